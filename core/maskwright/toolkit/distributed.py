"""Sums that belong to the global batch, where several processes share it."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a number over all processes, without gradient; the number itself in one process.

    A loss that divides by a batch-wide count divides by this one instead: the mean of the processes' losses, which is what
    distributed training follows, is then the loss of the global batch, also when the parts' counts differ. It is a
    collective call: make it in every process or in none, hence in training steps only.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
