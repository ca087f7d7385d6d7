"""Attentive masking: patches stay visible with a chance in proportion to what a teacher's class token pays them."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from maskwright import Layout, Mask, Signals, setting
from maskwright.toolkit.selection import keep_largest, kept_count, noise


def draw_without_replacement(importance: Tensor, count: int, u: Tensor) -> Tensor:
    """bool [B, N]: `count` places drawn one after the other, each in proportion to what is left of `importance` [B, N].

    `u` [B, N] are uniform numbers in [0, 1). The `count` largest of log importance + Gumbel noise have that law. Places of no
    importance come after all others, in random order.
    """
    weight = importance.double()
    gumbel = -(-u.double().clamp(min=torch.finfo(torch.float64).tiny).log()).log()
    # Keys of places without importance stay below every other key, and keep their own random order.
    keys = torch.where(weight > 0, weight.clamp(min=1e-300).log() + gumbel, -1e6 + gumbel)
    return keep_largest(keys, count)


@attrs.frozen
class Attentive:
    """Patches stay visible with a chance in proportion to a teacher's attention, drawn without replacement.

    Xue et al., arXiv:2211.08887. Salient patches tend to stay: this is a draw, not the top of the list.
    """

    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "attentive"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    provides: ClassVar[frozenset[str]] = frozenset()
    monotone: ClassVar[frozenset[str]] = frozenset({"ratio"})

    ratio: float = setting(0.7, "share of the patches that is hidden", ge=0, lt=1)

    def draw(self, layout: Layout, *, signals: Signals, progress: float, generator: torch.Generator) -> Mask:
        """Any grid; `signals["attention"]` is [B, N], not negative, of any scale."""
        count = max(1, kept_count(layout.positions, self.ratio))
        keep = draw_without_replacement(signals["attention"].flatten(1), count, noise(layout, generator))
        return Mask(keep.view(layout.shape))
