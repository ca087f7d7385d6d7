"""Packing: bins against naive packers and the optimum, and packed models against their sequences one by one."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings

from maskwright import AttentionMask, adapt
from maskwright.errors import BadParameter, MaskShapeError
from maskwright.toolkit import packing as packings
from maskwright.toolkit.packing import (
    PADDING,
    Packing,
    best_fit_decreasing,
    fewest_bins,
    first_fit_decreasing,
    fullest_bins,
    loss_weights,
    lower_bound,
    pack,
    packed_attention,
    packed_loss,
    restarted_positions,
    segments_from_starts,
    token_losses,
)

lengths_of = st.lists(st.integers(1, 9), min_size=1, max_size=9)
PACKERS = (best_fit_decreasing, first_fit_decreasing, fullest_bins, fewest_bins)

# -- bins --------------------------------------------------------------------------------------------------------


def naive_decreasing(lengths, capacity, better):
    """First fit (`better` is never true) or best fit, bin by bin."""
    bins, rooms = [], []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length, chosen = min(lengths[number], capacity), None
        for home, room in enumerate(rooms):
            if room >= length and (chosen is None or better(room, rooms[chosen])):
                chosen = home
        if chosen is None:
            chosen = len(bins)
            bins.append([])
            rooms.append(capacity)
        bins[chosen].append(number)
        rooms[chosen] -= length
    return bins


def optimum(lengths, capacity):
    """The fewest bins, by trying every assignment with no empty bin before a used one."""

    def fill(rest, rooms, best):
        if len(rooms) >= best:
            return best
        if not rest:
            return len(rooms)
        length, seen = rest[0], set()
        for home, room in enumerate(rooms):
            if room >= length and room not in seen:
                seen.add(room)
                best = fill(rest[1:], [*rooms[:home], room - length, *rooms[home + 1 :]], best)
        return fill(rest[1:], [*rooms, capacity - length], best)

    return fill(sorted((min(length, capacity) for length in lengths), reverse=True), [], len(lengths) + 1)


@given(lengths_of, st.integers(1, 12))
@settings(max_examples=150)
def test_bins_hold_every_sequence_once_and_no_more_than_fits(lengths, capacity):
    for packer in PACKERS:
        bins = packer(lengths, capacity)
        assert sorted(number for one in bins for number in one) == list(range(len(lengths)))
        for one in bins:
            assert sum(lengths[number] for number in one) <= capacity or len(one) == 1
    assert best_fit_decreasing(lengths, capacity) == naive_decreasing(lengths, capacity, lambda a, b: a < b)
    assert first_fit_decreasing(lengths, capacity) == naive_decreasing(lengths, capacity, lambda a, b: False)
    best = optimum(lengths, capacity)
    assert math.ceil(sum(min(one, capacity) for one in lengths) / capacity) <= lower_bound(lengths, capacity)
    assert lower_bound(lengths, capacity) <= best <= len(fewest_bins(lengths, capacity))
    assert len(fewest_bins(lengths, capacity)) <= len(first_fit_decreasing(lengths, capacity))
    assert len(best_fit_decreasing(lengths, capacity)) <= 11 / 9 * best + 6 / 9


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.4])
@pytest.mark.parametrize("number", [32, 100, 1000, 5000])
def test_long_tails_need_at_most_two_percent_more_bins_than_the_lower_bound(sigma, number):
    for seed in range(3):
        drawn = np.random.default_rng(seed).lognormal(3.9, sigma, number)
        lengths = drawn.astype(int).clip(2, 400).tolist()
        bins = len(fewest_bins(lengths, max(lengths)))
        assert bins <= math.ceil(1.02 * lower_bound(lengths, max(lengths)))
        assert bins <= len(first_fit_decreasing(lengths, max(lengths)))


def test_the_lower_bound_sees_more_than_the_sum():
    assert lower_bound([6, 6, 6], 10) == 3
    assert lower_bound([7, 4, 4, 4, 4], 10) == 3
    assert lower_bound([], 10) == 0


def test_the_search_beats_decreasing_fits_where_they_fall_short():
    lengths = [4, 3, 3, 2, 2, 2, 2, 2]
    assert len(best_fit_decreasing(lengths, 10)) == 2
    hard = [44, 24, 24, 22, 21, 17, 8, 8, 6, 6]
    assert len(first_fit_decreasing(hard, 61)) == len(best_fit_decreasing(hard, 61)) == 4
    assert len(fewest_bins(hard, 61)) == lower_bound(hard, 61) == 3


def test_many_sequences_are_packed_in_a_moment():
    lengths = np.random.default_rng(0).lognormal(3.9, 1.0, 20_000).astype(int).clip(2, 400).tolist()
    assert len(fewest_bins(lengths, 400)) <= 1.02 * lower_bound(lengths, 400)


def test_capacities_and_bins_that_make_no_sense_are_refused():
    with pytest.raises(BadParameter, match="capacity must be at least 1, not 0"):
        fewest_bins([1, 2], 0)
    with pytest.raises(BadParameter, match="Every one of the 3 sequences"):
        Packing.from_bins([1, 2, 3], [[0, 1], [1]])


# -- segments ----------------------------------------------------------------------------------------------------


def by_hand(lengths, bins):
    """Segment ids, positions, and (sequence, place in it) of every cell, cell by cell."""
    width = max(sum(lengths[number] for number in one) for one in bins)
    segments, positions, owners = [], [], []
    for one in bins:
        cells = [
            (order, place, number) for order, number in enumerate(one) for place in range(lengths[number])
        ]
        cells += [(PADDING, 1, None)] * (width - len(cells))
        segments.append([cell[0] for cell in cells])
        positions.append([cell[1] for cell in cells])
        owners.append([cell[2:] + cell[1:2] for cell in cells])
    return segments, positions, owners


@given(lengths_of, st.integers(4, 14))
@settings(max_examples=60)
def test_segments_positions_rules_and_weights_are_those_of_cell_by_cell(lengths, capacity):
    bins = fewest_bins(lengths, capacity)
    packing = Packing.from_bins(lengths, bins)
    segments, positions, owners = by_hand(lengths, bins)
    assert packing.segments.tolist() == segments
    assert packing.positions.tolist() == positions
    rows, width = packing.shape
    keep = packing.attention.keep
    for row, q, k in itertools.product(range(rows), range(width), range(width)):
        assert bool(keep[row, 0, q, k]) == (segments[row][q] == segments[row][k] and k <= q)
    assert torch.equal(packed_attention(packing.segments, causal=False).keep, keep | keep.mT)
    for shift, per in itertools.product((0, 1), ("sequence", "token")):
        weights = loss_weights(packing.segments, shift=shift, per=per, dtype=torch.float64)
        counts = [length - shift for length in lengths]
        for row, place in itertools.product(range(rows), range(width)):
            number, at = owners[row][place]
            expected = 0.0
            if number is not None and at >= shift:
                whole = sum(count > 0 for count in counts)
                expected = 1 / sum(counts) if per == "token" else 1 / counts[number] / whole
            assert weights[row, place].item() == pytest.approx(expected, abs=1e-12)
    assert packing.alone == all(len(one) == 1 for one in bins)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=7), st.integers(0, 99))
def test_what_is_placed_can_be_taken_back_also_of_empty_sequences(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    packing = pack(lengths, 8)
    values = torch.randn(sum(lengths), 3, generator=generator)
    placed = packing.place(values, 7.0)
    assert torch.equal(packing.take(placed), values)
    assert (placed[packing.segments == PADDING] == 7).all()
    assert [len(one) for one in packing.split(placed)] == lengths
    keys = torch.randn(packing.shape[0], 2, packing.shape[1], 3, generator=generator)
    aligned = packing.align_right(keys)
    for number, length in enumerate(lengths):
        row, start = int(packing.row[number]), int(packing.start[number])
        own = keys[row, :, start : start + length]
        assert torch.equal(aligned[number, :, aligned.shape[2] - length :], own)
        assert (aligned[number, :, : aligned.shape[2] - length] == 0).all()


def test_rows_cut_at_their_separators_are_packed_rows():
    begins = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]]).bool()
    segments = segments_from_starts(begins)
    assert segments.tolist() == [[0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 1, 1]]
    assert restarted_positions(segments).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]


def test_a_rule_over_65_536_tokens_needs_no_dense_tensor(monkeypatch):
    def dense(*_):
        raise AssertionError("a dense mask was asked for")

    monkeypatch.setattr(AttentionMask, "tile", dense)
    lengths = np.random.default_rng(0).lognormal(5, 1.5, 400).astype(int).clip(1, 9000)
    lengths = lengths[lengths.cumsum() <= 65_536].tolist()
    packing = pack([*lengths, 65_536 - sum(lengths)], 65_536)
    blocks = packing.attention.block_mask()
    assert packing.shape == (1, 65_536)
    tables = [blocks.kv_indices, blocks.full_kv_indices, blocks.q_indices, blocks.full_q_indices]
    assert all(table.numel() <= 512 * 512 for table in tables)


def test_the_rule_of_some_rows_is_their_part_of_it():
    rule = pack([3, 2, 4, 1, 1], 4).attention
    assert rule.batch == 3
    for rows in (slice(0, 1), slice(1, 3), slice(None, None, 2)):
        part = rule.rows(rows)
        assert isinstance(part, AttentionMask)
        assert torch.equal(part.keep, rule.keep[rows])
        assert torch.equal(part.blocks(2)[0], rule.blocks(2)[0][rows])
        assert torch.equal(part.blocks(2)[1], rule.blocks(2)[1][rows])
    assert AttentionMask.causal(4).rows(slice(1, 2)).batch == 1


def test_mistakes_are_named():
    with pytest.raises(BadParameter, match="per='tokens' must be"):
        loss_weights(torch.zeros(1, 3).long(), per="tokens")
    with pytest.raises(MaskShapeError, match=r"got \[1, 3, 4\], \[1, 2\] and \[1, 3\]"):
        token_losses(torch.zeros(1, 3, 4), torch.zeros(1, 2).long(), torch.zeros(1, 3).long())


# -- packed equals unpacked ----------------------------------------------------------------------------------------

SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 16, "max_position_embeddings": 16, "initializer_range": 0.3}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
MODELS = ("llama", "gpt2", "qwen2")


def model_of(name, dtype, implementation="sdpa"):
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16, initializer_range=0.3
        )
        model = transformers.GPT2LMHeadModel(config)
    elif name == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=1))
    model.set_attn_implementation(implementation)
    return model.eval().to(dtype)


def pinned(monkeypatch, model):
    """A model that keeps its implementation, so that the adapter gives it the dense mask in that implementation's form."""
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    return model


def tokens_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 20, (sum(lengths),), generator=generator)


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)


def difference(one, other):
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and a.numel()]
    return max(((a - b).abs().max().item() for a, b in pairs), default=0.0)


def worst_difference(model, lengths, *, rule=None, positions=None):
    """The largest difference of logits, losses and gradients, sequence by sequence and of the batch, packed against alone."""
    backbone, packing, flat = adapt(model, "token"), pack(lengths, 14), tokens_of(lengths)
    tokens, segments = packing.place(flat, 0), packing.segments
    rule = packing.attention if rule is None else rule(packing)
    logits = backbone.logits(tokens, rule, packing.positions if positions is None else positions(packing))
    losses = token_losses(logits, tokens, segments)
    found, batch = [], []
    each = zip(packing.split(logits), packing.split(losses), flat.split(lengths), strict=True)
    for ours, our_losses, sequence in each:
        alone = model(sequence[None], use_cache=False).logits[0]
        expected = torch.nn.functional.cross_entropy(alone[:-1], sequence[1:], reduction="none")
        found.append(difference([ours, our_losses[1:]], [alone, expected]))
        if len(sequence) > 1:
            ours, expected = our_losses.sum() / (len(sequence) - 1), expected.mean()
            found.append(difference(gradients(ours, model), gradients(expected, model)))
            batch.append(expected)
    if batch:
        ours, expected = packed_loss(logits, tokens, segments), torch.stack(batch).mean()
        found.append(difference([ours], [expected]))
        found.append(difference(gradients(ours, model), gradients(expected, model)))
    else:
        assert packed_loss(logits, tokens, segments).item() == 0
    return max(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("implementation", ["maskwright", "sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_losses_and_gradients_are_those_of_each_sequence_alone(name, implementation, dtype):
    model = model_of(name, dtype, "sdpa" if implementation == "maskwright" else implementation)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if implementation != "maskwright":
            pinned(monkeypatch, model)

        @given(st.lists(st.integers(1, 14), min_size=1, max_size=4))
        @example([1])
        @example([6, 1, 4, 1])
        @settings(max_examples=5, deadline=None)
        def holds(lengths):
            assert worst_difference(model, lengths) < TOLERANCE[dtype]

        holds()
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_packed_logits_and_losses_are_those_of_each_sequence_alone_with_flex_attention(name, dtype):
    """Forward only: flex_attention has no backward pass on CPU. transformers' GPT-2 does not take it at all."""
    model, alone = model_of(name, dtype, "flex_attention"), model_of(name, dtype)

    @given(st.lists(st.integers(1, 14), min_size=1, max_size=4))
    @example([6, 1, 4, 1])
    @settings(max_examples=4, deadline=None)
    def holds(lengths):
        packing, flat = pack(lengths, 14), tokens_of(lengths)
        tokens = packing.place(flat, 0)
        # transformers compiles flex_attention, which takes a compiler and a minute; eager is the same function.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits = adapt(model, "token").logits(tokens, packing.attention, packing.positions)
            expected = [alone(one[None]).logits[0] for one in flat.split(lengths)]
        assert difference(packing.split(logits), expected) < TOLERANCE[dtype]
        one_by_one = [
            torch.nn.functional.cross_entropy(made[:-1], one[1:])
            for made, one in zip(expected, flat.split(lengths))
            if len(one) > 1
        ]
        if one_by_one:
            ours = packed_loss(logits, tokens, packing.segments)
            assert ours.item() == pytest.approx(torch.stack(one_by_one).mean().item(), abs=TOLERANCE[dtype])

    holds()
    assert model.config._attn_implementation == "flex_attention"


def late(packing):
    """The rule with every border between segments one place too far to the right."""
    ids = packing.segments
    return packed_attention(torch.cat([ids[:, :1], ids[:, :-1]], dim=1))


def early(packing):
    """One place too far to the left."""
    ids = packing.segments
    return packed_attention(torch.cat([ids[:, 1:], ids[:, -1:]], dim=1))


def ahead(packing):
    """Causality with one place too many."""
    return AttentionMask.window(packing.shape[1], packing.shape[1], 1) & packed_attention(
        packing.segments, causal=False
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_rule_wrong_by_one_position_is_noticed(name):
    model, lengths = model_of(name, torch.float64), [6, 3, 5]
    assert worst_difference(model, lengths) < 1e-10
    for wrong in (late, early, ahead):
        assert worst_difference(model, lengths, rule=wrong) > 1e-3


def test_positions_that_run_on_are_noticed_where_they_are_learned():
    lengths = [6, 3, 5]
    running = lambda packing: torch.arange(packing.shape[1]).expand(packing.shape)  # noqa: E731
    assert worst_difference(model_of("gpt2", torch.float64), lengths, positions=running) > 1e-3
    # Rotary attention is relative (up to its float32 tables): the logits hide the mistake, the keys of a cache do not.
    assert worst_difference(model_of("llama", torch.float64), lengths, positions=running) < 1e-5


def test_weights_wrong_by_one_position_are_noticed(monkeypatch):
    right = packings.loss_weights
    monkeypatch.setattr(packings, "loss_weights", lambda *a, **b: right(*a, **b).roll(1, 1))
    assert worst_difference(model_of("llama", torch.float64), [6, 3, 5]) > 1e-3
