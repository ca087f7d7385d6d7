"""Pixels of hidden blocks, from a convolutional network that is sparse while it trains, at every scale."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import Batch, BoundObjective, Loss, Mask, Signals, adapt, setting
from maskwright.errors import BackboneMismatch, BadParameter, MaskShapeError
from maskwright.plugins.spark.decoder import ChannelNorm, Decoder, fill_empty, widths
from maskwright.plugins.spark.sparse import Sparse
from maskwright.toolkit.distributed import mean_over_processes
from maskwright.toolkit.images import fill_hidden, normalize_patches, patchify
from maskwright.toolkit.selection import at_visible

EPSILON = 1e-8
"""Added to the number of hidden patches, so that an empty mask costs exactly nothing."""


def hidden_l2(prediction: Tensor, target: Tensor, hidden: Tensor, count: Tensor | None = None) -> Tensor:
    """Σ_hidden mean (x̂ - t)² / (n + 1e-8) over the whole batch (section 3.3).

    `prediction`, `target` [B, N, V]; `hidden` bool [B, N]. `count` stands for n, the hidden patches, when the batch is only a
    part of the global one.
    """
    each = (prediction - target).square().mean(-1)
    return (each * hidden).sum() / ((hidden.sum() if count is None else count) + EPSILON)


@attrs.frozen
class Spark:
    """Normalised pixels of hidden blocks, decoded from a convolutional network whose layers skip what is hidden.

    Tian et al., arXiv:2301.03580. Any mask of the coarsest map's grid will do, with unequal counts too. The network itself is
    not changed: it is sparse only while the objective runs, and an ordinary dense network afterwards.
    """

    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "spark"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    provides: ClassVar[frozenset[str]] = frozenset()
    backbone: ClassVar[str] = "conv"
    default_strategy: ClassVar[str] = "spark"
    example_parameters: ClassVar[dict[str, int]] = {"decoder_width": 16}

    decoder_width: int = setting(
        768, "channels of the decoder's coarsest map, halved at each finer one", ge=1
    )
    densify_norm: str = setting(
        "auto",
        "norm of the encoder's maps before they are decoded; auto is batch where the network has batch norm, or else layer",
        choices=("auto", "batch", "layer", "none"),
    )

    def bind(self, backbone: nn.Module) -> BoundSpark:
        """A decoder on a ConvBackbone (or a model that has an adapter) whose total stride is a power of two."""
        return BoundSpark(self, adapt(backbone, self.backbone))


class BoundSpark(BoundObjective):
    """`encode`, `densify`, `decoder` and `hidden_l2`, one after the other.

    Outputs: `features`, the coarsest map at visible positions, [B, K, C], or [ΣK, C] where images keep unequal numbers;
    `prediction` [B, N, p·p·C], every block's predicted normalised pixels in the order of `toolkit.images.patchify`; in evaluation
    mode `reconstruction` [B, C, H, W], the visible blocks as they are and the predicted ones, brought back to pixels with the true
    block's own mean and deviation.
    """

    def __init__(self, settings: Spark, backbone: nn.Module) -> None:
        super().__init__()
        self.settings = settings
        self.backbone: Any = backbone
        _refuse_other_processes(backbone)
        strides = [int(stride) for stride in backbone.strides[1:]]
        self.patch_size = strides[-1]
        levels = int(math.log2(self.patch_size))
        if 2**levels != self.patch_size or not levels:
            raise BackboneMismatch(
                f"spark: the decoder doubles its maps, so the network's total stride must be 2, 4, 8, …, not {self.patch_size}."
            )
        if settings.decoder_width < self.patch_size:
            raise BadParameter(
                f"spark: decoder_width={settings.decoder_width} is halved {levels} times on the way to pixels; "
                f"it must be at least {self.patch_size} for this network."
            )
        # Of stages with maps of one size the last one counts, as in a network that downsamples once a stage.
        last = {stride: stage for stage, stride in enumerate(strides)}
        self.stage_of = [last.get(self.patch_size >> level) for level in range(levels)]
        norm = settings.densify_norm
        if norm == "auto":
            batch_norms = nn.modules.batchnorm._BatchNorm
            norm = "batch" if any(isinstance(one, batch_norms) for one in backbone.modules()) else "layer"
        kind: Any = {"batch": nn.BatchNorm2d, "layer": ChannelNorm, "none": nn.Identity}[norm]
        self.norms, self.projections = nn.ModuleDict(), nn.ModuleDict()
        self.mask_embeddings = nn.ParameterDict()
        for level, (stage, width) in enumerate(zip(self.stage_of, widths(settings.decoder_width, levels))):
            if stage is None:
                continue
            own, key = int(backbone.widths[1 + stage]), str(level)
            self.norms[key] = kind(own)
            embedding = nn.Parameter(torch.empty(1, own, 1, 1))
            self.mask_embeddings[key] = nn.init.trunc_normal_(embedding, std=0.02, a=-0.02, b=0.02)
            size = 3 if level else 1
            same = not level and own == width
            self.projections[key] = nn.Identity() if same else nn.Conv2d(own, width, size, padding=size // 2)
        self.decoder = Decoder(settings.decoder_width, levels, backbone.channels)
        self._looked = False

    def encode(self, pixels: Tensor, mask: Mask) -> tuple[list[Tensor], list[Tensor | None]]:
        """The map of each stage, zero where it is hidden, and those that are decoded, normalised, from coarse to fine."""
        keep = self._whole(mask, pixels).upsample(tuple(pixels.shape[2:])).keep[:, None]
        # A choice, not a product: not even an infinite hidden pixel gets through.
        x = torch.where(keep, pixels, pixels.new_zeros(()))
        maps: list[Tensor] = []
        with Sparse(mask):
            x = self.backbone.stem(x)
            for stage in self.backbone.stages:
                x = stage(x)
                maps.append(x)
            normal = [
                None if stage is None else self.norms[str(level)](maps[stage])
                for level, stage in enumerate(self.stage_of)
            ]
        if not self._looked:
            self._look(maps, mask)
        return maps, normal

    def densify(self, normal: list[Tensor | None], mask: Mask) -> list[Tensor | None]:
        """Empty positions take the embedding of their scale; then each map gets the decoder's width there."""
        dense: list[Tensor | None] = []
        for level, x in enumerate(normal):
            if x is None:
                dense.append(None)
                continue
            keep = mask.upsample(tuple(x.shape[2:])).keep[:, None]
            dense.append(self.projections[str(level)](fill_empty(x, self.mask_embeddings[str(level)], keep)))
        return dense

    def forward(
        self,
        batch: Batch,
        mask: Mask,
        *,
        signals: Signals | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Loss:
        """Mean squared error of normalised pixels in hidden blocks; one denominator for the global batch."""
        pixels = batch["pixels"]
        maps, normal = self.encode(pixels, mask)
        prediction = patchify(self.decoder(self.densify(normal, mask)), self.patch_size)
        hidden = (~mask).flatten().keep
        count = mean_over_processes(hidden.sum()) if self.training else hidden.sum()
        loss = hidden_l2(prediction, normalize_patches(patchify(pixels, self.patch_size)), hidden, count)
        outputs = {
            "prediction": prediction,
            "features": at_visible(maps[-1].flatten(2).transpose(1, 2), mask.flatten().keep),
        }
        if not self.training:
            outputs["reconstruction"] = fill_hidden(
                pixels, prediction, hidden, tuple(mask.shape[1:]), normalized=True
            )
        return Loss(total=loss, parts={"pixels": loss}, outputs=outputs)

    def _whole(self, mask: Mask, pixels: Tensor) -> Mask:
        """The mask, when it is one of this network's coarsest map for these images."""
        sides = tuple(pixels.shape[2:])
        if any(side % self.patch_size for side in sides):
            raise MaskShapeError(
                f"spark: images of {sides[0]} × {sides[1]} are no multiples of the network's total stride of {self.patch_size} "
                "pixels, and its maps would not be masked by whole cells; resize or crop them."
            )
        wanted = (len(pixels), *(side // self.patch_size for side in sides))
        if tuple(mask.shape) != wanted:
            raise MaskShapeError(
                f"spark: the mask is {list(mask.shape)} (rows, grid), the network's coarsest map {list(wanted)}; "
                "draw it with Layout.of(backbone, batch)."
            )
        return mask

    @torch.no_grad()
    def _look(self, maps: list[Tensor], mask: Mask) -> None:
        """Once: every map has its size and is empty where it is hidden. A layer that the context does not know shows here."""
        for number, (x, stride) in enumerate(zip(maps, self.backbone.strides[1:]), 1):
            size = tuple(cells * self.patch_size // stride for cells in mask.shape[1:])
            if tuple(x.shape[2:]) != size:
                raise BackboneMismatch(
                    f"spark: stage {number} makes maps of {tuple(x.shape[2:])}; with its stride of {stride} it should be {size}."
                )
            if bool((x * ~mask.upsample(size).keep[:, None]).any()):
                raise BackboneMismatch(
                    f"spark: stage {number} makes features where the mask hides, from zeros: a layer adds a bias that is no part "
                    "of PyTorch's own convolutions, linear layers or norms, or its activation is not 0 at 0."
                )
        self._looked = True


def _refuse_other_processes(backbone: nn.Module) -> None:
    """SyncBatchNorm over several processes is no PyTorch function, so that the context does not see it."""
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    if several and any(isinstance(module, nn.SyncBatchNorm) for module in backbone.modules()):
        raise BackboneMismatch(
            "spark: SyncBatchNorm would average over hidden positions as well; use BatchNorm2d, whose statistics are those of "
            "each process's visible positions."
        )
