"""The models that jobs work on: a user's folder, read without running anything in it, or a small one made here."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from maskwright.backbones import defaults
from maskwright.errors import BadModel
from maskwright.jobs.checkpoint import PICKLES, reason
from maskwright.jobs.settings import ModelSection
from maskwright.sources.text import TextSource

logger = logging.getLogger("maskwright")

DEFAULT = "default"
"""The word for a small model that is made here."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises `BadModel` when the folder or the file is missing, the file is not what transformers writes, or the weights are
    missing or pickles.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadModel(
            f"The model folder {folder} does not exist; give a folder that save_pretrained wrote (nothing is downloaded), "
            f"or {DEFAULT!r}."
        )
    path = folder / "config.json"
    if not path.is_file():
        raise BadModel(f"The model folder {folder} has no config.json; save the model with save_pretrained.")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadModel(f"{path} cannot be read ({reason(error)}).") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BadModel(f'{path} is no config of transformers: it has no "model_type".')
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(one.name for one in folder.iterdir() if one.suffix.lower() in PICKLES)
        if pickles:
            raise BadModel(
                f"The model folder {folder} has its weights as a pickle only ({pickles[0]}), and loading one runs whatever "
                "code is in it: load it where you trust it and call save_pretrained, which writes safetensors."
            )
        raise BadModel(f"The model folder {folder} has no weights (*.safetensors).")
    return config


def read_model(folder: Path, kind: str, dtype: torch.dtype | str = torch.float32) -> Any:
    """A model of a folder; `kind` is the class of transformers that reads it, such as "AutoModelForCausalLM".

    Weights that the folder lacks are new, and a warning of the logger "maskwright" names them; `dtype` "auto" leaves the weights
    as they were saved. Raises `BadModel` for what `read_config` refuses, a kind of model that transformers does not know, and
    damaged or foreign weights.
    """
    import transformers
    from safetensors import SafetensorError

    config = read_config(folder)
    names = _weight_names(folder)
    given: dict[str, Any] = {}
    # Without this, transformers adds a pooler that no objective here trains.
    if (
        kind == "AutoModel"
        and config["model_type"] in ("vit", "deit")
        and not any("pooler." in one for one in names)
    ):
        given["add_pooling_layer"] = False
    try:
        with quiet_transformers():
            model, info = getattr(transformers, kind).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=dtype,
                output_loading_info=True,
                **given,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise BadModel(
            f"The model folder {folder} ({config['model_type']}) cannot be read as {kind}: {reason(error)}"
        ) from error
    missing = sorted(info["missing_keys"])
    if len(missing) >= len(model.state_dict()):
        raise BadModel(
            f"The model folder {folder} holds no weight of a {type(model).__name__}, only {names[0]} and the like."
        )
    if missing:
        logger.warning(
            "The model folder %s lacks %d weights of a %s, such as %s: they begin at random.",
            folder,
            len(missing),
            type(model).__name__,
            missing[0],
        )
    return model


def _weight_names(folder: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                names += file.keys()
        except (OSError, SafetensorError) as error:
            raise BadModel(f"{path} is damaged ({reason(error)}); save the model again.") from None
    return names


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and tables; what matters in them is said by us."""
    from transformers.utils import logging as its

    level, shown = its.get_verbosity(), its.is_progress_bar_enabled()
    its.set_verbosity_error()
    its.disable_progress_bar()
    try:
        yield
    finally:
        its.set_verbosity(level)
        if shown:
            its.enable_progress_bar()


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
    """A ViT ("patch") or ResNet ("conv"): the user's, or a small one for images of `size` pixels."""
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
