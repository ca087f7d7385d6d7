"""maskwright's own wheel: the same import paths as in a checkout, with all that a user needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from environments import CORE, Environment
from third_party import GOOD

ROOT = CORE.parent
SEES = """
import importlib, json, pkgutil, sys
import maskwright, maskwright.plugins
from maskwright.registry import Registry, built_in_catalogue
registry = Registry()
listed = "torch" in sys.modules
print(json.dumps({
    "package": maskwright.__file__,
    "catalogue": str(built_in_catalogue()),
    "names": registry.names(),
    "plugins": sorted(module.name for module in pkgutil.iter_modules(maskwright.plugins.__path__)),
    "torch": listed,
    "component": importlib.import_module("maskwright.plugins.baselines.masks").Random.__module__,
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("these tests run from an installed maskwright, not from a checkout")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (built,) = folder.glob("maskwright-*.whl")
    return built


@pytest.fixture(scope="module")
def user(wheel, tmp_path_factory, wheelhouse) -> Environment:
    """An environment into which the wheel was installed, and one third-party plugin; the checkout is not on its path."""
    environment = Environment(tmp_path_factory.mktemp("user") / "venv", core=None)
    environment.pip("install", "--no-deps", "--ignore-installed", str(wheel))
    return environment.install(wheelhouse(GOOD))


def sees(environment: Environment) -> dict:
    return json.loads(environment.python("-P", "-c", SEES).stdout)


def test_wheel_and_checkout_give_the_same_names_and_import_paths(user, new_environment):
    installed, checkout = sees(user), sees(new_environment(GOOD))
    for key in ("names", "plugins", "component"):
        assert installed[key] == checkout[key]
    assert installed["component"] == "maskwright.plugins.baselines.masks"
    assert not installed["torch"]
    assert "good-mask" in installed["names"]
    assert Path(installed["package"]).is_relative_to(user.packages)
    assert Path(installed["catalogue"]) == user.packages / "maskwright" / "registry.toml"
    assert Path(checkout["package"]).is_relative_to(CORE)
    assert Path(checkout["catalogue"]) == ROOT / "registry.toml"


def test_the_wheel_ships_what_plugins_need_and_no_tests(user):
    package = user.packages / "maskwright"
    shipped = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    source = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "plugins").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert source <= shipped
    assert {
        "py.typed",
        "registry.toml",
        "jobs/templates/report.html.j2",
        "scaffold/templates/common/pyproject.toml.j2",
    } <= shipped
    top = {path.name for path in user.packages.iterdir()}
    assert not top & {"tests", "benchmarks", "core", "plugins", "docs"}


def test_the_command_is_installed_and_lists(user):
    for command in ([str(user.folder / "bin" / "maskwright")], [user.executable, "-P", "-m", "maskwright"]):
        done = subprocess.run([*command, "list"], capture_output=True, text=True, cwd=user.folder)
        assert done.returncode == 0, done.stderr
        assert "random" in done.stdout
        assert "mw-good 1.2" in done.stdout


def test_a_new_plugin_can_be_written_from_the_wheel(user, tmp_path):
    done = user.run("new", "from-wheel", "--kind", "pruner", "--dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "from-wheel" / "from_wheel" / "pruner.py").is_file()
