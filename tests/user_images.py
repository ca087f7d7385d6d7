"""A user's images as tests need them: coloured noise of three classes, in folders, tar shards and saved datasets."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ape", "bee", "cow")


def picture(label: int, seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """Noise around a tone that tells the class."""
    noise = np.random.default_rng(seed).integers(0, 60, (size[1], size[0], 3)) + 90 * label
    return Image.fromarray(noise.astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def tones(source, batch) -> list[int]:
    """The class that the pixels of each image tell."""
    values = source.denormalize(batch["pixels"]).mean((1, 2, 3)) * 255
    return ((values - 30) / 90).round().long().tolist()


def write_folder(folder: Path, count: int = 15) -> Path:
    for index in range(count):
        path = folder / CLASSES[index % 3] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index % 3, index).save(path)
    return folder


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members(numbers: range, label: str = "cls") -> list[tuple[str, bytes]]:
    """An image and its label for each number."""
    texts = {"cls": "{}", "json": '{{"label": {}}}'}
    return [
        member
        for n in numbers
        for member in (
            (f"{n:04}.png", encoded(picture(n % 3, n))),
            (f"{n:04}.{label}", texts[label].format(n % 3).encode()),
        )
    ]


def write_shards(folder: Path, shards: int = 3, each: int = 5, name: str = "data") -> Path:
    for shard in range(shards):
        first = shard * each
        write_tar(folder / f"{name}-{shard:03}.tar", members(range(first, first + each)))
    return folder


def rows(numbers: range) -> dict[str, list]:
    cells = [{"bytes": encoded(picture(n % 3, n)), "path": f"{n}.png"} for n in numbers]
    return {"image": cells, "label": [n % 3 for n in numbers]}


def dataset(columns: Mapping[str, list], label: str = "label"):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), label: ClassLabel(names=list(CLASSES))})
    return Dataset.from_dict(dict(columns), features=features)


def cut_short(path: Path, share: float = 0.6) -> None:
    """A file that breaks off."""
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
