"""A run's settings: defaults < RUN.toml < overrides, checked, and written back as a run.toml that repeats the run."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import attrs

from maskwright.errors import BadParameter, BadRunFile, did_you_mean
from maskwright.registry import COMPONENT, Registry, check_fit, components_inside, default
from maskwright.settings import setting
from maskwright.sources import EMBEDDED_IMAGES, EMBEDDED_TEXT

Table = dict[str, Any]


@attrs.frozen
class RunSection:
    """[run]: how long, how fast, how often. None is what the job does not use."""

    job: str = setting("pretrain", "which job this file is of")
    seed: int = setting(0, "everything random follows from it", ge=0)
    steps: int | None = setting(None, "optimiser steps", ge=1, optional=True)
    batch_size: int | None = setting(None, "samples a step, over all processes", ge=1, optional=True)
    lr: float | None = setting(None, "peak learning rate", gt=0, optional=True)
    weight_decay: float | None = setting(None, "AdamW's, on weight matrices", ge=0, optional=True)
    betas: tuple[float, ...] | None = setting(None, "AdamW's two betas", optional=True)
    warmup: float | None = setting(None, "share of the steps with a rising rate", ge=0, le=1, optional=True)
    clip: float | None = setting(None, "gradient norm; 0 clips nothing", ge=0, optional=True)
    log_every: int | None = setting(None, "steps between lines of metrics.jsonl", ge=1, optional=True)
    save_every: int | None = setting(None, "steps between checkpoints", ge=1, optional=True)
    calibration: int | None = setting(
        None, "samples on which a pruner measures a layer's inputs", ge=1, optional=True
    )
    clients: int | None = setting(
        None, "parts of the data, for pruners that need clients", ge=1, optional=True
    )


@attrs.frozen
class ComponentSection:
    """[strategy], [objective], [pruner] or [sampler]: a registered name; every other key is one of its parameters.

    A parameter that is itself a component is a table with a `name`, and a `kind` where that differs from its owner's; or just
    the name, where the owner declares it with `maskwright.component`.
    """

    kind: str
    name: str
    params: Mapping[str, Any] = attrs.field(factory=dict)

    def create(self, registry: Registry | None = None) -> Any:
        """The component. Raises what `Registry.create` raises."""
        registry = registry or default()
        inside = components_inside(registry.component_class(self.kind, self.name))
        kinds = {name: field.metadata[COMPONENT] for name, field in inside.items()}
        params = {key: self._value(value, kinds.get(key), registry) for key, value in self.params.items()}
        return registry.create(self.kind, self.name, **params)

    def _value(self, value: Any, declared: str | None, registry: Registry) -> Any:
        if isinstance(value, str) and declared is not None:
            return ComponentSection(declared, value).create(registry)
        if not (isinstance(value, Mapping) and isinstance(value.get("name"), str)):
            return value
        params = {key: given for key, given in value.items() if key not in ("kind", "name")}
        kind = value.get("kind", declared or self.kind)
        return ComponentSection(kind, value["name"], params).create(registry)


@attrs.frozen
class ModelSection:
    """[model]: a folder that transformers reads, or "default", a small model of the sizes given here."""

    source: str = setting("default", '"default", or a model folder')
    width: int | None = setting(None, "hidden size of the default model", ge=4, optional=True)
    depth: int | None = setting(None, "layers of the default model", ge=1, optional=True)
    heads: int | None = setting(None, "attention heads of the default model", ge=1, optional=True)
    patch_size: int | None = setting(
        None, "pixels a side of the default model's patches", ge=1, optional=True
    )
    stream: bool | None = setting(
        None, "prune a model folder block by block, one in memory at a time", optional=True
    )


@attrs.frozen
class DataSection:
    """[data]: an embedded source by name, or the user's folder or file."""

    source: str = setting(
        "photographs", "photographs, rotated-photographs, digits, standard-library, or a folder or file"
    )
    size: int | None = setting(
        None, "pixels a side; a model folder's own where left out", ge=1, optional=True
    )
    views: str | None = setting(
        None,
        "a second view of each image: another crop, or the other file of a pair; pairs, where left out, if all images are in pairs",
        choices=("crops", "pairs"),
        optional=True,
    )
    length: int | None = setting(None, "tokens a sample", ge=2, optional=True)
    vocabulary: int | None = setting(None, "size of a tokenizer that is made here", ge=32, optional=True)


@attrs.frozen
class RequestSection:
    """[request]: what the sample job is asked for."""

    count: int = setting(4, "texts", ge=1)
    length: int | None = setting(None, "tokens of each", ge=2, optional=True)
    steps: int | None = setting(None, "network calls, where the sampler has a choice", ge=1, optional=True)
    prompt: str = setting("", "text that each begins with")


@attrs.frozen
class PrunableSection:
    """[prunable]: which weights may be pruned, by wildcards on their names; None is the rule of maskwright.toolkit.prunable."""

    include: tuple[str, ...] | None = setting(
        None, "names that may be pruned, such as *.mlp.*", optional=True
    )
    exclude: tuple[str, ...] | None = setting(
        None, "names that stay dense, beside or instead of heads", optional=True
    )
    types: tuple[str, ...] | None = setting(None, "module types: Linear, Conv1D, Conv2d", optional=True)
    remainder: str = setting(
        "refuse",
        "weights whose inputs M of an N:M pattern does not divide",
        choices=("refuse", "skip", "pad"),
    )


@attrs.frozen
class OutputSection:
    """[output]: what a pruning leaves beside model/."""

    export: str = setting(
        "none",
        "another format of the pruned model, in a folder of that name",
        choices=("none", "compressed-tensors", "compressed-tensors-bitmask"),
    )


@attrs.frozen
class Settings:
    """Everything that decides a run. Sections that a job does not have are None."""

    run: RunSection
    model: ModelSection
    data: DataSection
    strategy: ComponentSection | None = None
    objective: ComponentSection | None = None
    pruner: ComponentSection | None = None
    budget: Mapping[str, Any] | None = None
    prunable: PrunableSection | None = None
    experts: Mapping[str, Mapping[str, str]] | None = None
    output: OutputSection | None = None
    sampler: ComponentSection | None = None
    request: RequestSection | None = None

    def as_dict(self) -> dict[str, Table]:
        """Plain tables as they stand in run.toml; what is None is left out."""
        tables: dict[str, Table] = {}
        for field in attrs.fields(Settings):
            section = getattr(self, field.name)
            if isinstance(section, ComponentSection):
                tables[field.name] = {"name": section.name, **section.params}
            elif isinstance(section, Mapping):
                if section:
                    tables[field.name] = dict(section)
            elif section is not None:
                tables[field.name] = attrs.asdict(section, filter=lambda _, value: value is not None)
        return tables

    def toml(self) -> str:
        """The text of run.toml."""
        import tomlkit

        from maskwright import __version__

        document = tomlkit.document()
        document.add(
            tomlkit.comment(f"maskwright {__version__}; repeat with: maskwright {self.run.job} run.toml")
        )
        for name, table in self.as_dict().items():
            document[name] = _plain(table)
        return tomlkit.dumps(document)

    def require(self, section: str) -> Any:
        """A section that this job has."""
        value = getattr(self, section)
        assert value is not None, section
        return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# -- which sections and keys each job has, and their defaults ------------------------------------------------

COMPONENTS = {"strategy": "mask-strategy", "objective": "objective", "pruner": "pruner", "sampler": "sampler"}
"""Sections that name a component, and its kind."""

BUDGETS: Table = {"pattern": "2:4", "sparsity": 0.5, "params": 0.7, "flops": 0.7, "bits": 4.0, "layers": 2}
"""Kinds of budget with an amount that is asked for when nothing is said, the first that the pruner meets."""
_CLASSES: dict[str, type] = {
    "run": RunSection,
    "model": ModelSection,
    "data": DataSection,
    "prunable": PrunableSection,
    "output": OutputSection,
    "request": RequestSection,
}
_TRAINING = tuple(
    field.name for field in attrs.fields(RunSection) if field.name not in ("calibration", "clients")
)
_MADE = tuple(field.name for field in attrs.fields(ModelSection) if field.name != "stream")

JOBS: dict[str, dict[str, tuple[str, ...] | None]] = {
    "pretrain": {"run": _TRAINING, "strategy": None, "objective": None, "model": _MADE, "data": None},
    "prune": {
        "run": ("job", "seed", "batch_size", "calibration", "clients", "log_every", "save_every"),
        "pruner": None,
        "budget": tuple(BUDGETS),
        "prunable": None,
        "experts": None,
        "output": None,
        "model": None,
        "data": None,
    },
    "sample": {"run": ("job", "seed"), "sampler": None, "request": None, "model": _MADE, "data": None},
}
"""Sections of each job, with their legal keys where these are not all that the section has."""

_OPTIMISER: Table = {"weight_decay": 0.05, "betas": [0.9, 0.95], "warmup": 0.1, "clip": 1.0}
_EVERY: Table = {"log_every": 1, "save_every": 100}

DEFAULTS: dict[str, dict[str, Table]] = {
    "pretrain": {"run": {**_OPTIMISER, **_EVERY}, "objective": {"name": "mae"}},
    "prune": {
        "run": {"batch_size": 8, "calibration": 128, **_EVERY},
        "pruner": {"name": "sparsegpt"},
        "data": {"source": "standard-library"},
    },
    "sample": {"sampler": {"name": "first-hitting"}, "data": {"source": "standard-library"}},
}
"""What a job does when nothing is said."""

BY_MODALITY: dict[str, dict[str, Table]] = {
    "image": {
        "run": {"steps": 600, "batch_size": 64, "lr": 1.5e-3},
        "strategy": {"name": "random", "ratio": 0.75},
        "data": {"source": "photographs"},
    },
    "text": {
        "run": {"steps": 1600, "batch_size": 8, "lr": 4e-3},
        "strategy": {"name": "random"},
        "data": {"source": "standard-library", "length": 128},
    },
}
"""What a pretraining does beside that, by what its objective learns from."""

_PHOTOGRAPHS: dict[str, Table] = {"data": {"size": 64}, "model": {"patch_size": 8}}
_DIGITS: dict[str, Table] = {"data": {"size": 8}, "model": {"patch_size": 2}}
"""Sizes of the embedded images, and of anybody's beside the default model."""

_DEFAULT_MODEL: dict[str, Table] = {
    "image": {"width": 128, "depth": 4, "heads": 4},
    "text": {"width": 128, "depth": 4, "heads": 4},
    "conv": {"width": 32, "depth": 2},
}
_SMALL_DECODER: Table = {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4}
"""What an objective's decoder measures beside the default model, where it has these parameters: a paper's own decoder, 512 wide
and 8 deep, would be forty times the encoder."""


# -- resolving -----------------------------------------------------------------------------------------------


def resolve(
    job: str,
    run_file: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    registry: Registry | None = None,
) -> Settings:
    """Defaults < RUN.toml < overrides.

    `overrides` is a nested mapping, `{"strategy": {"ratio": 0.5}}`; dotted keys, `{"strategy.ratio": 0.5}`, mean the same.
    Naming another component drops the parameters that a weaker source gave to the one it replaces.
    Raises `BadRunFile` for a file that is no TOML, an unknown section or key, or a value of the wrong type, and
    `UnknownComponent` for an objective that is not registered.
    """
    if job not in JOBS:
        raise BadRunFile(f"There is no job {job!r}.{did_you_mean(job, JOBS)} Jobs are {', '.join(JOBS)}.")
    registry = registry or default()
    sources = [("the settings given", nested(overrides or {}))]
    if run_file is not None:
        sources.insert(0, (str(run_file), _read(Path(run_file))))
    given: dict[str, Table] = {}
    for origin, tables in sources:
        run = tables.get("run")
        stated = run.get("job", job) if isinstance(run, Mapping) else job
        if isinstance(stated, str) and stated != job:
            advice = f"use `maskwright {stated}`." if stated in JOBS else f"jobs are {', '.join(JOBS)}."
            raise BadRunFile(f"{origin}: this is of the job {stated!r}, not {job!r}; {advice}")
        _check(job, tables, origin)
        given = _merge(given, tables)
    tables = _merge(_defaults(job, given, registry), given)
    tables = _merge(tables, {"run": {"job": job}})
    return _build(job, tables)


def _defaults(job: str, given: dict[str, Table], registry: Registry) -> dict[str, Table]:
    tables = DEFAULTS[job]
    modality = "text"
    if job == "pretrain":
        name = str({**tables["objective"], **given.get("objective", {})}["name"])
        info = registry.info(name, "objective")
        modality = "text" if "text" in info.modalities else "image"
        tables = _merge(tables, BY_MODALITY[modality])
        suited = None
        if "name" not in given.get("strategy", {}):
            suited = _suited_strategy(name, given.get("objective", {}), registry)
        if suited is not None:
            tables = _merge(
                tables, {"strategy": {"name": suited} if isinstance(suited, str) else dict(suited)}
            )
    named = str({**tables.get("pruner", {}), **given.get("pruner", {})}.get("name", ""))
    if job == "prune" and not given.get("budget"):
        met = registry.info(named, "pruner").budgets
        kind = next((kind for kind in BUDGETS if kind in met), None)
        tables = _merge(tables, {"budget": {kind: BUDGETS[kind]}} if kind else {})
    if given.get("model", {}).get("source", "default") != "default":
        return tables
    if job == "prune":
        # A paper's search over a model of billions of weights would take hours beside the embedded one's minute of training.
        small = getattr(registry.component_class("pruner", named), "small_parameters", {})
        tables = _merge(tables, {"pruner": {"name": named, **small}})
    if modality == "text":
        return _merge(tables, {"model": _DEFAULT_MODEL["text"]})
    if info.backbone == "conv":
        return _merge(tables, {"model": _DEFAULT_MODEL["conv"], "data": {"size": 64}})
    source = given.get("data", {}).get("source", tables["data"]["source"])
    tables = _merge(tables, {"model": _DEFAULT_MODEL["image"]})
    tables = _merge(tables, _DIGITS if source == "digits" else _PHOTOGRAPHS)
    return _merge(tables, {"objective": _small_decoders(name, given.get("objective", {}), registry)})


def _suited_strategy(
    name: str, given: Mapping[str, Any], registry: Registry
) -> str | Mapping[str, Any] | None:
    """The strategy that an objective brings, or else an objective inside it."""
    own: str | Mapping[str, Any] | None = getattr(
        registry.component_class("objective", name), "default_strategy", None
    )
    theirs = (_suited_strategy(inner, table, registry) for _, inner, table in _inside(name, given, registry))
    return own if own is not None else next((one for one in theirs if one is not None), None)


def _small_decoders(name: str, given: Mapping[str, Any], registry: Registry) -> Table:
    """The objective's table with the small decoder, where it has these parameters; so for the objectives inside it."""
    parameters = {parameter.name for parameter in registry.info(name, "objective").parameters}
    table: Table = {
        "name": name,
        **{key: value for key, value in _SMALL_DECODER.items() if key in parameters},
    }
    for parameter, inner, inside in _inside(name, given, registry):
        table[parameter] = _small_decoders(inner, inside, registry)
    return table


def _inside(
    name: str, given: Mapping[str, Any], registry: Registry
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """The objectives inside an objective: the parameter, the name, and what is given of its own parameters."""
    for parameter, field in components_inside(registry.component_class("objective", name)).items():
        value = given.get(parameter, field.default)
        table = {"name": value} if isinstance(value, str) else value
        if field.metadata[COMPONENT] == "objective" and isinstance(table, Mapping):
            # A table without a name says something of the default.
            inner = table.get("name", field.default)
            if isinstance(inner, str):
                yield parameter, inner, table


def check(settings: Settings, registry: Registry | None = None) -> None:
    """Make every component and the budget once, so that a mistake is found before anything is written or trained.

    Raises what `Registry.create` raises, `MissingSignal` for a strategy and an objective that do not fit, `BadBudget`.
    """
    registry = registry or default()
    made = {
        name: section.create(registry)
        for name in COMPONENTS
        if (section := getattr(settings, name)) is not None
    }
    if "strategy" in made and "objective" in made:
        check_fit(made["strategy"], made["objective"], catalogue=registry)
    if settings.budget:
        from maskwright.protocols import Budget

        Budget(**settings.budget)


def nested(overrides: Mapping[str, Any]) -> dict[str, Table]:
    """`{"strategy.ratio": 0.5}` → `{"strategy": {"ratio": 0.5}}`; what is nested already stays so."""
    tables: Table = {}
    for key, value in overrides.items():
        first, dot, rest = key.partition(".")
        piece = nested({rest: value}) if dot else value
        tables[first] = _deep(tables.get(first), piece)
    return tables


def _deep(old: Any, new: Any) -> Any:
    """Two values of one key: tables are merged all the way down, of anything else the later one counts.

    A table that names another component takes nothing from the one it replaces; a text that names the same one leaves it.
    """
    if not isinstance(new, Mapping):
        return old if isinstance(old, Mapping) and isinstance(new, str) and old.get("name") == new else new
    merged = dict(old) if isinstance(old, Mapping) else {}
    if "name" in merged and new.get("name", merged["name"]) != merged["name"]:
        merged = {}
    for key, value in new.items():
        merged[key] = _deep(merged.get(key), value)
    return merged


def leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested tables by their dotted names: `("strategy.ratio", 0.5)`; the inverse of `nested`."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _read(path: Path) -> dict[str, Table]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadRunFile(f"The run file {path} does not exist.") from None
    except OSError as error:
        raise BadRunFile(f"The run file {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise BadRunFile(f"The run file {path} is no UTF-8 text.") from None
    except tomllib.TOMLDecodeError as error:
        raise BadRunFile(f"The run file {path} is no valid TOML: {error}.") from None


def _merge(weak: Mapping[str, Table], strong: Mapping[str, Table]) -> dict[str, Table]:
    merged = {name: dict(table) for name, table in weak.items()}
    for name, table in strong.items():
        merged[name] = dict(table) if name == "budget" and table else _deep(merged.get(name), table)
    return merged


def _check(job: str, tables: Mapping[str, Any], origin: str) -> None:
    sections = JOBS[job]
    for name, table in tables.items():
        if name not in sections:
            others = [other for other in JOBS if name in JOBS[other]]
            elsewhere = f" It is a section of {' and '.join(others)}." if others else ""
            raise BadRunFile(
                f"{origin}: {job} has no section [{name}].{elsewhere or did_you_mean(name, sections)} "
                f"Legal: {', '.join(sections)}."
            )
        if not isinstance(table, Mapping):
            raise BadRunFile(
                f"{origin}: [{name}] must be a table such as [{name}] or {name}.key = …, not {table!r}."
            )
        if name in COMPONENTS:
            if not isinstance(table.get("name", ""), str):
                raise BadRunFile(f"{origin}, [{name}]: name must be a text, not {table['name']!r}.")
            continue
        if name == "experts":
            _check_experts(table, origin)
            continue
        legal = sections[name] or tuple(field.name for field in attrs.fields(_CLASSES[name]))
        for key, value in table.items():
            if key not in legal:
                raise BadRunFile(
                    f"{origin}, [{name}]: unknown key {key!r}.{did_you_mean(key, legal)} Legal: {', '.join(legal)}."
                )
            if name in _CLASSES:
                _check_type(f"{origin}, [{name}]: {key}", getattr(attrs.fields(_CLASSES[name]), key), value)
    if len(tables.get("budget", {})) > 1:
        raise BadRunFile(
            f"{origin}, [budget]: give exactly one of {', '.join(BUDGETS)}, not {', '.join(tables['budget'])}."
        )


def _check_experts(table: Mapping[str, Any], origin: str) -> None:
    for name, entry in table.items():
        fine = isinstance(entry, Mapping) and "model" in entry and set(entry) <= {"model", "data"}
        if not fine or not all(isinstance(value, str) for value in entry.values()):
            raise BadRunFile(
                f"{origin}, [experts]: {name} must have a `model`, a folder, and may have `data`, not {entry!r}."
            )


_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a text"),
    "bool": ((bool,), "true or false"),
    "tuple[float, ...]": ((list, tuple), "a list of numbers"),
    "tuple[str, ...]": ((list, tuple), "a list of texts"),
}


def _check_type(where: str, field: attrs.Attribute[Any], value: Any) -> None:
    kinds, words = _TYPES[str(field.type).removesuffix(" | None")]
    inside: type | UnionType = str if "str" in str(field.type) else int | float
    listed = not isinstance(value, list | tuple) or all(
        isinstance(item, inside) and not isinstance(item, bool) for item in value
    )
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds) or not listed:
        raise BadRunFile(f"{where} must be {words}, not {value!r}.")


def _build(job: str, tables: dict[str, Table]) -> Settings:
    sections: dict[str, Any] = {}
    for name in JOBS[job]:
        table = tables.get(name, {})
        if name in COMPONENTS:
            params = {key: value for key, value in table.items() if key != "name"}
            if "name" not in table:
                raise BadRunFile(f"[{name}] needs a name.")
            sections[name] = ComponentSection(COMPONENTS[name], table["name"], params)
        elif name in _CLASSES:
            try:
                sections[name] = _CLASSES[name](**table)
            except BadParameter as error:
                raise BadRunFile(
                    f"[{name}] {str(error).removeprefix(_CLASSES[name].__name__ + ': ')}"
                ) from None
        elif name == "experts":
            sections[name] = {
                expert: {key: _absolute(value) for key, value in entry.items()}
                for expert, entry in table.items()
            }
        else:
            sections[name] = dict(table)
    settings = Settings(**sections)
    model = settings.model
    sizes = [key for key in ("width", "depth", "heads", "patch_size") if getattr(model, key) is not None]
    if model.source != "default" and sizes:
        raise BadRunFile(
            f"[model] {', '.join(sizes)}: a model folder has its own sizes; they are for the default model."
        )
    if model.width is not None and model.heads is not None and model.width % (2 * model.heads):
        raise BadRunFile(
            f"[model] width={model.width} must be a multiple of 2 × heads = {2 * model.heads}, so that every head "
            "has an even number of channels."
        )
    betas = settings.run.betas
    if betas is not None and not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise BadRunFile(f"[run] betas={list(betas)} must be two numbers in [0, 1).")
    return attrs.evolve(
        settings,
        run=attrs.evolve(settings.run, betas=None if betas is None else tuple(betas)),
        model=attrs.evolve(model, source=_absolute(model.source)),
        data=attrs.evolve(settings.data, source=_absolute(settings.data.source)),
    )


def _absolute(source: str) -> str:
    """A path from the root, so that run.toml repeats the run from any folder; names of embedded things stay."""
    is_path = (
        os.sep in source or source.startswith((".", "~")) or source.endswith(".tar") or Path(source).exists()
    )
    embedded = source in ("default", *EMBEDDED_IMAGES, *EMBEDDED_TEXT)
    return str(Path(source).expanduser().resolve()) if is_path and not embedded else source
