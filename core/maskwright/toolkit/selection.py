"""Exact-count selection, vectorised over rows: the step that most mask strategies end with."""

from __future__ import annotations

import torch
from torch import Tensor

from maskwright.mask import Layout, Mask


def kept_count(positions: int, ratio: float) -> int:
    """int(positions · (1 - ratio)) in double precision, as MAE and its descendants truncate it."""
    return int(positions * (1 - ratio))


def keep_largest(scores: Tensor, count: int | Tensor) -> Tensor:
    """bool [B, N]: True at each row's `count` largest scores; equal scores go to the lower position.

    `count` is one number for all rows or int64 [B].
    """
    if isinstance(count, int) and 0 < count <= scores.shape[1]:
        # Without ties the smallest of the largest is a threshold, found several times faster than an order.
        least = scores.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
        chosen = scores >= least
        if bool((chosen.sum(1) == count).all()):
            return chosen
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    chosen = rank < (count if isinstance(count, int) else count[:, None])
    return torch.zeros_like(chosen).scatter_(1, order, chosen)


def noise(layout: Layout, generator: torch.Generator) -> Tensor:
    """Uniform [B, N] numbers in float64 (ties have no part in any law), from the generator, on the layout's device."""
    return torch.rand(
        layout.batch, layout.positions, generator=generator, device=generator.device, dtype=torch.float64
    ).to(layout.device)


def random_mask(layout: Layout, keep: int | Tensor, generator: torch.Generator) -> Mask:
    """`keep` visible positions in each row, uniformly at random."""
    return Mask(keep_largest(noise(layout, generator), keep).view(layout.shape))
