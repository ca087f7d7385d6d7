"""Pretraining on a folder of photographs, tar shards and a saved dataset, against a loop that loads its own images."""

from __future__ import annotations

import io
import itertools
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.pretrain_step import BATCH, SIZE, by_hand
from benchmarks.timing import Row, skipped
from maskwright.jobs.batches import Batches
from maskwright.sources.images import IMAGENET_MEAN, IMAGENET_STD, load_images

NAME = "image data: JPEGs of 640 × 480, the default ViT and MAE, 64 images a step"
IMAGES, REPEATS = 320, 3
"""Files, of which four in five are trained on: four steps an epoch."""
EPOCH = IMAGES * 4 // 5 // BATCH

Epoch = tuple[float, float]
"""Seconds of a step, and how many of them went by until its batch was there."""


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


class Loop:
    """One model in training, whose batches come from whoever is measured."""

    def __init__(self) -> None:
        self.next_batch: Callable[[int], Tensor] = lambda step: torch.zeros(BATCH, 3, SIZE, SIZE)
        self.waited = 0.0
        self.steps = by_hand(self._watched)
        next(self.steps)

    def _watched(self, _: int) -> Tensor:
        began = time.perf_counter()
        batch = self.next_batch(self.step)
        self.waited += time.perf_counter() - began
        return batch

    def epoch(self, next_batch: Callable[[int], Tensor], finish: Callable[[], object], first: int) -> Epoch:
        """An epoch's steps, and what is still under way when they are over, `finish`."""
        self.next_batch, self.waited, began = next_batch, 0.0, time.perf_counter()
        for self.step in range(first, first + EPOCH):
            next(self.steps)
        finish()
        return (time.perf_counter() - began) / EPOCH, self.waited / EPOCH

    step = 0


def run() -> list[Row]:
    """Fresh sources, each of their epochs beside one of the naive loop."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        kinds = [kind for kind in ("files", "shards", "dataset") if (folder / kind).exists()]
        loop, peer = Loop(), naive(folder / "files")
        measured: dict[tuple[str, int], list[tuple[Epoch, Epoch]]] = {}
        for _, kind in itertools.product(range(REPEATS), kinds):
            with Batches(load_images(folder / kind, size=SIZE), BATCH) as batches:
                for number in (0, 1):
                    mine = loop.epoch(partial(_pixels, batches), partial(_settled, batches), number * EPOCH)
                    its = loop.epoch(peer, lambda: None, number * EPOCH)
                    measured.setdefault((kind, number), []).append((mine, its))
    rows = [row for kind in kinds for number in (0, 1) for row in _rows(kind, number, measured[kind, number])]
    if "dataset" not in kinds:
        rows.append(skipped("a saved dataset", "the package datasets is not installed"))
    return rows


def _pixels(batches: Batches, step: int) -> Tensor:
    return batches[step]["pixels"]


def _settled(batches: Batches) -> None:
    """Wait for what is prepared ahead, so that it is counted here and not in the peer's time."""
    wait(batches._coming.values())


def _rows(kind: str, number: int, pairs: list[tuple[Epoch, Epoch]]) -> list[Row]:
    words = {"files": "a folder", "shards": "tar shards", "dataset": "a saved dataset"}[kind]
    when = ("first epoch", "later epochs")[number]
    (seconds, waited), (its_seconds, its_waited) = (
        tuple(statistics.median(pair[who][what] for pair in pairs) for what in (0, 1)) for who in (0, 1)
    )
    return [
        {
            "what": f"{words}, {when}: a step",
            "ratio": statistics.median(mine[0] / its[0] for mine, its in pairs),
            "bound": None if number == 0 else 1.0,
            "seconds": seconds,
            "peer_seconds": its_seconds,
            "note": f"the peer decodes, crops and stacks in the loop, {its_waited / its_seconds:.0%} of its step"
            + (f"; two batches more than the {EPOCH} that are used are decoded ahead" if number == 0 else ""),
        },
        {
            "what": f"{words}, {when}: waiting, as a share of the step",
            "ratio": statistics.median(mine[1] / mine[0] for mine, _ in pairs),
            "bound": None if number == 0 else 0.05,
            "seconds": waited,
            "peer_seconds": seconds,
            "note": "the first batch of all, which nothing can hide, is in it" if number == 0 else "",
        },
    ]
