"""Hypothesis strategies: layouts, ratios, signals, seeds. An example is a small frozen value whose repr makes it again.

What a component may say about its examples, all optional class attributes:

- `example_parameters`: a dict (or a static method that returns one) with which the kit makes the component
- `example_grids`: tuple of grids, for strategies whose layouts have a meaning (22 joints); otherwise by modality
- `example_signals(layout, generator) -> dict`: a static method, for signals that are no plain numbers
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import hypothesis.strategies as st
import torch
from torch import Tensor

from maskwright.errors import BadParameter
from maskwright.mask import Layout, Mask
from maskwright.testing.rules import unwanted

VOCABULARY = 32
"""Token ids of the kit are in [0, VOCABULARY)."""

seeds = st.integers(0, 999)
progresses = st.sampled_from((1.0, 0.0, 0.5, 0.25, 0.9))
ratios = st.sampled_from((None, 0.5, 0.3, 0.6, 0.75))

_IMAGES: tuple[tuple[int | None, tuple[int, ...]], ...] = (
    (16, (4, 4)),
    (16, (6, 4)),
    (16, (8, 10)),
    (16, (14, 14)),
    (8, (8, 8)),
    (8, (12, 8)),
    (4, (8, 8)),
    (4, (16, 8)),
    (4, (16, 16)),
)
_ODD_IMAGES: tuple[tuple[int | None, tuple[int, ...]], ...] = ((16, (7, 7)), (8, (5, 6)), (None, (8, 8)))
_VIDEOS = ((16, (4, 4, 4)), (16, (2, 4, 6)), (16, (8, 8, 8)), (16, (8, 14, 14)))
_SEQUENCES = ((None, (16,)), (None, (8,)), (None, (32,)), (None, (100,)), (None, (128,)))
_MOTIONS = ((None, (16, 22)), (None, (60, 22)))
_POINTS = ((None, (32,)), (None, (64,)))

ORDINARY: Mapping[str, tuple[tuple[int | None, tuple[int, ...]], ...]] = {
    "image": _IMAGES,
    "video": _VIDEOS,
    "motion": _MOTIONS,
    "point-cloud": _POINTS,
}
"""(patch size, grid) of the layouts that a strategy of each modality is expected to take; sequences for any other."""


def ordinary(component: Any) -> list[tuple[int | None, tuple[int, ...]]]:
    """The ordinary (patch size, grid) pairs for a strategy: its own `example_grids`, or those of its modalities."""
    own: Iterable[tuple[int, ...]] = getattr(component, "example_grids", ())
    if own:
        return [(None, tuple(grid)) for grid in own]
    words = sorted(component.modalities) or ["text"]
    return list(dict.fromkeys(pair for word in words for pair in ORDINARY.get(word, _SEQUENCES)))


def grids_of(component: Any) -> list[tuple[int | None, tuple[int, ...]]]:
    """Every (patch size, grid) pair that the kit tries: the ordinary ones, and images that do not divide evenly."""
    odd = not getattr(component, "example_grids", ()) and "image" in component.modalities
    return ordinary(component) + (list(_ODD_IMAGES) if odd else [])


def example_signals(component: Any, layout: Layout, seed: int) -> dict[str, Tensor]:
    """Every signal that a strategy needs: uniform float32 [B, N], int64 [B, *grid] for "tokens", or its own."""
    generator = torch.Generator().manual_seed(seed)
    own = getattr(component, "example_signals", None)
    if own is not None:
        return {name: value.to(layout.device) for name, value in own(layout, generator).items()}
    return {name: _signal(name, layout, generator).to(layout.device) for name in sorted(component.needs)}


def _signal(name: str, layout: Layout, generator: torch.Generator) -> Tensor:
    if name == "tokens":
        return torch.randint(0, VOCABULARY, layout.shape, generator=generator)
    return torch.rand(layout.batch, layout.positions, generator=generator)


@attrs.frozen
class Draw:
    """One call of a strategy. `ratio` replaces the component's own where it has such a parameter."""

    batch: int
    grid: tuple[int, ...]
    patch_size: int | None = None
    seed: int = 0
    signals_seed: int = 0
    progress: float = 1.0
    ratio: float | None = None

    @property
    def layout(self) -> Layout:
        """What is masked."""
        return Layout(self.batch, self.grid, patch_size=self.patch_size)

    def strategy(self, component: Any) -> Any:
        """The component with this example's ratio, where it takes one."""
        return with_parameter(component, "ratio", self.ratio) if self.ratio is not None else component

    def signals(self, component: Any, seed: int | None = None) -> dict[str, Tensor]:
        """The signals of this example, or those of another seed."""
        return example_signals(component, self.layout, self.signals_seed if seed is None else seed)

    def mask(self, component: Any, *, signals: Mapping[str, Tensor] | None = None, **other: Any) -> Mask:
        """Draw it. `other` are `seed` or `progress` in place of this example's."""
        return self.strategy(component).draw(
            self.layout,
            signals=self.signals(component) if signals is None else signals,
            progress=other.get("progress", self.progress),
            generator=torch.Generator().manual_seed(other.get("seed", self.seed)),
        )


def with_parameter(component: Any, name: str, value: Any) -> Any:
    """The component with one parameter changed, or as it is when it has no such parameter or refuses the value."""
    if not attrs.has(type(component)) or name not in attrs.fields_dict(type(component)):
        return component
    try:
        return attrs.evolve(component, **{name: value})
    except BadParameter:
        return component


def draws(component: Any, *, least: int = 1) -> st.SearchStrategy[Draw]:
    """Calls of a strategy on layouts of its modalities, most of which divide evenly; at least `least` rows."""
    pairs = grids_of(component)

    def draw(pair: tuple[int | None, tuple[int, ...]], **values: Any) -> Draw:
        return Draw(grid=pair[1], patch_size=pair[0], **values)

    return st.builds(
        draw,
        pair=st.sampled_from(pairs),
        batch=st.integers(least, least + 3),
        seed=seeds,
        signals_seed=seeds,
        progress=progresses,
        ratio=ratios,
    )


@attrs.frozen
class Growth:
    """A draw with one parameter (or "progress") at a lower and at a higher value."""

    draw: Draw
    parameter: str
    low: Any
    high: Any


def growths(component: Any) -> st.SearchStrategy[Growth]:
    """Pairs of values for every parameter that the strategy calls `monotone`."""

    def pairs(parameter: str) -> st.SearchStrategy[Growth]:
        values = values_of(component, parameter)
        return st.builds(
            lambda draw, two: Growth(draw, parameter, *sorted(two)),
            draws(component),
            st.tuples(st.sampled_from(values), st.sampled_from(values)),
        )

    return st.sampled_from(sorted(component.monotone)).flatmap(pairs)


def values_of(component: Any, parameter: str) -> list[Any]:
    """Values to try for a numeric parameter: within its range, or around its value when it has none."""
    shares = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
    if parameter == "progress":
        return list(shares)
    field = attrs.fields_dict(type(component))[parameter]
    now = getattr(component, parameter)
    bounds = re.fullmatch(r"in [\[(](\S+), (\S+)[\])]", str(field.metadata.get("range", "")))
    if bounds and not isinstance(now, int):
        low, high = float(bounds[1]), float(bounds[2])
        return [low + share * (high - low) for share in shares[1:-1]]
    around = [now * factor for factor in (0.5, 0.75, 1, 1.25, 1.5)]
    return sorted({round(value) if isinstance(now, int) else value for value in [*around, now + 1]})


def accepted(component: Any, draw: Draw, *, anywhere: bool = False, **other: Any) -> Mask:
    """The mask of an example, which is left out when the strategy refuses it or another rule is about its failing.

    So are masks that lie on another device, unless they may be `anywhere`.
    """
    try:
        mask = draw.mask(component, **other)
    except Exception:
        mask = None
    unwanted(not isinstance(mask, Mask) or mask.shape[0] < 1)
    assert mask is not None
    unwanted(not anywhere and mask.device != draw.layout.device)
    return mask
