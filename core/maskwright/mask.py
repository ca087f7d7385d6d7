"""`Mask`, `StagedMask`, `AttentionMask` and `Layout`: one polarity, True = visible / kept / attended, always.

The converters (`as_*`, `from_*`) are the only places where another library's polarity appears.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from torch import Tensor

from maskwright.errors import BadData, MaskShapeError, MaskTooLarge, UnequalMaskCounts

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

DENSE_LIMIT = 2**32
"""`AttentionMask.keep` refuses to materialise more elements than this (4 GiB as bool)."""


def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(map(str, tensor.shape)) + "]"


def _bool(_: object, attribute: attrs.Attribute[Tensor], value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        found = f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise MaskShapeError(
            f"Mask.keep must be a bool tensor, True = visible, not {found}; "
            "use Mask.from_removed for 1 = removed or Mask.from_hf_attention for 1 = attend."
        )
    if value.ndim == 0:
        raise MaskShapeError("Mask.keep must have at least one dimension, [B, *grid], not a single value.")


@attrs.frozen(eq=False, slots=False)
class Mask:
    """What is visible, kept or attended.

    `keep` is a bool tensor [B, *grid], True = visible. Rows are samples; for a weight matrix they are its
    output units and `keep` has the parameter's own shape.
    """

    keep: Tensor = attrs.field(validator=_bool)

    # -- facts ---------------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """[B, *grid]."""
        return self.keep.shape

    @property
    def ndim(self) -> int:
        """1 + the axes of the grid."""
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        """Where `keep` lies."""
        return self.keep.device

    @cached_property
    def _rows(self) -> Tensor:
        return self.keep.reshape(self.keep.shape[0], -1)

    @property
    def counts(self) -> Tensor:
        """Visible positions of each row, int64 [B]."""
        return self._rows.sum(1)

    @property
    def removed_ratio(self) -> Tensor:
        """Hidden share of each row, float32 [B]."""
        return 1.0 - self._rows.float().mean(1)

    # -- algebra -------------------------------------------------------------------------------------------

    def __invert__(self) -> Mask:
        """Visible and hidden change places."""
        return Mask(~self.keep)

    def __and__(self, other: Mask) -> Mask:
        """Visible in both."""
        return Mask(self.keep & self._fitting(other, "&"))

    def __or__(self, other: Mask) -> Mask:
        """Visible in either."""
        return Mask(self.keep | self._fitting(other, "|"))

    def _fitting(self, other: Mask, operator: str) -> Tensor:
        if not isinstance(other, Mask):
            raise MaskShapeError(f"Mask {operator} {type(other).__name__}: the other side must be a Mask.")
        if self.shape != other.shape:
            raise MaskShapeError(
                f"Mask {operator} Mask: shapes {_shape(self.keep)} and {_shape(other.keep)} differ; "
                "upsample or flatten one of them first."
            )
        return other.keep

    def to(self, device: torch.device | str) -> Mask:
        """The same mask on another device."""
        return Mask(self.keep.to(device))

    def flatten(self) -> Mask:
        """[B, *grid] → [B, N], row-major."""
        return Mask(self._rows)

    def rows(self, rows: slice) -> Mask:
        """Some of the samples."""
        return Mask(self.keep[rows])

    def upsample(self, size: tuple[int, ...]) -> Mask:
        """Repeat every grid cell so that the grid becomes `size`; each side must be a whole multiple.

        Raises `MaskShapeError` when `size` has another number of sides or does not divide.
        """
        grid = tuple(self.shape[1:])
        if len(size) != len(grid) or any(new % old for new, old in zip(size, grid)):
            raise MaskShapeError(
                f"Cannot upsample a mask of grid {grid} to {tuple(size)}: sides must be multiples."
            )
        keep = self.keep
        for axis, (new, old) in enumerate(zip(size, grid), start=1):
            # Several times faster than repeat_interleave on the tensor itself.
            cells = torch.arange(old, device=self.device).repeat_interleave(new // old)
            keep = keep.index_select(axis, cells)
        return Mask(keep)

    # -- indices -------------------------------------------------------------------------------------------

    def visible_indices(self) -> Tensor:
        """Flat positions of the visible, ascending, int64 [B, K]. Unequal counts raise `UnequalMaskCounts`."""
        return self._visible

    def hidden_indices(self) -> Tensor:
        """Flat positions of the hidden, ascending, int64 [B, N-K]. Unequal counts raise `UnequalMaskCounts`."""
        return self._hidden

    @cached_property
    def _visible(self) -> Tensor:
        return _indices(self._rows)

    @cached_property
    def _hidden(self) -> Tensor:
        return _indices(~self._rows)

    def gather_visible(self, x: Tensor) -> Tensor:
        """[B, N, ...] → [B, K, ...]: the visible positions of each row, in order."""
        self._check_positions(x)
        return _gather(x, self.visible_indices())

    def gather_hidden(self, x: Tensor) -> Tensor:
        """[B, N, ...] → [B, N-K, ...]: the hidden positions of each row, in order."""
        self._check_positions(x)
        return _gather(x, self.hidden_indices())

    def scatter_visible(self, x: Tensor, fill: Tensor | float) -> Tensor:
        """[B, K, D] → [B, N, D]: the inverse of `gather_visible`; hidden positions take `fill`.

        `fill` is a number or a tensor that broadcasts to [B, N, D], such as a mask token [1, 1, D].
        """
        index = self.visible_indices()
        if x.shape[:2] != index.shape:
            raise MaskShapeError(
                f"scatter_visible expects {_shape(index)[:-1]}, ...], the visible positions; got {_shape(x)}."
            )
        full = (self._rows.shape[0], self._rows.shape[1], *x.shape[2:])
        filling = torch.as_tensor(fill, dtype=x.dtype, device=x.device).expand(full)
        return filling.scatter(1, _spread(index, x), x)

    def _check_positions(self, x: Tensor) -> None:
        if x.shape[:2] != self._rows.shape:
            raise MaskShapeError(
                f"The mask has {_shape(self._rows)} positions (rows, N); the tensor is {_shape(x)}."
            )

    # -- other libraries' polarity --------------------------------------------------------------------------

    def as_removed(self, dtype: torch.dtype = torch.bool) -> Tensor:
        """1 = removed, [B, *grid] (MAE, SimMIM, BEiT, `bool_masked_pos` of transformers)."""
        return (~self.keep).to(dtype)

    def as_sdpa(self) -> Tensor:
        """bool, True = attend (torch.nn.functional.scaled_dot_product_attention)."""
        return self.keep

    def as_additive(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """0 where attended, the most negative finite number of `dtype` elsewhere."""
        hidden = ~self.keep
        return torch.zeros(self.shape, dtype=dtype, device=self.device).masked_fill_(
            hidden, torch.finfo(dtype).min
        )

    def as_key_padding(self) -> Tensor:
        """bool [B, N], True = ignore (`key_padding_mask` of torch.nn.MultiheadAttention)."""
        return ~self._rows

    def as_hf_attention(self) -> Tensor:
        """int64 [B, N], 1 = attend (`attention_mask` of transformers)."""
        return self._rows.long()

    @classmethod
    def from_removed(cls, removed: Tensor) -> Mask:
        """From 1 = removed."""
        return Mask(~_binary(removed, "from_removed"))

    @classmethod
    def from_sdpa(cls, attend: Tensor) -> Mask:
        """From a bool tensor, True = attend."""
        return Mask(_binary(attend, "from_sdpa"))

    @classmethod
    def from_additive(cls, bias: Tensor) -> Mask:
        """From 0 / most negative (or -inf). A bias that is neither raises `MaskShapeError`."""
        keep = bias == 0
        if not bool((keep | (bias <= torch.finfo(bias.dtype).min / 2)).all()):
            raise MaskShapeError(
                "from_additive expects 0 (attend) or the most negative number (do not); found other values: "
                "a position bias is no mask."
            )
        return Mask(keep)

    @classmethod
    def from_key_padding(cls, ignore: Tensor) -> Mask:
        """From True = ignore."""
        return Mask(~_binary(ignore, "from_key_padding"))

    @classmethod
    def from_hf_attention(cls, attend: Tensor) -> Mask:
        """From 1 = attend."""
        return Mask(_binary(attend, "from_hf_attention"))


class StagedMask(Mask):
    """A mask that falls in stages as a network gets deeper: what is hidden once stays hidden.

    `survived` int64 [B, *grid] says through how many of the `stages` a position stays visible; `keep`, the mask as anybody else
    sees it, is what survives them all. Algebra, `upsample` and files make a plain mask of it.
    """

    survived: Tensor
    stages: int

    def __init__(self, survived: Tensor, stages: int) -> None:
        if stages < 1 or survived.is_floating_point() or survived.dtype == torch.bool:
            raise MaskShapeError(
                f"StagedMask needs whole numbers of survived stages and at least 1 stage, got {survived.dtype} and {stages}."
            )
        super().__init__(survived >= stages)
        self.__dict__.update(survived=survived, stages=stages)

    def stage(self, index: int) -> Mask:
        """The mask in force from stage `index` on, 0-based."""
        return Mask(self.survived > index)

    def to(self, device: torch.device | str) -> StagedMask:
        """The same mask on another device."""
        return StagedMask(self.survived.to(device), self.stages)

    def flatten(self) -> StagedMask:
        """[B, *grid] → [B, N], row-major."""
        return StagedMask(self.survived.flatten(1), self.stages)

    def rows(self, rows: slice) -> StagedMask:
        """Some of the samples."""
        return StagedMask(self.survived[rows], self.stages)


def _binary(tensor: Tensor, converter: str) -> Tensor:
    if tensor.dtype == torch.bool:
        return tensor
    if not bool(((tensor == 0) | (tensor == 1)).all()):
        raise MaskShapeError(f"Mask.{converter} expects 0 and 1 only, found values outside of them.")
    return tensor.bool()


def _indices(rows: Tensor) -> Tensor:
    counts = rows.sum(1)
    count = int(counts[0]) if len(counts) else 0
    if not bool((counts == count).all()):
        raise UnequalMaskCounts(
            f"Rows have between {int(counts.min())} and {int(counts.max())} positions; indices need an equal "
            "number in each row. Use the bool mask (`keep`), or a strategy with an exact count."
        )
    return rows.nonzero()[:, 1].view(rows.shape[0], count)


def _spread(index: Tensor, x: Tensor) -> Tensor:
    return index.view(*index.shape, *(1,) * (x.ndim - 2)).expand(*index.shape, *x.shape[2:])


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, _spread(index, x))


# -- rules ---------------------------------------------------------------------------------------------------

Rule = Callable[[Any, Any, Any, Any], Any]
"""(b, h, q, k) → bool, elementwise on index tensors: the signature of flex_attention's `mask_mod`."""

Bounds = Callable[[Any, Any, Any, Any, Any, Any], tuple[Any, Any]]
"""(b, h, q_first, q_last, k_first, k_last) → (some, every) for a rectangle of positions, ends included.

`some` may be True when nothing is attended, `every` may be False when all is (safe sides); never the reverse.
"""


class AttentionMask(Mask):
    """Who attends to whom, as a rule: no L × L tensor exists until `keep` is read.

    `rule(b, h, q, k)` works elementwise on index tensors. `bounds` (optional) answers for whole rectangles,
    so that a block mask is built without visiting the elements; the constructors below all have it, and
    `&`, `|`, `~` keep it. Rules without it are evaluated one row of blocks at a time.

    `batch` and `heads` are 1 where the rule is the same for all (they broadcast).
    """

    rule: Rule
    q_len: int
    kv_len: int
    batch: int
    heads: int
    bounds: Bounds | None

    def __init__(
        self,
        rule: Rule,
        q_len: int,
        kv_len: int | None = None,
        *,
        batch: int = 1,
        heads: int = 1,
        device: torch.device | str = "cpu",
        bounds: Bounds | None = None,
    ) -> None:
        kv_len = q_len if kv_len is None else kv_len
        if min(q_len, kv_len, batch, heads) < 1:
            raise MaskShapeError(
                f"AttentionMask needs positive sizes, got batch {batch}, heads {heads}, {q_len} × {kv_len}."
            )
        self.__dict__.update(rule=rule, q_len=q_len, kv_len=kv_len, batch=batch, heads=heads, bounds=bounds)
        self.__dict__["_device"] = torch.device(device)

    def __repr__(self) -> str:
        return f"AttentionMask(batch={self.batch}, heads={self.heads}, {self.q_len} × {self.kv_len})"

    @property
    def shape(self) -> torch.Size:
        """[batch, heads, q_len, kv_len]."""
        return torch.Size((self.batch, self.heads, self.q_len, self.kv_len))

    @property
    def device(self) -> torch.device:
        """Where the tensors are made."""
        return self.__dict__["_device"]

    @property
    def keep(self) -> Tensor:
        """The dense mask, bool [batch, heads, q_len, kv_len], made anew at each call."""
        if self.shape.numel() > DENSE_LIMIT:
            raise MaskTooLarge(
                f"A dense mask of {self.q_len} × {self.kv_len} would take {self.shape.numel() / 2**30:.0f} GiB; "
                "use block_mask() with flex_attention, or evaluate `rule` where you need it."
            )
        return self.tile(0, self.q_len)

    @property
    def _rows(self) -> Tensor:
        return self.keep.reshape(self.batch, -1)

    def tile(self, q_first: int, q_end: int, k_first: int = 0, k_end: int | None = None) -> Tensor:
        """The dense mask of a rectangle, ends excluded: bool [batch, heads, q_end - q_first, k_end - k_first]."""
        k_end = self.kv_len if k_end is None else k_end
        b = torch.arange(self.batch, device=self.device).view(-1, 1, 1, 1)
        h = torch.arange(self.heads, device=self.device).view(1, -1, 1, 1)
        q = torch.arange(q_first, q_end, device=self.device).view(1, 1, -1, 1)
        k = torch.arange(k_first, k_end, device=self.device).view(1, 1, 1, -1)
        answer = torch.as_tensor(self.rule(b, h, q, k), dtype=torch.bool, device=self.device)
        return answer.expand(self.batch, self.heads, q_end - q_first, k_end - k_first)

    def __invert__(self) -> AttentionMask:
        rule, bounds = self.rule, self.bounds

        def outside(*block: Any) -> tuple[Any, Any]:
            assert bounds is not None
            some, every = bounds(*block)
            return ~torch.as_tensor(every), ~torch.as_tensor(some)

        return self._like(lambda b, h, q, k: ~rule(b, h, q, k), outside if bounds else None)

    def __and__(self, other: Mask) -> AttentionMask:
        return self._compose(other, "&")

    def __or__(self, other: Mask) -> AttentionMask:
        return self._compose(other, "|")

    def _compose(self, other: Mask, operator: str) -> AttentionMask:
        if not isinstance(other, AttentionMask):
            raise MaskShapeError(
                f"AttentionMask {operator} {type(other).__name__}: both sides must be rules."
            )
        same = (self.q_len, self.kv_len) == (other.q_len, other.kv_len)
        fits = all(1 in pair or pair[0] == pair[1] for pair in zip(self.shape[:2], other.shape[:2]))
        if not (same and fits):
            raise MaskShapeError(f"{self!r} {operator} {other!r}: sizes differ.")
        first, second, one, two = self.rule, other.rule, self.bounds, other.bounds
        both = operator == "&"

        def rule(b: Any, h: Any, q: Any, k: Any) -> Any:
            x, y = first(b, h, q, k), second(b, h, q, k)
            return x & y if both else x | y

        def bounds(*block: Any) -> tuple[Any, Any]:
            assert one is not None
            assert two is not None
            (some, every), (some_too, every_too) = one(*block), two(*block)
            return (some & some_too, every & every_too) if both else (some | some_too, every | every_too)

        composed = self._like(rule, bounds if one and two else None)
        composed.__dict__["batch"] = max(self.batch, other.batch)
        composed.__dict__["heads"] = max(self.heads, other.heads)
        return composed

    def _like(self, rule: Rule, bounds: Bounds | None) -> AttentionMask:
        return AttentionMask(
            rule,
            self.q_len,
            self.kv_len,
            batch=self.batch,
            heads=self.heads,
            device=self.device,
            bounds=bounds,
        )

    def to(self, device: torch.device | str) -> AttentionMask:
        """The same rule, evaluated on another device (index tensors that the rule closes over must follow)."""
        moved = self._like(self.rule, self.bounds)
        moved.__dict__["_device"] = torch.device(device)
        return moved

    def rows(self, rows: slice) -> AttentionMask:
        """The rule for some of the samples; the same where it holds for all of them."""
        if self.batch == 1:
            return self
        first, end, step = rows.indices(self.batch)
        rule, bounds = self.rule, self.bounds

        def some_bounds(b: Any, *block: Any) -> tuple[Any, Any]:
            assert bounds is not None
            return bounds(first + step * b, *block)

        some = self._like(lambda b, h, q, k: rule(first + step * b, h, q, k), some_bounds if bounds else None)
        some.__dict__["batch"] = len(range(first, end, step))
        return some

    def block_mask(self, block_size: int = 128) -> BlockMask:
        """flex_attention's BlockMask. Memory is four tables of one int32 a block, never one a pair of positions."""
        from torch.nn.attention.flex_attention import BlockMask

        some, every = self.blocks(block_size)
        partial = some & ~every
        kv_count, kv_index = _ordered(partial)
        full_kv_count, full_kv_index = _ordered(every)
        q_count, q_index = _ordered(partial.mT)
        full_q_count, full_q_index = _ordered(every.mT)
        # Not `from_kv_blocks`: it sorts its way to the tables of the other direction, at ten times the time and memory.
        return BlockMask(
            seq_lengths=(self.q_len, self.kv_len),
            kv_num_blocks=kv_count,
            kv_indices=kv_index,
            full_kv_num_blocks=full_kv_count,
            full_kv_indices=full_kv_index,
            q_num_blocks=q_count,
            q_indices=q_index,
            full_q_num_blocks=full_q_count,
            full_q_indices=full_q_index,
            BLOCK_SIZE=(block_size, block_size),
            mask_mod=self.rule,
        )

    def blocks(self, block_size: int = 128) -> tuple[Tensor, Tensor]:
        """(some, every), bool [batch, heads, q blocks, k blocks]: which blocks must be looked at, which are full.

        A block that sticks out of the sequence is never called full.
        """
        rows, columns = -(-self.q_len // block_size), -(-self.kv_len // block_size)
        if self.bounds is None:
            parts = [self._visit(row, block_size, columns) for row in range(rows)]
            return torch.cat([some for some, _ in parts], 2), torch.cat([every for _, every in parts], 2)
        full = (self.batch, self.heads, rows, columns)
        b = torch.arange(self.batch, device=self.device).view(-1, 1, 1, 1)
        h = torch.arange(self.heads, device=self.device).view(1, -1, 1, 1)
        q = torch.arange(rows, device=self.device).view(1, 1, -1, 1) * block_size
        k = torch.arange(columns, device=self.device).view(1, 1, 1, -1) * block_size
        q_last, k_last = q + block_size - 1, k + block_size - 1
        some, every = self.bounds(
            b, h, q, q_last.clamp(max=self.q_len - 1), k, k_last.clamp(max=self.kv_len - 1)
        )
        inside = (q_last < self.q_len) & (k_last < self.kv_len)
        some = torch.as_tensor(some, device=self.device).expand(full)
        return some, (torch.as_tensor(every, device=self.device) & inside).expand(full)

    def _visit(self, row: int, block_size: int, columns: int) -> tuple[Tensor, Tensor]:
        first = row * block_size
        tile = self.tile(first, min(first + block_size, self.q_len))
        padded = torch.nn.functional.pad(tile, (0, columns * block_size - self.kv_len))
        tiles = padded.unflatten(-1, (columns, block_size))
        every = tiles.all(-1).all(2, keepdim=True)
        if first + block_size > self.q_len:
            every = torch.zeros_like(every)
        return tiles.any(-1).any(2, keepdim=True), every

    # -- rules everyone needs --------------------------------------------------------------------------------

    @classmethod
    def full(
        cls, q_len: int, kv_len: int | None = None, *, device: torch.device | str = "cpu"
    ) -> AttentionMask:
        """Everyone attends to everyone."""
        return cls(
            lambda b, h, q, k: (q >= 0) & (k >= 0),
            q_len,
            kv_len,
            device=device,
            bounds=lambda b, h, q0, q1, k0, k1: ((q0 >= 0) & (k0 >= 0), (q0 >= 0) & (k0 >= 0)),
        )

    @classmethod
    def causal(
        cls, q_len: int, kv_len: int | None = None, *, device: torch.device | str = "cpu"
    ) -> AttentionMask:
        """k ≤ q. With `kv_len` > `q_len` the queries are the last positions (a cache lies before them)."""
        offset = (q_len if kv_len is None else kv_len) - q_len
        return cls(
            lambda b, h, q, k: q + offset >= k,
            q_len,
            kv_len,
            device=device,
            bounds=lambda b, h, q0, q1, k0, k1: (q1 + offset >= k0, q0 + offset >= k1),
        )

    @classmethod
    def window(
        cls, length: int, left: int, right: int = 0, *, device: torch.device | str = "cpu"
    ) -> AttentionMask:
        """q - left ≤ k ≤ q + right: a sliding window; right = 0 is causal."""
        return cls(
            lambda b, h, q, k: (k >= q - left) & (k <= q + right),
            length,
            device=device,
            bounds=lambda b, h, q0, q1, k0, k1: (
                (k1 >= q0 - left) & (k0 <= q1 + right),
                (k0 >= q1 - left) & (k1 <= q0 + right),
            ),
        )

    @classmethod
    def segments(cls, segment_ids: Tensor) -> AttentionMask:
        """Only within the same segment; `segment_ids` is int [B, L] (a packed batch)."""
        ids = segment_ids
        if ids.ndim != 2:
            raise MaskShapeError(f"segment_ids must be [B, L], got {_shape(ids)}.")

        def bounds(b: Any, h: Any, q0: Any, q1: Any, k0: Any, k1: Any) -> tuple[Any, Any]:
            q_low, q_high, k_low, k_high = ids[b, q0], ids[b, q1], ids[b, k0], ids[b, k1]
            return (q_low <= k_high) & (k_low <= q_high), (q_low == k_high) & (k_low == q_high)

        ascending = bool((ids.diff(dim=1) >= 0).all())
        return cls(
            lambda b, h, q, k: ids[b, q] == ids[b, k],
            ids.shape[1],
            batch=ids.shape[0],
            device=ids.device,
            bounds=bounds if ascending else None,
        )

    @classmethod
    def keys(cls, visible: Mask, q_len: int | None = None) -> AttentionMask:
        """Every query attends to the visible keys of its row; `visible` is [B, L] (padding, dropped tokens)."""
        rows = visible.flatten().keep
        before = torch.nn.functional.pad(rows.cumsum(1), (1, 0))

        def bounds(b: Any, h: Any, q0: Any, q1: Any, k0: Any, k1: Any) -> tuple[Any, Any]:
            inside = before[b, k1 + 1] - before[b, k0]
            return (inside > 0) & (q0 >= 0), (inside == k1 - k0 + 1) & (q0 >= 0)

        return cls(
            lambda b, h, q, k: rows[b, k] & (q >= 0),
            q_len or rows.shape[1],
            rows.shape[1],
            batch=rows.shape[0],
            device=rows.device,
            bounds=bounds,
        )


_CHUNK = 2**22
"""Blocks that `_ordered` sorts at a time, to bound the memory of the int64 indices in between."""


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [.., R] and, for each row, the column numbers with the marked ones first, both in order, [.., R, C]; int32."""
    rows = blocks.reshape(-1, blocks.shape[-1])
    order = torch.empty(rows.shape, dtype=torch.int32, device=rows.device)
    chunk = max(1, _CHUNK // rows.shape[1])
    for first in range(0, len(rows), chunk):
        unmarked = ~rows[first : first + chunk]
        if rows.device.type == "cpu":
            # numpy sorts bools by counting them.
            placed = torch.from_numpy(np.argsort(unmarked.numpy(), axis=1, kind="stable"))
        else:
            placed = unmarked.to(torch.int8).argsort(dim=1, stable=True)
        order[first : first + chunk] = placed
    return blocks.sum(-1, dtype=torch.int32), order.view(blocks.shape)


# -- layouts -------------------------------------------------------------------------------------------------


def _grid(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(int(side) for side in value)


@attrs.frozen
class Layout:
    """What is to be masked: (14, 14) patches, (8, 14, 14) tubes, (128,) tokens, (60, 22) frames × joints.

    `patch_size` is how many pixels one cell of the grid spans on each side, where the cells are patches.
    """

    batch: int
    grid: tuple[int, ...] = attrs.field(converter=_grid)
    device: torch.device = attrs.field(default=torch.device("cpu"), converter=torch.device)
    patch_size: int | None = None

    def __attrs_post_init__(self) -> None:
        if self.batch < 1 or not self.grid or min(self.grid) < 1:
            raise MaskShapeError(
                f"Layout needs a positive batch and grid, got batch {self.batch}, grid {self.grid}."
            )

    @property
    def positions(self) -> int:
        """N, the cells of the grid."""
        return math.prod(self.grid)

    @property
    def shape(self) -> tuple[int, ...]:
        """(batch, *grid): the shape of a mask's `keep`."""
        return (self.batch, *self.grid)

    @classmethod
    def of(cls, backbone: Any, batch: Mapping[str, Tensor]) -> Layout:
        """The layout of a batch as a backbone sees it: its patch grid, its coarsest map, or how many tokens or points there are."""
        if "tokens" in batch:
            tokens = batch["tokens"]
            return cls(tokens.shape[0], tuple(tokens.shape[1:]), tokens.device)
        if "points" in batch:
            points = batch["points"]
            return cls(points.shape[0], tuple(points.shape[1:-1]), points.device)
        pixels = batch.get("pixels", next(iter(batch.values())))
        if hasattr(backbone, "strides"):
            cell = int(backbone.strides[-1])
            return cls(pixels.shape[0], tuple(side // cell for side in pixels.shape[2:]), pixels.device, cell)
        if not hasattr(backbone, "grid"):
            raise MaskShapeError(
                f"Layout.of needs a backbone with a `grid` or `strides`; {type(backbone).__name__} has neither. "
                "Adapt it first (maskwright.backbones.adapt), or write Layout(batch, grid) yourself."
            )
        return cls(
            pixels.shape[0], tuple(backbone.grid), pixels.device, getattr(backbone, "patch_size", None)
        )


# -- files ---------------------------------------------------------------------------------------------------

_FORMAT = "maskwright-masks-1"


def save_masks(path: str | os.PathLike[str], masks: Mapping[str, Mask], *, of: str = "weights") -> None:
    """Write masks to a safetensors file, one bit per element (little-endian bit order, row-major).

    The file appears whole or not at all. `load_masks` reads it back. `of` says what is masked: a model's "weights", or its
    "difference" from another one (see `masks_of`).
    """
    from safetensors.numpy import save

    packed = {
        name: np.packbits(mask.keep.detach().cpu().numpy().reshape(-1), bitorder="little")
        for name, mask in masks.items()
    }
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    write_whole(path, save(packed, metadata={"format": _FORMAT, "shapes": json.dumps(shapes), "of": of}))


def masks_of(path: str | os.PathLike[str]) -> str:
    """What the masks of a file are of, "weights" or "difference". Raises `BadData` as `load_masks` does."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="np") as file:
            return str((file.metadata() or {}).get("of", "weights"))
    except FileNotFoundError:
        raise BadData(f"{path} does not exist; give the masks.safetensors of a run.") from None
    except (SafetensorError, OSError) as error:
        raise BadData(f"{path} cannot be read as safetensors: {error}") from error


def load_masks(path: str | os.PathLike[str]) -> dict[str, Mask]:
    """Read what `save_masks` wrote. Raises `BadData` for any other file and for a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise BadData(f"{path} is a safetensors file, but holds no maskwright masks.")
            shapes = json.loads(metadata["shapes"])
            return {name: _unpacked(file.get_tensor(name), shape) for name, shape in shapes.items()}
    except FileNotFoundError:
        raise BadData(f"{path} does not exist; give the masks.safetensors of a run.") from None
    except (SafetensorError, OSError) as error:
        raise BadData(f"{path} cannot be read as safetensors: {error}") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise BadData(f"{path} is damaged: its shapes do not fit its bits; save the masks again.") from error


def _unpacked(bits: np.ndarray, shape: list[int]) -> Mask:
    count = math.prod(shape)
    if not shape or min(shape) < 0 or bits.dtype != np.uint8 or bits.shape != (-(-count // 8),):
        raise ValueError
    return Mask(
        torch.from_numpy(np.unpackbits(bits, count=count, bitorder="little").astype(bool)).reshape(shape)
    )


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that it appears whole or not at all, even when the disk fills or the run is killed."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
