"""TALL masks and Consensus Merging: the equations, the searches, and single-task models out of what is stored."""

import copy
import itertools
import json
import random
import shutil

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import maskwright
from maskwright import Budget, Expert, PruneTask, save_masks
from maskwright.backbones.defaults import causal_language_model
from maskwright.cli import cli
from maskwright.errors import BadBudget, BadData, BadModel, BadParameter, NumericalError
from maskwright.plugins.tall_masks.pruner import (
    Consensus,
    TallMasks,
    checkpoint_bits,
    consensus,
    normalised,
    read,
    reconstructed,
    restored,
    stored_bits,
    summed,
    tall_mask,
    ties,
)
from maskwright.sources.text import load_text
from maskwright.testing import conformance
from maskwright.toolkit.prunable import prunable_weights

CHECKS = [
    (f"{one.name}: {name}", check) for one in (TallMasks, Consensus) for name, check in conformance(one)
]


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_conformance(check):
    check()


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6)

# -- masks -----------------------------------------------------------------------------------------------------------


def test_the_mask_of_a_hand_case():
    """τ = (1, 2), τₘ = 3: task 1 is on for λ < 0.5, task 2 for λ < 2; equality is off."""
    one, two, merged = vector(1), vector(2), vector(3)
    assert [bool(tall_mask(one, merged, strength)) for strength in (0.2, 0.49, 0.5, 0.6)] == [1, 1, 0, 0]
    assert [bool(tall_mask(two, merged, strength)) for strength in (0.5, 1.99, 2.0, 3.0)] == [1, 1, 0, 0]


def test_opposite_entries_are_on_below_one_though_their_sum_is_zero():
    for entry in (vector(1), vector(-1)):
        assert [bool(tall_mask(entry, vector(0), strength)) for strength in (0.2, 0.99, 1.0)] == [1, 1, 0]


def test_an_entry_that_no_task_touched_is_off():
    """Both sides are zero: with ≥ it would count as used by all."""
    assert not tall_mask(vector(0), vector(0), 0.0).any()
    assert not tall_mask(vector(0, 0), vector(0, 5), 0.2).any()


def test_the_mask_is_that_of_the_weights():
    """1[|θ₀ - θₜ| > λ·|θₘ - θₜ|], written entry by entry."""
    base, tuned = randn(40), randn(3, 40, seed=1)
    vectors = tuned - base
    merged = summed(vectors)
    for strength in LAMBDAS:
        for row in range(3):
            mask = tall_mask(vectors[row], merged, strength)
            for place in range(40):
                left = abs(float(base[place] - tuned[row, place]))
                right = abs(float(base[place] + merged[place] - tuned[row, place]))
                assert bool(mask[place]) == (left > strength * right)


def test_one_task_is_rebuilt_as_it_was():
    base, tuned = randn(100), randn(100, seed=1)
    tuned[:30] = base[:30]
    task = tuned - base
    for strength in LAMBDAS:
        mask = tall_mask(task, summed(task[None]), strength)
        assert torch.equal(mask, task != 0)
        torch.testing.assert_close(reconstructed(base, task, mask), tuned, atol=1e-15, rtol=1e-14)


def test_tasks_that_share_no_entry_are_rebuilt_as_they_were():
    base, vectors = randn(90), torch.zeros(3, 90, dtype=torch.float64)
    for row in range(3):
        vectors[row, 30 * row : 30 * row + 20] = randn(20, seed=row + 1)
    merged = summed(vectors)
    for strength in (0.0, *LAMBDAS, 100.0):
        masks = torch.stack([tall_mask(one, merged, strength) for one in vectors])
        assert torch.equal(masks, vectors != 0)
        for mask, own in zip(masks, vectors):
            assert torch.equal(reconstructed(base, merged, mask), torch.where(mask, base + own, base))
    assert masks.sum(0).max() == 1
    assert torch.equal(reconstructed(base, merged, consensus(masks, 2)), base)


def test_larger_strengths_keep_fewer_of_the_same():
    vectors = randn(2, 500)
    masks = [tall_mask(vectors[0], summed(vectors), strength) for strength in (0.0, *LAMBDAS, 1.0, 5.0)]
    assert torch.equal(masks[0], vectors[0] != 0)
    for more, fewer in itertools.pairwise(masks):
        assert not (fewer & ~more).any()
        assert fewer.sum() < more.sum()


def test_at_one_no_binary_mask_is_closer():
    base, vectors = randn(300), randn(4, 300, seed=2)
    merged = summed(vectors)
    for own in vectors:
        rebuilt = reconstructed(base, merged, tall_mask(own, merged, 1.0))
        distance = (rebuilt - base - own).abs().sum()
        assert distance.item() == pytest.approx(torch.minimum(own.abs(), (merged - own).abs()).sum().item())
        for strength in LAMBDAS:
            other = reconstructed(base, merged, tall_mask(own, merged, strength))
            assert (other - base - own).abs().sum() >= distance


def test_the_order_of_the_tasks_has_no_part():
    vectors = torch.randint(-8, 9, (4, 200), generator=torch.Generator().manual_seed(0)).double()
    order = [2, 0, 3, 1]
    masks = [
        torch.stack([tall_mask(one, summed(rows), 0.4) for one in rows]) for rows in (vectors, vectors[order])
    ]
    assert torch.equal(masks[0][order], masks[1])
    for k in range(6):
        assert torch.equal(consensus(masks[0], k), consensus(masks[1], k))


def test_consensus_from_all_entries_to_none():
    masks = torch.rand(3, 400, generator=torch.Generator().manual_seed(0)) < 0.5
    kept = [consensus(masks, k) for k in range(5)]
    assert kept[0].all()
    assert torch.equal(kept[1], masks.any(0))
    assert torch.equal(kept[3], masks.all(0))
    assert not kept[4].any()
    assert all(not (fewer & ~more).any() for more, fewer in itertools.pairwise(kept))


def test_storage_in_bits():
    assert (stored_bits(10**6, 8), checkpoint_bits(10**6, 8)) == (72 * 10**6, 256 * 10**6)
    assert (stored_bits(10**6, 20), checkpoint_bits(10**6, 20)) == (84 * 10**6, 640 * 10**6)
    assert stored_bits(10, 2, 5) - stored_bits(10, 2) == checkpoint_bits(10, 2, 5) - checkpoint_bits(10, 2)


# -- TIES ------------------------------------------------------------------------------------------------------------


def test_ties_of_a_hand_case():
    vectors = torch.stack([vector(5, -4, 0.1, 2, 0), vector(-2, -3, 0.2, 2.5, 0)])
    # The largest two of each: (5, -4) and (-3, 2.5); signs (+, -, ·, +, ·).
    assert ties(vectors, 0.4).tolist() == [5, -7, 0, 2.5, 0]
    assert ties(vectors, 0.4, mean=True).tolist() == [5, -3.5, 0, 2.5, 0]
    # All entries: 5 - 2 is positive, so that -2 is left out.
    assert ties(vectors, 1.0).tolist() == pytest.approx([5, -7, 0.3, 4.5, 0])


def test_a_tie_of_signs_goes_to_most_entries():
    assert ties(torch.stack([vector(1, 1, 1), vector(-1, 1, 1)]), 1.0).tolist() == [1, 2, 2]
    assert ties(torch.stack([vector(1, -1, -1), vector(-1, -1, -1)]), 1.0).tolist() == [-1, -2, -2]


@pytest.mark.parametrize("mean", [False, True])
def test_ties_entry_by_entry(mean):
    vectors, share = randn(4, 37), 0.2
    kept = int(37 * share)
    rows = vectors.tolist()
    for row in rows:
        least = sorted(map(abs, row))[-kept]
        row[:] = [one if abs(one) >= least else 0.0 for one in row]
        assert sum(one != 0 for one in row) == 7, "the official code keeps an eighth"
    expected, sums = [], [sum(column) for column in zip(*rows)]
    majority = sum((one > 0) - (one < 0) for one in sums)
    for column, total in zip(zip(*rows), sums):
        sign = total if total else majority
        agree = [one for one in column if one * sign > 0]
        expected.append(sum(agree) / (max(len(agree), 1) if mean else 1))
    assert ties(vectors, share, mean=mean).tolist() == pytest.approx(expected)


# -- the pruners -----------------------------------------------------------------------------------------------------


def flat_model(*base):
    model = nn.Sequential(nn.Linear(len(base), 1, bias=False))
    model[0].weight.data = torch.tensor([base], dtype=torch.float32)
    return model


def experts_of(model, *vectors, scores=None):
    """Experts of a `flat_model` with these task vectors."""
    base = model[0].weight.detach()
    found = {}
    for number, own in enumerate(vectors):
        state = {"0.weight": base + torch.tensor([own], dtype=torch.float32)}
        found["abcdefgh"[number]] = Expert(state, scores[number] if scores else None)
    return found


def pruned(pruner, model, experts, **more):
    return pruner.prune(model, PruneTask(None, extras={"experts": experts}, **more))


def by_kept(table, base, rest=0.0):
    """A score by how many entries of the model differ from the base."""
    return lambda model: table.get(int((model[0].weight != base).sum()), rest)


def ladder():
    """A model and a task vector of which λ = 0.2, …, 0.6 use 5, 4, 3, 2, 1 entries of the merger with a second one."""
    model = flat_model(*[0.5] * 6)
    # |τ| / |τₘ - τ| = 0.25, 0.35, 0.45, 0.55, 0.65 and 0.1.
    own, other = [1.0] * 6, [1 / 0.25, 1 / 0.35, 1 / 0.45, 1 / 0.55, 1 / 0.65, 10.0]
    return model, own, other


def test_each_task_has_the_strength_that_its_expert_likes_best():
    for wanted, kept in zip(LAMBDAS, (5, 4, 3, 2, 1)):
        model, own, other = ladder()
        base = model[0].weight.detach().clone()
        experts = experts_of(model, own, other, scores=[by_kept({kept: 0.9, 6: 1.0}, base), None])
        result = pruned(TallMasks(), model, experts)
        assert result.facts["lambda a"] == wanted
        assert result.facts["kept a"] == pytest.approx(kept / 6)
        assert (result.facts["score a"], result.facts["expert's score a"]) == (0.9, 1.0)
        assert int(result.artifacts["task-masks"]["a:0.weight"].keep.sum()) == kept
        assert result.facts["lambda b"] == 1.0, "nobody can say: the nearest in L1"
        assert [one["lambda"] for one in result.history] == list(LAMBDAS)


def test_of_equally_good_strengths_the_smallest_is_taken():
    model, own, other = ladder()
    base = model[0].weight.detach().clone()
    table = {5: 0.1, 4: 0.8, 3: 0.2, 2: 0.8, 1: 0.3}
    experts = experts_of(model, own, other, scores=[by_kept(table, base), lambda model: -3.0])
    facts = pruned(TallMasks(lambdas=(0.6, 0.5, 0.4, 0.3, 0.2)), model, experts).facts
    assert facts["lambda a"] == 0.3
    assert facts["lambda b"] == 0.2, "all are as good"


def test_one_strength_is_taken_as_it_is():
    model, own, other = ladder()
    facts = pruned(TallMasks(lambdas=0.4), model, experts_of(model, own, other)).facts
    assert facts["lambda a"] == facts["lambda b"] == 0.4
    assert facts["kept a"] == pytest.approx(3 / 6)


def test_shares_of_selfish_and_catastrophic_entries():
    """λ = 1. Entries: only a's, only b's, both, opposite (nobody's: merged they are 0), untouched."""
    model = flat_model(0.0, 0.0, 0.0, 0.0, 0.0)
    experts = experts_of(model, (1, 0, 1, 1, 0), (0, 2, 1.5, -1, 0))
    result = pruned(TallMasks(lambdas=0.9), model, experts)
    masks = result.artifacts["task-masks"]
    assert masks["a:0.weight"].keep.tolist() == [[True, False, False, True, False]]
    assert masks["b:0.weight"].keep.tolist() == [[False, True, True, True, False]]
    assert result.facts["selfish share"] == pytest.approx(3 / 5)
    assert result.facts["catastrophic share"] == pytest.approx(1 / 5)


def test_the_model_becomes_the_merger_where_some_task_uses_it():
    model = flat_model(10.0, 20.0, 30.0, 40.0)
    result = pruned(TallMasks(lambdas=1.0), model, experts_of(model, (1, 0, 3, 0.5), (0, 0, 3.5, -0.5)))
    # 1 + 0; untouched; 3 > 3.5 is not, 3.5 > 3 is; 0.5 > 0.5 is not.
    assert result.masks["0.weight"].keep.tolist() == [[True, False, True, False]]
    assert model[0].weight.tolist() == [[11, 20, 36.5, 40]]
    assert result.artifacts["merged"]["0.weight"].tolist() == [[1, 0, 6.5, 0]]


def test_ties_is_what_it_is_told_to_merge_by():
    vectors = randn(2, 30, dtype=torch.float32)
    model = flat_model(*[0.0] * 30)
    result = pruned(TallMasks(merge="ties", lambdas=0.3), model, experts_of(model, *vectors.tolist()))
    merged = ties(vectors)
    assert int((merged != 0).sum()) <= 12
    used = tall_mask(vectors[0], merged, 0.3) | tall_mask(vectors[1], merged, 0.3)
    assert torch.equal(result.artifacts["merged"]["0.weight"][0], merged * used)
    wide = TallMasks(merge="ties", ties_share=0.9, lambdas=0.3)
    model = flat_model(*[0.0] * 30)
    again = pruned(wide, model, experts_of(model, *vectors.tolist())).artifacts["merged"]["0.weight"][0]
    assert int((again != 0).sum()) > 20


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
def test_consensus_for_every_k(k):
    vectors = randn(3, 60, dtype=torch.float32)
    model = flat_model(*range(60))
    base = model[0].weight.detach().clone()
    result = pruned(Consensus(k=k, scales=1.0, lambdas=0.4), model, experts_of(model, *vectors.tolist()))
    # Subtracting the base again rounds, as it does in the pruner.
    given = torch.stack([(base[0] + one) - base[0] for one in vectors])
    merged = summed(given)
    used = sum(tall_mask(one, merged, 0.4).int() for one in given)
    kept = used >= k
    assert torch.equal(result.masks["0.weight"].keep[0], kept)
    assert torch.equal(model[0].weight[0].detach(), torch.where(kept, base[0] + merged, base[0]))
    if k == 0:
        assert torch.equal(model[0].weight[0].detach(), base[0] + merged), "the plain merge"
    if k == 4:
        assert torch.equal(model[0].weight.detach(), base), "the model as given"


def test_consensus_takes_the_first_best_scale():
    """Normalised: each expert's score counts by its own."""
    model = flat_model(*[0.0] * 4)

    def score(best, height):
        return lambda model: height * (1 - abs(model[0].weight[0, 0].item() - best))

    experts = experts_of(model, [0.5] * 4, [0.5] * 4, scores=[score(0.3, 100), score(0.7, 1)])
    own = {name: expert.score(flat_model(*[0.5] * 4)) for name, expert in experts.items()}
    facts = pruned(Consensus(k=0), model, experts).facts
    values = {}
    for scale in Consensus().scales:
        values[scale] = sum(experts[name].score(flat_model(*[scale] * 4)) / own[name] for name in "ab") / 2
    assert facts["scale"] in (0.3, 0.4, 0.5, 0.6, 0.7)
    assert values[facts["scale"]] == pytest.approx(max(values.values()))
    assert facts["normalised score"] == pytest.approx(max(values.values()))
    assert model[0].weight[0, 0].item() == pytest.approx(facts["scale"])

    model = flat_model(*[0.0] * 4)
    flat = experts_of(model, [0.5] * 4, [0.5] * 4, scores=[lambda model: 2.0, lambda model: 7.0])
    assert pruned(Consensus(), model, flat).facts["scale"] == 0.1


def test_scores_are_measured_by_the_experts_own_score_whatever_its_sign():
    assert normalised(0.45, 0.9) == pytest.approx(0.5)
    assert normalised(0.9, 0.6) == pytest.approx(1.5)
    assert normalised(-10.0, -8.0) < normalised(-9.0, -8.0) < normalised(-8.0, -8.0) == 1.0


# -- what is not merged ----------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
        self.head = nn.Linear(6, 3)
        self.tied = nn.Embedding(3, 6)
        self.tied.weight = self.head.weight

    def forward(self, x):
        return self.head(self.body(x))


def classifiers(count=2):
    torch.manual_seed(0)
    model = Classifier()
    experts = {}
    for number in range(count):
        state = {
            name: one + 0.3 * randn(*one.shape, seed=50 * number + place, dtype=torch.float32)
            if one.is_floating_point()
            else one + number + 1
            for place, (name, one) in enumerate(model.state_dict().items())
        }
        state["tied.weight"] = state["head.weight"]
        experts[f"task {number}"] = state
    return model, experts


def test_one_task_is_restored_whole_from_its_artifacts():
    """Head, biases, norms, running statistics and counters are the task's own; tied weights are restored in both places."""
    model, states = classifiers(1)
    base = {name: one.clone() for name, one in model.state_dict().items()}
    tied = model.state_dict()
    result = pruned(TallMasks(), model, {name: Expert(state) for name, state in states.items()})
    own = result.artifacts["task-own"]
    assert {"task 0:head.weight", "task 0:body.1.running_var", "task 0:body.1.num_batches_tracked"} <= set(
        own
    )
    assert "task 0:tied.weight" not in own, "stored once"
    model.load_state_dict(base)
    state = restored(tied, result.artifacts, "task 0")
    assert set(state) == set(base)
    for name, one in state.items():
        torch.testing.assert_close(one, states["task 0"][name], atol=1e-6, rtol=1e-6)
        if "weight" not in name or name.startswith(("head", "tied", "body.1")):
            assert torch.equal(one, states["task 0"][name]), "what is not merged is exact"
    fresh = Classifier()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.head.weight.detach(), states["task 0"]["head.weight"])


def test_the_model_is_scored_as_the_task_would_use_it_and_left_alone():
    model, states = classifiers()
    model.train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    seen = []

    def score(model):
        assert not model.training
        assert torch.equal(model.head.weight, states["task 0"]["head.weight"])
        assert torch.equal(model.body[1].running_mean, states["task 0"]["body.1.running_mean"])
        seen.append(model.body[0].weight.detach().clone())
        if len(seen) == 3:
            raise RuntimeError("no more")
        return 1.0

    experts = {"task 0": Expert(states["task 0"], score), "task 1": Expert(states["task 1"])}
    with pytest.raises(RuntimeError, match="no more"):
        pruned(TallMasks(), model, experts)
    assert model.training
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert not torch.equal(seen[0], seen[2])


def test_what_was_scored_is_what_is_restored():
    model, states = classifiers(3)
    base = {name: one.clone() for name, one in model.state_dict().items()}
    tied = model.state_dict()
    held = {}

    def score(model, name):
        held.setdefault(name, []).append({key: one.clone() for key, one in model.state_dict().items()})
        return -float((model.body[0].weight - states[name]["body.0.weight"]).abs().sum())

    experts = {
        name: Expert(state, lambda model, name=name: score(model, name)) for name, state in states.items()
    }
    result = pruned(TallMasks(), model, experts)
    model.load_state_dict(base)
    for name in states:
        tried = LAMBDAS.index(result.facts[f"lambda {name}"])
        state = restored(tied, result.artifacts, name)
        assert all(torch.equal(state[key], one) for key, one in held[name][tried].items())


def test_a_shared_model_has_each_tasks_head_and_nothing_else_of_it():
    model, states = classifiers()
    base = {name: one.clone() for name, one in model.state_dict().items()}
    scales = []

    def score(model, name):
        if not torch.equal(model.body[0].bias, states[name]["body.0.bias"]):
            scales.append(name)
            assert torch.equal(model.head.bias, states[name]["head.bias"])
            assert torch.equal(model.body[1].running_mean, base["body.1.running_mean"])
        return 1.0

    experts = {
        name: Expert(state, lambda model, name=name: score(model, name)) for name, state in states.items()
    }
    result = pruned(Consensus(), model, experts)
    assert len(scales) == 2 * 10
    assert set(result.artifacts["task-heads"]) == {
        f"{name}:{key}" for name in states for key in ("head.weight", "head.bias")
    }
    changed = {name for name, one in model.state_dict().items() if not torch.equal(one, base[name])}
    assert changed == {"body.0.weight", "body.3.weight"}
    assert "body.0.bias" in {
        key.partition(":")[2] for key in pruned(TallMasks(), model, experts).artifacts["task-own"]
    }


def test_the_task_says_what_is_merged():
    """As in the paper, everything but the head."""
    model, states = classifiers()

    def encoder(model):
        return {name: one for name, one in model.named_parameters() if name.startswith("body")}

    result = pruned(TallMasks(), model, {name: Expert(one) for name, one in states.items()}, prunable=encoder)
    assert {"body.0.bias", "body.1.weight", "body.3.weight"} <= set(result.masks)
    assert {key.partition(":")[2] for key in result.artifacts["task-own"]} == {
        *("head.weight", "head.bias", "body.1.running_mean", "body.1.running_var"),
        "body.1.num_batches_tracked",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_restored_exactly(dtype):
    model, states = classifiers(1)
    model.to(dtype)
    state = {
        name: one.to(dtype) if one.is_floating_point() else one for name, one in states["task 0"].items()
    }
    base = copy.deepcopy(model).state_dict()
    result = pruned(TallMasks(), model, {"task 0": Expert(state)})
    assert model.body[0].weight.dtype == dtype
    found = restored(base, result.artifacts, "task 0")
    assert all(torch.equal(one, state[name]) for name, one in found.items())


# -- on disk ---------------------------------------------------------------------------------------------------------


def test_bytes_on_disk_are_those_of_the_formula(tmp_path):
    """Eight tasks: one vector and a bit for each entry and task beside the base, against eight checkpoints."""
    tasks, model = 8, nn.Sequential(nn.Linear(300, 400, bias=False), nn.Linear(400, 203, bias=False))
    base = {name: one.clone() for name, one in model.state_dict().items()}
    states = {
        f"task-{number}": {
            name: one + 0.01 * randn(*one.shape, seed=number, dtype=torch.float32)
            for name, one in base.items()
        }
        for number in range(tasks)
    }
    result = pruned(TallMasks(), model, {name: Expert(state) for name, state in states.items()})

    def written(name, tensors):
        save_file(tensors, tmp_path / name)
        return (tmp_path / name).stat().st_size

    checkpoints = sum(written(f"{name}.safetensors", state) for name, state in states.items())
    held = written("base.safetensors", base)
    held += written("merged.safetensors", dict(result.artifacts["merged"]))
    save_masks(tmp_path / "task-masks.safetensors", result.artifacts["task-masks"])
    held += (tmp_path / "task-masks.safetensors").stat().st_size
    entries = 300 * 400 + 400 * 203
    headers = 6000
    assert 0 <= held - stored_bits(entries, tasks) / 8 < headers
    assert 0 <= checkpoints - checkpoint_bits(entries, tasks) / 8 < headers
    assert result.facts["stored bytes"] == stored_bits(entries, tasks) / 8
    assert result.facts["checkpoint bytes"] == checkpoint_bits(entries, tasks) / 8
    assert checkpoints / held == pytest.approx(256 / 72, rel=0.02)

    artifacts = read(tmp_path)
    read_base = load_file(tmp_path / "base.safetensors")
    merged = {name: sum(state[name] - base[name] for state in states.values()) for name in base}
    for task, state in states.items():
        found = restored(read_base, artifacts, task)
        for name, one in found.items():
            mask = tall_mask(state[name] - base[name], merged[name], 1.0)
            torch.testing.assert_close(one, torch.where(mask, base[name] + merged[name], base[name]))
            ours = result.artifacts["task-masks"][f"{task}:{name}"].keep
            assert torch.equal(one, reconstructed(base[name], result.artifacts["merged"][name], ours))
            assert torch.equal(ours, artifacts["task-masks"][f"{task}:{name}"].keep)


# -- bad input -------------------------------------------------------------------------------------------------------


def test_experts_that_cannot_be_merged_are_refused():
    model, states = classifiers()
    before = {name: one.clone() for name, one in model.state_dict().items()}

    def refused(error, match, **changes):
        for pruner in (TallMasks(), Consensus(scales=1.0)):
            state = {**states["task 0"], **changes}
            state = {name: one for name, one in state.items() if one is not None}
            with pytest.raises(error, match=match):
                pruned(pruner, model, {"tuned": Expert(state)})
            assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())

    refused(BadModel, r"'tuned' is of another architecture: the model's body\.0\.weight is \[8, 6\], it is \[6, 8\]",
            **{"body.0.weight": torch.zeros(6, 8)})  # fmt: skip
    refused(BadModel, r"the model's head\.bias is \[3\], it has none", **{"head.bias": None})
    refused(NumericalError, r"'tuned' has entries in head\.bias that are NaN", **{"head.bias": torch.full((3,), float("nan"))})  # fmt: skip
    for pruner in (TallMasks(), Consensus()):
        with pytest.raises(BadData, match="needs models that were fine-tuned from this one"):
            pruner.prune(model, PruneTask(None))
        with pytest.raises(BadBudget, match="takes no budget; leave the sparsity out"):
            pruner.prune(model, PruneTask(Budget(sparsity=0.5), extras={"experts": {}}))
    with pytest.raises(BadData, match="must not have a colon"):
        pruned(TallMasks(), model, {"a:b": Expert(states["task 0"])})
    with pytest.raises(NumericalError, match="score of the expert 'a' is not a number"):
        pruned(TallMasks(), model, {"a": Expert(states["task 0"], lambda model: float("nan"))})
    with pytest.raises(BadData, match="none has one; give experts data, or one scale"):
        pruned(Consensus(), model, {"a": Expert(states["task 0"])})
    with pytest.raises(BadData, match="'a' scores 0 on its own task"):
        pruned(Consensus(), model, {"a": Expert(states["task 0"], lambda model: 0.0)})
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(BadParameter, match=r"tall-masks: lambdas=\(-1\.0,\) must be numbers of at least 0"):
        TallMasks(lambdas=(-1.0,))
    with pytest.raises(BadParameter, match=r"consensus: scales=\(\) must be numbers"):
        Consensus(scales=())
    with pytest.raises(BadParameter, match="k=-1 must be >= 0"):
        Consensus(k=-1)


def test_what_does_not_belong_together_is_not_restored(tmp_path):
    model, states = classifiers()
    artifacts = pruned(TallMasks(), model, {name: Expert(one) for name, one in states.items()}).artifacts
    with pytest.raises(BadData, match="no task 'c' in these artifacts; they have task 0, task 1"):
        restored(model.state_dict(), artifacts, "c")
    with pytest.raises(BadModel, match=r"The base model has no body\.0\.weight \[8, 6\]"):
        restored({"body.0.weight": torch.zeros(6, 8)}, artifacts, "task 0")
    save_masks(tmp_path / "task-masks.safetensors", artifacts["task-masks"])
    with pytest.raises(BadData, match=r"has no merged\.safetensors"):
        read(tmp_path)


# -- with other plugins, and from the command line -------------------------------------------------------------------


def test_a_merged_model_is_pruned_further_by_another_plugin():
    model, states = classifiers()
    pruned(Consensus(scales=0.3), model, {name: Expert(one) for name, one in states.items()})
    merged = model.body[0].weight.detach().clone()
    result = maskwright.create("pruner", "magnitude").prune(model, PruneTask(Budget(sparsity=0.5)))
    keep = result.masks["body.0.weight"].keep
    assert torch.equal(model.body[0].weight.detach(), merged * keep)
    assert 0 < int(keep.sum()) < keep.numel()


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A tiny Llama, two models tuned from it, and text."""
    folder = tmp_path_factory.mktemp("family")
    draw = random.Random(0)
    words = ["mask", "token", "weight", "layer", "keep", "remove", "the", "of", "a", "norm"]
    lines = [" ".join(draw.choice(words) for _ in range(12)) + "." for _ in range(300)]
    (folder / "text.txt").write_text("\n".join(lines), "utf-8")
    source = load_text(folder / "text.txt", length=16, vocabulary=280)
    model = causal_language_model(
        vocabulary=source.vocabulary, length=32, width=16, depth=1, heads=2, eos_token=source.eos_token
    )
    model.save_pretrained(folder / "base")
    source.save_pretrained(folder / "base")
    tensors = load_file(folder / "base" / "model.safetensors")
    for number, name in enumerate(("one", "two")):
        shutil.copytree(folder / "base", folder / name)
        moved = {
            key: value + 0.05 * randn(*value.shape, seed=100 * number + place, dtype=torch.float32)
            for place, (key, value) in enumerate(tensors.items())
        }
        save_file(moved, folder / name / "model.safetensors", {"format": "pt"})
    return folder


def prune(family, out, pruner, *more):
    settings = {
        **{"data.source": family / "text.txt", "data.length": 16},
        **{"experts.one.model": family / "one", "experts.one.data": family / "text.txt"},
        "experts.two.model": family / "two",
    }
    chosen = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    line = ["prune", "--model", family / "base", "--pruner", pruner, "--out", out, *chosen, *more]
    result = CliRunner().invoke(cli, [str(one) for one in line], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads((out / "summary.json").read_text())


def test_the_command_leaves_what_restores_each_model(tmp_path, family):
    summary = prune(family, tmp_path / "run", "tall-masks")
    facts = summary["facts"]
    assert facts["lambda one"] in LAMBDAS
    assert facts["lambda two"] == 1.0, "it has no data"
    base = transformers.AutoModelForCausalLM.from_pretrained(family / "base")
    artifacts = read(tmp_path / "run")
    for task in ("one", "two"):
        expert = load_file(family / task / "model.safetensors")
        state = restored(base.state_dict(), artifacts, task)
        weights = {weight.name: weight for weight in prunable_weights(base)}
        for name, tensor in expert.items():
            if name not in weights:
                assert torch.equal(state[name], tensor)
                continue
            given = weights[name].parameter.detach()
            vectors = [load_file(family / one / "model.safetensors")[name] - given for one in ("one", "two")]
            mask = tall_mask(tensor - given, sum(vectors), facts[f"lambda {task}"])
            assert torch.equal(artifacts["task-masks"][f"{task}:{name}"].keep, mask)
            assert torch.equal(state[name], torch.where(mask, given + sum(vectors), given))
    again = transformers.AutoModelForCausalLM.from_pretrained(family / "base")
    again.load_state_dict(restored(base.state_dict(), artifacts, "one"))
    assert summary["sparsity"] == pytest.approx(facts["catastrophic share"], abs=1e-3)


def test_the_command_leaves_one_model_for_all(tmp_path, family):
    summary = prune(family, tmp_path / "run", "consensus", "--set", "pruner.scales=[0.5]")
    facts = summary["facts"]
    assert facts["scale"] == 0.5
    both = 1 - facts["selfish share"] - facts["catastrophic share"]
    assert 1 - summary["sparsity"] == pytest.approx(both, abs=1e-3)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(family / "base")
    masks = maskwright.load_masks(tmp_path / "run" / "masks.safetensors")
    for name, tensor in base.state_dict().items():
        moved = saved.state_dict()[name] != tensor
        assert not (moved & ~masks[name].keep).any() if name in masks else not moved.any()
