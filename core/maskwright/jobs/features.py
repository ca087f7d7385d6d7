"""What an encoder makes of each place of an image: its features, and two ways to look at them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from maskwright.backbones import ConvBackbone, PatchBackbone


def places(backbone: Any, pixels: Tensor) -> Tensor:
    """[B, C, H, W] → [B, h, w, D]: the encoder's last features, nothing hidden."""
    if isinstance(backbone, PatchBackbone):
        prefix = backbone.prefix(len(pixels))
        tokens = torch.cat([prefix, backbone.patches(pixels) + backbone.positions], 1)
        features: Tensor = backbone.encode(tokens)
        return features[:, prefix.shape[1] :].unflatten(1, tuple(backbone.grid))
    assert isinstance(backbone, ConvBackbone)
    x = backbone.stem(pixels)
    for stage in backbone.stages:
        x = stage(x)
    return x.permute(0, 2, 3, 1)


def similarity(features: Tensor, chosen: Tensor) -> Tensor:
    """[B, h, w, D], int64 [B, 2] (row, column) → [B, h, w] in [-1, 1]: the cosine of each place's feature with the chosen one's."""
    each = normalize(features.float(), dim=-1)
    one = each[torch.arange(len(each), device=each.device), chosen[:, 0], chosen[:, 1]]
    return torch.einsum("bhwd,bd->bhw", each, one)


def principal_colours(features: Tensor) -> Tensor:
    """[B, h, w, D] → [B, 3, h, w] in [0, 1]: the first three principal components of all places as red, green and blue.

    The components are those of all images together, so that a colour means the same in each. The mean is taken off; the middle
    96 % of a component's values fill its range, and its largest weight is positive, so that the colours are the same each time.
    Features that are all alike give grey.
    """
    x = features.reshape(-1, features.shape[-1]).double().cpu()
    x = x - x.mean(0)
    _, _, axes = torch.linalg.svd(x, full_matrices=False)
    axes = axes[:3]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    values = torch.zeros(len(x), 3, dtype=torch.float64)
    values[:, : len(axes)] = x @ axes.T
    ends = torch.tensor([0.02, 0.98], dtype=torch.float64)
    low, high = values.quantile(ends, dim=0)
    flat = high - low <= 1e-9 * features.abs().max().double().cpu()
    colours = torch.where(flat, 0.5, (values - low) / torch.where(flat, 1.0, high - low))
    return colours.clamp(0, 1).float().unflatten(0, features.shape[:3]).permute(0, 3, 1, 2).contiguous()


def liveliest(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, C, H, W] → int64 [B, 2]: row and column of the place of a grid whose pixels spread widest."""
    mean, square = (torch.nn.functional.adaptive_avg_pool2d(x, grid) for x in (pixels, pixels.square()))
    flat = (square - mean.square()).mean(1).flatten(1).argmax(1)
    return torch.stack([flat // grid[1], flat % grid[1]], 1)


@torch.no_grad()
def maps(backbone: Any, pixels: Tensor) -> dict[str, Tensor]:
    """What pictures.safetensors holds of the features of images: `chosen` int64 [B, 2], `similarity` [B, h, w], `components`
    [B, 3, h, w]."""
    features = places(backbone, pixels)
    chosen = liveliest(pixels, (features.shape[1], features.shape[2]))
    return {
        "chosen": chosen,
        "similarity": similarity(features, chosen),
        "components": principal_colours(features),
    }
