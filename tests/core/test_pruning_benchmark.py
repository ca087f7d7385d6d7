"""The benchmark of pruners measures what it says: the rows are whole, and the naive code does what the pruners do."""

from pathlib import Path

import pytest
import torch
from torch import nn

import maskwright
from maskwright import Budget, PruneTask
from maskwright.toolkit.structured import find_axes


@pytest.fixture
def pruning(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    import benchmarks.pruning

    monkeypatch.setattr(benchmarks.pruning, "REPEATS", 1)
    monkeypatch.setattr(benchmarks.pruning, "SIZE", 64)
    monkeypatch.setattr(benchmarks.pruning, "SMALL", 48)
    return benchmarks.pruning


def test_every_pruner_has_its_peers_and_their_bounds(pruning):
    rows = pruning.run()
    peers = [
        (row["what"].split(",")[0].split(" ×")[0], row["what"].rpartition("against ")[2]) for row in rows
    ]
    assert peers == [
        ("magnitude", "torch.nn.utils.prune"),
        ("magnitude", "naive code"),
        ("wanda by layer", "torch.nn.utils.prune"),
        ("wanda", "naive code"),
        ("2:4", "naive code"),
        ("sparsegpt", "naive code"),
        ("channel scores", "torch-pruning"),
        ("channel scores", "naive code"),
        ("a model without its smallest channels", "torch-pruning"),
    ]
    for (_, peer), row in zip(peers, rows):
        assert row["bound"] == (1 / 3 if peer == "naive code" else 1.0)
        assert row["ratio"] == pytest.approx(row["seconds"] / row["peer_seconds"])


def test_the_naive_sparsegpt_gives_the_same_weights(pruning):
    layer = nn.Linear(40, 24, bias=False)
    inputs = torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    dense = layer.weight.detach().clone()
    pruner = maskwright.create("pruner", "sparsegpt", block_size=16)
    # One sequence of 200 tokens: H = 2 XᵀX.
    pruner.prune(layer, PruneTask(Budget(sparsity=0.5), [{"x": inputs[None]}]))
    naive = pruning.naive.sparsegpt(dense, 2 * inputs.T @ inputs, 0.5, pruner.damping, 16)
    assert torch.allclose(layer.weight, naive, atol=1e-4)


def test_the_naive_channels_are_those_that_stay(pruning):
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3))
    batch = {"x": torch.randn(2, 6)}
    with torch.no_grad():
        naive = pruning.naive.channels(model, 0.5)
    assert [len(kept) for kept in naive] == [10, 6]
    for axis, kept in zip(find_axes(model, batch), naive):
        best = axis.channels[0].squares(model).topk(len(kept)).indices.sort().values
        assert torch.equal(best, kept)
