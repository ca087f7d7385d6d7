"""Attention rules: their algebra and blocks against brute force, and what reaches sdpa, flex_attention and transformers."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from maskwright import AttentionMask, Mask, adapt
from maskwright.errors import BackboneMismatch, MaskShapeError, MaskTooLarge
from maskwright.toolkit.attention import BLOCK, Slabs, attend

seeds = st.integers(0, 2**31)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def by_hand(rule, batch, heads, q_len, kv_len):
    """The dense mask, pair by pair."""
    return torch.tensor(
        [
            [[[bool(rule(b, h, q, k)) for k in range(kv_len)] for q in range(q_len)] for h in range(heads)]
            for b in range(batch)
        ]
    )


# -- what the constructors mean ----------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(0, 4))
@settings(max_examples=25, deadline=None)
def test_causal_queries_are_the_last_positions(q_len, cached):
    mask = AttentionMask.causal(q_len, q_len + cached)
    expected = by_hand(lambda b, h, q, k: k <= q + cached, 1, 1, q_len, q_len + cached)
    assert torch.equal(mask.keep, expected)
    assert mask.shape == expected.shape == (1, 1, q_len, q_len + cached)


@given(st.integers(1, 9), st.integers(0, 10), st.integers(0, 10))
@settings(max_examples=25, deadline=None)
def test_a_window_reaches_left_and_right(length, left, right):
    expected = by_hand(lambda b, h, q, k: q - left <= k <= q + right, 1, 1, length, length)
    assert torch.equal(AttentionMask.window(length, left, right).keep, expected)


@given(st.integers(1, 3), st.integers(1, 9), seeds)
@settings(max_examples=25, deadline=None)
def test_segments_see_themselves_only(batch, length, seed):
    ids = torch.randint(0, 3, (batch, length), generator=generator(seed))
    for given_ids in (ids, ids.sort(1).values):
        mask = AttentionMask.segments(given_ids)
        expected = by_hand(lambda b, h, q, k: given_ids[b, q] == given_ids[b, k], batch, 1, length, length)  # noqa: B023
        assert torch.equal(mask.keep, expected)


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), seeds)
@settings(max_examples=25, deadline=None)
def test_keys_are_seen_where_they_are_visible(batch, length, queries, seed):
    visible = torch.rand(batch, length, generator=generator(seed)) < 0.5
    mask = AttentionMask.keys(Mask(visible), queries)
    assert torch.equal(mask.keep, by_hand(lambda b, h, q, k: visible[b, k], batch, 1, queries, length))
    assert AttentionMask.keys(Mask(visible)).shape == (batch, 1, length, length)


def test_full_is_everything():
    assert AttentionMask.full(3, 5).keep.all()
    assert AttentionMask.full(3, 5).shape == (1, 1, 3, 5)


def test_segment_ids_have_a_batch():
    with pytest.raises(MaskShapeError, match=r"segment_ids must be \[B, L\], got \[4\]"):
        AttentionMask.segments(torch.zeros(4))


@pytest.mark.parametrize("sizes", [{"q_len": 0}, {"q_len": 2, "kv_len": 0}, {"q_len": 2, "batch": 0}])
def test_empty_rules_are_refused(sizes):
    with pytest.raises(MaskShapeError, match="positive sizes"):
        AttentionMask(lambda b, h, q, k: q >= k, **sizes)


# -- algebra and blocks ------------------------------------------------------------------------------------------


def some_rule(draw, batch, heads, length, free=True):
    """A rule of any kind over length × length, with its meaning on plain numbers."""
    seed = draw(seeds)
    kind = draw(st.sampled_from(["causal", "window", "segments", "keys", "full"] + ["free"] * free))
    if kind == "causal":
        return AttentionMask.causal(length)
    if kind == "window":
        return AttentionMask.window(length, draw(st.integers(0, length)), draw(st.integers(0, length)))
    if kind == "segments":
        ids = torch.randint(0, 4, (batch, length), generator=generator(seed))
        return AttentionMask.segments(ids.sort(1).values if draw(st.booleans()) else ids)
    if kind == "keys":
        return AttentionMask.keys(Mask(torch.rand(batch, length, generator=generator(seed)) < 0.7))
    if kind == "full":
        return AttentionMask.full(length)
    table = torch.rand(batch, heads, length, length, generator=generator(seed)) < 0.6
    return AttentionMask(lambda b, h, q, k: table[b, h, q, k], length, batch=batch, heads=heads)


@st.composite
def composed(draw):
    """A rule made of up to four, with ~, & and |, and the dense mask that it must have."""
    batch, heads, length = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 40))
    rule = some_rule(draw, batch, heads, length)
    dense = rule.keep
    for _ in range(draw(st.integers(0, 3))):
        operator = draw(st.sampled_from("&|~"))
        if operator == "~":
            rule, dense = ~rule, ~dense
            continue
        other = some_rule(draw, batch, heads, length)
        # From the right as well: the two sides need not have the same batch and heads.
        left, right = (rule, other) if draw(st.booleans()) else (other, rule)
        rule = left & right if operator == "&" else left | right
        dense = dense & other.keep if operator == "&" else dense | other.keep
    return rule, dense


@given(composed())
@settings(max_examples=60, deadline=None)
def test_rules_compose_as_their_dense_masks_do(example):
    rule, dense = example
    assert torch.equal(rule.keep, dense.expand(rule.shape))
    assert (rule & rule).shape == rule.shape


@given(composed(), st.integers(1, 17))
@settings(max_examples=60, deadline=None)
def test_blocks_hold_what_the_dense_mask_holds(example, block_size):
    rule, dense = example
    some, every = rule.blocks(block_size)
    length = rule.q_len
    blocks = -(-length // block_size)
    assert some.shape == every.shape == (rule.batch, rule.heads, blocks, blocks)
    padded = torch.nn.functional.pad(dense.expand(rule.shape), (0, blocks * block_size - length) * 2)
    tiles = padded.unflatten(3, (blocks, block_size)).unflatten(2, (blocks, block_size))
    attended, whole = tiles.any(5).any(3), tiles.all(5).all(3)
    assert (some | ~attended).all(), "an attended block would be skipped"
    assert (whole | ~every).all(), "a block would be taken for full"
    assert (some | ~every).all()
    if rule.bounds is None:
        assert torch.equal(some, attended)
        assert torch.equal(every, whole)


@pytest.mark.parametrize(
    "rule",
    [
        AttentionMask.causal(50),
        AttentionMask.causal(20, 50),
        AttentionMask.window(50, 9),
        AttentionMask.window(50, 9, 4),
        AttentionMask.segments(torch.arange(50)[None] // 13),
        AttentionMask.keys(Mask(torch.arange(50)[None] % 16 < 12)),
        AttentionMask.full(50, 33),
        ~AttentionMask.causal(50),
    ],
    ids=["causal", "cached", "window", "both sides", "segments", "keys", "full", "not causal"],
)
def test_bounds_of_single_rules_are_exact(rule):
    """Blocks of the constructors are neither looked at nor visited in vain."""
    assert rule.bounds is not None
    without = AttentionMask(rule.rule, rule.q_len, rule.kv_len, batch=rule.batch)
    for block_size in (1, 4, 7, 64):
        assert all(torch.equal(a, b) for a, b in zip(rule.blocks(block_size), without.blocks(block_size)))


@given(composed(), st.sampled_from([4, 8, 16]))
@settings(max_examples=25, deadline=None)
def test_a_block_mask_lists_each_block_once_in_both_directions(example, block_size):
    rule, _ = example
    mask = rule.block_mask(block_size)
    some, every = rule.blocks(block_size)
    assert mask.seq_lengths == (rule.q_len, rule.kv_len)
    assert (block_size, block_size) == mask.BLOCK_SIZE
    assert mask.shape == (rule.batch, rule.heads, rule.q_len, rule.kv_len)
    for counts, indices, blocks in (
        (mask.kv_num_blocks, mask.kv_indices, some & ~every),
        (mask.full_kv_num_blocks, mask.full_kv_indices, every),
        (mask.q_num_blocks, mask.q_indices, (some & ~every).mT),
        (mask.full_q_num_blocks, mask.full_q_indices, every.mT),
    ):
        assert counts.dtype == indices.dtype == torch.int32
        for place in torch.cartesian_prod(*[torch.arange(size) for size in counts.shape]).tolist():
            row, count = indices[tuple(place)], counts[tuple(place)]
            assert row[:count].tolist() == blocks[tuple(place)].nonzero().flatten().tolist()
            assert sorted(row.tolist()) == list(range(blocks.shape[-1]))


def test_a_block_mask_is_the_one_that_torch_makes():
    from torch.nn.attention.flex_attention import create_block_mask

    rule = AttentionMask.causal(256) & AttentionMask.window(256, 70)
    theirs = create_block_mask(rule.rule, None, None, 256, 256, device="cpu", BLOCK_SIZE=32)
    ours = rule.block_mask(32)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_rules_of_other_sizes_do_not_combine():
    for other in (AttentionMask.causal(5), AttentionMask.causal(4, 5)):
        with pytest.raises(MaskShapeError, match="sizes differ"):
            AttentionMask.causal(4) & other
    two, three = (AttentionMask.segments(torch.zeros(batch, 4)) for batch in (2, 3))
    with pytest.raises(MaskShapeError, match="sizes differ"):
        two | three
    with pytest.raises(MaskShapeError, match="both sides must be rules"):
        two & Mask(torch.ones(2, 4, dtype=torch.bool))


def test_a_rule_is_a_mask_too():
    rule = AttentionMask.causal(4) | AttentionMask.segments(torch.tensor([[0, 0, 1, 1], [0, 1, 2, 2]]))
    dense = Mask(rule.keep)
    assert rule.ndim == dense.ndim == 4
    assert rule.counts.tolist() == dense.counts.tolist() == [12, 11]
    assert torch.allclose(rule.removed_ratio, dense.removed_ratio)
    assert torch.equal(rule.tile(1, 3, 2, 4), dense.keep[:, :, 1:3, 2:4])
    assert repr(rule) == "AttentionMask(batch=2, heads=1, 4 × 4)"
    assert rule.to("meta").device.type == "meta"


# -- a million positions -----------------------------------------------------------------------------------------

MILLION = 1_000_000


@pytest.fixture(scope="module")
def packed_million():
    """Causal, in a window, in documents of 5,000 to 15,000 tokens."""
    lengths = torch.randint(5_000, 15_001, (200,), generator=generator(0))
    ids = torch.repeat_interleave(torch.arange(200), lengths)[None, :MILLION]
    assert ids.shape[1] == MILLION
    rule = AttentionMask.causal(MILLION) & AttentionMask.window(MILLION, 4_000) & AttentionMask.segments(ids)
    return rule, ids[0]


def test_a_million_squared_is_never_made_dense(packed_million):
    rule, _ = packed_million
    for dense in ("keep", "counts", "removed_ratio"):
        with pytest.raises(MaskTooLarge, match=r"1000000 × 1000000 would take 931 GiB"):
            getattr(rule, dense)
    for convert in (rule.as_sdpa, rule.as_additive, rule.as_removed):
        with pytest.raises(MaskTooLarge):
            convert()
    with pytest.raises(MaskTooLarge) as caught:
        (~rule).keep  # noqa: B018
    assert caught.value.exit_code == 1


def test_the_block_mask_of_a_million_squared_is_made_and_right(packed_million):
    rule, ids = packed_million
    size = 512
    mask = rule.block_mask(size)
    blocks = -(-MILLION // size)
    assert mask.kv_indices.shape == (1, 1, blocks, blocks)
    some, every = rule.blocks(size)
    # A window of 4,000 touches at most nine blocks of 512 a row.
    assert (mask.kv_num_blocks + mask.full_kv_num_blocks).max() <= 9
    assert mask.full_kv_num_blocks.sum() > 0
    draw = generator(1)
    q = torch.randint(0, MILLION, (20_000,), generator=draw)
    k = (q - torch.randint(-2_000, 6_000, (20_000,), generator=draw)).clamp(0, MILLION - 1)
    expected = (k <= q) & (k >= q - 4_000) & (ids[q] == ids[k])
    zero = torch.zeros_like(q)
    assert torch.equal(mask.mask_mod(zero, zero, q, k), expected)
    assert 0.2 < expected.float().mean() < 0.8
    row, column = q // size, k // size
    assert (some[0, 0, row, column] | ~expected).all()
    assert (expected | ~every[0, 0, row, column]).all()
    listed = torch.zeros(blocks, blocks, dtype=torch.bool)
    for counts, indices in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        first = torch.arange(blocks) < counts[0, 0, :, None]
        listed[torch.arange(blocks)[:, None].expand_as(first)[first], indices[0, 0][first].long()] = True
    assert torch.equal(listed, some[0, 0])


# -- attention ---------------------------------------------------------------------------------------------------


def tensors(batch, heads, groups, q_len, kv_len, seed=0, width=8):
    draw = generator(seed)
    return (
        torch.randn(batch, heads, q_len, width, generator=draw, dtype=torch.float64),
        torch.randn(batch, groups, kv_len, width, generator=draw, dtype=torch.float64),
        torch.randn(batch, groups, kv_len, width + 2, generator=draw, dtype=torch.float64),
    )


def softmax_attention(query, key, value, keep, scale=None):
    """Attention as its definition has it, with zeros for a query that attends to nothing."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    weights = torch.where(keep, scores, -torch.inf).softmax(-1)
    return torch.where(keep.any(-1, keepdim=True), weights, 0.0) @ value


@given(composed())
@settings(max_examples=30, deadline=None)
def test_sdpa_takes_bool_and_additive_forms(example):
    rule, dense = example
    rule, dense = rule | AttentionMask.window(rule.q_len, 0), dense | torch.eye(rule.q_len, dtype=torch.bool)
    query, key, value = tensors(rule.batch, rule.heads, rule.heads, rule.q_len, rule.kv_len)
    expected = softmax_attention(query, key, value, dense)
    for form in (rule.as_sdpa(), rule.as_additive(torch.float64)):
        assert torch.allclose(scaled_dot_product_attention(query, key, value, attn_mask=form), expected)


def test_multihead_attention_takes_the_removed_form_for_each_head():
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(3, 6, 8)
    rule = AttentionMask.causal(6) & AttentionMask.segments(torch.tensor([[0, 0, 0, 1, 1, 1]] * 3))
    with torch.no_grad():
        one, weights = layer(x, x, x, attn_mask=rule.as_removed()[0, 0], average_attn_weights=False)
        each = rule.as_removed().expand(3, 2, 6, 6).flatten(0, 1)
        two, _ = layer(x, x, x, attn_mask=each)
        alone, _ = layer(x[:, 3:], x[:, 3:], x[:, 3:], attn_mask=AttentionMask.causal(3).as_removed()[0, 0])
    assert torch.equal(weights > 0, rule.keep.expand(3, 2, 6, 6))
    assert torch.allclose(one, two)
    assert torch.allclose(one[:, 3:], alone, atol=1e-6)


@given(composed(), st.sampled_from([16, 64]))
@settings(max_examples=12, deadline=None)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_takes_the_block_mask(example, block_size):
    rule, dense = example
    rule, dense = rule | AttentionMask.window(rule.q_len, 0), dense | torch.eye(rule.q_len, dtype=torch.bool)
    query, key, value = tensors(rule.batch, rule.heads, rule.heads, rule.q_len, rule.kv_len)
    out = flex_attention(query, key, value, block_mask=rule.block_mask(block_size))
    assert torch.allclose(out, softmax_attention(query, key, value, dense))


@given(composed(), st.integers(1, 2), st.sampled_from([None, 0.3]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_attend_is_attention_under_the_rule(example, groups, scale, dense_is_kept):
    rule, dense = example
    heads = groups * max(2, rule.heads) if rule.heads == 1 or groups == 1 else rule.heads
    groups = 1 if heads % groups else groups
    query, key, value = tensors(max(2, rule.batch), heads, groups, rule.q_len, rule.kv_len)
    expected = softmax_attention(query, key, value, dense, scale)
    slabs = Slabs(rule, kept=2**20 if dense_is_kept else 0)
    assert torch.allclose(slabs.attend(query, key, value, scale=scale), expected)


LONG = {
    "causal": AttentionMask.causal(700),
    "cached": AttentionMask.causal(300, 700),
    "window": AttentionMask.window(700, 40),
    "segments": AttentionMask.causal(700) & AttentionMask.segments(torch.arange(700)[None] // 150),
    "full": AttentionMask.full(700),
    "a gap": AttentionMask(lambda b, h, q, k: (q < 200) & (k < 100) | (q >= 500) & (k >= 600), 700),
    "nothing": AttentionMask(lambda b, h, q, k: q < k - 700, 700),
    "heads": AttentionMask(lambda b, h, q, k: k <= q - 100 * h, 700, heads=2),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("limit", [1, 2**17, 2**22])
def test_attend_goes_slab_by_slab(name, limit):
    rule = LONG[name]
    query, key, value = (x.requires_grad_() for x in tensors(1, 2, 1, rule.q_len, rule.kv_len))
    expected = softmax_attention(query, key, value, rule.keep)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator(5))
    gradients = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    nothing = not rule.keep.any()
    for kept in (0, 2**26):
        slabs = Slabs(rule, limit=limit, kept=kept)
        out = slabs.attend(query, key, value)
        assert torch.allclose(out, expected)
        assert out.requires_grad != nothing
        if nothing:
            continue
        ours = torch.autograd.grad((out * weights).sum(), (query, key, value))
        assert all(torch.allclose(a, b) for a, b in zip(ours, gradients))
    # The slabs cover the queries once, in order.
    borders = [(slab.q_first, slab.q_end) for slab in slabs.slabs]
    assert borders[0][0] == 0
    assert borders[-1][1] == rule.q_len
    assert all(one[1] == other[0] for one, other in itertools.pairwise(borders))
    assert len(borders) > 1 or limit > 1 or nothing


def test_slabs_look_only_at_the_keys_they_need_and_keep_only_partial_masks():
    slabs = Slabs(AttentionMask.window(100 * BLOCK, BLOCK), limit=1).slabs
    assert len(slabs) == 100
    assert max(slab.k_end - slab.k_first for slab in slabs) == 2 * BLOCK
    full = Slabs(AttentionMask.full(100 * BLOCK)).slabs
    assert all(slab.full and slab.keep is None for slab in full)
    evaluated = []

    def rule(b, h, q, k):
        evaluated.append(torch.broadcast_shapes(q.shape, k.shape).numel())
        return q >= k

    bounds = AttentionMask.causal(1).bounds
    large = Slabs(AttentionMask(rule, 6_000, bounds=bounds), limit=2**20, kept=2**24)
    assert evaluated == [], "1.8 · 10⁷ pairs are more than are kept"
    query, key, value = tensors(1, 1, 1, 6_000, 6_000, width=2)
    with torch.no_grad():
        out = large.attend(query, key, value)
    assert max(evaluated) <= 2**20
    last = softmax_attention(query[:, :, -1:], key, value, torch.ones(1, 6_000, dtype=torch.bool))
    assert torch.allclose(out[:, :, -1:], last)


def test_dropout_is_on_the_attended_keys():
    query, key, value = (x.float() for x in tensors(1, 2, 2, 200, 200))
    rule = AttentionMask.causal(200)
    torch.manual_seed(0)
    dropped = attend(query, key, torch.ones_like(value), rule, dropout=0.5)
    assert not torch.allclose(dropped, torch.ones_like(dropped))
    assert dropped.mean().item() == pytest.approx(1, abs=0.1)
    assert torch.allclose(attend(query, key, torch.ones_like(value), rule), torch.ones_like(dropped))


@pytest.mark.parametrize(
    "rule",
    [
        AttentionMask.causal(5),
        AttentionMask.causal(6, 7),
        AttentionMask.segments(torch.zeros(3, 6)),
        AttentionMask(lambda b, h, q, k: q >= k, 6, heads=3),
    ],
)
def test_a_rule_for_other_sizes_is_refused(rule):
    query, key, value = tensors(2, 2, 2, 6, 6)
    with pytest.raises(MaskShapeError, match=r"does not fit queries \[2, 2, 6, 8\] and keys \[2, 2, 6, 8\]"):
        attend(query, key, value, rule)


# -- transformers ------------------------------------------------------------------------------------------------

VOCABULARY, LENGTH = 40, 24
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def models():
    import transformers as t

    return {
        "llama": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(**SIZES, intermediate_size=32, num_key_value_heads=2, max_position_embeddings=64)
        ),
        "qwen2": lambda: t.Qwen2ForCausalLM(
            t.Qwen2Config(
                **SIZES,
                intermediate_size=32,
                num_key_value_heads=2,
                max_position_embeddings=64,
                use_sliding_window=True,
                sliding_window=4,
                max_window_layers=1,
            )
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=1,
            )
        ),
        "bert": lambda: t.BertForMaskedLM(
            t.BertConfig(**SIZES, intermediate_size=32, max_position_embeddings=64, initializer_range=0.2)
        ),
    }


def model_of(name, implementation="sdpa"):
    torch.manual_seed(0)
    model = models()[name]().eval()
    model.set_attn_implementation(implementation)
    return model


def tokens(seed=0):
    return torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator(seed))


SEGMENTS = torch.tensor([[0] * 10 + [1] * 14, [0] * 3 + [1] * 16 + [2] * 5])


def rules():
    prefix = AttentionMask(lambda b, h, q, k: k < 6, LENGTH)
    return {
        "packed": AttentionMask.causal(LENGTH) & AttentionMask.segments(SEGMENTS),
        "prefix": AttentionMask.causal(LENGTH) | prefix,
        "window": AttentionMask.window(LENGTH, 3, 2),
        "heads": AttentionMask(lambda b, h, q, k: k <= q - h, LENGTH, heads=4)
        | AttentionMask.window(LENGTH, 0),
    }


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("rule", ["packed", "prefix", "window", "heads"])
def test_a_rule_in_a_model_is_its_dense_mask(name, implementation, rule):
    rule = rules()[rule]
    model = model_of(name, implementation)
    dense = rule.keep.expand(2, -1, -1, -1)
    form = Mask(dense).as_additive() if implementation == "eager" else dense
    with torch.no_grad():
        expected = model(tokens(), attention_mask=form).logits
        free = model(tokens()).logits
        backbone = adapt(model, "token")
        ours = backbone.logits(tokens(), rule)
        again = backbone.logits(tokens())
    assert torch.allclose(ours, expected, atol=1e-5)
    assert not torch.allclose(ours, free, atol=1e-3)
    assert torch.allclose(again, free, atol=1e-5), "without a rule the model is what it was"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_embeddings_positions_and_gradients_go_the_same_way(name):
    model, rule = model_of(name).train(), rules()["packed"]
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    backbone = adapt(model, "token")
    grads = []
    for run in (
        lambda x: model(inputs_embeds=x, attention_mask=rule.keep, position_ids=positions).logits,
        lambda x: backbone.logits(x, rule, positions),
    ):
        torch.manual_seed(1)
        model.eval() if name == "bert" else model.train()
        x = backbone.embed(tokens()).detach().requires_grad_()
        run(x).square().mean().backward()
        grads.append(x.grad)
    assert torch.allclose(*grads, atol=1e-7)


def test_gradient_checkpointing_finds_the_rule_again():
    rule, grads = rules()["packed"], []
    for checkpointed in (False, True):
        model = model_of("llama").train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        adapt(model, "token").logits(tokens(), rule).square().mean().backward()
        grads.append(model.model.embed_tokens.weight.grad)
    assert torch.allclose(*grads, atol=1e-8)


def test_packed_documents_are_as_if_alone():
    model = model_of("llama")
    backbone = adapt(model, "token")
    rule = AttentionMask.causal(LENGTH) & AttentionMask.segments(SEGMENTS[:1])
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    ids = tokens()[:1]
    with torch.no_grad():
        packed = backbone.logits(ids, rule, positions)
        alone = torch.cat([backbone.logits(ids[:, :10]), backbone.logits(ids[:, 10:])], dim=1)
    assert torch.allclose(packed, alone, atol=1e-5)


def test_no_dense_mask_is_made_for_the_model(monkeypatch):
    def dense(self):
        raise AssertionError("the dense mask was asked for")

    monkeypatch.setattr(AttentionMask, "keep", property(dense))
    with torch.no_grad():
        adapt(model_of("llama"), "token").logits(tokens(), rules()["packed"])


def test_padding_given_the_usual_way_still_counts():
    model = model_of("bert")
    visible = Mask(torch.arange(LENGTH) < torch.tensor([[20], [24]]))
    with torch.no_grad():
        expected = model(tokens(), attention_mask=visible.as_hf_attention()).logits
        backbone = adapt(model, "token")
        ours = backbone.logits(tokens(), AttentionMask.keys(visible))
        usual = model(tokens(), attention_mask=visible.as_hf_attention()).logits
    assert model.config._attn_implementation == "maskwright"
    assert torch.allclose(ours[visible.keep], expected[visible.keep], atol=1e-5)
    assert torch.allclose(usual, expected, atol=1e-5)


def test_a_model_still_generates_and_saves_as_before(tmp_path):
    import transformers

    model = model_of("llama")
    before = model.generate(tokens(), max_new_tokens=5, do_sample=False, pad_token_id=0)
    adapt(model, "token").logits(tokens(), rules()["packed"])
    after = model.generate(tokens(), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(before, after)
    model.save_pretrained(tmp_path)
    assert "maskwright" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation != "maskwright"


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_model_with_flex_attention_gets_the_block_mask(name):
    rule = rules()["packed"]
    with torch.no_grad():
        expected = model_of(name)(tokens(), attention_mask=rule.keep).logits
        # transformers compiles flex_attention, which takes a compiler and a minute; eager is the same function.
        with torch.compiler.set_stance("force_eager"):
            model = model_of(name, "flex_attention")
            ours = adapt(model, "token").logits(tokens(), rule)
    assert model.config._attn_implementation == "flex_attention"
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_outside_the_interface_gets_the_dense_mask(monkeypatch, implementation):
    model = model_of("bert", implementation)
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    rule = rules()["packed"]
    with torch.no_grad():
        ours = adapt(model, "token").logits(tokens(), rule)
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.allclose(ours, adapt(model, "token").logits(tokens(), rule), atol=1e-5)


def test_a_rule_of_another_length_is_refused_by_the_layer():
    with pytest.raises(MaskShapeError, match=r"23 × 23\) does not fit queries"):
        adapt(model_of("llama"), "token").logits(tokens(), AttentionMask.causal(23))


def test_a_model_that_bends_its_scores_is_refused():
    import transformers as t

    torch.manual_seed(0)
    config = t.Gemma2Config(
        **SIZES, intermediate_size=32, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=5.0
    )
    backbone = adapt(t.Gemma2ForCausalLM(config).eval(), "token")
    with pytest.raises(BackboneMismatch, match=r"softcap.*flex_attention"):
        backbone.logits(tokens(), rules()["packed"])
