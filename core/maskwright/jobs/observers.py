"""Observers: plugins that are told what a run does, when asked for with `-p NAME`. None of them can stop a run."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import pluggy

from maskwright import hookspecs
from maskwright.errors import PluginLoadError, UnknownComponent, UsageError, did_you_mean
from maskwright.hookspecs import hookimpl
from maskwright.jobs.settings import leaves
from maskwright.protocols import RunInfo
from maskwright.registry import Registry

HOOKS = ("maskwright_run_started", "maskwright_mask_drawn", "maskwright_step_ended", "maskwright_run_ended")


class Observers:
    """The observers of one run. One that raises is reported once on stderr and switched off; the run goes on."""

    def __init__(self, hosts: Mapping[str, pluggy.PluginManager] | None = None) -> None:
        self._hosts = dict(hosts or {})

    @classmethod
    def named(cls, names: Iterable[str], registry: Registry) -> Observers:
        """Observers by name: "tensorboard", a plugin's slug or distribution, or a module that can be imported.

        Raises `UnknownComponent` for a name that is none of these, `PluginLoadError` for one that cannot be imported or
        lacks what it needs, `UsageError` for a plugin without any of the hooks.
        """
        return cls({name: _host(name, _find(name, registry)) for name in dict.fromkeys(names)})

    def __bool__(self) -> bool:
        return bool(self._hosts)

    def tell(self, hook: str, **what: Any) -> None:
        """Call one hook of every observer that is still on."""
        for name, host in list(self._hosts.items()):
            try:
                getattr(host.hook, hook)(**what)
            except Exception as error:
                del self._hosts[name]
                print(
                    f"maskwright: the observer {name!r} raised {type(error).__name__}: {error} "
                    f"(in {hook}); it is switched off and the run goes on.",
                    file=sys.stderr,
                )


def _find(name: str, registry: Registry) -> Any:
    if name == "tensorboard":
        return TensorBoard()
    plugins = registry.plugins()
    named = [plugin for plugin in plugins if name in (plugin.slug, plugin.distribution)]
    # A distribution may hold many plugins, the built-in one does: its name alone means none of them in particular.
    if len(named) == 1:
        module = named[0].module
        try:
            if named[0].error:
                raise PluginLoadError(named[0].error)
            return registry.module(named[0])
        except Exception as error:
            raise PluginLoadError(
                f"The observer {name!r} ({module}) could not be imported: {type(error).__name__}: {error}. "
                "`maskwright doctor` shows where."
            ) from error
    if not _exists(name):
        known = ["tensorboard", *(plugin.slug for plugin in plugins)]
        raise UnknownComponent(
            f"There is no observer {name!r}.{did_you_mean(name, known)} Give 'tensorboard', a plugin's name "
            "(`maskwright list --long` shows them), or a module that Python can import."
        )
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise PluginLoadError(
            f"The observer {name!r} could not be imported: {type(error).__name__}: {error}."
        ) from error


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _host(name: str, observer: Any) -> pluggy.PluginManager:
    host = pluggy.PluginManager("maskwright")
    host.add_hookspecs(hookspecs)
    try:
        host.register(observer)
    except pluggy.PluginValidationError as error:
        raise PluginLoadError(f"The observer {name!r} has a hook that cannot be called: {error}.") from error
    if not {caller.name for caller in host.get_hookcallers(observer) or []} & set(HOOKS):
        raise UsageError(
            f"The plugin {name!r} observes nothing: it has none of the hooks {', '.join(HOOKS)}."
        )
    return host


class TensorBoard:
    """Writes a run's metrics to its folder `tensorboard/`, through accelerate's tracker."""

    def __init__(self) -> None:
        from accelerate.utils import is_tensorboard_available

        if not is_tensorboard_available():
            raise PluginLoadError(
                "The observer 'tensorboard' needs the package tensorboard: pip install tensorboard."
            )
        self._tracker: Any = None

    @hookimpl
    def maskwright_run_started(self, run: RunInfo) -> None:
        from accelerate.tracking import TensorBoardTracker

        self._tracker = TensorBoardTracker("", run.folder / "tensorboard")
        self._tracker.start()
        self._tracker.log(
            {"settings": "\n".join(f"    {name} = {value}" for name, value in leaves(run.settings))}
        )

    @hookimpl
    def maskwright_step_ended(self, run: RunInfo, metrics: Mapping[str, Any]) -> None:
        values = {name: value for name, value in metrics.items() if name != "step"}
        self._tracker.log(values, step=metrics["step"])

    @hookimpl
    def maskwright_run_ended(self, run: RunInfo, result: Mapping[str, Any]) -> None:
        numbers = {
            f"result/{name}": value for name, value in result.items() if isinstance(value, int | float)
        }
        self._tracker.log(numbers, step=run.steps)
        self._tracker.finish()
