"""`python -m benchmarks`: it finds the benchmarks, says which bounds are met, and keeps the numbers."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from benchmarks import __main__ as runner
from benchmarks.timing import interleaved, row, skipped

ROWS = [
    row("quick", 1.0, 2.0, 0.75),
    row("slow", 3e-3, 2e-3, 1.2, "a busy machine"),
    row("told", 5e-6, 2.5e-6),
    skipped("absent", "no network"),
]


def test_every_benchmark_is_found():
    found = runner.benchmarks()
    assert {"listing", "masks"} <= set(found)
    assert "timing" not in found


def test_a_bound_is_met_when_the_ratio_is_not_above_it():
    assert [runner.verdict(one) for one in ROWS] == ["met", "NOT MET", "reported", "not measured"]
    assert runner.verdict(row("equal", 2.0, 1.0, 2.0)) == "met"


def test_the_table_has_ratio_bound_times_and_notes():
    lines = runner.table("things", ROWS).splitlines()
    assert lines[0] == "things"
    assert lines[1].split() == ["quick", "0.5", "≤", "0.75", "1", "s", "2", "s", "met"]
    assert lines[2].split() == ["slow", "1.5", "≤", "1.2", "3", "ms", "2", "ms", "NOT", "MET"]
    assert lines[3].strip() == "a busy machine"
    assert lines[4].split() == ["told", "2", "5", "µs", "2.5", "µs", "reported"]
    assert lines[5].split() == ["absent", "not", "measured"]


def test_what_is_run_is_shown_and_kept_beside_earlier_numbers(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    out.write_text(json.dumps({"benchmarks": {"earlier": [], "one": [skipped("old", "old")]}}))
    one = SimpleNamespace(NAME="Number one", run=lambda: ROWS)
    two = SimpleNamespace(NAME="Number two", run=lambda: pytest.fail("it was not asked for"))
    monkeypatch.setattr(runner, "benchmarks", lambda: {"one": one, "two": two})
    monkeypatch.setattr(sys, "argv", ["benchmarks", "one", "--out", str(out)])
    assert runner.main() is None
    told = capsys.readouterr().out
    assert "Number one" in told
    assert "Not met: slow." in told
    kept = json.loads(out.read_text())
    assert set(kept["benchmarks"]) == {"earlier", "one"}
    assert kept["benchmarks"]["one"] == ROWS
    assert kept["machine"]["cpus"]


def test_an_unknown_name_is_a_mistake_in_use(monkeypatch, capsys):
    monkeypatch.setattr(runner, "benchmarks", lambda: {"one": None})
    monkeypatch.setattr(sys, "argv", ["benchmarks", "three"])
    with pytest.raises(SystemExit) as stopped:
        runner.main()
    assert stopped.value.code == 2
    assert "there is no benchmark 'three'; there are one" in capsys.readouterr().err


def test_things_are_measured_by_turns():
    turns: list[str] = []
    seconds = interleaved({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 3)
    assert turns == ["a", "b"] * 4
    assert set(seconds) == {"a", "b"}
    assert all(value >= 0 for value in seconds.values())
