"""Tiny backbones of every kind, with fixed weights: what the kit binds objectives to.

The plain ones are ordinary PyTorch modules that have a kind's methods; the others are models of transformers that come in
through `maskwright.backbones.adapt`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.backbones.defaults import causal_language_model, masked_language_model, vision_transformer

VOCABULARY = 32
"""Token ids of the kit are in [0, VOCABULARY); the last stands for a hidden token."""

MASK_TOKEN = VOCABULARY - 1

LENGTH = 12
"""Tokens in a sequence of the kit."""


class PlainViT(nn.Module):
    """A PatchBackbone: convolutional patch embedding, learned positions, pre-norm blocks, a final norm."""

    def __init__(
        self, grid: tuple[int, int] = (4, 4), *, prefix: int = 1, width: int = 16, depth: int = 2
    ) -> None:
        super().__init__()
        self.grid, self.patch_size, self.width, self.depth, self.channels = grid, 4, width, depth, 3
        self.embedding = nn.Conv2d(self.channels, width, self.patch_size, stride=self.patch_size)
        self.position_table = nn.Parameter(0.1 * torch.randn(1, grid[0] * grid[1], width))
        self.special = nn.Parameter(0.1 * torch.randn(1, prefix, width)) if prefix else None
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 2, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    @property
    def positions(self) -> Tensor:
        return self.position_table

    def patches(self, pixels: Tensor) -> Tensor:
        return self.embedding(pixels).flatten(2).transpose(1, 2)

    def prefix(self, batch_size: int) -> Tensor:
        if self.special is None:
            return self.position_table.new_zeros(batch_size, 0, self.width)
        return self.special.expand(batch_size, -1, -1)

    def encode(self, tokens: Tensor, levels: Sequence[int] = ()) -> Any:
        outputs = []
        for block in self.blocks:
            tokens = block(tokens)
            outputs.append(tokens)
        return [outputs[level] for level in levels] if levels else self.norm(tokens)


class PlainConvNet(nn.Module):
    """A ConvBackbone: a stem and two stages with batch norm, 8 pixels to a cell of the coarsest map."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.widths, self.strides = 3, (8, 8, 16), (2, 4, 8)
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in ((8, 8), (8, 16))
        )

    def stem(self, pixels: Tensor) -> Tensor:
        return self.first(pixels)


class PlainDenoiser(nn.Module):
    """A Denoiser of images: x [B, 3, 16, 16], t [B] → the shape of x. It has a grid of 4 × 4 patches of 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.grid, self.patch_size, self.channels = (4, 4), 4, 3
        self.inward = nn.Conv2d(3, 8, 3, padding=1)
        self.time = nn.Linear(1, 8)
        self.outward = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        hidden = self.inward(x) + self.time(t.float()[:, None])[..., None, None]
        return self.outward(torch.nn.functional.gelu(hidden))


def _resnet() -> Any:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return ResNetModel(config)


def _convnext() -> Any:
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(
        ConvNextConfig(patch_size=4, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], drop_path_rate=0.0)
    )


def _swin() -> Any:
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[1, 2],
        num_heads=[1, 2],
        window_size=4,
        drop_path_rate=0.0,
    )
    return SwinModel(config, add_pooling_layer=False)


_MAKERS: dict[str, Callable[[int], nn.Module]] = {
    "plain-vit": lambda seed: PlainViT(),
    "plain-vit-oblong": lambda seed: PlainViT((4, 6), prefix=0),
    "transformers-vit": lambda seed: vision_transformer(
        image_size=16, patch_size=4, width=16, depth=2, heads=2, seed=seed
    ),
    "transformers-swin": lambda seed: _swin(),
    "plain-convnet": lambda seed: PlainConvNet(),
    "transformers-resnet": lambda seed: _resnet(),
    "transformers-convnext": lambda seed: _convnext(),
    "transformers-llama": lambda seed: causal_language_model(
        vocabulary=VOCABULARY, length=LENGTH, width=16, depth=2, heads=2, mask_token=MASK_TOKEN, seed=seed
    ),
    "transformers-bert": lambda seed: masked_language_model(
        vocabulary=VOCABULARY, length=LENGTH, width=16, depth=2, heads=2, mask_token=MASK_TOKEN, seed=seed
    ),
    "plain-denoiser": lambda seed: PlainDenoiser(),
}

NAMES: dict[str, tuple[str, ...]] = {
    "patch": ("plain-vit", "plain-vit-oblong", "transformers-vit"),
    "grid": ("plain-vit", "transformers-swin", "plain-vit-oblong", "transformers-vit"),
    "conv": ("plain-convnet", "transformers-resnet", "transformers-convnext"),
    "token": ("transformers-llama", "transformers-bert"),
    "denoiser": ("plain-denoiser",),
}
"""The kit's backbones of each kind, the simplest first."""


def backbone(name: str, seed: int) -> nn.Module:
    """One of the kit's backbones; the same seed gives the same weights (there are four sets of them)."""
    return copy.deepcopy(_first(name, seed % 4))


@lru_cache(maxsize=64)
def _first(name: str, seed: int) -> nn.Module:
    """Made once and copied: a copy is several times faster than a model of a library."""
    with seeded(seed):
        return _MAKERS[name](seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it torch's global generator starts at a seed; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield
