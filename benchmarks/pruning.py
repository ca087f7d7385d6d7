"""Masks per second: magnitude, Wanda, SparseGPT, 2:4 and channels, against torch.nn.utils.prune, torch-pruning and naive code.

All see the same matrices in the same run, on one thread. Where two ways must agree, that is checked first. torch.nn.utils.prune knows
neither patterns nor compensation, and torch-pruning only channels: there naive code is the only peer.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings

import torch
from torch import nn
from torch.nn.utils import prune

import maskwright
from benchmarks import naive_pruning as naive
from benchmarks.timing import Row, interleaved, row, skipped
from maskwright import Budget, PruneTask
from maskwright.toolkit.patterns import keep_n_of_m
from maskwright.toolkit.prunable import prunable_weights
from maskwright.toolkit.structured import find_axes

NAME = "pruning"
SIZE, SMALL = 2048, 1024
REPEATS = 7
HALF = Budget(sparsity=0.5)


def run() -> list[Row]:
    """The rows of the table, measured on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            rows = [*magnitude(), *wanda(), *two_of_four(), *sparsegpt()]
        return [*rows, *channels()]
    finally:
        torch.set_num_threads(threads)


def _layer(size: int) -> nn.Linear:
    layer = nn.Linear(size, size, bias=False)
    layer.weight.data = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    return layer


def _rows(what: str, times: dict[str, float], bounds: dict[str, float]) -> list[Row]:
    """Ours against each peer, with the masks that it makes in a second."""
    return [
        row(
            f"{what}, against {peer}",
            times["ours"],
            times[peer],
            bound,
            f"{1 / times['ours']:.3g} against {1 / times[peer]:.3g} masks per second",
        )
        for peer, bound in bounds.items()
    ]


def magnitude() -> list[Row]:
    """A whole layer pruned: mask, zeros, report."""
    layer, pruner = _layer(SIZE), maskwright.create("pruner", "magnitude")
    weight = layer.weight.detach().clone()

    def ours() -> torch.Tensor:
        layer.weight.data.copy_(weight)
        return pruner.prune(layer, PruneTask(HALF)).masks["weight"].keep

    def library() -> torch.Tensor:
        layer.weight.data.copy_(weight)
        prune.l1_unstructured(layer, "weight", 0.5)
        keep = layer.weight_mask
        prune.remove(layer, "weight")
        return keep

    def plain() -> torch.Tensor:
        layer.weight.data.copy_(weight)
        keep = naive.magnitude(layer.weight.data, 0.5)
        layer.weight.data[~keep] = 0
        return keep

    assert torch.equal(ours(), library().bool())
    assert torch.equal(ours(), plain())
    times = interleaved({"ours": ours, "torch.nn.utils.prune": library, "naive code": plain}, REPEATS)
    return _rows(f"magnitude, {SIZE} × {SIZE}", times, {"torch.nn.utils.prune": 1.0, "naive code": 1 / 3})


def wanda() -> list[Row]:
    """From weights and input norms to the mask. torch.nn.utils.prune takes the scores, and compares over the layer."""
    from maskwright.plugins.baselines.pruner import wanda_scores

    layer = _layer(SIZE)
    weight = layer.weight.detach().clone()
    squares = torch.rand(SIZE, generator=torch.Generator().manual_seed(1))
    by_row, by_layer = (maskwright.create("pruner", "wanda", compare=group) for group in ("row", "layer"))

    def library() -> torch.Tensor:
        prune.l1_unstructured(layer, "weight", 0.5, importance_scores=wanda_scores(weight, squares[None]))
        keep = layer.weight_mask
        prune.remove(layer, "weight")
        layer.weight.data.copy_(weight)
        return keep

    ways = {
        "ours": lambda: by_row.keep(wanda_scores(weight, squares[None]), HALF),
        "ours by layer": lambda: by_layer.keep(wanda_scores(weight, squares[None]), HALF),
        "torch.nn.utils.prune": library,
        "naive code": lambda: naive.wanda(weight, squares, 0.5),
    }
    assert torch.equal(ways["ours"](), ways["naive code"]())
    assert torch.equal(ways["ours by layer"](), library().bool())
    times = interleaved(ways, REPEATS)
    layered = {**times, "ours": times["ours by layer"]}
    return [
        *_rows(f"wanda by layer, {SIZE} × {SIZE}", layered, {"torch.nn.utils.prune": 1.0}),
        *_rows(f"wanda, {SIZE} × {SIZE}", times, {"naive code": 1 / 3}),
    ]


def two_of_four() -> list[Row]:
    """From scores to the mask."""
    scores = _layer(SIZE).weight.detach().abs()
    ways = {"ours": lambda: keep_n_of_m(scores, 2, 4), "naive code": lambda: naive.two_of_four(scores)}
    assert torch.equal(ways["ours"](), ways["naive code"]())
    return _rows(f"2:4, {SIZE} × {SIZE}", interleaved(ways, REPEATS), {"naive code": 1 / 3})


def sparsegpt() -> list[Row]:
    """From weights and Hessian to the new weights."""
    layer = _layer(SMALL)
    (weight,) = prunable_weights(layer)
    inputs = torch.randn(2 * SMALL, SMALL, generator=torch.Generator().manual_seed(2))
    hessian = inputs.T @ inputs / SMALL
    pruner = maskwright.create("pruner", "sparsegpt")
    ways = {
        "ours": lambda: pruner.pruned(weight, hessian[None].clone(), HALF)[0],
        "naive code": lambda: naive.sparsegpt(
            layer.weight.detach(), hessian, 0.5, pruner.damping, pruner.block_size
        ),
    }
    # Sums in another order: a few weights at the threshold may fall to the other side.
    assert ((ways["ours"]() == 0) == (ways["naive code"]() == 0)).float().mean() > 0.999
    return _rows(f"sparsegpt, {SMALL} × {SMALL}", interleaved(ways, 3), {"naive code": 1 / 3})


def channels() -> list[Row]:
    """Scores of all channels of an MLP, and the whole pruning with it: tracing, scores, removal.

    Ours does more in the second: it finds how many channels meet the budget, leaves masks and a report, and tests on a copy that the
    small model computes what the dense one does under the masks, before anything is changed.
    """
    if importlib.util.find_spec("torch_pruning") is None:
        return [skipped("channel-magnitude", "torch-pruning is not installed")]
    import torch_pruning as tp

    model = nn.Sequential(
        nn.Linear(512, SIZE), nn.GELU(), nn.Linear(SIZE, SIZE), nn.GELU(), nn.Linear(SIZE, 512)
    )
    example = torch.randn(2, 512)
    (first, second) = (axis.channels[0] for axis in find_axes(model, {"x": example}))
    graph = tp.DependencyGraph().build_dependency(model, example, verbose=False)
    groups = [
        graph.get_pruning_group(layer, tp.prune_linear_out_channels, list(range(SIZE)))
        for layer in (model[0], model[2])
    ]
    importance = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None)
    with torch.no_grad():
        times = interleaved(
            {
                "ours": lambda: [channels.squares(model) for channels in (first, second)],
                "torch-pruning": lambda: [importance(group) for group in groups],
                "naive code": lambda: naive.channels(model, 0.5),
            },
            REPEATS,
        )
    rows = _rows("channel scores", times, {"torch-pruning": 1.0, "naive code": 1 / 3})

    pruner = maskwright.create("pruner", "channel-magnitude")

    def ours() -> None:
        pruner.prune(copy.deepcopy(model), PruneTask(Budget(params=0.5), [{"x": example}]))

    def library() -> None:
        small = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tp.pruner.MagnitudePruner(
                small, example, importance=importance, pruning_ratio=0.35, ignored_layers=[small[-1]]
            ).step()

    times = interleaved({"ours": ours, "torch-pruning": library}, REPEATS)
    return [*rows, *_rows("a model without its smallest channels", times, {"torch-pruning": 1.0})]
