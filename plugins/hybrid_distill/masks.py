"""Masks that hide, stage by stage, the patches that are most like the others."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from maskwright import Layout, Signals, StagedMask, setting
from maskwright.errors import MaskShapeError, MissingSignal
from maskwright.toolkit.selection import keep_largest


def alive_counts(positions: int, keep: float, stages: int) -> list[int]:
    """How many of the positions each stage leaves: ⌊ρ · those before⌋, and at least one."""
    counts = [positions]
    for _ in range(stages):
        # A product that is a whole number but for its rounding, such as 0.29 · 100, is that number.
        counts.append(max(1, int(counts[-1] * keep + 1e-9)))
    return counts[1:]


def redundancy(features: Tensor, alive: Tensor) -> Tensor:
    """Mean cosine similarity of each token to the other ones alive, [B, N, D] and bool [B, N] → [B, N]; -inf where not alive.

    A token alone has none to be like: 0.
    """
    directions = torch.nn.functional.normalize(features, dim=-1) * alive[..., None]
    # The sum over all is the sum over the others and the token itself: no N × N matrix is needed.
    similar = (directions * directions.sum(1, keepdim=True)).sum(-1) - directions.square().sum(-1)
    others = (alive.sum(1, keepdim=True) - 1).clamp(min=1)
    return (similar / others).masked_fill(~alive, -torch.inf)


TIE = 64
"""Redundancies that differ by fewer units of rounding are equal; those of the last two tokens always are."""


def drop_redundant(features: Tensor, alive: Tensor, keep: int) -> Tensor:
    """bool [B, N]: the `keep` least redundant of the tokens alive; equal ones stay in order of position."""
    scores = (redundancy(features, alive) / (TIE * torch.finfo(features.dtype).eps)).round()
    return keep_largest((-scores).masked_fill(~alive, -torch.inf), keep)


@attrs.frozen
class ProgressiveRedundant:
    """The patches whose features are most like those of the others, hidden in stages, a share of what is left in each.

    Shi et al., arXiv:2306.15876. Deterministic. At every stage the similarity is measured anew among the patches still alive.
    """

    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "progressive-redundant"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_features"})
    provides: ClassVar[frozenset[str]] = frozenset()

    keep: float = setting(0.7, "share ρ of the patches still alive that each stage keeps", gt=0, le=1)
    stages: int = setting(3, "how many times patches are dropped", ge=1)

    @staticmethod
    def example_signals(layout: Layout, generator: torch.Generator) -> dict[str, Tensor]:
        """Random features for the conformance kit: three stages of 8 channels."""
        return {"teacher_features": torch.randn(layout.batch, layout.positions, 3, 8, generator=generator)}

    def count_range(self, layout: Layout) -> tuple[int, int]:
        """Visible patches of a row at the end, fewest and most: the same."""
        last = alive_counts(layout.positions, self.keep, self.stages)[-1]
        return last, last

    def draw(
        self, layout: Layout, *, signals: Signals, progress: float, generator: torch.Generator
    ) -> StagedMask:
        """Any grid. Needs `teacher_features` [B, N, stages, D], or [B, N, D] to measure every stage by the same."""
        if "teacher_features" not in signals:
            raise MissingSignal(
                "progressive-redundant needs the signal 'teacher_features' [B, N, stages, D], a vector of each patch; "
                "objective 'hybrid-distill' provides it, or give your own."
            )
        features = signals["teacher_features"]
        shape = list(features.shape)
        if features.ndim not in (3, 4) or shape[:2] != [layout.batch, layout.positions]:
            raise MaskShapeError(
                f"progressive-redundant: the signal teacher_features is {shape}, the layout has {layout.batch} × "
                f"{layout.positions} patches; it must be [B, N, stages, D] or [B, N, D]."
            )
        if features.ndim == 4 and shape[2] != self.stages:
            raise MaskShapeError(
                f"progressive-redundant: the signal teacher_features has {shape[2]} stages, stages={self.stages}; "
                "give strategy and objective the same number."
            )
        alive = torch.ones(shape[:2], dtype=torch.bool, device=features.device)
        survived = torch.zeros(shape[:2], dtype=torch.int64, device=features.device)
        for stage, count in enumerate(alive_counts(layout.positions, self.keep, self.stages)):
            here = features if features.ndim == 3 else features[:, :, stage]
            alive = drop_redundant(here if here.dtype == torch.float64 else here.float(), alive, count)
            survived += alive
        return StagedMask(survived.view(layout.shape), self.stages)
