"""Dynamic alignment of a student that sees few patches with a frozen teacher that sees all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import Batch, BoundObjective, Loss, Mask, Signals, adapt, setting
from maskwright.backbones import encode_visible
from maskwright.backbones.teachers import NORMALIZATIONS, VisionTeacher
from maskwright.errors import BadParameter
from maskwright.toolkit.decoders import initialize_linear
from maskwright.toolkit.selection import drops_hidden


def whiten(features: Tensor) -> Tensor:
    """Layer normalisation over channels without parameters, eps 1e-5: the target of each level."""
    return nn.functional.layer_norm(features, features.shape[-1:], eps=1e-5)


def smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """2 · smooth L1 with beta 1, the mean over everything: the squared error where that is below 1."""
    return 2 * nn.functional.smooth_l1_loss(prediction, target)


DISTANCES = {
    "smooth-l1": smooth_l1,
    "l2": nn.functional.mse_loss,
    "l1": nn.functional.l1_loss,
}
"""Losses of a level, each the mean over images, tokens and channels."""


def initial_mixture(teacher_levels: range, teacher_depth: int, student_depth: int) -> Tensor:
    """Rows of the Dynamic Alignment matrix W [levels, S] before training, that of each aligned level of the teacher.

    The identity plus 0.01 for teachers as deep as the student; 1/S everywhere for others, which have no identity.
    """
    if teacher_depth != student_depth:
        return torch.full((len(teacher_levels), student_depth), 1 / student_depth)
    return (torch.eye(student_depth) + 0.01)[teacher_levels.start : teacher_levels.stop]


@attrs.frozen
class MaskAlign:
    """Features of visible patches, aligned with what a frozen teacher makes of the whole image; nothing is reconstructed.

    Xue et al., arXiv:2211.08887. The student's levels are mixed by a learned matrix (Dynamic Alignment) and brought to the
    teacher's width by one linear layer a level. `teacher` is a vision transformer of transformers, or its folder.
    """

    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "maskalign"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    provides: ClassVar[frozenset[str]] = frozenset({"attention"})
    backbone: ClassVar[str] = "patch"
    counts: ClassVar[str] = "exact"
    default_strategy: ClassVar[str] = "attentive"

    teacher: Any = setting(None, "a vision transformer of transformers, or its folder", optional=True)
    levels: int = setting(
        5, "last levels of the teacher that are aligned, with equal weights; at most all", ge=1
    )
    mixture: bool = setting(
        True, "mix the student's levels by a learned matrix; otherwise level is aligned with level"
    )
    loss: str = setting("smooth-l1", "the loss of a level", choices=DISTANCES)
    normalization: str = setting(
        "imagenet", "what the teacher's pixels are normalised with", choices=NORMALIZATIONS
    )

    @staticmethod
    def example_parameters() -> dict[str, Any]:
        """A tiny teacher, for the conformance kit."""
        from maskwright.backbones.defaults import vision_transformer

        return {
            "teacher": vision_transformer(image_size=16, patch_size=4, width=16, depth=2, heads=2, seed=7)
        }

    def bind(self, backbone: nn.Module) -> BoundMaskAlign:
        """The student is a PatchBackbone (or a model that has an adapter). Raises `BadParameter` without a teacher."""
        if self.teacher is None:
            raise BadParameter(
                "maskalign needs a teacher: give teacher=… a vision transformer of transformers or the folder of one "
                "(--set objective.teacher=./clip-vit)."
            )
        return BoundMaskAlign(self, adapt(backbone, self.backbone))


class BoundMaskAlign(BoundObjective):
    """`teacher`, `weights` (W, flat) and `heads`.

    Outputs: `features` [B, K, D], the student's last level at visible patches; `prediction` [B, T+K, Dt], what it says of
    the teacher's last level there (T is 1 where both models have a class token, which is aligned as well).
    """

    def __init__(self, settings: MaskAlign, backbone: nn.Module) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = backbone
        self.teacher = VisionTeacher(settings.teacher, backbone, normalization=settings.normalization)
        depth = self.teacher.depth
        if not settings.mixture and depth != backbone.depth:
            raise BadParameter(
                f"maskalign: without mixture, levels are aligned one by one, but the teacher has {depth} blocks and the student "
                f"{backbone.depth}; leave mixture on."
            )
        # Only the rows and heads that a loss reaches exist: the others would never be trained.
        self.levels = range(max(0, depth - settings.levels), depth)
        mixture = initial_mixture(self.levels, depth, backbone.depth)
        # A plain vector: optimisers that spare vectors from weight decay spare it, as the official one does.
        self.weights = nn.Parameter(mixture.flatten()) if settings.mixture else None
        self.heads = nn.ModuleList(nn.Linear(backbone.width, self.teacher.width) for _ in self.levels)
        self.heads.apply(initialize_linear)

    def signals(self, batch: Batch) -> Signals:
        """`attention` [B, N] of the teacher's class token, and the teacher's levels [B, P+N, Dt] for `forward`.

        A teacher without a class token gives its levels only.
        """
        seen = self.teacher(batch["pixels"], levels=self.levels, attention=self.teacher.has_class_token)
        told = {} if seen.class_attention is None else {"attention": seen.class_attention}
        return told | {f"teacher level {a}": level for a, level in seen.levels.items()}

    def encode(self, pixels: Tensor, mask: Mask) -> list[Tensor]:
        """[B, C, H, W] → S_1 … S_S, each [B, P+K, D]: the student's blocks on visible patches, before its final norm."""
        tokens = self.backbone.patches(pixels) + self.backbone.positions
        with drops_hidden("maskalign"):
            every: list[Tensor] = encode_visible(
                self.backbone, tokens, mask, levels=range(self.backbone.depth)
            )
        return every

    def mixed(self, every: list[Tensor]) -> Sequence[Tensor]:
        """Z_a = Σ_b W[a, b] · S_b for each aligned level, [A, B, P+K, D]."""
        if self.weights is None:
            return [every[a] for a in self.levels]
        return torch.einsum("as,s...->a...", self.weights.view(len(self.levels), -1), torch.stack(every))

    def forward(
        self,
        batch: Batch,
        mask: Mask,
        *,
        signals: Signals | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Loss:
        """The loss of each aligned level, averaged over the levels. Unequal visible counts raise `UnequalMaskCounts`."""
        told = signals if signals and f"teacher level {self.levels[0]}" in signals else self.signals(batch)
        mask = mask.flatten()
        every = self.encode(batch["pixels"], mask)
        prefix = every[0].shape[1] - mask.visible_indices().shape[1]
        shared = min(prefix, self.teacher.prefix, 1)
        measure = DISTANCES[self.settings.loss]
        parts = {}
        for level, mixture, head in zip(self.levels, self.mixed(every), self.heads):
            prediction = head(torch.cat([mixture[:, :shared], mixture[:, prefix:]], 1))
            whole = told[f"teacher level {level}"]
            target = [whole[:, :shared], mask.gather_visible(whole[:, self.teacher.prefix :])]
            parts[f"level_{level + 1}"] = measure(prediction, whiten(torch.cat(target, 1))) / len(self.levels)
        total = torch.stack(list(parts.values())).sum()
        return Loss(total, parts, {"features": every[-1][:, prefix:], "prediction": prediction})
