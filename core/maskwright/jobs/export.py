"""A pruned model as the library compressed-tensors reads it, written from the model folder of a run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskwright.errors import OutputError, UsageError
from maskwright.jobs.checkpoint import reason
from maskwright.mask import Mask, write_whole
from maskwright.toolkit.prunable import Weight

DENSE, BITMASK = "compressed-tensors", "compressed-tensors-bitmask"


def check_exportable(kind: str, weights: Sequence[Weight]) -> None:
    """Raise `UsageError` for an unknown format, and for weights that are none of an `nn.Linear`."""
    if kind not in (DENSE, BITMASK):
        raise UsageError(f"output.export={kind!r} must be {DENSE} or {BITMASK}.")
    other = next((weight.name for weight in weights if weight.type != "Linear"), None)
    if other is not None:
        raise UsageError(
            f"{kind} describes nn.Linear layers only, and {other} is of another kind; leave output.export out."
        )


def export(run: Path, kind: str, network: nn.Module, masks: Mapping[str, Mask], sparsity: float) -> Path:
    """Write `run`/`kind`/ from `run`/model/ and return it; it appears whole or not at all.

    "compressed-tensors" describes the sparsity in config.json and leaves the weights dense, which every version of the
    library reads, and with it transformers and vLLM. "compressed-tensors-bitmask" stores kept values beside one bit for each
    weight of linear layers, which is smaller; versions up to 0.14 decompress it.
    """
    from safetensors import SafetensorError

    target = run / kind
    temporary = run / f".{kind}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _fill(run / "model", temporary, kind, network, masks, sparsity)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{target} cannot be written ({reason(error)}); the model in {run / 'model'} is whole."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _fill(
    model: Path, target: Path, kind: str, network: nn.Module, masks: Mapping[str, Mask], sparsity: float
) -> None:
    pattern = all(_is_two_of_four(mask.keep) for mask in masks.values())
    config = json.loads((model / "config.json").read_text("utf-8"))
    storage = "dense" if kind == DENSE else "sparse-24-bitmask" if pattern else "sparse-bitmask"
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": [],
        "sparsity_config": {
            "format": storage,
            "sparsity_structure": "2:4" if pattern else "unstructured",
            "global_sparsity": sparsity,
            "targets": ["Linear"],
            "ignore": [
                name
                for name, module in network.named_modules()
                if isinstance(module, nn.Linear) and f"{name}.weight" not in masks
            ],
        },
    }
    found: set[str] = set()
    places: dict[str, str] = {}
    for path in sorted(model.iterdir()):
        if path.suffix == ".safetensors" and kind == BITMASK:
            names = _compress(path, target / path.name, masks, pattern, found)
            places |= dict.fromkeys(names, path.name)
        elif path.suffix == ".safetensors":
            _link(path, target / path.name)
        elif path.name != "config.json" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    if kind == BITMASK and (missing := set(masks) - found):
        raise UsageError(
            f"{BITMASK}: {model} holds {min(missing)} under another name; leave output.export out, or use {DENSE}."
        )
    write_whole(target / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    index = model / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text("utf-8"))
        listed["weight_map"] = places or listed["weight_map"]
        write_whole(target / index.name, (json.dumps(listed, indent=2) + "\n").encode())


def _is_two_of_four(keep: Tensor) -> bool:
    return keep.shape[-1] % 4 == 0 and bool((keep.unflatten(-1, (-1, 4)).sum(-1) == 2).all())


def _compress(
    path: Path, target: Path, masks: Mapping[str, Mask], pattern: bool, found: set[str]
) -> list[str]:
    """Rewrite a file with each pruned weight as values, bits (little-endian in rows) and shape; the names it now has.

    The pruned weights that it had are added to `found`.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            if name in masks:
                found.add(name)
                tensors |= _bitmask(
                    name.removesuffix(".weight"), file.get_tensor(name), masks[name].keep, pattern
                )
            else:
                tensors[name] = file.get_tensor(name)
    save_file(tensors, target, metadata=metadata)
    return list(tensors)


def _bitmask(prefix: str, weight: Tensor, keep: Tensor, pattern: bool) -> dict[str, Tensor]:
    bits = torch.from_numpy(np.packbits(keep.numpy(), axis=-1, bitorder="little"))
    values = weight[keep]
    stored: dict[str, Any] = {
        "compressed": values.view(len(weight), -1) if pattern else values,
        "bitmask": bits,
        "shape": torch.tensor(weight.shape)[:, None] if pattern else torch.tensor(weight.shape),
    }
    if not pattern:
        counts = keep.sum(1)
        stored["row_offsets"] = counts.cumsum(0) - counts
    return {f"{prefix}.{name}": tensor for name, tensor in stored.items()}


def _link(path: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
