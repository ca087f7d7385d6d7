"""Saved masks on a dense model, shard by shard: what `maskwright apply` does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from maskwright.backbones.folders import read_config
from maskwright.errors import BadData, OutputError, reason
from maskwright.mask import load_masks, masks_of
from maskwright.protocols import SparsityReport


def apply_masks(model: Path, masks: Path, target: Path) -> SparsityReport:
    """Write the model of a folder with its weights outside the masks set to zero; the folder appears whole or not at all.

    Only one shard is in memory at a time. Raises `BadModel` for a folder without safetensors, `BadData` for masks of tensors that
    the model does not have or of other shapes, and `OutputError` for a target that is not empty or cannot be written.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    read_config(model)
    if masks_of(masks) != "weights":
        raise BadData(
            f"The masks in {masks} are of a model's change, not of its weights: there is nothing to set to zero; use the model/ folder "
            "beside them."
        )
    found = load_masks(masks)
    shards = sorted(model.glob("*.safetensors"))
    left = dict(found)
    for path in shards:
        with safe_open(path, "pt") as file:
            for name in set(file.keys()) & left.keys():
                mask, shape = left.pop(name), tuple(file.get_slice(name).get_shape())
                if tuple(mask.shape) != shape:
                    raise BadData(
                        f"The mask of {name} is {list(mask.shape)}, the weight in {path} {list(shape)}; they belong to different models."
                    )
    if left:
        raise BadData(
            f"{model} has no tensor {min(left)}, of which {masks} holds a mask; they belong to different models."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"The output folder {target} is not empty; choose another one with --out.")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for path in sorted(model.iterdir()):
            if path in shards:
                with safe_open(path, "pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                    metadata = file.metadata()
                for name in tensors.keys() & found.keys():
                    tensors[name] = tensors[name].masked_fill(~found[name].keep, 0)
                save_file(tensors, temporary / path.name, metadata=metadata)
            elif path.is_file():
                shutil.copyfile(path, temporary / path.name)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{target} cannot be written ({reason(error)}); {model} is untouched.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return SparsityReport.of(found)


__all__ = ["apply_masks"]
