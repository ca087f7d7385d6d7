"""What the pruners do, written one weight, column or group at a time, in the order of the papers' texts."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from maskwright.toolkit.patterns import removed_count


def magnitude(weight: Tensor, sparsity: float) -> Tensor:
    """Sort all magnitudes, and drop the first ones."""
    order = weight.abs().flatten().sort(stable=True).indices
    keep = torch.ones(weight.numel(), dtype=torch.bool)
    keep[order[: removed_count(weight.numel(), sparsity)]] = False
    return keep.view_as(weight)


def wanda(weight: Tensor, squares: Tensor, sparsity: float) -> Tensor:
    """Output after output: sort its scores, and drop the first ones."""
    norms = squares.sqrt()
    keep = torch.ones_like(weight, dtype=torch.bool)
    count = removed_count(weight.shape[1], sparsity)
    for row in range(len(weight)):
        order = (weight[row].abs() * norms).sort(stable=True).indices
        keep[row, order[:count]] = False
    return keep


def two_of_four(scores: Tensor) -> Tensor:
    """Group of columns after group of columns: the two largest of four."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for start in range(0, scores.shape[1], 4):
        kept = scores[:, start : start + 4].sort(dim=1, descending=True, stable=True).indices[:, :2]
        keep.scatter_(1, start + kept, True)
    return keep


def sparsegpt(weight: Tensor, hessian: Tensor, sparsity: float, damping: float, block: int) -> Tensor:
    """Column after column: drop, and let every column to the right make up for it at once. Returns the new weight."""
    weight = weight.clone()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    columns, rows = weight.shape[1], len(weight)
    for column in range(columns):
        if column % block == 0:
            end = min(column + block, columns)
            scores = (weight[:, column:end] / factor.diagonal()[column:end]).square()
            count = removed_count(rows * end, sparsity) - removed_count(rows * column, sparsity)
            drop = torch.zeros(scores.numel(), dtype=torch.bool)
            drop[scores.T.flatten().sort(stable=True).indices[:count]] = True
            drop = drop.view(end - column, rows).T
        error = weight[:, column] / factor[column, column] * drop[:, column % block]
        weight[:, column:] -= error[:, None] * factor[column, column:]
        weight[drop[:, column % block], column] = 0
    return weight


def channels(layers: nn.Sequential, share: float) -> list[Tensor]:
    """Kept units between each two linear layers, by the squared norm of what makes and reads each, unit after unit."""
    kept = []
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for first, second in itertools.pairwise(linear):
        norms = torch.stack(
            [
                first.weight[unit].square().sum() + second.weight[:, unit].square().sum()
                for unit in range(first.out_features)
            ]
        )
        order = norms.sort(descending=True, stable=True).indices
        kept.append(order[: int(share * first.out_features)].sort().values)
    return kept
