"""Magnitude, random, Wanda and SparseGPT: which weights a trained model can do without, found without training.

W is a layer's weight [out, in], X what it receives [tokens, in], H = (2/n)·XᵀX over n sequences.
"""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import Budget, PruneResult, PruneTask, setting
from maskwright.errors import BadBudget, NumericalError
from maskwright.toolkit.calibration import calibrate, outer_products, squared_norms
from maskwright.toolkit.patterns import (
    check_budget,
    keep_best,
    keep_largest,
    keep_n_of_m,
    keep_share,
    removed_count,
)
from maskwright.toolkit.prunable import Weight, finish, prunable_weights

_MODALITIES = frozenset({"image", "text"})
_BUDGETS = frozenset({"sparsity", "pattern"})


# -- magnitude, random -----------------------------------------------------------------------------------------------


@attrs.frozen
class Magnitude:
    """The smallest weights of each layer are removed.

    Sparsity: one threshold per layer, as in the comparisons of Wanda and SparseGPT; `compare` sets another group.
    """

    kind: ClassVar[str] = "pruner"
    name: ClassVar[str] = "magnitude"
    modalities: ClassVar[frozenset[str]] = _MODALITIES
    needs: ClassVar[frozenset[str]] = frozenset()
    budgets: ClassVar[frozenset[str]] = _BUDGETS
    changes_weights: ClassVar[bool] = False

    compare: str = setting(
        "layer", "which weights compete for a sparsity", choices=("layer", "row", "global")
    )

    def prune(self, model: nn.Module, task: PruneTask) -> PruneResult:
        """Raises `BadBudget` for patterns that do not fit a layer."""
        weights = prunable_weights(model, task.prunable)
        budget = check_budget(self, weights, task.budget)
        if budget.sparsity is None:
            n, m = budget.n_of_m
            keep = {weight.name: keep_n_of_m(weight.matrix, n, m, magnitude=True) for weight in weights}
        else:
            scores = {weight.name: weight.matrix.abs() for weight in weights}
            keep = keep_share(scores, budget.sparsity, self.compare)
        return finish(model, weights, keep)


@attrs.frozen
class Random:
    """Weights of each layer are removed uniformly at random: what any other pruner must beat."""

    kind: ClassVar[str] = "pruner"
    name: ClassVar[str] = "random"
    modalities: ClassVar[frozenset[str]] = _MODALITIES
    needs: ClassVar[frozenset[str]] = frozenset()
    budgets: ClassVar[frozenset[str]] = _BUDGETS
    changes_weights: ClassVar[bool] = False

    compare: str = setting(
        "layer", "which weights compete for a sparsity", choices=("layer", "row", "global")
    )

    def prune(self, model: nn.Module, task: PruneTask) -> PruneResult:
        """Draws from the task's generator. Raises `BadBudget` for patterns that do not fit a layer."""
        weights = prunable_weights(model, task.prunable)
        budget = check_budget(self, weights, task.budget)
        scores = {
            weight.name: torch.rand(weight.shape, generator=task.generator, device=task.generator.device)
            for weight in weights
        }
        return finish(model, weights, keep_best(scores, budget, self.compare))


# -- Wanda -----------------------------------------------------------------------------------------------------------


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """|W_ij| · ‖X_j‖₂ (Wanda, equation 1) in float32: weight [out, in]; squares [G, in], the squared norms of the inputs.

    With G > 1 groups, each has out / G consecutive rows.
    """
    norms = squares.sqrt().repeat_interleave(len(weight) // len(squares), 0)
    return weight.float().abs() * norms


def cumulated_share(scores: Tensor) -> Tensor:
    """[out, in]: for each score, the share of its row's total that it and all smaller ones make up (Wanda's variant)."""
    order = scores.sort(dim=1, stable=True)
    shares = order.values.double().cumsum(1)
    shares /= shares[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
    return torch.empty_like(shares).scatter_(1, order.indices, shares)


@attrs.frozen
class Wanda:
    """Weights are compared by magnitude times the norm of their input, within each output.

    Sun et al., arXiv:2306.11695. With `compare="share"` the official code's variant: rows give up weights until the same
    share of their total score is gone.
    """

    kind: ClassVar[str] = "pruner"
    name: ClassVar[str] = "wanda"
    modalities: ClassVar[frozenset[str]] = _MODALITIES
    needs: ClassVar[frozenset[str]] = frozenset({"batches"})
    budgets: ClassVar[frozenset[str]] = _BUDGETS
    changes_weights: ClassVar[bool] = False

    compare: str = setting("row", "which weights compete for a sparsity", choices=("row", "layer", "share"))

    def prune(self, model: nn.Module, task: PruneTask) -> PruneResult:
        """Raises `BadBudget` for patterns that do not fit a layer, `BadData` for an empty calibration set."""
        weights = prunable_weights(model, task.prunable)
        budget = check_budget(self, weights, task.budget)
        keep: dict[str, Tensor] = {}
        for block in calibrate(model, weights, task, squared_norms):
            for weight, squares in block:
                keep[weight.name] = self.keep(wanda_scores(weight.matrix, squares), budget)
                weight.apply(weight.mask(keep[weight.name]))
        return finish(model, weights, keep)

    def keep(self, scores: Tensor, budget: Budget) -> Tensor:
        """bool [out, in] from the scores of a layer."""
        if budget.kind == "sparsity" and self.compare == "share":
            return keep_best({"": cumulated_share(scores)}, budget, "layer")[""]
        return keep_best({"": scores}, budget, self.compare)[""]


# -- SparseGPT -------------------------------------------------------------------------------------------------------


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H [G, in, in] + damping · mean(diag H) · I."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    return hessian + torch.diag_embed((damping * diagonal.mean(1, keepdim=True)).expand_as(diagonal))


def inverse_factor(hessian: Tensor) -> Tensor:
    """U [G, in, in], upper triangular with UᵀU = H⁻¹. Raises `NumericalError` when H is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if not bool(failed.any()):
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not bool(failed.any()):
            return factor
    raise NumericalError(
        f"sparsegpt: the Hessian {list(hessian.shape[1:])} of a layer is not positive definite; give more calibration tokens, "
        "or set damping higher."
    )


def quadratic_error(change: Tensor, hessian: Tensor) -> float:
    """½ Σ ΔW · H · ΔWᵀ over the rows of ΔW [G, rows, in]."""
    return float(((change @ hessian) * change).sum(dtype=torch.float64)) / 2


def compensate(
    weight: Tensor, factor: Tensor, budget: Budget, block_size: int
) -> tuple[Tensor, Tensor, float]:
    """Remove weights column after column, and let those to the right make up for it (SparseGPT, algorithm 1).

    `weight` [G, rows, in], `factor` [G, in, in] of `inverse_factor`. Returns the new weight, what is kept (bool), and half of
    Σ e², the loss of the quadratic model. An N:M group is chosen when its first column is reached, on the weights as updated
    until then; a sparsity is met in each block of columns.
    """
    columns = weight.shape[2]
    pattern = budget.n_of_m if budget.kind == "pattern" else None
    if pattern is not None:
        block_size = max(block_size // pattern[1], 1) * pattern[1]
    # Columns are worked on one by one, so they are kept as rows.
    updated = weight.mT.contiguous()
    kept = torch.ones_like(updated, dtype=torch.bool)
    total = 0.0
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block, inside = updated[:, start:end].clone(), factor[:, start:end, start:end]
        scale = inside.diagonal(dim1=1, dim2=2)[..., None]
        keep, errors = kept[:, start:end], torch.empty_like(block)
        if pattern is None:
            keep.copy_(_keep_of_block((block / scale).square(), start, columns, budget))
        for i in range(end - start):
            if pattern is not None and i % pattern[1] == 0:
                group = slice(i, i + pattern[1])
                scores = (block[:, group] / scale[:, group]).square()
                keep[:, group] = keep_n_of_m(scores.mT, *pattern).mT
            torch.mul(block[:, i] / scale[:, i], ~keep[:, i], out=errors[:, i])
            block[:, i:].baddbmm_(inside[:, i, i:, None], errors[:, i, None], alpha=-1)
        updated[:, start:end] = block.masked_fill_(~keep, 0)
        updated[:, end:].baddbmm_(factor[:, start:end, end:].mT, errors, alpha=-1)
        total += float(errors.square().sum(dtype=torch.float64)) / 2
    return updated.mT, kept.mT, total


def _keep_of_block(scores: Tensor, start: int, columns: int, budget: Budget) -> Tensor:
    """bool of the scores [G, k, rows] of columns start to start + k; what is removed adds up to the sparsity of the layer."""
    if budget.sparsity is None:
        raise BadBudget(f"The budget {budget} is no sparsity and no pattern; give one of these.")
    lines = scores.numel() // scores.shape[1]
    before, after = (
        removed_count(lines * count, budget.sparsity) for count in (start, start + scores.shape[1])
    )
    return keep_largest(scores.reshape(1, -1), scores.numel() - (after - before)).view(scores.shape)


@attrs.frozen
class SparseGpt:
    """Weights that cost least by the curvature of the layer's error are removed, and the others make up for them.

    Frantar and Alistarh, arXiv:2301.00774. Inputs that are always zero lose all their weights. Without `update` only the
    masks are taken: scores are those of the dense weights, and the surviving weights stay.
    """

    kind: ClassVar[str] = "pruner"
    name: ClassVar[str] = "sparsegpt"
    modalities: ClassVar[frozenset[str]] = _MODALITIES
    needs: ClassVar[frozenset[str]] = frozenset({"batches"})
    budgets: ClassVar[frozenset[str]] = _BUDGETS
    changes_weights: ClassVar[bool] = True

    damping: float = setting(0.01, "share of the Hessian's mean diagonal that is added to it", ge=0)
    block_size: int = setting(128, "columns that are chosen and updated together", ge=1)
    sequential: bool = setting(False, "let layers inside a block see those before them pruned")
    update: bool = setting(True, "let the surviving weights make up for the removed ones")

    def prune(self, model: nn.Module, task: PruneTask) -> PruneResult:
        """Raises `BadBudget`, `BadData` for an empty calibration set, `NumericalError` for too little of it."""
        weights = prunable_weights(model, task.prunable)
        budget = check_budget(self, weights, task.budget)
        keep: dict[str, Tensor] = {}
        history = []
        for block in calibrate(model, weights, task, outer_products, sequential=self.sequential):
            for weight, products in block:
                matrix, keep[weight.name], error = self.pruned(weight, 2 * products, budget)
                if self.update:
                    weight.write(matrix)
                weight.apply(weight.mask(keep[weight.name]))
                history.append({"layer": float(len(history)), "error": error})
        return finish(model, weights, keep, history)

    def pruned(self, weight: Weight, hessian: Tensor, budget: Budget) -> tuple[Tensor, Tensor, float]:
        """New weight [out, in], what is kept, and the error, of one layer with H [G, in, in]."""
        dense = weight.matrix.to(torch.promote_types(weight.parameter.dtype, torch.float32))
        groups = dense.unflatten(0, (len(hessian), -1))
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        dead = diagonal == 0
        diagonal.masked_fill_(dead, 1)
        groups = groups.masked_fill(dead[:, None], 0)
        hessian = damped(hessian.to(dense.dtype), self.damping)
        factor = inverse_factor(hessian)
        if self.update:
            updated, keep, error = compensate(groups, factor, budget, self.block_size)
            return updated.flatten(0, 1), keep.flatten(0, 1), error
        scale = factor.diagonal(dim1=1, dim2=2)[:, None]
        scores = (groups / scale).square()
        if budget.kind == "pattern":
            keep = keep_n_of_m(scores, *budget.n_of_m)
        else:
            keep = torch.cat(
                [
                    _keep_of_block(piece.mT, self.block_size * i, dense.shape[1], budget).mT
                    for i, piece in enumerate(scores.split(self.block_size, 2))
                ],
                2,
            )
        return dense, keep.flatten(0, 1), quadratic_error(groups.masked_fill(keep, 0), hessian)


COMPONENTS = (Magnitude, Random, Wanda, SparseGpt)
