"""Exact attention under a rule: a slab of queries at a time without an L × L mask, or by a layer's own scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from maskwright.errors import MaskShapeError
from maskwright.mask import AttentionMask

BLOCK = 128
"""Positions a side of the blocks in which a rule is looked at."""

LIMIT = 2**22
"""Elements of the dense mask of one slab, where it has more than one row of blocks."""

KEPT = 2**26
"""Elements of dense masks that are kept for the next layer; beyond, each layer evaluates the rule again."""


@attrs.frozen(eq=False)
class Slab:
    """Queries [q_first, q_end) and the span of keys [k_first, k_end) outside of which none of them attends to anything.

    `full`: each of them attends to the whole span. `keep` is the dense mask of the rectangle, where it is kept.
    """

    q_first: int
    q_end: int
    k_first: int
    k_end: int
    full: bool
    keep: Tensor | None


class Slabs:
    """An attention rule, prepared for as many layers as like: which keys each slab of queries needs, and their masks.

    Preparing takes one look at every block of 128 × 128, and keeps the dense masks of at most 2²⁶ pairs of positions.
    """

    def __init__(self, mask: AttentionMask, *, limit: int = LIMIT, kept: int = KEPT) -> None:
        self.mask = mask
        self.slabs = list(_slabs(mask, limit))
        pairs = sum(
            (one.q_end - one.q_first) * (one.k_end - one.k_first) for one in self.slabs if not one.full
        )
        if pairs * mask.batch * mask.heads <= kept:
            self.slabs = [
                attrs.evolve(one, keep=None if one.full else _tile(mask, one)) for one in self.slabs
            ]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, dropout: float = 0.0
    ) -> Tensor:
        """softmax(q · k · scale) · v over the attended keys: [B, H, Q, D], [B, G, K, D], [B, G, K, E] → [B, H, Q, E].

        H is a multiple of G (grouped queries). A query that attends to nothing gets zeros. `scale` is 1/√D by default.
        Raises `MaskShapeError` when the rule is for other sizes.
        """
        self._check(query, key)
        parts = []
        for slab in self.slabs:
            span = slice(slab.k_first, slab.k_end)
            tensors = query[:, :, slab.q_first : slab.q_end], key[:, :, span], value[:, :, span]
            if slab.full or slab.keep is not None or not torch.is_grad_enabled():
                parts.append(self._attend(slab, *tensors, scale, dropout))
            else:
                # The dense mask is not kept for the backward pass either, but evaluated again.
                parts.append(checkpoint(self._attend, slab, *tensors, scale, dropout, use_reentrant=False))
        return torch.cat(parts, dim=2)

    def _attend(
        self, slab: Slab, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float
    ) -> Tensor:
        if slab.k_first == slab.k_end:
            return query.new_zeros(*query.shape[:-1], value.shape[-1])
        grouped = key.shape[1] != query.shape[1]
        if slab.full:
            return scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, scale=scale, enable_gqa=grouped
            )
        keep = (_tile(self.mask, slab) if slab.keep is None else slab.keep).to(query.device)
        seen = keep.any(-1, keepdim=True)
        blind = not bool(seen.all())
        # What a kernel makes of a row without keys differs: such a row sees everything, and its result is dropped.
        attended = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=keep | ~seen if blind else keep,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=grouped,
        )
        return attended.masked_fill(~seen, 0.0) if blind else attended

    def _check(self, query: Tensor, key: Tensor) -> None:
        mask = self.mask
        sizes = (query.shape[2], key.shape[2]) == (mask.q_len, mask.kv_len)
        if not (sizes and mask.batch in (1, query.shape[0]) and mask.heads in (1, query.shape[1])):
            raise MaskShapeError(
                f"{mask!r} does not fit queries {list(query.shape)} and keys {list(key.shape)} ([B, heads, L, D]); "
                "make the rule for these lengths, and for a batch and heads of 1 or of these numbers."
            )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention under a rule, once: `Slabs(mask).attend(query, key, value)`."""
    return Slabs(mask).attend(query, key, value, scale=scale, dropout=dropout)


@attrs.frozen(eq=False)
class ScoreRule:
    """An attention rule that each layer evaluates on its own queries and keys, such as "the k keys that score highest".

    `keep(scores [B, H, Q, K]) -> bool` of the same shape, True = attended. The scores are q · k · scale, and carry no gradient:
    what a rule keeps is not learned, what is kept is.
    """

    keep: Callable[[Tensor], Tensor]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, dropout: float = 0.0
    ) -> Tensor:
        """As `Slabs.attend`: [B, H, Q, D], [B, G, K, D], [B, G, K, E] → [B, H, Q, E]; zeros for a query that attends to nothing.

        Raises `MaskShapeError` when the rule answers with anything but a bool for each score.
        """
        if key.shape[1] != query.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
        keep = self.keep(scores.detach())
        if keep.dtype != torch.bool or keep.shape != scores.shape:
            raise MaskShapeError(
                f"An attention rule on scores {list(scores.shape)} must answer with bool of that shape, True = attended; "
                f"it gave {keep.dtype} {list(keep.shape)}."
            )
        # A finite number, so that a row without keys has no 0 / 0.
        weights = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~keep, 0.0)
        return torch.nn.functional.dropout(weights, dropout).to(value.dtype) @ value


def _tile(mask: AttentionMask, slab: Slab) -> Tensor:
    return mask.tile(slab.q_first, slab.q_end, slab.k_first, slab.k_end)


def _slabs(mask: AttentionMask, limit: int) -> Iterator[Slab]:
    """Rows of blocks, as many in one slab as their common mask has at most `limit` elements; at least one."""
    some, every = (blocks.flatten(0, 1) for blocks in mask.blocks(BLOCK))
    some, every = some.any(0), every.all(0)
    rows, columns = some.shape
    empty = ~some.any(1)
    lows = some.to(torch.int8).argmax(1).masked_fill(empty, columns).tolist()
    highs = (columns - some.flip(1).to(torch.int8).argmax(1)).masked_fill(empty, 0).tolist()

    def slab(start: int, end: int, low: int, high: int) -> Slab:
        low = min(low, high)
        full = high > low and bool(every[start:end, low:high].all())
        q_end, k_end = min(end * BLOCK, mask.q_len), min(high * BLOCK, mask.kv_len)
        return Slab(start * BLOCK, q_end, low * BLOCK, k_end, full, None)

    start, low, high = 0, lows[0], highs[0]
    for row in range(1, rows):
        wider = min(low, lows[row]), max(high, highs[row])
        if (row + 1 - start) * (wider[1] - wider[0]) * BLOCK**2 * mask.batch * mask.heads > limit:
            yield slab(start, row, low, high)
            start, wider = row, (lows[row], highs[row])
        low, high = wider
    yield slab(start, rows, low, high)
