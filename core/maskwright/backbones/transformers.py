"""Adapters for the models of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.backbones import GridBackbone, PatchBackbone, TokenBackbone, adapter
from maskwright.errors import BackboneMismatch
from maskwright.mask import AttentionMask, Mask
from maskwright.toolkit.attention import ScoreRule, Slabs


class TransformersPatches(nn.Module):
    """What the adapters of vision transformers share. `model` is the wrapped model, for saving."""

    def __init__(self, model: Any, *, width: int) -> None:
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
        self.width = width
        self.channels = config.num_channels

    def check_pixels(self, pixels: Tensor) -> None:
        if tuple(pixels.shape[-2:]) != self.image_size or pixels.shape[1] != self.channels:
            raise BackboneMismatch(
                f"The model takes images of {self.channels} × {self.image_size[0]} × {self.image_size[1]}, "
                f"got {' × '.join(map(str, pixels.shape[1:]))}."
            )


class TransformersBlocks(TransformersPatches):
    """One block after the other on tokens of one width: what the adapters of ViT and BEiT share."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, width=model.config.hidden_size)

    def patches(self, pixels: Tensor) -> Tensor:
        self.check_pixels(pixels)
        return self.model.embeddings.patch_embeddings(pixels)

    def _run(
        self,
        tokens: Tensor,
        levels: Sequence[int],
        between: Callable[[int, Tensor], Tensor] | None = None,
        **told: Any,
    ) -> Any:
        """The blocks, each of which is told the rest, and the final norm; or the outputs of some of them."""
        hidden = self.model.embeddings.dropout(tokens)
        wanted: dict[int, Any] = {level % self.depth: None for level in levels}
        for index, layer in enumerate(self._layers):
            hidden = layer(hidden if between is None else between(index, hidden), **told)
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


class TransformersViT(TransformersBlocks):
    """A `ViTModel`, `DeiTModel` or `Dinov2Model` (with registers or without) of transformers as a PatchBackbone.

    The prefix is the class token, then DeiT's distillation token, or DINOv2's registers, which have no positions. At the first
    attention rule its attention implementation becomes "maskwright" (see `register_attention`).
    """

    @property
    def _placed(self) -> int:
        """Prefix tokens that have a position."""
        return self.model.embeddings.position_embeddings.shape[1] - self.grid[0] * self.grid[1]

    @property
    def positions(self) -> Tensor:
        return self.model.embeddings.position_embeddings[:, self._placed :]

    def prefix(self, batch_size: int) -> Tensor:
        embeddings = self.model.embeddings
        special = [embeddings.cls_token, getattr(embeddings, "distillation_token", None)]
        tokens = torch.cat([token for token in special if token is not None], dim=1)
        tokens = tokens + embeddings.position_embeddings[:, : self._placed]
        registers = getattr(embeddings, "register_tokens", None)
        if registers is not None:
            tokens = torch.cat([tokens, registers], dim=1)
        return tokens.expand(batch_size, -1, -1)

    def encode(
        self,
        tokens: Tensor,
        levels: Sequence[int] = (),
        between: Callable[[int, Tensor], Tensor] | None = None,
        attention: AttentionMask | ScoreRule | None = None,
    ) -> Any:
        told = {} if attention is None else {"attention_mask": self._attention(attention)}
        return self._run(tokens, levels, between, **told)

    def _attention(self, attention: AttentionMask | ScoreRule) -> Slabs | ScoreRule:
        if self.model.config._attn_implementation not in ENTRANCES:
            register_attention()
            self.model.set_attn_implementation(ATTENTION)
        return Slabs(attention) if isinstance(attention, AttentionMask) else attention


class TransformersBeit(TransformersBlocks):
    """A `BeitModel` of transformers as a PatchBackbone.

    Where its blocks have a bias for each pair of relative positions, `encode` must be told which patches it is given, and
    the rows and columns of those are taken from the bias. It reaches the blocks through transformers' attention interface
    ("maskwright", see `register_attention`), which a model gets when it is first given some of the patches.
    With `use_mean_pooling` the model has no final norm of its own (its pooler has one), and so has `encode`.
    """

    @property
    def relative_positions(self) -> bool:
        """Whether a block, or the model for all of them, has a bias of relative positions."""
        biases = [self.model.shared_position_bias, *(one.relative_position_bias for one in self._layers)]
        return any(bias is not None for bias in biases)

    @property
    def positions(self) -> Tensor:
        table, token = self.model.embeddings.position_embeddings, self.model.embeddings.cls_token
        if table is None:
            return token.new_zeros(1, self.grid[0] * self.grid[1], self.width)
        return table[:, 1:]

    def prefix(self, batch_size: int) -> Tensor:
        table, token = self.model.embeddings.position_embeddings, self.model.embeddings.cls_token
        return (token if table is None else token + table[:, :1]).expand(batch_size, -1, -1)

    def encode(
        self,
        tokens: Tensor,
        levels: Sequence[int] = (),
        between: Callable[[int, Tensor], Tensor] | None = None,
        places: Tensor | None = None,
    ) -> Any:
        told: dict[str, Any] = {"resolution": self.image_size}
        if not self.relative_positions:
            return self._run(tokens, levels, between, **told)
        if between is not None:
            raise BackboneMismatch(
                f"{type(self.model).__name__} compares positions, so that no tokens can be dropped between its blocks; use a ViT, or a "
                "BEiT without relative_position_bias."
            )
        if self.model.shared_position_bias is not None:
            told["attention_mask"] = self.model.shared_position_bias(self.grid)
        if places is not None:
            if self.model.config._attn_implementation not in ENTRANCES:
                register_attention()
                self.model.set_attn_implementation(ATTENTION)
            # Its places among all tokens of the model: the class token is the first.
            told["places"] = torch.nn.functional.pad(places + 1, (1, 0))
        elif tokens.shape[1] != 1 + self.grid[0] * self.grid[1]:
            raise BackboneMismatch(
                f"{type(self.model).__name__} compares positions, so it must be told which {tokens.shape[1] - 1} of the "
                f"{self.grid[0] * self.grid[1]} patches it is given: encode(tokens, places=mask.visible_indices()), or "
                "maskwright.backbones.encode_visible(backbone, tokens, mask)."
            )
        return self._run(tokens, levels, **told)


class TransformersSwin(TransformersPatches):
    """A `SwinModel` of transformers as a GridBackbone: its windows and merges want every patch.

    Patches are those of the first stage, 4 pixels a side; the features are the last stage's, each of `feature_stride` pixels
    and `feature_width` channels. There is no prefix. `levels` counts the blocks of all stages.
    """

    every_patch = True

    def __init__(self, model: Any) -> None:
        super().__init__(model, width=model.config.embed_dim)
        merges = 2 ** (len(model.config.depths) - 1)
        self.depth = sum(model.config.depths)
        self.feature_stride = self.patch_size * merges
        self.feature_width = self.width * merges
        if any(side % merges for side in self.grid):
            raise BackboneMismatch(
                f"This {type(model).__name__} merges {merges} × {merges} patches, which its grid of {self.grid} is no multiple "
                f"of; its images must be multiples of {self.feature_stride} pixels."
            )

    @property
    def positions(self) -> Tensor:
        table = self.model.embeddings.position_embeddings
        if table is not None:
            return table
        return self.model.layernorm.weight.new_zeros(1, self.grid[0] * self.grid[1], self.width)

    def patches(self, pixels: Tensor) -> Tensor:
        self.check_pixels(pixels)
        embedded, _ = self.model.embeddings.patch_embeddings(pixels)
        return self.model.embeddings.norm(embedded)

    def prefix(self, batch_size: int) -> Tensor:
        return self.model.layernorm.weight.new_zeros(batch_size, 0, self.width)

    def encode(self, tokens: Tensor, levels: Sequence[int] = ()) -> Any:
        hidden, grid = self.model.embeddings.dropout(tokens), self.grid
        outputs = []
        for stage in self.model.encoder.layers:
            if not levels:
                hidden = stage(hidden, grid)[0]
            else:
                for block in stage.blocks:
                    hidden = block(hidden, grid)[0]
                    outputs.append(hidden)
                hidden = hidden if stage.downsample is None else stage.downsample(hidden, grid)
            grid = grid if stage.downsample is None else (grid[0] // 2, grid[1] // 2)
        return [outputs[level] for level in levels] if levels else self.model.layernorm(hidden)


def _side(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


_PATCH_ADAPTERS: dict[str, Callable[[Any], nn.Module]] = {
    "vit": TransformersViT,
    "deit": TransformersViT,
    "dinov2": TransformersViT,
    "dinov2_with_registers": TransformersViT,
    "beit": TransformersBeit,
    "swin": TransformersSwin,
}


@adapter(GridBackbone, "SwinModel", "ViTModel", "DeiTModel", "BeitModel", "Dinov2Model")
@adapter(PatchBackbone, "ViTModel", "DeiTModel", "BeitModel", "Dinov2Model")
def _patch_backbone(module: Any) -> nn.Module | None:
    for name in _PATCH_ADAPTERS:  # of a model with a head
        module = getattr(module, name, module)
    wrap = _PATCH_ADAPTERS.get(getattr(getattr(module, "config", None), "model_type", ""))
    embeddings = getattr(module, "embeddings", None)
    return wrap(module) if wrap is not None and hasattr(embeddings, "patch_embeddings") else None


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
        self,
        tokens: Tensor,
        attention: AttentionMask | None = None,
        positions: Tensor | None = None,
        *,
        cache: Any = None,
        last: int = 0,
    ) -> Tensor:
        """As in TokenBackbone. A causal model's keys and values go into `cache`, an empty one of transformers; `last` logits only."""
        given: dict[str, Any] = {"input_ids" if tokens.dtype == torch.int64 else "inputs_embeds": tokens}
        if attention is not None:
            given["attention_mask"] = self._attention(attention, tokens)
        if positions is not None:
            given["position_ids"] = positions
        if self.shift:
            given.update(use_cache=cache is not None, past_key_values=cache)
        if last:
            given["logits_to_keep"] = last
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


ENTRANCES = {ATTENTION}
"""Attention implementations by which rules and places enter: this one, and others that hand on to `attention_forward`."""


def register_attention() -> None:
    """Make `attn_implementation="maskwright"` known to transformers.

    A model that uses it takes an `AttentionMask` as `attention_mask`, and no L × L mask is made for it; given a tensor or
    nothing, it does what it does with "sdpa". `places` int64 [B, K] takes the rows and columns of these tokens from a tensor
    [B or 1, H, N, N]. Nothing of a model's code is touched, and its config does not save the name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, mask_forward)


def mask_forward(*sizes: Any, attention_mask: Any = None, **arguments: Any) -> Any:
    """Called once a forward by transformers' mask creation; what it returns goes to every layer."""
    if isinstance(attention_mask, AttentionMask):
        return Slabs(attention_mask)
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*sizes, attention_mask=attention_mask, **arguments)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    places: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """[B, H, Q, D], [B, G, K, D], [B, G, K, E] → [B, Q, H, E]: called by every layer."""
    if places is not None and isinstance(attention_mask, Tensor):
        attention_mask = _among(attention_mask, places)
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


def _among(bias: Tensor, places: Tensor) -> Tensor:
    """[B or 1, H, N, N], int64 [B, K] → [B, H, K, K]: the rows and columns of some tokens."""
    rows = torch.arange(len(bias), device=places.device)[:, None, None]
    chosen = bias.permute(0, 2, 3, 1)[rows, places[:, :, None], places[:, None, :]]
    return chosen.permute(0, 3, 1, 2)


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
    a prompt of at least one token (the logits there are zero). A backbone's `prefill` and `step`, where it has them, are
    attributes of what is returned.
    """

    def predict(tokens: Tensor) -> Tensor:
        logits = backbone.logits(tokens)
        if not backbone.shift:
            return logits
        first = torch.zeros_like(logits[:, : backbone.shift])
        return torch.cat([first, logits[:, : -backbone.shift]], dim=1)

    for name in ("prefill", "step"):
        if hasattr(backbone, name):
            setattr(predict, name, getattr(backbone, name))
    return predict
