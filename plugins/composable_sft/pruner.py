"""Lottery-ticket sparse fine-tuning: θ₀ are the parameters as given, b the entries that may change, φ = θ - θ₀ the product.

All trained parameters are one flat vector θ, first the maskable ones, then those that are trained whole (a new head).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import attrs
import torch
from torch import Tensor, nn

from maskwright import Mask, PruneResult, PruneTask, SparsityReport, setting
from maskwright.errors import BadData, BadModel, BadParameter, NumericalError
from maskwright.toolkit.masked import replaced
from maskwright.toolkit.patterns import check_budget, keep_largest, removed_count
from maskwright.toolkit.prunable import Weight, prunable_weights

THRESHOLD = 1e-7
"""Entries that moved by no more are not part of a difference."""

Entries: TypeAlias = tuple[Tensor, Tensor]
"""Flat positions int [K], ascending, and what is added there [K]."""

# -- the equations ---------------------------------------------------------------------------------------------------


def phase_steps(epochs: int | None, batches: int, least: int | None = None, most: int | None = None) -> int:
    """Steps of a phase: so many epochs, but no fewer than `least` and no more than `most`; without epochs, `most`.

    Raises `BadParameter` when neither is given, and when `least` is more than `most`.
    """
    if epochs is None and most is None:
        raise BadParameter("lt-sft: a phase needs epochs or a largest number of steps; give it one of them.")
    if least is not None and most is not None and least > most:
        raise BadParameter(
            f"lt-sft: a phase of at least {least} steps cannot have at most {most}; change one of them."
        )
    if epochs is None:
        assert most is not None
        return most
    steps = max(epochs * batches, least or 0)
    return steps if most is None else min(steps, most)


def selected(moved: Tensor, taken: Tensor, count: int) -> Tensor:
    """bool [P]: the `count` entries with the largest |θ - θ₀| of those not yet taken; of equal ones the first."""
    return keep_largest(moved.abs().masked_fill(taken, -1)[None], count)[0] & ~taken


def shares(count: int, iterations: int) -> list[int]:
    """How many entries each iteration adds: equal up to rounding, `count` in all."""
    return [count * (one + 1) // iterations - count * one // iterations for one in range(iterations)]


def l1_distance(theta: Tensor, base: Tensor, parameters: int) -> Tensor:
    """Σ|θ - θ₀| / N, N = all parameters of the model."""
    return (theta - base).abs().sum() / parameters


def entries_of(base: Tensor, theta: Tensor, keep: Tensor) -> Entries:
    """φ of one parameter: θ - θ₀ where it is kept and more than 1e-7 apart."""
    difference = (theta - base).reshape(-1)
    positions = (keep.reshape(-1) & (difference.abs() > THRESHOLD)).nonzero()[:, 0]
    return positions.to(torch.int32 if len(difference) < 2**31 else torch.int64), difference[positions]


def summed(parts: Sequence[Entries]) -> Entries:
    """Σφ: the union of the entries, each the sum of those who have it, in float64."""
    positions, place = torch.cat([one.long() for one, _ in parts]).unique(return_inverse=True)
    values = torch.cat([one.double() for _, one in parts])
    return positions, values.new_zeros(len(positions)).index_add_(0, place, values)


def added(base: Tensor, part: Entries) -> Tensor:
    """θ₀ + φ in the dtype and shape of θ₀, rounded once; entries without a difference have the bits of θ₀."""
    positions, values = part[0].long(), part[1]
    theta = base.detach().clone(memory_format=torch.contiguous_format).view(-1)
    theta[positions] = (theta[positions].double() + values.double()).to(theta.dtype)
    return theta.view(base.shape)


# -- differences on a model ------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Difference:
    """φ by parameter name, the parameters' shapes, and parameters that were trained whole."""

    entries: Mapping[str, Entries]
    shapes: Mapping[str, tuple[int, ...]]
    whole: Mapping[str, Tensor] = attrs.field(factory=dict)

    @property
    def count(self) -> int:
        """Entries that differ."""
        return sum(len(positions) for positions, _ in self.entries.values())

    def artifacts(self) -> dict[str, dict[str, Tensor]]:
        """As tensors by file and name."""
        held = {
            f"{name}:{what}": tensor
            for name, pair in self.entries.items()
            for what, tensor in zip(
                ("positions", "values", "shape"), (*pair, torch.tensor(self.shapes[name]))
            )
        }
        return {"difference": held, **({"whole": dict(self.whole)} if self.whole else {})}

    @classmethod
    def of(cls, artifacts: Mapping[str, Mapping[str, Any]]) -> Difference:
        """The inverse of `artifacts`."""
        held = artifacts["difference"]
        names = dict.fromkeys(key.rpartition(":")[0] for key in held)
        return cls(
            {name: (held[f"{name}:positions"], held[f"{name}:values"]) for name in names},
            {name: tuple(held[f"{name}:shape"].tolist()) for name in names},
            dict(artifacts.get("whole", {})),
        )


def read(folder: str | Path) -> Difference:
    """The difference that a run of `maskwright prune --pruner lt-sft` left in its folder. Raises `BadData` where there is none."""
    from safetensors.torch import load_file

    path = Path(folder)
    if not (path / "difference.safetensors").is_file():
        raise BadData(f"{path} has no difference.safetensors; give the folder of a run of lt-sft.")
    files = [name for name in ("difference", "whole") if (path / f"{name}.safetensors").is_file()]
    return Difference.of({name: load_file(path / f"{name}.safetensors") for name in files})


class Composition:
    """Differences added to a model and subtracted again, in any order.

    What a sum of floating-point numbers lost cannot be had back by subtracting. So θ₀ is remembered where differences touch it,
    and the model is θ₀ + Σφ, rounded once, of the differences that are there: whichever came first, and bit for bit θ₀ after the last has gone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.differences: dict[str, Difference] = {}
        self._base: dict[str, Entries] = {}
        self._whole: dict[str, tuple[str, Tensor]] = {}

    @torch.no_grad()
    def add(self, name: str, difference: Difference, *, whole: bool = False) -> None:
        """Add a difference under a name; with `whole` its whole parameters (the task's head) take the place of the model's.

        Raises `BadModel` when it is of another architecture, `BadParameter` for a name that is there or a second head; the model
        is then as it was.
        """
        if name in self.differences:
            raise BadParameter(f"The difference {name!r} is there already; subtract it first.")
        heads = difference.whole if whole else {}
        shapes = {**difference.shapes, **{key: tuple(tensor.shape) for key, tensor in heads.items()}}
        for key, shape in shapes.items():
            if tuple(self._parameter(key).shape) != shape:
                raise BadModel(
                    f"The difference {name!r} has {key} {list(shape)}, the model {list(self._parameter(key).shape)}; it is of "
                    "another architecture."
                )
            if key in self._whole or (key in heads and key in self._base):
                raise BadParameter(
                    f"{key} is set whole by one difference and changed by another; subtract the one that is there before adding {name!r}."
                )
        self.differences[name] = difference
        for key, (positions, _) in difference.entries.items():
            self._remember(key, positions.long())
            self._write(key)
        for key, tensor in heads.items():
            self._whole[key] = (name, self._parameter(key).detach().clone())
            self._parameter(key).copy_(tensor)

    @torch.no_grad()
    def subtract(self, name: str) -> None:
        """Take a difference away again. Raises `BadParameter` for one that is not there."""
        if name not in self.differences:
            there = ", ".join(self.differences) or "none"
            raise BadParameter(f"There is no difference {name!r} on the model; there are {there}.")
        for key in self.differences.pop(name).entries:
            self._write(key)
            if not any(key in one.entries for one in self.differences.values()):
                del self._base[key]
        for key, (owner, tensor) in list(self._whole.items()):
            if owner == name:
                self._parameter(key).copy_(tensor)
                del self._whole[key]

    def _parameter(self, key: str) -> nn.Parameter:
        try:
            return self.model.get_parameter(key)
        except AttributeError:
            raise BadModel(f"The model has no parameter {key!r}, which the difference changes.") from None

    def _remember(self, key: str, positions: Tensor) -> None:
        parameter = self._parameter(key)
        known = self._base.get(key, (positions[:0], parameter.new_empty(0)))
        new = positions[~torch.isin(positions, known[0])].to(parameter.device)
        values = parameter.detach().reshape(-1)[new]
        self._base[key] = torch.cat([known[0].to(new.device), new]), torch.cat([known[1], values])

    def _write(self, key: str) -> None:
        """θ₀ + Σφ at all the entries that were ever touched."""
        parameter, (positions, base) = self._parameter(key), self._base[key]
        theta = parameter.detach().clone(memory_format=torch.contiguous_format).view(-1)
        theta[positions] = base
        parts = [one.entries[key] for _, one in sorted(self.differences.items()) if key in one.entries]
        if parts:
            theta = added(theta, summed([(one.to(theta.device), two.to(theta.device)) for one, two in parts]))
        parameter.copy_(theta.view(parameter.shape))


# -- the pruner ------------------------------------------------------------------------------------------------------


@attrs.frozen
class LtSft:
    """Fine-tune, keep the entries that changed most, rewind, and fine-tune only those: a sparse difference to the given model.

    Ansell et al., arXiv:2110.07560; the defaults are those of the official NER recipe. The sparsity is that of the difference: 0.99
    lets one entry in a hundred change. An epoch goes once through the task's batches.
    """

    kind: ClassVar[str] = "pruner"
    name: ClassVar[str] = "lt-sft"
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    needs: ClassVar[frozenset[str]] = frozenset({"batches", "loss"})
    budgets: ClassVar[frozenset[str]] = frozenset({"sparsity"})
    changes_weights: ClassVar[bool] = True
    prunes: ClassVar[str] = "difference"
    compare: ClassVar[str] = "global"
    example_parameters: ClassVar[dict[str, Any]] = {"full_epochs": 1, "sparse_epochs": 1, "lr": 0.01}

    full_epochs: int | None = setting(
        3, "epochs of the full fine-tuning; without, its most steps", ge=0, optional=True
    )
    full_min_steps: int | None = setting(None, "fewest steps of the full fine-tuning", ge=0, optional=True)
    full_max_steps: int | None = setting(None, "most steps of the full fine-tuning", ge=0, optional=True)
    sparse_epochs: int | None = setting(
        10, "epochs of the sparse fine-tuning; without, its most steps", ge=0, optional=True
    )
    sparse_min_steps: int | None = setting(
        None, "fewest steps of the sparse fine-tuning", ge=0, optional=True
    )
    sparse_max_steps: int | None = setting(None, "most steps of the sparse fine-tuning", ge=0, optional=True)
    iterations: int = setting(
        1, "how many times both phases are done, each adding its share of entries", ge=1
    )
    lr: float = setting(5e-5, "learning rate at the start of each phase; it falls linearly to 0", gt=0)
    weight_decay: float = setting(0.0, "AdamW's weight decay", ge=0)
    clip: float = setting(1.0, "largest norm of the gradient, after it is masked; 0 clips nothing", ge=0)
    full_l1: float = setting(0.0, "factor λ of the mean distance to θ₀, full fine-tuning", ge=0)
    sparse_l1: float = setting(0.0, "factor λ of the mean distance to θ₀, sparse fine-tuning", ge=0)
    l1_sparse_only: bool = setting(False, "leave parameters that are trained whole out of that distance")
    whole: tuple[str, ...] = setting(
        (), "name patterns of parameters that are trained and stored whole, such as a new head"
    )

    def prune(self, model: nn.Module, task: PruneTask) -> PruneResult:
        """Raises `BadBudget` for what is no sparsity, `BadData` without batches and loss, `BadParameter` for a phase without a length."""
        weights = prunable_weights(model, task.prunable)
        budget = check_budget(self, weights, task.budget)
        assert budget.sparsity is not None
        if task.loss is None or not task.batches:
            raise BadData("lt-sft trains on batches and a loss; give the task both.")
        full = phase_steps(self.full_epochs, len(task.batches), self.full_min_steps, self.full_max_steps)
        sparse = phase_steps(
            self.sparse_epochs, len(task.batches), self.sparse_min_steps, self.sparse_max_steps
        )
        trained = [*weights, *self.whole_parameters(model, weights)]
        maskable = sum(weight.parameter.numel() for weight in weights)
        count = maskable - removed_count(maskable, budget.sparsity)

        base = _joined(trained)
        theta = nn.Parameter(base.clone())
        keep = torch.zeros_like(base, dtype=torch.bool)
        history: list[dict[str, float]] = []
        with replaced(model, trained) as replace:
            run = _Training(self, model, task, trained, maskable, base, theta, replace, history)
            for share in shares(count, self.iterations):
                start = theta.detach().clone()
                keep[maskable:] = True
                run.phase(full, None, self.full_l1)
                moved = (theta.detach() - base)[:maskable]
                keep[:maskable] |= selected(moved, keep[:maskable], share)
                theta.data.copy_(start)
                run.phase(sparse, keep, self.sparse_l1)
        return self.finish(model, weights, trained, base, theta.detach(), keep, history)

    def whole_parameters(self, model: nn.Module, weights: Sequence[Weight]) -> list[Weight]:
        """What `whole` names. Raises `BadParameter` for a pattern that names nothing, or a weight that is to be masked."""
        named = dict(model.named_parameters())
        chosen = {
            name: one
            for name, one in named.items()
            if any(fnmatchcase(name, pattern) for pattern in self.whole)
        }
        idle = [pattern for pattern in self.whole if not any(fnmatchcase(name, pattern) for name in named)]
        if idle:
            raise BadParameter(f"lt-sft: whole={idle[0]!r} matches no parameter of the model.")
        taken = {id(weight.parameter) for weight in weights}
        both = [name for name, one in chosen.items() if id(one) in taken]
        if both:
            raise BadParameter(
                f"lt-sft: {both[0]} is trained whole and may be pruned too; exclude it from the prunable weights."
            )
        return prunable_weights(model, lambda _: chosen) if chosen else []

    def finish(
        self,
        model: nn.Module,
        weights: Sequence[Weight],
        trained: Sequence[Weight],
        base: Tensor,
        theta: Tensor,
        keep: Tensor,
        history: list[dict[str, float]],
    ) -> PruneResult:
        """Write θ₀ + φ, so that the model is exactly what its difference makes of the given one."""
        entries, masks, whole, changed = {}, {}, {}, 0
        maskable = {weight.name for weight in weights}
        pieces = (_pieces(one, trained) for one in (base, theta, keep))
        with torch.no_grad():
            for weight, before, after, kept in zip(trained, *pieces):
                if weight.name in maskable:
                    entries[weight.name] = entries_of(before, after, kept)
                    masks[weight.name] = Mask(kept.clone())
                    values = added(weight.parameter, entries[weight.name])
                    changed += int((values != weight.parameter).sum())
                    weight.parameter.copy_(values)
                else:
                    weight.parameter.copy_(after)
                    whole[weight.name] = weight.parameter.detach().clone()
        shapes = {weight.name: tuple(weight.parameter.shape) for weight in weights}
        held = Difference(entries, shapes, whole).artifacts()
        facts = {
            "selected entries": float(sum(int(mask.keep.sum()) for mask in masks.values())),
            "changed entries": float(changed),
            "difference bytes": float(sum(one.nbytes for file in held.values() for one in file.values())),
        }
        return PruneResult(model, masks, SparsityReport.of(masks), history, held, facts)


@attrs.define(eq=False)
class _Training:
    """One flat vector θ that stands in for the parameters of a model while it is trained."""

    settings: LtSft
    model: nn.Module
    task: PruneTask
    trained: Sequence[Weight]
    maskable: int
    base: Tensor
    theta: nn.Parameter
    replace: Any
    history: list[dict[str, float]]

    def phase(self, total: int, keep: Tensor | None, strength: float) -> None:
        """Train with a fresh optimiser; with `keep` [P], only where it is True."""
        theta, how, loss_of = self.theta, self.settings, self.task.loss
        assert loss_of is not None
        parameters = sum(one.numel() for one in self.model.parameters())
        reach = self.maskable if how.l1_sparse_only else len(self.base)
        optimizer = torch.optim.AdamW([theta], lr=how.lr, weight_decay=how.weight_decay)
        state = {"theta": nn.ParameterList([theta]), "optimizer": optimizer}
        for step in self.task.steps(total, state):
            values = zip(self.trained, _pieces(theta, self.trained))
            self.replace({weight.name: value.to(weight.parameter.dtype) for weight, value in values})
            loss = loss_of(self.model, self.task.batch(step))
            number = float(loss.detach())
            if not math.isfinite(number):
                raise NumericalError(
                    f"lt-sft: the loss is {number} at step {step.index + 1} of {step.total}; try a lower lr, and look at the "
                    "model's loss on this data before."
                )
            if strength:
                loss = loss + strength * l1_distance(theta[:reach], self.base[:reach], parameters)
            optimizer.zero_grad()
            loss.backward()
            assert theta.grad is not None
            if keep is not None:
                theta.grad.masked_fill_(~keep, 0)
            if how.clip:
                nn.utils.clip_grad_norm_([theta], how.clip)
            optimizer.param_groups[0]["lr"] = how.lr * (1 - step.fraction)
            optimizer.step()
            if keep is not None:
                # Weight decay moves entries that have no gradient too.
                theta.data.copy_(torch.where(keep, theta.data, self.base))
            numbers = {"loss": number, "sparse": float(keep is not None)}
            self.task.log(step, **numbers)
            self.history.append({"step": float(len(self.history) + 1), **numbers})
        if not bool(theta.detach().isfinite().all()):
            raise NumericalError("lt-sft: training led to entries that are NaN or infinite; try a lower lr.")


def _joined(trained: Sequence[Weight]) -> Tensor:
    """θ₀ [P] in float32, so that small steps are not lost in 16 bits; float64 where a parameter has it."""
    wide = any(weight.parameter.dtype == torch.float64 for weight in trained)
    kind = torch.float64 if wide else torch.float32
    return torch.cat([weight.parameter.detach().reshape(-1).to(kind) for weight in trained])


def _pieces(flat: Tensor, trained: Sequence[Weight]) -> list[Tensor]:
    """[P] as tensors of the parameters' shapes."""
    pieces = flat.split([weight.parameter.numel() for weight in trained])
    return [piece.view(weight.parameter.shape) for weight, piece in zip(trained, pieces)]


COMPONENTS = (LtSft,)
