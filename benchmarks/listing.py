"""How long the command line takes to say what there is, with many plugins installed.

The peer is a bare interpreter that imports what any plugin host of this kind needs (click, attrs, pluggy,
importlib.metadata), and, side by side, `llm plugins` with as many plugins of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.timing import Row, command, interleaved, row, skipped

sys.path.append(str(Path(__file__).parents[1] / "tests" / "end_to_end"))

from environments import Environment
from third_party import plugin
from wheels import Wheel

NAME = "listing"
BUILT_IN = 55
REPEATS = 15
BARE = "import click, attrs, pluggy, importlib.metadata"

CREATE = """
import timeit
from maskwright.registry import Registry
registry = Registry()
kind = type(registry.create("mask-strategy", "plug-0000"))
def best(statement):
    return min(timeit.repeat(statement, globals=globals(), number=5000, repeat=9)) / 5000
print(best('registry.create("mask-strategy", "plug-0000", cell=3)'), best("kind(cell=3)"))
"""

LLM_PLUGIN = "import torch\nimport llm\n@llm.hookimpl\ndef register_models(register):\n    pass\n"


def run() -> list[Row]:
    """The rows of the table."""
    with tempfile.TemporaryDirectory(prefix="maskwright-listing-") as folder:
        place = Path(folder)
        return [*_commands(place), *_growth(place), _create(place), _beside_llm(place)]


def _host(place: Path, wheels: Sequence[Wheel]) -> tuple[Environment, dict[str, str]]:
    """An environment with these plugins and 55 built-in tables (those that are missing so far come from a file)."""
    environment = Environment(place)
    for wheel in wheels:
        wheel.unpack(environment.packages)
    return environment, _environment(place)


def _environment(place: Path) -> dict[str, str]:
    from maskwright.registry import Registry

    missing = BUILT_IN - len(Registry(third_party=False).plugins())
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "MASKWRIGHT"))}
    if missing > 0:
        file = place / "built-in.toml"
        file.write_text("".join(_table(number) for number in range(missing)), encoding="utf-8")
        kept["MASKWRIGHT_REGISTRY"] = str(file)
    return {**kept, "PYTHONNOUSERSITE": "1", "COLUMNS": "120"}


def _table(number: int) -> str:
    """A table as long as those of the papers: two components with four parameters."""
    slug = f"paper-{number:02}"
    text = f"""
    [plugins.{slug}]
    module = "paper_{number:02}"
    title = "A paper whose title is about as long as the titles of papers are: number {number}"
    paper = "arXiv:2407.{number:05}"
    code = "https://example.org/{slug}"
    """
    for kind in ("mask-strategy", "objective"):
        text += f"""
    [[plugins.{slug}.components]]
    kind = "{kind}"
    name = "{slug}"
    modalities = ["image", "video"]
    summary = "What it decides, in one line that is about as long as such lines are"
    parameters = [
        """
        for name in ("ratio", "alpha", "beta", "temperature"):
            text += f'{{ name = "{name}", type = "float", default = "0.75", range = "in [0, 1)", help = "what it means" }},\n'
        text += "]\n"
    return textwrap.dedent(text)


def _many(count: int, *, before: str = "") -> list[Wheel]:
    return [plugin(f"mw-plug-{i:04}", f"plug-{i:04}", before=before) for i in range(count)]


def _commands(place: Path) -> list[Row]:
    """Each command with 55 + 100 plugins, of which one imports torch and one hangs."""
    wheels = _many(98)
    wheels.append(plugin("mw-torch", "torch-mask", before="import torch\n"))
    wheels.append(plugin("mw-hangs", "hanging-mask", before="import time; time.sleep(3600)\n"))
    environment, settings = _host(place / "commands", wheels)
    start = [environment.executable, "-P", "-m", "maskwright"]
    completing = {
        **settings,
        "_MASKWRIGHT_COMPLETE": "bash_complete",
        "COMP_WORDS": "maskwright list plug-00",
        "COMP_CWORD": "2",
    }
    asked = {
        "list": (["list"], settings),
        "list --json": (["list", "--json"], settings),
        "info": (["info", "plug-0042"], settings),
        "--help": (["--help"], settings),
        "completion": ([], completing),
    }
    _complete_really(start, completing)
    runs = {name: command([*start, *words], env, str(place)) for name, (words, env) in asked.items()}
    bare = command([environment.executable, "-P", "-c", BARE], settings, str(place))
    seconds = interleaved({"bare": bare, **runs}, REPEATS)
    return [
        row(f"{name} with 155 plugins / a bare interpreter", seconds[name], seconds["bare"], 2.0)
        for name in asked
    ]


def _complete_really(start: Sequence[str], settings: dict[str, str]) -> None:
    done = subprocess.run(start, env=settings, capture_output=True, text=True)
    if "plug-0042" not in done.stdout:
        raise RuntimeError(f"completion gave no names: {done.stdout[:200]}{done.stderr[-500:]}")


def _growth(place: Path) -> list[Row]:
    """What each further plugin costs `list`, and whether a thousand cost ten times as much as a hundred."""
    steps = (0, 500, 1000)
    runs = {}
    for count in steps:
        environment, settings = _host(place / f"growth-{count}", _many(count))
        words = [environment.executable, "-P", "-m", "maskwright", "list"]
        runs[str(count)] = command(words, settings, str(place))
    seconds = interleaved(runs, REPEATS)
    none, half, all_ = (seconds[str(count)] for count in steps)
    return [
        row("list: each plugin from 55 to 1,055 / 0.25 ms", (all_ - none) / steps[2], 0.25e-3, 1.0),
        row(
            "list: plugins 556 to 1,055 / plugins 56 to 555",
            all_ - half,
            half - none,
            1.25,
            "linear: about 1",
        ),
    ]


def _create(place: Path) -> Row:
    environment, settings = _host(place / "create", _many(100))
    words = [environment.executable, "-P", "-c", CREATE]
    told = subprocess.run(words, env=settings, check=True, capture_output=True, text=True).stdout
    through, plain = map(float, told.split())
    note = f"{through * 1e6:.2f} µs through the registry, {plain * 1e6:.2f} µs by the class"
    return row("create of a loaded component, over its class / 20 µs", through - plain, 20e-6, 1.0, note)


def _beside_llm(place: Path) -> Row:
    """100 plugins that import torch, in each host."""
    what = "list / `llm plugins`, each with 100 plugins that import torch"
    ours, settings = _host(place / "ours", _many(100, before="import torch\n"))
    theirs = Environment(place / "theirs")
    installed = subprocess.run(
        [theirs.executable, "-m", "pip", "install", "--quiet", "--ignore-installed", "--target", str(theirs.packages), "llm"],
        env=settings, capture_output=True, text=True,
    )  # fmt: skip
    if installed.returncode:
        reason = (installed.stderr.strip() or "pip failed").splitlines()[-1]
        return skipped(what, f"llm could not be installed here: {reason}")
    for number in range(100):
        module = f"llm_plug_{number:04}"
        wheel = Wheel(
            f"llm-plug-{number:04}", {module: module}, {f"{module}/__init__.py": LLM_PLUGIN}, group="llm"
        )
        wheel.unpack(theirs.packages)
    settings["LLM_USER_PATH"] = str(place / "llm")
    words = [theirs.executable, "-P", "-m", "llm", "plugins"]
    told = subprocess.run(words, env=settings, check=True, capture_output=True, text=True).stdout
    if len(json.loads(told)) != 100:
        return skipped(what, f"llm found {len(json.loads(told))} plugins, not 100")
    runs = {
        "ours": command([ours.executable, "-P", "-m", "maskwright", "list"], settings, str(place)),
        "theirs": command(words, settings, str(place)),
    }
    seconds = interleaved(runs, 5)
    return row(what, seconds["ours"], seconds["theirs"])
