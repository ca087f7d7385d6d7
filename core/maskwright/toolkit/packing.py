"""Sequences of unequal length in few rows, so that each is computed as if it were alone: the one place that knows how.

A packed batch is described by its segment ids, int64 [R, L]: a run of equal ids in a row is one sequence, -1 is padding.
Positions, the attention rule and the weights of a loss follow from them. Which sequence goes into which row is decided by bin
packing. Used by prepacking (Zhao et al., arXiv:2404.09529) and by objectives on packed rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from functools import cached_property

import attrs
import numpy as np
import torch
from torch import Tensor

from maskwright.errors import BadParameter, MaskShapeError
from maskwright.mask import AttentionMask

PADDING = -1
"""The segment id of padding."""

SEARCHED = 1024
"""Sequences up to which `fewest_bins` also tries to fill every bin as far as it goes, which takes quadratic time."""

Bins = list[list[int]]
"""The numbers of the sequences in each row, in the order in which they lie there."""


# -- what follows from the segment ids ---------------------------------------------------------------------------


def starts(segments: Tensor) -> Tensor:
    """Where a segment (or the padding) begins: int64 [R, L] → bool [R, L]."""
    first = torch.ones_like(segments[:, :1], dtype=torch.bool)
    return torch.cat([first, segments[:, 1:] != segments[:, :-1]], dim=1)


def segments_from_starts(begins: Tensor) -> Tensor:
    """Segment ids 0, 1, … of rows without padding: bool [R, L], True at first tokens, → int64 [R, L]."""
    return begins.cumsum(1) - begins[:, :1].long()


def restarted_positions(segments: Tensor) -> Tensor:
    """0, 1, … within each segment, int64 [R, L]. Padding gets 1, as in the official code; any legal position would do."""
    places = torch.arange(segments.shape[1], device=segments.device)
    begun = torch.where(starts(segments), places, 0).cummax(1).values
    return (places - begun).masked_fill(segments == PADDING, 1)


def packed_attention(segments: Tensor, *, causal: bool = True) -> AttentionMask:
    """The rule of a packed batch: within a segment only, and (if `causal`) not ahead; no L × L tensor is made.

    Padding attends to padding, so that no row of attention is empty; nothing else sees it. Ids should rise along a row: then
    the rule is known for whole blocks. Raises `MaskShapeError` unless `segments` is [R, L].
    """
    # Padding is at the end of a row, so that its id must be the largest there.
    ids = segments.masked_fill(segments == PADDING, torch.iinfo(segments.dtype).max)
    within = AttentionMask.segments(ids)
    return AttentionMask.causal(segments.shape[1], device=segments.device) & within if causal else within


def predicted(segments: Tensor, shift: int = 1) -> Tensor:
    """The tokens that a model predicts from their own segment, bool [R, L].

    `shift` is that of a TokenBackbone: with 1 a segment's first token is predicted by nothing, with 0 every token is.
    """
    real = segments != PADDING
    if not shift:
        return real
    return real & ~starts(segments)


def loss_weights(
    segments: Tensor, *, shift: int = 1, per: str = "sequence", dtype: torch.dtype = torch.float32
) -> Tensor:
    """What each token's loss counts for in a packed batch so that the sum is the loss without packing: [R, L], sum 1.

    `per="sequence"`: the mean over the sequences of each one's mean over its predicted tokens, so that a short sequence counts
    as much as a long one; `per="token"`: the mean over all predicted tokens. The weight lies at the token that is predicted.
    A sequence without a predicted token (one of length 1 in a causal model) counts for nothing, and is not counted either.
    """
    if per not in ("sequence", "token"):
        raise BadParameter(f"loss_weights: per={per!r} must be 'sequence' or 'token'.")
    counted = predicted(segments, shift).flatten()
    if per == "token":
        each = counted.to(dtype) / counted.sum().clamp(min=1)
        return each.view(segments.shape)
    sequence = starts(segments).flatten().cumsum(0) - 1
    lengths = torch.zeros(counted.numel(), dtype=dtype, device=segments.device)
    lengths.index_add_(0, sequence, counted.to(dtype))
    number = (lengths > 0).sum().clamp(min=1)
    return (counted / lengths[sequence].clamp(min=1) / number).view(segments.shape)


def token_losses(logits: Tensor, tokens: Tensor, segments: Tensor, *, shift: int = 1) -> Tensor:
    """Cross-entropy in nats of each predicted token, 0 at the others: [R, L, V], int64 [R, L] twice → [R, L]."""
    if logits.shape[:2] != tokens.shape or tokens.shape != segments.shape:
        raise MaskShapeError(
            f"Packed losses need logits [R, L, V], tokens and segments [R, L]; got {list(logits.shape)}, "
            f"{list(tokens.shape)} and {list(segments.shape)}."
        )
    counted = predicted(segments, shift)
    made = logits[:, : logits.shape[1] - shift].flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(made, tokens[:, shift:].flatten(), reduction="none")
    each = torch.nn.functional.pad(losses.view(len(tokens), -1), (shift, 0))
    return torch.where(counted, each, 0.0)


def packed_loss(
    logits: Tensor, tokens: Tensor, segments: Tensor, *, shift: int = 1, per: str = "sequence"
) -> Tensor:
    """The loss of a packed batch, equal to that of its sequences one by one: see `loss_weights`. A scalar, 0 when nothing counts."""
    weights = loss_weights(segments, shift=shift, per=per, dtype=logits.dtype)
    return (token_losses(logits, tokens, segments, shift=shift) * weights).sum()


# -- where each sequence lies ------------------------------------------------------------------------------------


@attrs.frozen(eq=False, slots=False)
class Packing:
    """Which row, and which places in it, each of N sequences has; tensors go in and out by it.

    `lengths`, `row` and `start` are int64 [N]; `shape` is (R, L), the packed batch. A sequence may be empty. `pack` makes one.
    """

    lengths: Tensor
    row: Tensor
    start: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_bins(
        cls, lengths: Sequence[int], bins: Sequence[Sequence[int]], *, device: torch.device | str = "cpu"
    ) -> Packing:
        """Each bin's sequences one after the other in a row; rows are as long as the longest.

        Raises `BadParameter` unless every sequence is in exactly one bin.
        """
        order = [number for one in bins for number in one]
        if sorted(order) != list(range(len(lengths))):
            raise BadParameter(f"Every one of the {len(lengths)} sequences must be in exactly one bin.")
        row, start, longest = [0] * len(order), [0] * len(order), 0
        for index, one in enumerate(bins):
            end = 0
            for number in one:
                row[number], start[number] = index, end
                end += lengths[number]
            longest = max(longest, end)
        placed = torch.tensor([list(lengths), row, start], dtype=torch.int64, device=device)
        return cls(placed[0], placed[1], placed[2], (len(bins), longest))

    @cached_property
    def index(self) -> Tensor:
        """Of every token of every sequence, in the order of the sequences, its place in the flat batch: int64 [Σ lengths]."""
        before = self.lengths.cumsum(0) - self.lengths
        first = self.row * self.shape[1] + self.start - before
        total = int(self.lengths.sum())
        return first.repeat_interleave(self.lengths) + torch.arange(total, device=self.lengths.device)

    @cached_property
    def segments(self) -> Tensor:
        """Segment ids, int64 [R, L]: the numbers 0, 1, … of a row's sequences from the left, then -1."""
        rising = (self.row * (self.shape[1] + 1) + self.start).argsort(stable=True)
        rows = self.row[rising]
        rank = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
        ids = torch.empty_like(rank).index_copy_(0, rising, rank)
        return self.place(ids.repeat_interleave(self.lengths), PADDING)

    @property
    def positions(self) -> Tensor:
        """Restarted positions, int64 [R, L]."""
        return restarted_positions(self.segments)

    @property
    def attention(self) -> AttentionMask:
        """The causal rule."""
        return packed_attention(self.segments)

    @property
    def alone(self) -> bool:
        """Whether no row holds tokens of more than one sequence: a causal model needs no rule then, for padding comes last."""
        filled = self.row[self.lengths > 0]
        return int(filled.bincount().max()) <= 1 if len(filled) else True

    def place(self, values: Tensor, fill: float) -> Tensor:
        """The sequences one after the other, [Σ lengths, …], in their rows: [R, L, …]."""
        flat = values.new_full((self.shape[0] * self.shape[1], *values.shape[1:]), fill)
        return flat.index_copy(0, self.index, values).view(*self.shape, *values.shape[1:])

    def take(self, packed: Tensor) -> Tensor:
        """The inverse of `place`: [R, L, …] → [Σ lengths, …]."""
        return packed.flatten(0, 1).index_select(0, self.index)

    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        """[R, L, …] → N tensors [length, …]."""
        return self.take(packed).split(self.lengths.tolist())

    def align_right(self, packed: Tensor) -> Tensor:
        """[R, H, L, D] → [N, H, longest, D]: each sequence at the end of its own row, zeros before it (keys and values)."""
        _, heads, width, _ = packed.shape
        longest, number = int(self.lengths.max()), torch.arange(len(self.row), device=self.row.device)
        if self.shape == (len(number), longest) and bool(
            (self.lengths == longest).all() & (self.row == number).all()
        ):
            return packed
        head = torch.arange(heads, device=number.device)[:, None]
        back = torch.arange(longest, device=number.device) - longest + self.lengths[:, None]
        place = (self.start[:, None] + back).clamp(min=0)
        at = (self.row[:, None, None] * heads + head) * width + place[:, None]
        aligned = packed.flatten(0, 2).index_select(0, at.flatten()).unflatten(0, at.shape)
        return aligned.masked_fill_((back < 0)[:, None, :, None], 0.0)


def pack(
    lengths: Sequence[int],
    capacity: int | None = None,
    *,
    bins: Callable[[Sequence[int], int], Bins] | None = None,
    device: torch.device | str = "cpu",
) -> Packing:
    """Sequences in rows of at most `capacity` tokens (by default the longest's length); a longer one has a row of its own.

    `bins` is one of the functions below, by default `fewest_bins`. No sequence is split.
    """
    capacity = max(lengths, default=1) if capacity is None else capacity
    return Packing.from_bins(lengths, (bins or fewest_bins)(lengths, max(1, capacity)), device=device)


# -- bin packing -------------------------------------------------------------------------------------------------


def lower_bound(lengths: Sequence[int], capacity: int) -> int:
    """Bins that no packing can do without: the bound L2 of Martello and Toth (1990), which is at least ⌈Σ lengths / capacity⌉."""
    if not len(lengths):
        return 0
    sizes = np.sort(np.minimum(np.asarray(lengths, dtype=np.int64), _checked(capacity)))
    total = np.concatenate([[0], np.cumsum(sizes)])
    # No two above half of the capacity share a bin. For each threshold t up to that half: those of at least t and at most
    # half can only go where one above half, but of at most capacity - t, leaves room, or into more bins.
    thresholds = np.unique(np.concatenate([[0], sizes[2 * sizes <= capacity]]))
    half = np.searchsorted(sizes, capacity // 2, side="right")
    large = np.searchsorted(sizes, capacity - thresholds, side="right")
    small = np.searchsorted(sizes, thresholds, side="left")
    room = (large - half) * capacity - (total[large] - total[half])
    rest = np.maximum(0, -(-(total[half] - total[small] - room) // capacity))
    return int((len(sizes) - half + rest).max())


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> Bins:
    """From the longest to the shortest, each into the fullest bin that has room (the oldest of equals), else a new one.

    What the official prepacking code takes from the package `binpacking`. O(N log N) comparisons.
    """
    bins: Bins = []
    rooms: list[tuple[int, int]] = []
    for number in _falling(lengths):
        length = min(lengths[number], _checked(capacity))
        at = bisect_left(rooms, (length, 0))
        room, home = rooms.pop(at) if at < len(rooms) else (capacity, len(bins))
        if home == len(bins):
            bins.append([])
        bins[home].append(number)
        insort(rooms, (room - length, home))
    return bins


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> Bins:
    """From the longest to the shortest, each into the oldest bin that has room, else a new one. O(N log N)."""
    order = _falling(lengths)
    leaves = 1 << max(0, len(order) - 1).bit_length()
    # A tree of the largest room below each node: the oldest bin with room is found from its root.
    room = [_checked(capacity)] * (2 * leaves)
    bins: Bins = [[] for _ in order]
    for number in order:
        length, node = min(lengths[number], capacity), 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        bins[node - leaves].append(number)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [one for one in bins if one]


def fullest_bins(lengths: Sequence[int], capacity: int) -> Bins:
    """Each bin: the longest sequence left, and those of the rest that fill it up as far as they can (subset sums, as bits)."""
    left, bins = _falling(lengths), Bins()
    while left:
        room = _checked(capacity) - min(lengths[left[0]], capacity)
        sums, steps, within = 1, [], (1 << room + 1) - 1
        for place in range(1, len(left)):
            length = lengths[left[place]]
            if length <= room:
                steps.append((place, sums))
                sums |= sums << length & within
                if sums >> room:
                    break
        total, chosen = sums.bit_length() - 1, [0]
        for place, before in reversed(steps):
            if not before >> total & 1:
                chosen.append(place)
                total -= lengths[left[place]]
        bins.append([left[place] for place in sorted(chosen)])
        gone = set(chosen)
        left = [number for place, number in enumerate(left) if place not in gone]
    return bins


def fewest_bins(lengths: Sequence[int], capacity: int) -> Bins:
    """Best-fit decreasing, unless first-fit decreasing or (up to 1,024 sequences) `fullest_bins` needs fewer bins."""
    best = best_fit_decreasing(lengths, capacity)
    bound = lower_bound(lengths, capacity)
    others = (first_fit_decreasing, *((fullest_bins,) if len(lengths) <= SEARCHED else ()))
    for other in others:
        if len(best) == bound:
            break
        best = min(best, other(lengths, capacity), key=len)
    return best


def _falling(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda number: -lengths[number])


def _checked(capacity: int) -> int:
    if capacity < 1:
        raise BadParameter(f"A bin's capacity must be at least 1, not {capacity}.")
    return capacity
