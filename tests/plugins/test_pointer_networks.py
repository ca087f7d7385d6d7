"""Pointer Networks: the paper's equations by hand, decodes that are valid, and answers checked with scipy and brute force."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import maskwright
import maskwright.testing
from maskwright import Layout, Mask, MaskedTraining, SampleRequest, adapt
from maskwright.backbones import PointerBackbone
from maskwright.errors import BackboneMismatch, BadData, MaskShapeError
from maskwright.plugins.pointer_networks import claim, tasks
from maskwright.plugins.pointer_networks.network import PointerLSTM
from maskwright.plugins.pointer_networks.objective import Pointer, first, pointing, sequence_loss
from maskwright.plugins.pointer_networks.sampler import RULES, PointerDecode, beam_search
from maskwright.plugins.pointer_networks.tasks import TASKS, sequences

INF = math.inf
POINTS = np.array([(0.1, 0.5), (0.5, 0.1), (0.5, 0.5), (0.9, 0.6), (0.4, 0.9), (0.45, 0.55)])


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{component.name}-{name}")
        for component in (Pointer, PointerDecode)
        for name, check in maskwright.testing.conformance(component)
    ],
)
def test_conforms(check):
    check()


# -- pointing (section 2.3) ----------------------------------------------------------------------------------


E = torch.tensor([[(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (-1.0, 0.5)]], dtype=torch.float64)
D = torch.tensor([[(0.5, -0.5)]], dtype=torch.float64)
W1 = torch.tensor([[1.0, 0.5], [0.0, -1.0]], dtype=torch.float64)
W2 = torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
V = torch.tensor([1.0, -2.0], dtype=torch.float64)


def test_scores_by_hand():
    u = pointing(E, D, W1, W2, V)[0, 0]
    assert torch.allclose(u, u.new_tensor([0.964028, 2.428337, 2.509803, 1.169153]), atol=1e-6)
    p = u.softmax(-1)
    assert torch.allclose(p, u.new_tensor([0.088938, 0.384615, 0.417260, 0.109187]), atol=1e-6)
    masked = u.masked_fill(torch.tensor([False, False, True, False]), -INF).softmax(-1)
    assert torch.allclose(masked, u.new_tensor([0.152620, 0.660012, 0.0, 0.187368]), atol=1e-6)


def test_loss_by_hand_and_its_gradient():
    u = pointing(E, D, W1, W2, V).requires_grad_()
    loss = sequence_loss(u, torch.tensor([[3]]))
    assert float(loss.detach()) == pytest.approx(2.214695, abs=1e-6)
    masked = u.masked_fill(torch.tensor([False, False, True, False]), -INF)
    assert float(sequence_loss(masked, torch.tensor([[3]])).detach()) == pytest.approx(1.674680, abs=1e-6)
    loss.backward()
    assert torch.allclose(u.grad[0, 0], u.detach()[0, 0].softmax(-1) - torch.eye(4, dtype=torch.float64)[3])


def test_pointing_is_the_formula_pair_by_pair():
    e, d, w1, w2 = (torch.randn(*shape) for shape in ((2, 5, 3), (2, 4, 3), (3, 3), (3, 3)))
    v = torch.randn(3)
    u = pointing(e, d, w1, w2, v)
    for b, i, j in itertools.product(range(2), range(4), range(5)):
        assert torch.allclose(u[b, i, j], v @ torch.tanh(w1 @ e[b, j] + w2 @ d[b, i]), atol=1e-5)


def test_a_permutation_of_the_memory_permutes_and_a_constant_changes_nothing():
    u = pointing(E, D, W1, W2, V)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(pointing(E[:, order], D, W1, W2, V), u[..., order])
    assert torch.allclose((u + 7.5).softmax(-1), u.softmax(-1))


def test_padded_targets_have_no_loss():
    u = torch.randn(2, 3, 4)
    targets = torch.tensor([[1, 3, -1], [0, 2, 3]])
    logs = u.log_softmax(-1)
    by_hand = -(logs[0, 0, 1] + logs[0, 1, 3] + logs[1, 0, 0] + logs[1, 1, 2] + logs[1, 2, 3]) / 5
    assert torch.allclose(sequence_loss(u, targets), by_hand)


# -- the bound objective -------------------------------------------------------------------------------------


def bound(features=2, width=8, seed=0, spread=0.5):
    """With weights large enough for differences to be seen."""
    torch.manual_seed(seed)
    return Pointer(spread=spread).bind(PointerLSTM(features, width, spread=spread)).eval()


def everything(rows, n):
    return Mask(torch.ones(rows, n, dtype=torch.bool))


def test_weights_begin_as_in_the_paper():
    one = Pointer().bind(PointerLSTM())
    assert one.backbone.width == 256
    assert all(float(p.detach().abs().max()) <= 0.08 for p in one.parameters())
    assert float(one.w1.detach().std()) == pytest.approx(0.16 / math.sqrt(12), rel=0.05)


def test_the_same_parameters_point_at_any_number_of_inputs():
    one = bound()
    for n in (1, 3, 17):
        batch = {"points": torch.rand(2, n, 2), "targets": torch.arange(n).expand(2, -1)}
        assert one(batch, everything(2, n)).outputs["prediction"].shape == (2, n + 1, n + 1)


def test_the_decoder_reads_the_point_that_was_pointed_at():
    """Not the encoder's state, and no blend: step by step with the LSTM itself."""
    one = bound()
    points, targets = torch.rand(1, 4, 2), torch.tensor([[2, 0, 3, 1]])
    found = one({"points": points, "targets": targets}, everything(1, 4)).outputs
    memory, (h, c) = one.backbone.reader(points)
    slots = torch.cat([memory, one.end.view(1, 1, -1)], 1)
    reads = [one.start, *points[0, [2, 0, 3, 1]]]
    for step, read in enumerate(reads):
        d, (h, c) = one.backbone.writer(read.view(1, 1, -1), (h, c))
        u = pointing(slots, d, one.w1, one.w2, one.v)
        assert torch.allclose(found["prediction"][0, step], u[0, 0].softmax(-1), atol=1e-6)
    assert found["decided"].tolist() == [[2, 0, 3, 1, 4]]


def test_padding_changes_nothing():
    one = bound()
    points, targets = torch.rand(1, 3, 2), torch.tensor([[1, 2, 0]])
    short = one({"points": points, "targets": targets}, everything(1, 3))
    longer = torch.cat([points, 9 * torch.rand(1, 2, 2)], 1)
    padded = torch.nn.functional.pad(targets, (0, 2), value=-1)
    batch = {"points": longer, "targets": padded, "lengths": torch.tensor([3])}
    long = one(batch, everything(1, 5))
    assert torch.allclose(short.total, long.total, atol=1e-6)
    p = long.outputs["prediction"][0, :4]
    assert torch.allclose(p[:, [0, 1, 2, 5]], short.outputs["prediction"][0], atol=1e-6)
    assert not p[:, 3:5].any()


def test_a_hidden_point_is_as_if_it_had_never_been_there():
    """Anywhere in the sequence, and a wrong position in the mask is noticed."""
    one = bound()
    points, targets = torch.rand(1, 4, 2), torch.tensor([[3, 1, 0, 2]])
    keep = torch.tensor([[True, False, True, True]])
    whole = one({"points": points, "targets": targets}, Mask(keep)).total
    less = {"points": points[:, [0, 2, 3]], "targets": torch.tensor([[2, 0, 1]])}
    assert torch.allclose(whole, one(less, everything(1, 3)).total, atol=1e-6)
    assert not torch.allclose(whole, one({"points": points, "targets": targets}, Mask(keep.roll(1, 1))).total)


def test_first_keeps_the_order():
    order, counts = first(torch.tensor([[False, True, False, True], [True, True, True, True]]))
    assert order.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert counts.tolist() == [2, 4]


def test_what_does_not_fit_is_refused():
    one = bound()
    batch = {"points": torch.rand(1, 3, 2), "targets": torch.tensor([[3, 0, 1]])}
    with pytest.raises(MaskShapeError, match="up to 3"):
        one(batch, everything(1, 3))
    batch["targets"] = torch.tensor([[2, 0, 1]])
    with pytest.raises(MaskShapeError, match=r"\[1, 4\]"):
        one(batch, everything(1, 4))
    with pytest.raises(BadData, match="no inputs at all"):
        one(batch, Mask(torch.zeros(1, 3, dtype=torch.bool)))


def test_a_module_of_ones_own_is_a_backbone():
    class Own(nn.Module):
        features, width = 2, 4

        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(2, 4)

        def encode(self, inputs, lengths):
            memory = self.embed(inputs)
            return memory, (memory.mean(1),)

        def decode(self, inputs, state):
            return self.embed(inputs).cumsum(1) + state[0][:, None]

    own = Own()
    assert isinstance(own, PointerBackbone)
    assert adapt(own, "pointer") is own
    one = Pointer().bind(own)
    values = PointerDecode(rule="tour").sample(
        one.denoiser(torch.rand(2, 4, 2)),
        SampleRequest(torch.full((2, 4), -1), -1, torch.Generator()),
    )
    assert all(tasks.is_permutation(row, 4) for row in values.values.tolist())
    with pytest.raises(BackboneMismatch, match=r"encode\(inputs \[B, n, F\], lengths \[B\]\)"):
        Pointer().bind(nn.Linear(2, 2))


@pytest.mark.parametrize("strategy", [{"ratio": 0.0}, {"ratio": 0.5}])
def test_trains_under_masks_of_other_plugins(strategy):
    """Sorting what is left of the keys is a task as well."""
    torch.manual_seed(0)
    model = MaskedTraining(
        PointerLSTM(1, 16), maskwright.create("mask-strategy", "random", **strategy), Pointer()
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        loss = model(**TASKS["sorting"].batch(32, 4, generator))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert sum(losses[-10:]) < 0.85 * sum(losses[:3]) / 3 * 10
    assert Layout.of(model.backbone, TASKS["sorting"].batch(5, 4, generator)).shape == (5, 4)


# -- beam search ---------------------------------------------------------------------------------------------


class Tree:
    """Scores from a table of probabilities by what was chosen before."""

    def __init__(self, table, n):
        self.table, self.n = table, n

    def __call__(self, chosen):
        p = torch.zeros(*chosen.shape[:2], self.n + 1, dtype=torch.float64)
        for row, sequences_ in enumerate(chosen.tolist()):
            for place, one in enumerate(sequences_):
                p[row, place] = torch.tensor(self.table(tuple(one)), dtype=torch.float64)
        return p.log()


def hand(chosen):
    known = {
        (): (0.5, 0.4, 0.1, 0),
        (0,): (0, 0.55, 0.45, 0),
        (1,): (0.95, 0, 0.05, 0),
        (2,): (0.5, 0.5, 0, 0),
    }
    left = [one for one in range(3) if one not in chosen]
    return known.get(chosen, [float(one in left[:1]) for one in range(4)])


@pytest.mark.parametrize(("width", "values", "p"), [(1, [0, 1, 2], 0.275), (2, [1, 0, 2], 0.38)])
def test_beam_by_hand(width, values, p):
    found = beam_search(Tree(hand, 3), torch.full((1, 3), -1), width=width, rule=RULES["tour"])
    assert found.values.tolist() == [values]
    assert math.exp(float(found.log_probability)) == pytest.approx(p)
    assert found.calls == 3


def random_scores(n, rows, seed, missing=()):
    """Scores that depend on the whole prefix."""
    weights = torch.randn(rows, 64, n + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def scores(chosen):
        rows, beams, length = chosen.shape
        key = torch.zeros(rows, beams, dtype=torch.int64)
        for place in range(length):
            key = (key * 31 + 7 * chosen[..., place] + 13) % 64
        found = 2 * weights[torch.arange(rows)[:, None], key]
        found[..., list(missing)] = -INF
        return found

    return scores


def log_probability(scores, row, sequence, rule, renormalize, length):
    """Of one sequence, by the chain rule, one step after the other."""
    total, rows = 0.0, row + 1
    for step, one in enumerate(sequence):
        chosen = torch.tensor(sequence[:step], dtype=torch.int64).expand(rows, 1, step)
        u = scores(chosen)[row, 0]
        keep = rule(chosen[:1, 0], (u > -INF)[None], length - step).keep[0]
        logs = u.log_softmax(-1).masked_fill(~keep, -INF)
        total += float((logs - logs.logsumexp(-1) if renormalize else logs)[one])
    return total


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("rule", ["tour", "unvisited"])
def test_a_beam_of_every_prefix_finds_the_maximum(rule, renormalize):
    n, rows = 4, 3
    scores = random_scores(n, rows, seed=5)
    found = beam_search(
        scores, torch.full((rows, n + 1), -1), width=200, rule=RULES[rule], renormalize=renormalize
    )
    sizes = range(1, n + 1) if rule == "unvisited" else (n,)
    every = [[*one, n] for size in sizes for one in itertools.permutations(range(n), size)]
    for row in range(rows):
        best = max(log_probability(scores, row, one, RULES[rule], renormalize, n + 1) for one in every)
        assert float(found.log_probability[row]) == pytest.approx(best)
        (mine,) = sequences(found.values[row : row + 1], n)
        assert log_probability(scores, row, [*mine, n], RULES[rule], renormalize, n + 1) == pytest.approx(
            best
        )


def test_a_beam_of_one_is_greedy():
    n, rows = 6, 4
    scores = random_scores(n, rows, seed=1)
    found = beam_search(scores, torch.full((rows, n), -1), width=1, rule=RULES["tour"])
    for row in range(rows):
        chosen = []
        for _ in range(n):
            u = scores(torch.tensor(chosen, dtype=torch.int64).expand(rows, 1, len(chosen)))[row, 0, :n]
            u[chosen] = -INF
            chosen.append(int(u.argmax()))
        assert found.values[row].tolist() == chosen


def test_wider_beams_are_never_worse_than_all_but_exact():
    """Between greedy and exact there is no order for each input, but there is on the average."""
    n, rows = 5, 40
    scores = random_scores(n, rows, seed=2)
    mean = [
        float(
            beam_search(
                scores, torch.full((rows, n), -1), width=width, rule=RULES["tour"]
            ).log_probability.mean()
        )
        for width in (1, 3, 150)
    ]
    assert mean[0] < mean[1] < mean[2]


def test_renormalised_probabilities_of_all_orders_sum_to_one():
    n = 4
    scores = random_scores(n, 1, seed=3)
    every = [
        log_probability(scores, 0, [*one, n], RULES["tour"], True, n + 1)
        for one in itertools.permutations(range(n))
    ]
    assert sum(map(math.exp, every)) == pytest.approx(1.0)
    unmasked = [
        log_probability(scores, 0, [*one, n], RULES["tour"], False, n + 1)
        for one in itertools.permutations(range(n))
    ]
    assert sum(map(math.exp, unmasked)) < 0.9


def test_renormalising_changes_what_a_beam_prefers():
    """After 0 little is left of p, after 1 nearly all: products of raw p prefer 1, renormalised ones 0."""

    def table(chosen):
        known = {(): (0.6, 0.4, 0.0, 0.0), (0,): (0.9, 0.06, 0.04, 0.0), (1,): (0.5, 0.01, 0.49, 0.0)}
        return known.get(chosen, (0.0, 0.0, 0.0, 1.0)) if len(chosen) < 2 else (0.3, 0.3, 0.3, 0.1)

    blank = torch.full((1, 2), -1)
    raw = beam_search(Tree(table, 3), blank, width=3, rule=RULES["unvisited"])
    divided = beam_search(Tree(table, 3), blank, width=3, rule=RULES["unvisited"], renormalize=True)
    assert raw.values.tolist() == [[1, 0]]
    assert divided.values.tolist() == [[0, 1]]
    assert math.exp(float(divided.log_probability)) == pytest.approx(0.6 * 0.6)


def test_an_ended_sequence_leaves_the_beam_and_stays_a_candidate():
    """(0, end) with 0.45 beats everything longer, though a beam of one goes on with 1."""

    def table(chosen):
        return {(): (1.0, 0, 0), (0,): (0, 0.55, 0.45)}.get(chosen, (0.5, 0.0, 0.5))

    found = beam_search(Tree(table, 2), torch.full((1, 3), -1), width=1, rule=RULES["unvisited"])
    assert found.values.tolist() == [[0, 2, 2]]
    assert math.exp(float(found.log_probability)) == pytest.approx(0.45)


# -- rules ---------------------------------------------------------------------------------------------------


def is_right(rule, row, n, missing):
    there = [one for one in range(n) if one not in missing]
    if rule == "tour":
        return sorted(row) == there
    if rule == "triangles":
        return tasks.is_set_of_triangles(row, n) and set(row) <= set(there)
    least = {"polygon": 3, "unvisited": 1}[rule]
    return len(row) >= least and len(set(row)) == len(row) and set(row) <= set(there)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from(["tour", "triangles", "polygon", "unvisited"]),
    n=st.integers(3, 7),
    lost=st.integers(0, 2),
    width=st.integers(1, 5),
    seed=st.integers(0, 99),
    renormalize=st.booleans(),
)
def test_every_decode_is_valid_whatever_the_scores(rule, n, lost, width, seed, renormalize):
    lost = min(lost, n - 3)
    missing = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:lost].tolist()
    scores = random_scores(n, 3, seed, missing)
    length = (3 * 10 if rule == "triangles" else n) + 1
    sampler = PointerDecode(beams=width, rule=rule, renormalize=renormalize)
    samples = sampler.sample(scores, SampleRequest(torch.full((3, length), -1), -1, torch.Generator()))
    for row in sequences(samples.values, n):
        assert is_right(rule, row, n, missing), (row, missing)


@pytest.mark.parametrize("rule", ["tour", "triangles"])
def test_a_mask_that_is_wrong_by_one_position_is_noticed(rule):
    """The same search with what is allowed moved by one no longer answers validly."""

    def moved(chosen, exists, room):
        keep = RULES[rule](chosen, exists, room).keep
        return Mask(torch.cat([keep[..., :-1].roll(1, -1), keep[..., -1:]], -1))

    length = 25 if rule == "triangles" else 6
    scores, blank = random_scores(5, 20, seed=4), torch.full((20, length), -1)
    for used, share in ((RULES[rule], 1.0), (moved, 0.2)):
        found = beam_search(scores, blank, width=2, rule=used)
        valid = [is_right(rule, row, 5, ()) for row in sequences(found.values, 5)]
        assert (sum(valid) == 20) if share == 1 else (sum(valid) <= share * 20)


def test_all_triples_of_few_points_can_be_taken():
    """Where no triple is left the end comes by itself."""

    def eager(chosen):
        scores = torch.zeros(1, chosen.shape[1], 5)
        scores[..., 4] = -50.0
        return scores

    found = beam_search(eager, torch.full((1, 16), -1), width=2, rule=RULES["triangles"], renormalize=True)
    (row,) = sequences(found.values, 4)
    assert len(row) == 12
    assert {tuple(row[at : at + 3]) for at in range(0, 12, 3)} == set(itertools.combinations(range(4), 3))


@pytest.mark.parametrize(("length", "taken"), [(8, 6), (7, 6), (6, 6), (5, 3)])
def test_no_triangle_is_begun_that_has_no_room(length, taken):
    def eager(chosen):
        scores = torch.zeros(1, chosen.shape[1], 6)
        scores[..., 5] = -50.0
        return scores

    found = beam_search(
        eager, torch.full((1, length), -1), width=1, rule=RULES["triangles"], renormalize=True
    )
    (row,) = sequences(found.values, 5)
    assert len(row) == taken
    assert tasks.is_set_of_triangles(row, 5)


def test_a_rule_is_a_mask_of_what_may_come_next():
    exists = torch.tensor([[True, True, True, False, True]])
    chosen = torch.tensor([[2, 0]])
    keep = {name: rule(chosen, exists, 9).keep.int().tolist()[0] for name, rule in RULES.items()}
    assert keep["anything"] == [1, 1, 1, 0, 1]
    assert keep["unvisited"] == [0, 1, 0, 0, 1]
    assert keep["polygon"] == keep["tour"] == [0, 1, 0, 0, 0]
    assert RULES["triangles"](torch.tensor([[0, 1]]), exists, 9).keep.int().tolist() == [[0, 0, 1, 0, 0]]
    all_visited = RULES["tour"](torch.tensor([[2, 0, 1]]), exists, 9)
    assert all_visited.keep.int().tolist() == [[0, 0, 0, 0, 1]]


def test_prompts_may_differ_in_length_and_are_kept():
    tokens = torch.tensor([[3, 1, -1, -1, -1], [2, -1, -1, -1, -1]])
    samples = PointerDecode(rule="tour").sample(
        random_scores(5, 2, 0), SampleRequest(tokens, -1, torch.Generator())
    )
    assert samples.values[0, :2].tolist() == [3, 1]
    assert samples.values[1, 0] == 2
    assert all(tasks.is_permutation(row, 5) for row in samples.values.tolist())
    assert samples.order.tolist() == [[-1, -1, 0, 1, 2], [-1, 0, 1, 2, 3]]


def test_prompts_that_are_no_beginning_are_refused():
    def ask(tokens, mask_token=-1):
        return PointerDecode().sample(
            random_scores(3, 1, 0), SampleRequest(torch.tensor([tokens]), mask_token, torch.Generator())
        )

    with pytest.raises(BadData, match="may only come first"):
        ask([-1, 1, -1])
    with pytest.raises(BadData, match="points at 7; there are 3 inputs"):
        ask([7, -1, -1])
    with pytest.raises(BadData, match="got -2"):
        ask([-2, -1, -1])
    with pytest.raises(BackboneMismatch, match=r"\[B, K, n \+ 1\]"):
        PointerDecode().sample(
            lambda chosen: torch.zeros(1, 4),
            SampleRequest(torch.full((1, 2), -1), -1, torch.Generator()),
        )


def test_the_denoiser_is_the_objective_step_by_step():
    one = bound()
    points, targets = torch.rand(2, 4, 2), torch.tensor([[2, 0, 3, 1], [1, 3, 0, 2]])
    p = one({"points": points, "targets": targets}, everything(2, 4)).outputs["prediction"]
    ask = one.denoiser(points)
    for step in range(5):
        both = torch.stack([targets[:, :step], targets.flip(1)[:, :step]], 1)
        scores = ask(both)
        assert scores.shape == (2, 2, 5)
        assert torch.allclose(scores[:, 0].softmax(-1), p[:, step], atol=1e-6)


# -- tasks ---------------------------------------------------------------------------------------------------


def test_hull_triangles_and_tour_by_hand():
    assert tasks.hull(POINTS) == [0, 1, 3, 4]
    assert tasks.area(POINTS[[0, 1, 3, 4]]) == pytest.approx(0.325)
    assert tasks.coverage([0, 1, 3], POINTS) == pytest.approx(0.553846, abs=1e-6)
    triples = np.array(tasks.triangulation(POINTS)).reshape(-1, 3).tolist()
    assert triples == [[0, 4, 5], [0, 1, 2], [0, 2, 5], [2, 3, 5], [3, 4, 5], [1, 2, 3]]
    tour = tasks.optimal_tour(POINTS)
    assert tour == [0, 1, 3, 2, 5, 4]
    assert tasks.tour_length(tour, POINTS) == pytest.approx(2.542572, abs=1e-6)
    assert tasks.tour_length(tour[::-1], POINTS) == pytest.approx(2.542572, abs=1e-6)
    assert tasks.tour_length([0, 5, 2, 1, 3, 4], POINTS) == pytest.approx(2.547672, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_the_tour_is_the_shortest_of_all(n):
    for seed in range(3):
        points = np.random.default_rng(seed).random((n, 2))
        every = [[0, *rest] for rest in itertools.permutations(range(1, n))]
        tour = tasks.optimal_tour(points)
        assert tasks.is_permutation(tour, n)
        assert tasks.tour_length(tour, points) == pytest.approx(
            min(tasks.tour_length(one, points) for one in every)
        )


def test_the_hull_holds_every_point_and_the_triangles_their_own():
    """By definition: all points left of each side; no point inside a circumcircle; areas that add up."""
    points = np.random.default_rng(0).random((9, 2))
    corners = points[tasks.hull(points)]
    for a, b in zip(corners, np.roll(corners, -1, axis=0)):
        turned = (b[0] - a[0]) * (points[:, 1] - a[1]) - (b[1] - a[1]) * (points[:, 0] - a[0])
        assert (turned > -1e-12).all()
    triples = np.array(tasks.triangulation(points)).reshape(-1, 3)
    for triple in triples:
        p = points[triple]
        centre = np.linalg.solve(2 * (p[1:] - p[0]), (p[1:] ** 2 - p[0] ** 2).sum(1))
        others = np.delete(points, triple, axis=0)
        assert (np.linalg.norm(others - centre, axis=1) > np.linalg.norm(p[0] - centre)).all()
    assert sum(tasks.area(points[one]) for one in triples) == pytest.approx(tasks.area(corners))
    x = tasks.incentre(points[triples])[:, 0]
    assert (np.diff(x) > 0).all()


def test_an_incentre_is_equally_far_from_all_sides():
    p = np.random.default_rng(1).random((3, 2))
    centre = tasks.incentre(p)

    def off(a, b):
        return abs((b[0] - a[0]) * (centre[1] - a[1]) - (b[1] - a[1]) * (centre[0] - a[0])) / np.linalg.norm(
            b - a
        )

    assert off(p[0], p[1]) == pytest.approx(off(p[1], p[2])) == pytest.approx(off(p[2], p[0]))


def test_the_targets_follow_a_permutation_of_the_inputs():
    order = np.array([3, 5, 0, 4, 1, 2])
    hull = tasks.hull(POINTS[order])
    assert hull[0] == min(hull)
    assert tasks.same_cycle([int(order[one]) for one in hull], [0, 1, 3, 4])


def test_checkers_tell_wrong_from_right():
    assert tasks.is_permutation([2, 0, 1], 3)
    assert not tasks.is_permutation([2, 0, 0], 3)
    assert not tasks.is_permutation([2, 0], 3)
    assert tasks.is_polygon([4, 0, 2], 5)
    assert not any(tasks.is_polygon(one, 5) for one in ([0, 1], [0, 1, 1], [0, 1, 5]))
    assert tasks.is_set_of_triangles([0, 1, 2, 0, 1, 3], 4)
    wrong = ([], [0, 1], [0, 2, 1], [0, 1, 2, 0, 1, 2], [0, 1, 4], [0, 1, 2, 3])
    assert not any(tasks.is_set_of_triangles(one, 4) for one in wrong)
    assert tasks.same_cycle([3, 4, 0, 1], [0, 1, 3, 4])
    assert not any(tasks.same_cycle(one, [0, 1, 3, 4]) for one in ([4, 3, 1, 0], [0, 1, 3], [0, 3, 1, 4], []))
    assert tasks.same_triangles([0, 1, 2, 1, 2, 3], [1, 2, 3, 0, 1, 2])
    assert not tasks.same_triangles([0, 1, 2], [1, 2, 3, 0, 1, 2])


def test_a_polygon_that_crosses_itself_has_no_area():
    square = np.array([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
    assert tasks.is_simple(square)
    assert tasks.coverage([0, 1, 2, 3], square) == 1.0
    assert not tasks.is_simple(square[[0, 2, 1, 3]])
    assert math.isnan(tasks.coverage([0, 2, 1, 3], square))
    assert not tasks.is_simple(square[:2])


@pytest.mark.parametrize("name", TASKS)
def test_batches_hold_the_answers(name):
    task = TASKS[name]
    batch = task.batch(4, 5, torch.Generator().manual_seed(0))
    again = task.batch(4, 5, torch.Generator().manual_seed(0))
    assert torch.equal(batch["points"], again["points"])
    for points, row in zip(batch["points"].double().numpy(), batch["targets"].tolist()):
        answer = [one for one in row if one >= 0]
        assert answer == task.answer(points)
        assert task.valid(answer, 5)
        assert len(answer) <= task.longest(5)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("n", [5, 9])
def test_an_untrained_network_answers_validly(name, n):
    task = TASKS[name]
    one = bound(task.features)
    points = torch.rand(6, n, task.features, generator=torch.Generator().manual_seed(n))
    answers = claim.decoded(one, task, points, rule=task.rule, beams=3)
    assert claim.validity(answers, task, n) == 1.0
    if n > 5:
        assert claim.validity(claim.decoded(one, task, points, rule="anything"), task, n) < 1.0


# -- the claim -----------------------------------------------------------------------------------------------


def test_the_fixed_dictionary_names_places_and_ends_there():
    torch.manual_seed(0)
    one = claim.FixedDictionary(Pointer(), PointerLSTM(1, 8), 6)
    batch = TASKS["sorting"].batch(3, 4, torch.Generator().manual_seed(0))
    out = one(batch, everything(3, 4))
    assert out.outputs["prediction"].shape == (3, 5, 5)
    assert torch.allclose(out.outputs["prediction"].sum(-1), torch.ones(3, 5))
    out.total.backward()
    assert one.predict.weight.grad[6].any()
    assert not one.predict.weight.grad[4:6].any()
    with pytest.raises(RuntimeError):
        one(TASKS["sorting"].batch(3, 8, torch.Generator()), everything(3, 8))


def test_tau_is_kendalls():
    from scipy.stats import kendalltau

    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(5, 7, generator=generator).argsort(1)
    answers = torch.rand(5, 7, generator=generator).argsort(1)
    ranks = targets.argsort(1)
    by_scipy = [kendalltau(range(7), rank[one].numpy()).statistic for rank, one in zip(ranks, answers)]
    assert claim.tau(answers.tolist(), targets) == pytest.approx(sum(by_scipy) / 5)
    assert claim.tau(targets.tolist(), targets) == 1.0
