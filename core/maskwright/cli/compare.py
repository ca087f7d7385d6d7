"""`maskwright compare`: runs side by side on one page."""

from __future__ import annotations

import json
from pathlib import Path

import click

from maskwright.cli.listing import SCHEMA
from maskwright.cli.tables import Table, shown


@click.command(
    epilog="\b\nExamples:\n  maskwright compare runs/pretrain-1 runs/pretrain-2\n"
    "  maskwright compare runs/mae-* runs/hpm-* --out mae-hpm.html\n  maskwright compare runs/* --json"
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN…", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="Where the page goes [compare.html]."
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the table's data for a program; no page is written unless --out names one.",
)
def compare(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Put runs side by side on one page: results, curves over steps and seconds, costs, masks, pictures, settings that differ.

    RUN is a folder that pretrain, prune or sample left. Runs with the same settings but for the seed are one row: mean and
    spread. What cannot be compared (other data, another budget, an unfinished run) is said on the page.
    """
    from maskwright.jobs import compare as job

    comparison = job.compare(runs)
    target = out if out is not None or as_json else Path("compare.html")
    if target is not None:
        job.write_comparison(comparison, target)
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, **comparison.as_json()}, indent=2))
        return
    for notice in comparison.notices:
        click.echo(notice)
    for section in comparison.jobs:
        columns, rows = job.table(comparison.of(section))
        table = Table()
        table.add("", *columns)
        for label, cells in rows:
            table.add(label, *cells)
        for line in table.lines(stretch=0, least=30):
            click.echo(line)
    click.echo(f"page  {shown(str(target))}")
