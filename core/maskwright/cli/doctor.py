"""`maskwright doctor`: every plugin imported on its own, and what is wrong."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from maskwright.cli import health
from maskwright.cli.completion import plugin_names
from maskwright.cli.listing import SCHEMA
from maskwright.cli.session import Session, pass_session
from maskwright.cli.tables import counted, shown

if TYPE_CHECKING:
    from maskwright.diagnosis import Diagnosis, Unmet
    from maskwright.registry import ComponentInfo, Registry


@click.command(
    epilog="\b\nExamples:\n  maskwright doctor\n  maskwright doctor my-plugin --timeout 5\n  maskwright --no-third-party doctor --json"
)
@click.argument("plugins", nargs=-1, metavar="[PLUGIN]…", shell_complete=plugin_names())
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long an import may take.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@pass_session
def doctor(session: Session, plugins: tuple[str, ...], timeout: float, as_json: bool) -> None:
    """Import every plugin (or those named) in a process of its own, and say what is wrong.

    Looks for plugins that fail, crash or hang on import, catalogues that differ from what the plugin registers, requirements
    that the environment does not meet, and names that two distributions claim. Exits with 1 when anything is broken.

    This runs the code of the plugins. `maskwright list` marks afterwards what was found broken.
    """
    from maskwright import diagnosis

    registry = session.registry
    chosen = [registry.plugin(name) for name in plugins] or registry.plugins()
    found = []
    for one in diagnosis.diagnose(registry, chosen, timeout=timeout):
        found.append(one)
        if not as_json:
            click.echo(_line(one))
    health.remember({one.plugin: _unusable(one) for one in found if not one.plugin.error})
    conflicts = [] if plugins else registry.conflicts()
    unmet = diagnosis.unmet_requirements(
        one.distribution for one in chosen if one.source in ("built-in", "third-party")
    )
    broken = [one for one in found if not one.ok]
    ok = not (broken or conflicts or unmet)
    if as_json:
        click.echo(json.dumps(_document(registry, found, conflicts, unmet, ok), indent=2))
    else:
        for line in [*map(_conflict, [registry] * len(conflicts), conflicts), *map(str, unmet)]:
            click.echo(f"{click.style('BROKEN ', fg='red')}  {line}")
        click.echo(
            f"{len(found) - len(broken)} of {counted(len(found), 'plugin')} work"
            + (f"; {counted(len(conflicts), 'name')} in conflict" if conflicts else "")
            + (f"; {counted(len(unmet), 'requirement')} not met" if unmet else "")
            + "."
        )
    sys.exit(0 if ok else 1)


def _unusable(one: Diagnosis) -> str:
    """What `list` should say of it later: only what keeps it from being imported."""
    return one.problems[0] if one.result in ("failed", "crashed", "timeout") else ""


_WORDS = {"timeout": "HANGS", "unreadable": "BROKEN", "needs-extra": "extra", "ok": "ok"}


def _line(one: Diagnosis) -> str:
    plugin = one.plugin
    word = _WORDS.get(one.result, "FAILED") if one.ok or one.result != "ok" else "DRIFT"
    where = (
        ""
        if plugin.source == "built-in"
        else shown(plugin.distribution)
        if plugin.source == "file"
        else plugin.origin
    )
    spent = f"{one.seconds:.2f} s" if one.seconds is not None else ""
    head = "  ".join(
        filter(None, (click.style(f"{word:<7}", fg="green" if one.ok else "red"), plugin.slug, where, spent))
    )
    return "\n".join([head, *(f"         {said}" for said in (*one.problems, *one.notes))])


def _conflict(registry: Registry, claims: list[ComponentInfo]) -> str:
    info = claims[0]
    owners = " and ".join(one.plugin.origin for one in claims)
    asks = ", ".join(registry.address(one) for one in claims)
    return f"the {info.kind} {info.name!r} is claimed by {owners}; they are reached as {asks}"


def _document(
    registry: Registry,
    found: list[Diagnosis],
    conflicts: list[list[ComponentInfo]],
    unmet: list[Unmet],
    ok: bool,
) -> dict[str, Any]:
    """The schema of `doctor --json`.

    `schema`; `ok`; `plugins`: `slug`, `module`, `distribution`, `version`, `source`, `result` (see `maskwright.diagnosis`),
    `seconds` (or null), `problems`, `notes`; `conflicts`: `kind`, `name`, `claims` (names by which each is reached);
    `requirements`: `distribution`, `requirement`, `installed` ("" when it is not).
    """
    return {
        "schema": SCHEMA,
        "ok": ok,
        "plugins": [
            {
                **{
                    key: getattr(one.plugin, key)
                    for key in ("slug", "module", "distribution", "version", "source")
                },
                "result": one.result,
                "seconds": one.seconds,
                "problems": list(one.problems),
                "notes": list(one.notes),
            }
            for one in found
        ],
        "conflicts": [
            {
                "kind": claims[0].kind,
                "name": claims[0].name,
                "claims": [registry.address(one) for one in claims],
            }
            for claims in conflicts
        ],
        "requirements": [
            {"distribution": one.distribution, "requirement": one.requirement, "installed": one.installed}
            for one in unmet
        ],
    }
