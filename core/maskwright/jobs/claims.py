"""Executable claims: a paper's headline effect, measured again at CPU scale, with an honest verdict.

A plugin's `claim.py` has one module-level `CLAIM`. The criterion is written down before measuring and never tuned.
"""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from maskwright.errors import UnknownComponent, did_you_mean
from maskwright.mask import write_whole
from maskwright.registry import PluginInfo, Registry

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced at this scale"

Measurement = Mapping[str, float]
"""One seed's numbers, by name (the names say the unit)."""


@attrs.frozen
class Claim:
    """What is claimed, against what, and how it is decided.

    `measure(seed)` returns one seed's numbers; `decide(measurements)` is the criterion in code, `criterion` the same in words.
    `paper` are the paper's own numbers. `note` is anything a reader must know to read the numbers rightly.
    """

    statement: str
    baseline: str
    criterion: str
    measure: Callable[[int], Measurement]
    decide: Callable[[Sequence[Measurement]], bool]
    seeds: tuple[int, ...] = (0, 1, 2)
    paper: str = ""
    note: str = ""


@attrs.frozen
class ClaimResult:
    """A measured claim."""

    slug: str
    claim: Claim
    measurements: tuple[Measurement, ...]

    @property
    def verdict(self) -> str:
        """ "reproduced" or "not reproduced at this scale"."""
        return REPRODUCED if self.claim.decide(self.measurements) else NOT_REPRODUCED

    def text(self) -> str:
        """The block that `maskwright verify` prints and that the plugin's README shows, letter for letter."""
        claim = self.claim
        names = list(dict.fromkeys(name for one in self.measurements for name in one))
        width = max(map(len, names), default=0)
        lines = [f"{self.slug}: {self.verdict}"]
        rows = [("claim", claim.statement), ("baseline", claim.baseline), ("criterion", claim.criterion)]
        rows += [("paper", claim.paper)] * bool(claim.paper) + [("note", claim.note)] * bool(claim.note)
        lines += [f"  {label:<10}{text}" for label, text in rows]
        lines.append(f"  {'seeds':<10}{', '.join(map(str, claim.seeds))}")
        lines += [
            f"    {name:<{width}}  {spread([one[name] for one in self.measurements if name in one])}"
            for name in names
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        facts = attrs.asdict(self.claim, filter=lambda field, _: field.name not in ("measure", "decide"))
        return {
            "slug": self.slug,
            "verdict": self.verdict,
            **facts,
            "measurements": [dict(one) for one in self.measurements],
        }


def spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation` to four significant digits; the plain value where there is only one."""
    mean = statistics.fmean(values)
    if len(values) == 1 or max(values) == min(values):
        return f"{mean:.4g}"
    return f"{mean:.4g} ± {statistics.stdev(values):.2g}"


def load_claim(plugin: PluginInfo) -> Claim:
    """The CLAIM of a plugin. Raises `UnknownComponent` when it has none."""
    try:
        module = importlib.import_module(f"{plugin.module}.claim")
    except ModuleNotFoundError as error:
        if error.name != f"{plugin.module}.claim":
            raise
        raise UnknownComponent(f"Plugin {plugin.slug!r} has no claim.py.") from None
    return module.CLAIM


def with_claims(registry: Registry, slugs: Sequence[str] = ()) -> list[PluginInfo]:
    """The plugins named, or every built-in plugin that has a claim. Raises `UnknownComponent` for a name that is none."""
    plugins = {plugin.slug: plugin for plugin in registry.plugins()}
    for slug in slugs:
        if slug not in plugins:
            raise UnknownComponent(f"There is no plugin {slug!r}.{did_you_mean(slug, plugins)}")
    if slugs:
        return [plugins[slug] for slug in slugs]
    return [
        plugin for plugin in plugins.values() if plugin.source == "built-in" and plugin.slug != "baselines"
    ]


def verify(plugin: PluginInfo, progress: Callable[[int, int], None] | None = None) -> ClaimResult:
    """Measure a plugin's claim. `progress(done, total)` is called after each seed."""
    claim = load_claim(plugin)
    measurements = []
    for done, seed in enumerate(claim.seeds, 1):
        measurements.append(claim.measure(seed))
        if progress is not None:
            progress(done, len(claim.seeds))
    return ClaimResult(plugin.slug, claim, tuple(measurements))


def record(result: ClaimResult, folder: Path) -> None:
    """Write the result into a plugin's folder: claim.json, and the block between the markers of its README.md."""
    write_whole(folder / "claim.json", (json.dumps(result.as_json(), indent=2) + "\n").encode())
    readme = folder / "README.md"
    write_whole(
        readme, replace_block(readme.read_text("utf-8"), "claim", f"```\n{result.text()}\n```").encode()
    )


def replace_block(text: str, name: str, content: str) -> str:
    """The text with what stands between `<!-- name -->` and `<!-- /name -->` replaced; appended where there is none."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, found, rest = text.partition(start)
    if not found:
        return f"{text.rstrip()}\n\n{start}\n{content}\n{end}\n"
    return f"{head}{start}\n{content}\n{end}{rest.partition(end)[2]}"
