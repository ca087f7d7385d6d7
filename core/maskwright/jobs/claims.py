"""Executable claims: a paper's headline effect, measured again at CPU scale, with an honest verdict.

A plugin's `claim.py` has one module-level `CLAIM`. The criterion is written down before measuring and never tuned.
"""

from __future__ import annotations

import importlib
import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from maskwright.errors import OutputError, PluginLoadError, UnknownComponent, did_you_mean
from maskwright.mask import write_whole
from maskwright.registry import (
    PluginInfo,
    Registry,
    built_in_catalogue,
    is_path,
    plugin_folder,
    recorded_claim,
)

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


def declared(plugin: PluginInfo, name: str) -> Any:
    """What a plugin's claim.py has under a name; None where there is none. Raises `PluginLoadError` for one that fails."""
    try:
        return getattr(_claim_module(plugin), name, None)
    except Exception as error:
        raise PluginLoadError(
            f"The claim of plugin {plugin.slug!r} could not be imported: {type(error).__name__}: {error}."
        ) from error


def load_claim(plugin: PluginInfo) -> Claim:
    """The CLAIM of a plugin. Raises `UnknownComponent` when it has none, `PluginLoadError` when it cannot be imported."""
    claim = declared(plugin, "CLAIM")
    if not isinstance(claim, Claim):
        raise UnknownComponent(
            f"Plugin {plugin.slug!r} has no claim: a module `claim` with CLAIM = maskwright.jobs.claims.Claim(…)."
        )
    return claim


def _claim_module(plugin: PluginInfo) -> Any:
    folder = plugin_folder(plugin)
    if folder is None or not (folder / "claim.py").is_file():
        return None
    if is_path(plugin.module):
        file = attrs.evolve(plugin, module=str(folder / "claim.py"))
        return Registry(built_in=False, third_party=False).module(file)
    package = (
        plugin.module if folder.name == plugin.module.rpartition(".")[2] else plugin.module.rpartition(".")[0]
    )
    return importlib.import_module(f"{package}.claim" if package else "claim")


def with_claims(
    registry: Registry, names: Sequence[str] = (), *, third_party: bool = False, family: str | None = None
) -> list[PluginInfo]:
    """The plugins named (slugs), or else every built-in plugin that has a claim.py; with `third_party` any other too.

    `family` leaves those of one family. Raises `UnknownComponent` for a name or a family that there is not.
    """
    every = registry.plugins()
    chosen = [registry.plugin(name) for name in names] or [
        plugin
        for plugin in every
        if (third_party or plugin.source == "built-in")
        and not plugin.error
        and (folder := plugin_folder(plugin)) is not None
        and (folder / "claim.py").is_file()
    ]
    if family is not None:
        family = family_of(registry, family)
    return [plugin for plugin in chosen if family in (None, plugin.family)]


def family_of(registry: Registry, name: str) -> str:
    """The family of a name, which may leave out its plural's s. Raises `UnknownComponent` for one that there is not."""
    families = sorted({plugin.family for plugin in registry.plugins() if plugin.family})
    for family in (name, f"{name}s"):
        if family in families:
            return family
    raise UnknownComponent(
        f"There is no family {name!r}.{did_you_mean(name, families)} Families are {', '.join(families) or 'none'}."
    )


def keep_result(result: ClaimResult, path: Path) -> None:
    """Keep a measured claim, for `kept_result`. Raises `OutputError` when it cannot be written."""
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(result.as_json(), indent=2) + "\n").encode())


def kept_result(plugin: PluginInfo, path: Path) -> ClaimResult | None:
    """The result that was kept, unless there is none or the claim says something else by now."""
    try:
        kept = json.loads(path.read_text("utf-8"))
        result = ClaimResult(plugin.slug, load_claim(plugin), tuple(kept["measurements"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if json.loads(json.dumps(result.as_json())) == kept else None


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
    """Write the result into a plugin's folder: claim.json, and the block between the markers of its README.md, if it has one.

    Raises `OutputError` when the folder cannot be written.
    """
    readme = folder / "README.md"
    with _writing(folder):
        write_whole(folder / "claim.json", (json.dumps(result.as_json(), indent=2) + "\n").encode())
        if readme.is_file():
            text = replace_block(readme.read_text("utf-8"), "claim", f"```\n{result.text()}\n```")
            write_whole(readme, text.encode())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error


def papers_table(registry: Registry) -> str:
    """The README's table of the papers, in Markdown: one row for each built-in plugin of a paper.

    Title and folder, components, the claim's first sentence, and its verdict, from registry.toml and the claim.json files.
    """
    lines = [
        "| paper | components | claim, measured on a CPU at small scale | verdict |",
        "|---|---|---|---|",
    ]
    plugins = [plugin for plugin in registry.plugins() if plugin.source == "built-in" and plugin.paper]
    for plugin in sorted(plugins, key=lambda one: (one.family, one.title.lower())):
        claim = recorded_claim(plugin) or {}
        names = ", ".join(f"`{info.name}`" for info in registry.find() if info.plugin.key == plugin.key)
        title = f"[{_cell(plugin.title)}]({plugin.paper_url})" if plugin.paper_url else _cell(plugin.title)
        statement = _cell(str(claim.get("statement", "")))
        folder = f"[{plugin.slug}](plugins/{plugin.slug}/README.md)"
        lines.append(
            f"| {title} · {folder} | {names} | {_first_sentence(statement)} | {claim.get('verdict', 'not measured yet')} |"
        )
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.;])\s+(?=[A-Z(])", text, maxsplit=1)[0].rstrip(".;")


def record_papers(registry: Registry) -> Path | None:
    """Write the table of the papers into the README.md beside the built-in catalogue; None where there is none."""
    return record_block("papers", papers_table(registry))


def record_block(name: str, content: str) -> Path | None:
    """Write what stands between the markers of a name in the README.md beside the built-in catalogue; None where there are none."""
    readme = built_in_catalogue().parent / "README.md"
    text = readme.read_text("utf-8") if readme.is_file() else ""
    if f"<!-- {name} -->" not in text:
        return None
    with _writing(readme):
        write_whole(readme, replace_block(text, name, content).encode())
    return readme


def replace_block(text: str, name: str, content: str) -> str:
    """The text with what stands between `<!-- name -->` and `<!-- /name -->` replaced; appended where there is none."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, found, rest = text.partition(start)
    if not found:
        return f"{text.rstrip()}\n\n{start}\n{content}\n{end}\n"
    return f"{head}{start}\n{content}\n{end}{rest.partition(end)[2]}"
