"""The registry: what exists (read from registry.toml files, importing nothing), and how a component is made.

A catalogue is a registry.toml. The built-in one lies beside the package, a third-party distribution ships its own next to
the module that its `maskwright` entry point names, and a user may name more files. A plugin's module is imported when one
of its components is first created, registered with pluggy, and its `maskwright_components` hook is read.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import threading
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, overload

import attrs
import pluggy

from maskwright import hookspecs
from maskwright.errors import (
    BadParameter,
    MaskwrightError,
    MissingColumn,
    MissingSignal,
    NameConflict,
    PluginLoadError,
    RegistryFileError,
    UnknownComponent,
    did_you_mean,
)

if TYPE_CHECKING:
    from maskwright.protocols import MaskStrategy, Objective, Pruner, Sampler

Location: TypeAlias = str | os.PathLike[str]

KINDS = ("mask-strategy", "objective", "pruner", "sampler")
BUILT_IN = "maskwright"

_PLUGIN_KEYS = frozenset({"module", "title", "paper", "code", "extras", "components"})
_COMPONENT_KEYS = frozenset(
    {
        "kind",
        "name",
        "modalities",
        "summary",
        "needs",
        "provides",
        "backbone",
        "domain",
        "budgets",
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
    extras: tuple[str, ...] = ()
    distribution: str = BUILT_IN
    version: str = ""
    source: str = "built-in"
    """"built-in", "third-party", "file" or "program"."""
    folder: Path | None = None
    """Where a relative module path starts, or where the module lies."""
    described: bool = True
    error: str = ""
    """Why it cannot be used, where that is known without importing it."""


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
    backbone: str = ""
    domain: str = ""
    budgets: frozenset[str] = frozenset()
    exempt: Mapping[str, str] = attrs.field(factory=dict)
    parameters: tuple[Parameter, ...] = ()

    @property
    def qualified(self) -> str:
        """`distribution/name`, which is never ambiguous between distributions."""
        return f"{self.plugin.distribution}/{self.name}"


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
        self._files = tuple(Path(file) for file in files)
        self._third_party = third_party
        self._built_in = built_in
        self._disabled = frozenset(disabled)
        self._lock = threading.RLock()
        self._plugins: dict[tuple[str, str], PluginInfo] = {}
        self._components: dict[str, dict[str, list[ComponentInfo]]] = {kind: {} for kind in KINDS}
        self._classes: dict[tuple[str, str, str, str], type] = {}
        self._failed: dict[tuple[str, str], PluginLoadError] = {}
        self._loaded: set[tuple[str, str]] = set()
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
        """Every plugin, the built-in ones first."""
        self._ensure_read()
        return list(self._plugins.values())

    def names(self, kind: str | None = None, pattern: str = "*") -> list[str]:
        """Sorted component names, of one kind or of all; `pattern` takes wildcards (`"*mae*"`)."""
        return sorted({info.name for info in self.find(kind=kind) if fnmatchcase(info.name, pattern)})

    def find(
        self,
        *,
        kind: str | None = None,
        modality: str | None = None,
        needs: str | None = None,
        provides: str | None = None,
        plugin: str | None = None,
    ) -> list[ComponentInfo]:
        """The components that match every word given, sorted by kind and name."""
        self._ensure_read()
        kinds = KINDS if kind is None else (self._known_kind(kind),)
        return [
            info
            for one in kinds
            for name in sorted(self._components[one])
            for info in self._components[one][name]
            if (modality is None or modality in info.modalities)
            and (needs is None or needs in info.needs)
            and (provides is None or provides in info.provides)
            and (plugin is None or plugin in (info.plugin.slug, info.plugin.distribution))
        ]

    def info(self, name: str, kind: str | None = None) -> ComponentInfo:
        """What the catalogue says of a component. A name that exists in several kinds needs `kind`."""
        self._ensure_read()
        kinds = KINDS if kind is None else (self._known_kind(kind),)
        found = [info for one in kinds if (info := self._resolve(one, name)) is not None]
        if not found and self._import_undescribed():
            found = [info for one in kinds if (info := self._resolve(one, name)) is not None]
        if not found:
            raise self._unknown(name, kind)
        if len(found) > 1:
            several = ", ".join(info.kind for info in found)
            raise NameConflict(f"{name!r} is a {several}; say which kind is meant.")
        return found[0]

    def _resolve(self, kind: str, name: str) -> ComponentInfo | None:
        owner, slash, bare = name.rpartition("/")
        claims = self._components[kind].get(bare, [])
        if slash:
            return next(
                (info for info in claims if owner in (info.plugin.distribution, info.plugin.slug)), None
            )
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
        elsewhere = [info for info in self.find() if info.name == name.rpartition("/")[2]]
        if elsewhere and kind is not None:
            return UnknownComponent(f"{name!r} is no {kind}; it is a {elsewhere[0].kind}.")
        known = self.names(kind)
        if not known:
            return UnknownComponent(f"There is no {what} {name!r}: no plugin offers any.")
        broken = [plugin for plugin in self._plugins.values() if plugin.error and plugin.source != "built-in"]
        hint = (
            f" Some plugins could not be read ({', '.join(p.slug for p in broken)}): see `maskwright doctor`."
            if broken
            else ""
        )
        return UnknownComponent(
            f"There is no {what} {name!r}.{did_you_mean(name, known)} `maskwright list` shows all {len(known)}.{hint}"
        )

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
        except TypeError:
            self._check_parameters(component, params)
            raise

    def component_class(self, kind: str, name: str) -> type:
        """The class behind a name. Its plugin is imported if it is not yet."""
        info = self.info(name, kind)
        key = (info.plugin.distribution, info.plugin.slug, info.kind, info.name)
        found = self._classes.get(key)
        if found is None:
            self.load(info.plugin)
            found = self._classes.get(key)
        if found is None:
            raise PluginLoadError(
                f"Plugin {info.plugin.slug!r} describes the {kind} {info.name!r} in its registry.toml but does not register "
                "it; `maskwright describe` prints the table that would be right."
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
        """Import a plugin and read its hook; its component classes. A second call returns the same."""
        key = (plugin.distribution, plugin.slug)
        with self._lock:
            if key in self._failed:
                raise self._failed[key]
            if key not in self._loaded:
                try:
                    self._load(plugin)
                except PluginLoadError as error:
                    self._failed[key] = error
                    raise
                self._loaded.add(key)
            return [one for (dist, slug, _, _), one in self._classes.items() if (dist, slug) == key]

    def _load(self, plugin: PluginInfo) -> None:
        where = f"Plugin {plugin.slug!r} of {plugin.distribution}"
        if plugin.error:
            raise PluginLoadError(f"{where} cannot be used: {plugin.error}")
        try:
            module = self._import(plugin)
        except Exception as error:
            raise PluginLoadError(
                f"{where} could not be imported: {type(error).__name__}: {error}. {self._advice(plugin, error)}"
            ) from error
        try:
            if not self.host.is_registered(module):
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
        except Exception as error:
            raise PluginLoadError(f"{where} failed in its hook: {type(error).__name__}: {error}.") from error
        if not offered:
            raise PluginLoadError(
                f"{where} registers nothing: {plugin.module} has no `maskwright_components` hook."
            )
        for component in offered:
            self._adopt(plugin, component)

    @staticmethod
    def _advice(plugin: PluginInfo, error: Exception) -> str:
        if isinstance(error, ModuleNotFoundError) and plugin.extras:
            return f"Install what it needs: pip install '{plugin.distribution}[{','.join(plugin.extras)}]'."
        top = plugin.module.partition(".")[0]
        gone = isinstance(error, ModuleNotFoundError) and error.name == top and plugin.source == "third-party"
        if gone:
            return (
                f"{plugin.distribution} was uninstalled while this program ran: install it again "
                f"(maskwright install {plugin.distribution}), or start anew."
            )
        return "`maskwright doctor` shows where."

    @staticmethod
    def _import(plugin: PluginInfo) -> Any:
        if not plugin.module.endswith(".py"):
            return importlib.import_module(plugin.module)
        path = ((plugin.folder or Path()) / plugin.module).resolve()
        name = f"maskwright_file_{abs(hash(str(path)))}"
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module

    def _adopt(self, plugin: PluginInfo, component: type) -> None:
        kind, name = getattr(component, "kind", None), getattr(component, "name", None)
        if kind not in KINDS or not isinstance(name, str) or not is_kebab(name):
            raise PluginLoadError(
                f"Plugin {plugin.slug!r} of {plugin.distribution} registers {component!r}: its `kind` must be one of "
                f"{', '.join(KINDS)} and its `name` kebab-case; they are {kind!r} and {name!r}."
            )
        self._classes[(plugin.distribution, plugin.slug, kind, name)] = component
        claims = self._components[kind].setdefault(name, [])
        if not any(info.plugin == plugin for info in claims):
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
        plugin = PluginInfo(
            slug="program",
            module=component.__module__,
            distribution="program",
            source="program",
            described=False,
        )
        with self._lock:
            self._ensure_read()
            kind, name = getattr(component, "kind", ""), getattr(component, "name", "")
            claims = self._components.get(kind, {}).get(name, [])
            if claims and not replace:
                raise NameConflict(
                    f"The {kind} {name!r} is already registered by {claims[0].plugin.distribution}; "
                    "choose another name, or register(..., replace=True)."
                )
            if claims:
                self._components[kind][name] = []
            self._plugins.setdefault(("program", "program"), plugin)
            self._adopt(self._plugins[("program", "program")], component)
        return component

    # -- reading catalogues --------------------------------------------------------------------------------

    def _ensure_read(self) -> None:
        if self._read:
            return
        with self._lock:
            if self._read:
                return
            if self._built_in:
                path = built_in_catalogue()
                for plugin, components in read_catalogue(
                    path, PluginInfo(slug="", module="", folder=path.parent)
                ):
                    self._admit(plugin, components)
            for file in self._files:
                origin = PluginInfo(
                    slug="", module="", distribution=file.stem, source="file", folder=file.parent
                )
                for plugin, components in read_catalogue(file, origin):
                    self._admit(plugin, components)
            if self._third_party:
                for plugin, components in third_party_catalogues(self._disabled):
                    self._admit(plugin, components)
            self._read = True

    def _admit(self, plugin: PluginInfo, components: Iterable[ComponentInfo]) -> None:
        if plugin.slug in self._disabled or plugin.distribution in self._disabled:
            return
        self._plugins[(plugin.distribution, plugin.slug)] = plugin
        for info in components:
            self._components[info.kind].setdefault(info.name, []).append(info)

    def _import_undescribed(self) -> bool:
        """Import the plugins without a registry.toml, whose components are known in no other way."""
        grew = False
        for plugin in [
            plugin for plugin in self._plugins.values() if not plugin.described and not plugin.error
        ]:
            key = (plugin.distribution, plugin.slug)
            if plugin.source == "third-party" and key not in self._loaded and key not in self._failed:
                try:
                    self.load(plugin)
                    grew = True
                except PluginLoadError:
                    continue
        return grew


def is_kebab(name: str) -> bool:
    """Lower-case words joined by single hyphens, as component names are."""
    return bool(name) and all(part.isalnum() and part == part.lower() for part in name.split("-"))


def built_in_catalogue() -> Path:
    """The registry.toml of the built-in plugins: in the wheel beside the package, in a checkout at its root."""
    here = Path(__file__).resolve().parent
    inside = here / "registry.toml"
    return inside if inside.is_file() else here.parents[1] / "registry.toml"


def read_catalogue(path: Location, origin: PluginInfo) -> Iterator[tuple[PluginInfo, list[ComponentInfo]]]:
    """The plugins of one registry.toml. `origin` fills in what the file does not say (distribution, source, folder).

    Raises `RegistryFileError` with file and table for a syntax error, an unknown key, or a missing or wrong value.
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
    for slug, table in _table(tables.get("plugins", {}), path, "[plugins]").items():
        where = f"[plugins.{slug}]"
        _legal_keys(_table(table, path, where), _PLUGIN_KEYS, path, where)
        if not isinstance(table.get("module"), str):
            raise RegistryFileError(
                f"{path}, {where}: `module` is missing; name the module or file that has the hook."
            )
        plugin = PluginInfo(
            slug=slug,
            module=table["module"],
            title=_text(table, "title", path, where),
            paper=_text(table, "paper", path, where),
            code=_text(table, "code", path, where),
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
        yield (
            plugin,
            [
                _read_component(entry, plugin, path, f"{where} component {i}")
                for i, entry in enumerate(components, 1)
            ],
        )


def _read_component(entry: Any, plugin: PluginInfo, path: Location, where: str) -> ComponentInfo:
    _legal_keys(_table(entry, path, where), _COMPONENT_KEYS, path, where)
    kind, name = entry.get("kind"), entry.get("name")
    if kind not in KINDS:
        raise RegistryFileError(f"{path}, {where}: kind {kind!r} must be one of {', '.join(KINDS)}.")
    if not isinstance(name, str) or not is_kebab(name):
        raise RegistryFileError(f"{path}, {where}: name {name!r} must be kebab-case, such as 'hard-patches'.")
    parameters = entry.get("parameters", [])
    for parameter in parameters:
        _legal_keys(
            _table(parameter, path, f"{where} parameters"), _PARAMETER_KEYS, path, f"{where} parameters"
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
        exempt=_table(entry.get("exempt", {}), path, where),
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


def third_party_catalogues(disabled: frozenset[str]) -> Iterator[tuple[PluginInfo, list[ComponentInfo]]]:
    """The plugins of installed distributions, by name, found through their entry points; none of them is imported."""
    for entry, distribution, version, beside in sorted(
        _entry_points(), key=lambda found: (found[1], found[0].name)
    ):
        if {entry.name, distribution} & disabled:
            continue
        folder = _module_folder(entry.module, beside)
        origin = PluginInfo(
            slug=entry.name,
            module=entry.module,
            distribution=distribution,
            version=version,
            source="third-party",
            folder=folder,
        )
        if folder is None:
            yield attrs.evolve(origin, described=False, error=f"its module {entry.module!r} is not found"), []
            continue
        if not os.path.isfile(catalogue := os.path.join(folder, "registry.toml")):
            yield attrs.evolve(origin, described=False), []
            continue
        try:
            yield from list(read_catalogue(catalogue, origin))
        except MaskwrightError as error:
            yield attrs.evolve(origin, error=str(error)), []


def _entry_points() -> Iterator[tuple[importlib.metadata.EntryPoint, str, str, Path | None]]:
    """The entry points `maskwright`, each with its distribution, version, and the folder in which that is installed.

    As `importlib.metadata.entry_points` finds them, of two distributions of one name the first, but in a third of the time:
    a file without the group's name is not parsed, and name and version are those of the folder's name, not of METADATA.
    """
    seen = set()
    for found in importlib.metadata.distributions():
        path = getattr(found, "_path", None)
        name, version = _origin(found, path)
        if name in seen:
            continue
        seen.add(name)
        if isinstance(path, Path):
            try:
                with open(os.path.join(path, "entry_points.txt"), encoding="utf-8") as file:
                    text = file.read()
            except OSError:
                continue
        else:
            text = found.read_text("entry_points.txt") or ""
        if "maskwright" in text:
            for entry in found.entry_points:
                if entry.group == "maskwright":
                    yield entry, name, version, path.parent if isinstance(path, Path) else None


def _origin(found: importlib.metadata.Distribution, path: Any) -> tuple[str, str]:
    """Distribution name and version."""
    folder = getattr(path, "name", "")
    name, dash, version = folder.removesuffix(".dist-info").partition("-")
    if folder.endswith(".dist-info") and dash:
        return name.replace("_", "-").lower(), version
    return (found.metadata["Name"] or "unknown").replace("_", "-").lower(), found.version


def _module_folder(module: str, beside: Path | None) -> Path | None:
    """The folder in which a module's registry.toml lies, found without importing the module or its parents.

    `beside` is where its distribution is installed: where most modules are, and where it is cheapest to look.
    """
    top, *rest = module.split(".")
    if beside is not None:
        usual = os.path.join(beside, top, *rest)
        if os.path.isfile(os.path.join(usual, "__init__.py")):
            return Path(usual)
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not spec.submodule_search_locations:
        return Path(spec.origin).parent if spec.origin and not rest else None
    for location in spec.submodule_search_locations:
        folder = Path(location).joinpath(*rest)
        if folder.is_dir():
            return folder
        if rest and folder.with_suffix(".py").is_file():
            return folder.parent
    return None


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
        backbone=getattr(component, "backbone", ""),
        domain=getattr(component, "domain", ""),
        budgets=words("budgets"),
        exempt=dict(getattr(component, "exempt", {})),
        parameters=tuple(_describe_parameter(field) for field in fields),
    )


def _describe_parameter(field: attrs.Attribute[Any]) -> Parameter:
    kind = (
        field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type or ""))
    )
    default: Any = field.default
    if default is attrs.NOTHING:
        spelled = ""
    elif isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        spelled = f"{getattr(default.factory, '__name__', 'made')}()"
    else:
        spelled = repr(default)
    return Parameter(
        field.alias or field.name,
        kind,
        spelled,
        str(field.metadata.get("range", "")),
        str(field.metadata.get("help", "")),
    )


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
    create = default().create
    register = default().register


def __getattr__(name: str) -> Any:
    if name in ("names", "find", "info", "plugins", "create", "register", "component_class"):
        return getattr(default(), name)
    raise AttributeError(f"module 'maskwright.registry' has no attribute {name!r}")


def check_fit(
    strategy: MaskStrategy,
    objective: Objective,
    columns: frozenset[str] | None = None,
    *,
    catalogue: Registry | None = None,
) -> None:
    """Raise when the strategy needs a signal that nobody provides, or the objective a column the data lack.

    Batch columns count as signals: a strategy may need "tokens". The message names who could provide what is missing.
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


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "nothing"


__all__ = [
    "KINDS",
    "ComponentInfo",
    "Parameter",
    "PluginInfo",
    "Registry",
    "check_fit",
    "default",
    "describe_component",
    "read_catalogue",
]
