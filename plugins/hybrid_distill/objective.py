"""Token relations of one frozen teacher and final features of another, on the tokens that survive."""

from __future__ import annotations

import inspect
from bisect import bisect_right
from itertools import pairwise
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import Batch, BoundObjective, Loss, Mask, Signals, StagedMask, adapt, setting
from maskwright.backbones import encode_visible
from maskwright.backbones.teachers import NORMALIZATIONS, Projections, VisionTeacher, make_watchable, watch
from maskwright.errors import BackboneMismatch, BadParameter
from maskwright.toolkit.selection import drops_hidden

RELATIONS = {"qk": ("query", "key"), "vv": ("value", "value")}
"""Which projections of an attention are compared with which."""


def relation(x: Tensor, y: Tensor) -> Tensor:
    """R = x · yᵀ / √d for each head: [..., N, d], [..., M, d] → [..., N, M], before any soft-max."""
    return x @ y.transpose(-2, -1) * x.shape[-1] ** -0.5


def relation_distance(student: Tensor, teacher: Tensor, measure: str = "smooth-l1") -> Tensor:
    """Mean distance of relations [B, heads, N, N].

    "smooth-l1" compares the scaled logits as they are, "kl" the soft-maxed rows, KL(teacher ‖ student) averaged over rows.
    Smooth L1 of soft-maxed rows is no choice: their entries are of the order 1/N, so that it would vanish beside the features.
    Where the numbers of heads differ, both are averaged over heads first.
    """
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1), teacher.mean(1)
    if measure == "smooth-l1":
        return nn.functional.smooth_l1_loss(student, teacher)
    its = teacher.log_softmax(-1)
    return (its.exp() * (its - student.log_softmax(-1))).sum(-1).mean()


def whiten(features: Tensor) -> Tensor:
    """Layer normalisation over channels without parameters: teachers of any scale become comparable targets."""
    return nn.functional.layer_norm(features, features.shape[-1:])


def stage_starts(depth: int, stages: int) -> list[int]:
    """The block before which each stage drops its tokens: ⌊s · L / stages⌋, that is 0, L/3, 2L/3."""
    return [stage * depth // stages for stage in range(stages)]


@attrs.frozen
class HybridDistill:
    """Token relations of an MIM teacher at intermediate blocks and final features of a supervised or contrastive teacher.

    Shi et al., arXiv:2306.15876. Both teachers are frozen and see the whole image; the student runs the kept tokens only, fewer at
    each stage of the strategy 'progressive-redundant', and nothing is reconstructed. Loss = α · relations + β · features.
    A teacher is a vision transformer of transformers, or its folder; one whose weight is 0 is not needed.
    """

    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "hybrid-distill"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    provides: ClassVar[frozenset[str]] = frozenset({"teacher_features"})
    backbone: ClassVar[str] = "patch"
    counts: ClassVar[str] = "exact"
    default_strategy: ClassVar[str] = "progressive-redundant"

    mim_teacher: Any = setting(
        None, "teacher of token relations, such as an MAE: a model or its folder", optional=True
    )
    feature_teacher: Any = setting(
        None, "teacher of features, such as DeiT or CLIP: a model or its folder", optional=True
    )
    alpha: float = setting(1.0, "weight α of the relations", ge=0)
    beta: float = setting(1.0, "weight β of the features", ge=0)
    relations: tuple[str, ...] = setting(
        ("qk", "vv"), "which relations are compared: qk, vv or both, with equal weight"
    )
    layers: tuple[int, ...] = setting(
        (-4, -3, -2),
        "blocks whose relations are compared, 0-based; -1 is the last, of student and teacher each",
    )
    measure: str = setting(
        "smooth-l1",
        "distance of relations: of scaled logits, or of soft-maxed rows",
        choices=("smooth-l1", "kl"),
    )
    stages: int = setting(3, "stages of features that the strategy is given", ge=1)
    mim_normalization: str = setting(
        "imagenet", "what the MIM teacher's pixels are normalised with", choices=NORMALIZATIONS
    )
    feature_normalization: str = setting(
        "imagenet", "what the feature teacher's pixels are normalised with", choices=NORMALIZATIONS
    )

    def __attrs_post_init__(self) -> None:
        if not self.relations or set(self.relations) - RELATIONS.keys():
            raise BadParameter(
                f"hybrid-distill: relations={self.relations!r} must be some of {', '.join(RELATIONS)}."
            )
        if not self.layers or any(isinstance(one, bool) or not isinstance(one, int) for one in self.layers):
            raise BadParameter(
                f"hybrid-distill: layers={self.layers!r} must be whole numbers of blocks, such as (-3, -2)."
            )
        if self.alpha == self.beta == 0:
            raise BadParameter("hybrid-distill: alpha and beta are both 0, and nothing is learned.")

    @staticmethod
    def example_parameters() -> dict[str, Any]:
        """Tiny teachers of other widths, heads and depths than the example student's, for the conformance kit."""
        from maskwright.backbones.defaults import vision_transformer

        tiny = {"image_size": 16, "patch_size": 4}
        return {
            "mim_teacher": vision_transformer(width=16, depth=2, heads=2, seed=7, **tiny),
            "feature_teacher": vision_transformer(width=24, depth=3, heads=3, seed=8, **tiny),
            "layers": (-2,),
        }

    @staticmethod
    def example_backbone(seed: int) -> nn.Module:
        """A student of transformers: of other models the kit knows no queries, keys and values."""
        from maskwright.backbones.defaults import vision_transformer

        return vision_transformer(image_size=16, patch_size=4, width=16, depth=2, heads=2, seed=seed)

    def bind(self, backbone: nn.Module) -> BoundHybridDistill:
        """The student is a PatchBackbone around a model of transformers (any PatchBackbone for α = 0).

        Raises `BadParameter` without a teacher that is needed and for `layers` that there are not.
        """
        for weight, teacher, what in (
            ("alpha", "mim_teacher", "an MAE or another masked image model"),
            ("beta", "feature_teacher", "DeiT, CLIP, DINO or the like"),
        ):
            if getattr(self, weight) > 0 and getattr(self, teacher) is None:
                raise BadParameter(
                    f"hybrid-distill needs two teachers and has no {teacher}: give {teacher}=… a vision transformer of "
                    f"transformers or the folder of one (--set objective.{teacher}=./folder), {what}; or set {weight}=0."
                )
        return BoundHybridDistill(self, adapt(backbone, self.backbone))


class BoundHybridDistill(BoundObjective):
    """Parts: `relations` and `features`, weighted. Output: `features` [B, K, D], the student's final kept patches."""

    mim_teacher: VisionTeacher | None
    feature_teacher: VisionTeacher | None

    def __init__(self, settings: HybridDistill, backbone: nn.Module) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = backbone
        self.mim_teacher = self.feature_teacher = self.adapter = None
        self.layers: tuple[tuple[int, int], ...] = ()
        self.projections = sorted({name for kind in settings.relations for name in RELATIONS[kind]})
        if settings.alpha > 0:
            _make_watchable(backbone)
            self.mim_teacher = VisionTeacher(
                settings.mim_teacher, backbone, normalization=settings.mim_normalization
            )
            depths = (backbone.depth, self.mim_teacher.depth)
            self.layers = tuple(
                (_block(one, depths[0], "student"), _block(one, depths[1], "MIM teacher"))
                for one in settings.layers
            )
        if settings.beta > 0:
            self.feature_teacher = VisionTeacher(
                settings.feature_teacher, backbone, normalization=settings.feature_normalization
            )
            width = self.feature_teacher.width
            self.adapter = nn.Identity() if width == backbone.width else nn.Linear(backbone.width, width)

    def signals(self, batch: Batch) -> Signals:
        """`teacher_features` [B, N, stages, D], and what `forward` compares with.

        Stage s is judged by what the feature teacher (without one, the MIM teacher) makes of the patches at the end of the same
        share of its depth: after block ⌊(s + 1) · L / stages⌋.
        """
        pixels, stages, told = batch["pixels"], self.settings.stages, {}
        judge: Any = self.mim_teacher if self.feature_teacher is None else self.feature_teacher
        ends = [max(0, (stage + 1) * judge.depth // stages - 1) for stage in range(stages)]
        if self.mim_teacher is not None:
            seen = self.mim_teacher(
                pixels,
                projections=[its for _, its in self.layers],
                levels=ends if judge is self.mim_teacher else (),
            )
            for _, its in self.layers:
                told |= {
                    f"MIM {its} {name}": getattr(seen.projections[its], name) for name in self.projections
                }
        if self.feature_teacher is not None:
            seen = self.feature_teacher(pixels, levels=ends)
            told["final"] = seen.final
        levels = torch.stack([seen.levels[end] for end in ends], dim=2)
        return {"teacher_features": levels[:, judge.prefix :], **told}

    def forward(
        self,
        batch: Batch,
        mask: Mask,
        *,
        signals: Signals | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Loss:
        """α · relations + β · features over the tokens alive where they are compared; a `StagedMask` drops tokens in stages.

        Class tokens are never dropped, and compared where both models have one. Unequal visible counts raise `UnequalMaskCounts`.
        """
        own = {f"MIM {its} {name}" for _, its in self.layers for name in self.projections}
        own |= {"final"} if self.feature_teacher is not None else set()
        told: Signals = signals if signals is not None and own <= signals.keys() else self.signals(batch)
        mask = mask.flatten()
        staged = mask if isinstance(mask, StagedMask) else StagedMask(mask.keep.long(), 1)
        stages = [staged.stage(index) for index in range(staged.stages)]
        starts = stage_starts(self.backbone.depth, len(stages))
        blocks = [mine for mine, _ in self.layers]
        with watch(blocks) as found:
            final, prefix = self._encode(batch["pixels"], stages, starts)
        parts = {}
        if self.mim_teacher is not None:
            distances = [
                self._relations(found[mine], told, its, stages[bisect_right(starts, mine) - 1], prefix)
                for mine, its in self.layers
            ]
            parts["relations"] = self.settings.alpha * torch.stack(distances).mean()
        if self.feature_teacher is not None:
            assert self.adapter is not None
            its = self.feature_teacher.prefix
            target = _kept(whiten(told["final"].float()), stages[-1], its, prefix)
            prediction = _without_others(self.adapter(final), prefix, its).float()
            parts["features"] = self.settings.beta * nn.functional.smooth_l1_loss(prediction, target)
        return Loss(torch.stack(list(parts.values())).sum(), parts, {"features": final[:, prefix:]})

    def _encode(self, pixels: Tensor, stages: list[Mask], starts: list[int]) -> tuple[Tensor, int]:
        """The student on fewer tokens at each stage: final tokens [B, P+K, D], and P."""
        with drops_hidden("hybrid-distill"):
            drops = [
                Mask(after.keep.gather(1, before.visible_indices())) for before, after in pairwise(stages)
            ]
            for one in (stages[0], *drops):
                one.visible_indices()
        length = self.backbone.prefix(1).shape[1]

        def between(block: int, tokens: Tensor) -> Tensor:
            for start, drop in zip(starts[1:], drops):
                if start == block:
                    tokens = torch.cat([tokens[:, :length], drop.gather_visible(tokens[:, length:])], 1)
            return tokens

        if drops and "between" not in inspect.signature(self.backbone.encode).parameters:
            raise BackboneMismatch(
                f"The mask drops patches in {len(stages)} stages, and {type(self.backbone).__name__}.encode takes no `between` to do so; "
                "add it (see PatchBackbone), or use a strategy without stages."
            )
        told = {"between": between} if drops else {}
        tokens = self.backbone.patches(pixels) + self.backbone.positions
        return encode_visible(self.backbone, tokens, stages[0], **told), length

    def _relations(self, student: Projections, told: Signals, its: int, alive: Mask, prefix: int) -> Tensor:
        """Mean distance of the chosen relations of one block, among the tokens alive there."""
        assert self.mim_teacher is not None
        other = self.mim_teacher.prefix
        mine = {name: _without_others(getattr(student, name), prefix, other) for name in self.projections}
        # Relations of kept tokens are the same before and after the others are left out, for there is no soft-max yet.
        wanted = {name: _kept(told[f"MIM {its} {name}"], alive, other, prefix) for name in self.projections}
        distances = [
            relation_distance(
                relation(mine[x], mine[y]), relation(wanted[x], wanted[y]), self.settings.measure
            )
            for x, y in (RELATIONS[kind] for kind in self.settings.relations)
        ]
        return torch.stack(distances).mean()


def _without_others(tokens: Tensor, prefix: int, other: int) -> Tensor:
    """[..., P+K, D] → [..., shared+K, D]: the class token where both models have one, and the patches."""
    return torch.cat([tokens[..., : min(prefix, other, 1), :], tokens[..., prefix:, :]], -2)


def _kept(tokens: Tensor, alive: Mask, prefix: int, other: int) -> Tensor:
    """The same of a teacher's whole image, [B, ..., P+N, D], at the patches that are alive."""
    index = alive.visible_indices().view(len(tokens), *(1,) * (tokens.ndim - 3), -1, 1)
    index = (prefix + index).expand(*tokens.shape[:-2], -1, tokens.shape[-1])
    return torch.cat([tokens[..., : min(prefix, other, 1), :], tokens.gather(-2, index)], -2)


def _block(layer: int, depth: int, whose: str) -> int:
    if not -depth <= layer < depth:
        raise BadParameter(
            f"hybrid-distill: layers has {layer}, and the {whose} has {depth} blocks: give numbers from {-depth} to {depth - 1} "
            "(--set objective.layers=[-2])."
        )
    return layer % depth


def _make_watchable(backbone: nn.Module) -> None:
    """Let queries, keys and values of the student's model be seen."""
    models = [module for module in backbone.modules() if hasattr(module, "set_attn_implementation")]
    if not models:
        raise BackboneMismatch(
            f"hybrid-distill compares queries, keys and values, and those of a {type(backbone).__name__} cannot be seen: the student "
            "must be a vision transformer of transformers, unless alpha=0."
        )
    make_watchable(models[0])
