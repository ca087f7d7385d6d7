"""Adapters for the models of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.backbones import PatchBackbone, TokenBackbone, adapter
from maskwright.errors import BackboneMismatch
from maskwright.mask import AttentionMask


class TransformersViT(nn.Module):
    """A `ViTModel` or `DeiTModel` of transformers as a PatchBackbone. `model` is the wrapped model, for saving."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = self.model.config
        image, patch = _side(config.image_size), _side(config.patch_size)
        self.grid = (image[0] // patch[0], image[1] // patch[1])
        if patch[0] != patch[1]:
            raise BackboneMismatch(
                f"Patches must be square, this {type(model).__name__} has {patch[0]} × {patch[1]}."
            )
        self.patch_size = patch[0]
        self.image_size = image
        self.width = config.hidden_size
        self.channels = config.num_channels

    @property
    def _prefix_length(self) -> int:
        return self.model.embeddings.position_embeddings.shape[1] - self.grid[0] * self.grid[1]

    @property
    def positions(self) -> Tensor:
        return self.model.embeddings.position_embeddings[:, self._prefix_length :]

    def patches(self, pixels: Tensor) -> Tensor:
        if tuple(pixels.shape[-2:]) != self.image_size or pixels.shape[1] != self.channels:
            raise BackboneMismatch(
                f"The model takes images of {self.channels} × {self.image_size[0]} × {self.image_size[1]}, "
                f"got {' × '.join(map(str, pixels.shape[1:]))}."
            )
        return self.model.embeddings.patch_embeddings(pixels)

    def prefix(self, batch_size: int) -> Tensor:
        embeddings = self.model.embeddings
        special = [embeddings.cls_token, getattr(embeddings, "distillation_token", None)]
        tokens = torch.cat([token for token in special if token is not None], dim=1)
        return (tokens + embeddings.position_embeddings[:, : self._prefix_length]).expand(batch_size, -1, -1)

    def encode(self, tokens: Tensor, levels: Sequence[int] = ()) -> Any:
        hidden = self.model.embeddings.dropout(tokens)
        wanted: dict[int, Any] = {level % self.depth: None for level in levels}
        for index, layer in enumerate(self._layers):
            hidden = layer(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            if index in wanted:
                wanted[index] = hidden
        return [wanted[level % self.depth] for level in levels] if levels else self.model.layernorm(hidden)

    @property
    def depth(self) -> int:
        return len(self._layers)

    @property
    def _layers(self) -> Any:
        return self.model.layers if hasattr(self.model, "layers") else self.model.encoder.layer


def _side(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


@adapter(PatchBackbone, "ViTModel", "DeiTModel")
def _patch_backbone(module: Any) -> nn.Module | None:
    for name in ("vit", "deit"):
        module = getattr(module, name, module)
    embeddings = getattr(module, "embeddings", None)
    fits = getattr(getattr(module, "config", None), "model_type", "") in ("vit", "deit")
    return TransformersViT(module) if fits and hasattr(embeddings, "patch_embeddings") else None


class TransformersLM(nn.Module):
    """A causal or masked language model of transformers as a TokenBackbone. `model` is the wrapped model.

    Attention rules reach the model as its own `attention_mask`: a bool [B, 1, Q, K] tensor for sdpa and eager, a
    BlockMask where `attn_implementation="flex_attention"`.
    """

    def __init__(self, model: Any, *, shift: int) -> None:
        super().__init__()
        self.model = model
        self.shift = shift
        self.vocabulary = self.model.config.vocab_size
        self.width = self.model.config.hidden_size
        self.mask_token = getattr(self.model.config, "mask_token_id", None)

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def logits(
        self, tokens: Tensor, attention: AttentionMask | None = None, positions: Tensor | None = None
    ) -> Tensor:
        given: dict[str, Any] = {"input_ids" if tokens.dtype == torch.int64 else "inputs_embeds": tokens}
        if attention is not None:
            given["attention_mask"] = self._attention(attention, tokens)
        if positions is not None:
            given["position_ids"] = positions
        if self.shift:
            given["use_cache"] = False
        return self.model(**given).logits

    def _attention(self, attention: AttentionMask, tokens: Tensor) -> Any:
        implementation = self.model.config._attn_implementation
        if implementation == "flex_attention":
            return attention.block_mask()
        keep = attention.keep.expand(tokens.shape[0], -1, -1, -1)
        if implementation == "eager":
            dtype = self.model.get_input_embeddings().weight.dtype
            return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(
                ~keep, torch.finfo(dtype).min
            )
        return keep


@adapter(TokenBackbone, "any …ForCausalLM", "any …ForMaskedLM")
def _token_backbone(module: Any) -> nn.Module | None:
    name = type(module).__name__
    if not hasattr(module, "config") or not hasattr(module, "get_input_embeddings"):
        return None
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return TransformersLM(module, shift=1)
    return TransformersLM(module, shift=0) if name.endswith("ForMaskedLM") else None


def denoiser(backbone: TokenBackbone) -> Callable[..., Tensor]:
    """A token backbone as a sampler's denoiser: logits[:, i] is its prediction of token i.

    A causal model's outputs are moved one place to the right; nothing predicts its first token, so a sampler must be given
    a prompt of at least one token (the logits there are zero).
    """

    def predict(tokens: Tensor) -> Tensor:
        logits = backbone.logits(tokens)
        if not backbone.shift:
            return logits
        first = torch.zeros_like(logits[:, : backbone.shift])
        return torch.cat([first, logits[:, : -backbone.shift]], dim=1)

    return predict
