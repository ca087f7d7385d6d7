"""Fitness of a vector of levels: how far the model that they make is from the dense one, on a fresh minibatch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import Tensor, nn

from maskwright import Batch, PruneTask
from maskwright.errors import BadData, BadModel
from maskwright.plugins.evopress.levels import Unit
from maskwright.plugins.evopress.search import minibatch
from maskwright.toolkit.calibration import evaluating, run
from maskwright.toolkit.masked import Replace


def divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """KL(dense ‖ compressed) of each token over the last axis [..., V] → [...]; `dense` are log-probabilities."""
    compressed = torch.log_softmax(logits.float(), -1)
    return nn.functional.kl_div(compressed, dense, reduction="none", log_target=True).sum(-1)


def predictions(logits: Tensor) -> Tensor:
    """[B, L, V] → [B, L-1, V]: nothing follows the last position. Other outputs are as they are."""
    return logits[:, :-1] if logits.ndim == 3 and logits.shape[1] > 1 else logits


def logits_of(output: object) -> Tensor | None:
    """A model's logits: its output, or what that calls so."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def measure_of(model: nn.Module, task: PruneTask, asked: str) -> str:
    """ "kl" or "loss": what is asked for, and for "auto" the divergence where the model puts out logits, or else the task's loss.

    Raises `BadModel` and `BadData` for what cannot be had.
    """
    with torch.no_grad(), evaluating(model):
        has_logits = logits_of(run(model, {name: column[:1] for name, column in task.batches[0].items()}))
    if asked == "auto":
        asked = "kl" if has_logits is not None or task.loss is None else "loss"
    if asked == "kl" and has_logits is None:
        raise BadModel(
            f"evopress compares logits, and this {type(model).__name__} puts out none; set fitness='loss' and give the task a loss."
        )
    if asked == "loss" and task.loss is None:
        raise BadData("evopress with fitness='loss' needs a loss; give the task one, or set fitness='kl'.")
    return asked


# -- data ------------------------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Pool:
    """Samples of one form. `length` is their number of tokens: that of the integer columns [B, length], or 1."""

    columns: Batch
    length: int

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, rows: Tensor, length: int) -> Batch:
        """Some samples, cut to `length` tokens."""
        return {
            name: (column[rows][:, :length] if _is_sequence(column) else column[rows])
            for name, column in self.columns.items()
        }


def _is_sequence(column: Tensor) -> bool:
    return column.ndim == 2 and not column.is_floating_point()


def pools_of(batches: Sequence[Batch]) -> list[Pool]:
    """The samples of all batches, those of one form together."""
    alike: dict[tuple[object, ...], list[Batch]] = {}
    for batch in batches:
        form = tuple((name, column.shape[1:], column.dtype) for name, column in sorted(batch.items()))
        alike.setdefault(form, []).append(batch)
    pools = []
    for several in alike.values():
        columns = {name: torch.cat([one[name] for one in several]) for name in several[0]}
        lengths = [column.shape[1] for column in columns.values() if _is_sequence(column)]
        pools.append(Pool(columns, max(lengths, default=1)))
    return pools


@attrs.frozen(eq=False)
class Part:
    """Samples that are run together, how many of their tokens count, and the dense model's log-probabilities for them."""

    batch: Batch
    tokens: int
    dense: Tensor | None = None


# -- the model under levels ------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Fitness:
    """Evaluates vectors of levels [n, L]: each is switched in by reference, on one fresh minibatch for all of them.

    `measure` is "kl" or "loss" (see `measure_of`), `replace` that of `maskwright.toolkit.masked`.
    """

    model: nn.Module
    task: PruneTask
    units: Sequence[Unit]
    replace: Replace
    measure: str
    pools: list[Pool] = attrs.field(init=False)
    logits: list[Tensor] = attrs.field(init=False, factory=list)
    chunk: int = attrs.field(init=False)
    evaluations: int = attrs.field(init=False, default=0)
    _levels: list[int | None] = attrs.field(init=False)
    _dense: list[dict[str, Tensor]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.pools = pools_of(self.task.batches)
        # As many samples at a time as the caller's own batches have.
        self.chunk = max(len(next(iter(batch.values()))) for batch in self.task.batches)
        self._levels = [None] * len(self.units)
        self._dense = [
            {name: self.model.get_parameter(name).detach() for name in unit.at(unit.lowest)}
            for unit in self.units
        ]
        if self.measure == "kl":
            self.logits = [
                torch.cat([self._forward(pool.take(rows, pool.length)) for rows in self._chunks(len(pool))])
                for pool in self.pools
            ]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sample, int64 [N]."""
        return torch.cat([torch.full((len(pool),), pool.length) for pool in self.pools])

    def __call__(self, candidates: Tensor, tokens: int) -> Tensor:
        """Fitness of each candidate on the same `tokens` tokens, float64 [n]."""
        parts = list(self._parts(*minibatch(self.lengths, tokens, self.task.generator)))
        self.evaluations += len(candidates)
        values = []
        for levels in candidates.tolist():
            self.switch(levels)
            values.append(self._value(parts))
        return torch.stack(values).double().cpu()

    def over_all(self, levels: Tensor) -> float:
        """Fitness on all samples."""
        lengths = self.lengths
        parts = list(self._parts(torch.arange(len(lengths)), lengths))
        self.switch(levels.tolist())
        return float(self._value(parts))

    def switch(self, levels: Sequence[int | None]) -> None:
        """Let the model's weights be those of these levels, None for dense: only what changed is exchanged."""
        changed: dict[str, Tensor] = {}
        for place, (new, old) in enumerate(zip(levels, self._levels)):
            if new is None and old is not None:
                changed.update(self._dense[place])
            elif new is not None and new != old:
                versions = self.units[place].at(new)
                changed.update((name, version.values) for name, version in versions.items())
        self.replace(changed)
        self._levels = list(levels)

    def _value(self, parts: Sequence[Part]) -> Tensor:
        total: Tensor | float = 0.0
        for part in parts:
            if part.dense is None:
                assert self.task.loss is not None
                total = total + self.task.loss(self.model, part.batch).double() * part.tokens
            else:
                each = divergence(part.dense, predictions(self._forward(part.batch)))
                total = total + each.sum(dtype=torch.float64)
        return torch.as_tensor(total) / sum(part.tokens for part in parts)

    def _parts(self, index: Tensor, taken: Tensor) -> Iterator[Part]:
        """A minibatch in parts that are run at once; what is cut is a part of its own."""
        first = 0
        for number, pool in enumerate(self.pools):
            mine = (index >= first) & (index < first + len(pool))
            rows, lengths = index[mine] - first, taken[mine]
            first += len(pool)
            whole = rows[lengths == pool.length]
            for some in whole.split(self.chunk) if len(whole) else ():
                yield self._part(number, some, pool.length)
            for row, length in zip(rows[lengths < pool.length], lengths[lengths < pool.length].tolist()):
                yield self._part(number, row[None], length)

    def _part(self, number: int, rows: Tensor, length: int) -> Part:
        pool = self.pools[number]
        batch = pool.take(rows, length)
        if self.measure == "loss":
            return Part(batch, len(rows) * length)
        if length == pool.length:
            logits = self.logits[number][rows]
        else:
            # A model that looks ahead answers otherwise on a shorter sequence, so the dense one is asked again.
            self.switch([None] * len(self.units))
            logits = self._forward(batch)
        dense = torch.log_softmax(predictions(logits).float(), -1)
        return Part(batch, dense.shape[:-1].numel(), dense)

    def _forward(self, batch: Batch) -> Tensor:
        logits = logits_of(run(self.model, batch))
        assert logits is not None
        return logits

    def _chunks(self, count: int) -> Sequence[Tensor]:
        return torch.arange(count).split(self.chunk)


class Parent(nn.Module):
    """The current vector of levels and how many candidates were evaluated until it: what a checkpoint holds."""

    levels: Tensor
    evaluations: Tensor

    def __init__(self, levels: Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", levels)
        self.register_buffer("evaluations", torch.zeros((), dtype=torch.int64))

    def become(self, levels: Tensor, evaluations: int) -> None:
        """Take another vector, found with so many more evaluations."""
        self.levels.copy_(levels)
        self.evaluations += evaluations
