"""`MaskedTraining`: backbone, strategy and objective as one module that any trainer trains."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from maskwright.backbones import adapt
from maskwright.mask import Layout, Mask
from maskwright.protocols import Batch, Loss, MaskStrategy, Objective, Signals
from maskwright.registry import check_fit

_STRIDE = 1_000_003
"""Seeds of successive draws lie this far apart, so that neighbouring seeds do not share their streams."""


class MaskedTraining(nn.Module):
    """A model whose forward draws a mask and returns the objective's loss: `model(**batch)["loss"]`.

    It counts its own draws and optimiser steps (buffers, so that every trainer's checkpoint holds them), hence a resumed
    run draws the masks that it would have drawn. `total_steps` turns the count into the progress that strategies and
    objectives see; without it progress stays at `progress`, which the caller may set.

    With several processes every rank draws the mask of the *global* training batch from the same generator and takes its own
    rows; ranks must hold batches of equal size. An objective's own draws differ between ranks. In evaluation mode a batch is
    the rank's own business, and its mask follows from the seed alone.
    """

    draws: Tensor
    steps: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        strategy: MaskStrategy,
        objective: Objective,
        *,
        seed: int = 0,
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        check_fit(strategy, objective)
        self.strategy = strategy
        self.objective = objective
        self.bound = objective.bind(adapt(backbone, objective.backbone))
        self.seed = seed
        self.total_steps = total_steps
        self.progress = 0.0
        self.mask_drawn: Callable[[Mask], None] | None = None
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._generators: dict[torch.device, torch.Generator] = {}
        self._follow_optimizers()

    @property
    def backbone(self) -> nn.Module:
        """The backbone as the objective sees it (an adapter, for models of a library)."""
        return self.bound.backbone

    def forward(self, **batch: Tensor) -> dict[str, Any]:
        """`loss` [], and what the objective reports: its parts and outputs, and the `mask`."""
        mask, signals = self.draw(batch)
        loss: Loss = self.bound(
            batch,
            mask,
            signals=signals,
            progress=self.current_progress(),
            generator=self._generator(mask.device, 1 + self._place()[1]),
        )
        if self.training:
            self.draws += 1
        return {"loss": loss.total, "parts": loss.parts, "outputs": loss.outputs, "mask": mask}

    def draw(self, batch: Batch) -> tuple[Mask, Signals]:
        """This rank's rows of the global batch's mask, and the local signals."""
        signals = dict(self.bound.signals(batch))
        needed = {name: signals.get(name, batch.get(name)) for name in self.strategy.needs}
        layout = Layout.of(self.backbone, batch)
        world, rank = self._place()
        wide = Layout(layout.batch * world, layout.grid, layout.device, layout.patch_size)
        mask = self.strategy.draw(
            wide,
            signals={name: _gathered(value, world) for name, value in needed.items() if value is not None},
            progress=self.current_progress(),
            generator=self._generator(layout.device, 0),
        )
        if world > 1:
            mask = mask.rows(slice(rank * layout.batch, (rank + 1) * layout.batch))
        if self.mask_drawn is not None:
            self.mask_drawn(mask)
        return mask, signals

    def current_progress(self) -> float:
        """Share of training done, in [0, 1]."""
        if self.total_steps is None:
            return self.progress
        return min(1.0, int(self.steps) / self.total_steps)

    def _generator(self, device: torch.device, stream: int) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device=device)
        count = int(self.draws) if self.training else -1
        return self._generators[device].manual_seed(((self.seed * _STRIDE + count) * 1024 + stream) % 2**63)

    def _place(self) -> tuple[int, int]:
        """(number of ranks that share the batch, this rank)."""
        shared = self.training and dist.is_available() and dist.is_initialized()
        return (dist.get_world_size(), dist.get_rank()) if shared else (1, 0)

    def _follow_optimizers(self) -> None:
        """After each step of an optimizer that holds our parameters: count it, and let the teacher follow."""
        mine = weakref.ref(self)

        def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            model = mine()
            if model is not None and model._holds_a_parameter_of(optimizer):
                model.steps += 1
                model.bound.after_step(model.current_progress())

        handle = register_optimizer_step_post_hook(stepped)
        # Not inside the hook: PyTorch is iterating over its hooks then.
        weakref.finalize(self, handle.remove)

    def _holds_a_parameter_of(self, optimizer: torch.optim.Optimizer) -> bool:
        first = next((p for group in optimizer.param_groups for p in group["params"]), None)
        return first is not None and any(first is parameter for parameter in self.parameters())


def _gathered(value: Tensor, world: int) -> Tensor:
    if world == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world)]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)
