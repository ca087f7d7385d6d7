"""What is wrong with the plugins here: each imported in a process of its own, with a time limit.

A plugin that raises, exits, crashes or hangs is found out without harm to the others or to this process.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import attrs

from maskwright.errors import PluginLoadError
from maskwright.registry import PluginInfo, Registry, describe_component, drift

_PATIENCE = 120.0
"""Seconds in which a fresh process must at least begin: the first of them imports torch for all."""


@attrs.frozen
class Diagnosis:
    """What became of one plugin.

    `result` is "ok", "failed" (it raised or exited), "crashed", "timeout", "unreadable" (its catalogue) or "needs-extra" (what
    one of its pip extras brings is not installed). `seconds` is how long the import took, with torch imported before.
    `problems` are sentences about what is broken, `notes` about what is not.
    """

    plugin: PluginInfo
    result: str
    seconds: float | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return not self.problems


def diagnose(
    registry: Registry, plugins: Sequence[PluginInfo], *, timeout: float = 30.0, processes: int | None = None
) -> Iterator[Diagnosis]:
    """Import each plugin in its own process; results come in the order of the plugins, as soon as they are there."""
    methods = multiprocessing.get_all_start_methods()
    # A fork server imports torch once, and every plugin starts from a copy of that clean process.
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["torch", "maskwright.protocols"])
    with ThreadPoolExecutor(processes or os.cpu_count() or 1) as pool:
        yield from pool.map(lambda plugin: _diagnose(registry, plugin, timeout, context), plugins)


def _diagnose(registry: Registry, plugin: PluginInfo, timeout: float, context: Any) -> Diagnosis:
    notes = []
    if not plugin.described and plugin.source == "third-party":
        notes.append(
            f"has no registry.toml, so that its components are not listed: `maskwright describe {plugin.module}` prints one"
        )
    if plugin.error:
        return Diagnosis(plugin, "unreadable", problems=(plugin.error,), notes=tuple(notes))
    mine, theirs = context.Pipe(duplex=False)
    options = {"files": registry.files, "third_party": registry.third_party, "disabled": registry.disabled}
    process = context.Process(target=_load, args=(theirs, dict(os.environ), options, plugin.key), daemon=True)
    process.start()
    theirs.close()
    try:
        told = _receive(mine, _PATIENCE)
        if told == "started":
            told = _receive(mine, timeout)
        if told is None:
            process.kill()
            said = f"its import did not end within {timeout:g} seconds"
            return Diagnosis(plugin, "timeout", timeout, (said,), tuple(notes))
        if told == "gone":
            process.join(5)
            said = f"its import ended the process with exit code {process.exitcode}"
            return Diagnosis(plugin, "crashed", problems=(said,), notes=tuple(notes))
    finally:
        process.kill()
        process.join()
        mine.close()
    problems, more = told["problems"], told["notes"]
    return Diagnosis(plugin, told["result"], told["seconds"], tuple(problems), (*notes, *more))


def _receive(connection: Connection, seconds: float) -> Any:
    """What the process says; None when it says nothing in time, "gone" when it died."""
    try:
        return connection.recv() if connection.poll(seconds) else None
    except (EOFError, OSError):
        return "gone"


def _load(
    connection: Connection, environment: Mapping[str, str], options: Mapping[str, Any], key: tuple[str, str]
) -> None:
    """In the process: import one plugin and tell what happened."""
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    os.environ.clear()
    os.environ.update(environment)
    registry = Registry(**options)
    plugin = next(one for one in registry.plugins() if one.key == key)
    described = [info for info in registry.find() if info.plugin.key == key]
    connection.send("started")
    begun = time.perf_counter()
    told: dict[str, Any] = {"result": "ok", "problems": [], "notes": []}
    try:
        classes = registry.load(plugin)
    except PluginLoadError as error:
        cause = error.__cause__
        if plugin.extras and isinstance(cause, ModuleNotFoundError):
            told["result"] = "needs-extra"
            told["notes"].append(f"needs the extra {', '.join(plugin.extras)}: {error}")
        else:
            told["result"] = "failed"
            told["problems"].append(explain(cause) if cause is not None else str(error))
    else:
        if plugin.described:
            registered = [describe_component(component, plugin) for component in classes]
            told["problems"] += [f"catalogue: {said}" for said in drift(described, registered)]
    told["seconds"] = round(time.perf_counter() - begun, 3)
    connection.send(told)


def explain(error: BaseException) -> str:
    """An exception in one line: what it says, and the file and line where it was raised."""
    said = f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen")
    ]
    return f"{said} ({frames[-1].filename}:{frames[-1].lineno})" if frames else said


# -- what distributions require ----------------------------------------------------------------------------------


@attrs.frozen
class Unmet:
    """A requirement of a distribution that the environment does not meet; `installed` is a version, or empty."""

    distribution: str
    requirement: str
    installed: str

    def __str__(self) -> str:
        have = f"{self.installed} is installed" if self.installed else "it is not installed"
        return f"{self.distribution} requires {self.requirement}; {have}"


def unmet_requirements(distributions: Iterable[str]) -> list[Unmet]:
    """What these distributions require (extras aside) and do not get. One that is not installed requires nothing."""
    from packaging.requirements import InvalidRequirement, Requirement

    found = []
    for name in dict.fromkeys(distributions):
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in required:
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                found.append(Unmet(name, text, ""))
                continue
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                installed = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                installed = ""
            if not installed or not requirement.specifier.contains(installed, prereleases=True):
                found.append(Unmet(name, f"{requirement.name}{requirement.specifier}", installed))
    return found
