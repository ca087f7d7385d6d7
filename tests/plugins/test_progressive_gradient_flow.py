"""nm-decay: its masks, schedules and gradients, that both ends are dense and SR-STE training, and what is left of a model."""

import math

import attrs
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import maskwright
from maskwright import Budget, PruneTask
from maskwright.backbones.defaults import causal_language_model, vision_transformer
from maskwright.errors import BadBudget, BadData, BadParameter, NumericalError
from maskwright.jobs.checkpoint import load_checkpoint, restore, save_checkpoint
from maskwright.plugins.progressive_gradient_flow.pruner import (
    NmDecay,
    effective,
    exponential_flow,
    frame_starts,
    geometric_patterns,
    gradient,
    learning_rate,
    linear_flow,
    magnitude_mask,
    stepwise_patterns,
)
from maskwright.testing import conformance
from maskwright.toolkit.prunable import Rule, prunable_weights

CHECKS = conformance(NmDecay)


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_conformance(check):
    check()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


# -- the equations ---------------------------------------------------------------------------------------------------


def naive_mask(matrix, n, m, dimension):
    keep = torch.zeros(matrix.shape, dtype=torch.bool)
    lines, marks = (matrix, keep) if dimension == "row" else (matrix.T, keep.T)
    for line, marked in zip(lines, marks):
        for start in range(0, len(line), m):
            group = line[start : start + m].abs()
            marked[start : start + m][group.argsort(descending=True, stable=True)[:n]] = True
    return keep


@pytest.mark.parametrize("dimension", ["row", "col"])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (1, 8), (15, 16), (1, 16), (1, 32), (3, 6)])
def test_the_mask_is_that_of_a_loop_over_groups_at_any_scale(n, m, dimension):
    weight = randn(2 * m, 2 * m)
    keep = magnitude_mask(weight, n, m, dimension)
    assert torch.equal(keep, naive_mask(weight, n, m, dimension))
    assert int(keep.sum()) == weight.numel() * n // m
    along = keep if dimension == "row" else keep.T
    assert (along.unflatten(1, (-1, m)).sum(-1) == n).all()
    for factor in (1e-3, 7.0, -1.0):
        assert torch.equal(magnitude_mask(weight * factor, n, m, dimension), keep)


def test_how_much_flows():
    assert linear_flow(1e-3, 300) == pytest.approx(0.7)
    assert linear_flow(1e-3, 1500) == 0
    assert exponential_flow(1e-3, 300) == pytest.approx(0.740818, abs=1e-6)
    assert exponential_flow(1e-4, 20_001) == pytest.approx(0.135322, abs=1e-6)
    assert linear_flow(1e-3, 0) == exponential_flow(1e-3, 0) == 1


def test_the_ends_of_the_effective_weight_are_the_dense_weight_and_the_hard_mask():
    weight = randn(8, 32)
    keep = magnitude_mask(weight, 1, 8)
    assert torch.equal(effective(weight, keep, 1.0), weight)
    assert torch.equal(effective(weight, keep, 0.0), weight * keep)


def test_one_group_by_hand():
    weight = torch.tensor([[3.0, -1, 2, 0.5]])
    keep = magnitude_mask(weight, 1, 4)
    assert effective(weight, keep, 0.25).tolist() == [[3, -0.25, 0.5, 0.125]]
    assert gradient(torch.ones(1, 4), weight, keep, 0.25, "masked").tolist() == [[1, 0.25, 0.25, 0.25]]


@pytest.mark.parametrize("flow", [1.0, 0.3, 0.0])
def test_the_masked_gradient_is_autograds_and_the_others_are_as_named(flow):
    weight, upstream = randn(8, 16, dtype=torch.float64), randn(8, 16, seed=1, dtype=torch.float64)
    keep = magnitude_mask(weight, 2, 8)
    leaf = weight.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(effective(leaf, keep, flow), leaf, upstream)
    masked = gradient(upstream, weight, keep, flow, "masked")
    assert torch.equal(masked, by_autograd)
    assert torch.equal(masked, upstream * (keep.double() + (~keep).double() * flow))
    assert torch.equal(gradient(upstream, weight, keep, flow, "straight-through"), upstream)
    extra = gradient(upstream, weight, keep, flow, "sr-ste", 2e-4)
    torch.testing.assert_close(extra, upstream + ~keep * weight * 2e-4, rtol=0, atol=1e-15)
    assert torch.equal(extra[keep], upstream[keep])


def test_the_ends_of_the_masked_gradient_are_dense_and_hard():
    weight, upstream = randn(8, 16), randn(8, 16, seed=1)
    keep = magnitude_mask(weight, 2, 4)
    assert torch.equal(gradient(upstream, weight, keep, 1.0, "masked"), upstream)
    assert torch.equal(gradient(upstream, weight, keep, 0.0, "masked"), upstream * keep)


# -- schedules -------------------------------------------------------------------------------------------------------


def test_the_frames_of_the_paper():
    assert stepwise_patterns(1, 16) == [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]
    assert frame_starts(5, 5, 90) == [5, 22, 39, 56, 73]
    assert geometric_patterns(1, 8) == [(8, 64), (4, 32), (2, 16), (1, 8)]
    assert frame_starts(4, 5, 90) == [5, 26, 47, 68]


@pytest.mark.parametrize(("n", "m"), [(3, 8), (1, 6), (6, 8), (5, 16), (2, 4), (1, 2), (7, 8)])
def test_stepwise_tightens_to_the_target_whatever_the_ratio(n, m):
    patterns = stepwise_patterns(n, m)
    kept = [one for one, _ in patterns]
    assert patterns[-1] == (n, m)
    assert kept == sorted(kept, reverse=True)
    assert all(group == m for _, group in patterns)


def test_what_holds_in_each_step():
    step_wise = NmDecay(steps=100, decay="stepwise", dense=0.05, fine_tune=0.1)
    inside = {"w": (1, 16)}
    phases = [step_wise.phase(step, inside) for step in range(100)]
    assert [phase.patterns for phase in phases[:5]] == [None] * 5
    assert {phase.flow for phase in phases[:5]} == {1.0}
    assert {phase.flow for phase in phases[5:]} == {0.0}
    kept = [phase.patterns["w"][0] for phase in phases[5:]]
    assert kept == [15] * 17 + [8] * 17 + [4] * 17 + [2] * 17 + [1] * 27

    geometric = attrs.evolve(step_wise, decay="geometric")
    patterns = [geometric.phase(step, {"w": (1, 8)}).patterns["w"] for step in range(5, 100)]
    assert patterns == [(8, 64)] * 21 + [(4, 32)] * 21 + [(2, 16)] * 21 + [(1, 8)] * 32

    fading = NmDecay(steps=100, decay="exponential", beta=0.01, dense=0.05, fine_tune=0.1)
    flows = [fading.phase(step, inside).flow for step in range(100)]
    assert flows[:6] == [1.0] * 6
    assert flows[89] == pytest.approx(math.exp(-0.84))
    assert flows[90:] == [0.0] * 10
    assert all(fading.phase(step, inside).patterns == inside for step in range(5, 100))


def test_without_a_coefficient_the_decay_spans_its_phase():
    span = {"steps": 1000, "dense": 0.1, "fine_tune": 0.1}
    straight, curved = NmDecay(decay="linear", **span), NmDecay(**span)
    assert [straight.phase(step, {}).flow for step in (100, 500, 899)] == pytest.approx([1, 0.5, 1 / 800])
    assert curved.phase(500, {}).flow == pytest.approx(math.exp(-10.9 / 2))


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(1.0, 0.1, 0.2, step / 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(0.55)
    assert rates[20] == pytest.approx(0.55 + 0.45 * math.cos(0.2 * math.pi))
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[50] == pytest.approx(0.55)


# -- the pruner ------------------------------------------------------------------------------------------------------


def problem(seed=0, norm=False, width=32):
    generator = seeded(seed)
    middle = [nn.BatchNorm1d(width), nn.Dropout(0.2)] if norm else []
    model = nn.Sequential(nn.Linear(16, width), *middle, nn.ReLU(), nn.Linear(width, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(5, 24, 16, generator=generator)
    return model, [{"x": part, "y": part[:, :4].abs().argmax(1)} for part in x]


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch["x"]).float(), batch["y"])


def run(pruner, model, batches, pattern="1:8", task=PruneTask, **other):
    given = task(Budget(pattern=pattern), batches, cross_entropy, seeded(3), **other)
    return pruner.prune(model, given)


def dense_training(model, batches, steps, rate, weight_decay=0.01):
    """The same optimiser in an ordinary loop."""
    matrices = [one for one in model.parameters() if one.ndim > 1]
    vectors = [one for one in model.parameters() if one.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], weight_decay=weight_decay
    )
    for step in range(steps):
        loss = cross_entropy(model, batches[step % len(batches)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(rate, 1e-7, 15 / 350, step / steps)
        optimizer.step()


def after(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "pruner",
    [
        NmDecay(steps=12, dense=1.0),
        NmDecay(steps=12, beta=0.0),
        NmDecay(steps=12, beta=0.0, decay="linear", gradient="straight-through"),
    ],
    ids=["dense phase", "D = 1, masked", "D = 1, straight-through"],
)
def test_where_all_flows_it_is_dense_training_bit_for_bit(pruner):
    model, batches = problem()
    plain, _ = problem()
    result = run(pruner, model, batches)
    dense_training(plain, batches, 12, 1e-3)
    for name, value in plain.named_parameters():
        expected = value.detach()
        if name in result.masks:
            keep = magnitude_mask(expected, 1, 8)
            assert torch.equal(result.masks[name].keep, keep)
            expected = expected * keep
        assert torch.equal(model.get_parameter(name).detach(), expected)


class Masked(torch.autograd.Function):
    """SR-STE as its authors write it down: a reference."""

    @staticmethod
    def forward(ctx, weight, keep):
        ctx.save_for_backward(weight, keep)
        return weight * keep

    @staticmethod
    def backward(ctx, upstream):
        weight, keep = ctx.saved_tensors
        return upstream + 2e-4 * ~keep * weight, None


@pytest.mark.parametrize("kind", ["sr-ste", "masked", "straight-through"])
def test_where_nothing_flows_it_is_hard_mask_training(kind):
    """Against autograd through W ⊙ Φ in an ordinary loop, with the mask of the moment."""
    model, batches = problem()
    run(NmDecay(steps=10, decay="none", gradient=kind), model, batches)
    faded, _ = problem()
    run(NmDecay(steps=10, beta=1e9, dense=0, gradient=kind, fine_tune=1.0), faded, batches)

    plain, _ = problem()

    class Forward(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = plain

        def forward(self, x):
            for layer in self.inner:
                if isinstance(layer, nn.Linear):
                    keep = naive_mask(layer.weight.detach(), 1, 8, "row")
                    if kind == "sr-ste":
                        weight = Masked.apply(layer.weight, keep)
                    elif kind == "masked":
                        weight = layer.weight * keep
                    else:
                        weight = layer.weight + (layer.weight * ~keep * -1).detach()
                    x = F.linear(x, weight, layer.bias)
                else:
                    x = layer(x)
            return x

    dense_training(Forward(), batches, 10, 1e-3)
    for name, value in plain.named_parameters():
        keep = naive_mask(value.detach(), 1, 8, "row") if value.ndim > 1 else True
        torch.testing.assert_close(model.get_parameter(name).detach(), value.detach() * keep)
        assert torch.equal(faded.get_parameter(name), model.get_parameter(name))


def test_each_way_of_decaying_and_each_gradient_trains_differently():
    found = []
    for options in (
        {},
        {"decay": "linear"},
        {"gradient": "straight-through"},
        {"gradient": "sr-ste", "strength": 0.1},
        {"decay": "stepwise"},
        {"decay": "none"},
        {"decay": "none", "gradient": "straight-through"},
        {"dimension": "col", "decay": "linear"},
    ):
        model, batches = problem()
        result = run(NmDecay(steps=40, lr=1e-2, **options), model, batches, "1:4")
        assert result.report.sparsity == 0.75
        losses = [entry["loss"] for entry in result.history]
        assert sum(losses[-5:]) < sum(losses[:5])
        found.append(after(model)["0.weight"])
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_the_export_has_exactly_n_of_m():
    model, batches = problem()
    result = run(NmDecay(steps=8, fine_tune=0.5), model, batches)
    weight = model[2].weight.detach()
    assert weight.shape == (4, 32)
    assert int(weight.count_nonzero()) == 16
    assert (weight.unflatten(1, (-1, 8)).count_nonzero(dim=-1) == 1).all()
    assert [entry["flow"] for entry in result.history[4:]] == [0.0] * 4
    column, _ = problem()
    run(NmDecay(steps=8, dimension="col"), column, batches, "1:4")
    assert (column[0].weight.detach().unflatten(0, (-1, 4)).count_nonzero(dim=1) == 1).all()
    assert int(magnitude_mask(randn(8, 32), 1, 8).sum()) == 32


def test_in_the_last_phase_the_model_that_is_trained_is_the_one_that_is_exported():
    """The loss of the last step is that of the binary model: nothing outside the mask helps it."""
    model, batches = problem()
    seen = []

    def watched(model, batch):
        seen.append((model[0].weight.detach().clone(), model[2].weight.detach().clone()))
        return cross_entropy(model, batch)

    pruner = NmDecay(steps=20, fine_tune=0.25, lr=1e-2)
    pruner.prune(model, PruneTask(Budget(pattern="1:8"), batches, watched, seeded()))
    shares = [float((first != 0).float().mean()) for first, _ in seen]
    assert shares == [1.0] * 15 + [0.125] * 5


def test_patterns_by_name_are_passed_by_value():
    model, batches = problem()
    result = run(NmDecay(steps=2, patterns=("2.*=2:4",)), model, batches, "1:8")
    assert {layer.name: layer.sparsity for layer in result.report.layers} == {
        "0.weight": 0.875,
        "2.weight": 0.5,
    }


class Killed(Exception):
    pass


class Interrupted(PruneTask):
    """Saves after `at` steps to a file, or goes on from there."""

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


@pytest.mark.parametrize("decay", ["exponential", "stepwise"])
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path, decay):
    """Also in the middle of a frame, with running statistics and dropout."""
    pruner = NmDecay(steps=12, decay=decay, lr=1e-2, dense=0.25)
    whole, batches = problem(norm=True)
    run(pruner, whole, batches)
    path = tmp_path / "loop.safetensors"
    extras = {"path": path, "at": 7, "resumed": False}
    killed, _ = problem(norm=True)
    with pytest.raises(Killed):
        run(pruner, killed, batches, task=Interrupted, extras=extras)
    resumed, _ = problem(norm=True)
    run(pruner, resumed, batches, task=Interrupted, extras={**extras, "resumed": True})
    for name, value in after(whole).items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_dropout_follows_the_generator_and_statistics_the_data():
    results = []
    for seed in (1, 1, 2):
        model, batches = problem(norm=True)
        start, before = after(model), torch.get_rng_state()
        task = PruneTask(Budget(pattern="1:8"), batches, cross_entropy, seeded(seed))
        NmDecay(steps=5).prune(model.eval(), task)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(after(model))
        assert not model.training
        assert not torch.equal(start["1.running_mean"], results[-1]["1.running_mean"])
        assert int(results[-1]["1.num_batches_tracked"]) == 5
    assert torch.equal(results[0]["0.weight"], results[1]["0.weight"])
    assert not torch.equal(results[0]["0.weight"], results[2]["0.weight"])


def test_only_prunable_weights_move_when_asked_and_frozen_parameters_never():
    model, batches = problem()
    start = after(model)
    run(NmDecay(steps=4, train="prunable"), model, batches)
    assert torch.equal(model[0].bias, start["0.bias"])
    frozen, _ = problem()
    frozen[0].bias.requires_grad_(False)
    run(NmDecay(steps=4), frozen, batches)
    assert torch.equal(frozen[0].bias, start["0.bias"])
    assert not torch.equal(frozen[2].bias, start["2.bias"])
    assert not frozen[0].bias.requires_grad


def test_half_precision_learns_in_single_precision():
    """Steps far below the resolution of bfloat16 add up."""
    model, batches = problem()
    start = after(model.to(torch.bfloat16))
    batches = [{"x": one["x"].bfloat16(), "y": one["y"]} for one in batches]
    run(NmDecay(steps=60, lr=2e-4, warmup=0.0, beta=0.0), model, batches, "2:4")
    moved = (model[0].bias.detach().float() - start["0.bias"].float()).abs().max()
    assert moved > 2e-3
    assert model[0].weight.dtype == torch.bfloat16


def test_what_is_wrong_is_said():
    model, batches = problem()
    with pytest.raises(
        BadBudget, match="nm-decay does not meet a budget of sparsity; give it one of pattern"
    ):
        NmDecay().prune(model, PruneTask(Budget(sparsity=0.5), batches, cross_entropy))
    with pytest.raises(BadBudget, match=r"1:3 does not fit 0\.weight \[32, 16\]: its 16 inputs"):
        run(NmDecay(), model, batches, "1:3")
    with pytest.raises(BadBudget, match=r"8:64 does not fit 0\.weight"):
        run(NmDecay(decay="geometric"), model, batches, "1:8")
    with pytest.raises(BadBudget, match=r"1:8 does not fit 2\.weight \[4, 32\]: its 4 outputs"):
        run(NmDecay(dimension="col"), model, batches)
    with pytest.raises(BadData, match="nm-decay trains on batches and a loss"):
        NmDecay().prune(model, PruneTask(Budget(pattern="2:4")))
    with pytest.raises(BadParameter, match=r"dense=0\.7 and fine_tune=0\.5 are shares of one run"):
        NmDecay(dense=0.7, fine_tune=0.5)
    with pytest.raises(BadParameter, match="WILDCARD=N:M"):
        NmDecay(patterns=("mlp",))
    start = after(model)
    task = PruneTask(
        Budget(pattern="2:4"), batches, lambda model, batch: cross_entropy(model, batch) * math.nan
    )
    with pytest.raises(NumericalError, match=r"the loss is nan .* at step 1 of 3"):
        NmDecay(steps=3).prune(model, task)
    assert all(torch.equal(value, start[name]) for name, value in after(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_that_two_modules_share_are_trained_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    batches = [{"x": randn(6, 8), "y": torch.arange(6)}]
    result = run(NmDecay(steps=3), model, batches, "2:4")
    assert list(result.masks) == ["0.weight"]
    assert model[2].weight is model[0].weight
    assert int(model[0].weight.count_nonzero()) == 32


# -- models it was not written for -----------------------------------------------------------------------------------


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
    )


def resnet():
    return transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )


def squared(model, batch):
    out = model(batch["pixels"]) if "pixels" in batch else model(input_ids=batch["tokens"])
    found = getattr(out, "logits", None)
    return (out.last_hidden_state if found is None else found).float().square().mean()


TOKENS = {"tokens": torch.randint(0, 40, (4, 16), generator=seeded())}
PIXELS = {"pixels": torch.randn(2, 3, 32, 32, generator=seeded(1))}
MODELS = {
    "llama": (lambda: causal_language_model(vocabulary=40, length=16, width=16, depth=1, heads=2), TOKENS),
    "gpt2": (gpt2, TOKENS),
    "vit": (lambda: vision_transformer(width=16, depth=1, heads=2), PIXELS),
    "resnet": (resnet, PIXELS),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", ["exponential", "stepwise"])
def test_any_model(name, dtype, decay):
    torch.manual_seed(0)
    make, batch = MODELS[name]
    model = make().to(dtype)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    # The three channels of a picture have no groups of four.
    rule = Rule(include=("encoder*",)) if name == "resnet" else None
    task = PruneTask(Budget(pattern="1:4"), [batch], squared, seeded(), prunable=rule)
    result = NmDecay(steps=2, decay=decay).prune(model, task)
    assert result.report.sparsity == 0.75
    for weight in prunable_weights(model, task.prunable):
        keep = weight.as_matrix(result.masks[weight.name].keep)
        assert (keep.unflatten(1, (-1, 4)).sum(-1) == 1).all()
        assert not weight.matrix[~keep].any()
        assert weight.parameter.dtype == dtype
    assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())


def test_feed_forward_alone_as_in_the_paper_and_another_pruner_after_it():
    """The rule of the task says where; what nm-decay trained goes to a pruner of another paper."""
    model = causal_language_model(vocabulary=40, length=16, width=16, depth=1, heads=2)
    rule = Rule(include=("*mlp*",))
    task = PruneTask(Budget(pattern="1:8"), [TOKENS], squared, seeded(), prunable=rule)
    masks = NmDecay(steps=2).prune(model, task).masks
    assert masks.keys() == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    again = maskwright.create("pruner", "wanda").prune(model, task).masks
    for name, mask in masks.items():
        nonzero = model.get_parameter(name) != 0
        assert torch.equal(nonzero, mask.keep)
        assert torch.equal(again[name].keep, mask.keep), (
            "Wanda keeps the one weight that is left of each group"
        )
