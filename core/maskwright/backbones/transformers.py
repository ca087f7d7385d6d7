"""Adapters for the models of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.backbones import PatchBackbone, TokenBackbone, adapter
from maskwright.errors import BackboneMismatch
from maskwright.mask import AttentionMask, Mask
from maskwright.toolkit.attention import ScoreRule, Slabs


class TransformersViT(nn.Module):
    """A `ViTModel` or `DeiTModel` of transformers as a PatchBackbone. `model` is the wrapped model, for saving.

    At the first attention rule its attention implementation becomes "maskwright" (see `register_attention`).
    """

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

    def encode(
        self,
        tokens: Tensor,
        levels: Sequence[int] = (),
        attention: AttentionMask | ScoreRule | None = None,
    ) -> Any:
        hidden = self.model.embeddings.dropout(tokens)
        rule = {} if attention is None else {"attention_mask": self._attention(attention)}
        wanted: dict[int, Any] = {level % self.depth: None for level in levels}
        for index, layer in enumerate(self._layers):
            hidden = layer(hidden, **rule)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            if index in wanted:
                wanted[index] = hidden
        return [wanted[level % self.depth] for level in levels] if levels else self.model.layernorm(hidden)

    def _attention(self, attention: AttentionMask | ScoreRule) -> Slabs | ScoreRule:
        if self.model.config._attn_implementation != ATTENTION:
            register_attention()
            self.model.set_attn_implementation(ATTENTION)
        return Slabs(attention) if isinstance(attention, AttentionMask) else attention

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

    An attention rule reaches the model as its `attention_mask`, through transformers' own attention interface: at the first
    rule the model's attention implementation becomes "maskwright" (see `register_attention`), which is sdpa without a rule.
    A model that was given "flex_attention" keeps it and gets a BlockMask; one that cannot change its implementation gets a
    dense bool [B, heads, Q, K] mask (or 0 and most negative, for "eager"). A rule replaces the model's own rule entirely:
    causality, sliding windows and all.
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
        config = self.model.config
        if config._attn_implementation not in (ATTENTION, "flex_attention"):
            register_attention()
            self.model.set_attn_implementation(ATTENTION)
        if config._attn_implementation == ATTENTION:
            return attention
        if config._attn_implementation == "flex_attention":
            return attention.block_mask()
        keep = Mask(attention.keep.expand(tokens.shape[0], -1, -1, -1))
        if config._attn_implementation == "eager":
            return keep.as_additive(self.model.get_input_embeddings().weight.dtype)
        return keep.as_sdpa()


ATTENTION = "maskwright"
"""The attention implementation under which transformers' models take an `AttentionMask`, and their layers a `ScoreRule`."""


def register_attention() -> None:
    """Make `attn_implementation="maskwright"` known to transformers.

    A model that uses it takes an `AttentionMask` as `attention_mask`, and no L × L mask is made for it; given a tensor or
    nothing, it does what it does with "sdpa". Nothing of a model's code is touched, and its config does not save the name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _attention_mask)


def _attention_mask(*sizes: Any, attention_mask: Any = None, **arguments: Any) -> Any:
    """Called once a forward by transformers' mask creation; what it returns goes to every layer."""
    if isinstance(attention_mask, AttentionMask):
        return Slabs(attention_mask)
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*sizes, attention_mask=attention_mask, **arguments)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """[B, H, Q, D], [B, G, K, D], [B, G, K, E] → [B, Q, H, E]: called by every layer."""
    if not isinstance(attention_mask, Slabs | ScoreRule):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **arguments
        )
    changed = [name for name in ("softcap", "s_aux", "position_bias") if arguments.get(name) is not None]
    if changed:
        raise BackboneMismatch(
            f"{type(module).__name__} changes its attention scores ({', '.join(changed)}), which attention rules do not support; "
            'load the model with attn_implementation="flex_attention".'
        )
    attended = attention_mask.attend(query, key, value, scale=scaling, dropout=dropout)
    return attended.transpose(1, 2).contiguous(), None


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
