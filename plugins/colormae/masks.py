"""Windows of filtered noise, ranked: red, blue, green and purple masks that do not look at the image."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from maskwright import Layout, Mask, Signals, setting
from maskwright.errors import BadParameter, UnsupportedLayout
from maskwright.toolkit.selection import keep_largest, kept_count

COLORS = ("green", "red", "blue", "purple", "white")

MEASURED: dict[str, tuple[float, float, float]] = {
    "red": (1.6, math.inf, 7.0),
    "blue": (0.64, math.inf, 6.3),
    "green": (0.55, 2.0, 7.6),
    "purple": (0.51, 1.74, 7.4),
    "white": (0.0, math.inf, 1.0),
}
"""(σ1, σ2, n) of each colour: fits to the periodograms of the official figure; the numbers are published nowhere."""


def blur_response(squared_frequency: Tensor, sigma: float) -> Tensor:
    """The transfer function of G_σ, exp(-2π²σ²f²); σ in patches, f in cycles a patch. σ = ∞ lets nothing through."""
    return (
        torch.exp(-2 * math.pi**2 * sigma**2 * squared_frequency)
        if sigma < math.inf
        else 0 * squared_frequency
    )


def color_response(color: str, squared_frequency: Tensor, sigma1: float, sigma2: float) -> Tensor:
    """H of one pass (section 3.1): G1 (red), 1 - G1 (blue), G1 - G2 (green), 1 - (G1 - G2) (purple), 1 (white)."""
    low, lower = (blur_response(squared_frequency, sigma) for sigma in (sigma1, sigma2))
    one = torch.ones_like(squared_frequency)
    return {"red": low, "blue": one - low, "green": low - lower, "purple": one - (low - lower), "white": one}[
        color
    ]


def color_noise(white: Tensor, color: str, sigma1: float, sigma2: float, passes: float) -> Tensor:
    """White noise [L, M, M] through the filter `passes` times, |H|^n, with circular borders.

    Scaled as one pass scales the strongest frequency, so that many passes do not vanish; no ranking sees the scale.
    """
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) for side in white.shape[-2:])
    response = color_response(color, rows[:, None] ** 2 + columns**2, sigma1, sigma2)
    peak = response.max()
    return torch.fft.ifft2(torch.fft.fft2(white) * (response / peak) ** passes * peak).real


@lru_cache(maxsize=8)
def fields_of(
    color: str,
    filter: tuple[float, float, float],
    size: tuple[int, int, int],
    grid: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """Noise fields of a colour in their four orientations, continued so that a window of `grid` fits at every place.

    float32 [4 · L, M + rows - 1, M + columns - 1], from `size` = (L, M, seed). A pure function of its arguments, hence kept between
    steps; all colours filter the same white noise, drawn on the CPU so that every device has the same fields.
    """
    count, side, seed = size
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(count, side, side, generator=generator, dtype=torch.float64)
    noise = color_noise(white, color, *filter)
    noise = noise - noise.mean((1, 2), keepdim=True)  # decides no rank within a field
    if not noise.std() > 1e-9:
        raise BadParameter(
            f"colormae: the filter of {color} with sigma1={filter[0]:g}, sigma2={filter[1]:g}, passes={filter[2]:g} leaves "
            "nothing of the noise; deviations between 0.3 and 4 patches do."
        )
    noise = (noise / noise.std()).float()
    flipped = torch.cat([noise, noise.flip(1), noise.flip(2), noise.flip(1, 2)])
    down, across = (torch.arange(side + length - 1) % side for length in grid)
    return flipped[:, down[:, None], across].contiguous().to(device)


def windows(fields: Tensor, grid: tuple[int, int], count: int, generator: torch.Generator) -> Tensor:
    """[count, rows, columns]: for each a random field of [F, H, W], its flips included, and a random corner in it."""
    number, height, width = fields.shape
    down, across = height - grid[0] + 1, width - grid[1] + 1
    place = torch.randint(number * down * across, (count,), generator=generator, device=generator.device).to(
        fields.device
    )
    field, row, column = place // (down * across), place // across % down, place % across
    # Every window of the flat memory, the meaningless ones that straddle a border included: one index is read much
    # faster than three.
    last = (grid[0] - 1) * width + grid[1] - 1
    views = fields.as_strided((fields.numel() - last, *grid), (1, width, 1))
    return views[(field * height + row) * width + column]


def keep_highest(noise: Tensor, ratio: float) -> Tensor:
    """bool [B, rows, columns]: the int(N · (1 - ratio)) highest values of each window [B, rows, columns] stay.

    Windows are not divided by their maximum, as the official code does before it ranks: that turns the ranking of a window
    of negative values upside down.
    """
    flat = noise.flatten(1)
    return keep_largest(flat, kept_count(flat.shape[1], ratio)).view_as(noise)


@attrs.frozen
class ColorMae:
    """Patches kept where filtered noise is highest: clumps (red), spread (blue), evenly spaced groups (green) or both (purple).

    Hinojosa et al., arXiv:2407.13036. Large noise fields are made once and kept; every image takes a window of one of them at
    a random place, with random flips, and keeps its int(N · (1 - ratio)) highest values. White is uniform random masking.
    `sigma1`, `sigma2` (in patches) and `passes` are by default those measured for each colour from the paper's figure.
    `schedule` switches the colour: [[0.66, "blue"], [0.9, "red"]] is blue from 66 % of the training on, red from 90 %.
    """

    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "colormae"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset()
    monotone: ClassVar[frozenset[str]] = frozenset({"ratio"})

    ratio: float = setting(0.75, "share of the patches that is hidden", ge=0, lt=1)
    color: str = setting("green", "which frequencies of the noise are left", choices=COLORS)
    schedule: tuple[tuple[float, str], ...] = setting(
        (), "pairs of training progress and the colour from there on"
    )
    sigma1: float | None = setting(None, "deviation of the (weaker) blur, in patches", gt=0, optional=True)
    sigma2: float | None = setting(
        None, "deviation of the stronger blur of green and purple", gt=0, optional=True
    )
    passes: float | None = setting(None, "how often the filter is applied (a power)", gt=0, optional=True)
    fields: int = setting(64, "noise fields that are kept", ge=1)
    field_side: int | None = setting(
        None,
        "patches a side of a field; by default 64, or four times the grid's longer side",
        ge=1,
        optional=True,
    )
    field_seed: int = setting(0, "what the fields are drawn from", ge=0)

    def __attrs_post_init__(self) -> None:
        check_schedule(self.schedule)
        for color in (self.color, *(color for _, color in self.schedule)):
            sigma1, sigma2, _ = self.filter(color)
            if color in ("green", "purple") and not sigma1 < sigma2:
                raise BadParameter(
                    f"colormae: sigma1={sigma1:g} must be below sigma2={sigma2:g} for {color} noise."
                )

    def draw(self, layout: Layout, *, signals: Signals, progress: float, generator: torch.Generator) -> Mask:
        """Grids of rows × columns that keep a patch at this ratio."""
        if len(layout.grid) != 2:
            raise UnsupportedLayout(
                f"colormae needs a grid of rows × columns, such as (14, 14), not {layout.grid}; use 'random' here."
            )
        longer = max(layout.grid)
        side = max(64, 4 * longer) if self.field_side is None else self.field_side
        if longer > side:
            raise UnsupportedLayout(
                f"colormae: field_side={side} must be at least {longer}, the longer side of the grid {layout.grid}."
            )
        if kept_count(layout.positions, self.ratio) < 1:
            raise UnsupportedLayout(
                f"colormae: ratio={self.ratio} leaves nothing visible of {layout.positions} patches; lower it."
            )
        color = self.color_at(progress)
        size = (self.fields, side, self.field_seed)
        fields = fields_of(color, self.filter(color), size, layout.grid, layout.device)
        return Mask(keep_highest(windows(fields, layout.grid, layout.batch, generator), self.ratio))

    def color_at(self, progress: float) -> str:
        """The colour at a share of the training: that of the last switch at or before it."""
        return next((color for start, color in reversed(self.schedule) if start <= progress), self.color)

    def filter(self, color: str) -> tuple[float, float, float]:
        """(σ1, σ2, n) of a colour: what is set here, or what was measured."""
        given = (self.sigma1, self.sigma2, self.passes)
        return tuple(mine if mine is not None else its for mine, its in zip(given, MEASURED[color]))


def check_schedule(schedule: tuple[tuple[float, str], ...]) -> None:
    """Raise `BadParameter` unless these are pairs of rising progress in [0, 1] and a colour."""
    last = -1.0
    for pair in schedule:
        legal = isinstance(pair, tuple | list) and len(pair) == 2 and pair[1] in COLORS
        if not legal or not isinstance(pair[0], int | float) or not last < pair[0] <= 1:
            raise BadParameter(
                f"colormae: schedule={list(schedule)!r} must be pairs of rising progress in [0, 1] and a colour "
                f'({", ".join(COLORS)}), such as [[0.66, "blue"], [0.9, "red"]].'
            )
        last = pair[0]
