"""Virtual environments that see this interpreter's packages and the checkout, and install wheels for real, off line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Iterable
from pathlib import Path

import maskwright

CORE = Path(maskwright.__file__).resolve().parents[1]
PACKAGES = Path(sysconfig.get_path("purelib"))


class Environment:
    """A virtual environment. `run` is the command line in it, `python` the interpreter, `pip` its pip."""

    def __init__(self, folder: Path, *, core: Path | None = CORE) -> None:
        self.folder = folder
        venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
        self.executable = str(folder / "bin" / "python")
        self.packages = next(folder.glob("lib/python*/site-packages"))
        seen = [str(core)] * (core is not None) + [str(PACKAGES)]
        (self.packages / "these.pth").write_text("\n".join(seen) + "\n")
        for file in PACKAGES.glob("*coverage*.pth"):
            shutil.copy(file, self.packages)

    def python(self, *arguments: str, check: bool = True, **more: object) -> subprocess.CompletedProcess[str]:
        """Run the interpreter. `env` is added to the environment, in which nothing of the caller's Python is left."""
        kept = {
            name: text
            for name, text in os.environ.items()
            if not name.startswith(("PYTHON", "PIP_", "MASKWRIGHT"))
        }
        added = {
            "PYTHONNOUSERSITE": "1",
            "PIP_NO_INDEX": "1",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_BUILD_ISOLATION": "0",  # pip's spelling of --no-build-isolation
            "COLUMNS": "200",
            "NO_COLOR": "1",
            "MASKWRIGHT_CACHE": str(self.folder / "cache"),
        }
        more.setdefault("cwd", self.folder)
        more.setdefault("timeout", 120)
        done = subprocess.run(
            [self.executable, *arguments],
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env={**kept, **added, **more.pop("env", {})},
            **more,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def run(self, *arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
        """`maskwright ARGUMENTS…`; whatever it ends with is returned."""
        more.setdefault("check", False)
        return self.python("-P", "-m", "maskwright", *arguments, **more)

    def pip(self, *arguments: str) -> None:
        """`pip ARGUMENTS…`, off line."""
        self.python("-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)

    def install(self, wheels: Iterable[Path]) -> Environment:
        """Install wheels with pip, and nothing that they need."""
        self.pip("install", "--no-deps", *map(str, wheels))
        return self
