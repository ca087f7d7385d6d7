"""Pruning a causal language model that does not fit into memory: block after block, read from its shards and written to new ones.

A block of the model is in memory at a time, beside embeddings, head and the activations of the calibration and held-out sequences. The
pruner sees a small model that holds the block, with the block's inputs as its batches; so any pruner works that asks for batches only
and compares no weights across blocks.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from maskwright.backbones.folders import read_config
from maskwright.errors import BadBudget, BadModel, NumericalError, OutputError, UsageError
from maskwright.jobs import models
from maskwright.jobs.checkpoint import reason
from maskwright.jobs.pretrain import spread_over
from maskwright.jobs.run import Result, Run
from maskwright.jobs.workloads import HELD_OUT, readable_text
from maskwright.mask import Mask, load_masks, save_masks
from maskwright.protocols import Budget, LayerSparsity, Pruner, PruneResult, PruneTask, SparsityReport
from maskwright.toolkit import remainders
from maskwright.toolkit.calibration import blocks_of
from maskwright.toolkit.patterns import check_budget
from maskwright.toolkit.prunable import Rule, Weight, prunable_weights
from maskwright.toolkit.remainders import fitting, uneven


def prune_streamed(
    run: Run, pruner: Pruner, budget: Budget | None, rule: Rule, files: Mapping[str, str]
) -> Result:
    """The prune job, block by block. Perplexity before and after is measured on the way.

    Raises `UsageError` for a model, pruner or export that cannot be streamed, before anything is read, and `BadModel` for shards that
    are missing or damaged.
    """
    from safetensors import SafetensorError

    folder = Path(run.settings.model.source)
    _check(run, pruner, folder)
    shards = Shards(folder)
    network = _empty_model(folder)
    remainder = run.settings.require("prunable").remainder
    odd = uneven(prunable_weights(network, rule), budget)
    weights = prunable_weights(network, fitting(rule, budget, remainder))
    amount = check_budget(pruner, [] if remainder == "pad" else weights, budget)
    if odd:
        run.say(remainders.told(odd, budget, remainder))
    blocks = _blocks(network, weights)
    source = readable_text(folder, run.settings.data, run.seed, network, read_config(folder))
    inside = {f"{path}." for path, _ in blocks}
    rest = [name for name in shards.names if not name.startswith(tuple(inside))]
    _fill(network, {name: shards.tensor(name) for name in rest})
    network.tie_weights()
    network.eval()

    prunable = sum(weight.parameter.numel() for weight in weights)
    run.say(
        f"Prunable: {prunable:,} weights in {len(weights)} tensors of {len(blocks)} blocks, one block at a time"
    )
    count = min(run.settings.run.calibration or 128, len(source))
    given = [
        source.batch(part)["tokens"]
        for part in source.order(0)[:count].split(run.settings.run.batch_size or 8)
    ]
    held = list(spread_over(source.held_out, HELD_OUT)["tokens"].split(16))
    recorders = _record(network, [path for path, _ in blocks])
    calibration = _Stream.begin(network, recorders, given)
    dense = _Stream.begin(network, recorders, held)
    sparse = dense.copy()

    written, masks = _Written(run.folder / ".streamed", folder), MaskFiles(run.folder / ".masks")
    layers: list[LayerSparsity] = []
    generator = run.generator(1)
    try:
        for index, (path, names) in enumerate(blocks):
            block = network.get_submodule(path).real
            tensors = {
                name.removeprefix(f"{path}."): shards.tensor(name)
                for name in shards.names
                if name.startswith(f"{path}.")
            }
            _fill(block, tensors)
            dense.advance(block, index)
            view = _Alone(block)
            short = {name: f"layers.0.{name.removeprefix(f'{path}.')}" for name in names}
            task = PruneTask(
                budget=amount,
                batches=[{"number": torch.tensor([number])} for number in range(len(given))],
                generator=generator,
                prunable=partial(_named, names=tuple(short.values())),
            )
            view.inputs = calibration.inputs(index)
            result = _pruned(pruner, view, task, path, remainder)
            found = {name: result.masks[inner] for name, inner in short.items() if inner in result.masks}
            for mask in found.values():
                run.mask_drawn(mask)
            masks.add(found)
            layers += SparsityReport.of(found).layers
            calibration.advance(block, index)
            sparse.advance(block, index)
            written.add(
                {f"{path}.{name}": tensor for name, tensor in block.state_dict().items() if name in tensors}
            )
            block.to("meta")
            run.say(f"{path}: {SparsityReport(tuple(layers)).sparsity:.2%} removed so far")
        outside = network.state_dict()
        written.add({name: outside[name] for name in rest if name in outside})
        before, after = (stream.perplexity(network, recorders) for stream in (dense, sparse))
        report = SparsityReport(tuple(layers))
        return run.finish(
            {
                "pruner": pruner.name,
                "budget": {amount.kind: getattr(amount, amount.kind)},
                "quality": {"measure": "perplexity", "better": "lower", "before": before, "after": after},
                "data": source.summary,
                "calibration_samples": count,
                "parameters": shards.parameters,
                "streamed": True,
                **({f"{remainders.DONE[remainder]} weights": [weight.name for weight in odd]} if odd else {}),
            },
            model=written,
            files=files,
            masks=masks,
            counted=lambda place: _counted(place, report, shards),
        )
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{run.folder} cannot be written ({reason(error)}); free the disk or choose another folder with --out. {folder} is untouched."
        ) from error
    finally:
        for place in (run.folder / ".streamed", run.folder / ".masks"):
            shutil.rmtree(place, ignore_errors=True)


def _named(view: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Parameter]:
    return {name: view.get_parameter(name) for name in names}


def _pruned(
    pruner: Pruner, view: nn.Module, task: PruneTask, path: str, remainder: remainders.Remainder
) -> PruneResult:
    """A block pruned; what is wrong with its weights is said with their names in the whole model."""
    try:
        return remainders.prune(pruner, view, task, remainder)
    except (BadBudget, NumericalError) as error:
        raise type(error)(str(error).replace("layers.0.", f"{path}.")) from None


def _check(run: Run, pruner: Pruner, folder: Path) -> None:
    if run.settings.model.source == models.DEFAULT or not models.is_causal(read_config(folder)):
        raise UsageError(
            "model.stream reads causal language models from a folder; name one, or leave it out."
        )
    if lacking := pruner.needs - {"batches"}:
        raise UsageError(
            f"model.stream has one block in memory, and {pruner.name} needs {', '.join(sorted(lacking))} of the whole model; leave "
            "model.stream out, or use a pruner that needs batches only, such as magnitude, wanda or sparsegpt."
        )
    if getattr(pruner, "prunes", "weights") == "channels":
        raise UsageError(
            f"model.stream writes blocks of the size they had, and {pruner.name} makes them smaller; leave model.stream out."
        )
    if getattr(pruner, "compare", None) == "global":
        raise UsageError(
            f"model.stream has one block in memory, and {pruner.name} with compare=global compares all weights; use compare=layer."
        )
    if run.settings.require("output").export != "none":
        raise UsageError("model.stream writes safetensors only; leave output.export out.")


# -- shards ----------------------------------------------------------------------------------------------------------


class Shards:
    """The tensors of a model folder by name, each read when it is asked for.

    Raises `BadModel` for shards that the index names and that are missing, and for damaged ones.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self.places: dict[str, Path] = {}
        self.parameters = self.bytes = 0
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            listed = json.loads(index.read_text("utf-8")).get("weight_map", {})
            missing = sorted({file for file in listed.values() if not (folder / file).is_file()})
            if missing:
                raise BadModel(
                    f"The model folder {folder} lacks {len(missing)} of its shards, such as {missing[0]}; copy them there."
                )
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 - it is no mapping
                        self.places[name] = path
                        self.parameters += math.prod(file.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise BadModel(f"{path} is damaged ({error}); copy the model again.") from None
            self.bytes += path.stat().st_size

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self.places)

    def tensor(self, name: str) -> Tensor:
        """One tensor, read now."""
        from safetensors import safe_open

        with safe_open(self.places[name], "pt") as file:
            return file.get_tensor(name)


def _empty_model(folder: Path) -> Any:
    """The model of a folder, its parameters without memory and its buffers real."""
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    with init_empty_weights(include_buffers=False):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def _blocks(network: nn.Module, weights: Sequence[Weight]) -> list[tuple[str, list[str]]]:
    """(path, names of prunable weights) of each block. Raises `UsageError` for weights that lie in no list of blocks."""
    paths = {id(module): name for name, module in network.named_modules()}
    found = [(paths[id(module)], inside) for module, inside in blocks_of(network, weights)]
    lone = next(
        (
            path
            for path, inside in found
            if any(weight.owner is network.get_submodule(path) for weight in inside)
        ),
        None,
    )
    if lone is not None:
        raise UsageError(
            f"model.stream goes block by block, and {lone} is in no block of the model; exclude it with prunable.exclude."
        )
    return [(path, [weight.name for weight in inside]) for path, inside in found]


def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module's parameters and buffers their values. Raises `BadModel` for values of other shapes."""
    try:
        module.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise BadModel(f"The shards do not fit the model's config: {error}") from None


# -- activations -----------------------------------------------------------------------------------------------------


class _Stop(Exception):
    """Raised where the rest of a forward is of no interest."""


class _Recorder(nn.Module):
    """Stands in a block's place: remembers what it is called with, and gives its input on.

    `real` is the block. `answer` replaces what the last one gives on.
    """

    def __init__(self, real: nn.Module, last: bool) -> None:
        super().__init__()
        self.__dict__["real"] = real  # no submodule: the model's names stay free of it
        self.last = last
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.answer: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["real"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.answer is not None:
            return self.answer
        self.call = (args, {key: value for key, value in kwargs.items() if key != "past_key_values"})
        self.given = hidden
        if self.last:
            raise _Stop
        return hidden


def _record(network: nn.Module, paths: Sequence[str]) -> list[_Recorder]:
    """Put recorders in the blocks' places."""
    recorders = []
    for index, path in enumerate(paths):
        parent, _, name = path.rpartition(".")
        recorder = _Recorder(network.get_submodule(path), last=index == len(paths) - 1)
        setattr(network.get_submodule(parent), name, recorder)
        recorders.append(recorder)
    return recorders


@attrs.define(eq=False)
class _Stream:
    """Batches on their way through the blocks: their hidden states, and what each block is called with beside them."""

    tokens: list[Tensor]
    hidden: list[Tensor]
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]

    @classmethod
    @torch.no_grad()
    def begin(cls, network: nn.Module, recorders: Sequence[_Recorder], tokens: Sequence[Tensor]) -> _Stream:
        """What the first block is given."""
        hidden, calls = [], []
        for part in tokens:
            try:
                network(input_ids=part, use_cache=False)
            except _Stop:
                hidden.append(recorders[0].given)
                calls.append([one.call or ((), {}) for one in recorders])
        return cls(list(tokens), hidden, calls)

    def copy(self) -> _Stream:
        """The same at the same place, to go another way."""
        return _Stream(self.tokens, list(self.hidden), self.calls)

    def inputs(self, index: int) -> list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]:
        """(hidden, other arguments) of each batch at a block."""
        return [(hidden, *calls[index]) for hidden, calls in zip(self.hidden, self.calls)]

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int) -> None:
        """Through one block."""
        for number, (hidden, args, kwargs) in enumerate(self.inputs(index)):
            self.hidden[number] = _output(block(hidden, *args, **kwargs))

    @torch.no_grad()
    def perplexity(self, network: nn.Module, recorders: Sequence[_Recorder]) -> float:
        """Of the next token, from the last block's output."""
        nats = count = 0.0
        for tokens, hidden in zip(self.tokens, self.hidden):
            recorders[-1].answer = hidden
            try:
                logits = network(input_ids=tokens, use_cache=False).logits[:, :-1].float()
            finally:
                recorders[-1].answer = None
            nats += float(nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="sum"))
            count += tokens[:, 1:].numel()
        if not math.isfinite(nats):
            raise NumericalError(
                "The model's loss on held-out text is not finite: look at its weights and its dtype."
            )
        return math.exp(min(nats / count, 700.0))


def _output(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


class _Alone(nn.Module):
    """One block as a model: called with the number of a batch, it runs the block on that batch's hidden states."""

    inputs: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])

    def forward(self, number: Tensor) -> Tensor:
        hidden, args, kwargs = self.inputs[int(number)]
        return _output(self.layers[0](hidden, *args, **kwargs))


# -- files -----------------------------------------------------------------------------------------------------------


class MaskFiles(Mapping[str, Mask]):
    """Masks in files, bit-packed, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, Path] = {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    def add(self, masks: Mapping[str, Mask]) -> None:
        """Write some more."""
        for name, mask in masks.items():
            path = self.folder / f"{len(self.places)}.safetensors"
            save_masks(path, {name: mask})
            self.places[name] = path

    def __getitem__(self, name: str) -> Mask:
        return load_masks(self.places[name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class _Written:
    """New shards as they come; `save_pretrained` moves them to where the model belongs, with its config and index."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source = folder, source
        self.map: dict[str, str] = {}
        self.bytes = 0
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """One more shard."""
        from safetensors.torch import save_file

        file = f"model-{len(set(self.map.values())) + 1:05d}.safetensors"
        save_file(
            {name: one.contiguous() for name, one in tensors.items()}, self.folder / file, {"format": "pt"}
        )
        self.map |= dict.fromkeys(tensors, file)
        self.bytes += sum(one.nbytes for one in tensors.values())

    def save_pretrained(self, target: Path) -> None:
        """Shards, index and configs as transformers reads them."""
        for path in sorted(self.folder.iterdir()):
            os.replace(path, target / path.name)
        for name in ("config.json", "generation_config.json"):
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, target / name)
        index = {"metadata": {"total_size": self.bytes}, "weight_map": self.map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _counted(folder: Path, report: SparsityReport, shards: Shards) -> dict[str, Any]:
    """Sparsity and sizes of what was written, tensor by tensor. Raises `OutputError` for weights outside their mask."""
    saved = Shards(folder / "model")
    from safetensors import safe_open

    layers: list[dict[str, Any]] = []
    removed_bytes = 0
    with safe_open(folder / "masks.safetensors", "np") as masks:
        shapes = json.loads(masks.metadata()["shapes"])
    if set(shapes) != {layer.name for layer in report.layers}:
        raise OutputError(f"{folder / 'masks.safetensors'} does not hold the masks of this pruning.")
    for layer in report.layers:
        values = saved.tensor(layer.name)
        kept = int(values.count_nonzero())
        if kept > layer.kept:
            raise OutputError(
                f"{folder / 'model'} does not hold the pruned model: {layer.name} has weights outside its mask."
            )
        layers.append({"name": layer.name, "kept": kept, "total": layer.total})
        removed_bytes += (layer.total - layer.kept) * values.element_size() - -(-layer.total // 8)
    total = sum(layer["total"] for layer in layers)
    return {
        "sparsity": 1 - sum(layer["kept"] for layer in layers) / total,
        "layers": layers,
        "sizes": {
            "dense": shards.bytes,
            "bit-packed": shards.bytes - removed_bytes,
            "model folder": saved.bytes,
            "masks file": (folder / "masks.safetensors").stat().st_size,
        },
    }


__all__ = ["MaskFiles", "Shards", "prune_streamed"]
