"""The values that pass between components: budgets, reports, tasks, requests and samples."""

import math
from typing import ClassVar

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import maskwright
from maskwright import (
    BoundObjective,
    Budget,
    Loss,
    Mask,
    MaskStrategy,
    Objective,
    Pruner,
    PruneResult,
    PruneTask,
    Sampler,
    SampleRequest,
    Samples,
    SparsityReport,
)
from maskwright.errors import BadBudget
from maskwright.protocols import Component, LayerSparsity, Step
from maskwright.testing.rules import made

# -- budgets -----------------------------------------------------------------------------------------------------

LEGAL = [
    ("sparsity", 0),
    ("sparsity", 0.5),
    ("sparsity", 0.999),
    ("pattern", "2:4"),
    ("pattern", "1:2"),
    ("pattern", "7:8"),
    ("params", 1),
    ("params", 0.01),
    ("flops", 0.7),
    ("bits", 4),
    ("bits", 2.5),
    ("bits", 32),
    ("layers", 1),
    ("layers", 12),
]


@pytest.mark.parametrize(("name", "value"), LEGAL)
def test_a_budget_knows_its_kind(name, value):
    budget = Budget(**{name: value})
    assert budget.kind == name
    assert getattr(budget, name) == value
    assert str(budget) == f"{name} {value}"
    assert budget == Budget(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        ("sparsity", 1, r"\[0, 1\)"),
        ("sparsity", -0.1, r"\[0, 1\)"),
        ("sparsity", math.nan, "must be a number"),
        ("sparsity", "0.5", "must be a number"),
        ("sparsity", True, "must be a number"),
        ("params", 0, r"\(0, 1\]"),
        ("params", 1.01, r"\(0, 1\]"),
        ("flops", -1, r"\(0, 1\]"),
        ("flops", math.inf, "must be a number"),
        ("bits", 0, r"\(0, 32\]"),
        ("bits", 33, r"\(0, 32\]"),
        ("layers", 0, "whole number of at least 1"),
        ("layers", 2.5, "whole number of at least 1"),
        ("layers", -3, "whole number of at least 1"),
    ],
)
def test_a_budget_outside_its_range_names_the_value_and_the_legal_ones(name, value, legal):
    with pytest.raises(BadBudget, match=legal) as caught:
        Budget(**{name: value})
    assert f"{name}={value}" in str(caught.value) or f"{name}={value!r}" in str(caught.value)
    assert caught.value.exit_code == 2


@given(st.integers(1, 32), st.integers(1, 32))
def test_n_of_m_is_read_when_n_is_less_than_m(n, m):
    if n < m:
        assert Budget(pattern=f"{n}:{m}").n_of_m == (n, m)
    else:
        with pytest.raises(BadBudget, match="0 < N < M"):
            Budget(pattern=f"{n}:{m}")


@pytest.mark.parametrize(
    "pattern", ["", "2", "2:", ":4", "2:4:8", "a:b", "-2:4", "0:4", "2.0:4", "²:4", "2 : 4x"]
)
def test_other_patterns_are_refused_with_an_example(pattern):
    with pytest.raises(BadBudget, match=r"must be N:M with 0 < N < M, such as 2:4"):
        Budget(pattern=pattern)


def test_a_pattern_is_not_read_from_another_budget():
    with pytest.raises(BadBudget, match="must be N:M"):
        Budget(sparsity=0.5).n_of_m  # noqa: B018


@pytest.mark.parametrize(
    "given_ones", [{}, {"sparsity": 0.5, "pattern": "2:4"}, {"sparsity": 0.0, "layers": 3}]
)
def test_a_budget_is_exactly_one(given_ones):
    with pytest.raises(BadBudget, match="exactly one of") as caught:
        Budget(**given_ones)
    assert (", ".join(given_ones) or "none") in str(caught.value)


def test_a_budget_does_not_change():
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Budget(sparsity=0.5).sparsity = 0.1


# -- reports -----------------------------------------------------------------------------------------------------


def test_a_report_counts_the_masks():
    keep = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]]).bool()
    report = SparsityReport.of({"a": Mask(keep), "b": Mask(torch.ones(3, 2, dtype=torch.bool))})
    assert report.layers == (LayerSparsity("a", (2, 4), 3, 8), LayerSparsity("b", (3, 2), 6, 6))
    assert [layer.sparsity for layer in report.layers] == [0.625, 0.0]
    assert (report.kept, report.total) == (9, 14)
    assert report.sparsity == pytest.approx(5 / 14)


def test_a_report_of_nothing_is_dense():
    report = SparsityReport.of({})
    assert (report.kept, report.total, report.sparsity) == (0, 0, 0.0)


def test_a_result_carries_model_masks_and_report():
    model = nn.Linear(2, 2)
    masks = {"weight": Mask(torch.eye(2, dtype=torch.bool))}
    result = PruneResult(model, masks, SparsityReport.of(masks))
    assert result.report.sparsity == 0.5
    assert list(result.history) == []


# -- tasks -------------------------------------------------------------------------------------------------------


def test_a_task_counts_its_steps():
    task = PruneTask(Budget(sparsity=0.5))
    steps = list(task.steps(4, {}))
    assert steps == [Step(index, 4) for index in range(4)]
    assert [step.fraction for step in steps] == [0.0, 0.25, 0.5, 0.75]
    assert list(task.steps(0, {})) == []
    assert task.log(steps[0], loss=1.0) is None


def test_a_task_gives_its_batches_in_turn():
    batches = [{"tokens": torch.tensor([index])} for index in range(3)]
    task = PruneTask(Budget(sparsity=0.5), batches=batches)
    assert [int(task.batch(step)["tokens"]) for step in task.steps(7, {})] == [0, 1, 2, 0, 1, 2, 0]


def test_tasks_do_not_share_their_generators_or_extras():
    one, other = PruneTask(Budget(sparsity=0.5)), PruneTask(Budget(sparsity=0.5))
    assert torch.equal(torch.rand(3, generator=one.generator), torch.rand(3, generator=other.generator))
    assert one.generator is not other.generator
    assert one.extras is not other.extras


# -- samples -----------------------------------------------------------------------------------------------------


def test_a_request_says_which_tokens_are_the_prompts():
    request = SampleRequest(torch.tensor([[5, 9, 9], [9, 1, 9]]), 9, torch.Generator())
    assert torch.equal(request.prompt.keep, torch.tensor([[1, 0, 0], [0, 1, 0]]).bool())
    assert (request.steps, request.time_conditioned) == (None, False)


def test_samples_count_calls_and_may_have_an_order():
    samples = Samples(torch.zeros(2, 3), evaluations=4)
    assert samples.order is None
    assert samples.facts == {}
    assert samples.facts is not Samples(torch.zeros(2, 3), evaluations=4).facts


# -- components --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "protocol"),
    [("mask-strategy", MaskStrategy), ("objective", Objective), ("pruner", Pruner), ("sampler", Sampler)],
)
def test_what_the_registry_makes_has_its_protocol(kind, protocol):
    for name in maskwright.names(kind):
        component = made(maskwright.registry.component_class(kind, name))
        assert (component.kind, component.name) == (kind, name)
        assert isinstance(component, protocol)
        assert isinstance(component, Component)


def test_a_users_own_class_is_a_strategy_by_its_methods():
    class Mine:
        kind: ClassVar[str] = "mask-strategy"
        name: ClassVar[str] = "mine"
        modalities: ClassVar[frozenset[str]] = frozenset()
        needs: ClassVar[frozenset[str]] = frozenset()

        def draw(self, layout, *, signals, progress, generator):
            return Mask(torch.ones(layout.shape, dtype=torch.bool))

    assert isinstance(Mine(), MaskStrategy)
    assert not isinstance(Mine(), Objective)
    assert not isinstance(object(), MaskStrategy)


def test_a_bound_objective_without_signals_or_teacher_has_neither():
    bound = BoundObjective()
    assert bound.signals({}) == {}
    assert bound.after_step(0.5) is None
    with pytest.raises(NotImplementedError):
        bound({}, Mask(torch.ones(1, 2, dtype=torch.bool)))


def test_a_loss_may_come_without_outputs():
    loss = Loss(torch.tensor(1.0), {"all": torch.tensor(1.0)})
    assert loss.outputs == {}
