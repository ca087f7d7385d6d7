"""Cross-view completion: one encoder for both views, and a decoder that looks things up in the second."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import Batch, BoundObjective, Loss, Mask, Signals, adapt, setting
from maskwright.backbones import encode_visible
from maskwright.errors import MaskShapeError
from maskwright.toolkit.decoders import CrossTransformer, DecoderInput, check_heads, initialize_linear
from maskwright.toolkit.images import fill_hidden, patch_targets
from maskwright.toolkit.selection import drops_hidden


def completion_loss(prediction: Tensor, target: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Mean squared error of each patch, averaged over the hidden ones of the whole batch; over all where `hidden` is None.

    `prediction`, `target` [B, N, V]; `hidden` bool [B, N]. A mask that hides nothing costs exactly 0.
    """
    each = (prediction - target).square().mean(-1)
    return each.mean() if hidden is None else (each * hidden).sum() / hidden.sum().clamp(min=1)


def learning_rate(epoch: float, *, peak: float = 1.0, warmup: float = 40, planned: float = 800) -> float:
    """Linear from 0 over `warmup` epochs, then a cosine to 0 at `planned` (utils/misc.py of the official code).

    Official training stops half-way, after 400 epochs, with 0.541 of the peak.
    """
    if epoch < warmup:
        return peak * epoch / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (planned - warmup)))


@attrs.frozen
class CrossViewCompletion:
    """Pixels of a view's hidden patches, predicted with the help of a second, whole view of the same scene.

    Weinzaepfel et al., arXiv:2210.10716. `pixels` [B, C, H, W] is the view that is masked, `pixels_other_view` of the same
    shape the other one. Needs an equal number of visible patches in each image.
    """

    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "croco"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"pixels", "pixels_other_view"})
    provides: ClassVar[frozenset[str]] = frozenset()
    backbone: ClassVar[str] = "patch"
    counts: ClassVar[str] = "exact"
    default_strategy: ClassVar[dict[str, Any]] = {"name": "random", "ratio": 0.9, "truncated": "hidden"}
    example_parameters: ClassVar[dict[str, int]] = {
        "decoder_width": 16,
        "decoder_depth": 1,
        "decoder_heads": 2,
    }

    norm_pix: bool = setting(True, "predict pixels normalised within each patch")
    hidden_only: bool = setting(True, "count hidden patches only; otherwise all of them")
    norm_memory: bool = setting(
        True, "normalise the second view in each decoder block before it is attended to"
    )
    decoder_width: int = setting(512, "width of the decoder", ge=4)
    decoder_depth: int = setting(8, "blocks of the decoder", ge=1)
    decoder_heads: int = setting(16, "attention heads of the decoder; they must divide its width", ge=1)

    def __attrs_post_init__(self) -> None:
        check_heads(self)

    def bind(self, backbone: nn.Module) -> BoundCrossViewCompletion:
        """A cross-attending decoder on a PatchBackbone (or a model that has an adapter)."""
        return BoundCrossViewCompletion(self, adapt(backbone, self.backbone))


class BoundCrossViewCompletion(BoundObjective):
    """`encode` is the siamese encoder, called once for each view, and `decode` the decoder.

    Outputs: `features` [B, K, D], the encoded visible patches of the first view; `prediction` [B, N, p·p·C] at every
    position of it, normalised pixels with `norm_pix`; in evaluation mode `reconstruction` [B, C, H, W], the visible patches as
    they are and the predicted ones, brought back to pixels with the true patch's own mean and deviation.
    """

    def __init__(self, settings: CrossViewCompletion, backbone: nn.Module) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = backbone
        width, pixels = settings.decoder_width, backbone.patch_size**2 * backbone.channels
        self.decoder_input = DecoderInput(backbone.width, width, tuple(backbone.grid))
        self.decoder = CrossTransformer(
            width, settings.decoder_depth, settings.decoder_heads, norm_memory=settings.norm_memory
        )
        self.predict = nn.Linear(width, pixels)
        for module in (self.decoder_input, self.decoder, self.predict):
            module.apply(initialize_linear)

    def encode(self, pixels: Tensor, mask: Mask | None = None) -> Tensor:
        """[B, C, H, W] → [B, K, D]: patches of one view, the visible ones in raster order, or all N without a mask.

        A backbone's class token takes part and is left behind: the decoder sees patches only, as CroCo has no such token.
        """
        tokens = self.backbone.patches(pixels) + self.backbone.positions
        prefix = self.backbone.prefix(len(tokens))
        if mask is None:
            encoded: Tensor = self.backbone.encode(torch.cat([prefix, tokens], dim=1))
            return encoded[:, prefix.shape[1] :]
        with drops_hidden("croco"):
            return encode_visible(self.backbone, tokens, mask)[:, prefix.shape[1] :]

    def decode(self, visible: Tensor, mask: Mask, other: Tensor) -> Tensor:
        """Visible patches of the first view [B, K, D] and all of the second [B, N, D] → [B, N, p·p·C]."""
        memory = self.decoder_input.embed(other) + self.decoder_input.positions
        return self.predict(self.decoder(self.decoder_input(visible, mask, prefix=0), memory))

    def target(self, pixels: Tensor) -> Tensor:
        """[B, N, p·p·C]: what is to be predicted."""
        return patch_targets(pixels, self.backbone.patch_size, normalized=self.settings.norm_pix)

    def forward(
        self,
        batch: Batch,
        mask: Mask,
        *,
        signals: Signals | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Loss:
        """Mean squared error on hidden patches of the first view. Unequal visible counts raise `UnequalMaskCounts`."""
        pixels, other, mask = batch["pixels"], batch["pixels_other_view"], mask.flatten()
        if pixels.shape != other.shape:
            raise MaskShapeError(
                f"croco: `pixels` is {list(pixels.shape)} and `pixels_other_view` {list(other.shape)}; "
                "both views must have the same shape, row by row of the same scene."
            )
        visible = self.encode(pixels, mask)
        prediction = self.decode(visible, mask, self.encode(other))
        hidden = (~mask).keep
        loss = completion_loss(prediction, self.target(pixels), hidden if self.settings.hidden_only else None)
        outputs = {"prediction": prediction, "features": visible}
        if not self.training:
            outputs["reconstruction"] = fill_hidden(
                pixels, prediction, hidden, tuple(self.backbone.grid), normalized=self.settings.norm_pix
            )
        return Loss(total=loss, parts={"pixels": loss}, outputs=outputs)
