"""`maskwright prune`: a causal language model pruned to a budget, its perplexity before and after, and what was really saved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from maskwright.backbones.defaults import causal_language_model
from maskwright.backbones.folders import read_config, read_model
from maskwright.errors import BadModel, NumericalError, OutputError, UsageError
from maskwright.jobs import models
from maskwright.jobs.export import check_exportable, export
from maskwright.jobs.pretrain import embedded_language_model, spread_over
from maskwright.jobs.run import Result, Run
from maskwright.jobs.settings import Settings
from maskwright.mask import Mask, load_masks
from maskwright.protocols import Batch, Budget, Pruner, PruneTask, Step
from maskwright.sources.text import EOS, TextSource, load_text
from maskwright.toolkit.patterns import check_budget, refuse_budget
from maskwright.toolkit.prunable import Rule, Weight, prunable_weights
from maskwright.toolkit.sizes import dense_bytes, packed_bytes

HELD_OUT = 256
"""Held-out sequences that perplexity is measured on, at most."""

GIVEN = frozenset({"batches", "loss"})
"""What this job's task brings, of what a pruner may need."""

_BESIDE = ("tokenizer*.json", "special_tokens_map.json", "vocab.json", "merges.txt", "*.jinja")
"""Texts of a model folder that belong to its tokenizer."""


@attrs.define(eq=False)
class RunTask(PruneTask):
    """A task whose steps, checkpoints and metrics are those of a run, with a fresh batch of training text for each step."""

    run: Any = None
    source: Any = None

    def steps(self, total: int, state: Mapping[str, Any]) -> Iterator[Step]:
        """As `Run.steps`: a pruner that is killed goes on from its last checkpoint."""
        return self.run.steps(total, state)

    def log(self, step: Step, **metrics: float) -> None:
        """As `Run.log`."""
        self.run.log(step, **metrics)

    def batch(self, step: Step) -> Batch:
        """The batch of a step of training, epoch after epoch, each in its own order."""
        size = self.run.settings.run.batch_size or 1
        numbers = torch.arange(step.index * size, (step.index + 1) * size)
        epochs = numbers // len(self.source)
        parts = [
            self.source.batch(self.source.order(epoch)[numbers[epochs == epoch] % len(self.source)], epoch)
            for epoch in epochs.unique().tolist()
        ]
        return {"tokens": torch.cat([part["tokens"] for part in parts]).to(self.run.device)}


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
    rule = rule_of(settings)
    network, source = _model(run, pruner, budget, rule)
    network.to(run.device).eval()
    weights = prunable_weights(network, rule)
    _check_budget(pruner, weights, budget)
    if settings.require("output").export != "none":
        check_exportable(settings.require("output").export, weights)
    run.say(_described(network, weights))
    before = perplexity(network, source, run)
    task = RunTask(
        budget=budget,
        batches=calibration(source, run),
        loss=next_token_loss,
        generator=run.generator(1),
        accelerator=run.accelerator,
        prunable=rule,
        run=run,
        source=source,
    )
    # Where masks are of the change, what was saved is compared with what was given.
    changes = getattr(pruner, "prunes", "weights") == "difference"
    base = {weight.name: weight.parameter.detach().clone() for weight in weights} if changes else {}
    run.say(f"Pruning with {pruner.name}" + (f" to a {budget}" if budget else ""))
    result = pruner.prune(network, task)
    for mask in result.masks.values():
        run.mask_drawn(mask)
    summary = {
        "pruner": pruner.name,
        "budget": {budget.kind: getattr(budget, budget.kind)} if budget else {},
        "perplexity_before": before,
        "perplexity_after": perplexity(network, source, run),
        "data": source.summary,
        "calibration_tokens": sum(batch["tokens"].numel() for batch in task.batches),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        **({"facts": dict(result.facts)} if result.facts else {}),
    }
    folder = None if settings.model.source == models.DEFAULT else Path(settings.model.source)
    return run.finish(
        summary,
        model=network,
        tokenizer=source if folder is None else None,
        files=_beside(folder) if folder is not None else None,
        masks=result.masks,
        artifacts=result.artifacts,
        counted=lambda written: counted(written, network, weights, result.masks, settings, base),
    )


def _check_budget(pruner: Pruner, weights: list[Weight], budget: Budget | None) -> None:
    if pruner.budgets:
        check_budget(pruner, weights, budget)
    else:
        refuse_budget(pruner, budget)


# -- before ----------------------------------------------------------------------------------------------------------


def rule_of(settings: Settings) -> Rule:
    """What [prunable] says, the rest as the rule has it."""
    given = attrs.asdict(settings.require("prunable"), filter=lambda _, value: value is not None)
    return Rule(**{name: tuple(value) for name, value in given.items()})


def _model(run: Run, pruner: Pruner, budget: Budget | None, rule: Rule) -> tuple[Any, TextSource]:
    """The model and the text: the user's, or the embedded ones. Budgets that cannot be met are found before any training."""
    section, data = run.settings.model, run.settings.data
    if section.source == models.DEFAULT:
        shaped = causal_language_model(
            vocabulary=32,
            length=8,
            width=section.width or 128,
            depth=section.depth or 4,
            heads=section.heads or 4,
        )
        _check_budget(pruner, prunable_weights(shaped, rule), budget)
        trained = embedded_language_model(run)
        assert isinstance(trained.source, TextSource)
        return trained.network, trained.source
    folder = Path(section.source)
    config = read_config(folder)
    if not models.is_causal(config):
        kind = ", ".join(config.get("architectures") or [config["model_type"]])
        raise BadModel(
            f"The model in {folder} is a {kind}; this job measures perplexity and takes causal language models. Other models "
            "are pruned from Python, with maskwright.create('pruner', …).prune(model, task)."
        )
    length, most = data.length or 128, config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(most, int) and length > most:
        raise BadModel(
            f"The model in {folder} takes {most} tokens, data.length={length}; set data.length to at most {most}."
        )
    network = read_model(folder, "AutoModelForCausalLM", dtype="auto")
    tokenizer = models.tokenizer_of(section)
    source = load_text(data.source, length=length, tokenizer=tokenizer, seed=run.seed)
    return network, _readable(source, tokenizer, network)


def _readable(source: TextSource, tokenizer: Path | None, network: Any) -> TextSource:
    """The text with the model's own end of a document, or none, where its tokenizer does not know `<eos>`.

    Raises `BadModel` for tokens that the model has no embedding of.
    """
    from tokenizers import Tokenizer

    if Tokenizer.from_file(str(tokenizer)).token_to_id(EOS) is None:
        own = network.config.eos_token_id
        own = own[0] if isinstance(own, list) and own else own

        def mended(one: TextSource) -> TextSource:
            ends = one.ids == source.eos_token
            ids = np.where(ends, own, one.ids) if isinstance(own, int) else one.ids[~ends]
            return attrs.evolve(one, ids=ids)

        source = attrs.evolve(mended(source), rest=mended(source.held_out))
    most = max(int(one.ids.max(initial=0)) for one in (source, source.held_out))
    size = network.get_input_embeddings().num_embeddings
    if most >= size:
        raise BadModel(
            f"The tokenizer beside this {network.config.model_type} model makes the token {most}, the model knows {size}; "
            "they do not belong together."
        )
    return source


def calibration(source: TextSource, run: Run) -> list[Batch]:
    """Training sequences in their order of the first epoch, in batches: as many as `run.calibration`."""
    count = min(run.settings.run.calibration or 128, len(source))
    parts = source.order(0)[:count].split(run.settings.run.batch_size or count)
    return [{"tokens": source.batch(part)["tokens"].to(run.device)} for part in parts]


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log-likelihood, in nats, of tokens int64 [B, L] after the first."""
    logits = model(input_ids=batch["tokens"], use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, source: TextSource, run: Run) -> float:
    """On held-out sequences. Raises `NumericalError` when the loss is not finite."""
    tokens = spread_over(source.held_out, HELD_OUT)["tokens"].to(run.device)
    parts = tokens.split(max(run.settings.run.batch_size or 1, 16))
    nats = sum(float(next_token_loss(model, {"tokens": part})) * len(part) for part in parts) / len(tokens)
    if not math.isfinite(nats):
        raise NumericalError(
            "The model's loss on held-out text is not finite: look at its weights and its dtype before pruning."
        )
    return math.exp(min(nats, 700.0))


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


# -- after -----------------------------------------------------------------------------------------------------------


def counted(
    folder: Path,
    network: Any,
    weights: list[Weight],
    masks: Mapping[str, Mask],
    settings: Settings,
    base: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Sparsity and sizes of what lies in a run's folder, read from there; of the change against `base` where that is given.

    Raises `OutputError` when the saved weights are not those that the saved masks keep.
    """
    saved = read_model(folder / "model", "AutoModelForCausalLM", dtype="auto")
    kept = load_masks(folder / "masks.safetensors")
    layers: list[dict[str, Any]] = []
    for weight in weights:
        values = saved.get_parameter(weight.name).detach()
        if weight.name in base:
            values = values - base[weight.name].to(values)
        if bool(values[~kept[weight.name].keep].any()):
            raise OutputError(
                f"{folder / 'model'} does not hold the pruned model: {weight.name} has weights outside its mask."
            )
        layers.append(
            {"name": weight.name, "kept": int(values.count_nonzero()), "total": int(values.numel())}
        )
    removed = 1 - sum(layer["kept"] for layer in layers) / sum(layer["total"] for layer in layers)
    sizes = {
        "dense": dense_bytes(network),
        "bit-packed": packed_bytes(network, masks),
        "model folder": _bytes(folder / "model"),
        "masks file": (folder / "masks.safetensors").stat().st_size,
    }
    wanted = settings.require("output").export
    if wanted != "none":
        sizes[wanted] = _bytes(export(folder, wanted, network, kept, removed))
    return {"sparsity": removed, "layers": layers, "sizes": sizes}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
