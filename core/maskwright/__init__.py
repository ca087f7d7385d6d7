"""maskwright: one registry for masking in deep learning.

    import maskwright

    strategy = maskwright.create("mask-strategy", "colormae", color="green", ratio=0.75)
    objective = maskwright.create("objective", "mae").bind(vit)

Everything here is imported when it is first used: `import maskwright` imports neither torch nor any plugin.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskwright.backbones import adapt as adapt
    from maskwright.hookspecs import hookimpl as hookimpl
    from maskwright.jobs.training import MaskedTraining as MaskedTraining
    from maskwright.mask import AttentionMask as AttentionMask
    from maskwright.mask import Layout as Layout
    from maskwright.mask import Mask as Mask
    from maskwright.mask import StagedMask as StagedMask
    from maskwright.mask import load_masks as load_masks
    from maskwright.mask import save_masks as save_masks
    from maskwright.protocols import Batch as Batch
    from maskwright.protocols import BoundObjective as BoundObjective
    from maskwright.protocols import Budget as Budget
    from maskwright.protocols import Expert as Expert
    from maskwright.protocols import Loss as Loss
    from maskwright.protocols import MaskStrategy as MaskStrategy
    from maskwright.protocols import Objective as Objective
    from maskwright.protocols import Pruner as Pruner
    from maskwright.protocols import PruneResult as PruneResult
    from maskwright.protocols import PruneTask as PruneTask
    from maskwright.protocols import Sampler as Sampler
    from maskwright.protocols import SampleRequest as SampleRequest
    from maskwright.protocols import Samples as Samples
    from maskwright.protocols import Signals as Signals
    from maskwright.protocols import SparsityReport as SparsityReport
    from maskwright.registry import Registry as Registry
    from maskwright.registry import component as component
    from maskwright.registry import create as create
    from maskwright.registry import names as names
    from maskwright.settings import setting as setting

__version__ = "0.1.0"

_HOMES = {
    "maskwright.mask": ("Mask", "StagedMask", "AttentionMask", "Layout", "save_masks", "load_masks"),
    "maskwright.protocols": (
        *(
            "MaskStrategy",
            "Objective",
            "Pruner",
            "Sampler",
            "BoundObjective",
            "Batch",
            "Signals",
            "Loss",
            "Budget",
        ),
        *("Expert", "PruneTask", "PruneResult", "SparsityReport", "SampleRequest", "Samples"),
    ),
    "maskwright.registry": ("Registry", "component"),
    "maskwright.settings": ("setting",),
    "maskwright.hookspecs": ("hookimpl",),
    "maskwright.backbones": ("adapt",),
    "maskwright.jobs.training": ("MaskedTraining",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "create", "names", "registry"])


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    if name == "registry":
        return importlib.import_module("maskwright.registry")
    if name in ("create", "names"):
        return getattr(importlib.import_module("maskwright.registry"), name)
    raise AttributeError(f"module 'maskwright' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
