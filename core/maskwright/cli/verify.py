"""`maskwright verify`: the claims of the papers, measured again."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from maskwright.cli.completion import plugin_names
from maskwright.cli.listing import SCHEMA
from maskwright.cli.session import Session, pass_session
from maskwright.cli.tables import shown
from maskwright.errors import UnknownComponent, UsageError

if TYPE_CHECKING:
    from maskwright.jobs.claims import ClaimResult


@click.command(
    epilog="\b\nExamples:\n  maskwright verify hpm\n  maskwright verify --family pruning\n  maskwright verify hpm --record"
)
@click.argument("plugins", nargs=-1, metavar="[PLUGIN]…", shell_complete=plugin_names())
@click.option("--all", "everything", is_flag=True, help="Third-party plugins' claims as well.")
@click.option(
    "--family", metavar="NAME", help="Only plugins of this family (images, diffusion, sequences, pruning)."
)
@click.option(
    "--record",
    is_flag=True,
    help="Write the results into the plugins' folders and the README's table of papers.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@pass_session
def verify(
    session: Session,
    plugins: tuple[str, ...],
    everything: bool,
    family: str | None,
    record: bool,
    as_json: bool,
) -> None:
    """Measure the claims of plugins again: each paper's headline effect, at the scale of a CPU, with its verdict.

    Without a name: of every built-in plugin, one after the other (up to some two minutes each). "not reproduced at this scale"
    is a result, not a failure; the exit code is 1 only when something could not be measured.
    """
    if plugins and everything:
        raise UsageError("Name plugins or give --all, not both.")
    from maskwright.jobs import claims
    from maskwright.registry import plugin_folder

    registry = session.registry
    chosen = claims.with_claims(registry, plugins, third_party=everything, family=family)
    if not chosen:
        raise UnknownComponent("No plugin that is asked for has a claim.")
    results: list[ClaimResult] = []
    failures: dict[str, str] = {}
    for plugin in chosen:

        def progress(done: int, total: int, slug: str = plugin.slug) -> None:
            if sys.stderr.isatty():
                click.echo(f"{slug}: seed {done} of {total}", err=True)

        try:
            result = claims.verify(plugin, progress)
        except Exception as error:
            if len(chosen) == 1 or session.debug:
                raise
            failures[plugin.slug] = f"{type(error).__name__}: {error}"
            click.echo(f"{plugin.slug}: could not be measured: {failures[plugin.slug]}\n", err=True)
            continue
        results.append(result)
        if not as_json:
            click.echo(result.text() + "\n")
        folder = plugin_folder(plugin)
        if record and folder is not None:
            claims.record(result, folder)
    if record and (readme := claims.record_papers(registry)) is not None:
        click.echo(f"wrote {shown(str(readme))}", err=True)
    if as_json:
        document = {"schema": SCHEMA, "results": [one.as_json() for one in results], "failures": failures}
        click.echo(json.dumps(document, indent=2))
    elif len(chosen) > 1:
        reproduced = sum(one.verdict == claims.REPRODUCED for one in results)
        failed = f", {len(failures)} could not be measured" if failures else ""
        click.echo(f"{reproduced} of {len(chosen)} claims reproduced{failed}.")
    sys.exit(1 if failures else 0)
