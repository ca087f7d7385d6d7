"""The benchmark of mask drawing measures what it says: the naive references obey the strategies' laws, the rows are whole."""

from pathlib import Path

import numpy as np
import pytest
import torch

import maskwright
from maskwright import Layout


@pytest.fixture
def masks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    import benchmarks.masks

    monkeypatch.setattr(benchmarks.masks, "REPEATS", 2)
    return benchmarks.masks


def test_the_rows_name_what_is_measured_and_their_bounds(masks):
    rows = {row["what"]: row for row in masks.run()}
    bounds = [row["bound"] for row in rows.values()]
    assert len(rows) == 3
    assert bounds == [1 / 5, 1 / 3, 1.3]
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["seconds"] / row["peer_seconds"])
        assert row["seconds"] > 0


def test_the_naive_squares_obey_the_law_of_the_strategy(masks):
    keep = masks.naive_simmim_blocks.draw(2000, np.random.default_rng(0))
    layout = Layout(2000, (14, 14), patch_size=16)
    ours = maskwright.create("mask-strategy", "simmim-blocks").draw(
        layout, signals={}, progress=0.0, generator=torch.Generator().manual_seed(0)
    )
    naive = torch.from_numpy(keep)
    assert naive.shape == ours.shape
    assert naive.flatten(1).sum(1).unique().tolist() == ours.counts.unique().tolist() == [76]
    assert torch.equal(naive[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2), naive)
    # 5 standard errors of a difference of two means.
    assert (naive.double().mean(0) - ours.keep.double().mean(0)).abs().max() < 5 * (2 * 0.25 / 2000) ** 0.5
