"""Hard Patches Mining: the counts and the law of its masks, its losses by hand, its two decoders and its teacher."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskwright
from maskwright import Layout, Mask, MaskedTraining
from maskwright.backbones.defaults import vision_transformer
from maskwright.errors import (
    BadParameter,
    MaskShapeError,
    MissingSignal,
    UnequalMaskCounts,
    UnsupportedLayout,
)
from maskwright.plugins.hpm.masks import HardPatches, hard_count, hide_hard
from maskwright.plugins.hpm.objective import (
    HardPatchesMining,
    absolute_loss,
    reconstruction_loss,
    relative_loss,
    teacher_decay,
)
from maskwright.registry import check_fit
from maskwright.testing import conformance
from maskwright.toolkit.images import normalize_patches, patchify

SMALL = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
seeds = st.integers(0, 2**31)


def checks_of(component):
    return [pytest.param(check, id=name) for name, check in conformance(component)]


@pytest.mark.parametrize("check", [*checks_of(HardPatches), *checks_of(HardPatchesMining)])
def test_conforms(check):
    check()


# -- masks -------------------------------------------------------------------------------------------------------


def drawn(patch_loss, *, grid=None, progress=1.0, seed=0, **parameters):
    """Visible, bool [B, N]."""
    layout = Layout(len(patch_loss), grid or (patch_loss.shape[1],))
    mask = HardPatches(**parameters).draw(
        layout,
        signals={"patch_loss": patch_loss},
        progress=progress,
        generator=torch.Generator().manual_seed(seed),
    )
    return mask.flatten().keep


@pytest.mark.parametrize(("epoch", "hard"), [(0, 0), (2, 1), (10, 4), (49, 18), (99, 36), (199, 73)])
def test_the_official_counts_of_196_patches_over_200_epochs(epoch, hard):
    assert hard_count(147, (epoch + 1) / 200) == hard
    patch_loss = torch.arange(196.0).expand(200, -1)
    keep = drawn(patch_loss, progress=(epoch + 1) / 200)
    assert (keep.sum(1) == 49).all()
    always = ~keep.any(0)
    assert always[196 - hard :].all()
    assert not always[: 196 - hard].any()


def test_both_truncations_are_the_official_ones():
    # 100 · (1 - 0.9) is a little less than 10 in floating point.
    keep = drawn(torch.rand(3, 100), ratio=0.9)
    assert keep.sum(1).tolist() == [9, 9, 9]


@pytest.mark.parametrize(("epoch", "hard", "chance"), [(199, 73, 74 / 123), (99, 36, 111 / 160)])
def test_the_rest_of_the_mask_is_uniform_over_the_others(epoch, hard, chance):
    patch_loss = torch.rand(1, 196, generator=torch.Generator().manual_seed(1)).expand(6000, -1)
    hidden = ~drawn(patch_loss, progress=(epoch + 1) / 200)
    hardest = patch_loss[0].topk(hard).indices
    often = hidden.double().mean(0)
    assert (often[hardest] == 1).all()
    others = torch.ones(196, dtype=torch.bool).index_fill(0, hardest, False)
    # Six standard deviations of a binomial of 6000 trials; the mean is exact because the count is.
    assert (often[others] - chance).abs().max() < 6 * math.sqrt(chance * (1 - chance) / 6000)
    assert often[others].mean().item() == pytest.approx(chance, abs=1e-9)


def test_eight_patches_by_hand():
    patch_loss = torch.tensor([[0.1, 0.9, 0.3, 0.7, 0.5, 0.2, 0.8, 0.4]]).expand(9000, -1)
    hidden = ~drawn(patch_loss, ratio=0.5, progress=1.0)
    assert (hidden.sum(1) == 4).all()
    often = hidden.double().mean(0)
    assert often[[1, 6]].tolist() == [1, 1]
    others = [0, 2, 3, 4, 5, 7]
    assert (often[others] - 1 / 3).abs().max() < 6 * math.sqrt(2 / 9 / 9000)


@given(seeds, st.integers(2, 40), st.floats(0, 0.95), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_counts_are_exact_and_the_hardest_are_hidden(seed, patches, ratio, start, end, progress):
    kept = int(patches * (1 - ratio))
    patch_loss = torch.rand(5, patches, generator=torch.Generator().manual_seed(seed))
    arguments = {"ratio": ratio, "alpha_start": start, "alpha_end": end, "progress": progress}
    if kept < 1:
        with pytest.raises(UnsupportedLayout, match="leaves nothing visible"):
            drawn(patch_loss, **arguments)
        return
    keep = drawn(patch_loss, seed=seed, **arguments)
    hard = int((patches - kept) * (start + (end - start) * progress))
    for row, loss in zip(keep, patch_loss):
        assert row.sum() == kept
        hardest = sorted(range(patches), key=lambda patch: -loss[patch])[:hard]
        assert not row[hardest].any()


def naive():
    """benchmarks/naive_hard_patches.py, which the throughput is measured against."""
    path = Path(__file__).parents[2] / "benchmarks" / "naive_hard_patches.py"
    spec = importlib.util.spec_from_file_location("naive_hard_patches", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_law_is_that_of_the_loop_over_images():
    reference = naive().draw
    patch_loss = torch.rand(1, 12, generator=torch.Generator().manual_seed(2)).expand(20000, -1)
    theirs = reference(patch_loss.numpy(), np.random.default_rng(0), ratio=0.6, progress=0.7)
    ours = drawn(patch_loss, ratio=0.6, progress=0.7).numpy()
    # Pairs too: how often two patches are visible together.
    for one in (ours, theirs):
        assert (one.sum(1) == 4).all()
    together = [one.astype(float).T @ one / len(one) for one in (ours, theirs)]
    assert np.abs(together[0] - together[1]).max() < 6 * math.sqrt(2 * 0.25 / 20000)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_only_the_order_of_the_prediction_counts(seed):
    rank = torch.rand(4, 30, generator=torch.Generator().manual_seed(seed)).argsort(1).double()
    for mapped in (rank * 3 - 100, rank.exp(), -1 / (1 + rank), rank**3):
        assert torch.equal(drawn(rank, seed=seed), drawn(mapped, seed=seed))
    # The other way round, and with two neighbours exchanged, it is another mask.
    assert not torch.equal(drawn(rank, seed=seed, ratio=0.5), drawn(-rank, seed=seed, ratio=0.5))


def test_without_hard_patches_it_is_the_random_mask():
    layout = Layout(6, (14, 14))
    generator = torch.Generator().manual_seed(3)
    random = maskwright.create("mask-strategy", "random").draw(
        layout, signals={}, progress=0.0, generator=generator
    )
    keep = drawn(torch.rand(6, 196), grid=(14, 14), progress=0.0, seed=3)
    assert torch.equal(keep, random.flatten().keep)


def test_equal_losses_go_by_position_and_never_break_the_count():
    keep = drawn(torch.zeros(50, 16), alpha_start=1.0, alpha_end=1.0)
    assert torch.equal(keep, (torch.arange(16) >= 12).expand(50, -1))
    half = drawn(torch.ones(400, 16))
    assert (half.sum(1) == 4).all()
    assert not half[:, :6].any()
    assert half[:, 6:].any(0).all()


def test_hiding_is_done_row_by_row():
    patch_loss, random = torch.rand(5, 20), torch.rand(5, 20, dtype=torch.float64)
    together = hide_hard(patch_loss, random, 6, 7)
    for row in range(5):
        assert torch.equal(
            together[row], hide_hard(patch_loss[row : row + 1], random[row : row + 1], 6, 7)[0]
        )


def test_the_signal_may_have_the_grids_shape_and_no_other():
    patch_loss = torch.rand(3, 4, 5)
    assert torch.equal(drawn(patch_loss.flatten(1), grid=(4, 5)), drawn(patch_loss, grid=(4, 5)))
    with pytest.raises(MaskShapeError, match=r"patch_loss is \[3, 19\], the layout has 3 × 20"):
        drawn(torch.rand(3, 19), grid=(4, 5))


def test_without_its_signal_the_strategy_says_who_could_give_it():
    with pytest.raises(MissingSignal, match=r"'patch_loss' \[B, N\].*'hpm' provides it"):
        HardPatches().draw(Layout(1, 16), signals={}, progress=0, generator=torch.Generator())


# -- losses ------------------------------------------------------------------------------------------------------

S, T = torch.tensor([[0.0, 1, 2]]), torch.tensor([[0.1, 0.3, 0.2]])


@pytest.mark.parametrize(
    ("prediction", "expected", "within"),
    [
        (S, 0.5844817215, 1e-6),
        (torch.zeros(1, 3), 0.6931451806, 1e-6),
        (1000 * T, -1.0e-6, 1e-7),
        (-1000 * T, 13.8155106, 1e-6),
    ],
)
def test_the_ranking_loss_of_three_patches(prediction, expected, within):
    assert relative_loss(prediction, T).item() == pytest.approx(expected, abs=within)


def test_the_absolute_loss_of_three_patches():
    assert absolute_loss(S, T).item() == pytest.approx(1.6666333375, abs=1e-6)


def relative_by_hand(prediction, loss):
    """Every ordered pair of every image, one after the other, as the method states it."""
    total, pairs = 0.0, 0
    for s, t in zip(prediction.tolist(), loss.tolist()):
        for i in range(len(s)):
            for j in range(len(s)):
                chance = 1 / (1 + math.exp(s[i] - s[j]))
                if t[j] > t[i]:
                    total -= math.log(chance + 1e-6)
                elif t[j] < t[i]:
                    total -= math.log(1 - chance + 1e-6)
                pairs += t[i] != t[j]
    return total / pairs


def test_the_ranking_loss_is_the_sum_over_pairs_with_one_denominator_for_the_batch():
    draw = torch.Generator().manual_seed(0)
    prediction = torch.randn(3, 7, generator=draw) * 3
    loss = torch.rand(3, 7, generator=draw)
    loss[1, :4] = 0.5  # fewer pairs in this image
    assert relative_loss(prediction, loss).item() == pytest.approx(
        relative_by_hand(prediction, loss), rel=1e-5
    )
    of_each = [relative_loss(prediction[row : row + 1], loss[row : row + 1]).item() for row in range(3)]
    assert relative_loss(prediction, loss).item() != pytest.approx(sum(of_each) / 3, rel=1e-4)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_the_ranking_loss_knows_differences_and_orders_only(seed):
    draw = torch.Generator().manual_seed(seed)
    prediction = torch.randn(4, 6, generator=draw, requires_grad=True)
    loss = torch.rand(4, 6, generator=draw)
    value = relative_loss(prediction, loss)
    shifted = relative_loss(prediction + torch.randn(4, 1, generator=draw), loss)
    assert shifted.item() == pytest.approx(value.item(), abs=1e-5)
    for mapped in (loss.exp() * 7, -1 / (loss + 1), loss.argsort(1).argsort(1)):
        assert relative_loss(prediction, mapped).item() == pytest.approx(value.item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(value, prediction)
    assert gradient.sum(1).abs().max() < 1e-6
    assert gradient.abs().max() > 1e-3


def test_the_gradient_of_a_grossly_inverted_pair_vanishes():
    prediction = torch.tensor([[0.0, -40.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(relative_loss(prediction, torch.tensor([[0.0, 1.0]])), prediction)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("learn", [relative_loss, absolute_loss])
def test_equal_losses_and_empty_masks_cost_nothing_that_is_not_finite(learn):
    for shape in ((2, 5), (2, 1), (2, 0)):
        prediction = torch.randn(shape, requires_grad=True)
        value = learn(prediction, torch.ones(shape))
        (gradient,) = torch.autograd.grad(value, prediction)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
    if learn is relative_loss:
        assert relative_loss(torch.randn(2, 5), torch.ones(2, 5)) == 0


@pytest.mark.parametrize("learn", [relative_loss, absolute_loss])
def test_the_losses_send_no_gradient_into_their_target(learn):
    prediction, loss = (torch.rand(2, 5, requires_grad=True) for _ in range(2))
    learn(prediction, loss).backward()
    assert loss.grad is None
    assert prediction.grad.abs().sum() > 0


def test_half_precision_keeps_the_constant():
    value = relative_loss((-1000 * T).bfloat16(), T)
    assert value.item() == pytest.approx(13.8155106, abs=1e-3)


def test_the_error_of_a_patch_is_its_mean_square():
    prediction, target = torch.rand(2, 3, 4), torch.rand(2, 3, 4)
    assert torch.allclose(
        reconstruction_loss(prediction, target)[1, 2], ((prediction - target)[1, 2] ** 2).sum() / 4
    )


@pytest.mark.parametrize(("epoch", "decay"), [(0, 0.999), (50, 0.99945), (100, 0.9999), (150, 0.9999)])
def test_the_teachers_decay_over_200_epochs(epoch, decay):
    assert teacher_decay(epoch / 200) == pytest.approx(decay, abs=1e-12)


def test_the_decay_without_a_warm_up_is_the_last_one():
    assert teacher_decay(0.0, warmup=0.0) == pytest.approx(0.9999)
    # 100 of 800 epochs.
    assert teacher_decay(50 / 800, warmup=0.125) == pytest.approx(0.99945)


# -- the bound objective -----------------------------------------------------------------------------------------


def bound(**parameters):
    vit = vision_transformer(image_size=16, width=32, depth=2, heads=2)
    torch.manual_seed(0)
    return HardPatchesMining(**{**SMALL, **parameters}).bind(vit)


def batch_of(count=3, seed=0):
    return {"pixels": torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def random_mask(count=3, kept=4, seed=0):
    noise = torch.rand(count, 16, generator=torch.Generator().manual_seed(seed))
    return Mask((noise.argsort(1).argsort(1) < kept).view(count, 4, 4))


def test_the_parts_are_the_two_losses_on_hidden_patches():
    objective, batch, mask = bound(), batch_of(), random_mask()
    loss = objective(batch, mask)
    patches = patchify(batch["pixels"], 4)
    error = ((loss.outputs["prediction"] - patches) ** 2).mean(-1)
    hidden = [error[row][~mask.keep[row].flatten()] for row in range(3)]
    assert loss.parts["pixels"].item() == pytest.approx(torch.cat(hidden).mean().item(), rel=1e-5)
    forecast = [loss.outputs["patch_loss"][row][~mask.keep[row].flatten()] for row in range(3)]
    expected = relative_by_hand(torch.stack(forecast), torch.stack(hidden))
    assert loss.parts["loss_prediction"].item() == pytest.approx(expected, rel=1e-4)
    assert loss.total.item() == pytest.approx(sum(part.item() for part in loss.parts.values()), rel=1e-6)
    assert torch.allclose(loss.outputs["patch_error"], error, rtol=1e-4)


def test_norm_pix_and_absolute_are_the_other_targets():
    objective, batch, mask = bound(norm_pix=True, relative=False), batch_of(), random_mask()
    loss = objective(batch, mask)
    target = normalize_patches(patchify(batch["pixels"], 4))
    error = ((loss.outputs["prediction"] - target) ** 2).mean(-1)
    hidden = mask.flatten().gather_hidden(error)
    assert loss.parts["pixels"].item() == pytest.approx(hidden.mean().item(), rel=1e-5)
    wanted = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, keepdim=True) + 1e-6).sqrt()
    forecast = mask.flatten().gather_hidden(loss.outputs["patch_loss"])
    expected = (forecast - wanted).square().mean().item()
    assert loss.parts["loss_prediction"].item() == pytest.approx(expected, rel=1e-4)


def gradients(objective, part):
    objective.zero_grad()
    part.backward()
    return {
        name: parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        for name, parameter in objective.named_parameters()
    }


def test_the_ranking_loss_trains_the_shared_input_and_not_the_reconstructor():
    objective = bound()
    reached = gradients(objective, objective(batch_of(), random_mask()).parts["loss_prediction"])
    by = {name.removeprefix("network.").split(".")[0]: [] for name in reached}
    for name, hit in reached.items():
        by[name.removeprefix("network.").split(".")[0]].append(hit)
    assert not any(by["reconstructor"] + by["predict_pixels"] + by["teacher"])
    # A shift of all outputs does not change an order: its bias alone has no gradient.
    assert any(by["predict_loss"])
    assert all(by["loss_predictor"])
    assert any(by["backbone"])
    assert reached["network.decoder_input.mask_token"]
    assert reached["network.decoder_input.embed.weight"]


def test_the_reconstruction_trains_the_encoder_and_not_the_loss_predictor():
    objective = bound()
    reached = gradients(objective, objective(batch_of(), random_mask()).parts["pixels"])
    assert not any(hit for name, hit in reached.items() if "loss" in name or name.startswith("teacher"))
    assert reached["network.decoder_input.mask_token"]


def test_both_decoders_have_one_shape():
    network = HardPatchesMining().bind(vision_transformer(image_size=16, width=32, depth=1, heads=2)).network
    shapes = [
        [tuple(p.shape) for p in part.parameters()]
        for part in (network.reconstructor, network.loss_predictor)
    ]
    assert shapes[0] == shapes[1]
    assert len(network.reconstructor.layers) == 8
    assert network.reconstructor.layers[0].self_attn.num_heads == 16
    assert network.predict_loss.weight.shape == network.predict_pixels.weight.shape == (48, 512)


def test_the_teacher_is_a_copy_of_the_whole_network_that_follows():
    objective = bound(ema_start=0.9, ema_end=0.5)
    student, teacher = objective.network, objective.teacher
    assert student.state_dict().keys() == teacher.state_dict().keys()
    assert not any(p.requires_grad for p in teacher.parameters())
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    objective(batch_of(), random_mask()).total.backward()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in teacher.named_parameters())
    objective.after_step(0.25)  # half of the warm-up: decay 0.7
    for (name, mine), its in zip(teacher.named_parameters(), student.parameters()):
        assert torch.allclose(mine, 0.7 * before[name] + 0.3 * its, atol=1e-6), name
    assert not objective.train().teacher.training


def test_the_signal_is_the_teachers_forecast_with_everything_in_view():
    objective, batch = bound(), batch_of()
    seen = []
    objective.teacher.decoder_input.register_forward_hook(lambda _, given, out: seen.append((given, out)))
    objective.network.register_forward_hook(lambda *_: pytest.fail("the student is not asked"))
    with torch.no_grad():
        for p in objective.network.parameters():
            p.zero_()
    signal = objective.signals(batch)["patch_loss"]
    assert signal.shape == (3, 16)
    assert not signal.requires_grad
    assert signal.std() > 0
    (((encoded, mask, prefix), out),) = seen
    assert mask.keep.all()
    assert encoded.shape == (3, 17, 32)
    # No mask token: every token of the decoder's input carries its patch.
    with torch.no_grad():
        objective.teacher.decoder_input.mask_token.add_(5)
    assert torch.equal(signal, objective.signals(batch)["patch_loss"])


def test_the_forecast_is_in_raster_order():
    """A patch that alone differs from the others changes most of all its own forecast."""
    objective = bound()
    pixels = torch.zeros(16, 3, 16, 16)
    for patch in range(16):
        row, column = divmod(patch, 4)
        pixels[patch, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = torch.randn(
            3, 4, 4, generator=torch.Generator().manual_seed(1)
        )
    flat = objective.signals({"pixels": torch.zeros(16, 3, 16, 16)})["patch_loss"]
    change = (objective.signals({"pixels": pixels})["patch_loss"] - flat).abs()
    assert change.argmax(1).tolist() == list(range(16))


def test_hidden_pixels_reach_neither_decoder():
    objective, batch, mask = bound(), batch_of(), random_mask()
    visible = mask.upsample((16, 16)).keep[:, None]
    changed = {"pixels": torch.where(visible, batch["pixels"], 100.0)}
    one, two = objective(batch, mask).outputs, objective(changed, mask).outputs
    assert torch.equal(one["prediction"], two["prediction"])
    assert torch.equal(one["patch_loss"], two["patch_loss"])


def test_the_reconstruction_shows_visible_patches_as_they_are():
    for norm_pix in (False, True):
        objective, batch, mask = bound(norm_pix=norm_pix).eval(), batch_of(), random_mask()
        shown = objective(batch, mask).outputs["reconstruction"]
        visible = mask.upsample((16, 16)).keep[:, None].expand_as(shown)
        assert torch.equal(shown[visible], batch["pixels"][visible])
        assert not torch.isclose(shown[~visible], batch["pixels"][~visible]).any()


def test_training_learns_the_order_of_the_losses():
    """Brightness tells how noisy the neighbours are; the order of hidden losses of new images is then far from chance."""
    model = MaskedTraining(
        vision_transformer(image_size=16, width=32, depth=2, heads=2),
        HardPatches(),
        HardPatchesMining(**SMALL),
        total_steps=80,
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)

    def images(seed):
        draw = torch.Generator().manual_seed(seed)
        angle = torch.rand(32, 1, 1, 1, generator=draw) * 2 * math.pi
        down, across = torch.meshgrid(*(torch.linspace(-1, 1, 4),) * 2, indexing="ij")
        strength = (4 * (across * angle.cos() + down * angle.sin())).sigmoid()
        strength = strength.repeat_interleave(4, 2).repeat_interleave(4, 3)
        return (torch.randn(32, 3, 16, 16, generator=draw) + 3) * strength

    for step in range(80):
        optimizer.zero_grad()
        model(pixels=images(step))["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        mask = random_mask(32)
        outputs = model.bound({"pixels": images(1000)}, mask).outputs
    ranks = [
        mask.flatten().gather_hidden(outputs[name]).argsort(1).argsort(1).double()
        for name in ("patch_loss", "patch_error")
    ]
    ranks = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    spearman = (ranks[0] * ranks[1]).sum(1) / (ranks[0].norm(dim=1) * ranks[1].norm(dim=1))
    assert spearman.mean() > 0.25


def test_wrong_parameters_are_refused():
    with pytest.raises(BadParameter, match="decoder_heads=3 must divide decoder_width=16"):
        HardPatchesMining(decoder_width=16, decoder_heads=3)
    with pytest.raises(BadParameter, match=r"hard-patches: alpha_end=2.0 must be in \[0, 1\]"):
        HardPatches(alpha_end=2)


# -- with components of others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random", "colormae", "simmim-blocks", "block"])
def test_the_objective_takes_the_masks_of_other_strategies(name):
    if name not in maskwright.names("mask-strategy"):
        pytest.skip(f"there is no {name} yet")
    exact = {"exact": True, "ratio": 0.5, "min_block": 4} if name == "block" else {}
    model = MaskedTraining(
        vision_transformer(image_size=32, width=32, depth=1, heads=2),
        maskwright.create("mask-strategy", name, **exact),
        HardPatchesMining(**SMALL),
    )
    output = model(pixels=torch.randn(2, 3, 32, 32))
    output["loss"].backward()
    assert torch.isfinite(output["loss"])
    assert (output["mask"].counts == output["mask"].counts[0]).all()


def test_masks_of_unequal_counts_are_refused_with_a_reason():
    keep = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    with pytest.raises(UnequalMaskCounts, match="hpm drops hidden patches"):
        bound()(batch_of(), Mask(keep))


def test_an_objective_without_the_signal_is_refused_and_hpm_is_named():
    with pytest.raises(MissingSignal, match=r"'patch_loss'.*'mae' does not provide.*'hpm'"):
        check_fit(HardPatches(), maskwright.create("objective", "mae"))
    check_fit(HardPatches(), HardPatchesMining())


def test_a_signal_of_ones_own_serves_hard_patches_with_any_objective():
    """The variance of a patch in place of a learned forecast: the busiest patches are hidden."""
    pixels = batch_of()["pixels"] * torch.rand(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    variance = patchify(pixels, 4).var(-1)
    objective = maskwright.create("objective", "mae", **SMALL).bind(
        vision_transformer(image_size=16, width=32, depth=1, heads=2)
    )
    mask = HardPatches(alpha_start=1.0, alpha_end=1.0).draw(
        Layout(3, (4, 4)), signals={"patch_loss": variance}, progress=1.0, generator=torch.Generator()
    )
    assert torch.equal(
        mask.flatten().visible_indices(), variance.topk(4, largest=False).indices.sort(1).values
    )
    objective({"pixels": pixels}, mask).total.backward()
