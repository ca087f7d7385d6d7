"""`setting`: one hyper-parameter of a component, with its default, range and one-line meaning."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import attrs

from maskwright.errors import BadParameter


def setting(
    default: Any = attrs.NOTHING,
    help: str = "",
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Collection[Any] | None = None,
    optional: bool = False,
) -> Any:
    """An attrs field for a component's hyper-parameter.

    Bounds (`ge`, `gt`, `le`, `lt`) and `choices` are checked when the component is made and printed by
    `maskwright info`. An int is taken where a float is meant. `optional` admits None. A wrong value raises
    `BadParameter`, which names the value and the legal ones.
    """
    bounds = [(">=", ge), (">", gt), ("<=", le), ("<", lt)]
    legal = describe_range(ge, gt, le, lt, choices)

    def check(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value is None and optional:
            return
        where = f"{getattr(type(instance), 'name', type(instance).__name__)}: {attribute.name}={value!r}"
        sample = default if default is not attrs.NOTHING else None
        whole = isinstance(sample, int) or attribute.type in (int, "int", int | None, "int | None")
        if isinstance(sample, bool) and not isinstance(value, bool):
            raise BadParameter(f"{where} must be true or false.")
        if whole and (not isinstance(value, int) or isinstance(value, bool) != isinstance(sample, bool)):
            raise BadParameter(f"{where} must be a whole number{f' {legal}' if legal else ''}.")
        numeric = isinstance(sample, float) or any(bound is not None for _, bound in bounds)
        if numeric and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise BadParameter(f"{where} must be a number{f' {legal}' if legal else ''}.")
        if isinstance(sample, str) and not isinstance(value, str):
            raise BadParameter(f"{where} must be a text.")
        outside = (
            (ge is not None and not value >= ge)
            or (gt is not None and not value > gt)
            or (le is not None and not value <= le)
            or (lt is not None and not value < lt)
            or (choices is not None and value not in choices)
        )
        if outside:
            raise BadParameter(f"{where} must be {legal}.")

    def convert(value: Any) -> Any:
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        return tuple(value) if isinstance(default, tuple) and isinstance(value, list) else value

    return attrs.field(
        default=default, converter=convert, validator=check, metadata={"help": help, "range": legal}
    )


def describe_range(
    ge: float | None, gt: float | None, le: float | None, lt: float | None, choices: Collection[Any] | None
) -> str:
    """The legal values in words: `in [0, 1)`, `>= 1`, `one of red, blue`."""
    if choices is not None:
        return "one of " + ", ".join(map(str, choices))
    low = ge if ge is not None else gt
    high = le if le is not None else lt
    if low is not None and high is not None:
        return f"in {'[' if ge is not None else '('}{low:g}, {high:g}{']' if le is not None else ')'}"
    if low is not None:
        return f"{'>=' if ge is not None else '>'} {low:g}"
    if high is not None:
        return f"{'<=' if le is not None else '<'} {high:g}"
    return ""
