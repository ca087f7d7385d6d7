"""`maskwright check`: the conformance kit on a component, a plugin, or all of them."""

from __future__ import annotations

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from maskwright.cli.completion import component_and_plugin_names
from maskwright.cli.listing import HEADINGS, SCHEMA
from maskwright.cli.modules import components_of_module
from maskwright.cli.session import Session, pass_session
from maskwright.errors import PluginLoadError, UnknownComponent, UsageError, did_you_mean

if TYPE_CHECKING:
    from maskwright.registry import PluginInfo, Registry
    from maskwright.testing import CheckResult

_COLOURS = {"passed": "green", "failed": "red", "exempt": "yellow", "skipped": None}


@click.command(
    epilog="\b\nExamples:\n  maskwright check random\n  maskwright check my-plugin --rule rows-are-independent --examples 500\n"
    "  maskwright check ./my_mask.py\n  maskwright check --all"
)
@click.argument("names", nargs=-1, metavar="[NAME|MODULE]…", shell_complete=component_and_plugin_names())
@click.option("--all", "everything", is_flag=True, help="Every component of every plugin.")
@click.option("--kind", type=click.Choice(list(HEADINGS)), help="Only components of this kind.")
@click.option("--rule", "rules", multiple=True, metavar="RULE", help="Only this rule. May be repeated.")
@click.option(
    "--examples", type=click.IntRange(min=1), metavar="N", help="Examples a rule tries; more look longer."
)
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of results.")
@pass_session
def check(
    session: Session,
    names: tuple[str, ...],
    everything: bool,
    kind: str | None,
    rules: tuple[str, ...],
    examples: int | None,
    as_json: bool,
) -> None:
    """Prove that components keep the rules of their kind: the conformance kit, one line a rule.

    NAME is a component, a plugin or a distribution; MODULE a module or a file (./my_mask.py). A rule that a component must
    break is exempt, with the reason that its class gives. Exits with 1 when a rule is broken.
    """
    if bool(names) == everything:
        raise UsageError("Name a component, a plugin or a module to check, or give --all.")
    registry = session.registry
    results: list[CheckResult] = []
    broken: list[str] = []

    def show(result: CheckResult) -> None:
        results.append(result)
        if not as_json:
            click.echo(_line(result))

    from maskwright.testing import rules_for, run_checks

    known = {rule.name for one in HEADINGS for rule in rules_for(one)}
    for rule in rules:
        if rule not in known:
            raise UsageError(
                f"There is no rule {rule!r}.{did_you_mean(rule, known)} Rules are {', '.join(sorted(known))}."
            )

    for title, find in _targets(registry, names, kind):
        if not as_json:
            click.echo(click.style(title, bold=True))
        try:
            component = find()
        except PluginLoadError as error:
            if not everything:
                raise
            broken.append(str(error))
            if not as_json:
                click.echo(f"  {click.style('failed ', fg='red')}  {error}")
            continue
        run_checks([component], show, only=rules or None, max_examples=examples)
    if as_json:
        click.echo(json.dumps(_document(results, broken), indent=2))
    else:
        click.echo(_summary(results, broken))
    sys.exit(1 if broken or not all(result.ok for result in results) else 0)


def _targets(
    registry: Registry, names: tuple[str, ...], kind: str | None
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(title, function that returns the component's class) of everything that is asked for, each once; no names: of all."""
    titles: set[str] = set()
    for name in names or (None,):
        for title, find in _named(registry, name):
            if title not in titles and (kind is None or title.startswith(f"{kind} ")):
                titles.add(title)
                yield title, find
    if not titles:
        raise UnknownComponent(f"There is no {kind or 'component'} in {', '.join(names) or 'any plugin'}.")


def _named(registry: Registry, name: str | None) -> list[tuple[str, Callable[[], Any]]]:
    """What one name means: the components of that name and those of a plugin of that name, else those of a module."""
    plugin = None if name is None else _plugin(registry, name)
    infos = [
        info
        for info in registry.find()
        if name in (None, registry.address(info), info.qualified)
        or (plugin is not None and info.plugin.key == plugin.key)
    ]
    if infos or name is None:
        addresses = [(info.kind, registry.address(info)) for info in infos]
        return [
            (f"{kind} {address}", partial(registry.component_class, kind, address))
            for kind, address in addresses
        ]
    classes: list[Any] | None = registry.load(plugin) if plugin is not None else components_of_module(name)
    if classes is None:
        known = [*registry.names(), *(one.slug for one in registry.plugins())]
        raise UnknownComponent(
            f"There is no component, plugin or module {name!r}.{did_you_mean(name, known)} `maskwright list` shows all; "
            "a file is named by its path, such as ./my_mask.py."
        )
    return [(f"{one.kind} {one.name}", partial(_same, one)) for one in classes]


def _same(component: Any) -> Any:
    return component


def _plugin(registry: Registry, name: str) -> PluginInfo | None:
    try:
        return registry.plugin(name)
    except UnknownComponent:
        return None


def _line(result: CheckResult) -> str:
    word = click.style(f"{result.status:<7}", fg=_COLOURS[result.status])
    if result.status == "failed":
        return f"  {word}  {result.name}\n{textwrap.indent(result.message, ' ' * 11)}"
    said = f": {result.message}" if result.message else ""
    return f"  {word}  {result.name}{said}"


def _summary(results: list[CheckResult], broken: list[str]) -> str:
    counts: Counter[str] = Counter(result.status for result in results)
    said = ", ".join(f"{counts[status]} {status}" for status in _COLOURS if counts[status])
    return (
        (said or "nothing was checked") + (f"; {len(broken)} could not be imported" if broken else "") + "."
    )


def _document(results: list[CheckResult], broken: list[str]) -> dict[str, Any]:
    """The schema of `check --json`: `schema`; `ok`; `results`: `component`, `rule`, `status`, `message`, `seconds`; `broken`:
    why components could not be imported."""
    return {
        "schema": SCHEMA,
        "ok": not broken and all(result.ok for result in results),
        "results": [
            {
                "component": result.component,
                "rule": result.name,
                "status": result.status,
                "message": result.message,
                "seconds": result.seconds,
            }
            for result in results
        ],
        "broken": broken,
    }
