"""A module or file that no catalogue names, as a plugin in a registry of its own."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from maskwright.errors import UnknownComponent
from maskwright.registry import PluginInfo, Registry, is_path


def plugin_of_module(name: str) -> tuple[Registry, PluginInfo] | None:
    """A registry without any catalogue, and the plugin that a dotted module name or a path (file or package folder) means.

    A package folder is imported by its own name, from the folder it lies in. None where there is no such module; raises
    `UnknownComponent` where there is no such path. Nothing but parents of a dotted name is imported yet.
    """
    registry = Registry(built_in=False, third_party=False)
    if not is_path(name):
        try:
            if importlib.util.find_spec(name) is None:
                return None
        except (ImportError, ValueError, AttributeError):
            return None
        return registry, PluginInfo(
            slug=name.rpartition(".")[2], module=name, distribution="here", source="file"
        )
    path = Path(name).expanduser().absolute()
    if path.is_dir() and (path / "__init__.py").is_file():
        sys.path.insert(0, str(path.parent))
        return registry, PluginInfo(slug=path.name, module=path.name, distribution="here", source="file")
    if not path.is_file():
        raise UnknownComponent(
            f"There is no module {name}: it is no file, and no folder with an __init__.py."
        )
    return registry, PluginInfo(
        slug=path.stem,
        module=f".{os.sep}{path.name}",
        distribution="here",
        source="file",
        folder=path.parent,
    )


def components_of_module(name: str) -> list[Any] | None:
    """The component classes that a module or file registers; None where there is no such module."""
    found = plugin_of_module(name)
    if found is None:
        return None
    registry, plugin = found
    return registry.load(plugin)
