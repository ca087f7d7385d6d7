"""SparK's sparse convolution against the dense one that it wraps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import maskwright
from benchmarks.timing import Row, interleaved, row
from maskwright import Layout, Mask
from maskwright.plugins.spark.sparse import Sparse

NAME = "SparK's sparse convolution over the dense one that it wraps"
BATCH, REPEATS = 8, 21

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
    """For each layer its forward, then training (with the backward); last, the training of all of them. On one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        strategy = maskwright.create("mask-strategy", "spark")
        layout = Layout(BATCH, (7, 7), patch_size=32)
        generator = torch.Generator().manual_seed(0)
        mask = strategy.draw(layout, signals={}, progress=0.0, generator=generator)
        measured = {what: times(make(), side, mask) for what, (make, side) in LAYERS.items()}
    finally:
        torch.set_num_threads(threads)
    forward = [row(f"{what}: forward", one["sparse"], one["dense"], 1.3) for what, one in measured.items()]
    # First layers have no input gradient to compute, so that a second pass over their large output weighs more.
    training = [
        row(f"{what}: with backward", one["sparse training"], one["dense training"])
        for what, one in measured.items()
    ]
    together = [sum(one[key] for one in training) for key in ("seconds", "peer_seconds")]
    return [*forward, *training, row("all of them, with backward", *together, bound=1.3)]


def times(layer: nn.Conv2d, side: int, mask: Mask) -> dict[str, float]:
    """Seconds of one layer: its output, and with the gradients of its weight and, unless it is a network's first, its input."""
    keep = mask.upsample((side, side)).keep[:, None]
    x = torch.randn(BATCH, layer.in_channels, side, side, generator=torch.Generator().manual_seed(0)) * keep
    x.requires_grad_(layer.in_channels > 3)
    ones = torch.ones_like(layer(x))
    # One context serves a whole network: the mask at each size is made once in it.
    context = Sparse(mask)

    def sparse() -> Tensor:
        with context:
            return layer(x)

    return interleaved(
        {
            "sparse": sparse,
            "dense": lambda: layer(x),
            "sparse training": lambda: sparse().backward(ones),
            "dense training": lambda: layer(x).backward(ones),
        },
        REPEATS,
    )
