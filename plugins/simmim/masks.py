"""Squares of a grid that is coarser than the model's own, hidden uniformly at random."""

from __future__ import annotations

import math
from typing import ClassVar

import attrs
import torch

from maskwright import Layout, Mask, Signals, setting
from maskwright.errors import UnsupportedLayout
from maskwright.toolkit.selection import random_mask

PAPER_MASK_PATCH = 32
"""Pixels a side of a square, for the paper's images of 192 and 224 pixels."""


def hidden_count(cells: int, ratio: float) -> int:
    """⌈cells · ratio⌉ of the product in double precision, as the official code rounds it: 100 · 0.55 gives 56."""
    return math.ceil(cells * ratio)


def suited_mask_patch(shorter_side: int, patch_size: int) -> int:
    """The paper's 32 pixels; below 96 pixels of image halved, as far as whole patches allow, until three fit in a side."""
    square = PAPER_MASK_PATCH
    while 3 * square > shorter_side and square % (2 * patch_size) == 0:
        square //= 2
    return square


@attrs.frozen
class SimMimBlocks:
    """Squares larger than the model's patches, hidden uniformly at random, the same number in every image.

    Section 3.2 of SimMIM (Xie et al., arXiv:2111.09886): the image is cut into squares of `mask_patch` pixels, of which
    ⌈count · ratio⌉ are hidden, so that the share is at least `ratio`: 22 of 36 at 192 pixels, 30 of 49 at 224. Raising
    `ratio` under the same seed hides more squares and shows none again.
    """

    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "simmim-blocks"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset()
    monotone: ClassVar[frozenset[str]] = frozenset({"ratio"})

    ratio: float = setting(0.6, "share of the squares that is hidden, rounded up", ge=0, le=1)
    mask_patch: int | None = setting(
        None,
        "pixels a side of a square; by default 32, halved on images below 96 pixels until three fit in a side",
        ge=1,
        optional=True,
    )

    def draw(self, layout: Layout, *, signals: Signals, progress: float, generator: torch.Generator) -> Mask:
        """Grids of rows × columns with a `patch_size` that divides the square, in images that the square divides."""
        coarse = self.coarse(layout)
        hidden = hidden_count(coarse.positions, self.ratio)
        if hidden == coarse.positions and self.ratio < 1:
            raise UnsupportedLayout(
                f"simmim-blocks: ratio={self.ratio} of {coarse.positions} squares rounds up to all of them; "
                "give a smaller mask_patch or ratio."
            )
        return random_mask(coarse, coarse.positions - hidden, generator).upsample(layout.grid)

    def coarse(self, layout: Layout) -> Layout:
        """The layout of the squares."""
        patch = layout.patch_size
        if len(layout.grid) != 2 or patch is None:
            raise UnsupportedLayout(
                f"simmim-blocks measures squares in pixels: it needs a grid of rows × columns and the patch size, such as "
                f"Layout(8, (14, 14), patch_size=16), not {layout.grid} with patch_size={patch}; use 'random' here."
            )
        image = tuple(side * patch for side in layout.grid)
        square = suited_mask_patch(min(image), patch) if self.mask_patch is None else self.mask_patch
        if square % patch or any(side % square for side in image):
            legal = [patch * s for s in range(1, min(layout.grid) + 1) if not any(g % s for g in layout.grid)]
            raise UnsupportedLayout(
                f"simmim-blocks: mask_patch={square} must be a multiple of the model's patch of {patch} pixels and divide "
                f"the image of {image[0]} × {image[1]}; here it may be {', '.join(map(str, legal))}."
            )
        return Layout(layout.batch, tuple(side // square for side in image), layout.device, square)
