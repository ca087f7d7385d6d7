"""`--set key=value`: TOML values, or plain texts where they are none."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from typing import Any

import click


def value_of(text: str) -> Any:
    """The TOML value that a text spells (0.5, true, [1, 2], "a"), or the text itself (green)."""
    try:
        tables = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return tables["value"] if len(tables) == 1 else text


def settings_of(pairs: Iterable[str]) -> dict[str, Any]:
    """`["ratio=0.5", "model.width=64"]` → `{"ratio": 0.5, "model.width": 64}`; the last of equal keys counts."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise click.UsageError(f"--set {pair!r} must be key=value, such as --set ratio=0.5.")
        found[key.strip()] = value_of(text.strip())
    return found


def set_option(help: str) -> Callable[[Any], Any]:
    """The option `--set key=value …`."""
    return click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help=help)


class Grid(click.ParamType):
    """`14x14`, `8x14x14` or `128` as a tuple of sides."""

    name = "grid"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The sides, each at least 1."""
        if isinstance(value, tuple):
            return value
        sides = str(value).lower().replace("×", "x").split("x")
        if not all(side.isdigit() and int(side) > 0 for side in sides):
            self.fail(f"{value!r} must be sides such as 14x14, 8x14x14 or 128.", param, ctx)
        return tuple(map(int, sides))
