"""Small models of well-known architectures, made from a config: what jobs use where no model is given.

Nothing is downloaded. The same seed gives the same weights, and the global generator is left as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def causal_language_model(
    *,
    vocabulary: int,
    length: int,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    eos_token: int | None = None,
    pad_token: int | None = None,
    mask_token: int | None = None,
    seed: int = 0,
) -> Any:
    """A `LlamaForCausalLM` for sequences of up to `length` tokens; `mask_token` is noted in its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=_multiple(width * 8 // 3, 32),
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=eos_token,
        eos_token_id=eos_token,
        pad_token_id=pad_token,
        mask_token_id=mask_token,
    )
    return _seeded(lambda: LlamaForCausalLM(config), seed)


def masked_language_model(
    *,
    vocabulary: int,
    length: int,
    mask_token: int,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    eos_token: int | None = None,
    pad_token: int | None = None,
    seed: int = 0,
) -> Any:
    """A `BertForMaskedLM` without dropout for sequences of up to `length` tokens; `mask_token` is in its config."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=length,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=pad_token,
        eos_token_id=eos_token,
        mask_token_id=mask_token,
    )
    return _seeded(lambda: BertForMaskedLM(config), seed)


def masked_denoiser(
    *,
    vocabulary: int,
    length: int,
    mask_token: int,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    eos_token: int | None = None,
    pad_token: int | None = None,
    seed: int = 0,
) -> Any:
    """A `ModernBertForMaskedLM` that learns from little text; `mask_token` is in its config.

    All layers but the first look at the eight nearest neighbours only, positions are rotary, and weights begin with variance
    2 / (5 · width). A BERT of this size learns nothing but how frequent each token is in its first five hundred steps, since
    half of its text is hidden: where to look is what it would have to find out first.
    """
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = ModernBertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=length,
        global_attn_every_n_layers=depth,
        local_attention=8,
        initializer_range=math.sqrt(2 / (5 * width)),
        pad_token_id=pad_token,
        bos_token_id=eos_token,
        eos_token_id=eos_token,
        cls_token_id=eos_token,
        sep_token_id=eos_token,
        mask_token_id=mask_token,
    )
    return _seeded(lambda: ModernBertForMaskedLM(config), seed)


def vision_transformer(
    *,
    image_size: int = 32,
    patch_size: int = 4,
    channels: int = 3,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    seed: int = 0,
) -> Any:
    """A `ViTModel` without pooler; the default sees 32 × 32 pixels as 8 × 8 patches."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        num_channels=channels,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _seeded(lambda: ViTModel(config, add_pooling_layer=False), seed)


def convolutional_network(*, channels: int = 3, width: int = 32, depth: int = 2, seed: int = 0) -> Any:
    """A `ResNetModel` of basic blocks with three stages of widths 1, 2 and 4 × `width`, whose features lie 16 pixels apart."""
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(
        num_channels=channels,
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width],
        depths=[depth] * 3,
        layer_type="basic",
    )
    return _seeded(lambda: ResNetModel(config), seed)


def _seeded(make: Callable[[], Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return make()


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
