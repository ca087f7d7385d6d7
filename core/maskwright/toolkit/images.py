"""Images as patches and back, and fixed sine-cosine positions."""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] → [B, N, p·p·C]; a patch's values are ordered (row, column, channel), as in MAE."""
    batch, channels, height, width = pixels.shape
    p = patch_size
    x = pixels.reshape(batch, channels, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p * channels)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """[B, N, p·p·C] → [B, C, H, W], the inverse of `patchify`."""
    batch, p = patches.shape[0], patch_size
    x = patches.reshape(batch, *grid, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, x.shape[1], grid[0] * p, grid[1] * p)


def normalize_patches(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """Each patch with mean 0 and unbiased variance 1 (the `norm_pix_loss` target of MAE)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + eps).sqrt()


def patch_targets(pixels: Tensor, patch_size: int, *, normalized: bool) -> Tensor:
    """[B, C, H, W] → [B, N, p·p·C]: the pixels of each patch, as they are or normalised within it."""
    patches = patchify(pixels, patch_size)
    return normalize_patches(patches) if normalized else patches


def denormalize_patches(prediction: Tensor, patches: Tensor, eps: float = 1e-6) -> Tensor:
    """The inverse of `normalize_patches`, with the mean and deviation of the true `patches`: both [B, N, V]."""
    mean = patches.mean(-1, keepdim=True)
    # In two passes: torch.var_mean along a short last axis takes ten times as long, and this is done in every step.
    squares = torch.linalg.vector_norm(patches - mean, dim=-1, keepdim=True).square()
    return prediction * (squares / (patches.shape[-1] - 1) + eps).sqrt() + mean


@torch.no_grad()
def fill_hidden(
    pixels: Tensor, prediction: Tensor, hidden: Tensor, grid: tuple[int, int], *, normalized: bool
) -> Tensor:
    """[B, C, H, W]: images with their hidden patches (bool [B, N]) replaced by what was predicted of them [B, N, p·p·C].

    `normalized` predictions are brought back to pixels with the true patch's own mean and deviation.
    """
    patch_size = pixels.shape[-1] // grid[1]
    patches = patchify(pixels, patch_size)
    if normalized:
        prediction = denormalize_patches(prediction, patches)
    return unpatchify(torch.where(hidden[..., None], prediction.to(patches.dtype), patches), grid, patch_size)


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine positions [1, N, width]: half of the width for columns, half for rows (MoCo v3, MAE)."""
    quarter = width // 4
    frequency = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / max(quarter, 1))
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    parts = [f(side.reshape(-1, 1) * frequency) for side in (column, row) for f in (torch.sin, torch.cos)]
    table = torch.cat(parts, dim=1).float()
    return torch.nn.functional.pad(table, (0, width - table.shape[1]))[None]
