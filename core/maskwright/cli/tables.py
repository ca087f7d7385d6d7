"""Aligned columns for the terminal, as wide as it is; plain and whole when the output is piped.

Colour is click's business, which leaves it out when the output is no terminal; `colour` heeds NO_COLOR.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from pathlib import Path

import click


def colour() -> bool | None:
    """What `click.Context.color` should be: False with NO_COLOR, else None, which lets click look at the terminal."""
    return False if os.environ.get("NO_COLOR") else None


def width() -> int | None:
    """Columns of the terminal (or COLUMNS); None when the output is piped and COLUMNS says nothing: then nothing is cut."""
    if os.environ.get("COLUMNS", "").isdigit() or sys.stdout.isatty():
        return max(40, shutil.get_terminal_size().columns)
    return None


def counted(number: int, noun: str) -> str:
    """`1 plugin`, `3 plugins`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shown(path: str) -> str:
    """A path as people would type it: relative where it lies below the working directory."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


class Table:
    """Rows of cells; one column takes what room is left, and is cut or wrapped there."""

    def __init__(self, indent: str = "") -> None:
        self.indent = indent
        self.rows: list[tuple[str, ...]] = []

    def add(self, *cells: str) -> None:
        """One more row; cells may carry colour, but for the one that is cut or wrapped."""
        self.rows.append(tuple(cell if click.unstyle(cell) else "" for cell in cells))

    def lines(self, *, stretch: int, least: int = 20, wrap: bool = False) -> list[str]:
        """The rows as lines; the column `stretch` has the room that the others leave, but `least` at least."""
        widths = [max(len(click.unstyle(cell)) for cell in column) for column in zip(*self.rows)]
        room = width()
        if room is not None:
            others = sum(size + 2 for column, size in enumerate(widths) if column != stretch and size)
            widths[stretch] = min(widths[stretch], max(least, room - others - len(self.indent)))
        lines = []
        for row in self.rows:
            text = row[stretch]
            parts = [text]
            if len(text) > widths[stretch]:
                parts = (
                    textwrap.wrap(text, widths[stretch])
                    if wrap
                    else [text[: widths[stretch] - 1].rstrip() + "…"]
                )
            for number, part in enumerate(parts):
                cells = [part if at == stretch else cell if not number else "" for at, cell in enumerate(row)]
                padded = [
                    cell + " " * (size - len(click.unstyle(cell)))
                    for cell, size in zip(cells, widths)
                    if size
                ]
                lines.append(self.indent + "  ".join(padded).rstrip())
        return lines
