"""The loops: pretrain, prune, sample and verify, on accelerate, with their report pages."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskwright.jobs.run import Result
    from maskwright.jobs.settings import Settings
    from maskwright.registry import Registry


def execute(
    settings: Settings,
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    observers: Sequence[str] = (),
    registry: Registry | None = None,
    quiet: bool = False,
) -> Result:
    """Run the job that `settings` (from `maskwright.jobs.settings.resolve`) describe, and return what it left.

    `folder` is where its files go: runs/<job>-<n> when none is named. With `resume` it names a run that was begun with the
    same settings, which goes on from its last checkpoint. `observers` are names of plugins that are told what happens.
    The global generators of torch are left as they were. Raises a `MaskwrightError`; after Ctrl-C an `Interrupted`, which
    says how to go on.
    """
    import torch

    from maskwright.errors import Interrupted
    from maskwright.jobs.run import Run

    job = importlib.import_module(f"maskwright.jobs.{settings.run.job}")
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        Run(
            settings, folder=folder, resume=resume, observers=observers, registry=registry, quiet=quiet
        ) as run,
    ):
        try:
            result: Result = getattr(job, settings.run.job)(run)
        except KeyboardInterrupt:
            raise Interrupted(f"Stopped; go on from the last checkpoint with: {run.resume_command}") from None
        return result
