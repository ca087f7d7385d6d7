"""first_hitting: the time-free loss, hitting times, both samplers against an exactly known law, and their composition."""

import itertools
import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import beta, chisquare, kstest
from torch import nn

import maskwright
from maskwright import Layout, Mask, MaskedTraining, SampleRequest
from maskwright.backbones.defaults import causal_language_model, masked_language_model
from maskwright.backbones.transformers import denoiser
from maskwright.errors import BackboneMismatch
from maskwright.plugins.first_hitting import objective as objectives
from maskwright.plugins.first_hitting import sampler as samplers
from maskwright.plugins.first_hitting.masks import UniformCount, uniform_counts
from maskwright.plugins.first_hitting.objective import MaskedDiffusion, substitution, time_free_nll
from maskwright.plugins.first_hitting.oracle import MarkovChain
from maskwright.plugins.first_hitting.sampler import Ancestral, FirstHitting, hitting_times
from maskwright.testing import conformance
from maskwright.toolkit.schedules import COSINE, LINEAR, SCHEDULES

SMALL = {"width": 32, "depth": 1, "heads": 2}
SAMPLES = 20_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def checks(*components):
    return [
        pytest.param(check, id=f"{component.name}-{name}")
        for component in components
        for name, check in conformance(component)
    ]


@pytest.mark.parametrize("check", checks(UniformCount, MaskedDiffusion, FirstHitting, Ancestral))
def test_conforms(check):
    check()


# -- the mask --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("antithetic", [False, True])
def test_counts_are_uniform_from_one_to_all(antithetic):
    generator = seeded()
    counts = torch.cat([uniform_counts(6, 9, generator, antithetic=antithetic) for _ in range(2000)])
    assert chisquare(torch.bincount(counts, minlength=10)[1:].numpy()).pvalue > 0.001
    first = torch.stack([uniform_counts(6, 9, generator, antithetic=antithetic)[0] for _ in range(3000)])
    assert chisquare(torch.bincount(first, minlength=10)[1:].numpy()).pvalue > 0.001


def test_antithetic_counts_have_one_in_each_stratum():
    for seed in range(20):
        counts = uniform_counts(5, 10, seeded(seed), antithetic=True)
        assert sorted(((counts - 1) // 2).tolist()) == [0, 1, 2, 3, 4]


def test_the_mask_hides_so_many_places_uniformly():
    mask = UniformCount().draw(Layout(6000, (5,)), signals={}, progress=0.0, generator=seeded())
    assert set(mask.counts.tolist()) == {0, 1, 2, 3, 4}
    two = mask.keep[mask.counts == 3]
    places = torch.bincount((two.logical_not() * 2 ** torch.arange(5)).sum(1))
    assert (places > 0).sum() == 10
    assert chisquare(places[places > 0].numpy()).pvalue > 0.001


# -- the objective ---------------------------------------------------------------------------------------------


class Table(nn.Module):
    """A token backbone whose logits for every partially masked sequence are given: states + mask, all enumerated."""

    shift = 0

    def __init__(self, chain, logits=None):
        super().__init__()
        self.chain = chain
        self.table = nn.Parameter(torch.zeros(()) if logits is None else logits)
        self.oracle = logits is None
        self.vocabulary = chain.mask_token + 1
        self.mask_token = chain.mask_token
        self.width = 1

    def embed(self, ids):
        return ids[..., None].double()

    def logits(self, tokens, attention=None, positions=None):
        if self.oracle:
            return self.chain.denoiser(tokens)
        base = self.chain.mask_token + 1
        return self.table[(tokens * base ** torch.arange(tokens.shape[1] - 1, -1, -1)).sum(1)]


def every_mask(length):
    return Mask(~torch.tensor(list(itertools.product([False, True], repeat=length)))[1:])


def bounds_by_count(bound, chain):
    """E over masks of each size of the bound's per-token loss: [S^L, L], for every sequence and n = 1..L."""
    mask = every_mask(chain.length)
    hidden = (~mask).counts
    rows = []
    for tokens in chain.sequences:
        loss = bound({"tokens": tokens.expand(len(hidden), -1)}, mask)
        per_mask = loss.outputs["bound"] / chain.length
        rows.append(torch.stack([per_mask[hidden == n].mean() for n in range(1, chain.length + 1)]))
    return torch.stack(rows)


def test_the_oracles_bound_is_the_likelihood_of_every_sequence():
    chain = MarkovChain.random(0, length=3)
    bound = MaskedDiffusion().bind(Table(chain))
    nll = bounds_by_count(bound, chain).sum(1)
    assert float((nll + chain.law.log()).abs().max()) < 1e-12


@pytest.mark.parametrize("length", [1, 4, 9])
def test_each_count_has_the_same_weight_in_time(length):
    for n in range(1, length + 1):
        integral, _ = quad(lambda t, n=n: t ** (n - 1) * (1 - t) ** (length - n), 0, 1)
        assert math.comb(length, n) * integral == pytest.approx(1 / n, rel=1e-10)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_time_weighted_loss_has_the_same_expectation(schedule):
    # Any network, here a random table; the weight -α'/(1 - α) written out for each schedule.
    chain = MarkovChain.random(1, length=3)
    logits = torch.randn(len(chain.partial), 3, 4, generator=seeded(), dtype=torch.float64)
    bound = MaskedDiffusion().bind(Table(chain, logits))
    mask = every_mask(3)
    hidden = (~mask).counts.double()
    tokens = chain.sequences[11].expand(len(hidden), -1)
    mean = bound({"tokens": tokens}, mask).outputs["bound"] / 3
    time_free = float(sum(mean[hidden == n].mean() for n in (1, 2, 3)))

    def weighted(t):
        share, weight = {
            "linear": (t, 1 / t),
            "cosine": (math.cos(math.pi * (1 - t) / 2), math.pi / 2 * math.tan(math.pi * (1 - t) / 2)),
        }[schedule]
        chance = share**hidden * (1 - share) ** (3 - hidden)
        return weight * float((chance * mean * hidden).sum())

    assert quad(weighted, 0, 1)[0] == pytest.approx(time_free, rel=1e-8)


def test_each_samples_loss_is_the_mean_over_its_hidden_tokens():
    model = masked_language_model(vocabulary=20, length=8, mask_token=2, **SMALL).eval()
    tokens = torch.randint(3, 20, (3, 8), generator=seeded())
    keep = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1, 1]]).bool()
    loss = MaskedDiffusion().bind(model)({"tokens": tokens}, Mask(keep))
    shown = tokens.where(keep, torch.tensor(2))
    logits = model(input_ids=shown).logits.detach()
    logits[..., 2] = -torch.inf
    each = []
    for row in range(3):
        nll = [-float(logits[row, i].log_softmax(-1)[tokens[row, i]]) for i in range(8) if not keep[row, i]]
        each.append(sum(nll) / len(nll))
    assert float(loss.total) == pytest.approx(sum(each) / 3, rel=1e-5)
    assert loss.outputs["bound"].tolist() == pytest.approx([8 * one for one in each], rel=1e-5)
    assert float(loss.parts["nll"]) == float(loss.total)


def test_nothing_hidden_costs_exactly_nothing():
    model = masked_language_model(vocabulary=20, length=8, mask_token=2, **SMALL)
    loss = MaskedDiffusion().bind(model)({"tokens": torch.full((2, 8), 5)}, Mask(torch.ones(2, 8).bool()))
    assert float(loss.total) == 0
    loss.total.backward()


def test_a_mask_token_in_the_data_is_no_target():
    model = masked_language_model(vocabulary=20, length=4, mask_token=2, **SMALL)
    tokens = torch.tensor([[5, 2, 7, 2]])
    bound = MaskedDiffusion().bind(model)
    with_it = bound({"tokens": tokens}, Mask(torch.tensor([[True, False, False, True]])))
    without = bound({"tokens": tokens}, Mask(torch.tensor([[True, True, False, True]])))
    assert bool(with_it.total.isfinite())
    assert float(with_it.total) == pytest.approx(float(without.total))


def test_substitution_forbids_the_mask_and_carries_over():
    logits = torch.randn(1, 3, 5, generator=seeded())
    log_mu = substitution(logits, torch.tensor([[1, 4, 0]]), mask_token=4)
    assert log_mu[0, 0].exp().tolist() == [0, 1, 0, 0, 0]
    assert log_mu[0, 2].exp().tolist() == [1, 0, 0, 0, 0]
    assert torch.allclose(log_mu[0, 1, :4], logits[0, 1, :4].log_softmax(-1))
    assert log_mu[0, 1, 4] == -torch.inf


def test_gradients_are_finite_and_reach_the_backbone():
    model = masked_language_model(vocabulary=20, length=8, mask_token=2, **SMALL)
    tokens = torch.randint(3, 20, (3, 8), generator=seeded())
    mask = UniformCount().draw(Layout(3, (8,)), signals={}, progress=0.0, generator=seeded())
    MaskedDiffusion().bind(model)({"tokens": tokens}, mask).total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert any(float(g.abs().max()) > 0 for g in gradients)


def test_a_model_without_a_mask_token_is_refused():
    with pytest.raises(BackboneMismatch, match="needs a mask token, and LlamaForCausalLM names none"):
        MaskedDiffusion().bind(causal_language_model(vocabulary=20, length=8, **SMALL))
    with pytest.raises(BackboneMismatch, match="20 is outside the vocabulary of 20"):
        MaskedDiffusion().bind(causal_language_model(vocabulary=20, length=8, mask_token=20, **SMALL))


@pytest.mark.parametrize(("strategy", "parameters"), [("uniform-count", {}), ("random", {"ratio": 0.5})])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_it_trains_with_any_strategy_on_any_language_model(strategy, parameters, kind):
    make = {"bert": masked_language_model, "llama": causal_language_model}[kind]
    model = make(vocabulary=20, length=8, mask_token=2, **SMALL)
    training = MaskedTraining(
        model,
        maskwright.create("mask-strategy", strategy, **parameters),
        maskwright.create("objective", "masked-diffusion"),
    )
    optimizer = torch.optim.Adam(training.parameters(), lr=1e-2)
    tokens = (torch.arange(16).view(2, 8) + 3).repeat(8, 1)
    losses = []
    for _ in range(60):
        loss = training(tokens=tokens)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


# -- hitting times ---------------------------------------------------------------------------------------------


def naive_times(count, u, schedule):
    """The recursion 1 - α(t') = u^(1/n) (1 - α(t)), one event after the other, in plain numbers."""
    t, times = 1.0, []
    for n, number in zip(range(count, 0, -1), u):
        if schedule == "linear":
            t = t * number ** (1 / n)
        else:
            t = 1 - 2 / math.pi * math.acos(number ** (1 / n) * math.cos(math.pi * (1 - t) / 2))
        times.append(t)
    return times


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LINEAR, (0.974004, 0.652030, 0.505060, 0.025253)),
        (COSINE, (0.854522, 0.452165, 0.337059, 0.016078)),
    ],
    ids=["linear", "cosine"],
)
def test_hitting_times_have_the_known_numbers(schedule, expected):
    u = torch.tensor([[0.9, 0.3, 0.6, 0.05]], dtype=torch.float64)
    times = hitting_times(torch.tensor([4]), u, schedule)
    assert times[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert naive_times(4, u[0].tolist(), schedule.name) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_hitting_times_are_the_naive_recursion_for_every_row(name):
    counts = torch.tensor([5, 3, 0, 1])
    u = torch.rand(4, 5, generator=seeded(), dtype=torch.float64)
    times = hitting_times(counts, u, SCHEDULES[name])
    for row, count in enumerate(counts.tolist()):
        assert times[row, :count].tolist() == pytest.approx(
            naive_times(count, u[row].tolist(), name), abs=1e-7
        )
        assert len(set(times[row, max(count - 1, 0) :].tolist())) == 1  # it stays after the last event


class Clock:
    """A time-conditioned denoiser that notes the times it is given; `table` is what it answers."""

    def __init__(self, table):
        self.table, self.times = table, []

    def __call__(self, tokens, time):
        self.times.append(time.double())
        return self.table(tokens)


def recorded_times(count=4000, length=4, schedule="linear"):
    chain = MarkovChain.random(0, length=length)
    clock = Clock(chain.denoiser)
    request = SampleRequest(chain.blank(count), chain.mask_token, seeded(), time_conditioned=True)
    FirstHitting(schedule=schedule).sample(clock, request)
    return torch.stack(clock.times, dim=1)


def order_statistics_hold(times, schedule):
    """Whether 1 - α of the k-th time has the law of the k-th largest of L uniforms, Beta(L + 1 - k, k), for each k."""
    share = SCHEDULES[schedule].hidden(times)
    length = times.shape[1]
    each = [kstest(share[:, k].numpy(), beta(length - k, k + 1).cdf).pvalue for k in range(length)]
    return min(each) > 0.001


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_times_are_descending_order_statistics_of_uniforms(schedule):
    times = recorded_times(schedule=schedule)
    assert bool((times.diff(dim=1) < 0).all())
    assert order_statistics_hold(times, schedule)
    if schedule == "linear":
        expected = torch.tensor([(4 + 1 - k) / (4 + 1) for k in (1, 2, 3, 4)], dtype=torch.float64)
        assert torch.allclose(times.mean(0), expected, atol=0.01)


def wrong_times(exponent):
    """A hitting time that is not the paper's: u^exponent(n) in place of u^(1/n)."""

    def times(counts, u, schedule):
        left = counts[:, None] - torch.arange(u.shape[1])
        factor = torch.where(left > 0, u ** exponent(left.clamp(min=1)), 1.0)
        return schedule.time(factor.cumprod(1))

    return times


WRONG = {
    "no root at all": lambda n: 1.0 + 0 * n,
    "the count after the reveal": lambda n: 1 / (n - 1).clamp(min=1),
    "the count from the start": lambda n: 1 / n.amax(),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_hitting_times_are_no_order_statistics(name, monkeypatch):
    monkeypatch.setattr(samplers, "hitting_times", wrong_times(WRONG[name]))
    assert not order_statistics_hold(recorded_times(), "linear")


# -- the law of the samples ------------------------------------------------------------------------------------


def p_value(chain, values, law):
    counts = torch.bincount(chain.number(values), minlength=len(law))
    assert float(law.min()) * len(values) > 5
    return chisquare(counts.numpy(), (law * len(values)).numpy()).pvalue


def draw(chain, sampler, *, seed=0, count=SAMPLES, denoise=None, **request):
    generator = seeded(seed)
    return sampler.sample(
        denoise or chain.denoiser, SampleRequest(chain.blank(count), chain.mask_token, generator, **request)
    )


def test_the_oracle_is_the_posterior_by_brute_force():
    chain = MarkovChain.random(2, length=3)
    assert float(chain.law.sum()) == pytest.approx(1)
    for tokens in torch.tensor([[3, 1, 3], [0, 3, 2], [3, 3, 3]]):
        probability = chain.denoiser(tokens[None])[0].exp()
        for place in range(3):
            weights = torch.zeros(3, dtype=torch.float64)
            for x in itertools.product(range(3), repeat=3):
                if all(t in (3, v) for t, v in zip(tokens.tolist(), x)):
                    p = chain.start[x[0]] * chain.transition[x[0], x[1]] * chain.transition[x[1], x[2]]
                    weights[x[place]] += p
            assert torch.allclose(probability[place, :3], weights / weights.sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_first_hitting_samples_the_chain(seed, schedule):
    chain = MarkovChain.random(seed)
    assert p_value(chain, draw(chain, FirstHitting(schedule=schedule), seed=seed).values, chain.law) > 0.001


def test_ancestral_at_1000_steps_samples_the_chain():
    chain = MarkovChain.random(0, length=3)
    assert p_value(chain, draw(chain, Ancestral(), steps=1000).values, chain.law) > 0.001


def test_ancestral_at_few_steps_has_its_own_exact_law():
    chain = MarkovChain.random(0, length=3)
    samples = draw(chain, Ancestral(end=0.0), steps=3).values
    assert p_value(chain, samples, chain.ancestral_law(3)) > 0.001
    assert p_value(chain, samples, chain.law) < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ancestral_of_two_tokens_mixes_the_law_with_independence(steps):
    chain = MarkovChain.random(3, length=2)
    joint = chain.law.view(3, 3)
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    mixed = (independent / steps + (1 - 1 / steps) * joint).flatten()
    assert float((chain.ancestral_law(steps) - mixed).abs().max()) < 1e-12
    assert p_value(chain, draw(chain, Ancestral(end=0.0), steps=steps).values, mixed) > 0.001
    assert p_value(chain, draw(chain, FirstHitting()).values, chain.law) > 0.001


def test_parallel_decoding_is_independent_within_a_call():
    # Two tokens in one call: the product of the marginals. Two calls of one each: the joint law.
    chain = MarkovChain.random(3, length=2)
    joint = chain.law.view(3, 3)
    independent = (joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)).flatten()
    together = draw(chain, FirstHitting(), steps=1)
    assert together.evaluations == 1
    assert p_value(chain, together.values, independent) > 0.001
    assert p_value(chain, together.values, chain.law) < 1e-6
    assert p_value(chain, draw(chain, FirstHitting(), steps=2).values, chain.law) > 0.001


# A denoiser without time cannot show when a token was revealed: with it the law of the samples is right for *any* times. So the
# times are tested twice: as order statistics, above, and here through a denoiser that does depend on time. Before t = 1/2 (seen
# from t = 1) it is the posterior of one chain, then that of another. With the true times each token's 1 - α is an independent
# uniform, so each token is early with chance q = 1 - (1 - α(1/2)), and
# p(x) = Σ over sets S of early tokens of q^|S| (1 - q)^(L - |S|) p_one(x_S) p_two(x_rest | x_S).


class TwoChains:
    def __init__(self, one, two):
        self.one, self.two = one, two

    def __call__(self, tokens, time):
        early = (time > 0.5)[:, None, None]
        return torch.where(early, self.one.denoiser(tokens), self.two.denoiser(tokens))

    def law(self, schedule):
        q = 1 - float(SCHEDULES[schedule].hidden(torch.tensor(0.5, dtype=torch.float64)))
        length = self.one.length
        law = torch.zeros_like(self.one.law)
        for early in itertools.product([False, True], repeat=length):
            early = torch.tensor(early)
            seen = self.one.sequences.masked_fill(~early, self.one.mask_token)
            alike = (seen[:, None] == seen[None]).all(-1).double()
            first = alike @ self.one.law
            second = self.two.law / (alike @ self.two.law)
            law += q ** int(early.sum()) * (1 - q) ** int((~early).sum()) * first * second
        return law


def two_chains():
    return TwoChains(MarkovChain.random(0, length=3), MarkovChain.random(5, length=3))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_time_conditioned_denoiser_gives_its_own_law(schedule):
    pair = two_chains()
    law = pair.law(schedule)
    assert float(law.sum()) == pytest.approx(1)
    drawn = draw(pair.one, FirstHitting(schedule=schedule), denoise=pair, time_conditioned=True)
    assert p_value(pair.one, drawn.values, law) > 0.001
    other = next(name for name in SCHEDULES if name != schedule)
    assert p_value(pair.one, drawn.values, pair.law(other)) < 1e-6


def test_ancestral_gives_the_time_conditioned_law_as_well():
    pair = two_chains()
    drawn = draw(pair.one, Ancestral(), denoise=pair, time_conditioned=True, steps=200, count=8000)
    assert p_value(pair.one, drawn.values, pair.law("linear")) > 0.001


@pytest.mark.parametrize("name", WRONG)
def test_wrong_hitting_times_give_another_law(name, monkeypatch):
    monkeypatch.setattr(samplers, "hitting_times", wrong_times(WRONG[name]))
    pair = two_chains()
    drawn = draw(pair.one, FirstHitting(), denoise=pair, time_conditioned=True)
    assert p_value(pair.one, drawn.values, pair.law("linear")) < 0.001


# -- calls, draws, order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [None, 4, 3, 1, 9])
def test_first_hitting_calls_and_draws(steps):
    chain = MarkovChain.random(0)
    calls = []

    def counted(tokens):
        calls.append(1)
        return chain.denoiser(tokens)

    samples = draw(chain, FirstHitting(), count=50, denoise=counted, steps=steps)
    assert samples.evaluations == len(calls) == min(steps or 4, 4)
    assert samples.facts["categorical_draws"] == 50 * 4
    assert int(samples.values.max()) < chain.mask_token
    assert torch.equal(samples.order.sort(1).values, torch.arange(4).expand(50, 4))


def test_the_order_is_uniform_whatever_the_denoiser():
    def biased(tokens):
        logits = torch.zeros(*tokens.shape, 4, dtype=torch.float64)
        logits[:, 0, 0] = 9.0  # sure of its first place
        return logits

    request = SampleRequest(torch.full((12_000, 4), 3), 3, seeded())
    order = FirstHitting().sample(biased, request).order
    permutations = torch.bincount((order * 4 ** torch.arange(4)).sum(1))
    permutations = permutations[permutations > 0]
    assert len(permutations) == 24
    assert chisquare(permutations.numpy()).pvalue > 0.001


@pytest.mark.parametrize("sampler", [FirstHitting(), Ancestral(steps=20)], ids=["first-hitting", "ancestral"])
def test_prompts_of_different_lengths_are_kept(sampler):
    chain = MarkovChain.random(0)
    tokens = torch.tensor([[0, 3, 3, 2], [3, 3, 3, 3], [1, 2, 0, 1], [3, 2, 3, 3]])
    samples = sampler.sample(chain.denoiser, SampleRequest(tokens, 3, seeded()))
    prompt = tokens != 3
    assert torch.equal(samples.values[prompt], tokens[prompt])
    assert bool((samples.values != 3).all())
    assert torch.equal(samples.order == -1, prompt)
    if sampler.name == "first-hitting":
        assert samples.evaluations == 4
        assert samples.facts["categorical_draws"] == 2 + 4 + 0 + 3
        assert sorted(samples.order[3].tolist()) == [-1, 0, 1, 2]
    assert tokens[1].tolist() == [3, 3, 3, 3]  # the request is not written into


@pytest.mark.parametrize("sampler", [FirstHitting(), Ancestral()], ids=["first-hitting", "ancestral"])
def test_a_full_prompt_needs_no_call(sampler):
    samples = sampler.sample(None, SampleRequest(torch.tensor([[1, 2]]), 3, seeded()))
    assert samples.evaluations == 0
    assert samples.values.tolist() == [[1, 2]]


def test_a_prompt_conditions_the_rest():
    chain = MarkovChain.random(0)
    tokens = torch.tensor([3, 1, 3, 2]).expand(SAMPLES, -1)
    given = (chain.sequences[:, 1] == 1) & (chain.sequences[:, 3] == 2)
    law = chain.law[given] / chain.law[given].sum()
    for sampler, count in ((FirstHitting(), SAMPLES), (Ancestral(steps=200), 4000)):
        values = sampler.sample(chain.denoiser, SampleRequest(tokens[:count], 3, seeded())).values
        counts = torch.bincount(chain.number(values), minlength=81)[given]
        assert chisquare(counts.numpy(), (law * count).numpy()).pvalue > 0.001


def test_cached_ancestral_calls_only_after_a_change():
    chain = MarkovChain.random(0)
    calls = {}
    for cache in (True, False):
        counts = [
            draw(chain, Ancestral(cache=cache, steps=30), seed=seed, count=1).evaluations
            for seed in range(150)
        ]
        calls[cache] = sum(counts) / len(counts)
    expected = 30 * (1 - (1 - 1 / 30) ** 4)
    assert calls[True] == pytest.approx(expected, rel=0.03)
    # Without a cache it calls at each step until nothing is masked: the largest of 4 uniform step numbers.
    last = sum(1 - (k / 30) ** 4 for k in range(30))
    assert calls[False] == pytest.approx(last, rel=0.06)


def test_the_cache_changes_nothing_but_the_calls():
    chain = MarkovChain.random(0)
    one, two = (draw(chain, Ancestral(cache=cache, steps=40), count=3) for cache in (True, False))
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.order, two.order)
    assert one.facts == two.facts
    assert one.evaluations < two.evaluations


def test_a_time_conditioned_denoiser_is_never_cached():
    chain = MarkovChain.random(0)
    clock = Clock(chain.denoiser)
    samples = draw(chain, Ancestral(steps=40), count=1, denoise=clock, time_conditioned=True)
    assert samples.evaluations == len(clock.times) == int(samples.order.max()) + 1
    assert [float(time[0]) for time in clock.times] == pytest.approx(
        [1 - i * (1 - 1e-5) / 40 for i in range(len(clock.times))], abs=1e-6
    )


def test_leftovers_take_their_most_likely_token():
    # One step that ends at t = 0.9: most tokens are left, and the argmax fills them.
    chain = MarkovChain.random(0)
    samples = draw(chain, Ancestral(steps=1, end=0.9), count=2000)
    left = samples.order == 1
    assert 0.85 < float(left.double().mean()) < 0.95
    untouched = left.all(1)
    best = chain.denoiser(chain.blank(1))[0, :, :3].argmax(-1)
    assert bool((samples.values[untouched] == best).all())


@pytest.mark.parametrize("sampler", [FirstHitting(), Ancestral(steps=30)], ids=["first-hitting", "ancestral"])
def test_a_seed_decides_and_nothing_global_moves(sampler):
    chain = MarkovChain.random(0)
    before = torch.random.get_rng_state()
    one, again, other = (draw(chain, sampler, seed=seed, count=30).values for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


# -- precision -------------------------------------------------------------------------------------------------


def test_coarse_uniforms_lower_the_entropy_of_ancestral_far_more():
    classes = 64
    law = 1 / torch.arange(1, classes + 1, dtype=torch.float64)
    law /= law.sum()
    true = float(-torch.special.xlogy(law, law).sum())

    def denoise(tokens):
        return torch.nn.functional.pad(law.log(), (0, 1)).expand(*tokens.shape, classes + 1)

    def entropy(sampler):
        values = sampler.sample(
            denoise, SampleRequest(torch.full((500, 8), classes), classes, seeded())
        ).values
        counts = torch.bincount(values.flatten(), minlength=classes).double()
        share = counts / counts.sum()
        return float(-torch.special.xlogy(share, share).sum())

    hitting = {bits: entropy(FirstHitting(bits=bits)) for bits in (8, 53)}
    stepped = {bits: entropy(Ancestral(bits=bits, steps=32)) for bits in (8, 53)}
    assert hitting[53] == pytest.approx(true, abs=0.04)
    assert stepped[53] == pytest.approx(true, abs=0.04)
    assert hitting[8] < true - 0.1
    assert stepped[8] < hitting[8] - 0.3


# -- with real models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("sampler", [FirstHitting(), Ancestral(steps=16)], ids=["first-hitting", "ancestral"])
def test_samplers_run_on_language_models(kind, sampler):
    make = {"bert": masked_language_model, "llama": causal_language_model}[kind]
    backbone = maskwright.adapt(make(vocabulary=20, length=8, mask_token=2, **SMALL).eval(), "token")
    tokens = torch.full((3, 8), 2)
    tokens[:, 0] = 5
    samples = sampler.sample(denoiser(backbone), SampleRequest(tokens, 2, seeded()))
    assert samples.values.shape == (3, 8)
    assert bool((samples.values != 2).all())
    assert bool((samples.values[:, 0] == 5).all())
    assert samples.evaluations <= 16 + 1


def test_a_trained_denoiser_continues_what_it_learned():
    model = masked_language_model(vocabulary=25, length=6, mask_token=24, width=32, depth=2, heads=2)
    training = MaskedTraining(model, UniformCount(), MaskedDiffusion())
    optimizer = torch.optim.Adam(training.parameters(), lr=1e-2)
    texts = torch.arange(24).view(4, 6)
    for _ in range(200):
        loss = training(tokens=texts.repeat(4, 1))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prompt = torch.full((4, 6), 24)
    prompt[:, 2] = texts[:, 2]
    backbone = maskwright.adapt(model.eval(), "token")
    samples = FirstHitting().sample(denoiser(backbone), SampleRequest(prompt, 24, seeded()))
    assert float((samples.values == texts).double().mean()) > 0.9


def test_the_equations_work_alone():
    nll = torch.tensor([[1.0, 2.0, 4.0], [5.0, 1.0, 1.0]])
    hidden = torch.tensor([[True, False, True], [False, False, False]])
    assert time_free_nll(nll, hidden).tolist() == [2.5, 0.0]
    assert (MaskedDiffusion,) == objectives.COMPONENTS
