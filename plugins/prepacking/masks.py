"""Attention within the segments of packed rows."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from maskwright import AttentionMask, Layout, Signals, setting
from maskwright.errors import MaskShapeError, UnsupportedLayout
from maskwright.toolkit.packing import PADDING, packed_attention


@attrs.frozen
class Prepack:
    """Who attends to whom in packed rows: only within a segment, and only backwards (the paper's independent mask).

    It reads the batch column "segments", int64 [B, L]: a run of equal ids is one sequence, -1 is padding, which attends to
    padding so that no row of attention is empty. Nothing is random. `maskwright.toolkit.packing` has the positions and the weights
    of the loss that go with it; `maskwright.plugins.prepacking.prefill` uses all of them.
    """

    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "prepack"
    modalities: ClassVar[frozenset[str]] = frozenset({"text"})
    needs: ClassVar[frozenset[str]] = frozenset({"segments"})
    provides: ClassVar[frozenset[str]] = frozenset()
    counts: ClassVar[str] = "bounded"

    causal: bool = setting(True, "a token does not attend to later ones of its segment")

    @staticmethod
    def example_signals(layout: Layout, generator: torch.Generator) -> dict[str, Tensor]:
        """Rows of segments of about eight tokens, padded at the end."""
        begins = torch.rand(layout.batch, layout.positions, generator=generator) < 1 / 8
        segments = begins.cumsum(1) - begins[:, :1].long()
        padding = torch.randint(0, max(1, layout.positions // 4), (layout.batch, 1), generator=generator)
        late = torch.arange(layout.positions) >= layout.positions - padding
        return {"segments": segments.masked_fill(late, PADDING)}

    def draw(
        self, layout: Layout, *, signals: Signals, progress: float, generator: torch.Generator
    ) -> AttentionMask:
        """A rule over L tokens for each row; grids of one axis."""
        if len(layout.grid) != 1:
            raise UnsupportedLayout(
                f"prepack masks rows of tokens, of a grid such as (128,), not {layout.grid}."
            )
        segments = signals["segments"]
        if tuple(segments.shape) != layout.shape or segments.is_floating_point():
            raise MaskShapeError(
                f"prepack needs segment ids of whole numbers {list(layout.shape)}, one a token; got {segments.dtype} "
                f"{list(segments.shape)}."
            )
        return packed_attention(segments, causal=self.causal)


COMPONENTS = (Prepack,)
