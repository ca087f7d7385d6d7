"""Mask tuning: M are real-valued masks of the frozen weights W, m = [M > threshold] what they keep, Ŵ = m ⊙ W what the model runs on.

Two losses decide: a, of the task, whose gradient is followed, and b, of general knowledge, which says where it may be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import PruneResult, PruneTask, setting
from maskwright.errors import BadData, BadModel, BadParameter
from maskwright.toolkit.masked import (
    Replace,
    replaced,
    require_finite_loss,
    require_finite_scores,
    straight_through,
)
from maskwright.toolkit.patterns import refuse_budget
from maskwright.toolkit.prunable import Weight, finish, prunable_weights
from maskwright.toolkit.schedules import cosine

EPSILON = 1e-8
"""Beside |g_a| + |g_b|: gradients of masks are often as small, and then P is nearer to ½ than the signs say."""


def binarized(masks: Tensor, threshold: float) -> Tensor:
    """m, bool: what lies above the threshold; what equals it is removed."""
    return masks.detach() > threshold


def general_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """b = -T² · mean Σ_c softmax(teacher / T) · log softmax(student / T), of logits [..., C]. No gradient reaches the teacher."""
    known = torch.softmax(teacher.detach().float() / temperature, -1)
    said = torch.log_softmax(student.float() / temperature, -1)
    return -(temperature**2) * (known * said).sum(-1).mean()


def drift(student: Tensor, teacher: Tensor) -> Tensor:
    """The general loss of features [..., D] where there are no logits: half their mean squared distance."""
    return 0.5 * (student.float() - teacher.detach().float()).square().sum(-1).mean()


def agreement(task: Tensor, general: Tensor) -> Tensor:
    """P = ½ (1 + sign(g_a) (g_a + g_b) / (|g_a| + |g_b| + ε)), elementwise: 1 where signs agree, |g_a| / (|g_a| + |g_b|) where not."""
    share = (task + general) / (task.abs() + general.abs() + EPSILON)
    return 0.5 * (1 + task.sign() * share)


def dropped(task: Tensor, probability: Tensor, uniform: Tensor, strength: float) -> Tensor:
    """g = ((1 - λ) + λ · [P > U]) · g_a, not rescaled: only the task's gradient is ever followed."""
    return ((1 - strength) + strength * (probability > uniform)) * task


def norms(masks: Sequence[Tensor]) -> Tensor:
    """Σ ‖M‖₂ over the masks, each norm plain and not squared."""
    return torch.stack([torch.linalg.vector_norm(one) for one in masks]).sum()


def attention_weights(model: nn.Module, weights: Sequence[Weight]) -> list[Weight]:
    """Those of the weights that lie in a module which its class or its name calls attention."""

    def inside(name: str) -> bool:
        parts = name.split(".")[:-1]
        paths = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
        words = [type(model.get_submodule(path)).__name__ for path in paths] + parts
        return any("attention" in word.lower() or "attn" in word.lower() for word in words)

    return [weight for weight in weights if inside(weight.name)]


@contextmanager
def outputs_of(model: nn.Module) -> Iterator[list[Any]]:
    """Collects what the model returns, however often a loss calls it."""
    found: list[Any] = []
    handle = model.register_forward_hook(lambda module, given, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


def knowledge(student: Sequence[Any], teacher: Sequence[Any], temperature: float) -> Tensor:
    """The general loss between outputs of the masked and of the original model: of their logits, or of their features.

    Raises `BadModel` where there are neither.
    """
    for name in ("logits", "last_hidden_state"):
        pairs = [
            [one if isinstance(one, Tensor) else getattr(one, name, None) for one in outputs]
            for outputs in (student, teacher)
        ]
        if pairs[0] and all(isinstance(one, Tensor) for several in pairs for one in several):
            now, before = (torch.cat([_rows(one) for one in several if one is not None]) for several in pairs)
            return general_loss(now, before, temperature) if name == "logits" else drift(now, before)
    raise BadModel(
        "mask-tuning compares what the masked model and the original say, and the loss got neither logits nor a "
        "last_hidden_state from calling this model; return one of them, or set dropout=0 to tune without general knowledge."
    )


def _rows(output: Tensor) -> Tensor:
    """[N, C] of [..., C], or of [B, C, H, W]."""
    return (output.movedim(1, -1) if output.ndim == 4 else output).flatten(0, -2)


class Layer(nn.Module):
    """One frozen weight with its real-valued mask; called, it gives Ŵ."""

    def __init__(self, weight: Weight, masks: Tensor, threshold: float) -> None:
        super().__init__()
        self.weight, self.threshold = weight, threshold
        self.masks = nn.Parameter(masks)

    @property
    def keep(self) -> Tensor:
        """m, bool, of the parameter's shape."""
        return binarized(self.masks, self.threshold)

    def forward(self) -> Tensor:
        return straight_through(self.weight.parameter.detach(), self.keep, self.masks)


@attrs.frozen
class MaskTuning:
    """The weights of attention that stay on for a task, without a budget, by thresholded masks and gradient dropout.

    Zheng et al., arXiv:2307.15049; the defaults are the official configuration for ViT-B/16 but for the steps, which are those of
    Caltech101 (16 images of 100 classes, batches of 32, 30 epochs). How much is removed is an outcome of the training.
    """

    kind: ClassVar[str] = "pruner"
    name: ClassVar[str] = "mask-tuning"
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    needs: ClassVar[frozenset[str]] = frozenset({"batches", "loss"})
    budgets: ClassVar[frozenset[str]] = frozenset()
    changes_weights: ClassVar[bool] = False
    # Four steps of Adam that move an entry by more than its distance to the threshold, so that something is removed.
    example_parameters: ClassVar[dict[str, Any]] = {"steps": 4, "lr": 0.004}

    steps: int = setting(1500, "training steps", ge=1)
    epochs: int = setting(30, "equal parts of the training, in which the learning rate is constant", ge=1)
    lr: float = setting(8e-5, "Adam's learning rate at the start; falls along a cosine to 0", ge=0)
    where: str = setting(
        "attention",
        "which prunable weights are masked: those of attention (all, in a model without), or all",
        choices=("attention", "all"),
    )
    start: str = setting(
        "constant", "masks at the start: equal, or uniform below", choices=("constant", "uniform")
    )
    scale: float = setting(1e-2, "value, or bound, of the masks at the start", gt=0)
    threshold: float = setting(5e-3, "masks above it keep their weight", ge=0)
    norm: float = setting(1e-4, "factor w of the masks' norms in the task's loss", ge=0)
    dropout: float = setting(1.0, "strength λ of the gradient dropout; 0 is tuning without it", ge=0, le=1)
    temperature: float = setting(1.0, "temperature T of the general-knowledge loss", gt=0)

    def __attrs_post_init__(self) -> None:
        if self.threshold >= self.scale:
            raise BadParameter(
                f"mask-tuning: threshold={self.threshold!r} must be below scale={self.scale!r}; otherwise nothing is kept at the start."
            )

    def prune(self, model: nn.Module, task: PruneTask) -> PruneResult:
        """Raises `BadBudget` for any budget, `BadData` without batches and loss, `BadModel` where outputs cannot be compared."""
        refuse_budget(self, task.budget)
        weights = prunable_weights(model, task.prunable)
        if task.loss is None or not task.batches:
            raise BadData("mask-tuning trains on batches and a loss; give the task both.")
        if self.where == "attention":
            weights = attention_weights(model, weights) or weights
        layers = nn.ModuleList(
            Layer(weight, self.first(weight.parameter, task.generator), self.threshold) for weight in weights
        )
        history = self.train(model, weights, layers, task)
        keep = {layer.weight.name: layer.weight.as_matrix(layer.keep) for layer in layers}
        result = finish(model, weights, keep, history)
        facts = {
            "removed": result.report.total - result.report.kept,
            "bytes of the masks": sum(-(-one.total // 8) for one in result.report.layers),
        }
        return PruneResult(model, result.masks, result.report, history, facts=facts)

    def first(self, parameter: Tensor, generator: torch.Generator) -> Tensor:
        """M at the start, float32."""
        if self.start == "constant":
            return torch.full(parameter.shape, self.scale, dtype=torch.float32, device=parameter.device)
        return self.scale * _uniform(parameter, generator)

    def train(
        self, model: nn.Module, weights: list[Weight], layers: nn.ModuleList, task: PruneTask
    ) -> list[dict[str, float]]:
        """Follow the task's gradient over the masks where general knowledge lets it; returns numbers by step."""
        history = []
        masks = [layer.masks for layer in layers]
        optimizer = torch.optim.Adam(masks, self.lr)
        state = {"layers": layers, "optimizer": optimizer, "generator": task.generator}
        with replaced(model, weights) as replace:
            for step in task.steps(self.steps, state):
                behind = step.index * self.epochs // step.total / self.epochs
                optimizer.param_groups[0]["lr"] = cosine(self.lr, 0.0, behind)
                loss, general = self.losses(model, layers, task, task.batch(step), replace)
                numbers = {"loss": require_finite_loss(self, loss, step)}
                if general is not None:
                    numbers["general_loss"] = require_finite_loss(self, general, step)
                numbers["agreement"] = self.set_gradients(masks, loss, general, task.generator)
                optimizer.step()
                require_finite_scores(self, masks, step)
                removed = sum(int((~layer.keep).sum()) for layer in layers)
                numbers["removed"] = removed / sum(one.numel() for one in masks)
                task.log(step, **numbers)
                history.append({"step": float(step.index + 1), **numbers})
        return history

    def losses(
        self, model: nn.Module, layers: nn.ModuleList, task: PruneTask, batch: Any, replace: Replace
    ) -> tuple[Tensor, Tensor | None]:
        """The task's loss without the norms, and that of general knowledge, from one forward of the masked model."""
        assert task.loss is not None
        with outputs_of(model) as teacher, torch.no_grad():
            if self.dropout:
                replace({layer.weight.name: layer.weight.parameter for layer in layers})
                task.loss(model, batch)
        replace({layer.weight.name: layer() for layer in layers})
        with outputs_of(model) as student:
            loss = task.loss(model, batch)
        return loss, knowledge(student, teacher, self.temperature) if self.dropout else None

    def set_gradients(
        self, masks: Sequence[Tensor], loss: Tensor, general: Tensor | None, generator: torch.Generator
    ) -> float:
        """Leave g at every mask; returns the share of entries whose two gradients agree (1 without general knowledge)."""
        wanted = loss + self.norm * norms(masks)
        if general is None:
            for one, gradient in zip(masks, torch.autograd.grad(wanted, masks)):
                one.grad = gradient
            return 1.0
        knows = torch.autograd.grad(general, masks, retain_graph=True, allow_unused=True)
        agreed, total = 0, 0
        for one, g_a, g_b in zip(masks, torch.autograd.grad(wanted, masks), knows):
            g_b = torch.zeros_like(g_a) if g_b is None else g_b
            one.grad = dropped(g_a, agreement(g_a, g_b), _uniform(one, generator), self.dropout)
            agreed += int((g_a.sign() * g_b.sign() >= 0).sum())
            total += one.numel()
        return agreed / total


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """U in [0, 1), float32, of a tensor's shape and where it is."""
    return torch.rand(like.shape, generator=generator, device=generator.device).to(like.device)


COMPONENTS = (MaskTuning,)
