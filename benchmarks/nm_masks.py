"""2:4 magnitude masks of a large matrix against three naive ways to find them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskwright.toolkit.patterns import keep_n_of_m

NAME = "2:4 magnitude masks, 4096 × 4096"
SIZE = 4096
ROUNDS = 9


def by_topk(weight: Tensor) -> Tensor:
    """The two largest of each row of four."""
    groups = weight.abs().view(-1, 4)
    keep = torch.zeros(groups.shape, dtype=torch.bool)
    return keep.scatter_(1, groups.topk(2, dim=1).indices, True).view_as(weight)


def by_sort(weight: Tensor) -> Tensor:
    """The first two of each sorted row of four."""
    groups = weight.abs().view(-1, 4)
    order = groups.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros(groups.shape, dtype=torch.bool).scatter_(1, order[:, :2], True).view_as(weight)


def by_network(weight: Tensor) -> Tensor:
    """The second largest of four by minima and maxima, as a threshold (ties may keep more than two)."""
    groups = weight.abs().view(-1, 4)
    a, b, c, d = groups.unbind(1)
    of_losers = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
    of_winners = torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    return (groups >= torch.maximum(of_losers, of_winners)[:, None]).view_as(weight)


def ours(weight: Tensor) -> Tensor:
    """What the pruner `magnitude` calls."""
    return keep_n_of_m(weight, 2, 4, magnitude=True)


def timed(ways: dict[str, Callable[[Tensor], Tensor]], weight: Tensor) -> dict[str, float]:
    """Median seconds of each, measured in turns so that all see the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(ROUNDS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(weight)
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def run() -> list[dict[str, Any]]:
    """One row: our time over the best naive one."""
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    naive = {"topk": by_topk, "sort": by_sort, "comparison network": by_network}
    assert torch.equal(ours(weight), by_sort(weight))
    seconds = timed({**naive, "ours": ours}, weight)
    best = min(naive, key=seconds.__getitem__)
    told = ", ".join(f"{name} {seconds[name]:.3f} s" for name in naive)
    return [
        {
            "what": f"{NAME}: time over the best naive way, {best} (of {told})",
            "ratio": seconds["ours"] / seconds[best],
            "bound": 1.0,
            "seconds": seconds["ours"],
            "peer_seconds": seconds[best],
        }
    ]
