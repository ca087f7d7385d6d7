"""Image files of any kind and mode as upright pictures of 8 bits a channel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".avif", ".ppm", ".pgm", ".pnm", ".jp2"),
)
"""Which files are taken for images, in any case of letters."""

BACKGROUND = "white"
"""What transparent pictures are laid on."""


def decode(file: Path | BinaryIO, channels: int, enough: int) -> Image.Image:
    """An image file of any mode as RGB or L: upright, on white where it is transparent, its first frame.

    It is shrunk until its shorter side has at most `enough` pixels. Raises whatever Pillow's decoders raise.
    """
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        opened.draft(mode(channels), (enough, enough))
        image: Image.Image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I") or image.mode == "F":
            image = Image.fromarray(eight_bits(np.asarray(image), image.mode))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image.convert("RGBA"))
        image = image.convert(mode(channels))
        shrink = enough / min(image.size)
        if shrink < 1:
            width, height = (max(1, round(side * shrink)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        image.load()
    return image


def mode(channels: int) -> str:
    """Pillow's name for colour or grey."""
    return "RGB" if channels == 3 else "L"


def eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of more than 8 bits, scaled to uint8 and never cut off at the bright end.

    16 bits: 65535 is white. Fractions: 1 is white where none is larger, else 255 is. In a picture with values beyond that
    (32 bits, or fractions above 255) the brightest is white.
    """
    values = np.where(np.isfinite(values), values, 0)
    white = (1.0 if values.max() <= 1 else 255.0) if mode == "F" else 65535.0
    scale = 255 / max(white, float(values.max()))
    return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)


def why_not(file: Path) -> str | None:
    """Why a file does not begin as an image does, or None where it does. Its header only is read."""
    from PIL import Image

    try:
        with Image.open(file):
            return None
    except Exception as error:  # decoders of damaged files raise what they like
        return in_words(error)


def in_words(error: Exception) -> str:
    """What is wrong with a file, as short words: `image file is truncated`."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "it is no image"
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said.strip().partition(os.linesep)[0].rstrip(".") or type(error).__name__
