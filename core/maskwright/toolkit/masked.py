"""A model whose prunable weights are, for a while, computed tensors: what pruners train masks through.

with replaced(model, weights) as replace:
    for step in task.steps(total, state):
        replace({weight.name: straight_through(weight.parameter.detach(), keep, scores) ...})
        loss = task.loss(model, task.batch(step))
        require_finite_loss(self, loss, step)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from maskwright.errors import NumericalError
from maskwright.protocols import Pruner, Step
from maskwright.toolkit.calibration import evaluating
from maskwright.toolkit.prunable import Weight, identity

Replace: TypeAlias = Callable[[Mapping[str, Tensor]], None]
"""Puts tensors of the parameters' shapes in their places, by name."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, weight: Tensor, keep: Tensor, scores: Tensor) -> Tensor:
        context.save_for_backward(weight)
        context.dtype = scores.dtype
        return weight * keep

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        (weight,) = context.saved_tensors
        return None, None, gradients[0].to(context.dtype) * weight


def straight_through(weight: Tensor, keep: Tensor, scores: Tensor) -> Tensor:
    """keep ⊙ weight, in the weight's dtype, for scores that decide `keep` (bool); all three of one shape.

    The gradient passes from the mask to the scores as if they were the mask: dL/dscores = dL/d(keep ⊙ weight) ⊙ weight, at entries
    that are removed as well. None reaches the weight. Bengio et al., arXiv:1308.3432.
    """
    masked: Tensor = _StraightThrough.apply(weight, keep, scores)
    return masked


def require_finite_loss(pruner: Pruner, loss: Tensor, step: Step) -> float:
    """A loss as a number. Raises `NumericalError` that names the step when it is not finite."""
    number = float(loss.detach())
    if not math.isfinite(number):
        raise NumericalError(
            f"{pruner.name}: the loss is {number} at step {step.index + 1} of {step.total}; look at the model's "
            "loss on this data before pruning."
        )
    return number


def require_finite_scores(pruner: Pruner, scores: Iterable[Tensor], step: Step) -> None:
    """Raise `NumericalError` when scores are not finite after a step of the optimizer: a gradient was too large for its dtype."""
    # A sum is not finite when a term is not.
    if not all(bool(one.detach().sum().isfinite()) for one in scores):
        raise NumericalError(
            f"{pruner.name}: a gradient is NaN or infinite at step {step.index + 1} of {step.total}; prune the model in float32 or "
            "bfloat16, or take a smaller learning rate."
        )


def running_statistics(model: nn.Module) -> nn.ModuleList:
    """The layers whose buffers follow the data in training mode: BatchNorm and InstanceNorm with running statistics."""
    return nn.ModuleList(
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
    )


@contextmanager
def replaced(model: nn.Module, weights: Sequence[Weight], *, statistics: bool = False) -> Iterator[Replace]:
    """Gives a function that lets tensors stand in for weights: `replace({name: parameter.detach() * mask})`.

    What the model computes then depends on the tensors, with gradients to whatever they were made from. No parameter
    requires a gradient meanwhile, and the model is in evaluation mode: no dropout, no statistics that follow. With `statistics`,
    layers with running statistics are in training mode, so that these follow; an error puts them back. Afterwards it is the plain
    model it was, with the parameters it had.
    """
    places = {
        weight.name: [
            (owner, attribute)
            for owner in weight.owners
            for attribute, parameter in owner._parameters.items()
            if parameter is not None and identity(parameter) == identity(weight.parameter)
        ]
        for weight in weights
    }
    originals: list[tuple[nn.Module, str, nn.Parameter | None]] = [
        (*place, place[0]._parameters[place[1]]) for several in places.values() for place in several
    ]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def replace(tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            for owner, attribute in places[name]:
                owner._parameters[attribute] = tensor  # type: ignore[assignment]

    following = running_statistics(model) if statistics else nn.ModuleList()
    before = {name: value.clone() for name, value in following.state_dict().items()}
    with evaluating(model):
        try:
            for parameter, _ in required:
                parameter.requires_grad_(False)
            for module in following:
                module.train()
            yield replace
        except BaseException:
            following.load_state_dict(before)
            raise
        finally:
            for owner, attribute, original in originals:
                owner._parameters[attribute] = original
            for parameter, flag in required:
                parameter.requires_grad_(flag)
