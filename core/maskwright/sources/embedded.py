"""Images that come with scikit-learn and scikit-image: digits, and patches of photographs. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from maskwright.errors import BadData
from maskwright.sources.decoding import decode, mode
from maskwright.sources.pictures import Collection, Stack
from maskwright.sources.views import random_resized_crops, random_squares, whole_picture

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

HELD_OUT = 5
"""The last fifth of the digits is held out; of a user's images, one in five."""

UPRIGHT = {
    "astronaut": "astronaut.png",
    "camera": "camera.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "motorcycle": "motorcycle_left.png",
    "rocket": "rocket.jpg",
}
"""The photographs inside scikit-image's wheel that show which way is up; its textures, slides and skies do not."""

TURNS = (0, 90, 180, 270)
"""Degrees, counter-clockwise."""


def normalisation(channels: int) -> dict[str, Sequence[float]]:
    """ImageNet's mean and standard deviation, averaged over the colours where there is one channel."""
    if channels == 3:
        return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return {"mean": (sum(IMAGENET_MEAN) / 3,), "std": (sum(IMAGENET_STD) / 3,)}


def digits(channels: int) -> Collection:
    """scikit-learn's 8 × 8 digits."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = torch.from_numpy(digits.target).long()
    images = [Image.fromarray(image).convert(mode(channels)) for image in grey]
    border = len(images) - len(images) // HELD_OUT
    return Collection(
        name="scikit-learn's digits",
        parts={
            "train": Stack(images[:border], labels[:border]),
            "held_out": Stack(images[border:], labels[border:]),
        },
        views=random_resized_crops(least=0.5, most=1.0, mirror=False),
        fixed=whole_picture,
        classes=[str(name) for name in digits.target_names],
        label="the digit that was written, from scikit-learn",
        mean=(float(grey[:border].mean() / 255),) * channels,
        std=(float(grey[:border].std() / 255),) * channels,
    )


def photographs(size: int, channels: int, crops: int) -> Collection:
    """Crops of scikit-learn's two photographs, labelled with the photograph."""
    images, names = _bundled(channels)
    labels = torch.arange(len(images))
    return Collection(
        name="scikit-learn's photographs",
        parts={
            "train": Stack(_bands(images, 0, 3) + _bands(images, 5, 8), labels.repeat(2), crops),
            "held_out": Stack(_bands(images, 3, 5), labels, max(2, crops // 4)),
        },
        views=random_squares(size, mirror=True),
        fixed=random_squares(size, mirror=False),
        classes=names,
        label="self-made: which photograph a patch is from",
        **normalisation(channels),
    )


def rotated_photographs(size: int, channels: int, crops: int) -> Collection:
    """Crops of nine photographs turned by 0, 90, 180 or 270 degrees, labelled with the photograph and the turn.

    No mirroring: it would make a quarter turn to the left one to the right.
    """
    images, names = _bundled(channels)
    images += [decode(path, channels, 10**6) for path in _in_scikit_image()]
    names += UPRIGHT
    classes = [f"{name} {turn}°" for name in names for turn in TURNS]
    # Samples take turns among pictures, so that every class has its share: the photographs turn fastest.
    labels = torch.arange(len(classes)).view(-1, len(TURNS)).T.flatten()

    def turned(first: int, end: int) -> list[Image.Image]:
        return [band.rotate(turn, expand=True) for turn in TURNS for band in _bands(images, first, end)]

    return Collection(
        name="scikit-learn's and scikit-image's photographs, turned",
        parts={
            "train": Stack(turned(0, 3) + turned(5, 8), labels.repeat(2), crops),
            "held_out": Stack(turned(3, 5), labels, max(2 * len(classes), crops // 4)),
        },
        views=random_squares(size, mirror=False),
        fixed=random_squares(size, mirror=False),
        classes=classes,
        label=f"self-made: which of {len(names)} photographs a patch is from, and by how many degrees it was turned",
        **normalisation(channels),
    )


def _bundled(channels: int) -> tuple[list[Image.Image], list[str]]:
    """scikit-learn's two photographs and their names."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    bundle = load_sample_images()
    images = [Image.fromarray(image).convert(mode(channels)) for image in bundle.images]
    return images, [Path(name).stem for name in bundle.filenames]


def _in_scikit_image() -> list[Path]:
    """The files inside the installed package, found without importing it: `skimage.data` may download what is not there."""
    found = find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise BadData(
            "The data 'rotated-photographs' are pictures inside the package scikit-image, which is not installed: "
            "pip install 'maskwright[photographs]'. 'photographs' and 'digits' need nothing more."
        )
    paths = [Path(found.submodule_search_locations[0], "data", file) for file in UPRIGHT.values()]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise BadData(
            f"The installed scikit-image lacks its pictures {', '.join(missing)}; install its wheel: "
            "pip install --force-reinstall scikit-image."
        )
    return paths


def _bands(images: Sequence[Image.Image], first: int, end: int) -> list[Image.Image]:
    """The rows from `first` to `end` eighths of each."""
    return [one.crop((0, one.height * first // 8, one.width, one.height * end // 8)) for one in images]
