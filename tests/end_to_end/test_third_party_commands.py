"""What the command line says of good and bad third-party plugins, all installed in one real environment."""

from __future__ import annotations

import json

import pytest
from environments import Environment

PROBLEMS = {
    "mw-hangs": ("timeout", "did not end within"),
    "mw-lies": ("ok", "promised-mask is described but not registered"),
    "mw-malformed": ("unreadable", "is no valid TOML"),
    "mw-missing": ("needs-extra", "pip install 'mw-missing[fast]'"),
    "mw-raises": ("failed", "boom at import"),
}
"""Distribution → what `doctor` finds, and words of its explanation."""

FINE = ("mw-good", "mw-takes", "mw-twin-a", "mw-twin-b", "mw-spying", "mw-silent")


def lines_with(text: str, word: str) -> list[str]:
    """Those whose first word it is, the mark apart."""
    return [line for line in text.splitlines() if line.removeprefix("!").split()[:1] == [word]]


@pytest.fixture(scope="module")
def listed(troubled: Environment) -> str:
    """What `list` prints before any plugin was ever imported."""
    done = troubled.run("list", env={"MASKWRIGHT_CACHE": str(troubled.folder / "empty-cache")})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module")
def examined(troubled: Environment) -> dict:
    """What `doctor --json` says."""
    spy = str(troubled.folder / "spy")
    done = troubled.run("doctor", "--timeout", "6", "--json", env={"MASKWRIGHT_TEST_SPY": spy})
    assert done.returncode == 1
    return json.loads(done.stdout)


def test_list_shows_every_described_component_with_its_distribution(listed):
    for component, origin in {
        "good-mask": "mw-good 1.2",
        "raising-mask": "mw-raises 1.0",
        "missing-mask": "mw-missing 1.0",
        "hanging-mask": "mw-hangs 1.0",
        "promised-mask": "mw-lies 1.0",
        "mw-takes/tube": "mw-takes 1.0",
        "mw-twin-a/twin-mask": "mw-twin-a 1.0",
        "mw-twin-b/twin-mask": "mw-twin-b 1.0",
    }.items():
        (line,) = lines_with(listed, component)
        assert line.endswith(origin)


def test_list_tells_built_in_components_apart(listed):
    (line,) = lines_with(listed, "tube")
    assert "mw-" not in line
    assert "maskwright 0" not in line


def test_list_names_what_cannot_be_read_and_what_is_not_described(listed):
    (malformed,) = lines_with(listed, "mw-malformed")
    assert malformed.startswith("!")
    assert "no valid TOML" in listed
    (silent,) = lines_with(listed, "mw-silent")
    assert "maskwright describe mw_silent" in silent
    assert "silent-mask" not in listed


def test_list_as_json_has_the_same(troubled, listed):
    content = json.loads(troubled.run("list", "--json").stdout)
    assert content["schema"] == 1
    addresses = {one["address"] for one in content["components"] if one["source"] == "third-party"}
    assert {"good-mask", "mw-takes/tube", "mw-twin-a/twin-mask"} <= addresses
    plugins = {one["distribution"]: one for one in content["plugins"]}
    assert plugins["mw-good"]["version"] == "1.2"
    assert not plugins["mw-silent"]["described"]
    assert "TOML" in plugins["mw-malformed"]["problem"]


@pytest.mark.parametrize(
    "name", ["good-mask", "mw-good/good-mask", "hanging-mask", "raising-mask", "promised-mask"]
)
def test_info_needs_no_import(troubled, name):
    done = troubled.run("info", name)
    assert done.returncode == 0
    assert "side of a cell" in done.stdout
    assert "third-party" in done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("twin-mask", "ask for 'mw-twin-a/twin-mask' or 'mw-twin-b/twin-mask'"),
        ("malformed-mask", "cannot be used (mw-malformed): see `maskwright doctor`"),
        ("silent-mask", "`maskwright describe mw_silent` imports it"),
        ("goodmask", "Did you mean 'good-mask'"),
    ],
)
def test_info_on_what_has_no_answer_is_one_sentence(troubled, name, words):
    done = troubled.run("info", name)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_info_on_a_name_taken_twice_is_about_the_built_in_one(troubled):
    done = troubled.run("info", "tube")
    assert done.returncode == 0
    assert "mw-takes" not in done.stdout.partition("Parameters")[0]


@pytest.mark.parametrize("distribution", PROBLEMS)
def test_doctor_explains_each_bad_plugin(examined, distribution):
    result, words = PROBLEMS[distribution]
    (found,) = [one for one in examined["plugins"] if one["distribution"] == distribution]
    assert found["result"] == result
    assert words in " ".join(found["problems"] + found["notes"])


@pytest.mark.parametrize("distribution", FINE)
def test_doctor_finds_the_others_in_order_whatever_stands_beside_them(examined, distribution):
    (found,) = [one for one in examined["plugins"] if one["distribution"] == distribution]
    assert (found["result"], found["problems"]) == ("ok", [])
    assert found["seconds"] < 6


def test_doctor_names_the_conflicts(examined):
    conflicts = {one["name"]: one["claims"] for one in examined["conflicts"]}
    assert conflicts["tube"] == ["tube", "mw-takes/tube"]
    assert sorted(conflicts["twin-mask"]) == ["mw-twin-a/twin-mask", "mw-twin-b/twin-mask"]
    assert not examined["ok"]


def test_doctor_on_a_good_plugin_alone_is_content(troubled):
    done = troubled.run("doctor", "mw-good")
    assert done.returncode == 0, done.stdout
    assert "1 of 1 plugin work" in done.stdout


def test_list_marks_afterwards_what_doctor_found(troubled, examined):
    text = troubled.run("list").stdout
    for name in ("hanging-mask", "raising-mask"):
        assert lines_with(text, name)[0].startswith("!")
    assert lines_with(text, "good-mask")[0].startswith(" ")
    assert "boom at import" in troubled.run("info", "raising-mask").stdout


def test_listing_info_help_and_completion_run_no_plugin_code(troubled, tmp_path):
    spy = tmp_path / "spy"
    with_spy = {"MASKWRIGHT_TEST_SPY": str(spy)}
    for words in (
        ["list"],
        ["list", "--json"],
        ["list", "*spy*"],
        ["info", "spying-mask"],
        ["--help"],
        ["info", "spying"],
    ):
        troubled.run(*words, env=with_spy)
    for words in ("info spying", "check sp", "list --plugin mw-s"):
        asked = {
            **with_spy,
            "_MASKWRIGHT_COMPLETE": "bash_complete",
            "COMP_WORDS": f"maskwright {words}",
            "COMP_CWORD": str(len(words.split())),
        }
        assert "sp" in troubled.run(env=asked).stdout
    assert not spy.exists()
    assert troubled.run("describe", "mw_spying", env=with_spy).returncode == 0
    assert spy.read_text() == "imported"


def test_a_folder_chooses_no_code_to_run(troubled, tmp_path):
    spy = tmp_path / "spy"
    source = f"import pathlib; pathlib.Path({str(spy)!r}).write_text('imported')\n"
    for name in ("registry.toml", "good_mask.py", "mw_good.py", "conftest.py", "sitecustomize.py"):
        (tmp_path / name).write_text(
            source if name.endswith(".py") else '[plugins.here]\nmodule = "./good_mask.py"\n'
        )
    info = tmp_path / "here-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: here\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[maskwright]\nhere = good_mask\n")
    for words in (["list"], ["info", "good-mask"], ["doctor", "mw-good"]):
        done = troubled.run(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "here" not in done.stdout.split()
    assert not spy.exists()


def test_a_plugin_is_pinned_by_its_distribution_and_switched_off(troubled):
    off = troubled.run("list", "*-mask", env={"MASKWRIGHT_DISABLE_PLUGINS": "mw-twin-b"}).stdout
    assert lines_with(off, "twin-mask")[0].endswith("mw-twin-a 1.0")
    done = troubled.run("info", "mw-twin-b/twin-mask", env={"MASKWRIGHT_DISABLE_PLUGINS": "mw-twin-b"})
    assert done.returncode == 2
    assert "switched off" in done.stderr
    assert "mw-" not in troubled.run("--no-third-party", "list").stdout
