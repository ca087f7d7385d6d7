"""Makes docs/pictures/strategies.png: the masks of several strategies on one photograph. `python docs/pictures/strategies.py`

Hidden patches are translucent, so that the picture belongs on a light page and on a dark one. `hard-patches` needs the loss
that an objective expects of each patch; the variance of the patch stands in for it here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

import maskwright
from maskwright import Layout, Mask
from maskwright.jobs import pictures
from maskwright.mask import write_whole
from maskwright.toolkit.images import patchify

TARGET = Path(__file__).with_suffix(".png")
GRID, PATCH = 14, 24
"""Patches a side, and pixels a side of a drawn patch."""

LEFT = 110
"""Where the square that is shown begins in the photograph, in pixels."""

HIDDEN = (*(round(255 * part) for part in pictures.HIDDEN), 140)
"""The grey of all our pictures as a veil: red, green, blue, opacity."""

SHOWN = (
    ("random", {}),
    ("block", {}),
    ("simmim-blocks", {"mask_patch": 32}),
    ("hard-patches", {}),
    ("colormae", {"color": "red"}),
    ("colormae", {"color": "green"}),
    ("colormae", {"color": "blue"}),
    ("colormae", {"color": "purple"}),
)
SEED = 3


def photograph() -> Tensor:
    """[3, H, W] in [0, 1]: a square of one of scikit-learn's photographs."""
    whole = Image.fromarray(load_sample_image("flower.jpg"))
    square = whole.crop((LEFT, 0, LEFT + whole.height, whole.height)).resize(
        (GRID * PATCH, GRID * PATCH), Image.Resampling.LANCZOS
    )
    values = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return values.view(*reversed(square.size), 3).permute(2, 0, 1) / 255


def drawn(name: str, settings: dict[str, object], photo: Tensor) -> Mask:
    """One mask on 14 × 14 patches of 16 pixels, as a ViT at 224 pixels has them, at the end of the training."""
    strategy = maskwright.create("mask-strategy", name, **settings)
    variance = patchify(photo[None], PATCH).var(-1)
    return strategy.draw(
        Layout(1, (GRID, GRID), patch_size=16),
        signals=dict.fromkeys(strategy.needs, variance),
        progress=1.0,
        generator=torch.Generator().manual_seed(SEED),
    )


def veiled(photo: Tensor, mask: Mask) -> Image.Image:
    """The photograph where patches are visible, the veil elsewhere."""
    seen = mask.upsample((GRID * PATCH, GRID * PATCH)).keep[0]
    page = Image.new("RGBA", (GRID * PATCH, GRID * PATCH), HIDDEN)
    page.paste(pictures.picture(photo), mask=Image.fromarray(seen.numpy().astype("uint8") * 255))
    return page


def main() -> None:
    """Draw them all."""
    photo = photograph()
    images = [veiled(photo, drawn(name, settings, photo)) for name, settings in SHOWN]
    labels = [
        ", ".join([name, *settings.values()]) if name == "colormae" else name for name, settings in SHOWN
    ]
    page = pictures.grid_of(images, columns=4, gap=18, labels=labels, text_size=24)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    write_whole(target, pictures.png(page))
    print(f"wrote {target}, {page.width} × {page.height} pixels, {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
