"""The mask that the time-free loss is an average over: a uniform number of hidden tokens."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from maskwright import Layout, Mask, Signals, setting
from maskwright.toolkit.selection import random_mask


def uniform_counts(
    batch: int, positions: int, generator: torch.Generator, *, antithetic: bool = False
) -> Tensor:
    """n ~ Uniform{1, …, positions} for each sample, int64 [batch].

    With `antithetic` the batch has one sample in each of `batch` equal strata, in random order: each n is still uniform, and
    their mean varies less.
    """
    u = torch.rand(batch, generator=generator, device=generator.device, dtype=torch.float64)
    if antithetic:
        u = (torch.randperm(batch, generator=generator, device=generator.device) + u) / batch
    return (u * positions).long().clamp(max=positions - 1) + 1


@attrs.frozen
class UniformCount:
    """A uniform number of positions hidden in each sample, from one to all, and uniformly chosen.

    The expectation over it of the mean loss on the hidden positions is the likelihood bound of masked diffusion for any
    schedule (Zheng et al., arXiv:2409.02908, section 3).
    """

    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "uniform-count"
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "video", "motion", "text"})
    needs: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    counts: ClassVar[str] = "bounded"

    # MDLM's training.antithetic_sampling, of the time there.
    antithetic: bool = setting(True, "spread the numbers evenly over the batch")

    def count_range(self, layout: Layout) -> tuple[int, int]:
        """Visible positions of a row: (fewest, most)."""
        return 0, layout.positions - 1

    def draw(self, layout: Layout, *, signals: Signals, progress: float, generator: torch.Generator) -> Mask:
        """Any grid."""
        hidden = uniform_counts(layout.batch, layout.positions, generator, antithetic=self.antithetic)
        return random_mask(layout, layout.positions - hidden.to(layout.device), generator)


COMPONENTS = (UniformCount,)
