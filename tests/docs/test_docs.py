"""The examples of the docs and of README.md are run, their commands parsed, and their components put through the kit."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from click.testing import CliRunner
from transformers import ViTConfig, ViTModel

import maskwright
import maskwright.testing
from maskwright import registry as registry_module
from maskwright.cli import cli
from maskwright.jobs.observers import HOOKS, Observers, _host
from maskwright.registry import KINDS, PluginInfo, read_catalogue
from maskwright.testing import pytest_plugin

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/write-a-plugin.md",
    "docs/registry-file.md",
    "docs/command-line.md",
    "docs/runs.md",
)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """(line, text) of the page's fenced blocks in a language."""
    text = (ROOT / page).read_text("utf-8")
    return [
        (text.count("\n", 0, match.start(2)), match[2])
        for match in FENCE.finditer(text)
        if match[1] == language
    ]


def run(page: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run a page's Python blocks one after the other in one namespace; a traceback shows the page's own lines."""
    for line, text in blocks(page, "python"):
        code = compile("\n" * line + text, str(ROOT / page), "exec")
        exec(code, namespace)
    return namespace


def components(namespace: dict[str, Any]) -> list[type]:
    return [
        value
        for value in namespace.values()
        if isinstance(value, type) and attrs.has(value) and getattr(value, "kind", None) in KINDS
    ]


def conform(classes: list[type]) -> Iterator[str]:
    for component in classes:
        results = maskwright.testing.run_checks(component, max_examples=4)
        assert any(one.status == "passed" for one in results)
        yield from (f"{one.component}: {one.message}" for one in results if not one.ok)


@pytest.fixture(scope="module")
def things(request) -> dict[str, Any]:
    """What the examples take for granted: a user's model and data, and the marker of the pytest plugin."""
    pytest_plugin.pytest_configure(request.config)  # an older editable install does not have its entry point
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    vit = ViTModel(config)
    small = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    images = torch.randn(2, 3, 32, 32)
    return {
        "vit": vit,
        "images": images,
        "batch": {"pixels": images},
        "generator": torch.Generator().manual_seed(0),
        "bound": maskwright.create("objective", "hpm", **small).bind(vit),
        "strategy": maskwright.create("mask-strategy", "hard-patches"),
    }


@pytest.fixture(scope="module")
def written(things) -> dict[str, Any]:
    """The namespace of docs/write-a-plugin.md after its examples."""
    return run("docs/write-a-plugin.md", dict(things))


def test_write_a_plugin_shows_a_component_of_each_kind(written):
    assert {component.kind for component in components(written)} == set(KINDS)


@pytest.mark.parametrize("name", ["Stripes", "EasyFirst", "MeanColour", "ColumnNorm", "OneShot"])
def test_its_components_conform(written, name):
    assert list(conform([written[name]])) == []


def test_its_errors_say_what_the_page_says(written, capsys, things):
    run("docs/write-a-plugin.md", dict(things))
    told = capsys.readouterr().out
    assert "stripes: width=9 must be in [1, 4]." in told
    assert "'easy-first' needs the signal 'patch_loss'" in told
    assert "'hpm'" in told


def test_readme_runs_and_its_component_conforms(things):
    namespace = run("README.md", dict(things))
    assert things["vit"].embeddings.patch_embeddings.projection.weight.grad.abs().sum() > 0
    (checkers,) = components(namespace)
    assert list(conform([checkers])) == []


def test_registry_file_runs(tmp_path, monkeypatch, capsys, things):
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "registry.toml").write_text(blocks("docs/registry-file.md", "toml")[1][1])
    (_, source), *_ = [one for one in blocks("docs/write-a-plugin.md", "python") if "class Stripes" in one[1]]
    hook = (
        "\nfrom maskwright import hookimpl\n@hookimpl\ndef maskwright_components():\n    return [Stripes]\n"
    )
    (tmp_path / "my" / "stripes.py").write_text(source + hook)
    monkeypatch.chdir(tmp_path)
    namespace = run("docs/registry-file.md", {})
    assert namespace["strategy"].width == 2
    assert "stripes ./stripes.py ['stripes']" in capsys.readouterr().out


def test_runs_page_runs_and_names_every_hook_of_an_observer():
    namespace = run("docs/runs.md", {})
    assert set(HOOKS) <= set(namespace)
    assert Observers({"page": _host("page", SimpleNamespace(**namespace))})


@pytest.mark.parametrize("page", PAGES)
def test_toml_examples_are_read(page, tmp_path):
    for _, text in blocks(page, "toml"):
        tomllib.loads(text)
        if text.startswith("[plugins."):
            (tmp_path / "registry.toml").write_text(text)
            ((plugin, found),) = read_catalogue(tmp_path / "registry.toml", PluginInfo(slug="", module=""))
            assert plugin.module
            assert found


def test_registry_file_has_every_key_and_no_other():
    page = (ROOT / "docs/registry-file.md").read_text("utf-8")

    def keys(title: str) -> set[str]:
        section = page.partition(title)[2].partition("\n## ")[0]
        return set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))

    assert keys("## Keys of a plugin") == registry_module._PLUGIN_KEYS
    assert keys("## Keys of a component") == registry_module._COMPONENT_KEYS
    sentence = page.partition("A parameter has ")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == registry_module._PARAMETER_KEYS


def told_keys(section: str) -> set[str]:
    """The keys that docs/command-line.md names for `section`, in a table or in a sentence."""
    text = (ROOT / "docs/command-line.md").read_text("utf-8").partition(section)[2]
    text = text.lstrip("\n").partition("\n\n")[0]
    if not text.startswith("|"):
        return set(re.findall(r"`(\w+)`", text))
    rows = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    return {word for row in rows for word in re.findall(r"`(\w+)`", row)}


def test_command_line_page_names_every_key_of_list_as_json():
    document = json.loads(CliRunner().invoke(cli, ["list", "--json"], prog_name="maskwright").stdout)
    assert told_keys("`list --json` is an object with\n") == set(document)
    assert told_keys("\nA component has\n") == set(document["components"][0])
    assert told_keys("\nA plugin has") == set(document["plugins"][0])


def test_command_line_page_names_every_command():
    page = (ROOT / "docs/command-line.md").read_text("utf-8").partition("```sh")[0]
    assert set(
        re.findall(r"`([\w-]+)[^`]*`", "\n".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)))
    ) == set(cli.table)


def commands(page: str) -> list[str]:
    return [
        line.split(" > ")[0].strip()
        for _, text in blocks(page, "sh")
        for line in text.splitlines()
        if line.startswith("maskwright ")
    ]


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in commands(page)}))
def test_commands_are_legal(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line.replace("…", ""), comments=True)[1:]
    context = cli.make_context("maskwright", words)
    name, command, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(name, rest, parent=context)
