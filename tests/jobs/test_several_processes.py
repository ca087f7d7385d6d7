"""Two gloo processes give the numbers of one, leave one folder, and end without a word."""

import json

import pytest
from small_runs import lines, process, run, wait_for_steps

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def two(folder, **changes):
    started = process(folder, launcher=TORCHRUN, **changes)
    out, err = started.communicate(timeout=240)
    assert started.returncode == 0, err
    return err


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one_and_end_cleanly(tmp_path):
    given = {"run__steps": 20, "run__batch_size": 16}
    said = two(tmp_path / "two", **given)
    run(tmp_path / "one", **given)
    one, both = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == len(both) == 20
    for a, b in zip(one, both):
        assert a == pytest.approx(b, abs=1e-4)
    for word in ("Warning", "warning", "destroy_process_group", "Traceback", "Error"):
        assert word not in said
    a, b = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert a["held_out_loss"] == pytest.approx(b["held_out_loss"], abs=1e-4)
    assert (a["processes"], b["processes"]) == (1, 2)
    names = [{path.name for path in (tmp_path / name).rglob("*")} for name in ("one", "two")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_began(tmp_path):
    given = {"run__steps": 400, "run__batch_size": 16, "run__save_every": 5}
    started = process(tmp_path / "run", launcher=TORCHRUN, **given)
    wait_for_steps(started, tmp_path / "run", 6, seconds=120)
    started.terminate()
    out, err = started.communicate(timeout=120)
    assert started.returncode != 0
    done = len(lines(tmp_path / "run"))
    assert 6 <= done < 400
    assert (tmp_path / "run" / "checkpoint" / "loop-1.safetensors").exists()
    run(tmp_path / "run", resume=True, **given)
    run(tmp_path / "whole", **given)
    for a, b in zip(lines(tmp_path / "run"), lines(tmp_path / "whole"), strict=True):
        assert a == pytest.approx(b, abs=1e-3)
