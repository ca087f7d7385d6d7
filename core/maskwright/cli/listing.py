"""`maskwright list`: what there is, from the catalogue alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import click

from maskwright.cli import health
from maskwright.cli.completion import component_names, plugin_names, words
from maskwright.cli.session import Session, pass_session
from maskwright.cli.tables import Table, counted, shown, width

if TYPE_CHECKING:
    from maskwright.registry import ComponentInfo, PluginInfo, Registry

SCHEMA = 1
HEADINGS = {
    "mask-strategy": "Mask strategies",
    "objective": "Objectives",
    "pruner": "Pruners",
    "sampler": "Samplers",
}


@click.command(
    epilog="\b\nExamples:\n  maskwright list '*mae*'\n  maskwright list --kind mask-strategy --modality video\n"
    "  maskwright list --provides patch_loss --json"
)
@click.argument("pattern", default="*", shell_complete=component_names())
@click.option("--kind", type=click.Choice(list(HEADINGS)), help="Only this kind of component.")
@click.option(
    "--modality", metavar="M", shell_complete=words("modalities"), help="image, video, text, motion, …"
)
@click.option(
    "--needs", metavar="SIGNAL", shell_complete=words("needs"), help="Those that need this signal or column."
)
@click.option(
    "--provides", metavar="SIGNAL", shell_complete=words("provides"), help="Those that provide this signal."
)
@click.option(
    "--plugin", metavar="NAME", shell_complete=plugin_names(), help="Those of one plugin or distribution."
)
@click.option("--long", is_flag=True, help="Plugin, module, paper and parameters as well.")
@click.option("--json", "as_json", is_flag=True, help="For programs; docs/command-line.md has the keys.")
@pass_session
def list_components(
    session: Session,
    pattern: str,
    kind: str | None,
    modality: str | None,
    needs: str | None,
    provides: str | None,
    plugin: str | None,
    long: bool,
    as_json: bool,
) -> None:
    """List components by kind; PATTERN is a part of a name, or has wildcards ("*mae*").

    Third-party components show their distribution and version at the right; "!" marks what cannot be used.
    Nothing is imported: this reads the plugins' registry.toml files.
    """
    registry = session.registry
    asked = any((kind, modality, needs, provides, plugin)) or pattern != "*"
    found = [
        info
        for info in registry.find(kind=kind, modality=modality, needs=needs, provides=provides, plugin=plugin)
        if _matches(info, pattern)
    ]
    problems = health.problems(registry.plugins())
    if as_json:
        click.echo(json.dumps(_document(registry, found, problems), indent=2))
        return
    by_kind: dict[str, list[ComponentInfo]] = {}
    for info in found:
        by_kind.setdefault(info.kind, []).append(info)
    blocks = [_block(registry, infos, problems, long) for infos in by_kind.values()]
    apart = [one for one in registry.plugins() if one.key in problems or not one.described]
    if apart and not (asked and found):
        blocks.append(_apart(apart, problems))
    for block in blocks:
        click.echo(block + "\n")
    if not found:
        click.echo("No component matches; `maskwright list` shows all.", err=True)
    elif not asked:
        click.echo(_count(found, problems))


def _matches(info: ComponentInfo, pattern: str) -> bool:
    wild = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    return fnmatchcase(info.name, wild) or fnmatchcase(info.qualified, wild)


# -- for people --------------------------------------------------------------------------------------------------


def _block(
    registry: Registry, infos: list[ComponentInfo], problems: Mapping[tuple[str, str], str], long: bool
) -> str:
    heading = click.style(f"{HEADINGS[infos[0].kind]} ({len(infos)})", bold=True)
    if long:
        return "\n".join([heading, *(_entry(registry, info, problems) for info in infos)])
    table = Table()
    for info in infos:
        broken = info.plugin.key in problems
        table.add(
            click.style("!", fg="red") if broken else " ",
            click.style(registry.address(info), fg="red" if broken else "cyan"),
            click.style(_cut(",".join(sorted(info.modalities))), dim=True),
            info.summary,
            click.style(_origin(info.plugin), fg="yellow"),
        )
    return "\n".join([heading, *table.lines(stretch=3, least=16)])


def _cut(words: str) -> str:
    """At most twelve characters where the terminal is narrow."""
    room = width()
    return words if room is None or room >= 110 or len(words) <= 12 else f"{words[:11]}…"


def _entry(registry: Registry, info: ComponentInfo, problems: Mapping[tuple[str, str], str]) -> str:
    plugin = info.plugin
    rows = [
        ("decides", info.summary),
        ("modalities", ", ".join(sorted(info.modalities))),
        ("needs", ", ".join(sorted(info.needs))),
        ("provides", ", ".join(sorted(info.provides))),
        ("budgets", ", ".join(sorted(info.budgets))),
        ("domain", info.domain),
        ("backbone", info.backbone),
        ("parameters", ", ".join(f"{one.name}={one.default or '…'}" for one in info.parameters)),
        ("paper", f"{plugin.title} ({plugin.paper})" if plugin.paper else plugin.title),
        ("plugin", f"{plugin.slug} ({plugin.module}), {plugin.source}, {plugin.origin}"),
        ("broken", problems.get(plugin.key, "")),
    ]
    lines = [f"  {click.style(registry.address(info), fg='cyan')}"]
    table = Table(indent="    ")
    for label, text in rows:
        if text:
            table.add(click.style(label, dim=True), text)
    return "\n".join([*lines, *table.lines(stretch=1, least=24, wrap=True)])


def _origin(plugin: PluginInfo) -> str:
    """What tells a third-party component from a built-in one; a built-in one has nothing here."""
    if plugin.source == "file":
        return shown(plugin.distribution)
    return {"built-in": "", "program": "this program"}.get(plugin.source, plugin.origin)


def _apart(plugins: Iterable[PluginInfo], problems: Mapping[tuple[str, str], str]) -> str:
    table = Table()
    for plugin in plugins:
        said = problems.get(plugin.key)
        table.add(
            click.style("!", fg="red") if said else " ",
            click.style(plugin.slug, fg="red" if said else "cyan"),
            plugin.origin if plugin.source != "file" else shown(plugin.distribution),
            said
            or f"not described: `maskwright describe {plugin.module}` imports it and prints what it offers",
        )
    heading = click.style("Plugins with a note (see `maskwright doctor`)", bold=True)
    return "\n".join([heading, *table.lines(stretch=3, least=30, wrap=True)])


def _count(found: list[ComponentInfo], problems: Mapping[tuple[str, str], str]) -> str:
    own = sum(info.plugin.source == "built-in" for info in found)
    others = f", {len(found) - own} of others" if len(found) > own else ""
    broken = f"; {counted(len(problems), 'plugin')} cannot be used (!)" if problems else ""
    return f"{own} built-in components{others}{broken}. `maskwright info NAME` tells more."


# -- for programs ------------------------------------------------------------------------------------------------


def _document(
    registry: Registry, found: list[ComponentInfo], problems: Mapping[tuple[str, str], str]
) -> dict[str, Any]:
    """The schema of `list --json`; keys are only ever added while `schema` stays the same.

    - `schema`: 1; `maskwright`: version
    - `components`: the ones that match, by kind and name, each as `component_as_json` has it
    - `plugins`: every plugin, whatever was asked: `slug`, `module`, `title`, `paper`, `code`, `family`, `extras`, `distribution`,
      `version`, `source` ("built-in", "third-party", "file"), `described` (has a registry.toml), `problem` (why it cannot be
      used, "" as far as is known) and `components` (how many it describes)
    """
    from maskwright import __version__

    described = Counter(info.plugin.key for info in registry.find())
    plugins = [
        {
            **{key: getattr(plugin, key) for key in ("slug", "module", "title", "paper", "code", "family")},
            "extras": list(plugin.extras),
            **{key: getattr(plugin, key) for key in ("distribution", "version", "source", "described")},
            "problem": problems.get(plugin.key, ""),
            "components": described[plugin.key],
        }
        for plugin in registry.plugins()
    ]
    components = [component_as_json(registry, info, problems) for info in found]
    return {"schema": SCHEMA, "maskwright": __version__, "components": components, "plugins": plugins}


def component_as_json(
    registry: Registry, info: ComponentInfo, problems: Mapping[tuple[str, str], str]
) -> dict[str, Any]:
    """One component for programs.

    `kind`; `name`; `address` (the name to ask for: `name`, or `qualified` where another has the same); `qualified`; `summary`;
    `modalities`, `needs`, `provides`, `budgets` (sorted lists); `counts` ("bounded" for a strategy whose rows may keep different
    numbers, "exact" for an objective that needs equal ones, else ""); `exact_with`; `backbone`; `domain`; `parameters` (a list of `name`, `type`,
    `default`, `range`, `help`, all texts); `disjoint_rows`; `exempt` (rule → reason); `plugin` (slug), `module`, `distribution`, `version`,
    `source`; `problem` ("" when none is known).
    """
    plugin = info.plugin
    return {
        "kind": info.kind,
        "name": info.name,
        "address": registry.address(info),
        "qualified": info.qualified,
        "summary": info.summary,
        **{key: sorted(getattr(info, key)) for key in ("modalities", "needs", "provides", "budgets")},
        "counts": info.counts,
        "exact_with": dict(info.exact_with),
        "backbone": info.backbone,
        "domain": info.domain,
        "parameters": [
            {key: getattr(one, key) for key in ("name", "type", "default", "range", "help")}
            for one in info.parameters
        ],
        "disjoint_rows": info.disjoint_rows,
        "exempt": dict(info.exempt),
        "plugin": plugin.slug,
        **{key: getattr(plugin, key) for key in ("module", "distribution", "version", "source")},
        "problem": problems.get(plugin.key, ""),
    }
