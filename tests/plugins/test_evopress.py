"""EvoPress: the mutation's exactness, the search on known optima, the levels, and what becomes of models."""

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import attrs
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import maskwright
from maskwright import Budget, PruneTask
from maskwright.backbones.defaults import causal_language_model, masked_language_model, vision_transformer
from maskwright.errors import BadBudget, BadData, BadModel, BadParameter, NumericalError
from maskwright.jobs import execute
from maskwright.jobs.settings import resolve
from maskwright.plugins.evopress.fitness import Fitness, divergence, measure_of, pools_of, predictions
from maskwright.plugins.evopress.levels import (
    default_difference,
    level_range,
    root,
    sparse_units,
    uniform_counts,
)
from maskwright.plugins.evopress.pruner import LAYERS, SPARSITY, EvoPress
from maskwright.plugins.evopress.search import (
    Space,
    distinct,
    flips,
    minibatch,
    movable,
    offspring,
    random_states,
    selected,
    switched,
)
from maskwright.sources.text import load_text
from maskwright.testing import conformance
from maskwright.toolkit.masked import replaced
from maskwright.toolkit.prunable import prunable_weights

CHECKS = conformance(EvoPress)


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_conformance(check):
    check()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def space_of(lowest, highest, groups=None, deviation=None):
    groups = torch.zeros(len(lowest), dtype=torch.int64) if groups is None else torch.tensor(groups)
    return Space(torch.tensor(lowest), torch.tensor(highest), groups, deviation)


# -- mutation --------------------------------------------------------------------------------------------------------


def test_the_number_of_switches_is_the_smaller_of_two_draws():
    shares = flips(90_000, 3, seeded()).bincount(minlength=4)[1:] / 90_000
    torch.testing.assert_close(shares, torch.tensor([5 / 9, 3 / 9, 1 / 9]), atol=0.006, rtol=0)


def test_children_keep_the_total_and_their_ranges():
    generator = seeded(1)
    lowest, highest = [-3, -1, -8, 0, -2, -8], [3, 8, 1, 4, 0, 8]
    space = space_of(lowest, highest)
    parent = torch.zeros(6, dtype=torch.int64)
    distances = set()
    for _ in range(30):
        children = offspring(parent, space, 64, 3, generator)
        assert len(children) == 64 == len({tuple(child) for child in children.tolist()})
        assert (children.sum(1) == 0).all()
        assert ((children >= space.lowest) & (children <= space.highest)).all()
        distance = (children - parent).abs().sum(1)
        distances |= set(distance.tolist())
        parent = children[int(torch.randint(64, (), generator=generator))]
    assert distances == {2, 4, 6}


def test_both_layers_of_a_switch_are_uniform_among_those_that_can():
    """Layer 0 cannot fall, layer 2 cannot rise; one switch a child."""
    space = space_of([0, -1, -1, -1], [2, 2, 0, 2])
    parent = torch.zeros(4, dtype=torch.int64)
    change = switched(parent, space, 60_000, 1, seeded())
    fell = (change == -1).float().mean(0)
    rose = (change == 1).float().mean(0)
    torch.testing.assert_close(fell, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]), atol=0.008, rtol=0)
    # Of those that fell, 1 leaves {0, 3}, 2 leaves {0, 1, 3}, 3 leaves {0, 1}.
    expected = torch.tensor([1 / 6 + 1 / 9 + 1 / 6, 1 / 9 + 1 / 6, 0, 1 / 6 + 1 / 9])
    torch.testing.assert_close(rose, expected, atol=0.008, rtol=0)


def test_groups_keep_their_own_totals_and_are_drawn_alike():
    groups = [0, 1] * 6
    space = space_of([0] * 12, [1] * 12, groups)
    parent = random_states(space.groups, 2, 1, seeded())[0]
    children = switched(parent, space, 20_000, 1, seeded(1))
    for group in (0, 1):
        assert (children[:, space.groups == group].sum(1) == 2).all()
    moved = (children != parent)[:, space.groups == 0].any(1).float().mean()
    assert moved.item() == pytest.approx(0.5, abs=0.015)


def test_a_small_space_gives_as_many_children_as_there_are():
    space = space_of([-1, -1, -1], [1, 1, 1])
    children = offspring(torch.zeros(3, dtype=torch.int64), space, 50, 3, seeded())
    legal = {v for v in itertools.product((-1, 0, 1), repeat=3) if sum(v) == 0}
    assert {tuple(child) for child in children.tolist()} == legal - {(0, 0, 0)}
    nowhere = space_of([0, 0], [5, 5])
    assert not movable(torch.zeros(2, dtype=torch.int64), nowhere)
    assert len(offspring(torch.zeros(2, dtype=torch.int64), nowhere, 5, 3, seeded())) == 0
    assert not movable(torch.zeros(2, dtype=torch.int64), space_of([-1, 0], [1, 0]))
    assert movable(torch.zeros(2, dtype=torch.int64), space_of([-1, 0], [0, 1]))
    assert not movable(torch.zeros(2, dtype=torch.int64), space_of([-1, 0], [0, 1], [0, 1]))


def test_the_deviation_is_limited():
    space = space_of([-5] * 6, [5] * 6, deviation=2)
    children = offspring(torch.zeros(6, dtype=torch.int64), space, 20, 3, seeded())
    assert (children.abs().sum(1) == 2).all()
    assert len(children) == 20


def test_distinct_rows_keep_their_order():
    rows = torch.tensor([[2, 1], [0, 0], [2, 1], [5, 5], [0, 0]])
    assert distinct(rows).tolist() == [[2, 1], [0, 0], [5, 5]]


# -- selection -------------------------------------------------------------------------------------------------------


def linear(cost):
    return lambda candidates, tokens: candidates.double() @ cost


def generations_until(cost, kept, count, seed, limit=4000):
    """Generations until the `kept` smallest costs are chosen, from a random start."""
    generator = seeded(seed)
    space = space_of([0] * len(cost), [1] * len(cost))
    parent = random_states(space.groups, kept, 1, generator)[0]
    optimum = set(cost.argsort()[:kept].tolist())
    for generation in range(limit):
        if set(parent.nonzero()[:, 0].tolist()) == optimum:
            return generation
        children = offspring(parent, space, count, 3, generator)
        before = float(cost @ parent.double())
        parent, value = selected(children, parent, [(1, 1)], linear(cost))
        assert value <= before + 1e-12
        assert int(parent.sum()) == kept
    raise AssertionError("the optimum was not found")


@pytest.mark.parametrize(
    ("layers", "kept", "count", "mean"),
    [(16, 4, 1, 111), (16, 4, 8, 15.7), (16, 4, 32, 4.0), (32, 8, 32, 18.3)],
)
def test_a_linear_fitness_is_always_solved_in_the_expected_time(layers, kept, count, mean):
    taken = []
    for seed in range(10):
        cost = torch.rand(layers, generator=seeded(100 + seed), dtype=torch.float64)
        taken.append(generations_until(cost, kept, count, seed))
    assert mean / 2.5 < sum(taken) / 10 < mean * 2.5


def test_a_separable_fitness_over_levels_reaches_the_brute_force_optimum():
    """A cost for every level of every layer, five layers of five levels with total 0."""
    legal = torch.tensor([v for v in itertools.product(range(-2, 3), repeat=5) if sum(v) == 0])
    for seed in range(3):
        cost = torch.rand(5, 5, generator=seeded(seed), dtype=torch.float64)

        def evaluate(candidates, tokens, cost=cost):
            return cost[torch.arange(5), candidates + 2].sum(1)

        space, generator = space_of([-2] * 5, [2] * 5), seeded(seed)
        parent = torch.zeros(5, dtype=torch.int64)
        for _ in range(60):
            children = offspring(parent, space, 24, 3, generator)
            parent, value = selected(children, parent, [(4, 1), (1, 2)], evaluate)
        assert value == pytest.approx(float(evaluate(legal, 0).min()))


def test_the_parent_joins_the_last_stage_only_and_loses_ties():
    seen = []

    def evaluate(candidates, tokens):
        seen.append((len(candidates), tokens))
        return torch.zeros(len(candidates), dtype=torch.float64)

    children, parent = torch.arange(12).view(6, 2), torch.tensor([-1, -1])
    winner, _ = selected(children, parent, [(4, 10), (1, 20), (1, 40)], evaluate)
    assert seen == [(6, 10), (4, 20), (2, 40)]
    assert winner.tolist() == [0, 1]

    def parent_is_best(candidates, tokens):
        return candidates.double().sum(1)

    assert selected(children, parent, [(4, 10), (1, 40)], parent_is_best)[0].tolist() == [-1, -1]
    assert selected(children[:0], parent, [(4, 10), (1, 40)], evaluate)[0].tolist() == [-1, -1]
    with pytest.raises(NumericalError, match="the best of 7 candidates has the fitness nan"):
        selected(children, parent, [(1, 1)], lambda some, _: torch.full((len(some),), math.nan))


def test_few_tokens_choose_who_is_looked_at_with_many():
    """A child that only many tokens show to be good is lost when the first stage does not keep it."""
    few, many = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([5.0, 3.0, 1.0]).double()

    def evaluate(candidates, tokens):
        return (few if tokens == 1 else many)[candidates[:, 0].clamp(max=2)] + 9.0 * (candidates[:, 0] > 2)

    children, parent = torch.tensor([[0], [1], [2]]), torch.tensor([3])
    assert selected(children, parent, [(2, 1), (1, 2)], evaluate)[0].item() == 1
    assert selected(children, parent, [(3, 1), (1, 2)], evaluate)[0].item() == 2


def test_a_minibatch_has_exactly_its_tokens():
    index, taken = minibatch(torch.full((10,), 8), 20, seeded())
    assert taken.tolist() == [8, 8, 4]
    assert len(set(index.tolist())) == 3
    index, taken = minibatch(torch.tensor([8, 4, 2]), 100, seeded())
    assert sorted(index.tolist()) == [0, 1, 2]
    assert taken.sum() == 14
    first = {tuple(minibatch(torch.full((10,), 8), 20, g)[0].tolist()) for g in [seeded()] for _ in range(5)}
    assert len(first) == 5


def test_random_states_raise_as_many_in_each_group():
    groups = torch.tensor([0, 1] * 5)
    states = random_states(groups, 2, 30, seeded())
    assert len({tuple(state) for state in states.tolist()}) == 30
    assert (states[:, groups == 0].sum(1) == 2).all()
    assert (states[:, groups == 1].sum(1) == 2).all()
    assert len(random_states(torch.zeros(3, dtype=torch.int64), 1, 64, seeded())) == 3


# -- fitness ---------------------------------------------------------------------------------------------------------


def test_the_divergence_is_from_dense_to_compressed():
    dense, other = torch.randn(2, 5, 7, generator=seeded()), torch.randn(2, 5, 7, generator=seeded(1))
    p, q = dense.softmax(-1), other.softmax(-1)
    naive = torch.zeros(2, 5)
    for b, t in itertools.product(range(2), range(5)):
        naive[b, t] = sum(p[b, t, v] * (p[b, t, v].log() - q[b, t, v].log()) for v in range(7))
    torch.testing.assert_close(divergence(dense.log_softmax(-1), other), naive)
    assert divergence(dense.log_softmax(-1), dense).abs().max() < 1e-6
    assert predictions(dense).shape == (2, 4, 7)
    assert predictions(dense[:, 0]).shape == (2, 7)


def llama(depth=2, width=16, seed=0):
    return causal_language_model(vocabulary=40, length=16, width=width, depth=depth, heads=2, seed=seed)


def tokens(count=6, length=16, seed=0):
    return {"tokens": torch.randint(0, 40, (count, length), generator=seeded(seed))}


@torch.no_grad()
@pytest.mark.parametrize("bidirectional", [False, True])
def test_fitness_is_the_token_mean_over_the_minibatch(bidirectional):
    """Whole sequences and a cut one, from batches of several forms, against models that are built anew."""
    make = (
        llama
        if not bidirectional
        else lambda: masked_language_model(vocabulary=40, length=16, mask_token=3, width=16, depth=2, heads=2)
    )
    model = make().eval()
    batches = [tokens(3), tokens(2, length=10, seed=1), tokens(1, seed=2)]
    weights = prunable_weights(model)
    pruner = EvoPress(level="magnitude", num_levels=2)
    task = PruneTask(Budget(sparsity=0.5), batches, generator=seeded(3))
    units, space = pruner.sparse(model, weights, task, 0.5, torch.device("cpu"))
    candidates = offspring(torch.zeros_like(space.lowest), space, 4, 3, seeded())
    rows = [row for batch in batches for row in batch["tokens"]]
    # The pools put sequences of one form together.
    rows = rows[:3] + rows[5:] + rows[3:5]
    with replaced(model, weights) as replace:
        fitness = Fitness(model, task, units, replace, measure_of(model, task, "auto"))
        assert fitness.lengths.tolist() == [16, 16, 16, 16, 10, 10]
        state = task.generator.get_state()
        found = fitness(candidates, 37)
        after = fitness.over_all(candidates[0])
    task.generator.set_state(state)
    index, taken = minibatch(torch.tensor([16, 16, 16, 16, 10, 10]), 37, task.generator)

    untouched = make().eval()

    def naive(levels, index, taken):
        other = make().eval()
        for unit, level in zip(units, levels.tolist()):
            for name, version in unit.at(level).items():
                other.get_parameter(name).copy_(version.values)
        each = []
        for number, length in zip(index.tolist(), taken.tolist()):
            piece = rows[number][None, :length]
            dense, pruned = (one(input_ids=piece).logits[:, :-1] for one in (untouched, other))
            each.append(
                F.kl_div(
                    pruned.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none"
                ).sum(-1)[0]
            )
        return torch.cat(each).double().mean()

    expected = torch.stack([naive(levels, index, taken) for levels in candidates])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    whole = naive(candidates[0], torch.arange(6), torch.tensor([16, 16, 16, 16, 10, 10]))
    assert after == pytest.approx(float(whole), rel=1e-5)
    assert len({round(float(value), 9) for value in found}) == 4


def test_samples_of_one_form_are_put_together():
    x = {"inputs": torch.randn(3, 4), "labels": torch.zeros(3, dtype=torch.int64)}
    pools = pools_of([x, tokens(2), {**x}])
    assert [(len(pool), pool.length) for pool in pools] == [(6, 1), (2, 16)]
    assert pools[1].take(torch.tensor([1]), 5)["tokens"].shape == (1, 5)
    assert pools[0].take(torch.tensor([1]), 1)["inputs"].shape == (1, 4)


# -- levels ----------------------------------------------------------------------------------------------------------


def test_a_level_is_a_fixed_number_of_weights():
    uniform, ends = uniform_counts([128], 0.5), level_range(128, 64, 10, 3)
    assert (uniform, ends) == ([64], (-3, 3))
    model = nn.Sequential(nn.Linear(16, 8))
    weights = prunable_weights(model)
    task = PruneTask(Budget(sparsity=0.5), generator=seeded())
    (unit,) = sparse_units(
        model, weights, task, maskwright.create("pruner", "magnitude"), uniform, 10, [ends]
    )
    zeros = [int((unit.at(level)["0.weight"].values == 0).sum()) for level in range(-3, 4)]
    assert zeros == [34, 44, 54, 64, 74, 84, 94]
    assert [removed / 128 for removed in zeros][::6] == [0.265625, 0.734375]
    # A small layer has fewer levels, and the largest may be empty.
    assert level_range(20, 10, 4, 8) == (-2, 2)
    assert level_range(20, 10, 5, 8) == (-2, 2)


def test_uniform_counts_add_up_and_differ_by_less_than_one():
    sizes = [7, 13, 129, 64, 3]
    counts = uniform_counts(sizes, 0.3)
    assert sum(counts) == int(0.3 * sum(sizes))
    assert all(abs(count - 0.3 * size) < 1 for count, size in zip(counts, sizes))
    # ½ · min(s, 1-s) / K · hidden², with a Llama's q, k, v, o as the median.
    assert default_difference([64 * 64] * 4 + [64 * 172] * 3, 0.7, 8) == int(0.5 * 0.3 / 8 * 64**2)
    assert default_difference([9], 0.0, 8) == 1


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "random"])
def test_every_pruner_meets_every_level_to_the_weight(name):
    """Wanda rounds down in each row, and the rest is made up."""
    model = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 9))
    batch = {"inputs": torch.randn(40, 10, generator=seeded())}
    task = PruneTask(Budget(sparsity=0.5), [batch], generator=seeded())
    units = sparse_units(
        model,
        prunable_weights(model),
        task,
        maskwright.create("pruner", name),
        [35, 31],
        5,
        [(-7, 7), (-6, 6)],
    )
    for unit, uniform, ends in zip(units, (35, 31), (7, 6)):
        for level in range(-ends, ends + 1):
            (version,) = unit.at(level).values()
            assert int((~version.keep).sum()) == uniform + 5 * level
            assert not version.values[~version.keep].any()
        dense = model.get_parameter(next(iter(unit.at(0)))).detach()
        if uniform == 35:
            assert torch.equal(next(iter(unit.at(-7).values())).values, dense)
            assert not next(iter(unit.at(7).values())).values.any()


def test_what_a_row_wise_pruner_leaves_over_comes_from_its_next_step():
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    batch = {"inputs": torch.randn(30, 8, generator=seeded()) * torch.arange(1.0, 9)}
    scores = model[0].weight.detach().abs() * batch["inputs"].square().sum(0).sqrt()
    task = PruneTask(Budget(sparsity=0.5), [batch], generator=seeded())
    (unit,) = sparse_units(
        model, prunable_weights(model), task, maskwright.create("pruner", "wanda"), [22], 1, [(0, 0)]
    )
    removed = ~unit.at(0)["0.weight"].keep
    order = scores.argsort(1).argsort(1)
    assert removed[order < 3].all()
    assert not removed[order > 3].any()
    assert int(removed[order == 3].sum()) == 4


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_a_layer_alone_with_the_root_of_its_inputs_is_pruned_as_in_the_model(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(8 * 16, 6))
    batch = {"inputs": torch.randn(50, 4, 4, 4, generator=seeded())}
    weights = prunable_weights(model)
    pruner = maskwright.create("pruner", name)
    task = PruneTask(Budget(sparsity=0.5), [batch], generator=seeded())
    units = sparse_units(model, weights, task, pruner, [72, 384], 1, [(0, 0), (0, 0)])
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    for unit in units:
        ((path, version),) = unit.at(0).items()
        alone = attrs.evolve(task, prunable=lambda one, path=path: {path: one.get_parameter(path)})
        keep = pruner.prune(model, alone).masks[path].keep
        found = next(weight for weight in weights if weight.name == path).as_parameter(version.keep)
        assert int((found != keep).sum()) <= 2
        torch.testing.assert_close(
            version.values[found & keep], model.get_parameter(path)[found & keep], rtol=2e-3, atol=2e-4
        )
        model.load_state_dict(dense)


def test_the_root_has_the_second_moments_also_of_few_and_dead_inputs():
    x = torch.randn(2, 3, 6, generator=seeded())
    x[:, :, 4] = 0
    products = x.mT @ x
    found = root(products)
    torch.testing.assert_close((found.mT @ found).float(), products, rtol=1e-4, atol=1e-5)
    assert not found[:, :, 4].any()


def test_levels_do_not_depend_on_other_layers():
    """Each is made from inputs of the dense model, so that any combination is the same weights."""
    model, batch = llama(), tokens()
    weights = prunable_weights(model)
    task = PruneTask(Budget(sparsity=0.5), [batch], generator=seeded())
    sizes = [weight.parameter.numel() for weight in weights]
    pruner, counts = maskwright.create("pruner", "sparsegpt"), uniform_counts(sizes, 0.5)
    every = sparse_units(model, weights, task, pruner, counts, 8, [(-1, 1)] * len(weights))
    last = sparse_units(model, weights[-1:], task, pruner, counts[-1:], 8, [(-1, 1)])[0]
    name = weights[-1].name
    for level in (-1, 0, 1):
        assert torch.equal(every[-1].at(level)[name].keep, last.at(level)[name].keep)


# -- error is not monotone -------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """x + W x, W low-rank; `attention` is only a name here."""

    def __init__(self, first, second):
        super().__init__()
        self.attention, self.mlp = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.attention.weight.data, self.mlp.weight.data = first.clone(), second.clone()

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(x)


class Stack(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def not_monotone():
    """Four blocks: what block 0 adds, block 2 takes away; blocks 1 and 3 change other coordinates a little."""
    generator = seeded(5)

    def other():
        weight = torch.zeros(8, 8)
        weight[2:, 2:] = 0.3 * torch.randn(6, 6, generator=generator)
        return weight

    push = torch.zeros(8, 8)
    push[0, 1] = 3.0
    slight = 0.02 * torch.eye(8)
    return Stack(
        [
            Residual(push, slight),
            Residual(other(), other()),
            Residual(-push, slight),
            Residual(other(), other()),
        ]
    )


def dropping(x, names):
    """Mean KL and the sum of layer-wise errors when these linear layers are removed."""
    model, dense = not_monotone(), not_monotone()
    outputs = {}
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, args, out, name=name: outputs.update({name: out}))
    with torch.no_grad():
        target = dense(x).log_softmax(-1)
        for name in names:
            model.get_submodule(name).weight.zero_()
        error = sum(outputs[name].square().mean().item() for name in names)
        return divergence(target, model(x)).mean().item(), error


def test_removing_strictly_more_can_be_better_and_layer_errors_mislead():
    """The paper's counter-example: of two sets of dropped sub-blocks, the superset leaves the better model, with the larger error sum."""
    x = torch.randn(200, 8, generator=seeded())
    less, less_error = dropping(x, ["blocks.0.attention"])
    more, more_error = dropping(x, ["blocks.0.attention", "blocks.2.attention"])
    assert more_error > less_error
    assert more < less / 5
    # So the sum of errors, which a solver of layer-wise errors minimises, orders sets of equal size wrongly as well.
    pairs = list(itertools.combinations([f"blocks.{i}.attention" for i in range(4)], 2))
    results = {pair: dropping(x, pair) for pair in pairs}
    by_error = min(pairs, key=lambda pair: results[pair][1])
    by_loss = min(pairs, key=lambda pair: results[pair][0])
    assert by_loss == ("blocks.0.attention", "blocks.2.attention")
    assert by_error != by_loss
    assert results[by_error][0] > 5 * results[by_loss][0]


def test_the_search_finds_the_pair_that_layer_errors_miss():
    x = torch.randn(200, 8, generator=seeded())
    model = not_monotone()
    pruner = EvoPress(
        generations=10, offspring=8, survivors=(1,), tokens=(200,), initially_generated=2, initial_tokens=200
    )
    result = pruner.prune(model, PruneTask(Budget(layers=2), [{"x": x}], generator=seeded(1)))
    levels = {name: int(level) for name, level in result.artifacts["levels"].items()}
    attention = [levels[f"blocks.{i}.attention.weight"] for i in range(4)]
    mlp = [levels[f"blocks.{i}.mlp.weight"] for i in range(4)]
    assert attention == [1, 0, 1, 0]
    assert mlp == [1, 0, 1, 0]
    assert result.facts["fitness"] < result.facts["fitness_at_the_start"]


# -- the pruner ------------------------------------------------------------------------------------------------------

FAST = {"generations": 4, "offspring": 6, "survivors": (2, 1), "tokens": (32, 96), "num_levels": 2}


def pruned(model, batches, budget=None, seed=0, loss=None, **parameters):
    task = PruneTask(budget or Budget(sparsity=0.6), batches, loss, seeded(seed))
    return EvoPress(**{**FAST, **parameters}).prune(model, task)


def test_brute_force_over_a_real_model_gives_the_same_levels():
    """Four layers of three levels: 19 vectors with total 0, each measured on all data."""
    torch.manual_seed(1)
    sizes = [(12, 12)] * 4
    layers = [part for size in sizes for part in (nn.Linear(*size), nn.Tanh())]
    model = nn.Sequential(*layers[:-1])
    for place in (0, 4):
        model[place].weight.data *= 4
    batch = {"x": torch.randn(64, 12, generator=seeded())}
    weights = prunable_weights(model)
    pruner = EvoPress(
        generations=12,
        offspring=10,
        survivors=(1,),
        tokens=(64,),
        num_levels=1,
        weights_diff=20,
        level="wanda",
    )
    task = PruneTask(Budget(sparsity=0.6), [batch], generator=seeded())
    units, _ = pruner.sparse(model, weights, task, 0.6, torch.device("cpu"))
    legal = [v for v in itertools.product((-1, 0, 1), repeat=4) if sum(v) == 0]
    assert len(legal) == 19
    with torch.no_grad(), replaced(model, weights) as replace:
        fitness = Fitness(model, task, units, replace, "kl")
        values = [fitness.over_all(torch.tensor(levels)) for levels in legal]
    result = pruner.prune(model, task)
    found = tuple(int(level) for level in result.artifacts["levels"].values())
    assert found == legal[values.index(min(values))] != (0, 0, 0, 0)
    assert result.facts["fitness"] == pytest.approx(min(values))
    # On all data fitness has no noise, and never rises.
    fitnesses = [entry["fitness"] for entry in result.history]
    assert fitnesses == sorted(fitnesses, reverse=True)
    assert result.facts["fitness_at_the_start"] == pytest.approx(values[legal.index((0, 0, 0, 0))])


@pytest.mark.parametrize("level", ["magnitude", "wanda", "sparsegpt"])
def test_the_total_is_exact_and_the_weights_are_those_of_the_levels(level):
    model, batches = llama(), [tokens()]
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    weights = prunable_weights(model)
    total = sum(weight.parameter.numel() for weight in weights)
    result = pruned(model, batches, level=level)
    assert total - result.report.kept == int(0.6 * total)
    uniform = uniform_counts([weight.parameter.numel() for weight in weights], 0.6)
    difference = default_difference([weight.parameter.numel() for weight in weights], 0.6, 2)
    levels = [int(one) for one in result.artifacts["levels"].values()]
    assert sum(levels) == 0
    assert any(levels)
    for weight, count, one in zip(weights, uniform, levels):
        keep = result.masks[weight.name].keep
        assert int((~keep).sum()) == count + one * difference
        now = model.get_parameter(weight.name)
        assert not now[~keep].any()
        if level != "sparsegpt":
            assert torch.equal(now, dense[weight.name] * keep)
    assert result.facts["evaluations"] == 4 * (6 + 3)
    assert len(result.history) == 4


def test_the_search_beats_the_uniform_levels_where_layers_differ():
    """One layer hardly matters: it gives up its weights for the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
    model[2].weight.data *= 0.01
    batch = {"x": torch.randn(128, 16, generator=seeded())}
    result = pruned(model, [batch], generations=20, level="magnitude", tokens=(64, 128), num_levels=3)
    levels = result.artifacts["levels"]
    assert int(levels["2.weight"]) == 3
    assert result.facts["fitness"] < 0.9 * result.facts["fitness_at_the_start"]


def test_the_same_seed_gives_the_same_levels_and_another_seed_others():
    found = []
    for seed in (1, 1, 2):
        result = pruned(llama(), [tokens()], seed=seed, level="magnitude")
        found.append([int(one) for one in result.artifacts["levels"].values()])
    assert found[0] == found[1] != found[2]


def test_without_room_the_model_stays_dense_or_uniform():
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = pruned(model, [tokens()], Budget(sparsity=0.0))
    assert result.history == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    one = nn.Sequential(nn.Linear(8, 8))
    result = pruned(one, [{"x": torch.randn(4, 8)}], Budget(sparsity=0.5), level="magnitude")
    assert result.report.sparsity == 0.5
    assert result.history == []


def test_levels_may_be_kept_near_the_uniform_ones():
    result = pruned(llama(), [tokens()], generations=8, level="magnitude", max_level=1, max_total_deviation=4)
    levels = torch.cat(list(result.artifacts["levels"].values()))
    assert levels.abs().max() == 1
    assert levels.abs().sum() in (2, 4)


def square(model, batch):
    """A loss of this batch that depends on the weights."""
    return model(input_ids=batch["tokens"])[0].float().square().mean()


@torch.no_grad()
def test_a_loss_counts_by_tokens():
    model, batches = llama().eval(), [tokens(3), tokens(2, length=10, seed=1)]
    weights, task = prunable_weights(model), PruneTask(Budget(sparsity=0.5), batches, square, seeded(3))
    units, space = EvoPress(level="magnitude", num_levels=1).sparse(
        model, weights, task, 0.5, torch.device("cpu")
    )
    index, taken = minibatch(torch.tensor([16] * 3 + [10] * 2), 37, seeded(3))
    rows = [row for batch in batches for row in batch["tokens"]]
    with replaced(model, weights) as replace:
        (found,) = Fitness(model, task, units, replace, "loss")(torch.zeros_like(space.lowest)[None], 37)
        # The model still has the levels that were measured.
        each = [
            float(square(model, {"tokens": rows[number][None, :length]})) * length
            for number, length in zip(index.tolist(), taken.tolist())
        ]
    assert taken.sum() == 37
    assert found.item() == pytest.approx(sum(each) / 37, rel=1e-5)


def test_a_loss_is_minimised_where_it_is_asked_for_or_there_are_no_logits():
    config = transformers.LlamaConfig(
        **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 2},
    )
    causal, encoder = llama(), transformers.LlamaModel(config)
    with_loss = PruneTask(Budget(sparsity=0.5), [tokens()], square)
    without = PruneTask(Budget(sparsity=0.5), [tokens()])
    assert measure_of(causal, with_loss, "auto") == measure_of(causal, without, "auto") == "kl"
    assert measure_of(encoder, with_loss, "auto") == measure_of(causal, with_loss, "loss") == "loss"
    for asked in ("auto", "kl"):
        with pytest.raises(BadModel, match="compares logits, and this LlamaModel puts out none"):
            measure_of(encoder, without, asked)
    with pytest.raises(BadData, match="needs a loss"):
        measure_of(causal, without, "loss")
    result = pruned(encoder, [tokens()], loss=square, level="magnitude")
    with torch.no_grad():
        assert result.facts["fitness"] == pytest.approx(float(square(encoder.eval(), tokens())), rel=1e-4)


def test_a_weight_of_two_layers_is_one_layer_of_the_search():
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(3)])
    model[2].weight = model[0].weight
    result = pruned(model, [{"x": torch.randn(20, 8)}], Budget(sparsity=0.5), level="wanda")
    assert set(result.artifacts["levels"]) == {"0.weight", "1.weight"}
    assert model[2].weight is model[0].weight
    assert int((model[0].weight == 0).sum() + (model[1].weight == 0).sum()) == 64


# -- layers ----------------------------------------------------------------------------------------------------------


def test_dropped_sub_blocks_are_as_many_of_each_kind():
    model = llama(depth=4)
    result = pruned(model, [tokens()], Budget(layers=3), initially_generated=6)
    levels = {name: int(one) for name, one in result.artifacts["levels"].items()}
    dropped = {
        kind: {name.split(".")[2] for name, level in levels.items() if level and kind in name}
        for kind in ("self_attn", "mlp")
    }
    assert all(len(blocks) == 1 for blocks in dropped.values())
    for kind, (block,) in dropped.items():
        part = getattr(model.model.layers[int(block)], kind)
        assert not any(parameter.any() for parameter in part.parameters())
    # A sub-block without weights passes on what it is given: the model without that part answers the same.
    other = llama(depth=4)
    ids = tokens()["tokens"]
    with torch.no_grad():
        for kind, (block,) in dropped.items():
            layer = other.model.layers[int(block)]
            nothing = (lambda *_, **__: (0.0, None)) if kind == "self_attn" else (lambda *_: 0.0)
            setattr(getattr(layer, kind), "forward", nothing)  # noqa: B010 - a module's attribute
        torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits)


def test_whole_blocks_are_dropped_together():
    result = pruned(llama(depth=4), [tokens()], Budget(layers=2), drop="blocks", initially_generated=3)
    levels = {name.split(".")[2]: int(one) for name, one in result.artifacts["levels"].items()}
    assert sorted(levels.values()) == [0, 0, 1, 1]
    kept = {name.split(".")[2] for name, mask in result.masks.items() if mask.keep.any()}
    assert kept == {block for block, level in levels.items() if not level}


def test_the_plans_are_the_papers():
    assert (SPARSITY["survivors"], SPARSITY["tokens"]) == ((8, 2, 1), (2048, 16384, 65536))
    assert (SPARSITY["generations"], SPARSITY["offspring"]) == (400, 64)
    assert (LAYERS["offspring"], LAYERS["survivors"], LAYERS["tokens"]) == (32, (2, 1), (2048, 32768))
    chosen = EvoPress()
    assert chosen.level.name == "sparsegpt"
    assert (chosen.num_levels, chosen.max_mutations, chosen.initially_generated) == (8, 3, 64)
    steps = []

    class Counting(PruneTask):
        def steps(self, total, state):
            steps.append(total)
            yield from list(super().steps(total, state))[:1]

    EvoPress(tokens=(32, 64), survivors=(1, 1), offspring=2).prune(
        llama(depth=4), Counting(Budget(layers=2), [tokens()], generator=seeded())
    )
    EvoPress(tokens=(32, 64), survivors=(1, 1), offspring=2, level="magnitude").prune(
        llama(), Counting(Budget(sparsity=0.5), [tokens()], generator=seeded())
    )
    assert steps == [int(2 * 2 / 1.5), 400]


# -- models it was not written for -----------------------------------------------------------------------------------


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **{"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
            **{"bos_token_id": 0, "eos_token_id": 0},
        )
    )


def image_classifier():
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
        )
    )


PIXELS = {"pixels": torch.randn(6, 3, 32, 32, generator=seeded(1))}
MODELS = {
    "llama": (llama, tokens()),
    "bert": (
        lambda: masked_language_model(vocabulary=40, length=16, mask_token=3, width=16, depth=2, heads=2),
        tokens(),
    ),
    "gpt2": (gpt2, tokens()),
    "vit": (lambda: vision_transformer(width=16, depth=2, heads=2), PIXELS),
    "resnet": (image_classifier, PIXELS),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_model(name, dtype):
    torch.manual_seed(0)
    make, batch = MODELS[name]
    model = make().to(dtype)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def change(model, batch):
        return model(pixel_values=batch["pixels"]).last_hidden_state.float().square().mean()

    few = {"level": {"name": "wanda", "compare": "layer"}, "generations": 1, "num_levels": 1}
    result = pruned(model, [batch], loss=change if name == "vit" else None, **few)
    weights = prunable_weights(model)
    total = sum(weight.parameter.numel() for weight in weights)
    assert total - result.report.kept == int(0.6 * total)
    for weight in weights:
        assert torch.equal(weight.parameter, state.pop(weight.name) * result.masks[weight.name].keep)
        assert weight.parameter.dtype == dtype
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key in state)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_layers_of_any_transformer(name):
    torch.manual_seed(0)
    make, batch = MODELS[name]
    loss = (
        (lambda m, b: m(pixel_values=b["pixels"]).last_hidden_state.square().mean())
        if name == "vit"
        else None
    )
    result = pruned(make(), [batch], Budget(layers=1), loss=loss, generations=2, initially_generated=2)
    weights = {name: mask for name, mask in result.masks.items() if not mask.keep.any()}
    attention = {name for name in weights if "att" in name}
    assert attention
    assert set(weights) - attention


def test_a_pruner_of_the_users_own_makes_the_levels():
    """It is given one layer at a time, with inputs."""
    seen = []

    @attrs.frozen
    class Last:
        kind = "pruner"
        name = "last"
        modalities = frozenset({"text"})
        needs = frozenset({"batches"})
        budgets = frozenset({"sparsity"})
        changes_weights = False

        def prune(self, model, task):
            (weight,) = prunable_weights(model, task.prunable)
            seen.append(tuple(weight.shape))
            assert task.batches[0]["input"].shape == (weight.shape[1], weight.shape[1])
            count = int(task.budget.sparsity * weight.parameter.numel())
            keep = torch.arange(weight.parameter.numel()).view(weight.shape) >= count
            mask = weight.mask(keep)
            weight.apply(mask)
            return maskwright.PruneResult(model, {weight.name: mask}, maskwright.SparsityReport.of({}))

    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8))
    result = pruned(model, [{"x": torch.randn(9, 8)}], Budget(sparsity=0.5), level=Last())
    assert set(seen) == {(4, 8), (8, 4)}
    for mask in result.masks.values():
        flat = mask.keep.flatten()
        assert torch.equal(flat, flat.sort().values)


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_told():
    with pytest.raises(
        BadBudget, match="evopress does not meet a budget of pattern; give it one of layers, sparsity"
    ):
        pruned(llama(), [tokens()], Budget(pattern="2:4"))
    with pytest.raises(BadData, match="on batches; give the task at least one"):
        pruned(llama(), [])
    with pytest.raises(BadBudget, match="has 2 layers, so that 3 cannot be kept"):
        pruned(llama(), [tokens()], Budget(layers=3))
    with pytest.raises(BadModel, match="this Sequential has none with prunable weights; give a sparsity"):
        pruned(nn.Sequential(nn.Linear(4, 4)), [{"x": torch.randn(2, 4)}], Budget(layers=1))
    with pytest.raises(BadModel, match="A Linear1 has no attention beside other weights; set drop='blocks'"):
        pruned(Stack([Linear1() for _ in range(2)]), [{"x": torch.randn(2, 4)}], Budget(layers=1))
    with pytest.raises(BadParameter, match=r"survivors=\(2, 1\) and tokens=\(5,\) must name the same number"):
        EvoPress(survivors=(2, 1), tokens=(5,))
    with pytest.raises(BadParameter, match="the last stage must keep 1 candidate"):
        EvoPress(survivors=(2,), tokens=(50,))
    with pytest.raises(BadParameter, match="must be whole numbers above 0"):
        EvoPress(survivors=(0.5, 1), tokens=(50, 60))
    with pytest.raises(BadParameter, match="level='maskllm' needs loss, and is given one layer at a time"):
        EvoPress(level="maskllm")


class Linear1(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x)


@attrs.frozen
class Careless:
    """Removes half of what it is asked to."""

    kind = "pruner"
    name = "careless"
    modalities = frozenset({"text"})
    needs = frozenset()
    budgets = frozenset({"sparsity"})
    changes_weights = False

    def prune(self, model, task):
        half = attrs.evolve(task, budget=Budget(sparsity=task.budget.sparsity / 2))
        return maskwright.create("pruner", "magnitude").prune(model, half)


def test_a_pruner_that_misses_its_levels_is_refused_and_the_model_is_as_it_was():
    model = nn.Sequential(nn.Linear(16, 16))
    before = model[0].weight.detach().clone()
    with pytest.raises(
        BadParameter, match=r"'careless' was asked to remove .* weights of 0\.weight and removed"
    ):
        pruned(model, [{"x": torch.randn(4, 16)}], level=Careless())
    assert torch.equal(model[0].weight, before)


# -- the job ---------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from maskwright.jobs import execute
from maskwright.jobs.settings import resolve
execute(resolve("prune", None, json.loads(sys.argv[1])), folder=sys.argv[2], quiet=True)
"""


def test_a_killed_run_goes_on_to_the_same_levels(tmp_path):
    draw = random.Random(0)
    words = ["mask", "layer", "level", "weight", "of", "the", "sparse", "dense", "token", "search"]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(draw.choice(words) for _ in range(12)) for _ in range(400)), "utf-8")
    source = load_text(text, length=16, vocabulary=300)
    model = causal_language_model(vocabulary=source.vocabulary, length=16, width=16, depth=1, heads=2)
    for number, parameter in enumerate(model.parameters()):
        parameter.data *= 1 + number % 4
    model.save_pretrained(tmp_path / "model")
    source.save_pretrained(tmp_path / "model")
    given = {
        **{"data.source": str(text), "data.length": 16, "run.calibration": 12, "run.batch_size": 4},
        **{"model.source": str(tmp_path / "model")},
        **{
            "pruner.name": "evopress",
            "pruner.level": "wanda",
            "pruner.generations": 30,
            "pruner.offspring": 4,
        },
        **{"pruner.survivors": [2, 1], "pruner.tokens": [32, 64], "pruner.num_levels": 3},
        **{"budget.sparsity": 0.6, "run.save_every": 3},
    }
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(given), str(killed)],
        **{"stderr": subprocess.PIPE, "text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}},
    )
    metrics = killed / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 6:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "summary.json").exists()

    settings = resolve("prune", None, given)
    resumed = execute(settings, folder=killed, resume=True, quiet=True)
    straight = execute(settings, folder=whole, quiet=True)
    one, other = (load_file(folder / "levels.safetensors") for folder in (killed, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert any(int(level) for level in other.values())
    for name in ("quality", "sparsity", "facts"):
        assert resumed.summary[name] == straight.summary[name]
    lines = [
        [{**json.loads(line), "seconds": None} for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (killed, whole)
    ]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == list(range(1, 31))
