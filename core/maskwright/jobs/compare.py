"""`maskwright compare`: several run folders side by side on one page of HTML, which needs no network and no JavaScript.

Runs with the same settings but for the seed are one group: mean and spread. What cannot be compared is said on the page.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from maskwright.errors import OutputError, UsageError
from maskwright.jobs import pictures, report
from maskwright.jobs.report import Figure, Run, duration, flops, say, share, size
from maskwright.jobs.settings import leaves
from maskwright.mask import write_whole

FREE = ("run.seed", "run.log_every", "run.save_every", "run.job")
"""Settings in which the runs of one group may differ."""

IMAGES = 4
"""Pictures of each group."""

LONGEST = 46
"""Letters of a group's name in a chart."""


@attrs.frozen
class Column:
    """A number of the summary, how it is said, and which end of it is good ("high", "low", or neither)."""

    key: str
    title: str
    speak: Callable[[float], str]
    good: str = ""


COLUMNS: dict[str, tuple[Column, ...]] = {
    "pretrain": (
        Column("linear_probe", "linear probe", share, "high"),
        Column("knn_probe", "kNN probe", share, "high"),
        Column("held_out_loss", "held-out loss", say, "low"),
        Column("perplexity", "perplexity", say, "low"),
        Column("seconds_per_step", "seconds a step", duration),
        Column("flops_per_step", "FLOPs a step", flops),
        Column(
            "flops_without_gradient",
            "FLOPs without gradient",
            lambda value: flops(value) if value else "none",
        ),
        Column("peak_memory", "peak memory", size),
        Column("seconds", "whole run", duration),
    ),
    "prune": (
        Column("perplexity_before", "perplexity, dense", say),
        Column("perplexity_after", "perplexity, pruned", say, "low"),
        Column("accuracy_before", "accuracy, dense", share),
        Column("accuracy_after", "accuracy, pruned", share, "high"),
        Column("sparsity", "weights removed", lambda value: share(value, 2)),
        Column("seconds", "whole run", duration),
    ),
    "sample": (
        Column("evaluations", "network calls", say),
        Column("samples", "samples", say),
        Column("length", "tokens each", say),
        Column("sampling_seconds", "sampling", duration),
        Column("seconds", "whole run", duration),
    ),
}


@attrs.frozen(eq=False)
class Group:
    """Runs of one job with the same settings but for the seed. `number` counts the groups of the page from 1."""

    number: int
    job: str
    title: str
    settings: Mapping[str, Any]
    runs: tuple[Run, ...]
    folders: tuple[Path, ...]
    label: str = ""

    @property
    def finished(self) -> list[Run]:
        """The runs that came to their end: the only ones whose numbers count."""
        return [run for run in self.runs if run.finished]

    def values(self, key: str) -> list[float]:
        """A number of the summary, of each finished run that has it."""
        return [found[key] for run in self.finished if key in (found := numbers(run))]

    @property
    def data(self) -> str:
        """What it was trained on, as its settings say."""
        told = [str(self.settings.get(f"data.{name}")) for name in ("source", "size", "length")]
        return " ".join(one for one in told if one != "None")


@attrs.frozen(eq=False)
class Comparison:
    """What is compared: the groups, the settings in which those of one job differ, and what a reader must be told."""

    groups: tuple[Group, ...]
    differ: Mapping[str, tuple[str, ...]]
    notices: tuple[str, ...]

    @property
    def jobs(self) -> list[str]:
        """The kinds of runs."""
        return list(dict.fromkeys(group.job for group in self.groups))

    def of(self, job: str) -> list[Group]:
        """The groups of one kind."""
        return [group for group in self.groups if group.job == job]

    def as_json(self) -> dict[str, Any]:
        """The table's data for a program."""
        return {
            "notices": list(self.notices),
            "differ": {job: list(names) for job, names in self.differ.items()},
            "groups": [
                {
                    "label": group.label,
                    "job": group.job,
                    "settings": {name: _plain(value) for name, value in group.settings.items()},
                    "runs": [
                        {
                            "folder": str(folder),
                            "seed": _seed(run),
                            "finished": run.finished,
                            "step": last_step(run),
                            "steps": group.settings.get("run.steps"),
                        }
                        for folder, run in zip(group.folders, group.runs)
                    ],
                    "numbers": {
                        column: {
                            "mean": statistics.fmean(values),
                            "spread": statistics.stdev(values) if len(values) > 1 else None,
                            "values": values,
                        }
                        for column in _keys(group)
                        if (values := group.values(column))
                    },
                }
                for group in self.groups
            ],
        }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _keys(group: Group) -> list[str]:
    """The numbers of any of its summaries, the columns of the page first."""
    known = [column.key for column in COLUMNS.get(group.job, ())]
    return list(dict.fromkeys([*known, *(key for run in group.runs for key in numbers(run))]))


def numbers(run: Run) -> dict[str, float]:
    """The numbers of a summary by their dotted names, the loss of the first step, which nothing had been learned before, and a
    pruned model's quality by its measure, as `perplexity_after`."""
    found = {name: value for name, value in leaves(run.summary) if report.is_number(value)}
    steps, losses = run.series("loss")
    if steps[:1] == [1]:
        found["untrained_loss"] = losses[0]
    quality = run.summary.get("quality")
    if isinstance(quality, Mapping):
        for when in ("before", "after"):
            if report.is_number(value := quality.get(when)):
                found[f"{quality.get('measure', 'quality')}_{when}"] = value
    return found


# -- reading -------------------------------------------------------------------------------------------------


def compare(folders: Sequence[Path]) -> Comparison:
    """Read run folders and group them. Raises `UsageError` for a folder that is no run."""
    folders = list({folder.resolve(): folder for folder in folders}.values())
    read = [(folder, _run(folder)) for folder in folders]
    gathered: dict[Any, list[tuple[Path, Run]]] = {}
    for folder, run in read:
        settings = _settings(run)
        # Where no setting can be read, nothing says that two runs are alike.
        key = (run.job, tuple(sorted((name, repr(value)) for name, value in settings.items())) or folder)
        gathered.setdefault(key, []).append((folder, run))
    groups = []
    for number, members in enumerate(gathered.values(), 1):
        first = members[0][1]
        runs = sorted(members, key=lambda one: (_seed(one[1]) is None, _seed(one[1]) or 0))
        groups.append(
            Group(
                number,
                first.job,
                report.title(first),
                _settings(first),
                tuple(run for _, run in runs),
                tuple(folder for folder, _ in runs),
            )
        )
    differ = {
        job: _differing([one for one in groups if one.job == job]) for job in {one.job for one in groups}
    }
    named = tuple(attrs.evolve(group, label=_label(group, groups)) for group in groups)
    return Comparison(named, differ, tuple(_notices(named, differ)))


def _run(folder: Path) -> Run:
    if not folder.is_dir():
        raise UsageError(f"There is no run in {folder}: it is no folder.")
    if not (folder / "run.toml").is_file() and not (folder / "summary.json").is_file():
        inside = sorted(path.parent for path in folder.glob("*/run.toml"))
        advice = (
            f"the folders in it are runs, such as {inside[0]}: name those"
            if inside
            else "name folders that pretrain, prune or sample left"
        )
        raise UsageError(f"{folder} is no run, for it has no run.toml; {advice}.")
    return report.read_run(folder)


def _settings(run: Run) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else _of_any_seed(value, _seed(run))
        for name, value in leaves(run.settings)
        if name not in FREE
    }


def _of_any_seed(value: Any, seed: int | None) -> Any:
    """A path without the run's own seed: a teacher that was trained with each seed is one setting of all of them."""
    if not isinstance(value, str) or seed is None:
        return value
    return re.sub(rf"(?<=[/\\]seed-){seed}(?=[/\\]|$)", "*", value)


def _seed(run: Run) -> int | None:
    table = run.settings.get("run")
    seed = table.get("seed") if isinstance(table, Mapping) else None
    return seed if isinstance(seed, int) else None


def last_step(run: Run) -> int | None:
    """The last step that metrics.jsonl has."""
    steps = [line["step"] for line in run.metrics if report.is_number(line.get("step"))]
    return int(max(steps)) if steps else None


def _differing(groups: Sequence[Group]) -> tuple[str, ...]:
    names = dict.fromkeys(name for group in groups for name in group.settings)
    return tuple(name for name in names if len({repr(group.settings.get(name)) for group in groups}) > 1)


def _label(group: Group, groups: Sequence[Group]) -> str:
    """The title, and where others share it, what sets this group apart from them: components first, the budget last."""
    alike = [one for one in groups if one.job == group.job and one.title == group.title]
    order = {section: place for place, section in enumerate(("data", "model", "run"), 1)}
    apart = [
        f"{name.rpartition('.')[2].replace('_', ' ')} {_said(group.settings[name])}"
        for name in sorted(_differing(alike), key=lambda name: order.get(name.partition(".")[0], 0))
        if name in group.settings
    ]
    more = [f"and {len(apart) - 2} more"] if len(apart) > 3 else []
    return ", ".join([group.title, *(apart[:2] if more else apart), *more])


def _listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _said(value: Any) -> str:
    """A setting; of a path its last two parts."""
    text = say(value)
    parts = Path(text).parts
    return str(Path(*parts[-2:])) if isinstance(value, str) and len(parts) > 2 else text


def _notices(groups: Sequence[Group], differ: Mapping[str, Sequence[str]]) -> Iterable[str]:
    jobs = list(dict.fromkeys(group.job for group in groups))
    if len(jobs) > 1:
        yield f"These are runs of different kinds ({', '.join(jobs)}): each kind has a table of its own."
    for job in jobs:
        of = [group for group in groups if group.job == job]
        data = list(dict.fromkeys(group.data for group in of))
        if len(data) > 1:
            yield (
                f"Different data ({'; '.join(data)}): losses and probes can be compared only between runs on the same."
            )
        for name, words in (("run.steps", "steps"), ("run.batch_size", "samples a step")):
            if name in differ[job]:
                told = list(dict.fromkeys(_said(group.settings.get(name)) for group in of))
                yield f"Not the same budget: {_listed(told)} {words}."
        models = [name for name in differ[job] if name.startswith("model.")]
        if models:
            yield f"Not the same model: they differ in {_listed(models)}."
        if len(of) > 1 and not any(len(group.runs) > 1 for group in of):
            yield f"One seed of each {job} run: small differences may be chance. Run more seeds to see a spread."
    for group in groups:
        seeds = [_seed(run) for run in group.runs]
        for seed in {one for one in seeds if one is not None and seeds.count(one) > 1}:
            yield f"{group.label}: seed {seed} is there {seeds.count(seed)} times, so that its spread says too little."
        for folder, run in zip(group.folders, group.runs):
            if not run.finished:
                step, total = last_step(run), group.settings.get("run.steps")
                reached = f"after step {say(step)}" if step is not None else "before its first step"
                of_all = f" of {say(total)}" if step is not None and total is not None else ""
                yield f"{folder} is unfinished ({reached}{of_all}): only its curves count."
            for note in run.notes:
                yield f"{folder}: {note}"


# -- the page ------------------------------------------------------------------------------------------------


def write_comparison(comparison: Comparison, target: Path) -> Path:
    """Write the page, whole or not at all. Raises `OutputError` when it cannot be written."""
    content = render(comparison).encode("utf-8", "replace")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, content)
    except OSError as error:
        raise OutputError(
            f"The page {target} cannot be written ({error.strerror or error}); choose another file with --out."
        ) from error
    return target


def render(comparison: Comparison) -> str:
    """The page as HTML."""
    from maskwright import __version__

    runs = sum(len(group.runs) for group in comparison.groups)
    counted = f"{runs} run{'s' * (runs != 1)}"
    if runs != len(comparison.groups):
        counted += f" in {len(comparison.groups)} group{'s' * (len(comparison.groups) != 1)}"
    return (
        report.environment()
        .get_template("compare.html.j2")
        .render(
            {
                "title": f"{counted} compared",
                "notices": comparison.notices,
                "sections": [_section(comparison, job) for job in comparison.jobs],
                "groups": comparison.groups,
                "style": pictures.style,
                "row_names": report.ROWS,
                "seed": _seed,
                "last_step": last_step,
                "say": say,
                "zip": zip,
                "version": __version__,
            }
        )
    )


def table(groups: Sequence[Group]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The page's table of one kind of runs as texts: (titles of the columns, (label, cells) of each row)."""
    columns = columns_of(groups)
    rows = [
        (
            f"{group.number} {group.label}",
            [" ".join(filter(None, _cell(one, group, groups)[:2])) for one in columns],
        )
        for group in groups
    ]
    return [column.title for column in columns], rows + _levels(groups, columns)


def columns_of(groups: Sequence[Group]) -> list[Column]:
    """The columns in which some group has a number; a teacher's part that no run has needs none."""
    return [
        column
        for column in COLUMNS.get(groups[0].job, ())
        if any(group.values(column.key) for group in groups)
        and (column.key != "flops_without_gradient" or any(any(one.values(column.key)) for one in groups))
    ]


def _section(comparison: Comparison, job: str) -> dict[str, Any]:
    groups = comparison.of(job)
    columns = columns_of(groups)
    shown = {group.number: _pictures(group, groups) for group in groups}
    return {
        "job": job,
        "groups": groups,
        "columns": columns,
        "rows": [(group, [_cell(column, group, groups) for column in columns]) for group in groups],
        "levels": _levels(groups, columns),
        "several": any(len(group.runs) > 1 for group in groups),
        "best": any(_best(column, groups) for column in columns),
        "charts": _charts(groups),
        "pictures": shown if any(shown.values()) else {},
        "caption": report.pictures_caption({name for rows in shown.values() for name in rows}),
        "corners": {
            group.number: _corners(group) for group in groups if any(run.masks for run in group.runs)
        },
        "texts": {group.number: report.texts(group.runs[0])[:2] for group in groups if group.runs[0].samples},
        "differ": [
            (name, [_said(group.settings[name]) if name in group.settings else "–" for group in groups])
            for name in comparison.differ[job]
        ],
    }


def spoken(values: Sequence[float], speak: Callable[[float], str]) -> tuple[str, str]:
    """(mean, spread) in words, the spread in the mean's unit and empty where there is one value."""
    mean = speak(statistics.fmean(values))
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    if not deviation:
        return mean, ""
    # Two digits say all that a spread of few runs can; a percent sign need not be said twice.
    return mean, f"± {speak(float(f'{deviation:.2g}'))}".removesuffix("\N{NO-BREAK SPACE}%")


def _cell(column: Column, group: Group, groups: Sequence[Group]) -> tuple[str, str, bool]:
    """(mean, spread, whether it is the best)."""
    values = group.values(column.key)
    if not values:
        return "–", "", False
    mean, spread = spoken(values, column.speak)
    # A loss has no other trivial level that all objectives share.
    if column.key == "held_out_loss" and (first := group.values("untrained_loss")):
        spread = f"{spread} from {say(float(f'{statistics.fmean(first):.2g}'))}".strip()
    return mean, spread, group.number in _best(column, groups)


def _best(column: Column, groups: Sequence[Group]) -> set[int]:
    """The numbers of the groups with the best mean, among those that can be compared: of one data, and for a loss of one
    objective under one strategy; nobody where there are no two of them, or all are level."""
    best: set[int] = set()
    sorts: dict[Any, list[Group]] = {}
    for group in groups:
        if column.good and group.values(column.key):
            parts = [
                (name, repr(value))
                for name, value in group.settings.items()
                if name.startswith(("objective.", "strategy."))
            ]
            key = (group.data, tuple(parts) if column.key == "held_out_loss" else ())
            sorts.setdefault(key, []).append(group)
    for alike in sorts.values():
        means = {group.number: statistics.fmean(group.values(column.key)) for group in alike}
        if len(set(means.values())) > 1:
            most = (max if column.good == "high" else min)(means.values())
            best |= {number for number, mean in means.items() if mean == most}
    return best


LEVELS = {
    "encoder before training": {"linear_probe": "linear_probe_before", "knn_probe": "knn_probe_before"},
    "always the commonest label": {"linear_probe": "chance", "knn_probe": "chance"},
}
"""What is to be had for nothing: for each column, the number of the summary that is its level."""


def _levels(groups: Sequence[Group], columns: Sequence[Column]) -> list[tuple[str, list[str]]]:
    """Rows of the table for what is to be had for nothing, one for each value where groups differ in it."""
    rows = []
    for name, keys in LEVELS.items():
        sorts: dict[Any, list[Group]] = {}
        for group in groups:
            if any(group.values(key) for key in keys.values()):
                sorts.setdefault(_level_key(group, name), []).append(group)
        said: dict[tuple[str, ...], list[int]] = {}
        for alike in sorts.values():
            cells = []
            for column in columns:
                key = keys.get(column.key, "")
                values = [value for group in alike for value in group.values(key)] if key else []
                cells.append(column.speak(statistics.fmean(values)) if values else "")
            said.setdefault(tuple(cells), []).extend(group.number for group in alike)
        for level, numbers in said.items():
            whose = f" ({', '.join(map(str, sorted(numbers)))})" if len(said) > 1 else ""
            rows.append((name + whose, list(level)))
    return rows


def _level_key(group: Group, level: str) -> Any:
    """Groups that share it share the level: the data decide chance, the data and the model the untrained encoder."""
    model = [(name, repr(value)) for name, value in group.settings.items() if name.startswith("model.")]
    return (group.data, tuple(model) if level == "encoder before training" else ())


# -- charts and pictures -------------------------------------------------------------------------------------


def _charts(groups: Sequence[Group]) -> list[Figure]:
    charts = []
    for key, title in (
        ("linear_probe", "Accuracy of a linear probe"),
        ("knn_probe", "Accuracy of a kNN probe"),
    ):
        values = [group.values(key) for group in groups]
        if sum(map(bool, values)) > 1:
            charts.append(_dots(groups, values, key, title))
    names = dict.fromkeys(group.settings.get("objective.name", group.job) for group in groups)
    for objective in names:
        those = [group for group in groups if group.settings.get("objective.name", group.job) == objective]
        for x, label in (("step", "step"), ("seconds", "seconds since the first step")):
            lines = {
                group.number: [line for run in group.runs if (line := _line(run, x)) is not None]
                for group in those
            }
            drawn = {number: runs for number, runs in lines.items() if runs}
            if drawn:
                charts.append(_curves(those, drawn, label, f" of {objective}" if len(names) > 1 else ""))
    return charts


def _line(run: Run, x: str) -> pictures.Line | None:
    """The loss over steps, or over seconds from the first line on; None where there are no two numbers."""
    lines = [
        line for line in run.metrics if report.is_number(line.get("loss")) and report.is_number(line.get(x))
    ]
    if len(lines) < 2:
        return None
    start = lines[0][x] if x == "seconds" else 0
    return [line[x] - start for line in lines], [line["loss"] for line in lines]


def _curves(
    groups: Sequence[Group], lines: Mapping[int, Sequence[pictures.Line]], label: str, whose: str
) -> Figure:
    by_number = {group.number: group for group in groups}
    named = {f"{number}  {_short(by_number[number].label)}": runs for number, runs in lines.items()}
    image = pictures.compared_curves(named, places=[number - 1 for number in lines], x_label=label)
    ends = [
        f"{by_number[number].label}: {say(statistics.fmean(run[1][-1] for run in runs))}"
        for number, runs in lines.items()
    ]
    over = "steps" if label == "step" else "seconds"
    return report.png_figure(
        image,
        f"Loss over {over}; last values: {'; '.join(ends)}.",
        title=f"Loss{whose} over {over}",
        wide=False,
    )


def _dots(groups: Sequence[Group], values: Sequence[Sequence[float]], key: str, title: str) -> Figure:
    levels = {}
    for name, keys in LEVELS.items():
        known: dict[Any, list[float]] = {}
        for group in groups:
            known.setdefault(_level_key(group, name), []).extend(group.values(keys[key]))
        means = {round(statistics.fmean(numbers), 9) for numbers in known.values() if numbers}
        if len(means) == 1:
            levels[name] = means.pop()
    image = pictures.dots([str(group.number) for group in groups], values, references=levels)
    told = [
        f"{group.number} {group.label} {share(statistics.fmean(numbers))}"
        for group, numbers in zip(groups, values)
        if numbers
    ]
    told += [f"{name} {share(value)}" for name, value in levels.items()]
    return report.png_figure(image, f"{title}: {'; '.join(told)}.", title=title, wide=False)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1].rstrip(" ,") + "…"


def _pictures(group: Group, groups: Sequence[Group]) -> dict[str, list[Figure]]:
    """Rows of pictures of the group's first run that has any; with maps of features when some group has nothing else."""

    def tensors(one: Group) -> Mapping[str, Any]:
        return next((run.tensors for run in one.runs if run.tensors), {})

    maps = any(tensors(one) and "reconstructions" not in tensors(one) for one in groups)
    return report.image_rows(tensors(group), most=IMAGES, maps=maps)


def _corners(group: Group) -> list[Figure]:
    return report.corners(next(run.masks for run in group.runs if run.masks))
