"""CroCo: counts of its masks, its loss by hand, one encoder for two views, and a decoder that looks at the second."""

import math

import pytest
import torch
from torch import nn

import maskwright
from maskwright import Layout, Mask, MaskedTraining
from maskwright.backbones.defaults import vision_transformer
from maskwright.errors import BadParameter, MaskShapeError, MissingColumn, UnequalMaskCounts
from maskwright.jobs.settings import resolve
from maskwright.plugins.croco import claim
from maskwright.plugins.croco.objective import CrossViewCompletion, completion_loss, learning_rate
from maskwright.testing import conformance
from maskwright.testing.backbones import PlainViT
from maskwright.toolkit.images import normalize_patches, patchify, sincos_positions
from maskwright.toolkit.selection import random_mask

SMALL = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bound(seed=0, backbone=None, **parameters):
    """Every weight moved, so that nothing is zero by its initialisation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = CrossViewCompletion(**{**SMALL, **parameters}).bind(backbone or PlainViT())
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
    return module


def views(rows=3, side=16, seed=0):
    first, second = torch.randn(2, rows, 3, side, side, generator=generator(seed))
    return {"pixels": first, "pixels_other_view": second}


def mask_of(rows=3, grid=(4, 4), kept=2, seed=0):
    return random_mask(Layout(rows, grid), kept, generator(seed))


@pytest.mark.parametrize(
    "check", [pytest.param(check, id=name) for name, check in conformance(CrossViewCompletion)]
)
def test_conforms(check):
    check()


# -- masks -------------------------------------------------------------------------------------------------------


def default_strategy():
    section = dict(CrossViewCompletion.default_strategy)
    return maskwright.create("mask-strategy", section.pop("name"), **section)


def default_masks(rows, positions, seed=0):
    """Hidden, bool [B, N]."""
    layout = Layout(rows, (positions,))
    return default_strategy().draw(layout, signals={}, progress=0.0, generator=generator(seed)).as_removed()


def official_mask(noise, count):
    """Hidden, one image after the other: position i is where the number i-th in size lies among the first `count`."""
    rows = []
    for numbers in noise.tolist():
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        rows.append([place < count for place in order])
    return torch.tensor(rows)


@pytest.mark.parametrize(("positions", "hidden"), [(196, 176), (64, 57), (16, 14), (4, 3)])
def test_the_hidden_number_is_truncated(positions, hidden):
    masks = default_masks(50, positions)
    assert masks.sum(1).tolist() == [hidden] * 50
    assert official_mask(torch.rand(3, positions), int(0.9 * positions)).sum(1).tolist() == [hidden] * 3


def test_the_official_rule_is_the_inverse_permutation_and_has_the_same_law():
    noise = torch.tensor([[0.5, 0.9, 0.1]])
    assert noise.argsort(1).tolist() == [[2, 0, 1]]
    assert official_mask(noise, 1).tolist() == [[False, True, False]]
    assert (noise.argsort(1) < 1).tolist() == [[False, True, False]]
    smallest = noise.argsort(1).argsort(1) < 1
    assert smallest.tolist() == [[False, False, True]], "not where the smallest number is"
    # How often positions, and pairs of them, are hidden: 9 of 10, and 9 · 8 / (10 · 9).
    ours = default_masks(20_000, 10)
    theirs = torch.rand(20_000, 10, generator=generator(1)).argsort(1) < 9
    for masks in (ours, theirs):
        together = masks.double().T @ masks.double() / len(masks)
        expected = torch.full((10, 10), 0.8).double().fill_diagonal_(0.9)
        assert (together - expected).abs().max() < 6 * math.sqrt(0.16 / 20_000)


def test_each_position_is_hidden_as_often_as_any_other():
    often = default_masks(20_000, 16).double().mean(0)
    assert (often - 14 / 16).abs().max() < 6 * math.sqrt(14 / 16 * 2 / 16 / 20_000)


def test_a_run_hides_nine_tenths_unless_it_is_told_otherwise():
    strategy = resolve("pretrain", None, {"objective.name": "croco"}).strategy
    assert (strategy.name, strategy.params) == ("random", {"ratio": 0.9, "truncated": "hidden"})
    other = resolve("pretrain", None, {"objective.name": "croco", "strategy.ratio": 0.5}).strategy
    assert other.params == {"ratio": 0.5, "truncated": "hidden"}


# -- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 4])
def test_a_prediction_of_zero_costs_the_biased_variance_of_the_normalised_patch(p):
    patches = patchify(torch.randn(5, 3, 4 * p, 4 * p, dtype=torch.float64, generator=generator()), p)
    n = 3 * p * p
    variance = patches.var(-1)
    expected = ((n - 1) / n * variance / (variance + 1e-6)).mean()
    cost = completion_loss(torch.zeros_like(patches), normalize_patches(patches))
    assert float(cost) == pytest.approx(float(expected), abs=1e-12)
    if p == 1:
        # A patch of no more than three numbers: two thirds, but for the constant beside the variance.
        assert float(cost) == pytest.approx(2 / 3, abs=1e-3)


def test_only_hidden_patches_count_and_the_batch_has_one_denominator():
    prediction, target = torch.randn(2, 2, 5, 6, generator=generator())
    hidden = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
    costs = [
        sum((a - b) ** 2 for a, b in zip(prediction[i, j].tolist(), target[i, j].tolist())) / 6
        for i, j in hidden.nonzero().tolist()
    ]
    assert len(costs) == 4
    assert float(completion_loss(prediction, target, hidden)) == pytest.approx(sum(costs) / 4, rel=1e-5)
    assert float(completion_loss(prediction, target, torch.zeros(2, 5, dtype=torch.bool))) == 0


def test_without_normalisation_and_mask_it_is_the_plain_mean_squared_error():
    module, batch, mask = bound(norm_pix=False, hidden_only=False), views(), mask_of()
    loss = module(batch, mask)
    expected = nn.functional.mse_loss(loss.outputs["prediction"], patchify(batch["pixels"], 4))
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)
    normalised, only_hidden = bound(hidden_only=False), bound(norm_pix=False)
    assert not torch.isclose(normalised(batch, mask).total, loss.total)
    assert not torch.isclose(only_hidden(batch, mask).total, loss.total)


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0), (20.5, 0.5125), (40, 1), (400, 0.54129), (800, 0)])
def test_the_official_learning_rate(epoch, rate):
    assert learning_rate(epoch) == pytest.approx(rate, abs=1e-5)
    assert learning_rate(epoch, peak=3e-4) == pytest.approx(3e-4 * rate, abs=1e-8)


# -- the network -------------------------------------------------------------------------------------------------


def test_positions_have_the_column_first():
    table = sincos_positions(8, (2, 3))[0]
    one = torch.tensor([0.8415, 0.0100, 0.5403, 1.0000])
    none = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert torch.allclose(table[1], torch.cat([one, none]), atol=1e-4)
    assert torch.allclose(table[3], torch.cat([none, one]), atol=1e-4)
    assert torch.equal(bound().decoder_input.positions, sincos_positions(16, (4, 4)))


def test_what_is_hidden_in_the_first_view_cannot_be_seen_and_the_second_view_can():
    module, batch, mask = bound().eval(), views(), mask_of()
    before = module(batch, mask).outputs
    covered = mask.upsample((16, 16)).keep[:, None]
    other = torch.where(covered, batch["pixels"], torch.full_like(batch["pixels"], torch.inf))
    after = module({**batch, "pixels": other}, mask).outputs
    assert torch.equal(before["prediction"], after["prediction"])
    assert torch.equal(before["features"], after["features"])
    # One pixel of the second view reaches every patch of its own image, and no other image.
    touched = batch["pixels_other_view"].clone()
    touched[1, 0, 3, 5] += 1
    moved = (
        module({**batch, "pixels_other_view": touched}, mask).outputs["prediction"] != before["prediction"]
    )
    assert moved.any(-1)[1].all()
    assert not moved[[0, 2]].any()


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("norm_memory", [True, False])
def test_the_prediction_is_that_of_the_definition_image_by_image(prefix, norm_memory):
    vit = PlainViT(prefix=prefix)
    module = bound(backbone=vit, norm_memory=norm_memory)
    batch, mask = views(), mask_of(kept=3)
    prediction = module(batch, mask).outputs["prediction"]
    parts = module.decoder_input
    for row in range(3):
        keep = mask.flatten().keep[row].tolist()

        def encoded(pixels, chosen):
            tokens = [
                vit.embedding(pixels[None])[0].flatten(1)[:, i] + vit.position_table[0, i] for i in chosen
            ]
            special = [] if vit.special is None else list(vit.special[0])
            hidden = torch.stack([*special, *tokens])[None]
            for block in vit.blocks:
                hidden = block(hidden)
            return vit.norm(hidden)[0, len(special) :]

        visible = iter(encoded(batch["pixels"][row], [i for i in range(16) if keep[i]]))
        f1 = torch.stack([parts.embed(next(visible)) if seen else parts.mask_token[0, 0] for seen in keep])
        f2 = parts.embed(encoded(batch["pixels_other_view"][row], range(16)))
        f1, f2 = f1 + sincos_positions(16, (4, 4))[0], f2 + sincos_positions(16, (4, 4))[0]
        for block in module.decoder.blocks:
            layer, memory = block.layer, block.norm_memory(f2)
            own = layer.norm1(f1)[None]
            f1 = f1 + layer.self_attn(own, own, own)[0][0]
            f1 = f1 + layer.multihead_attn(layer.norm2(f1)[None], memory[None], memory[None])[0][0]
            f1 = f1 + layer.linear2(nn.functional.gelu(layer.linear1(layer.norm3(f1))))
        expected = module.predict(module.decoder.norm(f1))
        assert torch.allclose(prediction[row], expected, atol=2e-5)


def test_both_views_go_through_one_encoder_and_train_it():
    vit = PlainViT()
    module, batch, mask = bound(backbone=vit), views(), mask_of()
    names = {name.split(".")[0] for name, _ in module.named_parameters()}
    assert names == {"backbone", "decoder_input", "decoder", "predict"}
    first, second = module.encode(batch["pixels"], mask), module.encode(batch["pixels_other_view"])
    assert first.shape == (3, 2, 16)
    assert second.shape == (3, 16, 16)
    # The same picture in both places, whole: one function.
    everything = Mask(torch.ones(3, 4, 4, dtype=torch.bool))
    assert torch.equal(module.encode(batch["pixels"], everything), module.encode(batch["pixels"]))
    for visible, other in ((first.detach(), second), (first, second.detach())):
        module.zero_grad(set_to_none=True)
        completion_loss(module.decode(visible, mask, other), module.target(batch["pixels"])).backward(
            retain_graph=True
        )
        assert all(bool(one.grad.any()) for one in vit.blocks.parameters())


def test_without_values_in_cross_attention_it_is_a_masked_autoencoder_of_one_view():
    module, batch, mask = bound().eval(), views(), mask_of()
    other = {**batch, "pixels_other_view": views(seed=5)["pixels"]}
    assert not torch.equal(*(module(one, mask).outputs["prediction"] for one in (batch, other)))
    with torch.no_grad():
        for block in module.decoder.blocks:
            attention = block.layer.multihead_attn
            attention.in_proj_weight[2 * attention.embed_dim :] = 0
            attention.in_proj_bias[2 * attention.embed_dim :] = 0
            attention.out_proj.bias.zero_()
    one, two = (module(columns, mask).outputs["prediction"] for columns in (batch, other))
    assert torch.equal(one, two)
    # What is left: self-attention and MLP on the tokens of the first view.
    hidden = module.decoder_input(module.encode(batch["pixels"], mask), mask.flatten(), prefix=0)
    for block in module.decoder.blocks:
        layer = block.layer
        own = layer.norm1(hidden)
        hidden = hidden + layer.self_attn(own, own, own)[0]
        hidden = hidden + layer.linear2(nn.functional.gelu(layer.linear1(layer.norm3(hidden))))
    assert torch.allclose(one, module.predict(module.decoder.norm(hidden)), atol=1e-5)


def test_the_reconstruction_shows_visible_patches_as_they_are():
    module, batch, mask = bound().eval(), views(), mask_of()
    loss = module(batch, mask)
    keep = mask.upsample((16, 16)).keep[:, None].expand(-1, 3, -1, -1)
    shown = loss.outputs["reconstruction"]
    assert torch.equal(shown[keep], batch["pixels"][keep])
    assert not torch.isclose(shown[~keep], batch["pixels"][~keep]).all()
    assert "reconstruction" not in module.train()(batch, mask).outputs


# -- what can be learned from the second view ----------------------------------------------------------------------


def learned(second, steps=250):
    """The loss on fresh white noise, after training on it with `second(first, generator)` as the second view."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = PlainViT((2, 2), prefix=0, width=32, depth=1)
        vit.patch_size, vit.embedding = 2, nn.Conv2d(3, 32, 2, stride=2)
        module = CrossViewCompletion(decoder_width=32, decoder_depth=1, decoder_heads=4).bind(vit)
    optimizer = torch.optim.AdamW(module.parameters(), lr=4e-3)
    draws = generator(3)

    def loss(rows):
        first = torch.randn(rows, 3, 4, 4, generator=draws)
        mask = random_mask(Layout(rows, (2, 2)), 1, draws)
        return module({"pixels": first, "pixels_other_view": second(first, draws)}, mask).total

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20, 2 * (1 - step / steps))
        optimizer.zero_grad()
        loss(64).backward()
        optimizer.step()
    with torch.no_grad():
        return float(loss(2000))


def test_copying_is_learned_where_the_second_view_is_the_first():
    assert learned(lambda first, draws: first) < 0.25


def test_nothing_is_learned_where_the_second_view_is_noise():
    # A constant costs 11 / 12 on white noise, patches of 12 numbers normalised: no prediction has a lower expectation.
    noise = learned(lambda first, draws: torch.randn(first.shape, generator=draws))
    assert 0.9 < noise < 1.1


# -- in company --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "parameters"),
    [("random", {"ratio": 0.9}), ("simmim-blocks", {"ratio": 0.5}), ("block", {"hidden": 11, "exact": True})],
)
def test_it_takes_masks_of_other_strategies_on_a_model_of_transformers(strategy, parameters):
    vit = vision_transformer(image_size=16, patch_size=4, width=16, depth=1, heads=2)
    model = MaskedTraining(
        vit, maskwright.create("mask-strategy", strategy, **parameters), CrossViewCompletion(**SMALL)
    )
    out = model(**views())
    out["loss"].backward()
    assert out["loss"].isfinite()
    assert vit.embeddings.patch_embeddings.projection.weight.grad.any()


def test_what_does_not_fit_is_refused_with_the_reason():
    with pytest.raises(BadParameter, match="decoder_heads=3 must divide decoder_width=16"):
        CrossViewCompletion(decoder_width=16, decoder_heads=3)
    module, batch = bound(), views()
    unequal = Mask(torch.arange(16).view(4, 4) < torch.tensor([2, 3, 4]).view(3, 1, 1))
    with pytest.raises(UnequalMaskCounts, match=r"croco drops hidden patches.* between 2 and 4"):
        module(batch, unequal)
    with pytest.raises(MaskShapeError, match=r"`pixels` is \[3, .* `pixels_other_view` \[2, .* same shape"):
        module({**batch, "pixels_other_view": batch["pixels_other_view"][:2]}, mask_of())
    model = MaskedTraining(PlainViT(), default_strategy(), CrossViewCompletion(**SMALL))
    with pytest.raises(MissingColumn, match="'croco' needs the batch column 'pixels_other_view'"):
        model(pixels=batch["pixels"])


# -- the claim's data ----------------------------------------------------------------------------------------------


def test_the_claims_views_are_crops_of_one_field_some_pixels_apart():
    fields = claim.fields(4, generator())
    assert torch.allclose(fields.std((2, 3)), torch.ones(4, 3), atol=1e-5)
    assert torch.allclose(fields.mean((2, 3)), torch.zeros(4, 3), atol=1e-5)
    shifts = torch.tensor([[0, 0], [3, -2], [-3, 3], [1, 0]])
    first, second = claim.two_crops(fields, shifts)
    for index, (down, right) in enumerate(shifts.tolist()):
        assert torch.equal(first[index], fields[index, :, 16:48, 16:48])
        assert torch.equal(second[index], fields[index, :, 16 + down : 48 + down, 16 + right : 48 + right])


def test_the_claims_fields_have_amplitudes_of_one_over_frequency():
    power = torch.fft.rfft2(claim.fields(200, generator())).abs().square().mean((0, 1))
    # Along the first column, octave by octave: a quarter of the power at twice the frequency.
    for low in (2, 4, 8):
        assert float(power[2 * low, 0] / power[low, 0]) == pytest.approx(0.25, rel=0.25)
