"""Wheels written by hand: small, whole, and installed by the real pip."""

from __future__ import annotations

import base64
import hashlib
import textwrap
import zipfile
from pathlib import Path

import attrs


@attrs.frozen
class Wheel:
    """A pure-Python distribution: its `maskwright` entry points, and its files by their path in site-packages."""

    name: str
    entry_points: dict[str, str]
    files: dict[str, str]
    version: str = "1.0"
    requires: tuple[str, ...] = ()
    group: str = "maskwright"

    @property
    def module_name(self) -> str:
        return self.name.replace("-", "_")

    @property
    def file_name(self) -> str:
        return f"{self.module_name}-{self.version}-py3-none-any.whl"

    def members(self) -> dict[str, str]:
        """What the archive holds, by path."""
        info = f"{self.module_name}-{self.version}.dist-info"
        metadata = [
            "Metadata-Version: 2.1",
            f"Name: {self.name}",
            f"Version: {self.version}",
            *(f"Requires-Dist: {one}" for one in self.requires),
        ]
        points = [f"[{self.group}]", *(f"{slug} = {module}" for slug, module in self.entry_points.items())]
        members = {
            **{path: textwrap.dedent(text) for path, text in self.files.items()},
            f"{info}/METADATA": "\n".join(metadata) + "\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/entry_points.txt": "\n".join(points) + "\n",
        }
        record = [f"{path},sha256={_digest(text)},{len(text.encode())}" for path, text in members.items()]
        return {**members, f"{info}/RECORD": "\n".join([*record, f"{info}/RECORD,,", ""])}

    def write(self, folder: Path) -> Path:
        """As a wheel, for pip."""
        target = folder / self.file_name
        with zipfile.ZipFile(target, "w") as archive:
            for path, text in self.members().items():
                archive.writestr(path, text)
        return target

    def unpack(self, packages: Path) -> None:
        """As pip would leave it in site-packages, for environments with a thousand of them."""
        for path, text in self.members().items():
            file = packages / path
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
