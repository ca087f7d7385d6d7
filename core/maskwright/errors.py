"""Every error a user can meet. The message says what was wrong, what is legal and what to do next.

`exit_code` is what the command line ends with: 2 for a mistake in how maskwright was asked,
1 for work that could not be done.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MaskwrightError(Exception):
    """The work could not be done."""

    exit_code = 1


class UsageError(MaskwrightError):
    """maskwright was asked for something that does not exist or does not fit."""

    exit_code = 2


class UnknownComponent(UsageError, LookupError):
    """No component of that name and kind is registered."""


class BadParameter(UsageError, ValueError):
    """A component was given a parameter that it does not have, or a value outside its range."""


class NameConflict(UsageError):
    """Two distributions claim one name: ask for `distribution/name`."""


class RegistryFileError(UsageError):
    """A registry.toml cannot be read: syntax error, unknown key, missing or repeated entry."""


class BadRequirement(UsageError, ValueError):
    """What is to be installed or removed is no package, no path, or not a plugin."""


class BadName(UsageError, ValueError):
    """A name is not legal for a new plugin, or it is taken."""


class MissingSignal(UsageError):
    """A strategy needs a signal that the chosen objective does not provide."""


class CountsMismatch(UsageError, ValueError):
    """A strategy keeps unequal numbers of positions, and the objective needs equal ones."""


class MissingColumn(UsageError):
    """An objective needs a batch column that the data do not have."""


class OverlappingMasks(UsageError, ValueError):
    """Rows that an objective mixes keep the same position, or the strategy does not promise that they will not."""


class BackboneMismatch(UsageError, TypeError):
    """A module is not a backbone of the kind that the objective works on."""


class UnsupportedLayout(UsageError, ValueError):
    """A strategy cannot mask this grid with these parameters."""


class BadBudget(UsageError, ValueError):
    """A pruning budget is outside its range, or does not fit the weights."""


class BadData(UsageError):
    """The user's data cannot be read."""


class BadModel(UsageError):
    """The user's model folder cannot be read."""


class BadRunFile(UsageError):
    """A run file cannot be read or has an unknown key."""


class UnequalMaskCounts(MaskwrightError, ValueError):
    """Rows of a mask keep different numbers of positions, where an equal number is needed."""


class MaskShapeError(MaskwrightError, ValueError):
    """A mask and a tensor, or two masks, do not fit each other."""


class MaskTooLarge(MaskwrightError, MemoryError):
    """A rule was asked for its dense form at a size that does not fit in memory."""


class PluginLoadError(MaskwrightError, ImportError):
    """A plugin could not be imported, or registers something else than it describes."""


class InstallError(MaskwrightError):
    """The environment could not be changed: no installer, not writable, managed by the system, or the installer failed."""


class OutputError(MaskwrightError, OSError):
    """The output folder cannot be written."""


class CheckpointError(MaskwrightError):
    """A checkpoint is missing, damaged, of another run, or not safetensors."""


class Interrupted(MaskwrightError):
    """The user, or the machine, stopped the run. The exit code is what a shell gives a program that Ctrl-C ended."""

    exit_code = 130


class NumericalError(MaskwrightError, ArithmeticError):
    """A loss or a weight is not finite."""


def nearest(word: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The known words most like `word`, best first; empty when none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=limit, cutoff=0.55)
    return close or [name for name in known if word and (word in name or name in word)][:limit]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'a' or 'b'?`, or nothing."""
    close = nearest(word, known)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def reason(error: BaseException) -> str:
    """An error's first line, without the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = str(error).partition("\n")[0].strip().removeprefix("Error while serializing: ")
    return said.removeprefix("I/O error: ") or type(error).__name__
