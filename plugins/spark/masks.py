"""Cells of a network's coarsest map, hidden uniformly at random."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch

from maskwright import Layout, Mask, Signals, setting
from maskwright.errors import UnsupportedLayout
from maskwright.toolkit.selection import random_mask


def visible_count(cells: int, ratio: float) -> int:
    """round(cells · (1 - ratio)) of the product in double precision, half to even, as the official code rounds it."""
    return round(cells * (1 - ratio))


@attrs.frozen
class SparkBlocks:
    """Cells of the coarsest map hidden uniformly at random, rounded to the nearest count, the same in every image.

    Section 3.1 of SparK (Tian et al., arXiv:2301.03580): one cell is a block as large as the network's total stride, 32 pixels
    for a ResNet, so that every finer map is masked by whole cells. 20 of 49 are visible at 224 pixels.
    """

    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "spark"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset()
    monotone: ClassVar[frozenset[str]] = frozenset({"ratio"})

    ratio: float = setting(0.6, "share of the cells that is hidden", ge=0, lt=1)

    def draw(self, layout: Layout, *, signals: Signals, progress: float, generator: torch.Generator) -> Mask:
        """Any grid of which at least one cell stays visible."""
        visible = visible_count(layout.positions, self.ratio)
        if not visible:
            raise UnsupportedLayout(
                f"spark: ratio={self.ratio} of {layout.positions} cells rounds to none visible; give a smaller ratio or "
                "larger images (a cell is as large as the network's total stride)."
            )
        return random_mask(layout, visible, generator)
