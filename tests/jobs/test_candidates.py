"""Several pruners on one model: the table, a pruner that fails, stopping and going on, and mistakes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import transformers
from click.testing import CliRunner
from test_prune import LENGTH, llama, text  # noqa: F401 - fixtures

from maskwright.cli import cli
from maskwright.errors import UsageError
from maskwright.jobs.candidates import Comparison, Outcome, Plan, _collected, compare, render
from maskwright.registry import Registry

FAILING = """
import attrs
from maskwright.errors import BadModel
from maskwright import hookimpl

@attrs.frozen
class Fails:
    kind, name, modalities, needs = "pruner", "fails", frozenset({"text"}), frozenset()
    budgets, changes_weights = frozenset({"sparsity", "pattern"}), False

    def prune(self, model, task):
        raise BadModel("This pruner wants a model with 3 legs.")

@hookimpl
def maskwright_components():
    return [Fails]
"""
DESCRIBED = """
[plugins.failing]
module = "./failing.py"
[[plugins.failing.components]]
kind = "pruner"
name = "fails"
modalities = ["text"]
summary = "Fails"
budgets = ["pattern", "sparsity"]
"""


def shared(model, data, **more):
    return {
        **{"model.source": str(model), "data.source": str(data), "data.length": LENGTH},
        **{"run.calibration": 8, "run.batch_size": 4, "budget.sparsity": 0.5},
        **more,
    }


def test_pruners_are_ranked_and_a_failing_one_stops_no_other(tmp_path, llama, text):  # noqa: F811
    (tmp_path / "failing.py").write_text(FAILING)
    (tmp_path / "registry.toml").write_text(DESCRIBED)
    arguments = ["--registry", str(tmp_path / "registry.toml"), "compare-pruners", str(llama)]
    arguments += ["--pruners", "fails,magnitude", "--data", str(text), "--sparsity", "0.5"]
    arguments += [
        "--set",
        f"data.length={LENGTH}",
        "--set",
        "run.calibration=8",
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(cli, [*arguments, "--set", "magnitude.compare=global", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["measure"] == "perplexity"
    assert told["pending"] == 0
    row, last = told["pruners"]
    assert last["pruner"] == "fails"
    assert last["failures"] == {"0": "This pruner wants a model with 3 legs."}
    assert row["pruner"] == "magnitude"
    assert row["quality"] != told["dense"]
    assert row["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert row["peak_memory"] > 10**8
    assert {"dense", "bit-packed", "compressed-tensors-bitmask"} <= set(row["sizes"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "This pruner wants a model with 3 legs." in page
    assert "fails, seed 0, failed" in page
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "runs" / "magnitude-seed0" / "model")


def test_a_comparison_that_was_stopped_goes_on(tmp_path, llama, text):  # noqa: F811
    out = tmp_path / "out"
    command = [sys.executable, "-m", "maskwright", "compare-pruners", str(llama)]
    command += ["--pruners", "random", "--seeds", "0,1", "--data", str(text), "--sparsity", "0.5"]
    command += ["--set", f"data.length={LENGTH}", "--set", "run.calibration=8", "--out", str(out)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    first = out / "runs" / "random-seed0" / "summary.json"
    for _ in range(1200):
        if first.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert f"go on with: maskwright compare-pruners --resume {out}" in said
    assert "<strong>Unfinished.</strong>" in (out / "report.html").read_text()
    before = first.stat().st_mtime_ns
    comparison = compare(Plan.read(out), out, resume=True)
    assert first.stat().st_mtime_ns == before, "what was done is not done again"
    assert comparison.pending == 0
    (only,) = comparison.outcomes
    assert sorted(only.summaries) == [0, 1]
    assert (only.spread("quality", "after") or 0) > 0


def outcome(pruner, after, *, better="lower", seeds=(0,), layers=()):
    quality = {"measure": "perplexity" if better == "lower" else "accuracy", "better": better, "before": 0.9}
    summaries = {
        seed: {
            "quality": {**quality, "after": value},
            "sparsity": 0.5,
            "seconds": 12.0,
            "sizes": {"dense": 1000, "bit-packed": 600},
            "layers": list(layers),
        }
        for seed, value in zip(seeds, after)
    }
    return Outcome(pruner, summaries, {}, dict.fromkeys(seeds, 10**9))


def test_the_best_comes_first_and_what_failed_last(tmp_path):
    plan = Plan(("c", "b", "a"), (0,))
    for pruner, after in (("a", 3.0), ("b", 2.0)):
        place = tmp_path / "runs" / f"{pruner}-seed0"
        place.mkdir(parents=True)
        summary = {**outcome(pruner, (after,)).summaries[0], "finished": True}
        (place / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "runs" / "c-seed0.error.json").write_text('{"said": "No."}')
    assert [one.pruner for one in _collected(plan, tmp_path).outcomes] == ["b", "a", "c"]


def test_means_and_spreads_are_over_seeds():
    one = outcome("a", (2.0, 4.0), seeds=(0, 1))
    assert one.mean("quality", "after") == 3.0
    assert one.spread("quality", "after") == pytest.approx(2**0.5)
    assert one.mean("sizes", "bit-packed") == 600
    assert one.mean("nothing", "here") is None
    assert outcome("a", (2.0,)).spread("quality", "after") is None


def test_a_page_draws_layers_only_where_they_differ(tmp_path):
    even = [{"name": "a", "kept": 5, "total": 10}, {"name": "b", "kept": 5, "total": 10}]
    uneven = [{"name": "a", "kept": 2, "total": 10}, {"name": "b", "kept": 8, "total": 10}]
    plan = Plan(("a", "b"), (0,), {"budget": {"sparsity": 0.5}})

    def page(*outcomes):
        return render(Comparison(plan, tmp_path, outcomes))

    assert "Removed share by weight" not in page(outcome("a", (1.0,), layers=even))
    drawn = page(outcome("a", (1.0,), layers=even), outcome("b", (2.0,), layers=uneven))
    assert "Removed share of each weight, by pruner: b from 20" in drawn
    assert "lower is better" in drawn
    assert "No run has finished yet" in page()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Name the pruners to compare"),
        (["--pruners", "magnitude", "--seeds", "a"], "must be whole numbers"),
        (["--pruners", "magnitude,magnitude"], "Name each pruner and seed once"),
        (["--pruners", "magnitud"], "magnitude"),
        (["--pruners", "magnitude", "--set", "run.seed=3"], "seeds with --seeds"),
        (["--pruners", "magnitude", "--set", "magnitude.compar=row"], "compare"),
        (["--pruners", "magnitude", "--sparsity", "1.5"], "must be in [0, 1)"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, arguments, said):
    done = CliRunner().invoke(cli, ["compare-pruners", *arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert not (tmp_path / "out").exists()


def test_only_a_comparison_is_resumed(tmp_path):
    with pytest.raises(UsageError, match=r"it has no comparison\.toml"):
        Plan.read(tmp_path)
    plan = Plan(("a",), (0, 1), {"budget": {"sparsity": 0.5}}, {"a": {"steps": 3}})
    (tmp_path / "comparison.toml").write_text(plan.toml())
    assert Plan.read(tmp_path) == plan
    assert plan.runs == [("a", 0), ("a", 1)]

    registry = Registry(third_party=False, built_in=False)
    for name, budgets in (("a", frozenset({"sparsity"})), ("finds-out", frozenset())):
        words = {"kind": "pruner", "name": name, "modalities": frozenset({"text"}), "needs": frozenset()}
        methods = {"budgets": budgets, "changes_weights": False, "prune": lambda self, model, task: None}
        registry.register(type("Made", (), {**words, **methods}))
    assert plan.overrides("a", 1, registry) == {
        "budget": {"sparsity": 0.5},
        "run": {"seed": 1},
        "pruner": {"name": "a", "steps": 3},
    }
    assert "budget" not in plan.overrides("finds-out", 1, registry)
