"""`write_report`: a run folder as one page of HTML that needs nothing else: no network, no JavaScript.

It reads whichever of run.toml, summary.json, metrics.jsonl, pictures.safetensors, masks.safetensors and samples.jsonl are
there; what is missing or damaged is said on the page, and the rest is drawn.
"""

from __future__ import annotations

import base64
import json
import math
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import attrs
import torch
from torch import Tensor

from maskwright.errors import MaskwrightError, OutputError
from maskwright.jobs import pictures
from maskwright.jobs.settings import leaves
from maskwright.mask import Mask, load_masks, write_whole

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL import Image

IMAGES_SHOWN = 8
SAMPLES_SHOWN = 12
LAYERS_SHOWN = 60
SKIPPED_SHOWN = 100
CORNER = 32
"""Rows and columns of a weight mask that are drawn: enough to see a pattern, few enough to see a weight."""


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html and return its path. The page appears whole or not at all.

    Raises `OutputError` when the folder cannot be written.
    """
    target = Path(folder) / "report.html"
    content = render(read_run(Path(folder))).encode("utf-8", "replace")
    try:
        write_whole(target, content)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"The report {target} cannot be written ({reason}); free the disk or choose another folder."
        ) from error
    return target


# -- reading -------------------------------------------------------------------------------------------------


@attrs.define
class Run:
    """What was found in a run folder. `notes` say which files could not be read."""

    name: str
    settings: dict[str, Any] = attrs.field(factory=dict)
    summary: dict[str, Any] = attrs.field(factory=dict)
    metrics: list[dict[str, Any]] = attrs.field(factory=list)
    tensors: dict[str, Tensor] = attrs.field(factory=dict)
    masks: dict[str, Mask] = attrs.field(factory=dict)
    samples: list[dict[str, Any]] = attrs.field(factory=list)
    notes: list[str] = attrs.field(factory=list)

    @property
    def job(self) -> str:
        """ "pretrain", "prune", "sample", or "run" where no file says."""
        section = self.settings.get("run")
        set_there = section.get("job") if isinstance(section, Mapping) else None
        return str(self.summary.get("job") or set_there or self.settings.get("job") or "run")

    @property
    def finished(self) -> bool:
        """Whether the job came to its end."""
        return self.summary.get("finished") is True

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one metric, in the order of the file."""
        lines = [line for line in self.metrics if is_number(line.get(key)) and is_number(line.get("step"))]
        return [line["step"] for line in lines], [line[key] for line in lines]

    def metric_names(self) -> list[str]:
        """Metrics that are numbers, in order of appearance, without the step."""
        names = {key: None for line in self.metrics for key, value in line.items() if is_number(value)}
        return [name for name in names if name != "step"]


def read_run(folder: Path) -> Run:
    """Read what there is. Nothing raises: a file that is damaged becomes a note."""
    run = Run(name=folder.resolve().name)

    def read(file: str, attribute: str, reader: Callable[[Path], Any]) -> None:
        path = folder / file
        if not path.exists():
            return
        try:
            setattr(run, attribute, reader(path))
        except (OSError, ValueError, KeyError, RuntimeError, MaskwrightError) as error:
            said = str(error).partition("\n")[0].replace(str(path), file)
            run.notes.append(f"{file} could not be read: {said}")

    read("run.toml", "settings", lambda path: tomllib.loads(path.read_text("utf-8")))
    read("summary.json", "summary", _read_object)
    read("metrics.jsonl", "metrics", _read_lines)
    read("pictures.safetensors", "tensors", _read_tensors)
    read("masks.safetensors", "masks", load_masks)
    read("samples.jsonl", "samples", _read_lines)
    return run


def _read_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        raise ValueError("it does not hold an object.")
    return value


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects, one a line. The last line may be cut short by a kill: it is left out."""
    lines = [line for line in path.read_bytes().decode("utf-8", "replace").splitlines() if line.strip()]
    values = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"line {number} is not JSON.") from None
        if isinstance(value, dict):
            values.append(value)
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is one, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- the page ------------------------------------------------------------------------------------------------


@attrs.frozen
class Figure:
    """A picture with the words that stand for it. `narrow` is the same one, drawn for a phone."""

    source: str
    alt: str
    width: int
    height: int
    caption: str = ""
    title: str = ""
    wide: bool = True
    narrow: str = ""

    @property
    def small(self) -> bool:
        """Whether it is blown up on the page: its pixels stay squares then."""
        return max(self.width, self.height) < 160


@attrs.frozen
class Number:
    """One headline number, said in words that need no legend."""

    label: str
    value: str
    note: str = ""


def environment() -> Environment:
    """Where the templates of the pages are."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("maskwright.jobs"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(run: Run) -> str:
    """The page as HTML."""
    from maskwright import __version__

    specific = {"pretrain": _pretrain, "prune": _prune, "sample": _sample}.get(run.job, _plain)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            {
                "run": run,
                "title": title(run),
                "state": _state(run),
                "again": f"maskwright {run.job} run.toml" if run.settings and run.job != "run" else "",
                "settings": list(flat(run.settings)),
                "results": list(flat({k: v for k, v in run.summary.items() if not isinstance(v, list)})),
                "version": __version__,
                "numbers": [],
                "rows": {},
                "row_names": ROWS,
                "zip": zip,
                "pictures_caption": pictures_caption,
                "charts": [],
                "corners": [],
                "texts": [],
                "texts_title": "Samples",
                "sizes": [],
                "labels": _labels(run),
                "skipped": _skipped(run)[:SKIPPED_SHOWN],
                "skipped_count": len(_skipped(run)),
                **specific(run),
            }
        )
    )


def _labels(run: Run) -> str:
    """What the labels of the probes are, and how often a guess is right."""
    label, chance = run.summary.get("labels"), run.summary.get("chance")
    if not isinstance(label, str) or not label:
        return ""
    guess = f" Always naming the most frequent one is right in {share(chance)}." if is_number(chance) else ""
    return f"The label that the probes name: {label}.{guess}"


def _skipped(run: Run) -> list[tuple[str, str]]:
    """What of the data could not be read, and why not."""
    files = run.summary.get("skipped_files")
    listed = files if isinstance(files, list) else []
    return [(str(one.get("file")), str(one.get("reason"))) for one in listed if isinstance(one, Mapping)]


def title(run: Run) -> str:
    """The components, in the order in which they act: `hard-patches × hpm`."""
    names = [_component(run, kind) for kind in ("strategy", "objective", "pruner", "sampler")]
    return " × ".join(name for name in names if name) or run.name


def _component(run: Run, kind: str) -> str:
    for value in (run.settings.get(kind), run.summary.get(kind)):
        if isinstance(value, str):
            return value
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            return value["name"]
    return ""


def _state(run: Run) -> str:
    if run.finished:
        return ""
    steps = [line["step"] for line in run.metrics if is_number(line.get("step"))]
    total = _find(run.settings, "steps")
    reached = f" The last step on record is {max(steps):,}" if steps else " No step is on record"
    of = f" of {total:,}" if steps and is_number(total) else ""
    return f"This run has not finished.{reached}{of}."


def _find(settings: Mapping[str, Any], key: str) -> Any:
    """A setting by its last name, wherever it stands."""
    return next((value for name, value in leaves(settings) if name.rpartition(".")[2] == key), None)


def flat(table: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Dotted names and values of nested tables, for readers."""
    for name, value in leaves(table):
        yield name, say(value)


# -- pretrain ------------------------------------------------------------------------------------------------


def _pretrain(run: Run) -> dict[str, Any]:
    hidden = set(_masked_shares(run))
    return {
        "numbers": [
            *_headline(
                run,
                ("final loss", ("final_loss", "loss"), say, "mean of the last steps"),
                ("held-out loss", ("held_out_loss",), say, ""),
                ("perplexity", ("perplexity",), say, "held out"),
                ("linear probe", ("linear_probe",), share, _before(run, "linear_probe")),
                ("kNN probe", ("knn_probe",), share, _before(run, "knn_probe")),
            ),
            *([Number("hidden", share(hidden.pop()), "of each image")] if len(hidden) == 1 else []),
            *_time(run),
            *_headline(
                run,
                ("time a step", ("seconds_per_step",), duration, "median"),
                ("FLOPs a step", ("flops_per_step",), lambda count: flops(count, ""), _teachers_part(run)),
                ("peak memory", ("peak_memory",), size, ""),
            ),
            *_headline(run, ("waiting for data", ("waiting_for_data",), share, "of the training loop")),
        ],
        "rows": image_rows(run.tensors),
        "texts": texts(run),
        "texts_title": "What it writes on held-out text",
        "charts": _loss_charts(run),
    }


def _before(run: Run, probe: str) -> str:
    """What a probe is to be held against."""
    before = run.summary.get(f"{probe}_before")
    return f"held out; {share(before)} before" if is_number(before) else "accuracy, held out"


def _teachers_part(run: Run) -> str:
    apart = run.summary.get("flops_without_gradient")
    return f"{flops(apart, '')} of them without gradient" if is_number(apart) and apart else ""


ROWS = {
    "originals": "original",
    "masks": "what the model saw",
    "other_views": "second view",
    "reconstructions": "reconstruction",
    "similarity": "alike to the framed patch",
    "components": "main components",
}
"""The rows of pictures, by the tensor that each shows, in the page's order."""


def image_rows(
    tensors: Mapping[str, Tensor], *, most: int = IMAGES_SHOWN, maps: bool = False
) -> dict[str, list[Figure]]:
    """For each row's name in `ROWS`, a picture of each image: original, what the model saw, and what it made of it.

    That is the reconstruction; where nothing is reconstructed, or with `maps`, two maps of the encoder's features.
    """
    originals, masks = tensors.get("originals"), tensors.get("masks")
    if originals is None or originals.ndim != 4:
        return {}
    if masks is not None and (masks.ndim != 3 or len(masks) < len(originals)):
        return {}
    names = [name for name in ROWS if _belongs(tensors, name)]
    if names == ["originals"]:
        return {}
    if "reconstructions" in names and not maps:
        names = [name for name in names if name not in ("similarity", "components")]
    count = min(most, len(originals))
    return {name: [cell(tensors, name, index) for index in range(count)] for name in names}


def _belongs(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether a row can be drawn: its tensor is there, of the right number of dimensions, with an entry for each image."""
    tensor, images = tensors.get(name), tensors["originals"]
    dimensions = 3 if name in ("masks", "similarity") else 4
    if tensor is None or tensor.ndim != dimensions or len(tensor) < len(images):
        return False
    return name != "reconstructions" or (tensor.shape == images.shape and "masks" in tensors)


def cell(tensors: Mapping[str, Tensor], name: str, index: int) -> Figure:
    """One picture of the table of images."""
    pixels, which = tensors["originals"][index], f"Held-out image {index + 1}"
    if name == "originals":
        return figure(pictures.picture(pixels), f"{which}, original")
    if name == "other_views":
        return figure(pictures.picture(tensors[name][index]), f"{which}, second view")
    if name == "similarity":
        chosen = tensors.get("chosen")
        place = (int(chosen[index, 0]), int(chosen[index, 1])) if chosen is not None else None
        return figure(
            pictures.similarity_image(tensors[name][index], place),
            f"{which}, how much each patch's feature is like that of the framed one",
        )
    if name == "components":
        return figure(
            pictures.picture(tensors[name][index]),
            f"{which}, main components of the patches' features as colours",
        )
    keep = tensors["masks"][index].bool()
    if name == "masks":
        hidden = share(1 - keep.float().mean().item())
        return figure(pictures.overlay(pixels, keep), f"{which} as the model saw it: {hidden} hidden")
    size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
    shown = Mask(keep[None]).upsample(size).keep[0]
    mended = torch.where(shown, pixels.float(), tensors[name][index].float())
    return figure(pictures.picture(mended), f"{which}, hidden part predicted")


def pictures_caption(rows: Collection[str]) -> str:
    """What a reader must know of the rows that are shown."""
    said = ["Held-out images."]
    if "masks" in rows:
        said.append("Grey patches were hidden from the model.")
    if "other_views" in rows:
        said.append("The second view is seen whole.")
    if "reconstructions" in rows:
        said.append(
            "In the reconstruction, only what was hidden is predicted; visible patches are shown as they are."
        )
    if "similarity" in rows:
        said.append(
            "The trained encoder saw the whole image for its features. Blue: a patch's feature points the way of the framed "
            "patch's (cosine 1), pale: it has nothing to do with it (0), orange: the opposite."
        )
    if "components" in rows:
        said.append(
            "Patches of one colour have features that are alike: the first three principal components are red, green and blue."
        )
    return " ".join(said)


def _loss_charts(run: Run) -> list[Figure]:
    names = run.metric_names()
    losses = [name for name in names if _is_loss(name) and not _is_held_out(name)]
    held_out = [name for name in names if _is_loss(name) and _is_held_out(name)]
    total = [name for name in losses if name in ("loss", "total")]
    parts = [name for name in losses if name not in total]
    charts = [_chart(run, [*total, *held_out] or parts, "Loss", wide=True)]
    if total and parts and not _all_equal(run, parts, total):
        charts.append(_chart(run, parts, "Parts of the loss"))
    masked = [name for name in names if name in _MASKED]
    if len(set(_masked_shares(run))) > 1:
        charts.append(_chart(run, masked[:1], "Masked share", percent=True))
    rest = [n for n in names if n not in {*losses, *held_out, *masked} and n not in _UNDRAWN]
    charts += [_chart(run, [name], _words(name)) for name in rest]
    return [chart for chart in charts if chart is not None]


def _masked_shares(run: Run) -> list[float]:
    """The hidden share of each step's masks, to a thousandth."""
    key = next((name for name in run.metric_names() if name in _MASKED), "")
    return [round(value, 3) for value in run.series(key)[1]]


_MASKED = ("masked", "masked_share", "masked_ratio", "removed_ratio", "hidden")
_UNDRAWN = ("seconds", "time", "epoch", "progress", "images", "tokens", "samples")


def _is_loss(name: str) -> bool:
    return "loss" in name or name == "total" or name.startswith(("part.", "part/", "parts."))


def _is_held_out(name: str) -> bool:
    return any(word in name for word in ("held", "valid", "eval"))


def _all_equal(run: Run, parts: Sequence[str], total: Sequence[str]) -> bool:
    """Whether the one part is the whole loss: then it is not drawn twice."""
    return len(parts) == 1 and run.series(parts[0]) == run.series(total[0])


def _chart(
    run: Run, names: Sequence[str], title: str, *, percent: bool = False, wide: bool = False
) -> Figure | None:
    """Lines of metrics by step, or nothing where none has a number."""
    series = {_words(name): run.series(name) for name in names}
    series = {name: line for name, line in series.items() if any(map(math.isfinite, line[1]))}
    if not series:
        return None
    said = []
    for name, (steps, values) in series.items():
        speak = share if percent else say
        good = [(step, value) for step, value in zip(steps, values) if math.isfinite(value)]
        (first, start), (last, end) = good[0], good[-1]
        said.append(f"{name} from {speak(start)} at step {say(first)} to {speak(end)} at step {say(last)}")
    small = pictures.curve(series, percent=percent, size=(4.15, 2.5))
    image = pictures.curve(series, percent=percent) if wide else small
    words = f"{title} by step: {'; '.join(said)}."
    drawn = png_figure(image, words, title=title, wide=wide)
    return attrs.evolve(drawn, narrow=_data_uri(small)) if wide else drawn


# -- prune ---------------------------------------------------------------------------------------------------


def _prune(run: Run) -> dict[str, Any]:
    layers = [layer for layer in run.summary.get("layers") or [] if isinstance(layer, dict)]
    kept = sum(layer.get("kept", 0) for layer in layers)
    total = sum(layer.get("total", 0) for layer in layers)
    removed = run.summary.get("sparsity", 1 - kept / total if total else None)
    asked = _asked(run)
    numbers = _quality(run)
    if is_number(removed):
        label = "weights unchanged" if run.summary.get("prunes") == "difference" else "weights removed"
        numbers.append(Number(label, share(removed, 2), f"asked: {asked}" if asked else ""))
    left = run.summary.get("left")
    for key, name in (("params", "parameters left"), ("flops", "FLOPs left")):
        if isinstance(left, Mapping) and is_number(left.get(key)):
            numbers.append(Number(name, share(left[key], 2), "counted from model/"))
    numbers += _time(run)
    sizes = _sizes(run.summary.get("sizes"))
    charts = [_layer_chart(run, layers), *_training_charts(run)]
    return {
        "numbers": numbers,
        "charts": [chart for chart in charts if chart],
        "corners": corners(run.masks),
        "sizes": sizes,
    }


def _quality(run: Run) -> list[Number]:
    """How good the model was and is, in the measure of its kind."""
    told = run.summary.get("quality")
    if not isinstance(told, Mapping):
        return []
    name, speak = str(told.get("measure", "quality")), share if told.get("measure") == "accuracy" else say
    pairs = [("before", "dense"), ("after", "pruned")]
    return [
        Number(f"{name} {when}", speak(value), what)
        for when, what in pairs
        if is_number(value := told.get(when))
    ]


def _asked(run: Run) -> str:
    """The budget in words."""
    budget = run.summary.get("budget", run.settings.get("budget"))
    if isinstance(budget, Mapping):
        return ", ".join(f"{key} {say(value)}" for key, value in budget.items() if value is not None)
    return "" if budget is None else say(budget)


def _layer_chart(run: Run, layers: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Removed share by layer; by block of layers where there are too many to read."""
    counted = [
        (str(layer.get("name", "")), int(layer["kept"]), int(layer["total"]))
        for layer in layers
        if is_number(layer.get("kept")) and layer.get("total")
    ]
    title = "Removed share by layer"
    if len(counted) > LAYERS_SHOWN:
        title = "Removed share by block"
        sums: dict[str, tuple[int, int]] = {}
        for name, kept, total in counted:
            block = re.match(r".*?\d+", name)
            key = block[0] if block else name
            before = sums.get(key, (0, 0))
            sums[key] = (before[0] + kept, before[1] + total)
        counted = [(name, kept, total) for name, (kept, total) in sums.items()][:LAYERS_SHOWN]
    if not counted:
        return None
    names = [name.removesuffix(".weight") for name, _, _ in counted]
    removed = [1 - kept / total for _, kept, total in counted]
    budget = run.summary.get("budget")
    asked = budget.get("sparsity") if isinstance(budget, Mapping) else None
    line = asked if is_number(asked) else None
    low, high = (
        min(range(len(removed)), key=removed.__getitem__),
        max(range(len(removed)), key=removed.__getitem__),
    )
    alt = (
        f"{title}: least {share(removed[low])} in {names[low]}, most {share(removed[high])} in {names[high]}."
    )
    caption = f"Dashed: the {share(asked)} that was asked." if is_number(asked) else ""
    return figure_of(
        lambda width: pictures.bars(names, removed, reference=line, width=width),
        alt,
        title=title,
        caption=caption,
    )


def _training_charts(run: Run) -> list[Figure]:
    names = [name for name in run.metric_names() if name not in _UNDRAWN]
    losses = [name for name in names if _is_loss(name)]
    charts = [_chart(run, losses, "Loss while the pruner trained", wide=True)]
    charts += [_chart(run, [name], _words(name)) for name in names if name not in losses]
    return [chart for chart in charts if chart is not None]


def corners(masks: Mapping[str, Mask]) -> list[Figure]:
    """The first rows and columns of the first, the middle and the last masks of matrices."""
    matrices = [(name, mask.keep) for name, mask in masks.items() if mask.keep.ndim >= 2]
    chosen = sorted({0, len(matrices) // 3, 2 * len(matrices) // 3, len(matrices) - 1}) if matrices else []
    figures = []
    for index in chosen:
        name, keep = matrices[index]
        corner = keep.flatten(1)[:CORNER, :CORNER]
        size = f"{corner.shape[0]} × {corner.shape[1]}"
        figures.append(
            figure(
                pictures.mask_image(corner, cell=6),
                f"Mask of {name}, first {size} weights: {share(corner.float().mean().item())} kept",
                caption=name.removesuffix(".weight"),
            )
        )
    return figures


def _sizes(sizes: Any) -> list[tuple[str, str, float]]:
    """(what, how large, share of the largest)."""
    if not isinstance(sizes, Mapping):
        return []
    known = {_words(name): value for name, value in sizes.items() if is_number(value) and value > 0}
    most = max(known.values(), default=1)
    return [(name, size(value), value / most) for name, value in known.items()]


# -- sample --------------------------------------------------------------------------------------------------


def _sample(run: Run) -> dict[str, Any]:
    numbers = _headline(
        run,
        ("network calls", ("evaluations",), say, "for the whole batch"),
        ("categorical draws", ("draws", "categorical_draws"), say, ""),
        ("samples", ("samples", "count"), say, ""),
        ("length", ("length",), say, "tokens"),
    )
    numbers += _time(run)
    return {"numbers": numbers, "texts": texts(run), "charts": _loss_charts(run)}


def texts(run: Run) -> list[str]:
    """The samples, their tokens on the colour of when they were written where that is known."""
    from markupsafe import Markup

    texts: list[str] = []  # Markup where the tokens are coloured: reveal escapes them
    for line in run.samples[:SAMPLES_SHOWN]:
        tokens, order = line.get("tokens"), line.get("order")
        if isinstance(tokens, list) and isinstance(order, list) and len(tokens) == len(order):
            texts.append(Markup(pictures.reveal(order, list(map(str, tokens)))))
        else:
            texts.append(str(line.get("text", "")))
    return texts


def _plain(run: Run) -> dict[str, Any]:
    return {"charts": _loss_charts(run)}


# -- words and numbers ---------------------------------------------------------------------------------------


def _headline(run: Run, *wanted: tuple[str, tuple[str, ...], Callable[[Any], str], str]) -> list[Number]:
    """The numbers that the summary has, in the order asked."""
    numbers = []
    for label, keys, speak, note in wanted:
        value = next((run.summary[key] for key in keys if is_number(run.summary.get(key))), None)
        if value is not None:
            numbers.append(Number(label, speak(value), note))
    return numbers


def _time(run: Run) -> list[Number]:
    """How long it took, and for how many steps."""
    seconds, steps = run.summary.get("seconds"), run.summary.get("steps")
    note = f"{say(steps)} steps" if is_number(steps) else ""
    if is_number(seconds):
        return [Number("time", duration(seconds), note)]
    return [Number("steps", say(steps))] if note else []


def say(value: Any) -> str:
    """A value for readers: four significant digits, thousands apart, yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "not finite"
        if value == int(value) and abs(value) < 1e6:
            return f"{int(value):,}"
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(say, value)) or "none"
    return str(value)


def share(value: float, digits: int = 1) -> str:
    """0.75 → 75 %."""
    if not math.isfinite(value):
        return "not finite"
    return f"{round(value * 100, digits):g}\N{NO-BREAK SPACE}%"


def flops(count: float, word: str = "FLOPs") -> str:
    """Operations as one reads them: 2.22 GFLOPs."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if count < 1000 or prefix == "P":
            break
        count /= 1000
    return f"{count:.3g}\N{NO-BREAK SPACE}{prefix}{word}".rstrip()


def duration(seconds: float) -> str:
    """Seconds as one reads them: 32 ms, 1.25 s, 12.3 s, 2 min 05 s, 1 h 03 min."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {left:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes as one reads them: 1.2 MB (10⁶)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"


def _words(name: str) -> str:
    return re.sub(r"[_./]+", " ", name).strip()


def figure(image: Image.Image, alt: str, *, caption: str = "", title: str = "") -> Figure:
    """A picture as a data URI."""
    return png_figure(pictures.png(image), alt, caption=caption, title=title)


def figure_of(draw: Callable[[float], bytes], alt: str, *, title: str, caption: str = "") -> Figure:
    """A chart that `draw(inches)` makes as a PNG, wide for a desk and narrow for a phone."""
    drawn = png_figure(draw(8.5), alt, title=title, caption=caption)
    return attrs.evolve(drawn, narrow=_data_uri(draw(4.15)))


def png_figure(data: bytes, alt: str, *, caption: str = "", title: str = "", wide: bool = True) -> Figure:
    """A PNG as a data URI."""
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    return Figure(_data_uri(data), alt, width, height, caption, title, wide)


def _data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
