"""Weights that are computed for a while: the straight-through gradient, running statistics, and losses that are no numbers."""

import copy

import pytest
import torch
from torch import nn

from maskwright.errors import NumericalError
from maskwright.protocols import Step
from maskwright.toolkit.masked import (
    replaced,
    require_finite_loss,
    require_finite_scores,
    running_statistics,
    straight_through,
)
from maskwright.toolkit.patterns import keep_largest, kth_largest
from maskwright.toolkit.prunable import prunable_weights


def convnet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_scores_is_that_of_the_masked_weight_times_the_weight(dtype):
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(5, 7, generator=generator).to(dtype) for _ in range(2))
    keep = torch.rand(5, 7, generator=generator) < 0.5
    scores = torch.rand(5, 7, generator=generator).requires_grad_()
    leaf = (weight * keep).requires_grad_()
    ((leaf @ x.T).float() ** 2).sum().backward()
    masked = straight_through(weight, keep, scores)
    assert torch.equal(masked.detach(), leaf.detach())
    assert masked.dtype == dtype
    ((masked @ x.T).float() ** 2).sum().backward()
    assert scores.grad.dtype == torch.float32
    torch.testing.assert_close(scores.grad, leaf.grad.float() * weight.float(), rtol=0, atol=0)
    assert (scores.grad[~keep] != 0).all(), "removed entries learn too"


def test_statistics_follow_only_where_asked_and_dropout_stays_off():
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 2
    for asked in (False, True):
        model = convnet().eval()
        before = copy.deepcopy(model.state_dict())
        with replaced(model, prunable_weights(model), statistics=asked):
            assert torch.equal(model(x), model(x)), "no dropout"
        moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert moved == ["1.running_mean", "1.running_var", "1.num_batches_tracked"] * asked
        assert not any(module.training for module in model.modules())


def test_an_error_puts_statistics_back():
    model = convnet()
    before = copy.deepcopy(model.state_dict())

    def failing():
        with replaced(model, prunable_weights(model), statistics=True):
            model(torch.ones(2, 3, 8, 8))
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        failing()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_running_statistics_are_those_of_norms_that_have_them():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3))
    assert list(running_statistics(model)) == [model[0]]
    assert len(running_statistics(model[2])) == 0


def test_a_loss_that_is_no_number_names_its_step():
    class Some:
        name = "some"

    assert require_finite_loss(Some(), torch.tensor(1.5), Step(0, 3)) == 1.5
    with pytest.raises(NumericalError, match="some: the loss is inf at step 2 of 3"):
        require_finite_loss(Some(), torch.tensor(float("inf")), Step(1, 3))


def test_scores_that_a_gradient_has_destroyed_name_the_step():
    class Some:
        name = "some"

    require_finite_scores(Some(), [torch.ones(3), torch.zeros(2)], Step(0, 3))
    for bad in (float("inf"), float("nan")):
        with pytest.raises(NumericalError, match="some: a gradient is NaN or infinite at step 3 of 3"):
            require_finite_scores(Some(), [torch.ones(3), torch.tensor([0.0, bad])], Step(2, 3))


def test_the_kth_largest_is_the_least_that_is_kept():
    scores = torch.randn(4, 33, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    for count in (1, 7, 33):
        kept = scores.masked_fill(~keep_largest(scores, count), float("inf"))
        assert torch.equal(kth_largest(scores, count)[:, 0], kept.amin(1))
