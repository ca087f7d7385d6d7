"""The benchmark of the data path measures what it says: three kinds of the same images, and a peer that really loads them."""

from pathlib import Path

import pytest
import torch

from maskwright.sources.images import load_images


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    import benchmarks.image_data

    monkeypatch.setattr(benchmarks.image_data, "IMAGES", 80)
    return benchmarks.image_data


def test_all_sources_and_the_peer_show_the_same_images(bench, tmp_path):
    pytest.importorskip("datasets")
    bench.write(tmp_path)
    batches = [
        load_images(tmp_path / kind, size=64).batch(torch.arange(8))
        for kind in ("files", "shards", "dataset")
    ]
    assert all(torch.equal(batches[0]["pixels"], other["pixels"]) for other in batches[1:])
    pixels = bench.naive(tmp_path / "files")(0)
    assert pixels.shape == (bench.BATCH, 3, 64, 64)
    assert len(pixels.flatten(1).unique(dim=0)) == bench.BATCH
    assert pixels[:8].mean() == pytest.approx(float(batches[0]["pixels"].mean()), abs=0.5)


def test_rows_compare_an_epoch_with_the_one_beside_it(bench):
    pairs = [((0.2, 0.02), (0.4, 0.2)), ((0.9, 0.09), (1.0, 0.5)), ((0.3, 0.03), (0.4, 0.2))]
    step, waiting = bench._rows("files", 1, pairs)
    assert (step["ratio"], step["bound"], step["seconds"], step["peer_seconds"]) == (0.3 / 0.4, 1.0, 0.3, 0.4)
    assert (waiting["ratio"], waiting["bound"]) == (pytest.approx(0.1), 0.05)
    assert "50%" in step["note"]
