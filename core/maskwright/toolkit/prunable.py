"""Which weights may be pruned: one rule set for every model, and each weight as a matrix [out, in].

`Rule` chooses by module type and name; embeddings, output heads, norms and biases stay dense, and a weight that several
modules share is counted once. `prunable_weights` gives what it chose as `Weight`s, whatever layout the library stores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from maskwright.errors import BadModel, NumericalError
from maskwright.mask import Mask
from maskwright.protocols import PruneResult, SparsityReport

TYPES = ("Linear", "Conv1D", "Conv2d")
"""Module types whose `weight` may be pruned; Conv1D is the transposed linear layer of transformers' GPT-2."""

DENSE = (
    *("*embed*", "*pooler*"),
    *(f"{head}.*" for head in ("lm_head", "cls", "classifier", "score", "head", "heads", "fc", "qa_outputs")),
    *(f"*.{head}.*" for head in ("lm_head", "cls", "classifier", "qa_outputs")),
)
"""Name patterns of embeddings and output heads as libraries call them: these stay dense."""


@attrs.frozen
class Rule:
    """Which parameters may be pruned: those of modules of these types whose names match.

    Patterns are shell wildcards on the parameter's full name, such as "model.layers.*.mlp.*". Weights that an embedding
    owns too, the output layer that transformers names, and attention inside `nn.MultiheadAttention` (whose projections are
    never called as modules, so that nothing can be measured at them) are left out. A rule is a `PruneTask.prunable`.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = DENSE
    types: tuple[str, ...] = TYPES

    def __call__(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters by name, in the order in which the model defines them, each once."""
        taken = {identity(weight) for weight in _dense_weights(model)}
        chosen: dict[str, nn.Parameter] = {}
        for name, module in _modules(model):
            weight = getattr(module, "weight", None)
            path = f"{name}.weight" if name else "weight"
            if (
                isinstance(weight, nn.Parameter)
                and type_of(module) in self.types
                and weight.is_floating_point()
                and identity(weight) not in taken
                and any(fnmatchcase(path, pattern) for pattern in self.include)
                and not any(fnmatchcase(path, pattern) for pattern in self.exclude)
            ):
                taken.add(identity(weight))
                chosen[path] = weight
        return chosen


def type_of(module: nn.Module) -> str:
    """ "Linear", "Conv1D" or "Conv2d" for a module that is one (or a subclass), else ""."""
    if isinstance(module, nn.Linear):
        return "Linear"
    if isinstance(module, nn.Conv2d) and not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "Conv2d"
    # By name, so that models of other libraries do not need transformers to be imported.
    is_conv1d = any(kind.__name__ == "Conv1D" and hasattr(module, "nf") for kind in type(module).__mro__)
    return "Conv1D" if is_conv1d else ""


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    fused = {
        id(part)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for part in module.modules()
    }
    return [(name, module) for name, module in model.named_modules() if id(module) not in fused]


def _dense_weights(model: nn.Module) -> list[Tensor]:
    """Weights of embeddings, and of the output layer that a transformers model names."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    named = getattr(model, "get_output_embeddings", lambda: None)()
    head = getattr(named, "weight", None)
    return [*tables, head] if isinstance(head, Tensor) else tables


def identity(tensor: Tensor) -> Any:
    """The same for tensors that share their memory."""
    start = tensor.data_ptr() if tensor.device.type != "meta" else 0
    return (start, tuple(tensor.shape)) if start else id(tensor)


@attrs.frozen(eq=False)
class Weight:
    """A parameter that may be pruned, seen as a matrix [out, in].

    Linear weights are that matrix. Conv1D stores it transposed. A Conv2d weight [out, in, h, w] becomes [out, h·w·in] with
    input channels last, so that consecutive columns are consecutive inputs, as N:M patterns mean. `owners` are the modules
    that use the parameter; the first gives its name.
    """

    name: str
    parameter: nn.Parameter
    owners: tuple[nn.Module, ...]

    @property
    def owner(self) -> nn.Module:
        """The module that the parameter is named after."""
        return self.owners[0]

    @property
    def type(self) -> str:
        """ "Linear", "Conv1D", "Conv2d", or "" for a parameter of another module."""
        return type_of(self.owner)

    @property
    def groups(self) -> int:
        """Groups of a grouped convolution: each has its own inputs and out / groups consecutive rows. 1 elsewhere."""
        return int(getattr(self.owner, "groups", 1)) if self.type == "Conv2d" else 1

    @property
    def inputs(self) -> int:
        """Consecutive inputs of one output: columns of a linear layer, input channels of a convolution's group."""
        return self.parameter.shape[1] if self.type == "Conv2d" else self.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        size = self.parameter.shape
        if self.type == "Conv1D":
            return size[1], size[0]
        return size[0], self.parameter.numel() // size[0]

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as [out, in]; shares memory except for convolutions wider than 1 × 1."""
        if self.type == "Conv1D":
            return tensor.T
        return tensor.movedim(1, -1).flatten(1) if tensor.ndim > 2 else tensor

    def as_parameter(self, matrix: Tensor) -> Tensor:
        """The inverse of `as_matrix`: [out, in] as a tensor of the parameter's shape."""
        if self.type == "Conv1D":
            return matrix.T
        size = self.parameter.shape
        if len(size) == 2:
            return matrix
        return matrix.reshape(size[0], *size[2:], size[1]).movedim(-1, 1)

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in], detached, in the parameter's dtype. Change it with `write`."""
        return self.as_matrix(self.parameter.detach())

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Set the weight from [out, in]; it is cast to the parameter's dtype."""
        self.parameter.copy_(self.as_parameter(matrix))

    def mask(self, keep: Tensor) -> Mask:
        """The mask of the parameter's own shape from bool [out, in]."""
        return Mask(self.as_parameter(keep).contiguous())

    @torch.no_grad()
    def apply(self, mask: Mask) -> None:
        """Set the weights outside the mask to zero; those inside stay as they are, bit for bit."""
        self.parameter.masked_fill_(~mask.keep.to(self.parameter.device), 0)


def prunable_weights(
    model: nn.Module, rule: Callable[[nn.Module], Mapping[str, nn.Parameter]] | None = None
) -> list[Weight]:
    """What a rule chooses, in the model's order. None is the rule's defaults.

    Raises `BadModel` when there is nothing to prune or a name is no parameter of the model, and `NumericalError` for weights
    that are not finite.
    """
    chosen = (rule or Rule())(model)
    if not chosen:
        raise BadModel(
            f"Nothing in this {type(model).__name__} may be pruned: it has no {', '.join(TYPES)} outside embeddings and output "
            "heads that the rule includes; give a rule with other `include` and `exclude` patterns."
        )
    users: dict[Any, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(identity(parameter), []).append(module)
    weights = []
    for name, parameter in chosen.items():
        try:
            owner = model.get_submodule(name.rpartition(".")[0])
            model.get_parameter(name)
        except AttributeError:
            raise BadModel(
                f"The model has no parameter {name!r}, which the rule names as prunable."
            ) from None
        others = [module for module in users[identity(parameter)] if module is not owner]
        weights.append(Weight(name, parameter, (owner, *others)))
    require_finite(weights)
    return weights


def require_finite(weights: list[Weight]) -> None:
    """Raise `NumericalError` that names the first weight with NaN or infinite entries."""
    for weight in weights:
        values = weight.parameter.detach()
        # A sum is not finite when a term is not; only then is it worth counting.
        if values.device.type == "meta" or bool(values.sum(dtype=torch.float32).isfinite()):
            continue
        if bad := int((~values.isfinite()).sum()):
            raise NumericalError(
                f"{weight.name} {tuple(values.shape)} has {bad} weights that are NaN or infinite; a model must be finite "
                "before it is pruned."
            )


def finish(
    model: nn.Module,
    weights: list[Weight],
    keep: Mapping[str, Tensor],
    history: Sequence[Mapping[str, float]] = (),
) -> PruneResult:
    """Zero what is not kept, and say what was: `keep` holds a bool [out, in] by each weight's name."""
    masks = {weight.name: weight.mask(keep[weight.name]) for weight in weights}
    for weight in weights:
        weight.apply(masks[weight.name])
    return PruneResult(model, masks, SparsityReport.of(masks), history)
