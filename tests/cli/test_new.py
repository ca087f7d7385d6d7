"""`maskwright new`: what it writes, and which names it refuses."""

from __future__ import annotations

import ast
import importlib
import os
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

import maskwright.testing
from maskwright import scaffold
from maskwright.cli import cli
from maskwright.errors import BadName, MaskwrightError, OutputError
from maskwright.jobs.claims import load_claim
from maskwright.registry import KINDS, PluginInfo, Registry, describe_component, drift, read_catalogue


def new(*arguments: str):
    return CliRunner().invoke(cli, ["new", *arguments], prog_name="maskwright")


@pytest.fixture(params=KINDS)
def written(request, tmp_path, monkeypatch):
    """(kind, folder) of a new plugin whose package can be imported."""
    name = f"fresh-{request.param}"
    folder = scaffold.write(name, request.param, tmp_path)
    monkeypatch.syspath_prepend(folder)
    yield request.param, folder
    for module in [module for module in sys.modules if module.partition(".")[0] == name.replace("-", "_")]:
        del sys.modules[module]


def test_it_is_a_whole_distribution(written):
    kind, folder = written
    package = folder.name.replace("-", "_")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    module = scaffold.MODULES[kind]
    inside = {f"{package}/{name}" for name in ("__init__.py", f"{module}.py", "claim.py", "registry.toml")}
    assert files == inside | {"pyproject.toml", "README.md", ".gitignore", "tests/test_conformance.py"}
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["maskwright"] == {folder.name: package}
    assert project["build-system"]["build-backend"] == "hatchling.build"
    for path in folder.rglob("*.py"):
        ast.parse(path.read_text())
    assert not [
        path
        for path in folder.rglob("*")
        if "{{" in path.name or (path.is_file() and "{{" in path.read_text())
    ]


def test_its_catalogue_says_what_it_registers(written):
    _, folder = written
    package = folder.name.replace("-", "_")
    origin = PluginInfo(slug="", module="", source="third-party", folder=folder / package)
    ((plugin, described),) = read_catalogue(folder / package / "registry.toml", origin)
    registered = importlib.import_module(package).maskwright_components()
    assert plugin.module == package
    assert drift(described, [describe_component(one, plugin) for one in registered]) == []


def test_its_component_passes_the_kit(written):
    _, folder = written
    (component,) = importlib.import_module(folder.name.replace("-", "_")).maskwright_components()
    results = maskwright.testing.run_checks(component, max_examples=4)
    assert [f"{one.name}: {one.message}" for one in results if not one.ok] == []
    assert sum(one.status == "passed" for one in results) > len(results) / 2


def test_its_claim_fails_with_words_until_it_is_written(written):
    _, folder = written
    package = folder.name.replace("-", "_")
    claim = load_claim(PluginInfo(slug=folder.name, module=package))
    with pytest.raises(MaskwrightError, match=r"claim of fresh-.* is not written yet: fill in .*claim\.py"):
        claim.measure(0)
    assert not claim.decide([])


def test_the_command_says_what_to_do_next(tmp_path):
    done = new("next-mask", "--kind", "mask-strategy", "--dir", str(tmp_path))
    assert done.exit_code == 0
    assert "next_mask/masks.py" in done.output
    for command in ("maskwright install -e", "maskwright check next-mask", "pytest"):
        assert command in done.output


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("MyMask", "Perhaps 'my-mask'"),
        ("my_mask", "Perhaps 'my-mask'"),
        ("2-masks", "kebab-case"),
        ("mask-", "Perhaps 'mask'"),
        ("../evil", "Perhaps 'evil'"),
        ("", "kebab-case"),
        ("class", "Python's own"),
        ("match", "Python's own"),
        ("random", "maskwright offers a mask-strategy of that name"),
        ("json", "there is a Python package 'json'"),
        ("torch", "there is a Python package 'torch'"),
        ("maskwright", "there is a Python package 'maskwright'"),
    ],
)
def test_a_bad_name_is_refused_with_a_reason(tmp_path, name, words):
    done = new("--kind", "objective", "--dir", str(tmp_path), "--", name)
    assert done.exit_code == 2
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_is_a_mistake_in_use(tmp_path):
    done = new("my-thing", "--kind", "mask", "--dir", str(tmp_path))
    assert done.exit_code == 2
    assert "mask-strategy" in done.stderr
    with pytest.raises(BadName, match="kinds are mask-strategy"):
        scaffold.write("my-thing", "mask", tmp_path)


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "my-thing").mkdir()
    (tmp_path / "my-thing" / "precious").write_text("mine")
    done = new("my-thing", "--kind", "pruner", "--dir", str(tmp_path))
    assert done.exit_code == 1
    assert "exists already" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["my-thing", "precious"]


def test_a_place_that_is_no_folder_is_named(tmp_path):
    done = new("my-thing", "--kind", "pruner", "--dir", str(tmp_path / "nowhere"))
    assert done.exit_code == 1
    assert "nowhere is no folder" in done.stderr


@pytest.mark.parametrize("which", ["write_text", "rename"])
def test_nothing_is_left_when_the_disk_is_full(tmp_path, monkeypatch, which):
    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, which, full)
    with pytest.raises(OutputError, match=r"my-thing cannot be written: No space left on device"):
        scaffold.write("my-thing", "sampler", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_component_registered_by_a_program_takes_the_name_too(tmp_path):
    registry = Registry(third_party=False)

    @registry.register
    class Mine:
        kind, name, modalities, needs = "sampler", "my-own", frozenset(), frozenset()

        def sample(self, denoiser, request): ...

    with pytest.raises(BadName, match="program offers a sampler of that name"):
        scaffold.write("my-own", "pruner", tmp_path, registry)
