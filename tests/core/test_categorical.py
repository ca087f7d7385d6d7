"""Float64 categorical draws, the law of cut Gumbel numbers, and the schedules of masking."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from maskwright import SampleRequest
from maskwright.errors import BackboneMismatch, BadData, BadParameter
from maskwright.toolkit.categorical import (
    categorical,
    gumbel_argmax,
    largest_gumbel,
    truncated_gumbel_law,
    uniforms,
)
from maskwright.toolkit.denoising import Asked, log_probabilities, without_mask
from maskwright.toolkit.schedules import COSINE, LINEAR, SCHEDULES, groups


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def zipf(classes):
    weights = 1 / torch.arange(1, classes + 1, dtype=torch.float64)
    return weights / weights.sum()


def entropy(law):
    return float(-torch.special.xlogy(law, law).sum())


# -- uniforms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 8, 11, 24, 52, 53])
def test_uniforms_lie_on_their_grid_strictly_inside(bits):
    u = uniforms((200_000,), seeded(), bits=bits)
    assert u.dtype == torch.float64
    assert u.min() >= 2.0**-bits
    assert u.max() <= 1 - 2.0**-bits
    assert bool((u * 2**bits == (u * 2**bits).round()).all())
    assert bool(u.log().neg().log().isfinite().all())


def test_a_coarse_uniform_reaches_its_ends():
    cells = (uniforms((20_000,), seeded(), bits=4) * 16).long()
    counts = torch.bincount(cells, minlength=16)
    assert counts[0] == 0
    assert chisquare(counts[2:].numpy()).pvalue > 0.001
    assert counts[1] > 1.7 * counts[2:].double().mean()  # zero's share joined it


def test_53_bits_use_the_whole_grain():
    scaled = uniforms((1000,), seeded()) * 2**52
    assert 300 < int((scaled != scaled.floor()).sum()) < 700


@pytest.mark.parametrize("bits", [1, 0, 54])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(BadParameter, match="between 2 and 53"):
        uniforms((3,), seeded(), bits=bits)


def test_only_the_generator_moves():
    before = torch.random.get_rng_state()
    logits = torch.randn(5, 7, generator=seeded())
    first, again = categorical(logits, seeded(3)), categorical(logits, seeded(3))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(
        categorical(logits.expand(40, 5, 7), seeded(3)), categorical(logits.expand(40, 5, 7), seeded(4))
    )


# -- draws -----------------------------------------------------------------------------------------------------


def test_draws_follow_their_law():
    law = torch.tensor([0.02, 0.08, 0.2, 0.7])
    drawn = categorical(law.log().expand(40_000, 4) + 3.0, seeded())  # unnormalised
    assert chisquare(torch.bincount(drawn, minlength=4).numpy(), (law * 40_000).numpy()).pvalue > 0.001


def test_rows_have_their_own_law():
    logits = torch.tensor([[[0.0, -torch.inf], [-torch.inf, 0.0]], [[-torch.inf, 5.0], [5.0, -torch.inf]]])
    assert categorical(logits, seeded()).tolist() == [[0, 1], [1, 0]]
    assert categorical(logits.expand(50, 2, 2, 2), seeded()).shape == (50, 2, 2)


def test_draws_are_the_naive_gumbel_max():
    logits = torch.randn(6, 5, generator=seeded(1))
    u = uniforms((6, 5), seeded(2))
    naive = []
    for row in range(6):
        scores = [float(logits[row, k]) - math.log(-math.log(float(u[row, k]))) for k in range(5)]
        naive.append(scores.index(max(scores)))
    assert categorical(logits, seeded(2)).tolist() == gumbel_argmax(logits, u).tolist() == naive


def test_small_classes_survive_at_53_bits_and_not_at_11():
    # A class of weight 1e-5 beside one of weight 1: it would need a Gumbel number beyond 7.6 to win.
    rows = torch.tensor([1e-5, 1.0]).log().expand(1_000_000, 2)
    fine = int((categorical(rows, seeded()) == 0).sum())
    assert 1 <= fine <= 30
    # At 11 bits it can win only where the large one's number is low.
    expected = truncated_gumbel_law(torch.tensor([1e-5, 1.0]) / 1.00001, largest_gumbel(11))
    assert float(expected[0]) < 1e-12
    assert int((categorical(rows, seeded(), bits=11) == 0).sum()) == 0


# -- the law of cut Gumbel numbers -----------------------------------------------------------------------------


def naive_law(probabilities, largest):
    """The formula as it is written, one sum after the other."""
    e = math.exp(-largest)
    order = sorted(range(len(probabilities)), key=lambda k: probabilities[k])
    pi = [0.0, *(probabilities[k] for k in order)]
    classes = len(probabilities)
    law = [0.0] * classes
    for n in range(1, classes + 1):
        total = 0.0
        for i in range(1, n + 1):
            rest = sum(pi[i:])
            before = math.exp(-e * rest / pi[i - 1]) if pi[i - 1] > 0 else 0.0
            total += math.exp((classes + 1 - i) * e) * (math.exp(-e * rest / pi[i]) - before) / rest
        law[order[n - 1]] = pi[n] * total
    return law


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (1.0, (8.947e-10, 0.002717, 0.087983, 0.909301)),
        (2.0, (3.957e-5, 0.023342, 0.153238, 0.823380)),
        (4.0, (0.008612, 0.068208, 0.195205, 0.727975)),
    ],
)
def test_the_law_has_the_known_numbers(largest, expected):
    law = truncated_gumbel_law(torch.tensor([0.02, 0.08, 0.2, 0.7], dtype=torch.float64), largest)
    assert law.tolist() == pytest.approx(expected, rel=5e-4, abs=6e-7)
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)


def test_float32_grain_hardly_moves_four_classes():
    # The largest deviation, 1.0729e-7, was computed with 40 digits.
    pi = torch.tensor([0.02, 0.08, 0.2, 0.7], dtype=torch.float64)
    assert float((truncated_gumbel_law(pi, largest_gumbel(24)) - pi).abs().max()) == pytest.approx(
        1.0729e-7, rel=1e-4
    )
    assert float((truncated_gumbel_law(pi, largest_gumbel(53)) - pi).abs().max()) < 1e-15


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6), st.floats(0.0, 6.0))
@settings(max_examples=60, deadline=None)
def test_the_law_is_the_naive_sum(weights, largest):
    pi = torch.tensor(weights, dtype=torch.float64)
    pi = pi / pi.sum()
    law = truncated_gumbel_law(pi, largest)
    assert law.tolist() == pytest.approx(naive_law(pi.tolist(), largest), abs=1e-10)
    assert float(law.sum()) == pytest.approx(1, abs=1e-9)
    assert float(law[pi.argmax()]) >= float(pi.max()) - 1e-9


def test_the_law_takes_batches_ties_and_zeros():
    laws = truncated_gumbel_law(torch.tensor([[0.5, 0.0, 0.5], [0.25, 0.5, 0.25]]), 1.0)
    assert laws[0].tolist() == pytest.approx([0.5, 0.0, 0.5])
    assert float(laws[1, 0]) == pytest.approx(float(laws[1, 2]))
    assert float(laws[1, 1]) > 0.5


@pytest.mark.parametrize(("bits", "largest"), [(24, 16.6355), (53, 36.7368), (11, 7.6244), (8, 5.5432)])
def test_the_largest_gumbel_of_each_grain(bits, largest):
    assert largest_gumbel(bits) == pytest.approx(largest, abs=5e-5)
    top = torch.tensor(1 - 2.0**-bits, dtype=torch.float64)
    assert float(-(-top.log()).log()) == pytest.approx(largest_gumbel(bits))


def gridded_law(probabilities, bits):
    """The exact law of Gumbel-max with uniforms k/2^bits (zero counted as one): class by class, cell by cell."""
    cells = 2**bits
    grid = [-math.log(-math.log(k / cells)) for k in range(1, cells)]
    share = [(2 if k == 1 else 1) / cells for k in range(1, cells)]

    def below(x):
        """The share of the grid that is at most x."""
        return sum(part for value, part in zip(grid, share) if value <= x)

    logs = [math.log(p) for p in probabilities]
    return [
        sum(
            part * math.prod(below(value + mine - other) for m, other in enumerate(logs) if m != n)
            for value, part in zip(grid, share)
        )
        for n, mine in enumerate(logs)
    ]


def test_coarse_draws_follow_the_law_of_their_grain():
    pi = torch.tensor([0.0213, 0.0791, 0.2034, 0.6962], dtype=torch.float64)  # no two numbers tie
    counts = torch.bincount(categorical(pi.log().expand(60_000, 4), seeded(), bits=4), minlength=4).numpy()
    law = torch.tensor(gridded_law(pi.tolist(), 4))
    assert float(law.sum()) == pytest.approx(1)
    assert chisquare(counts, (law * 60_000).numpy()).pvalue > 0.001
    assert chisquare(counts, (pi * 60_000).numpy()).pvalue < 1e-6


def test_the_grain_errs_as_the_cut_does_but_less():
    # The largest number of a grain has a share of its own; the law of the cut spreads it over all others.
    pi = torch.tensor([0.0213, 0.0791, 0.2034, 0.6962], dtype=torch.float64)
    for bits in (4, 6):
        cut, grain = (
            truncated_gumbel_law(pi, largest_gumbel(bits)),
            torch.tensor(gridded_law(pi.tolist(), bits)),
        )
        assert entropy(cut) < entropy(grain) < entropy(pi)


@pytest.mark.parametrize(
    ("steps", "bits", "expected"),
    [
        (None, 24, 7.552),
        (None, 53, 7.566),
        (64, 24, 6.903),
        (1000, 24, 5.319),
        (10_000, 24, 3.907),
        (1000, 53, 7.566),
    ],
)
def test_the_entropy_that_is_left_over_50257_classes(steps, bits, expected):
    pi = zipf(50_257)
    classes = pi if steps is None else torch.cat([pi / steps, torch.tensor([1 - 1 / steps]).double()])
    law = truncated_gumbel_law(classes, largest_gumbel(bits))[: len(pi)]
    assert entropy(law / law.sum()) == pytest.approx(expected, abs=5e-4)
    if (steps, bits) == (1000, 24):
        assert float(law.sum()) * steps == pytest.approx(
            0.64, abs=5e-4
        )  # tokens leave later than they are due


# -- schedules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_time_inverts_the_hidden_share(schedule):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    share = schedule.hidden(t)
    assert torch.allclose(schedule.time(share), t, atol=1e-7)
    assert share[0] == 0
    assert share[-1] == 1
    assert bool((share.diff() > 0).all())
    assert torch.equal(schedule.alpha(t), 1 - share)


def test_the_cosine_is_the_papers():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(COSINE.alpha(t), 1 - torch.cos(math.pi * (1 - t) / 2))
    assert torch.equal(LINEAR.alpha(t), 1 - t)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.one_of(st.none(), st.integers(1, 25)))
@settings(max_examples=80, deadline=None)
def test_groups_share_the_events_evenly(counts, steps):
    sizes = groups(torch.tensor(counts), steps)
    calls = min(max(counts), steps or max(counts))
    assert sizes.shape == (len(counts), calls)
    assert sizes.sum(1).tolist() == counts
    for count, row in zip(counts, sizes.tolist()):
        mine = min(count, calls)
        assert row[mine:] == [0] * (calls - mine)
        assert all(size in (count // max(mine, 1), -(-count // max(mine, 1))) for size in row[:mine])
        assert 0 not in row[:mine]


# -- denoisers -------------------------------------------------------------------------------------------------


def test_log_probabilities_leave_the_mask_out():
    logits = torch.randn(2, 3, 5, generator=seeded())
    before = logits.clone()
    log_mu = log_probabilities(logits, 2)
    assert torch.equal(logits, before)
    assert log_mu.dtype == torch.float64
    assert bool((log_mu[..., 2] == -torch.inf).all())
    assert torch.allclose(log_mu.exp().sum(-1), torch.ones(2, 3).double())
    assert torch.equal(without_mask(logits, 2)[..., :2], logits[..., :2].double())
    assert torch.allclose(log_probabilities(logits, 5), logits.double().log_softmax(-1))


def test_a_denoiser_is_counted_and_given_time_only_when_it_wants_it():
    seen = []

    def denoiser(tokens, **given):
        seen.append(given)
        tokens.zero_()  # what it does to its own copy is its affair
        return torch.zeros(*tokens.shape, 4)

    tokens = torch.tensor([[1, 3]])
    for timed in (False, True):
        asked = Asked(denoiser, SampleRequest(tokens, 3, seeded(), time_conditioned=timed))
        asked(tokens, torch.ones(1, dtype=torch.float64))
        assert asked.calls == 1
    assert seen[0] == {}
    assert seen[1]["time"].dtype == torch.float32
    assert tokens.tolist() == [[1, 3]]


def test_a_denoiser_of_another_shape_is_refused():
    tokens = torch.tensor([[1, 3]])
    asked = Asked(lambda tokens: torch.zeros(1, 3, 4), SampleRequest(tokens, 3, seeded()))
    with pytest.raises(BackboneMismatch, match=r"\[1, 2\] must return logits \[B, L, V\], not \[1, 3, 4\]"):
        asked(tokens, torch.ones(1))


def test_impossible_requests_are_refused():
    with pytest.raises(BadData, match=r"must be \[B, L\], not \[2\]"):
        Asked(lambda tokens: tokens, SampleRequest(torch.tensor([1, 3]), 3, seeded()))
    with pytest.raises(BadParameter, match="steps=0 must be at least 1"):
        Asked(lambda tokens: tokens, SampleRequest(torch.tensor([[1, 3]]), 3, seeded(), steps=0))
