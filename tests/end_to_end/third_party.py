"""Third-party plugins of every sort, good and bad, as wheels. None of them needs torch."""

from __future__ import annotations

from wheels import Wheel

COMPONENT = """\
import attrs
from maskwright import hookimpl, setting

@attrs.frozen
class Component:
    '''{summary}.'''
    kind = "mask-strategy"
    name = "{name}"
    modalities = frozenset({{"image"}})
    needs = frozenset()
    provides = frozenset()
    cell: int = setting(1, "side of a cell", ge=1)

    def draw(self, layout, *, signals, progress, generator):
        raise NotImplementedError

@hookimpl
def maskwright_components():
    return [Component]
"""

TABLE = """\
[plugins.{slug}]
module = "{module}"
title = "A plugin of the tests"
{more}
[[plugins.{slug}.components]]
kind = "mask-strategy"
name = "{name}"
modalities = ["image"]
summary = "{summary}"
parameters = [{{ name = "cell", type = "int", default = "1", range = ">= 1", help = "side of a cell" }}]
"""

SUMMARY = "A mask of the tests"


def plugin(
    name: str,
    component: str,
    *,
    before: str = "",
    registers: str | None = None,
    catalogue: str | None = "",
    more: str = "",
    version: str = "1.0",
) -> Wheel:
    """A distribution with one plugin and one component.

    `before` runs first when it is imported; it registers `registers` in place of `component`; `catalogue` replaces its
    registry.toml, and None leaves it out.
    """
    module = name.replace("-", "_")
    words = {"slug": name, "module": module, "name": component, "summary": SUMMARY, "more": more}
    files = {f"{module}/__init__.py": before + COMPONENT.format(name=registers or component, summary=SUMMARY)}
    if catalogue is not None:
        files[f"{module}/registry.toml"] = catalogue or TABLE.format(**words)
    return Wheel(name, {name: module}, files, version)


SPY = "import os, pathlib\npathlib.Path(os.environ['MASKWRIGHT_TEST_SPY']).write_text('imported')\n"

GOOD = plugin("mw-good", "good-mask", version="1.2")
RAISES = plugin("mw-raises", "raising-mask", before="raise RuntimeError('boom at import')\n")
MISSING = plugin(
    "mw-missing", "missing-mask", before="import a_package_nobody_has\n", more='extras = ["fast"]'
)
HANGS = plugin("mw-hangs", "hanging-mask", before="import time; time.sleep(3600)\n")
TAKES = plugin("mw-takes", "tube")
TWIN_A = plugin("mw-twin-a", "twin-mask")
TWIN_B = plugin("mw-twin-b", "twin-mask")
MALFORMED = plugin("mw-malformed", "malformed-mask", catalogue="[plugins.mw-malformed\nmodule = 'x'\n")
SILENT = plugin("mw-silent", "silent-mask", catalogue=None)
LIES = plugin("mw-lies", "promised-mask", registers="other-mask")
SPYING = plugin("mw-spying", "spying-mask", before=SPY)

TROUBLED = (GOOD, RAISES, MISSING, HANGS, TAKES, TWIN_A, TWIN_B, MALFORMED, SILENT, LIES, SPYING)


def generated(count: int) -> list[Wheel]:
    """Good plugins in number."""
    return [plugin(f"mw-many-{i:04}", f"many-{i:04}") for i in range(count)]


OBSERVER = """\
import json, os
from maskwright import hookimpl

def note(*words):
    with open(os.environ["MASKWRIGHT_TEST_SPY"], "a") as file:
        file.write(json.dumps(words) + "\\n")

@hookimpl
def maskwright_run_started(run):
    note("started", run.job, run.steps)

@hookimpl
def maskwright_mask_drawn(run, mask):
    note("mask", *mask.shape)

@hookimpl
def maskwright_step_ended(run, metrics):
    note("step", metrics["step"], "loss" in metrics)

@hookimpl
def maskwright_run_ended(run, result):
    note("ended", os.path.basename(run.folder))
"""

GRUMPY = """\
from maskwright import hookimpl

@hookimpl
def maskwright_step_ended(run, metrics):
    raise RuntimeError("no more steps, please")
"""


def observer(name: str, source: str) -> Wheel:
    """A distribution with an observer and no component."""
    module = name.replace("-", "_")
    table = f'[plugins.{name}]\nmodule = "{module}"\ntitle = "An observer of the tests"\n'
    return Wheel(name, {name: module}, {f"{module}/__init__.py": source, f"{module}/registry.toml": table})


WATCHING = observer("mw-watching", OBSERVER)
GRUMBLING = observer("mw-grumbling", GRUMPY)
