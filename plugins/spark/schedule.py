"""The learning rate and the weight decay that SparK trains with, for your own loop (utils/lr_control.py of the official code)."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Linear from 0.005 · peak over `warmup` steps, then a cosine that ends at exactly 0.001 · peak in step `total` - 1."""
    if step < warmup:
        return peak * (0.005 + 0.995 * step / warmup)
    done = (step - warmup) / max(total - 1 - warmup, 1)
    return peak * (0.001 + 0.999 * (0.5 + 0.5 * math.cos(math.pi * done)))


def weight_decay(step: int, *, total: int, start: float = 0.04, end: float = 0.2) -> float:
    """A cosine from `start` to `end` over all steps, warm-up included."""
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * step / max(total - 1, 1)))
