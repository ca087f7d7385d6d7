"""What `doctor` found out, remembered, so that `list` can mark broken plugins without importing them.

One small JSON file in the user's cache folder. A verdict counts only while the plugin is as it was: the same version and the
same modification times. What cannot be read or written is as good as nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskwright.registry import PluginInfo


def cache_file() -> Path:
    """Where the verdicts of this environment are kept: MASKWRIGHT_CACHE, or the system's folder for caches."""
    named = os.environ.get("MASKWRIGHT_CACHE")
    if named:
        folder = Path(named)
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", Path.home())) / "maskwright"
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches" / "maskwright"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskwright"
    return folder / "health.json"


def problems(plugins: Iterable[PluginInfo]) -> dict[tuple[str, str], str]:
    """Why plugins cannot be used, by their key: what reading found, else what the last `doctor` found."""
    known = _read()
    found: dict[tuple[str, str], str] = {}
    for plugin in plugins:
        remembered = known.get(_name(plugin))
        if plugin.error:
            found[plugin.key] = plugin.error
        elif isinstance(remembered, Mapping) and remembered.get("state") == _state(plugin):
            found[plugin.key] = str(remembered.get("problem", ""))
    return found


def remember(verdicts: Mapping[PluginInfo, str]) -> None:
    """Keep what `doctor` found of these plugins; an empty text clears what was remembered."""
    known = _read()
    for plugin, problem in verdicts.items():
        known.pop(_name(plugin), None)
        if problem:
            known[_name(plugin)] = {"problem": problem, "state": _state(plugin)}
    file = cache_file()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        partial.write_text(json.dumps(known, indent=1), "utf-8")
        partial.replace(file)


def _read() -> dict[str, Any]:
    try:
        known = json.loads(cache_file().read_text("utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    return known if isinstance(known, dict) else {}


def _name(plugin: PluginInfo) -> str:
    return " ".join((sys.prefix, *plugin.key))


def _state(plugin: PluginInfo) -> str:
    """Changes when the plugin does: its version, and when its files were last written."""
    from maskwright.registry import plugin_folder

    newest = 0
    with suppress(OSError):
        folder = plugin_folder(plugin)
        if folder is not None:
            newest = max((file.stat().st_mtime_ns for file in folder.glob("*.py")), default=0)
    return f"{plugin.version} {plugin.module} {newest}"
