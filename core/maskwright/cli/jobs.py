"""`maskwright pretrain`, `prune` and `sample`: settings from a run file and options, then the job."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from maskwright.cli.completion import component_names, plugin_names
from maskwright.cli.session import Session, process_rank
from maskwright.cli.tables import Table, shown
from maskwright.cli.values import set_option, settings_of
from maskwright.errors import UsageError

if TYPE_CHECKING:
    from maskwright.jobs.run import Result

_PATH_OR_NAME = "FOLDER"


def _option(setting: str, *names: str, **kwargs: Any) -> tuple[str, click.Option]:
    """An option that is short for `--set SETTING=…`."""
    return setting, click.Option(list(names), **kwargs)


def _component(section: str, kind: str, help: str) -> tuple[str, click.Option]:
    return _option(
        f"{section}.name", f"--{section}", metavar="NAME", help=help, shell_complete=component_names(kind)
    )


_SEED = _option("run.seed", "--seed", type=int, metavar="N", help="Everything random follows from it.")
_BATCH = _option(
    "run.batch_size", "--batch-size", type=int, metavar="N", help="Samples a step, over all processes."
)
_MODEL = _option(
    "model.source",
    "--model",
    metavar=_PATH_OR_NAME,
    type=click.Path(),
    help='A model folder of transformers; without one, or "default", a small model is made.',
)


def _data(help: str) -> tuple[str, click.Option]:
    return _option("data.source", "--data", metavar=_PATH_OR_NAME, type=click.Path(), help=help)


SHORTCUTS: dict[str, list[tuple[str, click.Option]]] = {
    "pretrain": [
        _component("strategy", "mask-strategy", "Decides what is hidden."),
        _component("objective", "objective", "Decides what is learned from the rest."),
        _MODEL,
        _data(
            "photographs, rotated-photographs, digits, standard-library, or yours: a folder of images, tar shards, a saved Hugging "
            "Face dataset, a text file."
        ),
        _option("run.steps", "--steps", type=int, metavar="N", help="Optimiser steps."),
        _BATCH,
        _SEED,
        _option("run.lr", "--lr", type=float, metavar="X", help="Peak learning rate."),
    ],
    "prune": [
        _component("pruner", "pruner", "Decides which weights stay."),
        _MODEL,
        _data("What to calibrate on: standard-library, or your text file."),
        _option("budget.sparsity", "--sparsity", type=float, metavar="X", help="Share removed, in [0, 1)."),
        _option(
            "budget.pattern", "--pattern", metavar="N:M", help="N of every M consecutive weights are kept."
        ),
        _option("budget.params", "--params", type=float, metavar="X", help="Share of the parameters kept."),
        _option("budget.flops", "--flops", type=float, metavar="X", help="Share of the FLOPs kept."),
        _option("budget.bits", "--bits", type=float, metavar="X", help="Mean bits a weight."),
        _option("budget.layers", "--layers", type=int, metavar="N", help="Layers kept."),
        _option(
            "model.stream",
            "--stream",
            is_flag=True,
            default=None,
            help="Read and prune the model block by block: for models larger than memory.",
        ),
        _option(
            "output.export",
            "--export",
            metavar="FORMAT",
            help="Also write compressed-tensors, or compressed-tensors-bitmask (smaller; for its versions up to 0.14).",
        ),
        _BATCH,
        _SEED,
    ],
    "sample": [
        _component("sampler", "sampler", "Decides in which order tokens are filled in."),
        _option("request.count", "--count", type=int, metavar="N", help="Texts."),
        _option("request.length", "--length", type=int, metavar="N", help="Tokens of each."),
        _option(
            "request.steps",
            "--steps",
            type=int,
            metavar="N",
            help="Network calls, where the sampler has a choice.",
        ),
        _option("request.prompt", "--prompt", metavar="TEXT", help="What each text begins with."),
        _MODEL,
        _data("What the default denoiser is trained on: standard-library, or your text file."),
        _SEED,
    ],
}
"""Options of each job that are short for one setting, with that setting's dotted name."""


def _job(name: str, help: str, examples: str) -> click.Command:
    """The command of one job."""
    shortcuts = {option.name: setting for setting, option in SHORTCUTS[name]}

    def call(
        run_file: Path | None,
        pairs: tuple[str, ...],
        out: Path | None,
        resume: str | None,
        observers: tuple[str, ...],
        quiet: bool,
        as_json: bool,
        **given: Any,
    ) -> None:
        session = click.get_current_context().ensure_object(Session)
        short = {shortcuts[option]: value for option, value in given.items() if value is not None}
        folder = out if resume is None else _to_resume(name, resume, out, run_file)
        if resume is not None:
            run_file = folder / "run.toml" if folder is not None else None

        from maskwright.jobs import execute
        from maskwright.jobs.settings import check, resolve

        settings = resolve(name, run_file, {**short, **settings_of(pairs)}, registry=session.registry)
        check(settings, session.registry)
        result = execute(
            settings,
            folder=folder,
            resume=resume is not None,
            observers=observers,
            registry=session.registry,
            quiet=quiet or as_json,
        )
        if process_rank() == 0:
            _print(result, as_json)

    options = [
        click.Argument(["run_file"], required=False, metavar="[RUN.toml]", type=click.Path(path_type=Path)),
        *(option for _, option in SHORTCUTS[name]),
        click.Option(
            ["--out"],
            type=click.Path(path_type=Path),
            metavar="DIR",
            help=f"The run's folder [runs/{name}-<n>].",
        ),
        click.Option(
            ["--resume"],
            is_flag=False,
            flag_value="",
            metavar="[DIR]",
            help="Go on with the run in DIR, or with the latest one.",
        ),
        click.Option(
            ["-p", "--observer", "observers"],
            multiple=True,
            metavar="NAME",
            shell_complete=plugin_names(),
            help='Tell a plugin what happens ("tensorboard", or one of yours). May be repeated.',
        ),
        click.Option(["--quiet"], is_flag=True, help="No progress."),
        click.Option(
            ["--json", "as_json"], is_flag=True, help="Print the summary for a program, and no progress."
        ),
    ]
    command = click.Command(
        name, params=options, callback=call, help=help, epilog=f"\b\nExamples:\n{examples}"
    )
    made: click.Command = set_option("Any setting, such as strategy.ratio=0.5. May be repeated.")(command)
    return made


def _to_resume(job: str, named: str, out: Path | None, run_file: Path | None) -> Path:
    """The folder of the run that is to go on: the one named, or the latest of this job below runs/."""
    if run_file is not None:
        raise UsageError(
            f"--resume goes on with a run's own run.toml: leave {run_file} out, and name the run's folder after --resume."
        )
    if named and out is not None:
        raise UsageError("Name the run's folder once: after --resume or after --out.")
    folder = Path(named) if named else out
    if folder is None:
        numbered = [
            (int(path.name.rpartition("-")[2]), path)
            for path in Path("runs").glob(f"{job}-*")
            if path.name.rpartition("-")[2].isdigit() and (path / "run.toml").is_file()
        ]
        if not numbered:
            raise UsageError("There is no run to resume below ./runs: name its folder, --resume DIR.")
        folder = max(numbered)[1]
    if not (folder / "run.toml").is_file():
        raise UsageError(f"There is no run to resume in {folder}: it has no run.toml.")
    return folder


def _print(result: Result, as_json: bool) -> None:
    """Where everything is, the headline numbers, and for a sample job the texts."""
    if as_json:
        report = str(result.report) if result.report is not None else None
        click.echo(
            json.dumps(
                {"folder": str(result.folder), "report": report, "summary": dict(result.summary)}, indent=2
            )
        )
        return
    for text in _texts(result.folder / "samples.jsonl"):
        click.echo(f"{text}\n")
    table = Table()
    for name, value in _numbers(result.summary):
        table.add(name.replace("_", " "), value)
    for line in table.lines(stretch=1) if table.rows else ():
        click.echo(line)
    for line in _skipped(result.summary.get("skipped_files") or []):
        click.echo(line)
    click.echo(f"folder  {shown(str(result.folder))}")
    if result.report is not None:
        click.echo(f"report  {shown(str(result.report))}")


def _numbers(summary: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in summary.items():
        if name in ("job", "finished"):
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name} ")
        elif isinstance(value, float):
            yield f"{prefix}{name}", f"{value:.4g}"
        elif isinstance(value, str | int) and not isinstance(value, bool):
            yield f"{prefix}{name}", str(value)


def _skipped(files: Sequence[Mapping[str, str]], most: int = 20) -> Iterator[str]:
    """What could not be read, by name."""
    if files:
        yield "unreadable, and skipped:"
    for one in files[:most]:
        yield f"  {shown(one['file'])}: {one['reason']}"
    if len(files) > most:
        yield f"  and {len(files) - most} more, all of them in summary.json"


def _texts(file: Path) -> Iterator[str]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        text = json.loads(line).get("text")
        if text:
            yield str(text)


pretrain = _job(
    "pretrain",
    "Train a model with a mask strategy and an objective; without arguments a small ViT on photographs, in two minutes.\n\n"
    "RUN.toml holds settings; options are stronger. The run's folder gets run.toml, metrics.jsonl, checkpoint/, model/ and "
    "report.html. Several processes: torchrun --nproc-per-node N -m maskwright pretrain …",
    "  maskwright pretrain --strategy random --objective mae --data ./photos --model ./vit\n"
    "  maskwright pretrain run.toml --set strategy.ratio=0.6 --out runs/mine\n"
    "  maskwright pretrain --resume runs/mine",
)

prune = _job(
    "prune",
    "Prune a model of transformers (language model, image classifier, encoder) to a budget; without arguments a small one that is trained first.\n\n"
    "Perplexity is measured before and after. The run's folder gets model/, masks.safetensors and report.html.",
    "  maskwright prune --model ./llama --pruner magnitude --pattern 2:4\n"
    "  maskwright prune run.toml --sparsity 0.5",
)

sample = _job(
    "sample",
    "Sample text from a masked denoiser; without arguments from a small one that is trained first.\n\n"
    "Prints the texts; report.html shows the order in which their tokens were revealed.",
    '  maskwright sample --count 2 --prompt "The "\n  maskwright sample run.toml --set sampler.name=greedy',
)
