"""How installed plugins are found: as importlib.metadata finds entry points, only faster, and damage stays where it is."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from maskwright.registry import Registry, _entries, _entry_points, module_folder

POINTS = """\
# a comment
[console_scripts]
maskwright = maskwright.cli:main
[maskwright]
one = pkg.one
 two=pkg.two:attribute
; another comment
three = pkg.three:attribute [extra]

no equals sign
[maskwright.other]
four = pkg.four
"""


def distribution(folder: Path, name: str, points: str | bytes, version: str = "1.0") -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_bytes(points if isinstance(points, bytes) else points.encode())


def test_entry_points_are_those_of_importlib_metadata(tmp_path):
    readable = POINTS.replace("no equals sign\n", "").replace(
        "; another comment\n", ""
    )  # it stumbles over these
    distribution(tmp_path, "plug", readable)
    theirs = importlib.metadata.PathDistribution(tmp_path / "plug-1.0.dist-info").entry_points
    assert list(_entries(POINTS)) == [(one.name, one.module) for one in theirs.select(group="maskwright")]
    assert list(_entries(POINTS)) == [("one", "pkg.one"), ("two", "pkg.two"), ("three", "pkg.three")]
    assert list(_entries("[console_scripts]\nx = y\n")) == []


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path / "second")
    monkeypatch.syspath_prepend(tmp_path / "first")
    return tmp_path


def test_the_first_of_two_distributions_of_one_name_counts(site):
    distribution(site / "second", "My_Plug", "[maskwright]\nplug = old_plug\n", "1.0")
    distribution(site / "first", "my_plug", "[maskwright]\nplug = new_plug\n", "2.0")
    mine = [found for found in _entry_points() if found[0] == "plug"]
    assert mine == [("plug", "new_plug", "my-plug", "2.0", site / "first")]


def test_a_distribution_without_dist_info_is_found(site):
    egg = site / "first" / "my_egg.egg-info"
    egg.mkdir(parents=True)
    (egg / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: My.Egg\nVersion: 3.0\n")
    (egg / "entry_points.txt").write_text("[maskwright]\negg = egg_module\n")
    assert ("egg", "egg_module", "my.egg", "3.0", site / "first") in list(_entry_points())


def test_damaged_files_of_one_touch_no_other(site):
    distribution(site / "first", "no_text", b"[maskwright]\nx = \xff\xfe\n")
    distribution(site / "first", "good_one", "[maskwright]\ngood-one = good_one\n")
    package = site / "first" / "good_one"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "registry.toml").write_bytes(b"\xff\xfe")
    found = {plugin.distribution: plugin for plugin in Registry(built_in=False).plugins()}
    assert "no-text" not in found
    assert "is no valid TOML" in found["good-one"].error


def test_a_module_is_found_beside_its_distribution_before_any_other(site):
    for place in ("first", "second"):
        (site / place / "twice").mkdir(parents=True)
        (site / place / "twice" / "__init__.py").touch()
    assert module_folder("twice") == site / "first" / "twice"
    assert module_folder("twice", site / "second") == site / "second" / "twice"
    assert module_folder("twice", site / "nowhere") == site / "first" / "twice"
    assert module_folder("nowhere_at_all", site / "second") is None
