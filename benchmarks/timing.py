"""Medians of things that are measured by turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def interleaved(
    measured: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds of each, the median of `repeats` after one that does not count.

    With `time.process_time` as `clock` they are of this process, and other processes count less; for work on one thread.
    """
    taken: dict[str, list[float]] = {name: [] for name in measured}
    for turn in range(repeats + 1):
        for name, call in measured.items():
            started = clock()
            call()
            if turn:
                taken[name].append(clock() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def command(words: Sequence[str], environment: Mapping[str, str], folder: str) -> Callable[[], object]:
    """Runs a command to its end; raises when it fails."""

    def run() -> None:
        subprocess.run(words, env=dict(environment), cwd=folder, stdout=subprocess.DEVNULL, check=True)

    return run


def row(what: str, seconds: float, peer_seconds: float, bound: float | None = None, note: str = "") -> Row:
    """One line of the table."""
    return {
        "what": what,
        "ratio": seconds / peer_seconds,
        "bound": bound,
        "seconds": seconds,
        "peer_seconds": peer_seconds,
        "note": note,
    }


def skipped(what: str, reason: str) -> Row:
    """A line that says why it was not measured."""
    return {"what": what, "ratio": None, "bound": None, "seconds": None, "peer_seconds": None, "note": reason}
