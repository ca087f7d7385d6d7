"""What prunable weights receive: statistics of their inputs, block after block, with pruned blocks feeding the next.

    for block in calibrate(model, weights, task, squared_norms):
        for weight, statistic in block:
            ...  # prune the weight here: what follows sees the pruned block

A block of a transformer is run on what the block before it put out; where a model does not hand one block's output to the
next, the whole model is run for each, up to the block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor, nn

from maskwright.errors import BadData, NumericalError
from maskwright.protocols import Batch, PruneTask
from maskwright.toolkit.prunable import Weight, type_of

Measure: TypeAlias = Callable[[Tensor], Tensor]
"""What is summed over tokens: inputs [G, T, in] of G groups (1 but for grouped convolutions) → [G, ...]."""

COLUMNS = {"tokens": "input_ids", "pixels": "pixel_values"}
"""Batch columns by what transformers calls them."""


def squared_norms(inputs: Tensor) -> Tensor:
    """[G, T, in] → [G, in]: the squared 2-norm of each input over the tokens, in float32."""
    return inputs.float().square().sum(1)


def outer_products(inputs: Tensor) -> Tensor:
    """[G, T, in] → [G, in, in]: XᵀX over the tokens, in float32."""
    rows = inputs.float()
    return rows.transpose(1, 2) @ rows


def inputs_of(module: nn.Module, x: Tensor) -> Tensor:
    """A module's input as [G, T, in], in the order of the columns of `Weight.matrix`.

    Convolutions see one token at each place of their output: [B, C, H, W] is unfolded, input channels last.
    """
    if not isinstance(module, nn.Conv2d):
        return x.reshape(1, -1, x.shape[-1])
    x = x if x.ndim == 4 else x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    unfolded = nn.functional.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)
    batch, groups, places = len(x), module.groups, unfolded.shape[-1]
    pieces = unfolded.view(batch, groups, module.in_channels // groups, -1, places)
    return pieces.permute(1, 0, 4, 3, 2).reshape(groups, batch * places, -1)


def run(model: nn.Module, batch: Batch, task: PruneTask | None = None) -> Any:
    """The model on a batch: through the task's loss, or called with the columns that its forward names.

    A model whose forward names none is given the first column.
    """
    batch = on_device(model, batch)
    if task is not None and task.loss is not None:
        return task.loss(model, batch)
    legal = inspect.signature(model.forward).parameters
    named = {COLUMNS.get(name, name): column for name, column in batch.items()}
    given = {name: column for name, column in named.items() if name in legal}
    return model(**given) if given else model(next(iter(batch.values())))


def on_device(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The batch where the model's parameters are."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return {name: column.to(device) for name, column in batch.items()}


def calibrate(
    model: nn.Module,
    weights: Sequence[Weight],
    task: PruneTask,
    measure: Measure,
    *,
    sequential: bool = False,
) -> Iterator[list[tuple[Weight, Tensor]]]:
    """For each block, in the order in which the model runs them: its weights with their statistics over `task.batches`.

    A statistic is the running mean over sequences (rows of 3-D inputs, images) of what `measure` sums over their tokens,
    [G, ...] in float32. All statistics of a block are taken while it is still dense; with `sequential`, weights that the
    block uses later see those before them pruned, and each group with one input is yielded on its own. The model is in
    evaluation mode meanwhile. Raises `BadData` without batches and for weights that the model does not use, and
    `NumericalError` for inputs that are not finite.
    """
    if not task.batches:
        raise BadData("The calibration set is empty: give at least one batch.")
    with evaluating(model):
        plan = _plan(model, weights, task)
        streams = _capture(model, plan, task) if plan.chained else []
        for block in plan.blocks:
            for part in block.parts if sequential else [block.weights]:
                yield _measured(model, block, part, plan, streams, task, measure)
            for stream in streams:
                stream.advance(block)


# -- the order in which a model runs its blocks ------------------------------------------------------------------


class _Stop(Exception):
    """Raised by a hook when the rest of a forward is of no interest."""


@attrs.define(eq=False)
class _Block:
    """A module whose weights are pruned together; `parts` groups them by their input, in order of use."""

    module: nn.Module
    weights: list[Weight]
    parts: list[list[Weight]] = attrs.field(factory=list)
    calls: int = 0


@attrs.frozen(eq=False)
class _Plan:
    blocks: list[_Block]
    chained: bool
    """Whether each block's input is the output of the block before it, and depends on pruned weights in no other way."""


def blocks_of(model: nn.Module, weights: Sequence[Weight]) -> list[tuple[nn.Module, list[Weight]]]:
    """The modules that are pruned one after the other, with their weights, in the model's order.

    A block is an entry of an outermost list of modules of one class (a transformer's layers, a ResNet's stages). A weight
    outside such a list is a block of its own.
    """
    owners = {id(owner) for weight in weights for owner in weight.owners}
    home: dict[int, nn.Module] = {}

    def search(module: nn.Module) -> None:
        children = list(module.children())
        repeated = isinstance(module, nn.ModuleList | nn.Sequential) and len({type(c) for c in children}) == 1
        for child in children:
            if repeated and id(child) not in owners:
                home.update((id(inner), child) for inner in child.modules())
            else:
                search(child)

    search(model)
    blocks: dict[int, tuple[nn.Module, list[Weight]]] = {}
    for weight in weights:
        block = home.get(id(weight.owner), weight.owner)
        blocks.setdefault(id(block), (block, []))[1].append(weight)
    return list(blocks.values())


def _plan(model: nn.Module, weights: Sequence[Weight], task: PruneTask) -> _Plan:
    """Run the model once to see the order of its blocks, and whether they can be run one by one."""
    blocks = [_Block(module, inside) for module, inside in blocks_of(model, weights)]
    order: list[_Block] = []
    chained = True
    last: tuple[Any, int] = (None, 0)
    inputs: dict[int, list[Any]] = {}

    def entered(block: _Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal chained
        hidden, rest = _split(args, kwargs)
        if hidden is None:
            chained = False
        elif order:
            chained &= hidden is last[0] and hidden._version == last[1]
        else:
            chained &= not hidden.requires_grad
        # Only prunable weights require a gradient here, so whatever else depends on them shows.
        chained &= not any(tensor.requires_grad for tensor in _tensors(rest))
        block.calls += 1
        if block not in order:
            order.append(block)

    def left(output: Any) -> None:
        nonlocal last
        hidden = _first(output)
        last = (hidden, hidden._version if hidden is not None else 0)

    def used(block: _Block, weight: Weight, x: Tensor) -> None:
        if any(weight is known for part in block.parts for known in part):
            return
        held = inputs.setdefault(id(block), [])
        if not (held and held[-1] is x):
            held.append(x)
            block.parts.append([])
        block.parts[-1].append(weight)

    hooks = []
    for block in blocks:
        hooks.append(
            block.module.register_forward_pre_hook(
                lambda _, args, kwargs, block=block: entered(block, args, kwargs), with_kwargs=True
            )
        )
        for weight in block.weights:
            for owner in weight.owners:
                hooks.append(
                    owner.register_forward_pre_hook(
                        lambda _, args, kwargs, block=block, weight=weight: used(
                            block, weight, _split(args, kwargs)[0]
                        ),
                        with_kwargs=True,
                    )
                )
        hooks.append(block.module.register_forward_hook(lambda _, args, output: left(output)))
    wanted = {id(weight.parameter) for weight in weights}
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in required:
            parameter.requires_grad_(id(parameter) in wanted)
        # The graph is only asked who depends on whom: it need not hold any tensor.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, _nothing):
            run(model, task.batches[0], task)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in required:
            parameter.requires_grad_(flag)
    unused = [
        weight.name
        for block in blocks
        for weight in block.weights
        if not any(weight is known for part in block.parts for known in part)
    ]
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        raise BadData(
            f"The model does not use {', '.join(unused[:3])}{more} on the calibration data, so that nothing can be measured "
            "there; leave them out of what may be pruned."
        )
    return _Plan(order, chained and all(block.calls == 1 for block in blocks))


def _nothing(_: Any) -> Tensor:
    raise RuntimeError("the calibration's graph has no tensors")


def _split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """A module's input (the first tensor it is given), and everything else."""
    if args:
        return (args[0] if isinstance(args[0], Tensor) else None), [*args[1:], *kwargs.values()]
    name = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
    return kwargs.get(name or ""), [value for key, value in kwargs.items() if key != name]


def _first(output: Any) -> Tensor | None:
    """A block's output that the next one takes."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


# -- running ---------------------------------------------------------------------------------------------------------


_HIDDEN: Any = object()
"""Stands for a block's input in the arguments of a call."""


@attrs.define(eq=False)
class _Stream:
    """One batch on its way through the blocks: what the next block is given, and the other arguments of each."""

    hidden: Any = None
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = attrs.field(factory=dict)

    def record(self, block: _Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a call's arguments; the input only of the first."""
        hidden = _split(args, kwargs)[0]
        self.hidden = hidden if self.hidden is None else self.hidden
        self.calls[id(block)] = (
            tuple(_HIDDEN if value is hidden else value for value in args),
            {name: _HIDDEN if value is hidden else value for name, value in kwargs.items()},
        )

    @torch.no_grad()
    def run(self, block: _Block) -> Any:
        args, kwargs = self.calls[id(block)]
        return block.module(
            *(self.hidden if value is _HIDDEN else value for value in args),
            **{name: self.hidden if value is _HIDDEN else value for name, value in kwargs.items()},
        )

    def advance(self, block: _Block) -> None:
        self.hidden = _first(self.run(block))


@torch.no_grad()
def _capture(model: nn.Module, plan: _Plan, task: PruneTask) -> list[_Stream]:
    """Every batch as it enters the first block."""
    streams = []
    for batch in task.batches:
        stream = _Stream()
        hooks = [
            block.module.register_forward_pre_hook(
                lambda _, args, kwargs, block=block, stream=stream: stream.record(block, args, kwargs),
                with_kwargs=True,
            )
            for block in plan.blocks
        ]
        hooks.append(plan.blocks[-1].module.register_forward_pre_hook(_stop))
        _until_stopped(model, batch, task, hooks)
        streams.append(stream)
    return streams


def _until_stopped(model: nn.Module, batch: Batch, task: PruneTask, hooks: Sequence[Any]) -> None:
    try:
        run(model, batch, task)
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()


@attrs.define(eq=False)
class _Mean:
    """Running mean over sequences."""

    value: Tensor | None = None
    sequences: int = 0

    def add(self, total: Tensor, sequences: int) -> None:
        before, self.sequences = self.sequences, self.sequences + sequences
        part = total / self.sequences
        self.value = part if self.value is None else self.value.mul_(before / self.sequences).add_(part)


@torch.no_grad()
def _measured(
    model: nn.Module,
    block: _Block,
    part: list[Weight],
    plan: _Plan,
    streams: list[_Stream],
    task: PruneTask,
    measure: Measure,
) -> list[tuple[Weight, Tensor]]:
    means = {id(weight): _Mean() for weight in part}
    # q, k and v see the same tensor: it is measured once.
    seen: dict[Any, tuple[Tensor, Tensor]] = {}

    def used(weight: Weight, module: nn.Module, x: Tensor) -> None:
        key = (id(x), id(module) if type_of(module) == "Conv2d" else 0)
        if key not in seen:
            seen[key] = (x, measure(inputs_of(module, x)))
        means[id(weight)].add(seen[key][1], len(x) if x.ndim > 2 else 1)

    def hooked() -> list[Any]:
        return [
            owner.register_forward_pre_hook(
                lambda module, args, kwargs, weight=weight: used(weight, module, _split(args, kwargs)[0]),
                with_kwargs=True,
            )
            for weight in part
            for owner in weight.owners
        ]

    if plan.chained:
        hooks = hooked()
        try:
            for stream in streams:
                stream.run(block)
                seen.clear()
        finally:
            for hook in hooks:
                hook.remove()
    else:
        for batch in task.batches:
            hooks = hooked()
            if block.calls == 1:
                hooks.append(block.module.register_forward_hook(_stop))
            _until_stopped(model, batch, task, hooks)
            seen.clear()
    measured = []
    for weight in part:
        value = means[id(weight)].value
        assert value is not None, weight.name
        if not bool(value.sum().isfinite()):
            raise NumericalError(
                f"The inputs of {weight.name} are not finite on the calibration data; look at the data and at the model's "
                "outputs before pruning."
            )
        measured.append((weight, value))
    return measured


def _stop(*_: Any) -> None:
    raise _Stop


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without a key-value cache, which would grow each time a block is run; as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    model.eval()
    if config is not None and cache is not None:
        config.use_cache = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        if config is not None and cache is not None:
            config.use_cache = cache
