"""MaskLLM: its distribution, schedules, prior and regularisation, and what is left of the model afterwards."""

import math
from itertools import combinations

import attrs
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import maskwright
from maskwright import Budget, Mask, PruneTask
from maskwright.backbones.defaults import causal_language_model, masked_language_model, vision_transformer
from maskwright.errors import BadBudget, BadData, BadParameter, NumericalError
from maskwright.plugins.maskllm.pruner import (
    MaskLlm,
    chosen,
    cosine,
    gumbel,
    linear,
    mixed,
    probabilities,
    straight_through,
    with_prior,
)
from maskwright.testing import conformance
from maskwright.toolkit.masked import replaced
from maskwright.toolkit.patterns import candidates, keep_n_of_m
from maskwright.toolkit.prunable import prunable_weights

CHECKS = conformance(MaskLlm)
TWO_FOUR = Budget(pattern="2:4")
S = candidates(2, 4).double()


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_conformance(check):
    check()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


# -- the distribution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (2, 3)])
def test_each_block_of_a_mixture_sums_to_n(n, m):
    patterns = candidates(n, m).double()
    p = probabilities(randn(len(patterns), 50), randn(len(patterns), 50, seed=1), 100.0, 4.0)
    mask = mixed(p, patterns)
    assert (mask.sum(1) - n).abs().max() < 1e-12
    assert ((mask >= 0) & (mask <= 1 + 1e-12)).all()
    assert (chosen(p, patterns).sum(1) == n).all()


@pytest.mark.parametrize(
    ("fraction", "expected", "kept"),
    [(0.0, [0.321275, 0.151760, 0.071686], 0.624795), (0.5, [0.955007, None, None], 0.977438)],
)
def test_the_case_of_one_block(fraction, expected, kept):
    logits = torch.tensor([0.03, 0, 0, 0, 0, -0.03], dtype=torch.float64)[:, None]
    temperature, scale = linear(4, 0.05, fraction), linear(100, 500, fraction)
    p = probabilities(logits, torch.zeros_like(logits), scale, temperature)[:, 0]
    for place, value in zip((0, 1, 5), expected):
        if value is not None:
            assert p[place].item() == pytest.approx(value, abs=1e-6)
    assert torch.equal(p[1:5], p[1].expand(4))
    mask = mixed(p[:, None], S)[0]
    assert mask.tolist() == pytest.approx([kept, kept, 1 - kept, 1 - kept], abs=1e-6)


def test_schedules_never_quite_reach_their_end():
    last = 1999 / 2000
    assert linear(4, 0.05, last) == pytest.approx(0.051975)
    assert linear(100, 500, last) == pytest.approx(499.8)
    assert linear(4, 0.05, 0.5) == pytest.approx(2.025)
    assert (linear(4, 0.05, 0), linear(100, 500, 0)) == (4, 100)
    assert cosine(5e-4, 5e-5, 0) == 5e-4
    assert cosine(5e-4, 5e-5, 0.5) == pytest.approx(2.75e-4)
    assert cosine(5e-4, 5e-5, 1) == 5e-5


def test_the_defaults_are_those_of_the_official_recipe():
    recipe = attrs.asdict(MaskLlm())
    assert recipe == {
        **{"steps": 2000, "lr": 5e-4, "final_lr": 5e-5, "betas": (0.9, 0.95), "epsilon": 1e-5},
        **{"weight_decay": 0.1, "clip": 1.0, "temperature": 4.0, "final_temperature": 0.05, "scale": 100.0},
        **{"final_scale": 500.0, "prior": "sparsegpt", "prior_strength": 3.0, "regularization": 1e-5},
        **{"hard": False},
    }


def test_a_constant_added_to_a_block_changes_nothing():
    logits, noise = randn(6, 40), randn(6, 40, seed=1)
    moved = logits + 0.25 * torch.arange(40)
    p = probabilities(logits, noise, 100.0, 4.0)
    torch.testing.assert_close(probabilities(moved, noise, 100.0, 4.0), p, rtol=1e-9, atol=1e-12)
    assert torch.equal(chosen(moved, S), chosen(logits, S))


def test_the_first_of_equal_logits_is_chosen():
    assert chosen(torch.zeros(6, 3), S).tolist() == [[1, 1, 0, 0]] * 3


def test_hard_samples_are_binary_with_the_gradient_of_the_mixture():
    logits, noise = randn(6, 20).requires_grad_(), randn(6, 20, seed=1)
    upstream = randn(20, 4, seed=2)
    p = probabilities(logits, noise, 3.0, 1.5)
    mask = straight_through(p, S)
    assert torch.equal(mask.detach(), chosen(p.detach(), S))
    assert set(mask.detach().unique().tolist()) == {0.0, 1.0}
    (hard,) = torch.autograd.grad(mask, logits, upstream, retain_graph=True)
    (soft,) = torch.autograd.grad(mixed(p, S), logits, upstream)
    assert torch.equal(hard, soft)
    assert soft.abs().sum() > 0


def test_noise_is_gumbel_and_comes_from_the_generator():
    noise = gumbel((200_000,), seeded(1))
    assert noise.dtype == torch.float32
    assert torch.equal(noise, gumbel((200_000,), seeded(1)))
    assert noise.mean().item() == pytest.approx(0.577216, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    for level in (-1.0, 0.0, 1.0, 3.0):
        assert (noise <= level).float().mean().item() == pytest.approx(math.exp(-math.exp(-level)), abs=0.005)


def test_samples_follow_the_softmax_of_the_scaled_logits():
    """κ multiplies the logits and not the noise: arg-max of G·κ + g is distributed as softmax(G·κ)."""
    logits = torch.tensor([0.02, 0.0, -0.01, 0.01, 0.0, -0.02])[:, None]
    noise = gumbel((6, 100_000), seeded(2))
    p = probabilities(logits, noise, 100.0, 0.3)
    share = F.one_hot(p.argmax(0), 6).float().mean(0)
    torch.testing.assert_close(share, torch.softmax(logits[:, 0] * 100, 0), atol=0.01, rtol=0)


# -- the prior -------------------------------------------------------------------------------------------------------


def test_the_prior_lifts_its_own_pattern_and_lowers_its_complement():
    logits = 0.01 * randn(6, 2000)
    prior = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64).expand(2000, 4)
    lifted = with_prior(logits, prior, S, 3.0)
    ahead = (lifted - logits) / logits.std() / 3
    torch.testing.assert_close(ahead[:, 0], torch.tensor([0.0, 1, 0, 0, -1, 0], dtype=torch.float64))
    assert torch.equal(with_prior(logits, prior, S, 0.0), logits)


def test_the_prior_does_not_pin_the_start():
    """With α = 3 the arg-max is the prior's pattern in about 94.5 % of the blocks, and a sample in about 73 %."""
    logits = with_prior(
        0.01 * torch.randn(6, 40_000, generator=seeded()),
        torch.tensor([1.0, 0, 1, 0]).expand(40_000, 4),
        S.float(),
        3.0,
    )
    assert (logits.argmax(0) == 1).float().mean().item() == pytest.approx(0.945, abs=0.005)
    p = probabilities(logits, gumbel((6, 40_000), seeded(1)), 100.0, 4.0)
    assert (p.argmax(0) == 1).float().mean().item() == pytest.approx(0.73, abs=0.01)


def test_one_of_four_is_centred_by_its_mean_overlap():
    patterns = candidates(1, 4).double()
    logits = randn(4, 100)
    lifted = with_prior(logits, torch.eye(4, dtype=torch.float64)[:1].expand(100, 4), patterns, 3.0)
    ahead = (lifted - logits) / logits.std() / 3
    torch.testing.assert_close(ahead[:, 0], torch.tensor([0.75, -0.25, -0.25, -0.25], dtype=torch.float64))


def test_regularisation_alone_ends_at_the_magnitude_mask():
    """Gradient ascent on Σ(W ⊙ m̃)² from equal logits, without noise."""
    weight = randn(30, 4)
    logits = torch.zeros(6, 30, dtype=torch.float64, requires_grad=True)
    for _ in range(300):
        mask = mixed(probabilities(logits, torch.zeros_like(logits), 1.0, 1.0), S)
        (gradient,) = torch.autograd.grad((weight * mask).square().sum(), logits)
        logits = (logits + gradient).detach().requires_grad_()
    assert torch.equal(chosen(logits, S).bool(), keep_n_of_m(weight.abs(), 2, 4))


# -- the pruner ------------------------------------------------------------------------------------------------------


def regression(seed=0, rows=8, columns=16):
    """A layer whose task needs what its magnitudes do not show, with batches and a loss."""
    generator = seeded(seed)
    model = nn.Sequential(nn.Linear(columns, rows))
    x = torch.randn(6, 32, columns, generator=generator)
    needed = (torch.rand(columns, generator=generator) < 0.5).float() * 3 + 0.05
    x = x * needed
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    batches = [{"x": part, "y": model(part).detach()} for part in x]
    return model, batches


def squared_error(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def pruned(model, batches, pruner, budget=TWO_FOUR, seed=0, loss=squared_error):
    return pruner.prune(model, PruneTask(budget, batches, loss, seeded(seed)))


FAST = {"steps": 60, "lr": 0.02, "final_lr": 0.002}


def test_weights_are_bit_identical_inside_the_mask_and_zero_outside():
    model, batches = regression()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    result = pruned(model, batches, MaskLlm(**FAST))
    mask = result.masks["0.weight"].keep
    assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert int(mask.sum()) == mask.numel() / 2
    assert torch.equal(model[0].weight.detach(), torch.where(mask, dense["0.weight"], torch.zeros(())))
    assert torch.equal(model[0].bias, dense["0.bias"])
    x = batches[0]["x"]
    assert torch.equal(model(x), F.linear(x, dense["0.weight"] * mask, dense["0.bias"]))


def test_the_learned_mask_is_better_than_every_prior_and_close_to_the_best():
    losses = {}
    for name in ("magnitude", "wanda", "sparsegpt", "maskllm"):
        model, batches = regression(seed=3, rows=1, columns=8)
        if name == "maskllm":
            pruned(model, batches, MaskLlm(steps=300, lr=0.02, final_lr=0.002, regularization=0.0))
        else:
            options = {"update": False} if name == "sparsegpt" else {}
            pruned(model, batches, maskwright.create("pruner", name, **options))
        losses[name] = sum(squared_error(model, batch).item() for batch in batches)
    model, batches = regression(seed=3, rows=1, columns=8)
    dense, every = model[0].weight.detach().clone(), []
    for first in combinations(range(4), 2):
        for second in combinations(range(4, 8), 2):
            kept = torch.zeros(1, 8)
            kept[0, [*first, *second]] = 1
            model[0].weight.data = dense * kept
            every.append(sum(squared_error(model, batch).item() for batch in batches))
    assert losses["maskllm"] == pytest.approx(min(every))
    assert losses["maskllm"] < losses["magnitude"]


def test_the_same_seed_gives_the_same_masks_and_the_global_generator_is_left_alone():
    problems = [regression() for _ in range(3)]
    before = torch.get_rng_state()
    results = [
        pruned(*problem, MaskLlm(steps=5, prior="none"), seed=seed)
        for seed, problem in zip((1, 1, 2), problems)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    keeps = [result.masks["0.weight"].keep for result in results]
    assert torch.equal(keeps[0], keeps[1])
    assert not torch.equal(keeps[0], keeps[2])


def test_the_loss_minus_the_kept_squares_is_minimised_with_the_schedules():
    model, batches = regression()
    calls = []

    class Recording(PruneTask):
        def log(self, step, **metrics):
            calls.append((step.fraction, metrics))

    task = Recording(TWO_FOUR, batches, squared_error, seeded())
    result = MaskLlm(steps=8).prune(model, task)
    assert [fraction for fraction, _ in calls] == [i / 8 for i in range(8)]
    assert [metrics["temperature"] for _, metrics in calls] == [linear(4, 0.05, i / 8) for i in range(8)]
    assert [metrics["scale"] for _, metrics in calls] == [linear(100, 500, i / 8) for i in range(8)]
    assert [entry["loss"] for entry in result.history] == [metrics["loss"] for _, metrics in calls]
    assert 1 / 6 < calls[0][1]["certainty"] < calls[-1][1]["certainty"] <= 1


def test_regularisation_favours_large_weights():
    def missing(regularization):
        """How far the kept squares are from the most that any 2:4 mask keeps."""
        model, batches = regression(rows=32)
        dense = model[0].weight.detach().clone()
        most = (dense * keep_n_of_m(dense.abs(), 2, 4)).square().sum()
        pruner = MaskLlm(**FAST, prior="none", regularization=regularization)
        pruned(model, batches, pruner)
        return (most - model[0].weight.detach().square().sum()).item()

    assert 0 <= missing(10.0) < 0.1 * missing(0.0)


@pytest.mark.parametrize("prior", ["magnitude", "wanda", "sparsegpt", maskwright.create("pruner", "wanda")])
def test_without_training_to_speak_of_the_mask_is_near_its_prior(prior):
    model, batches = regression(rows=64)
    alone, _ = regression(rows=64)
    pruner = maskwright.create("pruner", prior) if isinstance(prior, str) else prior
    if prior == "sparsegpt":
        pruner = maskwright.create("pruner", prior, update=False)
    expected = pruned(alone, batches, pruner).masks["0.weight"].keep
    keep = pruned(model, batches, MaskLlm(steps=1, lr=1e-9, final_lr=0.0, prior=prior)).masks["0.weight"].keep
    same = (keep == expected).unflatten(1, (-1, 4)).all(-1).float().mean().item()
    assert same == pytest.approx(0.945, abs=0.05)


def test_a_plain_model_is_left_also_when_training_fails():
    model, batches = regression()
    model.train()
    model[0].bias.requires_grad_(False)
    parameters = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def failing(model, batch):
        assert not model.training
        return squared_error(model, batch) * float("nan")

    with pytest.raises(NumericalError, match="the loss is nan at step 1 of 5"):
        pruned(model, batches, MaskLlm(steps=5), loss=failing)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert type(model[0]) is nn.Linear
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad, model.training) == (True, False, True)


def test_only_patterns_that_fit_batches_and_known_priors_are_taken():
    model, batches = regression(columns=10)
    with pytest.raises(BadBudget, match="maskllm does not meet a budget of sparsity; give it one of pattern"):
        pruned(model, batches, MaskLlm(), Budget(sparsity=0.5))
    with pytest.raises(BadBudget, match=r"2:4 does not fit 0\.weight \[8, 10\]"):
        pruned(model, batches, MaskLlm())
    with pytest.raises(BadData, match="maskllm trains on batches and a loss"):
        MaskLlm().prune(nn.Linear(4, 4), PruneTask(TWO_FOUR))
    with pytest.raises(BadParameter, match=r"maskllm: prior=3 must be a pruner"):
        MaskLlm(prior=3)
    with pytest.raises(
        maskwright.errors.UnknownComponent, match=r"no pruner 'magnitud'\. Did you mean 'magnitude'"
    ):
        pruned(*regression(), MaskLlm(prior="magnitud"))


# -- models it was not written for ---------------------------------------------------------------------------------


def gpt2():
    config = transformers.GPT2Config(
        **{"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0},
        **{"eos_token_id": 0},
    )
    return transformers.GPT2LMHeadModel(config)


def features(model, batch):
    """Keep what the dense model put out."""
    out = model(batch["pixels"]) if "pixels" in batch else model(input_ids=batch["tokens"])
    found = getattr(out, "logits", None)
    return (out.last_hidden_state if found is None else found).float().square().mean()


TOKENS = {"tokens": torch.randint(0, 40, (4, 16), generator=seeded())}
PIXELS = {"pixels": torch.randn(2, 3, 32, 32, generator=seeded(1))}
MODELS = {
    "llama": (lambda: causal_language_model(vocabulary=40, length=16, width=16, depth=2, heads=2), TOKENS),
    "bert": (
        lambda: masked_language_model(vocabulary=40, length=16, mask_token=3, width=16, depth=2, heads=2),
        TOKENS,
    ),
    "vit": (lambda: vision_transformer(width=16, depth=2, heads=2), PIXELS),
    "gpt2": (gpt2, TOKENS),
    "resnet": (
        lambda: transformers.ResNetModel(
            transformers.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
            )
        ),
        PIXELS,
    ),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hard", [False, True])
def test_any_model(name, dtype, hard):
    torch.manual_seed(0)
    make, batch = MODELS[name]
    model = make().to(dtype)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    result = pruned(model, [batch], MaskLlm(steps=2, hard=hard), Budget(pattern="1:4"), loss=features)
    assert result.report.sparsity == 0.75
    for weight in prunable_weights(model):
        keep = result.masks[weight.name].keep
        assert (weight.as_matrix(keep).unflatten(1, (-1, 4)).sum(-1) == 1).all()
        assert torch.equal(weight.parameter.detach(), state.pop(weight.name) * keep)
        assert weight.parameter.dtype == dtype
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key in state)


def test_a_pruner_of_the_users_own_is_a_prior():
    @attrs.frozen
    class FirstTwo:
        kind = "pruner"
        name = "first-two"
        modalities = frozenset({"text"})
        needs = frozenset()
        budgets = frozenset({"pattern"})
        changes_weights = True

        def prune(self, model, task):
            masks = {}
            for weight in prunable_weights(model, task.prunable):
                keep = torch.tensor([True, True, False, False]).repeat(weight.shape[0], weight.shape[1] // 4)
                weight.write(weight.matrix * 7 * keep)
                masks[weight.name] = Mask(weight.as_parameter(keep))
            return maskwright.PruneResult(model, masks, maskwright.SparsityReport.of(masks))

    model, batches = regression()
    dense = model[0].weight.detach().clone()
    pruner = MaskLlm(steps=1, lr=1e-9, final_lr=0.0, prior=FirstTwo(), prior_strength=100.0)
    keep = pruned(model, batches, pruner).masks["0.weight"].keep
    assert keep.unflatten(1, (-1, 4))[..., :2].all()
    assert torch.equal(model[0].weight.detach(), dense * keep)


def test_weights_that_two_modules_share_are_replaced_in_both():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    weights = prunable_weights(model)
    x = torch.randn(3, 4)
    with replaced(model, weights) as replace:
        replace({"0.weight": 2 * torch.eye(4)})
        assert torch.equal(model(x), 4 * x)
    assert model[0].weight is model[1].weight is weights[0].parameter
