"""Images for the jobs: what comes with scikit-learn and scikit-image, or a user's own folder, shards or saved dataset.

Which crop of which image a training sample shows is a pure function of (seed, epoch, index): it depends neither on the
number of processes and workers, nor on the size of the batches, nor on whether the run was resumed. Nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskwright.errors import BadData
from maskwright.sources import EMBEDDED_IMAGES, embedded, pairs
from maskwright.sources.decoding import SUFFIXES, decode
from maskwright.sources.embedded import IMAGENET_MEAN, IMAGENET_STD
from maskwright.sources.found import collection
from maskwright.sources.paths import look
from maskwright.sources.pictures import Collection, Paired, Pictures
from maskwright.sources.randomness import uniforms
from maskwright.sources.second_views import SecondView
from maskwright.sources.views import Views, resized_crops, sizes_of

SMALLEST = 8
"""Images of fewer pixels a side are refused: there is nothing to mask in them."""


class ImageSource:
    """Labelled or unlabelled images of one size, normalised: what a job trains on and looks at.

    `mean` and `std` (one number a channel, for pixels in [0, 1]) are what `batch` normalises with and `denormalize` undoes.
    `classes` are the names of the labels, and `label` says what a label is and who made it; without `labelled` all labels are
    0 and mean nothing.
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
        label: str = "",
        second: SecondView | None = None,
        evaluations: dict[str, ImageSource] | None = None,
    ) -> None:
        self.name = name
        self.size = size
        self.seed = seed
        self.channels = len(mean)
        self.classes = tuple(classes)
        self.labelled = len(self.classes) > 1
        self.label = label if self.labelled else ""
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._pictures = pictures
        self._views = views
        self._second = second
        if second is not None:
            self.columns = ImageSource.columns | {"pixels_other_view"}
        self._evaluations = evaluations or {}

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self._pictures)

    @property
    def damage(self) -> dict[str, str]:
        """What could not be read, as far as it was looked at, and why not, by name. Other images stood in for it."""
        parts = [self, *self._evaluations.values()]
        return dict(
            sorted({name: said for part in parts for name, said in part._pictures.damage.items()}.items())
        )

    @property
    def skipped(self) -> tuple[str, ...]:
        """The names of what could not be read."""
        return tuple(self.damage)

    @property
    def summary(self) -> str:
        """One line for a report."""
        held_out = self._evaluations.get("held_out")
        images = "images" if self._second is None else self._second.words
        counts = f"{len(self)} {images}" + (f", {len(held_out)} held out" if held_out is not None else "")
        classes = f", {len(self.classes)} classes" if self.labelled else ", no labels"
        count = len(self.damage)
        skipped = f", {count} unreadable file{'s' if count > 1 else ''} skipped" if count else ""
        label = f"; label: {self.label}" if self.label else ""
        return f"{self.name}: {counts}{classes}, {self.channels} × {self.size} × {self.size}{skipped}{label}"

    def order(self, epoch: int) -> Tensor:
        """The samples of an epoch in training order, int64 [len(source)]: a pure function of (seed, epoch)."""
        noise = uniforms(self.seed, epoch, torch.arange(len(self)), 1, stream=1)[:, 0]
        return noise.argsort(stable=True)

    def batch(self, indices: Tensor, epoch: int = 0) -> dict[str, Tensor]:
        """`pixels` float32 [B, C, size, size], normalised, and `labels` int64 [B], of samples int64 [B] in an epoch.

        With second views there are `pixels_other_view` as well, of the same shape.
        """
        if self._second is not None:
            columns, labels = self._second.draw(
                self._pictures,
                self._views,
                indices,
                seed=self.seed,
                epoch=epoch,
                size=self.size,
                channels=self.channels,
            )
        else:
            pictures, labels = self._pictures.take(indices)
            boxes, mirrored = self._views(uniforms(self.seed, epoch, indices, 5), sizes_of(pictures))
            columns = {"pixels": resized_crops(pictures, boxes, mirrored, self.size, self.channels)}
        mean, std = _column(self.mean), _column(self.std)
        return {**{name: (pixels - mean) / std for name, pixels in columns.items()}, "labels": labels}

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
    source: str | os.PathLike[str],
    *,
    size: int,
    channels: int = 3,
    crops: int = 2048,
    seed: int = 0,
    second_view: str | None = None,
) -> ImageSource:
    """The images of a name or a path, as squares of `size` pixels.

    - "digits": scikit-learn's 8 × 8 digits, enlarged; the last fifth (other writers) is held out; crops, no mirroring.
    - "photographs": random crops of scikit-learn's two photographs, `crops` of them an epoch, from the upper and the lower
      three eighths; those held out come from the quarter between. The label is the photograph.
    - "rotated-photographs": the same of nine photographs, seven of them scikit-image's, each turned by 0, 90, 180 or 270
      degrees. The label is the photograph and the turn.
    - a folder: every image in it and its sub-folders, with sub-folder names as labels when all images lie in sub-folders;
    - WebDataset tar shards: their folder, one .tar, or a pattern; labels are .cls or .json members;
    - a folder that Hugging Face's `save_to_disk` wrote.

    Of a path, every fifth image of a label is held out, where the user's names do not say what is (`train` and `val`).
    With a `second_view` each sample also shows `pixels_other_view` of the same scene, and the training views of both have colours
    of their own: "pairs" takes it from a folder's pairs of files (see `maskwright.sources.pairs`), "crops" is another crop of the
    same picture that shares at least half with the first, "auto" the former where all images of a folder are in pairs.
    Raises `BadData` for what is missing, empty, of no known kind or without a readable image, for a package that is missing,
    and for sizes that make no sense.
    """
    for word, value, least in (("size", size, SMALLEST), ("crops", crops, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise BadData(f"{word}={value!r} must be a whole number of at least {least}.")
    if channels not in (1, 3):
        raise BadData(f"channels={channels!r} must be 3 (colour) or 1 (grey).")
    if second_view is not None and second_view not in pairs.KINDS:
        raise BadData(f"second_view={second_view!r} must be one of {', '.join(pairs.KINDS)}, or None.")
    made = _collection(os.fspath(source), size, channels, crops, second_view)
    return _source(made, size, seed, second_view is not None)


def _collection(source: str, size: int, channels: int, crops: int, second_view: str | None) -> Collection:
    if source in EMBEDDED_IMAGES and second_view == "pairs":
        raise BadData(f"The data {source!r} have no pairs of files; set data.views to 'crops'.")
    if source == "digits":
        return embedded.digits(channels)
    if source == "photographs":
        return embedded.photographs(size, channels, crops)
    if source == "rotated-photographs":
        return embedded.rotated_photographs(size, channels, crops)
    found = look(source)
    if second_view in ("auto", "pairs"):
        found = pairs.with_partners(found, second_view)
    return collection(found, size, channels)


def _source(made: Collection, size: int, seed: int, two_views: bool) -> ImageSource:
    paired = isinstance(made.parts["train"], Paired)

    def part(name: str, pictures: Pictures, views: Views, seed: int, **rest: Any) -> ImageSource:
        return ImageSource(
            name,
            pictures,
            views,
            size=size,
            seed=seed,
            classes=made.classes,
            mean=made.mean,
            std=made.std,
            label=made.label,
            **rest,
        )

    evaluations = {
        split: part(
            f"{made.name}, {split}",
            pictures,
            made.fixed,
            seed + 1,
            second=SecondView(made.fixed if paired else made.views, jitter=False, paired=paired)
            if two_views
            else None,
        )
        for split, pictures in made.parts.items()
    }
    second = SecondView(made.views, jitter=True, paired=paired) if two_views else None
    return part(made.name, made.parts["train"], made.views, seed, second=second, evaluations=evaluations)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SMALLEST",
    "SUFFIXES",
    "ImageSource",
    "decode",
    "load_images",
    "uniforms",
]
