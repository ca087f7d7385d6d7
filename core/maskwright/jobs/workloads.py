"""What a model is pruned on: batches, a loss, and one number that says how good it still is, by the kind of model.

Causal language models are measured by perplexity, masked ones by the perplexity of hidden tokens, image classifiers by accuracy, and
encoders of text or images by the cosine of their embeddings to those of the model as it was given.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from maskwright.backbones.folders import read_config, read_model
from maskwright.errors import BadData, BadModel, NumericalError
from maskwright.jobs import models
from maskwright.jobs.pretrain import embedded_language_model, spread_over
from maskwright.jobs.run import Run
from maskwright.jobs.settings import DataSection
from maskwright.protocols import Batch
from maskwright.sources.images import ImageSource, load_images
from maskwright.sources.text import EOS, TextSource, load_text

HELD_OUT = 256
"""Held-out samples that quality is measured on, at most."""

_HIDDEN = 0.15
"""Share of the tokens that a masked language model is asked for."""


@attrs.define(eq=False)
class Workload:
    """A model with what it is calibrated, trained and measured on.

    `measure` names the number, `better` says whether "lower" or "higher" is. `prepare` turns a batch of the source into what the
    loss takes. `reader` is the class of transformers that reads the saved model again.
    """

    network: Any
    source: TextSource | ImageSource
    reader: str
    measure: str
    better: str
    loss: Callable[[nn.Module, Batch], Tensor]
    score: Callable[[nn.Module, Batch], Tensor]
    """A number for each sample of a batch [B], whose mean (or its exponential, for a perplexity) is the quality."""
    prepare: Callable[[Batch], Batch] = lambda batch: batch

    @property
    def held_out(self) -> TextSource | ImageSource:
        """Samples that nothing is calibrated or trained on."""
        return (
            self.source.held_out
            if isinstance(self.source, TextSource)
            else self.source.evaluation("held_out")
        )

    def __len__(self) -> int:
        """Training samples of one epoch."""
        return len(self.source)

    def order(self, epoch: int) -> Tensor:
        """The training samples of an epoch in their order, int64 [len(workload)]."""
        return self.source.order(epoch)

    def batch(self, indices: Tensor, epoch: int = 0) -> dict[str, Tensor]:
        """Samples int64 [B] of an epoch, as the loss takes them."""
        return dict(self.prepare(self.source.batch(indices, epoch)))

    def calibration(self, run: Run) -> list[Batch]:
        """Training samples in their order of the first epoch, in batches: as many as `run.calibration`."""
        count = min(run.settings.run.calibration or 128, len(self.source))
        parts = self.source.order(0)[:count].split(run.settings.run.batch_size or count)
        return [_on(run.device, self.batch(part)) for part in parts]

    @torch.no_grad()
    def quality(self, model: nn.Module, run: Run) -> float:
        """The measure on held-out samples, in evaluation mode. Raises `NumericalError` when it is not finite."""
        model.eval()
        batch = self.prepare(spread_over(self.held_out, HELD_OUT))
        size = max(run.settings.run.batch_size or 1, 16)
        parts = zip(*(column.split(size) for column in batch.values()))
        scores = [self.score(model, _on(run.device, dict(zip(batch, part)))) for part in parts]
        mean = float(torch.cat(scores).double().mean())
        if not math.isfinite(mean):
            raise NumericalError(
                f"The model's {self.measure} on held-out data is not finite: look at its weights and its dtype before pruning."
            )
        return math.exp(min(mean, 700.0)) if "perplexity" in self.measure else mean


def _on(device: torch.device, batch: Batch) -> Batch:
    return {name: column.to(device) for name, column in batch.items()}


def workload(run: Run) -> Workload:
    """The model of a run's settings, and what it is pruned on: the user's, or the embedded language model and its text.

    Raises `BadModel` for a model that nothing here can measure, or that does not take the data.
    """
    section = run.settings.model
    if section.source == models.DEFAULT:
        trained = embedded_language_model(run)
        assert isinstance(trained.source, TextSource)
        return causal_text(trained.network, trained.source)
    return of_folder(Path(section.source), run.settings.data, run.seed)


def of_folder(folder: Path, data: DataSection, seed: int) -> Workload:
    """The model of a folder on these data. Raises what `workload` raises."""
    config = read_config(folder)
    names = config.get("architectures") or [f"{config['model_type']} model"]
    if models.is_causal(config):
        network = read_model(folder, "AutoModelForCausalLM", dtype="auto")
        return causal_text(network, readable_text(folder, data, seed, network, config))
    if any(name.endswith("ForMaskedLM") for name in names):
        network = read_model(folder, "AutoModelForMaskedLM", dtype="auto")
        return masked_text(network, readable_text(folder, data, seed, network, config), folder)
    if any(name.endswith("ForImageClassification") for name in names):
        network = read_model(folder, "AutoModelForImageClassification", dtype="auto")
        return classified_images(network, _images(folder, data, seed, config), folder)
    if any(name.endswith("Model") for name in names):
        network = read_model(folder, "AutoModel", dtype="auto")
        if "vocab_size" in config:
            return embedded(
                network, readable_text(folder, data, seed, network, config, room=2), _wrapped(folder)
            )
        if "num_channels" in config:
            images = _images(folder, data, seed, config)
            return embedded(network, images, _renormalized(images, folder))
    raise BadModel(
        f"The model in {folder} is a {', '.join(names)}; this job measures language models, image classifiers, and encoders of text "
        "or images. Other models are pruned from Python, with maskwright.create('pruner', …).prune(model, task)."
    )


# -- kinds -----------------------------------------------------------------------------------------------------------


def causal_text(network: Any, source: TextSource) -> Workload:
    """A causal language model on its text."""
    return Workload(
        network, source, "AutoModelForCausalLM", "perplexity", "lower", next_token_loss, next_token_nats
    )


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log-likelihood, in nats, of tokens int64 [B, L] after the first."""
    return next_token_nats(model, batch).mean()


def next_token_nats(model: nn.Module, batch: Batch) -> Tensor:
    """The same of each sequence, [B]."""
    logits = model(input_ids=batch["tokens"], use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.mT, batch["tokens"][:, 1:], reduction="none").mean(1)


def masked_text(network: Any, source: TextSource, folder: Path) -> Workload:
    """A masked language model: 15 % of the tokens are hidden, by position and sequence only, and it is asked for them."""
    token = network.config.mask_token_id if hasattr(network.config, "mask_token_id") else None
    token = token if token is not None else _token(folder, "[MASK]", "<mask>")
    if token is None:
        raise BadModel(
            f"Neither the config nor the tokenizer in {folder} names a mask token; set mask_token_id."
        )

    def prepare(batch: Batch) -> Batch:
        tokens = batch["tokens"]
        # Hidden positions follow from the tokens themselves: the same sequence is always asked the same question.
        state = (tokens.cumsum(1) * 2654435761 + torch.arange(tokens.shape[1]) * 40503) % 65536
        hidden = state.argsort(1).argsort(1) < max(1, round(_HIDDEN * tokens.shape[1]))
        return {"tokens": tokens.masked_fill(hidden, token), "labels": tokens.masked_fill(~hidden, -100)}

    def nats(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(input_ids=batch["tokens"]).logits.float()
        each = nn.functional.cross_entropy(logits.mT, batch["labels"], reduction="none")
        return each.sum(1) / (batch["labels"] >= 0).sum(1)

    return Workload(
        network,
        source,
        "AutoModelForMaskedLM",
        "perplexity of hidden tokens",
        "lower",
        lambda model, batch: nats(model, batch).mean(),
        nats,
        prepare,
    )


def classified_images(network: Any, source: ImageSource, folder: Path) -> Workload:
    """An image classifier on labelled images."""
    if not source.labelled or len(source.classes) != network.config.num_labels:
        have = f"{len(source.classes)} classes" if source.labelled else "no labels"
        raise BadData(
            f"The classifier in {folder} has {network.config.num_labels} classes and {source.name} has {have}; give data.source a "
            "folder with one sub-folder of images for each class, in the model's order by name."
        )

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(pixel_values=batch["pixels"]).logits.float()
        return nn.functional.cross_entropy(logits, batch["labels"])

    def right(model: nn.Module, batch: Batch) -> Tensor:
        answers = model(pixel_values=batch["pixels"]).logits.argmax(-1)
        return (answers == batch["labels"]).double()

    prepare = _renormalized(source, folder)
    return Workload(
        network, source, "AutoModelForImageClassification", "accuracy", "higher", loss, right, prepare
    )


def embedded(
    network: Any, source: TextSource | ImageSource, prepare: Callable[[Batch], Batch] = lambda batch: batch
) -> Workload:
    """An encoder, whose embeddings (means over tokens or places) are to stay those of a frozen copy of itself."""
    dense = copy.deepcopy(network).eval().requires_grad_(False)

    def targets(batch: Batch) -> Batch:
        batch = prepare(batch)
        column = batch["tokens"] if "tokens" in batch else batch["pixels"]
        device = next(dense.parameters()).device
        with torch.no_grad():
            return {**batch, "embedding": embedding(dense, _on(device, batch)).to(column.device)}

    def distance(model: nn.Module, batch: Batch) -> Tensor:
        return 1 - nn.functional.cosine_similarity(embedding(model, batch), batch["embedding"])

    return Workload(
        network,
        source,
        "AutoModel",
        "cosine to the dense embeddings",
        "higher",
        lambda model, batch: distance(model, batch).mean(),
        lambda model, batch: 1 - distance(model, batch),
        targets,
    )


def embedding(model: nn.Module, batch: Batch) -> Tensor:
    """[B, D]: the mean of the last features over tokens or places, in float32."""
    if "tokens" in batch:
        return model(input_ids=batch["tokens"]).last_hidden_state.float().mean(1)
    features = model(pixel_values=batch["pixels"]).last_hidden_state.float()
    return features.mean((2, 3)) if features.ndim == 4 else features.mean(1)


# -- data ------------------------------------------------------------------------------------------------------------


def readable_text(
    folder: Path, data: DataSection, seed: int, network: Any, config: dict[str, Any], *, room: int = 0
) -> TextSource:
    """The text with the model's own tokenizer, `room` tokens shorter than the model takes."""
    most = config.get("max_position_embeddings", config.get("n_positions"))
    length = data.length or min(128, most if isinstance(most, int) else 128)
    if isinstance(most, int) and length > most:
        raise BadModel(
            f"The model in {folder} takes {most} tokens, data.length={length}; set data.length to at most {most}."
        )
    tokenizer = models.tokenizer_in(folder)
    source = load_text(data.source, length=length - room, tokenizer=tokenizer, seed=seed)
    return _readable(source, tokenizer, network)


def _readable(source: TextSource, tokenizer: Path | None, network: Any) -> TextSource:
    """The text with the model's own end of a document, or none, where its tokenizer does not know `<eos>`.

    Raises `BadModel` for tokens that the model has no embedding of.
    """
    from tokenizers import Tokenizer

    if Tokenizer.from_file(str(tokenizer)).token_to_id(EOS) is None:
        own = getattr(network.config, "eos_token_id", None)
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


def _wrapped(folder: Path) -> Callable[[Batch], Batch]:
    """Sequences between the tokens that the model's tokenizer puts round them, where it has such."""
    first, last = _token(folder, "[CLS]", "<s>"), _token(folder, "[SEP]", "</s>")

    def prepare(batch: Batch) -> Batch:
        tokens = batch["tokens"]
        column = tokens.new_ones(len(tokens), 1)
        parts = [column * first if first is not None else None, tokens]
        parts.append(column * last if last is not None else None)
        return {"tokens": torch.cat([part for part in parts if part is not None], 1)}

    return prepare


def _token(folder: Path, *names: str) -> int | None:
    """The id of the first of these tokens that the tokenizer of a folder has."""
    from tokenizers import Tokenizer

    codec = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return next((found for name in names if (found := codec.token_to_id(name)) is not None), None)


def _images(folder: Path, data: DataSection, seed: int, config: dict[str, Any]) -> ImageSource:
    if data.source == "standard-library":
        raise BadData(
            f"The model in {folder} takes images; set data.source to a folder of images, 'digits' or 'photographs'."
        )
    size = data.size or models.size_in(config) or 224
    return load_images(data.source, size=size, channels=int(config.get("num_channels", 3)), seed=seed)


def _renormalized(source: ImageSource, folder: Path) -> Callable[[Batch], Batch]:
    """Pixels normalised as preprocessor_config.json says, where the model's folder has one."""
    path = folder / "preprocessor_config.json"
    try:
        said = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        mean, std = (torch.tensor(said[name]).view(-1, 1, 1) for name in ("image_mean", "image_std"))
    except (KeyError, TypeError, ValueError):
        return lambda batch: batch

    def prepare(batch: Batch) -> Batch:
        return {**batch, "pixels": (source.denormalize(batch["pixels"]) - mean) / std}

    return prepare
