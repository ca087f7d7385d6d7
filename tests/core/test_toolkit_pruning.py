"""The pruning toolkit: which weights, as which matrices, with which inputs, and which of their entries stay."""

from fractions import Fraction

import attrs
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskwright import Budget, Mask, PruneTask
from maskwright.backbones.defaults import causal_language_model, masked_language_model, vision_transformer
from maskwright.errors import BadBudget, BadData, BadModel, NumericalError
from maskwright.toolkit import calibration, patterns
from maskwright.toolkit.calibration import calibrate, inputs_of, outer_products, squared_norms
from maskwright.toolkit.patterns import (
    candidates,
    check_budget,
    keep_best,
    keep_largest,
    keep_n_of_m,
    keep_share,
    removed_count,
    require_divisible,
)
from maskwright.toolkit.prunable import Rule, Weight, finish, prunable_weights
from maskwright.toolkit.sizes import dense_bytes, packed_bytes

SMALL = {"width": 16, "depth": 2, "heads": 2}
transformers.logging.set_verbosity_error()


def gpt2():
    config = transformers.GPT2Config(
        **{"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0},
    )
    return transformers.GPT2LMHeadModel(config)


def qwen():
    config = transformers.Qwen2Config(
        **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False},
    )
    return transformers.Qwen2ForCausalLM(config)


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


def t5():
    config = transformers.T5Config(
        **{"vocab_size": 40, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2},
        **{"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0},
    )
    return transformers.T5ForConditionalGeneration(config)


def albert():
    config = transformers.AlbertConfig(
        **{"vocab_size": 40, "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16},
    )
    return transformers.AlbertModel(config, add_pooling_layer=False)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.inner(x).relu()


TOKENS = {"tokens": torch.randint(0, 40, (3, 16), generator=torch.Generator().manual_seed(0))}
PIXELS = {"pixels": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
ROWS = {"x": torch.randn(5, 8, generator=torch.Generator().manual_seed(2))}

MODELS = {
    "llama": (lambda: causal_language_model(vocabulary=40, length=16, **SMALL), TOKENS),
    "bert": (lambda: masked_language_model(vocabulary=40, length=16, mask_token=3, **SMALL), TOKENS),
    "vit": (lambda: vision_transformer(**SMALL), PIXELS),
    "gpt2": (gpt2, TOKENS),
    "qwen": (qwen, TOKENS),
    "resnet": (resnet, PIXELS),
    "albert": (albert, TOKENS),
    "blocks": (lambda: nn.Sequential(Residual(), Residual(), Residual()), ROWS),
    "sequential": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), ROWS),
}
CHAINED = ("llama", "bert", "vit", "gpt2", "qwen", "resnet", "blocks")


def made(name, seed=0):
    torch.manual_seed(seed)
    make, batch = MODELS[name]
    return make(), batch


# -- which weights ---------------------------------------------------------------------------------------------------


def names(model, rule=None):
    return [weight.name for weight in prunable_weights(model, rule)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", 14),
        ("bert", 12),
        ("vit", 12),
        ("gpt2", 8),
        ("qwen", 14),
        ("resnet", 7),
        ("albert", 6),
        ("sequential", 2),
    ],
)
def test_layers_are_prunable_and_embeddings_and_heads_are_not(name, expected):
    found = names(made(name)[0])
    assert len(found) == expected
    assert not any(word in one for one in found for word in ("embed", "head", "classifier", "norm", "wte"))
    assert all(one.endswith("weight") for one in found)


def test_an_output_head_tied_to_an_embedding_is_not_prunable_under_any_name():
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False))
    model[2].weight = model[0].weight
    assert names(model) == ["1.weight"]


def test_a_shared_weight_is_counted_once_and_knows_both_owners():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    (weight,) = prunable_weights(model)
    assert (weight.name, weight.owners) == ("0.weight", (model[0], model[2]))


def test_a_weight_that_is_a_view_of_another_is_counted_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert names(model) == ["0.weight"]


def test_patterns_and_types_choose_other_weights():
    model = made("llama")[0]
    assert len(names(model, Rule(include=("*.mlp.*",)))) == 6
    assert len(names(model, Rule(exclude=("*.0.*", "*lm_head*")))) == 7
    assert names(nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1)), Rule(types=("Conv2d",))) == ["1.weight"]


def test_attention_whose_projections_are_not_called_is_left_out():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert names(model) == ["linear1.weight", "linear2.weight"]


def test_a_model_with_nothing_to_prune_and_a_wrong_name_are_refused():
    with pytest.raises(BadModel, match="Nothing in this Embedding may be pruned"):
        prunable_weights(nn.Embedding(4, 4))
    with pytest.raises(BadModel, match=r"no parameter '7\.weight'"):
        prunable_weights(made("sequential")[0], lambda model: {"7.weight": model[0].weight})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    model = made("sequential")[0]
    model[2].weight.data[1, 3] = value
    with pytest.raises(NumericalError, match=r"2\.weight \(4, 8\) has 1 weights that are NaN or infinite"):
        prunable_weights(model)


def test_large_finite_weights_are_finite():
    model = nn.Linear(4, 4)
    model.weight.data.fill_(3e38)
    assert len(prunable_weights(model)) == 1


@pytest.mark.parametrize("name", list(MODELS))
def test_a_weight_and_its_matrix_are_inverse(name):
    for weight in prunable_weights(made(name)[0]):
        matrix = weight.matrix.clone()
        assert tuple(matrix.shape) == weight.shape
        assert torch.equal(weight.as_parameter(matrix), weight.parameter)
        weight.write(matrix * 2)
        assert torch.equal(weight.matrix, matrix * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_kept(dtype):
    (weight,) = prunable_weights(nn.Linear(4, 4).to(dtype))
    weight.write(torch.ones(4, 4))
    weight.apply(Mask(torch.eye(4, dtype=torch.bool)))
    assert weight.parameter.dtype == dtype
    assert torch.equal(weight.parameter.detach(), torch.eye(4, dtype=dtype))


@pytest.mark.parametrize("name", ["gpt2", "resnet", "llama"])
def test_a_matrix_times_the_inputs_is_what_the_layer_puts_out(name):
    """Columns of the matrix and of the inputs are in one order, also for transposed and convolutional layers."""
    model, batch = made(name)
    weights = prunable_weights(model.eval())
    seen = {}
    hooks = [
        weight.owner.register_forward_hook(
            lambda module, args, output, weight=weight: seen.update({weight.name: (args[0], output)})
        )
        for weight in weights
    ]
    with torch.no_grad():
        calibration.run(model, batch)
    for hook in hooks:
        hook.remove()
    for weight in weights:
        x, output = seen[weight.name]
        product = inputs_of(weight.owner, x)[0] @ weight.matrix.T
        if (bias := getattr(weight.owner, "bias", None)) is not None:
            product = product + bias
        expected = output.movedim(1, -1) if weight.type == "Conv2d" else output
        torch.testing.assert_close(product, expected.reshape(product.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("groups", "options"),
    [
        (1, {"padding": 1, "stride": 2}),
        (4, {"padding": "same", "dilation": 2}),
        (8, {"padding": 1, "padding_mode": "reflect"}),
        (2, {"padding": (0, 2), "padding_mode": "circular"}),
    ],
)
def test_convolutions_are_unfolded_in_the_order_of_their_matrix(groups, options):
    conv = nn.Conv2d(8, 16, 3, groups=groups, bias=False, **options)
    (weight,) = prunable_weights(conv)
    x = torch.randn(2, 8, 6, 5)
    inputs = inputs_of(conv, x)
    assert (weight.groups, weight.inputs) == (groups, 8 // groups)
    product = torch.einsum("gti,goi->tgo", inputs, weight.matrix.unflatten(0, (groups, -1))).flatten(1)
    expected = conv(x).detach().movedim(1, -1).reshape(product.shape)
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)


def test_columns_of_a_convolution_are_consecutive_input_channels():
    conv = nn.Conv2d(4, 1, (2, 1), bias=False)
    conv.weight.data = torch.arange(8.0).view(1, 4, 2, 1)
    (weight,) = prunable_weights(conv)
    assert weight.matrix.tolist() == [[0, 2, 4, 6, 1, 3, 5, 7]]


def test_finish_zeroes_what_is_not_kept_and_counts_it():
    model = made("gpt2")[0]
    weights = prunable_weights(model)
    before = {weight.name: weight.parameter.detach().clone() for weight in weights}
    keep = {weight.name: keep_n_of_m(weight.matrix.abs(), 1, 2) for weight in weights}
    result = finish(model, weights, keep)
    assert result.report.sparsity == 0.5
    for weight in weights:
        mask = result.masks[weight.name].keep
        assert mask.shape == weight.parameter.shape
        assert torch.equal(weight.parameter.detach(), before[weight.name] * mask)


# -- which entries ---------------------------------------------------------------------------------------------------


def naive_n_of_m(scores, n, m):
    """Sort each group; the first of equals first."""
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], m):
            group = scores[row, start : start + m].tolist()
            best = sorted(range(m), key=lambda i: (-group[i], i))[:n]
            keep[row, [start + i for i in best]] = True
    return keep


PAIRS = [(1, 2), (1, 4), (2, 4), (3, 4), (4, 8), (1, 8), (7, 8), (2, 3), (3, 6), (2, 5), (5, 16)]


@pytest.mark.parametrize(("n", "m"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_n_of_m_equals_a_naive_search_with_ties(n, m, dtype):
    generator = torch.Generator().manual_seed(n * 100 + m)
    few = torch.randint(-2, 3, (5, 6 * m), generator=generator).to(dtype)
    many = torch.randn(5, 6 * m, generator=generator).to(dtype)
    for scores in (few, many, few.abs(), -many.abs(), torch.zeros_like(many)):
        assert torch.equal(keep_n_of_m(scores, n, m), naive_n_of_m(scores, n, m))
        assert torch.equal(keep_n_of_m(scores, n, m, magnitude=True), naive_n_of_m(scores.abs(), n, m))


def test_n_of_m_across_the_edges_of_its_chunks(monkeypatch):
    scores = torch.randint(0, 3, (6, 40)).float()
    expected = naive_n_of_m(scores, 2, 4)
    monkeypatch.setattr(patterns, "_CHUNK", 16)
    assert torch.equal(keep_n_of_m(scores, 2, 4), expected)


def test_n_of_m_takes_transposed_and_empty_scores():
    scores = torch.randn(8, 12)
    assert torch.equal(keep_n_of_m(scores.T, 2, 4), naive_n_of_m(scores.T, 2, 4))
    assert keep_n_of_m(torch.zeros(0, 8), 2, 4).shape == (0, 8)


def test_candidates_are_all_rows_in_order():
    rows = ["".join(map(str, row)) for row in candidates(2, 4).int().tolist()]
    assert rows == ["1100", "1010", "1001", "0110", "0101", "0011"]
    assert ["".join(map(str, row)) for row in candidates(1, 4).int().tolist()] == [
        "1000",
        "0100",
        "0010",
        "0001",
    ]
    with pytest.raises(BadBudget, match="8:16 has 12,870 candidates"):
        candidates(8, 16)


def test_a_pattern_that_does_not_divide_names_layer_shape_and_pattern():
    weights = prunable_weights(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)))
    with pytest.raises(BadBudget, match=r"Pattern 2:4 does not fit 1\.weight \[8, 6\]: its 6 inputs"):
        require_divisible(weights, Budget(pattern="2:4"))
    with pytest.raises(BadBudget, match=r"2:4 does not fit scores \[3, 6\]"):
        keep_n_of_m(torch.zeros(3, 6), 2, 4)


def test_groups_of_a_convolution_do_not_span_its_places():
    """3 input channels at 4 places are 12 columns: 4 divides 12, but a group would mix channels of two places."""
    with pytest.raises(BadBudget, match="its 3 inputs"):
        require_divisible(prunable_weights(nn.Conv2d(3, 4, 2)), Budget(pattern="2:4"))


def test_a_pruner_is_not_given_a_budget_that_it_does_not_meet():
    @attrs.frozen
    class Only:
        name = "only"
        budgets = frozenset({"sparsity"})

    with pytest.raises(BadBudget, match="only does not meet a budget of pattern; give it one of sparsity"):
        check_budget(Only(), [], Budget(pattern="2:4"))
    with pytest.raises(BadBudget, match=r"flops 0\.5 is no sparsity and no pattern"):
        keep_best({"w": torch.zeros(2, 2)}, Budget(flops=0.5))


@given(st.integers(0, 10**7), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_counts_are_those_of_the_decimal_number(total, thousandths):
    assert removed_count(total, thousandths / 1000) == int(Fraction(thousandths, 1000) * total)


def test_counts_do_not_suffer_from_binary_fractions():
    assert int(100 * 0.29) == 28
    assert removed_count(100, 0.29) == 29


@given(
    st.integers(0, 2**32),
    st.integers(1, 6),
    st.integers(1, 30),
    st.floats(0, 0.999),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=60, deadline=None)
def test_the_largest_are_kept_exactly_and_ties_go_to_the_lower_position(seed, rows, columns, share, dtype):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (rows, columns), generator=generator).to(dtype)
    count = columns - removed_count(columns, share)
    keep = keep_largest(scores, count)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(keep, torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, order, True))


@pytest.mark.parametrize("compare", ["layer", "row", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.777, 0.99])
def test_a_sparsity_is_met_exactly_in_each_group_that_is_compared(compare, sparsity):
    scores = {"a": torch.randn(7, 30).abs(), "b": torch.randn(11, 13).abs()}
    keep = keep_share(scores, sparsity, compare)
    removed = {name: int((~mask).sum()) for name, mask in keep.items()}
    if compare == "row":
        assert all(((~mask).sum(1) == removed_count(mask.shape[1], sparsity)).all() for mask in keep.values())
    elif compare == "layer":
        assert removed == {name: removed_count(one.numel(), sparsity) for name, one in scores.items()}
    else:
        assert sum(removed.values()) == removed_count(7 * 30 + 11 * 13, sparsity)
        if 0 < sparsity < 0.9:
            least = min(scores[name][keep[name]].min() for name in scores)
            assert all((scores[name][~keep[name]] <= least).all() for name in scores)


# -- their inputs ----------------------------------------------------------------------------------------------------


def naive_statistics(model, weights, batches, name):
    """One forward of the whole model: what `name` receives, squared and summed over tokens, averaged over sequences."""
    (weight,) = [weight for weight in weights if weight.name == name]
    total, sequences = 0.0, 0

    def used(module, args, kwargs):
        nonlocal total, sequences
        x = args[0] if args else next(iter(kwargs.values()))
        total = total + inputs_of(module, x).double().square().sum(1)
        sequences += len(x) if x.ndim > 2 else 1

    hooks = [owner.register_forward_pre_hook(used, with_kwargs=True) for owner in weight.owners]
    with torch.no_grad():
        for batch in batches:
            calibration.run(model, batch)
    for hook in hooks:
        hook.remove()
    return total / sequences


@pytest.mark.parametrize("name", list(MODELS))
def test_statistics_equal_those_of_a_whole_forward_through_what_is_pruned_so_far(name):
    model, batch = made(name)
    model.train()
    batches = [batch, {key: value.flip(0)[:2] for key, value in batch.items()}]
    weights = prunable_weights(model)
    blocks = 0
    for block in calibrate(model, weights, PruneTask(Budget(sparsity=0.5), batches), squared_norms):
        assert not model.training
        for weight, squares in block:
            expected = naive_statistics(model, weights, batches, weight.name)
            torch.testing.assert_close(squares.double(), expected, rtol=1e-4, atol=1e-6)
        for weight, _ in block:
            weight.write(weight.matrix * 0.5)
        blocks += 1
    assert blocks > 0
    assert model.training


def test_a_decoder_that_sees_the_encoder_is_calibrated_on_the_pruned_encoder():
    torch.manual_seed(0)
    model = t5()
    task = PruneTask(
        Budget(sparsity=0.5),
        [TOKENS],
        loss=lambda model, batch: model(input_ids=batch["tokens"], labels=batch["tokens"]).loss,
    )
    weights = prunable_weights(model)
    assert not calibration._plan(model.eval(), weights, task).chained
    seen = []
    for block in calibrate(model, weights, task, squared_norms):
        seen += block
        for weight, _ in block:
            weight.write(weight.matrix * 0)
    cross = [squares for weight, squares in seen if "EncDecAttention.k" in weight.name]
    # With every encoder weight at zero, the decoder sees normalised embeddings alone.
    assert len(seen) == len(weights)
    assert torch.allclose(cross[0], cross[1])


@pytest.mark.parametrize("name", CHAINED)
def test_blocks_are_run_one_by_one_where_the_model_chains_them(name, monkeypatch):
    model, batch = made(name)
    weights = prunable_weights(model)
    task = PruneTask(Budget(sparsity=0.5), [batch, batch])
    runs = []
    real = calibration.run
    monkeypatch.setattr(calibration, "run", lambda *args: runs.append(1) or real(*args))
    blocks = list(calibrate(model, weights, task, squared_norms))
    assert len(blocks) > 1
    assert len(runs) == 1 + len(task.batches), "once to see the order, once for each batch"


def test_true_sequential_shows_later_layers_of_a_block_the_earlier_ones_pruned():
    model, batch = made("llama")
    weights = prunable_weights(model)
    task = PruneTask(Budget(sparsity=0.5), [batch])
    order = []
    for part in calibrate(model, weights, task, squared_norms, sequential=True):
        order.append([weight.name.split(".")[-2] for weight, _ in part])
        for weight, squares in part:
            expected = naive_statistics(model, weights, [batch], weight.name)
            torch.testing.assert_close(squares.double(), expected, rtol=1e-4, atol=1e-6)
        for weight, _ in part:
            weight.write(weight.matrix * 0.5)
    layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert order == layer * 2


def test_outer_products_are_those_of_all_tokens():
    model = nn.Sequential(nn.Linear(8, 4))
    batches = [{"x": torch.randn(3, 5, 8)}, {"x": torch.randn(2, 5, 8)}]
    ((block,),) = calibrate(
        model, prunable_weights(model), PruneTask(Budget(sparsity=0.5), batches), outer_products
    )
    x = torch.cat([batch["x"] for batch in batches]).reshape(-1, 8)
    torch.testing.assert_close(block[1][0], x.T @ x / 5)


def test_calibration_leaves_the_model_as_it_was_also_when_it_is_broken_off():
    model, batch = made("llama")
    model.train()
    model.model.layers[0].eval()
    next(iter(model.parameters())).requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    cache = model.config.use_cache
    blocks = calibrate(
        model, prunable_weights(model), PruneTask(Budget(sparsity=0.5), [batch]), squared_norms
    )
    next(blocks)
    blocks.close()
    assert model.training
    assert not model.model.layers[0].training
    assert model.config.use_cache == cache
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())


def test_an_empty_calibration_set_unused_weights_and_bad_inputs_are_refused():
    model, batch = made("sequential")
    weights = prunable_weights(model)
    with pytest.raises(BadData, match="The calibration set is empty"):
        list(calibrate(model, weights, PruneTask(Budget(sparsity=0.5)), squared_norms))
    model.extra = nn.Linear(8, 8)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    with pytest.raises(BadData, match=r"does not use extra\.weight"):
        list(
            calibrate(model, prunable_weights(model), PruneTask(Budget(sparsity=0.5), [batch]), squared_norms)
        )
    model, _ = made("sequential")
    bad = PruneTask(Budget(sparsity=0.5), [{"x": torch.full((2, 8), float("nan"))}])
    with pytest.raises(NumericalError, match=r"inputs of 0\.weight are not finite"):
        list(calibrate(model, prunable_weights(model), bad, squared_norms))


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_sizes_count_shared_tensors_once_and_pruned_ones_as_bits_and_kept_values():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 10)).half()
    model[0].weight, shared = nn.Parameter(torch.randn(8, 8).half()), model[2]
    model.append(shared)
    assert dense_bytes(model) == 2 * (64 + 80 + 10)
    keep = torch.zeros(8, 8, dtype=torch.bool)
    keep[0, :5] = True
    assert packed_bytes(model, {"0.weight": Mask(keep)}) == 2 * (5 + 80 + 10) + 64 // 8


def test_a_weight_is_what_its_docstring_says_it_is():
    (weight,) = prunable_weights(nn.Linear(3, 2))
    assert isinstance(weight, Weight)
    assert (weight.type, weight.groups, weight.inputs, weight.shape) == ("Linear", 1, 3, (2, 3))
