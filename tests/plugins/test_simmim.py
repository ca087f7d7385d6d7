"""SimMIM: the squares, the replaced embeddings, the loss on hidden pixels, and company it was not written for."""

import math

import numpy as np
import pytest
import torch

import maskwright
from maskwright import Layout, Mask
from maskwright.backbones.defaults import vision_transformer
from maskwright.errors import BackboneMismatch, BadParameter, MaskShapeError, UnsupportedLayout
from maskwright.plugins.simmim.claim import CLAIM, decide, distance_of, mean_distance
from maskwright.plugins.simmim.masks import SimMimBlocks, hidden_count, suited_mask_patch
from maskwright.plugins.simmim.objective import SimMim, hidden_l1, replace_hidden
from maskwright.testing import conformance
from maskwright.toolkit.images import patchify
from maskwright.toolkit.selection import at_visible

GRID, PATCH = (4, 4), 4


@pytest.mark.parametrize(
    "check",
    [check for _, check in conformance(SimMimBlocks) + conformance(SimMim)],
    ids=lambda check: f"{check.component.name}-{check.name}",
)
def test_conforms(check):
    check()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(strategy, batch, image, patch, seed=0):
    side = image // patch
    layout = Layout(batch, (side, side), patch_size=patch)
    return strategy.draw(layout, signals={}, progress=0.0, generator=generator(seed))


def vit(**changes):
    sizes = {"image_size": 16, "patch_size": PATCH, "channels": 3, "width": 16, "depth": 2, "heads": 2}
    return vision_transformer(**{**sizes, **changes})


def bound(**changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SimMim().bind(vit(**changes))


def pixels(batch=3, seed=1, channels=3):
    return torch.randn(batch, channels, 16, 16, generator=generator(seed))


def some_hidden(batch=3, seed=2):
    return maskwright.create("mask-strategy", "random", ratio=0.5).draw(
        Layout(batch, GRID, patch_size=PATCH), signals={}, progress=0.0, generator=generator(seed)
    )


# -- the squares (exact checks 1 to 4) ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "square", "patch", "ratio", "cells", "patches"),
    [
        (192, 32, 4, 0.6, 22, 1408),
        (224, 32, 16, 0.6, 30, 120),
        (192, 64, 4, 0.6, 6, 1536),
        (320, 32, 16, 0.55, 56, 224),
    ],
)
def test_hidden_counts_are_the_official_ones(image, square, patch, ratio, cells, patches):
    mask = draw(SimMimBlocks(ratio=ratio, mask_patch=square), 3, image, patch)
    assert hidden_count((image // square) ** 2, ratio) == cells
    assert (mask.keep[0].numel() - mask.counts).tolist() == [patches] * 3


def test_the_count_is_the_ceiling_of_the_product_in_double_precision():
    assert hidden_count(100, 0.55) == 56
    assert hidden_count(100, 0.07) == 8
    assert all(
        hidden_count(n, r / 100) == int(np.ceil(n * (r / 100))) for n in range(1, 60) for r in range(101)
    )


def test_every_square_is_hidden_or_visible_as_a_whole():
    keep = draw(SimMimBlocks(mask_patch=32), 64, 192, 4).keep.float()[:, None]
    most = torch.nn.functional.max_pool2d(keep, 8)
    least = -torch.nn.functional.max_pool2d(-keep, 8)
    assert torch.equal(most, least)
    assert 0 < float(most.mean()) < 1


def test_squares_are_hidden_uniformly_and_in_pairs_as_without_replacement():
    draws = 20_000
    hidden = ~draw(SimMimBlocks(), draws, 192, 32).keep.flatten(1)
    each = hidden.double().mean(0)
    pairs = (hidden.double().T @ hidden.double()) / draws
    off = pairs[~torch.eye(36, dtype=torch.bool)]
    one, two = 22 / 36, 22 * 21 / (36 * 35)
    # Five standard errors: about one run in a thousand would exceed it for 1,296 numbers, and the seed is fixed.
    assert (each - one).abs().max() < 5 * math.sqrt(one * (1 - one) / draws)
    assert (off - two).abs().max() < 5 * math.sqrt(two * (1 - two) / draws)


def test_squares_of_one_patch_are_uniform_random_masking():
    mask = draw(SimMimBlocks(mask_patch=16), 4000, 112, 16, seed=3)
    assert mask.counts.unique().tolist() == [49 - 30]
    keep = mask.keep.double()
    together = (keep[:, :, 1:] * keep[:, :, :-1]).mean()
    assert abs(float(together) - 19 * 18 / (49 * 48)) < 0.005


def test_ratio_0_hides_nothing_and_ratio_1_everything():
    assert draw(SimMimBlocks(ratio=0), 2, 64, 16).keep.all()
    assert not draw(SimMimBlocks(ratio=1, mask_patch=32), 2, 64, 16).keep.any()


def naive_squares(noise, image, square, patch, ratio):
    """One image after the other: the squares of the smallest noise are hidden."""
    masks = []
    for row in noise:
        side = image // square
        hidden = np.zeros(side * side, dtype=bool)
        hidden[np.argsort(row)[: math.ceil(side * side * ratio)]] = True
        blocks = np.kron(hidden.reshape(side, side), np.ones((square // patch,) * 2, dtype=bool))
        masks.append(~blocks)
    return torch.from_numpy(np.stack(masks))


@pytest.mark.parametrize(
    ("image", "square", "patch", "ratio"), [(192, 32, 4, 0.6), (96, 48, 16, 0.3), (64, 8, 8, 0.9)]
)
def test_the_vectorised_draw_is_the_naive_one(image, square, patch, ratio):
    cells = (image // square) ** 2
    noise = torch.rand(5, cells, generator=generator(7), dtype=torch.float64).numpy()
    drawn = draw(SimMimBlocks(ratio=ratio, mask_patch=square), 5, image, patch, seed=7)
    assert torch.equal(drawn.keep, naive_squares(noise, image, square, patch, ratio))


def test_a_wide_image_has_squares_in_both_directions():
    layout = Layout(2, (4, 8), patch_size=16)
    mask = SimMimBlocks(ratio=0.5).draw(layout, signals={}, progress=0.0, generator=generator())
    assert mask.shape == (2, 4, 8)
    assert mask.counts.tolist() == [16, 16]


@pytest.mark.parametrize(
    ("side", "patch", "square"),
    [(224, 16, 32), (192, 4, 32), (96, 4, 32), (64, 4, 16), (32, 4, 8), (16, 4, 4), (64, 16, 16)],
)
def test_the_default_square_is_the_papers_where_it_fits(side, patch, square):
    assert suited_mask_patch(side, patch) == square
    assert SimMimBlocks().coarse(Layout(1, (side // patch,) * 2, patch_size=patch)).patch_size == square


@pytest.mark.parametrize(
    ("layout", "parameters", "words"),
    [
        (Layout(1, (14, 14)), {}, "patch size"),
        (Layout(1, (196,), patch_size=16), {}, "rows × columns"),
        (Layout(1, (7, 7), patch_size=16), {"mask_patch": 32}, "may be 16, 112"),
        (Layout(1, (14, 14), patch_size=16), {"mask_patch": 24}, "multiple of the model's patch"),
        (Layout(1, (4, 4), patch_size=16), {"mask_patch": 64}, "rounds up to all"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_with_what_would(layout, parameters, words):
    with pytest.raises(UnsupportedLayout, match=words):
        SimMimBlocks(**parameters).draw(layout, signals={}, progress=0.0, generator=generator())


@pytest.mark.parametrize("wrong", [{"ratio": 1.2}, {"mask_patch": 0}])
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(BadParameter):
        SimMimBlocks(**wrong)


# -- the loss (exact checks 5 and 6) -----------------------------------------------------------------------------


def test_loss_of_the_hand_case():
    target, prediction = (
        torch.zeros(1, 3, 2, 2, dtype=torch.float64),
        torch.ones(1, 3, 2, 2, dtype=torch.float64),
    )
    hidden = torch.tensor([[[[True, False], [False, False]]]])
    assert hidden_l1(prediction, target, hidden).item() == pytest.approx(0.9999900001, abs=1e-10)
    prediction[..., 0, 1] = prediction[..., 1, :] = 100
    assert hidden_l1(prediction, target, hidden).item() == pytest.approx(0.9999900001, abs=1e-10)


def test_gradient_is_a_sign_over_the_count_on_hidden_pixels_and_zero_elsewhere():
    target = pixels(2)
    prediction = pixels(2, seed=9).requires_grad_()
    hidden = ~Mask(some_hidden(2).keep).upsample((16, 16)).keep[:, None]
    hidden_l1(prediction, target, hidden).backward()
    expected = (prediction - target).sign() * hidden / ((hidden.sum() + 1e-5) * 3)
    assert torch.equal(prediction.grad[~hidden.expand_as(target)], torch.zeros(int((~hidden).sum()) * 3))
    torch.testing.assert_close(prediction.grad, expected)


def test_an_empty_mask_costs_exactly_nothing():
    everything = Mask(torch.ones(3, *GRID, dtype=torch.bool))
    loss = bound()({"pixels": pixels()}, everything)
    assert loss.total.item() == 0
    loss.total.backward()


def test_the_denominator_belongs_to_the_batch_not_to_the_image():
    """Unequal counts: the loss is not the mean of the images' losses."""
    model, batch = bound(), pixels(2)
    keep = torch.ones(2, *GRID, dtype=torch.bool)
    keep[0, 0, 0] = False
    keep[1, 1:] = False
    together = model({"pixels": batch}, Mask(keep)).total.item()
    alone = [model({"pixels": batch[i : i + 1]}, Mask(keep[i : i + 1])).total.item() for i in range(2)]
    assert together == pytest.approx((alone[0] * 1 + alone[1] * 12) / 13, rel=1e-5)
    assert together != pytest.approx(sum(alone) / 2, rel=1e-3)


def test_the_loss_is_the_official_formula_on_the_prediction():
    model, batch, mask = bound(), pixels(), some_hidden()
    loss = model({"pixels": batch}, mask)
    error = (loss.outputs["prediction"] - patchify(batch, PATCH)).abs()
    hidden = ~mask.flatten().keep
    assert loss.total.item() == pytest.approx(error[hidden].mean().item(), rel=1e-5)
    assert loss.parts == {"pixels": loss.total}


# -- the encoder's input (exact check 7) -------------------------------------------------------------------------


def test_hidden_pixels_do_not_reach_the_encoder_and_visible_ones_do():
    model, batch, mask = bound().eval(), pixels(), some_hidden()
    seen = mask.upsample((16, 16)).keep[:, None]
    before = model.encode(batch, ~mask.flatten().keep)
    other = torch.where(seen, batch, torch.full_like(batch, float("inf")))
    assert torch.equal(before, model.encode(other, ~mask.flatten().keep))
    changed = batch.clone()
    row, column = seen[0, 0].nonzero()[0].tolist()
    changed[0, :, row, column] += 1
    after = model.encode(changed, ~mask.flatten().keep)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1:], after[1:])


def test_the_token_gets_its_gradient_from_hidden_positions_and_the_embedding_from_visible_ones():
    embeddings = torch.randn(2, 4, 3, generator=generator()).requires_grad_()
    token = torch.randn(3, generator=generator(1)).requires_grad_()
    hidden = torch.tensor([[True, False, False, True], [False, True, False, False]])
    mixed = replace_hidden(embeddings, token, hidden)
    assert torch.equal(mixed[hidden], token.expand(3, 3))
    assert torch.equal(mixed[~hidden], embeddings[~hidden])
    mixed.sum().backward()
    assert torch.equal(embeddings.grad, (~hidden)[..., None].expand(2, 4, 3).float())
    assert torch.equal(token.grad, torch.full((3,), 3.0))


def test_a_hidden_patch_still_has_its_position():
    """The token is put in before positions: two hidden patches of one image come out different."""
    model = bound().eval()
    encoded = model.encode(pixels(1), torch.ones(1, 16, dtype=torch.bool))[0]
    assert (encoded[0] - encoded[5]).abs().max() > 1e-3


def test_the_encoder_sees_every_position_and_the_prefix():
    model, seen = bound(), []
    encode = model.backbone.encode
    model.backbone.encode = lambda tokens: seen.append(tokens.shape) or encode(tokens)
    model({"pixels": pixels()}, some_hidden())
    assert seen == [(3, 1 + 16, 16)]


def test_the_mask_token_starts_truncated_at_one_deviation():
    token = bound(width=64).mask_token.detach()
    assert 0.005 < float(token.std()) < 0.02
    assert float(token.abs().max()) <= 0.02


def test_the_head_is_one_layer_in_channel_major_order():
    """Pixel shuffle: output channel c·p² + i·p + j is pixel (i, j) of channel c."""
    model = bound()
    convolution = model.head[0]
    assert [type(layer) for layer in model.head] == [torch.nn.Conv2d, torch.nn.PixelShuffle]
    assert convolution.kernel_size == (1, 1)
    assert convolution.out_channels == PATCH**2 * 3
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.bias.copy_(torch.arange(PATCH**2 * 3))
    predicted = model.head(torch.zeros(1, 16, *GRID))
    assert predicted.shape == (1, 3, 16, 16)
    c, i, j = 2, 1, 3
    assert predicted[0, c, PATCH + i, 2 * PATCH + j].item() == c * PATCH**2 + i * PATCH + j


def test_outputs_are_what_they_say():
    model, batch, mask = bound().eval(), pixels(), some_hidden()
    outputs = model({"pixels": batch}, mask).outputs
    encoded = model.encode(batch, ~mask.flatten().keep)
    seen = mask.upsample((16, 16)).keep[:, None].expand_as(batch)
    assert torch.equal(outputs["features"], mask.gather_visible(encoded))
    assert outputs["prediction"].shape == (3, 16, PATCH * PATCH * 3)
    assert torch.equal(outputs["reconstruction"][seen], batch[seen])
    assert torch.equal(
        patchify(outputs["reconstruction"], PATCH)[~mask.flatten().keep],
        outputs["prediction"][~mask.flatten().keep],
    )
    assert not outputs["reconstruction"].requires_grad


def test_features_of_unequal_counts_are_listed_one_after_the_other():
    encoded = torch.arange(12.0).view(2, 3, 2)
    keep = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.equal(at_visible(encoded, keep), encoded[keep])
    assert at_visible(encoded, ~keep).shape == (1, 2)
    assert at_visible(encoded, keep & torch.tensor([True, False, True])).shape == (2, 2, 2)


def test_gradients_reach_every_parameter():
    model = bound()
    model({"pixels": pixels()}, some_hidden()).total.backward()
    without = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()]
    assert without == []


def test_binding_refuses_what_is_no_patch_backbone():
    with pytest.raises(BackboneMismatch, match=r"patches\(pixels"):
        SimMim().bind(torch.nn.Conv2d(3, 8, 3))


def test_a_mask_of_another_grid_is_refused():
    with pytest.raises(MaskShapeError, match=r"\[3, 9\].*\[3, 16\]"):
        bound()({"pixels": pixels()}, Mask(torch.ones(3, 3, 3, dtype=torch.bool)))


# -- company -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random", "block", "simmim-blocks", "colormae"])
def test_any_strategys_mask_trains_it(name):
    strategy = maskwright.create("mask-strategy", name, **({"min_block": 2} if name == "block" else {}))
    model, random = bound(), generator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = {"pixels": torch.nn.functional.interpolate(torch.rand(8, 3, 2, 2, generator=generator(4)), 16)}
    losses = []
    for _ in range(40):
        mask = strategy.draw(Layout.of(model.backbone, batch), signals={}, progress=0.5, generator=random)
        loss = model(batch, mask).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_its_squares_serve_mae():
    mae = maskwright.create("objective", "mae", decoder_width=16, decoder_depth=1, decoder_heads=2).bind(
        vit()
    )
    mask = draw(SimMimBlocks(), 3, 16, PATCH)
    loss = mae({"pixels": pixels()}, mask)
    assert loss.total.isfinite()
    assert loss.outputs["features"].shape == (3, 16 - 10, 16)


def unequal():
    keep = torch.rand(4, *GRID, generator=generator(5)) < torch.tensor([0.9, 0.7, 0.4, 0.2]).view(-1, 1, 1)
    assert keep[:2].sum() != keep[2:].sum()
    return Mask(keep)


def test_two_processes_with_unequal_counts_average_to_the_global_loss(monkeypatch):
    model, batch, mask = bound().train(), pixels(4), unequal()
    whole = model({"pixels": batch}, mask).total
    (expected,) = torch.autograd.grad(whole, model.mask_token)

    counts = [int((~mask.rows(rows).keep).sum()) * PATCH**2 for rows in (slice(0, 2), slice(2, 4))]
    gathered = []

    def add_the_other_processes(value):
        gathered.append(int(value))
        value.fill_(sum(counts))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", add_the_other_processes)
    losses = [model({"pixels": batch[rows]}, mask.rows(rows)).total for rows in (slice(0, 2), slice(2, 4))]
    gradients = [torch.autograd.grad(loss, model.mask_token)[0] for loss in losses]
    assert gathered == counts
    assert (losses[0] + losses[1]).item() / 2 == pytest.approx(whole.item(), rel=1e-6)
    torch.testing.assert_close((gradients[0] + gradients[1]) / 2, expected, rtol=1e-4, atol=1e-8)
    model.eval()({"pixels": batch[:2]}, mask.rows(slice(0, 2)))
    assert gathered == counts, "evaluation makes no collective call"


# -- the claim (exact check 8) -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("square", "ratio", "distance", "tolerance"),
    [
        (4, 0.6, 2.08, 0.01),
        (8, 0.6, 3.68, 0.05),
        (16, 0.6, 7.24, 0.25),
        (32, 0.6, 15.43, 0.6),
        (64, 0.6, 37.7, 3.0),
        (32, 0.8, 25.6, 1.5),
    ],
)
def test_mean_distance_to_what_is_visible(square, ratio, distance, tolerance):
    assert distance_of(square, ratio, 80, seed=0) == pytest.approx(distance, abs=tolerance)


def test_distance_of_a_hand_case():
    hidden = torch.zeros(2, 3, 5, dtype=torch.bool)
    hidden[0, :, 1:4] = True
    assert mean_distance(hidden) == pytest.approx((1 + 2 + 1) / 3)


def test_the_criterion_can_fail():
    good = {
        f"distance at {p} px, ratio {r} (px)": d
        for (p, r), d in {
            (4, 0.6): 2.1,
            (8, 0.6): 3.7,
            (16, 0.6): 7.3,
            (32, 0.6): 15.5,
            (64, 0.6): 37.0,
            (32, 0.5): 12.7,
            (16, 0.75): 10.4,
            (8, 0.8): 6.1,
        }.items()
    }
    assert decide([good, good])
    assert not decide([good, {**good, "distance at 32 px, ratio 0.6 (px)": 21.0}])
    assert not decide([good, {**good, "distance at 8 px, ratio 0.6 (px)": 7.4}])
    assert not decide([{**good, "distance at 8 px, ratio 0.8 (px)": 11.0}])
    assert len(CLAIM.seeds) >= 3
