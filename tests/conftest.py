"""What all tests share: no trace in the user's home, and a folder that passes for an environment's site-packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sites import Site


@pytest.fixture(autouse=True)
def _on_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No setting of the user's reaches a test, and `doctor` remembers nothing beyond one."""
    for name in ("MASKWRIGHT_REGISTRY", "MASKWRIGHT_DISABLE_PLUGINS", "COLUMNS", "NO_COLOR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASKWRIGHT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    (tmp_path_factory.getbasetemp() / "cache" / "health.json").unlink(missing_ok=True)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """An empty one, on sys.path; what was imported from it is forgotten afterwards."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield Site(folder)
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if str(folder) in file:
            del sys.modules[name]
