"""Pointing: scores over the inputs, and the loss of a target sequence of positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import Batch, BoundObjective, Loss, Mask, Signals, adapt, setting
from maskwright.errors import BadData, MaskShapeError
from maskwright.plugins.pointer_networks.network import PointerLSTM


def pointing(memory: Tensor, states: Tensor, w1: Tensor, w2: Tensor, v: Tensor) -> Tensor:
    """u_j^i = vᵀ tanh(W1 e_j + W2 d_i) (section 2.3): e [B, n, H], d [B, T, H] → [B, T, n].

    W1, W2 [A, H] and v [A]; a row of W is what makes one component.
    """
    return torch.tanh((memory @ w1.T)[:, None] + (states @ w2.T)[:, :, None]) @ v


def sequence_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """-log p(C_i | C_<i, P), the mean over the targets: u [B, T, V] with -inf where nothing can be pointed at.

    `targets` int64 [B, T], -1 where there is none.
    """
    return nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-1)


def first(keep: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, n] → (order int64 [B, n], counts int64 [B]): the kept positions in their order, then the others."""
    return (~keep).int().argsort(dim=1, stable=True), keep.sum(1)


@attrs.frozen
class Pointer:
    """The next input of an output sequence, by additive attention whose weights are the output distribution.

    Vinyals et al., arXiv:1506.03134. `points` [B, n, F] are the inputs, `targets` int64 [B, T] the positions to point at, -1 after
    their end (the symbol for it is added here). What the mask hides does not exist: it is neither read nor pointed at nor a target.
    A column `lengths` int64 [B] says how many of a row's inputs there are, where rows are padded.
    """

    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "pointer"
    modalities: ClassVar[frozenset[str]] = frozenset({"point-cloud"})
    needs: ClassVar[frozenset[str]] = frozenset({"points", "targets"})
    provides: ClassVar[frozenset[str]] = frozenset()
    backbone: ClassVar[str] = "pointer"
    default_strategy: ClassVar[dict[str, Any]] = {"name": "random", "ratio": 0.0}

    spread: float = setting(0.08, "weights of the attention begin uniformly in ± this", gt=0)

    def bind(self, backbone: nn.Module) -> BoundPointer:
        """Attention, a start and an end on a PointerBackbone, such as `maskwright.plugins.pointer_networks.network.PointerLSTM`."""
        return BoundPointer(self, adapt(backbone, self.backbone))

    @staticmethod
    def example_backbone(seed: int) -> nn.Module:
        """Of the conformance kit."""
        return PointerLSTM(2, 8)

    @staticmethod
    def example_batch(backbone: Any, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Of the conformance kit: points in any order."""
        points = torch.rand(rows, 6, backbone.features, generator=generator)
        return {"points": points, "targets": torch.rand(rows, 6, generator=generator).argsort(1)}

    @staticmethod
    def other_hidden_content(batch: Batch, mask: Mask, generator: torch.Generator) -> dict[str, Tensor]:
        """Of the conformance kit: other points where the mask hides them."""
        other = 3 * torch.randn(batch["points"].shape, generator=generator)
        return {**batch, "points": torch.where(mask.keep[..., None], batch["points"], other)}


class BoundPointer(BoundObjective):
    """`denoiser(points, keep)` is what a sampler of the domain "pointer" asks.

    Outputs: `features` [B, n, H], the encoder's states, 0 at what is hidden; `prediction` [B, T+1, n+1], the probability of pointing
    at each input, and last at the end, at each step; `decided` int64 [B, T+1], the targets of those steps, -1 where there is none.
    """

    def __init__(self, settings: Pointer, backbone: nn.Module) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = backbone
        width = backbone.width
        self.w1 = nn.Parameter(torch.empty(width, width))
        self.w2 = nn.Parameter(torch.empty(width, width))
        self.v = nn.Parameter(torch.empty(width))
        # The symbols ⇒ and ⇐ of figure 1: an input vector to begin with, and one more thing to point at.
        self.start = nn.Parameter(torch.empty(backbone.features))
        self.end = nn.Parameter(torch.empty(width))
        with torch.no_grad():
            for parameter in (self.w1, self.w2, self.v, self.start, self.end):
                parameter.uniform_(-settings.spread, settings.spread)

    def encode(self, points: Tensor, keep: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """[B, n, F], bool [B, n] → ([B, n, H], state): the inputs that exist, read in their order."""
        order, counts = first(keep)
        if not bool((counts > 0).all()):
            raise BadData("pointer: a row has no inputs at all; each needs one at least to be read.")
        index = order[..., None]
        memory, state = self.backbone.encode(points.gather(1, index.expand_as(points)), counts)
        memory = torch.zeros_like(memory).scatter(1, index.expand_as(memory), memory)
        return memory.masked_fill(~keep[..., None], 0.0), state

    def scores(self, memory: Tensor, keep: Tensor, states: Tensor) -> Tensor:
        """u [B, T, n+1]: of the inputs, -inf where none exists, and of the end."""
        slots = torch.cat([memory, self.end.expand(len(memory), 1, -1)], dim=1)
        exists = nn.functional.pad(keep, (0, 1), value=True)
        u = pointing(slots, states, self.w1, self.w2, self.v)
        return u.masked_fill(~exists[:, None], -torch.inf)

    def inputs(self, points: Tensor, chosen: Tensor) -> Tensor:
        """The start and the points chosen so far (section 2.3: the inputs themselves): [B, n, F], [B, T] → [B, T+1, F].

        After the end nothing counts any more: there the start stands in.
        """
        real = ((chosen >= 0) & (chosen < points.shape[1]))[..., None]
        index = torch.where(real, chosen[..., None], 0).expand(-1, -1, points.shape[2])
        begin = self.start.expand(len(points), 1, -1)
        return torch.cat([begin, torch.where(real, points.gather(1, index), self.start)], dim=1)

    def forward(
        self,
        batch: Batch,
        mask: Mask,
        *,
        signals: Signals | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Loss:
        """The mean of -log p(C_i | C_<i, P) over all targets and ends of the batch, with teacher forcing.

        No visited position is masked here: the paper trains without.
        """
        points, targets = batch["points"], batch["targets"]
        count = points.shape[1]
        if mask.shape != points.shape[:2] or len(targets) != len(points) or int(targets.max()) >= count:
            raise MaskShapeError(
                f"pointer: points {list(points.shape)}, targets {list(targets.shape)} up to {int(targets.max())} and a mask "
                f"{list(mask.shape)} do not fit: they must be [B, n, F], positions below n or -1 [B, T], and [B, n]."
            )
        keep = mask.keep
        if "lengths" in batch:
            keep = keep & (torch.arange(count, device=keep.device) < batch["lengths"][:, None])
        real = (targets >= 0) & keep.gather(1, targets.clamp(min=0))
        order, counts = first(real)
        targets = targets.gather(1, order)
        steps = torch.arange(targets.shape[1] + 1, device=targets.device)
        decided = nn.functional.pad(targets, (0, 1), value=-1)
        decided = torch.where(steps < counts[:, None], decided, -1)
        decided = torch.where(steps == counts[:, None], count, decided)

        memory, state = self.encode(points, keep)
        states = self.backbone.decode(self.inputs(points, decided[:, :-1]), state)
        u = self.scores(memory, keep, states)
        loss = sequence_loss(u, decided)
        outputs = {"prediction": u.softmax(-1), "features": memory, "decided": decided}
        return Loss(total=loss, parts={"pointing": loss}, outputs=outputs)

    @torch.no_grad()
    def denoiser(self, points: Tensor, keep: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Scores of the next position for K sequences of each row: a function [B, K, i] → [B, K, n+1].

        `points` [B, n, F]; `keep` bool [B, n] says which exist (all of them).
        """
        keep = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device) if keep is None else keep
        memory, state = self.encode(points, keep)

        @torch.no_grad()
        def predict(chosen: Tensor) -> Tensor:
            rows, candidates, _ = chosen.shape
            several = points.repeat_interleave(candidates, 0)
            begin = tuple(one.repeat_interleave(candidates, 0) for one in state)
            states = self.backbone.decode(self.inputs(several, chosen.flatten(0, 1)), begin)[:, -1]
            return self.scores(memory, keep, states.reshape(rows, candidates, -1))

        return predict


COMPONENTS = (Pointer,)
