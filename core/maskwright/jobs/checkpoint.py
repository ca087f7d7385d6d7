"""Checkpoints: nested states in one safetensors file, written whole or not at all, and never a pickle."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskwright.backbones.folders import PICKLES
from maskwright.errors import CheckpointError, OutputError, reason

_FORMAT = "maskwright-checkpoint-1"
Header = dict[str, Any]


def save_checkpoint(path: Path, state: Mapping[str, Any], header: Header) -> None:
    """Write what `state` holds at this moment, and `header` (JSON), to `path`; an earlier file stays until this one is whole.

    `state` maps names to objects with `state_dict()`, or to generators. Raises `OutputError` when it cannot be written and
    `CheckpointError` for a state that has something else than tensors, numbers, texts, lists and tables.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    tree = {name: _flat(_state_of(thing), name, tensors, {}, set()) for name, thing in state.items()}
    metadata = {
        "format": _FORMAT,
        "header": json.dumps(header),
        "state": json.dumps(tree),
        "checksum": _checksum(tensors),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=metadata)
        handle = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"The checkpoint {path} cannot be written ({reason(error)}); free the disk or choose another folder"
            f"{'; the earlier checkpoint is intact' if path.exists() else ''}."
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def load_checkpoint(path: Path) -> tuple[dict[str, Any], Header]:
    """(states by name, header) of a file that `save_checkpoint` wrote.

    Raises `CheckpointError` for a file that is damaged or no checkpoint, and for a pickle beside it.
    """
    from safetensors import SafetensorError, safe_open

    refuse_pickles(path.parent)
    try:
        with safe_open(path, "pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is a safetensors file, but no checkpoint of maskwright.")
        if metadata["checksum"] != _checksum(tensors):
            raise ValueError("its checksum is wrong")
        tree, header = json.loads(metadata["state"]), json.loads(metadata["header"])
        return {name: _nested(value, tensors) for name, value in tree.items()}, header
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"The checkpoint {path} is damaged ({reason(error)}); put a good copy there, or delete it to begin again."
        ) from error


def read_header(path: Path) -> Header:
    """The header alone; the tensors are not read. Raises `CheckpointError` as `load_checkpoint` does."""
    from safetensors import SafetensorError, safe_open

    refuse_pickles(path.parent)
    try:
        with safe_open(path, "pt", device="cpu") as file:
            header: Header = json.loads((file.metadata() or {})["header"])
            return header
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint {path} is damaged ({reason(error)}); put a good copy there, or delete it to begin again."
        ) from error


def restore(thing: Any, state: Any, name: str, path: Path) -> None:
    """Give an object the state that was saved of it. Raises `CheckpointError` when it does not fit."""
    try:
        if isinstance(thing, torch.Generator):
            thing.set_state(state["generator"])
        else:
            thing.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"The checkpoint {path} does not fit this run's {name} ({reason(error)}); it is of another run."
        ) from error


def refuse_pickles(folder: Path) -> None:
    """Raise `CheckpointError` when a folder of checkpoints has a file that looks like a pickle."""
    found = sorted(path.name for path in folder.glob("*") if path.suffix.lower() in PICKLES)
    if found:
        raise CheckpointError(
            f"{folder / found[0]} is a pickle, and loading one runs whatever code is in it: maskwright reads safetensors "
            "only. Remove the file."
        )


def _state_of(thing: Any) -> Any:
    return {"generator": thing.get_state()} if isinstance(thing, torch.Generator) else thing.state_dict()


def _flat(
    value: Any, place: str, tensors: dict[str, Tensor], known: dict[Any, str], storages: set[int]
) -> Any:
    """The value as JSON in which {"tensor": name} stands for each tensor; a tensor that occurs twice is kept once."""
    if isinstance(value, np.generic):
        value = value.item()
    if (
        value is None
        or isinstance(value, bool | int | str)
        or (type(value) is float and math.isfinite(value))
    ):
        return value
    if isinstance(value, float):
        return {"float": repr(value)}
    if isinstance(value, Tensor):
        tensor = value.detach()
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and same in known:
            return {"tensor": known[same]}
        known[same] = place
        tensor = tensor.cpu().contiguous()
        # safetensors refuses tensors that share memory: views of one storage are taken apart.
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[place] = tensor
        return {"tensor": place}
    if isinstance(value, Mapping):
        return {
            "pairs": [
                [key, _flat(item, f"{place}/{key}", tensors, known, storages)] for key, item in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        items = [_flat(item, f"{place}/{i}", tensors, known, storages) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    raise CheckpointError(
        f"The state {place} is a {type(value).__name__}, which a checkpoint cannot hold: a state_dict() must consist of "
        "tensors, numbers, texts, lists and tables."
    )


def _nested(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_nested(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_nested(item, tensors) for item in content)
    return {key: _nested(item, tensors) for key, item in content}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        if tensors[name].numel():
            total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"
