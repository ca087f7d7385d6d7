"""The registry: what exists (read from registry.toml files, importing nothing), and how a component is made.

A catalogue is a registry.toml. The built-in one lies beside the package, a third-party distribution ships its own next to
the module that its `maskwright` entry point names, and a user may name more files. A plugin's module is imported when one
of its components is first created, registered with pluggy, and its `maskwright_components` hook is read.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import threading
import tomllib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, overload

import attrs
import pluggy

from maskwright import hookspecs
from maskwright.errors import (
    BadParameter,
    CountsMismatch,
    MaskwrightError,
    MissingColumn,
    MissingSignal,
    NameConflict,
    OverlappingMasks,
    PluginLoadError,
    RegistryFileError,
    UnknownComponent,
    did_you_mean,
    nearest,
)

if TYPE_CHECKING:
    from maskwright.protocols import MaskStrategy, Objective, Pruner, Sampler

Location: TypeAlias = str | os.PathLike[str]

KINDS = ("mask-strategy", "objective", "pruner", "sampler")
BUILT_IN = "maskwright"

METHODS = {"mask-strategy": "draw", "objective": "bind", "pruner": "prune", "sampler": "sample"}
"""What a component of each kind is called with."""

COUNTS = {"mask-strategy": ("exact", "bounded"), "objective": ("any", "exact")}
"""The words that `counts` may be, the default first: what a strategy keeps in each row, and what an objective takes.

"exact" is an equal number of visible positions in every row of a draw.
"""

_PLUGIN_KEYS = frozenset({"module", "title", "paper", "code", "family", "extras", "components"})
_COMPONENT_KEYS = frozenset(
    {
        "kind",
        "name",
        "modalities",
        "summary",
        "needs",
        "provides",
        "counts",
        "exact_with",
        "backbone",
        "domain",
        "budgets",
        "disjoint_rows",
        "exempt",
        "parameters",
    }
)
_PARAMETER_KEYS = frozenset({"name", "type", "default", "range", "help"})


@attrs.frozen
class Parameter:
    """One hyper-parameter as the catalogue describes it; `default` is its Python spelling, empty when required."""

    name: str
    type: str = ""
    default: str = ""
    range: str = ""
    help: str = ""


@attrs.frozen
class PluginInfo:
    """One plugin as its catalogue describes it."""

    slug: str
    module: str
    title: str = ""
    paper: str = ""
    code: str = ""
    family: str = ""
    """A word by which plugins are grouped, such as "images" or "pruning"."""
    extras: tuple[str, ...] = ()
    distribution: str = BUILT_IN
    """The distribution that ships it; for a user's file the path of that file."""
    version: str = ""
    source: str = "built-in"
    """"built-in", "third-party", "file" or "program"."""
    folder: Path | None = None
    """Where a relative module path starts, or where the module lies."""
    described: bool = True
    error: str = ""
    """Why it cannot be used, where that is known without importing it."""

    @property
    def key(self) -> tuple[str, str]:
        """(distribution, slug), by which it is known in one registry."""
        return self.distribution, self.slug

    @property
    def owner(self) -> str:
        """What stands before the slash in the qualified names of its components."""
        return self.distribution if self.source in ("built-in", "third-party") else self.slug

    @property
    def paper_url(self) -> str:
        """Where the paper is, from "arXiv:2407.13036", a DOI or an address; empty for anything else."""
        paper = self.paper.strip()
        if arxiv := re.fullmatch(r"(?:arxiv:)?(\d{4}\.\d{4,5})(v\d+)?", paper, re.IGNORECASE):
            return f"https://arxiv.org/abs/{arxiv[1]}"
        if doi := re.fullmatch(r"(?:doi:|https?://doi\.org/)?(10\.\S+)", paper, re.IGNORECASE):
            return f"https://doi.org/{doi[1]}"
        return paper if paper.startswith(("https://", "http://")) else ""

    @property
    def origin(self) -> str:
        """Distribution and version, for people to read."""
        return f"{self.distribution} {self.version}".strip()


@attrs.frozen
class ComponentInfo:
    """One component as its catalogue describes it."""

    kind: str
    name: str
    plugin: PluginInfo
    modalities: frozenset[str] = frozenset()
    summary: str = ""
    needs: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()
    counts: str = ""
    """A word of `COUNTS`, with the default parameters; empty for the kind's default."""
    exact_with: Mapping[str, str] = attrs.field(factory=dict)
    """Parameters, as Python spells them, with which a strategy of bounded counts keeps equal ones."""
    backbone: str = ""
    domain: str = ""
    budgets: frozenset[str] = frozenset()
    disjoint_rows: int = 1
    exempt: Mapping[str, str] = attrs.field(factory=dict)
    parameters: tuple[Parameter, ...] = ()

    @property
    def qualified(self) -> str:
        """`distribution/name`, which is never ambiguous between distributions; `plugin/name` for a user's own file."""
        return f"{self.plugin.owner}/{self.name}"

    @property
    def exact_parameters(self) -> str:
        """What a strategy of bounded counts must be given to keep equal ones, such as "exact=True"; or nothing."""
        return ", ".join(f"{name}={value}" for name, value in self.exact_with.items())


class Registry:
    """Every component that can be created, by kind and name. Instances are independent of each other and thread-safe.

    `files` are more registry.toml files (never read implicitly from the working directory); `third_party=False` and
    `disabled` (slugs, distributions or entry point names) switch plugins off before any import.
    """

    def __init__(
        self,
        *,
        files: Iterable[str | os.PathLike[str]] = (),
        third_party: bool = True,
        built_in: bool = True,
        disabled: Iterable[str] = (),
    ) -> None:
        self.files = tuple(Path(file).expanduser().absolute() for file in files)
        self.third_party = third_party
        self.built_in = built_in
        self.disabled = frozenset(map(_normal, disabled))
        self._lock = threading.RLock()
        self._turns: dict[tuple[str, str], threading.RLock] = {}
        self._plugins: dict[tuple[str, str], PluginInfo] = {}
        self._components: dict[str, dict[str, list[ComponentInfo]]] = {kind: {} for kind in KINDS}
        self._switched_off: list[ComponentInfo] = []
        self._classes: dict[tuple[str, str, str, str], type] = {}
        self._failed: dict[tuple[str, str], str] = {}
        self._loaded: dict[tuple[str, str], tuple[type, ...]] = {}
        self._read = False
        self.host = pluggy.PluginManager("maskwright")
        self.host.add_hookspecs(hookspecs)

    @classmethod
    def from_files(cls, *files: str | os.PathLike[str]) -> Registry:
        """The built-in and installed plugins, and those of these registry.toml files."""
        return cls(files=files)

    @classmethod
    def from_environment(
        cls, *, files: Iterable[str | os.PathLike[str]] = (), third_party: bool = True
    ) -> Registry:
        """As the command line sees it: MASKWRIGHT_REGISTRY (paths) and MASKWRIGHT_DISABLE_PLUGINS (a,b) are heeded."""
        named = [path for path in os.environ.get("MASKWRIGHT_REGISTRY", "").split(os.pathsep) if path]
        switched_off = [name.strip() for name in os.environ.get("MASKWRIGHT_DISABLE_PLUGINS", "").split(",")]
        return cls(files=[*files, *named], third_party=third_party, disabled=filter(None, switched_off))

    # -- looking up ----------------------------------------------------------------------------------------

    def plugins(self) -> list[PluginInfo]:
        """Every plugin, the built-in ones first. `error` says why one cannot be used, as far as that is known."""
        with self._reading():
            return [
                attrs.evolve(plugin, error=self._failed[key])
                if key in self._failed and not plugin.error
                else plugin
                for key, plugin in self._plugins.items()
            ]

    def plugin(self, name: str) -> PluginInfo:
        """One plugin by its slug, its distribution or `distribution/slug`; a built-in one before any other.

        Hyphens and underscores are the same. Raises `UnknownComponent` with the nearest names.
        """
        every = sorted(self.plugins(), key=lambda plugin: plugin.source != "built-in")
        wanted = _normal(name)
        for one in every:
            if wanted in (_normal(one.slug), _normal(f"{one.owner}/{one.slug}")):
                return one
        for one in every:
            if one.source == "third-party" and wanted == _normal(one.distribution):
                return one
        known = [word for one in every for word in (one.slug, one.owner)]
        raise UnknownComponent(
            f"There is no plugin {name!r}.{did_you_mean(name, dict.fromkeys(known))} "
            "`maskwright list --long` shows them all."
        )

    def names(self, kind: str | None = None, pattern: str = "*") -> list[str]:
        """Sorted component names, of one kind or of all; `pattern` takes wildcards (`"*mae*"`)."""
        return sorted({info.name for info in self.find(kind=kind, name=pattern)})

    def find(
        self,
        *,
        kind: str | None = None,
        name: str | None = None,
        modality: str | None = None,
        needs: str | None = None,
        provides: str | None = None,
        plugin: str | None = None,
    ) -> list[ComponentInfo]:
        """The components that match every word given, sorted by kind and name.

        `name` takes wildcards (`"*mae*"`); `plugin` is a slug or a distribution. Nothing is imported.
        """
        kinds = KINDS if kind is None else (self._known_kind(kind),)
        with self._reading():
            every = [
                info
                for one in kinds
                for known in sorted(self._components[one])
                for info in self._components[one][known]
            ]
        wanted = _normal(plugin or "")
        return [
            info
            for info in every
            if (name is None or fnmatchcase(info.name, name))
            and (modality is None or modality in info.modalities)
            and (needs is None or needs in info.needs)
            and (provides is None or provides in info.provides)
            and (plugin is None or wanted in (_normal(info.plugin.slug), _normal(info.plugin.distribution)))
        ]

    def info(self, name: str, kind: str | None = None) -> ComponentInfo:
        """What the catalogue says of a component; nothing is imported. A name of several kinds needs `kind`."""
        kinds = KINDS if kind is None else (self._known_kind(kind),)
        with self._reading():
            found = [info for one in kinds if (info := self._resolve(one, name)) is not None]
        if not found:
            raise self._unknown(name, kind)
        if len(found) > 1:
            several = " and ".join(_a(info.kind) for info in found)
            raise NameConflict(f"{name!r} is {several}; say which kind is meant.")
        return found[0]

    def address(self, info: ComponentInfo) -> str:
        """The shortest name that means this component: its own, or the qualified one where another has it too."""
        with self._reading():
            try:
                meant = self._resolve(info.kind, info.name)
                return info.name if meant is info or meant == info else info.qualified
            except NameConflict:
                return info.qualified

    def conflicts(self) -> list[list[ComponentInfo]]:
        """The components that share kind and name, one list for each such name."""
        with self._reading():
            return [
                list(claims)
                for names in self._components.values()
                for _, claims in sorted(names.items())
                if len(claims) > 1
            ]

    def _resolve(self, kind: str, name: str) -> ComponentInfo | None:
        owner, slash, bare = name.rpartition("/")
        claims = self._components[kind].get(bare, ())
        if slash:
            mine = [info for info in claims if owner == info.plugin.owner]
            mine = mine or [info for info in claims if owner in info.plugin.key]
            if len(mine) > 1:
                asks = " or ".join(repr(f"{info.plugin.slug}/{bare}") for info in mine)
                raise NameConflict(f"{owner} offers the {kind} {bare!r} more than once; ask for {asks}.")
            return mine[0] if mine else None
        built_in = [info for info in claims if info.plugin.source == "built-in"]
        if built_in:
            return built_in[0]
        if len(claims) > 1:
            both = " and ".join(info.plugin.distribution for info in claims)
            asks = " or ".join(repr(info.qualified) for info in claims)
            raise NameConflict(f"The {kind} {name!r} is claimed by {both}; ask for {asks}.")
        return claims[0] if claims else None

    def _unknown(self, name: str, kind: str | None) -> UnknownComponent:
        what = kind or "component"
        bare = name.rpartition("/")[2]
        elsewhere = [info for info in self.find(name=bare) if name in (info.name, info.qualified)]
        if elsewhere and kind is not None:
            return UnknownComponent(f"{name!r} is no {kind}; it is {_a(elsewhere[0].kind)}.")
        off = [
            info.plugin.slug for info in self._switched_off if info.name == bare and kind in (None, info.kind)
        ]
        if off:
            return UnknownComponent(
                f"The {what} {name!r} belongs to the plugin {off[0]!r}, which is switched off "
                "(MASKWRIGHT_DISABLE_PLUGINS, or `disabled`)."
            )
        known = self.names(kind)
        meant = did_you_mean(name, known)
        if "/" in name:  # another owner of the name, or another name of the owner
            close = [
                info.qualified for near in nearest(bare, known) for info in self.find(kind=kind, name=near)
            ]
            meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        if not known:
            said = f"There is no {what} {name!r}: no plugin offers any."
        else:
            said = f"There is no {what} {name!r}.{meant} `maskwright list` shows all {len(known)}."
        plugins = self.plugins()
        if broken := [plugin.slug for plugin in plugins if plugin.error]:
            said += f" Some plugins cannot be used ({', '.join(broken)}): see `maskwright doctor`."
        if closed := [
            p.module for p in plugins if not p.described and p.source == "third-party" and not p.error
        ]:
            said += f" What {', '.join(closed)} offers is not described: `maskwright describe {closed[0]}` imports it."
        return UnknownComponent(said)

    @staticmethod
    def _known_kind(kind: str) -> str:
        if kind not in KINDS:
            raise UnknownComponent(
                f"There is no kind {kind!r}.{did_you_mean(kind, KINDS)} Kinds are {', '.join(KINDS)}."
            )
        return kind

    # -- making --------------------------------------------------------------------------------------------

    @overload
    def create(self, kind: Literal["mask-strategy"], name: str, **params: Any) -> MaskStrategy: ...
    @overload
    def create(self, kind: Literal["objective"], name: str, **params: Any) -> Objective: ...
    @overload
    def create(self, kind: Literal["pruner"], name: str, **params: Any) -> Pruner: ...
    @overload
    def create(self, kind: Literal["sampler"], name: str, **params: Any) -> Sampler: ...
    @overload
    def create(self, kind: str, name: str, **params: Any) -> Any: ...

    def create(self, kind: str, name: str, **params: Any) -> Any:
        """A component with these hyper-parameters; its plugin is imported if it is not yet.

        Raises `UnknownComponent` with the nearest names, `NameConflict`, `BadParameter` with the legal ones, or
        `PluginLoadError` with the cause chained.
        """
        component = self.component_class(kind, name)
        try:
            return component(**params)
        except MaskwrightError:
            raise
        except (TypeError, ValueError) as error:
            self._check_parameters(component, params)
            raise BadParameter(f"{name}: {error}") from error

    def component_class(self, kind: str, name: str) -> type:
        """The class behind a name. Its plugin is imported if it is not yet."""
        try:
            info = self.info(name, kind)
        except UnknownComponent:
            if not self._import_undescribed():
                raise
            info = self.info(name, kind)
        key = (*info.plugin.key, info.kind, info.name)
        found = self._classes.get(key)
        if found is None:
            self.load(info.plugin)
            found = self._classes.get(key)
        if found is None:
            raise PluginLoadError(
                f"Plugin {info.plugin.slug!r} describes the {kind} {info.name!r} in its registry.toml but does not register "
                f"it; `maskwright describe {info.plugin.module}` prints the table that would be right."
            )
        return found

    @staticmethod
    def _check_parameters(component: type, params: Mapping[str, Any]) -> None:
        fields = [field for field in attrs.fields(component) if field.init] if attrs.has(component) else []
        legal = [field.alias for field in fields]
        name = getattr(component, "name", component.__name__)
        for given in params:
            if given not in legal:
                raise BadParameter(
                    f"{name} has no parameter {given!r}.{did_you_mean(given, legal)} "
                    f"Legal: {', '.join(legal) or 'none'}."
                ) from None
        missing = [
            field.alias for field in fields if field.default is attrs.NOTHING and field.alias not in params
        ]
        if missing:
            raise BadParameter(f"{name} needs the parameter {', '.join(map(repr, missing))}.") from None

    def load(self, plugin: PluginInfo) -> list[type]:
        """Import a plugin and read its hooks; its component classes. A second call returns the same.

        The import runs without a lock of this registry, so that a plugin may itself look things up. After a failure the next
        call tries again.
        """
        key = plugin.key
        if key not in self._loaded:
            where = f"Plugin {plugin.slug!r} of {plugin.distribution}"
            try:
                self._load(plugin, where)
            except PluginLoadError as error:
                self._failed[key] = str(error)
                raise
            self._failed.pop(key, None)
        return list(self._loaded[key])

    def _load(self, plugin: PluginInfo, where: str) -> None:
        if plugin.error:
            raise PluginLoadError(f"{where} cannot be used: {plugin.error}")
        if plugin.key in self._failed:
            importlib.invalidate_caches()
        try:
            module = self._import(plugin)
        except (Exception, SystemExit) as error:
            raise PluginLoadError(
                f"{where} could not be imported: {type(error).__name__}: {error}. {self._advice(plugin, error)}"
            ) from error
        with self._lock:
            turn = self._turns.setdefault(plugin.key, threading.RLock())
        with turn:
            if plugin.key not in self._loaded:
                self._register(plugin, module, where)

    def _register(self, plugin: PluginInfo, module: Any, where: str) -> None:
        """Read the hooks of an imported plugin; all of its components are taken, or none."""
        known = self.host.is_registered(module)
        try:
            if not known:
                self.host.register(module)
            hooks = self.host.get_hookcallers(module) or []
            offered = [
                component
                for caller in hooks
                if caller.name == "maskwright_components"
                for implementation in caller.get_hookimpls()
                if implementation.plugin is module
                for component in cast(Iterable[type], implementation.function())
            ]
            if not any(caller.spec for caller in hooks):
                raise PluginLoadError(
                    f"{where} registers nothing: {plugin.module} has no `maskwright_components` hook "
                    "(a function of that name with @maskwright.hookimpl)."
                )
            for component in offered:
                if complaint := _complaint(component):
                    raise PluginLoadError(f"{where} registers {component!r}: {complaint}")
        except (Exception, SystemExit) as error:
            if not known and self.host.is_registered(module):
                self.host.unregister(module)
            if isinstance(error, PluginLoadError):
                raise
            raise PluginLoadError(f"{where} failed in its hook: {type(error).__name__}: {error}.") from error
        with self._lock:
            for component in offered:
                self._adopt(plugin, component)
            self._loaded[plugin.key] = tuple(offered)

    def module(self, plugin: PluginInfo) -> Any:
        """The plugin's module, imported without reading its components: an observer need not have any."""
        return self._import(plugin)

    @staticmethod
    def _advice(plugin: PluginInfo, error: BaseException) -> str:
        if isinstance(error, ModuleNotFoundError):
            if plugin.extras:
                return (
                    f"Install what it needs: pip install '{plugin.distribution}[{','.join(plugin.extras)}]'."
                )
            if plugin.source == "file":
                return "A file beside the registry.toml is named by its path, such as './my_mask.py'."
        if plugin.source == "third-party" and plugin.folder is not None and not plugin.folder.is_dir():
            return "Its files are gone: it was uninstalled meanwhile."
        return f"`maskwright doctor {plugin.slug}` shows where."

    @staticmethod
    def _import(plugin: PluginInfo) -> Any:
        if not is_path(plugin.module):
            return importlib.import_module(plugin.module)
        path = ((plugin.folder or Path()) / plugin.module).resolve()
        name = f"maskwright_file_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
        inside = [str(path)] if path.is_dir() else None
        file = path / "__init__.py" if inside else path
        with _FILES:  # a module in the making must not be seen by another thread
            if name in sys.modules:
                return sys.modules[name]
            spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)
            if spec is None or spec.loader is None or not file.is_file():
                raise FileNotFoundError(f"{file} does not exist")
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
            return module

    def _adopt(self, plugin: PluginInfo, component: Any) -> None:
        kind, name = component.kind, component.name
        self._classes[(*plugin.key, kind, name)] = component
        claims = self._components[kind].setdefault(name, [])
        mine = (plugin.distribution, plugin.module)
        if not any((info.plugin.distribution, info.plugin.module) == mine for info in claims):
            claims.append(describe_component(component, plugin))

    # -- registering from a program ------------------------------------------------------------------------

    @overload
    def register(self, component: type, *, replace: bool = False) -> type: ...
    @overload
    def register(self, component: None = None, *, replace: bool = False) -> Callable[[type], type]: ...

    def register(self, component: type | None = None, *, replace: bool = False) -> Any:
        """Add a component class, for notebooks; also a decorator. A name that is taken needs `replace=True`."""
        if component is None:
            return lambda given: self.register(given, replace=replace)
        if complaint := _complaint(component):
            raise BadParameter(f"{component!r} cannot be registered: {complaint}")
        kind, name = component.kind, component.name  # type: ignore[attr-defined]
        plugin = PluginInfo(
            slug="program",
            module=component.__module__,
            distribution="program",
            source="program",
            described=False,
        )
        with self._reading():
            claims = self._components[kind].get(name, [])
            if claims and not replace:
                raise NameConflict(
                    f"The {kind} {name!r} is already registered by {claims[0].plugin.distribution}; "
                    "choose another name, or register(..., replace=True)."
                )
            self._components[kind][name] = []
            self._plugins.setdefault(plugin.key, plugin)
            self._loaded[plugin.key] = (*self._loaded.get(plugin.key, ()), component)
            self._adopt(self._plugins[plugin.key], component)
        return component

    # -- reading catalogues --------------------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Hold the lock, with the catalogues read. Nothing that imports or calls a plugin runs in here."""
        with self._lock:
            if not self._read:
                self._admit(list(self._catalogues()))
                self._read = True
            yield

    def _catalogues(self) -> Iterator[Entry]:
        if self.built_in:
            from maskwright import __version__

            path = built_in_catalogue()
            yield from read_catalogue(
                path, PluginInfo(slug="", module="", version=__version__, folder=path.parent)
            )
        for file in self.files:
            origin = PluginInfo(slug="", module="", distribution=str(file), source="file", folder=file.parent)
            yield from read_catalogue(file, origin)
        for name, entries in third_party_catalogues() if self.third_party else ():
            if self.disabled and _normal(name) in self.disabled:
                self._switched_off.extend(info for _, components in entries for info in components)
            else:
                yield from entries

    def _admit(self, entries: Iterable[Entry]) -> None:
        for plugin, components in entries:
            if self.disabled and {_normal(plugin.slug), _normal(plugin.distribution)} & self.disabled:
                self._switched_off.extend(components)
                continue
            self._plugins[plugin.key] = plugin
            for info in components:
                self._components[info.kind].setdefault(info.name, []).append(info)

    def _import_undescribed(self) -> bool:
        """Import the plugins without a registry.toml, whose components are known in no other way; whether any came in."""
        grew = False
        for plugin in self.plugins():
            if (
                plugin.described
                or plugin.source != "third-party"
                or plugin.error
                or plugin.key in self._loaded
            ):
                continue
            with suppress(PluginLoadError):
                self.load(plugin)
                grew = True
        return grew


Entry: TypeAlias = "tuple[PluginInfo, list[ComponentInfo]]"

_FILES = threading.RLock()


def _complaint(component: Any) -> str:
    """What keeps a class from being a component, or nothing."""
    kind, name = getattr(component, "kind", None), getattr(component, "name", None)
    if not isinstance(component, type):
        return "a component is a class."
    if kind not in KINDS or not isinstance(name, str) or not is_kebab(name):
        return f"its `kind` must be one of {', '.join(KINDS)} and its `name` kebab-case; they are {kind!r} and {name!r}."
    if not callable(getattr(component, METHODS[kind], None)):
        return f"{_a(kind)} has a method `{METHODS[kind]}`."
    counts = getattr(component, "counts", "")
    if isinstance(counts, str) and counts and counts not in COUNTS.get(kind, ()):
        return f"`counts` of {_a(kind)} may be {' or '.join(map(repr, COUNTS.get(kind, ('nothing',))))}, not {counts!r}."
    return ""


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _normal(name: str) -> str:
    """Names as they are compared: case, hyphens and underscores do not count."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_path(module: str) -> bool:
    """Whether a catalogue's `module` is a path ("./my_mask.py", "./my_package") and not a dotted name."""
    return module.endswith(".py") or "/" in module or os.sep in module or module.startswith(".")


def is_kebab(name: str) -> bool:
    """Lower-case words joined by single hyphens, as component names are."""
    return bool(name) and all(part.isalnum() and part == part.lower() for part in name.split("-"))


def built_in_catalogue() -> Path:
    """The registry.toml of the built-in plugins: in the wheel beside the package, in a checkout at its root."""
    here = Path(__file__).resolve().parent
    inside = here / "registry.toml"
    return inside if inside.is_file() else here.parents[1] / "registry.toml"


def read_catalogue(path: Location, origin: PluginInfo) -> list[Entry]:
    """The plugins of one registry.toml. `origin` fills in what the file does not say (distribution, source, folder).

    Raises `RegistryFileError` with file and table for a syntax error, an unknown key, a missing or wrong value, or a
    component that is listed twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tables = tomllib.loads(file.read())
    except FileNotFoundError:
        raise RegistryFileError(f"{path} does not exist; give the path of a registry.toml.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RegistryFileError(f"{path} is no valid TOML: {error}.") from None
    except OSError as error:
        raise RegistryFileError(f"{path} cannot be read: {error.strerror}.") from None
    _legal_keys(tables, frozenset({"plugins"}), path, "the top level")
    entries: list[Entry] = []
    seen: dict[tuple[str, str], str] = {}
    for slug, table in _table(tables.get("plugins", {}), path, "[plugins]").items():
        where = f"[plugins.{slug}]"
        _legal_keys(_table(table, path, where), _PLUGIN_KEYS, path, where)
        if not isinstance(table.get("module"), str) or not table["module"]:
            raise RegistryFileError(
                f"{path}, {where}: `module` is missing; name the module or file that has the hook."
            )
        plugin = PluginInfo(
            slug=slug,
            module=table["module"],
            title=_text(table, "title", path, where),
            paper=_text(table, "paper", path, where),
            code=_text(table, "code", path, where),
            family=_text(table, "family", path, where),
            extras=tuple(_texts(table, "extras", path, where)),
            distribution=origin.distribution,
            version=origin.version,
            source=origin.source,
            folder=origin.folder,
        )
        components = table.get("components", [])
        if not isinstance(components, list):
            raise RegistryFileError(
                f"{path}, {where}: `components` must be an array of tables, [[plugins.{slug}.components]]."
            )
        read = [
            _read_component(entry, plugin, path, f"{where} component {i}")
            for i, entry in enumerate(components, 1)
        ]
        for info in read:
            first = seen.setdefault((info.kind, info.name), slug)
            if first != slug or sum(one.kind == info.kind and one.name == info.name for one in read) > 1:
                raise RegistryFileError(
                    f"{path}, {where}: the {info.kind} {info.name!r} is listed twice"
                    f"{f', first in [plugins.{first}]' if first != slug else ''}; names are unique per kind."
                )
        entries.append((plugin, read))
    return entries


def _read_component(entry: Any, plugin: PluginInfo, path: Location, where: str) -> ComponentInfo:
    _legal_keys(_table(entry, path, where), _COMPONENT_KEYS, path, where)
    kind, name = entry.get("kind"), entry.get("name")
    if kind not in KINDS:
        raise RegistryFileError(f"{path}, {where}: kind {kind!r} must be one of {', '.join(KINDS)}.")
    if not isinstance(name, str) or not is_kebab(name):
        raise RegistryFileError(f"{path}, {where}: name {name!r} must be kebab-case, such as 'hard-patches'.")
    parameters = entry.get("parameters", [])
    if not isinstance(parameters, list):
        raise RegistryFileError(f"{path}, {where}: parameters must be a list of tables, not {parameters!r}.")
    counts = _text(entry, "counts", path, where)
    if counts and counts not in COUNTS.get(kind, ()):
        legal = ", ".join(COUNTS.get(kind, ())) or f"nothing of {_a(kind)}"
        raise RegistryFileError(f"{path}, {where}: counts {counts!r} must be {legal}.")
    inside = f"{where} parameters"
    for parameter in parameters:
        _legal_keys(_table(parameter, path, inside), _PARAMETER_KEYS, path, inside)
        for key in parameter:
            _text(parameter, key, path, inside)
        if not parameter.get("name"):
            raise RegistryFileError(f"{path}, {inside}: each needs a `name`.")
    tables = {}
    for key in ("exempt", "exact_with"):
        tables[key] = _table(entry.get(key, {}), path, f"{where} {key}")
        for name_within in tables[key]:
            _text(tables[key], name_within, path, f"{where} {key}")
    rows = entry.get("disjoint_rows", 1)
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise RegistryFileError(
            f"{path}, {where}: disjoint_rows {rows!r} must be a whole number of at least 1."
        )
    return ComponentInfo(
        kind=kind,
        name=name,
        plugin=plugin,
        modalities=frozenset(_texts(entry, "modalities", path, where)),
        summary=_text(entry, "summary", path, where),
        needs=frozenset(_texts(entry, "needs", path, where)),
        provides=frozenset(_texts(entry, "provides", path, where)),
        backbone=_text(entry, "backbone", path, where),
        domain=_text(entry, "domain", path, where),
        budgets=frozenset(_texts(entry, "budgets", path, where)),
        counts=counts,
        **tables,
        disjoint_rows=rows,
        parameters=tuple(Parameter(**parameter) for parameter in parameters),
    )


def _legal_keys(table: Mapping[str, Any], legal: frozenset[str], path: Location, where: str) -> None:
    for key in table:
        if key not in legal:
            raise RegistryFileError(
                f"{path}, {where}: unknown key {key!r}.{did_you_mean(key, legal)} Legal: {', '.join(sorted(legal))}."
            )


def _table(value: Any, path: Location, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RegistryFileError(f"{path}: {where} must be a table, not {value!r}.")
    return value


def _text(table: Mapping[str, Any], key: str, path: Location, where: str) -> str:
    value = table.get(key, "")
    if not isinstance(value, str):
        raise RegistryFileError(f"{path}, {where}: {key} must be a text, not {value!r}.")
    return value


def _texts(table: Mapping[str, Any], key: str, path: Location, where: str) -> list[str]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise RegistryFileError(f"{path}, {where}: {key} must be a list of texts, not {value!r}.")
    return value


def third_party_catalogues() -> Iterator[tuple[str, list[Entry]]]:
    """The plugins of installed distributions, by distribution, with the entry point's name; none of them is imported.

    What is wrong with one of them becomes the `error` of its plugin and never touches another.
    """
    read: set[str] = set()
    for name, module, distribution, version, beside in sorted(
        _entry_points(), key=lambda found: (found[2], found[0])
    ):
        folder, error, described = None, "", True
        try:
            folder = module_folder(module, beside)
            catalogue = os.path.join(folder, "registry.toml") if folder else None
            if catalogue is None:
                error = f"its module {module!r} is not found"
            elif not os.path.isfile(catalogue):
                described = False
            elif catalogue not in read:
                read.add(catalogue)
                origin = PluginInfo(
                    "", "", distribution=distribution, version=version, source="third-party", folder=folder
                )
                yield name, read_catalogue(catalogue, origin)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
            if isinstance(problem, MaskwrightError):
                error = str(problem)
        if error or not described:
            plugin = PluginInfo(
                name,
                module,
                distribution=distribution,
                version=version,
                source="third-party",
                folder=folder,
                described=described,
                error=error,
            )
            yield name, [(plugin, [])]


def _entry_points() -> Iterator[tuple[str, str, str, str, Path | None]]:
    """The entry points `maskwright`: name, module, distribution, its version, and the folder in which that is installed.

    As `importlib.metadata.entry_points` finds them (of two distributions of one name the first), but several times faster,
    which is felt with a hundred plugins: of most distributions only entry_points.txt is opened. A distribution whose files
    are damaged is passed over.
    """
    seen = set()
    for found in importlib.metadata.distributions():
        with suppress(Exception):
            path = getattr(found, "_path", None)
            name, version = _origin(found, path)
            if name in seen:
                continue
            seen.add(name)
            installed = path if isinstance(path, Path) else None
            if installed is not None:
                with open(os.path.join(installed, "entry_points.txt"), encoding="utf-8") as file:
                    text = file.read()
            else:
                text = found.read_text("entry_points.txt") or ""
            for slug, module in _entries(text):
                yield slug, module, name, version, installed and installed.parent


def _entries(text: str) -> Iterator[tuple[str, str]]:
    """Name and module of each entry point in the group `maskwright` of an entry_points.txt."""
    inside = False
    for line in text.splitlines() if BUILT_IN in text else ():
        line = line.strip()
        if line.startswith("["):
            inside = line == f"[{BUILT_IN}]"
        elif inside and line and not line.startswith(("#", ";")):
            slug, equals, value = line.partition("=")
            if equals:
                yield slug.strip(), re.split(r"[:\s\[]", value.strip(), maxsplit=1)[0]


def _origin(found: importlib.metadata.Distribution, path: Any) -> tuple[str, str]:
    """Distribution name and version: from the folder's name, which is much faster than reading METADATA."""
    folder = getattr(path, "name", "")
    name, dash, version = folder.removesuffix(".dist-info").partition("-")
    if folder.endswith(".dist-info") and dash:
        return name.replace("_", "-").lower(), version
    return found.metadata["Name"].replace("_", "-").lower(), found.version


def module_folder(module: str, beside: Path | None = None) -> Path | None:
    """The folder in which a module's registry.toml lies, found without importing the module or its parents.

    `beside` is where its distribution is installed: where most modules are, and where it is cheapest to look.
    """
    top, *rest = module.split(".")
    if beside is not None:
        usual = os.path.join(beside, top, *rest)
        if os.path.isfile(os.path.join(usual, "__init__.py")):
            return Path(usual)
    if module.startswith(f"{BUILT_IN}.plugins."):
        search, rest = list(importlib.import_module(f"{BUILT_IN}.plugins").__path__), rest[1:]
    else:
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        if not spec.submodule_search_locations:
            return Path(spec.origin).parent if spec.origin and not rest else None
        search = list(spec.submodule_search_locations)
    for location in search:
        folder = Path(location).joinpath(*rest)
        if folder.is_dir():
            return folder
        if rest and folder.with_suffix(".py").is_file():
            return folder.parent
    return None


def plugin_folder(plugin: PluginInfo) -> Path | None:
    """The folder in which a plugin's claim.json and README.md lie, found without importing it."""
    if is_path(plugin.module):
        path = ((plugin.folder or Path()) / plugin.module).resolve()
        return path if path.is_dir() else path.parent
    return module_folder(plugin.module)


def recorded_claim(plugin: PluginInfo) -> dict[str, Any] | None:
    """The claim.json in a plugin's folder, as `maskwright verify --record` writes it; None where there is none."""
    try:
        folder = plugin_folder(plugin)
        claim = json.loads((folder / "claim.json").read_text("utf-8")) if folder else None
    except (OSError, ValueError):
        return None
    return claim if isinstance(claim, dict) else None


def describe_component(component: type, plugin: PluginInfo) -> ComponentInfo:
    """What a registry.toml should say of a component class, read from the class."""

    def words(attribute: str) -> frozenset[str]:
        value: Any = getattr(component, attribute, frozenset())
        return frozenset(value) if isinstance(value, set | frozenset | list | tuple) else frozenset()

    fields = [field for field in attrs.fields(component) if field.init] if attrs.has(component) else []
    return ComponentInfo(
        kind=component.kind,  # type: ignore[attr-defined]
        name=component.name,  # type: ignore[attr-defined]
        plugin=plugin,
        modalities=words("modalities"),
        summary=(component.__doc__ or "").strip().partition("\n")[0].rstrip("."),
        needs=words("needs"),
        provides=words("provides"),
        counts=_describe_counts(component),
        exact_with={name: repr(value) for name, value in getattr(component, "exact_with", {}).items()},
        backbone=getattr(component, "backbone", ""),
        domain=getattr(component, "domain", ""),
        budgets=words("budgets"),
        disjoint_rows=_disjoint_rows(component),
        exempt=dict(getattr(component, "exempt", {})),
        parameters=tuple(_describe_parameter(field) for field in fields),
    )


def _describe_counts(component: type) -> str:
    """The word of a class; where its instances differ (`counts` is a property) that of its default parameters.

    Where a parameter has no default, it is the word that fits fewest partners.
    """
    default, other = COUNTS.get(component.kind, ("", ""))  # type: ignore[attr-defined]
    counts = getattr(component, "counts", default)
    if isinstance(counts, property):
        try:
            counts = component().counts
        except (TypeError, MaskwrightError):
            counts = other
    return "" if counts == default else str(counts)


def _disjoint_rows(component: type) -> int:
    """What a class says of its consecutive rows; with its default parameters, where they decide."""
    rows: Any = getattr(component, "disjoint_rows", 1)
    if isinstance(rows, property):
        try:
            rows = component().disjoint_rows
        except TypeError:  # a parameter has no default
            return 1
    return rows if isinstance(rows, int) else 1


def _describe_parameter(field: attrs.Attribute[Any]) -> Parameter:
    kind = (
        field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type or ""))
    )
    default: Any = field.default
    if default is attrs.NOTHING:
        spelled = ""
    elif isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        spelled = f"{getattr(default.factory, '__name__', 'made')}()"
    elif isinstance(default, set | frozenset):  # in one order, whatever the hashes of this process
        spelled = (
            f"{type(default).__name__}({{{', '.join(sorted(map(repr, default)))}}})"
            if default
            else repr(default)
        )
    else:
        spelled = repr(default)
    return Parameter(
        field.alias or field.name,
        kind,
        spelled,
        str(field.metadata.get("range", "")),
        str(field.metadata.get("help", "")),
    )


def component(kind: str, default: Any = attrs.NOTHING, help: str = "") -> Any:
    """An attrs field for a component inside a component.

    It takes a registered name, a table with a `name` and that component's parameters, or a component that is made already, and
    holds the component. Raises `BadParameter` for anything else, and what `Registry.create` raises.
    """
    metadata = {"help": help, "range": f"name of {_a(kind)}, or a table with a name", COMPONENT: kind}
    return attrs.field(default=default, converter=partial(_made, kind), metadata=metadata)


def _made(kind: str, given: Any) -> Any:
    if isinstance(given, str):
        return default().create(kind, given)
    if isinstance(given, Mapping) and isinstance(given.get("name"), str):
        return default().create(kind, **given)
    if getattr(given, "kind", None) == kind and not isinstance(given, type):
        return given
    raise BadParameter(
        f"{given!r} is no {kind}: give its name, a table with a `name` and its parameters, or one that create() made."
    )


COMPONENT = "component"
"""Key in a field's metadata: the kind of the component that it holds."""


def components_inside(component: type) -> dict[str, attrs.Attribute[Any]]:
    """The fields of a component class that hold components, by parameter; `metadata[COMPONENT]` is the kind."""
    fields = attrs.fields(component) if attrs.has(component) else ()
    return {field.alias: field for field in fields if COMPONENT in field.metadata}


def drift(described: Iterable[ComponentInfo], registered: Iterable[ComponentInfo]) -> list[str]:
    """Where a catalogue differs from what the plugin registers, a sentence each; nothing when they agree."""
    said = {(info.kind, info.name): info for info in described}
    real = {(info.kind, info.name): info for info in registered}
    found = [
        f"{kind} {name} is described but not registered" for kind, name in said if (kind, name) not in real
    ]
    found += [
        f"{kind} {name} is registered but not described" for kind, name in real if (kind, name) not in said
    ]
    for key in said.keys() & real.keys():
        for field in attrs.fields(ComponentInfo):
            old, new = getattr(said[key], field.name), getattr(real[key], field.name)
            if field.name != "plugin" and old != new:
                found.append(f"{key[0]} {key[1]}: {field.name} should be {_plain(new)}, not {_plain(old)}")
    return sorted(found)


def _plain(value: Any) -> str:
    if isinstance(value, frozenset):
        return _quoted(value)
    if isinstance(value, tuple):
        return "; ".join(" ".join(filter(None, attrs.astuple(one))) for one in value) or "nothing"
    return repr(value)


@lru_cache(maxsize=1)
def default() -> Registry:
    """The registry of this process: built-in and installed plugins, and what the environment names.

    Its methods are also functions of this module: `maskwright.registry.names("objective")`.
    """
    return Registry.from_environment()


if TYPE_CHECKING:
    names = default().names
    find = default().find
    info = default().info
    plugins = default().plugins
    plugin = default().plugin
    create = default().create
    register = default().register


def __getattr__(name: str) -> Any:
    if name in ("names", "find", "info", "plugins", "plugin", "create", "register", "component_class"):
        return getattr(default(), name)
    raise AttributeError(f"module 'maskwright.registry' has no attribute {name!r}")


def keeps_equal_counts(strategy: Any) -> bool:
    """Whether every row of a draw of this strategy, as it was made, keeps the same number of positions.

    Its class says `counts = "bounded"` when it may not (the default is "exact"), and `exact_with = {"exact": True}` when it
    does with these parameters. `counts` may also be a property.
    """
    wanted: Mapping[str, Any] = getattr(strategy, "exact_with", {})
    given = bool(wanted) and all(getattr(strategy, name) == value for name, value in wanted.items())
    return given or getattr(strategy, "counts", "exact") == "exact"


def needs_equal_counts(objective: Any) -> bool:
    """Whether this objective needs the same number of visible positions in every row: it says `counts = "exact"`."""
    return getattr(objective, "counts", "any") == "exact"


def counts_fit(strategy: ComponentInfo, objective: ComponentInfo) -> bool:
    """Whether a strategy with its default parameters keeps equal counts where the objective needs them."""
    return objective.counts != "exact" or strategy.counts != "bounded"


def check_fit(
    strategy: MaskStrategy,
    objective: Objective,
    columns: frozenset[str] | None = None,
    *,
    catalogue: Registry | None = None,
) -> None:
    """Raise when the strategy needs a signal that nobody provides, or the objective a column the data lack or equal counts.

    Batch columns count as signals: a strategy may need "tokens". The message names who could provide what is missing, or
    with which parameter, or which strategies, the counts are equal. Raises `OverlappingMasks` when the objective mixes more
    rows than the strategy keeps disjoint (`disjoint_rows`).
    """
    if columns is not None and (lacking := objective.needs - columns):
        raise MissingColumn(
            f"Objective {objective.name!r} needs the batch column {_quoted(lacking)}; the data have {_quoted(columns)}."
        )
    offered = objective.provides | objective.needs | (columns or frozenset())
    if missing := strategy.needs - offered:
        every = (catalogue or default()).find(kind="objective")
        helpers = sorted(info.name for info in every if missing <= info.provides)
        advice = (
            f"use one that does: {_quoted(helpers)}" if helpers else "no registered objective provides it"
        )
        raise MissingSignal(
            f"Strategy {strategy.name!r} needs the signal {_quoted(missing)}, which objective {objective.name!r} does not "
            f"provide; {advice}."
        )
    if needs_equal_counts(objective) and not keeps_equal_counts(strategy):
        wanted: Mapping[str, Any] = getattr(strategy, "exact_with", {})
        if wanted:
            spelled = ", ".join(f"{name}={value!r}" for name, value in wanted.items())
            advice = f"give {strategy.name!r} {spelled}"
        else:
            fitting = sorted(
                info.name
                for info in (catalogue or default()).find(kind="mask-strategy")
                if info.counts != "bounded"
                and info.needs <= offered
                and (
                    not info.modalities or info.modalities & getattr(objective, "modalities", info.modalities)
                )
            )
            advice = f"use one that does: {_quoted(fitting)}" if fitting else "no registered strategy does"
        raise CountsMismatch(
            f"Strategy {strategy.name!r} does not keep the same number of positions in every sample, which objective "
            f"{objective.name!r} needs; {advice}."
        )
    mixed, disjoint = (getattr(one, "disjoint_rows", 1) for one in (objective, strategy))
    if disjoint % mixed:
        suited = getattr(objective, "default_strategy", None)
        fault, advice = f"keeps only {disjoint} disjoint", "give both the same number"
        if disjoint == 1:
            fault, advice = "draws each by itself", f"use {suited!r}" if suited else "use one that does"
        raise OverlappingMasks(
            f"Objective {objective.name!r} mixes {mixed} consecutive rows, whose masks must not overlap; strategy "
            f"{strategy.name!r} {fault}; {advice}."
        )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "nothing"


__all__ = [
    "COUNTS",
    "KINDS",
    "ComponentInfo",
    "Parameter",
    "PluginInfo",
    "Registry",
    "check_fit",
    "component",
    "components_inside",
    "counts_fit",
    "default",
    "describe_component",
    "drift",
    "keeps_equal_counts",
    "module_folder",
    "needs_equal_counts",
    "plugin_folder",
    "read_catalogue",
    "recorded_claim",
]
