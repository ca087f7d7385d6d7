"""`python -m benchmarks [NAME…]`: run benchmarks, print a table, save benchmarks/results.json."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import platform
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"


def benchmarks() -> dict[str, ModuleType]:
    """Every benchmark by the name of its module."""
    found = {}
    for module in pkgutil.iter_modules([str(HERE)]):
        source = (HERE / f"{module.name}.py").read_text(encoding="utf-8")
        if "\nNAME = " in source and "\ndef run(" in source:
            found[module.name] = importlib.import_module(f"benchmarks.{module.name}")
    return found


def verdict(row: dict) -> str:
    """What the last column says."""
    if row["ratio"] is None:
        return "not measured"
    if row.get("bound") is None:
        return "reported"
    return "met" if row["ratio"] <= row["bound"] else "NOT MET"


def duration(seconds: float | None) -> str:
    """`1.23 s`, `45.6 ms`, `7.8 µs`."""
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= size or unit == "µs":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError


def table(name: str, rows: list[dict]) -> str:
    """The rows of one benchmark for people."""
    lines = [name]
    width = max((len(row["what"]) for row in rows), default=0)
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3g}"
        bound = "" if row.get("bound") is None else f"≤ {row['bound']:.3g}"
        times = f"{duration(row['seconds']):>9}  {duration(row['peer_seconds']):>9}"
        lines.append(f"  {row['what']:<{width}}  {ratio:>7}  {bound:>7}  {times}  {verdict(row)}")
        if row.get("note"):
            lines.append(f"    {row['note']}")
    return "\n".join(lines)


def main() -> None:
    """Run those named, or all. A bound that is not met is shown, not an error."""
    known = benchmarks()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all when none is named"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="where the numbers go (default: %(default)s)"
    )
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(known)}")
    results = json.loads(given.out.read_text("utf-8"))["benchmarks"] if given.out.is_file() else {}
    print("  ratio = seconds / the peer's seconds; less is better\n")
    for name in given.names or known:
        rows = known[name].run()
        print(table(known[name].NAME, rows) + "\n", flush=True)
        results[name] = rows
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count()}
    text = json.dumps({"machine": machine, "benchmarks": results}, indent=2, ensure_ascii=False)
    given.out.write_text(text + "\n", encoding="utf-8")
    missed = [
        row["what"] for name in given.names or known for row in results[name] if verdict(row) == "NOT MET"
    ]
    print(
        f"{given.out} has the numbers. "
        + (f"Not met: {'; '.join(missed)}." if missed else "Every bound is met.")
    )


if __name__ == "__main__":
    sys.exit(main())
