"""N:M patterns on weights whose inputs M does not divide: refused, left dense, or padded, for every pruner alike.

- "refuse" raises `BadBudget` that names the first such weight.
- "skip" leaves these weights out of what may be pruned.
- "pad" prunes them as if inputs that are always zero filled their last group, which is how they are stored for sparse kernels:
  meanwhile the weights have columns of zeros more, and what reaches their modules as many zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import attrs
import torch
from torch import Tensor, nn

from maskwright.errors import BadBudget
from maskwright.mask import Mask
from maskwright.protocols import Budget, Pruner, PruneResult, PruneTask, SparsityReport
from maskwright.toolkit.patterns import require_divisible
from maskwright.toolkit.prunable import Rule, Weight, prunable_weights

Remainder: TypeAlias = Literal["refuse", "skip", "pad"]

_Choose: TypeAlias = Callable[[nn.Module], dict[str, nn.Parameter]]


def uneven(weights: Sequence[Weight], budget: Budget | None) -> list[Weight]:
    """The weights whose inputs a pattern does not divide; none for other budgets."""
    if budget is None or budget.kind != "pattern":
        return []
    group = budget.n_of_m[1]
    return [weight for weight in weights if weight.inputs % group]


DONE = {"skip": "skipped", "pad": "padded"}


def told(odd: Sequence[Weight], budget: Budget | None, remainder: Remainder) -> str:
    """A sentence for people: which weights the pattern does not divide, and what is done about them."""
    done = {"skip": "they stay dense", "pad": "their last group is filled up with zeros"}[remainder]
    shown = ", ".join(f"{weight.name} ({weight.inputs} inputs)" for weight in odd[:3])
    more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
    return f"The {budget} does not divide the inputs of {shown}{more}: {done}, as prunable.remainder={remainder} says"


def fitting(rule: _Choose | None, budget: Budget | None, remainder: Remainder) -> _Choose:
    """The rule, with "skip" without the weights that the pattern does not divide. The result raises `BadBudget` when none is left."""
    chosen = rule or Rule()
    if remainder != "skip" or budget is None or budget.kind != "pattern":
        return chosen

    def even(model: nn.Module) -> dict[str, nn.Parameter]:
        weights = prunable_weights(model, chosen)
        skipped = {weight.name for weight in uneven(weights, budget)}
        left = {weight.name: weight.parameter for weight in weights if weight.name not in skipped}
        if not left:
            raise BadBudget(
                f"{budget} divides the inputs of none of the {len(weights)} weights that may be pruned, so that skipping leaves "
                "nothing; use another pattern, or pad."
            )
        return left

    return even


def prune(pruner: Pruner, model: nn.Module, task: PruneTask, remainder: Remainder = "refuse") -> PruneResult:
    """`pruner.prune(model, task)`, with what the pattern does not divide refused, skipped or padded.

    Masks are of the parameters' own shapes. Of a padded weight's last group at most N stay; a pruner that draws may spend some of
    them on the padding. Raises what the pruner raises.
    """
    rule = fitting(task.prunable, task.budget, remainder)
    weights = uneven(prunable_weights(model, rule), task.budget)
    if not weights:
        return pruner.prune(model, attrs.evolve(task, prunable=rule))
    assert task.budget is not None
    if remainder == "refuse":
        require_divisible(weights, task.budget)
    with _padded(model, weights, task.budget.n_of_m[1]):
        result = pruner.prune(model, attrs.evolve(task, prunable=rule))
    sizes = {weight.name: weight for weight in weights}
    masks = {name: _cut(sizes[name], mask) if name in sizes else mask for name, mask in result.masks.items()}
    return attrs.evolve(result, masks=masks, report=SparsityReport.of(masks))


def _cut(weight: Weight, mask: Mask) -> Mask:
    return Mask(mask.keep.narrow(_inputs_dim(weight), 0, weight.inputs).contiguous())


def _inputs_dim(weight: Weight) -> int:
    return 0 if weight.type == "Conv1D" else 1


@contextmanager
def _padded(model: nn.Module, weights: Sequence[Weight], group: int) -> Iterator[None]:
    """The weights with columns of zeros up to a multiple of `group`; afterwards the same parameters again, with their new values."""
    stored: list[tuple[Weight, nn.Parameter]] = []
    hooks: list[Any] = []
    try:
        for weight in weights:
            more, parameter = -weight.inputs % group, weight.parameter
            dim = _inputs_dim(weight)
            size = list(parameter.shape)
            size[dim] = more
            zeros = parameter.detach().new_zeros(size)
            longer = nn.Parameter(torch.cat([parameter.detach(), zeros], dim), parameter.requires_grad)
            stored.append((weight, parameter))
            for owner in weight.owners:
                owner.weight = longer
                hooks.append(owner.register_forward_pre_hook(_zeros_after(weight, more), prepend=True))
                _widen(owner, more * weight.groups)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, parameter in stored:
            longest = weight.owner.weight
            assert isinstance(longest, nn.Parameter)
            with torch.no_grad():
                parameter.copy_(longest.narrow(_inputs_dim(weight), 0, weight.inputs))
            for owner in weight.owners:
                owner.weight = parameter
                _widen(owner, -(-weight.inputs % group) * weight.groups)


def _widen(owner: nn.Module, more: int) -> None:
    """Let a layer's own number of inputs say what its weight has."""
    for name in ("in_features", "in_channels", "nx"):
        if isinstance(getattr(owner, name, None), int):
            setattr(owner, name, getattr(owner, name) + more)


def _zeros_after(weight: Weight, more: int) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    """A hook that gives a module inputs [..., in + more], or [B, groups · (in + more), H, W]."""

    def pad(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        if weight.type != "Conv2d":
            return (nn.functional.pad(x, (0, more)), *args[1:])
        grouped = x.unflatten(-3, (weight.groups, -1))
        return (nn.functional.pad(grouped, (0, 0, 0, 0, 0, more)).flatten(-4, -3), *args[1:])

    return pad


__all__ = ["DONE", "Remainder", "fitting", "prune", "told", "uneven"]
