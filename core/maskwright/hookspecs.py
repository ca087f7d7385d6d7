"""The hooks of maskwright. A plugin implements `maskwright_components`; an observer any of the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from maskwright.mask import Mask
    from maskwright.protocols import Component, RunInfo

hookspec = pluggy.HookspecMarker("maskwright")
hookimpl = pluggy.HookimplMarker("maskwright")


@hookspec
def maskwright_components() -> Iterable[type[Component]]:  # type: ignore[empty-body]
    """The component classes this plugin offers.

    Called once, when one of the plugin's components is first created. Each class has `kind`, `name`,
    `modalities`, `needs` and `provides` as class attributes and its hyper-parameters as attrs fields.
    """


@hookspec
def maskwright_run_started(run: RunInfo) -> None:
    """A job begins. `run` has its name, folder, settings and number of steps."""


@hookspec
def maskwright_mask_drawn(run: RunInfo, mask: Mask) -> None:
    """A training mask was drawn for the local batch, on the main process."""


@hookspec
def maskwright_step_ended(run: RunInfo, metrics: Mapping[str, Any]) -> None:
    """A step ended. `metrics` is the line written to metrics.jsonl."""


@hookspec
def maskwright_run_ended(run: RunInfo, result: Mapping[str, Any]) -> None:
    """The job ended well. `result` is its summary."""
