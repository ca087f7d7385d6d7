"""The four protocols and the values that pass between them.

A component is a frozen attrs class: its fields are the method's hyper-parameters, declared with
`maskwright.setting`. State lives in what it makes (a `BoundObjective`, a `PruneResult`), never in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import attrs
import torch
from torch import Tensor, nn

from maskwright.errors import BadBudget
from maskwright.mask import Layout, Mask

Signals: TypeAlias = Mapping[str, Tensor]
"""What an objective tells a strategy before the mask is drawn, by name: `patch_loss` [B, N], `tokens` [B, L]."""

Batch: TypeAlias = Mapping[str, Tensor]
"""Columns by name: `pixels` [B, C, H, W], `tokens` int64 [B, L], `labels` int64 [B], ..."""

KINDS = ("mask-strategy", "objective", "pruner", "sampler")


@runtime_checkable
class Component(Protocol):
    """What every component says of itself, as class attributes."""

    kind: ClassVar[str]
    name: ClassVar[str]
    modalities: ClassVar[frozenset[str]]


@runtime_checkable
class MaskStrategy(Protocol):
    """Decides what is hidden.

    Class attributes beside those of `Component`: `needs`, the signals it must be given; optionally `counts`, "exact" (the
    default: every row of a draw keeps the same number) or "bounded", and `exact_with`, the parameters that make bounded
    counts exact; `disjoint_rows`, how many consecutive rows keep no position twice (4: rows 0 … 3, rows 4 … 7, …, the last ones
    may be fewer; 1 without it); `monotone`, the parameters (or "progress") that never shrink the hidden set as they grow; and
    `exempt` (see maskwright.testing).
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    modalities: ClassVar[frozenset[str]]

    @property
    def needs(self) -> frozenset[str]:
        """Signals it must be given."""
        ...

    def draw(self, layout: Layout, *, signals: Signals, progress: float, generator: torch.Generator) -> Mask:
        """A mask of shape [layout.batch, *layout.grid] on layout.device.

        `progress` in [0, 1] is the share of training done. Only `generator` is a source of randomness: the same
        seed gives the same mask, and the global generators are not touched. Signals lie on layout.device.
        Raises `UnsupportedLayout` when the grid does not fit the parameters.
        """
        ...


@attrs.frozen(eq=False)
class Loss:
    """What an objective returns.

    `total` is the scalar to minimise; `parts` are its weighted terms and sum to it; `outputs` are tensors for reports
    and tests, such as `reconstruction` [B, C, H, W] or `prediction` [B, N, D].
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor] = attrs.field(factory=dict)


class BoundObjective(nn.Module):
    """An objective bound to a backbone. It owns decoders, heads, teachers and mask tokens.

    Subclasses set `self.backbone` and implement `forward`. A teacher's parameters have requires_grad False.
    """

    backbone: nn.Module

    def signals(self, batch: Batch) -> Signals:
        """Signals for the strategy, computed before the mask is drawn, without gradient; none by default."""
        return {}

    def forward(
        self,
        batch: Batch,
        mask: Mask,
        *,
        signals: Signals | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Loss:
        """The loss of a batch under a mask.

        `signals` is what `signals(batch)` returned: a teacher runs once per step, not twice. `generator` is the only
        source of randomness of objectives that draw (noise, time steps).
        """
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Called after every optimiser step: EMA teachers follow. Nothing by default."""


@runtime_checkable
class Objective(Protocol):
    """Decides what is learned from what is left.

    `backbone` names the kind of backbone it works on (a protocol of maskwright.backbones: "patch", "grid", "conv", "token",
    "denoiser"). `needs` are batch columns; `provides` are signals that its bound form can compute. Optionally `counts`:
    "exact" where every row must keep the same number of positions, "any" (the default) otherwise. `disjoint_rows`, how
    many consecutive rows must keep no position twice, because it mixes them: strategies that do not promise it are refused.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    modalities: ClassVar[frozenset[str]]
    backbone: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """Batch columns it reads."""
        ...

    @property
    def provides(self) -> frozenset[str]:
        """Signals it can compute for a strategy."""
        ...

    def bind(self, backbone: nn.Module) -> BoundObjective:
        """A module with the backbone inside, ready to train. Raises `BackboneMismatch` for a backbone of another kind."""
        ...


# -- pruning -------------------------------------------------------------------------------------------------


@attrs.frozen
class Budget:
    """How much may stay: exactly one of the fields.

    `sparsity` is the share of prunable weights removed, in [0, 1); `pattern` "N:M" keeps N of every M consecutive
    inputs; `params` and `flops` are the shares kept, in (0, 1]; `bits` is the mean bits per weight; `layers` the number of
    layers kept.
    """

    sparsity: float | None = None
    pattern: str | None = None
    params: float | None = None
    flops: float | None = None
    bits: float | None = None
    layers: int | None = None

    def __attrs_post_init__(self) -> None:
        given = {name: value for name, value in attrs.asdict(self).items() if value is not None}
        if len(given) != 1:
            names = ", ".join(given) or "none"
            raise BadBudget(
                f"A budget has exactly one of sparsity, pattern, params, flops, bits, layers; got {names}."
            )
        ((name, value),) = given.items()
        if name == "pattern":
            self.n_of_m  # noqa: B018 - the property checks the text
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadBudget(f"Budget {name}={value!r} must be a number.")
        elif name == "sparsity" and not 0 <= value < 1:
            raise BadBudget(f"Budget sparsity={value} must be in [0, 1): 0.5 removes half of the weights.")
        elif name in ("params", "flops") and not 0 < value <= 1:
            raise BadBudget(f"Budget {name}={value} must be in (0, 1]: 0.7 keeps 70 %.")
        elif name == "bits" and not 0 < value <= 32:
            raise BadBudget(f"Budget bits={value} must be in (0, 32].")
        elif name == "layers" and (not isinstance(value, int) or value < 1):
            raise BadBudget(f"Budget layers={value} must be a whole number of at least 1.")

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return next(name for name, value in attrs.asdict(self).items() if value is not None)

    @property
    def n_of_m(self) -> tuple[int, int]:
        """(N, M) of an N:M pattern. Raises `BadBudget` for any other budget."""
        kept, colon, group = str(self.pattern).partition(":")
        if not (colon and kept.isdecimal() and group.isdecimal() and 0 < int(kept) < int(group)):
            raise BadBudget(
                f"Budget pattern={self.pattern!r} must be N:M with 0 < N < M, such as 2:4 (2 of 4 are kept)."
            )
        return int(kept), int(group)

    def __str__(self) -> str:
        return f"{self.kind} {getattr(self, self.kind)}"


@attrs.frozen
class LayerSparsity:
    """One pruned parameter: how many of its `total` weights are `kept`."""

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int

    @property
    def sparsity(self) -> float:
        """Removed share."""
        return 1 - self.kept / self.total


@attrs.frozen
class SparsityReport:
    """What was kept, per parameter and in all."""

    layers: tuple[LayerSparsity, ...]

    @classmethod
    def of(cls, masks: Mapping[str, Mask]) -> SparsityReport:
        """Counted from the masks."""
        return cls(
            tuple(
                LayerSparsity(name, tuple(mask.shape), int(mask.keep.count_nonzero()), mask.keep.numel())
                for name, mask in masks.items()
            )
        )

    @property
    def kept(self) -> int:
        """Weights kept, in all."""
        return sum(layer.kept for layer in self.layers)

    @property
    def total(self) -> int:
        """Prunable weights, in all."""
        return sum(layer.total for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Removed share of the prunable weights."""
        return 1 - self.kept / self.total if self.total else 0.0


@attrs.frozen(eq=False)
class PruneResult:
    """The pruned model (changed in place and returned), its masks by parameter name, a report, and what happened.

    `artifacts` are what a method leaves beside them, by the name of the file that a job writes: `{"task-masks": {name: Mask}}` or
    `{"difference": {name: Tensor}}`, of one kind each. `facts` are numbers worth reporting.
    """

    model: nn.Module
    masks: Mapping[str, Mask]
    report: SparsityReport
    history: Sequence[Mapping[str, float]] = ()
    artifacts: Mapping[str, Mapping[str, Mask] | Mapping[str, Tensor]] = attrs.field(factory=dict)
    facts: Mapping[str, float] = attrs.field(factory=dict)


@attrs.frozen(eq=False)
class Expert:
    """A model that was fine-tuned from the one that a pruner is given.

    `state` holds its parameters under the pruned model's names; `score(model)` says how good a model is at the expert's task, higher is
    better, or is None where nobody can say.
    """

    state: Mapping[str, Tensor]
    score: Callable[[nn.Module], float] | None = None


@attrs.frozen
class Step:
    """One step of a pruner that trains: its number, and `fraction` = index / total in [0, 1)."""

    index: int
    total: int

    @property
    def fraction(self) -> float:
        """Share of the steps that is behind."""
        return self.index / self.total


@attrs.define(eq=False)
class PruneTask:
    """What a pruner is given.

    `budget` is None for a pruner that finds out itself how much it removes. `batches` are calibration or training batches; `loss(model, batch)` is the scalar to keep low; `generator` the only
    source of randomness; `prunable(model)` names the weights that may be pruned (None: the rule of
    `maskwright.toolkit.prunable`). `extras` holds what special pruners need, by the name in their `needs`: `experts`, a mapping
    of names to `Expert`s; `clients`, a sequence with the batches of each client.
    """

    budget: Budget | None
    batches: Sequence[Batch] = ()
    loss: Callable[[nn.Module, Batch], Tensor] | None = None
    generator: torch.Generator = attrs.field(factory=lambda: torch.Generator().manual_seed(0))
    accelerator: Any = None
    prunable: Callable[[nn.Module], dict[str, nn.Parameter]] | None = None
    extras: Mapping[str, Any] = attrs.field(factory=dict)

    def steps(self, total: int, state: Mapping[str, Any]) -> Iterator[Step]:
        """Loop over the steps of a pruner that trains.

        `state` maps names to what must be saved between steps: objects with `state_dict` and `load_state_dict`. A job
        shows progress, saves and resumes here; this plain form only counts.
        """
        for index in range(total):
            yield Step(index, total)

    def log(self, step: Step, **metrics: float) -> None:
        """Report numbers of a step. A job writes them to metrics.jsonl; this plain form drops them."""

    def batch(self, step: Step) -> Batch:
        """The batch of a step: the batches in turn, again and again."""
        return self.batches[step.index % len(self.batches)]


@runtime_checkable
class Pruner(Protocol):
    """Decides which weights stay.

    `needs` names what the task must bring: "batches", "loss", or a key of its extras. `budgets` are the budget kinds it
    meets, none for a method that finds out itself how much it removes; `changes_weights` says whether weights inside the mask may
    move. `prunes = "difference"` is said by a method whose masks are of the model's *change*: outside them weights are as they were
    given, not zero; `prunes = "channels"` by one that makes the model smaller: masks are of the shapes it had, and say what is left.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    modalities: ClassVar[frozenset[str]]
    budgets: ClassVar[frozenset[str]]
    changes_weights: ClassVar[bool]

    @property
    def needs(self) -> frozenset[str]:
        """What the task must bring."""
        ...

    def prune(self, model: nn.Module, task: PruneTask) -> PruneResult:
        """Prune `model` in place: weights outside their mask become exactly zero."""
        ...


# -- sampling ------------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class SampleRequest:
    """What is to be sampled.

    `tokens` int64 [B, L] holds the prompt, and `mask_token` wherever a token is wanted. `steps` is the number of network
    calls or time steps asked for, where the sampler has a choice. `time_conditioned` denoisers are also given `time=[B]`.
    """

    tokens: Tensor
    mask_token: int
    generator: torch.Generator
    steps: int | None = None
    time_conditioned: bool = False

    @property
    def prompt(self) -> Mask:
        """Visible where the prompt fixes the token."""
        return Mask(self.tokens != self.mask_token)


@attrs.frozen(eq=False)
class Samples:
    """What was sampled.

    `values` is [B, L]; `evaluations` counts network calls (a call for the whole batch is one); `order` int64 [B, L] says
    at which event each position was revealed, -1 for the prompt, or is None. `facts` are numbers worth reporting, such as
    the categorical draws made.
    """

    values: Tensor
    evaluations: int
    order: Tensor | None = None
    facts: Mapping[str, float] = attrs.field(factory=dict)


@runtime_checkable
class Sampler(Protocol):
    """Decides in which order, when and how masked values are filled in.

    `domain` is "discrete", "continuous", "autoregressive" or "pointer". For tokens, `denoiser(tokens)` returns logits
    [B, L, V] in which logits[:, i] predicts token i (see `maskwright.backbones.denoiser` for models that are shifted).
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    modalities: ClassVar[frozenset[str]]
    domain: ClassVar[str]

    def sample(self, denoiser: Callable[..., Tensor], request: SampleRequest) -> Samples:
        """Fill every masked position; the prompt is kept; no mask token is left."""
        ...


# -- runs ----------------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class RunInfo:
    """A running job, as observers see it."""

    job: str
    folder: Path
    settings: Mapping[str, Any]
    steps: int
