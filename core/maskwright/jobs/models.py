"""The models that jobs work on: a user's folder, read without running anything in it, or a small one made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from maskwright.backbones import defaults
from maskwright.backbones.folders import read_config, read_model
from maskwright.errors import BadModel
from maskwright.jobs.settings import ModelSection
from maskwright.sources.text import TextSource

DEFAULT = "default"
"""The word for a small model that is made here."""


def is_causal(config: dict[str, Any]) -> bool:
    """Whether a config is of a causal language model, by the class that saved it."""
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or ())


def image_size(section: ModelSection) -> int | None:
    """Pixels a side of the images that a model folder takes; None where it does not say, or for the default model."""
    if section.source == DEFAULT:
        return None
    return size_in(read_config(Path(section.source)))


def size_in(config: dict[str, Any]) -> int | None:
    """Pixels a side of the images that a config is for; None where it does not say."""
    size = config.get("image_size")
    return size if isinstance(size, int) else size[0] if isinstance(size, list) and size else None


def channels(section: ModelSection) -> int:
    """Channels of the images that the model takes."""
    return 3 if section.source == DEFAULT else int(read_config(Path(section.source)).get("num_channels", 3))


def vision_model(section: ModelSection, *, size: int, seed: int, backbone: str = "patch") -> Any:
    """A ViT ("patch", "grid") or ResNet ("conv"): the user's, or a small one for images of `size` pixels."""
    if section.source != DEFAULT:
        return read_model(Path(section.source), "AutoModel")
    if backbone == "conv":
        return defaults.convolutional_network(
            width=section.width or 32, depth=section.depth or 2, channels=3, seed=seed
        )
    patch = section.patch_size or 4
    if size % patch:
        raise BadModel(
            f"data.size={size} must be a multiple of model.patch_size={patch}, so that patches fill the image."
        )
    return defaults.vision_transformer(
        image_size=size,
        patch_size=patch,
        width=section.width or 128,
        depth=section.depth or 4,
        heads=section.heads or 4,
        seed=seed,
    )


def language_model(section: ModelSection, source: TextSource, *, causal: bool, seed: int) -> Any:
    """A causal or masked language model: the user's, or a small Llama or ModernBERT for the sequences of `source`.

    A user's model gets rows for the special tokens that its vocabulary lacks, and its config the mask token's id. Raises
    `BadModel` when its positions end before the sequences do.
    """
    if section.source == DEFAULT:
        make = defaults.causal_language_model if causal else defaults.masked_denoiser
        return make(
            vocabulary=source.vocabulary,
            length=source.length,
            width=section.width or 128,
            depth=section.depth or 4,
            heads=section.heads or 4,
            eos_token=source.eos_token,
            pad_token=source.pad_token,
            mask_token=source.mask_token,
            seed=seed,
        )
    folder = Path(section.source)
    config = read_config(folder)
    most = config.get("max_position_embeddings")
    if isinstance(most, int) and source.length > most:
        raise BadModel(
            f"The model in {folder} takes {most} tokens, data.length={source.length}; set data.length to at most {most}."
        )
    model = read_model(folder, "AutoModelForCausalLM" if is_causal(config) else "AutoModelForMaskedLM")
    if source.vocabulary > model.config.vocab_size:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            model.resize_token_embeddings(source.vocabulary)
    model.config.mask_token_id = source.mask_token
    return model


def tokenizer_of(section: ModelSection) -> Path | None:
    """The tokenizer.json of a model folder; None for the default model. Raises `BadModel` where it is missing."""
    return None if section.source == DEFAULT else tokenizer_in(Path(section.source))


def tokenizer_in(folder: Path) -> Path:
    """The tokenizer.json of a folder. Raises `BadModel` where it is missing."""
    read_config(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadModel(
            f"The model folder {folder} has no tokenizer.json; save a fast tokenizer there with save_pretrained."
        )
    return path
