"""Reconstruction and loss prediction on one encoder, and the teacher that forecasts the loss."""

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
from maskwright.toolkit.teachers import follow, teacher_of

EPSILON = 1e-6


def reconstruction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """M: mean squared error of each patch, [B, K, V] → [B, K]."""
    return (prediction - target).square().mean(-1)


def relative_loss(prediction: Tensor, loss: Tensor) -> Tensor:
    """Cross-entropy of "patch j is harder than patch i" over all ordered pairs of unequal loss.

    `prediction` s and `loss` t are [B, K]; t takes no gradient. The denominator counts the pairs of the whole batch; no pair
    (all losses equal) gives 0. A pair costs at most -log(1e-6): the constant lies inside the logarithm, outside the sigmoid.
    """
    loss, prediction = loss.detach(), prediction.float()
    harder = loss[:, None, :] > loss[:, :, None]
    difference = prediction[:, None, :] - prediction[:, :, None]
    # A pair and its reverse cost the same, so the mean over the pairs with t_j > t_i is that over all.
    cost = -torch.log(difference.sigmoid() + EPSILON)
    return (cost * harder).sum() / harder.sum().clamp(min=1)


def absolute_loss(prediction: Tensor, loss: Tensor) -> Tensor:
    """Mean squared error to the loss, which is standardised within each image (an ablation of the paper). [B, K] both."""
    loss, prediction = loss.detach().float(), prediction.float()
    if loss.shape[1] < 2:
        return prediction.square().sum() / max(1, prediction.numel())
    variance, mean = torch.var_mean(loss, dim=1, keepdim=True)
    return (prediction - (loss - mean) / (variance + EPSILON).sqrt()).square().mean()


def teacher_decay(progress: float, start: float = 0.999, end: float = 0.9999, warmup: float = 0.5) -> float:
    """Linear from `start` to `end` while progress goes from 0 to `warmup`, then constant."""
    return start + (end - start) * (min(1.0, progress / warmup) if warmup else 1.0)


@attrs.frozen
class HardPatchesMining:
    """Pixels of hidden patches and the order of their losses, each predicted by a decoder of its own.

    Wang et al., arXiv:2304.05919. An EMA teacher that sees the whole image forecasts `patch_loss` for the strategy
    'hard-patches'. Needs an equal number of visible patches in each image.
    """

    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "hpm"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    provides: ClassVar[frozenset[str]] = frozenset({"patch_loss"})
    backbone: ClassVar[str] = "patch"
    counts: ClassVar[str] = "exact"
    default_strategy: ClassVar[str] = "hard-patches"
    example_parameters: ClassVar[dict[str, int]] = {
        "decoder_width": 16,
        "decoder_depth": 1,
        "decoder_heads": 2,
    }

    relative: bool = setting(True, "learn the order of the losses; otherwise their standardised values")
    norm_pix: bool = setting(False, "predict pixels normalised within each patch")
    decoder_width: int = setting(512, "width of both decoders", ge=4)
    decoder_depth: int = setting(8, "blocks of each decoder", ge=1)
    decoder_heads: int = setting(16, "attention heads of the decoders; they must divide their width", ge=1)
    ema_start: float = setting(0.999, "decay of the teacher at the start", ge=0, lt=1)
    ema_end: float = setting(0.9999, "decay of the teacher after its warm-up", ge=0, lt=1)
    ema_warmup: float = setting(
        0.5, "share of training in which the decay grows: 100 of 200 epochs", ge=0, le=1
    )

    def __attrs_post_init__(self) -> None:
        check_heads(self)

    def bind(self, backbone: nn.Module) -> BoundHardPatchesMining:
        """Two decoders and a teacher on a PatchBackbone (or a model that has an adapter)."""
        return BoundHardPatchesMining(self, adapt(backbone, self.backbone))


class Network(nn.Module):
    """The encoder and both decoders: what the teacher is a copy of."""

    def __init__(self, settings: HardPatchesMining, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        width, pixels = settings.decoder_width, backbone.patch_size**2 * backbone.channels
        self.decoder_input = DecoderInput(backbone.width, width, tuple(backbone.grid))
        self.reconstructor = transformer(width, settings.decoder_depth, settings.decoder_heads)
        self.predict_pixels = nn.Linear(width, pixels)
        self.loss_predictor = transformer(width, settings.decoder_depth, settings.decoder_heads)
        self.predict_loss = nn.Linear(width, pixels)
        for name, module in self.named_children():
            if name != "backbone":
                module.apply(initialize_linear)

    def encode(self, pixels: Tensor, mask: Mask) -> Tensor:
        """[B, C, H, W] → [B, P+N, width]: what both decoders see, in raster order."""
        tokens = self.backbone.patches(pixels) + self.backbone.positions
        with drops_hidden("hpm"):
            encoded = encode_visible(self.backbone, tokens, mask)
        return self.decoder_input(encoded, mask, encoded.shape[1] - mask.visible_indices().shape[1])

    def pixels(self, decoder_input: Tensor) -> Tensor:
        """[B, P+N, width] → [B, N, p·p·C]."""
        return self.predict_pixels(self.reconstructor(decoder_input)[:, -self._patches :])

    def patch_loss(self, decoder_input: Tensor) -> Tensor:
        """[B, P+N, width] → [B, N]: p·p·C outputs a patch, averaged to the one number that counts."""
        return self.predict_loss(self.loss_predictor(decoder_input)[:, -self._patches :]).mean(-1)

    @property
    def _patches(self) -> int:
        return self.backbone.grid[0] * self.backbone.grid[1]


class BoundHardPatchesMining(BoundObjective):
    """`network` is what is trained, `teacher` follows it.

    Outputs: `patch_error` [B, N], the mean squared error of every patch (the loss is that of the hidden ones); `patch_loss`
    [B, N], what the student predicts of it; `prediction` [B, N, p·p·C]; in evaluation mode `reconstruction` [B, C, H, W].
    """

    def __init__(self, settings: HardPatchesMining, backbone: nn.Module) -> None:
        super().__init__()
        self.settings = settings
        self.network = Network(settings, backbone)
        self.teacher = teacher_of(self.network)

    @property
    def backbone(self) -> nn.Module:
        """The student's encoder."""
        return self.network.backbone

    @torch.no_grad()
    def signals(self, batch: Batch) -> Signals:
        """`patch_loss` [B, N]: the teacher's forecast, with the whole image in view and no mask token.

        In training only the outputs at hidden places are compared with anything; here the same head is read at visible
        ones. That is the method.
        """
        pixels = batch["pixels"]
        everything = Mask(
            torch.ones(len(pixels), self.teacher._patches, dtype=torch.bool, device=pixels.device)
        )
        return {"patch_loss": self.teacher.patch_loss(self.teacher.encode(pixels, everything)).float()}

    def target(self, pixels: Tensor) -> Tensor:
        """[B, N, p·p·C]: what is to be reconstructed."""
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
        """Reconstruction plus ranking loss, both on hidden patches, with weight 1 each."""
        pixels, mask = batch["pixels"], mask.flatten()
        shared = self.network.encode(pixels, mask)
        # Both decoders read the same tensor: the ranking loss trains the encoder too.
        prediction, forecast = self.network.pixels(shared), self.network.patch_loss(shared)
        error = reconstruction_loss(prediction.float(), self.target(pixels))
        hidden = mask.gather_hidden(error)
        reconstruction = hidden.sum() / max(1, hidden.numel())
        learn = relative_loss if self.settings.relative else absolute_loss
        ranking = learn(mask.gather_hidden(forecast), hidden)
        outputs = {
            "prediction": prediction,
            "patch_error": error.detach(),
            "patch_loss": forecast.detach(),
        }
        if not self.training:
            outputs["reconstruction"] = fill_hidden(
                pixels,
                prediction,
                (~mask).keep,
                tuple(self.backbone.grid),
                normalized=self.settings.norm_pix,
            )
        return Loss(
            total=reconstruction + ranking,
            parts={"pixels": reconstruction, "loss_prediction": ranking},
            outputs=outputs,
        )

    def after_step(self, progress: float) -> None:
        """The teacher follows."""
        of = self.settings
        follow(self.teacher, self.network, teacher_decay(progress, of.ema_start, of.ema_end, of.ema_warmup))
