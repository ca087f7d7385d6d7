"""SparK's sparse convolution against the dense one that it wraps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import maskwright
from benchmarks.timing import Row, interleaved, row
from maskwright import Layout, Mask
from maskwright.plugins.spark.sparse import Sparse

NAME = "SparK's sparse convolution: forward and backward, over the dense convolution"
BATCH, REPEATS = 8, 15

LAYERS: dict[str, tuple[Callable[[], nn.Conv2d], int]] = {
    "7 × 7 stride 2, 3 → 64 at 224 (ResNet's first)": (lambda: nn.Conv2d(3, 64, 7, 2, 3, bias=False), 224),
    "1 × 1, 64 → 256 at 56": (lambda: nn.Conv2d(64, 256, 1, bias=False), 56),
    "3 × 3, 64 → 64 at 56": (lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), 56),
    "3 × 3, 256 → 256 at 14": (lambda: nn.Conv2d(256, 256, 3, padding=1, bias=False), 14),
    "3 × 3, 512 → 512 at 7": (lambda: nn.Conv2d(512, 512, 3, padding=1, bias=False), 7),
    "7 × 7 depthwise, 96 at 56 (ConvNeXt's)": (lambda: nn.Conv2d(96, 96, 7, padding=3, groups=96), 56),
    "4 × 4 stride 4, 3 → 96 at 224 (ConvNeXt's first)": (lambda: nn.Conv2d(3, 96, 4, 4), 224),
}
"""Convolutions of ResNet-50 and ConvNeXt-T, and the size of the map that they see."""


def run() -> list[Row]:
    """A row for each layer, measured on one thread, and one for all of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator = torch.Generator().manual_seed(0)
        strategy = maskwright.create("mask-strategy", "spark")
        layout = Layout(BATCH, (7, 7), patch_size=32)
        mask = strategy.draw(layout, signals={}, progress=0.0, generator=generator)
        rows = [measured(what, make(), side, mask) for what, (make, side) in LAYERS.items()]
    finally:
        torch.set_num_threads(threads)
    together = [sum(one[key] for one in rows) for key in ("seconds", "peer_seconds")]
    return [*rows, row("all of them together", *together)]


def measured(what: str, layer: nn.Conv2d, side: int, mask: Mask) -> Row:
    """One layer in training: its output, and the gradients of its input and weight."""
    keep = mask.upsample((side, side)).keep[:, None]
    x = torch.randn(BATCH, layer.in_channels, side, side, generator=torch.Generator().manual_seed(0)) * keep
    x.requires_grad_(layer.in_channels > 3)
    ones = torch.ones_like(layer(x))
    context = Sparse(mask)

    def dense() -> None:
        layer(x).backward(ones)

    def sparse() -> None:
        # One context serves a whole network; the mask at each size is made once in it.
        with context:
            y = layer(x)
        y.backward(ones)

    times = interleaved({"sparse": sparse, "dense": dense}, REPEATS)
    return row(what, times["sparse"], times["dense"], 1.3)
