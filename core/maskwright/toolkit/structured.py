"""Channels that leave a model together, so that it becomes smaller: units of an MLP, filters of a convolution, attention heads.

Which parts of which weights belong to a channel is found by the dependency graph of torch-pruning (Fang et al.,
arXiv:2301.12900), which also takes them out. Here is decided which channels may go, and how many:

- Every weight that makes a channel must be one that may be pruned. Weights that read it lose its column, whatever they are.
- Channels of a model of transformers go in equal numbers wherever one number of its config stands for them, so that the config
  describes the smaller model too. What no number of the config describes stays whole. Other models have no such bounds.
- The same share of every kind of channel is kept, the largest with which the budget is met.

Masks are of the shapes that the model had: applied to the dense model they give the outputs of the small one, which is tested
before anything is changed. All is tried on a copy: meanwhile the model is in memory twice.
"""

from __future__ import annotations

import bisect
import copy
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskwright.errors import BadBudget, BadData, BadModel, UsageError
from maskwright.mask import Mask
from maskwright.protocols import Batch, Budget, PruneResult, PruneTask, SparsityReport
from maskwright.toolkit.calibration import evaluating, run
from maskwright.toolkit.prunable import Rule, prunable_weights

INSTALL = "pip install 'maskwright[structured]'"
_ATTEMPTS = 8
"""Times that the plan is made smaller when counting the FLOPs of its result shows more than were planned."""

# -- what is counted -------------------------------------------------------------------------------------------------


def parameter_count(model: nn.Module) -> int:
    """Numbers in all parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flop_count(model: nn.Module, batch: Batch) -> int:
    """Floating point operations of matrix products and convolutions on the first sample of a batch (torch.utils.flop_counter)."""
    return sum(_flops_by_module(model, batch).values())


@torch.no_grad()
def _flops_by_module(model: nn.Module, batch: Batch) -> dict[str, int]:
    """The operations that each module does itself, beside those of modules inside it."""
    # Fused attention is not counted on every device; its plain form is.
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(model, _rows(batch, 1))
    root = f"{type(model).__name__}"
    totals = {
        name.removeprefix(root).removeprefix("."): sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if name.partition(".")[0] == root
    }
    totals[""] = int(counter.get_total_flops())
    own = dict(totals)
    for name, total in totals.items():
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            if parent in own:
                own[parent] -= total
                break
    return own


def _rows(batch: Batch, count: int) -> dict[str, Tensor]:
    """The first samples, without labels: a model's own loss is nothing to count or to follow."""
    return {name: column[:count] for name, column in batch.items() if name != "labels"}


# -- channels --------------------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Part:
    """What a parameter has of each channel: along `dim`, the indices `places` [channels, k]."""

    name: str
    dim: int
    places: Tensor


@attrs.frozen(eq=False)
class Channels:
    """Channels of which each leaves several parameters at once; `name` is the module that makes them."""

    name: str
    size: int
    parts: tuple[Part, ...]

    @property
    def dims(self) -> set[tuple[str, int]]:
        """(parameter, dimension) of every part."""
        return {(part.name, part.dim) for part in self.parts}

    def squares(self, model: nn.Module) -> Tensor:
        """float32 [channels]: the sum of squares of all weights, without biases and norms, that leave with each channel."""
        total = torch.zeros(self.size)
        for part in self.parts:
            weight = model.get_parameter(part.name).detach()
            if weight.ndim > 1:
                others = [dim for dim in range(weight.ndim) if dim != part.dim]
                of_index = weight.float().square().sum(others).cpu()
                total += of_index[part.places].sum(1)
        return total


@attrs.frozen(eq=False)
class Axis:
    """A number that may become smaller: `value` at first, in multiples of `step`; it stands for the size of all `channels`.

    `fields` are the places in a model's config that hold it, and `fixed` what that must say beside.
    """

    name: str
    value: int
    step: int
    channels: tuple[Channels, ...]
    fields: tuple[tuple[Any, ...], ...] = ()
    fixed: Mapping[str, int] = attrs.field(factory=dict)

    def unit(self, channels: Channels) -> int:
        """Consecutive channels that stay or go together: those of an attention head; elsewhere each is on its own."""
        return channels.size // self.value if self.fixed else 1

    def kept(self, channels: Channels, value: int) -> int:
        """How many of the channels stay at a value."""
        return channels.size * value // self.value


def find_axes(
    model: nn.Module,
    batch: Batch,
    rule: Callable[[nn.Module], Mapping[str, nn.Parameter]] | None = None,
    graph: Any = None,
) -> list[Axis]:
    """What may become smaller in a model. `model` is traced in evaluation mode, and must have its gradients enabled.

    Raises `BadModel` when nothing may, and `UsageError` without torch-pruning.
    """
    allowed = {weight.name for weight in prunable_weights(model, rule) if len(weight.owners) == 1}
    described = _described(model) if _has_config(model) else None
    wanted = None if described is None else {dim for axis in described for dim in axis[2]}
    found = list(_channels(graph or traced(model, batch), model, allowed, wanted))
    if described is None:
        axes = [Axis(one.name, one.size, 1, (one,)) for one in found if one.size > 1]
        reason = "no channel lies between two of the weights that may be pruned"
    else:
        axes = []
        for fields, value, dims, fixed in described:
            mine = [one for one in found if one.dims <= dims]
            covered: set[tuple[str, int]] = set().union(*(one.dims for one in mine))
            if mine and covered == dims:
                step = math.lcm(*(value // math.gcd(value, one.size) for one in mine))
                name = " and ".join(".".join(map(str, field)) for field in fields)
                if value > step:
                    axes.append(Axis(name, value, step, tuple(mine), fields, fixed))
        reason = "no number in its config stands for channels that may all be pruned, so that transformers could not load a smaller one"
    if not axes:
        raise BadModel(
            f"No channels can be removed from this {type(model).__name__}: {reason}; prune single weights with a sparsity or a "
            "pattern instead."
        )
    return axes


def traced(model: nn.Module, batch: Batch) -> Any:
    """torch-pruning's dependency graph, followed back from every output."""
    tp = _torch_pruning()

    def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
        # A step after the last layer marks what reaches the output, whose size must stay.
        return [one.clone() for one in _tensors(run(model, batch)) if one.grad_fn is not None]

    with evaluating(model), torch.enable_grad():
        return tp.DependencyGraph().build_dependency(
            model, _rows(batch, 2), forward_fn=outputs, verbose=False
        )


def _torch_pruning() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError:
        raise UsageError(
            f"Removing channels needs torch-pruning, which is not installed: {INSTALL}"
        ) from None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _channels(
    graph: Any, model: nn.Module, allowed: set[str], wanted: set[tuple[str, int]] | None
) -> Iterator[Channels]:
    """The groups of the graph whose makers are all allowed and that end at nothing but layers that may lose a column."""
    names = {id(module): name for name, module in model.named_modules()}
    seen: set[str] = set()
    for name, module in model.named_modules():
        weight = f"{name}.weight" if name else "weight"
        if (
            weight not in allowed
            or weight in seen
            or module not in graph.module2node
            or (wanted is not None and (weight, 0) not in wanted)
        ):
            continue
        handler = graph.get_pruner_of_module(module)
        size = handler.get_out_channels(module)
        group = graph.get_pruning_group(module, handler.prune_out_channels, list(range(size)))
        parts = _parts(graph, group, names, size, model)
        makers = {part.name for part in parts or () if part.dim == 0 and _is_weight(model, part)}
        seen |= makers | {weight}
        if parts and makers <= allowed and any(part.dim == 1 for part in parts):
            yield Channels(name, size, tuple(parts))


def _separable(module: nn.Module) -> bool:
    """Whether a layer treats its channels one by one, so that some may go."""
    convolution = isinstance(module, nn.modules.conv._ConvNd) and not module.transposed
    return convolution or isinstance(module, nn.Linear | nn.modules.batchnorm._BatchNorm)


def _is_weight(model: nn.Module, part: Part) -> bool:
    return model.get_parameter(part.name).ndim > 1


def _parts(
    graph: Any, group: Any, names: Mapping[int, str], size: int, model: nn.Module
) -> list[Part] | None:
    """The parts of a group; None for one that reaches an output, or something that is not independent in its channels."""
    parts: dict[tuple[str, int], Part] = {}
    for item in group.items:
        module, indices, roots = item.dep.target.module, item.idxs, item.root_idxs
        kind = item.dep.target.type.name if hasattr(item.dep.target.type, "name") else ""
        if id(module) not in names:
            if kind in ("PARAMETER", "OUTPUT", "EXPAND", "UNBIND"):
                return None
            continue  # an operation without parameters
        if not _separable(module):
            return None
        out = graph.is_out_channel_pruning_fn(item.dep.handler)
        if getattr(module, "groups", 1) > 1:
            if not module.groups == module.in_channels == module.out_channels:
                return None
            out = True
        if len(indices) % size or len(set(indices)) != len(indices):
            return None
        order = torch.tensor(roots).argsort(stable=True)
        if not torch.equal(
            torch.tensor(roots)[order], torch.arange(size).repeat_interleave(len(indices) // size)
        ):
            return None
        places = torch.tensor(indices)[order].view(size, -1)
        for own, _ in module.named_parameters(recurse=False):
            if not out and own == "bias":
                continue
            name = f"{names[id(module)]}.{own}".lstrip(".")
            parts[name, 0 if out else 1] = Part(name, 0 if out else 1, places)
    return list(parts.values())


# -- what a config of transformers can say ---------------------------------------------------------------------------


def _has_config(model: nn.Module) -> bool:
    return callable(getattr(getattr(model, "config", None), "to_dict", None))


_Described = tuple[tuple[tuple[Any, ...], ...], int, set[tuple[str, int]], dict[str, int]]


def _described(model: Any) -> list[_Described]:
    """(fields, value, the dimensions that follow, fixed) of each number of the config that some sizes are proportional to.

    It is found by doubling the number and looking at the shapes of the model that its class then makes (without memory). Numbers
    that only work when they change together, such as a ResNet's first two widths, are one.
    """
    plain = _shapes(model.config, type(model))
    mine = {name: tuple(one.shape) for name, one in model.named_parameters()}
    if plain is None or any(plain.get(name) != shape for name, shape in mine.items()):
        return []
    # Widths that embeddings and layer norms share cannot shrink; the graph would follow them through the whole model for nothing.
    whole = {
        f"{name}.{own}".lstrip(".")
        for name, module in model.named_modules()
        if not _separable(module)
        for own, _ in module.named_parameters(recurse=False)
    }
    rows = {shape[0] for shape in mine.values()}
    found: list[_Described] = []
    rejected: dict[int, list[tuple[Any, ...]]] = {}
    for field, value in _numbers(model.config):
        if not any(size % value == 0 or value % size == 0 for size in rows):
            continue
        fixed = _head_size(model.config) if field == ("num_attention_heads",) else {}
        if fixed is None:
            continue
        dims = _following(model, [field], value, fixed, plain, mine)
        if dims is None:
            rejected.setdefault(value, []).append(field)
        elif dims and not any(name in whole for name, _ in dims):
            found.append(((field,), value, dims, fixed))
    for value, fields in rejected.items():
        if len(fields) > 1 and (dims := _following(model, fields, value, {}, plain, mine)):
            found.append((tuple(fields), value, dims, {}))
    return found


def _numbers(config: Any) -> Iterator[tuple[tuple[Any, ...], int]]:
    for name, value in config.to_dict().items():
        if name in ("num_hidden_layers", "num_key_value_heads", "head_dim") or name.endswith("_token_id"):
            continue
        entries = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, one in entries:
            if isinstance(one, int) and not isinstance(one, bool) and one > 1:
                yield ((name,) if index is None else (name, index)), one


def _head_size(config: Any) -> dict[str, int] | None:
    """What fixes the size of a head while their number changes; None where heads are shared or turned by positions."""
    if hasattr(config, "num_key_value_heads") or hasattr(config, "rope_parameters"):
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"head_dim": int(size)}


def _following(
    model: Any,
    fields: Sequence[tuple[Any, ...]],
    value: int,
    fixed: Mapping[str, int],
    plain: Mapping[str, tuple[int, ...]],
    mine: Mapping[str, tuple[int, ...]],
) -> set[tuple[str, int]] | None:
    """Dimensions that double with the fields; None when anything else changes."""
    doubled = _shapes(model.config, type(model), lambda config: _set(config, fields, 2 * value, fixed))
    if doubled is None or doubled.keys() != plain.keys():
        return None
    dims = set()
    for name, shape in mine.items():
        if len(doubled[name]) != len(shape):
            return None
        for dim, (before, after) in enumerate(zip(shape, doubled[name])):
            if after == 2 * before:
                dims.add((name, dim))
            elif after != before:
                return None
    return dims


def _set(config: Any, fields: Sequence[tuple[Any, ...]], value: int, fixed: Mapping[str, int]) -> None:
    for name, size in fixed.items():
        setattr(config, name, size)
    for name, *index in fields:
        if index:
            entries = list(getattr(config, name))
            entries[index[0]] = value
            setattr(config, name, entries)
        else:
            setattr(config, name, value)


def _shapes(
    config: Any, kind: Any, change: Callable[[Any], None] = lambda config: None
) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the parameters of a model of this config after a change; None where there can be none."""
    config = copy.deepcopy(config)
    try:
        change(config)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            made = kind(config)
    except Exception:  # configs and models raise anything for numbers that they do not like
        return None
    return {name: tuple(one.shape) for name, one in made.named_parameters()}


# -- how many stay ---------------------------------------------------------------------------------------------------


Plan = dict[str, int]
"""The value of each axis, by its name."""


@attrs.frozen(eq=False)
class Costs:
    """What a model would cost at a plan, from the shapes alone."""

    axes: Sequence[Axis]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: int
    flops: Mapping[str, int]

    def of(self, kind: str, plan: Plan) -> float:
        """Parameters or FLOPs."""
        left = self._left(plan)
        if kind == "params":
            return self.parameters - sum(
                math.prod(self.shapes[name]) - math.prod(shape) for name, shape in left.items()
            )
        shares = {
            name.removesuffix(".weight"): math.prod(a / b for a, b in zip(shape, self.shapes[name]))
            for name, shape in left.items()
            if len(shape) > 1
        }
        for axis in self.axes:
            for channels in axis.channels:
                # What modules around the channels do with them themselves, such as attention.
                around = _around(channels)
                shares.setdefault(around, axis.kept(channels, plan[axis.name]) / channels.size)
        return sum(count * (shares.get(name, 1.0) if name else 1.0) for name, count in self.flops.items())

    def _left(self, plan: Plan) -> dict[str, list[int]]:
        left: dict[str, list[int]] = {}
        for axis in self.axes:
            for channels in axis.channels:
                gone = channels.size - axis.kept(channels, plan[axis.name])
                for part in channels.parts:
                    shape = left.setdefault(part.name, list(self.shapes[part.name]))
                    shape[part.dim] -= gone * part.places.shape[1]
        return left


def _around(channels: Channels) -> str:
    """The innermost module that holds every part."""
    paths = [part.name.split(".")[:-2] for part in channels.parts]
    common = []
    for level in zip(*paths):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def fit(axes: Sequence[Axis], cost: Callable[[Plan], float], allowed: float) -> Plan:
    """The largest plan with one share for every axis whose cost is at most `allowed`; what is left over goes to single axes, the
    step that costs most first.

    Raises `BadBudget` when even one step of every axis costs more.
    """

    def at(share: float) -> Plan:
        return {
            axis.name: max(1, math.floor(share * axis.value / axis.step + 1e-9)) * axis.step for axis in axes
        }

    if cost(at(0.0)) > allowed:
        raise _TooSmall(cost(at(0.0)))
    shares = sorted({k * axis.step / axis.value for axis in axes for k in range(axis.value // axis.step + 1)})
    most = bisect.bisect_right(shares, allowed, key=lambda share: cost(at(share)))
    plan = at(shares[max(most - 1, 0)])
    while True:
        larger = [
            (cost(more), more)
            for axis in axes
            if plan[axis.name] + axis.step <= axis.value
            for more in [{**plan, axis.name: plan[axis.name] + axis.step}]
        ]
        fitting = [one for one in larger if one[0] <= allowed]
        if not fitting:
            return plan
        plan = max(fitting, key=lambda one: one[0])[1]


class _TooSmall(Exception):
    """The least that can be reached."""

    def __init__(self, least: float) -> None:
        super().__init__(least)
        self.least = least


# -- removing --------------------------------------------------------------------------------------------------------


def prune_channels(
    model: nn.Module,
    task: PruneTask,
    budget: Budget,
    scores: Callable[[nn.Module, Channels], Tensor],
) -> PruneResult:
    """Remove the channels with the lowest scores [channels] until a budget of params or flops is met, in place.

    The share is of all parameters of the model, or of all its FLOPs on the first sample. What is kept of everything is equal, and of equal scores
    the lower channel stays. Facts of the result are the parameters and FLOPs before and after, counted. Raises `BadModel` for a
    model that cannot become smaller or would compute something else, `BadBudget` for one that cannot become so small, `BadData`
    without batches; the model is then as it was.
    """
    if not task.batches:
        raise BadData(
            "The calibration set is empty: give at least one batch, on which the model's channels are followed."
        )
    batch = task.batches[0]
    by_module = _flops_by_module(model, batch)
    dense = {"params": parameter_count(model), "flops": sum(by_module.values())}
    small = copy.deepcopy(model).requires_grad_(True)
    graph = traced(small, batch)
    axes = find_axes(small, batch, task.prunable, graph)
    shapes = {name: tuple(one.shape) for name, one in small.named_parameters()}
    costs = Costs(axes, shapes, dense["params"], by_module)
    allowed = limit = float(getattr(budget, budget.kind)) * dense[budget.kind]
    for _ in range(_ATTEMPTS):
        try:
            plan = fit(axes, lambda plan: costs.of(budget.kind, plan), limit)
        except _TooSmall as error:
            raise BadBudget(
                f"Budget {budget} cannot be met: with the least that may stay of {', '.join(axis.name for axis in axes[:4])}, "
                f"{error.least / dense[budget.kind]:.3f} of the {budget.kind} are left; ask for that or more."
            ) from None
        gone = _lowest(model, axes, plan, scores)
        remove(small, graph, axes, plan, gone)
        after = {"params": parameter_count(small), "flops": flop_count(small, batch)}
        if after[budget.kind] <= allowed:
            break
        limit *= allowed / after[budget.kind] * (1 - 1e-6)
        small = copy.deepcopy(model).requires_grad_(True)
        graph = traced(small, batch)
    else:
        raise BadModel(
            f"The FLOPs of this {type(model).__name__} do not follow its channels; ask for a budget of params."
        )
    masks = _masks(model, task, axes, gone)
    _require_same_function(model, small, batch, masks)
    _become(model, small)
    return PruneResult(
        model,
        masks,
        SparsityReport.of(masks),
        facts={
            "dense_parameters": dense["params"],
            "parameters": after["params"],
            "dense_flops": dense["flops"],
            "flops": after["flops"],
        },
    )


def _lowest(
    model: nn.Module,
    axes: Sequence[Axis],
    plan: Plan,
    scores: Callable[[nn.Module, Channels], Tensor],
) -> dict[str, Tensor]:
    """The channels that go, int64 and ascending, by the name of what makes them."""
    gone = {}
    for axis in axes:
        for channels in axis.channels:
            unit = axis.unit(channels)
            of_unit = scores(model, channels).view(-1, unit).sum(1)
            count = (channels.size - axis.kept(channels, plan[axis.name])) // unit
            order = of_unit.flip(0).sort(stable=True).indices
            lowest = (len(of_unit) - 1 - order)[:count].sort().values
            gone[channels.name] = (lowest[:, None] * unit + torch.arange(unit)).flatten()
    return gone


def remove(
    model: nn.Module, graph: Any, axes: Sequence[Axis], plan: Plan, gone: Mapping[str, Tensor]
) -> None:
    """Take channels out of the model that a graph is of, with torch-pruning, and say so in the model's config."""
    for axis in axes:
        for channels in axis.channels:
            if not len(gone[channels.name]):
                continue
            module = model.get_submodule(channels.name)
            handler = graph.get_pruner_of_module(module).prune_out_channels
            graph.get_pruning_group(module, handler, gone[channels.name].tolist()).prune(record_history=False)
        if axis.fields:
            _set(model.config, axis.fields, plan[axis.name], axis.fixed)


def _become(model: Any, small: Any) -> None:
    """Give a model the parameters, buffers, sizes and config of a smaller copy of it; the rest of it stays as it is."""
    for mine, other in zip(model.modules(), small.modules(), strict=True):
        for name, parameter in other.named_parameters(recurse=False):
            before = mine.get_parameter(name)
            if before.shape != parameter.shape:
                setattr(mine, name, nn.Parameter(parameter.detach(), before.requires_grad))
        for name, buffer in other.named_buffers(recurse=False):
            if mine.get_buffer(name).shape != buffer.shape:
                setattr(mine, name, buffer)
        for name, value in vars(other).items():
            if isinstance(value, int) and not isinstance(value, bool):
                setattr(mine, name, value)
    if _has_config(model):
        # Modules share one config: it is changed, not replaced.
        vars(model.config).update(vars(small.config))


def _masks(
    model: nn.Module, task: PruneTask, axes: Sequence[Axis], gone: Mapping[str, Tensor]
) -> dict[str, Mask]:
    """A mask for each weight that may be pruned and each that loses something, in the shapes of the dense model."""
    chosen = (task.prunable or Rule())(model)
    keep = {name: torch.ones(one.shape, dtype=torch.bool) for name, one in chosen.items()}
    for axis in axes:
        for channels in axis.channels:
            for part in channels.parts:
                parameter = model.get_parameter(part.name)
                if parameter.ndim > 1 and len(gone[channels.name]):
                    mask = keep.setdefault(part.name, torch.ones(parameter.shape, dtype=torch.bool))
                    mask.index_fill_(part.dim, part.places[gone[channels.name]].flatten(), False)
    return {name: Mask(one) for name, one in keep.items()}


@torch.no_grad()
def _require_same_function(
    model: nn.Module, small: nn.Module, batch: Batch, masks: Mapping[str, Mask]
) -> None:
    """Raise `BadModel` unless the small model gives what the dense one gives under the masks, and its config describes it."""
    if _has_config(small):
        shapes = _shapes(small.config, type(small)) or {}
        other = next(
            (name for name, one in small.named_parameters() if shapes.get(name) != tuple(one.shape)), None
        )
        if other is not None:
            raise BadModel(
                f"The config of this {type(model).__name__} does not describe the smaller model: {other} differs; ask for another budget."
            )
    rows = _rows(batch, 2)
    masked = {
        name: one.detach().masked_fill(~masks[name].keep.to(one.device), 0)
        for name, one in model.named_parameters()
        if name in masks and not bool(masks[name].keep.all())
    }
    answers = []
    for one, state in ((model, masked), (small, {})):
        with evaluating(one), _holding(one, state):
            answers.append([value.float() for value in _tensors(run(one, rows)) if value.is_floating_point()])
    precision = torch.finfo(next(model.parameters()).dtype).eps ** 0.5
    for here, there in zip(*answers, strict=True):
        if here.shape != there.shape or (here - there).abs().max() > precision * here.abs().max().clamp(
            min=1
        ):
            raise BadModel(
                f"Without these channels this {type(model).__name__} computes something else than with their weights at zero, "
                "because something in it does not treat its channels one by one; prune single weights instead."
            )


@contextmanager
def _holding(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values in a model's parameters for a while."""
    before = {name: model.get_parameter(name).data for name in state}
    try:
        for name, value in state.items():
            model.get_parameter(name).data = value
        yield
    finally:
        for name, value in before.items():
            model.get_parameter(name).data = value
