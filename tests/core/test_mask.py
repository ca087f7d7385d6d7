"""`Mask`, `Layout` and the masks file: the algebra's laws, the converters against what they convert for, the format."""

import json
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import maskwright
from maskwright import Layout, Mask, StagedMask, load_masks, save_masks
from maskwright.errors import BadData, MaskShapeError, UnequalMaskCounts
from maskwright.mask import write_whole

shapes = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)
seeds = st.integers(0, 2**32 - 1)


def random_keep(shape, seed, share=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def exact_mask(rows, positions, kept, seed):
    noise = torch.rand(rows, positions, generator=torch.Generator().manual_seed(seed))
    return Mask(noise.argsort(1).argsort(1) < kept)


# -- algebra ---------------------------------------------------------------------------------------------------


@given(shapes, seeds, seeds)
@settings(max_examples=40, deadline=None)
def test_algebra_is_boolean(shape, one, two):
    a, b = Mask(random_keep(shape, one)), Mask(random_keep(shape, two))
    assert torch.equal((~~a).keep, a.keep)
    assert torch.equal((~(a & b)).keep, (~a | ~b).keep)
    assert torch.equal((~(a | b)).keep, (~a & ~b).keep)
    assert torch.equal((a & (a | b)).keep, a.keep)
    assert not (a & ~a).keep.any()
    assert (a | ~a).keep.all()


@given(shapes, seeds)
@settings(max_examples=40, deadline=None)
def test_counts_and_ratios_agree_with_the_positions(shape, seed):
    mask = Mask(random_keep(shape, seed))
    positions = math.prod(shape[1:])
    assert mask.counts.tolist() == [int(row.sum()) for row in mask.keep]
    assert mask.counts.dtype == torch.int64
    assert torch.allclose(mask.removed_ratio, 1 - mask.counts / positions)
    assert torch.equal(mask.counts + (~mask).counts, torch.full((shape[0],), positions))
    assert torch.equal(mask.flatten().keep, mask.keep.reshape(shape[0], -1))


def test_masks_of_different_shapes_do_not_combine():
    with pytest.raises(MaskShapeError, match=r"\[1, 2\] and \[1, 3\] differ"):
        Mask(torch.ones(1, 2, dtype=torch.bool)) & Mask(torch.ones(1, 3, dtype=torch.bool))


def test_a_mask_does_not_combine_with_a_tensor():
    keep = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(MaskShapeError, match="must be a Mask"):
        Mask(keep) | keep


@pytest.mark.parametrize("wrong", [torch.ones(2, 2), [[True]], torch.ones(2, dtype=torch.uint8)])
def test_keep_must_be_a_bool_tensor(wrong):
    with pytest.raises(MaskShapeError, match="bool tensor, True = visible"):
        Mask(wrong)


def test_a_single_value_is_no_mask():
    with pytest.raises(MaskShapeError, match="at least one dimension"):
        Mask(torch.tensor(True))


def test_rows_takes_some_samples():
    keep = random_keep((4, 3, 3), 0)
    assert torch.equal(Mask(keep).rows(slice(1, 3)).keep, keep[1:3])


def test_to_moves_the_mask():
    moved = Mask(torch.ones(1, 2, dtype=torch.bool)).to("meta")
    assert moved.device.type == "meta"
    assert moved.shape == (1, 2)


# -- upsampling and indices ------------------------------------------------------------------------------------


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3),
    seeds,
)
@settings(max_examples=40, deadline=None)
def test_upsample_repeats_every_cell(batch, sides, seed):
    grid, factors = [side for side, _ in sides], [factor for _, factor in sides]
    mask = Mask(random_keep((batch, *grid), seed))
    larger = mask.upsample(tuple(side * factor for side, factor in sides))
    for index in torch.cartesian_prod(*[torch.arange(size) for size in larger.shape]).reshape(
        -1, len(sides) + 1
    ):
        sample, *cell = index.tolist()
        source = (sample, *(at // factor for at, factor in zip(cell, factors)))
        assert larger.keep[tuple(index.tolist())] == mask.keep[source]


@pytest.mark.parametrize("size", [(5, 4), (4,), (4, 4, 4), (2, 2)])
def test_upsample_refuses_sides_that_are_no_multiples(size):
    with pytest.raises(MaskShapeError, match="multiples"):
        Mask(torch.ones(1, 4, 4, dtype=torch.bool)).upsample(size)


def test_a_staged_mask_hides_more_at_each_stage_and_shows_what_survives_them_all():
    mask = StagedMask(torch.tensor([[[3, 0], [1, 2]], [[0, 3], [2, 1]]]), stages=3)
    assert isinstance(mask, Mask)
    assert mask.shape == (2, 2, 2)
    assert [mask.stage(stage).keep[0].tolist() for stage in range(3)] == [
        [[True, False], [True, True]],
        [[True, False], [False, True]],
        [[True, False], [False, False]],
    ]
    assert torch.equal(mask.keep, mask.stage(2).keep)
    assert mask.visible_indices().tolist() == [[0], [1]]


def test_a_staged_mask_keeps_its_stages_when_it_is_cut_moved_and_flattened():
    mask = StagedMask(torch.tensor([[[3, 0], [1, 2]], [[0, 3], [2, 1]]]), stages=3)
    for same in (mask.flatten(), mask.rows(slice(1, 2)).flatten(), mask.to("cpu").flatten()):
        assert (type(same), same.stages) == (StagedMask, 3)
    assert mask.rows(slice(1, 2)).flatten().survived.tolist() == [[0, 3, 2, 1]]
    assert type(~mask) is Mask
    assert type(mask & mask) is Mask


@pytest.mark.parametrize(
    ("survived", "stages"), [(torch.zeros(1, 2), 1), (torch.zeros(1, 2, dtype=torch.bool), 1)]
)
def test_stages_are_counted_in_whole_numbers(survived, stages):
    with pytest.raises(MaskShapeError, match="whole numbers"):
        StagedMask(survived, stages)
    with pytest.raises(MaskShapeError, match="at least 1 stage"):
        StagedMask(torch.ones(1, 2, dtype=torch.int64), 0)


@given(st.integers(1, 4), st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_scatter_is_the_inverse_of_gather_on_the_visible(rows, positions, data):
    kept = data.draw(st.integers(0, positions))
    mask = exact_mask(rows, positions, kept, data.draw(seeds))
    x = torch.randn(rows, positions, 3, generator=torch.Generator().manual_seed(1))
    visible = mask.gather_visible(x)
    assert visible.shape == (rows, kept, 3)
    full = mask.scatter_visible(visible, -7.0)
    assert torch.equal(full, torch.where(mask.keep[..., None], x, torch.tensor(-7.0)))
    assert torch.equal(mask.gather_visible(full), visible)
    hidden = mask.gather_hidden(x)
    naive = torch.stack([x[row][~mask.keep[row]] for row in range(rows)])
    assert torch.equal(hidden, naive)


@given(st.integers(1, 4), st.integers(1, 12), st.data())
@settings(max_examples=40, deadline=None)
def test_visible_and_hidden_indices_are_ascending_and_share_out_the_positions(rows, positions, data):
    mask = exact_mask(rows, positions, data.draw(st.integers(0, positions)), data.draw(seeds))
    visible, hidden = mask.visible_indices(), mask.hidden_indices()
    assert visible.dtype == hidden.dtype == torch.int64
    for row in range(rows):
        assert visible[row].tolist() == [i for i in range(positions) if mask.keep[row, i]]
        assert sorted(visible[row].tolist() + hidden[row].tolist()) == list(range(positions))


def test_a_mask_token_fills_the_hidden_and_takes_gradient():
    mask = Mask(torch.tensor([[True, False, True, False]]))
    token = torch.zeros(1, 1, 2, requires_grad=True)
    visible = torch.ones(1, 2, 2, requires_grad=True)
    mask.scatter_visible(visible, token).sum().backward()
    assert token.grad.flatten().tolist() == [2.0, 2.0]
    assert visible.grad.flatten().tolist() == [1.0] * 4


def test_gathering_works_on_grids_and_on_plain_numbers():
    mask = Mask(torch.tensor([[[True, False], [False, True]]]))
    assert mask.gather_visible(torch.tensor([[1, 2, 3, 4]])).tolist() == [[1, 4]]
    assert mask.scatter_visible(torch.tensor([[1, 4]]), 0).tolist() == [[1, 0, 0, 4]]


def test_unequal_counts_have_no_indices():
    mask = Mask(torch.tensor([[True, False, False], [True, True, False]]))
    for ask in (mask.visible_indices, mask.hidden_indices, lambda: mask.gather_visible(torch.zeros(2, 3, 1))):
        with pytest.raises(UnequalMaskCounts, match="between 1 and 2"):
            ask()


def test_tensors_that_do_not_fit_are_refused():
    mask = Mask(torch.tensor([[True, False, True]]))
    with pytest.raises(MaskShapeError, match=r"\[1, 3\] positions.*\[1, 4, 2\]"):
        mask.gather_visible(torch.zeros(1, 4, 2))
    with pytest.raises(MaskShapeError, match="scatter_visible expects"):
        mask.scatter_visible(torch.zeros(1, 3, 2), 0.0)


# -- the other libraries' polarity -----------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 6), seeds)
@settings(max_examples=30, deadline=None)
def test_every_converter_has_an_inverse(rows, positions, seed):
    mask = Mask(random_keep((rows, positions), seed))
    for there, back in [
        (mask.as_removed(), Mask.from_removed),
        (mask.as_removed(torch.float32), Mask.from_removed),
        (mask.as_removed(torch.int64), Mask.from_removed),
        (mask.as_sdpa(), Mask.from_sdpa),
        (mask.as_additive(), Mask.from_additive),
        (mask.as_additive(torch.bfloat16), Mask.from_additive),
        (mask.as_additive(torch.float16), Mask.from_additive),
        (mask.as_key_padding(), Mask.from_key_padding),
        (mask.as_hf_attention(), Mask.from_hf_attention),
    ]:
        assert torch.equal(back(there).keep, mask.keep)


def test_infinite_bias_is_a_mask_and_a_position_bias_is_none():
    assert Mask.from_additive(torch.tensor([[0.0, -math.inf]])).keep.tolist() == [[True, False]]
    for bias in ([0.0, -1.0], [0.0, math.inf], [0.0, math.nan]):
        with pytest.raises(MaskShapeError, match="position bias"):
            Mask.from_additive(torch.tensor([bias]))


def test_converters_refuse_numbers_other_than_0_and_1():
    for convert in (Mask.from_removed, Mask.from_sdpa, Mask.from_key_padding, Mask.from_hf_attention):
        with pytest.raises(MaskShapeError, match="0 and 1 only"):
            convert(torch.tensor([[0, 2]]))


def attended_by_hand(q, k, v, keep):
    """Attention over the kept keys alone, query by query."""
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in q.shape[:-1]]).tolist():
        b, h, i = index
        seen = keep.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])[b, h, i]
        weights = torch.softmax(k[b, h][seen] @ q[b, h, i] / math.sqrt(q.shape[-1]), 0)
        out[b, h, i] = weights @ v[b, h][seen]
    return out


@given(seeds)
@settings(max_examples=8, deadline=None)
def test_scaled_dot_product_attention_attends_to_what_is_kept(seed):
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, 5, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    keep = random_keep((2, 2, 5, 5), seed) | torch.eye(5, dtype=torch.bool)
    mask = Mask(keep)
    expected = attended_by_hand(q, k, v, keep)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert torch.allclose(attend(q, k, v, attn_mask=mask.as_sdpa()), expected)
    assert torch.allclose(attend(q, k, v, attn_mask=mask.as_additive(torch.float64)), expected)


def test_multihead_attention_ignores_what_is_not_kept():
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 6, 8)
    keys = Mask(torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 1]]).bool())
    padded, weights = layer(x, x, x, key_padding_mask=keys.as_key_padding())
    for row in range(2):
        seen = x[row : row + 1, keys.keep[row]]
        alone, _ = layer(x[row : row + 1], seen, seen)
        assert torch.allclose(padded[row], alone[0], atol=1e-6)
    assert (weights[~keys.keep[:, None].expand_as(weights)] == 0).all()

    pairs = Mask(random_keep((6, 6), 3) | torch.eye(6, dtype=torch.bool))
    _, weights = layer(x, x, x, attn_mask=pairs.as_removed())
    assert torch.equal(weights > 0, pairs.keep.expand(2, -1, -1))
    added, _ = layer(x, x, x, attn_mask=pairs.as_additive())
    bools, _ = layer(x, x, x, attn_mask=pairs.as_removed())
    assert torch.allclose(added, bools, atol=1e-6)


def test_a_bert_model_does_not_look_at_hidden_tokens():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    model = transformers.BertModel(config).eval()
    keep = Mask(torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool())
    tokens = torch.randint(0, 20, (2, 5))
    changed = torch.where(keep.keep, tokens, (tokens + 7) % 20)
    with torch.no_grad():
        one = model(tokens, attention_mask=keep.as_hf_attention()).last_hidden_state
        two = model(changed, attention_mask=keep.as_hf_attention()).last_hidden_state
        short = model(tokens[:1, :3]).last_hidden_state
        other = model(tokens, attention_mask=(~keep).as_hf_attention()).last_hidden_state
    assert torch.allclose(one[keep.keep], two[keep.keep], atol=1e-6)
    assert torch.allclose(one[0, :3], short[0], atol=1e-5)
    assert not torch.allclose(one[0, :3], other[0, :3], atol=1e-3)


def test_a_llama_model_takes_the_additive_form_as_its_four_dimensional_mask():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    model = transformers.LlamaModel(config).eval()
    tokens = torch.randint(0, 20, (1, 6))
    causal = maskwright.AttentionMask.causal(6)
    packed = causal & maskwright.AttentionMask.segments(torch.tensor([[0, 0, 0, 1, 1, 1]]))
    with torch.no_grad():
        own = model(tokens).last_hidden_state
        ours = model(tokens, attention_mask=causal.as_additive()).last_hidden_state
        both = model(
            tokens,
            attention_mask=packed.as_additive(),
            position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]),
        ).last_hidden_state
        second = model(tokens[:, 3:]).last_hidden_state
    assert torch.allclose(own, ours, atol=1e-5)
    assert torch.allclose(both[:, 3:], second, atol=1e-5)
    assert torch.allclose(both[:, :3], own[:, :3], atol=1e-5)


# -- layouts ---------------------------------------------------------------------------------------------------


def test_a_layout_knows_its_shape():
    layout = Layout(2, [4, 7], patch_size=8)
    assert (layout.grid, layout.positions, layout.shape) == ((4, 7), 28, (2, 4, 7))
    assert Layout(2, 5).grid == (5,)
    assert Layout(1, 5, "meta").device.type == "meta"


@pytest.mark.parametrize(("batch", "grid"), [(0, (2, 2)), (1, ()), (1, (2, 0)), (-1, 4)])
def test_an_empty_layout_is_refused(batch, grid):
    with pytest.raises(MaskShapeError, match="positive batch and grid"):
        Layout(batch, grid)


def test_the_layout_of_a_batch_is_the_backbone_s_grid_or_the_tokens():
    class Backbone:
        grid = (4, 2)
        patch_size = 16

    layout = Layout.of(Backbone(), {"pixels": torch.zeros(3, 1, 64, 32)})
    assert (layout.shape, layout.patch_size) == ((3, 4, 2), 16)
    assert Layout.of(object(), {"tokens": torch.zeros(3, 9, dtype=torch.int64)}).shape == (3, 9)
    with pytest.raises(MaskShapeError, match="object has neither"):
        Layout.of(object(), {"pixels": torch.zeros(3, 1, 64, 32)})


# -- files -----------------------------------------------------------------------------------------------------

any_rank = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)


@given(st.dictionaries(st.text(min_size=1, max_size=12), st.tuples(any_rank, seeds), max_size=4))
@settings(max_examples=30, deadline=None)
def test_masks_of_every_rank_come_back_from_their_file(tmp_path_factory, drawn):
    drawn.pop("__metadata__", None)
    masks = {name: Mask(random_keep(shape, seed)) for name, (shape, seed) in drawn.items()}
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    save_masks(path, masks)
    loaded = load_masks(path)
    assert loaded.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(loaded[name].keep, mask.keep)


def test_a_mask_costs_one_bit_an_element(tmp_path):
    path = tmp_path / "masks.safetensors"
    save_masks(path, {"weight": Mask(random_keep((512, 1001), 0))})
    bits = 512 * 1001
    assert bits / 8 <= path.stat().st_size < bits / 8 + 1024


def test_a_zero_sized_mask_and_a_strided_mask_are_saved_as_they_are(tmp_path):
    keep = random_keep((6, 4), 1)
    save_masks(tmp_path / "m", {"empty": Mask(torch.zeros(0, 3, dtype=torch.bool)), "t": Mask(keep.T)})
    loaded = load_masks(tmp_path / "m")
    assert loaded["empty"].shape == (0, 3)
    assert torch.equal(loaded["t"].keep, keep.T)


def test_an_attention_rule_is_saved_as_the_mask_that_it_means(tmp_path):
    save_masks(tmp_path / "m", {"causal": maskwright.AttentionMask.causal(5)})
    assert torch.equal(load_masks(tmp_path / "m")["causal"].keep, torch.ones(1, 1, 5, 5).tril().bool())


def test_other_files_are_refused(tmp_path):
    with pytest.raises(BadData, match="does not exist"):
        load_masks(tmp_path / "none")
    save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(BadData, match="no maskwright masks"):
        load_masks(tmp_path / "weights.safetensors")
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(BadData, match="cannot be read"):
        load_masks(tmp_path / "text")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_gives_one_clear_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "masks.safetensors"
    save_masks(path, {"weight": Mask(random_keep((8, 16), 0)), "bias": Mask(random_keep((8,), 1))})
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:cut])
    with pytest.raises(BadData):
        load_masks(path)


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": "maskwright-masks-1"},
        {"format": "maskwright-masks-1", "shapes": "{"},
        {"format": "maskwright-masks-1", "shapes": "[1]"},
        {"format": "maskwright-masks-1", "shapes": json.dumps({"gone": [2]})},
        {"format": "maskwright-masks-1", "shapes": json.dumps({"x": [100]})},
        {"format": "maskwright-masks-1", "shapes": json.dumps({"x": ["a"]})},
        {"format": "maskwright-masks-1", "shapes": json.dumps({"x": [-2]})},
        {"format": "maskwright-masks-1", "shapes": json.dumps({"x": []})},
    ],
)
def test_metadata_that_do_not_fit_the_bits_are_damage(tmp_path, metadata):
    save_file({"x": torch.zeros(2, dtype=torch.uint8)}, tmp_path / "m", metadata=metadata)
    with pytest.raises(BadData, match=r"damaged|cannot be read"):
        load_masks(tmp_path / "m")


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "masks.safetensors"
    mask = Mask(random_keep((8, 16), 0))
    save_masks(path, {"weight": mask})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_masks(path, {"weight": ~mask})
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["masks.safetensors"]
    assert torch.equal(load_masks(path)["weight"].keep, mask.keep)


def test_an_interrupt_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_written_file_can_be_read_by_others(tmp_path):
    write_whole(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
