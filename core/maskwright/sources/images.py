"""Images for the jobs: scikit-learn's digits, crops of its two photographs, or a folder of the user's own.

Which crop of which image a training sample shows is a pure function of (seed, epoch, index): it depends neither on the
number of processes and workers, nor on the size of the batches, nor on whether the run was resumed. Nothing is downloaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from maskwright.errors import BadData, did_you_mean

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Which files of a folder are taken for images, in any case of letters."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST = 8
"""Images of fewer pixels a side are refused: there is nothing to mask in them."""

_CACHE_BYTES = 512 * 2**20
_HELD_OUT = 5
"""One image in five of a folder, and the last fifth of the digits, are held out."""


class ImageSource:
    """Labelled or unlabelled images of one size, normalised: what a job trains on and looks at.

    `mean` and `std` (one number a channel, for pixels in [0, 1]) are what `batch` normalises with and `denormalize` undoes.
    `classes` are the names of the labels; without `labelled` all labels are 0 and mean nothing.
    """

    columns = frozenset({"pixels", "labels"})

    def __init__(
        self,
        name: str,
        pictures: Pictures,
        views: Views,
        *,
        size: int,
        seed: int,
        classes: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        evaluations: dict[str, ImageSource] | None = None,
    ) -> None:
        self.name = name
        self.size = size
        self.seed = seed
        self.channels = len(mean)
        self.classes = tuple(classes)
        self.labelled = len(self.classes) > 1
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._pictures = pictures
        self._views = views
        self._evaluations = evaluations or {}

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self._pictures)

    @property
    def skipped(self) -> tuple[str, ...]:
        """The files that could not be read, as far as they were looked at. Others stood in for them."""
        parts = [self, *self._evaluations.values()]
        names = dict.fromkeys(name for part in parts for name in part._pictures.skipped)
        return tuple(names)

    @property
    def summary(self) -> str:
        """One line for a report."""
        held_out = self._evaluations.get("held_out")
        counts = f"{len(self)} images" + (f", {len(held_out)} held out" if held_out is not None else "")
        classes = f", {len(self.classes)} classes" if self.labelled else ", no labels"
        skipped = f", {len(self.skipped)} unreadable files skipped" if self.skipped else ""
        return f"{self.name}: {counts}{classes}, {self.channels} × {self.size} × {self.size}{skipped}"

    def order(self, epoch: int) -> Tensor:
        """The samples of an epoch in training order, int64 [len(source)]: a pure function of (seed, epoch)."""
        noise = uniforms(self.seed, epoch, torch.arange(len(self)), 1, stream=1)[:, 0]
        return noise.argsort(stable=True)

    def batch(self, indices: Tensor, epoch: int = 0) -> dict[str, Tensor]:
        """`pixels` float32 [B, C, size, size], normalised, and `labels` int64 [B], of samples int64 [B] in an epoch."""
        pictures, labels = self._pictures.take(indices)
        sizes = torch.tensor([(p.height, p.width) for p in pictures], dtype=torch.float64).view(-1, 2)
        boxes, mirrored = self._views(uniforms(self.seed, epoch, indices, 5), sizes)
        pixels = resized_crops(pictures, boxes, self.size, self.channels)
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return {"pixels": (pixels / 255 - _column(self.mean)) / _column(self.std), "labels": labels}

    def evaluation(self, split: str = "held_out") -> ImageSource:
        """The "train" or "held_out" images as fixed views without augmentation, for probes and pictures."""
        if split not in self._evaluations:
            raise BadData(
                f"There is no split {split!r}; legal are {', '.join(map(repr, self._evaluations))}."
            )
        return self._evaluations[split]

    def denormalize(self, pixels: Tensor) -> Tensor:
        """[B, C, H, W] as a batch has them → the same in [0, 1], to be shown."""
        mean, std = _column(self.mean).to(pixels), _column(self.std).to(pixels)
        return (pixels * std + mean).clamp(0, 1)


def load_images(
    source: str | os.PathLike[str], *, size: int, channels: int = 3, crops: int = 2048, seed: int = 0
) -> ImageSource:
    """The images named "digits" or "photographs", or those of a folder, as squares of `size` pixels.

    - "digits": scikit-learn's 8 × 8 digits, enlarged; the last fifth (other writers) is held out; crops, no mirroring.
    - "photographs": random crops of scikit-learn's two photographs, `crops` of them an epoch, from the upper and the lower
      three eighths; those held out come from the quarter between. The label is the photograph.
    - a folder: every image in it and its sub-folders, with sub-folder names as labels when all images lie in sub-folders;
      every fifth image of a label is held out.

    Raises `BadData` for a folder that is missing, empty or without a readable image, and for sizes that make no sense.
    """
    for word, value, least in (("size", size, SMALLEST), ("crops", crops, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise BadData(f"{word}={value!r} must be a whole number of at least {least}.")
    if channels not in (1, 3):
        raise BadData(f"channels={channels!r} must be 3 (colour) or 1 (grey).")
    if source == "digits":
        return _digits(size, channels, seed)
    if source == "photographs":
        return _photographs(size, channels, crops, seed)
    return _folder(Path(source), size, channels, seed)


# -- the three sources -----------------------------------------------------------------------------------------


def _digits(size: int, channels: int, seed: int) -> ImageSource:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = torch.from_numpy(digits.target).long()
    images = [Image.fromarray(image).convert(_mode(channels)) for image in grey]
    border = len(images) - len(images) // _HELD_OUT
    mean, std = float(grey[:border].mean() / 255), float(grey[:border].std() / 255)
    parts = {
        "train": Stack(images[:border], labels[:border]),
        "held_out": Stack(images[border:], labels[border:]),
    }
    return _source(
        "scikit-learn's digits",
        parts,
        random_resized_crops(least=0.5, most=1.0, mirror=False),
        whole_picture,
        size=size,
        seed=seed,
        classes=[str(name) for name in digits.target_names],
        mean=(mean,) * channels,
        std=(std,) * channels,
    )


def _photographs(size: int, channels: int, crops: int, seed: int) -> ImageSource:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    bundle = load_sample_images()
    photographs = [Image.fromarray(image).convert(_mode(channels)) for image in bundle.images]

    def band(first: int, end: int) -> list[Image.Image]:
        return [
            one.crop((0, one.height * first // 8, one.width, one.height * end // 8)) for one in photographs
        ]

    labels = torch.arange(len(photographs))
    parts = {
        "train": Stack(band(0, 3) + band(5, 8), labels.repeat(2), crops),
        "held_out": Stack(band(3, 5), labels, max(2, crops // 4)),
    }
    return _source(
        "scikit-learn's photographs",
        parts,
        random_squares(size, mirror=True),
        random_squares(size, mirror=False),
        size=size,
        seed=seed,
        classes=[Path(name).stem for name in bundle.filenames],
        **_imagenet(channels),
    )


def _folder(folder: Path, size: int, channels: int, seed: int) -> ImageSource:
    if not folder.is_dir():
        names = ("digits", "photographs")
        reason = "is no folder" if folder.exists() else "does not exist"
        raise BadData(
            f"The image folder {folder} {reason}.{did_you_mean(str(folder), names)} "
            "Give a folder of images, 'digits' or 'photographs'."
        )
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise BadData(f"The image folder {folder} has no images ({', '.join(s[1:] for s in SUFFIXES)}).")
    readable = [path for path in files if _opens(path)]
    skipped = [str(path.relative_to(folder)) for path in files if path not in set(readable)]
    if not readable:
        raise BadData(
            f"None of the {len(files)} files in {folder} is a readable image, such as {skipped[0]}."
        )
    parents = [path.relative_to(folder).parts[0] for path in readable]
    in_folders = all(len(path.relative_to(folder).parts) > 1 for path in readable)
    classes = sorted(set(parents)) if in_folders else [folder.name]
    labels = torch.tensor([classes.index(name) for name in parents] if in_folders else [0] * len(parents))
    held_out = _every_fifth(labels)
    if bool(held_out.all()) or not bool(held_out.any()):
        held_out = torch.arange(len(labels)) == len(labels) - 1
    chosen = {"train": ~held_out if len(labels) > 1 else held_out, "held_out": held_out}
    parts = {
        split: Files(
            folder,
            [path for path, here in zip(readable, which.tolist()) if here],
            labels[which],
            channels,
            2 * size,
            skipped,
        )
        for split, which in chosen.items()
    }
    return _source(
        str(folder),
        parts,
        random_resized_crops(least=0.2, most=1.0, mirror=True),
        centre_square,
        size=size,
        seed=seed,
        classes=classes,
        **_imagenet(channels),
    )


def _source(
    name: str, parts: Mapping[str, Pictures], views: Views, fixed: Views, *, seed: int, **rest: Any
) -> ImageSource:
    evaluations = {
        split: ImageSource(f"{name}, {split}", part, fixed, seed=seed + 1, **rest)
        for split, part in parts.items()
    }
    return ImageSource(name, parts["train"], views, seed=seed, evaluations=evaluations, **rest)


def _imagenet(channels: int) -> dict[str, Any]:
    if channels == 3:
        return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return {"mean": (sum(IMAGENET_MEAN) / 3,), "std": (sum(IMAGENET_STD) / 3,)}


def _every_fifth(labels: Tensor) -> Tensor:
    """bool [N]: each label's fifth, tenth, ... image."""
    place = torch.zeros_like(labels)
    for label in labels.unique():
        place[labels == label] = torch.arange(int((labels == label).sum()))
    return place % _HELD_OUT == _HELD_OUT - 1


# -- where pictures come from ------------------------------------------------------------------------------------


class Pictures(Protocol):
    """Pictures by index: `take(indices [B])` gives B images of Pillow in mode RGB or L, and their labels [B]."""

    @property
    def skipped(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> tuple[Sequence[Image.Image], Tensor]: ...


class Stack:
    """Pictures in memory, as `count` samples that take turns among them: sample i shows picture i mod their number."""

    skipped: tuple[str, ...] = ()

    def __init__(self, images: Sequence[Image.Image], labels: Tensor, count: int | None = None) -> None:
        self.images = images
        self.labels = labels
        self.count = len(images) if count is None else count

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Tensor) -> tuple[Sequence[Image.Image], Tensor]:
        turns = indices % len(self.images)
        return [self.images[turn] for turn in turns.tolist()], self.labels[turns]


class Files:
    """Image files, decoded when they are asked for and kept while they fit in half a gigabyte.

    A file that turns out to be damaged is noted in `skipped`, and the next readable one of the list stands in for it,
    always the same one. Pictures are shrunk until their shorter side has at most `enough` pixels.
    """

    def __init__(
        self,
        folder: Path,
        paths: Sequence[Path],
        labels: Tensor,
        channels: int,
        enough: int,
        skipped: Sequence[str],
    ) -> None:
        self.folder = folder
        self.paths = list(paths)
        self.labels = labels
        self.channels = channels
        self.enough = enough
        self.skipped = list(skipped)
        self._damaged: set[int] = set()
        self._kept: dict[int, Image.Image] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Tensor) -> tuple[Sequence[Image.Image], Tensor]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            found = list(threads.map(self._nearest_readable, indices.tolist()))
        for index, picture in found:
            size = picture.width * picture.height * self.channels
            if index not in self._kept and self._kept_bytes + size <= _CACHE_BYTES:
                self._kept[index] = picture
                self._kept_bytes += size
        return [picture for _, picture in found], self.labels[[index for index, _ in found]]

    def _nearest_readable(self, index: int) -> tuple[int, Image.Image]:
        for candidate in (*range(index, len(self.paths)), *range(index)):
            if candidate in self._kept:
                return candidate, self._kept[candidate]
            if candidate in self._damaged:
                continue
            try:
                return candidate, decode(self.paths[candidate], self.channels, self.enough)
            except Exception:  # decoders of damaged files raise what they like
                self._damaged.add(candidate)
                self.skipped.append(str(self.paths[candidate].relative_to(self.folder)))
        raise BadData(f"None of the {len(self.paths)} images in {self.folder} can be decoded.")


def _opens(path: Path) -> bool:
    """Whether the file begins as an image does (its header only is read)."""
    from PIL import Image

    try:
        with Image.open(path):
            return True
    except Exception:  # decoders of damaged files raise what they like
        return False


def decode(path: Path, channels: int, enough: int) -> Image.Image:
    """An image file of any mode as RGB or L: upright, on white where it is transparent, its first frame."""
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        file.draft(_mode(channels), (enough, enough))
        image: Image.Image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I") or image.mode == "F":
            image = Image.fromarray(_eight_bits(np.asarray(image), image.mode))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert(_mode(channels))
        shrink = enough / min(image.size)
        if shrink < 1:
            width, height = (max(1, round(side * shrink)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        image.load()
    return image


def _mode(channels: int) -> str:
    return "RGB" if channels == 3 else "L"


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """16-bit grey values are divided by 257 (65535 is white); fractions up to 1 are multiplied by 255."""
    scale = (255.0 if values.max() <= 1 else 1.0) if mode == "F" else 1 / 257
    return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)


# -- which part of a picture is shown ----------------------------------------------------------------------------

Views = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(uniform numbers [B, 5], picture sizes [B, 2]) → boxes [B, 4] (top, left, height, width) in pixels, mirrored bool [B]."""


def random_resized_crops(*, least: float, most: float, mirror: bool) -> Views:
    """Boxes of `least` to `most` of the picture's area, with sides between 3:4 and 4:3 (cut at the picture's)."""

    def views(u: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        area = sizes.prod(1) * (least + (most - least) * u[:, 0])
        stretch = torch.exp(math.log(4 / 3) * (2 * u[:, 1] - 1)).sqrt()
        sides = torch.stack([area.sqrt() / stretch, area.sqrt() * stretch], 1).minimum(sizes)
        corners = (sizes - sides) * u[:, 2:4]
        return torch.cat([corners, sides], 1), (u[:, 4] < 0.5) & mirror

    return views


def random_squares(size: int, *, mirror: bool) -> Views:
    """Squares of one to two times `size` pixels a side, anywhere: details keep about their scale."""

    def views(u: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        most = sizes.amin(1).clamp(max=2 * size)
        least = (most / 2).maximum(most.clamp(max=size))
        side = (least + (most - least) * u[:, 0])[:, None].expand(-1, 2)
        corners = (sizes - side) * u[:, 2:4]
        return torch.cat([corners, side], 1), (u[:, 4] < 0.5) & mirror

    return views


def centre_square(u: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The largest square in the middle."""
    side = sizes.amin(1, keepdim=True).expand(-1, 2)
    return torch.cat([(sizes - side) / 2, side], 1), torch.zeros(len(u), dtype=torch.bool)


def whole_picture(u: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """All of it."""
    return torch.cat([torch.zeros_like(sizes), sizes], 1), torch.zeros(len(u), dtype=torch.bool)


def resized_crops(pictures: Sequence[Image.Image], boxes: Tensor, size: int, channels: int) -> Tensor:
    """Boxes [B, 4] (top, left, height, width, in pixels) of B pictures, as float32 [B, C, size, size], values 0 to 255.

    Linear interpolation with averaging where the picture shrinks, as Pillow's; whole values.
    """
    from PIL import Image

    pixels = np.empty((len(pictures), size, size, channels), dtype=np.uint8)
    ends = boxes[:, :2] + boxes[:, 2:]
    for place, picture, (top, left), (bottom, right) in zip(
        pixels, pictures, boxes[:, :2].tolist(), ends.tolist()
    ):
        box = (left, top, min(right, picture.width), min(bottom, picture.height))
        crop = picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
        place[:] = np.asarray(crop).reshape(size, size, channels)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float()


# -- randomness without a state ----------------------------------------------------------------------------------


def uniforms(seed: int, epoch: int, indices: Tensor, count: int, *, stream: int = 0) -> Tensor:
    """float64 [B, count] in [0, 1): a pure function of (seed, epoch, index, stream), evaluated for all at once.

    A counter-based generator: the 64-bit finaliser of SplitMix64 (Steele, Lea and Flood, 2014) on the mixed key.
    """
    key = np.array([stream], dtype=np.int64).view(np.uint64)
    for word in (np.int64(seed), np.int64(epoch), indices.cpu().numpy().astype(np.int64)):
        key = _mixed(key ^ np.atleast_1d(word).view(np.uint64))
    numbers = _mixed(key[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    return torch.from_numpy((numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(z: np.ndarray) -> np.ndarray:
    z = z + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
