"""`maskwright compare-pruners`: pruners on one model, under one budget, calibration set and list of seeds, on one page.

Each pruner and seed is a run of the prune job in a process of its own, so that its peak memory is its own and its failure stops no
other. What has finished is not done again: a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from maskwright.errors import BadRunFile, Interrupted, OutputError, UsageError
from maskwright.jobs import models, pictures, report
from maskwright.jobs.settings import Settings, check, nested, resolve
from maskwright.mask import write_whole
from maskwright.registry import Registry, default

PLAN = "comparison.toml"
PAGE = "report.html"
TABLE = "comparison.json"


@attrs.frozen
class Plan:
    """What is compared: `pruners` by name, each with its `parameters`, on the settings of the prune job in `shared`."""

    pruners: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    shared: Mapping[str, Any] = attrs.field(factory=dict)
    """Tables of the prune job's settings, without pruner and seed."""
    parameters: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)

    @property
    def runs(self) -> list[tuple[str, int]]:
        """(pruner, seed), all pruners with the first seed first: half of the work already compares them all."""
        return [(pruner, seed) for seed in self.seeds for pruner in self.pruners]

    def overrides(self, pruner: str, seed: int, registry: Registry) -> dict[str, Any]:
        """The settings of one run; without the budget for a pruner that finds out itself how much it removes."""
        tables = nested(self.shared)
        if not registry.info(pruner, "pruner").budgets:
            tables.pop("budget", None)
        run = {**tables.get("run", {}), "seed": seed}
        return {**tables, "run": run, "pruner": {"name": pruner, **self.parameters.get(pruner, {})}}

    def toml(self) -> str:
        """The text of comparison.toml."""
        import tomlkit

        document = tomlkit.document()
        document.add(tomlkit.comment("what `maskwright compare-pruners` compares; go on with --resume"))
        document["pruners"], document["seeds"] = list(self.pruners), list(self.seeds)
        document["shared"] = {name: dict(table) for name, table in nested(self.shared).items()}
        document["parameters"] = {name: dict(table) for name, table in self.parameters.items()}
        return tomlkit.dumps(document)

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """The plan of a folder. Raises `UsageError` for a folder that holds no comparison."""
        path = folder / PLAN
        if not path.is_file():
            raise UsageError(f"There is no comparison to resume in {folder}: it has no {PLAN}.")
        try:
            said = tomllib.loads(path.read_text("utf-8"))
            return cls(tuple(said["pruners"]), tuple(said["seeds"]), said["shared"], said["parameters"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadRunFile(f"{path} is no plan of a comparison: {error}.") from None


@attrs.frozen
class Outcome:
    """One pruner over its seeds. `failures` are sentences by seed; the other numbers are of the seeds that finished."""

    pruner: str
    summaries: Mapping[int, Mapping[str, Any]]
    failures: Mapping[int, str]
    memory: Mapping[int, int]

    def values(self, *path: str) -> list[float]:
        """A number of each finished run's summary, by its keys."""
        found = []
        for summary in self.summaries.values():
            value: Any = summary
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.append(float(value))
        return found

    def mean(self, *path: str) -> float | None:
        """The mean over seeds; None where no run has it."""
        values = self.values(*path)
        return statistics.fmean(values) if values else None

    def spread(self, *path: str) -> float | None:
        """The standard deviation over seeds; None below two of them."""
        values = self.values(*path)
        return statistics.stdev(values) if len(values) > 1 else None


@attrs.frozen
class Comparison:
    """What came of a plan: best quality first, what failed last."""

    plan: Plan
    folder: Path
    outcomes: tuple[Outcome, ...]

    @property
    def page(self) -> Path:
        """The page for people."""
        return self.folder / PAGE

    @property
    def measure(self) -> str:
        """The name of the quality, such as "perplexity"; "" when nothing finished."""
        return next((str(one["quality"]["measure"]) for one in self._finished()), "")

    @property
    def dense(self) -> float | None:
        """The quality of the model as it was given."""
        return next((float(one["quality"]["before"]) for one in self._finished()), None)

    @property
    def pending(self) -> int:
        """Runs that have neither finished nor failed."""
        done = sum(len(one.summaries) + len(one.failures) for one in self.outcomes)
        return len(self.plan.runs) - done

    def _finished(self) -> list[Mapping[str, Any]]:
        return [summary for one in self.outcomes for summary in one.summaries.values()]

    def as_json(self) -> dict[str, Any]:
        """The table for programs."""
        rows = []
        for one in self.outcomes:
            sizes = {name: value for name in _sizes(one) if (value := one.mean("sizes", name)) is not None}
            rows.append(
                {
                    "pruner": one.pruner,
                    "quality": one.mean("quality", "after"),
                    "spread": one.spread("quality", "after"),
                    "seeds": sorted(one.summaries),
                    "sparsity": one.mean("sparsity"),
                    "seconds": one.mean("seconds"),
                    "peak_memory": max(one.memory.values(), default=None),
                    "sizes": sizes,
                    "failures": {str(seed): said for seed, said in one.failures.items()},
                }
            )
        return {"measure": self.measure, "dense": self.dense, "pending": self.pending, "pruners": rows}


def compare(
    plan: Plan,
    folder: Path,
    *,
    resume: bool = False,
    registry: Registry | None = None,
    arguments: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Do the runs of a plan that are not yet done, and write comparison.json and report.html; also when it is stopped.

    `arguments` are global options for the runs' own command lines, such as --registry. Raises `UsageError` and what `check` raises for
    a plan that cannot be run, before anything is trained, and `Interrupted` after Ctrl-C.
    """
    registry = registry or default()
    if len(set(plan.pruners)) < len(plan.pruners) or not plan.pruners or not plan.seeds:
        raise UsageError(
            f"Name each pruner and seed once; got {', '.join(plan.pruners) or 'no pruner'} and seeds "
            f"{', '.join(map(str, plan.seeds)) or 'none'}."
        )
    for pruner in plan.pruners:
        check(
            resolve("prune", None, plan.overrides(pruner, plan.seeds[0], registry), registry=registry),
            registry,
        )
    _open(plan, folder, resume)
    plan_of_runs = _with_model(plan, folder, say)
    settings = {
        (pruner, seed): resolve(
            "prune", None, plan_of_runs.overrides(pruner, seed, registry), registry=registry
        )
        for pruner, seed in plan.runs
    }
    exportable = _exportable(settings[plan.runs[0]])
    try:
        for number, (pruner, seed) in enumerate(plan.runs, 1):
            place = _place(folder, pruner, seed)
            if _summary(place) is not None:
                continue
            say(f"{number} of {len(plan.runs)}: {pruner}, seed {seed}")
            zeros = getattr(registry.component_class("pruner", pruner), "prunes", "weights") != "channels"
            _run(settings[pruner, seed], place, exportable and zeros, arguments)
    except KeyboardInterrupt:
        _write(_collected(plan, folder))
        raise Interrupted(f"Stopped; go on with: maskwright compare-pruners --resume {folder}") from None
    comparison = _collected(plan, folder)
    _write(comparison)
    return comparison


# -- runs ------------------------------------------------------------------------------------------------------------


def _place(folder: Path, pruner: str, seed: int) -> Path:
    return folder / "runs" / f"{pruner.replace('/', '-')}-seed{seed}"


def _open(plan: Plan, folder: Path, resume: bool) -> None:
    try:
        if not resume:
            if folder.is_dir() and any(folder.iterdir()):
                raise OutputError(
                    f"The output folder {folder} is not empty; choose another one with --out, or go on with --resume {folder}."
                )
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / PLAN, plan.toml().encode("utf-8"))
        (folder / "runs").mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}.") from error


def _with_model(plan: Plan, folder: Path, say: Callable[[str], None]) -> Plan:
    """The plan with a model folder: the embedded language model is trained once, for all."""
    tables = nested(plan.shared)
    model = tables.get("model", {})
    if model.get("source", models.DEFAULT) != models.DEFAULT:
        return plan
    target = folder / "model"
    if not (target / "config.json").is_file():
        from maskwright.jobs.pretrain import embedded_language_model
        from maskwright.jobs.run import Run

        say("Training the embedded language model, once for all pruners")
        settings = resolve("prune", None, {name: table for name, table in tables.items() if name != "pruner"})
        temporary = folder / ".model"
        shutil.rmtree(temporary, ignore_errors=True)
        with Run(settings, folder=temporary / "run", quiet=True) as run:
            trained = embedded_language_model(run)
            parts: list[Any] = [trained.network, trained.source]
            for part in parts:
                part.save_pretrained(temporary / "model")
        (temporary / "model").rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
    data = {"length": 128, **tables.get("data", {})}
    return attrs.evolve(plan, shared={**tables, "model": {"source": str(target)}, "data": data})


def _exportable(settings: Settings) -> bool:
    """Whether the model's prunable weights are all of linear layers, which compressed-tensors describes."""
    import importlib.util

    import torch
    import transformers

    from maskwright.jobs.prune import rule_of
    from maskwright.toolkit.prunable import prunable_weights

    if importlib.util.find_spec("compressed_tensors") is None:
        return False
    config = transformers.AutoConfig.from_pretrained(settings.model.source, local_files_only=True)
    kind: Any = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    with torch.device("meta"):
        made = transformers.AutoModel.from_config(config) if kind is None else kind(config)
    return all(weight.type == "Linear" for weight in prunable_weights(made, rule_of(settings)))


def _run(settings: Settings, place: Path, exportable: bool, arguments: Sequence[str]) -> None:
    """One run in a process of its own; what it failed of is left in <place>.error.json, its peak memory in <place>.memory."""
    if exportable and settings.require("output").export == "none":
        output = attrs.evolve(settings.require("output"), export="compressed-tensors-bitmask")
        settings = attrs.evolve(settings, output=output)
    resumed = (place / "checkpoint").is_dir() and (place / "run.toml").is_file()
    if not resumed:
        shutil.rmtree(place, ignore_errors=True)
    failure = place.with_name(f"{place.name}.error.json")
    failure.unlink(missing_ok=True)
    file = place.with_name(f"{place.name}.toml")
    write_whole(file, settings.toml().encode("utf-8"))
    asked = ["--resume", str(place)] if resumed else [str(file), "--out", str(place)]
    command = [sys.executable, "-m", "maskwright", *arguments, "prune", *asked, "--quiet"]
    log = place.with_name(f"{place.name}.log")
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            code, memory = _waited(process)
        except KeyboardInterrupt:
            process.wait()  # it has had the signal too, and saves its checkpoint
            raise
    if code == Interrupted.exit_code:
        raise KeyboardInterrupt
    if code:
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        said = next(
            (line for line in reversed(lines) if line.startswith("Error: ")), lines[-1] if lines else ""
        )
        said = said.removeprefix("Error: ") or f"The process ended with code {code}."
        write_whole(failure, json.dumps({"said": said}).encode("utf-8"))
        return
    if memory:
        write_whole(place / "memory.json", json.dumps({"peak_memory": memory}).encode("utf-8"))
    for path in (file, log):
        path.unlink(missing_ok=True)


def _waited(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Exit code and peak resident bytes of a child; 0 where the platform does not say."""
    if not hasattr(os, "wait4"):
        return process.wait(), 0
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _summary(place: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None otherwise."""
    found = _read(place / "summary.json")
    return found if found.get("finished") is True and isinstance(found.get("quality"), dict) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# -- results ---------------------------------------------------------------------------------------------------------


def _collected(plan: Plan, folder: Path) -> Comparison:
    outcomes = []
    for pruner in plan.pruners:
        summaries, failures, memory = {}, {}, {}
        for seed in plan.seeds:
            place = _place(folder, pruner, seed)
            summary = _summary(place)
            if summary is not None:
                summaries[seed] = summary
                if peak := _read(place / "memory.json").get("peak_memory"):
                    memory[seed] = int(peak)
            elif said := _read(place.with_name(f"{place.name}.error.json")).get("said"):
                failures[seed] = str(said)
        outcomes.append(Outcome(pruner, summaries, failures, memory))
    comparison = Comparison(plan, folder, tuple(outcomes))
    better = next((one["quality"]["better"] for one in comparison._finished()), "lower")
    sign = 1 if better == "lower" else -1

    def place_of(one: Outcome) -> float:
        quality = one.mean("quality", "after")
        return math.inf if quality is None else sign * quality

    return attrs.evolve(comparison, outcomes=tuple(sorted(outcomes, key=place_of)))


def _write(comparison: Comparison) -> None:
    try:
        text = json.dumps(comparison.as_json(), indent=2, ensure_ascii=False) + "\n"
        write_whole(comparison.folder / TABLE, text.encode("utf-8"))
        write_whole(comparison.page, render(comparison).encode("utf-8", "replace"))
    except OSError as error:
        raise OutputError(
            f"{comparison.folder} cannot be written ({error.strerror or error}); the runs in it are whole."
        ) from error


def _sizes(one: Outcome) -> list[str]:
    """Names of the sizes on disk that a page shows."""
    names = dict.fromkeys(name for summary in one.summaries.values() for name in summary.get("sizes", {}))
    return [name for name in names if name not in ("masks file", "model folder")]


# -- the page --------------------------------------------------------------------------------------------------------


def render(comparison: Comparison) -> str:
    """The page as HTML."""
    from maskwright import __version__

    finished = [one for one in comparison.outcomes if one.summaries]
    names = list(dict.fromkeys(name for one in finished for name in _sizes(one)))
    plan = comparison.plan
    shared = nested(plan.shared)
    budget = ", ".join(f"{key} {report.say(value)}" for key, value in shared.get("budget", {}).items())
    return (
        report.environment()
        .get_template("pruners.html.j2")
        .render(
            {
                "title": f"{len(plan.pruners)} pruners on {_model_name(shared)}",
                "budget": budget or "each pruner's usual budget",
                "measure": comparison.measure,
                "dense": ""
                if comparison.dense is None
                else say_quality(comparison.dense, comparison.measure),
                "better": next((one["quality"]["better"] for one in comparison._finished()), ""),
                "data": next((str(one.get("data", "")) for one in comparison._finished()), ""),
                "seeds": plan.seeds,
                "pending": comparison.pending,
                "again": f"maskwright compare-pruners --resume {comparison.folder.name}",
                "rows": [_row(one, comparison, names) for one in finished],
                "sizes": names,
                "failures": [
                    (one.pruner, seed, said)
                    for one in comparison.outcomes
                    for seed, said in one.failures.items()
                ],
                "charts": _charts(comparison, finished),
                "settings": list(report.flat({**shared, "parameters": plan.parameters})),
                "version": __version__,
            }
        )
    )


def _model_name(shared: Mapping[str, Any]) -> str:
    """The folder's name, with its parent's where that says nothing."""
    source = str(shared.get("model", {}).get("source", models.DEFAULT))
    if source == models.DEFAULT:
        return "the embedded language model"
    path = Path(source)
    return f"{path.parent.name}/{path.name}" if path.name in ("model", "checkpoint") else path.name


def _row(one: Outcome, comparison: Comparison, names: Sequence[str]) -> dict[str, Any]:
    quality, spread = one.mean("quality", "after"), one.spread("quality", "after")
    assert quality is not None
    seconds, sparsity = one.mean("seconds"), one.mean("sparsity")
    return {
        "pruner": one.pruner,
        "quality": say_quality(quality, comparison.measure),
        "spread": "" if spread is None else say_quality(float(f"{spread:.2g}"), comparison.measure),
        "sparsity": "" if sparsity is None else report.share(sparsity, 2) + _of_change(one),
        "sizes": [
            report.size(value) if (value := one.mean("sizes", name)) is not None else "–" for name in names
        ],
        "seconds": report.duration(seconds) if seconds is not None else "",
        "memory": report.size(max(one.memory.values())) if one.memory else "–",
        "run": f"runs/{_place(Path(), one.pruner, min(one.summaries)).name}/report.html",
        "seeds": len(one.summaries),
    }


def _of_change(one: Outcome) -> str:
    """What is counted where a method masks the change of the weights."""
    masked = {summary.get("prunes") for summary in one.summaries.values()}
    return " unchanged" if masked == {"difference"} else ""


def say_quality(value: float, measure: str) -> str:
    """A quality for people: accuracies in per cent."""
    return report.share(value, 2) if measure == "accuracy" else report.say(value)


def _charts(comparison: Comparison, finished: Sequence[Outcome]) -> list[report.Figure]:
    if not finished:
        return []
    names = [one.pruner for one in finished]
    qualities = [one.mean("quality", "after") or 0.0 for one in finished]
    percent = comparison.measure == "accuracy"
    said = "; ".join(
        f"{name} {say_quality(value, comparison.measure)}" for name, value in zip(names, qualities)
    )
    drawn = [
        report.figure_of(
            lambda width: pictures.bars(
                names, qualities, reference=comparison.dense, percent=percent, width=width
            ),
            f"{comparison.measure} by pruner: {said}.",
            title=f"{comparison.measure}, held out",
            caption="Dashed: the dense model.",
        )
    ]
    layers = {}
    for one in finished:
        told = next(iter(one.summaries.values())).get("layers") or []
        shares = [1 - layer["kept"] / layer["total"] for layer in told if layer.get("total")]
        layers[one.pruner] = (list(range(1, len(shares) + 1)), shares)
    uneven = {name: line for name, line in layers.items() if line[1] and max(line[1]) - min(line[1]) > 0.005}
    if uneven:
        drawn.append(
            report.figure_of(
                lambda width: pictures.curve(
                    uneven, x_label="weight, in the model's order", percent=True, size=(width, 3.0)
                ),
                "Removed share of each weight, by pruner: "
                + "; ".join(
                    f"{name} from {report.share(min(line[1]))} to {report.share(max(line[1]))}"
                    for name, line in uneven.items()
                ),
                title="Removed share by weight",
                caption="Pruners that remove the same share of every weight are left out.",
            )
        )
    return drawn


__all__ = ["Comparison", "Outcome", "Plan", "compare", "render"]
