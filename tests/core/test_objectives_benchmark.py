"""`python -m benchmarks objectives`: the loops by hand compute what maskwright computes, and every objective is measured."""

import resource
from pathlib import Path

import pytest
import torch
from benchmarks import objectives
from benchmarks.objectives_by_hand import BY_HAND
from torch.utils.flop_counter import FlopCounterMode

from maskwright.registry import Registry


@pytest.fixture(autouse=True)
def global_generator():
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("name", BY_HAND)
def test_the_loop_by_hand_is_the_same_computation(name):
    """Its multiplications are those of maskwright's step, to one in a hundred."""
    flops = {}
    for loop, make in objectives.LOOPS.items():
        step = make(name, 2)
        with FlopCounterMode(display=False) as counter:
            step()
        flops[loop] = counter.get_total_flops()
    assert flops["maskwright"] == pytest.approx(flops["hand"], rel=0.01)


def test_every_image_objective_is_measured_and_each_loop_by_hand_is_of_one():
    found = {info.name for info in Registry(third_party=False).find(kind="objective", modality="image")}
    assert set(objectives.objectives()) == found
    assert set(BY_HAND) <= found


def test_what_the_backbone_was_called_with_can_be_repeated():
    for name, methods in (("mae", 2), ("spark", 4)):
        model, batch = objectives.training(name, 2)
        calls = []
        with objectives.recorded(model.backbone, calls):
            model(**batch)["loss"].backward()
        assert len(calls) == methods
        model.zero_grad()
        for call in calls:
            call()
        assert any(one.grad is not None and one.grad.any() for one in model.backbone.parameters())


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="Linux says it in /proc")
def test_the_largest_size_is_this_processes_own():
    """Between what it holds now and what getrusage says, which a child inherits from its parent."""
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    assert 0.95 * now <= objectives.largest() <= said + 1
