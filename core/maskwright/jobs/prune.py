"""`maskwright prune`: a model pruned to a budget, its quality before and after, and what was really saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from maskwright.backbones.defaults import causal_language_model
from maskwright.backbones.folders import read_model
from maskwright.errors import BadModel, OutputError, UsageError
from maskwright.jobs import models
from maskwright.jobs.batches import Batches
from maskwright.jobs.export import check_exportable, export
from maskwright.jobs.run import Result, Run
from maskwright.jobs.settings import Settings
from maskwright.jobs.skipped import as_summary
from maskwright.jobs.streaming import prune_streamed
from maskwright.jobs.workloads import Workload, of_folder, workload
from maskwright.mask import Mask, load_masks
from maskwright.protocols import Batch, Budget, Expert, Pruner, PruneTask, Step
from maskwright.sources.images import ImageSource
from maskwright.toolkit import remainders
from maskwright.toolkit.patterns import check_budget, refuse_budget
from maskwright.toolkit.prunable import Rule, Weight, prunable_weights
from maskwright.toolkit.remainders import Remainder, fitting, uneven
from maskwright.toolkit.sizes import dense_bytes, packed_bytes
from maskwright.toolkit.structured import flop_count, parameter_count

GIVEN = frozenset({"batches", "loss", "experts", "clients"})
"""What this job's task brings, of what a pruner may need."""

_BESIDE = (
    *("tokenizer*.json", "special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt", "*.jinja"),
    "preprocessor_config.json",
)
"""Texts of a model folder that belong to its tokenizer or say how images are prepared."""


@attrs.define(eq=False)
class RunTask(PruneTask):
    """A task whose steps, checkpoints and metrics are those of a run, with a fresh batch of training data for each step."""

    run: Any = None
    work: Any = None
    _batches: Batches | None = attrs.field(default=None, init=False)

    def steps(self, total: int, state: Mapping[str, Any]) -> Iterator[Step]:
        """As `Run.steps`: a pruner that is killed goes on from its last checkpoint."""
        return self.run.steps(total, state)

    def log(self, step: Step, **metrics: float) -> None:
        """As `Run.log`."""
        self.run.log(step, **metrics)

    def batch(self, step: Step) -> Batch:
        """The batch of a step of training, epoch after epoch, each in its own order."""
        if self._batches is None:
            self._batches = Batches(self.work, self.run.settings.run.batch_size or 1)
        batch = self._batches.make(step.index)
        return {name: column.to(self.run.device) for name, column in batch.items()}


def prune(run: Run) -> Result:
    """Prune a model, measure it on held-out text before and after, and leave it with its masks and a report."""
    settings = run.settings
    budget = Budget(**settings.budget) if settings.budget else None
    pruner: Pruner = settings.require("pruner").create(run.registry)
    if lacking := pruner.needs - GIVEN:
        raise UsageError(
            f"The pruner {pruner.name!r} needs {', '.join(sorted(lacking))}, which this job does not have; call it from "
            "Python with a PruneTask that brings it as extras."
        )
    every, remainder = rule_of(settings), settings.require("prunable").remainder
    rule = fitting(every, budget, remainder)
    if settings.model.stream:
        return prune_streamed(run, pruner, budget, every, _beside(Path(settings.model.source)))
    _check_default(run, pruner, budget, rule)
    work = workload(run)
    network = work.network
    network.to(run.device).eval()
    odd = uneven(prunable_weights(network, every), budget)
    weights = prunable_weights(network, rule)
    _check_budget(pruner, weights, budget, remainder)
    changes = getattr(pruner, "prunes", "weights") == "difference"
    if settings.require("output").export != "none":
        _check_export(settings.require("output").export, pruner, weights)
    run.say(_described(network, weights))
    if odd:
        run.say(remainders.told(odd, budget, remainder))
    dense = Dense.of(network, work, pruner)
    before = work.quality(network, run)
    task = RunTask(
        budget=budget,
        batches=work.calibration(run),
        loss=work.loss,
        generator=run.generator(1),
        accelerator=run.accelerator,
        prunable=rule,
        extras=_extras(run, pruner, work),
        run=run,
        work=work,
    )
    # Where masks are of the change, what was saved is compared with what was given.
    base = {weight.name: weight.parameter.detach().clone() for weight in weights} if changes else {}
    run.say(f"Pruning with {pruner.name}" + (f" to a {budget}" if budget else ""))
    result = remainders.prune(pruner, network, task, remainder)
    for mask in result.masks.values():
        run.mask_drawn(mask)
    summary = {
        "pruner": pruner.name,
        **({"prunes": "difference"} if changes else {}),
        "budget": {budget.kind: getattr(budget, budget.kind)} if budget else {},
        "quality": {
            "measure": work.measure,
            "better": work.better,
            "before": before,
            "after": work.quality(network, run),
        },
        "data": work.source.summary,
        "calibration_samples": sum(len(next(iter(batch.values()))) for batch in task.batches),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        **({"facts": dict(result.facts)} if result.facts else {}),
        **(as_summary(work.source.damage) if isinstance(work.source, ImageSource) else {}),
        **({f"{remainders.DONE[remainder]} weights": [weight.name for weight in odd]} if odd else {}),
    }
    folder = None if settings.model.source == models.DEFAULT else Path(settings.model.source)
    return run.finish(
        summary,
        model=network,
        tokenizer=work.source if folder is None else None,
        files=_beside(folder) if folder is not None else None,
        masks=result.masks,
        masks_of="difference" if changes else "weights",
        artifacts=result.artifacts,
        counted=lambda written: counted(written, work, weights, result.masks, settings, base, dense),
    )


def _check_budget(
    pruner: Pruner, weights: list[Weight], budget: Budget | None, remainder: Remainder = "refuse"
) -> None:
    if pruner.budgets:
        check_budget(pruner, [] if remainder == "pad" else weights, budget)
    else:
        refuse_budget(pruner, budget)


# -- before ----------------------------------------------------------------------------------------------------------


def rule_of(settings: Settings) -> Rule:
    """What [prunable] says, the rest as the rule has it."""
    given = attrs.asdict(settings.require("prunable"), filter=lambda _, value: value is not None)
    del given["remainder"]
    return Rule(**{name: tuple(value) for name, value in given.items()})


def _extras(run: Run, pruner: Pruner, work: Workload) -> dict[str, Any]:
    """What the pruner needs beside batches and a loss."""
    extras: dict[str, Any] = {}
    if "experts" in pruner.needs:
        extras["experts"] = experts(run, work)
    if "clients" in pruner.needs:
        extras["clients"] = clients(run, work)
    return extras


def experts(run: Run, work: Workload) -> dict[str, Expert]:
    """The fine-tuned models that [experts] names, by name; each is scored on its own data, where these are named.

    Raises `UsageError` when there are none, and `BadModel` for one that is not of the pruned model's architecture.
    """
    named = run.settings.experts or {}
    if not named:
        raise UsageError(
            "This pruner needs experts, models fine-tuned from the one that is pruned: name them with "
            "--set experts.NAME.model=FOLDER and, where they are to be measured, --set experts.NAME.data=FOLDER."
        )
    shapes = {name: one.shape for name, one in work.network.state_dict().items()}
    found = {}
    for name, entry in named.items():
        folder = Path(entry["model"])
        data = attrs.evolve(run.settings.data, source=entry.get("data", run.settings.data.source))
        own = of_folder(folder, data, run.seed)
        state = {key: value.detach() for key, value in own.network.state_dict().items()}
        other = next((key for key in shapes if key not in state or state[key].shape != shapes[key]), None)
        if other is not None:
            raise BadModel(
                f"The expert {name!r} in {folder} is of another architecture than the pruned model: {other} differs."
            )
        found[name] = Expert(state, _score(own, run) if "data" in entry else None)
    return found


def _score(work: Workload, run: Run) -> Callable[[nn.Module], float]:
    """Higher is better: a perplexity counts negative."""
    sign = 1 if work.better == "higher" else -1
    return lambda model: sign * work.quality(model, run)


def clients(run: Run, work: Workload) -> list[list[Batch]]:
    """The training data in `run.clients` equal parts that share no sample, each in batches."""
    count = run.settings.run.clients or 10
    order = work.source.order(0)
    if len(order) < count:
        raise UsageError(
            f"run.clients={count} is more than the {len(order)} training samples; ask for fewer clients."
        )
    size = run.settings.run.batch_size or 8
    return [
        [
            {name: column.to(run.device) for name, column in work.batch(part).items()}
            for part in share.split(size)
        ]
        for share in order.tensor_split(count)
    ]


def _check_default(run: Run, pruner: Pruner, budget: Budget | None, rule: Any) -> None:
    """Find a budget that the embedded model cannot meet before that model is trained."""
    section = run.settings.model
    if section.source == models.DEFAULT:
        shaped = causal_language_model(
            vocabulary=32,
            length=8,
            width=section.width or 128,
            depth=section.depth or 4,
            heads=section.heads or 4,
        )
        remainder = run.settings.require("prunable").remainder
        _check_budget(pruner, prunable_weights(shaped, rule), budget, remainder)


def _described(network: nn.Module, weights: list[Weight]) -> str:
    total = sum(parameter.numel() for parameter in network.parameters())
    prunable = sum(weight.parameter.numel() for weight in weights)
    names = [weight.name for weight in weights]
    shown = ", ".join(names if len(names) <= 3 else [names[0], "…", names[-1]])
    return f"Prunable: {prunable:,} of {total:,} parameters, in {len(names)} weights: {shown}"


def _beside(folder: Path) -> dict[str, str]:
    return {
        path.name: path.read_text("utf-8") for pattern in _BESIDE for path in sorted(folder.glob(pattern))
    }


@attrs.frozen(eq=False)
class Dense:
    """What the model was before: its bytes, and where it may become smaller its parameters and its FLOPs on a sample."""

    bytes: int
    params: int = 0
    flops: int = 0
    batch: Batch | None = None

    @classmethod
    def of(cls, network: nn.Module, work: Workload, pruner: Pruner) -> Dense:
        """Counted now."""
        if getattr(pruner, "prunes", "weights") != "channels":
            return cls(dense_bytes(network))
        batch = work.batch(torch.arange(1))
        return cls(dense_bytes(network), parameter_count(network), flop_count(network, batch), batch)

    def left(self, saved: nn.Module) -> dict[str, float]:
        """The shares of parameters and FLOPs that a smaller model has."""
        assert self.batch is not None
        return {
            "params": parameter_count(saved) / self.params,
            "flops": flop_count(saved, self.batch) / self.flops,
        }


def _check_export(kind: str, pruner: Pruner, weights: list[Weight]) -> None:
    if getattr(pruner, "prunes", "weights") == "channels":
        raise UsageError(
            f"output.export={kind!r} is for models with zeros, and {pruner.name} makes the model itself smaller; leave it out, and use "
            "model/."
        )
    if getattr(pruner, "prunes", "weights") == "difference":
        raise UsageError(
            f"output.export={kind!r} is for models with zeros, and {pruner.name} leaves weights as they are and masks their change; leave "
            "it out."
        )
    check_exportable(kind, weights)


# -- after -----------------------------------------------------------------------------------------------------------


def counted(
    folder: Path,
    work: Workload,
    weights: list[Weight],
    masks: Mapping[str, Mask],
    settings: Settings,
    base: Mapping[str, Tensor],
    dense: Dense,
) -> dict[str, Any]:
    """Sparsity, sizes and what is left of `dense` in a run's folder, read from there; of the change against `base` where that is given.

    Raises `OutputError` when the saved weights are not those that the saved masks keep.
    """
    saved = read_model(folder / "model", work.reader, dtype="auto")
    kept = load_masks(folder / "masks.safetensors")
    layers: list[dict[str, Any]] = []
    for weight in weights:
        values = saved.get_parameter(weight.name).detach()
        if weight.name in base:
            values = values - base[weight.name].to(values)
        # A pruner may leave out weights that it was allowed to prune: these are dense, whatever zeros they had.
        keep = kept[weight.name].keep if weight.name in kept else torch.ones_like(values, dtype=torch.bool)
        smaller = values.shape != keep.shape
        if values.numel() != int(keep.sum()) if smaller else bool(values[~keep].any()):
            raise OutputError(
                f"{folder / 'model'} does not hold the pruned model: {weight.name} has weights outside its mask."
            )
        left = values.numel() if smaller else int(values.count_nonzero())
        layers.append({"name": weight.name, "kept": left, "total": keep.numel()})
    removed = 1 - sum(layer["kept"] for layer in layers) / sum(layer["total"] for layer in layers)
    shapes = {name: one.shape for name, one in work.network.named_parameters()}
    sizes = {
        "dense": dense.bytes,
        **(
            {"change, bit-packed": _packed_change(weights, masks)}
            if base
            else {
                "bit-packed": packed_bytes(
                    work.network,
                    {name: mask for name, mask in masks.items() if shapes.get(name) == mask.shape},
                )
            }
        ),
        "model folder": _bytes(folder / "model"),
        "masks file": (folder / "masks.safetensors").stat().st_size,
    }
    wanted = settings.require("output").export
    if wanted != "none":
        sizes[wanted] = _bytes(export(folder, wanted, work.network, kept, removed))
    told = {"sparsity": removed, "layers": layers, "sizes": sizes}
    return {**told, "left": dense.left(saved)} if dense.batch else told


def _packed_change(weights: list[Weight], masks: Mapping[str, Mask]) -> int:
    """Bytes of a change as its kept entries beside one bit for each entry."""
    return sum(
        int(masks[weight.name].keep.sum()) * weight.parameter.element_size()
        + -(-weight.parameter.numel() // 8)
        for weight in weights
        if weight.name in masks
    )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
