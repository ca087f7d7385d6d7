"""Prefilling a batch of prompts in packed rows, and the cache that generation goes on with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from maskwright import adapt
from maskwright.errors import BackboneMismatch, BadData, BadParameter
from maskwright.toolkit.packing import Bins, Packing, fewest_bins


def packed_rows(
    lengths: Sequence[int],
    capacity: int | None = None,
    bins: Callable[[Sequence[int], int], Bins] = fewest_bins,
    *,
    device: torch.device | str = "cpu",
) -> Packing:
    """Rows of prompts without their last token, packed by their full lengths, as in the official code.

    `capacity` is by default the longest prompt's length. A longer prompt has a row of its own.
    """
    capacity = max(lengths) if capacity is None else capacity
    return Packing.from_bins([length - 1 for length in lengths], bins(lengths, capacity), device=device)


def padded_left(prompts: Sequence[Tensor], fill: int) -> tuple[Tensor, Tensor]:
    """Prompts at the end of equal rows, int64 [B, longest], and 1 where they are, int64 [B, longest]."""
    device = prompts[0].device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    real = torch.arange(longest, device=device) >= longest - lengths[:, None]
    ids = torch.full(real.shape, fill, dtype=torch.int64, device=device)
    return ids.masked_scatter(real, torch.cat(list(prompts))), real.long()


@attrs.frozen(eq=False)
class Prefilled:
    """What `prefill` made of B prompts of lengths L_i.

    - `logits`: for each prompt [L_i - 1, V], the model's outputs for all of its tokens but the last; () if they were not wanted
    - `cache`: a DynamicCache of transformers, keys and values [B, H, max L_i - 1, D] in each layer, left-padded with zeros
    - `input_ids`, `attention_mask`: int64 [B, max L_i], the prompts and 1 where they are, left-padded
    - `packing`: which row and places each prompt had
    """

    logits: tuple[Tensor, ...]
    cache: Any
    input_ids: Tensor
    attention_mask: Tensor
    packing: Packing

    @property
    def final_tokens(self) -> Tensor:
        """The tokens that were kept back, the first input of decoding: int64 [B, 1]."""
        return self.input_ids[:, -1:]

    def inputs(self, copies: int = 1) -> dict[str, Any]:
        """For `model.generate(**prefilled.inputs(), …)`, which returns what it returns without prepacking.

        With `num_beams` or `num_return_sequences`, `copies` is that number: generate repeats the rest of its inputs itself.
        Generation writes into the cache: for a second one, prefill again or copy it (`copy.deepcopy`) before.
        """
        if copies > 1:
            self.cache.batch_repeat_interleave(copies)
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "past_key_values": self.cache,
        }

    @torch.no_grad()
    def next_logits(self, model: Any) -> Tensor:
        """The logits of each prompt's last token, [B, V]: one decoding step, which adds the kept-back tokens to the cache."""
        positions = self.attention_mask.sum(1, keepdim=True) - 1
        step = model(
            input_ids=self.final_tokens,
            attention_mask=self.attention_mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return step.logits[:, -1]


@torch.no_grad()
def prefill(
    model: nn.Module,
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    capacity: int | None = None,
    bins: Callable[[Sequence[int], int], Bins] = fewest_bins,
    logits: bool = True,
) -> Prefilled:
    """Keys and values of every prompt but for its last token, computed in few rows, as if each had been alone.

    `model` is a causal language model of transformers in evaluation mode; `prompts` are token ids. `capacity` is the length of
    a row (the longest prompt's by default; a longer prompt has its own row), `bins` the packing (`best_fit_decreasing` is the
    official one). With `logits=False` no logits are computed, which saves the most where the vocabulary is large.

    Raises `BadData` when there is no prompt or an empty one, `BadParameter` for a model in training mode or a capacity below 1,
    and `BackboneMismatch` for a model whose layers keep anything but keys and values of all tokens (sliding windows, states).
    """
    from transformers import DynamicCache

    backbone = adapt(model, "token")
    inner = getattr(backbone, "model", None)
    if backbone.shift != 1 or not hasattr(inner, "get_input_embeddings"):
        raise BackboneMismatch(
            f"prefill needs a causal language model of transformers (…ForCausalLM), not a {type(model).__name__}."
        )
    assert inner is not None
    if inner.training:
        raise BadParameter(
            "prefill needs the model in evaluation mode, so that dropout is off: call model.eval()."
        )
    cache = DynamicCache(config=inner.config)
    _check_full_attention(inner, cache)
    device = inner.get_input_embeddings().weight.device
    ids = [torch.as_tensor(prompt, dtype=torch.int64, device=device) for prompt in prompts]
    _check_prompts(ids)

    lengths = [len(prompt) for prompt in ids]
    packing = packed_rows(lengths, capacity, bins, device=device)
    padding = getattr(inner.config, "pad_token_id", None)
    padding = padding if isinstance(padding, int) and padding >= 0 else 0
    left, attend = padded_left(ids, padding)
    made: tuple[Tensor, ...] = ()
    if packing.shape[1]:
        tokens = packing.place(torch.cat([prompt[:-1] for prompt in ids]), padding)
        # Right padding is behind a row's only prompt: the model's own causality hides it, without a mask.
        rule, positions = (None, None) if packing.alone else (packing.attention, packing.positions)
        last = int(not logits and inner._supports_logits_to_keep())
        outputs = backbone.logits(tokens, rule, positions, cache=cache, last=last)
        made = packing.split(outputs) if logits else ()
        for layer in cache.layers:
            layer.keys, layer.values = packing.align_right(layer.keys), packing.align_right(layer.values)
    elif logits:
        made = tuple(torch.empty(0, backbone.vocabulary, device=device) for _ in ids)
    return Prefilled(made, cache, left, attend, packing)


def _check_prompts(prompts: Sequence[Tensor]) -> None:
    if not prompts:
        raise BadData("There is no prompt to prefill; give at least one.")
    for number, prompt in enumerate(prompts):
        if prompt.ndim != 1:
            raise BadData(f"Prompt {number} must be a list of token ids, not of shape {list(prompt.shape)}.")
        if not len(prompt):
            raise BadData(
                f"Prompt {number} is empty: nothing can follow nothing. Give it at least one token, such as the "
                "tokenizer's bos_token_id."
            )


def _check_full_attention(model: Any, cache: Any) -> None:
    from transformers import DynamicLayer

    kinds = sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer})
    if kinds or not cache.layers:
        raise BackboneMismatch(
            f"prefill packs models whose every layer attends to all earlier tokens; {type(model).__name__} has "
            f"{', '.join(kinds) or 'no such layer'}: prefill its prompts padded, with model.generate."
        )
