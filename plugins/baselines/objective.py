"""Masked autoencoding of pixels."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import Batch, BoundObjective, Loss, Mask, Signals, adapt, setting
from maskwright.backbones import encode_visible
from maskwright.toolkit.decoders import DecoderInput, check_heads, initialize_linear, transformer
from maskwright.toolkit.images import fill_hidden, patch_targets
from maskwright.toolkit.selection import drops_hidden


def hidden_error(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Mean over the hidden patches of the batch of each patch's mean squared error (MAE, section 3).

    `prediction`, `target` [B, N, V]; `hidden` bool [B, N]. A mask that hides nothing gives exactly 0.
    """
    each = (prediction - target).square().mean(-1)
    return (each * hidden).sum() / hidden.sum().clamp(min=1)


@attrs.frozen
class MaskedAutoencoder:
    """Pixels of hidden patches, predicted by a light decoder from an encoder that sees visible patches only.

    He et al., arXiv:2111.06377. Needs an equal number of visible patches in each image.
    """

    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "mae"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    provides: ClassVar[frozenset[str]] = frozenset()
    backbone: ClassVar[str] = "patch"
    counts: ClassVar[str] = "exact"
    example_parameters: ClassVar[dict[str, int]] = {
        "decoder_width": 16,
        "decoder_depth": 1,
        "decoder_heads": 2,
    }

    # The code's flag --norm_pix_loss is off by default; its published recipe and the paper's best results have it on.
    norm_pix: bool = setting(True, "predict pixels normalised within each patch")
    decoder_width: int = setting(512, "width of the decoder", ge=4)
    decoder_depth: int = setting(8, "blocks of the decoder", ge=1)
    decoder_heads: int = setting(16, "attention heads of the decoder; they must divide its width", ge=1)

    def __attrs_post_init__(self) -> None:
        check_heads(self)

    def bind(self, backbone: nn.Module) -> BoundMaskedAutoencoder:
        """A decoder on a PatchBackbone (or a model that has an adapter)."""
        return BoundMaskedAutoencoder(self, adapt(backbone, self.backbone))


class BoundMaskedAutoencoder(BoundObjective):
    """`encode` and `decode` are the two halves; `forward` is both and the loss.

    Outputs: `features` [B, K, D], the encoded visible patches; `prediction` [B, N, p·p·C] at every position, normalised
    pixels with `norm_pix`; in evaluation mode `reconstruction` [B, C, H, W], the visible patches as they are and the predicted
    ones, brought back to pixels with the true patch's own mean and deviation.
    """

    def __init__(self, settings: MaskedAutoencoder, backbone: nn.Module) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = backbone
        width, pixels = settings.decoder_width, backbone.patch_size**2 * backbone.channels
        self.decoder_input = DecoderInput(backbone.width, width, tuple(backbone.grid))
        self.decoder = transformer(width, settings.decoder_depth, settings.decoder_heads)
        self.predict = nn.Linear(width, pixels)
        for module in (self.decoder_input, self.decoder, self.predict):
            module.apply(initialize_linear)

    def encode(self, pixels: Tensor, mask: Mask) -> Tensor:
        """[B, C, H, W] → [B, P+K, D]: the encoder on prefix and visible tokens."""
        tokens = self.backbone.patches(pixels) + self.backbone.positions
        with drops_hidden("mae", "Or use the objective 'simmim', which takes any mask."):
            return encode_visible(self.backbone, tokens, mask)

    def decode(self, encoded: Tensor, mask: Mask) -> Tensor:
        """[B, P+K, D] → [B, N, p·p·C]."""
        prefix = encoded.shape[1] - mask.visible_indices().shape[1]
        decoded = self.decoder(self.decoder_input(encoded, mask, prefix))
        return self.predict(decoded[:, prefix:])

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
        """Mean squared error on hidden patches. Unequal visible counts raise `UnequalMaskCounts`."""
        pixels, hidden = batch["pixels"], (~mask).flatten().keep
        encoded = self.encode(pixels, mask)
        prediction = self.decode(encoded, mask)
        loss = hidden_error(prediction, self.target(pixels), hidden)
        outputs = {
            "prediction": prediction,
            "features": encoded[:, encoded.shape[1] - mask.visible_indices().shape[1] :],
        }
        if not self.training:
            outputs["reconstruction"] = fill_hidden(
                pixels, prediction, hidden, tuple(self.backbone.grid), normalized=self.settings.norm_pix
            )
        return Loss(total=loss, parts={"pixels": loss}, outputs=outputs)


COMPONENTS = (MaskedAutoencoder,)
