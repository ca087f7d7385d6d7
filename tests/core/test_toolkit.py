"""The shared building blocks beside naive versions of themselves: selection, patches, decoders, teachers."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskwright import Layout, Mask
from maskwright.toolkit.decoders import CrossTransformer, DecoderInput, initialize_linear, transformer
from maskwright.toolkit.images import (
    denormalize_patches,
    normalize_patches,
    patchify,
    sincos_positions,
    unpatchify,
)
from maskwright.toolkit.selection import keep_largest, kept_count, noise, random_mask
from maskwright.toolkit.teachers import follow, teacher_of

seeds = st.integers(0, 2**31)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- selection ---------------------------------------------------------------------------------------------------


def largest_by_hand(scores, counts):
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for row, count in enumerate(counts):
        order = sorted(range(scores.shape[1]), key=lambda place: (-scores[row, place].item(), place))
        keep[row, order[:count]] = True
    return keep


@given(
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(1, 25),
    seeds,
    st.sampled_from(["f4", "f8", "f2", "i8"]),
)
@settings(max_examples=80, deadline=None)
def test_the_largest_are_kept_and_ties_go_to_the_lower_position(rows, columns, values, seed, dtype):
    draw = np.random.default_rng(seed)
    # Few values make ties; many make none.
    scores = torch.from_numpy(draw.integers(0, values * values, (rows, columns)).astype(dtype))
    count = int(draw.integers(0, columns + 1))
    assert torch.equal(keep_largest(scores, count), largest_by_hand(scores, [count] * rows))
    counts = torch.from_numpy(draw.integers(0, columns + 1, rows))
    assert torch.equal(keep_largest(scores, counts), largest_by_hand(scores, counts.tolist()))


def test_selection_takes_scores_with_gradient_and_strides():
    scores = torch.randn(6, 4, generator=generator()).T.requires_grad_()
    expected = largest_by_hand(scores.detach(), [2] * 4)
    assert torch.equal(keep_largest(scores, 2), expected)
    assert torch.equal(keep_largest(scores.to(torch.bfloat16), 2).sum(1), torch.full((4,), 2))


def test_infinite_scores_are_ordered_too():
    scores = torch.tensor([[0.0, math.inf, -math.inf, 1.0], [-math.inf] * 4])
    assert keep_largest(scores, 2).tolist() == [[False, True, False, True], [True, True, False, False]]


@pytest.mark.parametrize(
    ("positions", "ratio", "kept"), [(196, 0.75, 49), (100, 0.9, 9), (64, 0.6, 25), (10, 0.0, 10)]
)
def test_counts_truncate_in_double_precision(positions, ratio, kept):
    assert kept_count(positions, ratio) == kept == int(positions * (1 - ratio))


@given(st.integers(1, 6), st.integers(1, 30), seeds)
@settings(max_examples=30, deadline=None)
def test_random_masks_keep_the_count_from_the_generator_alone(batch, positions, seed):
    layout = Layout(batch, (positions,))
    keep = seed % (positions + 1)
    mask = random_mask(layout, keep, generator(seed))
    assert mask.shape == (batch, positions)
    assert (mask.counts == keep).all()
    assert torch.equal(mask.keep, random_mask(layout, keep, generator(seed)).keep)


def test_random_masks_are_uniform():
    mask = random_mask(Layout(20_000, (3, 3)), 4, generator())
    often = mask.keep.double().mean(0)
    assert (often - 4 / 9).abs().max() < 6 * math.sqrt(20 / 81 / 20_000)
    together = (mask.flatten().keep.double().T @ mask.flatten().keep.double()) / 20_000
    off_diagonal = together[~torch.eye(9, dtype=torch.bool)]
    assert (off_diagonal - 4 / 9 * 3 / 8).abs().max() < 6 * math.sqrt(0.14 / 20_000)


def test_noise_is_uniform_in_double_precision():
    values = noise(Layout(100, (14, 14)), generator())
    assert values.shape == (100, 196)
    assert values.dtype == torch.float64
    assert 0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1
    assert len(values.unique()) == values.numel()


# -- images ------------------------------------------------------------------------------------------------------

pictures = st.tuples(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)
)


@given(pictures)
@settings(max_examples=30, deadline=None)
def test_patches_are_row_by_row_with_values_by_row_column_and_channel(sizes):
    batch, rows, columns, p, channels = sizes
    pixels = torch.arange(batch * channels * rows * p * columns * p).reshape(
        batch, channels, rows * p, columns * p
    )
    patches = patchify(pixels, p)
    assert patches.shape == (batch, rows * columns, p * p * channels)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in (batch, rows, columns, p, p, channels)]):
        b, row, column, y, x, c = index.tolist()
        value = patches[b, row * columns + column, (y * p + x) * channels + c]
        assert value == pixels[b, c, row * p + y, column * p + x]
    assert torch.equal(unpatchify(patches, (rows, columns), p), pixels)


def test_patches_are_normalised_with_the_unbiased_variance():
    patches = torch.randn(2, 3, 8, generator=generator()) * 5 + 2
    normal = normalize_patches(patches)
    for b in range(2):
        for n in range(3):
            one = patches[b, n].double().numpy()
            expected = (one - one.mean()) / np.sqrt(one.var(ddof=1) + 1e-6)
            assert np.allclose(normal[b, n].numpy(), expected, atol=1e-5)
    assert torch.isfinite(normalize_patches(torch.ones(1, 1, 4))).all()


def test_denormalised_patches_are_the_patches():
    patches = torch.randn(2, 5, 12, generator=generator(3)) * 4 + 7
    assert torch.allclose(denormalize_patches(normalize_patches(patches), patches), patches, atol=1e-5)
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    prediction = torch.randn(2, 5, 12, generator=generator(4))
    expected = prediction * (variance + 1e-6).sqrt() + mean
    assert torch.allclose(denormalize_patches(prediction, patches), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "grid"), [(16, (2, 3)), (64, (8, 8)), (30, (4, 4)), (4, (1, 5)), (3, (2, 2))]
)
def test_positions_are_sines_and_cosines_of_column_then_row(width, grid):
    table = sincos_positions(width, grid)
    assert table.shape == (1, grid[0] * grid[1], width)
    quarter = width // 4
    for row in range(grid[0]):
        for column in range(grid[1]):
            expected = [
                function(place / 10000 ** (index / quarter))
                for place in (column, row)
                for function in (math.sin, math.cos)
                for index in range(quarter)
            ]
            found = table[0, row * grid[1] + column].tolist()
            assert found == pytest.approx(expected + [0.0] * (width - 4 * quarter), abs=1e-5)


# -- decoders ----------------------------------------------------------------------------------------------------


def exact_mask(batch=3, grid=(3, 4), kept=5, seed=0):
    return random_mask(Layout(batch, grid), kept, generator(seed))


def test_the_decoder_sees_its_prefix_visible_tokens_and_mask_tokens_in_raster_order():
    torch.manual_seed(0)
    module, mask = DecoderInput(6, 8, (3, 4)), exact_mask()
    encoded = torch.randn(3, 2 + 5, 6, generator=generator())
    out = module(encoded, mask, prefix=2)
    assert out.shape == (3, 2 + 12, 8)
    for row in range(3):
        tokens = module.embed(encoded[row])
        assert torch.allclose(out[row, :2], tokens[:2], atol=1e-6), "a prefix has no position"
        visible = iter(tokens[2:])
        for place in range(12):
            token = next(visible) if mask.flatten().keep[row, place] else module.mask_token[0, 0]
            assert torch.allclose(out[row, 2 + place], token + module.positions[0, place], atol=1e-6)


def test_positions_are_fixed_and_not_saved():
    module = DecoderInput(6, 8, (3, 4))
    assert {name for name, _ in module.named_parameters()} == {"embed.weight", "embed.bias", "mask_token"}
    assert set(module.state_dict()) == {"embed.weight", "embed.bias", "mask_token"}
    assert torch.equal(module.positions, sincos_positions(8, (3, 4)))


def test_gradients_reach_mask_token_and_every_visible_token():
    module, mask = DecoderInput(6, 8, (3, 4)), exact_mask()
    encoded = torch.randn(3, 7, 6, requires_grad=True)
    module(encoded, mask, prefix=2).square().sum().backward()
    assert (encoded.grad.abs().sum(-1) > 0).all()
    assert module.mask_token.grad.abs().sum() > 0


def test_without_hidden_patches_there_is_no_mask_token():
    module = DecoderInput(6, 8, (2, 2))
    everything = Mask(torch.ones(1, 2, 2, dtype=torch.bool))
    module(torch.randn(1, 5, 6), everything, prefix=1).sum().backward()
    assert module.mask_token.grad.abs().sum() == 0


def test_the_transformer_is_the_pre_norm_one_of_the_papers():
    torch.manual_seed(0)
    model = transformer(12, 3, 2, mlp_ratio=2.0)
    x = torch.randn(2, 5, 12, generator=generator())
    hidden = x
    for block in model.layers:
        assert block.norm1.eps == block.norm2.eps == 1e-6
        normal = block.norm1(hidden)
        attention, _ = block.self_attn(normal, normal, normal, need_weights=False)
        hidden = hidden + attention
        hidden = hidden + block.linear2(nn.functional.gelu(block.linear1(block.norm2(hidden))))
        assert block.linear1.out_features == 24
    expected = nn.functional.layer_norm(hidden, (12,), model.norm.weight, model.norm.bias, 1e-6)
    assert torch.allclose(model.train()(x), expected, atol=1e-5), "and it has no dropout"
    assert torch.allclose(model.eval()(x), expected, atol=1e-5)


def attended(attention, queries, memory):
    """[T, D], [M, D] → [T, D]: scaled dot products, head by head."""
    to_q, to_k, to_v = attention.in_proj_weight.chunk(3)
    b_q, b_k, b_v = attention.in_proj_bias.chunk(3)
    q, k, v = queries @ to_q.T + b_q, memory @ to_k.T + b_k, memory @ to_v.T + b_v
    size = q.shape[1] // attention.num_heads
    heads = [slice(head * size, (head + 1) * size) for head in range(attention.num_heads)]
    seen = [(q[:, h] @ k[:, h].T / size**0.5).softmax(-1) @ v[:, h] for h in heads]
    return attention.out_proj(torch.cat(seen, 1))


@pytest.mark.parametrize("norm_memory", [True, False])
def test_the_cross_transformer_is_the_pre_norm_one_with_a_norm_for_its_memory(norm_memory):
    torch.manual_seed(0)
    model = CrossTransformer(12, 2, 3, mlp_ratio=2.0, norm_memory=norm_memory)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, memory = torch.randn(2, 5, 12, generator=generator()), torch.randn(2, 7, 12, generator=generator(1))
    untouched = memory.clone()
    expected = []
    for own, other in zip(x, memory):
        for block in model.blocks:
            layer, looked_at = block.layer, block.norm_memory(other)
            own = own + attended(layer.self_attn, layer.norm1(own), layer.norm1(own))
            own = own + attended(layer.multihead_attn, layer.norm2(own), looked_at)
            own = own + layer.linear2(nn.functional.gelu(layer.linear1(layer.norm3(own))))
        expected.append(model.norm(own))
    assert torch.allclose(model.train()(x, memory), torch.stack(expected), atol=1e-5)
    assert torch.allclose(model.eval()(x, memory), torch.stack(expected), atol=1e-5)
    assert torch.equal(memory, untouched)
    norms = {id(block.norm_memory) for block in model.blocks}
    assert len(norms) == 2
    assert all(isinstance(block.norm_memory, nn.LayerNorm) == norm_memory for block in model.blocks)


def test_cross_attention_begins_with_three_matrices_and_self_attention_with_one():
    torch.manual_seed(0)
    model = CrossTransformer(64, 1, 4).apply(initialize_linear)
    layer = model.blocks[0].layer
    # Xavier's bound, sqrt(6 / (inputs + outputs)), which the largest of 12,288 uniform numbers comes close to.
    for attention, outputs in ((layer.self_attn, 3 * 64), (layer.multihead_attn, 64)):
        bound = (6 / (64 + outputs)) ** 0.5
        for weight in attention.in_proj_weight.chunk(3):
            assert 0.98 * bound < float(weight.detach().abs().max()) <= bound
        assert not attention.in_proj_bias.any()
        assert not attention.out_proj.bias.any()


# -- teachers ----------------------------------------------------------------------------------------------------


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.norm(self.linear(x)))


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = Student()
        self.teacher = teacher_of(self.student)


def test_a_teacher_starts_as_a_copy_and_takes_no_gradient():
    student = Student()
    teacher = teacher_of(student)
    assert all(
        torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), student.state_dict().values())
    )
    assert all(mine is not its for mine, its in zip(teacher.parameters(), student.parameters()))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not teacher(torch.ones(2, 2)).requires_grad


def test_a_teacher_stays_in_evaluation_mode_inside_what_is_trained():
    both = Both().train()
    assert both.student.training
    assert both.student.dropout.training
    assert not any(module.training for module in both.teacher.modules())
    assert both.teacher.train() is both.teacher
    for twin in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        twin.train()
        assert not any(module.training for module in twin.teacher.modules())
        assert twin.teacher.train() is twin.teacher
        assert twin.teacher is not both.teacher


@given(st.floats(0, 1), seeds)
@settings(max_examples=20, deadline=None)
def test_a_teacher_follows_by_the_moving_average(decay, seed):
    torch.manual_seed(0)
    student = Student()
    teacher = teacher_of(student)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for value in student.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator(seed)) * 3)
    follow(teacher, student, decay)
    names = {name for name, _ in student.named_parameters()}
    for name, its in student.state_dict().items():
        expected = decay * before[name] + (1 - decay) * its if name in names else its
        assert torch.allclose(teacher.state_dict()[name], expected, atol=1e-5), name
    assert all(parameter.grad_fn is None for parameter in teacher.parameters())
