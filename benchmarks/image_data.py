"""Pretraining on a folder of photographs, tar shards and a saved dataset, against a loop that loads its own images."""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.pretrain_step import BATCH, SIZE, by_hand
from benchmarks.timing import Row, skipped
from maskwright.jobs.batches import Batches
from maskwright.sources.images import IMAGENET_MEAN, IMAGENET_STD, ImageSource, load_images

NAME = "image data: JPEGs of 640 × 480, the default ViT and MAE, 64 images a step"
IMAGES, REPEATS = 480, 2
"""Files, of which four in five are trained on: six steps an epoch."""
EPOCH = IMAGES * 4 // 5 // BATCH


def jpegs() -> Iterator[bytes]:
    """Parts of scikit-learn's photographs, each different, as a camera would save them."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    generator = np.random.default_rng(0)
    for index in range(IMAGES):
        photograph = photographs[index % len(photographs)]
        left, top = (int(generator.integers(0, side // 3)) for side in photograph.size)
        part = photograph.crop(
            (left, top, left + photograph.width * 2 // 3, top + photograph.height * 2 // 3)
        )
        buffer = io.BytesIO()
        part.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def write(folder: Path) -> None:
    """The same images as files, as shards of eighty, and as a saved dataset where the package is there."""
    contents = list(jpegs())
    (folder / "files").mkdir()
    (folder / "shards").mkdir()
    for index, content in enumerate(contents):
        (folder / "files" / f"{index:05}.jpg").write_bytes(content)
    for first in range(0, IMAGES, 80):
        with tarfile.open(folder / "shards" / f"{first:05}.tar", "w") as tar:
            for index in range(first, first + 80):
                info = tarfile.TarInfo(f"{index:05}.jpg")
                info.size = len(contents[index])
                tar.addfile(info, io.BytesIO(contents[index]))
    try:
        import datasets
    except ImportError:
        return
    datasets.disable_progress_bars()
    features = datasets.Features(image=datasets.Image())
    cells = [{"bytes": content, "path": None} for content in contents]
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(folder / "dataset")


def naive(folder: Path) -> Callable[[int], Tensor]:
    """What one writes for oneself: open, crop at random, resize and stack, in the loop, nothing kept."""
    files = sorted(folder.iterdir())
    generator = np.random.default_rng(0)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def one(path: Path) -> Tensor:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        side = int(min(image.size) * np.sqrt(generator.uniform(0.2, 1.0)))
        left, top = (int(generator.integers(0, whole - side + 1)) for whole in image.size)
        image = image.resize(
            (SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
        )
        if generator.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def batch(step: int) -> Tensor:
        chosen = [files[(step * BATCH + place) % len(files)] for place in range(BATCH)]
        return (torch.stack([one(path) for path in chosen]).float() / 255 - mean) / std

    return batch


def timed(next_batch: Callable[[int], Tensor]) -> tuple[list[float], list[float]]:
    """Seconds of each step of two epochs in a training loop, and how many of them went by until its batch was there."""
    waited: list[float] = []

    def watched(step: int) -> Tensor:
        began = time.perf_counter()
        batch = next_batch(step)
        waited.append(time.perf_counter() - began)
        return batch

    loop, steps = by_hand(watched), []
    for _ in range(2 * EPOCH):
        began = time.perf_counter()
        next(loop)
        steps.append(time.perf_counter() - began)
    return steps, waited


def background(source: ImageSource) -> tuple[list[float], list[float]]:
    """The same with the batches that a job has."""
    with Batches(source, BATCH) as batches:
        return timed(lambda step: batches[step]["pixels"])


def run() -> list[Row]:
    """Fresh sources by turns with the naive loop; the median turn of each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        kinds = [kind for kind in ("files", "shards", "dataset") if (folder / kind).exists()]
        turns: dict[str, list[tuple[list[float], list[float]]]] = {kind: [] for kind in ("naive", *kinds)}
        for _ in range(REPEATS):
            turns["naive"].append(timed(naive(folder / "files")))
            for kind in kinds:
                turns[kind].append(background(load_images(folder / kind, size=SIZE)))
    rows = [row for kind in kinds for row in _rows(kind, turns[kind], turns["naive"])]
    if "dataset" not in kinds:
        rows.append(skipped("a saved dataset", "the package datasets is not installed"))
    return rows


def _rows(kind: str, mine: list[Any], peer: list[Any]) -> list[Row]:
    words = {"files": "a folder", "shards": "tar shards", "dataset": "a saved dataset"}[kind]
    rows: list[Row] = []
    for epoch, part, bound in (
        ("first epoch", slice(1, EPOCH), None),
        ("later epochs", slice(EPOCH, None), 0.05),
    ):
        seconds, waited = (_median(turn[which][part] for turn in mine) for which in (0, 1))
        naive_seconds, naive_waited = (_median(turn[which][part] for turn in peer) for which in (0, 1))
        rows.append(
            {
                "what": f"{words}, {epoch}: a step",
                "ratio": seconds / naive_seconds,
                "bound": 1.0,
                "seconds": seconds,
                "peer_seconds": naive_seconds,
                "note": "the peer decodes, crops and stacks in the loop",
            }
        )
        rows.append(
            {
                "what": f"{words}, {epoch}: waiting, as a share of the step",
                "ratio": waited / seconds,
                "bound": bound,
                "seconds": waited,
                "peer_seconds": seconds,
                "note": f"loading takes {naive_waited / naive_seconds:.0%} of the peer's step",
            }
        )
    return rows


def _median(turns: Any) -> float:
    """Of the turns' means over their steps."""
    return float(np.median([np.mean(turn) for turn in turns]))
