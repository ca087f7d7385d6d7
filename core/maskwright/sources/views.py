"""Which part of a picture a sample shows, and that part as pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

Views = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(uniform numbers [B, 5], picture sizes [B, 2]) → boxes [B, 4] (top, left, height, width) in pixels, mirrored bool [B]."""


def random_resized_crops(*, least: float, most: float, mirror: bool) -> Views:
    """Boxes of `least` to `most` of the picture's area, with sides between 3:4 and 4:3 (cut at the picture's)."""

    def views(u: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        area = sizes.prod(1) * (least + (most - least) * u[:, 0])
        stretch = torch.exp(math.log(4 / 3) * (2 * u[:, 1] - 1)).sqrt()
        sides = torch.stack([area.sqrt() / stretch, area.sqrt() * stretch], 1).minimum(sizes)
        corners = (sizes - sides) * u[:, 2:4]
        return torch.cat([corners, sides], 1), (u[:, 4] < 0.5) & mirror

    return views


def random_squares(size: int, *, mirror: bool) -> Views:
    """Squares of one to two times `size` pixels a side, anywhere: details keep about their scale."""

    def views(u: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        most = sizes.amin(1).clamp(max=2 * size)
        least = (most / 2).maximum(most.clamp(max=size))
        side = (least + (most - least) * u[:, 0])[:, None].expand(-1, 2)
        corners = (sizes - side) * u[:, 2:4]
        return torch.cat([corners, side], 1), (u[:, 4] < 0.5) & mirror

    return views


def centre_square(u: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The largest square in the middle."""
    side = sizes.amin(1, keepdim=True).expand(-1, 2)
    return torch.cat([(sizes - side) / 2, side], 1), torch.zeros(len(u), dtype=torch.bool)


def shifted_squares(u: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Squares of 7/8 of the middle square's side somewhere in it: the official 224 of 256 pixels. For pairs of files."""
    whole = sizes.amin(1, keepdim=True)
    side = (whole * 7 / 8).expand(-1, 2)
    corners = (sizes - whole) / 2 + (whole - side) * u[:, 2:4]
    return torch.cat([corners, side], 1), torch.zeros(len(u), dtype=torch.bool)


def whole_picture(u: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """All of it."""
    return torch.cat([torch.zeros_like(sizes), sizes], 1), torch.zeros(len(u), dtype=torch.bool)


def sizes_of(pictures: Sequence[Image.Image]) -> Tensor:
    """Heights and widths in pixels, float64 [B, 2]."""
    return torch.tensor([(one.height, one.width) for one in pictures], dtype=torch.float64).view(-1, 2)


def resized_crops(
    pictures: Sequence[Image.Image], boxes: Tensor, mirrored: Tensor, size: int, channels: int
) -> Tensor:
    """Boxes [B, 4] (top, left, height, width, in pixels) of B pictures, as float32 [B, C, size, size] in [0, 1].

    Where `mirrored` (bool [B]) left is right. Linear interpolation with averaging where the picture shrinks, as Pillow's; whole values.
    """
    from PIL import Image

    pixels = np.empty((len(pictures), size, size, channels), dtype=np.uint8)
    ends = boxes[:, :2] + boxes[:, 2:]
    for place, picture, (top, left), (bottom, right) in zip(
        pixels, pictures, boxes[:, :2].tolist(), ends.tolist()
    ):
        box = (left, top, min(right, picture.width), min(bottom, picture.height))
        crop = picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
        place[:] = np.asarray(crop).reshape(size, size, channels)
    upright = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return torch.where(mirrored[:, None, None, None], upright.flip(-1), upright)
