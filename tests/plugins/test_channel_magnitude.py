"""Channel magnitude: which channels go, budgets met from below, and a small model that computes what the masked dense one does."""

import copy
import sys

import pytest
import torch
import transformers
from torch import nn

from maskwright import Budget, PruneTask, SparsityReport
from maskwright.errors import BadBudget, BadData, BadModel, NumericalError, UsageError
from maskwright.plugins.baselines.channels import ChannelMagnitude, group_norm
from maskwright.testing import conformance
from maskwright.toolkit.calibration import run
from maskwright.toolkit.prunable import Rule
from maskwright.toolkit.structured import find_axes, fit, flop_count, parameter_count

CHECKS = list(conformance(ChannelMagnitude))
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_conformance(check):
    check()


def convolutional():
    """With a batch norm, a depthwise and a flattened layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 12, 1),
        nn.Flatten(),
        nn.Linear(12 * 16, 20),
        nn.GELU(),
        nn.Linear(20, 4),
    )


def vit():
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=5)
    return transformers.ViTForImageClassification(config)


def resnet(layer_type):
    sizes = [8, 16] if layer_type == "basic" else [32, 64]
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=sizes, depths=[1, 2], layer_type=layer_type, num_labels=5
    )
    return transformers.ResNetForImageClassification(config)


def llama(**changes):
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **{**SIZES, **changes})
    return transformers.LlamaForCausalLM(config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **SIZES))


MODELS = {
    "convolutional": convolutional,
    "vit": vit,
    "resnet": lambda: resnet("basic"),
    "bottleneck": lambda: resnet("bottleneck"),
    "llama": llama,
    "bert": bert,
}


def made(name, seed=0):
    """A model whose norms have seen data, so that a removed channel would show where it is not."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.bias.data.normal_()
        if name in ("llama", "bert"):
            return model, {"tokens": torch.randint(0, 50, (3, 8))}
        return model, {"pixels": torch.randn(3, 3, 8, 8)}


@torch.no_grad()
def answers(model, batch):
    found = run(model.eval(), batch)
    return found if isinstance(found, torch.Tensor) else found.logits


def pruned(model, batch, budget, **task):
    return ChannelMagnitude().prune(model, PruneTask(budget, [batch], **task))


# -- the budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["params", "flops"])
def test_budgets_are_met_from_below_by_a_smaller_model(name, kind):
    model, batch = made(name)
    dense = {"params": parameter_count(model), "flops": flop_count(model, batch)}
    share = 0.9
    result = pruned(model, batch, Budget(**{kind: share}))
    left = {"params": parameter_count(model), "flops": flop_count(model, batch)}
    assert share - 0.09 < left[kind] / dense[kind] <= share
    assert result.facts == {
        "dense_parameters": dense["params"],
        "parameters": left["params"],
        "dense_flops": dense["flops"],
        "flops": left["flops"],
    }


def test_no_channel_more_would_fit():
    model, batch = made("convolutional")
    dense = parameter_count(model)
    axes = find_axes(copy.deepcopy(model), batch)
    pruned(model, batch, Budget(params=0.6))
    sizes = {"0": 27 + 1 + 2 + 9 + 1 + 12, "4": 8 + 1 + 16 * 20, "6": 12 * 16 + 1 + 4}
    assert {axis.name for axis in axes} == set(sizes)
    # Its smallest step is a filter of the first layer; what reads it has become smaller meanwhile.
    assert 0 <= 0.6 * dense - parameter_count(model) < sizes["0"]


def test_every_kind_of_channel_keeps_the_same_share():
    model, batch = made("vit")
    pruned(model, batch, Budget(params=0.7))
    assert model.config.num_attention_heads / 4 == pytest.approx(
        model.config.intermediate_size / 32, abs=0.25
    )
    assert {layer.mlp.fc1.out_features for layer in model.vit.layers} == {model.config.intermediate_size}


def test_fit_takes_the_largest_share_and_gives_the_rest_to_single_steps():
    class Numbers:
        def __init__(self, name, value, step):
            self.name, self.value, self.step = name, value, step

    axes = [Numbers("wide", 8, 2), Numbers("narrow", 4, 1)]

    def cost(plan):
        return 10 * plan["wide"] + 3 * plan["narrow"]

    assert fit(axes, cost, 92) == {"wide": 8, "narrow": 4}
    assert fit(axes, cost, 70) == {"wide": 6, "narrow": 3}
    assert fit(axes, cost, 72) == {"wide": 6, "narrow": 4}
    assert fit(axes, cost, 23) == {"wide": 2, "narrow": 1}


def test_flops_are_those_of_the_layers():
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    assert flop_count(model, {"x": torch.randn(5, 6)}) == 2 * (6 * 10 + 10 * 3)


# -- which channels --------------------------------------------------------------------------------------------------


def test_the_channels_of_the_smallest_norm_go():
    model, batch = made("convolutional")
    first, depthwise, after = model[0].weight.detach(), model[3].weight.detach(), model[4].weight.detach()
    norms = first.square().sum((1, 2, 3)) + depthwise.square().sum((1, 2, 3)) + after.square().sum((0, 2, 3))
    axes = {axis.name: axis for axis in find_axes(copy.deepcopy(model), batch)}
    assert torch.allclose(group_norm(model, axes["0"].channels[0]), norms, rtol=1e-5)
    bias, statistics = model[0].bias.detach().clone(), model[1].running_mean.clone()
    result = pruned(model, batch, Budget(params=0.5))
    kept = result.masks["0.weight"].keep.all((1, 2, 3)).nonzero()[:, 0]
    assert 0 < len(kept) < 8
    assert set(kept.tolist()) == set(norms.topk(len(kept)).indices.tolist())
    assert torch.equal(model[0].weight, first[kept])
    assert torch.equal(model[0].bias, bias[kept])
    assert torch.equal(model[1].running_mean, statistics[kept])
    assert (model[3].groups, model[3].in_channels) == (len(kept), len(kept))


def test_heads_go_as_a_whole():
    model, batch = made("vit")
    query = model.vit.layers[0].attention.q_proj
    query.weight.data[4:8] = 0  # the second head is the smallest by far
    for name in ("k_proj", "v_proj"):
        getattr(model.vit.layers[0].attention, name).weight.data[4:8] = 0
    result = pruned(model, batch, Budget(params=0.8))
    rows = result.masks["vit.layers.0.attention.q_proj.weight"].keep.all(1)
    assert rows.view(4, 4).all(1).tolist() == rows.view(4, 4).any(1).tolist() == [True, False, True, True]
    assert model.config.num_attention_heads == 3
    assert model.config.head_dim == 4


def test_a_ratio_in_the_config_lets_single_channels_go():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 4}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=8, patch_size=4))
    model.encoder.layer[0].mlp.fc1.weight.data[::4] = 0
    model.encoder.layer[0].mlp.fc2.weight.data[:, ::4] = 0
    result = pruned(model, {"pixels": torch.randn(2, 3, 8, 8)}, Budget(params=0.95))
    rows = result.masks["encoder.layer.0.mlp.fc1.weight"].keep.all(1)
    assert model.config.mlp_ratio == 3
    assert (~rows).nonzero()[:, 0].tolist() == list(range(0, 32, 4))


@pytest.mark.parametrize("name", MODELS)
def test_the_small_model_is_the_dense_one_under_the_masks(name):
    model, batch = made(name)
    masked = copy.deepcopy(model)
    result = pruned(model, batch, Budget(params=0.9))
    whole = answers(masked, batch)
    for weight, mask in result.masks.items():
        masked.get_parameter(weight).data.masked_fill_(~mask.keep, 0)
    assert torch.allclose(answers(model, batch), answers(masked, batch), atol=1e-5)
    assert not torch.allclose(answers(masked, batch), whole, atol=1e-3)
    assert result.report == SparsityReport.of(result.masks)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "convolutional"])
def test_the_smaller_model_is_saved_and_loaded_by_transformers(name, tmp_path):
    model, batch = made(name)
    pruned(model, batch, Budget(params=0.9))
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert parameter_count(again) == parameter_count(model)
    assert torch.equal(answers(again, batch), answers(model, batch))


def test_only_channels_that_prunable_weights_make_go():
    model, batch = made("convolutional")
    result = pruned(model, batch, Budget(params=0.95), prunable=Rule(include=("6.*",)))
    assert model[6].out_features < 20
    assert (model[0].out_channels, model[4].out_channels) == (8, 12)
    assert set(result.masks) == {"6.weight", "8.weight"}, "what reads a channel loses its column"


def test_gradients_that_were_off_stay_off():
    model, batch = made("llama")
    model.requires_grad_(False)
    pruned(model, batch, Budget(params=0.9))
    assert not any(parameter.requires_grad for parameter in model.parameters())


# -- refusals --------------------------------------------------------------------------------------------------------


def refused(error, match, model, batch, budget, **task):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=match):
        pruned(model, batch, budget, **task)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_models_whose_config_cannot_say_it_are_refused():
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    tokens = {"tokens": torch.randint(0, 50, (2, 8))}
    refused(
        BadModel, "no number in its config", transformers.GPT2LMHeadModel(config), tokens, Budget(params=0.9)
    )
    model, batch = made("llama")
    only = Rule(include=("model.layers.0.*",))
    refused(BadModel, "no number in its config", model, batch, Budget(params=0.9), prunable=only)


def test_channels_that_a_norm_mixes_are_refused():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    refused(BadModel, "no channel lies between", model, {"x": torch.randn(2, 6)}, Budget(params=0.5))

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.second(self.first(x).softmax(-1))

    refused(BadModel, "computes something else", Mixed(), {"x": torch.randn(2, 6)}, Budget(params=0.6))


def test_a_share_that_is_out_of_reach_is_refused_with_the_least_that_is_not():
    model, batch = made("bert")
    refused(BadBudget, r"0\.8\d\d of the params are left", model, batch, Budget(params=0.5))


def test_other_bad_input_is_refused():
    model, batch = made("llama")
    with pytest.raises(BadData, match="calibration set is empty"):
        ChannelMagnitude().prune(model, PruneTask(Budget(params=0.9)))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    refused_nan = pytest.raises(NumericalError, match=r"layers\.0\.mlp\.up_proj\.weight .* has 1 weights")
    with refused_nan:
        pruned(model, batch, Budget(params=0.9))


def test_without_torch_pruning_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    model, batch = made("llama")
    refused(UsageError, r"pip install 'maskwright\[structured\]'", model, batch, Budget(params=0.9))
