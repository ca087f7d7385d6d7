"""`maskwright pretrain`: any strategy × any objective, on images or text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from maskwright.backbones import TokenBackbone, adapt
from maskwright.errors import BackboneMismatch, UsageError
from maskwright.jobs import features, models
from maskwright.jobs.batches import Batches, Source
from maskwright.jobs.costs import Costs
from maskwright.jobs.probes import knn_accuracy, linear_accuracy
from maskwright.jobs.run import Result, Run
from maskwright.jobs.settings import Settings, resolve
from maskwright.jobs.skipped import Skipped, as_summary
from maskwright.jobs.training import MaskedTraining
from maskwright.mask import AttentionMask
from maskwright.protocols import MaskStrategy, Objective, Step
from maskwright.registry import check_fit
from maskwright.sources.images import ImageSource, load_images
from maskwright.sources.text import TextSource, load_text

HELD_OUT = 512
"""Held-out samples that the loss is measured on, at most."""

PROBED = 2000
"""Training images that the probes learn from, at most."""

PICTURES, CANDIDATES = 8, 64
"""Held-out images that the report shows, and from how many they are chosen."""

TEXTS = 4
"""Held-out texts on which the report shows what a language model writes."""

EMBEDDED_STEPS = 800
"""Steps of the embedded language model that other jobs begin with: about a minute on two cores."""


@attrs.frozen(eq=False)
class Trained:
    """What the loop leaves: the module that was trained, the model inside (as transformers saves it), the data, the costs."""

    module: MaskedTraining
    network: nn.Module
    source: ImageSource | TextSource
    costs: Costs
    waiting: float | None = None
    """The share of the loop's time in which a batch was waited for; None where no step was made."""


def pretrain(run: Run) -> Result:
    """Train, measure on held-out data, and leave a model folder and a report."""
    return conclude(run, train(run))


def embedded_language_model(run: Run, *, objective: str = "next-token") -> Trained:
    """The small language model that a job without a model works on: pretrained in the run's folder `base/`, or found there.

    `objective` decides its kind. The run's own [model] and [data] sections set its sizes and text. It is in evaluation mode
    on the run's device, and the same for the same seed.
    """
    given = run.settings
    sections = given.as_dict()
    settings = resolve(
        "pretrain",
        None,
        {
            "objective": {"name": objective},
            "run": {"seed": given.run.seed, "steps": EMBEDDED_STEPS},
            "model": sections["model"],
            "data": sections["data"],
        },
        registry=run.registry,
    )
    run.say(f"Training the embedded language model ({objective}) in {run.folder / 'base'}")
    with run.part("base", settings) as base:
        trained = train(base)
        if not (base.folder / "summary.json").exists():
            conclude(base, trained)
    trained.network.eval()
    return trained


# -- setting up ----------------------------------------------------------------------------------------------


def train(run: Run) -> Trained:
    """The loop: batches, masks, loss, AdamW with warm-up and a cosine."""
    settings = run.settings
    strategy: MaskStrategy = settings.require("strategy").create(run.registry)
    objective: Objective = settings.require("objective").create(run.registry)
    source = data(settings, objective)
    check_fit(strategy, objective, source.columns, catalogue=run.registry)
    run.say(f"Data: {source.summary}")
    total, size = settings.run.steps or 1, settings.run.batch_size or 1
    betas = settings.run.betas or (0.9, 0.999)
    if size % run.processes:
        raise UsageError(
            f"run.batch_size={size} is over all processes and must be a multiple of their number, {run.processes}."
        )
    network = model(settings, objective, source)
    # Decoders and heads are initialised from the global generator, which belongs to the run.
    torch.manual_seed(run.seed)
    module = MaskedTraining(
        network, strategy, objective, seed=run.seed, total_steps=total, columns=source.columns
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(module, settings.run.weight_decay or 0.0),
        lr=settings.run.lr or 1e-3,
        betas=(betas[0], betas[1]),
        fused=True,
    )
    module.to(run.device)
    module.train()
    skipped, waiting = Skipped(run.folder), None
    with Batches(source, size, process=run.accelerator.process_index, processes=run.processes) as batches:
        if torch.distributed.is_initialized():
            _set_up_distribution(run, module, batches)
        wrapped, optimizer = run.accelerator.prepare(module, optimizer)
        module.mask_drawn = run.mask_drawn
        costs = Costs(run.device, run.processes)
        for step in run.steps(total, {"model": module, "optimizer": optimizer, "costs": costs}):
            rate = learning_rate(step, settings.run.lr or 1e-3, settings.run.warmup or 0.0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with costs.step():
                batch = batches[step.index]
                skipped.note(unreadable(source))
                numbers = _step(run, step, wrapped, optimizer, batch, costs)
            run.log(step, **numbers, learning_rate=rate)
            waiting = batches.waiting
        module.mask_drawn = None
    run.accelerator.free_memory()
    module.eval()
    if waiting is not None:
        waiting = run.mean({"waiting": torch.tensor(waiting)})["waiting"]
    return Trained(module, network, source, costs, waiting)


def _step(
    run: Run, step: Step, module: nn.Module, optimizer: Any, batch: Mapping[str, Tensor], costs: Costs
) -> dict[str, float]:
    """One step of the optimiser; its numbers, averaged over the processes."""
    with costs.forward():
        out = module(**{name: column.to(run.device, non_blocking=True) for name, column in batch.items()})
    loss, parts = out["loss"], out["parts"]
    numbers = {"loss": loss}
    if len(parts) > 1:
        numbers |= {f"part.{name}": value for name, value in parts.items()}
    if not isinstance(out["mask"], AttentionMask):
        numbers["masked"] = out["mask"].removed_ratio.mean()
    means = run.mean(numbers)
    run.check_finite(means["loss"], "loss", step)
    with costs.backward():
        run.accelerator.backward(loss)
    if run.settings.run.clip:
        norm = float(run.accelerator.clip_grad_norm_(module.parameters(), run.settings.run.clip))
        run.check_finite(norm, "gradient norm", step)
        means["gradient_norm"] = norm
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means


def data(settings: Settings, objective: Objective) -> ImageSource | TextSource:
    """The source that an objective learns from, at the sizes that the model takes."""
    section = settings.data
    if objective.backbone == "token":
        return load_text(
            section.source,
            length=section.length or 128,
            vocabulary=section.vocabulary or 1024,
            tokenizer=models.tokenizer_of(settings.model),
            seed=settings.run.seed,
        )
    # A convolutional network's config names no size; 224 pixels are 7 × 7 places of the usual coarsest map.
    usual = 224 if objective.backbone == "conv" else 32
    size = section.size or models.image_size(settings.model) or usual
    return load_images(
        section.source,
        size=size,
        channels=models.channels(settings.model),
        seed=settings.run.seed,
        second_view=(section.views or "auto") if "pixels_other_view" in objective.needs else None,
    )


def unreadable(source: ImageSource | TextSource) -> Mapping[str, str]:
    """What a source could not read so far and did without, with the reasons."""
    return source.damage if isinstance(source, ImageSource) else {}


def model(settings: Settings, objective: Objective, source: ImageSource | TextSource) -> Any:
    """The model that an objective trains: the user's folder, or a small one of the kind it works on."""
    seed = settings.run.seed
    if isinstance(source, TextSource):
        return models.language_model(settings.model, source, causal=is_causal(objective), seed=seed)
    if objective.backbone not in ("patch", "grid", "conv"):
        raise BackboneMismatch(
            f"The objective {objective.name!r} works on a {objective.backbone}; this job trains encoders of patches, "
            "convolutional networks and language models. Use maskwright.MaskedTraining on your own module instead."
        )
    return models.vision_model(settings.model, size=source.size, seed=seed, backbone=objective.backbone)


def is_causal(objective: Objective) -> bool:
    """Whether an objective on tokens wants a causal model by default: its class attribute `causal` says so."""
    return bool(getattr(objective, "causal", False))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters for AdamW: weight decay on matrices and kernels, none on biases, norms and tokens."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [one for one in trained if one.squeeze().ndim >= 2]
    vectors = [one for one in trained if one.squeeze().ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def learning_rate(step: Step, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then a cosine to zero; of the step about to be made."""
    rising = max(round(warmup * step.total), 1)
    if step.index < rising:
        return peak * (step.index + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step.index - rising) / max(step.total - rising, 1)))


def _set_up_distribution(run: Run, module: MaskedTraining, batches: Batches) -> None:
    """Tell accelerate how to wrap the module: whether some parameters get no gradient is tried out on one batch.

    PyTorch hangs or fails on such parameters when it is not told, and warns when it is told without need.
    """
    from accelerate import DistributedDataParallelKwargs

    before = {name: value.clone() for name, value in module.state_dict().items()}
    batch = {name: column.to(run.device) for name, column in batches.make(0).items()}
    module(**batch)["loss"].backward()
    idle = any(one.grad is None for one in module.parameters() if one.requires_grad)
    module.zero_grad(set_to_none=True)
    module.load_state_dict(before)
    run.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=idle)


# -- the end -------------------------------------------------------------------------------------------------


def conclude(run: Run, trained: Trained) -> Result:
    """Held-out loss, probes, pictures, the model folder and the report."""
    source = trained.source
    run.say("Measuring on held-out data")
    summary: dict[str, Any] = {
        "strategy": run.settings.require("strategy").name,
        "objective": run.settings.require("objective").name,
        "steps": run.settings.run.steps,
        "final_loss": run.recent("loss"),
        **held_out(trained, run),
        "parameters": sum(one.numel() for one in trained.network.parameters()),
        "processes": run.processes,
        **trained.costs.summary(),
    }
    if trained.waiting is not None:
        summary["waiting_for_data"] = round(trained.waiting, 4)
    skipped = Skipped(run.folder)
    skipped.note(unreadable(source))
    if not run.is_main:
        return run.finish(summary)
    files = {}
    if isinstance(source, ImageSource):
        summary |= probes(trained, run)
        files["preprocessor_config.json"] = preprocessing(source)
        skipped.note(unreadable(source))
        summary |= as_summary(skipped.all())
    summary["data"] = source.summary
    return run.finish(
        summary,
        model=trained.network,
        tokenizer=source if isinstance(source, TextSource) else None,
        pictures=pictures(trained, run) if isinstance(source, ImageSource) else None,
        samples=texts(trained, run) if isinstance(source, TextSource) else None,
        files=files,
    )


def held_out(trained: Trained, run: Run) -> dict[str, float]:
    """`held_out_loss` under the masks of one fixed seed, and `perplexity` of a causal language model.

    Every process measures all of it: an objective may add up over processes.
    """
    source = trained.source
    fixed = source.held_out if isinstance(source, TextSource) else source.evaluation("held_out")
    count, loss, nats = 0, 0.0, 0.0
    backbone: Any = trained.module.backbone
    causal = isinstance(backbone, TokenBackbone) and backbone.shift == 1
    for batch in _batches(fixed, HELD_OUT, run):
        rows = len(next(iter(batch.values())))
        with torch.no_grad():
            loss += float(trained.module(**batch)["loss"]) * rows
            if causal:
                nats += float(next_token_loss(backbone, batch["tokens"])) * rows
        count += rows
    numbers = {"held_out_loss": loss / count}
    return numbers | ({"perplexity": math.exp(nats / count)} if causal else {})


def next_token_loss(backbone: TokenBackbone, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood, in nats, of tokens int64 [B, L] after the first, under a causal model."""
    logits = backbone.logits(tokens)[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def probes(trained: Trained, run: Run) -> dict[str, float | str]:
    """Accuracy on held-out images of a linear and a kNN classifier on frozen features, and what labels are; or nothing.

    Beside it stands what is to be had for nothing: the `chance` of always saying the commonest label, and the same probes of
    the encoder before this training (untrained, or as the model folder has it).
    """
    source = trained.source
    if not isinstance(source, ImageSource) or not source.labelled:
        return {}
    after, labels = _probed(trained.module.backbone, source, run)
    objective = trained.module.objective
    untrained = adapt(model(run.settings, objective, source).to(run.device).eval(), objective.backbone)
    before, _ = _probed(untrained, source, run)
    return {
        **after,
        **{f"{name}_before": value for name, value in before.items()},
        "chance": float(labels.bincount().max() / len(labels)),
        "labels": source.label,
    }


@torch.no_grad()
def _probed(backbone: Any, source: ImageSource, run: Run) -> tuple[dict[str, float], Tensor]:
    """Both probes of an encoder, and the held-out labels."""
    sets = []
    for split in ("train", "held_out"):
        seen = [
            (pooled(backbone, batch["pixels"]).cpu(), batch["labels"].cpu())
            for batch in _batches(source.evaluation(split), PROBED, run)
        ]
        sets += [torch.cat(column) for column in zip(*seen)]
    train_x, train_y, test_x, test_y = sets
    return {
        "linear_probe": linear_accuracy(train_x, train_y, test_x, test_y),
        "knn_probe": knn_accuracy(train_x, train_y, test_x, test_y),
    }, test_y


def pooled(backbone: Any, pixels: Tensor) -> Tensor:
    """[B, C, H, W] → [B, D]: the mean of the encoder's last features over all places, nothing hidden."""
    return features.places(backbone, pixels).mean((1, 2))


def pictures(trained: Trained, run: Run) -> dict[str, Tensor]:
    """Of some held-out images `originals` in [0, 1], `masks`, `other_views` and `reconstructions` where there are any, and the
    maps of the encoder's features (see `features.maps`)."""
    source = trained.source
    assert isinstance(source, ImageSource)
    seen = spread_over(source.evaluation("held_out"), CANDIDATES)
    chosen = most_detailed(seen["pixels"], seen["labels"], PICTURES)
    batch = {name: column[chosen].to(run.device) for name, column in seen.items()}
    with torch.no_grad():
        out = trained.module(**batch)
    tensors = {"originals": source.denormalize(batch["pixels"])}
    keep = out["mask"].keep if not isinstance(out["mask"], AttentionMask) else None
    if keep is not None and keep.ndim == 3:
        tensors["masks"] = keep
    if "pixels_other_view" in batch:
        tensors["other_views"] = source.denormalize(batch["pixels_other_view"])
    reconstruction = out["outputs"].get("reconstruction")
    if reconstruction is not None and reconstruction.shape == batch["pixels"].shape:
        tensors["reconstructions"] = source.denormalize(reconstruction)
    return tensors | features.maps(trained.module.backbone, batch["pixels"])


def most_detailed(pixels: Tensor, labels: Tensor, count: int) -> Tensor:
    """Indices of `count` images, the classes in turn, of the half of each class whose values spread widest.

    An empty sky shows nothing of what a model has learned.
    """

    def turn(order: Tensor) -> Tensor:
        """How many of the same class come before, for each image in an order."""
        return (labels[order, None] == labels[order]).tril(-1).sum(1)

    detailed = pixels.flatten(1).std(1).argsort(descending=True, stable=True)
    half = detailed[turn(detailed) < (labels.bincount()[labels[detailed]] + 1) // 2].sort().values
    return half[turn(half).argsort(stable=True)][:count]


@torch.no_grad()
def texts(trained: Trained, run: Run) -> list[dict[str, Any]]:
    """What the model writes on held-out text, as lines of samples.jsonl: `text`, `tokens`, and when each was written (`order`).

    A causal model goes on from the first quarter of a sequence, token by token at a temperature of 0.8; another one fills in
    what the strategy hides, its likeliest token everywhere at once.
    """
    source = trained.source
    assert isinstance(source, TextSource)
    backbone: Any = trained.module.backbone
    given = spread_over(source.held_out, TEXTS)["tokens"].to(run.device)
    if backbone.shift == 1:
        first = max(given.shape[1] // 4, 1)
        generator = run.generator(stream=TEXTS)
        written = given.clone()
        for place in range(first, given.shape[1]):
            chances = (backbone.logits(written[:, :place])[:, -1].double() / 0.8).softmax(-1)
            written[:, place] = torch.multinomial(chances.cpu(), 1, generator=generator)[:, 0].to(run.device)
        order = torch.arange(given.shape[1]).sub(first).clamp(min=-1).expand_as(given)
    else:
        mask, _ = trained.module.draw({"tokens": given})
        if isinstance(mask, AttentionMask) or backbone.mask_token is None:
            return []
        likeliest = backbone.logits(given.masked_fill(~mask.keep, backbone.mask_token)).argmax(-1)
        written, order = torch.where(mask.keep, given, likeliest), -mask.keep.long()
    return [
        {"text": source.decode(row), "tokens": [source.decode([token]) for token in row], "order": when}
        for row, when in zip(written.tolist(), order.tolist())
    ]


def preprocessing(source: ImageSource) -> str:
    """preprocessor_config.json: how transformers prepares an image as the training did."""
    config = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": source.size, "width": source.size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(source.mean),
        "image_std": list(source.std),
    }
    return json.dumps(config, indent=2) + "\n"


def spread_over(source: Source, most: int) -> dict[str, Tensor]:
    """At most `most` samples of a source, evenly spread over it."""
    return source.batch(torch.linspace(0, len(source) - 1, min(most, len(source))).round().long())


def _batches(source: Source, most: int, run: Run) -> Iterator[dict[str, Tensor]]:
    """The same in batches on the device."""
    chosen = torch.linspace(0, len(source) - 1, min(most, len(source))).round().long()
    for part in chosen.split(run.settings.run.batch_size or 64):
        yield {name: column.to(run.device) for name, column in source.batch(part).items()}
