"""The search: vectors of levels [L] with one total, changed by level switches, selected on ever more data.

Nothing here knows what a level does: `evaluate(candidates [n, L], tokens)` gives the fitness of each, [n], lower is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import attrs
import torch
from torch import Tensor

from maskwright.errors import NumericalError

ATTEMPTS = 16
"""How often a generation is filled up with new draws when some were drawn before; small spaces have too few to fill it."""

Evaluate: TypeAlias = Callable[[Tensor, int], Tensor]
Stage: TypeAlias = tuple[int, int]
"""(survivors, tokens) of one step of the selection."""


@attrs.frozen(eq=False)
class Space:
    """Which vectors are legal: lowest ≤ v ≤ highest and Σ|v| ≤ `deviation`; levels are switched within a group only.

    `lowest`, `highest`, `groups` are int64 [L]; groups are numbered from 0.
    """

    lowest: Tensor
    highest: Tensor
    groups: Tensor
    deviation: int | None = None


def flips(count: int, most: int, generator: torch.Generator) -> Tensor:
    """int64 [count]: min(a, b) of two uniform draws from 1 … most. For 3: one with 5/9, two with 3/9, three with 1/9."""
    return torch.randint(1, most + 1, (2, count), generator=generator, device=generator.device).amin(0)


def switched(parent: Tensor, space: Space, count: int, most: int, generator: torch.Generator) -> Tensor:
    """[count, L]: copies of the parent [L] after up to `most` level switches each (not all distinct).

    A switch takes one level from a layer and gives it to another of its group, both uniform among those that can; where no pair
    can, it is left out. So the total of each group stays.
    """
    values = parent.repeat(count, 1)
    number = flips(count, most, generator)
    rows = torch.arange(count, device=values.device)
    kinds = int(space.groups.max()) + 1
    for flip in range(most):
        group = torch.randint(kinds, (count, 1), generator=generator, device=values.device)
        inside = space.groups == group
        down, can_fall = _one_of(inside & (values > space.lowest), generator)
        others = inside & (values < space.highest)
        others[rows, down] = False
        up, can_rise = _one_of(others, generator)
        step = ((number > flip) & can_fall & can_rise).long()
        values[rows, down] -= step
        values[rows, up] += step
    return values


def _one_of(admissible: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A uniform choice among each row's True places (int64 [n]), and whether there was any (bool [n])."""
    keys = torch.rand(admissible.shape, generator=generator, device=admissible.device)
    return keys.masked_fill_(~admissible, -1).argmax(1), admissible.any(1)


def distinct(vectors: Tensor) -> Tensor:
    """The different rows, in the order in which they first appear."""
    unique, inverse = torch.unique(vectors, dim=0, return_inverse=True)
    places = torch.arange(len(vectors), device=vectors.device)
    first = torch.full((len(unique),), len(vectors), device=vectors.device)
    return vectors[first.scatter_reduce(0, inverse, places, "amin").sort().values]


def offspring(parent: Tensor, space: Space, count: int, most: int, generator: torch.Generator) -> Tensor:
    """[n, L]: `count` legal vectors that differ from the parent and from each other; fewer where there are no more."""
    family = parent[None]
    for _ in range(ATTEMPTS):
        drawn = switched(parent, space, count, most, generator)
        if space.deviation is not None:
            drawn = drawn[drawn.abs().sum(1) <= space.deviation]
        family = distinct(torch.cat([family, drawn]))
        if len(family) > count:
            break
    return family[1 : count + 1]


def movable(levels: Tensor, space: Space) -> bool:
    """Whether any level can be switched: some layer can fall and another of its group rise."""
    falls, rises = levels > space.lowest, levels < space.highest
    pairs = falls[:, None] & rises & (space.groups[:, None] == space.groups)
    return bool(pairs.fill_diagonal_(False).any())


def selected(
    candidates: Tensor, parent: Tensor, stages: Sequence[Stage], evaluate: Evaluate
) -> tuple[Tensor, float]:
    """The next parent [L] and its fitness: each stage keeps its best on its own data, and the parent joins the last one.

    Of equals the first is kept and the parent comes last, so that a child as good as it takes its place. Raises
    `NumericalError` when the best fitness is not finite.
    """
    if not len(candidates):
        stages = stages[-1:]
    for index, (survivors, tokens) in enumerate(stages):
        if index == len(stages) - 1:
            candidates = torch.cat([candidates, parent[None]])
        candidates, fitness = best(candidates, survivors, tokens, evaluate)
    return candidates[0], fitness


def best(candidates: Tensor, survivors: int, tokens: int, evaluate: Evaluate) -> tuple[Tensor, float]:
    """The `survivors` candidates of the lowest fitness, the best first, and its fitness."""
    fitness = evaluate(candidates, tokens)
    order = fitness.argsort(stable=True)
    lowest = float(fitness[order[0]])
    if not abs(lowest) < float("inf"):
        raise NumericalError(
            f"evopress: the best of {len(candidates)} candidates has the fitness {lowest}; look at the model's outputs on this "
            "data, or ask for less sparsity."
        )
    return candidates[order[:survivors].to(candidates.device)], lowest


def random_states(groups: Tensor, raised: int, count: int, generator: torch.Generator) -> Tensor:
    """Distinct 0/1 vectors [n ≤ count, L] with `raised` ones in every group, uniformly drawn."""
    states = groups.new_empty(0, len(groups))
    for _ in range(ATTEMPTS):
        keys = torch.rand(count, len(groups), generator=generator, device=groups.device)
        drawn = torch.zeros_like(keys, dtype=torch.int64)
        for group in range(int(groups.max()) + 1):
            rank = keys.masked_fill(groups != group, 2).argsort(1).argsort(1)
            drawn |= ((rank < raised) & (groups == group)).long()
        states = distinct(torch.cat([states, drawn]))
        if len(states) >= count:
            break
    return states[:count]


def minibatch(lengths: Tensor, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences drawn without repetition until they have `tokens` tokens: their numbers, and what is taken of each.

    `lengths` int64 [N]. The last one is cut; where there are no more tokens, all are taken.
    """
    order = torch.randperm(len(lengths), generator=generator, device=generator.device).to(lengths.device)
    before = lengths[order].cumsum(0) - lengths[order]
    index = order[before < tokens]
    return index, torch.minimum(lengths[index], tokens - before[before < tokens])
