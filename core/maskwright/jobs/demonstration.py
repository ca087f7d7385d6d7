"""One mask of a strategy, drawn on a photograph, with what stands in for the signals that the strategy needs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from maskwright.errors import BadData
from maskwright.jobs import pictures
from maskwright.mask import AttentionMask, Layout, Mask
from maskwright.testing.strategies import example_signals
from maskwright.toolkit.images import patchify

if TYPE_CHECKING:
    from PIL import Image

PATCH = 16
GRIDS: dict[str, tuple[int, ...]] = {
    "image": (14, 14),
    "video": (4, 14, 14),
    "motion": (60, 22),
    "text": (128,),
}
"""What is masked where no grid is named, by the strategy's first modality of these; (64,) for any other."""


@attrs.frozen(eq=False)
class Demonstration:
    """A mask of one sample, the photograph [3, H, W] in [0, 1] that it lies on (None where it is no image), and `remarks`."""

    mask: Mask
    photograph: Tensor | None
    remarks: tuple[str, ...]

    def image(self) -> Image.Image:
        """The photograph with its hidden patches covered; where there is none, the mask itself."""
        if isinstance(self.mask, AttentionMask):
            return pictures.attention_image(self.mask, 512)
        if self.photograph is not None:
            return pictures.overlay(self.photograph, self.mask)
        return pictures.mask_image(self.mask)

    def text(self, width: int) -> str:
        """The mask in half blocks and frames of lines, at most `width` columns wide: sequences are broken, pictures lie side
        by side."""
        if isinstance(self.mask, AttentionMask):
            planes = [_coarse(self.mask, width - 2)]
        elif self.mask.keep.ndim == 2:
            parts = self.mask.keep[0].split(width - 2)
            return "\n".join(pictures.terminal_mask(part[None].repeat(2, 1)) for part in parts)
        else:
            keep = self.mask.keep[0]
            planes = list(keep.reshape(-1, *keep.shape[-2:]))
        framed = [_framed(pictures.terminal_mask(plane)) for plane in planes]
        abreast = max(1, width // (planes[0].shape[-1] + 2))
        bands = [framed[first : first + abreast] for first in range(0, len(framed), abreast)]
        return "\n".join("\n".join(map("".join, zip(*band))) for band in bands)


def _framed(text: str) -> list[str]:
    lines = text.split("\n")
    bar = "─" * len(lines[0])
    return [f"┌{bar}┐", *(f"│{line}│" for line in lines), f"└{bar}┘"]


def demonstrate(
    strategy: Any,
    *,
    grid: tuple[int, ...] | None = None,
    image: Path | None = None,
    progress: float = 0.5,
    seed: int = 0,
) -> Demonstration:
    """Draw one mask. `image` is the user's photograph, in place of one of scikit-learn's.

    Signals are made up: of an image the variance of each patch, of anything else example values. The remarks say so.
    Raises `UnsupportedLayout` when the strategy cannot mask the grid, `BadData` for an image that cannot be read.
    """
    modality = next((word for word in GRIDS if word in strategy.modalities), "")
    own = tuple(getattr(strategy, "example_grids", ()))
    shape = grid or (own[0] if own and modality != "image" else GRIDS.get(modality, (64,)))
    photograph = None
    if len(shape) == 2 and modality == "image":
        photograph = _photograph(image, shape)
    elif image is not None:
        raise BadData(f"{strategy.name} does not mask images on a grid {_by(shape)}: leave --image out.")
    layout = Layout(1, shape, patch_size=PATCH if photograph is not None else None)
    signals, remarks = _signals(strategy, layout, photograph, seed)
    mask = strategy.draw(
        layout, signals=signals, progress=progress, generator=torch.Generator().manual_seed(seed)
    )
    return Demonstration(mask, photograph, remarks)


def _signals(
    strategy: Any, layout: Layout, photograph: Tensor | None, seed: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    signals: dict[str, Tensor] = {}
    remarks = []
    for name in sorted(strategy.needs):
        if photograph is not None and name != "tokens" and not hasattr(strategy, "example_signals"):
            signals[name] = patchify(photograph[None], PATCH).var(-1)
            remarks.append(
                f"{name}: the variance of each patch stands in for what an objective would tell the strategy"
            )
        else:
            signals[name] = example_signals(strategy, layout, seed)[name]
            remarks.append(f"{name}: example values, drawn at random")
    return signals, tuple(remarks)


def _photograph(path: Path | None, grid: tuple[int, ...]) -> Tensor:
    """[3, H, W] in [0, 1]: the middle of the image, as large as the grid's patches together."""
    from PIL import Image, ImageOps

    size = (grid[1] * PATCH, grid[0] * PATCH)
    if path is None:
        from sklearn.datasets import load_sample_image

        picture = Image.fromarray(load_sample_image("china.jpg"))
    else:
        from maskwright.sources.images import decode

        try:
            picture = decode(path, 3, 4 * max(size))
        except FileNotFoundError:
            raise BadData(f"The image {path} does not exist.") from None
        except Exception as error:  # decoders of damaged files raise what they like
            raise BadData(f"{path} cannot be read as an image: {error}.") from error
    fitted = ImageOps.fit(picture, size)
    values = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return values.view(size[1], size[0], 3).permute(2, 0, 1) / 255


def _coarse(mask: AttentionMask, width: int) -> Tensor:
    """bool [rows, columns]: the rule of the first head, at evenly spread queries and keys where it is too wide."""
    stride = math.ceil(max(mask.q_len, mask.kv_len) / width)
    zero = torch.zeros((), dtype=torch.int64, device=mask.device)
    q = torch.arange(0, mask.q_len, stride, device=mask.device)
    k = torch.arange(0, mask.kv_len, stride, device=mask.device)
    return torch.as_tensor(mask.rule(zero, zero, q[:, None], k[None])).expand(len(q), len(k))


def _by(grid: tuple[int, ...]) -> str:
    return " × ".join(map(str, grid))
