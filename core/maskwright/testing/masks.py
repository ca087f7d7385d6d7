"""The rules of mask strategies."""

from __future__ import annotations

import itertools
from typing import Any

import attrs
import torch
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis.errors import NoSuchExample
from torch import Tensor

from maskwright.errors import UnsupportedLayout
from maskwright.mask import AttentionMask, Mask
from maskwright.registry import keeps_equal_counts
from maskwright.testing.rules import (
    Rule,
    check_component_is_frozen,
    global_generators,
    not_tried,
    require,
    require_untouched,
    rule,
    unwanted,
)
from maskwright.testing.strategies import (
    Draw,
    Growth,
    accepted,
    draws,
    grids_of,
    growths,
    ordinary,
    with_parameter,
)

KIND = "mask-strategy"


def _two_rows(component: Any) -> Any:
    return draws(component, least=2)


@rule(KIND, cases=draws)
def check_draws_a_boolean_mask(component: Any, draw: Draw) -> None:
    """`draw` returns a `Mask` of bool, and raises nothing but `UnsupportedLayout`."""
    try:
        mask = draw.mask(component)
    except UnsupportedLayout:
        unwanted(True)
    require(isinstance(mask, Mask), f"draw returned a {type(mask).__name__}, not a Mask.")
    require(mask.keep.dtype == torch.bool, f"the mask is {mask.keep.dtype}, not bool.")


@rule(KIND, cases=draws)
def check_shape_is_the_layouts(component: Any, draw: Draw) -> None:
    """The mask is [batch, *grid]; an attention rule is over the layout's positions."""
    mask, layout = accepted(component, draw), draw.layout
    if isinstance(mask, AttentionMask):
        fits = mask.batch in (1, layout.batch) and mask.q_len == mask.kv_len == layout.positions
        require(fits, f"{mask!r} for {layout.batch} rows of {layout.positions} positions.")
    else:
        shape = tuple(mask.shape)
        require(shape == layout.shape, f"the mask is {shape}, the layout {layout.shape}.", mask)


@rule(KIND, cases=draws)
def check_device_is_the_layouts(component: Any, draw: Draw) -> None:
    """The mask lies where the layout says."""
    mask = accepted(component, draw, anywhere=True)
    require(mask.device == draw.layout.device, f"it lies on {mask.device}, not on {draw.layout.device}.")


@rule(
    KIND,
    cases=draws,
    applies=lambda component: keeps_equal_counts(component) or hasattr(component, "exact_with"),
)
def check_counts_are_equal(component: Any, draw: Draw) -> None:
    """Every row of a draw keeps the same number, unless the class says `counts = "bounded"`; with `exact_with` then too."""
    wanted = dict(getattr(component, "exact_with", {}))
    mask = _readable(attrs.evolve(component, **wanted) if wanted else component, draw)
    unwanted(isinstance(mask, AttentionMask))
    counts = mask.counts
    spelled = "".join(f" with {name}={value!r}" for name, value in wanted.items())
    require((counts == counts[0]).all(), f"rows keep {counts.tolist()} positions{spelled}.", mask)


@rule(KIND, applies=lambda component: not keeps_equal_counts(component))
def check_bounded_counts_differ(component: Any) -> None:
    """Rows do keep different numbers in some draw, where the class says that they may.

    Objectives that need equal counts are refused for such a strategy: it must not be said without need.
    """
    if not any(_is_accepted(component, draw) for draw in _ordinary_draws(component)):
        not_tried("the component accepted none of the examples")

    for seed, (patch_size, grid) in itertools.product(range(4), grids_of(component)):
        draw = Draw(4, grid, patch_size, seed=seed, signals_seed=seed)
        if not _is_accepted(component, draw):
            continue
        mask = draw.mask(component)
        if isinstance(mask, AttentionMask) or bool((mask.counts != mask.counts[0]).any()):
            return
    require(False, 'rows kept the same number in every draw; leave `counts = "bounded"` out.')


@rule(KIND, cases=draws)
def check_no_row_is_all_hidden(component: Any, draw: Draw) -> None:
    """Something stays visible: in each row of positions, and for each query of an attention rule.

    A class that promises more has `count_range(layout) -> (fewest, most)`, the visible positions of a row.
    """
    mask = _readable(component, draw)
    if isinstance(mask, AttentionMask):
        empty = (~mask.keep.any(-1)).nonzero()
        require(len(empty) == 0, f"nothing is attended to by (row, head, query) {empty[:3].tolist()}.", mask)
        return
    fewest, most = 1, mask.keep[0].numel()
    if hasattr(component, "count_range"):
        fewest, most = draw.strategy(component).count_range(draw.layout)
    counts = mask.counts
    inside = (counts >= fewest) & (counts <= most)
    require(inside.all(), f"rows keep {counts.tolist()} positions, not {fewest} to {most}.", mask)


@rule(KIND, cases=draws)
def check_same_generator_same_mask(component: Any, draw: Draw) -> None:
    """The generator's state decides: the same mask again, whatever was drawn in between."""
    first = accepted(component, draw)
    draw.mask(component, seed=draw.seed + 1)
    second = draw.mask(component)
    require(_same(first, second), "the same generator state gave two masks.", first, second)


@rule(KIND, cases=draws)
def check_global_random_state_is_untouched(component: Any, draw: Draw) -> None:
    """Drawing moves no global generator: torch's, numpy's or Python's."""
    signals = draw.signals(component)
    before = global_generators()
    mask = accepted(component, draw, signals=signals)
    mask.keep  # noqa: B018 - a rule may draw when it is evaluated
    require_untouched(before, "draw")


@rule(KIND, cases=draws, applies=lambda component: bool(component.needs))
def check_signals_are_left_alone(component: Any, draw: Draw) -> None:
    """The signals are not written to."""
    signals = draw.signals(component)
    before = {name: value.clone() for name, value in signals.items()}
    mask = accepted(component, draw, signals=signals)
    changed = [name for name, value in before.items() if not torch.equal(value, signals[name])]
    require(not changed, f"draw changed the signal {', '.join(changed)}; work on a copy.", mask)


@rule(KIND, cases=_two_rows, examples=30)
def check_rows_are_independent(component: Any, draw: Draw) -> None:
    """A row's mask depends on its own signals only, and rows are not copies of one random row."""
    mask = _repeatable(component, draw)
    ours, others = draw.signals(component), draw.signals(component, draw.signals_seed + 1000)
    per_row = [name for name, value in ours.items() if _has_rows(value, draw.batch)]
    if per_row and len(mask.keep) == draw.batch:
        row = draw.seed % draw.batch
        mixed = {
            name: _with_row(others[name], value, row) if name in per_row else value
            for name, value in ours.items()
        }
        changed = draw.mask(component, signals=mixed)
        require(
            torch.equal(mask.keep[row], changed.keep[row]),
            f"row {row} changed when the signals of the other rows did.",
            mask,
            changed,
        )
    if len(mask.keep) == draw.batch:
        alike = {
            name: value[:1].expand_as(value).contiguous() if name in per_row else value
            for name, value in ours.items()
        }
        several = [draw.mask(component, signals=alike, seed=draw.seed + again) for again in range(8)]
        random = any(not _same(several[0], other) for other in several[1:])
        copies = all(bool((one.keep == one.keep[:1]).all()) for one in several)
        require(not (random and copies), "all rows are copies of one random row.", mask)


@rule(KIND, cases=_two_rows, applies=lambda component: getattr(component, "disjoint_rows", 1) > 1)
def check_consecutive_rows_are_disjoint(component: Any, draw: Draw) -> None:
    """As many consecutive rows as the class says in `disjoint_rows` never keep the same position."""
    mask, group = _readable(component, draw), draw.strategy(component).disjoint_rows
    unwanted(isinstance(mask, AttentionMask))
    for first in range(0, draw.batch, group):
        most = int(mask.keep[first : first + group].sum(0).max())
        require(most <= 1, f"a position is kept by {most} of the {group} rows from row {first} on.", mask)


@rule(KIND, cases=growths, examples=30, applies=lambda component: bool(getattr(component, "monotone", ())))
def check_monotone(component: Any, growth: Growth) -> None:
    """What is hidden stays hidden as a parameter that the class lists in `monotone` grows, under the same seed."""
    draw, name = growth.draw, growth.parameter
    unwanted(growth.low == growth.high)
    component = draw.strategy(component) if name != "ratio" else component
    draw = draw if name != "ratio" else attrs.evolve(draw, ratio=None)
    masks = []
    for value in (growth.low, growth.high):
        one = component if name == "progress" else with_parameter(component, name, value)
        unwanted(name != "progress" and getattr(one, name) != value)
        other = {"progress": value} if name == "progress" else {}
        masks.append(accepted(one, draw, **other))
        # A mask that is another when drawn again is what another rule is about.
        unwanted(not _same(masks[-1], accepted(one, draw, **other)))
    low, high = masks
    unwanted(low.shape != high.shape)
    again = int((high.keep & ~low.keep).sum())
    require(
        again == 0,
        f"{again} positions hidden at {name}={growth.low!r} are visible at {growth.high!r}.",
        low,
        high,
    )


@rule(KIND, applies=lambda component: bool(component.needs))
def check_every_signal_is_used(component: Any) -> None:
    """The mask changes with every declared signal, in some of many draws."""
    if not any(_is_accepted(component, draw) for draw in _ordinary_draws(component)):
        not_tried("the component accepted none of the examples")
    for name in sorted(component.needs):

        def changes(draw: Draw, name: str = name) -> bool:
            if not _is_accepted(component, draw):
                return False
            mask = draw.mask(component)
            other = {**draw.signals(component), name: draw.signals(component, draw.signals_seed + 1000)[name]}
            return not _same(mask, draw.mask(component, signals=other))

        try:
            find(draws(component), changes, settings=_SEARCH)
        except NoSuchExample:
            require(False, f"the mask never changed with the signal {name!r}; drop it from `needs`.")


@rule(KIND)
def check_ordinary_layouts_are_accepted(component: Any) -> None:
    """At least half of the common layouts of its modalities are taken, with the default parameters."""
    refused = []
    layouts = list(_ordinary_draws(component))
    for draw in layouts:
        try:
            draw.mask(component)
        except UnsupportedLayout as error:
            refused.append((draw.grid, draw.patch_size, str(error)))
        except Exception:
            continue
    require(
        2 * len(refused) <= len(layouts),
        f"{len(refused)} of {len(layouts)} common layouts are refused, such as {refused[0][:2] if refused else ''}: "
        f"{refused[0][2] if refused else ''}",
    )


_SEARCH = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


def _ordinary_draws(component: Any) -> list[Draw]:
    return [
        Draw(2, grid, patch_size, seed=seed, signals_seed=seed)
        for seed, (patch_size, grid) in enumerate(ordinary(component))
    ]


def _is_accepted(component: Any, draw: Draw) -> bool:
    try:
        mask = draw.mask(component)
        return isinstance(mask, Mask) and mask.device == draw.layout.device
    except Exception:
        return False


def _readable(component: Any, draw: Draw) -> Mask:
    """The mask, where its shape is right: another rule is about that."""
    mask = accepted(component, draw)
    unwanted(not isinstance(mask, AttentionMask) and tuple(mask.shape) != draw.layout.shape)
    return mask


def _repeatable(component: Any, draw: Draw) -> Mask:
    """As `_readable`, where it is the same when drawn again: another rule is about that."""
    mask = _readable(component, draw)
    unwanted(not _same(mask, accepted(component, draw)))
    return mask


def _same(one: Mask, other: Mask) -> bool:
    return one.shape == other.shape and torch.equal(one.keep, other.keep)


def _has_rows(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch


def _with_row(others: Tensor, ours: Tensor, row: int) -> Tensor:
    mixed = others.clone()
    mixed[row] = ours[row]
    return mixed


RULES: tuple[Rule, ...] = (
    check_draws_a_boolean_mask,
    check_shape_is_the_layouts,
    check_device_is_the_layouts,
    check_counts_are_equal,
    check_bounded_counts_differ,
    check_no_row_is_all_hidden,
    check_same_generator_same_mask,
    check_global_random_state_is_untouched,
    check_signals_are_left_alone,
    check_rows_are_independent,
    check_consecutive_rows_are_disjoint,
    check_monotone,
    check_every_signal_is_used,
    check_ordinary_layouts_are_accepted,
    check_component_is_frozen,
)
