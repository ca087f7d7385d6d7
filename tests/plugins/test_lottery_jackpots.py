"""Lottery jackpots: layer rates, scores, swaps, and that nothing but masks and running statistics has moved."""

import copy
import json
import math

import attrs
import pytest
import torch
import transformers
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F

import maskwright
from maskwright import Budget, PruneTask, load_masks
from maskwright.backbones.defaults import causal_language_model, masked_language_model
from maskwright.cli import cli
from maskwright.errors import BadBudget, BadData, Interrupted, NumericalError
from maskwright.jobs import execute
from maskwright.jobs.run import Run
from maskwright.jobs.settings import resolve
from maskwright.plugins.lottery_jackpots.pruner import (
    KEPT,
    REMOVED,
    Layer,
    LotteryJackpot,
    kept_counts,
    swap_share,
    swapped,
)
from maskwright.protocols import Step
from maskwright.testing import conformance
from maskwright.testing.pruners import check_the_rest_is_untouched
from maskwright.toolkit.patterns import removed_count
from maskwright.toolkit.prunable import Rule, prunable_weights

CHECKS = conformance(LotteryJackpot)


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_conformance(check):
    check()


def test_without_statistics_no_rule_is_broken():
    check_the_rest_is_untouched(LotteryJackpot(steps=4, statistics=False))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bools(*values):
    return torch.tensor(values, dtype=torch.bool)


# -- swaps -----------------------------------------------------------------------------------------------------------

S = torch.tensor([1.0, 0.97, 0.95, 0.99, 1.02, 0.96])
B = bools(1, 1, 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("share", "expected"),
    [(1.0, [1, 0, 0, 1, 1, 0]), (0.5, [1, 1, 0, 0, 1, 0]), (1e-9, [1, 1, 0, 0, 1, 0])],
)
def test_the_case_of_six_entries(share, expected):
    assert torch.equal(swapped(S, B, share), bools(*expected))


def naive(scores, keep, share):
    """By lists: the same rule, one entry after the other."""
    s, b = scores.flatten().tolist(), keep.flatten().tolist()
    count = sum(b)
    best = sorted(range(len(s)), key=lambda i: (-s[i], not b[i], i))[:count]
    rank = {place: i for i, place in enumerate(sorted(range(len(s)), key=lambda i: (-s[i], i)))}
    into = sorted((i for i in best if not b[i]), key=rank.get)
    gone = sorted((i for i in range(len(s)) if b[i] and i not in best), key=lambda i: (s[i], i))
    swaps = math.ceil(round(share * len(into), 9))
    for place in into[:swaps]:
        b[place] = True
    for place in gone[:swaps]:
        b[place] = False
    return torch.tensor(b).view(keep.shape)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.1, 1e-6])
@pytest.mark.parametrize("decimals", [6, 1], ids=["distinct", "tied"])
def test_swaps_equal_those_of_lists(share, decimals):
    for seed in range(30):
        generator = seeded(seed)
        scores = torch.rand(7, 9, generator=generator).round(decimals=decimals)
        keep = torch.rand(7, 9, generator=generator) < 0.4
        found = swapped(scores, keep, share)
        assert int(found.sum()) == int(keep.sum())
        if decimals == 6:
            assert torch.equal(found, naive(scores, keep, share))
        else:
            # Among tied entries it is free which of them a part of the swaps takes; what it gains is not.
            other = naive(scores, keep, share)
            torch.testing.assert_close(scores[found].sum(), scores[other].sum())
            assert int((found & ~keep).sum()) == int((other & ~keep).sum())


def test_all_swaps_keep_the_highest_scores():
    scores = torch.rand(500, generator=seeded())
    keep = torch.rand(500, generator=seeded(1)) < 0.3
    found = swapped(scores, keep, 1.0)
    assert set(scores.topk(int(keep.sum())).indices.tolist()) == set(found.nonzero()[:, 0].tolist())


def test_the_smallest_share_swaps_one_entry_until_none_is_left():
    keep, taken = B, []
    for _ in range(4):
        after = swapped(S, keep, 1e-12)
        taken.append(int((after & ~keep).sum()))
        keep = after
    assert taken == [1, 1, 0, 0]
    assert torch.equal(keep, swapped(S, B, 1.0))


@pytest.mark.parametrize(("share", "swaps"), [(0.1, 3), (0.25, 6), (0.5, 12), (1.0, 23)])
def test_swaps_are_rounded_up(share, swaps):
    """108 entries at 0.7: 75 are removed; with 23 candidates ⌈23 ρ⌉ are swapped."""
    removed = removed_count(108, 0.7)
    assert removed == 75
    keep = torch.arange(108) >= removed
    scores = torch.where(keep, KEPT, REMOVED).clone()
    scores[:23] = 1.5 + torch.arange(23) / 100
    found = swapped(scores, keep, share)
    assert int((found & ~keep).sum()) == int((keep & ~found).sum()) == swaps
    assert found[23 - swaps : 23].all(), "the highest come in"


def test_a_share_is_read_as_it_was_written():
    """0.1 of 30 candidates are 3, though 0.1 · 30 is a little more in floating point."""
    keep = torch.arange(60) >= 30
    scores = torch.where(keep, 0.0, 1.0)
    assert int((swapped(scores, keep, 0.1) & ~keep).sum()) == 3


def test_ties_neither_stop_the_swaps_nor_cause_any():
    """A removed entry that overtakes tied kept ones takes the place of one of them; equal scores stay as they are."""
    keep = bools(1, 1, 1, 0, 0)
    scores = torch.tensor([1.0, 1.0, 1.0, 1.1, 0.99])
    assert torch.equal(swapped(scores, keep, 1.0), bools(0, 1, 1, 1, 0))
    assert torch.equal(swapped(torch.ones(5), keep, 1.0), keep)


def test_layers_that_keep_all_or_nothing_are_left_alone():
    for keep in (torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)):
        assert torch.equal(swapped(torch.rand(4, generator=seeded()), keep, 1.0), keep)


def test_the_share_falls_over_thirty_epochs():
    quartic = [swap_share("quartic", epoch / 30) for epoch in (0, 5, 15, 22.4)]
    assert quartic == pytest.approx([1, 0.4823, 0.0625, 0.0041], abs=1e-4)
    assert [math.ceil(swap_share("quartic", epoch / 30)) for epoch in range(30)] == [1] * 30
    assert [swap_share("constant", epoch / 30) for epoch in range(30)] == [1.0] * 30
    assert [swap_share("cosine", epoch) for epoch in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


# -- layer rates -----------------------------------------------------------------------------------------------------


def magnitudes(*sizes, seed=0):
    generator = seeded(seed)
    return {
        str(i): torch.randn(size, 4, generator=generator).abs() * (1 + i / 5) for i, size in enumerate(sizes)
    }


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9])
def test_one_threshold_decides_each_layers_share(sparsity):
    """The share of a layer is that of its entries strictly below the smallest magnitude that is kept of all."""
    given = magnitudes(30, 25, 40)
    counts = kept_counts(given, sparsity, "global")
    every = torch.cat([one.flatten() for one in given.values()])
    kept = len(every) - removed_count(len(every), sparsity)
    threshold = every.topk(kept).values[-1]
    assert counts == {name: int((one >= threshold).sum()) for name, one in given.items()}
    assert sum(counts.values()) == kept


def test_equal_magnitudes_do_not_change_the_count():
    given = {"a": torch.ones(5, 4), "b": torch.ones(5, 4)}
    assert sum(kept_counts(given, 0.45, "global").values()) == 22


def test_no_layer_is_left_empty_and_the_count_over_all_stays():
    given = {
        "large": 10 + torch.rand(10, 4, generator=seeded()),
        "small": torch.rand(10, 4, generator=seeded()),
    }
    assert kept_counts(given, 0.9, "global") == {"large": 7, "small": 1}
    with pytest.raises(BadBudget, match=r"A sparsity of 0\.98 keeps 2 of 80 weights in 3 layers"):
        kept_counts({**given, "empty": torch.zeros(0, 4)}, 0.98, "global")


def test_uniform_rates_remove_the_same_share_of_each_layer():
    assert kept_counts(magnitudes(27, 10), 0.7, "uniform") == {"0": 108 - 75, "1": 12}


# -- scores ----------------------------------------------------------------------------------------------------------


def test_scores_learn_at_kept_and_removed_entries_and_weights_do_not():
    model = nn.Linear(6, 5)
    (weight,) = prunable_weights(model)
    keep = torch.rand(5, 6, generator=seeded()) < 0.5
    layer = Layer(weight, keep)
    assert torch.equal(layer.scores.detach(), torch.where(keep, 1.0, 0.99))
    x = torch.randn(8, 6, generator=seeded(1))
    effective = layer()
    F.linear(x, effective).square().sum().backward()
    leaf = (model.weight.detach() * keep).requires_grad_()
    F.linear(x, leaf).square().sum().backward()
    assert torch.equal(layer.scores.grad, leaf.grad * model.weight.detach())
    assert layer.scores.grad[~keep].abs().min() > 0
    assert model.weight.grad is None
    assert [name for name, _ in layer.named_parameters()] == ["scores"]


# -- the pruner ------------------------------------------------------------------------------------------------------


def problem(seed=0, norm=True):
    """A small classifier with batch norm, and batches of four classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(12, 24), nn.BatchNorm1d(24) if norm else nn.Identity(), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(),
            nn.Linear(16, 4),
        )  # fmt: skip
    generator = seeded(seed)
    centres = 2 * torch.randn(4, 12, generator=generator)
    labels = torch.randint(0, 4, (6, 32), generator=generator)
    batches = [{"x": centres[part] + torch.randn(32, 12, generator=generator), "y": part} for part in labels]
    return model, batches


def class_loss(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])


HEAD = Rule(exclude=("5.*",))


def pruned(model, batches, pruner, sparsity=0.8, loss=class_loss, seed=0, rule=HEAD):
    return pruner.prune(
        model, PruneTask(Budget(sparsity=sparsity), batches, loss, seeded(seed), prunable=rule)
    )


def test_the_defaults_are_those_of_the_official_configuration():
    assert attrs.asdict(LotteryJackpot()) == {
        **{"steps": 30 * 196, "epochs": 30, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
        **{
            "rates": "global",
            "start": "magnitude",
            "swaps": 1.0,
            "restriction": "constant",
            "statistics": True,
        },
    }


def test_every_parameter_is_bit_identical_and_counts_hold_throughout():
    model, batches = problem()
    dense = copy.deepcopy(model.state_dict())
    given = {name: dense[name].abs() for name in ("0.weight", "3.weight")}
    counts = kept_counts(given, 0.8, "global")
    zeros = []

    def watching(model, batch):
        zeros.append({name: int((model.get_submodule(name[0]).weight != 0).sum()) for name in given})
        return class_loss(model, batch)

    result = pruned(model, batches, LotteryJackpot(steps=30, epochs=6), loss=watching)
    assert zeros == [counts] * 30
    for name, value in model.named_parameters():
        expected = dense[name] * result.masks[name].keep if name in given else dense[name]
        assert torch.equal(value.detach(), expected), name
    assert {name: int(mask.keep.sum()) for name, mask in result.masks.items()} == counts
    assert result.report.total - result.report.kept == removed_count(12 * 24 + 24 * 16, 0.8)
    assert result.facts["swaps"] == sum(entry["swaps"] for entry in result.history) > 0
    assert 0 < result.facts["share of the first mask still kept"] < 1
    assert not torch.equal(dense["1.running_mean"], model.state_dict()["1.running_mean"])


def test_at_a_learning_rate_of_zero_the_mask_stays_that_of_magnitudes():
    model, batches = problem()
    alone = copy.deepcopy(model)
    result = pruned(model, batches, LotteryJackpot(steps=5, lr=0.0))
    wanted = pruned(alone, batches, maskwright.create("pruner", "magnitude", compare="global"))
    assert all(torch.equal(result.masks[name].keep, wanted.masks[name].keep) for name in wanted.masks)
    assert result.facts["swaps"] == 0


def test_the_search_lowers_the_loss_that_the_magnitude_mask_has():
    model, batches = problem(3)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(60):
        optimizer.zero_grad()
        class_loss(model, batches[step % 6]).backward()
        optimizer.step()
    losses = {}
    for name, pruner in (
        ("magnitude", LotteryJackpot(steps=90, epochs=9, lr=0.0)),
        ("jackpot", LotteryJackpot(steps=90, epochs=9)),
        ("restricted", LotteryJackpot(steps=90, epochs=9, restriction="quartic")),
        ("random", LotteryJackpot(steps=90, epochs=9, lr=0.0, start="random")),
    ):
        copied = copy.deepcopy(model)
        copied.zero_grad()
        pruned(copied, batches, pruner, 0.9)
        losses[name] = sum(class_loss(copied.eval(), batch).item() for batch in batches) / 6
    assert losses["jackpot"] < 0.6 * losses["magnitude"] < 0.8 * losses["random"]
    assert losses["restricted"] < 0.6 * losses["magnitude"]


def test_rates_fall_by_the_epoch(monkeypatch):
    """Eight steps in four epochs: two of each."""
    rates = []
    step = torch.optim.SGD.step

    def watching(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", watching)
    model, batches = problem()
    result = pruned(model, batches, LotteryJackpot(steps=8, epochs=4, restriction="quartic"))
    assert [entry["share"] for entry in result.history] == [
        (1 - e / 4) ** 4 for e in (0, 0, 1, 1, 2, 2, 3, 3)
    ]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * e / 4)) for e in (0, 0, 1, 1, 2, 2, 3, 3)])
    result = pruned(*problem(), LotteryJackpot(steps=2, epochs=1, swaps=0.5))
    assert [entry["share"] for entry in result.history] == [0.5, 0.5]


def test_statistics_follow_the_masked_network_unless_they_may_not():
    for asked in (True, False):
        model, batches = problem()
        before = copy.deepcopy(model.state_dict())
        pruned(model, batches, LotteryJackpot(steps=40, lr=0.0, statistics=asked))
        moved = [
            n for n, v in model.state_dict().items() if n.startswith("1.") and not torch.equal(v, before[n])
        ]
        assert moved == ["1.running_mean", "1.running_var", "1.num_batches_tracked"] * asked
        if asked:
            masked = torch.cat([F.linear(b["x"], model[0].weight, model[0].bias) for b in batches])
            torch.testing.assert_close(model[1].running_mean, masked.mean(0).detach(), atol=0.15, rtol=0)
        assert model.training


def test_random_masks_come_from_the_generator():
    results = [
        pruned(*problem(), LotteryJackpot(steps=1, lr=0.0, start="random"), seed=seed) for seed in (1, 1, 2)
    ]
    keeps = [result.masks["0.weight"].keep for result in results]
    assert torch.equal(keeps[0], keeps[1])
    assert not torch.equal(keeps[0], keeps[2])


def test_a_failed_search_leaves_the_model_as_it_was():
    model, batches = problem()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericalError, match="lottery-jackpot: the loss is nan at step 1 of 5"):
        pruned(
            model,
            batches,
            LotteryJackpot(steps=5),
            loss=lambda model, batch: class_loss(model, batch) * math.nan,
        )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_gradient_that_is_no_number_stops_the_training():
    """The square root of a loss that is 0 has an infinite gradient, though the loss is a number."""
    model, batches = problem()
    state = copy.deepcopy(model.state_dict())

    def steep(model, batch):
        return (0 * model(batch["x"]).sum()).abs().sqrt()

    with pytest.raises(NumericalError, match="a gradient is NaN or infinite at step 1 of 5"):
        pruned(model, batches, LotteryJackpot(steps=5), loss=steep)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_only_sparsities_batches_and_losses_are_taken():
    model, batches = problem()
    with pytest.raises(
        BadBudget, match="lottery-jackpot does not meet a budget of pattern; give it one of sparsity"
    ):
        LotteryJackpot().prune(model, PruneTask(Budget(pattern="2:4"), batches, class_loss))
    with pytest.raises(BadData, match="lottery-jackpot trains on batches and a loss"):
        LotteryJackpot().prune(model, PruneTask(Budget(sparsity=0.5), batches))
    with pytest.raises(BadBudget, match="a layer that keeps none"):
        pruned(model, batches, LotteryJackpot(), 0.999)


# -- models it was not written for -----------------------------------------------------------------------------------

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=10)
    )


def resnet():
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
        )
    )


IMAGES = {"pixels": torch.randn(4, 3, 16, 16, generator=seeded()), "labels": torch.tensor([1, 2, 3, 4])}
TOKENS = {"tokens": torch.randint(0, 40, (4, 16), generator=seeded())}


def model_loss(model, batch):
    if "pixels" in batch:
        return F.cross_entropy(model(pixel_values=batch["pixels"]).logits.float(), batch["labels"])
    return F.cross_entropy(
        model(input_ids=batch["tokens"]).logits.flatten(0, 1).float(), batch["tokens"].flatten()
    )


MODELS = {
    "vit": (vit, IMAGES),
    "resnet": (resnet, IMAGES),
    "bert": (
        lambda: masked_language_model(vocabulary=40, length=16, mask_token=3, width=16, depth=1, heads=2),
        TOKENS,
    ),
    "llama": (lambda: causal_language_model(vocabulary=40, length=16, width=16, depth=1, heads=2), TOKENS),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_model(name, dtype):
    torch.manual_seed(0)
    make, batch = MODELS[name]
    model = make().to(dtype)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    before = copy.deepcopy(dict(model.named_parameters()))
    result = pruned(model, [batch], LotteryJackpot(steps=3), 0.7, model_loss, rule=None)
    chosen = {weight.name for weight in prunable_weights(model)}
    assert set(result.masks) == chosen
    total = sum(before[name].numel() for name in chosen)
    assert result.report.total - result.report.kept == removed_count(total, 0.7)
    for key, value in model.named_parameters():
        expected = before[key] * result.masks[key].keep if key in chosen else before[key]
        assert torch.equal(value, expected), key
        assert value.dtype == dtype


# -- the job ---------------------------------------------------------------------------------------------------------


def saved(folder, make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make().save_pretrained(folder)
    return folder


def test_the_command_line_prunes_a_classifier_of_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = saved(tmp_path / "model", vit)
    words = [
        "prune",
        "--pruner",
        "lottery-jackpot",
        "--model",
        str(model),
        "--data",
        "digits",
        "--sparsity",
        "0.8",
    ]
    small = ["pruner.steps=4", "pruner.epochs=2", "run.batch_size=16", "run.calibration=16", "data.size=16"]
    words += [word for pair in small for word in ("--set", pair)] + ["--out", "run", "--quiet"]
    told = CliRunner().invoke(cli, words)
    assert told.exit_code == 0, told.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["quality"]["measure"] == "accuracy"
    assert summary["sparsity"] == pytest.approx(0.8, abs=1e-3)
    dense = vit().from_pretrained(model).state_dict()
    again = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "run" / "model"
    ).state_dict()
    masks = load_masks(tmp_path / "run" / "masks.safetensors")
    for name, value in again.items():
        assert torch.equal(value, dense[name] * masks[name].keep if name in masks else dense[name]), name


def test_a_search_that_was_stopped_comes_to_the_same_masks_and_statistics(tmp_path, monkeypatch):
    model = saved(tmp_path / "model", resnet)
    changes = {
        **{"model.source": str(model), "data.source": "digits", "data.size": 16, "run.batch_size": 8},
        **{
            "run.calibration": 8,
            "budget.sparsity": 0.8,
            "pruner.name": "lottery-jackpot",
            "run.save_every": 2,
        },
        **{"pruner.steps": 6, "pruner.epochs": 3, "pruner.restriction": "quartic", "pruner.swaps": 0.5},
    }
    settings = resolve("prune", None, changes)
    whole = execute(settings, folder=tmp_path / "whole", quiet=True)
    logged = Run.log

    def stopping(run, step: Step, **metrics):
        logged(run, step, **metrics)
        if step.index == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "log", stopping)
        with pytest.raises(Interrupted):
            execute(settings, folder=tmp_path / "stopped", quiet=True)
    resumed = execute(settings, folder=tmp_path / "stopped", resume=True, quiet=True)
    assert resumed.summary["quality"] == whole.summary["quality"]
    one, other = (
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path / name / "model").state_dict()
        for name in ("whole", "stopped")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    dense = resnet().from_pretrained(model).state_dict()
    assert any("running" in name and not torch.equal(value, dense[name]) for name, value in one.items())
