"""registry.toml says of every built-in plugin what it registers, and every plugin is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

import maskwright.plugins
from maskwright.registry import Registry, describe_component, drift, plugin_folder

REGISTRY = Registry(third_party=False)
PLUGINS = {plugin.slug: plugin for plugin in REGISTRY.plugins()}


@pytest.mark.parametrize("slug", PLUGINS)
def test_the_catalogue_is_what_the_plugin_registers(slug):
    fresh = Registry(third_party=False)
    described = [info for info in fresh.find() if info.plugin.slug == slug]
    plugin = fresh.plugin(slug)
    registered = [describe_component(component, plugin) for component in fresh.load(plugin)]
    assert drift(described, registered) == []
    assert described


@pytest.mark.parametrize("slug", PLUGINS)
def test_a_plugin_says_what_it_is(slug):
    plugin = PLUGINS[slug]
    assert plugin.module == f"maskwright.plugins.{slug}"
    assert plugin.title
    folder = plugin_folder(plugin)
    assert folder is not None
    assert folder.name == slug
    assert (folder / "README.md").is_file()
    for info in REGISTRY.find(plugin=slug):
        assert info.summary, info.name
        assert info.modalities, info.name
        assert all(parameter.help and parameter.type for parameter in info.parameters), info.name


@pytest.mark.parametrize("slug", sorted(PLUGINS.keys() - {"baselines"}))
def test_a_paper_has_its_number_its_family_and_its_claim(slug):
    plugin = PLUGINS[slug]
    assert plugin.paper_url
    assert plugin.family in ("images", "diffusion", "sequences", "pruning")
    folder = plugin_folder(plugin)
    assert folder is not None
    assert (folder / "claim.py").is_file()
    assert (folder / "claim.json").is_file()
    assert "<!-- claim -->" in (folder / "README.md").read_text("utf-8")


def test_every_folder_of_plugins_is_in_the_catalogue():
    folders = {
        path.name
        for parent in maskwright.plugins.__path__
        for path in Path(parent).iterdir()
        if (path / "__init__.py").is_file()
    }
    assert folders == set(PLUGINS)


def test_no_name_is_claimed_twice():
    assert REGISTRY.conflicts() == []
