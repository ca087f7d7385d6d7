"""`maskwright install` and `maskwright uninstall`."""

from __future__ import annotations

import json
import sys

import click

from maskwright import packages as distributions
from maskwright.errors import UsageError
from maskwright.packages import Outcome


def _say(line: str) -> None:
    click.echo(line, err=True)


@click.command(
    epilog="\b\nExamples:\n  maskwright install my-plugin\n  maskwright install -e ./my-plugin --dry-run"
)
@click.argument("packages", nargs=-1, metavar="PKG…")
@click.option(
    "-e", "--editable", multiple=True, metavar="PATH", help="A project folder, installed so that edits count."
)
@click.option("-U", "--upgrade", is_flag=True, help="Take newer versions of what is installed.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would change; change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome for a program.")
def install(
    packages: tuple[str, ...], editable: tuple[str, ...], upgrade: bool, dry_run: bool, as_json: bool
) -> None:
    """Install plugins into this interpreter's environment, and say which components that brings.

    PKG is a package's name with or without a version ("my-plugin>=1.2"), a URL ("my-plugin @ https://…"), or the path of a
    wheel or project. pip does the work (uv, where there is no pip) and heeds its own configuration.

    A plugin is a program: it is not run now, but it will be when one of its components is used. Install what you trust.
    """
    if not packages and not editable:
        raise UsageError("Name at least one package, or a project folder with -e.")
    wanted = [distributions.requirement(text) for text in packages]
    folders = [distributions.project(path) for path in editable]
    outcome = distributions.install(wanted, folders, upgrade=upgrade, dry_run=dry_run, say=_say)
    _show(outcome, dry_run, as_json)


@click.command(epilog="\b\nExample:\n  maskwright uninstall my-plugin")
@click.argument("packages", nargs=-1, required=True, metavar="PKG…")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would change; change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome for a program.")
def uninstall(packages: tuple[str, ...], yes: bool, dry_run: bool, as_json: bool) -> None:
    """Remove plugins from this interpreter's environment, and say which components go.

    Only distributions that bring a maskwright plugin are removed.
    """
    names = [distributions.installed_plugin(text) for text in packages]
    if not yes and not dry_run:
        if not sys.stdin.isatty():
            raise UsageError(f"Nobody can be asked here; say --yes to remove {', '.join(names)}.")
        click.confirm(f"Remove {', '.join(names)}?", abort=True, err=True)
    outcome = distributions.uninstall(names, dry_run=dry_run, say=_say)
    _show(outcome, dry_run, as_json)


def _show(outcome: Outcome, dry_run: bool, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"dry_run": dry_run, **outcome.as_json()}, indent=2))
        return
    if not any((outcome.changes, outcome.gained, outcome.lost)):
        click.echo("Nothing would change." if dry_run else "Nothing changed.")
    elif dry_run:
        click.echo("Would change:")
    for change in outcome.changes:
        click.echo(f"  {change}")
    for title, offers in (("Gained", outcome.gained), ("Lost", outcome.lost)):
        if offers:
            click.echo(f"{title}:")
            width = max(len(offer.kind) for offer in offers)
            for offer in offers:
                click.echo(f"  {offer.kind:<{width}}  {offer.name}  ({offer.distribution} {offer.version})")
    for note in outcome.notes:
        click.echo(f"Note: {note}", err=True)
