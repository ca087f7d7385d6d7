"""The text baselines: next-token prediction on what is visible, greedy and nucleus sampling."""

import pytest
import torch
from scipy.stats import chisquare

import maskwright
from maskwright import AttentionMask, Layout, Mask, MaskedTraining, SampleRequest
from maskwright.backbones.defaults import causal_language_model, masked_language_model
from maskwright.backbones.transformers import denoiser
from maskwright.errors import BackboneMismatch, BadParameter, MaskShapeError
from maskwright.plugins.baselines.autoregressive import Greedy, TopP, nucleus
from maskwright.plugins.baselines.language import NextToken, attention_rule, previous_visible
from maskwright.testing import conformance

SMALL = {"width": 32, "depth": 2, "heads": 2}
VOCABULARY = 40


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def checks(*components):
    return [
        pytest.param(check, id=f"{component.name}-{name}")
        for component in components
        for name, check in conformance(component)
    ]


@pytest.mark.parametrize("check", checks(NextToken, Greedy, TopP, Greedy(order="left-to-right")))
def test_conforms(check):
    check()


def llama(implementation):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            attn_implementation=implementation,
        )
    )


def gpt2(implementation):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=32,
        attn_implementation=implementation,
    )
    return GPT2LMHeadModel(config)


def qwen2(implementation):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            attn_implementation=implementation,
        )
    )


MODELS = {"llama": llama, "gpt2": gpt2, "qwen2": qwen2}


def causal_models():
    return [
        pytest.param(make, implementation, id=f"{name}-{implementation}")
        for name, make in MODELS.items()
        for implementation in ("sdpa", "eager")
    ]


def built(make, implementation="sdpa"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(implementation).eval()


def some_tokens(rows=3, length=12, seed=0):
    return torch.randint(0, VOCABULARY, (rows, length), generator=seeded(seed))


# -- next-token ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "implementation"), causal_models())
def test_with_nothing_hidden_it_is_the_models_own_loss(make, implementation):
    model, tokens = built(make, implementation), some_tokens()
    loss = NextToken().bind(model)({"tokens": tokens}, Mask(torch.ones_like(tokens, dtype=torch.bool)))
    own = model(input_ids=tokens, labels=tokens).loss
    assert loss.total.item() == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize(("make", "implementation"), causal_models())
def test_hidden_content_never_reaches_another_prediction(make, implementation):
    model, bound = (model := built(make, implementation)), NextToken().bind(model)
    keep = torch.rand(3, 12, generator=seeded(1)) < 0.6
    tokens = some_tokens()
    other = torch.where(keep, tokens, some_tokens(seed=5))
    one, two = (bound({"tokens": given}, Mask(keep)) for given in (tokens, other))
    assert not torch.equal(tokens, other)
    assert torch.equal(one.outputs["prediction"], two.outputs["prediction"])
    assert torch.equal(one.total, two.total)


@pytest.mark.parametrize(("make", "implementation"), causal_models())
def test_the_future_never_reaches_a_prediction(make, implementation):
    bound = NextToken().bind(built(make, implementation))
    tokens = some_tokens()
    other = torch.cat([tokens[:, :7], some_tokens(seed=5)[:, 7:]], dim=1)
    for keep in (torch.ones(3, 12, dtype=torch.bool), torch.rand(3, 12, generator=seeded(1)) < 0.7):
        one, two = (bound({"tokens": given}, Mask(keep)).outputs["prediction"] for given in (tokens, other))
        assert torch.equal(one[:, :8], two[:, :8])
        assert not torch.equal(one[:, 8:], two[:, 8:])


@pytest.mark.parametrize(("make", "implementation"), causal_models())
def test_it_is_the_loss_of_each_sequence_without_its_hidden_tokens(make, implementation):
    model, tokens = built(make, implementation), some_tokens()
    keep = torch.rand(3, 12, generator=seeded(1)) < 0.6
    loss = NextToken().bind(model)({"tokens": tokens}, Mask(keep))
    total, count = 0.0, 0
    for row in range(3):
        left = tokens[row, keep[row]]
        logits = model(input_ids=left[None]).logits[0]
        for place in range(1, len(left)):
            total -= logits[place - 1].log_softmax(-1)[left[place]].item()
            count += 1
    assert loss.total.item() == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize(("make", "implementation"), causal_models())
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_tokens_at_the_ends_are_padding_to_transformers(make, implementation, side):
    model, tokens = built(make, implementation), some_tokens()
    visible = torch.arange(12) < 8 if side == "right" else torch.arange(12) >= 4
    keep = visible.expand(3, 12)
    loss = NextToken().bind(model)({"tokens": tokens}, Mask(keep)).total
    labels = torch.where(keep, tokens, -100)
    if side == "left":
        labels[:, 4] = -100  # its only predecessor is padding
    positions = (keep.cumsum(1) - 1).clamp(min=0)
    own = model(input_ids=tokens, attention_mask=keep.long(), position_ids=positions, labels=labels).loss
    assert loss.item() == pytest.approx(own.item(), rel=1e-4)


def test_each_visible_token_is_predicted_from_the_last_visible_one():
    keep = torch.tensor([[False, True, True, False, False, True]])
    assert previous_visible(keep).tolist() == [[-1, -1, 1, 2, 2, 2]]
    tokens = some_tokens(1, 6)
    loss = NextToken().bind(built(llama))({"tokens": tokens}, Mask(keep))
    naive = [-loss.outputs["prediction"][0, i].log_softmax(-1)[tokens[0, i]].item() for i in (2, 5)]
    assert loss.total.item() == pytest.approx(sum(naive) / 2, rel=1e-5)
    assert not loss.outputs["prediction"][0, [0, 1, 3, 4]].any()


def test_the_rule_is_causal_and_visible_or_itself():
    keep = torch.tensor([[True, False, True], [False, False, True]])
    rule = attention_rule(Mask(keep), 3)
    for b in range(2):
        for q in range(3):
            for k in range(3):
                assert bool(rule.keep[b, 0, q, k]) == ((k <= q and bool(keep[b, k])) or k == q)
    assert attention_rule(Mask(torch.ones(2, 3).bool()), 3) is None


def test_an_attention_rule_is_anded_with_causality():
    model, tokens = built(llama), some_tokens(2)
    window = AttentionMask.window(12, 2, 2)
    loss = NextToken().bind(model)({"tokens": tokens}, window)
    keep = window.keep & AttentionMask.causal(12).keep
    logits = model(input_ids=tokens, attention_mask=keep.expand(2, 1, 12, 12), use_cache=False).logits
    naive = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.total.item() == pytest.approx(naive.item(), rel=1e-5)


def test_packed_sequences_are_as_if_alone():
    model = built(llama)
    tokens = some_tokens(1)
    packed = AttentionMask.segments(torch.tensor([[0] * 5 + [1] * 7]))
    prediction = NextToken().bind(model)({"tokens": tokens}, packed).outputs["prediction"]
    alone = (
        NextToken()
        .bind(model)({"tokens": tokens[:, 5:]}, Mask(torch.ones(1, 7).bool()))
        .outputs["prediction"]
    )
    assert torch.allclose(prediction[:, 6:], alone[:, 1:], atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_rule_that_leaves_a_query_alone_stays_finite(implementation):
    # Nobody may look at anything: each token still sees itself, and gradients are numbers.
    model = built(llama, implementation).train()
    blind = AttentionMask(lambda b, h, q, k: (q < 0) & (k < 0), 12)
    loss = NextToken().bind(model)({"tokens": some_tokens()}, blind)
    loss.total.backward()
    assert bool(loss.total.isfinite())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("hidden", [0, 11, 12])
def test_extreme_masks_cost_a_finite_loss(hidden):
    model = built(llama).train()
    keep = (torch.arange(12) >= hidden).expand(3, 12)
    loss = NextToken().bind(model)({"tokens": some_tokens()}, Mask(keep)).total
    loss.backward()
    assert bool(loss.isfinite())
    assert hidden == 0 or float(loss) == 0


def test_masked_models_are_refused():
    with pytest.raises(BackboneMismatch, match="needs a causal language model, and BertForMaskedLM"):
        NextToken().bind(masked_language_model(vocabulary=20, length=8, mask_token=2, **SMALL))


def test_a_rule_of_another_length_is_refused():
    with pytest.raises(MaskShapeError, match="12 tokens must be 12 × 12"):
        NextToken().bind(built(llama))({"tokens": some_tokens()}, AttentionMask.causal(8))


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_it_trains(ratio):
    model = causal_language_model(vocabulary=VOCABULARY, length=12, **SMALL)
    strategy = maskwright.create("mask-strategy", "random", ratio=ratio)
    training = MaskedTraining(model, strategy, maskwright.create("objective", "next-token"))
    optimizer = torch.optim.Adam(training.parameters(), lr=3e-3)
    tokens = (torch.arange(12) + torch.arange(16)[:, None]) % 16
    losses = []
    for _ in range(40):
        loss = training(tokens=tokens)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.4 * losses[0]


def test_by_default_nothing_is_hidden():
    named = dict(NextToken.default_strategy)
    strategy = maskwright.create("mask-strategy", named.pop("name"), **named)
    assert strategy.draw(Layout(2, (9,)), signals={}, progress=0.0, generator=seeded()).keep.all()


# -- samplers --------------------------------------------------------------------------------------------------


def causal_table(tokens):
    """Logits [B, L, 6] of each place from the tokens before it; the mask, 5, is liked best."""
    table = torch.randn(6, 6, generator=seeded(3))
    before = torch.nn.functional.pad(table[tokens].cumsum(1)[:, :-1], (0, 0, 1, 0))
    logits = 2 * torch.tanh(before) + torch.randn(tokens.shape[1], 6, generator=seeded(4))
    logits[..., 5] = 9.0
    return logits


def both_ways_table(tokens):
    table = torch.randn(6, 6, generator=seeded(3))
    logits = torch.tanh(table[tokens].sum(1, keepdim=True)) + torch.randn(
        tokens.shape[1], 6, generator=seeded(4)
    )
    logits[..., 5] = 9.0
    return logits


def prompts():
    return torch.tensor([[0, 5, 5, 5, 5], [1, 2, 3, 5, 5], [4, 3, 2, 1, 0], [2, 5, 1, 5, 3]])


def request(tokens, seed=0, **other):
    return SampleRequest(tokens, 5, seeded(seed), **other)


def naive_left_to_right(tokens):
    """Row by row, place by place: the likeliest real token."""
    rows = []
    for row in tokens.tolist():
        for place, token in enumerate(row):
            if token == 5:
                row[place] = int(causal_table(torch.tensor([row]))[0, place, :5].argmax())
        rows.append(row)
    return rows


def test_greedy_from_left_to_right_is_the_naive_loop():
    samples = Greedy(order="left-to-right").sample(causal_table, request(prompts()))
    assert samples.values.tolist() == naive_left_to_right(prompts())
    assert samples.evaluations == 4
    assert samples.order.tolist() == [[-1, 0, 1, 2, 3], [-1, -1, -1, 0, 1], [-1] * 5, [-1, 0, -1, 1, -1]]


def naive_by_confidence(tokens):
    """Row by row: the surest of all masked places, one after the other."""
    rows = []
    for row in tokens.tolist():
        while 5 in row:
            probability = both_ways_table(torch.tensor([row]))[0, :, :5].softmax(-1)
            best = max((float(probability[i].max()), -i) for i, token in enumerate(row) if token == 5)
            row[-best[1]] = int(probability[-best[1]].argmax())
        rows.append(row)
    return rows


def test_greedy_by_confidence_is_the_naive_loop():
    samples = Greedy().sample(both_ways_table, request(prompts()))
    assert samples.values.tolist() == naive_by_confidence(prompts())
    assert samples.evaluations == 4
    assert sorted(samples.order[0].tolist()) == [-1, 0, 1, 2, 3]


@pytest.mark.parametrize(("steps", "calls"), [(1, 1), (2, 2), (3, 3), (9, 4)])
def test_greedy_in_fewer_calls_fills_the_surest_together(steps, calls):
    samples = Greedy().sample(both_ways_table, request(prompts(), steps=steps))
    assert samples.evaluations == calls
    assert bool((samples.values != 5).all())
    if steps == 1:
        best = both_ways_table(prompts())[..., :5]
        masked = prompts() == 5
        assert torch.equal(samples.values[masked], best.argmax(-1)[masked])
        sure = best.softmax(-1).amax(-1)[0, 1:]
        assert torch.equal(samples.order[0, 1:].argsort(), sure.argsort(descending=True))


@pytest.mark.parametrize(
    "sampler", [Greedy(), Greedy(order="left-to-right")], ids=["confidence", "left-to-right"]
)
def test_greedy_has_no_chance_in_it(sampler):
    one, two = (sampler.sample(causal_table, request(prompts(), seed)).values for seed in (0, 1))
    assert torch.equal(one, two)


def test_top_p_towards_zero_is_greedy():
    greedy = Greedy(order="left-to-right").sample(causal_table, request(prompts()))
    small = TopP(p=1e-9).sample(causal_table, request(prompts(), seed=7))
    assert torch.equal(small.values, greedy.values)
    assert torch.equal(small.order, greedy.order)


def test_a_low_temperature_is_greedy():
    greedy = Greedy(order="left-to-right").sample(causal_table, request(prompts()))
    assert torch.equal(
        TopP(p=1.0, temperature=1e-4).sample(causal_table, request(prompts())).values, greedy.values
    )


def two_token_law(transform):
    """The law of two tokens after the token 0, enumerated: [5, 5]."""
    law = torch.zeros(5, 5, dtype=torch.float64)
    first = transform(causal_table(torch.tensor([[0, 5, 5]]))[0, 1, :5])
    for x in range(5):
        second = transform(causal_table(torch.tensor([[0, x, 5]]))[0, 2, :5])
        law[x] = first[x] * second
    return law.flatten()


def naive_nucleus(logits, p, temperature=1.0):
    probability = (logits.double() / temperature).softmax(-1).tolist()
    kept, mass = [], 0.0
    for k in sorted(range(len(probability)), key=lambda k: -probability[k]):
        kept.append(k)
        mass += probability[k]
        if mass >= p:
            break
    law = [probability[k] / mass if k in kept else 0.0 for k in range(len(probability))]
    return torch.tensor(law, dtype=torch.float64)


@pytest.mark.parametrize(("p", "temperature"), [(1.0, 1.0), (0.7, 1.0), (1.0, 2.0), (0.6, 1.5)])
def test_top_p_samples_its_law(p, temperature):
    tokens = torch.tensor([0, 5, 5]).expand(12_000, 3)
    values = TopP(p=p, temperature=temperature).sample(causal_table, request(tokens)).values
    law = two_token_law(lambda logits: naive_nucleus(logits, p, temperature))
    counts = torch.bincount(values[:, 1] * 5 + values[:, 2], minlength=25)
    possible, often = law > 0, law * 12_000 > 5
    assert counts[~possible].sum() == 0
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    due = torch.cat([law[often], law[~often].sum()[None]]) * 12_000
    assert chisquare(seen[due > 0].numpy(), due[due > 0].numpy()).pvalue > 0.001
    if p < 1:
        assert int(possible.sum()) < 25


def test_the_nucleus_is_the_naive_one():
    logits = torch.randn(30, 9, generator=seeded())
    for p in (0.1, 0.5, 0.9, 0.999, 1.0):
        ours = nucleus(logits, p).double().softmax(-1)
        for row in range(30):
            assert torch.allclose(ours[row], naive_nucleus(logits[row], p), atol=1e-9)


def test_the_nucleus_keeps_classes_that_are_excluded_out():
    assert nucleus(torch.tensor([0.0, -torch.inf, -1.0]), 0.99).tolist() == [0.0, -torch.inf, -1.0]


@pytest.mark.parametrize("sampler", [TopP(), Greedy(), Greedy(order="left-to-right")])
def test_prompts_are_kept_and_nothing_stays_masked(sampler):
    samples = sampler.sample(causal_table, request(prompts()))
    given = prompts() != 5
    assert torch.equal(samples.values[given], prompts()[given])
    assert bool((samples.values < 5).all())
    assert torch.equal(samples.order < 0, given)


def test_draws_are_counted():
    assert TopP().sample(causal_table, request(prompts())).facts == {"categorical_draws": 4 + 2 + 0 + 2}


def test_a_time_conditioned_denoiser_is_given_the_masked_share():
    times = []

    def timed(tokens, time):
        times.append(time.tolist())
        return causal_table(tokens)

    TopP().sample(timed, request(prompts()[:2], time_conditioned=True))
    assert times[0] == pytest.approx([0.8, 0.4])
    assert times[-1] == pytest.approx([0.2, 0.0])


@pytest.mark.parametrize("parameters", [{"p": 0.0}, {"p": 1.1}, {"temperature": 0.0}])
def test_impossible_parameters_are_refused(parameters):
    with pytest.raises(BadParameter):
        TopP(**parameters)
    with pytest.raises(BadParameter, match="confidence, left-to-right"):
        Greedy(order="backwards")


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_greedy_is_what_generate_does(make):
    model = built(make)
    predict = denoiser(maskwright.adapt(model, "token"))
    prompt = some_tokens(2, 3)
    # The placeholder needs no logit: it is an id outside of what the model may say.
    tokens = torch.nn.functional.pad(prompt, (0, 6), value=VOCABULARY)
    samples = Greedy(order="left-to-right").sample(
        lambda tokens: predict(tokens.clamp(max=VOCABULARY - 1)), SampleRequest(tokens, VOCABULARY, seeded())
    )
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(samples.values, generated)


def test_samplers_run_on_a_masked_model():
    model = masked_language_model(vocabulary=20, length=8, mask_token=2, **SMALL).eval()
    predict = denoiser(maskwright.adapt(model, "token"))
    tokens = torch.full((2, 8), 2)
    for sampler in (Greedy(), TopP()):
        samples = sampler.sample(predict, SampleRequest(tokens, 2, seeded()))
        assert bool((samples.values != 2).all())
        assert samples.evaluations == 8
