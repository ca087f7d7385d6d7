"""What good and bad third-party plugins do to a program: installed as real wheels in one real environment."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import third_party
from environments import Environment

ASK = """
import json, sys
from maskwright.registry import Registry

registry = Registry()

def answer(ask):
    try:
        return ["ok", str(ask())]
    except Exception as error:
        return [type(error).__name__, str(error), type(error.__cause__).__name__]

create = lambda name: answer(lambda: registry.create("mask-strategy", name))
info = lambda name: answer(lambda: registry.info(name).qualified)
print(json.dumps({
    "info": {name: info(name) for name in sys.argv[1].split(",")},
    "create": {name: create(name) for name in sys.argv[2].split(",")},
    "torch": "torch" in sys.modules,
}))
"""

DESCRIBED = "good-mask raising-mask missing-mask hanging-mask tube mw-takes/tube twin-mask mw-twin-a/twin-mask mw-twin-b/twin-mask promised-mask spying-mask"
CREATED = "good-mask mw-good/good-mask raising-mask missing-mask mw-takes/tube twin-mask mw-twin-a/twin-mask mw-twin-b/twin-mask malformed-mask promised-mask other-mask silent-mask"


@pytest.fixture(scope="module")
def answers(troubled: Environment) -> dict[str, dict[str, list[str]]]:
    """What `info` and then `create` said of every component, in one program."""
    told = troubled.python(
        "-c",
        ASK,
        DESCRIBED.replace(" ", ","),
        CREATED.replace(" ", ","),
        env={"MASKWRIGHT_TEST_SPY": "/dev/full"},
    )
    return json.loads(told.stdout)


@pytest.mark.parametrize("name", ["good-mask", "mw-good/good-mask", "mw-takes/tube", "mw-twin-a/twin-mask"])
def test_a_good_plugin_works_beside_every_bad_one(answers, name):
    assert answers["create"][name] == ["ok", "Component(cell=1)"]


def test_nothing_here_imported_torch(answers):
    assert not answers["torch"]


def test_raising_on_import_names_the_plugin_and_chains_the_cause(answers):
    kind, message, cause = answers["create"]["raising-mask"]
    assert (kind, cause) == ("PluginLoadError", "RuntimeError")
    assert "'mw-raises'" in message
    assert "boom at import" in message
    assert "maskwright doctor" in message


def test_a_missing_package_is_named_with_the_extra_that_brings_it(answers):
    kind, message, cause = answers["create"]["missing-mask"]
    assert (kind, cause) == ("PluginLoadError", "ModuleNotFoundError")
    assert "a_package_nobody_has" in message
    assert "pip install 'mw-missing[fast]'" in message


def test_a_built_in_name_is_not_taken_over(answers):
    assert answers["info"]["tube"] == ["ok", "maskwright/tube"]
    assert answers["info"]["mw-takes/tube"] == ["ok", "mw-takes/tube"]


def test_two_plugins_with_one_name_are_both_reachable(answers):
    for ask in ("info", "create"):
        kind, message, _ = answers[ask]["twin-mask"]
        assert kind == "NameConflict"
        assert "'mw-twin-a/twin-mask' or 'mw-twin-b/twin-mask'" in message
    assert answers["info"]["mw-twin-b/twin-mask"] == ["ok", "mw-twin-b/twin-mask"]
    assert answers["create"]["mw-twin-b/twin-mask"][0] == "ok"


def test_components_of_a_malformed_catalogue_are_unknown_with_a_pointer(answers):
    kind, message, _ = answers["create"]["malformed-mask"]
    assert kind == "UnknownComponent"
    assert "mw-malformed" in message
    assert "maskwright doctor" in message


def test_without_a_catalogue_it_is_imported_when_its_name_is_asked_for(answers):
    assert answers["create"]["silent-mask"] == ["ok", "Component(cell=1)"]


def test_a_catalogue_that_promises_too_much_is_told_how_to_be_right(answers):
    kind, message, _ = answers["create"]["promised-mask"]
    assert kind == "PluginLoadError"
    assert "promised-mask" in message
    assert "maskwright describe" in message


def test_info_reads_what_cannot_be_imported(answers):
    for name in ("raising-mask", "missing-mask", "hanging-mask", "promised-mask", "spying-mask"):
        assert answers["info"][name][0] == "ok"


def test_looking_up_runs_no_plugin_code(troubled, tmp_path):
    spy = tmp_path / "spy"
    code = "import maskwright.registry as r; r.names(); r.find(modality='image'); r.info('spying-mask'); print(len(r.plugins()))"
    troubled.python("-c", code, env={"MASKWRIGHT_TEST_SPY": str(spy)})
    assert not spy.exists()
    troubled.python(
        "-c",
        "import maskwright; maskwright.create('mask-strategy', 'spying-mask')",
        env={"MASKWRIGHT_TEST_SPY": str(spy)},
    )
    assert spy.read_text() == "imported"


@pytest.mark.parametrize("switch", ["mw-good", "third-party"])
def test_a_plugin_is_switched_off_before_it_is_imported(troubled, switch):
    off = {"MASKWRIGHT_DISABLE_PLUGINS": "mw-good, mw-spying"} if switch == "mw-good" else {}
    code = f"from maskwright.registry import Registry; print(Registry.from_environment(third_party={bool(off)}).names('mask-strategy'))"
    names = troubled.python("-c", code, env=off).stdout
    assert "good-mask" not in names
    assert ("twin-mask" in names) == bool(off)
    assert "tube" in names


def test_a_hundred_plugins_are_listed_in_order_and_work(new_environment: Callable[..., Environment]):
    many = new_environment(*third_party.generated(100))
    code = """
import sys
from maskwright.registry import Registry
registry = Registry()
names = registry.names("mask-strategy", "many-*")
assert names == [f"many-{i:04}" for i in range(100)], names
assert not [name for name in sys.modules if name.startswith("mw_")]
assert registry.create("mask-strategy", "many-0042", cell=3).cell == 3
assert [name for name in sys.modules if name.startswith("mw_")] == ["mw_many_0042"]
"""
    many.python("-c", code)


def test_a_plugin_that_is_uninstalled_while_a_program_runs(new_environment: Callable[..., Environment]):
    environment = new_environment(third_party.GOOD, third_party.TWIN_A)
    code = """
import subprocess, sys
from maskwright.registry import Registry
registry = Registry()
registry.create("mask-strategy", "twin-mask")
assert registry.info("good-mask").plugin.version == "1.2"
subprocess.run([sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", "mw-good", "mw-twin-a"], check=True)
registry.create("mask-strategy", "twin-mask", cell=2)  # loaded already
try:
    registry.create("mask-strategy", "good-mask")
except Exception as error:
    print(type(error).__name__, error)
assert "good-mask" not in Registry().names()
"""
    told = environment.python("-c", code).stdout
    assert told.startswith("PluginLoadError")
    assert "uninstalled" in told
    assert "mw-good" in told
