"""N:M patterns on weights whose inputs M does not divide: refused, skipped or padded, with every N:M pruner."""

import copy

import pytest
import torch
import transformers
from torch import nn

import maskwright
from maskwright import Budget, PruneTask, SparsityReport
from maskwright.errors import BadBudget
from maskwright.toolkit import remainders
from maskwright.toolkit.prunable import Rule, prunable_weights

TWO_FOUR = Budget(pattern="2:4")
PARAMETERS = {"maskllm": {"steps": 2, "prior": "none"}}
PRUNERS = ("magnitude", "random", "wanda", "sparsegpt", "maskllm")


def odd_mlp(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))


def batches(*shape):
    return [{"x": torch.randn(8, *shape, generator=torch.Generator().manual_seed(part))} for part in range(2)]


def pruned(name, model, given, remainder, budget=TWO_FOUR):
    task = PruneTask(budget, given, loss=lambda model, batch: model(batch["x"]).square().mean())
    pruner = maskwright.create("pruner", name, **PARAMETERS.get(name, {}))
    return remainders.prune(pruner, model, task, remainder)


def groups(keep, size=4):
    """Kept of each group of the last dimension, the last one maybe shorter."""
    return torch.stack([part.sum(-1) for part in keep.split(size, -1)], -1)


@pytest.mark.parametrize("name", PRUNERS)
def test_refusing_names_the_weight_and_changes_nothing(name):
    model = odd_mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BadBudget, match=r"2:4 does not fit 2\.weight \[12, 6\]: its 6 inputs"):
        pruned(name, model, batches(8), "refuse")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", PRUNERS)
def test_skipping_leaves_the_weight_dense_and_prunes_the_rest(name):
    model = odd_mlp()
    dense = model[2].weight.detach().clone()
    result = pruned(name, model, batches(8), "skip")
    assert set(result.masks) == {"0.weight", "4.weight"}
    assert torch.equal(model[2].weight, dense)
    assert all(bool((groups(mask.keep) == 2).all()) for mask in result.masks.values())


@pytest.mark.parametrize("name", PRUNERS)
def test_padding_keeps_at_most_n_of_the_last_group_and_the_model_as_it_was_built(name):
    model = odd_mlp()
    parameters = dict(model.named_parameters())
    result = pruned(name, model, batches(8), "pad")
    assert set(result.masks) == {"0.weight", "2.weight", "4.weight"}
    keep = result.masks["2.weight"].keep
    assert keep.shape == (12, 6)
    kept = groups(keep)
    assert bool((kept[:, 0] == 2).all())
    assert bool((kept[:, 1] <= 2).all())
    assert not bool(model[2].weight[~keep].any())
    assert result.report == SparsityReport.of(result.masks)
    assert all(one is parameters[path] for path, one in model.named_parameters()), "the same parameters"
    assert (model[2].in_features, tuple(model[2].weight.shape)) == (6, (12, 6))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model(batches(8)[0]["x"]).shape == (8, 4)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_a_score_never_prefers_the_padding(name):
    """What is left of the last group of 6 = 4 + 2 is as large as N allows."""
    keep = pruned(name, odd_mlp(), batches(8), "pad").masks["2.weight"].keep
    assert bool((groups(keep)[:, 1] == 2).all())
    keep = pruned(name, odd_mlp(), batches(8), "pad", Budget(pattern="1:4")).masks["2.weight"].keep
    assert bool((groups(keep)[:, 1] == 1).all())


@pytest.mark.parametrize("name", PRUNERS)
def test_weights_that_the_pattern_divides_are_pruned_as_without(name):
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    masks = [pruned(name, copy.deepcopy(model), batches(8), how).masks for how in ("refuse", "skip", "pad")]
    for other in masks[1:]:
        assert all(torch.equal(mask.keep, other[key].keep) for key, mask in masks[0].items())


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_convolutions_are_padded_in_their_input_channels(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=4))
    plain = copy.deepcopy(model)
    result = pruned(name, model, batches(3, 8, 8), "pad")
    first, second = (result.masks[f"{index}.weight"].keep for index in (0, 2))
    assert bool((first.sum(1) == 2).all()), "two of three channels at each place of the filter"
    assert bool((second.sum(1) == 2).all()), "both of two"
    assert [module.in_channels for module in (model[0], model[2])] == [3, 8]
    if name == "magnitude":
        assert torch.equal(model[2].weight, plain[2].weight)


def test_transposed_layers_are_padded_in_their_rows():
    config = transformers.GPT2Config(vocab_size=20, n_embd=18, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    tokens = [{"tokens": torch.randint(0, 20, (4, 8))}]
    task = PruneTask(TWO_FOUR, tokens)
    result = remainders.prune(maskwright.create("pruner", "wanda"), model, task, "pad")
    keep = result.masks["transformer.h.0.mlp.c_fc.weight"].keep
    assert keep.shape == (18, 72)
    assert bool((groups(keep.T) == 2).all())
    assert model(input_ids=tokens[0]["tokens"]).logits.isfinite().all()


def test_an_error_leaves_the_model_as_it_was():
    model = odd_mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(maskwright.errors.BadData, match="calibration set is empty"):
        pruned("wanda", model, [], "pad")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_pattern_that_divides_nothing_cannot_be_skipped():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(BadBudget, match="divides the inputs of none of the 2 weights"):
        pruned("magnitude", model, (), "skip")


def test_other_budgets_have_no_remainder():
    weights = prunable_weights(odd_mlp())
    assert [weight.name for weight in remainders.uneven(weights, TWO_FOUR)] == ["2.weight"]
    assert remainders.uneven(weights, Budget(sparsity=0.5)) == []
    rule = Rule(include=("2.*",))
    assert remainders.fitting(rule, Budget(sparsity=0.5), "skip") is rule
