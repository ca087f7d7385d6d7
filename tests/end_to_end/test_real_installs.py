"""`maskwright install` and `uninstall` with the real pip in real environments, off line."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import third_party
from environments import Environment
from third_party import GOOD, MALFORMED, SILENT, TWIN_A, TWIN_B, plugin

NEWER = plugin("mw-good", "better-mask", version="2.0")


@pytest.fixture(scope="module")
def environment(new_environment: Callable[..., Environment]) -> Environment:
    """An environment with no plugin; each test leaves it so."""
    return new_environment()


@pytest.fixture
def clean(environment: Environment):
    yield environment
    left = json.loads(
        environment.python(
            "-P", "-c", "from maskwright.packages import print_installed; print_installed()"
        ).stdout
    )
    names = {offer[2] for offer in left["offers"]} | {*left["undescribed"], *left["errors"]}
    if names:
        environment.pip("uninstall", "--yes", *names)


def names(environment: Environment) -> list[str]:
    code = "from maskwright.registry import Registry; print(*Registry(built_in=False).names())"
    return environment.python("-P", "-c", code).stdout.split()


def test_a_wheel_is_installed_upgraded_and_removed_with_its_components_told(clean, wheelhouse):
    (old,), (new,) = wheelhouse(GOOD), wheelhouse(NEWER)

    done = clean.run("install", "--dry-run", str(old))
    assert (done.returncode, done.stdout) == (0, "Would change:\n  + mw-good 1.2\n")
    assert names(clean) == []

    done = clean.run("install", str(old))
    assert (done.returncode, done.stdout) == (
        0,
        "  + mw-good 1.2\nGained:\n  mask-strategy  good-mask  (mw-good 1.2)\n",
    )
    assert "Successfully installed mw-good-1.2" in done.stderr
    assert names(clean) == ["good-mask"]

    assert clean.run("install", str(old)).stdout == "Nothing changed.\n"
    found = {"PIP_FIND_LINKS": str(new.parent)}
    assert (
        clean.run("install", "-U", "mw-good", "--dry-run", env=found).stdout
        == "Would change:\n  ~ mw-good 1.2 → 2.0\n"
    )
    done = clean.run("install", "-U", "mw-good", env=found)
    assert done.stdout.splitlines() == [
        "  ~ mw-good 1.2 → 2.0",
        *("Gained:", "  mask-strategy  better-mask  (mw-good 2.0)"),
        *("Lost:", "  mask-strategy  good-mask  (mw-good 1.2)"),
    ]

    done = clean.run("uninstall", "--dry-run", "mw_good", "--json")
    assert json.loads(done.stdout)["lost"] == [
        {"kind": "mask-strategy", "name": "better-mask", "distribution": "mw-good", "version": "2.0"}
    ]
    assert names(clean) == ["better-mask"]
    done = clean.run("uninstall", "--yes", "mw_good")
    assert done.returncode == 0
    assert "- mw-good 2.0" in done.stdout
    assert names(clean) == []


def test_installing_runs_no_plugin_code(clean, wheelhouse, tmp_path):
    spy = tmp_path / "spy"
    done = clean.run(
        "install", *map(str, wheelhouse(third_party.SPYING)), env={"MASKWRIGHT_TEST_SPY": str(spy)}
    )
    assert "spying-mask" in done.stdout
    assert not spy.exists()


def test_what_is_wrong_with_a_plugin_is_said_at_once(clean, wheelhouse):
    done = clean.run("install", *map(str, wheelhouse(MALFORMED, SILENT, TWIN_A, TWIN_B)))
    assert done.returncode == 0
    notes = [line for line in done.stderr.splitlines() if line.startswith("Note: ")]
    assert any("mw-malformed cannot be used" in note and "TOML" in note for note in notes)
    assert any("mw-silent describes no components" in note for note in notes)
    assert any("'twin-mask' is offered by mw-twin-a and mw-twin-b" in note for note in notes)


def test_an_unknown_package_ends_in_one_sentence_and_no_change(clean):
    done = clean.run("install", "no-such-plugin-at-all")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("Error: No package 'no-such-plugin-at-all' was found")


def test_a_program_in_the_working_directory_is_not_taken_for_pip(clean, wheelhouse, tmp_path):
    for name in ("pip.py", "attrs.py", "packaging.py"):
        (tmp_path / name).write_text("raise SystemExit('hijacked')")
    done = clean.run("install", *map(str, wheelhouse(GOOD)), cwd=tmp_path)
    assert (done.returncode, "good-mask" in done.stdout) == (0, True)


def test_a_second_installer_waits_for_the_first(clean, wheelhouse):
    (wheel,) = wheelhouse(GOOD)
    with open(clean.packages / ".maskwright-install.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4242")
        lock.flush()
        second = subprocess.Popen(
            [clean.executable, "-P", "-m", "maskwright", "install", str(wheel)],
            env={**os.environ, "PIP_NO_INDEX": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "(process 4242) is changing this environment; waiting" in second.stderr.readline()
        time.sleep(0.3)
        assert second.poll() is None
        assert not (clean.packages / "mw_good").exists()
    out, _ = second.communicate(timeout=60)
    assert (second.returncode, "good-mask" in out) == (0, True)


def test_two_installers_at_once_both_succeed(clean, wheelhouse):
    both = [
        subprocess.Popen(
            [clean.executable, "-P", "-m", "maskwright", "install", str(wheel)],
            env={**os.environ, "PIP_NO_INDEX": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for wheel in wheelhouse(GOOD, TWIN_A)
    ]
    told = [one.communicate(timeout=60)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    # Each tells of its own only: neither sees half of the other's work.
    assert [text.count("(mw-") for text in told] == [1, 1]
    assert names(clean) == ["good-mask", "twin-mask"]


def without_override() -> None:
    """Give up root's right to write anywhere, so that a read-only folder is one for root too."""
    capability_bounding_set_drop, dac_override = 24, 1
    ctypes.CDLL(None).prctl(capability_bounding_set_drop, dac_override, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="gives up a Linux capability")
def test_a_read_only_environment_is_named_and_nothing_is_tried(new_environment, wheelhouse):
    environment = new_environment(TWIN_A)
    (wheel,) = wheelhouse(GOOD)
    environment.packages.chmod(0o555)
    try:
        for arguments in (("install", str(wheel)), ("uninstall", "--yes", "mw-twin-a")):
            done = environment.run(*arguments, preexec_fn=without_override)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.startswith("Error: The environment cannot be changed:")
            assert "is not writable" in done.stderr
            assert len(done.stderr.splitlines()) == 1
    finally:
        environment.packages.chmod(0o755)
    assert names(environment) == ["twin-mask"]


def test_without_pip_uv_does_the_work(clean, wheelhouse, tmp_path):
    (wheel,) = wheelhouse(GOOD)
    # As in an environment that uv made: no pip. The stand-in for uv writes down what it was asked.
    hides_pip = clean.packages / "no_pip.pth"
    hides_pip.write_text("import sys; sys.modules['pip'] = None\n")
    try:
        done = clean.run("install", str(wheel), env={"PATH": str(tmp_path)})
        assert done.returncode == 1
        assert "has no pip" in done.stderr
        assert "uv pip install" in done.stderr
        uv = tmp_path / "uv"
        uv.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/asked\n")
        uv.chmod(0o755)
        assert clean.run("install", str(wheel), env={"PATH": str(tmp_path)}).returncode == 0
    finally:
        hides_pip.unlink()
    assert Path(tmp_path, "asked").read_text().split() == [
        "pip",
        "install",
        "--python",
        clean.executable,
        "--",
        str(wheel),
    ]
