"""A new plugin: a complete distribution with a small working method of its kind, written from templates.

The folder `templates/common` has the files of every plugin, `templates/<kind>` those of one kind. `package` in a file's
path stands for the package's name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import keyword
import os
import re
import shutil
import sys
from pathlib import Path

import jinja2

from maskwright.errors import BadName, OutputError
from maskwright.registry import KINDS, Registry

TEMPLATES = Path(__file__).parent / "templates"
MODULES = {"mask-strategy": "masks", "objective": "objective", "pruner": "pruner", "sampler": "sampler"}
"""Where a component of each kind lies in its package."""


def check_name(name: str, registry: Registry | None = None) -> None:
    """Raise `BadName` unless a new plugin, its package and its component can all have this name."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        wish = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip(
            "-0123456789"
        )
        hint = f" Perhaps {wish!r}?" if wish and wish != name else ""
        raise BadName(
            f"{name!r} is no name for a plugin: it must be kebab-case, lower-case words joined by hyphens, such as "
            f"'my-mask'.{hint}"
        )
    package = name.replace("-", "_")
    if keyword.iskeyword(package) or keyword.issoftkeyword(package):
        raise BadName(
            f"{name!r} is a word of Python's own and cannot name a package; try '{name}-mask' or the like."
        )
    taken = (registry or Registry.from_environment()).find()
    for info in taken:
        if info.name == name:
            raise BadName(
                f"{name!r} is taken: {info.plugin.distribution} offers a {info.kind} of that name "
                f"(`maskwright info {name}`). Choose another."
            )
    if package in sys.stdlib_module_names or _importable(package):
        raise BadName(
            f"{name!r} is taken: there is a Python package {package!r}, which yours would hide. Choose another."
        )


def _importable(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def files(name: str, kind: str) -> dict[str, str]:
    """The files of a new plugin, by their path in its folder."""
    package = name.replace("-", "_")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    words = {
        "name": name,
        "kind": kind,
        "package": package,
        "module": MODULES[kind],
        "class_name": "".join(word.capitalize() for word in name.split("-")),
    }
    written = {}
    for folder in ("common", kind):
        for template in sorted((TEMPLATES / folder).rglob("*.j2")):
            source = template.relative_to(TEMPLATES).as_posix()
            target = source.partition("/")[2].removesuffix(".j2")
            target = "/".join(package if part == "package" else part for part in target.split("/"))
            written[target] = environment.get_template(source).render(words)
    return written


def write(
    name: str, kind: str, directory: str | os.PathLike[str] = ".", registry: Registry | None = None
) -> Path:
    """Write a new plugin into `directory/name` and return that folder. It appears whole or not at all.

    Raises `BadName`, or `OutputError` when the folder exists or cannot be written.
    """
    if kind not in KINDS:
        raise BadName(f"There is no kind {kind!r}; kinds are {', '.join(KINDS)}.")
    check_name(name, registry)
    parent = Path(directory)
    target = parent / name
    if not parent.is_dir():
        raise OutputError(f"{parent} is no folder; give an existing one with --dir.")
    if target.exists() or target.is_symlink():
        raise OutputError(f"{target} exists already; choose another name, or another place with --dir.")
    unfinished = parent / f".{name}.{os.getpid()}.part"
    try:
        for path, text in files(name, kind).items():
            file = unfinished / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8", newline="\n")
        unfinished.rename(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}.") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(unfinished)
    return target
