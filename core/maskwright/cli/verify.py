"""`maskwright verify`: the claims of the papers, measured again, and a family's components under one budget."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from maskwright.cli.completion import plugin_names
from maskwright.cli.listing import SCHEMA
from maskwright.cli.session import Session, pass_session
from maskwright.cli.tables import Table, shown
from maskwright.errors import UnknownComponent, UsageError

if TYPE_CHECKING:
    from maskwright.jobs.claims import ClaimResult
    from maskwright.jobs.comparison import Line, Terms
    from maskwright.registry import PluginInfo, Registry


@click.command(
    epilog="\b\nExamples:\n  maskwright verify hpm\n  maskwright verify hpm --record\n  maskwright verify --family images --record\n"
    "  maskwright verify --family images --only comparison --data digits --steps 200\n"
    "  maskwright verify --resume runs/verify-images-1"
)
@click.argument("plugins", nargs=-1, metavar="[PLUGIN]…", shell_complete=plugin_names())
@click.option("--all", "everything", is_flag=True, help="Third-party plugins' claims as well.")
@click.option(
    "--family",
    metavar="NAME",
    help="Only plugins of this family (images, diffusion, sequences, pruning), and its comparison.",
)
@click.option(
    "--only",
    type=click.Choice(("claims", "comparison")),
    help="One of the two parts of a family's verification.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="NAME",
    help="What the comparison is trained on: any --data of pretrain. May be repeated.",
)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Steps of each run of the comparison.")
@click.option(
    "--seeds", type=click.IntRange(min=1), metavar="N", help="Seeds of each row of the comparison [3]."
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Runs of the comparison at a time, with one thread each [one a core].",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where a family's results go [runs/verify-<family>-<n>].",
)
@click.option(
    "--resume",
    is_flag=False,
    flag_value="",
    metavar="[DIR]",
    help="Go on with what was begun in DIR, or latest.",
)
@click.option(
    "--record",
    is_flag=True,
    help="Write the results into the plugins' folders and the README's tables.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@pass_session
def verify(
    session: Session,
    plugins: tuple[str, ...],
    everything: bool,
    family: str | None,
    only: str | None,
    data: tuple[str, ...],
    steps: int | None,
    seeds: int | None,
    workers: int | None,
    out: Path | None,
    resume: str | None,
    record: bool,
    as_json: bool,
) -> None:
    """Measure the claims of plugins again: each paper's headline effect, at the scale of a CPU, with its verdict.

    Without a name: of every built-in plugin, one after the other (up to some two minutes each). "not reproduced at this scale"
    is a result, not a failure; the exit code is 1 only when something could not be measured.

    With --family images: a line for each claim, and a fair comparison under one budget: every objective of the family with its
    own masks, and every mask strategy with the same objective, beside a baseline. What fails is shown as failed. Everything is
    kept in a folder, so that a verification that was stopped goes on with --resume.
    """
    if plugins and everything:
        raise UsageError("Name plugins or give --all, not both.")
    from maskwright.jobs import claims, comparison

    registry = session.registry
    root, terms = None, comparison.Terms()
    if resume is not None:
        if plugins or everything or family or out or data or steps or seeds:
            raise UsageError("--resume goes on as it was begun: leave what decides about the runs out.")
        root = Path(resume) if resume else _latest()
        family, terms = comparison.recall(root)
    wanted: dict[str, Any] = {
        "data": data,
        "steps": steps,
        "seeds": seeds and tuple(range(seeds)),
        "everything": everything,
    }
    terms = attrs.evolve(terms, **{name: value for name, value in wanted.items() if value})
    family = None if family is None else claims.family_of(registry, family)
    compares = family in comparison.FAMILIES and not plugins and only != "claims"
    if not compares and (only == "comparison" or data or steps or seeds or workers):
        raise UsageError(
            f"There is a comparison of the family {' and '.join(comparison.FAMILIES)} only: give --family, and no plugin."
        )
    chosen = claims.with_claims(registry, plugins, third_party=terms.everything, family=family)
    if not chosen and not compares:
        raise UnknownComponent("No plugin that is asked for has a claim.")
    if root is None and family is not None and not plugins:
        root = out or _numbered(family)
        if out is not None and out.is_dir() and any(out.iterdir()):
            raise UsageError(
                f"The folder {out} is not empty: go on with --resume {out}, or choose another one with --out."
            )
        comparison.remember(root, family, terms)
    results, failures = _claims(session, [] if only == "comparison" else chosen, root, record, as_json)
    if record and (readme := claims.record_papers(registry)) is not None:
        click.echo(f"wrote {shown(str(readme))}", err=True)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "results": [one.as_json() for one in results],
        "failures": failures,
    }
    if compares and root is not None and family is not None:
        measured = _compare(registry, family, terms, root, workers or os.cpu_count() or 1, record, as_json)
        document["comparison"] = comparison.as_json(measured, terms)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    elif len(chosen) > 1 and only != "comparison":
        reproduced = sum(one.verdict == claims.REPRODUCED for one in results)
        failed = f", {len(failures)} could not be measured" if failures else ""
        click.echo(f"{reproduced} of {len(chosen)} claims reproduced{failed}.")
    sys.exit(1 if failures else 0)


def _claims(
    session: Session, chosen: list[PluginInfo], root: Path | None, record: bool, as_json: bool
) -> tuple[list[ClaimResult], dict[str, str]]:
    """Measure, print and record claims: blocks of text, or a line each for a family, whose results are kept in `root`."""
    from maskwright.jobs import claims
    from maskwright.registry import plugin_folder

    results: list[ClaimResult] = []
    failures: dict[str, str] = {}
    width = max((len(plugin.slug) for plugin in chosen), default=0)
    for plugin in chosen:

        def progress(done: int, total: int, slug: str = plugin.slug) -> None:
            if sys.stderr.isatty():
                click.echo(f"{slug}: seed {done} of {total}", err=True)

        kept = root / "claims" / f"{plugin.slug}.json" if root is not None else None
        try:
            result = claims.kept_result(plugin, kept) if kept is not None else None
            if result is None:
                result = claims.verify(plugin, progress)
                if kept is not None:
                    claims.keep_result(result, kept)
        except Exception as error:
            if len(chosen) == 1 or session.debug:
                raise
            failures[plugin.slug] = f"{type(error).__name__}: {error}"
            if root is not None and not as_json:
                click.echo(f"{plugin.slug:<{width}}  could not be measured: {failures[plugin.slug]}")
            else:
                click.echo(f"{plugin.slug}: could not be measured: {failures[plugin.slug]}\n", err=True)
            continue
        results.append(result)
        if not as_json:
            click.echo(
                f"{plugin.slug:<{width}}  {result.verdict}" if root is not None else result.text() + "\n"
            )
        folder = plugin_folder(plugin)
        if record and folder is not None:
            claims.record(result, folder)
    return results, failures


def _compare(
    registry: Registry, family: str, terms: Terms, root: Path, workers: int, record: bool, as_json: bool
) -> dict[str, list[Line]]:
    """Run a family's comparison, print it, and write it where it belongs."""
    from maskwright.jobs import claims, compare, comparison
    from maskwright.jobs.settings import resolve

    chosen = comparison.rows(registry, family, terms.everything)
    planned = comparison.tasks(chosen, terms)
    if not as_json:
        runs = len({task.folder for group in planned.values() for task in group})
        click.echo(
            f"\nComparing {len(chosen)} rows in {runs} runs of {terms.steps} steps, in {shown(str(root))}",
            err=True,
        )

    def progress(done: int, total: int, folder: str, seconds: float) -> None:
        if not as_json and seconds > 0.5:
            click.echo(f"{done} of {total}  {folder}  {seconds:.0f} s", err=True)

    failures = comparison.run_all(planned, root, registry, family, terms, workers=workers, progress=progress)
    measured = comparison.lines(chosen, planned, terms, root, failures)
    settings = resolve("pretrain", None, terms.overrides(terms.data[0], 0), registry=registry)
    text = comparison.markdown(measured, terms, settings)
    (root / "comparison.md").write_text(text + "\n", "utf-8")
    for data in terms.data:
        folders = [root / group[-1].folder for (_, of, _), group in planned.items() if of == data]
        done = [folder for folder in dict.fromkeys(folders) if (folder / "summary.json").is_file()]
        if done:
            page = compare.write_comparison(compare.compare(done), root / f"{Path(data).name}.html")
            if not as_json:
                click.echo(f"page  {shown(str(page))}", err=True)
    if not as_json:
        _print(measured)
    if record and (readme := claims.record_block(f"comparison-{family}", text)) is not None:
        click.echo(f"wrote {shown(str(readme))}", err=True)
    return measured


def _print(measured: dict[str, list[Line]]) -> None:
    from maskwright.jobs import comparison

    for data, lines in measured.items():
        table = Table()
        table.add(data, "linear probe", "kNN probe", "hidden", "a step", "GFLOPs a step")
        for line in lines:
            cells = comparison.cells(line)
            if line.numbers:
                table.add(line.row.name, *cells[:5])
        for name, values in comparison.levels(lines):
            table.add(name, *values, "", "", "")
        click.echo()
        for text in table.lines(stretch=0):
            click.echo(text)
        for line in lines:
            if not line.numbers:
                click.echo(f"{line.row.name}  {comparison.cells(line)[0]}")
    click.echo()


def _numbered(family: str) -> Path:
    numbers = [
        int(n)
        for path in Path("runs").glob(f"verify-{family}-*")
        if (n := path.name.rpartition("-")[2]).isdigit()
    ]
    return Path("runs") / f"verify-{family}-{max(numbers, default=0) + 1}"


def _latest() -> Path:
    found = sorted(Path("runs").glob("verify-*-*/verify.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UsageError("There is no verification to resume below ./runs: name its folder, --resume DIR.")
    return found[-1].parent
