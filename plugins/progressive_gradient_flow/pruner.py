"""Training towards N:M: W are the dense weights, Φ the magnitude mask, D how much of a masked weight still acts.

t is the number of steps since the dense phase ended, β the coefficient of the decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple

import attrs
import torch
from torch import Tensor, nn

from maskwright import Budget, PruneResult, PruneTask, setting
from maskwright.errors import BadBudget, BadData, BadParameter, NumericalError
from maskwright.toolkit.patterns import check_budget, keep_n_of_m, require_divisible
from maskwright.toolkit.prunable import Weight, finish, prunable_weights

Pattern = tuple[int, int]
"""(N, M): N of every M consecutive weights are kept."""

REACH = {"exponential": 10.9, "linear": 1.0}
"""β times the steps of the decay, where β is not given: 1e-4 over 350 epochs of ImageNet at a batch of 4096; exactly to 0."""

FINE_FRAMES = 4
"""Frames of the geometric schedule: groups of 8M, 4M, 2M and M."""


# -- the equations ---------------------------------------------------------------------------------------------------


def magnitude_mask(matrix: Tensor, n: int, m: int, dimension: str = "row") -> Tensor:
    """Φ: bool [out, in], True at the N largest |w| of M consecutive ones along the inputs ("row") or the outputs ("col")."""
    if dimension == "row":
        return keep_n_of_m(matrix, n, m, magnitude=True)
    return keep_n_of_m(matrix.T, n, m, magnitude=True).T


def linear_flow(beta: float, t: float) -> float:
    """D = max(0, 1 - β·t)."""
    return max(0.0, 1 - beta * t)


def exponential_flow(beta: float, t: float) -> float:
    """D = e^(-β·t)."""
    return math.exp(-beta * t)


def factor(keep: Tensor, flow: float, dtype: torch.dtype) -> Tensor:
    """Φ + (1 - Φ)·D, exactly 1 where Φ is: the larger of Φ and D (several times faster than `torch.where`)."""
    return keep.to(dtype).clamp_(min=flow)


def effective(weight: Tensor, keep: Tensor, flow: float) -> Tensor:
    """W̃ = W ⊙ (Φ + (1 - Φ)·D)."""
    return weight * factor(keep, flow, weight.dtype)


def gradient(
    upstream: Tensor, weight: Tensor, keep: Tensor, flow: float, rule: str, strength: float = 0.0
) -> Tensor:
    """dL/dW from dL/dW̃.

    "masked": ⊙ (Φ + (1 - Φ)·D), as the paper states. "straight-through": unchanged, as the official code has it. "sr-ste":
    + λ·(1 - Φ) ⊙ W, where `strength` is λ.
    """
    if rule == "masked":
        return upstream * factor(keep, flow, upstream.dtype)
    if rule == "sr-ste":
        return torch.addcmul(upstream, weight, ~keep, value=strength)
    return upstream


def stepwise_patterns(n: int, m: int) -> list[Pattern]:
    """(M-1):M, then M/2^i:M for i = 1 … log2(M/N); the target at the end, also where M/N is no power of two."""
    halvings = int(math.log2(m / n))
    patterns = [(m - 1, m), *((m // 2**i, m) for i in range(1, halvings + 1))]
    return patterns if patterns[-1] == (n, m) else [*patterns, (n, m)]


def geometric_patterns(n: int, m: int) -> list[Pattern]:
    """8N:8M, 4N:4M, 2N:2M, N:M: the same share kept, in shrinking groups."""
    return [(n * 2**i, m * 2**i) for i in reversed(range(FINE_FRAMES))]


def frame_starts(frames: int, first: int, last: int) -> list[int]:
    """When each of equal frames between two times begins, rounded down."""
    return [first + int(frame * (last - first) / frames) for frame in range(frames)]


def learning_rate(peak: float, least: float, warmup: float, fraction: float) -> float:
    """A linear rise over the share `warmup` of the steps, then the cosine that began at step 0, as timm has it."""
    if fraction < warmup:
        return least + (peak - least) * fraction / warmup
    return least + (peak - least) * (1 + math.cos(math.pi * fraction)) / 2


# -- the pruner ------------------------------------------------------------------------------------------------------


class Phase(NamedTuple):
    """What holds in a step: `flow` D, and the patterns in force by weight; None in the dense phase."""

    flow: float
    patterns: Mapping[str, Pattern] | None


@attrs.frozen
class NmDecay:
    """N:M weights of a model in training: weights outside the magnitude mask fade, or the pattern tightens, step by step.

    Bambhaniya et al., arXiv:2402.04744: MdGf is `decay` "exponential" or "linear", SdGf "stepwise" or "geometric". SR-STE, which
    they compare with, is decay="none" and gradient="sr-ste". The whole model is trained, in training mode, on the task's loss.
    """

    kind: ClassVar[str] = "pruner"
    name: ClassVar[str] = "nm-decay"
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    needs: ClassVar[frozenset[str]] = frozenset({"batches", "loss"})
    budgets: ClassVar[frozenset[str]] = frozenset({"pattern"})
    changes_weights: ClassVar[bool] = True
    example_parameters: ClassVar[dict[str, Any]] = {"steps": 4, "fine_tune": 0.25}
    exempt: ClassVar[dict[str, str]] = {
        "the-rest-is-untouched": "it trains the model: biases, norms and embeddings move with the pruned weights"
    }

    steps: int = setting(2000, "training steps", ge=1)
    decay: str = setting(
        "exponential",
        "how the mask comes into force",
        choices=("exponential", "linear", "stepwise", "geometric", "none"),
    )
    beta: float | None = setting(
        None,
        "β of a step, for exponential and linear; without it D ends at e^-10.9 or at 0",
        ge=0,
        optional=True,
    )
    gradient: str = setting(
        "masked", "what dL/dW is made from dL/dW̃", choices=("masked", "straight-through", "sr-ste")
    )
    strength: float = setting(2e-4, "factor λ of SR-STE's term", ge=0)
    dense: float = setting(0.0, "share of the steps before the decay, without a mask", ge=0, le=1)
    fine_tune: float = setting(0.0, "share of the steps at the end, with the binary target mask", ge=0, le=1)
    dimension: str = setting(
        "row", "groups run along inputs or outputs of the weight matrix", choices=("row", "col")
    )
    patterns: tuple[str, ...] = setting(
        (), 'patterns of their own for weights by name, as "WILDCARD=N:M"; the first that matches holds'
    )
    train: str = setting("all", "which parameters are trained", choices=("all", "prunable"))
    lr: float = setting(1e-3, "learning rate at its peak", gt=0)
    final_lr: float = setting(1e-7, "learning rate at the start and the end", ge=0)
    warmup: float = setting(15 / 350, "share of the steps over which the learning rate rises", ge=0, lt=1)
    weight_decay: float = setting(0.01, "AdamW's weight decay of tensors with at least two dimensions", ge=0)
    clip: float = setting(1.0, "largest norm of the gradient; 0 clips nothing", ge=0)

    def __attrs_post_init__(self) -> None:
        if self.dense + self.fine_tune > 1:
            raise BadParameter(
                f"nm-decay: dense={self.dense} and fine_tune={self.fine_tune} are shares of one run; their sum is at most 1."
            )
        for text in self.patterns:
            if "=" not in text:
                raise BadParameter(f'nm-decay: patterns has {text!r}, which must be "WILDCARD=N:M".')

    def prune(self, model: nn.Module, task: PruneTask) -> PruneResult:
        """Raises `BadBudget` for what is no N:M pattern or does not fit a layer, `BadData` without batches and loss."""
        weights = prunable_weights(model, task.prunable)
        targets = self.targets(weights, task.budget)
        if task.loss is None or not task.batches:
            raise BadData("nm-decay trains on batches and a loss; give the task both.")
        history = self.fit(model, weights, targets, task)
        keep = {
            weight.name: magnitude_mask(weight.matrix, *targets[weight.name], self.dimension)
            for weight in weights
        }
        return finish(model, weights, keep, history)

    def targets(self, weights: Sequence[Weight], budget: Budget | None) -> dict[str, Pattern]:
        """The pattern that each weight ends with. Raises `BadBudget` where it, or one on the way to it, does not fit."""
        common = check_budget(self, (), budget)
        rules = [(*text.rpartition("=")[::2],) for text in self.patterns]
        targets = {}
        for weight in weights:
            own = next((pattern for name, pattern in rules if fnmatchcase(weight.name, name)), common.pattern)
            n, m = targets[weight.name] = Budget(pattern=own).n_of_m
            for kept, group in self.way(n, m):
                self.require_room(weight, kept, group)
        return targets

    def require_room(self, weight: Weight, n: int, m: int) -> None:
        """Raise `BadBudget` when M does not divide the dimension that the groups run along."""
        if self.dimension == "row":
            require_divisible([weight], Budget(pattern=f"{n}:{m}"))
        elif weight.shape[0] % m:
            raise BadBudget(
                f"Pattern {n}:{m} does not fit {weight.name} {list(weight.parameter.shape)}: its {weight.shape[0]} outputs are "
                f"no multiple of {m}; use another pattern, or leave the layer out of what may be pruned."
            )

    def way(self, n: int, m: int) -> list[Pattern]:
        """The patterns that are in force after each other."""
        if self.decay == "stepwise":
            return stepwise_patterns(n, m)
        return geometric_patterns(n, m) if self.decay == "geometric" else [(n, m)]

    def phase(self, step: int, targets: Mapping[str, Pattern]) -> Phase:
        """What holds in a step, from its number alone: a run resumed anywhere has what the whole run had."""
        dense, last = int(self.dense * self.steps), self.steps - int(self.fine_tune * self.steps)
        if step < dense:
            return Phase(1.0, None)
        if step >= last:
            return Phase(0.0, targets)
        if self.decay in REACH:
            beta = REACH[self.decay] / (last - dense) if self.beta is None else self.beta
            flow = exponential_flow if self.decay == "exponential" else linear_flow
            return Phase(flow(beta, step - dense), targets)
        patterns = {}
        for name, target in targets.items():
            way = self.way(*target)
            begun = sum(start <= step for start in frame_starts(len(way), dense, last))
            patterns[name] = way[begun - 1]
        return Phase(0.0, patterns)

    def fit(
        self, model: nn.Module, weights: Sequence[Weight], targets: Mapping[str, Pattern], task: PruneTask
    ) -> list[dict[str, float]]:
        """Train the model, and leave the dense weights in it; returns numbers by step."""
        pruned = {weight.name: weight for weight in weights}
        known = {id(weight.parameter): weight.name for weight in weights}
        parameters = {
            known.get(id(parameter), name): parameter
            for name, parameter in model.named_parameters()
            if id(parameter) in known or (self.train == "all" and parameter.requires_grad)
        }
        # The optimiser moves W in at least float32, while the model computes with W̃ in its own dtype.
        dense = nn.ParameterList(
            parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for parameter in parameters.values()
        )
        latent = dict(zip(parameters, dense))
        optimizer = self.optimizer(list(dense))
        state = {
            "weights": dense,
            "buffers": buffers_of(model),
            "optimizer": optimizer,
            "generator": task.generator,
        }
        history = []
        with in_training(model, parameters.values()):
            try:
                for step in task.steps(self.steps, state):
                    phase = self.phase(step.index, targets)
                    keep = self.masks(pruned, latent, phase)
                    self.put(parameters, latent, keep, phase.flow)
                    with seeded_by(task.generator):
                        loss = task.loss(model, task.batch(step))
                        loss.backward()
                    self.collect(parameters, latent, keep, phase.flow)
                    norm = nn.utils.clip_grad_norm_(dense, self.clip or math.inf)
                    numbers = {"loss": float(loss.detach()), "flow": phase.flow, "norm": float(norm)}
                    if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["norm"])):
                        raise NumericalError(
                            f"nm-decay: the loss is {numbers['loss']} and its gradient {numbers['norm']} at step "
                            f"{step.index + 1} of {step.total}; lower lr, or look at the model's loss on this data."
                        )
                    rate = learning_rate(self.lr, self.final_lr, self.warmup, step.fraction)
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    optimizer.step()
                    task.log(step, **numbers)
                    history.append({"step": float(step.index + 1), **numbers})
            finally:
                self.put(parameters, latent, {}, 1.0)
        return history

    def optimizer(self, dense: list[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW; biases and the scales of norms do not decay."""
        matrices = [one for one in dense if one.ndim > 1]
        vectors = [one for one in dense if one.ndim <= 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.lr, weight_decay=self.weight_decay
        )

    @torch.no_grad()
    def masks(
        self, pruned: Mapping[str, Weight], latent: Mapping[str, Tensor], phase: Phase
    ) -> dict[str, Tensor]:
        """Φ of each weight, in the parameter's shape, from the dense weights as they are now; none in the dense phase."""
        if phase.patterns is None:
            return {}
        found = {}
        for name, weight in pruned.items():
            matrix = weight.as_matrix(latent[name].detach())
            keep = magnitude_mask(matrix, *phase.patterns[name], self.dimension)
            found[name] = weight.as_parameter(keep)
        return found

    @torch.no_grad()
    def put(
        self,
        parameters: Mapping[str, nn.Parameter],
        latent: Mapping[str, Tensor],
        keep: Mapping[str, Tensor],
        flow: float,
    ) -> None:
        """Give the model its effective weights."""
        for name, parameter in parameters.items():
            value = latent[name]
            parameter.copy_(effective(value, keep[name], flow) if name in keep else value)

    @torch.no_grad()
    def collect(
        self,
        parameters: Mapping[str, nn.Parameter],
        latent: Mapping[str, Tensor],
        keep: Mapping[str, Tensor],
        flow: float,
    ) -> None:
        """Move the gradients from the model to the dense weights."""
        for name, parameter in parameters.items():
            found, value = parameter.grad, latent[name]
            if found is not None and name in keep:
                found = gradient(found.to(value.dtype), value, keep[name], flow, self.gradient, self.strength)
            value.grad = None if found is None else found.to(value.dtype)
            parameter.grad = None


# -- the model while it is trained -----------------------------------------------------------------------------------


def buffers_of(model: nn.Module) -> nn.Module:
    """The model's buffers (running statistics) as a module of their own, to be saved with a checkpoint."""
    holder = nn.Module()
    for index, buffer in enumerate(model.buffers()):
        holder.register_buffer(str(index), buffer)
    return holder


@contextmanager
def in_training(model: nn.Module, trained: Any) -> Iterator[None]:
    """Training mode, in which these parameters and no others require a gradient; all is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in trained}
    try:
        model.train()
        for parameter, _ in required:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in required:
            parameter.requires_grad_(flag)
            if id(parameter) in chosen:
                parameter.grad = None


@contextmanager
def seeded_by(generator: torch.Generator) -> Iterator[None]:
    """Dropout draws from the global generators: they follow `generator` here, and are as they were afterwards."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


COMPONENTS = (NmDecay,)
