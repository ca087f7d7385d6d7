"""A linear layer under freshly sampled masks of MaskLLM against the same layer dense."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

import maskwright
from maskwright import Budget, PruneTask
from maskwright.plugins.maskllm.pruner import MaskLlm
from maskwright.toolkit.masked import replaced
from maskwright.toolkit.patterns import candidates
from maskwright.toolkit.prunable import prunable_weights

NAME = "MaskLLM's masked forward, 1024 × 1024, batch 64 × 128 tokens"
SIZE, BATCH, LENGTH = 1024, 64, 128
ROUNDS = 9


def run() -> list[dict[str, Any]]:
    """One row: sampling the masks, multiplying and the layer, over the dense layer; both keep what a backward needs."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(SIZE, SIZE, bias=False)
    layer.weight.data = torch.randn(SIZE, SIZE, generator=generator)
    x = torch.randn(BATCH, LENGTH, SIZE, generator=generator)
    pruner = maskwright.create("pruner", "maskllm")
    assert isinstance(pruner, MaskLlm)
    weights, patterns = prunable_weights(layer), candidates(2, 4).float()
    task = PruneTask(Budget(pattern="2:4"), generator=generator)
    logits = nn.ParameterList(pruner.start(weight, patterns, None, generator) for weight in weights)
    dense, masked = [], []
    for round_number in range(ROUNDS + 1):
        start = time.perf_counter()
        layer(x)
        middle = time.perf_counter()
        with replaced(layer, weights) as replace:
            replace(pruner.sampled(weights, logits, patterns, 100.0, 4.0, task)[0])
            layer(x)
        if round_number:
            dense.append(middle - start)
            masked.append(time.perf_counter() - middle)
    seconds, peer = statistics.median(masked), statistics.median(dense)
    return [{"what": NAME, "ratio": seconds / peer, "bound": 1.5, "seconds": seconds, "peer_seconds": peer}]
