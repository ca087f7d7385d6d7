"""Model folders as transformers writes them, read without running anything that is in them."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from maskwright.errors import BadModel, reason

logger = logging.getLogger("maskwright")

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Ends of names of files that are pickles, as a rule: loading one runs the code in it."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises `BadModel` when the folder or the file is missing, the file is not what transformers writes, or the weights are
    missing or pickles.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadModel(
            f"The model folder {folder} does not exist; give a folder that save_pretrained wrote; nothing is "
            "downloaded."
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
        and config["model_type"] in ("vit", "deit", "beit", "swin")
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
