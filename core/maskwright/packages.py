"""Distributions of plugins: what installing or removing them does to the running interpreter's environment.

The work is pip's (or uv's, where there is no pip). Here are the checks before it, one installer at a time, and what
components came or went. Nothing here imports a plugin.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from maskwright.errors import BadRequirement, InstallError, did_you_mean
from maskwright.registry import Registry

ARCHIVES = (".whl", ".tar.gz", ".zip")

Say = Callable[[str], None]


@attrs.frozen
class Offer:
    """A component that an installed distribution offers."""

    kind: str
    name: str
    distribution: str
    version: str = ""


@attrs.frozen
class Installed:
    """What the plugins of an environment offer, as their catalogues say."""

    offers: frozenset[Offer] = frozenset()
    undescribed: frozenset[str] = frozenset()
    """Distributions with a plugin but no registry.toml: what they offer is known once they are imported."""
    errors: Mapping[str, str] = attrs.field(factory=dict)
    """Distributions whose plugin cannot be used, and why."""


@attrs.frozen
class Change:
    """One distribution that is (or would be) installed or removed; a version is empty where it is absent."""

    name: str
    before: str
    after: str

    def __str__(self) -> str:
        if not self.before:
            return f"+ {self.name} {self.after}"
        if not self.after:
            return f"- {self.name} {self.before}"
        return (
            f"~ {self.name} {self.before} → {self.after}"
            if self.before != self.after
            else f"~ {self.name} {self.after}"
        )


@attrs.frozen
class Outcome:
    """What changed: distributions, and components gained and lost."""

    changes: tuple[Change, ...] = ()
    gained: tuple[Offer, ...] = ()
    lost: tuple[Offer, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {name: list(value) for name, value in attrs.asdict(self).items()}


# -- what may be asked for -----------------------------------------------------------------------------------


def requirement(text: str) -> str:
    """A requirement as pip is to be given it: PEP 508 (`name>=1`, `name @ url`), or the path of a wheel or project.

    Raises `BadRequirement` for anything else, options above all: `--index-url=…` is no package.
    """
    text = text.strip()
    if text.startswith("-"):
        raise BadRequirement(
            f"{text!r} is an option, not a package; `maskwright install` passes no options on. "
            "Set pip's options in its configuration or environment (PIP_INDEX_URL, …), or call pip yourself."
        )
    if "\n" in text or "\0" in text:
        raise BadRequirement(f"{text!r} must be one line: a package's name, such as 'my-plugin>=1.2'.")
    looks_like_path = text.endswith(ARCHIVES) or os.sep in text.partition("@")[0] or text in (".", "..")
    if looks_like_path and "://" not in text:
        path = Path(text).expanduser().absolute()
        if not path.exists():
            raise BadRequirement(f"There is no file or folder {text!r} to install.")
        return str(path)
    try:
        return str(Requirement(text))
    except InvalidRequirement as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise BadRequirement(
            f"{text!r} is no requirement ({reason}); write a package's name, such as 'my-plugin' or 'my-plugin>=1.2', "
            "or the path of a wheel."
        ) from None


def project(path: str | os.PathLike[str]) -> str:
    """The absolute path of a project folder for an editable install. Raises `BadRequirement` when it is none."""
    folder = Path(path).expanduser().absolute()
    if not any((folder / name).is_file() for name in ("pyproject.toml", "setup.py")):
        raise BadRequirement(
            f"{str(path)!r} is no project: it has no pyproject.toml. `maskwright new NAME --kind …` writes one."
        )
    return str(folder)


def installed_plugin(text: str) -> str:
    """The name of an installed distribution that brings a plugin. Raises `BadRequirement` for any other."""
    try:
        asked = Requirement(text)
    except InvalidRequirement:
        asked = None
    if asked is None or asked.specifier or asked.extras or asked.url or asked.marker:
        raise BadRequirement(f"{text!r} is no package's name; `maskwright list` shows what is installed.")
    name = canonicalize_name(asked.name)
    if name == "maskwright":
        raise BadRequirement("That is maskwright itself: `pip uninstall maskwright` removes it.")
    present = {
        canonicalize_name(entry.dist.name)
        for entry in importlib.metadata.entry_points(group="maskwright")
        if entry.dist is not None
    }
    if name in present:
        return name
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        hint = did_you_mean(name, present) or " `maskwright list` shows what is."
        raise BadRequirement(f"{text!r} is not installed.{hint}") from None
    raise BadRequirement(f"{text!r} brings no maskwright plugin; `pip uninstall {name}` removes it.")


# -- with what -----------------------------------------------------------------------------------------------


@attrs.frozen
class Installer:
    """The program that changes the environment: pip of the running interpreter, or uv where there is no pip."""

    name: str
    command: tuple[str, ...]

    def install(
        self, packages: Sequence[str], editable: Sequence[str], upgrade: bool, *extra: str
    ) -> list[str]:
        """The command line that installs these (already checked) requirements."""
        words = [*self.command, "install", *self._target(), *extra]
        words += ["--upgrade"] * upgrade
        for path in editable:
            words += ["--editable", path]
        return [*words, "--", *packages] if packages else words

    def uninstall(self, names: Sequence[str]) -> list[str]:
        """The command line that removes these (already checked) distributions."""
        return [
            *self.command,
            "uninstall",
            *self._target(),
            *(["--yes"] if self.name == "pip" else []),
            "--",
            *names,
        ]

    def _target(self) -> list[str]:
        return [] if self.name == "pip" else ["--python", sys.executable]


def find_installer() -> Installer:
    """pip, or uv. Raises `InstallError` with the way forward when this environment is not to be, or cannot be, changed."""
    in_venv = sys.prefix != sys.base_prefix
    if not in_venv and (Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").is_file():
        raise InstallError(
            f"{sys.executable} belongs to the system, which does not want packages installed into it (PEP 668). "
            "Make an environment and use maskwright there: `python3 -m venv ~/maskwright`, then "
            "`~/maskwright/bin/pip install maskwright` and `~/maskwright/bin/maskwright install …`."
        )
    folder = Path(sysconfig.get_path("purelib"))
    if not _writable(folder) and (in_venv or not site.ENABLE_USER_SITE):
        raise InstallError(
            f"The environment cannot be changed: {folder} is not writable. Ask its owner, or make one of your own: "
            "`python3 -m venv ~/maskwright`, then `~/maskwright/bin/pip install maskwright`."
        )
    # -P: a pip.py in the working directory is not the interpreter's pip.
    if importlib.util.find_spec("pip") is not None:
        return Installer("pip", (sys.executable, "-P", "-m", "pip", "--disable-pip-version-check"))
    if uv := shutil.which("uv"):
        return Installer("uv", (uv, "pip"))
    raise InstallError(
        f"{sys.executable} has no pip. `{sys.executable} -m ensurepip` adds it; in an environment that uv made, put uv on "
        "the PATH, or run `uv pip install …` (in a uv project: `uv add …`) yourself."
    )


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


# -- one at a time -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(say: Say) -> Iterator[None]:
    """Hold the environment's lock: two `maskwright install` at once would see half of each other's work.

    `say` is told when another process has it and this one waits.
    """
    folder = Path(sysconfig.get_path("purelib"))
    if not _writable(folder):
        folder = Path(site.getusersitepackages())
        folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # no such locks here
        yield
        return
    with open(folder / ".maskwright-install.lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            other = file.read().strip()
            say(
                f"Another maskwright{f' (process {other})' if other else ''} is changing this environment; "
                "waiting until it has finished …"
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


# -- what there is -------------------------------------------------------------------------------------------

_SNAPSHOT = "import maskwright.packages; maskwright.packages.print_installed()"


def print_installed() -> None:
    """Write what the third-party plugins offer to standard output, as JSON."""
    registry = Registry(built_in=False)
    plugins = registry.plugins()
    content = {
        "offers": [
            [info.kind, info.name, info.plugin.distribution, info.plugin.version] for info in registry.find()
        ],
        "undescribed": [one.distribution for one in plugins if not one.described and not one.error],
        "errors": {one.distribution: one.error for one in plugins if one.error},
    }
    json.dump(content, sys.stdout)


def installed() -> Installed:
    """What the plugins of the environment offer now, read by a new process: this one has its search path from before."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", _SNAPSHOT], capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise InstallError(f"The environment's plugins cannot be listed: {reason}.")
    content = json.loads(done.stdout)
    return Installed(
        frozenset(Offer(*words) for words in content["offers"]),
        frozenset(content["undescribed"]),
        content["errors"],
    )


def versions() -> dict[str, str]:
    """Every installed distribution's version, by canonical name, read anew."""
    importlib.invalidate_caches()
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        if (name := distribution.metadata["Name"]) is not None:
            found.setdefault(canonicalize_name(name), distribution.version)
    return found


# -- doing it ------------------------------------------------------------------------------------------------


def install(
    packages: Sequence[str],
    editable: Sequence[str] = (),
    *,
    upgrade: bool = False,
    dry_run: bool = False,
    say: Say = lambda text: None,
) -> Outcome:
    """Install checked requirements (see `requirement`) and project folders, and say what changed.

    `say` is given the installer's own words, line by line. With `dry_run` nothing changes and the outcome has what would.
    """
    installer = find_installer()
    if dry_run:
        return Outcome(changes=_would_install(installer, packages, editable, upgrade, say))
    with alone(say):
        before, had = installed(), versions()
        _run(installer.install(packages, editable, upgrade), say)
        after, has = installed(), versions()
    changes = _changes(had, has)
    return _outcome(before, after, changes, _notes(before, after, changes))


def uninstall(names: Sequence[str], *, dry_run: bool = False, say: Say = lambda text: None) -> Outcome:
    """Remove checked distributions (see `installed_plugin`) and say what changed, or with `dry_run` what would."""
    installer = find_installer()
    if dry_run:
        before, had = installed(), versions()
        lost = [offer for offer in before.offers if canonicalize_name(offer.distribution) in names]
        return Outcome(
            tuple(Change(name, had.get(name, ""), "") for name in names), lost=tuple(_sorted(lost))
        )
    with alone(say):
        before, had = installed(), versions()
        _run(installer.uninstall(names), say)
        after, has = installed(), versions()
    return _outcome(before, after, _changes(had, has), ())


def _would_install(
    installer: Installer, packages: Sequence[str], editable: Sequence[str], upgrade: bool, say: Say
) -> tuple[Change, ...]:
    had = versions()
    if installer.name == "uv":
        words = _run(installer.install(packages, editable, upgrade, "--dry-run"), say)
        found = re.findall(r"^ \+ ([\w.-]+)(?:==| @ )(\S+)", words, flags=re.MULTILINE)
    else:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.json")
            _run(
                installer.install(
                    packages, editable, upgrade, "--dry-run", "--quiet", "--report", str(report)
                ),
                say,
            )
            parts = [one["metadata"] for one in json.loads(report.read_text("utf-8"))["install"]]
        found = [(part["name"], part["version"]) for part in parts]
    names = [(canonicalize_name(name), version) for name, version in found]
    return tuple(Change(name, had.get(name, ""), version) for name, version in sorted(names))


def _changes(had: Mapping[str, str], has: Mapping[str, str]) -> tuple[Change, ...]:
    differing = sorted(name for name in {*had, *has} if had.get(name) != has.get(name))
    return tuple(Change(name, had.get(name, ""), has.get(name, "")) for name in differing)


def _outcome(
    before: Installed, after: Installed, changes: tuple[Change, ...], notes: Iterable[str]
) -> Outcome:
    def bare(offers: Iterable[Offer]) -> dict[tuple[str, str, str], Offer]:
        return {(one.kind, one.name, one.distribution): one for one in offers}

    old, new = bare(before.offers), bare(after.offers)
    gained = [offer for key, offer in new.items() if key not in old]
    lost = [offer for key, offer in old.items() if key not in new]
    return Outcome(changes, tuple(_sorted(gained)), tuple(_sorted(lost)), tuple(notes))


def _sorted(offers: Iterable[Offer]) -> list[Offer]:
    return sorted(offers, key=lambda offer: (offer.kind, offer.name, offer.distribution))


def _notes(before: Installed, after: Installed, changes: Iterable[Change]) -> Iterator[str]:
    """What the user should know of what came: plugins that do not work, that say nothing, or that are none."""
    touched = {change.name for change in changes if change.after}
    brings = {canonicalize_name(offer.distribution) for offer in after.offers}
    for name, error in sorted(after.errors.items()):
        if before.errors.get(name) != error or canonicalize_name(name) in touched:
            yield f"{name} cannot be used: {error}"
    for name in sorted(after.undescribed):
        if name not in before.undescribed or canonicalize_name(name) in touched:
            yield f"{name} describes no components (it has no registry.toml); they are known once it is imported."
    silent = touched - brings - {canonicalize_name(name) for name in {*after.errors, *after.undescribed}}
    if touched and silent == touched:
        yield f"None of {', '.join(sorted(touched))} brings a maskwright plugin."
    gained = after.offers - before.offers
    for offer in _sorted(gained):
        others = {
            one.distribution for one in after.offers if (one.kind, one.name) == (offer.kind, offer.name)
        }
        if len(others) > 1:
            yield (
                f"The {offer.kind} {offer.name!r} is offered by {' and '.join(sorted(others))}: ask for "
                f"{offer.distribution}/{offer.name}."
            )


def _run(command: Sequence[str], say: Say) -> str:
    """Run the installer, pass its lines on, and return them. Raises `InstallError` with its reason."""
    lines: list[str] = []
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                say(lines[-1])
    except OSError as error:
        raise InstallError(f"{command[0]} cannot be run: {error.strerror}.") from None
    if process.returncode:
        raise InstallError(explain(lines, process.returncode))
    return "\n".join(lines)


_REASONS = (
    (
        r"externally[- ]managed",
        "This Python belongs to the system, which does not want packages installed into it (PEP 668). Make an environment: "
        "`python3 -m venv ~/maskwright`.",
    ),
    (
        r"Read-only file system|Permission denied",
        "The environment cannot be changed: a folder of it is not writable. Ask its owner, or make one of your own: "
        "`python3 -m venv ~/maskwright`.",
    ),
    (r"No space left on device", "The disk is full; nothing more can be installed."),
)


def explain(lines: Sequence[str], exit_code: int) -> str:
    """One sentence for why an installer failed, from what it printed."""
    text = "\n".join(lines)
    for pattern, words in _REASONS:
        if re.search(pattern, text, flags=re.IGNORECASE):
            return words
    missing = re.search(r"No matching distribution found for (\S+)", text) or re.search(
        r"Because (\S+) was not found", text
    )
    if missing:
        return (
            f"No package {missing[1]!r} was found that fits this Python; look for a spelling mistake, or give the path of "
            "a wheel."
        )
    errors = [line.partition(":")[2].strip() for line in lines if re.match(r"(ERROR|error|×)", line.strip())]
    reason = next((one for one in errors if one), lines[-1].strip() if lines else "it said nothing")
    return f"Nothing was installed or removed: {reason.rstrip('.')} (exit code {exit_code})."
