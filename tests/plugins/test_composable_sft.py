"""LT-SFT: exactly K entries, rewinding, sparse training, and differences that add and subtract."""

import copy
import itertools
import json
import random

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import maskwright
from maskwright import Budget, PruneTask
from maskwright.backbones.defaults import causal_language_model, masked_language_model, vision_transformer
from maskwright.cli import cli
from maskwright.errors import BadBudget, BadData, BadModel, BadParameter, NumericalError
from maskwright.plugins.composable_sft.pruner import (
    Composition,
    Difference,
    LtSft,
    added,
    entries_of,
    l1_distance,
    phase_steps,
    read,
    selected,
    shares,
    summed,
)
from maskwright.sources.text import load_text
from maskwright.testing import conformance

CHECKS = conformance(LtSft)


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_conformance(check):
    check()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def network(seed=0):
    """An encoder of two layers and a head, which the default rule leaves alone."""
    body = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6))
    model = nn.ModuleDict({"body": body, "head": nn.Linear(6, 3)})
    for number, parameter in enumerate(model.parameters()):
        parameter.data = 0.5 * randn(*parameter.shape, seed=100 * seed + number)
    return model


def loss_of(model, batch):
    return F.cross_entropy(model["head"](model["body"](batch["x"])), batch["y"])


def data(seed=0, count=3):
    x = randn(count, 16, 6, seed=seed + 50)
    return [{"x": one, "y": (one[:, 0] > 0).long() + (one[:, 1] > 0).long()} for one in x]


def state_of(model):
    return {name: one.detach().clone() for name, one in model.state_dict().items()}


def tuned(model, batches, sparsity=0.8, prunable=None, task=PruneTask, **settings):
    pruner = LtSft(**{"lr": 0.01, "full_epochs": 4, "sparse_epochs": 4, **settings})
    return pruner.prune(model, task(Budget(sparsity=sparsity), batches, loss_of, seeded(), prunable=prunable))


def difference_of(result):
    return Difference.of(result.artifacts)


# -- which entries, and how long -------------------------------------------------------------------------------------


def test_the_largest_movements_of_all_tensors_are_chosen_together():
    """|Δ| = (0.5, 0.1 | 0.4, 0.3), K = 2: the first entry of each tensor."""
    moved = torch.tensor([-0.5, 0.1, 0.4, 0.3])
    nothing = torch.zeros(4, dtype=torch.bool)
    assert selected(moved, nothing, 2).tolist() == [True, False, True, False]
    assert not selected(moved, nothing, 0).any()
    assert selected(moved, nothing, 4).all()


def test_equal_movements_do_not_select_more_than_k():
    """14 of 35 entries never moved: K = 32 selects 32, the first of those that tie at zero."""
    moved = torch.cat([torch.zeros(7), randn(21).abs() + 0.1, torch.zeros(7)])
    chosen = selected(moved, torch.zeros(35, dtype=torch.bool), 32)
    assert int(chosen.sum()) == 32
    assert chosen[:32].all()
    ones = selected(torch.ones(10), torch.zeros(10, dtype=torch.bool), 3)
    assert ones.tolist() == [True] * 3 + [False] * 7


def test_entries_that_are_taken_are_not_chosen_again():
    moved = torch.tensor([9.0, 0.0, 8.0, 0.0, 1.0])
    taken = torch.tensor([True, False, True, False, False])
    assert selected(moved, taken, 2).tolist() == [False, True, False, False, True]
    assert selected(moved, taken, 3).tolist() == [False, True, False, True, True]


@pytest.mark.parametrize(("count", "iterations"), [(21, 3), (20, 3), (1, 3), (7, 1), (100, 7)])
def test_iterations_add_equal_shares_of_exactly_k(count, iterations):
    parts = shares(count, iterations)
    assert sum(parts) == count
    assert max(parts) - min(parts) <= 1
    if count == 21:
        assert parts == [7, 7, 7]


@pytest.mark.parametrize(
    ("least", "most", "epochs", "steps"),
    [
        *((None, None, 3, 30), (50, None, 3, 50), (None, 20, 3, 20), (25, 40, 3, 30), (35, 40, 3, 35)),
        *((None, 20, None, 20), (None, 30, 3, 30)),
    ],
)
def test_the_length_of_a_phase(least, most, epochs, steps):
    """Batches of 8 of 80 items: ten steps an epoch."""
    assert phase_steps(epochs, 10, least, most) == steps


def test_a_phase_without_a_length_is_refused():
    with pytest.raises(BadParameter, match="needs epochs or a largest number of steps"):
        phase_steps(None, 10, 5, None)
    with pytest.raises(BadParameter, match="at least 50 steps cannot have at most 40"):
        phase_steps(3, 10, 50, 40)


def test_the_distance_is_shared_out_over_all_parameters():
    base = randn(12)
    theta = base.clone()
    theta[:5] += 0.1
    assert 1.0 * l1_distance(theta, base, 40).item() == pytest.approx(0.1 * 5 / 40)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.99, 0.8, 0.5, 0.29])
def test_exactly_k_entries_change_and_no_other_bit(sparsity):
    model = network()
    before = state_of(model)
    result = tuned(model, data(), sparsity)
    total = 60 + 60
    k = total - int(round(sparsity * 100) * total // 100)
    assert int(sum(mask.keep.sum() for mask in result.masks.values())) == k
    changed = {name: model.state_dict()[name] != before[name] for name in before}
    assert sum(int(one.sum()) for one in changed.values()) == k
    assert all(torch.equal(changed[name], mask.keep) for name, mask in result.masks.items())
    assert result.facts["selected entries"] == result.facts["changed entries"] == k
    assert set(result.masks) == {"body.0.weight", "body.2.weight"}


def test_the_entries_are_those_that_full_fine_tuning_moved_most():
    model, base = network(), network()
    result = tuned(model, data(), sparse_epochs=0, sparse_max_steps=0)
    assert all(torch.equal(one, base.state_dict()[name]) for name, one in model.state_dict().items()), (
        "rewound"
    )
    dense = plain(base, data(), 12)
    names = list(result.masks)
    moved = torch.cat([(dense[name] - base.state_dict()[name]).flatten().abs() for name in names])
    kept = torch.cat([result.masks[name].keep.flatten() for name in names])
    assert int(kept.sum()) == 24
    assert moved[kept].min() > moved[~kept].max()


def plain(model, batches, steps, lr=0.01, names=("body.0.weight", "body.2.weight"), clip=1.0):
    """Full fine-tuning, written for clarity."""
    model = copy.deepcopy(model)
    trained = [model.get_parameter(name) for name in names]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss_of(model, batches[step % len(batches)]).backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
    return state_of(model)


def test_with_all_entries_the_second_phase_is_plain_fine_tuning():
    model, expected = network(), plain(network(), data(), 12)
    result = tuned(model, data(), sparsity=0.0, full_epochs=1)
    assert all(bool(mask.keep.all()) for mask in result.masks.values())
    for name, one in model.state_dict().items():
        torch.testing.assert_close(one, expected[name], atol=2e-7, rtol=1e-6)
    assert not torch.allclose(model["body"][0].weight, network()["body"][0].weight, atol=1e-3)


def test_the_sparse_phase_trains_what_a_masked_loop_trains():
    """Gradients are masked and then clipped: the norm is that of what is kept."""
    clip = 0.05
    model = network()
    result = tuned(model, data(), clip=clip)
    reference = network()
    names = list(result.masks)
    trained = [reference.get_parameter(name) for name in names]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 12)
        optimizer.zero_grad()
        loss_of(reference, data()[step % 3]).backward()
        for name, one in zip(names, trained):
            one.grad *= result.masks[name].keep
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
    for name in names:
        torch.testing.assert_close(
            model.get_parameter(name), reference.get_parameter(name), atol=2e-7, rtol=1e-6
        )


def test_weight_decay_and_regularisation_move_only_what_may_change():
    model, before = network(), state_of(network())
    result = tuned(model, data(), weight_decay=0.5, sparse_l1=3.0, full_l1=3.0)
    for name, mask in result.masks.items():
        assert torch.equal(model.get_parameter(name)[~mask.keep], before[name][~mask.keep])


def test_regularisation_draws_towards_the_pretrained_values():
    def distance(**settings):
        model = network()
        tuned(model, data(), sparsity=0.0, **settings)
        return sum(
            (one - network().state_dict()[name]).abs().sum() for name, one in model.state_dict().items()
        )

    assert distance(sparse_l1=200.0) < 0.5 * distance()
    assert distance(full_l1=200.0) == distance(), "with all entries the first phase decides nothing"


def test_a_whole_head_is_trained_from_its_own_start_and_stored():
    model, before = network(), state_of(network())
    result = tuned(model, data(), whole=("head.*",))
    assert set(result.artifacts["whole"]) == {"head.weight", "head.bias"}
    assert not torch.equal(model["head"].weight, before["head.weight"])
    assert torch.equal(model["body"][0].bias, before["body.0.bias"]), "what is not named stays"
    losses = [one["loss"] for one in result.history]
    start = loss_of(network(), data()[0]).item()
    assert losses[0] == pytest.approx(start)
    assert losses[12] == pytest.approx(start), "the head was rewound too"
    assert losses[11] < start > losses[-1]
    assert [one["sparse"] for one in result.history] == [0.0] * 12 + [1.0] * 12


def test_the_head_can_be_left_out_of_the_distance():
    def head(**settings):
        model = network()
        tuned(model, data(), whole=("head.*",), sparse_l1=500.0, **settings)
        return (model["head"].weight - network()["head"].weight).abs().sum()

    assert head(l1_sparse_only=True) > 2 * head()


def test_iterations_go_on_from_where_the_last_ended():
    model, before = network(), state_of(network())
    result = tuned(model, data(), sparsity=1 - 21 / 120, iterations=3)
    assert int(sum(mask.keep.sum() for mask in result.masks.values())) == 21
    losses = [one["loss"] for one in result.history]
    first_full, first_sparse = losses[0::24], losses[12::24]
    assert first_full == pytest.approx(first_sparse), "each iteration rewinds to its own start"
    assert first_full[0] > first_full[1] > first_full[2], "which is where the last one ended"
    for name, mask in result.masks.items():
        assert torch.equal(model.get_parameter(name)[~mask.keep], before[name][~mask.keep])
    assert int(sum(len(one[0]) for one in difference_of(result).entries.values())) == 21
    one = tuned(network(), data(), sparsity=1 - 21 / 120)
    assert any(not torch.equal(mask.keep, one.masks[name].keep) for name, mask in result.masks.items())


def test_more_iterations_than_entries():
    result = tuned(network(), data(), sparsity=0.99, iterations=5)
    assert int(sum(mask.keep.sum() for mask in result.masks.values())) == 2


def test_entries_that_do_not_move_are_selected_and_not_stored():
    """Inputs that are always zero: their weights tie at no movement and have no part in the difference."""
    batches = data()
    for batch in batches:
        batch["x"][:, 3:] = 0
    model = network()
    result = tuned(model, batches, sparsity=0.1)
    assert result.facts["selected entries"] == 108
    assert result.facts["changed entries"] == 120 - 30
    assert sum(len(positions) for positions, _ in difference_of(result).entries.values()) == 90


def test_a_run_that_was_stopped_goes_on_to_the_same_difference():
    class Stopped(Exception):
        pass

    class Saving(PruneTask):
        """Saves after each step, restores when a loop begins, and stops after the 17th step in all."""

        saved: dict = {}
        left = 17

        def steps(self, total, state):
            self.loop = getattr(self, "loop", 0) + 1
            done, states = type(self).saved.get(self.loop, (0, {}))
            for name, held in states.items():
                state[name].load_state_dict(held)
            for index in range(done, total):
                yield maskwright.protocols.Step(index, total)
                held = {name: copy.deepcopy(one.state_dict()) for name, one in state.items()}
                type(self).saved[self.loop] = (index + 1, held)
                type(self).left -= 1
                if type(self).left == 0:
                    raise Stopped

    whole, model = network(), network()
    expected = tuned(whole, data(), iterations=2, full_epochs=2, sparse_epochs=1)
    before = state_of(model)
    with pytest.raises(Stopped):
        tuned(model, data(), iterations=2, full_epochs=2, sparse_epochs=1, task=Saving)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    result = tuned(model, data(), iterations=2, full_epochs=2, sparse_epochs=1, task=Saving)
    assert all(torch.equal(one, whole.state_dict()[name]) for name, one in model.state_dict().items())
    assert all(torch.equal(mask.keep, expected.masks[name].keep) for name, mask in result.masks.items())


def test_what_cannot_be_trained_is_refused_and_the_model_left_as_it_was():
    model, before = network(), state_of(network())

    def failing(model, batch):
        return loss_of(model, batch) * float("nan")

    budget = Budget(sparsity=0.5)
    with pytest.raises(NumericalError, match="the loss is nan at step 1 of 9"):
        LtSft().prune(model, PruneTask(budget, data(), failing))
    with pytest.raises(BadData, match="lt-sft trains on batches and a loss"):
        LtSft().prune(model, PruneTask(budget))
    with pytest.raises(BadBudget, match="does not meet a budget of pattern; give it one of sparsity"):
        LtSft().prune(model, PruneTask(Budget(pattern="2:4"), data(), loss_of))
    with pytest.raises(BadParameter, match=r"whole='heads\.\*' matches no parameter"):
        tuned(model, data(), whole=("heads.*",))
    with pytest.raises(BadParameter, match=r"body\.0\.weight is trained whole and may be pruned too"):
        tuned(model, data(), whole=("body.0.*",))
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_the_task_says_which_parameters_are_maskable():
    """As in the paper, all of them: biases and the head's too."""
    model = network()
    result = tuned(model, data(), sparsity=0.5, prunable=lambda model: dict(model.named_parameters()))
    total = sum(one.numel() for one in model.parameters())
    assert set(result.masks) == set(dict(model.named_parameters()))
    assert result.facts["selected entries"] == total - int(0.5 * total)
    assert any(bool(mask.keep.any()) for name, mask in result.masks.items() if name.endswith("bias"))


# -- differences -----------------------------------------------------------------------------------------------------


def test_a_difference_makes_the_model_out_of_the_base_and_the_base_out_of_the_model():
    model, base = network(), network()
    difference = difference_of(tuned(model, data(), whole=("head.*",)))
    composition = Composition(base)
    composition.add("task", difference, whole=True)
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in base.state_dict().items())
    composition.subtract("task")
    assert all(torch.equal(one, network().state_dict()[name]) for name, one in base.state_dict().items())


def random_difference(model, seed, count, scale, dtype=torch.float32):
    generator = seeded(seed)
    entries, shapes = {}, {}
    for name, one in model.named_parameters():
        chosen = torch.randperm(one.numel(), generator=generator)[:count].sort().values
        entries[name] = (chosen.int(), (scale * torch.randn(len(chosen), generator=generator)).to(dtype))
        shapes[name] = tuple(one.shape)
    return Difference(entries, shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("order", list(itertools.permutations("abc"))[::2])
def test_differences_subtract_to_the_base_bit_for_bit_in_any_order(dtype, order):
    """Also where they overlap and are so large that a floating-point sum forgets the base."""
    model = network().to(dtype)
    model["body"][0].weight.data[0, 0] = -0.0
    before = {name: one.view(_bits(dtype)) for name, one in state_of(model).items()}
    differences = {
        name: random_difference(model, seed, 5, scale)
        for seed, (name, scale) in enumerate(zip("abc", (1e-3, 3e4, 1.0)))
    }
    composition = Composition(model)
    for name in "abc":
        composition.add(name, differences[name])
    every = state_of(model)
    for name in order:
        composition.subtract(name)
    after = {name: one.view(_bits(dtype)) for name, one in state_of(model).items()}
    assert all(torch.equal(one, before[name]) for name, one in after.items())
    for name in order:
        composition.add(name, differences[name])
    assert all(torch.equal(one, every[name]) for name, one in state_of(model).items()), "in any order"


def _bits(dtype):
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def test_a_composition_is_the_sum_of_its_differences():
    model = network()
    a, b = random_difference(model, 0, 6, 0.1), random_difference(model, 1, 6, 0.1)
    composition = Composition(model)
    composition.add("a", a)
    composition.add("b", b)
    overlap = 0
    for name, base in network().named_parameters():
        expected = base.detach().double().flatten()
        for positions, values in (a.entries[name], b.entries[name]):
            for position, value in zip(positions.tolist(), values.tolist()):
                expected[position] += value
        torch.testing.assert_close(model.get_parameter(name).double().flatten(), expected, atol=1e-7, rtol=0)
        overlap += len(set(a.entries[name][0].tolist()) & set(b.entries[name][0].tolist()))
    assert overlap > 0
    composition.subtract("a")
    alone = network()
    Composition(alone).add("b", b)
    assert all(torch.equal(one, alone.state_dict()[name]) for name, one in model.state_dict().items())


def test_a_difference_of_nothing_is_the_identity():
    model, before = network(), state_of(network())
    composition = Composition(model)
    nothing = Difference(
        {name: (torch.empty(0, dtype=torch.int32), torch.empty(0)) for name in ("body.0.weight",)},
        {"body.0.weight": (10, 6)},
    )
    composition.add("nothing", nothing)
    assert all(torch.equal(one, before[name]) for name, one in state_of(model).items())
    composition.add("a", random_difference(model, 0, 6, 0.1))
    alone = network()
    Composition(alone).add("a", random_difference(alone, 0, 6, 0.1))
    assert all(torch.equal(one, alone.state_dict()[name]) for name, one in model.state_dict().items())


def test_entries_are_those_beyond_the_threshold_of_any_number_of_axes():
    """Kernels too: the official file format garbles tensors of three axes and more."""
    base = randn(3, 4, 2, 2)
    theta = base.clone()
    theta[0, 1, 0, 1] += 0.5
    theta[2, 3, 1, 0] -= 0.25
    theta[1, 0, 0, 0] += 5e-8
    keep = torch.ones_like(base, dtype=torch.bool)
    positions, values = entries_of(base, theta, keep)
    assert positions.tolist() == [5, 46]
    assert values.tolist() == pytest.approx([0.5, -0.25], abs=1e-6)
    torch.testing.assert_close(added(base, (positions, values)), theta, atol=1e-7, rtol=0)
    keep[0] = False
    assert entries_of(base, theta, keep)[0].tolist() == [46]


def test_sums_hold_each_entry_once():
    one = (torch.tensor([1, 4]), torch.tensor([0.5, 2.0]))
    two = (torch.tensor([0, 4]), torch.tensor([7.0, -2.0]))
    positions, values = summed([one, two])
    assert positions.tolist() == [0, 1, 4]
    assert values.tolist() == [7.0, 0.5, 0.0]


def test_differences_of_other_models_and_names_are_refused():
    model = network()
    composition = Composition(model)
    difference = random_difference(model, 0, 2, 0.1)
    composition.add("a", difference)
    before = state_of(model)
    with pytest.raises(BadParameter, match="'a' is there already"):
        composition.add("a", difference)
    with pytest.raises(BadParameter, match="no difference 'b' on the model; there are a"):
        composition.subtract("b")
    other = Difference(difference.entries, {**difference.shapes, "body.0.weight": (6, 10)})
    with pytest.raises(BadModel, match=r"'b' has body\.0\.weight \[6, 10\], the model \[10, 6\]"):
        composition.add("b", other)
    unknown = Difference({}, {"tail.weight": (2,)})
    with pytest.raises(BadModel, match=r"no parameter 'tail\.weight'"):
        composition.add("b", unknown)
    head = Difference({}, {}, {"head.bias": torch.ones(3)})
    with pytest.raises(
        BadParameter, match=r"head\.bias is set whole by one difference and changed by another"
    ):
        composition.add("b", head, whole=True)
    assert all(torch.equal(one, before[name]) for name, one in state_of(model).items())
    composition.add("b", head)
    assert torch.equal(model["head"].bias, before["head.bias"]), "its head was not asked for"


def test_a_task_is_learned_on_top_of_a_language_and_carried_to_another():
    """φ_task is of base + φ_source and does not hold φ_source; φ_target takes its place."""
    languages = {
        name: difference_of(tuned(network(), data(seed), 0.9)) for seed, name in enumerate(("en", "bm"))
    }
    model = network()
    composition = Composition(model)
    composition.add("en", languages["en"])
    source = state_of(model)
    task = difference_of(tuned(copy.deepcopy(model), data(9), 0.9, whole=("head.*",)))
    composition.subtract("en")
    composition.add("bm", languages["bm"])
    composition.add("task", task, whole=True)
    base = state_of(network())
    for name in languages["en"].entries:
        only_en = set(languages["en"].entries[name][0].tolist())
        only_en -= set(task.entries[name][0].tolist()) | set(languages["bm"].entries[name][0].tolist())
        chosen = sorted(only_en)
        assert chosen
        assert torch.equal(model.get_parameter(name).detach().flatten()[chosen], base[name].flatten()[chosen])
        assert not torch.equal(source[name].flatten()[chosen], base[name].flatten()[chosen])
    assert torch.equal(model["head"].weight.detach(), task.whole["head.weight"])


def test_experts_of_sparse_differences_merge_without_loss_by_tall_masks():
    """Another paper's pruner on these results: where two differences do not meet, each task is rebuilt from their sum."""
    experts, kept = {}, {}
    for seed, name in enumerate("ab"):
        model = network()
        result = tuned(model, data(seed), 0.95)
        experts[name] = maskwright.Expert(state_of(model))
        kept[name] = torch.cat([mask.keep.flatten() for mask in result.masks.values()])
    merged = network()
    result = maskwright.create("pruner", "tall-masks").prune(
        merged, PruneTask(None, extras={"experts": experts})
    )
    both = kept["a"] & kept["b"]
    used = torch.cat([mask.keep.flatten() for mask in result.masks.values()])
    assert torch.equal(used[~both], (kept["a"] | kept["b"])[~both])


# -- models it was not written for -----------------------------------------------------------------------------------


def gpt2():
    config = transformers.GPT2Config(
        **{"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0},
        **{"eos_token_id": 0},
    )
    return transformers.GPT2LMHeadModel(config)


def features(model, batch):
    out = model(batch["pixels"]) if "pixels" in batch else model(input_ids=batch["tokens"])
    found = getattr(out, "logits", None)
    return (out.last_hidden_state if found is None else found).float().square().mean()


TOKENS = {"tokens": torch.randint(0, 40, (4, 16), generator=seeded())}
PIXELS = {"pixels": torch.randn(2, 3, 32, 32, generator=seeded(1))}
MODELS = {
    "llama": (lambda: causal_language_model(vocabulary=40, length=16, width=16, depth=2, heads=2), TOKENS),
    "bert": (
        lambda: masked_language_model(vocabulary=40, length=16, mask_token=3, width=16, depth=2, heads=2),
        TOKENS,
    ),
    "vit": (lambda: vision_transformer(width=16, depth=2, heads=2), PIXELS),
    "gpt2": (gpt2, TOKENS),
    "resnet": (
        lambda: transformers.ResNetModel(
            transformers.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
            )
        ),
        PIXELS,
    ),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_model(name, dtype):
    torch.manual_seed(0)
    make, batch = MODELS[name]
    model = make().to(dtype)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    base = copy.deepcopy(model)
    pruner = LtSft(lr=1e-2, full_epochs=2, sparse_epochs=3)
    result = pruner.prune(model, PruneTask(Budget(sparsity=0.9), [batch], features))
    total = sum(mask.keep.numel() for mask in result.masks.values())
    assert result.facts["selected entries"] == total - int(0.9 * total)
    assert 0 < result.facts["changed entries"] <= result.facts["selected entries"]
    composition = Composition(base)
    composition.add("it", difference_of(result))
    assert all(torch.equal(one, model.state_dict()[key]) for key, one in base.state_dict().items())


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny model in a folder, with its tokenizer, and text."""
    folder = tmp_path_factory.mktemp("llama")
    draw = random.Random(0)
    words = ["mask", "token", "weight", "layer", "keep", "remove", "the", "of", "a", "norm"]
    lines = [" ".join(draw.choice(words) for _ in range(12)) + "." for _ in range(300)]
    (folder / "text.txt").write_text("\n".join(lines), "utf-8")
    source = load_text(folder / "text.txt", length=16, vocabulary=280)
    model = causal_language_model(
        vocabulary=source.vocabulary, length=32, width=16, depth=1, heads=2, eos_token=source.eos_token
    )
    model.save_pretrained(folder / "model")
    source.save_pretrained(folder / "model")
    return folder


def prune(*arguments):
    result = CliRunner().invoke(cli, ["prune", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_the_command_leaves_a_difference_that_makes_its_model(tmp_path, llama):
    out = tmp_path / "run"
    settings = {
        **{"data.source": llama / "text.txt", "data.length": 16, "run.calibration": 16, "run.batch_size": 8},
        **{"pruner.lr": 0.01, "pruner.full_epochs": 2, "pruner.sparse_epochs": 3},
    }
    chosen = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    prune("--model", llama / "model", "--pruner", "lt-sft", "--sparsity", 0.95, "--out", out, *chosen)
    summary = json.loads((out / "summary.json").read_text())
    base, saved = (
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        for folder in (llama / "model", out / "model")
    )
    difference = read(out)
    total = sum(layer["total"] for layer in summary["layers"])
    k = total - int(0.95 * total)
    assert summary["facts"]["selected entries"] == k
    assert sum(layer["kept"] for layer in summary["layers"]) == k, "counted from what was saved"
    assert summary["quality"]["after"] < summary["quality"]["before"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4 + 6
    composition = Composition(base)
    composition.add("text", difference)
    assert all(torch.equal(one, saved.state_dict()[name]) for name, one in base.state_dict().items())
    composition.subtract("text")
    again = transformers.AutoModelForCausalLM.from_pretrained(llama / "model").state_dict()
    assert all(torch.equal(one, again[name]) for name, one in base.state_dict().items())
    held = (out / "difference.safetensors").stat().st_size
    assert held < 0.5 * (out / "model" / "model.safetensors").stat().st_size
    with pytest.raises(BadData, match=r"has no difference\.safetensors"):
        read(tmp_path)


def test_whole_parameters_are_read_again(tmp_path):
    result = tuned(network(), data(), whole=("head.*",))
    for name, held in result.artifacts.items():
        save_file(dict(held), tmp_path / f"{name}.safetensors")
    found, given = read(tmp_path), difference_of(result)
    assert found.shapes == given.shapes
    assert all(torch.equal(found.whole[name], one) for name, one in given.whole.items())
    for name, pair in given.entries.items():
        assert all(torch.equal(one, two) for one, two in zip(found.entries[name], pair))
