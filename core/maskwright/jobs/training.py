"""`MaskedTraining`: backbone, strategy and objective as one module that any trainer trains."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from maskwright.backbones import adapt
from maskwright.errors import BadParameter, MissingColumn, MissingSignal
from maskwright.mask import Layout, Mask
from maskwright.protocols import Batch, Loss, MaskStrategy, Objective, Signals
from maskwright.registry import check_fit


class MaskedTraining(nn.Module):
    """A model whose forward draws a mask and returns the objective's loss: `model(**batch)["loss"]`.

    `total_steps` turns the optimiser steps that it counts into the progress that strategies and objectives see; without it
    progress stays at the attribute `progress` (0.0), which the caller may set. `columns` names batch columns beside those that
    the objective needs, when the strategy is to read them as signals.

    It counts its draws (one a training forward, hence several a step with gradient accumulation) and the optimiser's steps.
    Both are part of its state_dict, so that every trainer's checkpoint holds them and a resumed run draws the masks that it
    would have drawn. A step counts, and the objective's teachers follow, after `step()` of any torch optimiser that holds one
    of its parameters, also inside a wrapper (accelerate, a gradient scaler): a step that the scaler skips does not count, and
    of several optimisers that step after the same forward only the first does. In evaluation mode nothing is counted and the
    mask depends on the seed and the batch size only.

    With several processes every rank draws the mask of the *global* training batch from the same generator and takes its own
    rows; ranks must hold batches of equal size and draw together. In evaluation mode a batch is its rank's own business.

    transformers.Trainer drops columns that `forward` does not name: when an objective reads others than pixels and tokens, set
    `remove_unused_columns=False` in its arguments.
    """

    accepts_loss_kwargs: ClassVar[bool] = False
    """transformers.Trainer: the loss is a mean, so that it is divided by the number of accumulated batches."""

    draws: int
    steps: int

    def __init__(
        self,
        backbone: nn.Module,
        strategy: MaskStrategy,
        objective: Objective,
        *,
        seed: int = 0,
        total_steps: int | None = None,
        columns: Collection[str] = (),
    ) -> None:
        super().__init__()
        if seed < 0:
            raise BadParameter(f"MaskedTraining: seed={seed} must be at least 0.")
        if total_steps is not None and total_steps < 1:
            raise BadParameter(f"MaskedTraining: total_steps={total_steps} must be at least 1, or None.")
        check_fit(strategy, objective, objective.needs | frozenset(columns))
        self.strategy = strategy
        self.objective = objective
        self.bound = objective.bind(adapt(backbone, objective.backbone))
        self.seed = seed
        self.total_steps = total_steps
        self.progress = 0.0
        self.mask_drawn: Callable[[Mask], None] | None = None
        self.draws = self.steps = 0
        self._unstepped = False
        _follow_optimizers(self)

    @property
    def backbone(self) -> nn.Module:
        """The backbone as the objective sees it (an adapter, for models of a library)."""
        return self.bound.backbone

    def forward(
        self,
        pixels: Tensor | None = None,
        tokens: Tensor | None = None,
        return_loss: bool = True,
        **columns: Tensor,
    ) -> dict[str, Any]:
        """`loss` [], and what the objective reports: its parts and outputs, and the `mask`.

        Every column is one keyword. `pixels` and `tokens` are named, and `return_loss` is there, for transformers.Trainer: it
        drops columns that have no name here, and evaluates only models that have the latter.
        """
        batch = {
            **({} if pixels is None else {"pixels": pixels}),
            **({} if tokens is None else {"tokens": tokens}),
            **columns,
        }
        mask, signals = self.draw(batch)
        loss: Loss = self.bound(
            batch,
            mask,
            signals=signals,
            progress=self.current_progress(),
            generator=self._generator(mask.device, 1 + _rank()),
        )
        if self.training:
            self.draws += 1
        return {"loss": loss.total, "parts": loss.parts, "outputs": loss.outputs, "mask": mask}

    def draw(self, batch: Batch) -> tuple[Mask, Signals]:
        """This rank's rows of the global batch's mask, and the local signals.

        Raises `MissingColumn` when the batch lacks a column that the objective or the strategy reads, and `MissingSignal` for a
        signal that the objective cannot give with the models that it has.
        """
        if missing := self.objective.needs - batch.keys():
            raise MissingColumn(_without(self.objective.name, missing, batch))
        signals = dict(self.bound.signals(batch))
        if missing := self.strategy.needs - signals.keys() - batch.keys():
            if promised := sorted(missing & self.objective.provides):
                raise MissingSignal(
                    f"With the models that it was given, {self.objective.name!r} gives no {', '.join(map(repr, promised))}, which "
                    f"{self.strategy.name!r} needs; choose another strategy, or other models."
                )
            raise MissingColumn(_without(self.strategy.name, missing, batch))
        needed = {name: signals[name] if name in signals else batch[name] for name in self.strategy.needs}
        layout = Layout.of(self.backbone, batch)
        world, rank = (_world(), _rank()) if self.training else (1, 0)
        mask = self.strategy.draw(
            Layout(layout.batch * world, layout.grid, layout.device, layout.patch_size),
            signals={name: _gathered(value, world) for name, value in needed.items()},
            progress=self.current_progress(),
            generator=self._generator(layout.device, 0),
        )
        if world > 1:
            mask = mask.rows(slice(rank * layout.batch, (rank + 1) * layout.batch))
        self._unstepped |= self.training
        if self.mask_drawn is not None:
            self.mask_drawn(mask)
        return mask, signals

    def current_progress(self) -> float:
        """Share of training done, in [0, 1]."""
        if self.total_steps is None:
            return self.progress
        return min(1.0, self.steps / self.total_steps)

    def _generator(self, device: torch.device, stream: int) -> torch.Generator:
        """A fresh generator for this draw. Stream 0 is the global batch's mask, 1 + rank the rank's own."""
        # Hashed, because torch reads 32 bits of a seed: neighbouring seeds must not share their draws.
        count = self.draws + 1 if self.training else 0
        words = np.random.SeedSequence((self.seed, count, stream)).generate_state(1, np.uint64)
        return torch.Generator(device=device).manual_seed(int(words[0] >> 1))

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._unstepped:
            return
        mine = {id(parameter) for parameter in self.parameters()}
        if any(id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"]):
            self._unstepped = False
            self.steps += 1
            self.bound.after_step(self.current_progress())

    # Plain numbers in the module and a tensor in the state: reading them costs no synchronisation with a device, and every
    # checkpoint format holds them.

    def get_extra_state(self) -> Tensor:
        """Draws and steps, int64 [2]."""
        return torch.tensor([self.draws, self.steps])

    def set_extra_state(self, state: Tensor) -> None:
        """Go on counting from a checkpoint's numbers."""
        self.draws, self.steps = (int(count) for count in state)

    def __getstate__(self) -> dict[str, Any]:
        """Without `mask_drawn`: who watches a model does not watch its copies."""
        return {**self.__dict__, "mask_drawn": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _follow_optimizers(self)


_LIVE: weakref.WeakSet[MaskedTraining] = weakref.WeakSet()
_HOOKED: list[Any] = []


def _follow_optimizers(model: MaskedTraining) -> None:
    """Have the model told of every optimiser step in this process, also of those of optimisers made before it.

    One hook for all models, which stays: a hook that goes away with its model would do so while torch iterates over them.
    """
    _LIVE.add(model)
    if not _HOOKED:
        _HOOKED.append(register_optimizer_step_post_hook(_tell_models))


def _tell_models(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for model in list(_LIVE):
        model._stepped(optimizer)


def _without(name: str, missing: frozenset[str], batch: Batch) -> str:
    lacks, has = (", ".join(map(repr, sorted(names))) or "none" for names in (missing, batch))
    return (
        f"{name!r} needs the batch column {lacks}; this batch has {has}. With transformers.Trainer, set "
        "remove_unused_columns=False in its arguments."
    )


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _world() -> int:
    return dist.get_world_size() if _distributed() else 1


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0


def _gathered(value: Tensor, world: int) -> Tensor:
    if world == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world)]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)
