"""`maskwright new`, then everything an author does next, with no edit in between, in a real environment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from environments import Environment

KINDS = ("mask-strategy", "objective", "pruner", "sampler")


@pytest.fixture(scope="module")
def author(new_environment: Callable[..., Environment], tmp_path_factory) -> tuple[Environment, Path]:
    """An environment in which a new plugin of each kind was written and installed editable."""
    environment, folder = new_environment(), tmp_path_factory.mktemp("author")
    for kind in KINDS:
        done = environment.run("new", f"demo-{kind}", "--kind", kind, "--dir", str(folder))
        assert done.returncode == 0, done.stderr
    done = environment.run(
        "install", *(word for kind in KINDS for word in ("-e", str(folder / f"demo-{kind}")))
    )
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        assert f"demo-{kind}  (demo-{kind} 0.1.0)" in done.stdout
    return environment, folder


def test_they_are_listed_as_third_party(author):
    environment, _ = author
    listed = environment.run("list", "demo-*").stdout
    for kind in KINDS:
        assert f"demo-{kind}" in listed
        assert f"demo-{kind} 0.1.0" in listed


@pytest.mark.parametrize("kind", KINDS)
def test_check_succeeds(author, kind):
    environment, _ = author
    done = environment.run("check", f"demo-{kind}", "--examples", "3")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
)
def test_pytest_succeeds(author, kind):
    environment, folder = author
    done = environment.python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=folder / f"demo-{kind}", check=False
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_doctor_finds_nothing_wrong(author):
    environment, _ = author
    done = environment.run("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in KINDS:
        assert f"demo-{kind}" in done.stdout


def test_verify_fails_honestly(author):
    environment, _ = author
    done = environment.run("verify", "demo-mask-strategy")
    assert done.returncode == 1
    assert "not written yet" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_edit_counts_at_once(author):
    environment, folder = author
    source = folder / "demo-mask-strategy" / "demo_mask_strategy" / "masks.py"
    before = source.read_text()
    code = "import maskwright; print(maskwright.create('mask-strategy', 'demo-mask-strategy'))"
    try:
        source.write_text(before.replace("cell: int = setting(1,", "cell: int = setting(7,"))
        assert "cell=7" in environment.python("-P", "-c", code).stdout
    finally:
        source.write_text(before)


def test_its_wheel_has_all_that_is_needed(author, new_environment, tmp_path):
    _, folder = author
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=folder / "demo-sampler", check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    other = new_environment().install([wheel])
    assert "demo-sampler 0.1.0" in other.run("list", "demo-sampler").stdout
    assert not (other.packages / "tests").exists()
