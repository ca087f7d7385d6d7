"""The rules of pruners.

What a pruner class may say about its examples, all optional class attributes:

- `example_parameters`: parameters with which the kit makes it, such as a few steps
- `example_model(seed) -> nn.Module`, `example_batches(seed) -> list of batches`, `example_loss(model, batch)`: static methods,
  for pruners of other models than the kit has; without the loss, `model(**batch)` must return one or have one as `.loss`
- `example_extras(model, seed) -> dict`: a static method, for what its `needs` name beside "batches" and "loss"
- `compare`: "layer", "row" or "global", the weights between which a sparsity is shared out; without it any of them will do
- `prunes = "difference"`: the masks are of the model's change, and outside them weights are as they were given; `prunes = "channels"`: the
  model becomes smaller, and the masks have the shapes that it had
- `budget_spent(result, budget) -> float`: for budgets that masks do not count ("flops", "bits"): what was spent, in the
  budget's own unit
- `exempt`: rules that the method must break, with the reason

The kit's batches have the column `tokens` for language models and `inputs` and `labels` for `nn.Sequential`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import hypothesis.strategies as st
import torch
from torch import Tensor, nn

from maskwright.errors import BackboneMismatch, BadBudget, BadModel, MaskwrightError
from maskwright.mask import Mask
from maskwright.protocols import Batch, Budget, PruneResult, PruneTask, SparsityReport
from maskwright.testing.backbones import LENGTH, VOCABULARY, backbone, seeded
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
from maskwright.toolkit.prunable import Weight, prunable_weights

KIND = "pruner"
OWN = "own"
"""The name of the model that a class's `example_model` makes."""

AMOUNTS: Mapping[str, tuple[Any, ...]] = {
    "sparsity": (0.5, 0.25, 0.75, 0.3, 0.0),
    "pattern": ("2:4", "1:4", "4:8"),
    "params": (0.5, 0.75),
    "flops": (0.5, 0.75),
    "bits": (2.0, 4.0),
    "layers": (1,),
}
"""The amounts of each kind of budget that the kit asks for, an ordinary one first."""


def _mlp(sizes: Sequence[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )


@attrs.frozen
class Pruning:
    """One call of a pruner: a model of the kit ("mlp" with layers of these sizes, "conv", "llama"), and how much may stay.

    `budget` is None for a pruner that takes none.
    """

    model: str = "mlp"
    sizes: tuple[int, ...] = (16, 8)
    budget: str | None = "sparsity"
    amount: Any = 0.5
    seed: int = 0
    dtype: str = "float32"

    def network(self, component: Any) -> nn.Module:
        """The model, with the weights of the seed; in training mode for odd seeds."""
        with seeded(self.seed):
            if self.model == OWN:
                made = component.example_model(self.seed)
            elif self.model == "llama":
                made = backbone("transformers-llama", self.seed)
            else:
                made = _convnet() if self.model == "conv" else _mlp(self.sizes)
        return made.to(getattr(torch, self.dtype)).train(self.seed % 2 == 1)

    def batches(self, component: Any) -> list[Batch]:
        """Two batches."""
        if hasattr(component, "example_batches"):
            return list(component.example_batches(self.seed))
        generator = torch.Generator().manual_seed(self.seed)
        return [self._batch(generator) for _ in range(2)]

    def _batch(self, generator: torch.Generator) -> Batch:
        if self.model == "llama":
            return {"tokens": torch.randint(0, VOCABULARY, (3, LENGTH), generator=generator)}
        shape, classes = ((8, 4, 4), 4) if self.model == "conv" else ((self.sizes[0],), self.sizes[-1])
        inputs = torch.randn(6, *shape, generator=generator).to(getattr(torch, self.dtype))
        return {"inputs": inputs, "labels": torch.randint(0, classes, (6,), generator=generator)}

    def task(self, component: Any, model: nn.Module, **other: Any) -> PruneTask:
        """What the pruner is given: the budget, and what it needs. `other` replaces arguments of the `PruneTask`."""
        needs = set(component.needs)
        extras: dict[str, Any] = {}
        if needs - {"batches", "loss"} and hasattr(component, "example_extras"):
            extras = dict(component.example_extras(model, self.seed))
        given: dict[str, Any] = {
            "budget": None if self.budget is None else Budget(**{self.budget: self.amount}),
            "batches": self.batches(component) if "batches" in needs else (),
            "loss": loss_of(component) if "loss" in needs else None,
            "generator": torch.Generator().manual_seed(self.seed),
            "extras": extras,
        }
        return PruneTask(**{**given, **other})


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """What the kit's models, or a model's own batch, give as one tensor."""
    if "tokens" in batch:
        return model(input_ids=batch["tokens"]).logits
    if "inputs" in batch:
        return model(batch["inputs"])
    answer = model(**batch)
    return answer if isinstance(answer, Tensor) else getattr(answer, "logits", answer[0])


def loss_of(component: Any) -> Callable[[nn.Module, Batch], Tensor]:
    """The scalar that stays low: cross-entropy of the next token, or of the labels."""
    return getattr(component, "example_loss", _loss)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    if "tokens" in batch:
        logits = outputs(model, batch)[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["tokens"][:, 1:].flatten())
    if "inputs" in batch:
        return nn.functional.cross_entropy(outputs(model, batch).float(), batch["labels"])
    answer = model(**batch)
    return answer if isinstance(answer, Tensor) else answer.loss


def models_of(component: Any) -> tuple[str, ...]:
    """Names of the models that the kit prunes with a component: an MLP, and one of each of its modalities."""
    if hasattr(component, "example_model"):
        return (OWN,)
    words = component.modalities or {"text", "image"}
    others = [name for word, name in (("text", "llama"), ("image", "conv")) if word in words]
    return ("mlp", *others)


def budgets_of(component: Any) -> list[tuple[str | None, Any]]:
    """(kind, amount) of the budgets that a component meets, an ordinary one of each kind first; (None, None) for one that takes none."""
    if not component.budgets:
        return [(None, None)]
    kinds = sorted(kind for kind in component.budgets if kind in AMOUNTS)
    every: list[list[tuple[str | None, Any]]] = [
        [(kind, amount) for amount in AMOUNTS[kind]] for kind in kinds
    ]
    return [pair for amounts in every for pair in amounts[:1]] + [
        pair for amounts in every for pair in amounts[1:]
    ]


def prunings(component: Any, *, kind: str | None = None) -> st.SearchStrategy[Pruning]:
    """Calls of a pruner with the budgets that it meets (only of one kind, where given)."""
    pairs = [pair for pair in budgets_of(component) if kind in (None, pair[0])]

    def call(pair: tuple[str | None, Any], **values: Any) -> Pruning:
        return Pruning(budget=pair[0], amount=pair[1], **values)

    return st.builds(
        call,
        pair=st.sampled_from(pairs) if pairs else st.nothing(),
        model=st.sampled_from(models_of(component)),
        sizes=st.sampled_from(((16, 8), (8, 24, 8), (24, 16, 8, 8))),
        seed=seeds,
    )


@attrs.frozen(eq=False)
class Outcome:
    """A model that was pruned, and what it was before."""

    example: Pruning
    model: nn.Module
    result: PruneResult
    state: dict[str, Tensor]
    parameters: dict[str, Tensor]
    weights: list[Weight]

    @property
    def same_form(self) -> bool:
        """Whether the model still has its parameters, of the same shapes."""
        now = {name: one.shape for name, one in self.model.named_parameters()}
        return now == {name: one.shape for name, one in self.parameters.items()}

    @property
    def masks(self) -> dict[str, Mask]:
        """The masks that name a parameter and fit it."""
        return {
            name: mask
            for name, mask in self.result.masks.items()
            if name in self.parameters and mask.shape == self.parameters[name].shape
        }


def pruned(component: Any, example: Pruning, model: nn.Module | None = None, **other: Any) -> Outcome:
    """Prune an example; what is raised is raised."""
    model = example.network(component) if model is None else model
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    parameters = {name: one.detach().clone() for name, one in model.named_parameters()}
    task = example.task(component, model, **other)
    before = copy.deepcopy(model)
    result = component.prune(model, task)
    # Should the result hold another model, that one is looked at, and one rule says so.
    model = result.model if isinstance(result, PruneResult) else model
    return Outcome(example, model, result, state, parameters, _weights(before, task))


def _weights(model: nn.Module, task: PruneTask) -> list[Weight]:
    try:
        return prunable_weights(model, task.prunable)
    except MaskwrightError:
        return []


def ready(component: Any, example: Pruning, model: nn.Module | None = None, **other: Any) -> Outcome:
    """As `pruned`; the example is left out when there is no result: other rules say why."""
    outcome = None
    try:
        outcome = pruned(component, example, model, **other)
    except Exception:
        unwanted(True)
    unwanted(outcome is None or not isinstance(outcome.result, PruneResult))
    assert outcome is not None
    return outcome


def _in_form(component: Any, example: Pruning) -> Outcome:
    """As `ready`, where the model kept its parameters."""
    outcome = ready(component, example)
    unwanted(not outcome.same_form)
    return outcome


# -- taking and refusing -------------------------------------------------------------------------------------


@rule(KIND)
def check_declared_budgets_are_accepted(component: Any) -> None:
    """`budgets` names kinds of budget, and an ordinary one of each kind is met on some model without an error.

    A pruner with no `budgets` runs without one.
    """
    unknown = set(component.budgets) - set(AMOUNTS)
    require(not unknown, f"`budgets` names {sorted(unknown)}; kinds are {', '.join(AMOUNTS)}.")
    missing = set(component.needs) - {"batches", "loss"}
    if missing and not hasattr(component, "example_extras"):
        not_tried(f"the kit has no {sorted(missing)}: give the class `example_extras(model, seed)`")
    for kind, amount in dict(reversed(budgets_of(component))).items():
        errors = []
        for name in models_of(component):
            try:
                pruned(component, Pruning(name, budget=kind, amount=amount))
            except Exception as error:
                errors.append(f"{name}: {type(error).__name__}: {error}")
        refused = len(errors) == len(models_of(component))
        what = "no budget" if kind is None else f"{kind} {amount}"
        require(not refused, f"{what} failed on every model: {'; '.join(errors)}")


@rule(KIND, cases=prunings, examples=8)
def check_result_is_the_pruned_model(component: Any, example: Pruning) -> None:
    """`prune` returns a `PruneResult` with the model that it was given and masks. It may refuse a model or an amount.

    A refusal is a `BadModel`, `BackboneMismatch` or `BadBudget`; anything else that is raised is an error.
    """
    model = example.network(component)
    try:
        result = component.prune(model, example.task(component, model))
    except (BadModel, BackboneMismatch, BadBudget):
        unwanted(True)
    require(isinstance(result, PruneResult), f"prune returned a {type(result).__name__}, not a PruneResult.")
    require(result.model is model, "the result's model is another than the one given; prune it in place.")
    require(bool(result.masks), "there are no masks; give one for each parameter that was pruned.")


@rule(KIND, applies=lambda component: len(set(AMOUNTS) - set(component.budgets)) > 0)
def check_other_budgets_are_refused(component: Any) -> None:
    """A kind of budget that is not in `budgets`, and none where there are some, raises `BadBudget` before anything is changed."""
    tried = _accepted_model(component)
    for kind in [one for one in AMOUNTS if one not in component.budgets]:
        example = attrs.evolve(tried, budget=kind, amount=AMOUNTS[kind][0])
        _require_refusal(component, example, BadBudget, f"the budget {kind} {example.amount}")
    if component.budgets:
        none = attrs.evolve(tried, budget=None, amount=None)
        _require_refusal(component, none, BadBudget, "a task without a budget")


@rule(KIND, applies=lambda component: "pattern" in component.budgets)
def check_patterns_that_do_not_fit_are_refused(component: Any) -> None:
    """N:M on a layer whose inputs M does not divide raises `BadBudget` before anything is changed."""
    if "mlp" not in models_of(component):
        not_tried("the class has a model of its own")
    if _accepted_model(component, kind="pattern").model != "mlp":
        not_tried("it does not prune the kit's MLP")
    example = Pruning(sizes=(16, 6, 8), budget="pattern", amount="2:4")
    _require_refusal(component, example, BadBudget, "2:4 on a layer of 6 inputs")


@rule(KIND, applies=lambda component: bool(component.needs))
def check_missing_needs_are_refused(component: Any) -> None:
    """A task that lacks something in `needs` raises one of maskwright's errors, which says so."""
    example = _accepted_model(component)
    for need in sorted(component.needs):
        without: dict[str, Any] = {need: () if need == "batches" else None}
        if need not in ("batches", "loss"):
            extras = example.task(component, example.network(component)).extras
            without = {"extras": {name: value for name, value in extras.items() if name != need}}
        _require_refusal(component, example, MaskwrightError, f"a task without {need!r}", **without)


def _accepted_model(component: Any, kind: str | None = None) -> Pruning:
    """An ordinary example that the component prunes, for rules about those that it must not."""
    for budget, amount in budgets_of(component):
        for name in models_of(component):
            example = Pruning(name, budget=budget, amount=amount)
            try:
                pruned(component, example)
            except Exception:
                continue
            if kind in (None, budget):
                return example
    not_tried("the component pruned none of the examples")


def _require_refusal(
    component: Any, example: Pruning, wanted: type[Exception], what: str, **other: Any
) -> None:
    model = example.network(component)
    task = example.task(component, model, **other)
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    error: Exception | None = None
    try:
        component.prune(model, task)
    except Exception as raised:
        error = raised
    found = "nothing was raised" if error is None else f"it raised {type(error).__name__}: {error}"
    require(isinstance(error, wanted), f"{what}: {found}, not {wanted.__name__}.")
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    require(not changed, f"{what} was refused after {changed[:3]} had been changed.")


@rule(KIND, applies=lambda component: bool(component.needs))
def check_every_need_is_used(component: Any) -> None:
    """What `needs` names is looked at: batches are read, the loss is computed, extras are taken."""
    example = _accepted_model(component)
    model = example.network(component)
    task = example.task(component, model)
    read: set[str] = set()
    watched = {
        "batches": _WatchedBatches(task.batches, read),
        "loss": _watched_loss(task.loss, read),
        "extras": _WatchedExtras(task.extras, read),
    }
    try:
        component.prune(model, attrs.evolve(task, **watched))
    except Exception as error:
        not_tried(f"{type(error).__name__}: {error}")
    idle = sorted(component.needs - read)
    require(not idle, f"{', '.join(map(repr, idle))} was never looked at; drop it from `needs`.")


class _WatchedBatches(Sequence[Batch]):
    def __init__(self, batches: Sequence[Batch], read: set[str]) -> None:
        self.batches, self.read = batches, read

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        self.read.add("batches")
        return self.batches[index]


class _WatchedExtras(Mapping[str, Any]):
    def __init__(self, extras: Mapping[str, Any], read: set[str]) -> None:
        self.extras, self.read = extras, read

    def __len__(self) -> int:
        return len(self.extras)

    def __iter__(self) -> Iterator[str]:
        return iter(self.extras)

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self.extras[name]


def _watched_loss(loss: Any, read: set[str]) -> Any:
    def watched(model: nn.Module, batch: Batch) -> Tensor:
        read.add("loss")
        return loss(model, batch)

    return watched if loss is not None else None


# -- the budget ----------------------------------------------------------------------------------------------


@rule(KIND, cases=prunings, examples=12, applies=lambda component: bool(component.budgets))
def check_budget_is_met(component: Any, example: Pruning) -> None:
    """Sparsity to the weight (within each layer, each row or over all), N:M in each group, no more layers or parameters."""
    outcome = ready(component, example)
    budget, result = Budget(**{str(example.budget): example.amount}), outcome.result
    unwanted(not outcome.masks)
    if hasattr(component, "budget_spent"):
        spent, allowed = float(component.budget_spent(result, budget)), float(example.amount)
        require(spent <= allowed * (1 + 1e-9), f"{budget}: {spent:.6g} were spent.")
    elif budget.kind == "sparsity":
        _require_sparsity(component, outcome, example.amount)
    elif budget.kind == "pattern":
        _require_pattern(outcome, *budget.n_of_m)
    elif budget.kind == "params":
        kept = sum(int(_keep(outcome, weight).sum()) for weight in outcome.weights)
        share = kept / max(1, sum(weight.parameter.numel() for weight in outcome.weights))
        require(0 < share <= example.amount, f"{budget}: {share:.6g} of the weights are kept.")
    elif budget.kind == "layers":
        left = _layers_left(outcome)
        require(left == example.amount, f"{budget}: {left} layers are left.")
    else:
        not_tried(f"the kit cannot count {budget.kind}: give the class `budget_spent(result, budget)`")


def _require_sparsity(component: Any, outcome: Outcome, sparsity: float) -> None:
    every = {weight.name: weight.as_matrix(_keep(outcome, weight)) for weight in outcome.weights}
    unwanted(not every)

    def met(removed: Tensor | int, total: int) -> bool:
        off = torch.as_tensor(removed, dtype=torch.float64) - sparsity * total
        return bool((off.abs() < 1 - 1e-9).all())

    removed = {name: int((~keep).sum()) for name, keep in every.items()}
    total = sum(keep.numel() for keep in every.values())
    ways = {
        "global": met(sum(removed.values()), total),
        "layer": all(met(removed[name], keep.numel()) for name, keep in every.items()),
        "row": all(met((~keep).sum(1), keep.shape[1]) for keep in every.values()),
    }
    asked = getattr(component, "compare", None)
    holds = ways[asked] if asked in ways else any(ways.values())
    first = next(iter(every.values()))
    require(
        holds,
        f"sparsity {sparsity} of {total} weights removes {sparsity * total:g}, in {len(every)} layers; "
        f"{sum(removed.values())} were removed: {', '.join(f'{name} {count}' for name, count in removed.items())}.",
        Mask(first),
    )


def _keep(outcome: Outcome, weight: Weight) -> Tensor:
    mask = outcome.masks.get(weight.name)
    return torch.ones_like(weight.parameter, dtype=torch.bool) if mask is None else mask.keep


def _require_pattern(outcome: Outcome, n: int, m: int) -> None:
    for weight in outcome.weights:
        keep = weight.as_matrix(_keep(outcome, weight))
        unwanted(keep.shape[1] % m != 0)
        counts = keep.reshape(-1, m).sum(1)
        wrong = int((counts != n).sum())
        require(
            wrong == 0,
            f"{wrong} of {len(counts)} groups of {m} in {weight.name} do not keep {n}.",
            Mask(keep),
        )


def _layers_left(outcome: Outcome) -> int:
    """Modules of the longest list of the model that are not masked as a whole."""
    lists = [(name, one) for name, one in outcome.model.named_modules() if isinstance(one, nn.ModuleList)]
    if not lists:
        not_tried("the model has no list of layers")
    name, longest = max(lists, key=lambda pair: len(pair[1]))
    if not outcome.same_form:
        return len(longest)
    gone = 0
    for index in range(len(longest)):
        mine = [mask for path, mask in outcome.masks.items() if path.startswith(f"{name}.{index}.")]
        gone += bool(mine) and not any(bool(mask.keep.any()) for mask in mine)
    return len(longest) - gone


# -- the masks -----------------------------------------------------------------------------------------------


@rule(KIND, cases=prunings, examples=8)
def check_masks_name_parameters(component: Any, example: Pruning) -> None:
    """Each mask is named after a parameter of the model and has its shape."""
    outcome = ready(component, example)
    for name, mask in outcome.result.masks.items():
        require(isinstance(mask, Mask), f"masks[{name!r}] is a {type(mask).__name__}, not a Mask.")
        require(name in outcome.parameters, f"the model has no parameter {name!r}.")
        shape, wanted = list(mask.shape), list(outcome.parameters[name].shape)
        require(shape == wanted, f"masks[{name!r}] is {shape}, the parameter {wanted}.")


@rule(KIND, cases=prunings, examples=8)
def check_report_counts_the_masks(component: Any, example: Pruning) -> None:
    """The report has a line for each mask, with what it keeps."""
    result = ready(component, example).result
    unwanted(not all(isinstance(mask, Mask) for mask in result.masks.values()))
    wanted = {layer.name: layer for layer in SparsityReport.of(result.masks).layers}
    found = {layer.name: layer for layer in result.report.layers}
    wrong = sorted(name for name in wanted.keys() | found if wanted.get(name) != found.get(name))
    require(not wrong, f"it is wrong about {', '.join(wrong[:3])}; SparsityReport.of(masks) is right.")


@rule(KIND, cases=prunings, examples=8)
def check_only_prunable_weights_are_pruned(component: Any, example: Pruning) -> None:
    """Masks are of weights that the task's rule names, and of no others: with the default, and with a rule of one layer."""
    outcome = ready(component, example)
    unwanted(not outcome.weights)
    allowed = {weight.name for weight in outcome.weights}
    others = sorted(set(outcome.masks) - allowed)
    require(not others, f"{', '.join(others[:3])} may not be pruned; the rule names {sorted(allowed)[:4]}.")
    first = outcome.weights[-1].name
    narrow = ready(component, example, prunable=lambda model: {first: model.get_parameter(first)})
    others = sorted(set(narrow.masks) - {first})
    require(not others, f"the task's rule names only {first}, and {others[:3]} was pruned.")


# -- the weights ---------------------------------------------------------------------------------------------


@rule(KIND, cases=prunings, examples=10)
def check_outside_the_mask_is_zero(component: Any, example: Pruning) -> None:
    """Weights that the mask hides are exactly zero; where `prunes` is "difference", exactly as they were given."""
    outcome = _in_form(component, example)
    wrong = "zero" if _base(component, outcome) is None else "as they were"
    for name, count in _left(component, outcome).items():
        require(False, f"{count} hidden weights of {name} are not {wrong}.", outcome.masks[name])


def _base(component: Any, outcome: Outcome) -> dict[str, Tensor] | None:
    """What hidden weights must be, where that is not zero."""
    return outcome.parameters if getattr(component, "prunes", "weights") == "difference" else None


def _left(component: Any, outcome: Outcome) -> dict[str, int]:
    """How many hidden weights are not what they must be, by name, where there are any."""
    base = _base(component, outcome)
    counts = {
        name: int(
            ((outcome.model.get_parameter(name) != (0 if base is None else base[name])) & ~mask.keep).sum()
        )
        for name, mask in outcome.masks.items()
    }
    return {name: count for name, count in counts.items() if count}


@rule(
    KIND,
    cases=prunings,
    examples=10,
    applies=lambda component: not getattr(component, "changes_weights", False),
)
def check_inside_is_untouched(component: Any, example: Pruning) -> None:
    """Weights that the mask keeps are as they were, bit for bit (unless `changes_weights`)."""
    outcome = _in_form(component, example)
    for name, mask in outcome.masks.items():
        moved = (outcome.model.get_parameter(name) != outcome.parameters[name]) & mask.keep
        require(not moved.any(), f"{int(moved.sum())} kept weights of {name} changed.", mask)


@rule(KIND, cases=prunings, examples=10)
def check_the_rest_is_untouched(component: Any, example: Pruning) -> None:
    """Parameters without a mask, and buffers, are as they were: embeddings, norms and their statistics, biases, the head."""
    outcome = _in_form(component, example)
    unwanted(len(outcome.masks) < len(outcome.result.masks))
    now = outcome.model.state_dict()
    kept = [name for name in outcome.state if name in now and name not in outcome.masks]
    # A tied parameter has two names.
    shared = {
        name
        for name, one in outcome.model.named_parameters(remove_duplicate=False)
        if any(one is outcome.model.get_parameter(masked) for masked in outcome.masks)
    }
    moved = [name for name in kept if name not in shared and not torch.equal(outcome.state[name], now[name])]
    require(not moved, f"{', '.join(moved[:3])} changed and has no mask.")


@rule(KIND, cases=prunings, examples=8)
def check_model_is_left_clean(component: Any, example: Pruning) -> None:
    """No hooks, gradients, wrappers or other modes are left behind: training and requires_grad are as they were."""
    model = example.network(component)
    modes = {name: module.training for name, module in model.named_modules()}
    asked = {name: one.requires_grad for name, one in model.named_parameters()}
    names, hooks = set(model.state_dict()), _hooks(model)
    outcome = ready(component, example, model)
    if outcome.same_form:
        extra = sorted(names ^ set(model.state_dict()))
        require(not extra, f"the model's state has other names: {', '.join(extra[:3])}.")
    for name, one in model.named_parameters():
        require(one.grad is None, f"{name} is left with a gradient.")
        same = asked.get(name, one.requires_grad) == one.requires_grad
        require(same, f"requires_grad of {name} was {asked.get(name)} and is {one.requires_grad}.")
    for name, module in model.named_modules():
        same = modes.get(name, module.training) == module.training
        word = "training" if module.training else "evaluation"
        require(same, f"{name or 'the model'} is left in {word} mode.")
    require(_hooks(model) <= hooks, "hooks are left on the model; remove them.")


def _hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@rule(KIND, cases=prunings, examples=8)
def check_model_still_runs(component: Any, example: Pruning) -> None:
    """The pruned model gives finite outputs."""
    outcome = ready(component, example)
    for batch in example.batches(component):
        with torch.no_grad():
            answer = outputs(outcome.model.eval(), batch)
        require(answer.isfinite().all(), "the pruned model's outputs are not finite.")


@rule(KIND, cases=prunings, examples=8)
def check_state_dict_round_trips(component: Any, example: Pruning) -> None:
    """The pruned model's `state_dict` loads into a fresh model, which then gives the same outputs."""
    outcome = ready(component, example)
    fresh = attrs.evolve(example, seed=example.seed + 1).network(component)
    if not outcome.same_form:
        config = getattr(outcome.model, "config", None)
        unwanted(config is None)
        with seeded(0):
            fresh = type(outcome.model)(config)
    state = {name: value.clone() for name, value in outcome.model.state_dict().items()}
    try:
        fresh.load_state_dict(state)
    except Exception as error:
        require(False, f"{type(error).__name__}: {error}")
    batch = example.batches(component)[0]
    try:
        with torch.no_grad():
            here, there = (outputs(model.eval(), batch) for model in (outcome.model, fresh))
    except Exception:
        unwanted(True)
    same = torch.allclose(here, there, rtol=1e-5, atol=1e-6, equal_nan=True)
    require(same, "a fresh model with its state gives other outputs.")


@rule(KIND, cases=prunings, examples=6)
def check_dtype_is_kept(component: Any, example: Pruning) -> None:
    """Models of 16 bits stay so, with zeros outside the mask and finite outputs."""
    unwanted(not _sound(component, ready(component, example)))
    for dtype in ("bfloat16", "float16"):
        half = attrs.evolve(example, dtype=dtype)
        try:
            outcome = pruned(component, half)
        except Exception as error:
            require(False, f"a model of {dtype}: {type(error).__name__}: {error}")
        for name, one in outcome.model.named_parameters():
            wanted = outcome.parameters[name].dtype if name in outcome.parameters else one.dtype
            require(one.dtype == wanted, f"{name} was {wanted} and is {one.dtype}.")
            require(one.isfinite().all(), f"{name} is not finite in {dtype}.")
        for name, count in (_left(component, outcome) if outcome.same_form else {}).items():
            require(False, f"{count} hidden weights of {name} are not what they must be in {dtype}.")


def _sound(component: Any, outcome: Outcome) -> bool:
    """Whether hidden weights are what they must be and all are finite."""
    finite = all(bool(one.isfinite().all()) for one in outcome.model.parameters())
    return finite and not (outcome.same_form and _left(component, outcome))


# -- randomness ----------------------------------------------------------------------------------------------


@rule(KIND, cases=prunings, examples=8)
def check_same_generator_same_masks(component: Any, example: Pruning) -> None:
    """The generator's state decides: the same masks and weights again, whatever was drawn in between."""
    first = ready(component, example)
    ready(component, example, generator=torch.Generator().manual_seed(example.seed + 1))
    second = ready(component, example)
    unwanted(not all(isinstance(mask, Mask) for mask in first.result.masks.values()))
    require(set(first.masks) == set(second.masks), "the same generator state masked other parameters.")
    for name, mask in first.masks.items():
        other = second.masks[name]
        require(
            torch.equal(mask.keep, other.keep),
            f"the same generator state gave two masks of {name}.",
            mask,
            other,
        )
    one, two = first.model.state_dict(), second.model.state_dict()
    moved = [name for name in one if name in two and not torch.equal(one[name], two[name])]
    require(not moved, f"the same generator state gave other weights: {', '.join(moved[:3])}.")


@rule(KIND, cases=prunings, examples=8)
def check_global_random_state_is_untouched(component: Any, example: Pruning) -> None:
    """Pruning moves no global generator: torch's, numpy's or Python's."""
    model = example.network(component)
    task = example.task(component, model)
    before = global_generators()
    try:
        component.prune(model, task)
    except Exception:
        unwanted(True)
    require_untouched(before, "prune")


RULES: tuple[Rule, ...] = (
    check_declared_budgets_are_accepted,
    check_result_is_the_pruned_model,
    check_other_budgets_are_refused,
    check_patterns_that_do_not_fit_are_refused,
    check_missing_needs_are_refused,
    check_every_need_is_used,
    check_budget_is_met,
    check_masks_name_parameters,
    check_report_counts_the_masks,
    check_only_prunable_weights_are_pruned,
    check_outside_the_mask_is_zero,
    check_inside_is_untouched,
    check_the_rest_is_untouched,
    check_model_is_left_clean,
    check_model_still_runs,
    check_state_dict_round_trips,
    check_dtype_is_kept,
    check_same_generator_same_masks,
    check_global_random_state_is_untouched,
    check_component_is_frozen,
)
