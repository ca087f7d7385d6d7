"""The light UNet decoder that turns densified maps of several scales into pixels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def widths(width: int, levels: int) -> list[int]:
    """Channels after 0, 1, …, `levels` blocks: half of the width, rounded down, each time."""
    return [width // 2**level for level in range(levels + 1)]


class Block(nn.Module):
    """[B, C, H, W] → [B, C', 2H, 2W]: a transposed convolution, two 3 × 3 convolutions with batch norm, ReLU6 between them."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(before, before, 4, stride=2, padding=1)
        self.mix = nn.Sequential(
            nn.Conv2d(before, before, 3, padding=1, bias=False),
            nn.BatchNorm2d(before),
            nn.ReLU6(inplace=True),
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.up(x))


class Decoder(nn.Module):
    """Maps from coarse to fine, at 1, 2, 4, … times the coarsest size and of the `widths`; None where there is no finer map.

    The coarsest grows by two in each of `levels` blocks, each finer one is added on the way, to pixels [B, channels, H, W].
    """

    def __init__(self, width: int, levels: int, channels: int) -> None:
        super().__init__()
        sizes = widths(width, levels)
        self.blocks = nn.ModuleList(Block(before, after) for before, after in pairwise(sizes))
        self.pixels = nn.Conv2d(sizes[-1], channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor | None]) -> Tensor:
        x = maps[0]
        for index, block in enumerate(self.blocks, 1):
            x = block(x)
            skip = maps[index] if index < len(maps) else None
            if skip is not None:
                x = x + skip
        return self.pixels(x)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W], eps 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def fill_empty(x: Tensor, embedding: Tensor, keep: Tensor) -> Tensor:
    """The mask embedding [1, C, 1, 1] of a scale at the empty positions of its map [B, C, H, W]; `keep` bool [B, 1, H, W]."""
    return torch.where(keep, x, embedding.to(x.dtype))
