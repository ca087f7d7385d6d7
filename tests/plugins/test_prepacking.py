"""prepacking: the official rows and masks, exact prefill and continuation, and the strategy in training."""

import copy

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

import maskwright
from maskwright import AttentionMask, Layout, MaskedTraining, adapt
from maskwright.backbones.defaults import causal_language_model, masked_language_model
from maskwright.errors import (
    BackboneMismatch,
    BadData,
    BadParameter,
    MaskShapeError,
    MissingSignal,
    UnsupportedLayout,
)
from maskwright.plugins.prepacking import prefill
from maskwright.plugins.prepacking import prefilling as prefillings
from maskwright.plugins.prepacking.claim import CLAIM, lengths, padded_prefill
from maskwright.plugins.prepacking.masks import Prepack
from maskwright.plugins.prepacking.prefilling import packed_rows, padded_left
from maskwright.testing import conformance
from maskwright.toolkit.packing import (
    PADDING,
    Packing,
    best_fit_decreasing,
    lower_bound,
    pack,
    packed_attention,
)

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.2}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
MODELS = ("llama", "gpt2", "qwen2")
LENGTHS = (5, 3, 9, 4, 2)
TOLD = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("check", dict(conformance(Prepack)).values(), ids=dict(conformance(Prepack)))
def test_conforms(check):
    check()


def model_of(name="llama", dtype=torch.float64):
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=40, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.2
        )
        model = transformers.GPT2LMHeadModel(config)
    elif name == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=2))
    return model.eval().to(dtype)


def prompts_of(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 40, (size,), generator=generator) for size in sizes]


@torch.no_grad()
def worst_difference(model, prompts, prefilled):
    """Of logits, keys and values, against each prompt alone, without padding."""
    worst = 0.0
    for number, prompt in enumerate(prompts):
        cache, before = transformers.DynamicCache(config=model.config), len(prompt) - 1
        assert prefilled.logits[number].shape == (before, 40)
        if not before:
            continue
        logits = model(prompt[None, :-1], past_key_values=cache, use_cache=True).logits[0]
        worst = max(worst, (prefilled.logits[number] - logits).abs().max().item())
        for ours, alone in zip(prefilled.cache.layers, cache.layers, strict=True):
            for one, other in ((ours.keys, alone.keys), (ours.values, alone.values)):
                width = one.shape[2]
                worst = max(worst, (one[number, :, width - before :] - other[0]).abs().max().item())
                assert (one[number, :, : width - before] == 0).all()
    return worst


def continuations(model, prompts):
    return torch.cat([model.generate(prompt[None], **TOLD)[:, -6:] for prompt in prompts])


# -- the official rows -----------------------------------------------------------------------------------------


def test_the_rows_of_a_small_batch():
    assert best_fit_decreasing(LENGTHS, 9) == [[2], [0, 3], [1, 4]]
    packing = packed_rows(LENGTHS)
    assert packing.shape == (3, 8)
    assert packing.row.tolist() == [1, 2, 0, 1, 2]
    assert (packing.start + packing.lengths).tolist() == [4, 2, 8, 7, 3], "the official offsets"
    assert (packing.segments >= 0).sum(1).tolist() == [8, 7, 3]
    assert packing.positions[1].tolist() == [0, 1, 2, 3, 0, 1, 2, 1]
    first_of_second = packing.attention.keep[1, 0, 4]
    assert first_of_second.nonzero().flatten().tolist() == [4], "only itself"


def test_the_rows_of_a_larger_batch():
    sizes = (12, 3, 3, 5, 7, 2, 12, 4, 6, 6)
    assert best_fit_decreasing(sizes, 12) == [[0], [6], [4, 3], [8, 9], [7, 1, 2, 5]]
    packing = packed_rows(sizes)
    assert packing.shape == (5, 11)
    assert packing.segments[4].tolist() == [0, 0, 0, 1, 1, 2, 2, 3, *[PADDING] * 3]


def test_equal_lengths_save_nothing_and_need_no_mask():
    packing = packed_rows((7, 7, 7))
    assert packing.shape == (3, 6)
    assert packing.alone
    assert not packed_rows(LENGTHS).alone


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12).filter(lambda sizes: max(sizes) > 1))
def test_rows_are_independent_lower_triangles_within_the_bounds(sizes):
    packing = packed_rows(sizes)
    assert lower_bound(sizes, max(sizes)) <= packing.shape[0] <= len(sizes)
    keep = packing.attention.keep[:, 0]
    for row, start, length in zip(packing.row, packing.start, packing.lengths, strict=True):
        block = keep[row, start : start + length]
        assert torch.equal(block[:, start : start + length], torch.ones(length, length).tril().bool())
        assert block.sum() == length * (length + 1) // 2, "nothing outside of the prompt"
    padding = packing.segments == PADDING
    assert not (keep & padding[:, None] & ~padding[:, :, None]).any(), "padding is never read"


def test_the_decoding_mask_and_the_shape_of_the_cache():
    prefilled = prefill(model_of(), prompts_of(LENGTHS))
    assert prefilled.attention_mask.tolist() == [[0] * (9 - size) + [1] * size for size in LENGTHS]
    assert all(layer.keys.shape == layer.values.shape == (5, 2, 8, 8) for layer in prefilled.cache.layers)
    assert prefilled.final_tokens.flatten().tolist() == [int(prompt[-1]) for prompt in prompts_of(LENGTHS)]
    assert set(prefilled.inputs()) == {"input_ids", "attention_mask", "past_key_values"}


# -- exactness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_cache_are_those_of_each_prompt_alone_and_generate_goes_on_alike(name, dtype):
    model = model_of(name, dtype)

    @given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 99))
    @example([6, 5, 1], 0)
    @example([1, 4, 6], 0)
    @example([1, 1], 0)
    @settings(max_examples=5, deadline=None)
    def holds(sizes, seed):
        prompts = prompts_of(sizes, seed)
        prefilled = prefill(model, prompts)
        assert worst_difference(model, prompts, prefilled) < TOLERANCE[dtype]
        made = model.generate(**prefilled.inputs(), **TOLD)
        assert torch.equal(made[:, -6:], continuations(model, prompts))
        assert torch.equal(made[:, :-6], padded_left(prompts, 0)[0])

    holds()


def test_twelve_prompts_in_a_rotary_model_of_four_layers():
    sizes = lengths(1.0, 0, 12)
    for dtype, tolerance in TOLERANCE.items():
        model, prompts = model_of(dtype=dtype), prompts_of([min(size, 60) for size in sizes])
        prefilled = prefill(model, prompts)
        assert prefilled.packing.shape[0] < 12
        assert worst_difference(model, prompts, prefilled) < tolerance


def test_changing_a_prompt_changes_no_bit_of_another_in_its_row():
    model = model_of(dtype=torch.float32)
    prompts = prompts_of(LENGTHS)
    before = prefill(model, prompts)
    prompts[0] = (prompts[0] + 5) % 40
    after = prefill(model, prompts)
    assert not torch.equal(before.logits[0], after.logits[0])
    for number in (1, 2, 3, 4):
        assert torch.equal(before.logits[number], after.logits[number])
        for one, other in zip(before.cache.layers, after.cache.layers, strict=True):
            assert torch.equal(one.keys[number], other.keys[number])
            assert torch.equal(one.values[number], other.values[number])


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_model_may_come_with_any_attention(implementation):
    model, prompts = model_of(), prompts_of(LENGTHS)
    model.set_attn_implementation(implementation)
    with torch.compiler.set_stance("force_eager"):
        prefilled = prefill(model, prompts)
        assert worst_difference(model_of(), prompts, prefilled) < 1e-10


def test_sampling_and_beams_go_on_alike():
    model, prompts = model_of(), prompts_of((7, 7, 4))
    ids, attention = padded_left(prompts, 0)
    for copies, how in ((3, {"num_beams": 3}), (1, {"do_sample": True, "repetition_penalty": 1.3})):
        told = {**TOLD, **how}
        torch.manual_seed(1)
        expected = model.generate(ids, attention_mask=attention, **told)
        torch.manual_seed(1)
        assert torch.equal(model.generate(**prefill(model, prompts).inputs(copies), **told), expected)


def test_the_logits_of_the_last_tokens_are_one_decoding_step():
    model, prompts = model_of("gpt2"), prompts_of((5, 1, 9, 4))
    made = prefill(model, prompts, logits=False)
    assert made.logits == ()
    with torch.no_grad():
        expected = torch.stack([model(prompt[None]).logits[0, -1] for prompt in prompts])
    assert torch.allclose(made.next_logits(model), expected, atol=1e-10)


# -- what must be noticed ------------------------------------------------------------------------------------------


def test_a_rule_wrong_by_one_position_is_noticed(monkeypatch):
    prompts = prompts_of(LENGTHS)

    def late(packing):
        ids = packing.segments
        return packed_attention(torch.cat([ids[:, :1], ids[:, :-1]], dim=1))

    monkeypatch.setattr(Packing, "attention", property(late))
    for name in MODELS:
        model = model_of(name)
        prefilled = prefill(model, prompts)
        assert worst_difference(model, prompts, prefilled) > 1e-3
        assert not torch.equal(
            model.generate(**prefilled.inputs(), **TOLD)[:, -6:], continuations(model, prompts)
        )


def test_positions_that_run_on_are_noticed_in_the_cache(monkeypatch):
    running = property(lambda packing: torch.arange(packing.shape[1]).expand(packing.shape))
    monkeypatch.setattr(Packing, "positions", running)
    for name in MODELS:
        model, prompts = model_of(name), prompts_of(LENGTHS)
        assert worst_difference(model, prompts, prefill(model, prompts)) > 1e-3


# -- edges ---------------------------------------------------------------------------------------------------------


def test_a_single_prompt_and_one_longer_than_the_bin_work():
    model = model_of()
    for sizes, capacity, shape in (((6,), None, (1, 5)), ((11, 3, 2, 4), 7, (3, 10)), ((3, 2), 1, (2, 2))):
        prompts = prompts_of(sizes)
        prefilled = prefill(model, prompts, capacity=capacity)
        assert prefilled.packing.shape == shape
        assert worst_difference(model, prompts, prefilled) < 1e-10
        made = model.generate(**prefilled.inputs(), **TOLD)
        assert torch.equal(made[:, -6:], continuations(model, prompts))


def test_lists_of_ids_and_a_copied_cache_work():
    model, prompts = model_of(), prompts_of(LENGTHS)
    prefilled = prefill(model, [prompt.tolist() for prompt in prompts])
    first = model.generate(**copy.deepcopy(prefilled).inputs(), **TOLD)
    assert torch.equal(model.generate(**prefilled.inputs(), **TOLD), first)


def test_longer_rows_and_another_packing_give_the_same():
    model, prompts = model_of(), prompts_of(LENGTHS)
    for arguments in (
        {"capacity": 23},
        {"bins": best_fit_decreasing},
        {"bins": lambda sizes, _: [[4, 0, 2, 1], [3]]},
    ):
        prefilled = prefill(model, prompts, **arguments)
        assert worst_difference(model, prompts, prefilled) < 1e-10
    assert prefill(model, prompts, capacity=23).packing.shape[0] == 1


def test_what_cannot_be_prefilled_is_refused():
    model = model_of()
    with pytest.raises(BadData, match=r"Prompt 1 is empty.*bos_token_id"):
        prefill(model, [[3, 4], []])
    with pytest.raises(BadData, match="There is no prompt"):
        prefill(model, [])
    with pytest.raises(BadData, match=r"Prompt 0 must be a list of token ids, not of shape \[1, 2\]"):
        prefill(model, [torch.zeros(1, 2)])
    with pytest.raises(BadParameter, match="capacity must be at least 1, not 0"):
        prefill(model, [[3, 4]], capacity=0)
    with pytest.raises(BadParameter, match=r"call model.eval\(\)"):
        prefill(model.train(), [[3, 4]])
    with pytest.raises(BackboneMismatch, match="needs a causal language model"):
        prefill(masked_language_model(vocabulary=40, length=16, mask_token=2).eval(), [[3, 4]])
    sliding = transformers.Qwen2Config(
        **SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )
    with pytest.raises(BackboneMismatch, match="DynamicSlidingWindowLayer: prefill its prompts padded"):
        prefill(transformers.Qwen2ForCausalLM(sliding).eval(), [[3, 4]])


def test_no_dense_mask_of_more_than_the_rows_is_made_and_none_where_prompts_are_alone(monkeypatch):
    def refused(*_):
        raise AssertionError("a rule was made")

    monkeypatch.setattr(Packing, "attention", property(refused))
    prompts = prompts_of((7, 6, 7))
    assert worst_difference(model_of(), prompts, prefill(model_of(), prompts)) < 1e-10
    with pytest.raises(AssertionError, match="a rule was made"):
        prefill(model_of(), prompts_of((7, 3, 4)))


def test_the_baseline_of_the_claim_is_the_padded_prefill():
    model, prompts = model_of(), prompts_of(LENGTHS)
    padded, ours = padded_prefill(model, prompts), prefill(model, prompts)
    for theirs, layer in zip(padded.past_key_values.layers, ours.cache.layers, strict=True):
        for number, size in enumerate(LENGTHS):
            own = layer.keys[number, :, 9 - size :]
            assert torch.allclose(theirs.keys[number, :, 9 - size : 8], own, atol=1e-10)


def test_the_claim_is_decided_by_its_numbers():
    good = {
        "llama, logits, float32, largest difference": 1e-6,
        "llama, prompts continued alike": 1.0,
        "1,000 long-tail lengths, bins over the lower bound": 1.0,
        "1,000 long-tail lengths, bins over first-fit decreasing": 1.0,
    }
    for sigma, spread, ratio in (("0", 0, 1), ("0.5", 0.5, 2), ("1", 1.1, 4), ("1.4", 1.3, 5)):
        good[f"σ = {sigma}, coefficient of variation"] = spread
        good[f"σ = {sigma}, time padded / prepacked"] = ratio
    assert CLAIM.decide([good] * 3)
    for name, value in (
        ("llama, logits, float32, largest difference", 2e-5),
        ("llama, prompts continued alike", 0.9),
        ("1,000 long-tail lengths, bins over the lower bound", 1.03),
        ("1,000 long-tail lengths, bins over first-fit decreasing", 1.01),
        ("σ = 0, time padded / prepacked", 0.9),
        ("σ = 1.4, time padded / prepacked", 1.9),
        ("σ = 0.5, time padded / prepacked", 14.0),
    ):
        assert not CLAIM.decide([good, good, {**good, name: value}]), name


# -- the strategy --------------------------------------------------------------------------------------------------


def drawn(segments, **parameters):
    strategy = maskwright.create("mask-strategy", "prepack", **parameters)
    return strategy.draw(
        Layout(len(segments), (segments.shape[1],)),
        signals={"segments": segments},
        progress=0.0,
        generator=torch.Generator(),
    )


def test_the_strategy_is_the_rule_of_the_packing():
    packing = packed_rows(LENGTHS)
    mask = drawn(packing.segments)
    assert isinstance(mask, AttentionMask)
    assert torch.equal(mask.keep, packing.attention.keep)
    both = drawn(packing.segments, causal=False).keep
    assert torch.equal(both, mask.keep | mask.keep.mT)


def test_the_strategy_refuses_what_does_not_fit():
    strategy = Prepack()
    told = {"progress": 0.0, "generator": torch.Generator()}
    with pytest.raises(UnsupportedLayout, match="rows of tokens"):
        strategy.draw(Layout(1, (4, 4)), signals={"segments": torch.zeros(1, 16).long()}, **told)
    with pytest.raises(MaskShapeError, match=r"whole numbers \[1, 8\]"):
        strategy.draw(Layout(1, (8,)), signals={"segments": torch.zeros(1, 7).long()}, **told)
    with pytest.raises(MaskShapeError, match=r"torch.float32"):
        strategy.draw(Layout(1, (8,)), signals={"segments": torch.zeros(1, 8)}, **told)


def test_it_composes_with_the_objective_of_another_plugin():
    """next-token under the rule: no token of one segment reaches another one's predictions."""
    model = causal_language_model(vocabulary=40, length=32, width=32, depth=2, heads=2).double().eval()
    objective = maskwright.create("objective", "next-token")
    with pytest.raises(MissingSignal, match="segments"):
        MaskedTraining(model, Prepack(), objective)
    training = MaskedTraining(model, Prepack(), objective, columns=["segments"]).eval()
    packing = pack([6, 3, 5], 14)
    tokens = packing.place(torch.cat(prompts_of([6, 3, 5])), 0)
    made = training(tokens=tokens, segments=packing.segments)
    assert isinstance(made["mask"], AttentionMask)
    other = tokens.clone()
    other[:, :6] = (other[:, :6] + 5) % 40
    changed = training(tokens=other, segments=packing.segments)
    same = made["outputs"]["prediction"] == changed["outputs"]["prediction"]
    assert same[:, 7:].all(), "what the second segment predicts"
    assert not same[:, 1:7].all()


def test_the_adapter_keeps_its_ways_without_a_cache():
    model = model_of()
    backbone = adapt(model, "token")
    prompts = prompts_of((6,))
    with torch.no_grad():
        logits = backbone.logits(prompts[0][None])
        cache = transformers.DynamicCache(config=model.config)
        last = backbone.logits(prompts[0][None], cache=cache, last=1)
    assert logits.shape == (1, 6, 40)
    assert torch.allclose(last, logits[:, -1:], atol=1e-10)
    assert cache.get_seq_length() == 6


def test_prefill_is_exported_by_the_plugin():
    import maskwright.plugins.prepacking as plugin

    assert plugin.prefill is prefillings.prefill
    assert plugin.Prefilled is prefillings.Prefilled
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        plugin.other  # noqa: B018
