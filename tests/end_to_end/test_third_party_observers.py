"""Observers that third-party wheels bring, in a real run of a real environment."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import third_party
from environments import Environment

STEPS = 3


@pytest.fixture(scope="module")
def environment(new_environment: Callable[..., Environment]) -> Environment:
    return new_environment(third_party.WATCHING, third_party.GRUMBLING, third_party.GOOD, third_party.RAISES)


@pytest.fixture(scope="module")
def watched(environment: Environment, tmp_path_factory):
    """A short run with an observer that writes down what it hears, and one that raises."""
    folder = tmp_path_factory.mktemp("watched")
    done = environment.run(
        *("pretrain", "-p", "mw-grumbling", "-p", "mw-watching", "--data", "digits", "--steps", str(STEPS)),
        *("--batch-size", "8", "--set", "run.log_every=1", "--quiet", "--out", str(folder / "run")),
        env={"MASKWRIGHT_TEST_SPY": str(folder / "heard"), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    heard = [json.loads(line) for line in (folder / "heard").read_text().splitlines()]
    return folder / "run", done.stderr, heard


def test_it_hears_the_whole_run_in_order(watched):
    _, _, heard = watched
    assert heard[0] == ["started", "pretrain", STEPS]
    assert heard[-1] == ["ended", "run"]
    words = [one[0] for one in heard[1:-1]]
    assert words == ["mask", "step"] * STEPS
    assert [one[1:] for one in heard if one[0] == "step"] == [[step, True] for step in range(1, STEPS + 1)]
    assert all(one[1] == 8 for one in heard if one[0] == "mask")


def test_one_that_raises_is_reported_once_and_the_run_goes_on(watched):
    folder, said, _ = watched
    complaints = [line for line in said.splitlines() if "mw-grumbling" in line]
    assert len(complaints) == 1
    assert "RuntimeError: no more steps, please" in complaints[0]
    assert "switched off" in complaints[0]
    assert (folder / "report.html").is_file()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) >= STEPS


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("mw-good", 2, "observes nothing"),
        ("mw-raises", 1, "boom at import"),
        ("mw-watchin", 2, "Did you mean 'mw-watching'"),
    ],
)
def test_what_cannot_observe_is_refused_before_the_run(environment, tmp_path, name, code, words):
    done = environment.run("pretrain", "-p", name, "--out", str(tmp_path / "run"), timeout=300)
    assert done.returncode == code
    assert words in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_an_observer_without_components_is_no_broken_plugin(environment):
    done = environment.run("doctor", "mw-watching")
    assert done.returncode == 0, done.stdout
