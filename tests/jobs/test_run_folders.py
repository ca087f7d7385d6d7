"""`Run`: its folder, steps, metrics and what it leaves."""

import errno
import json
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch
from small_runs import lines, small
from torch import nn

from maskwright import Mask, load_masks
from maskwright.errors import CheckpointError, Interrupted, NumericalError, OutputError, UsageError
from maskwright.jobs.run import Run
from maskwright.jobs.settings import resolve


class Counter:
    """A state that counts."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Killed(Exception):
    """Stands for a kill: nothing of the run's own is done after it."""


def opened(folder, **how):
    return Run(small(), folder=folder, quiet=True, **how)


def loop(run, counter, total=6, *, stop_before=None, seen=None, during=lambda step: None):
    """Counts; `during` is called in each step, and what it returns is the loss."""
    for step in run.steps(total, {"counter": counter}):
        if step.index == stop_before:
            raise Killed
        loss = during(step)
        counter.count += 1
        if seen is not None:
            seen.append((step.index, torch.rand(()).item()))
        run.log(step, loss=float(counter.count) if loss is None else loss)


# -- the folder --------------------------------------------------------------------------------------------------


def test_folders_are_numbered_where_none_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "pretrain-7").mkdir(parents=True)
    for name in ("pretrain-8", "pretrain-9"):
        with opened(None) as run:
            assert run.folder == Path("runs") / name


def test_a_folder_has_the_settings_that_repeat_the_run(tmp_path):
    with opened(tmp_path / "run"):
        pass
    assert resolve("pretrain", tmp_path / "run" / "run.toml") == small()


@pytest.mark.parametrize("file", ["run.toml", "thesis.txt"])
def test_a_folder_that_is_not_empty_is_refused_and_left_as_it_is(tmp_path, file):
    (tmp_path / file).write_text("precious")
    with pytest.raises(OutputError, match="choose another one with --out"):
        opened(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(file, "precious")]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/run cannot be written \(Not a directory\)"):
        opened(tmp_path / "file" / "run")


def test_a_read_only_folder_is_one_sentence_and_nothing_is_left(tmp_path, monkeypatch):
    real = os.open

    def refusing(path, flags, *rest, **named):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(tmp_path)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(OutputError, match=r"run.toml cannot be written \(Permission denied\)"):
        opened(tmp_path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_before_the_first_step_leaves_no_folder(tmp_path):
    with pytest.raises(UsageError), opened(tmp_path / "run"):
        raise UsageError("no such thing")
    assert not (tmp_path / "run").exists()


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    with opened(tmp_path / "run"):
        with pytest.raises(OutputError, match="still at work in another process"):
            opened(tmp_path / "run", resume=True)
    with opened(tmp_path / "run", resume=True):
        pass


# -- steps and resuming --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5])
def test_a_resumed_run_goes_on_from_its_checkpoint_with_the_same_random_numbers(tmp_path, stop):
    whole, parts = [], []
    with opened(tmp_path / "whole") as run:
        loop(run, Counter(), seen=whole)
    with pytest.raises(Killed), opened(tmp_path / "run") as run:
        loop(run, Counter(), stop_before=stop, seen=parts)
    counter = Counter()
    saved = stop - stop % 2
    with opened(tmp_path / "run", resume=True) as run:
        loop(run, counter, seen=(again := []))
    assert [index for index, _ in again] == list(range(saved, 6))
    assert parts[:saved] + again == whole
    assert counter.count == 6
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_each_of_several_loops_has_its_own_checkpoint(tmp_path):
    def job(run, stop=None):
        first, second = Counter(), Counter()
        loop(run, first, 3)
        loop(run, second, 5, stop_before=stop)
        return first.count, second.count

    with pytest.raises(Killed), opened(tmp_path) as run:
        job(run, stop=3)
    with opened(tmp_path, resume=True) as run:
        assert job(run) == (3, 5)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))


def test_a_finished_run_resumes_to_its_end_at_once(tmp_path):
    with opened(tmp_path) as run:
        loop(run, Counter())
    with opened(tmp_path, resume=True) as run:
        loop(run, counter := Counter(), stop_before=0)
    assert counter.count == 6


def test_only_settings_that_change_no_number_may_change(tmp_path):
    with opened(tmp_path) as run:
        loop(run, Counter())
    with Run(small(run__log_every=3, run__save_every=1), folder=tmp_path, resume=True, quiet=True):
        pass
    with pytest.raises(CheckpointError, match=r"run.lr was 0.0015, now it is 0.1"):
        Run(small(run__lr=0.1), folder=tmp_path, resume=True)


def test_resuming_what_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="There is no run to resume"):
        opened(tmp_path / "nothing", resume=True)
    with pytest.raises(UsageError, match="Name the folder"):
        opened(None, resume=True)


def test_the_state_of_another_loop_is_refused(tmp_path):
    with opened(tmp_path) as run:
        loop(run, Counter())
    with opened(tmp_path, resume=True) as run, pytest.raises(CheckpointError, match="is of another run"):
        loop(run, Counter(), total=7)


# -- stopping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_step_ends_the_run_after_it_with_a_checkpoint(tmp_path, number):
    def stopped(step):
        if step.index == 3:
            os.kill(os.getpid(), number)

    said = r"Stopped after step 4 of 6; go on with: maskwright pretrain --resume"
    before = signal.getsignal(number)
    with opened(tmp_path) as run, pytest.raises(Interrupted, match=said) as caught:
        loop(run, Counter(), during=stopped)
    assert caught.value.exit_code == 130
    assert signal.getsignal(number) == before
    with opened(tmp_path, resume=True) as run:
        loop(run, resumed := Counter(), seen=(again := []))
    assert (resumed.count, len(again)) == (6, 2)


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path):
    def stopped(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with opened(tmp_path) as run, pytest.raises(KeyboardInterrupt):
        loop(run, counter := Counter(), during=stopped)
    assert counter.count == 0


def test_a_run_in_another_thread_goes_without_signals(tmp_path):
    counter = Counter()

    def work():
        with opened(tmp_path) as run:
            loop(run, counter)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert counter.count == 6


# -- metrics -----------------------------------------------------------------------------------------------------


def test_log_every_writes_the_first_the_last_and_every_nth(tmp_path):
    with Run(small(run__log_every=4), folder=tmp_path, quiet=True) as run:
        loop(run, Counter(), total=10)
    assert [line["step"] for line in lines(tmp_path)] == [1, 4, 8, 10]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("-inf"))])
def test_a_number_that_is_not_finite_ends_the_run_and_names_the_step(tmp_path, value):
    said = r"The loss is .* at step 4 of 6.* step 2 is intact"
    with opened(tmp_path) as run, pytest.raises(NumericalError, match=said):
        loop(run, Counter(), during=lambda step: value if step.index == 3 else 1.0)
    assert len(lines(tmp_path)) == 3


def test_a_line_of_metrics_is_whole_or_not_there_when_the_disk_is_full(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with Run(small(run__save_every=100), folder=tmp_path, quiet=True) as run:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
            with pytest.raises(OutputError, match=r"metrics.jsonl cannot be written \(.*\); free the disk"):
                loop(run, Counter(), total=60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")
    assert len(lines(tmp_path)) > 5


# -- what is left --------------------------------------------------------------------------------------------------


def test_finish_writes_all_that_the_report_reads(tmp_path):
    masks = {"weight": Mask(torch.rand(4, 4) > 0.5)}
    with opened(tmp_path) as run:
        loop(run, Counter())
        result = run.finish(
            {"final_loss": 0.5},
            model=nn.Linear(2, 2),
            masks=masks,
            pictures={"originals": torch.rand(1, 3, 8, 8)},
            samples=[{"text": "Ä", "tokens": ["Ä"], "order": [0]}],
            files={"note.txt": "beside the model"},
        )
    assert result.folder == tmp_path
    assert result.report == tmp_path / "report.html"
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written == dict(result.summary)
    assert {"job": "pretrain", "finished": True, "final_loss": 0.5}.items() <= written.items()
    assert torch.equal(load_masks(tmp_path / "masks.safetensors")["weight"].keep, masks["weight"].keep)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        *("run.toml", "metrics.jsonl", "summary.json", "report.html", "masks.safetensors", "samples.jsonl"),
        *(
            "pictures.safetensors",
            "model/model.safetensors",
            "model/note.txt",
            "checkpoint/loop-1.safetensors",
        ),
    }
    assert "could not be read" not in (tmp_path / "report.html").read_text()


def test_a_model_folder_is_whole_or_not_there(tmp_path):
    class Failing:
        def save_pretrained(self, folder):
            (Path(folder) / "half").write_text("")
            raise OSError(errno.ENOSPC, "No space left on device")

    with (
        opened(tmp_path) as run,
        pytest.raises(OutputError, match=r"model cannot be written \(No space left on device\)"),
    ):
        run.finish({}, model=Failing())
    assert not [path for path in tmp_path.rglob("*") if "model" in path.name]
    assert not (tmp_path / "summary.json").exists()


def test_a_part_is_a_run_of_its_own_and_found_again(tmp_path):
    with opened(tmp_path) as run:
        for steps in (6, 0):
            with run.part("base", small(run__seed=3)) as base:
                counter = Counter()
                before = len(lines(tmp_path / "base"))
                loop(base, counter)
                assert base.folder == tmp_path / "base"
                assert counter.count == 6
                assert len(lines(tmp_path / "base")) - before == steps
