"""Which entries of a score matrix stay: N of every M, or an exact share per layer, per row or over all layers.

Scores are [out, in] (`maskwright.toolkit.prunable.Weight.matrix`); what is returned is bool, True = kept. Of equal scores the
lower position is kept.

Rounding: a sparsity is read as the decimal number that was written, and `removed_count` is its product with the number of
weights, rounded down: 0.29 of 100 weights removes 29. That count is met exactly in every group that is compared.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import combinations
from math import comb
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from maskwright.errors import BadBudget
from maskwright.protocols import Budget, Pruner
from maskwright.toolkit.prunable import Weight

Compare: TypeAlias = Literal["layer", "row", "global"]
"""Which weights compete for a sparsity: those of a layer, of one output of it, or all."""

CANDIDATES_LIMIT = 10_000
"""`candidates` refuses to list more patterns than this (8:16 has 12,870)."""

_LANES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 17
"""Elements worked on at a time: few enough to stay in a cache, many enough for Python not to be noticed."""


def candidates(n: int, m: int) -> Tensor:
    """The legal rows of an N:M block, bool [C(M, N), M], in lexicographic order of the kept positions (2:4: 1100 first).

    Raises `BadBudget` for patterns with more than `CANDIDATES_LIMIT` of them.
    """
    if comb(m, n) > CANDIDATES_LIMIT:
        raise BadBudget(
            f"{n}:{m} has {comb(m, n):,} candidates for each block, more than {CANDIDATES_LIMIT:,}; use a smaller pattern."
        )
    kept = torch.tensor(list(combinations(range(m), n)))
    return torch.zeros(len(kept), m, dtype=torch.bool).scatter_(1, kept, True)


def removed_count(total: int, sparsity: float) -> int:
    """How many of `total` weights a sparsity removes: the exact product, rounded down."""
    return int(Fraction(repr(float(sparsity))) * total)


def require_divisible(weights: Iterable[Weight], budget: Budget) -> tuple[int, int]:
    """(N, M) of a pattern, when every weight has room for it. Raises `BadBudget` that names the first weight whose inputs M does not divide."""
    n, m = budget.n_of_m
    for weight in weights:
        if weight.inputs % m:
            raise BadBudget(
                f"Pattern {n}:{m} does not fit {weight.name} {list(weight.parameter.shape)}: its {weight.inputs} inputs are no "
                f"multiple of {m}; use another pattern, or leave the layer out of what may be pruned."
            )
    return n, m


@torch.no_grad()
def keep_n_of_m(scores: Tensor, n: int, m: int, *, magnitude: bool = False) -> Tensor:
    """bool of the scores' shape: True at the N largest of every M consecutive entries of the last axis.

    With `magnitude`, absolute values are compared (faster than giving `scores.abs()`). Raises `BadBudget` when M does not
    divide that axis.
    """
    if scores.shape[-1] % m:
        raise BadBudget(
            f"{n}:{m} does not fit scores {list(scores.shape)}: {scores.shape[-1]} is no multiple of {m}."
        )
    # Lanes rely on the byte order of the usual processors; elsewhere groups are rows to choose from.
    if m in _LANES and sys.byteorder == "little" and scores.numel():
        return _by_lanes(scores.contiguous(), n, m, magnitude)
    groups = scores.reshape(-1, m)
    return keep_largest(groups.abs() if magnitude else groups, n).view(scores.shape)


def _by_lanes(scores: Tensor, n: int, m: int, magnitude: bool) -> Tensor:
    """`keep_n_of_m` by counting for each entry the others of its group that it beats.

    One comparison of the whole array with itself moved by s places decides every pair that is s apart. Its results are
    bytes, so a group of M is one integer: adding that integer counts wins for the left of each pair, and subtracting it
    moved by s bytes counts losses of the right. The sum in each byte lies in [0, M), so that no byte overflows.
    """
    keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    pieces = list(zip(scores.detach().view(-1).split(_CHUNK), keep.view(-1).split(_CHUNK)))
    # Each entry begins with one win over every one before it, which the comparisons then confirm or take away.
    first = sum(position << 8 * position for position in range(m))
    pairs = [
        (apart, sum(1 << 8 * position for position in range(m - apart)), 1 - (1 << 8 * apart))
        for apart in range(1, m)
    ]

    def count(part: list[tuple[Tensor, Tensor]]) -> None:
        size = part[0][0].numel()
        values = torch.zeros(size + m - 1, dtype=scores.dtype, device=scores.device)
        beats = torch.empty(size, dtype=torch.bool, device=scores.device)
        lanes = beats.view(_LANES[m])
        wins = torch.empty_like(lanes)
        for chunk, out in part:
            here = values[: chunk.numel()]
            torch.abs(chunk, out=here) if magnitude else here.copy_(chunk)
            wins.fill_(first)
            for apart, real, signed in pairs:
                torch.ge(values[:size], values[apart : size + apart], out=beats)
                wins.add_(lanes.bitwise_and_(real), alpha=signed)
            torch.ge(wins.view(torch.uint8)[: chunk.numel()], m - n, out=out)

    threads = min(torch.get_num_threads(), len(pieces)) if scores.device.type == "cpu" else 1
    if threads == 1:
        count(pieces)
    else:
        # Each thread goes through its own chunks: sharing out every one of the many short steps costs more than it saves.
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(count, [pieces[start::threads] for start in range(threads)]))
    return keep


@torch.no_grad()
def keep_largest(scores: Tensor, count: int) -> Tensor:
    """bool [R, N]: True at each row's `count` largest scores, exactly; of equal scores at the lower positions."""
    rows, columns = scores.shape
    if not 0 < count < columns:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    least = kth_largest(scores, count)
    keep = scores >= least
    surplus = keep.sum(1) - count
    for_ties = surplus.nonzero()[:, 0]
    if len(for_ties):
        tied = scores[for_ties] == least[for_ties]
        # The last `surplus` of the tied ones go.
        after = tied.sum(1, keepdim=True) - tied.cumsum(1)
        keep[for_ties] &= ~(tied & (after < surplus[for_ties, None]))
    return keep


@torch.no_grad()
def kth_largest(scores: Tensor, count: int) -> Tensor:
    """[R, 1]: the smallest of each row's `count` largest scores [R, N], for 0 < count <= N."""
    at = scores.shape[1] - count
    if scores.device.type != "cpu":
        return scores.kthvalue(at + 1, dim=1, keepdim=True).values
    # numpy's selection is several times faster than torch's. It has no bfloat16; float32 holds the same numbers.
    values = scores.float() if scores.dtype == torch.bfloat16 else scores
    least = np.partition(values.numpy(), at, axis=1)[:, at : at + 1]
    return torch.from_numpy(least.copy()).to(scores.dtype)


def keep_share(
    scores: Mapping[str, Tensor], sparsity: float, compare: Compare = "layer"
) -> dict[str, Tensor]:
    """bool masks of the scores' shapes with exactly `removed_count` entries removed per layer, per row or over all."""
    if compare == "row":
        return {
            name: keep_largest(one, one.shape[1] - removed_count(one.shape[1], sparsity))
            for name, one in scores.items()
        }
    if compare == "layer":
        return {name: keep_share({name: one}, sparsity, "global")[name] for name, one in scores.items()}
    every = [one.reshape(-1) for one in scores.values()]
    joined = every[0] if len(every) == 1 else torch.cat(every)
    kept = keep_largest(joined[None], joined.numel() - removed_count(joined.numel(), sparsity))[0]
    pieces = kept.split([one.numel() for one in every])
    return {name: piece.view(one.shape) for (name, one), piece in zip(scores.items(), pieces)}


def check_budget(pruner: Pruner, weights: Iterable[Weight], budget: Budget | None) -> Budget:
    """The budget of a pruner that meets one.

    Raises `BadBudget` when there is none, when the pruner does not meet this kind, or when a pattern does not fit a weight.
    """
    legal = ", ".join(sorted(pruner.budgets))
    if budget is None:
        raise BadBudget(f"{pruner.name} prunes to a budget and was given none; give it one of {legal}.")
    refuse_budget(pruner, budget)
    if budget.kind not in pruner.budgets:
        raise BadBudget(f"{pruner.name} does not meet a budget of {budget.kind}; give it one of {legal}.")
    if budget.kind == "pattern":
        require_divisible(weights, budget)
    return budget


def refuse_budget(pruner: Pruner, budget: Budget | None) -> None:
    """Raise `BadBudget` when a pruner that finds out itself how much it removes is given a budget."""
    if budget is not None and not pruner.budgets:
        raise BadBudget(
            f"{pruner.name} finds out itself how much it removes and takes no budget; leave the {budget.kind} out."
        )


def keep_best(scores: Mapping[str, Tensor], budget: Budget, compare: Compare = "layer") -> dict[str, Tensor]:
    """The masks of a sparsity, or of a pattern (where `compare` has no part: M consecutive inputs compete)."""
    if budget.kind == "pattern":
        return {name: keep_n_of_m(one, *budget.n_of_m) for name, one in scores.items()}
    if budget.sparsity is None:
        raise BadBudget(f"The budget {budget} is no sparsity and no pattern; give one of these.")
    return keep_share(scores, budget.sparsity, compare)
