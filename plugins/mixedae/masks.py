"""Which image of a group each position is taken from."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from maskwright import Layout, Mask, Signals, setting
from maskwright.errors import UnsupportedLayout
from maskwright.toolkit.selection import noise


def assignment(order: Tensor, images: int) -> Tensor:
    """A, int64 [G, N]: the image from which a group takes each position, from uniform noise [G, N].

    Each of 0 … images - 1 gets N // images positions, uniformly at random; the N mod images that are left over get the number
    `images`, which is nobody's.
    """
    rank = order.argsort(1).argsort(1)
    return (rank // (order.shape[1] // images)).clamp(max=images)


@attrs.frozen
class MixAssignment:
    """Consecutive images share one grid: each keeps an equal random share, and no position is kept by two of them.

    The mixing of Chen et al., arXiv:2303.17152, as masks: those of `images` rows partition the grid, and which of them keeps a
    position is the image that it is taken from. Images at the end of a batch that are fewer keep the same share of the grid;
    what the missing ones would have kept is nobody's, as are N mod `images` positions.
    """

    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "mix-assignment"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset()

    images: int = setting(4, "images mixed into one: 1 / r for the paper's mixing ratio r", ge=1)

    @property
    def disjoint_rows(self) -> int:
        """As many as are mixed."""
        return self.images

    def draw(self, layout: Layout, *, signals: Signals, progress: float, generator: torch.Generator) -> Mask:
        """Any grid of at least `images` positions."""
        if layout.positions < self.images:
            raise UnsupportedLayout(
                f"mix-assignment: {self.images} images cannot share {layout.positions} positions; "
                f"`images` must be at most {layout.positions}."
            )
        groups = Layout(-(-layout.batch // self.images), layout.grid, layout.device)
        source = assignment(noise(groups, generator), self.images)
        keep = source[:, None] == torch.arange(self.images, device=layout.device)[:, None]
        return Mask(keep.flatten(0, 1)[: layout.batch].reshape(layout.shape))
