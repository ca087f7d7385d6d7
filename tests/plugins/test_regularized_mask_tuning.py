"""Mask tuning: thresholds, gradient dropout, where masks are, and that weights and everything else stay as they were."""

import copy
import json
import math

import attrs
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

import maskwright
from maskwright import Budget, PruneTask, load_masks, save_masks
from maskwright.backbones.defaults import causal_language_model, masked_language_model, vision_transformer
from maskwright.cli import cli
from maskwright.errors import BadBudget, BadData, BadModel, BadParameter, Interrupted, NumericalError
from maskwright.jobs import execute
from maskwright.jobs.run import Run
from maskwright.jobs.settings import resolve
from maskwright.plugins.regularized_mask_tuning.pruner import (
    Layer,
    MaskTuning,
    agreement,
    attention_weights,
    binarized,
    drift,
    dropped,
    general_loss,
    norms,
)
from maskwright.protocols import Step
from maskwright.testing import conformance
from maskwright.toolkit.masked import replaced
from maskwright.toolkit.prunable import Rule, prunable_weights

CHECKS = conformance(MaskTuning)


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_conformance(check):
    check()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


# -- the equations ---------------------------------------------------------------------------------------------------

TABLE = [
    *[
        ((1, 1), 1),
        ((1, -1), 0.5),
        ((1, -3), 0.25),
        ((-1, 3), 0.25),
        ((-2, -0.5), 1),
        ((3, 0), 1),
        ((0, 1), 0.5),
    ],
]


@pytest.mark.parametrize(("gradients", "expected"), TABLE)
def test_the_probability_to_keep_a_gradient(gradients, expected):
    task, general = (torch.tensor(float(one), dtype=torch.float64) for one in gradients)
    assert agreement(task, general).item() == pytest.approx(expected, abs=1e-8)


def test_the_probability_in_closed_form():
    task, general = randn(1000), randn(1000, seed=1)
    alone = task.abs() / (task.abs() + general.abs())
    expected = torch.where(task.sign() == general.sign(), torch.ones(()).double(), alone)
    torch.testing.assert_close(agreement(task, general), expected, atol=1e-6, rtol=0)


def test_tiny_gradients_are_dropped_although_they_agree():
    """As in the official code: ε is not small beside gradients of 1e-9."""
    tiny = torch.tensor(1e-9, dtype=torch.float64)
    assert agreement(tiny, tiny).item() == pytest.approx(0.5 * (1 + 2e-9 / 1.2e-8))
    assert agreement(tiny, tiny).item() == pytest.approx(0.583, abs=1e-3)


@pytest.mark.parametrize(("strength", "least"), [(0.0, 1.0), (0.3, 0.7), (1.0, 0.0)])
def test_gradients_are_kept_or_scaled_and_never_replaced(strength, least):
    task, general = randn(4000), randn(4000, seed=1)
    g = dropped(task, agreement(task, general), torch.rand(4000, generator=seeded(2)), strength)
    kept = torch.isclose(g, task)
    assert torch.allclose(g[~kept], least * task[~kept])
    agree = task.sign() == general.sign()
    assert kept[agree].all(), "the reference agrees: nothing is lost"
    assert (~kept).any() == (strength > 0)


def test_the_mean_of_many_draws():
    task, general = randn(8), randn(8, seed=1)
    p = agreement(task, general)
    uniform = torch.rand(40_000, 8, generator=seeded(2))
    mean = dropped(task, p, uniform, 0.6).mean(0)
    torch.testing.assert_close(mean, (1 - 0.6 + 0.6 * p) * task, atol=0.02, rtol=0)


def test_what_equals_the_threshold_is_removed():
    masks = torch.tensor([-0.01, 0, 0.004999, 0.005, 0.0050001, 0.01])
    assert binarized(masks, 0.005).tolist() == [False] * 4 + [True] * 2


def test_the_gradient_passes_the_threshold_unchanged_and_misses_the_weight():
    model = nn.Linear(6, 4)
    (weight,) = prunable_weights(model)
    layer = Layer(weight, 0.02 * torch.rand(4, 6, generator=seeded()) - 0.005, 0.005)
    assert 0 < layer.keep.sum() < 24
    upstream = torch.randn(4, 6, generator=seeded(1))
    layer().backward(upstream)
    assert torch.equal(layer.masks.grad, upstream * model.weight.detach())
    assert model.weight.grad is None


def test_the_gradient_of_general_knowledge_is_the_difference_of_what_is_said():
    student, teacher = randn(5, 7).requires_grad_(), randn(5, 7, seed=1).requires_grad_()
    general_loss(student, teacher).backward()
    expected = (student.softmax(-1) - teacher.softmax(-1)) / 5
    torch.testing.assert_close(student.grad, expected.detach(), atol=1e-7, rtol=1e-5)
    assert teacher.grad is None
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1).mean()
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")
    assert general_loss(student, teacher).item() == pytest.approx((kl + entropy).item(), abs=1e-5)


def test_the_temperature_divides_logits_and_its_square_multiplies():
    student, teacher = randn(5, 7), randn(5, 7, seed=1)
    torch.testing.assert_close(
        general_loss(student, teacher, 2.0), 4 * general_loss(student / 2, teacher / 2)
    )


def test_features_drift_by_half_their_squared_distance():
    student, teacher = randn(5, 7).requires_grad_(), randn(5, 7, seed=1)
    drift(student, teacher).backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 5)


def test_norms_are_plain():
    one, two = randn(3, 4).requires_grad_(), randn(5, seed=1)
    norms([one, two]).backward()
    torch.testing.assert_close(norms([one, two]).item(), one.norm().item() + two.norm().item())
    torch.testing.assert_close(one.grad, one.detach() / one.detach().norm())


# -- the pruner ------------------------------------------------------------------------------------------------------


def problem(seed=0):
    """A classifier without attention, and batches of four classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Dropout(0.5), nn.ReLU(), nn.Linear(24, 4)
        )
    generator = seeded(seed)
    centres = 2 * torch.randn(4, 12, generator=generator)
    labels = torch.randint(0, 4, (5, 32), generator=generator)
    return model, [
        {"x": centres[part] + torch.randn(32, 12, generator=generator), "y": part} for part in labels
    ]


def class_loss(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])


class Watched(PruneTask):
    """A task that keeps what was logged."""

    def log(self, step, **metrics):
        self.seen = [*getattr(self, "seen", []), metrics]


def tuned(model, batches, pruner, seed=0, loss=class_loss, rule=None):
    return pruner.prune(model, PruneTask(None, batches, loss, seeded(seed), prunable=rule))


FAST = {"steps": 12, "epochs": 3, "lr": 2e-3}


def test_the_defaults_are_those_of_the_official_configuration():
    assert attrs.asdict(MaskTuning()) == {
        **{"steps": 1500, "epochs": 30, "lr": 8e-5, "where": "attention", "start": "constant", "scale": 1e-2},
        **{"threshold": 5e-3, "norm": 1e-4, "dropout": 1.0, "temperature": 1.0},
    }


def test_everything_but_the_masked_entries_is_bit_identical_and_counted():
    model, batches = problem()
    dense = copy.deepcopy(model.state_dict())
    result = tuned(model, batches, MaskTuning(**FAST))
    assert set(result.masks) == {"0.weight", "4.weight"}
    for name, value in model.state_dict().items():
        expected = dense[name] * result.masks[name].keep if name in result.masks else dense[name]
        assert torch.equal(value, expected), name
    removed = sum(int((~mask.keep).sum()) for mask in result.masks.values())
    assert 0 < removed == result.facts["removed"] == result.report.total - result.report.kept
    assert removed / result.report.total == pytest.approx(result.history[-1]["removed"])


def test_a_mask_takes_one_bit_a_weight(tmp_path):
    """The bytes that are reported are those on the disk, row by row."""
    model, batches = problem()
    result = tuned(model, batches, MaskTuning(**FAST))
    assert result.facts["bytes of the masks"] == -(-12 * 24 // 8) + -(-24 * 4 // 8)
    save_masks(tmp_path / "masks.safetensors", result.masks)
    with safe_open(tmp_path / "masks.safetensors", "pt") as file:
        packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    assert sum(one.nbytes for one in packed.values()) == result.facts["bytes of the masks"]
    keep = result.masks["0.weight"].keep
    assert packed["0.weight"].flatten().tolist() == np.packbits(keep.numpy(), bitorder="little").tolist()


def first_gradients(dropout, **parameters):
    """The gradients that the first step leaves at the masks, and both losses' own."""
    model, batches = problem()
    model.eval()
    weights = prunable_weights(model)
    pruner = MaskTuning(dropout=dropout, **parameters)
    layers = nn.ModuleList(
        Layer(weight, pruner.first(weight.parameter, seeded()), 0.005) for weight in weights
    )
    task = PruneTask(None, batches, class_loss, seeded())
    masks = [layer.masks for layer in layers]
    with replaced(model, weights) as replace:
        loss, general = pruner.losses(model, layers, task, batches[0], replace)
        share = pruner.set_gradients(masks, loss, general, task.generator)
    return model, batches, [one.grad for one in masks], general, share


def test_the_start_is_the_pretrained_model_and_its_first_step_plain_mask_tuning():
    """All masks are on, so that general knowledge has no gradient; P is 1 but for gradients near ε."""
    model, batches, with_dropout, general, _ = first_gradients(1.0)
    _, _, without, none, share = first_gradients(0.0)
    assert none is None
    assert share == 1.0
    logits = model(batches[0]["x"])
    torch.testing.assert_close(general, general_loss(logits, logits).detach(), rtol=0, atol=1e-6)
    for one, other in zip(with_dropout, without):
        large = other.abs() > 1e-6
        assert torch.equal(one[large], other[large])
        assert large.float().mean() > 0.5
    # By hand: the gradient of the weight times the weight, and the pull of the norm.
    class_loss(model, batches[0]).backward()
    for gradient, weight in zip(without, prunable_weights(model)):
        masks = torch.full(weight.parameter.shape, 0.01)
        expected = weight.parameter.grad * weight.parameter + 1e-4 * masks / masks.norm()
        torch.testing.assert_close(gradient, expected.detach(), rtol=1e-4, atol=1e-8)


def test_the_model_that_is_tuned_first_runs_as_it_was_given():
    model, batches = problem()
    model.eval()
    outputs = []

    def watching(model, batch):
        outputs.append(model(batch["x"]))
        return F.cross_entropy(outputs[-1], batch["y"])

    logits = model(batches[0]["x"])
    tuned(model, batches, MaskTuning(steps=1), loss=watching)
    assert len(outputs) == 2, "one forward of the teacher, one of the masked model"
    assert all(torch.equal(one, logits) for one in outputs)
    assert (outputs[0].requires_grad, outputs[1].requires_grad) == (False, True)


def test_without_a_learning_rate_nothing_is_removed():
    for norm in (0.0, 1e-4):
        model, batches = problem()
        dense = copy.deepcopy(model.state_dict())
        result = tuned(model, batches, MaskTuning(steps=4, lr=0.0, norm=norm))
        assert result.facts["removed"] == 0
        assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


def test_the_norm_alone_removes_what_the_data_never_use():
    """Inputs that are always 0 have no gradient but the norm's: Adam takes their masks down at full rate."""
    model, batches = problem()
    for batch in batches:
        batch["x"][:, :3] = 0
    few = {"steps": 40, "epochs": 1, "lr": 2e-4, "dropout": 0.0}
    keep = tuned(model, batches, MaskTuning(**few)).masks["0.weight"].keep
    assert not keep[:, :3].any()
    assert keep[:, 3:].any()
    model, _ = problem()
    keep = tuned(model, batches, MaskTuning(**few, norm=0.0)).masks["0.weight"].keep
    assert keep[:, :3].all()


def test_tuning_lowers_the_loss_and_dropout_the_distance_to_what_was_known():
    """Swapped labels of two classes: the task is against what the model knew."""
    model, batches = problem(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(80):
        optimizer.zero_grad()
        class_loss(model.train(), batches[step % 5]).backward()
        optimizer.step()
    model.eval().zero_grad()
    with torch.no_grad():
        known = [model(batch["x"]) for batch in batches]
    swap = torch.tensor([1, 0, 2, 3])
    other = [{"x": batch["x"], "y": swap[batch["y"]]} for batch in batches]
    losses, distances = {}, {}
    for strength in (0.0, 1.0):
        copied = copy.deepcopy(model)
        tuned(copied, other, MaskTuning(steps=30, epochs=30, lr=1e-3, dropout=strength))
        with torch.no_grad():
            losses[strength] = sum(class_loss(copied, batch).item() for batch in other)
            distances[strength] = sum(
                (general_loss(copied(batch["x"]), before) - general_loss(before, before)).item()
                for batch, before in zip(batches, known)
            )
    before = sum(class_loss(model, batch).item() for batch in other)
    assert max(losses.values()) < before
    assert 0 < distances[1.0] < distances[0.0]


def test_both_losses_come_from_one_forward_and_no_gradient_is_left_at_the_teacher():
    model, batches = problem()
    task = Watched(None, batches, class_loss, seeded())
    result = MaskTuning(steps=4, lr=4e-3).prune(model, task)
    assert [set(one) for one in task.seen] == [{"loss", "general_loss", "agreement", "removed"}] * 4
    assert [one["loss"] for one in result.history] == [one["loss"] for one in task.seen]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert 0 < task.seen[-1]["agreement"] < 1
    model, batches = problem()
    task = Watched(None, batches, class_loss, seeded())
    MaskTuning(steps=2, dropout=0.0).prune(model, task)
    assert [set(one) for one in task.seen] == [{"loss", "agreement", "removed"}] * 2


def test_the_generator_decides_what_is_dropped_and_where_uniform_masks_start():
    for parameters in ({}, {"start": "uniform", "lr": 0.0}):
        keeps = [
            tuned(*problem(), MaskTuning(**{**FAST, **parameters}), seed=seed).masks["0.weight"].keep
            for seed in (1, 1, 2)
        ]
        assert torch.equal(keeps[0], keeps[1])
        assert not torch.equal(keeps[0], keeps[2])
    assert 0.35 < keeps[0].float().mean() < 0.65, "half of [0, 0.01] lies above 0.005"


def test_learning_rates_fall_by_the_epoch(monkeypatch):
    rates = []
    step = torch.optim.Adam.step

    def watching(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", watching)
    tuned(*problem(), MaskTuning(steps=4, epochs=2, lr=1e-3))
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])


def test_a_gradient_that_is_no_number_stops_the_training():
    """The square root of a loss that is 0 has an infinite gradient, though the loss is a number."""
    model, batches = problem()
    state = copy.deepcopy(model.state_dict())

    def steep(model, batch):
        return (0 * model(batch["x"]).sum()).abs().sqrt()

    with pytest.raises(NumericalError, match="a gradient is NaN or infinite at step 1 of 5"):
        tuned(model, batches, MaskTuning(steps=5), loss=steep)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_mistakes_are_named():
    model, batches = problem()
    with pytest.raises(
        BadBudget, match="mask-tuning finds out itself how much it removes and takes no budget"
    ):
        MaskTuning().prune(model, PruneTask(Budget(sparsity=0.5), batches, class_loss))
    with pytest.raises(BadData, match="mask-tuning trains on batches and a loss"):
        MaskTuning().prune(model, PruneTask(None, batches))
    with pytest.raises(BadParameter, match=r"threshold=0\.02 must be below scale=0\.01"):
        MaskTuning(threshold=0.02)
    with pytest.raises(NumericalError, match="mask-tuning: the loss is nan at step 1 of 5"):
        tuned(model, batches, MaskTuning(steps=5), loss=lambda m, b: class_loss(m, b) * math.nan)
    assert not any(module._forward_hooks for module in model.modules())


def test_models_that_say_nothing_comparable_are_tuned_only_without_dropout():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(12, 4)

        def forward(self, x):
            return {"answer": self.inner(x)}

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"])["answer"], batch["y"])

    _, batches = problem()
    with pytest.raises(BadModel, match="neither logits nor a last_hidden_state"):
        tuned(Odd(), batches, MaskTuning(steps=1), loss=loss)
    tuned(Odd(), batches, MaskTuning(steps=1, dropout=0.0), loss=loss)


# -- where -----------------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def vit():
    """With large weights, so that what it says changes with its masks."""
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=10, initializer_range=0.4)
    )


def resnet():
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
        )
    )


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


IMAGES = {"pixels": torch.randn(4, 3, 16, 16, generator=seeded()), "labels": torch.tensor([1, 2, 3, 4])}
LARGER = {"pixels": torch.randn(2, 3, 32, 32, generator=seeded())}
TOKENS = {"tokens": torch.randint(0, 40, (4, 16), generator=seeded())}


def model_loss(model, batch):
    if "tokens" in batch:
        logits = model(input_ids=batch["tokens"]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch["tokens"].flatten())
    if "labels" in batch:
        return F.cross_entropy(model(pixel_values=batch["pixels"]).logits.float(), batch["labels"])
    return model(pixel_values=batch["pixels"]).last_hidden_state.float().square().mean()


MODELS = {
    "vit": (vit, IMAGES, 4),
    "vit encoder": (lambda: vision_transformer(width=16, depth=2, heads=2), LARGER, 8),
    "bert": (
        lambda: masked_language_model(vocabulary=40, length=16, mask_token=3, width=16, depth=1, heads=2),
        TOKENS,
        4,
    ),
    "llama": (lambda: causal_language_model(vocabulary=40, length=16, width=16, depth=1, heads=2), TOKENS, 4),
    "gpt2": (gpt2, TOKENS, 2),
    "resnet": (resnet, IMAGES, None),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_projections_of_attention_are_masked_and_all_where_there_is_none(name, dtype):
    torch.manual_seed(0)
    make, batch, count = MODELS[name]
    model = make().to(dtype)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    before = copy.deepcopy(model.state_dict())
    weights = prunable_weights(model)
    masked = attention_weights(model, weights)
    assert len(masked) == (count or 0)
    result = tuned(model, [batch], MaskTuning(steps=3, epochs=1, lr=4e-3), loss=model_loss)
    assert set(result.masks) == {weight.name for weight in masked or weights}
    assert result.facts["removed"] > 0
    for key, value in model.state_dict().items():
        expected = before[key] * result.masks[key].keep if key in result.masks else before[key]
        assert torch.equal(value, expected), key
        assert value.dtype == before[key].dtype


def test_all_prunable_weights_are_masked_where_asked():
    result = tuned(vit(), [IMAGES], MaskTuning(steps=1, where="all"), loss=model_loss)
    assert set(result.masks) == {weight.name for weight in prunable_weights(vit())}


def test_torchs_own_attention_is_masked_by_a_rule_that_names_it():
    """As in CLIP: in_proj [3D, D] and out_proj [D, D] of nn.MultiheadAttention, and their biases never."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 4))
    generator = seeded()
    batch = {
        "x": torch.randn(16, 3, 8, generator=generator),
        "y": torch.randint(0, 4, (16,), generator=generator),
    }
    names = ("0.self_attn.in_proj_weight", "0.self_attn.out_proj.weight", "0.linear1.weight")
    before = copy.deepcopy(model.state_dict())
    result = tuned(
        model,
        [batch],
        MaskTuning(steps=3, epochs=1, lr=4e-3),
        rule=lambda m: {name: m.get_parameter(name) for name in names},
    )
    assert set(result.masks) == set(names[:2])
    assert result.masks[names[0]].shape == (24, 8)
    assert all(bool((~mask.keep).any()) for mask in result.masks.values())
    assert torch.equal(model.state_dict()["0.self_attn.in_proj_bias"], before["0.self_attn.in_proj_bias"])
    assert isinstance(layer.self_attn.in_proj_weight, nn.Parameter)


def test_another_pruner_may_go_first():
    """What magnitude removed stays removed: a weight of 0 has no gradient at its mask and is 0 with or without it."""
    model, batches = problem()
    first = maskwright.create("pruner", "magnitude").prune(model, PruneTask(Budget(sparsity=0.5)))
    dense = copy.deepcopy(model.state_dict())
    result = tuned(model, batches, MaskTuning(**FAST), rule=Rule(include=("0.*",)))
    kept = result.masks["0.weight"].keep & first.masks["0.weight"].keep
    assert torch.equal(model[0].weight.detach(), dense["0.weight"] * kept)


# -- the job ---------------------------------------------------------------------------------------------------------


def saved(folder):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit().save_pretrained(folder)
    return folder


SMALL = {
    "pruner.steps": 6,
    "pruner.epochs": 3,
    "pruner.lr": 2e-3,
    "run.batch_size": 8,
    "run.calibration": 8,
    "data.size": 16,
}


def test_the_command_line_tunes_a_classifier_of_images(tmp_path):
    model, out = saved(tmp_path / "model"), tmp_path / "run"
    words = [
        "prune",
        "--pruner",
        "mask-tuning",
        "--model",
        str(model),
        "--data",
        "digits",
        "--out",
        str(out),
        "--quiet",
    ]
    words += [word for pair in SMALL.items() for word in ("--set", "{}={}".format(*pair))]
    told = CliRunner().invoke(cli, words)
    assert told.exit_code == 0, told.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["quality"]["measure"] == "accuracy"
    assert summary["budget"] == {}
    assert summary["facts"]["removed"] > 0
    dense = vit().from_pretrained(model).state_dict()
    masks = load_masks(out / "masks.safetensors")
    again = transformers.AutoModelForImageClassification.from_pretrained(out / "model").state_dict()
    for name, value in again.items():
        assert torch.equal(value, dense[name] * masks[name].keep if name in masks else dense[name]), name


def test_tuning_that_was_stopped_comes_to_the_same_masks(tmp_path, monkeypatch):
    changes = {
        "model.source": str(saved(tmp_path / "model")),
        "data.source": "digits",
        "pruner.name": "mask-tuning",
    }
    settings = resolve(
        "prune", None, {**changes, **SMALL, "run.save_every": 2, "pruner.steps": 14, "pruner.lr": 1e-3}
    )
    whole = execute(settings, folder=tmp_path / "whole", quiet=True)
    logged = Run.log

    def stopping(run, step: Step, **metrics):
        logged(run, step, **metrics)
        if step.index == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "log", stopping)
        with pytest.raises(Interrupted):
            execute(settings, folder=tmp_path / "stopped", quiet=True)
    resumed = execute(settings, folder=tmp_path / "stopped", resume=True, quiet=True)
    assert resumed.summary["quality"] == whole.summary["quality"]
    one, other = (load_masks(tmp_path / name / "masks.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name].keep, other[name].keep) for name in one)
    told = [
        [{**json.loads(line), "seconds": None} for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "stopped")
    ]
    assert told[0] == told[1]
    assert len(told[0]) == 14
