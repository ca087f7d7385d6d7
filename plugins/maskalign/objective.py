"""Dynamic alignment of a student that sees few patches with a frozen teacher that sees all of them."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import Batch, BoundObjective, Loss, Mask, Signals, adapt, setting
from maskwright.backbones.teachers import NORMALIZATIONS, VisionTeacher
from maskwright.errors import BadParameter


def whiten(features: Tensor) -> Tensor:
    """Layer normalisation over channels without parameters, eps 1e-5: the target of each level."""
    return nn.functional.layer_norm(features, features.shape[-1:], eps=1e-5)


def distance(prediction: Tensor, target: Tensor) -> Tensor:
    """2 · smooth L1 with beta 1, the mean over everything: the squared error where it is below 1."""
    return 2 * nn.functional.smooth_l1_loss(prediction, target)


def initial_mixture(teacher_levels: range, teacher_depth: int, student_depth: int) -> Tensor:
    """Rows of the Dynamic Alignment matrix W [levels, S] before training.

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
    default_strategy: ClassVar[str] = "attentive"

    teacher: Any = setting(None, "a vision transformer of transformers, or its folder", optional=True)
    levels: int = setting(5, "last levels of the teacher that are aligned, at most all", ge=1)
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
    """Outputs: `features` [B, K, D], the student's last level at visible patches; `prediction` [B, T+K, Dt], what it says of
    the teacher's last level there (T is 1 where both models have a class token, which is aligned as well)."""

    def __init__(self, settings: MaskAlign, backbone: nn.Module) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = backbone
        self.teacher = VisionTeacher(settings.teacher, backbone, normalization=settings.normalization)
        depth = self.teacher.depth
        self.levels = range(max(0, depth - settings.levels), depth)
        # Only the rows and heads that a loss reaches exist: the others would never be trained.
        self.mixture = nn.Parameter(initial_mixture(self.levels, depth, backbone.depth))
        self.heads = nn.ModuleList(nn.Linear(backbone.width, self.teacher.width) for _ in self.levels)
        for head in self.heads:
            nn.init.xavier_uniform_(head.weight)
            nn.init.zeros_(head.bias)

    def signals(self, batch: Batch) -> Signals:
        """`attention` [B, N] of the teacher's class token, and the teacher's levels [B, P+N, Dt] for `forward`.

        A teacher without a class token gives its levels only.
        """
        seen = self.teacher(batch["pixels"], levels=self.levels, attention=self.teacher.has_class_token)
        told = {} if seen.class_attention is None else {"attention": seen.class_attention}
        return told | {f"teacher level {a}": level for a, level in seen.levels.items()}

    def forward(
        self,
        batch: Batch,
        mask: Mask,
        *,
        signals: Signals | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Loss:
        """2 · smooth L1 of each aligned level, averaged over the levels. Unequal visible counts raise `UnequalMaskCounts`."""
        pixels = batch["pixels"]
        told = signals if signals and f"teacher level {self.levels[0]}" in signals else self.signals(batch)
        tokens = mask.gather_visible(self.backbone.patches(pixels) + self.backbone.positions)
        prefix = self.backbone.prefix(len(pixels))
        every = self.backbone.encode(torch.cat([prefix, tokens], 1), levels=range(self.backbone.depth))
        student = torch.stack(every)  # [S, B, P+K, D]
        patches = mask.visible_indices().shape[1]
        mine, its = student.shape[2] - patches, self.teacher_prefix(told, mask)
        shared = min(mine, its, 1)
        prediction, parts = student[-1], {}
        for row, level, head in zip(self.mixture, self.levels, self.heads):
            prediction = head(torch.einsum("s,sbtd->btd", row, without_others(student, mine, shared)))
            target = told[f"teacher level {level}"]
            target = torch.cat([target[:, :shared], mask.gather_visible(target[:, its:])], 1)
            parts[f"level_{level + 1}"] = distance(prediction, whiten(target)) / len(self.levels)
        total = torch.stack(list(parts.values())).sum()
        return Loss(total, parts, {"features": student[-1][:, mine:], "prediction": prediction})

    def teacher_prefix(self, told: Signals, mask: Mask) -> int:
        """Class and register tokens that the teacher puts before its patches."""
        return told[f"teacher level {self.levels[0]}"].shape[1] - mask.flatten().shape[1]


def without_others(tokens: Tensor, prefix: int, shared: int) -> Tensor:
    """[..., P+K, D] → [..., shared+K, D]: the class token where both models have one, and the patches."""
    return torch.cat([tokens[..., :shared, :], tokens[..., prefix:, :]], -2)
