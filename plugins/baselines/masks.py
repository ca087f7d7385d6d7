"""Mask strategies: random, BEiT blocks, tubes."""

from __future__ import annotations

import math
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from maskwright import Layout, Mask, Signals, setting
from maskwright.errors import UnsupportedLayout
from maskwright.toolkit.selection import keep_largest, kept_count, random_mask

TRIES = 10
"""Rectangles that BEiT proposes for one block before it gives the block up."""

ROUNDS = 64
"""Blocks after which `block` with an exact count stops proposing; a sample of 14 × 14 needs about seven."""


@attrs.frozen
class Random:
    """Positions hidden uniformly at random, the same number in every sample.

    int(N · (1 - ratio)) positions stay, truncated as in MAE (He et al., arXiv:2111.06377), and one where that is none. Papers
    that count what is hidden, such as CroCo, hide int(ratio · N): of 196 at 0.9 these are 176, not 177.
    """

    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "random"
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "video", "motion", "text"})
    needs: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    monotone: ClassVar[frozenset[str]] = frozenset({"ratio"})

    ratio: float = setting(0.75, "share of the positions that is hidden", ge=0, lt=1)
    truncated: str = setting(
        "visible", "which number is truncated to a whole one", choices=("visible", "hidden")
    )

    def draw(self, layout: Layout, *, signals: Signals, progress: float, generator: torch.Generator) -> Mask:
        """Any grid."""
        if self.truncated == "hidden":
            keep = layout.positions - int(self.ratio * layout.positions)
        else:
            keep = kept_count(layout.positions, self.ratio)
        return random_mask(layout, max(1, keep), generator)


@attrs.frozen
class Tube:
    """The same places hidden in every frame, uniformly at random.

    The first axis of the grid is time. int(ratio · places) places are hidden, truncated as in VideoMAE (Tong et al.,
    arXiv:2203.12602).
    """

    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "tube"
    modalities: ClassVar[frozenset[str]] = frozenset({"video", "motion"})
    needs: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    monotone: ClassVar[frozenset[str]] = frozenset({"ratio"})

    ratio: float = setting(0.9, "share of the places that is hidden in every frame", ge=0, lt=1)

    def draw(self, layout: Layout, *, signals: Signals, progress: float, generator: torch.Generator) -> Mask:
        """Grids of at least two axes, such as (8, 14, 14)."""
        if len(layout.grid) < 2:
            raise UnsupportedLayout(
                f"tube needs a grid of frames × places, such as (8, 14, 14), not {layout.grid}; use 'random' here."
            )
        frame = Layout(layout.batch, layout.grid[1:], layout.device)
        places = random_mask(frame, frame.positions - int(self.ratio * frame.positions), generator)
        return Mask(places.keep[:, None].expand(layout.shape).contiguous())


@attrs.frozen
class Block:
    """Rectangles hidden one after the other, with random size and aspect, until enough is hidden.

    BEiT (Bao et al., arXiv:2106.08254, algorithm 1): a block that adds between 1 and the still missing number of patches is
    taken, and the first block for which ten proposals fail ends the mask, so that at most N - int(N · (1 - ratio)) patches
    are hidden. With `exact` it goes on until that very number is hidden, as CAE does (Chen et al., arXiv:2202.03026).
    The official settings on 14 × 14 are `hidden=75` (BEiT) and `hidden=98, exact=True` (CAE).
    """

    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "block"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    counts: ClassVar[str] = "bounded"
    exact_with: ClassVar[dict[str, bool]] = {"exact": True}

    ratio: float = setting(0.4, "share of the patches that is hidden at most", ge=0, lt=1)
    exact: bool = setting(False, "go on until the number is met (CAE), instead of at most (BEiT)")
    hidden: int | None = setting(None, "number of hidden patches, instead of a ratio", ge=0, optional=True)
    min_block: int = setting(16, "patches of the smallest block that is proposed", ge=1)
    max_block: int | None = setting(
        None, "patches of the largest block; by default no limit", ge=1, optional=True
    )
    min_aspect: float = setting(0.3, "smallest aspect ratio; the largest is its inverse", gt=0, le=1)

    def draw(self, layout: Layout, *, signals: Signals, progress: float, generator: torch.Generator) -> Mask:
        """Grids of two axes, each of at least two patches."""
        if len(layout.grid) != 2 or min(layout.grid) < 2:
            raise UnsupportedLayout(
                f"block needs a grid of rows × columns, each at least 2, not {layout.grid}; use 'random' here."
            )
        target = layout.positions - max(1, kept_count(layout.positions, self.ratio))
        if self.hidden is not None:
            target = self.hidden
        if target >= layout.positions:
            raise UnsupportedLayout(
                f"block: hidden={target} leaves nothing visible of {layout.positions} patches; "
                f"`hidden` must be below {layout.positions}."
            )
        smallest, largest = min(self.min_block, target), largest_block(layout.grid, self.min_aspect)
        if smallest > largest:
            raise UnsupportedLayout(
                f"block: no block of {smallest} patches fits in {layout.grid}; set min_block to at most {largest}."
            )
        hidden = torch.zeros(layout.shape, dtype=torch.bool, device=layout.device)
        active = torch.full((layout.batch,), target > 0, device=layout.device)
        for _ in range(ROUNDS if self.exact else target):
            remaining = target - hidden.sum((1, 2))
            limit = remaining if self.max_block is None else remaining.clamp(max=self.max_block)
            blocks, found = propose(hidden, limit, smallest, self.min_aspect, generator)
            hidden |= blocks & active[:, None, None]
            active &= (hidden.sum((1, 2)) < target) & (found | self.exact)
            if not bool(active.any()):
                break
        return Mask(~(complete(hidden, target, generator) if self.exact else hidden))


def largest_block(grid: tuple[int, ...], min_aspect: float) -> int:
    """The largest area for which some aspect gives a rectangle shorter than both sides, after rounding."""
    height, width = (side - 0.5 for side in grid)
    return int(min(height * width, height**2 / min_aspect, width**2 / min_aspect))


def propose(
    hidden: Tensor, limit: Tensor, min_block: int, min_aspect: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One block for each sample: the first of ten random rectangles that hides between 1 and `limit` [B] more patches.

    `hidden` is bool [B, H, W]. Returns the rectangles, bool [B, H, W] (empty where none fits), and whether one was found,
    bool [B]. Area ~ U(min_block, limit), aspect log-uniform, place uniform; a rectangle as long as a side is refused.
    """
    batch, height, width = hidden.shape
    u = torch.rand(batch, TRIES, 4, generator=generator, device=generator.device, dtype=torch.float64)
    area, aspect, down, across = u.to(hidden.device).unbind(2)
    area = min_block + (limit[:, None] - min_block) * area
    aspect = ((2 * aspect - 1) * -math.log(min_aspect)).exp()
    h, w = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    inside = (h < height) & (w < width)
    h, w = h.clamp(max=height), w.clamp(max=width)
    top, left = (down * (height - h + 1)).long(), (across * (width - w + 1)).long()

    # Summed-area table: how much of each rectangle is hidden already, from its four corners.
    table = torch.nn.functional.pad(hidden.long().cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)
    corners = [(top + h, left + w), (top, left + w), (top + h, left), (top, left)]
    a, b, c, d = (table.gather(1, row * (width + 1) + column) for row, column in corners)
    adds = h * w - (a - b - c + d)

    fits = inside & (adds > 0) & (adds <= limit[:, None])
    first = fits.long().argmax(1, keepdim=True)
    found = fits.any(1)
    top, left, h, w = (x.gather(1, first)[:, :, None] for x in (top, left, h, w))
    row = torch.arange(height, device=hidden.device)[:, None]
    column = torch.arange(width, device=hidden.device)
    blocks = (row >= top) & (row < top + h) & (column >= left) & (column < left + w)
    return blocks & found[:, None, None], found


def complete(hidden: Tensor, target: int, generator: torch.Generator) -> Tensor:
    """bool [B, H, W] with exactly `target` hidden: what is missing is taken at random, beside what is hidden first."""
    beside = torch.nn.functional.max_pool2d(hidden[:, None].double(), 3, stride=1, padding=1)[:, 0]
    chance = torch.rand(hidden.shape, generator=generator, device=generator.device, dtype=torch.float64)
    scores = 2 * hidden + beside + chance.to(hidden.device)
    return keep_largest(scores.flatten(1), target).view_as(hidden)


COMPONENTS = (Random, Block, Tube)
