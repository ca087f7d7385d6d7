"""`maskwright compare-pruners`: tonight's candidates on one model, on one page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from maskwright.cli.completion import component_names
from maskwright.cli.session import Session, pass_session
from maskwright.cli.tables import Table, shown
from maskwright.cli.values import set_option, settings_of
from maskwright.errors import UsageError


@click.command(
    epilog="\b\nExamples:\n  maskwright compare-pruners ./llama --pruners magnitude,wanda,sparsegpt --pattern 2:4 --seeds 0,1,2\n"
    "  maskwright compare-pruners --pruners magnitude,maskllm --set maskllm.steps=200\n"
    "  maskwright compare-pruners --resume runs/compare-pruners-1"
)
@click.argument("model", required=False, metavar="[MODEL]", type=click.Path())
@click.option(
    "--pruners",
    metavar="A,B,…",
    shell_complete=component_names("pruner"),
    help="Names of pruners, with commas between them.",
)
@click.option("--sparsity", type=float, metavar="X", help="Share removed, in [0, 1).")
@click.option("--pattern", metavar="N:M", help="N of every M consecutive weights are kept.")
@click.option("--params", type=float, metavar="X", help="Share of the parameters kept.")
@click.option("--flops", type=float, metavar="X", help="Share of the FLOPs kept.")
@click.option("--seeds", default=None, metavar="N,…", help="One run of each pruner with each of these [0].")
@click.option("--data", metavar="FOLDER", type=click.Path(), help="What to calibrate and measure on.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Its folder [runs/compare-pruners-<n>]."
)
@click.option(
    "--resume", type=click.Path(path_type=Path), metavar="DIR", help="Go on with the comparison in DIR."
)
@click.option("--json", "as_json", is_flag=True, help="Print the table for a program.")
@click.option("--quiet", is_flag=True, help="No progress.")
@set_option("A setting of every run (run.calibration=64), or a pruner's parameter (maskllm.steps=200).")
@pass_session
def compare_pruners(
    session: Session,
    model: str | None,
    pruners: str | None,
    sparsity: float | None,
    pattern: str | None,
    params: float | None,
    flops: float | None,
    seeds: str | None,
    data: str | None,
    out: Path | None,
    resume: Path | None,
    as_json: bool,
    quiet: bool,
    pairs: tuple[str, ...],
) -> None:
    """Prune MODEL with several pruners under one budget, calibration set and list of seeds, and compare them on one page.

    MODEL is a folder of transformers; without one a small language model is trained first. Each run is a process of its own: one that
    fails is shown as failed and stops no other. The folder gets comparison.json, report.html and each run's own folder.
    """
    from maskwright.jobs import candidates
    from maskwright.jobs.run import numbered

    given = (model, pruners, sparsity, pattern, params, flops, seeds, data, out)
    if resume is not None:
        if any(one is not None for one in given) or pairs:
            raise UsageError("--resume goes on with its own settings: leave everything else out.")
        plan, folder = candidates.Plan.read(resume), resume
    else:
        if not pruners:
            raise UsageError("Name the pruners to compare, such as --pruners magnitude,wanda,sparsegpt.")
        names = tuple(name.strip() for name in pruners.split(",") if name.strip())
        short = {
            "model.source": model,
            "data.source": data,
            "budget.sparsity": sparsity,
            "budget.pattern": pattern,
            "budget.params": params,
            "budget.flops": flops,
        }
        shared, parameters = _sorted_out({**_given(short), **settings_of(pairs)}, names)
        plan = candidates.Plan(names, _seeds(seeds or "0"), shared, parameters)
        folder = out if out is not None else numbered("compare-pruners")

    arguments = [part for file in session.files for part in ("--registry", file)]
    arguments += [] if session.third_party else ["--no-third-party"]
    comparison = candidates.compare(
        plan,
        folder,
        resume=resume is not None,
        registry=session.registry,
        arguments=arguments,
        say=(lambda text: None) if quiet or as_json else (lambda text: click.echo(text, err=True)),
    )
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **comparison.as_json()}, indent=2))
    else:
        _print(comparison)
    if not any(one.summaries for one in comparison.outcomes):
        raise click.exceptions.Exit(1)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _sorted_out(
    settings: Mapping[str, Any], pruners: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings of every run, and parameters by pruner."""
    shared: dict[str, Any] = {}
    parameters: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        first, _, rest = key.partition(".")
        if first in pruners and rest:
            parameters.setdefault(first, {})[rest] = value
        elif first in ("pruner",) or key == "run.seed":
            raise UsageError(
                f"--set {key}: pruners are named with --pruners, seeds with --seeds, and a parameter with its pruner's name, "
                f"such as --set {pruners[0]}.…"
            )
        else:
            shared[key] = value
    return shared, parameters


def _seeds(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--seeds {text!r} must be whole numbers with commas between them, such as 0,1,2.")
    return tuple(map(int, parts))


def _print(comparison: Any) -> None:
    from maskwright.jobs.candidates import say_quality

    table = Table()
    told = comparison.as_json()
    measure = told["measure"]
    if told["dense"] is not None:
        table.add("dense", f"{measure} {say_quality(told['dense'], measure)}", "")
    for row in told["pruners"]:
        if row["quality"] is None:
            said = next(iter(row["failures"].values()), "not done")
            table.add(row["pruner"], "failed", said)
            continue
        spread = f" ± {say_quality(row['spread'], measure)}" if row["spread"] is not None else ""
        table.add(
            row["pruner"],
            f"{measure} {say_quality(row['quality'], measure)}{spread}",
            f"{row['sparsity']:.2%} removed, {row['seconds']:.1f} s",
        )
    for line in table.lines(stretch=2):
        click.echo(line)
    click.echo(f"folder  {shown(str(comparison.folder))}")
    click.echo(f"report  {shown(str(comparison.page))}")
