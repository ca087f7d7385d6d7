"""What a step costs: counted against products written out by hand, and told by every pretraining."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from small_runs import run
from torch import nn

from maskwright.jobs.costs import TIMED, Costs

CPU = torch.device("cpu")


def counted(forward, processes=1) -> Costs:
    costs = Costs(CPU, processes)
    with costs.step():
        with costs.forward():
            loss = forward()
        with costs.backward():
            loss.backward()
    return costs


def test_a_linear_layer_costs_three_products():
    layer = nn.Linear(5, 7)
    x = torch.randn(3, 5, requires_grad=True)
    costs = counted(lambda: layer(x).sum())
    assert costs.flops == 3 * (2 * 3 * 5 * 7)
    assert costs.without_gradient == 0


def test_inputs_without_gradient_save_one_of_them():
    layer = nn.Linear(5, 7)
    assert counted(lambda: layer(torch.randn(3, 5)).sum()).flops == 2 * (2 * 3 * 5 * 7)


@pytest.mark.parametrize("how", ["no_grad", "frozen"])
def test_a_teachers_part_is_stated_apart(how):
    student, teacher = nn.Linear(5, 7), nn.Linear(5, 11)
    teacher.requires_grad_(how != "frozen")

    def forward():
        x = torch.randn(3, 5)
        with torch.set_grad_enabled(how != "no_grad"):
            target = teacher(x)
        return student(x).sum() + target.detach().sum()

    costs = counted(forward)
    assert costs.without_gradient == 2 * 3 * 5 * 11
    assert costs.flops == 2 * (2 * 3 * 5 * 7) + costs.without_gradient


def test_attention_on_a_cpu_is_counted():
    b, h, q, k, d = 2, 3, 4, 6, 8
    query, key, value = (torch.randn(b, h, n, d, requires_grad=True) for n in (q, k, k))
    costs = counted(lambda: F.scaled_dot_product_attention(query, key, value).sum())
    product = 2 * b * h * q * k * d
    # Two products forward; the scores again and four gradients backward.
    assert costs.flops == 2 * product + 5 * product


def test_the_first_step_is_counted_and_the_others_are_timed():
    costs = counted(lambda: nn.Linear(5, 7)(torch.randn(3, 5)).sum(), processes=2)
    first = costs.flops
    assert first == 2 * 2 * (2 * 3 * 5 * 7)
    assert "seconds_per_step" not in costs.summary()
    for _ in range(3):
        with costs.step(), costs.forward(), costs.backward():
            pass
    assert costs.flops == first
    assert len(costs.seconds) == 3
    assert costs.summary()["seconds_per_step"] > 0
    costs.seconds.extend(range(TIMED))
    assert costs.summary()["seconds_per_step"] == pytest.approx(TIMED / 2, abs=1)


def test_the_state_holds_everything():
    costs = counted(lambda: nn.Linear(5, 7)(torch.randn(3, 5)).sum())
    costs.seconds.extend([0.5, 0.25])
    other = Costs(CPU)
    other.load_state_dict(costs.state_dict())
    assert other.state_dict()["seconds"].tolist() == [0.5, 0.25]
    assert {**other.summary(), "peak_memory": 0} == {**costs.summary(), "peak_memory": 0}


def test_the_peak_is_of_these_steps_alone():
    big = torch.ones(2**25)  # 128 MiB
    before = Costs(CPU).summary()["peak_memory"]
    del big
    after = Costs(CPU).summary()["peak_memory"]
    assert before > 2**27
    assert before - after > 2**26


def test_a_pretraining_says_what_its_steps_cost(tmp_path):
    result = run(tmp_path / "run", run__steps=3)
    for summary in (result.summary, json.loads((tmp_path / "run" / "summary.json").read_text())):
        # 8 images of 16 patches, 4 of them and a class token encoded: by far less than a dense step.
        assert 1e6 < summary["flops_per_step"] < 1e8
        assert summary["flops_without_gradient"] == 0
        assert 0 < summary["seconds_per_step"] < 10
        assert summary["peak_memory"] > 1e7


def test_what_was_counted_outlives_a_stop_after_the_last_step(tmp_path):
    first = run(tmp_path / "run", run__steps=3).summary
    (tmp_path / "run" / "summary.json").unlink()
    again = run(tmp_path / "run", resume=True, run__steps=3).summary
    assert again["flops_per_step"] == first["flops_per_step"]
    assert again["seconds_per_step"] == first["seconds_per_step"]


def test_every_line_of_the_metrics_has_its_seconds(tmp_path):
    run(tmp_path / "run", run__steps=4)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
