"""Mask strategies that keep every rule, and for each rule one that breaks it and no other."""

import os
from typing import ClassVar

import attrs
import torch

from maskwright import AttentionMask, Layout, Mask, setting
from maskwright.errors import UnsupportedLayout
from maskwright.toolkit.selection import keep_largest, kept_count, noise


@attrs.frozen
class Right:
    """Hides where the given loss is largest, with some noise."""

    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "right"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"patch_loss"})
    provides: ClassVar[frozenset[str]] = frozenset()
    monotone: ClassVar[frozenset[str]] = frozenset({"ratio"})

    ratio: float = setting(0.5, "share that is hidden", ge=0, lt=1)

    def scores(self, layout, signals, generator):
        return noise(layout, generator) - signals["patch_loss"].double()

    def draw(self, layout, *, signals, progress, generator):
        keep = max(1, kept_count(layout.positions, self.ratio))
        return Mask(keep_largest(self.scores(layout, signals, generator), keep).view(layout.shape))


@attrs.frozen
class Causal:
    """An attention rule: tokens see those before them."""

    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "causal"
    modalities: ClassVar[frozenset[str]] = frozenset({"text"})
    needs: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()

    def draw(self, layout, *, signals, progress, generator):
        return AttentionMask.causal(layout.positions, device=layout.device)


@attrs.frozen
class Apart:
    """Two consecutive rows keep one half of the positions each."""

    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "apart"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    disjoint_rows: ClassVar[int] = 2

    def draw(self, layout, *, signals, progress, generator):
        pairs = noise(Layout((layout.batch + 1) // 2, layout.grid), generator)
        scores = pairs[:, None] * torch.tensor([1.0, -1.0])[:, None]
        keep = keep_largest(scores.flatten(0, 1)[: layout.batch], layout.positions // 2)
        return Mask(keep.view(layout.shape))


class Tensors(Right):
    def draw(self, layout, **others):
        return super().draw(layout, **others).keep


class Raises(Right):
    def draw(self, layout, **others):
        raise IndexError("list index out of range")


class Flattens(Right):
    def draw(self, layout, **others):
        return super().draw(layout, **others).flatten()


class OneQueryMore(Causal):
    def draw(self, layout, **others):
        return AttentionMask.causal(layout.positions + 1)


class Elsewhere(Right):
    def draw(self, layout, **others):
        return super().draw(layout, **others).to("meta")


class Thresholds(Right):
    """How many are hidden depends on how large the losses are."""

    def draw(self, layout, *, signals, progress, generator):
        keep = self.scores(layout, signals, generator) > self.ratio - 1
        keep[:, 0] = True
        return Mask(keep.view(layout.shape))


@attrs.frozen
class Bounded(Thresholds):
    """As `Thresholds`, and says so; with `even` every row keeps the same number."""

    counts: ClassVar[str] = "bounded"
    exact_with: ClassVar[dict[str, bool]] = {"even": True}

    even: bool = False

    def draw(self, layout, **others):
        return Right.draw(self, layout, **others) if self.even else super().draw(layout, **others)


@attrs.frozen
class NotEven(Bounded):
    def draw(self, layout, **others):
        return Thresholds.draw(self, layout, **others)


class Modest(Right):
    counts: ClassVar[str] = "bounded"


class HidesAll(Right):
    def draw(self, layout, **others):
        mask = super().draw(layout, **others)
        return mask if self.ratio < 0.7 else mask & ~mask


@attrs.frozen
class KeepsTooMany(Right):
    """It keeps half and says that it keeps less."""

    def count_range(self, layout: Layout) -> tuple[int, int]:
        return 1, layout.positions // 10


class Blind(Causal):
    """The first query sees nothing."""

    def draw(self, layout, **others):
        return AttentionMask(lambda b, h, q, k: k < q, layout.positions)


class OtherRandomness(Right):
    def scores(self, layout, signals, generator):
        seed = int.from_bytes(os.urandom(4), "big")
        return super().scores(layout, signals, torch.Generator().manual_seed(seed))


class MovesTheGlobalState(Right):
    def draw(self, layout, **others):
        torch.rand(1)
        return super().draw(layout, **others)


class WritesSignals(Right):
    def scores(self, layout, signals, generator):
        return super().scores(layout, {"patch_loss": signals["patch_loss"].add_(1)}, generator)


class LooksAtTheBatch(Right):
    """A loss counts relative to the row's neighbours."""

    def scores(self, layout, signals, generator):
        loss = signals["patch_loss"].double()
        return noise(layout, generator) - (loss - loss.mean(0))


class OneRowForAll(Right):
    needs = frozenset()

    def scores(self, layout, signals, generator):
        return noise(Layout(1, layout.grid), generator).expand(layout.batch, -1).contiguous()


class Meets(Right):
    """It says that three rows keep no position twice, and draws each by itself."""

    disjoint_rows = 3


class ForgetsWhatWasHidden(Right):
    """Another order above one half."""

    def scores(self, layout, signals, generator):
        scores = super().scores(layout, signals, generator)
        return scores if self.ratio <= 0.5 else -scores


class ForgetsAsItGoes(Right):
    """It says that nothing is shown again as training goes on."""

    monotone = frozenset({"progress"})

    def draw(self, layout, *, progress, **others):
        mask = super().draw(layout, progress=progress, **others)
        return mask if progress < 0.5 else Mask(mask.keep.flip(-1))


class NeedsMoreThanItUses(Right):
    needs = frozenset({"patch_loss", "attention"})


class Picky(Right):
    def draw(self, layout, **others):
        if layout.grid != (16, 16):
            raise UnsupportedLayout(f"picky takes a grid of 16 × 16, not {layout.grid}.")
        return super().draw(layout, **others)


class Changeable(Right):
    anything = 0

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)


RIGHT = (Right, Causal, Bounded, Apart)
BROKEN = [
    ("draws-a-boolean-mask", Tensors),
    ("draws-a-boolean-mask", Raises),
    ("shape-is-the-layouts", Flattens),
    ("shape-is-the-layouts", OneQueryMore),
    ("device-is-the-layouts", Elsewhere),
    ("counts-are-equal", Thresholds),
    ("counts-are-equal", NotEven),
    ("bounded-counts-differ", Modest),
    ("no-row-is-all-hidden", HidesAll),
    ("no-row-is-all-hidden", KeepsTooMany),
    ("no-row-is-all-hidden", Blind),
    ("same-generator-same-mask", OtherRandomness),
    ("global-random-state-is-untouched", MovesTheGlobalState),
    ("signals-are-left-alone", WritesSignals),
    ("rows-are-independent", LooksAtTheBatch),
    ("rows-are-independent", OneRowForAll),
    ("consecutive-rows-are-disjoint", Meets),
    ("monotone", ForgetsWhatWasHidden),
    ("monotone", ForgetsAsItGoes),
    ("every-signal-is-used", NeedsMoreThanItUses),
    ("ordinary-layouts-are-accepted", Picky),
    ("component-is-frozen", Changeable),
]
