"""The database: each layer's weights at every level it can have, made once, each layer by itself.

A level is a fixed number of weights Δ, the same for every layer: removed(level) = removed(0) + level · Δ.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from maskwright import Budget, Pruner, PruneTask
from maskwright.errors import BadBudget, BadModel, BadParameter
from maskwright.toolkit.calibration import blocks_of, calibrate, outer_products
from maskwright.toolkit.patterns import keep_largest, removed_count
from maskwright.toolkit.prunable import Weight


@attrs.frozen(eq=False)
class Version:
    """A weight at one level: values in the parameter's shape, and what is kept of it, bool [out, in]."""

    values: Tensor
    keep: Tensor


@attrs.frozen(eq=False)
class Unit:
    """What has one level: a weight, or for a budget of layers the weights of a sub-block or block."""

    lowest: int
    versions: tuple[Mapping[str, Version], ...]
    """By level from `lowest` on; each by the weights' names."""

    def at(self, level: int) -> Mapping[str, Version]:
        """The weights at a level."""
        return self.versions[level - self.lowest]


# -- sparsity --------------------------------------------------------------------------------------------------------


def uniform_counts(sizes: Sequence[int], sparsity: float) -> list[int]:
    """Weights removed of each layer at level 0: the same share of each, adding up to what the sparsity removes of all."""
    ends = [removed_count(sum(sizes[:i]), sparsity) for i in range(len(sizes) + 1)]
    return [after - before for before, after in itertools.pairwise(ends)]


def default_difference(sizes: Sequence[int], sparsity: float, levels: int) -> int:
    """Δ = ½ · min(s, 1-s) / levels · hidden², with the median layer's size for hidden²; at least 1."""
    return max(1, int(0.5 * min(sparsity, 1 - sparsity) / levels * statistics.median_low(sizes)))


def level_range(size: int, removed: int, difference: int, levels: int) -> tuple[int, int]:
    """The lowest and the highest level of a layer: at most `levels` away, and no more is removed than there is."""
    return -min(removed // difference, levels), min((size - removed) // difference, levels)


def sparse_units(
    model: nn.Module,
    weights: list[Weight],
    task: PruneTask,
    pruner: Pruner,
    uniform: Sequence[int],
    difference: int,
    ranges: Sequence[tuple[int, int]],
) -> list[Unit]:
    """One unit for each weight: `uniform` weights are removed at level 0, and `difference` more at each level of its range.

    The pruner sees every layer alone, with the inputs it has in the dense model. Raises what the pruner raises.
    """
    places = {weight.name: place for place, weight in enumerate(weights)}
    made: dict[str, Unit] = {}

    def add(weight: Weight, products: Tensor | None) -> None:
        place = places[weight.name]
        lowest, highest = ranges[place]
        alone = _alone(weight, products)
        versions = [
            _version(weight, uniform[place] + level * difference, pruner, alone, task.generator)
            for level in range(lowest, highest + 1)
        ]
        made[weight.name] = Unit(lowest, tuple({weight.name: version} for version in versions))

    if "batches" in pruner.needs:
        for block in calibrate(model, weights, task, outer_products):
            for weight, products in block:
                add(weight, products)
    else:
        for weight in weights:
            add(weight, None)
    return [made[weight.name] for weight in weights]


Alone = Callable[[], tuple[nn.Module, list[dict[str, Tensor]]]]
"""Makes a model of one layer, with its calibration set."""


def root(products: Tensor) -> Tensor:
    """R [G, in, in] with RᵀR = XᵀX [G, in, in]: inputs that any second moment takes for X."""
    gram = products.double()
    factor, failed = torch.linalg.cholesky_ex(gram, upper=True)
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(gram)
        factor = values.clamp(min=0).sqrt()[..., None] * vectors.mT
    dead = gram.diagonal(dim1=1, dim2=2) == 0
    return factor.masked_fill(dead[:, None], 0)


def _alone(weight: Weight, products: Tensor | None) -> Alone:
    """A linear layer (for a grouped convolution a 1 × 1 one) with the weight's matrix in float32, and inputs for it."""
    matrix = weight.matrix.to(torch.promote_types(weight.parameter.dtype, torch.float32))
    rows, columns = matrix.shape
    groups = weight.groups
    batches = []
    if products is not None:
        inputs = root(products).to(matrix.dtype)
        # Group after group along the channels, one token at each place.
        inputs = inputs[0] if groups == 1 else inputs.mT.reshape(1, groups * columns, columns, 1)
        batches = [{"input": inputs}]

    def make() -> tuple[nn.Module, list[dict[str, Tensor]]]:
        # On "meta" no generator is asked for initial weights.
        layer: nn.Module
        if groups == 1:
            layer = nn.Linear(columns, rows, bias=False, device="meta")
            layer.weight = nn.Parameter(matrix.clone(), requires_grad=False)
        else:
            layer = nn.Conv2d(groups * columns, rows, 1, groups=groups, bias=False, device="meta")
            layer.weight = nn.Parameter(matrix[..., None, None].clone(), requires_grad=False)
        return nn.Sequential(layer), batches

    return make


@torch.no_grad()
def _version(weight: Weight, count: int, pruner: Pruner, alone: Alone, generator: torch.Generator) -> Version:
    dense = weight.matrix
    total = dense.numel()
    if count in (0, total):
        kept = torch.full(dense.shape, count == 0, device=dense.device)
        return Version(weight.as_parameter(dense * kept), kept)
    matrix, keep = _pruned(count, pruner, alone, generator)
    if missing := count - int((~keep).sum()):
        # A pruner that compares within rows rounds down in each: the rest is what it would remove next, smallest first.
        more = count + len(keep)
        next_ones = keep & ~_pruned(more, pruner, alone, generator)[1] if more < total else keep
        if not 0 < missing <= int(next_ones.sum()):
            raise BadParameter(
                f"evopress: the pruner {pruner.name!r} was asked to remove {count} of the {total} weights of {weight.name} and "
                f"removed {count - missing}; a level must be one that compares the weights of a layer or of a row."
            )
        smallness = torch.where(next_ones, -matrix.abs(), -torch.inf)
        keep = keep & ~keep_largest(smallness.reshape(1, -1), missing).view(keep.shape)
        matrix = matrix.masked_fill(~keep, 0)
    return Version(weight.as_parameter(matrix.to(dense.dtype)).contiguous(), keep)


def _pruned(count: int, pruner: Pruner, alone: Alone, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The matrix [out, in] with `count` of its weights removed, and what is kept."""
    model, batches = alone()
    name = "0.weight"
    # Half a weight more than asked for: whatever a float does, rounding down gives the count.
    budget = Budget(sparsity=(count + 0.5) / model.get_parameter(name).numel())
    task = PruneTask(
        budget, batches, generator=generator, prunable=lambda one: {name: one.get_parameter(name)}
    )
    keep = pruner.prune(model, task).masks[name].keep
    return model.get_parameter(name).detach().flatten(1), keep.flatten(1)


# -- layers ----------------------------------------------------------------------------------------------------------


def dropped_units(
    model: nn.Module, weights: list[Weight], kept: int, *, whole: bool
) -> tuple[list[Unit], list[int], int]:
    """Units that are there (level 0) or removed (1), the group of each, and how many of a group are to be removed.

    Groups are attention (0) and the rest (1) of each block; with `whole` there is one, of blocks. Raises `BadModel` for models
    without such blocks and `BadBudget` when it has fewer.
    """
    owners = {id(owner) for weight in weights for owner in weight.owners}
    blocks = [(block, inside) for block, inside in blocks_of(model, weights) if id(block) not in owners]
    if not blocks:
        raise BadModel(
            f"evopress drops entries of a list of blocks, and this {type(model).__name__} has none with prunable weights; give a "
            "sparsity instead."
        )
    if kept > len(blocks):
        raise BadBudget(f"The model has {len(blocks)} layers, so that {kept} cannot be kept; give fewer.")
    units, groups = [], []
    for block, inside in blocks:
        paths = {id(module): path.lower() for path, module in block.named_modules()}
        attention = [weight for weight in inside if "att" in paths.get(id(weight.owner), "")]
        rest = [weight for weight in inside if not any(weight is one for one in attention)]
        parts = [inside] if whole else [attention, rest]
        if not all(parts):
            raise BadModel(
                f"A {type(block).__name__} has no attention beside other weights; set drop='blocks' to drop it as a whole."
            )
        units += [_dropped(part) for part in parts]
        groups += range(len(parts))
    return units, groups, len(blocks) - kept


def _dropped(weights: list[Weight]) -> Unit:
    there = {
        one.name: Version(one.parameter.detach(), torch.ones_like(one.matrix, dtype=torch.bool))
        for one in weights
    }
    gone = {
        name: Version(torch.zeros_like(one.values), torch.zeros_like(one.keep)) for name, one in there.items()
    }
    return Unit(0, (there, gone))
