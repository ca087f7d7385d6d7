"""Exact-count selection, vectorised over rows: the step that most mask strategies end with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from maskwright.errors import UnequalMaskCounts
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
        chosen = _at_least_the_count(scores, count)
        # No row has fewer than `count`, so that the total says whether one has more.
        if int(np.count_nonzero(chosen.cpu().numpy())) == count * len(scores):
            return chosen
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    chosen = rank < (count if isinstance(count, int) else count[:, None])
    return torch.zeros_like(chosen).scatter_(1, order, chosen)


def _at_least_the_count(scores: Tensor, count: int) -> Tensor:
    """bool [B, N]: True where a score reaches the `count`-th largest of its row, more than `count` times where it is tied."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # numpy partitions and compares rows with vector instructions: four times faster than topk on 14 × 14 patches.
        values, place = scores.detach().numpy(), scores.shape[1] - count
        return torch.from_numpy(values >= np.partition(values, place, axis=1)[:, place, None])
    return scores >= scores.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)


def at_visible(x: Tensor, keep: Tensor) -> Tensor:
    """[B, N, D] at the visible positions, bool [B, N]: [B, K, D], or [ΣK, D] where rows keep unequal numbers."""
    counts, chosen = keep.sum(1), x[keep]
    equal = bool((counts == counts[0]).all()) and len(chosen) > 0
    return chosen.unflatten(0, (len(keep), -1)) if equal else chosen


def noise(layout: Layout, generator: torch.Generator) -> Tensor:
    """Uniform [B, N] numbers in float64 (ties have no part in any law), from the generator, on the layout's device."""
    return torch.rand(
        layout.batch, layout.positions, generator=generator, device=generator.device, dtype=torch.float64
    ).to(layout.device)


def random_mask(layout: Layout, keep: int | Tensor, generator: torch.Generator) -> Mask:
    """`keep` visible positions in each row, uniformly at random."""
    return Mask(keep_largest(noise(layout, generator), keep).view(layout.shape))


@contextmanager
def drops_hidden(name: str, advice: str = "") -> Iterator[None]:
    """Unequal counts inside are said to be what the objective `name` cannot take, with `advice` as the last sentence."""
    try:
        yield
    except UnequalMaskCounts as error:
        raise UnequalMaskCounts(
            f"{name} drops hidden patches, so each image must keep the same number of them. {error}{advice and f' {advice}'}"
        ) from None
