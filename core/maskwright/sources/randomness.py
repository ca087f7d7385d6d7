"""Random numbers without a state: functions of (seed, epoch, index)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, epoch: int, indices: Tensor, count: int, *, stream: int = 0) -> Tensor:
    """float64 [B, count] in [0, 1): a pure function of (seed, epoch, index, stream), evaluated for all at once.

    A counter-based generator: the 64-bit finaliser of SplitMix64 (Steele, Lea and Flood, 2014) on the mixed key.
    """
    key = np.array([stream], dtype=np.int64).view(np.uint64)
    for word in (np.int64(seed), np.int64(epoch), indices.cpu().numpy().astype(np.int64)):
        key = _mixed(key ^ np.atleast_1d(word).view(np.uint64))
    numbers = _mixed(key[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    return torch.from_numpy((numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(z: np.ndarray) -> np.ndarray:
    z = z + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
