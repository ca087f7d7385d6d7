"""Beam search over positions, with what may not be pointed at masked."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from maskwright import Mask, SampleRequest, Samples, setting
from maskwright.errors import BackboneMismatch, BadData

Rule = Callable[[Tensor, Tensor, int], Mask]
"""(chosen int64 [..., i], exists bool [..., n + 1], room) → what may come next, [..., n + 1]; n is the end.

`room` is how many places there are from this one on.
"""


def anything(chosen: Tensor, exists: Tensor, room: int) -> Mask:
    """Any input that exists, or the end: nothing is masked."""
    return Mask(exists)


def unvisited(chosen: Tensor, exists: Tensor, room: int, least: int = 1) -> Mask:
    """Inputs that were not chosen before; the end once there are `least` of them, or where nothing else is left."""
    keep = exists.clone()
    keep.scatter_(-1, chosen, False)
    left = keep[..., :-1].any(-1)
    keep[..., -1] = ~left | (exists[..., -1] & (chosen.shape[-1] >= least))
    return Mask(keep)


def polygon(chosen: Tensor, exists: Tensor, room: int) -> Mask:
    """Different corners, three at least."""
    return unvisited(chosen, exists, room, least=3)


def tour(chosen: Tensor, exists: Tensor, room: int) -> Mask:
    """Each input once: the end is there only when all were visited (section 3.3: only valid tours are considered)."""
    return unvisited(chosen, exists, room, least=exists.shape[-1])


def triangles(chosen: Tensor, exists: Tensor, room: int) -> Mask:
    """Triples i < j < k, none of them twice; the end only between two triples, and after the first one.

    A corner is there only where a triple that was not taken yet can still be completed from it, in the room that is left.
    """
    n = exists.shape[-1] - 1
    place = torch.arange(n, device=chosen.device)
    real = exists[..., :-1]
    above = real.flip(-1).cumsum(-1).flip(-1) - real.long()  # inputs that exist behind each position
    whole, begun = divmod(chosen.shape[-1], 3)
    taken = chosen[..., : 3 * whole].unflatten(-1, (whole, 3))
    none = torch.zeros_like(exists[..., -1:])
    if begun == 0:
        used = _counted(taken[..., 0], torch.ones_like(taken[..., 0]), n)
        keep = real & (used < above * (above - 1) // 2) & (room >= 3)
        end = ~keep.any(-1, keepdim=True) | (exists[..., -1:] if whole else none)
        return Mask(torch.cat([keep, end], dim=-1))
    previous = chosen[..., -1:]
    behind = real & (place > previous)
    if begun == 1:
        same = taken[..., 0] == previous
        keep = behind & (_counted(taken[..., 1], same.long(), n) < above)
    else:
        same = (taken[..., 0] == chosen[..., -2:-1]) & (taken[..., 1] == previous)
        keep = behind & (_counted(taken[..., 2], same.long(), n) == 0)
    return Mask(torch.cat([keep, none], dim=-1))


def _counted(index: Tensor, weight: Tensor, n: int) -> Tensor:
    """How often each of n positions is in `index` [..., m], where the weight is 1. An end counts nowhere."""
    counts = torch.zeros((*index.shape[:-1], n + 1), dtype=torch.int64, device=index.device)
    return counts.scatter_add(-1, index, weight)[..., :n]


RULES: dict[str, Rule] = {
    "anything": anything,
    "unvisited": unvisited,
    "polygon": polygon,
    "tour": tour,
    "triangles": triangles,
}


@attrs.frozen(eq=False)
class Found:
    """`values` int64 [B, L], `log_probability` float64 [B] of the values after the prompt, `calls` of the denoiser."""

    values: Tensor
    log_probability: Tensor
    calls: int


def beam_search(
    denoiser: Callable[[Tensor], Tensor],
    prompt: Tensor,
    *,
    width: int,
    rule: Rule,
    renormalize: bool = False,
) -> Found:
    """The likeliest sequence among `width` that are followed: prompt int64 [B, L], -1 where a position is wanted.

    A sequence that has ended leaves the beam and stays a candidate. Scores are sums of log p(C_i | C_<i, P), without a correction
    for length; the masked p are left as they are, or with `renormalize` divided by their sum.
    """
    rows, length = prompt.shape
    device = prompt.device
    live = prompt.new_zeros(rows, 1, 0)
    total = torch.zeros(rows, 1, dtype=torch.float64, device=device)
    ended: Tensor | None = None
    ended_total = total.new_full((rows, 1), -torch.inf)
    calls = 0
    for step in range(length):
        wanted = prompt[:, step] < 0
        if not bool(wanted.any()):
            live = torch.cat([live, prompt[:, None, step : step + 1].expand(-1, live.shape[1], -1)], dim=-1)
            continue
        scores = denoiser(live).double()
        calls += 1
        if scores.ndim != 3 or scores.shape[:2] != live.shape[:2]:
            raise BackboneMismatch(
                f"A denoiser of positions {list(live.shape)} must return scores [B, K, n + 1], not {list(scores.shape)}."
            )
        end = scores.shape[-1] - 1
        if ended is None:
            if int(prompt.max()) > end:
                raise BadData(
                    f"The prompt points at {int(prompt.max())}; there are {end} inputs, and the end."
                )
            ended = torch.full((rows, 1, length), end, device=device)
        exists = scores > -torch.inf
        keep = rule(live, exists, length - step).keep
        logs = scores.log_softmax(-1).masked_fill(~keep, -torch.inf)
        if renormalize:
            sums = logs.logsumexp(-1, keepdim=True)
            logs = torch.where(sums > -torch.inf, logs - sums, logs)
        # What follows the end costs nothing, nor does an end that has no score where nothing else is left, nor the prompt.
        over = (live == end).any(-1, keepdim=True) | ~(keep & exists).any(-1, keepdim=True)
        logs = torch.where(over, nothing_but(end, scores), logs)
        given = torch.zeros_like(scores).masked_fill(
            torch.arange(end + 1, device=device) != prompt[:, None, step : step + 1], -torch.inf
        )
        logs = torch.where(wanted[:, None, None], logs, given)
        candidates = total[..., None] + logs  # [B, K, V]

        finish = torch.where(wanted[:, None], candidates[..., end], -torch.inf)
        closed = torch.nn.functional.pad(live, (0, length - step), value=end)
        ended, ended_total = _best(
            torch.cat([ended, closed], dim=1), torch.cat([ended_total, finish], dim=1), width
        )
        candidates[..., end] = candidates[..., end].masked_fill(wanted[:, None], -torch.inf)
        flat = candidates.flatten(1)
        total, index = flat.topk(min(width, flat.shape[1]), dim=1)
        parent, position = index // (end + 1), index % (end + 1)
        live = live.gather(1, parent[..., None].expand(-1, -1, step))
        live = torch.cat([live, position[..., None]], dim=-1)
        # Probabilities only fall: when an ended sequence leads everywhere, it has won.
        if bool((ended_total.amax(1) >= total.amax(1)).all()) and not bool(
            (prompt[:, step + 1 :] >= 0).any()
        ):
            live, total = live[:, :0], total[:, :0]
            break
    if ended is None:
        return Found(prompt.clone(), total[:, 0], 0)
    every = torch.cat([ended, live] if live.shape[1] else [ended], dim=1)
    values, best = _best(every, torch.cat([ended_total, total], dim=1), 1)
    return Found(values[:, 0], best[:, 0], calls)


def nothing_but(end: int, scores: Tensor) -> Tensor:
    """Log-probabilities that are sure of the end, in the shape of the scores."""
    sure = torch.full_like(scores, -torch.inf)
    sure[..., end] = 0.0
    return sure


def _best(sequences: Tensor, totals: Tensor, width: int) -> tuple[Tensor, Tensor]:
    best, index = totals.topk(min(width, totals.shape[1]), dim=1)
    return sequences.gather(1, index[..., None].expand(-1, -1, sequences.shape[2])), best


@attrs.frozen
class PointerDecode:
    """Beam search over positions of the input, where what the rule forbids is masked.

    Vinyals et al., arXiv:1506.03134, sections 2.3, 3.3 and 4.4. `request.tokens` [B, L] holds the prompt of each row (the city that a
    tour begins with), and its mask token after it; L is the longest output, with one place more if the end is to be counted.
    """

    kind: ClassVar[str] = "sampler"
    name: ClassVar[str] = "pointer-decode"
    modalities: ClassVar[frozenset[str]] = frozenset({"point-cloud"})
    domain: ClassVar[str] = "pointer"

    beams: int = setting(4, "sequences that are followed; 1 takes the likeliest position each time", ge=1)
    rule: str = setting("unvisited", "what may be pointed at", choices=RULES)
    renormalize: bool = setting(False, "divide what is left of the probabilities by its sum")

    def sample(self, denoiser: Callable[..., Tensor], request: SampleRequest) -> Samples:
        """Every place after the prompt. A prompt that is no beginning, or names what is no input, raises `BadData`."""
        tokens = request.tokens
        hidden = tokens == request.mask_token
        if bool((hidden[:, :-1] & ~hidden[:, 1:]).any()):
            raise BadData(
                "A sequence of positions is decoded from its beginning: a prompt may only come first."
            )
        if bool((tokens < 0).logical_and(~hidden).any()):
            raise BadData(f"Positions are 0 or more, got {int(tokens[~hidden].min())} in the prompt.")
        found = beam_search(
            denoiser,
            tokens.masked_fill(hidden, -1),
            width=self.beams,
            rule=RULES[self.rule],
            renormalize=self.renormalize,
        )
        order = torch.where(hidden, hidden.cumsum(1) - 1, -1)
        facts = {"log_probability": float(found.log_probability.sum())}
        return Samples(found.values, found.calls, order, facts)


COMPONENTS = (PointerDecode,)
