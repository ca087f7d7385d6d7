"""A model whose prunable weights are, for a while, computed tensors: what pruners train masks through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor, nn

from maskwright.toolkit.calibration import evaluating
from maskwright.toolkit.prunable import Weight, identity

Replace: TypeAlias = Callable[[Mapping[str, Tensor]], None]
"""Puts tensors of the parameters' shapes in their places, by name."""


@contextmanager
def replaced(model: nn.Module, weights: Sequence[Weight]) -> Iterator[Replace]:
    """Gives a function that lets tensors stand in for weights: `replace({name: parameter.detach() * mask})`.

    What the model computes then depends on the tensors, with gradients to whatever they were made from. No parameter
    requires a gradient meanwhile, and the model is in evaluation mode: no dropout, no statistics that follow. Afterwards it
    is the plain model it was, with the parameters it had.
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

    with evaluating(model):
        try:
            for parameter, _ in required:
                parameter.requires_grad_(False)
            yield replace
        finally:
            for owner, attribute, original in originals:
                owner._parameters[attribute] = original
            for parameter, flag in required:
                parameter.requires_grad_(flag)
