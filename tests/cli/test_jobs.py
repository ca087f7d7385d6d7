"""`pretrain`, `prune` and `sample`: what the options come to, and what is printed at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from click.testing import CliRunner, Result

import maskwright.jobs
from maskwright.cli import cli
from maskwright.cli.jobs import SHORTCUTS
from maskwright.cli.session import Session
from maskwright.cli.values import value_of
from maskwright.jobs.run import Result as JobResult
from maskwright.jobs.settings import JOBS, Settings
from maskwright.registry import Registry


@attrs.define
class Job:
    """Stands in for the job: what it was asked for, and what it leaves."""

    summary: dict[str, Any] = attrs.field(
        factory=lambda: {"job": "pretrain", "finished": True, "final_loss": 0.123456}
    )
    samples: list[str] = attrs.field(factory=list)
    settings: Any = None
    asked: dict[str, Any] = attrs.field(factory=dict)

    def __call__(self, settings: Settings, **asked: Any) -> JobResult:
        self.settings, self.asked = settings, asked
        folder = Path(asked["folder"] or "runs/pretrain-1")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.toml").write_text(settings.toml())
        if self.samples:
            (folder / "samples.jsonl").write_text(
                "".join(json.dumps({"text": one}) + "\n" for one in self.samples)
            )
        return JobResult(folder, self.summary, folder / "report.html")


class Cuts:
    """Keeps everything."""

    kind, name = "pruner", "cuts"
    modalities = needs = frozenset()

    def prune(self, model, task): ...


class Fills:
    """Fills nothing."""

    kind, name = "sampler", "fills"
    modalities = frozenset()

    def sample(self, denoiser, request): ...


@pytest.fixture
def job(monkeypatch, tmp_path) -> Job:
    registry = Registry(third_party=False)
    registry.register(Cuts)
    registry.register(Fills)
    monkeypatch.setattr(Session, "registry", registry)
    monkeypatch.chdir(tmp_path)
    stand_in = Job()
    monkeypatch.setattr(maskwright.jobs, "execute", stand_in)
    return stand_in


def run(*args: str, **env: str) -> Result:
    result = CliRunner().invoke(cli, list(args), env=env, prog_name="maskwright")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def test_options_run_file_and_set_come_together(job, tmp_path):
    (tmp_path / "mine.toml").write_text("[run]\nsteps = 5\nseed = 1\n[strategy]\nratio = 0.5\n")
    result = run(
        "pretrain", "mine.toml", "--seed", "2", "--set", "run.batch_size=4", "--set", "strategy.ratio=0.6"
    )
    assert result.exit_code == 0, result.output
    settings = job.settings
    assert (settings.run.steps, settings.run.seed, settings.run.batch_size) == (5, 2, 4)
    assert settings.strategy.params == {"ratio": 0.6}
    assert job.asked["folder"] is None
    assert job.asked["resume"] is False
    assert job.asked["observers"] == ()
    assert job.asked["quiet"] is False


@pytest.mark.parametrize(
    ("args", "section", "key", "value"),
    [
        (["pretrain", "--strategy", "colormae"], "strategy", "name", "colormae"),
        (["pretrain", "--objective", "mae"], "objective", "name", "mae"),
        (["pretrain", "--model", "/vit"], "model", "source", "/vit"),
        (["pretrain", "--data", "digits"], "data", "source", "digits"),
        (["pretrain", "--steps", "3"], "run", "steps", 3),
        (["pretrain", "--batch-size", "3"], "run", "batch_size", 3),
        (["pretrain", "--seed", "3"], "run", "seed", 3),
        (["pretrain", "--lr", "0.5"], "run", "lr", 0.5),
        (["prune", "--pruner", "cuts", "--sparsity", "0.5"], "budget", "sparsity", 0.5),
        (["prune", "--pruner", "cuts", "--pattern", "1:4"], "budget", "pattern", "1:4"),
        (["prune", "--pruner", "cuts", "--params", "0.5"], "budget", "params", 0.5),
        (["prune", "--pruner", "cuts", "--flops", "0.5"], "budget", "flops", 0.5),
        (["prune", "--pruner", "cuts", "--bits", "1.61"], "budget", "bits", 1.61),
        (["prune", "--pruner", "cuts", "--layers", "3"], "budget", "layers", 3),
        (["sample", "--sampler", "fills", "--count", "2"], "request", "count", 2),
        (["sample", "--sampler", "fills", "--length", "9"], "request", "length", 9),
        (["sample", "--sampler", "fills", "--steps", "9"], "request", "steps", 9),
        (["sample", "--sampler", "fills", "--prompt", "The 1"], "request", "prompt", "The 1"),
    ],
)
def test_each_option_is_a_setting(job, args, section, key, value):
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert job.settings.as_dict()[section][key] == value


def test_every_shortcut_names_a_setting_that_its_job_has():
    for name, options in SHORTCUTS.items():
        for setting, _ in options:
            assert setting.partition(".")[0] in JOBS[name]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        ("3", 3),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('"3"', "3"),
        ("green", "green"),
        ("2:4", "2:4"),
        ("./photos", "./photos"),
        ("", ""),
        ("{ name = 'x' }", {"name": "x"}),
        ("1\nother = 2", "1\nother = 2"),
    ],
)
def test_values_are_toml_or_texts(text, value):
    assert value_of(text) == value
    assert type(value_of(text)) is type(value)


def test_out_observers_and_quiet_are_passed_on(job):
    run("pretrain", "--out", "here", "-p", "tensorboard", "-p", "mine", "--quiet")
    assert job.asked["folder"] == Path("here")
    assert job.asked["observers"] == ("tensorboard", "mine")
    assert job.asked["quiet"] is True


def test_the_end_says_numbers_folder_and_report(job):
    job.summary |= {"probe": {"linear": 0.75}, "layers": [1, 2], "data": "digits", "steps": 7, "shiny": True}
    lines = run("pretrain", "--out", "here").stdout.splitlines()
    assert [line.split(maxsplit=2) for line in lines] == [
        ["final", "loss", "0.1235"],
        ["probe", "linear", "0.75"],
        ["data", "digits"],
        ["steps", "7"],
        ["folder", "here"],
        ["report", "here/report.html"],
    ]


def test_sampled_texts_are_printed_first(job):
    job.samples = ["It was.", "It is."]
    output = run("sample", "--sampler", "fills", "--out", "here").stdout
    assert output.startswith("It was.\n\nIt is.\n\n")


def test_json_has_folder_report_and_summary_and_no_progress(job):
    result = run("pretrain", "--out", "here", "--json")
    assert json.loads(result.stdout) == {
        "folder": "here",
        "report": "here/report.html",
        "summary": job.summary,
    }
    assert job.asked["quiet"] is True


def test_of_several_processes_only_the_first_prints(job):
    assert run("pretrain", "--out", "here", RANK="1").stdout == ""
    assert run("pretrain", "--out", "there", RANK="0").stdout != ""


def test_resume_reads_the_runs_own_settings(job):
    run("pretrain", "--out", "mine", "--steps", "9", "--strategy", "colormae")
    assert run("pretrain", "--resume", "mine").exit_code == 0
    assert job.settings.run.steps == 9
    assert job.settings.strategy.name == "colormae"
    assert (job.asked["folder"], job.asked["resume"]) == (Path("mine"), True)
    run("pretrain", "--resume", "--out", "mine")
    assert (job.asked["folder"], job.asked["resume"]) == (Path("mine"), True)


def test_resume_without_a_name_takes_the_latest_run_of_the_job(job):
    for number in ("2", "10", "9"):
        run("pretrain", "--out", f"runs/pretrain-{number}", "--seed", number)
    Path("runs/pretrain-11").mkdir()
    Path("runs/pretrain-mine").mkdir()
    assert run("pretrain", "--resume").exit_code == 0
    assert job.asked["folder"] == Path("runs/pretrain-10")
    assert job.settings.run.seed == 10
    assert "There is no run to resume" in run("prune", "--resume").stderr


def test_a_folder_of_another_job_is_not_resumed(job):
    run("sample", "--sampler", "fills", "--out", "mine")
    result = run("pretrain", "--resume", "mine")
    assert result.exit_code == 2
    assert "this is of the job 'sample', not 'pretrain'; use `maskwright sample`" in result.stderr


def test_a_real_run_from_its_options_to_its_report(tmp_path):
    small = ["model.depth=1", "model.width=16", "model.heads=1", "objective.decoder_depth=1"]
    small += ["objective.decoder_width=16", "objective.decoder_heads=1"]
    pairs = [word for pair in small for word in ("--set", pair)]
    asked = [
        "pretrain",
        "--data",
        "digits",
        "--steps",
        "2",
        "--batch-size",
        "8",
        *pairs,
        "--out",
        str(tmp_path / "run"),
    ]
    result = run(*asked)
    assert result.exit_code == 0, result.output
    lines = dict(line.rsplit(maxsplit=1) for line in result.stdout.splitlines() if line)
    assert float(lines["final loss"]) > 0
    assert Path(lines["report"]).read_text("utf-8").startswith("<!")
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    again = run("pretrain", "--resume", str(tmp_path / "run"))
    assert again.exit_code == 0, again.output
    assert ["final", "loss", lines["final loss"]] in [line.split() for line in again.stdout.splitlines()]
    refused = run(*asked)
    assert (refused.exit_code, "holds a run already; go on with --resume" in refused.stderr) == (1, True)
