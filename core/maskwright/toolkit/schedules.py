"""Schedules: which share of the tokens is hidden at time t in [0, 1] and when a share is reached, and how rates fall."""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs
import torch
from torch import Tensor


@attrs.frozen
class Schedule:
    """`hidden(t)` = 1 - α(t) rises from 0 at t = 0 to 1 at t = 1; `time` is its inverse. Both work elementwise on tensors."""

    name: str
    hidden: Callable[[Tensor], Tensor]
    time: Callable[[Tensor], Tensor]

    def alpha(self, t: Tensor) -> Tensor:
        """α(t): the share that is visible."""
        return 1 - self.hidden(t)


LINEAR = Schedule("linear", hidden=lambda t: t, time=lambda share: share)
"""α = 1 - t. (MDLM's log-linear noise has (1 - ε)(1 - α), which cancels in every ratio.)"""

COSINE = Schedule(
    "cosine",
    hidden=lambda t: torch.sin(math.pi / 2 * t),
    time=lambda share: 2 / math.pi * torch.asin(share),
)
"""α = 1 - cos(π(1 - t)/2): MaskGIT's, whose cos(πr/2) of the tokens are hidden when the share r = 1 - t of the steps is done.

The sine of the complement is the same number without the rounding that the cosine has near t = 0.
"""

SCHEDULES = {schedule.name: schedule for schedule in (LINEAR, COSINE)}


def groups(counts: Tensor, steps: int | None) -> Tensor:
    """How many of each row's `counts` [B] events fall to each of at most `steps` calls: int64 [B, calls].

    A row with n events uses min(n, steps) calls, of ⌊n / steps⌋ or ⌈n / steps⌉ events each. Without `steps` each event
    has a call of its own. There are as many calls as the longest row needs.
    """
    longest = int(counts.max()) if counts.numel() else 0
    calls = longest if steps is None else min(longest, steps)
    mine = counts.clamp(max=max(calls, 1))[:, None]
    edge = torch.arange(calls + 1, device=counts.device).expand(len(counts), -1).minimum(mine)
    return (edge * counts[:, None] // mine.clamp(min=1)).diff(dim=1)


def cosine(start: float, end: float, fraction: float) -> float:
    """A learning rate that falls along half a cosine, when `fraction` of the training is behind."""
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
