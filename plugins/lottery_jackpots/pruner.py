"""A search for a jackpot: w are the frozen weights of a layer, b its binary mask (1 = kept), s a score for each entry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import PruneResult, PruneTask, setting
from maskwright.errors import BadBudget, BadData
from maskwright.toolkit.masked import (
    replaced,
    require_finite_loss,
    require_finite_scores,
    running_statistics,
    straight_through,
)
from maskwright.toolkit.patterns import check_budget, keep_largest, keep_share, kth_largest, removed_count
from maskwright.toolkit.prunable import Weight, finish, prunable_weights
from maskwright.toolkit.schedules import cosine

KEPT, REMOVED = 1.0, 0.99
"""Scores at the start: the order is that of the first mask, with a small gap to cross."""


def kept_counts(magnitudes: Mapping[str, Tensor], sparsity: float, rates: str) -> dict[str, int]:
    """How many entries each layer keeps, from |w| by name.

    "global" compares all layers with one threshold, and leaves each layer its largest entry; "uniform" removes the same share of
    each. Raises `BadBudget` when fewer entries are kept than there are layers.
    """
    if rates == "uniform":
        return {name: one.numel() - removed_count(one.numel(), sparsity) for name, one in magnitudes.items()}
    total = sum(one.numel() for one in magnitudes.values())
    kept = total - removed_count(total, sparsity)
    if kept < len(magnitudes):
        raise BadBudget(
            f"A sparsity of {sparsity} keeps {kept} of {total} weights in {len(magnitudes)} layers, and a layer that keeps none "
            "passes nothing on; ask for less, or leave layers out of what may be pruned."
        )
    # One entry of each layer is ahead of all others: no layer ends up empty, and the count over all stays exact.
    reserved = {
        name: one.flatten().float().scatter(0, one.argmax()[None], math.inf)
        for name, one in magnitudes.items()
    }
    return {name: int(keep.sum()) for name, keep in keep_share(reserved, sparsity, "global").items()}


def swap_share(schedule: str, fraction: float) -> float:
    """The factor of ρ when `fraction` = epoch / epochs of the search is behind."""
    if schedule == "quartic":
        return (1 - fraction) ** 4
    return cosine(1.0, 0.0, fraction) if schedule == "cosine" else 1.0


@torch.no_grad()
def swapped(scores: Tensor, keep: Tensor, share: float) -> Tensor:
    """b after a step, from scores s and b (bool) of one shape: ⌈ρ · candidates⌉ swaps, so that as many are kept as before.

    Candidates are the removed entries that are among the highest scores (as many as are kept) and the kept ones that are not. The
    highest of the former come in, the lowest of the latter go. Of scores that tie with the last of the highest, those of kept
    entries count as higher, then those at lower positions.
    """
    s, b = scores.detach().flatten(), keep.flatten()
    count = int(b.sum())
    if not 0 < count < b.numel():
        return keep
    least = kth_largest(s[None], count)[0]
    above, below = s > least, s < least
    growing, leaving = int((above & ~b).sum()), int((below & b).sum())
    if share == 1 and growing == leaving:
        return torch.where(b, ~below, above).view_as(keep)
    # Where scores tie, one list is filled up from the tied ones to the length of the other.
    swaps = math.ceil(Fraction(repr(float(share))) * max(growing, leaving))
    if swaps == 0:
        return keep
    into = keep_largest(s.masked_fill(b, -math.inf)[None], swaps)[0]
    out = keep_largest((-s).masked_fill(~b, -math.inf)[None], swaps)[0]
    return (b ^ into ^ out).view_as(keep)


class Layer(nn.Module):
    """One frozen weight with its mask and scores; called, it gives b ⊙ w."""

    keep: Tensor

    def __init__(self, weight: Weight, keep: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("keep", keep)
        self.scores = nn.Parameter(torch.where(keep, KEPT, REMOVED))

    def forward(self) -> Tensor:
        return straight_through(self.weight.parameter.detach(), self.keep, self.scores)

    def swap(self, share: float) -> int:
        """Change the mask after a step of the scores; how many entries came in."""
        keep = swapped(self.scores, self.keep, share)
        grown = int((keep & ~self.keep).sum())
        self.keep.copy_(keep)
        return grown


@attrs.frozen
class LotteryJackpot:
    """A fixed number of each layer's weights, chosen by learned scores while all weights stay frozen.

    Zhang et al., arXiv:2104.08700; the defaults are the official configuration for ResNet-32 on CIFAR-10, whose epoch has 196
    batches of 256. The search starts from the magnitude mask, follows the task's loss, and after each step swaps entries whose
    scores have overtaken others. BatchNorm statistics follow the masked network.
    """

    kind: ClassVar[str] = "pruner"
    name: ClassVar[str] = "lottery-jackpot"
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    needs: ClassVar[frozenset[str]] = frozenset({"batches", "loss"})
    budgets: ClassVar[frozenset[str]] = frozenset({"sparsity"})
    changes_weights: ClassVar[bool] = False
    example_parameters: ClassVar[dict[str, Any]] = {"steps": 4}
    exempt: ClassVar[dict[str, str]] = {
        "the-rest-is-untouched": "running statistics of BatchNorm follow the masked network, as in the official code; "
        "parameters stay, and statistics=false leaves these as well"
    }

    steps: int = setting(5880, "training steps", ge=1)
    epochs: int = setting(
        30, "equal parts of the training, in which the learning rate and ρ are constant", ge=1
    )
    lr: float = setting(0.1, "learning rate of the scores at the start; falls along a cosine to 0", ge=0)
    momentum: float = setting(0.9, "SGD's momentum", ge=0, lt=1)
    weight_decay: float = setting(5e-4, "SGD's weight decay, on the scores", ge=0)
    rates: str = setting(
        "global",
        "whether one threshold on magnitudes decides each layer's share",
        choices=("global", "uniform"),
    )
    start: str = setting("magnitude", "the first mask", choices=("magnitude", "random"))
    swaps: float = setting(1.0, "largest share ρ of the candidates that a step swaps", gt=0, le=1)
    restriction: str = setting(
        "constant",
        "how ρ goes on: constant, or falling over the epochs",
        choices=("constant", "quartic", "cosine"),
    )
    statistics: bool = setting(True, "let running statistics of norms follow the masked network")

    def prune(self, model: nn.Module, task: PruneTask) -> PruneResult:
        """Raises `BadBudget` for other budgets and for one that leaves fewer weights than layers, `BadData` without batches and loss."""
        weights = prunable_weights(model, task.prunable)
        budget = check_budget(self, weights, task.budget)
        assert budget.sparsity is not None
        if task.loss is None or not task.batches:
            raise BadData("lottery-jackpot trains on batches and a loss; give the task both.")
        magnitudes = {weight.name: weight.parameter.detach().abs() for weight in weights}
        counts = kept_counts(magnitudes, budget.sparsity, self.rates)
        layers = nn.ModuleList(
            Layer(weight, self.first(magnitudes[weight.name], counts[weight.name], task.generator))
            for weight in weights
        )
        initial = [layer.keep.clone() for layer in layers]
        history = self.train(model, weights, layers, task)
        result = finish(
            model, weights, {one.weight.name: one.weight.as_matrix(one.keep) for one in layers}, history
        )
        still = sum(int((first & layer.keep).sum()) for first, layer in zip(initial, layers))
        facts = {
            "swaps": sum(entry["swaps"] for entry in history),
            "share of the first mask still kept": still / result.report.kept,
        }
        return PruneResult(model, result.masks, result.report, history, facts=facts)

    def first(self, magnitudes: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """The mask at the start: the `count` largest magnitudes, or as many at random."""
        order = magnitudes
        if self.start == "random":
            drawn = torch.rand(magnitudes.shape, generator=generator, device=generator.device)
            order = drawn.to(magnitudes.device)
        return keep_largest(order.reshape(1, -1), count).view(magnitudes.shape)

    def train(
        self, model: nn.Module, weights: list[Weight], layers: nn.ModuleList, task: PruneTask
    ) -> list[dict[str, float]]:
        """Minimise the loss over the scores and let the masks follow; returns numbers by step."""
        assert task.loss is not None
        history = []
        optimizer = torch.optim.SGD(
            layers.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        state = {"layers": layers, "optimizer": optimizer}
        if self.statistics and len(following := running_statistics(model)):
            state["statistics"] = following
        with replaced(model, weights, statistics=self.statistics) as replace:
            for step in task.steps(self.steps, state):
                behind = step.index * self.epochs // step.total / self.epochs
                optimizer.param_groups[0]["lr"] = cosine(self.lr, 0.0, behind)
                replace({layer.weight.name: layer() for layer in layers})
                loss = task.loss(model, task.batch(step))
                numbers = {"loss": require_finite_loss(self, loss, step)}
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                require_finite_scores(self, (layer.scores for layer in layers), step)
                share = self.swaps * swap_share(self.restriction, behind)
                numbers |= {"swaps": float(sum(layer.swap(share) for layer in layers)), "share": share}
                task.log(step, **numbers)
                history.append({"step": float(step.index + 1), **numbers})
        return history


COMPONENTS = (LotteryJackpot,)
