"""A fair comparison of a family's components: every one in pretrainings on the same budget, beside one baseline.

Rows are the family's objectives with the strategy that each brings, and its mask strategies with the default objective. A
plugin whose components need more than a name to be run says so with `ENTRIES` beside the `CLAIM` of its claim.py.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import re
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from maskwright.errors import BadRunFile, Interrupted, MaskwrightError, OutputError
from maskwright.jobs import claims, execute
from maskwright.jobs.report import is_number, say, share
from maskwright.jobs.settings import BY_MODALITY, DEFAULTS, Settings, leaves, resolve
from maskwright.mask import write_whole
from maskwright.registry import ComponentInfo, PluginInfo, Registry

Overrides = Mapping[str, Any]
"""Settings of a pretraining by their dotted names."""

Maker = Callable[[Settings, Path], None]
"""Makes a teacher: it is given the settings of the pretraining that needs it, and the model folder to write."""


@attrs.frozen
class Entry:
    """One row of a family's comparison, as a plugin declares it: `ENTRIES = (Entry(…), …)` in its claim.py.

    `settings` are those of the pretraining beside the shared budget, by dotted names, at least "objective.name"; where they
    change the budget itself (a convolutional network wants larger images), the table says so. `teachers` gives model folders
    to settings, such as "objective.teacher": each is trained before, on the same budget and seed, by a pretraining of the
    settings given, or by a function such as `supervised`. `note` is shown beside the row, whose name is "strategy × objective"
    where no other is given.

    A plugin that declares entries has no others for its objectives; its strategies are compared all the same.
    """

    settings: Overrides
    teachers: Mapping[str, Overrides | Maker] = attrs.field(factory=dict)
    note: str = ""
    name: str = ""


@attrs.frozen
class Terms:
    """The budget that all entries share, and the data that they are compared on."""

    data: tuple[str, ...] = ("digits", "rotated-photographs")
    steps: int = 400
    batch_size: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    width: int = 64
    depth: int = 4
    heads: int = 4
    everything: bool = False
    """Whether third-party plugins' components are compared as well."""

    def overrides(self, data: str, seed: int) -> dict[str, Any]:
        """The settings of one run."""
        return {
            "run.steps": self.steps,
            "run.batch_size": self.batch_size,
            "run.seed": seed,
            "run.save_every": max(self.steps // 4, 1),
            "data.source": data,
            "model.width": self.width,
            "model.depth": self.depth,
            "model.heads": self.heads,
            **SIZES.get(data, PHOTOGRAPHS),
        }


PHOTOGRAPHS: Overrides = {"data.size": 32, "model.patch_size": 8}
SIZES: Mapping[str, Overrides] = {"digits": {"data.size": 16, "model.patch_size": 4}}
"""Pixels a side: 4 × 4 patches of digits, enlarged, and of anything else.

Steps, sizes and width were chosen from ten settings of the baseline on digits with seed 0, as one in which its kNN probe rises above
the untrained encoder's in this time: that row is favoured by the choice.
"""

FAMILIES = {"images": "image"}
"""Families that have a comparison, and the modality of what is compared in them."""


@attrs.frozen
class Row:
    """One row: what is run, and whose it is. `refused` says why it cannot be run at all."""

    name: str
    entry: Entry
    plugin: str = ""
    baseline: bool = False
    refused: str = ""


@attrs.frozen
class Task:
    """One pretraining, or one teacher: its folder below the comparison's, its settings, and the teachers that it needs."""

    folder: str
    settings: Overrides
    make: Maker | None = None
    teachers: Mapping[str, str] = attrs.field(factory=dict)


# -- the rows ------------------------------------------------------------------------------------------------


def rows(registry: Registry, family: str, everything: bool = False) -> list[Row]:
    """The baseline, every objective of the family, and every strategy of it with the default objective.

    Of the built-in plugins, or of all.
    """
    modality = FAMILIES[family]
    objective, strategy = DEFAULTS["pretrain"]["objective"]["name"], BY_MODALITY[modality]["strategy"]["name"]
    found = [Row(f"{strategy} × {objective}", Entry({"objective.name": objective}), baseline=True)]
    plugins = [
        one
        for one in registry.plugins()
        if one.family == family and not one.error and (everything or one.source == "built-in")
    ]
    found += [row for plugin in plugins for row in _objectives(registry, plugin, modality)]
    known = {info.name: info for info in registry.find(kind="objective")}
    given = (
        known[objective].provides | known[objective].needs | {"pixels", "labels"}
        if objective in known
        else set()
    )
    for plugin in plugins:
        for info in _components(registry, plugin, "mask-strategy", modality):
            entry = Entry({"objective.name": objective, "strategy.name": info.name})
            lacking = ", ".join(sorted(info.needs - given))
            refused = f"needs {lacking}, which {objective} does not provide" if lacking else ""
            found.append(Row(f"{info.name} × {objective}", entry, plugin.slug, refused=refused))
    return list({row.name: row for row in reversed(found)}.values())[::-1]


def _components(registry: Registry, plugin: PluginInfo, kind: str, modality: str) -> list[ComponentInfo]:
    return [info for info in registry.find(kind=kind, modality=modality) if info.plugin.key == plugin.key]


def _objectives(registry: Registry, plugin: PluginInfo, modality: str) -> Iterator[Row]:
    objectives = _components(registry, plugin, "objective", modality)
    try:
        declared: Sequence[Entry] | None = claims.declared(plugin, "ENTRIES")
    except MaskwrightError as error:
        for info in objectives:
            yield Row(info.name, Entry({"objective.name": info.name}), plugin.slug, refused=str(error))
        return
    if declared is None:
        declared = [Entry({"objective.name": info.name}) for info in objectives]
    for entry in declared:
        try:
            settings = resolve("pretrain", None, entry.settings, registry=registry)
            pair = f"{settings.require('strategy').name} × {settings.require('objective').name}"
            yield Row(entry.name or pair, entry, plugin.slug)
        except Exception as error:  # a plugin that cannot be imported raises what it likes
            name = entry.name or str(entry.settings.get("objective.name", plugin.slug))
            yield Row(name, entry, plugin.slug, refused=_reason(error))


def tasks(chosen: Sequence[Row], terms: Terms) -> dict[tuple[str, str, int], list[Task]]:
    """For each row, data and seed what is to be run, teachers first. Equal pretrainings are one task in one folder."""
    planned: dict[tuple[str, str, int], list[Task]] = {}
    same: dict[Any, Task] = {}

    def task(name: str, settings: Overrides, make: Maker | None = None, **teachers: str) -> Task:
        key = (json.dumps(settings, sort_keys=True, default=str), make, *sorted(teachers.items()))
        return same.setdefault(key, Task(name, settings, make, teachers))

    for row in chosen:
        if row.refused:
            continue
        for data in terms.data:
            for seed in terms.seeds:
                budget = terms.overrides(data, seed)
                place = f"{_file_name(data)}/{_file_name(row.name)}"
                teachers = {}
                for setting, made in row.entry.teachers.items():
                    called = f"{place}-{setting.rpartition('.')[2]}/seed-{seed}"
                    teachers[setting] = (
                        task(called, budget, made) if callable(made) else task(called, {**budget, **made})
                    )
                paths = {setting: one.folder for setting, one in teachers.items()}
                own = task(f"{place}/seed-{seed}", {**budget, **row.entry.settings}, None, **paths)
                planned[row.name, data, seed] = [*teachers.values(), own]
    return planned


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


# -- running -------------------------------------------------------------------------------------------------


def run(task: Task, root: Path, registry: Registry) -> str:
    """Do a task, or find it done; returns why it failed, or nothing. What was begun before goes on from its checkpoint."""
    folder = root / task.folder
    try:
        models = {
            setting: str((root / teacher / "model").resolve()) for setting, teacher in task.teachers.items()
        }
        for setting, model in models.items():
            if not Path(model).is_dir():
                raise BadRunFile(f"its teacher ({setting}) could not be made")
        settings = resolve("pretrain", None, {**task.settings, **models}, registry=registry)
        if task.make is not None:
            if not (folder / "model").is_dir():
                temporary = folder / "model.tmp"
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                task.make(settings, temporary)
                temporary.rename(folder / "model")
            return ""
        if _summary(folder).get("finished") is True:
            return ""
        begun = (folder / "run.toml").is_file()
        execute(settings, folder=folder, resume=begun, registry=registry, quiet=True)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        return ""
    except Interrupted:
        raise
    except Exception as error:  # whatever goes wrong in one entry is the entry's own
        return _reason(error)


def _reason(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return said if isinstance(error, MaskwrightError) else f"{type(error).__name__}: {said}"


def run_all(
    planned: Mapping[Any, Sequence[Task]],
    root: Path,
    registry: Registry,
    family: str,
    terms: Terms,
    *,
    workers: int = 1,
    progress: Callable[[int, int, str, float], None] | None = None,
) -> dict[str, str]:
    """Do all tasks, teachers first; returns why some failed, by their folder.

    `workers` processes with one thread each share them, or this process does them one after the other.
    `progress(done, total, folder, seconds)` is called after each. Raises `Interrupted` after Ctrl-C.
    """
    every = {task.folder: task for group in planned.values() for task in group}
    needed = {teacher for task in every.values() for teacher in task.teachers.values()}
    failures: dict[str, str] = {}
    done = 0

    def ended(folder: str, why: str, seconds: float) -> None:
        nonlocal done
        done += 1
        if why:
            failures[folder] = why
        if progress is not None:
            progress(done, len(every), folder, seconds)

    first = [folder for folder in every if folder in needed]
    rest = [folder for folder in every if folder not in needed]
    try:
        if workers == 1:
            for folder in first + rest:
                started = time.monotonic()
                ended(folder, run(every[folder], root, registry), time.monotonic() - started)
            return failures
        state = (registry.files, registry.third_party, registry.disabled, family, terms, root)
        with concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _begin, (os.getpid(), *state)
        ) as pool:
            try:
                for part in (first, rest):
                    coming = [pool.submit(_work, folder) for folder in part]
                    for future in concurrent.futures.as_completed(coming):
                        ended(*future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"Stopped; go on with: maskwright verify --resume {root}") from None
    return failures


_WORKER: dict[str, Any] = {}


def _begin(
    parent: int,
    files: Sequence[Path],
    third_party: bool,
    disabled: frozenset[str],
    family: str,
    terms: Terms,
    root: Path,
) -> None:
    """A worker reads the plan for itself: functions of plugins need not be sent to it."""
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    registry = Registry(files=files, third_party=third_party, disabled=disabled)
    planned = tasks(rows(registry, family, terms.everything), terms)
    _WORKER.update(
        tasks={task.folder: task for group in planned.values() for task in group},
        root=root,
        registry=registry,
    )


def _end_with(parent: int) -> None:
    """A worker whose parent was killed must not hold folders that the next one wants."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(folder: str) -> tuple[str, str, float]:
    started = time.monotonic()
    why = run(_WORKER["tasks"][folder], _WORKER["root"], _WORKER["registry"])
    return folder, why, time.monotonic() - started


# -- the table -----------------------------------------------------------------------------------------------


@attrs.frozen
class Line:
    """What was measured of a row on one data set: the numbers of every finished seed by name, or why there are none."""

    row: Row
    numbers: Mapping[str, tuple[float, ...]]
    differs: str
    failure: str = ""


NUMBERS = (
    "linear_probe",
    "knn_probe",
    "linear_probe_before",
    "knn_probe_before",
    "chance",
    "seconds_per_step",
    "flops_per_step",
    "flops_without_gradient",
)


def lines(
    chosen: Sequence[Row],
    planned: Mapping[tuple[str, str, int], Sequence[Task]],
    terms: Terms,
    root: Path,
    failures: Mapping[str, str],
) -> dict[str, list[Line]]:
    """The measured rows of each data set."""
    found = {
        data: [_measured(row, data, planned, terms, root, failures) for row in chosen] for data in terms.data
    }
    return {data: [_with_level(line, of) for line in of] for data, of in found.items()}


def _with_level(line: Line, found: Sequence[Line]) -> Line:
    """The line, with the level of its own encoder where that is another one than the baseline's."""
    keys = LEVELS["the baseline's encoder, untrained"]
    baseline = next((one for one in found if one.row.baseline), line)
    own, usual = ([of.numbers.get(key, ()) for key in keys] for of in (line, baseline))
    if not all(own) or own == usual:
        return line
    said = f"its encoder untrained: {' and '.join(map(accuracy, own))}"
    return attrs.evolve(line, differs="; ".join(filter(None, (line.differs, said))))


def _measured(
    row: Row,
    data: str,
    planned: Mapping[tuple[str, str, int], Sequence[Task]],
    terms: Terms,
    root: Path,
    failures: Mapping[str, str],
) -> Line:
    if row.refused:
        return Line(row, {}, "", row.refused)
    folders = [planned[row.name, data, seed][-1].folder for seed in terms.seeds]
    summaries = [_summary(root / folder) for folder in folders]
    numbers = {
        name: tuple(one[name] for one in summaries if one.get("finished") and is_number(one.get(name)))
        for name in NUMBERS
    }
    numbers["hidden"] = tuple(value for folder in folders if (value := _hidden(root / folder)) is not None)
    why = next((failures[folder] for folder in folders if folder in failures), "")
    return Line(row, {name: values for name, values in numbers.items() if values}, differences(row), why)


def _summary(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _hidden(folder: Path) -> float | None:
    """The mean share that the masks of a run hide."""
    try:
        read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    shares = [line["masked"] for line in read if "masked" in line]
    return statistics.fmean(shares) if shares else None


def differences(row: Row) -> str:
    """What a row has beside the shared budget: settings, teachers and its note."""
    told = [
        f"{name} {say(value)}"
        for name, value in leaves(dict(row.entry.settings))
        if not name.endswith(".name") and not name.endswith(".kind")
    ]
    for setting, made in row.entry.teachers.items():
        how = (
            (made.__doc__ or made.__name__).partition("\n")[0].rstrip(".") if callable(made) else _named(made)
        )
        told.append(f"{setting.rpartition('.')[2]}: {how[:1].lower()}{how[1:]}, on the same budget before")
    return "; ".join([*told, *([row.entry.note] if row.entry.note else [])])


def _named(settings: Overrides) -> str:
    return " × ".join(str(settings[key]) for key in ("strategy.name", "objective.name") if key in settings)


def markdown(measured: Mapping[str, Sequence[Line]], terms: Terms, settings: Settings) -> str:
    """The README's tables, one for each data set, in Markdown."""
    model, run = settings.model, settings.run
    parts = [
        f"All rows: {terms.steps:,} steps of {terms.batch_size} images, AdamW with a peak rate of {run.lr:g}, a ViT of width "
        f"{model.width} and depth {model.depth} where nothing else is said, seeds {', '.join(map(str, terms.seeds))} (mean ± "
        "standard deviation). Accuracies are of a linear and a kNN probe on the frozen mean feature of held-out images; time and "
        "operations are of one step, forward and backward, a teacher's included, with one thread a run. Every strategy has its "
        "own default ratio.",
    ]
    for data, found in measured.items():
        parts.append(f"**{data}**")
        head = [
            "strategy × objective",
            "linear probe",
            "kNN probe",
            "hidden",
            "a step",
            "GFLOPs a step",
            "beside the budget",
        ]
        parts.append("\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *_body(found)]))
    return "\n\n".join(parts)


def _body(found: Sequence[Line]) -> Iterator[str]:
    for line in found:
        name = f"`{line.row.name.replace(' × ', '` × `')}`" + " (baseline)" * line.row.baseline
        yield "| " + " | ".join([name, *cells(line)]) + " |"
    for level, values in levels(found):
        yield f"| *{level}* | " + " | ".join(values) + " | | | | |"


def levels(found: Sequence[Line]) -> Iterator[tuple[str, list[str]]]:
    """What is to be had for nothing, as the baseline's runs measured it: (name, the accuracies of both probes)."""
    baseline = next((line for line in found if line.row.baseline), None)
    for level, keys in LEVELS.items():
        values = [baseline.numbers.get(key, ()) if baseline else () for key in keys]
        if all(values):
            yield level, [accuracy(one) for one in values]


LEVELS = {
    "the baseline's encoder, untrained": ("linear_probe_before", "knn_probe_before"),
    "always the commonest label": ("chance", "chance"),
}


def cells(line: Line) -> list[str]:
    """Both probes, hidden share, seconds, operations, and what is beside the budget; or why there are none."""
    numbers = line.numbers
    if not numbers:
        return [
            _cell(f"not run: {line.failure}" if line.row.refused else f"failed: {line.failure}"),
            *[""] * 5,
        ]
    apart = numbers.get("flops_without_gradient", (0.0,))[0]
    teacher = f" ({apart / 1e9:.3g} without gradient)" if apart else ""
    failed = (
        f"of {len(numbers.get('linear_probe', ()))} seeds, another failed: {line.failure}"
        if line.failure
        else ""
    )
    return [
        accuracy(numbers.get("linear_probe", ())),
        accuracy(numbers.get("knn_probe", ())),
        share(statistics.fmean(numbers["hidden"]), 0) if "hidden" in numbers else "",
        f"{statistics.fmean(numbers['seconds_per_step']) * 1000:.3g} ms"
        if "seconds_per_step" in numbers
        else "",
        f"{statistics.fmean(numbers['flops_per_step']) / 1e9:.3g}{teacher}"
        if "flops_per_step" in numbers
        else "",
        _cell("; ".join(filter(None, (failed, line.differs)))),
    ]


def accuracy(values: Sequence[float]) -> str:
    """`91.3 ± 0.4 %`."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values) * 100:.1f}"
    spread = (
        f" ± {statistics.stdev(values) * 100:.1f}" if len(values) > 1 and max(values) > min(values) else ""
    )
    return f"{mean}{spread} %"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def as_json(measured: Mapping[str, Sequence[Line]], terms: Terms) -> dict[str, Any]:
    """The same for programs."""
    return {
        "terms": attrs.asdict(terms),
        "rows": [
            {
                "data": data,
                "name": line.row.name,
                "plugin": line.row.plugin,
                "baseline": line.row.baseline,
                "numbers": {name: list(values) for name, values in line.numbers.items()},
                "differs": line.differs,
                "failure": line.failure,
            }
            for data, found in measured.items()
            for line in found
        ],
    }


# -- the folder ----------------------------------------------------------------------------------------------


def remember(root: Path, family: str, terms: Terms) -> None:
    """Write what a verification is about into its folder. Raises `OutputError` when it cannot be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"family": family, **attrs.asdict(terms)}, indent=2) + "\n"
        write_whole(root / "verify.json", text.encode())
    except OSError as error:
        raise OutputError(
            f"{root} cannot be written: {error.strerror or error}; choose another one with --out."
        ) from error


def recall(root: Path) -> tuple[str, Terms]:
    """(family, terms) of a folder in which a verification was begun. Raises `BadRunFile` where there is none."""
    try:
        table = json.loads((root / "verify.json").read_text("utf-8"))
        family = table.pop("family")
        given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in table.items()}
        return family, Terms(**given)
    except FileNotFoundError:
        raise BadRunFile(f"There is no verification to resume in {root}: it has no verify.json.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadRunFile(f"{root / 'verify.json'} cannot be read: {error}.") from None


# -- teachers ------------------------------------------------------------------------------------------------


def supervised(settings: Settings, folder: Path) -> None:
    """Trained with the labels."""
    import torch

    from maskwright.backbones import adapt
    from maskwright.backbones.folders import quiet_transformers
    from maskwright.jobs import models
    from maskwright.jobs.batches import Batches
    from maskwright.jobs.pretrain import learning_rate, parameter_groups, pooled
    from maskwright.protocols import Step
    from maskwright.sources.images import load_images

    given, steps, size = settings.run, settings.run.steps or 1, settings.data.size or 32
    source = load_images(settings.data.source, size=size, seed=given.seed)
    network = models.vision_model(settings.model, size=size, seed=given.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(given.seed)
        head = torch.nn.Linear(network.config.hidden_size, len(source.classes))
        module = torch.nn.ModuleDict({"network": network, "head": head})
        peak = given.lr or 1e-3
        optimizer = torch.optim.AdamW(
            parameter_groups(module, given.weight_decay or 0.0), lr=peak, betas=(0.9, 0.95)
        )
        backbone = adapt(network, "patch")
        network.train()
        with Batches(source, given.batch_size or 32) as batches:
            for step in range(steps):
                batch = batches[step]
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(Step(step, steps), peak, given.warmup or 0.0)
                loss = torch.nn.functional.cross_entropy(
                    head(pooled(backbone, batch["pixels"])), batch["labels"]
                )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(module.parameters(), given.clip or float("inf"))
                optimizer.step()
    with quiet_transformers():
        network.eval().save_pretrained(folder)
