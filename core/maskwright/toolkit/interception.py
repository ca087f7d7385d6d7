"""Attention reached from outside: whatever a module computes by torch's attention goes through a function of yours.

torch's own means do it: a `TorchFunctionMode`, to which `scaled_dot_product_attention` and `MultiheadAttention` report, and
forward hooks, which know the block that is running. No module is changed, and none needs to know.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from maskwright.errors import BackboneMismatch


@attrs.frozen(eq=False)
class AttentionCall:
    """One attention: `query` [B, H, Q, D], `key` [B, H, K, D], `value` [B, H, K, E] and the module's own `mask`, if any.

    `block` is the name, in the module given to `intercepted`, of the innermost element of a `ModuleList` or `Sequential` that is
    running (of the innermost module, where there is no such list), `tokens` the first tensor of three axes that it was given, and
    `ordinal` says how many attentions the same block has computed before in this context: the second pass through a network
    has another ordinal than the first, and cross-attention another than the self-attention before it.
    """

    block: str
    ordinal: int
    tokens: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    dropout: float

    def logits(self) -> Tensor:
        """[B, H, Q, K]: q · k · scale plus the module's own mask; softmax of it are the weights."""
        logits = (self.query * self.scale) @ self.key.mT
        if self.mask is None:
            return logits
        return (
            logits.masked_fill(~self.mask, -math.inf) if self.mask.dtype == torch.bool else logits + self.mask
        )

    def attend(self, bias: Tensor | None = None) -> Tensor:
        """[B, H, Q, E]: what would have been computed, by torch's fused kernel; `bias` broadcasts to the logits and adds to them."""
        mask = self.mask
        if bias is not None:
            bias = bias.to(self.query.dtype)
            if mask is None:
                mask = bias
            else:
                mask = bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask + bias
        return F.scaled_dot_product_attention(
            self.query, self.key, self.value, attn_mask=mask, dropout_p=self.dropout, scale=self.scale
        )

    def weigh(self, weights: Tensor) -> Tensor:
        """[B, H, Q, K] → [B, H, Q, E]: the values under explicit weights, with the module's dropout."""
        return F.dropout(weights, self.dropout).to(self.value.dtype) @ self.value


Visit: TypeAlias = Callable[[AttentionCall], Tensor]
"""Decides what an attention gives: [B, H, Q, E]. `call.attend()` changes nothing."""


@contextmanager
def intercepted(module: nn.Module, visit: Visit) -> Iterator[None]:
    """Within it, every attention that `module` computes in this thread is what `visit(call)` returns.

    Seen are `torch.nn.functional.scaled_dot_product_attention`, whoever calls it, and `nn.MultiheadAttention` (with
    `nn.TransformerEncoderLayer` and its like) unless it is asked for its weights, pads keys or appends to them. Attention that a
    model computes from its own softmax, as transformers' "eager" does, is not seen. `visit` runs outside of the interception.
    Raises `BackboneMismatch` under gradient checkpointing, which would compute attention again, and plainly, when the context
    is left.
    """
    running: list[tuple[str, bool, Tensor | None]] = []
    counts: Counter[str] = Counter()

    def located(**given: Any) -> Tensor:
        place = next(
            (one for one in reversed(running) if one[1]), running[-1] if running else ("", False, None)
        )
        counts[place[0]] += 1
        return visit(AttentionCall(place[0], counts[place[0]] - 1, place[2], **given))

    def enter(name: str, listed: bool, _: nn.Module, args: Any, kwargs: Any) -> None:
        given = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.ndim == 3)
        running.append((name, listed, next(given, None)))

    def leave(*_: Any) -> None:
        running.pop()

    named = dict(module.named_modules())
    if any(one.training and getattr(one, "gradient_checkpointing", False) for one in named.values()):
        raise BackboneMismatch(
            f"{type(module).__name__} uses gradient checkpointing, which computes attention a second time where it cannot be "
            "changed; call gradient_checkpointing_disable() on the model."
        )
    elements = {
        id(child) for one in named.values() if isinstance(one, nn.ModuleList | nn.Sequential) for child in one
    }
    with ExitStack() as hooks:
        for name, one in named.items():
            # Of leaves only those that a list holds can be blocks.
            if (listed := id(one) in elements) or next(one.children(), None) is not None:
                before = one.register_forward_pre_hook(partial(enter, name, listed), with_kwargs=True)
                hooks.callback(before.remove)
                hooks.callback(one.register_forward_hook(leave, always_call=True).remove)
        with _Mode(located):
            yield


class _Mode(TorchFunctionMode):
    def __init__(self, visit: Callable[..., Tensor]) -> None:
        super().__init__()
        self.visit = visit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.visit(**_heads(*args, **kwargs))
        if func is F.multi_head_attention_forward:
            given = _MULTI_HEAD.bind(*args, **kwargs)
            given.apply_defaults()
            if _is_plain(given.arguments):
                return _multi_head(self.visit, **given.arguments), None
        return func(*args, **kwargs)


def _heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    """The arguments of `scaled_dot_product_attention` as fields of an `AttentionCall`."""
    if enable_gqa and key.shape[1] != query.shape[1]:
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return {
        "query": query,
        "key": key,
        "value": value,
        "mask": attn_mask,
        "scale": scale,
        "dropout": dropout_p,
    }


_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)
_EXTRAS = ("bias_k", "bias_v", "static_k", "static_v", "key_padding_mask")


def _is_plain(given: dict[str, Any]) -> bool:
    """Whether a multi-head attention is a projection, an attention and a projection, and nothing else."""
    return (
        given["query"].ndim == 3
        and not any(
            given[name] for name in ("need_weights", "add_zero_attn", "is_causal", "use_separate_proj_weight")
        )
        and all(given[name] is None for name in _EXTRAS)
    )


def _multi_head(
    visit: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    dropout_p: float,
    training: bool,
    attn_mask: Tensor | None,
    **_: Any,
) -> Tensor:
    """What `multi_head_attention_forward` computes of [Q, B, width], [K, B, width] twice: [Q, B, width]."""
    if query is key is value:
        projected = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
    else:
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        projected = tuple(map(F.linear, (query, key, value), in_proj_weight.chunk(3), biases))
    (length, batch, width), heads = query.shape, num_heads
    query, key, value = (one.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for one in projected)
    if attn_mask is not None:
        # Here True stands for what is not attended to.
        attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
        attn_mask = (
            attn_mask
            if attn_mask.ndim == 2 or len(attn_mask) == 1
            else attn_mask.unflatten(0, (batch, heads))
        )
    attended = visit(**_heads(query, key, value, attn_mask, dropout_p if training else 0.0))
    return F.linear(
        attended.permute(2, 0, 1, 3).reshape(length, batch, width), out_proj_weight, out_proj_bias
    )
