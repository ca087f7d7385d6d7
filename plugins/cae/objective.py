"""Encoder on visible patches, latent contextual regressor, decoder on predicted latents, and their alignment."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import Batch, BoundObjective, Loss, Mask, Signals, adapt, setting
from maskwright.backbones import encode_visible
from maskwright.errors import BadParameter, UnequalMaskCounts
from maskwright.toolkit.decoders import initialize_linear
from maskwright.toolkit.images import fill_hidden, normalize_patches, patchify, sincos_positions


def alignment(latents: Tensor, targets: Tensor) -> Tensor:
    """mean((Z - sg[Z̄])²) over hidden patches and channels; 0 where nothing is hidden."""
    return (latents - targets.detach()).square().sum() / max(latents.numel(), 1)


def survival(rates: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """[L] → [L, 2, rows, 1, 1]: 0 where a residual branch of an image is dropped, else 1 / (1 - rate) (stochastic depth).

    A block has two branches, which are dropped apart.
    """
    kept = 1 - rates.to(generator.device)[:, None, None]
    drawn = torch.rand(len(rates), 2, rows, generator=generator, device=generator.device)
    return ((drawn < kept) / kept)[..., None, None].to(rates.device)


class Attention(nn.Module):
    """Multi-head attention with biases on queries and values; a bias on keys would cancel in the softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, Q, D], [B, K, D], [B, K, D] → [B, Q, D]."""
        q, k, v = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp(width: int) -> nn.Module:
    """The feed-forward part of a block, four times as wide inside."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class RegressorBlock(nn.Module):
    """Mask queries look at the visible latents and at each other; the visible latents stay as they are."""

    def __init__(self, width: int, heads: int, layer_scale: float) -> None:
        super().__init__()
        self.norm_query, self.norm_key, self.norm_value, self.norm = (
            nn.LayerNorm(width, eps=1e-6) for _ in range(4)
        )
        self.attention, self.mlp = Attention(width, heads), mlp(width)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((width,), layer_scale)) for _ in range(2))

    def forward(
        self, q: Tensor, visible: Tensor, at_hidden: Tensor, at_visible: Tensor, survives: Tensor
    ) -> Tensor:
        """[B, M, D] queries, [B, V, D] latents and their positions → [B, M, D]; `survives` scales the two branches."""
        context = torch.cat([visible, q], 1)
        keys = context + torch.cat([at_visible, at_hidden], 1)
        seen = self.attention(self.norm_query(q + at_hidden), self.norm_key(keys), self.norm_value(context))
        # The residual stream itself is normalised here, as in the official code.
        h = self.norm(q + survives[0] * self.gamma_1 * seen)
        return h + survives[1] * self.gamma_2 * self.mlp(h)


class DecoderBlock(nn.Module):
    """A pre-norm transformer block with layer scale."""

    def __init__(self, width: int, heads: int, layer_scale: float) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attention, self.mlp = Attention(width, heads), mlp(width)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((width,), layer_scale)) for _ in range(2))

    def forward(self, x: Tensor, survives: Tensor) -> Tensor:
        """[B, M, D] → [B, M, D]; `survives` scales the two branches."""
        y = self.norm_1(x)
        x = x + survives[0] * self.gamma_1 * self.attention(y, y, y)
        return x + survives[1] * self.gamma_2 * self.mlp(self.norm_2(x))


@attrs.frozen
class ContextAutoencoder:
    """Latents of hidden patches are regressed from visible ones, aligned with the encoder's own, and decoded alone.

    Chen et al., arXiv:2202.03026. `tokenizer` has `vocabulary` and `codes(pixels [B, C, H, W]) -> int64 [B, N]`, one code
    for each patch, such as a frozen dVAE or `maskwright.plugins.cae.codes.PatchCodes`; without it the target is pixels
    normalised within each patch.
    """

    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "cae"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    provides: ClassVar[frozenset[str]] = frozenset()
    backbone: ClassVar[str] = "patch"
    counts: ClassVar[str] = "exact"
    default_strategy: ClassVar[dict[str, Any]] = {"name": "block", "ratio": 0.5, "exact": True}
    # Without drawn branches the kit can compare rows.
    example_parameters: ClassVar[dict[str, Any]] = {
        "regressor_depth": 1,
        "decoder_depth": 1,
        "drop_path": 0.0,
    }

    tokenizer: Any = setting(
        None, "what turns images into discrete targets; None: normalised pixels", optional=True
    )
    weight: float = setting(2.0, "λ, the weight of the alignment", ge=0)
    regressor_depth: int = setting(4, "blocks of the latent contextual regressor", ge=0)
    decoder_depth: int = setting(4, "blocks of the decoder", ge=0)
    width: int | None = setting(
        None, "width of regressor and decoder; None: the encoder's", ge=1, optional=True
    )
    heads: int | None = setting(
        None, "attention heads of both; None: one for 64 channels", ge=1, optional=True
    )
    layer_scale: float = setting(0.1, "initial scale of every residual branch", gt=0)
    drop_path: float = setting(
        0.1, "chance that a branch of the last block is dropped in training; none of the first", ge=0, lt=1
    )

    def bind(self, backbone: nn.Module) -> BoundContextAutoencoder:
        """A regressor and a decoder on a PatchBackbone (or a model that has an adapter)."""
        return BoundContextAutoencoder(self, adapt(backbone, self.backbone))


class BoundContextAutoencoder(BoundObjective):
    """`encode`, `regress` and `decode` are the three parts; `forward` is all of them and the loss.

    Outputs: `features` [B, V, D], the encoder's visible latents; `latents` [B, M, D'], the regressed ones of the hidden;
    `prediction` [B, M, K] logits, or normalised pixels; in evaluation mode `reconstruction` [B, C, H, W] where pixels are the target.
    """

    def __init__(self, settings: ContextAutoencoder, backbone: nn.Module) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = backbone
        width = settings.width or backbone.width
        heads = settings.heads or max(1, width // 64)
        if width % heads:
            raise BadParameter(f"cae: heads={heads} must divide the width of regressor and decoder, {width}.")
        norm = nn.LayerNorm(width, eps=1e-6)
        # Z̄ goes through it as well: alignment lives in the mapped space.
        self.project = (
            nn.Sequential(nn.Linear(backbone.width, width), norm)
            if width != backbone.width
            else nn.Identity()
        )
        self.mask_token = nn.Parameter(torch.empty(width))
        self.regressor = nn.ModuleList(
            RegressorBlock(width, heads, settings.layer_scale) for _ in range(settings.regressor_depth)
        )
        self.regressor_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder = nn.ModuleList(
            DecoderBlock(width, heads, settings.layer_scale) for _ in range(settings.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        pixels = backbone.patch_size**2 * backbone.channels
        self.head = nn.Linear(width, pixels if settings.tokenizer is None else settings.tokenizer.vocabulary)
        self.register_buffer("positions", sincos_positions(width, tuple(backbone.grid)), persistent=False)
        for module in (self.project, self.regressor, self.decoder, self.head):
            module.apply(initialize_linear)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    positions: Tensor

    def encode(self, pixels: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] → the encoder's latents of visible patches [B, V, D], class token dropped, and the same projected."""
        encoded = encode_visible(self.backbone, self.backbone.patches(pixels) + self.backbone.positions, mask)
        latents = encoded[:, self.backbone.prefix(1).shape[1] :]
        return latents, self.project(latents)

    def regress(self, visible: Tensor, mask: Mask, generator: torch.Generator | None = None) -> Tensor:
        """[B, V, D'] → Z [B, M, D']: latents of the hidden patches, from mask queries at their positions."""
        at = self.positions.expand(len(visible), -1, -1)
        at_visible, at_hidden = mask.gather_visible(at), mask.gather_hidden(at)
        queries = self.mask_token.expand_as(at_hidden)
        for block, survives in zip(self.regressor, self._survival(self.regressor, at, generator)):
            queries = block(queries, visible, at_hidden, at_visible, survives)
        return self.regressor_norm(queries)

    def decode(self, latents: Tensor, mask: Mask, generator: torch.Generator | None = None) -> Tensor:
        """Z [B, M, D'] → [B, M, K]: from predicted latents and their positions alone."""
        at = self.positions.expand(len(latents), -1, -1)
        x = latents + mask.gather_hidden(at)
        for block, survives in zip(self.decoder, self._survival(self.decoder, at, generator)):
            x = block(x, survives)
        return self.head(self.decoder_norm(x))

    def _survival(self, blocks: nn.ModuleList, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """What scales the branches of each block: 1 in evaluation, and without a generator to draw from."""
        if not (self.training and self.settings.drop_path and generator is not None):
            return like.new_ones(len(blocks), 2, 1, 1, 1)
        rates = torch.linspace(0, self.settings.drop_path, len(blocks), device=like.device)
        return survival(rates, len(like), generator).to(like)

    def forward(
        self,
        batch: Batch,
        mask: Mask,
        *,
        signals: Signals | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Loss:
        """Cross-entropy (or squared error) of hidden patches, and λ times the alignment.

        Unequal visible counts raise `UnequalMaskCounts`.
        """
        pixels, flat = batch["pixels"], mask.flatten()
        try:
            features, visible = self.encode(pixels, flat)
        except UnequalMaskCounts as error:
            raise UnequalMaskCounts(f"cae encodes visible and hidden patches apart. {error}") from None
        latents = self.regress(visible, flat, generator)
        prediction = self.decode(latents, flat, generator)
        with torch.no_grad():
            # The same encoder on the complementary patches: no copy, no momentum.
            target = self.encode(pixels, ~flat)[1] if self.settings.weight else latents
        parts = {
            "target": self._target_loss(prediction, pixels, flat),
            "alignment": self.settings.weight * alignment(latents, target),
        }
        outputs = {"features": features, "latents": latents, "prediction": prediction}
        if self.settings.tokenizer is None and not self.training:
            outputs["reconstruction"] = fill_hidden(
                pixels,
                (~flat).scatter_visible(prediction, 0.0),
                (~flat).keep,
                tuple(self.backbone.grid),
                normalized=True,
            )
        return Loss(parts["target"] + parts["alignment"], parts, outputs)

    def _target_loss(self, prediction: Tensor, pixels: Tensor, mask: Mask) -> Tensor:
        if self.settings.tokenizer is None:
            target = mask.gather_hidden(normalize_patches(patchify(pixels, self.backbone.patch_size)))
            return (prediction - target).square().sum() / max(prediction.numel(), 1)
        codes = mask.gather_hidden(self.settings.tokenizer.codes(pixels))
        return nn.functional.cross_entropy(prediction.flatten(0, 1), codes.flatten(), reduction="sum") / max(
            codes.numel(), 1
        )
