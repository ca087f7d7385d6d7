"""hidenseek: its saliency, what survives without data, sign supermasks, aggregation, the bytes on the wire, and any model."""

import itertools
import math

import attrs
import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import maskwright
from maskwright import Budget, PruneTask
from maskwright.backbones.defaults import (
    causal_language_model,
    convolutional_network,
    masked_language_model,
    vision_transformer,
)
from maskwright.errors import BadBudget, BadData, NumericalError
from maskwright.jobs.checkpoint import load_checkpoint, restore, save_checkpoint
from maskwright.plugins.hidenseek.pruner import (
    HideNSeek,
    Kept,
    adopted,
    aggregate,
    packed,
    personalise,
    signs_of,
    unpacked,
    valued,
)
from maskwright.plugins.hidenseek.saliency import Flow, kept_count, shares, survivors
from maskwright.testing import conformance
from maskwright.toolkit.prunable import Rule, prunable_weights

CHECKS = conformance(HideNSeek)


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_conformance(check):
    check()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chain(*matrices):
    layers = []
    for matrix in matrices:
        matrix = torch.as_tensor(matrix, dtype=torch.float32)
        layers.append(nn.Linear(matrix.shape[1], matrix.shape[0], bias=False))
        layers[-1].weight.data = matrix.clone()
    return nn.Sequential(*layers)


def every(model):
    """All of a plain model's weights: the last is no head here."""
    return prunable_weights(model, Rule(exclude=()))


def scores_of(model, x=None):
    weights = every(model)
    shape = (3, weights[0].shape[1])
    return Flow(model, weights, {"x": torch.zeros(shape) if x is None else x}).scores()


# -- saliency --------------------------------------------------------------------------------------------------------

W1, W2 = [[1.0, -2.0], [0.5, 3.0]], [[2.0, -1.0]]


def test_the_saliency_of_two_layers_by_hand():
    first, second = scores_of(chain(W1, W2))
    assert first.dtype == torch.float64
    assert first.tolist() == [[2, 4], [0.5, 3]]
    assert second.tolist() == [[6, 3.5]]
    assert first.sum() == second.sum() == 9.5


def test_four_of_six_survive_one_shot():
    model = chain(W1, W2)
    keep = survivors(model, every(model), {"x": torch.zeros(1, 2)}, 1 - 4 / 6, 1)
    assert keep["0.weight"].tolist() == [[False, True], [False, True]]
    assert keep["1.weight"].tolist() == [[True, True]]


def random_chain(seed=0, sizes=(12, 20, 16, 5)):
    generator = seeded(seed)
    return chain(*(torch.randn(b, a, generator=generator) for a, b in itertools.pairwise(sizes)))


def test_saliency_is_conserved_and_is_that_of_a_product_of_matrices():
    model = random_chain()
    scores = scores_of(model)
    matrices = [layer.weight.detach().double().abs() for layer in model]
    total = (matrices[2] @ matrices[1] @ matrices[0]).sum()
    for index, score in enumerate(scores):
        torch.testing.assert_close(score.sum(), total)
        # 1ᵀ(what follows) for each output, times |w|, times (what comes before)1 for each input.
        before, after = torch.ones(matrices[0].shape[1]).double(), torch.ones(matrices[-1].shape[0]).double()
        for matrix in matrices[:index]:
            before = matrix @ before
        for matrix in reversed(matrices[index + 1 :]):
            after = matrix.T @ after
        torch.testing.assert_close(score, after[:, None] * matrices[index] * before)


def test_saliency_ignores_signs_and_data_and_scales_with_a_layer():
    model = random_chain()
    expected = scores_of(model)
    flipped = random_chain()
    with torch.no_grad():
        for layer in flipped:
            layer.weight.mul_(torch.where(torch.rand(layer.weight.shape, generator=seeded(5)) < 0.5, -1, 1))
    for one, other in zip(expected, scores_of(flipped)):
        assert torch.equal(one, other)
    data = torch.randn(3, 12, generator=seeded(9))
    assert all(torch.equal(one, other) for one, other in zip(expected, scores_of(model, data)))
    scaled = random_chain()
    scaled[1].weight.data *= -4
    weights, batch = every(model), {"x": data}
    for one, other in zip(expected, scores_of(scaled)):
        torch.testing.assert_close(other, 4 * one)
    keep = survivors(model, weights, batch, 0.7, 1)
    other = survivors(scaled, every(scaled), {"x": -data}, 0.7, 1)
    assert all(torch.equal(keep[name], other[name]) for name in keep)


def test_the_model_is_not_touched_and_its_zeros_stay():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).train()
    model[0].weight.data[0] = torch.tensor([0.0, -0.0, 1, -1, 1e-30, -1e-30])
    model[1].running_mean.copy_(torch.linspace(-1, 1, 8))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    survivors(model, every(model), {"x": torch.ones(2, 6)}, 0.5, 3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
        assert torch.equal(torch.signbit(value), torch.signbit(state[name]))
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_deep_networks_overflow_single_and_not_double_precision():
    sizes = [256] * 30
    model = chain(*(torch.full((b, a), 1.0) for a, b in itertools.pairwise(sizes)))
    assert math.log(256) * 29 > math.log(torch.finfo(torch.float32).max)
    assert all(score.isfinite().all() for score in scores_of(model))


@pytest.mark.parametrize("seed", range(3))
def test_every_part_of_a_transformer_has_its_flow(seed):
    """Of queries and keys as well: under a softmax of equal tokens they would have none, and all be pruned."""
    model = causal_language_model(vocabulary=40, length=16, width=16, depth=2, heads=2, seed=seed)
    weights = prunable_weights(model)
    scores = dict(
        zip((w.name for w in weights), Flow(model, weights, {"tokens": torch.zeros(2, 5).long()}).scores())
    )
    assert all((score > 0).all() for score in scores.values())
    for layer in ("model.layers.0", "model.layers.1"):
        total = {part: scores[f"{layer}.self_attn.{part}_proj.weight"].sum() for part in "qkvo"}
        # One token, so that what q and k carry is what v and o carry: the branch's share of R.
        for part in "qkv":
            torch.testing.assert_close(total[part], total["o"])
        gated = [scores[f"{layer}.mlp.{part}_proj.weight"].sum() for part in ("gate", "up", "down")]
        torch.testing.assert_close(torch.stack(gated), gated[2].expand(3))


# -- what survives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 7, 100])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.97])
def test_exactly_the_rounded_share_is_kept_over_all_layers(rounds, sparsity):
    model = random_chain()
    keep = survivors(model, every(model), {"x": torch.zeros(1, 12)}, sparsity, rounds)
    total = sum(one.numel() for one in keep.values())
    assert (
        sum(int(one.sum()) for one in keep.values())
        == round((1 - sparsity) * total)
        == kept_count(total, sparsity)
    )


def test_one_shot_is_the_largest_of_all_scores():
    model = random_chain(3)
    scores = torch.cat([score.flatten() for score in scores_of(model)])
    keep = survivors(model, every(model), {"x": torch.zeros(1, 12)}, 0.8, 1)
    chosen = torch.cat([one.flatten() for one in keep.values()])
    assert scores[chosen].min() > scores[~chosen].max()


def test_rounds_follow_the_powers_of_the_share_and_what_is_gone_stays_gone():
    assert shares(1000, 0.9, 1) == [100]
    assert shares(1000, 0.9, 2) == [316, 100]
    assert shares(1000, 0.0, 3) == [1000] * 3
    model = random_chain()
    at = [
        survivors(model, every(model), {"x": torch.zeros(1, 12)}, 1 - 0.1 ** (i / 4), i)["1.weight"]
        for i in (1, 2, 3, 4)
    ]
    for more, fewer in itertools.pairwise(at):
        assert not (fewer & ~more).any()


def test_rounds_spare_a_layer_that_one_shot_starves():
    generator = seeded()
    sizes = (64, 128, 128, 10)
    model = chain(
        *(torch.randn(b, a, generator=generator) * (2 / a) ** 0.5 for a, b in itertools.pairwise(sizes))
    )
    least = {}
    for rounds in (1, 100):
        keep = survivors(model, every(model), {"x": torch.zeros(1, 64)}, 0.95, rounds)
        least[rounds] = min(float(one.float().mean()) for one in keep.values())
    assert least[1] < 0.003
    assert least[100] > 0.02
    with pytest.warns(
        UserWarning, match=r"hidenseek keeps \d+ of 16384 weights of 1\.weight, fewer than its 128"
    ):
        HideNSeek().warn(every(model), survivors(model, every(model), {"x": torch.zeros(1, 64)}, 0.95, 1))


# -- signs -----------------------------------------------------------------------------------------------------------


def test_the_sign_of_zero_is_plus():
    scores = torch.tensor([0.3, 0.0, -0.0, -1e-38, -0.2])
    assert signs_of(scores).tolist() == [True, True, True, False, False]
    assert valued(signs_of(scores), "sign").tolist() == [1, 1, 1, -1, -1]
    assert valued(signs_of(scores), "zero-one").tolist() == [1, 1, 1, 0, 0]


def test_the_straight_through_gradient_by_hand():
    model = chain([[0.5, -1], [2, 0.25]])
    keep = torch.tensor([[True, True], [False, True]])
    seed = model[0].weight.detach()[keep]
    kept = Kept({"0.weight": model[0].weight}, {"0.weight": keep}, seed)
    kept.put(signs_of(torch.tensor([0.3, -0.2, -0.7])), "sign")
    assert model[0].weight.tolist() == [[0.5, 1], [0, -0.25]]
    y = model(torch.tensor([1.0, 2]))
    assert y.tolist() == [2.5, -0.5]
    (0.5 * (y - torch.tensor([0.0, 1])).square().sum()).backward()
    slope = torch.zeros(2, 2).masked_scatter(keep, kept.gradient())
    assert slope.tolist() == [[1.25, -5], [0, -0.75]]


def test_the_server_takes_the_sign_of_the_weighted_sum_and_keeps_it_at_a_tie():
    signs = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0]]).bool()
    counts = torch.tensor([10, 30, 20])
    for previous in (True, False):
        news = aggregate(signs, counts, torch.full((4,), previous))
        assert news.tolist() == [True, previous, False, previous]


@pytest.mark.parametrize("seed", range(5))
def test_aggregation_is_that_of_a_loop(seed):
    generator = seeded(seed)
    signs = torch.rand(6, 50, generator=generator) < 0.5
    counts = torch.randint(1, 9, (6,), generator=generator)
    previous = torch.rand(50, generator=generator) < 0.5
    expected = []
    for bit in range(50):
        p = sum(int(n) * (1 if one else -1) for n, one in zip(counts, signs[:, bit])) / int(counts.sum())
        expected.append(bool(previous[bit]) if p == 0 else p > 0)
    assert aggregate(signs, counts, previous).tolist() == expected


@pytest.mark.parametrize("k", [1, 7, 8, 9, 12_928, 12_929])
def test_a_message_is_one_bit_a_sign(k):
    signs = torch.rand(k, generator=seeded(k)) < 0.5
    message = packed(signs)
    assert message.dtype == torch.uint8
    assert message.nbytes == math.ceil(k / 8) == len(message.numpy().tobytes())
    assert torch.equal(unpacked(message, k), signs)


def test_received_signs_hold_and_progress_is_kept():
    scores = torch.tensor([0.05, -0.05, 0.05, -0.05])
    received = torch.tensor([True, True, False, False])
    kept = adopted(scores, received, "project", 0.1)
    assert torch.equal(signs_of(kept), received)
    assert kept[0] == scores[0], "agreement leaves a score alone"
    assert kept[3] == scores[3]
    assert kept[1] == 0, "disagreement moves it just over the edge"
    assert -1e-30 < kept[2] < 0
    assert adopted(scores, received, "signs", 0.1).tolist() == pytest.approx([0.1, 0.1, -0.1, -0.1])


# -- the pruner ------------------------------------------------------------------------------------------------------


def federation(sizes=((8, 8), (16,), (8, 8, 8)), seed=0, dtype=torch.float32):
    generator = seeded(seed)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            scale = (2 / parameter.shape[1]) ** 0.5 if parameter.ndim > 1 else 0.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    teacher = torch.randn(12, 3, generator=generator)
    clients = []
    for own in sizes:
        parts = [torch.randn(size, 12, generator=generator) for size in own]
        clients.append([{"x": part.to(dtype), "y": (part @ teacher).argmax(1)} for part in parts])
    return model.to(dtype), clients


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch["x"]).float(), batch["y"])


def accuracy(model, batches):
    return torch.cat([(model(one["x"]).argmax(1) == one["y"]).float() for one in batches]).mean().item()


ALL = Rule(exclude=())


def run(pruner, model, clients, sparsity=0.5, task=PruneTask, seed=3, **extras):
    given = task(
        Budget(sparsity=sparsity),
        loss=cross_entropy,
        generator=seeded(seed),
        prunable=ALL,
        extras={"clients": clients, **extras},
    )
    return pruner.prune(model, given)


def start_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_magnitudes_are_untouched_and_only_signs_move():
    model, clients = federation()
    start = start_of(model)
    result = run(HideNSeek(communications=6, lr=0.05), model, clients)
    flipped = 0
    for name, mask in result.masks.items():
        weight = model.get_parameter(name).detach()
        assert torch.equal(weight.abs(), start[name].abs() * mask.keep)
        flipped += int((weight[mask.keep] != start[name][mask.keep]).sum())
    assert 0 < flipped < result.report.kept
    assert torch.equal(model[0].bias, start["0.bias"])
    assert result.report.kept == round(0.5 * result.report.total)


def test_the_mask_has_seen_no_data():
    model, clients = federation()
    other, _ = federation()
    strange = [[{"x": 100 * torch.randn(5, 12, generator=seeded(8)), "y": torch.zeros(5).long()}]]
    masks = run(HideNSeek(communications=1), model, clients).masks
    for name, mask in run(HideNSeek(communications=1), other, strange).masks.items():
        assert torch.equal(mask.keep, masks[name].keep)


def test_signs_are_learned():
    model, clients = federation(((32, 32), (32,), (32, 32, 32)))
    together = [batch for own in clients for batch in own]
    before = accuracy(model, together)
    result = run(HideNSeek(communications=12, lr=0.03), model, clients)
    assert result.history[-1]["loss"] < 0.6 * result.history[0]["loss"]
    assert accuracy(model, together) > max(0.75, before + 0.2)


def test_one_client_is_the_server():
    model, clients = federation(((16, 16),))
    result = run(HideNSeek(communications=5, lr=0.05), model, clients)
    signs = result.artifacts["signs"]
    assert torch.equal(signs["global"], signs["client-0"])
    assert {entry["agreement"] for entry in result.history} == {1.0}


def test_bytes_are_those_of_the_messages():
    model, clients = federation()
    total = sum(weight.numel() for weight in (model[0].weight, model[2].weight, model[4].weight))
    result = run(HideNSeek(communications=4), model, clients, sparsity=0.7)
    k = result.report.kept
    assert k == round(0.3 * total)
    message = math.ceil(k / 8)
    facts = result.facts
    assert all(
        one.dtype == torch.uint8 and one.nbytes == message for one in result.artifacts["signs"].values()
    )
    assert set(result.artifacts["signs"]) == {"global", "client-0", "client-1", "client-2"}
    assert facts["upload_bytes_of_a_message"] == message
    assert facts["upload_bytes"] == facts["download_bytes"] == 4 * 3 * message
    assert facts["upload_bytes_as_32_bit_weights"] == 4 * 3 * 4 * total
    assert facts["mask_bytes_once"] == math.ceil(total / 8)
    few = run(HideNSeek(communications=4, participation=0.4), federation()[0], clients, sparsity=0.7)
    assert few.facts["upload_bytes"] == 4 * 1 * message


def test_the_messages_rebuild_every_clients_model():
    model, clients = federation()
    start = start_of(model)
    result = run(HideNSeek(communications=6, lr=0.05), model, clients)
    shared = start_of(model)
    signs = result.artifacts["signs"]
    personalise(model, result.masks, signs["global"], start)
    assert all(torch.equal(value, shared[name]) for name, value in model.state_dict().items())
    kept = torch.cat([mask.keep.flatten() for mask in result.masks.values()])
    weights = {}
    for number in range(3):
        personalise(model, result.masks, signs[f"client-{number}"], start)
        weights[number] = torch.cat([model.get_parameter(name).detach().flatten() for name in result.masks])
        first = torch.cat([start[name].flatten() for name in result.masks])
        bits = np.unpackbits(signs[f"client-{number}"].numpy(), count=int(kept.sum())).astype(bool)
        assert np.array_equal((weights[number][kept] == first[kept]).numpy(), bits)
    assert not torch.equal(weights[0], weights[2])


def test_the_global_signs_are_the_weighted_majority_of_the_last_messages():
    model, clients = federation()
    result = run(HideNSeek(communications=1, lr=0.2), model, clients)
    k, signs = result.report.kept, result.artifacts["signs"]
    sent = torch.stack([unpacked(signs[f"client-{number}"], k) for number in range(3)])
    # 16, 16 and 24 samples.
    expected = aggregate(sent, torch.tensor([16, 16, 24]), torch.ones(k, dtype=torch.bool))
    assert torch.equal(unpacked(signs["global"], k), expected)
    assert not torch.equal(sent[0], sent[2])
    assert result.history[0]["flipped"] == pytest.approx((~expected).double().mean().item())
    assert result.history[0]["flipped"] > 0


def test_other_settings_are_other_methods():
    def weights(**options):
        model, clients = federation()
        run(HideNSeek(communications=4, lr=0.05, **options), model, clients)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    plain = weights()
    others = [
        weights(restart="signs"),
        weights(rounds=20),
        weights(participation=0.4),
        weights(rescale=True),
        weights(values="zero-one"),
        weights(epochs=1),
        weights(initial=0.02),
    ]
    assert all(not torch.equal(plain, other) for other in others)


def test_rescaled_layers_have_the_root_of_their_share():
    model, clients = federation()
    start = start_of(model)
    result = run(HideNSeek(communications=1, rescale=True), model, clients)
    for name, mask in result.masks.items():
        expected = start[name].abs() / math.sqrt(mask.keep.float().mean()) * mask.keep
        torch.testing.assert_close(model.get_parameter(name).detach().abs(), expected)


def test_zero_one_masks_are_the_comparison():
    model, clients = federation()
    start = start_of(model)
    result = run(HideNSeek(communications=6, lr=0.05, values="zero-one"), model, clients)
    zeros = 0
    for name, mask in result.masks.items():
        weight = model.get_parameter(name).detach()
        assert ((weight == start[name]) | (weight == 0))[mask.keep].all()
        zeros += int((weight == 0)[mask.keep].sum())
    assert zeros > 0


class Killed(Exception):
    pass


class Interrupted(PruneTask):
    def steps(self, total, state):
        path, at, resumed = self.extras["path"], self.extras["at"], self.extras["resumed"]
        if resumed:
            states, _ = load_checkpoint(path)
            for name, thing in state.items():
                restore(thing, states[name], name, path)
        for step in super().steps(total, state):
            if resumed and step.index < at:
                continue
            yield step
            if not resumed and step.index + 1 == at:
                save_checkpoint(path, state, {})
                raise Killed


def test_a_killed_run_goes_on_to_the_same_signs(tmp_path):
    pruner = HideNSeek(communications=6, participation=0.7, lr=0.05)
    whole, clients = federation()
    expected = run(pruner, whole, clients)
    killed, _ = federation()
    start = start_of(killed)
    where = {"path": tmp_path / "loop.safetensors", "at": 3}
    with pytest.raises(Killed):
        run(pruner, killed, clients, task=Interrupted, resumed=False, **where)
    assert all(torch.equal(value, start[name]) for name, value in killed.state_dict().items())
    resumed, _ = federation()
    result = run(pruner, resumed, clients, task=Interrupted, resumed=True, **where)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    for name, message in expected.artifacts["signs"].items():
        assert torch.equal(result.artifacts["signs"][name], message)
    assert result.facts == expected.facts


def test_what_is_wrong_is_said_and_the_model_is_left():
    model, clients = federation()
    start = start_of(model)
    with pytest.raises(
        BadBudget, match="hidenseek does not meet a budget of pattern; give it one of sparsity"
    ):
        HideNSeek().prune(
            model, PruneTask(Budget(pattern="2:4"), loss=cross_entropy, extras={"clients": clients})
        )
    for broken in ({}, {"clients": []}, {"clients": [clients[0], []]}):
        with pytest.raises(BadData, match="hidenseek trains on clients and a loss"):
            HideNSeek().prune(model, PruneTask(Budget(sparsity=0.5), loss=cross_entropy, extras=broken))
    task = PruneTask(
        Budget(sparsity=0.5),
        loss=lambda model, batch: cross_entropy(model, batch) * math.nan,
        extras={"clients": clients},
    )
    with pytest.raises(NumericalError, match="the loss is nan at communication 1 of 15"):
        HideNSeek().prune(model, task)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    explosive = chain(*(torch.full((2, 2), 1e30) for _ in range(12)))
    with pytest.raises(NumericalError, match="the saliency's flow is inf in float64"):
        scores_of(explosive)


# -- models it was not written for -----------------------------------------------------------------------------------


def first_feature(model, batch):
    out = model(batch["pixels"]) if "pixels" in batch else model(input_ids=batch["tokens"])
    found = getattr(out, "logits", None)
    return (out.last_hidden_state[..., 0] if found is None else found[..., 0]).float().mean()


TOKENS = {"tokens": torch.randint(0, 40, (4, 16), generator=seeded())}
PIXELS = {"pixels": torch.randn(2, 3, 32, 32, generator=seeded(1))}


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
    )


MODELS = {
    "gpt2": (gpt2, TOKENS),
    "llama": (lambda: causal_language_model(vocabulary=40, length=16, width=16, depth=2, heads=2), TOKENS),
    "bert": (
        lambda: masked_language_model(vocabulary=40, length=16, mask_token=3, width=16, depth=1, heads=2),
        TOKENS,
    ),
    "vit": (lambda: vision_transformer(width=16, depth=2, heads=2), PIXELS),
    "resnet": (lambda: convolutional_network(width=8, depth=1), PIXELS),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_model(name, dtype):
    make, batch = MODELS[name]
    model = make().to(dtype)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    implementation = model.config._attn_implementation
    start = start_of(model)
    task = PruneTask(
        Budget(sparsity=0.6),
        loss=first_feature,
        generator=seeded(),
        extras={"clients": [[batch], [batch, batch]]},
    )
    result = HideNSeek(communications=2, epochs=1, lr=0.3, rounds=3).prune(model, task)
    assert result.report.kept == kept_count(result.report.total, 0.6)
    assert all(layer.kept > 0 for layer in result.report.layers)
    moved = 0
    for weight in prunable_weights(model):
        keep = result.masks[weight.name].keep
        assert torch.equal(weight.parameter.detach().abs(), start[weight.name].abs() * keep)
        moved += int((weight.parameter.detach()[keep] != start.pop(weight.name)[keep]).sum())
    assert moved > 0
    assert all(torch.equal(value, start[key]) for key, value in model.state_dict().items() if key in start)
    assert model.config._attn_implementation == implementation
    assert len(result.artifacts["signs"]["global"]) == math.ceil(result.report.kept / 8)


def test_its_signs_go_into_another_papers_pruner():
    model, clients = federation()
    result = run(HideNSeek(communications=2), model, clients)
    task = PruneTask(Budget(sparsity=0.75), prunable=ALL)
    again = maskwright.create("pruner", "magnitude", compare="global").prune(model, task)
    assert again.report.sparsity == 0.75
    for name, mask in again.masks.items():
        assert not (mask.keep & ~result.masks[name].keep).any()


def test_settings_are_checked():
    with pytest.raises(maskwright.errors.BadParameter, match="restart='mean' must be one of project, signs"):
        HideNSeek(restart="mean")
    assert attrs.evolve(HideNSeek(), rounds=100).rounds == 100
