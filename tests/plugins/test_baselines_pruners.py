"""Magnitude, random, Wanda and SparseGPT: their equations, exact counts, and the identities that tie them together."""

import pytest
import torch
import transformers
from torch import nn

import maskwright
from maskwright import Budget, PruneTask
from maskwright.backbones.defaults import causal_language_model, vision_transformer
from maskwright.errors import BadBudget, BadData, BadParameter, NumericalError
from maskwright.plugins.baselines.pruner import (
    Magnitude,
    Random,
    SparseGpt,
    Wanda,
    compensate,
    cumulated_share,
    damped,
    inverse_factor,
    quadratic_error,
    wanda_scores,
)
from maskwright.testing import conformance
from maskwright.toolkit.patterns import keep_n_of_m, removed_count
from maskwright.toolkit.prunable import prunable_weights

PRUNERS = (Magnitude, Random, Wanda, SparseGpt)
TWO_FOUR = Budget(pattern="2:4")
HALF = Budget(sparsity=0.5)


CHECKS = [(pruner, name, check) for pruner in PRUNERS for name, check in conformance(pruner)]


@pytest.mark.parametrize(
    "check", [check for *_, check in CHECKS], ids=[f"{p.name}-{n}" for p, n, _ in CHECKS]
)
def test_conformance(check):
    check()


def layer(rows=6, columns=16, seed=0, scale=None, dtype=torch.float32):
    """A linear layer, its dense weight, and calibration inputs [4, 8, columns] with columns of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(columns, rows, bias=False).to(dtype)
    model.weight.data = torch.randn(rows, columns, generator=generator, dtype=dtype)
    x = torch.randn(4, 8, columns, generator=generator, dtype=dtype)
    x = x * (torch.rand(columns, generator=generator, dtype=dtype) * 3 if scale is None else scale)
    return model, model.weight.detach().clone(), x


def pruned(pruner, model, x, budget, **task):
    result = pruner.prune(model, PruneTask(budget, [{"x": part} for part in x.split(2)], **task))
    (mask,) = result.masks.values()
    return model.weight.detach(), mask.keep, result


# -- naive references ------------------------------------------------------------------------------------------------


def naive_groups(scores, n, m):
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], m):
            best = sorted(range(start, start + m), key=lambda j: (-scores[row, j].item(), j))[:n]
            keep[row, best] = True
    return keep


def naive_smallest(scores, count):
    """bool of the scores: False at the `count` smallest of all; of equals the later go first."""
    flat = scores.flatten().tolist()
    gone = sorted(range(len(flat)), key=lambda i: (flat[i], -i))[:count]
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[gone] = False
    return keep.view(scores.shape)


def naive_surgeon(weight, hessian, budget, block):
    """SparseGPT without factors: after each column the inverse of what is left of the Hessian is computed anew."""
    weight, kept, loss = weight.clone(), torch.ones_like(weight, dtype=torch.bool), 0.0
    columns = weight.shape[1]
    cost = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(columns)])
    for j in range(columns):
        if budget.pattern and j % budget.n_of_m[1] == 0:
            n, m = budget.n_of_m
            kept[:, j : j + m] = naive_groups(weight[:, j : j + m] ** 2 / cost[j : j + m], n, m)
        elif budget.sparsity and j % block == 0:
            end = min(j + block, columns)
            count = removed_count(len(weight) * end, budget.sparsity) - removed_count(
                len(weight) * j, budget.sparsity
            )
            # Rows are columns there, so that of equal scores the same one goes.
            kept[:, j:end] = naive_smallest((weight[:, j:end] ** 2 / cost[j:end]).T, count).T
        inverse = torch.linalg.inv(hessian[j:, j:])
        for row in range(len(weight)):
            if not kept[row, j]:
                move = weight[row, j] / inverse[0, 0]
                loss += (weight[row, j] ** 2 / inverse[0, 0]).item() / 2
                weight[row, j:] -= move * inverse[0]
                weight[row, j] = 0
    return weight, kept, loss


# -- magnitude and random --------------------------------------------------------------------------------------------


def test_magnitude_equals_a_naive_search():
    model, dense, x = layer()
    weight, keep, _ = pruned(Magnitude(), model, x, Budget(sparsity=0.3))
    assert torch.equal(keep, naive_smallest(dense.abs(), int(0.3 * 96)))
    assert torch.equal(weight, dense * keep)
    model, dense, x = layer(seed=1)
    assert torch.equal(pruned(Magnitude(), model, x, TWO_FOUR)[1], naive_groups(dense.abs(), 2, 4))


def test_magnitude_removes_no_weight_more_than_asked():
    """The official threshold takes one more: 129 of 256."""
    model, _, x = layer(16, 16)
    assert int((~pruned(Magnitude(), model, x, HALF)[1]).sum()) == 128


def test_magnitude_compares_within_layer_row_or_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 10))
    model[1].weight.data *= 10
    counts = {}
    for compare in ("layer", "row", "global"):
        copy = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 10))
        copy.load_state_dict(model.state_dict())
        result = Magnitude(compare=compare).prune(copy, PruneTask(HALF))
        counts[compare] = [layer.total - layer.kept for layer in result.report.layers]
        if compare == "row":
            assert all((mask.counts == mask.shape[1] / 2).all() for mask in result.masks.values())
    assert counts["layer"] == counts["row"] == [24, 30]
    assert sum(counts["global"]) == 54
    assert counts["global"][0] > 40


def test_random_draws_from_the_generator_given():
    def keep(seed):
        model, _, x = layer()
        return pruned(Random(), model, x, HALF, generator=torch.Generator().manual_seed(seed))[1]

    assert torch.equal(keep(1), keep(1))
    assert not torch.equal(keep(1), keep(2))
    torch.manual_seed(0)
    share = torch.stack([keep(seed) for seed in range(300)]).float().mean(0)
    assert (share - 0.5).abs().max() < 0.15, "no weight is favoured"


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), Random(), SparseGpt(update=False)])
def test_survivors_are_bit_identical_to_the_dense_weights(pruner):
    for budget in (HALF, TWO_FOUR):
        model, dense, x = layer(dtype=torch.float32)
        weight, keep, _ = pruned(pruner, model, x, budget)
        assert torch.equal(weight, torch.where(keep, dense, torch.zeros(())))


# -- Wanda -----------------------------------------------------------------------------------------------------------


def test_the_case_of_four_weights():
    """W = [1, -2, 3, -4], norms [8, 1, 1, 1]: magnitude keeps the last two, Wanda the first and the last."""
    x = torch.diag(torch.tensor([8.0, 1.0, 1.0, 1.0]))
    for pruner, expected in ((Magnitude(), [0, 0, 1, 1]), (Wanda(), [1, 0, 0, 1])):
        model = nn.Linear(4, 1, bias=False)
        model.weight.data = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
        result = pruner.prune(model, PruneTask(TWO_FOUR, [{"x": x}]))
        assert result.masks["weight"].keep.int().tolist() == [expected]
    scores = wanda_scores(torch.tensor([[1.0, -2.0, 3.0, -4.0]]), torch.tensor([[64.0, 1.0, 1.0, 1.0]]))
    assert scores.tolist() == [[8, 2, 3, 4]]


def test_wanda_equals_a_naive_search():
    model, dense, x = layer()
    norms = x.reshape(-1, 16).norm(dim=0)
    _, keep, _ = pruned(Wanda(), model, x, Budget(sparsity=0.4))
    expected = torch.stack([naive_smallest(row, int(16 * 0.4)) for row in dense.abs() * norms])
    assert torch.equal(keep, expected)
    model, dense, x = layer(seed=1)
    scores = dense.abs() * x.reshape(-1, 16).norm(dim=0)
    assert torch.equal(pruned(Wanda(), model, x, Budget(pattern="1:4"))[1], naive_groups(scores, 1, 4))


@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.5, 0.9])
def test_wanda_removes_the_same_number_in_each_row(ratio):
    model, _, x = layer(9, 23)
    _, keep, _ = pruned(Wanda(), model, x, Budget(sparsity=ratio))
    assert (keep.logical_not().sum(1) == int(23 * ratio)).all()


@pytest.mark.parametrize("budget", [HALF, TWO_FOUR])
def test_wanda_does_not_see_the_scale_of_all_inputs(budget):
    model, _, x = layer()
    keep = pruned(Wanda(), model, x, budget)[1]
    again, _, _ = layer()
    assert torch.equal(pruned(Wanda(), again, x * 1024, budget)[1], keep)


@pytest.mark.parametrize("budget", [HALF, TWO_FOUR])
def test_wanda_does_not_see_what_scales_an_input_and_its_weights_against_each_other(budget):
    factor = 2.0 ** torch.randint(-4, 5, (16,), generator=torch.Generator().manual_seed(3))
    keeps = {}
    for pruner in (Wanda(), Magnitude()):
        model, _, x = layer()
        keep = pruned(pruner, model, x, budget)[1]
        model, dense, x = layer()
        model.weight.data = dense / factor
        keeps[pruner.name] = torch.equal(pruned(pruner, model, x * factor, budget)[1], keep)
    assert keeps == {"wanda": True, "magnitude": False}


def test_wanda_with_equal_norms_is_magnitude():
    model, _, _ = layer()
    x = torch.ones(4, 8, 16)
    again, _, _ = layer()
    assert torch.equal(pruned(Wanda(), model, x, TWO_FOUR)[1], pruned(Magnitude(), again, x, TWO_FOUR)[1])


def test_a_dead_input_has_no_score_for_wanda():
    model, _, x = layer()
    x[..., 5] = 0
    _, keep, _ = pruned(Wanda(), model, x, Budget(sparsity=1 / 16))
    assert not keep[:, 5].any()
    assert keep.sum() == keep.numel() - 6


def naive_variant(scores, ratio):
    """The official search: bisect α until the sparsity is within 0.001."""
    ordered = scores.sort(dim=1, stable=True).values
    sums = ordered.cumsum(1)
    low, high, alpha = 0.0, 0.8, 0.4

    def removed(alpha):
        return sums <= scores.sum(1, keepdim=True) * alpha

    while abs(removed(alpha).float().mean().item() - ratio) > 0.001 and high - low >= 0.001:
        if removed(alpha).float().mean() > ratio:
            low, high, alpha = low, alpha, (alpha + low) / 2
        else:
            low, high, alpha = alpha, high, (alpha + high) / 2
    return removed(alpha).sum(1)


def test_the_variant_of_wanda_is_what_its_search_converges_to():
    model, dense, x = layer(64, 128)
    _, keep, _ = pruned(Wanda(compare="share"), model, x, HALF)
    removed = keep.logical_not().sum(1)
    assert removed.sum() == 64 * 128 / 2
    assert removed.unique().numel() > 3, "rows give up different numbers"
    official = naive_variant(dense.abs() * x.reshape(-1, 128).norm(dim=0), 0.5)
    assert (removed - official).abs().max() <= 1
    shares = cumulated_share(torch.tensor([[3.0, 1.0, 4.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(shares[0], torch.tensor([0.5, 0.125, 1.0], dtype=torch.float64))
    assert shares.isfinite().all()


# -- SparseGPT -------------------------------------------------------------------------------------------------------


def problem(rows=5, columns=24, seed=0, groups=1):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, 60, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return weight, damped(x.mT @ x, 0.01)


BUDGETS = [TWO_FOUR, Budget(pattern="4:8"), Budget(pattern="1:3"), HALF, Budget(sparsity=0.29)]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("block", [128, 8])
def test_sparsegpt_equals_surgery_with_fresh_inverses(budget, block):
    weight, hessian = problem()
    block = block if budget.pattern != "1:3" else block // 3 * 3
    updated, keep, error = compensate(weight, inverse_factor(hessian), budget, block)
    expected, kept, loss = naive_surgeon(weight[0], hessian[0], budget, block)
    assert torch.equal(keep[0], kept)
    torch.testing.assert_close(updated[0], expected, rtol=1e-9, atol=1e-9)
    assert error == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_the_reported_error_is_the_quadratic_form_of_the_change(budget):
    weight, hessian = problem(seed=1)
    updated, _, error = compensate(weight, inverse_factor(hessian), budget, 8)
    assert quadratic_error(updated - weight, hessian) == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize("budget", [TWO_FOUR, HALF], ids=str)
def test_a_diagonal_hessian_gives_wandas_mask_and_moves_nothing(budget):
    weight, _ = problem()
    scale = torch.rand(24, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 0.1
    updated, keep, _ = compensate(weight, inverse_factor(torch.diag(scale)[None]), budget, 8)
    scores = weight[0].abs() * scale.sqrt()
    if budget.pattern:
        assert torch.equal(keep[0], keep_n_of_m(scores, 2, 4))
    else:
        parts = [naive_smallest(part, 20) for part in scores.split(8, 1)]
        assert torch.equal(keep[0], torch.cat(parts, 1))
    assert torch.equal(updated, weight * keep)


@pytest.mark.parametrize("budget", [TWO_FOUR, HALF], ids=str)
def test_a_hessian_that_is_a_multiple_of_one_gives_magnitude(budget):
    weight, _ = problem()
    eye = 3 * torch.eye(24, dtype=torch.float64)[None]
    updated, keep, _ = compensate(weight, inverse_factor(eye), budget, 24)
    expected = keep_n_of_m(weight[0].abs(), 2, 4) if budget.pattern else naive_smallest(weight[0].abs(), 60)
    assert torch.equal(keep[0], expected)
    assert torch.equal(updated, weight * keep)


def test_updates_never_touch_an_earlier_column():
    """For a fixed mask: what comes after a column has no part in its final value."""
    weight, hessian = problem()
    factor = inverse_factor(hessian)
    whole, kept, _ = compensate(weight, factor, TWO_FOUR, 8)
    other = weight.clone()
    other[..., 16:] = torch.randn_like(other[..., 16:])
    changed, kept_too, _ = compensate(other, factor, TWO_FOUR, 8)
    assert torch.equal(kept[..., :16], kept_too[..., :16])
    assert torch.equal(whole[..., :16], changed[..., :16])
    assert not torch.equal(whole[..., 16:], changed[..., 16:])


def test_groups_are_chosen_on_the_weights_as_updated():
    weight, hessian = problem(rows=40)
    factor = inverse_factor(hessian)
    _, keep, _ = compensate(weight, factor, TWO_FOUR, 8)
    up_front = keep_n_of_m(weight.square() / factor.diagonal(dim1=1, dim2=2)[:, None] ** 2, 2, 4)
    assert torch.equal(keep[..., :4], up_front[..., :4])
    assert not torch.equal(keep, up_front)


def test_small_blocks_force_the_ratio_where_it_hurts():
    """With unequal columns, a sparsity in every block of 16 costs much more than in one block of 32."""
    weight, hessian = problem(rows=64, columns=32, seed=2)
    scale = torch.logspace(-1.5, 1.5, 32, dtype=torch.float64)
    factor = inverse_factor(hessian * scale * scale[:, None])
    errors = [compensate(weight, factor, HALF, block)[2] for block in (8, 16, 32)]
    assert errors[0] > errors[1] > errors[2]


def test_groups_of_a_convolution_are_separate_layers():
    weight, hessian = problem(groups=3, columns=8)
    together = compensate(weight, inverse_factor(hessian), TWO_FOUR, 8)
    for i in range(3):
        alone = compensate(weight[i : i + 1], inverse_factor(hessian[i : i + 1]), TWO_FOUR, 8)
        torch.testing.assert_close(together[0][i], alone[0][0])
        assert torch.equal(together[1][i], alone[1][0])


@pytest.mark.parametrize("update", [True, False])
def test_a_dead_input_loses_its_weights(update):
    model, dense, x = layer()
    x[..., 5] = 0
    weight, keep, _ = pruned(SparseGpt(update=update), model, x, Budget(sparsity=1 / 16))
    if update:
        assert (weight[:, 5] == 0).all()
    assert not keep[:, 5].any()


def test_sparsegpt_without_update_scores_the_dense_weights_throughout():
    model, dense, x = layer()
    rows = x.reshape(-1, 16)
    factor = inverse_factor(damped((rows.T @ rows)[None], 0.01))[0]
    _, keep, result = pruned(SparseGpt(update=False), model, x, TWO_FOUR)
    assert torch.equal(keep, naive_groups(dense**2 / factor.diag() ** 2, 2, 4))
    hessian = damped(2 * (rows.T @ rows)[None] / 4, 0.01)
    change = torch.where(keep, 0, dense)[None]
    assert result.history[0]["error"] == pytest.approx(quadratic_error(change, hessian), rel=1e-4)


@pytest.mark.parametrize("budget", [TWO_FOUR, HALF], ids=str)
def test_sparsegpt_errs_least_on_the_outputs_and_wanda_less_than_magnitude(budget):
    errors = {}
    for pruner in (SparseGpt(), SparseGpt(update=False), Wanda(), Magnitude()):
        model, dense, x = layer(32, 64, seed=4)
        mixed = x + x.roll(1, -1) + x.roll(7, -1)
        weight, _, _ = pruned(pruner, model, mixed, budget)
        errors[f"{pruner.name}{getattr(pruner, 'update', '')}"] = float(
            ((weight - dense) @ mixed.reshape(-1, 64).T).square().sum()
        )
    assert errors["sparsegptTrue"] < min(value for name, value in errors.items() if name != "sparsegptTrue")
    assert errors["wanda"] < errors["magnitude"]


def test_a_sparsity_of_the_layer_is_exact_although_it_is_met_block_by_block():
    model, _, x = layer(7, 100)
    for update in (True, False):
        model, _, x = layer(7, 100)
        _, keep, _ = pruned(SparseGpt(block_size=13, update=update), model, x, Budget(sparsity=0.37))
        assert int((~keep).sum()) == removed_count(700, 0.37)


def test_too_few_calibration_tokens_need_damping():
    model, _, x = layer(6, 64)
    with pytest.raises(NumericalError, match="not positive definite; give more calibration tokens"):
        SparseGpt(damping=0.0).prune(model, PruneTask(HALF, [{"x": x[:1, :4]}]))
    SparseGpt().prune(model, PruneTask(HALF, [{"x": x[:1, :4]}]))


# -- on models they were not written for -------------------------------------------------------------------------


def gpt2():
    config = transformers.GPT2Config(
        **{"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "eos_token_id": 0},
    )
    return transformers.GPT2LMHeadModel(config)


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


TOKENS = {"tokens": torch.randint(0, 40, (8, 16), generator=torch.Generator().manual_seed(0))}
PIXELS = {"pixels": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
MODELS = {
    "llama": (lambda: causal_language_model(vocabulary=40, length=16, width=16, depth=2, heads=2), TOKENS),
    "gpt2": (gpt2, TOKENS),
    "vit": (lambda: vision_transformer(width=16, depth=2, heads=2), PIXELS),
    "resnet": (resnet, PIXELS),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_any_model_any_pruner(name, dtype, pruner):
    torch.manual_seed(0)
    make, batch = MODELS[name]
    model = make().to(dtype)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    result = pruner().prune(model, PruneTask(TWO_FOUR, [batch]))
    assert result.model is model
    assert result.report.sparsity == 0.5
    for weight in prunable_weights(model):
        keep = weight.as_matrix(result.masks[weight.name].keep)
        assert (keep.unflatten(1, (-1, 4)).sum(-1) == 2).all()
        assert weight.parameter.dtype == dtype
        assert (weight.parameter[~result.masks[weight.name].keep] == 0).all()


@pytest.mark.parametrize("pruner", PRUNERS)
def test_nothing_is_changed_when_the_budget_does_not_fit(pruner):
    model, dense, x = layer(6, 18)
    with pytest.raises(BadBudget, match=r"2:4 does not fit weight \[6, 18\]"):
        pruned(pruner(), model, x, TWO_FOUR)
    with pytest.raises(BadBudget, match="does not meet a budget of flops"):
        pruned(pruner(), model, x, Budget(flops=0.5))
    assert torch.equal(model.weight.detach(), dense)


def test_an_empty_calibration_set_and_unknown_groups_are_refused():
    for pruner in (Wanda(), SparseGpt()):
        with pytest.raises(BadData, match="calibration set is empty"):
            pruner.prune(nn.Linear(4, 4), PruneTask(HALF))
    with pytest.raises(BadParameter, match="wanda: compare='global' must be one of row, layer, share"):
        maskwright.create("pruner", "wanda", compare="global")
