"""Masks that hide the patches with the largest predicted loss, more of them as training goes on (easy to hard)."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from maskwright import Layout, Mask, Signals, setting
from maskwright.errors import MaskShapeError, MissingSignal, UnsupportedLayout
from maskwright.toolkit.selection import keep_largest, kept_count, noise


def hard_count(hidden: int, progress: float, start: float = 0.0, end: float = 0.5) -> int:
    """int(hidden · α), α = start + (end - start) · progress: how many of the hidden patches are taken by loss.

    The official α of epoch e (from 0) of T is that of progress (e + 1) / T.
    """
    return int(hidden * (start + (end - start) * progress))


def hide_hard(patch_loss: Tensor, random: Tensor, keep: int, hard: int) -> Tensor:
    """bool [B, N], True = visible: `keep` positions in each row, never one of the row's `hard` largest losses.

    `patch_loss` [B, N] counts only through its order, equal losses by position (the lower is the harder). `random` [B, N] are
    numbers in [0, 1) that decide among the others. `keep + hard` must not exceed N.
    """
    if hard > 0:
        random = random - keep_largest(patch_loss, hard).to(random.dtype)
    return keep_largest(random, keep)


@attrs.frozen
class HardPatches:
    """Patches of the largest predicted loss hidden, a share that grows with training; the rest of the mask is random.

    Wang et al., arXiv:2304.05919. Of L patches L - int(L · (1 - ratio)) are hidden in every image; int of α times
    that number are those of the largest `patch_loss`, the others are drawn uniformly from what is left. α goes linearly from
    `alpha_start` to `alpha_end` with the progress.
    """

    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "hard-patches"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"patch_loss"})
    provides: ClassVar[frozenset[str]] = frozenset()
    monotone: ClassVar[frozenset[str]] = frozenset({"ratio"})

    ratio: float = setting(0.75, "share of the patches that is hidden", ge=0, lt=1)
    alpha_start: float = setting(0.0, "share of the hidden patches taken by loss, at the start", ge=0, le=1)
    alpha_end: float = setting(0.5, "share of the hidden patches taken by loss, at the end", ge=0, le=1)

    def draw(self, layout: Layout, *, signals: Signals, progress: float, generator: torch.Generator) -> Mask:
        """Any grid that keeps a patch at this ratio. Needs the signal `patch_loss` [B, N] (or [B, *grid])."""
        if "patch_loss" not in signals:
            raise MissingSignal(
                "hard-patches needs the signal 'patch_loss' [B, N], the loss expected of each patch; "
                "objective 'hpm' provides it, or give your own."
            )
        patch_loss = signals["patch_loss"].flatten(1)
        if patch_loss.shape != (layout.batch, layout.positions):
            raise MaskShapeError(
                f"hard-patches: the signal patch_loss is {list(signals['patch_loss'].shape)}, the layout has "
                f"{layout.batch} × {layout.positions} patches."
            )
        keep = kept_count(layout.positions, self.ratio)
        if keep < 1:
            raise UnsupportedLayout(
                f"hard-patches: ratio={self.ratio} leaves nothing visible of {layout.positions} patches; lower it."
            )
        hard = hard_count(layout.positions - keep, progress, self.alpha_start, self.alpha_end)
        return Mask(hide_hard(patch_loss, noise(layout, generator), keep, hard).view(layout.shape))
