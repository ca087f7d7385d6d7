"""The rules of samplers.

What a sampler class may say about its examples, all optional class attributes:

- `example_parameters`: parameters with which the kit makes it
- `example_denoiser(seed) -> callable`, `example_request(rows, seed) -> request`: static methods, for domains whose values
  are no tokens ("continuous"); the rules about tokens are left out for these
- `exempt`: rules that the method must break, with the reason
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import attrs
import hypothesis.strategies as st
import torch
from torch import Tensor

from maskwright.errors import MaskwrightError
from maskwright.mask import Mask
from maskwright.protocols import SampleRequest, Samples
from maskwright.testing.rules import (
    Rule,
    check_component_is_frozen,
    global_generators,
    not_tried,
    require,
    require_untouched,
    rule,
    unwanted,
)
from maskwright.testing.strategies import seeds

KIND = "sampler"
CLASSES = 8
"""Logits that the kit's denoiser gives at each position."""

_LIKES_MASKS = 5.0
_CERTAIN = 100.0


@attrs.frozen
class Sampling:
    """One call of a sampler.

    `prompt` is "empty", "some" (any places), "first" (one token), "prefix" (as many in each row), "uneven" (prefixes) or
    "full". A `mask_token` of 8 has no logit.
    """

    rows: int = 2
    length: int = 8
    prompt: str = "empty"
    mask_token: int = 7
    steps: int | None = None
    timed: bool = False
    seed: int = 0

    def tokens(self, seed: int | None = None) -> Tensor:
        """int64 [rows, length]; `seed` gives other tokens at the same places."""
        content = torch.Generator().manual_seed(self.seed + 1 if seed is None else seed)
        tokens = torch.randint(0, CLASSES - 1, (self.rows, self.length), generator=content)
        tokens += tokens >= self.mask_token
        return torch.where(self._fixed(), tokens, self.mask_token)

    @property
    def missing(self) -> Tensor:
        """bool [length + 1]: which of `length` inputs do not exist, in the domain "pointer"; the end, which is last, does."""
        here = torch.arange(self.length + 1)
        return (here >= self.length - self.seed % 3) & (here < self.length)

    def permutation(self, seed: int | None = None) -> Tensor:
        """int64 [rows, length]: the positions of the inputs that exist, each once, and then the end."""
        content = torch.Generator().manual_seed(self.seed + 1 if seed is None else seed)
        shuffled = torch.rand(self.rows, self.length, generator=content)
        order = shuffled.masked_fill(self.missing[:-1], 2.0).argsort(1)
        return order.masked_fill(self.missing[order], self.length)

    def positions(self, seed: int | None = None) -> Tensor:
        """As `tokens`, in the domain "pointer"."""
        return torch.where(self._fixed(), self.permutation(seed), self.mask_token)

    def _fixed(self) -> Tensor:
        places = torch.Generator().manual_seed(self.seed)
        here = torch.arange(self.length)
        uneven = torch.randint(1, self.length, (self.rows, 1), generator=places)
        return {
            "empty": here < 0,
            "first": here < 1,
            "prefix": here < uneven[0],
            "uneven": here < uneven,
            "full": here >= 0,
            "some": torch.rand(self.rows, self.length, generator=places) < 0.4,
        }[self.prompt]

    def request(self, tokens: Tensor | None = None, seed: int | None = None) -> SampleRequest:
        """The request, with a generator of its own."""
        return SampleRequest(
            tokens=self.tokens() if tokens is None else tokens,
            mask_token=self.mask_token,
            generator=torch.Generator().manual_seed(self.seed if seed is None else seed),
            steps=self.steps,
            time_conditioned=self.timed,
        )


PROMPTS = {
    "discrete": ("empty", "some", "first"),
    "autoregressive": ("first", "prefix", "uneven"),
    "pointer": ("empty", "first", "prefix", "uneven"),
}
"""The prompts of each domain of tokens, or of positions, that leave something to sample."""


def samplings(
    component: Any, *, prompts: tuple[str, ...] = (), least: int = 1
) -> st.SearchStrategy[Sampling]:
    """Calls of a sampler with prompts of its domain (only `prompts`, where given), and at least `least` rows."""
    kinds = PROMPTS.get(component.domain, ("empty",))
    points = component.domain == "pointer"
    return st.builds(
        Sampling,
        rows=st.integers(least, least + 2),
        length=st.integers(3, 9),
        prompt=st.sampled_from([kind for kind in kinds if kind in prompts] or prompts or kinds),
        mask_token=st.just(-1) if points else st.sampled_from((CLASSES - 1, 0, CLASSES)),
        steps=st.sampled_from((None, 3, 1, 9, 20)),
        timed=st.just(False) if points else st.booleans(),
        seed=seeds,
    )


class Table:
    """A denoiser: logits [B, L, 8] from random tables, which depend on the other tokens of the row and on the position.

    It likes the mask token better than any other, where that has a logit. In the autoregressive domain only the tokens before
    a position count. With `target` [B, L] it is certain of those tokens instead.
    """

    def __init__(self, example: Sampling, *, causal: bool, target: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(example.seed + 2)
        self.content = torch.randn(CLASSES + 1, CLASSES, generator=generator)
        self.place = torch.randn(example.length, CLASSES, generator=generator)
        self.example, self.causal, self.target = example, causal, target

    def __call__(self, tokens: Tensor, time: Tensor | None = None) -> Tensor:
        seen = self.content[tokens]
        before = seen.cumsum(1) - seen
        context = before if self.causal else before + 0.5 * (seen.sum(1, keepdim=True) - before - seen)
        logits = torch.tanh(context) * 2 + self.place[: tokens.shape[1]]
        if self.target is not None:
            certain = torch.nn.functional.one_hot(self.target[:, : tokens.shape[1]], CLASSES)
            return _CERTAIN * certain.float()
        if self.example.mask_token < CLASSES:
            logits[..., self.example.mask_token] = _LIKES_MASKS
        return logits


class Pointers:
    """A denoiser of the domain "pointer": scores [B, K, length + 1] from a random table of each row, by what was chosen.

    Inputs that are missing have -inf. With `target` [B, length] it is certain of those positions instead.
    """

    def __init__(self, example: Sampling, *, target: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(example.seed + 2)
        ids = example.length + 1
        self.last = torch.randn(example.rows, ids + 1, ids, generator=generator)
        self.before = torch.randn(example.rows, ids, ids, generator=generator)
        self.example, self.target = example, target

    def __call__(self, chosen: Tensor) -> Tensor:
        rows, candidates, length = chosen.shape
        ids = self.example.length + 1
        if self.target is not None:
            scores = _CERTAIN * torch.nn.functional.one_hot(self.target[:, length], ids).float()
            scores = scores[:, None].repeat(1, candidates, 1)
        else:
            row = torch.arange(rows)[:, None]
            last = chosen[..., -1] if length else torch.full((rows, candidates), ids)
            scores = 2 * torch.tanh(self.before[row[..., None], chosen].sum(2)) + self.last[row, last]
        return scores.masked_fill(self.example.missing, -torch.inf)


class Watched:
    """A denoiser whose calls are written down: the tokens it was given, and the times."""

    def __init__(self, denoiser: Callable[..., Any]) -> None:
        self.denoiser = denoiser
        self.given: list[Any] = []
        self.times: list[Any] = []

    def __call__(self, x: Any, *others: Any, **named: Any) -> Any:
        self.given.append(x.clone() if isinstance(x, Tensor) else x)
        self.times.append(named.get("time"))
        return self.denoiser(x, *others, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)


@attrs.frozen(eq=False)
class Outcome:
    """What a sampler made of a request."""

    request: Any
    samples: Samples
    denoiser: Watched

    @property
    def prompt(self) -> Mask:
        """What the prompt fixed."""
        return self.request.prompt


def sampled(component: Any, example: Sampling, request: Any = None, target: Tensor | None = None) -> Outcome:
    """Run the sampler on an example; what it raises is raised."""
    if hasattr(component, "example_request"):
        request = component.example_request(example.rows, example.seed) if request is None else request
        denoiser = component.example_denoiser(example.seed)
    elif component.domain == "pointer":
        request = example.request(example.positions()) if request is None else request
        denoiser = Pointers(example, target=target)
    else:
        request = example.request() if request is None else request
        denoiser = Table(example, causal=component.domain == "autoregressive", target=target)
    watched = Watched(denoiser)
    asked = copy.copy(request)
    if isinstance(getattr(request, "tokens", None), Tensor):
        # What was asked for, should the sampler write into the request.
        asked = attrs.evolve(request, tokens=request.tokens.clone())
    return Outcome(asked, component.sample(watched, request), watched)


def ready(component: Any, example: Sampling, **other: Any) -> Outcome:
    """As `sampled`; the example is left out when there is no outcome: another rule says why."""
    outcome = None
    try:
        outcome = sampled(component, example, **other)
    except Exception:
        unwanted(True)
    unwanted(outcome is None or not isinstance(outcome.samples.values, Tensor))
    assert outcome is not None
    return outcome


def _readable(component: Any, example: Sampling, **other: Any) -> Outcome:
    """As `ready`, with values of the right shape."""
    outcome = ready(component, example, **other)
    unwanted(outcome.samples.values.shape != outcome.request.tokens.shape)
    return outcome


def _of_tokens(component: Any) -> bool:
    return component.domain in PROMPTS and not hasattr(component, "example_request")


def _points(component: Any) -> bool:
    return _of_tokens(component) and component.domain == "pointer"


def _prompts(component: Any, example: Sampling, seed: int | None = None) -> Tensor:
    """The tokens of a request, or the positions."""
    return example.positions(seed) if _points(component) else example.tokens(seed)


def _classes(component: Any, example: Sampling) -> int:
    return example.length + 1 if _points(component) else CLASSES


def _tried(component: Any) -> bool:
    return _of_tokens(component) or hasattr(component, "example_request")


# -- every domain --------------------------------------------------------------------------------------------


@rule(KIND, cases=samplings)
def check_requests_are_answered(component: Any, example: Sampling) -> None:
    """`sample` returns `Samples`: as many rows as were asked for, finite. It may refuse an odd prompt in its own words.

    For tokens the values are int64 [B, L].
    """
    if not _tried(component):
        not_tried(
            f"the kit has no {component.domain!r} denoiser: give the class `example_denoiser` and `example_request`"
        )
    try:
        outcome = sampled(component, example)
    except MaskwrightError as refusal:
        ordinary = example.prompt in ("empty", "some", "prefix") or not _of_tokens(component)
        require(not ordinary, f"an ordinary request was refused: {refusal}")
        return
    samples = outcome.samples
    require(isinstance(samples, Samples), f"sample returned a {type(samples).__name__}, not Samples.")
    values = samples.values
    require(isinstance(values, Tensor), f"the values are a {type(values).__name__}, not a tensor.")
    if _of_tokens(component):
        shape, wanted = list(values.shape), list(outcome.request.tokens.shape)
        require(values.dtype == torch.int64, f"the values are {values.dtype}, not int64.", outcome.prompt)
        require(shape == wanted, f"the values are {shape}, not {wanted}.", outcome.prompt)
    else:
        require(values.isfinite().all(), "some values are not finite.")


@rule(KIND, cases=samplings, applies=_tried)
def check_evaluations_are_the_calls(component: Any, example: Sampling) -> None:
    """`evaluations` is the number of times that the denoiser was called."""
    outcome = ready(component, example)
    said, counted = outcome.samples.evaluations, len(outcome.denoiser.given)
    require(said == counted, f"`evaluations` says {said}, the denoiser was called {counted} times.")


@rule(KIND, cases=samplings, applies=_tried)
def check_same_generator_same_samples(component: Any, example: Sampling) -> None:
    """The generator's state decides: the same samples again, whatever was drawn in between."""
    first = ready(component, example).samples
    ready(component, attrs.evolve(example, seed=example.seed + 1))
    second = ready(component, example).samples
    same = first.values.shape == second.values.shape and torch.equal(first.values, second.values)
    require(same, f"the same generator state gave {_spelled(first.values)}, then {_spelled(second.values)}.")


@rule(KIND, cases=samplings, applies=_tried)
def check_global_random_state_is_untouched(component: Any, example: Sampling) -> None:
    """Sampling moves no global generator: torch's, numpy's or Python's."""
    before = global_generators()
    ready(component, example)
    require_untouched(before, "sample")


@rule(KIND, cases=samplings, applies=_tried)
def check_request_is_left_alone(component: Any, example: Sampling) -> None:
    """The tensors of the request are not written to."""
    request = (
        component.example_request(example.rows, example.seed)
        if hasattr(component, "example_request")
        else example.request(_prompts(component, example))
    )
    tensors = {name: value for name, value in _fields(request).items() if isinstance(value, Tensor)}
    before = copy.deepcopy(tensors)
    ready(component, example, request=request)
    changed = [name for name, value in tensors.items() if not torch.equal(value, before[name])]
    require(not changed, f"it changed the request's {', '.join(changed)}; work on a copy.")


def _fields(request: Any) -> dict[str, Any]:
    return attrs.asdict(request, recurse=False) if attrs.has(type(request)) else dict(vars(request))


# -- tokens --------------------------------------------------------------------------------------------------


@rule(KIND, cases=samplings, applies=_of_tokens)
def check_prompt_is_kept(component: Any, example: Sampling) -> None:
    """The tokens of the prompt come back as they were."""
    outcome = _readable(component, example)
    tokens, values = outcome.request.tokens, outcome.samples.values
    kept = torch.where(outcome.prompt.keep, values == tokens, True)
    require(kept.all(), f"the prompt {_spelled(tokens)} became {_spelled(values)}.", outcome.prompt)


@rule(KIND, cases=samplings, applies=_of_tokens)
def check_no_mask_token_is_left(component: Any, example: Sampling) -> None:
    """Every masked position is filled, even where the denoiser likes the mask token best."""
    outcome = _readable(component, example)
    left = outcome.samples.values == example.mask_token
    require(
        not left.any(),
        f"{int(left.sum())} mask tokens ({example.mask_token}) are left in {_spelled(outcome.samples.values)}.",
        outcome.prompt,
    )


@rule(KIND, cases=samplings, applies=_of_tokens)
def check_values_are_in_the_vocabulary(component: Any, example: Sampling) -> None:
    """Every value that was sampled is a token that has a logit."""
    outcome = _readable(component, example)
    values = outcome.samples.values
    # The mask token and the prompt are what other rules are about.
    classes = _classes(component, example)
    outside = ((values < 0) | (values >= classes)) & ~outcome.prompt.keep & (values != example.mask_token)
    require(not outside.any(), f"tokens are 0 to {classes - 1}, got {_spelled(values)}.", outcome.prompt)


@rule(KIND, cases=samplings, applies=_of_tokens)
def check_order_is_true(component: Any, example: Sampling) -> None:
    """`order`, where given, is -1 at the prompt, 0 or more elsewhere, and in keeping with what the denoiser was shown."""
    outcome = ready(component, example)
    order = outcome.samples.order
    if order is None:
        not_tried("the sampler gives no order")
    prompt, tokens = outcome.prompt, outcome.request.tokens
    shape = list(order.shape)
    require(shape == list(tokens.shape), f"the order is {shape}, not {list(tokens.shape)}.", prompt)
    require(order.dtype == torch.int64, f"the order is {order.dtype}, not int64.", prompt)
    unwanted(outcome.samples.values.shape != tokens.shape)
    # A position at which a mask token is left has no time.
    mine = ~prompt.keep & (outcome.samples.values != example.mask_token)
    fits = (order == -1) | ~prompt.keep
    fits &= (order >= 0) | ~mine
    require(fits.all(), f"-1 is for the prompt, 0 or more for the rest; got {order.tolist()}.", prompt)
    seen = _first_seen(outcome)
    earlier = seen[:, :, None] < seen[:, None, :]
    both = mine[:, :, None] & mine[:, None, :]
    wrong = (earlier & both & (order[:, :, None] >= order[:, None, :])).nonzero()
    if len(wrong):
        row, first, second = wrong[0].tolist()
        require(
            False,
            f"in row {row} the denoiser saw position {first} filled before {second}, but the order says "
            f"{order[row].tolist()}.",
            prompt,
        )


def _first_seen(outcome: Outcome) -> Tensor:
    """int64 [B, L]: the first call from which on a position was filled in what the denoiser was given."""
    request = outcome.request
    calls = len(outcome.denoiser.given)
    seen = torch.full(request.tokens.shape, calls)
    for call in reversed(range(calls)):
        given = outcome.denoiser.given[call]
        if (
            not isinstance(given, Tensor)
            or given.ndim != 2
            or given.shape[0] != len(seen)
            or given.shape[1] > seen.shape[1]
        ):
            continue
        filled = torch.zeros_like(seen, dtype=torch.bool)
        filled[:, : given.shape[1]] = given != request.mask_token
        seen = torch.where(filled & (seen == call + 1), call, seen)
    return seen


def _prompted(component: Any) -> Any:
    return samplings(component, prompts=("some", "first", "prefix", "uneven"), least=2)


@rule(KIND, cases=_prompted, applies=_of_tokens)
def check_rows_are_independent(component: Any, example: Sampling) -> None:
    """A row's values depend on its own prompt only, and rows are not copies of one random row."""
    before = _readable(component, example)
    again = _readable(component, example)
    unwanted(not torch.equal(before.samples.values, again.samples.values))
    tokens = before.request.tokens
    row = example.seed % example.rows
    mixed = _prompts(component, example, example.seed + 1000)
    mixed[row] = tokens[row]
    after = _readable(component, example, request=example.request(mixed))
    one, two = before.samples.values[row], after.samples.values[row]
    same = torch.equal(one, two)
    # A sampler that draws from elsewhere may have repeated itself by chance; that is for another rule to say.
    unwanted(not same and not _repeats(component, example, before.samples.values))
    require(
        same,
        f"row {row} was {one.tolist()}, and {two.tolist()} when the prompts of the other rows changed.",
        before.prompt,
    )
    alike = tokens[:1].expand_as(tokens).contiguous()
    several = [
        _readable(component, example, request=example.request(alike, example.seed + more)).samples.values
        for more in range(8)
    ]
    random = any(not torch.equal(several[0], other) for other in several[1:])
    copies = all(bool((one == one[:1]).all()) for one in several)
    require(not (random and copies), "all rows are copies of one random row.", before.prompt)


def _repeats(component: Any, example: Sampling, values: Tensor, times: int = 12) -> bool:
    """Whether the same request gives the same values, again and again."""
    return all(torch.equal(_readable(component, example).samples.values, values) for _ in range(times))


@rule(KIND, cases=samplings, applies=_of_tokens)
def check_what_is_certain_is_sampled(component: Any, example: Sampling) -> None:
    """Where the denoiser is certain of a token, that token is sampled."""
    target = _certainty(component, example)
    outcome = _readable(component, example, target=target)
    values, hidden = outcome.samples.values, ~outcome.prompt.keep
    # Mask tokens, and values that are no tokens, are what other rules are about.
    real = (values >= 0) & (values < _classes(component, example)) & (values != example.mask_token)
    wrong = hidden & real & (values != target)
    require(
        not wrong.any(),
        f"certain were {_spelled(target)}, sampled were {_spelled(values)}.",
        outcome.prompt,
    )


def _certainty(component: Any, example: Sampling) -> Tensor:
    """What the denoiser is certain of: any tokens; of positions, what the prompt begins with."""
    if _points(component):
        return example.permutation()
    generator = torch.Generator().manual_seed(example.seed)
    target = torch.randint(0, CLASSES - 1, (example.rows, example.length), generator=generator)
    return target + (target >= example.mask_token)


@rule(KIND, cases=samplings, applies=_points)
def check_missing_inputs_are_not_pointed_at(component: Any, example: Sampling) -> None:
    """An input whose score is -inf is never chosen, and after the end there is nothing but the end."""
    outcome = _readable(component, example)
    values, mine = outcome.samples.values, ~outcome.prompt.keep
    # Values that are no positions are what another rule is about.
    real = mine & (values >= 0) & (values <= example.length)
    wrong = real & example.missing[values.clamp(0, example.length)]
    missing = example.missing.nonzero().flatten().tolist()
    require(not wrong.any(), f"the inputs {missing} do not exist, got {_spelled(values)}.", outcome.prompt)
    ended = (values == example.length).cumsum(1) > 0
    late = ended & real & (values != example.length)
    require(
        not late.any(), f"after the end, {example.length}, came more: {_spelled(values)}.", outcome.prompt
    )


def _full(component: Any) -> Any:
    return samplings(component, prompts=("full",))


@rule(KIND, cases=_full, examples=10, applies=_of_tokens)
def check_full_prompts_come_back(component: Any, example: Sampling) -> None:
    """A request with nothing to sample is answered with its prompt, and no error."""
    unwanted(not _answers(component, attrs.evolve(example, prompt=PROMPTS[component.domain][0])))
    outcome = sampled(component, example)
    unwanted(outcome.samples.values.shape != outcome.request.tokens.shape)
    same = torch.equal(outcome.samples.values, outcome.request.tokens)
    require(same, f"{_spelled(outcome.request.tokens)} became {_spelled(outcome.samples.values)}.")


def _answers(component: Any, example: Sampling) -> bool:
    try:
        return isinstance(sampled(component, example).samples.values, Tensor)
    except Exception:
        return False


@rule(KIND, cases=samplings, applies=lambda component: _of_tokens(component) and not _points(component))
def check_time_is_given_when_asked_for(component: Any, example: Sampling) -> None:
    """A time-conditioned denoiser is given `time` [B] in [0, 1], never rising; any other is given none."""
    times = ready(component, example).denoiser.times
    if not example.timed:
        require(all(time is None for time in times), "`time` was given to a denoiser that wants none.")
        return
    last = torch.full((example.rows,), math.inf)
    for time in times:
        fits = isinstance(time, Tensor) and list(time.shape) == [example.rows]
        require(fits, f"`time` must be a tensor [{example.rows}], got {_shape(time)}.")
        assert isinstance(time, Tensor)
        inside = bool(((time >= 0) & (time <= 1)).all())
        require(inside, f"time {time.tolist()} is not in [0, 1].")
        require((time <= last).all(), f"time rose from {last.tolist()} to {time.tolist()}.")
        last = time


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else repr(value)


def _spelled(tokens: Tensor) -> str:
    """The first rows as text."""
    rows = tokens[:3].tolist() if tokens.ndim else [tokens.item()]
    return ", ".join(map(str, rows)) + (" …" if tokens.ndim and len(tokens) > 3 else "")


RULES: tuple[Rule, ...] = (
    check_requests_are_answered,
    check_evaluations_are_the_calls,
    check_same_generator_same_samples,
    check_global_random_state_is_untouched,
    check_request_is_left_alone,
    check_prompt_is_kept,
    check_no_mask_token_is_left,
    check_values_are_in_the_vocabulary,
    check_order_is_true,
    check_rows_are_independent,
    check_what_is_certain_is_sampled,
    check_missing_inputs_are_not_pointed_at,
    check_full_prompts_come_back,
    check_time_is_given_when_asked_for,
    check_component_is_frozen,
)
