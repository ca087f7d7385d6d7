"""skipped.jsonl: what a run could not read of its data. It outlives a kill, and every process adds to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskwright.errors import OutputError

FILE = "skipped.jsonl"


class Skipped:
    """The names of what was skipped in a run's folder, with the reasons. There is no file where nothing was."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._noted = set(self.all())

    def note(self, damage: Mapping[str, str]) -> None:
        """Write down what this process has not yet. Raises `OutputError` when the file cannot be written."""
        new = {name: reason for name, reason in damage.items() if name not in self._noted}
        if not new:
            return
        lines = "".join(
            json.dumps({"file": name, "reason": reason}, ensure_ascii=False) + "\n"
            for name, reason in new.items()
        )
        try:
            with self.path.open(
                "ab", buffering=0
            ) as file:  # one write, so that processes do not mix their lines
                file.write(lines.encode("utf-8", "replace"))
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written ({error.strerror}); free the disk.") from error
        self._noted |= new.keys()

    def all(self) -> dict[str, str]:
        """What any process has noted since the run began, in the order of the names."""
        if not self.path.exists():
            return {}
        found = {}
        for line in self.path.read_text("utf-8", "replace").splitlines():
            try:
                noted = json.loads(line)
            except ValueError:  # a kill cut it off; the file is found damaged again when it is needed again
                continue
            found[noted["file"]] = noted["reason"]
        return dict(sorted(found.items()))


def as_summary(found: Mapping[str, str]) -> dict[str, Any]:
    """Names and reasons as they stand in summary.json."""
    files = [{"file": name, "reason": reason} for name, reason in sorted(found.items())]
    return {"skipped": len(files), "skipped_files": files}


__all__ = ["FILE", "Skipped", "as_summary"]
