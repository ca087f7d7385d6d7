"""MAE: its loss by hand, its passes against the shuffled ones of the paper, its sizes, and its company."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import maskwright
from maskwright import Layout, Mask, MaskedTraining
from maskwright.backbones.defaults import vision_transformer
from maskwright.errors import BackboneMismatch, BadParameter, CountsMismatch, MissingSignal, UnequalMaskCounts
from maskwright.plugins.baselines.objective import MaskedAutoencoder, hidden_error
from maskwright.registry import check_fit
from maskwright.testing import conformance
from maskwright.testing.backbones import PlainViT, seeded
from maskwright.toolkit.images import normalize_patches, patchify

SMALL = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}
GRID, PATCH, VALUES = (4, 4), 4, 48


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{word}-{name}")
        for word, component in {
            "normalised": MaskedAutoencoder,
            "raw": MaskedAutoencoder(norm_pix=False, **SMALL),
        }.items()
        for name, check in conformance(component)
    ],
)
def test_conforms(check):
    check()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bound(backbone=None, **settings):
    with seeded(0):
        return MaskedAutoencoder(**{**SMALL, **settings}).bind(backbone or PlainViT(GRID))


def images(batch=3, seed=1):
    return torch.randn(batch, 3, 16, 16, generator=generator(seed))


def random_mask(ratio=0.75, batch=3, seed=2, grid=GRID):
    return maskwright.create("mask-strategy", "random", ratio=ratio).draw(
        Layout(batch, grid, patch_size=PATCH), signals={}, progress=0.0, generator=generator(seed)
    )


# -- the loss ------------------------------------------------------------------------------------------------------


def test_the_error_is_that_of_hidden_patches_only():
    """Two images of two patches of two values. Squared errors per patch: 1, 10 | 4, 9; the second and third are hidden."""
    target = torch.zeros(2, 2, 2)
    prediction = torch.tensor([[[1.0, -1.0], [4.0, 2.0]], [[2.0, 2.0], [3.0, -3.0]]])
    hidden = torch.tensor([[False, True], [True, False]])
    assert float(hidden_error(prediction, target, hidden)) == (10 + 4) / 2
    assert float(hidden_error(prediction, target, torch.ones_like(hidden))) == (1 + 10 + 4 + 9) / 4


def test_the_mean_is_over_the_patches_of_the_batch():
    """With unequal counts the images do not weigh the same: one hidden patch of error 1, three of error 5."""
    prediction = torch.tensor([1.0, 5.0]).sqrt().view(2, 1, 1).expand(2, 4, 1)
    hidden = torch.tensor([[True, False, False, False], [True, True, True, False]])
    assert float(hidden_error(prediction, torch.zeros(2, 4, 1), hidden)) == pytest.approx((1 + 3 * 5) / 4)


def test_nothing_hidden_is_no_error():
    assert (
        float(hidden_error(torch.ones(1, 4, 3), torch.zeros(1, 4, 3), torch.zeros(1, 4, dtype=torch.bool)))
        == 0
    )


def test_the_gradient_comes_from_hidden_patches_only():
    """∂L/∂x̂ = 2 (x̂ - x) / (values · hidden patches) where hidden, exactly 0 elsewhere."""
    prediction, target = torch.randn(2, 3, 5, 4, generator=generator()).unbind(0)
    prediction.requires_grad_(True)
    hidden = random_mask(0.5, 3, grid=(5,)).as_removed()
    hidden_error(prediction, target, hidden).backward()
    expected = 2 * (prediction - target).detach() / (4 * int(hidden.sum())) * hidden[..., None]
    torch.testing.assert_close(prediction.grad, expected)
    assert not prediction.grad[~hidden].any()


def test_targets_are_normalised_patch_by_patch():
    """Mean 0 and unbiased variance 1 in each patch, with the paper's 1e-6; without `norm_pix` the pixels as they are."""
    pixels = images() * 7 + 3
    patches = patchify(pixels, PATCH)
    expected = (patches - patches.mean(-1, keepdim=True)) / (patches.std(-1, keepdim=True) ** 2 + 1e-6).sqrt()
    torch.testing.assert_close(bound().target(pixels), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(bound(norm_pix=False).target(pixels), patches)


def test_a_flat_patch_has_a_target_of_zero():
    assert torch.equal(bound().target(torch.full((1, 3, 16, 16), 5.0)), torch.zeros(1, 16, VALUES))


# -- the two passes ------------------------------------------------------------------------------------------------


def shuffled_prediction(mae, pixels, mask, order):
    """The paper's way: visible patches in a random order, mask tokens appended, everything put back."""
    backbone = mae.backbone
    tokens = backbone.patches(pixels) + backbone.positions
    predictions = []
    for row in range(len(tokens)):
        keep = mask.flatten().keep[row]
        shuffled = sorted(keep.nonzero()[:, 0].tolist(), key=lambda place: float(order[row, place]))
        hidden = (~keep).nonzero()[:, 0].tolist()
        visible = tokens[row : row + 1, shuffled]
        encoded = mae.decoder_input.embed(backbone.encode(torch.cat([backbone.prefix(1), visible], dim=1)))
        special, seen = encoded[:, :1], encoded[:, 1:]
        appended = torch.cat([seen, mae.decoder_input.mask_token.expand(1, len(hidden), -1)], dim=1)
        back = torch.tensor([*shuffled, *hidden]).argsort()
        full = torch.cat([special, appended[:, back] + mae.decoder_input.positions], dim=1)
        predictions.append(mae.predict(mae.decoder(full)[:, 1:]))
    return torch.cat(predictions)


def test_the_prediction_is_that_of_the_shuffled_passes():
    mae, pixels, mask = bound(), images(), random_mask()
    expected = shuffled_prediction(mae, pixels, mask, torch.rand(3, 16, generator=generator(5)))
    outputs = mae({"pixels": pixels}, mask).outputs
    torch.testing.assert_close(outputs["prediction"], expected, rtol=1e-4, atol=1e-5)


def test_the_encoder_sees_the_prefix_and_the_visible_patches_only():
    """It is given P + K tokens, and a hidden pixel changes none of them, bit for bit; a visible one does."""
    given = []

    class Watched(PlainViT):
        def encode(self, tokens, levels=()):
            given.append(tokens.detach())
            return super().encode(tokens, levels)

    with seeded(0):
        mae = bound(Watched(GRID))
    pixels, mask = images(), random_mask()
    keep = mask.upsample((16, 16)).keep[:, None]
    for changed in (pixels, torch.where(keep, pixels, 9.0), torch.where(keep, 9.0, pixels)):
        mae({"pixels": changed}, mask)
    assert given[0].shape == (3, 1 + 4, 16)
    assert torch.equal(given[0], given[1])
    assert not torch.equal(given[0], given[2])


def test_the_encoder_pays_for_what_it_sees():
    """Floating point operations of the encoder blocks: those of K + 1 tokens, not of N + 1."""

    def flops(function):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function()
        return counter.get_total_flops()

    backbone = PlainViT((8, 8), width=32)
    mae, pixels = bound(backbone), torch.randn(2, 3, 32, 32, generator=generator())
    mask = random_mask(0.75, 2, grid=(8, 8))
    patches = flops(lambda: backbone.patches(pixels))
    encoder = flops(lambda: mae.encode(pixels, mask)) - patches
    assert encoder == flops(lambda: backbone.encode(torch.zeros(2, 1 + 16, 32)))
    assert encoder < 0.3 * flops(lambda: backbone.encode(torch.zeros(2, 1 + 64, 32)))


def test_the_decoder_has_the_papers_default_size():
    """512 wide, 8 blocks, 16 heads: counted by hand for a ViT-B/16 at 224 pixels."""
    assert attributes(MaskedAutoencoder()) == (True, 512, 8, 16)
    with torch.device("meta"):
        backbone = PlainViT((14, 14), width=768, depth=1)
        backbone.patch_size = 16
        mae = MaskedAutoencoder().bind(backbone)
    w = 512
    block = (3 * w * w + 3 * w) + (w * w + w) + (4 * w * w + 4 * w) + (4 * w * w + w) + 4 * w
    expected = (768 * w + w) + w + 8 * block + 2 * w + (w * 768 + 768)
    inside = sum(parameter.numel() for parameter in backbone.parameters())
    assert sum(parameter.numel() for parameter in mae.parameters()) - inside == expected == 26_008_320


def attributes(mae):
    return mae.norm_pix, mae.decoder_width, mae.decoder_depth, mae.decoder_heads


def test_weights_start_as_in_the_paper():
    """Linear layers uniform within ±√(6 / (in + out)) with zero biases, the mask token normal with 0.02."""
    mae = bound(PlainViT(GRID, width=64), decoder_width=64, decoder_heads=4)
    linear = [
        mae.predict,
        mae.decoder_input.embed,
        *(m for m in mae.decoder.modules() if type(m) is nn.Linear),
    ]
    for weight, bias in [
        *((one.weight, one.bias) for one in linear),
        *(
            (one.in_proj_weight, one.in_proj_bias)
            for one in mae.decoder.modules()
            if isinstance(one, nn.MultiheadAttention)
        ),
    ]:
        bound_of = (6 / sum(weight.shape)) ** 0.5
        assert 0.95 * bound_of < float(weight.detach().abs().max()) <= bound_of
        assert float(weight.detach().std()) == pytest.approx(bound_of / 3**0.5, rel=0.05)
        assert not bias.any()
    assert float(mae.decoder_input.mask_token.detach().std()) == pytest.approx(0.02, rel=0.3)


def test_mask_tokens_differ_by_their_place_only():
    """Before the decoder: the same token plus fixed sine-cosine positions, which are no parameters."""
    mae, mask = bound(), random_mask()
    encoded = mae.encode(images(), mask)
    full = mae.decoder_input(encoded, mask, 1)[:, 1:] - mae.decoder_input.positions
    hidden = full[mask.flatten().as_removed()]
    torch.testing.assert_close(hidden, mae.decoder_input.mask_token[0].expand_as(hidden))
    assert "decoder_input.positions" not in dict(mae.named_parameters())


# -- what it shows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_prediction_reconstructs_the_image(norm_pix):
    mae, pixels, mask = bound(norm_pix=norm_pix).eval(), images(), random_mask()
    patches = patchify(pixels, PATCH)
    mae.decode = lambda *_: normalize_patches(patches) if norm_pix else patches
    shown = mae({"pixels": pixels}, mask).outputs["reconstruction"]
    torch.testing.assert_close(shown, pixels, rtol=1e-4, atol=1e-4)


def test_the_reconstruction_keeps_visible_pixels_and_replaces_hidden_ones():
    pixels, mask = images(), random_mask()
    mae = bound()
    assert "reconstruction" not in mae({"pixels": pixels}, mask).outputs
    shown = mae.eval()({"pixels": pixels}, mask).outputs["reconstruction"]
    keep = mask.upsample((16, 16)).keep[:, None].expand_as(pixels)
    assert torch.equal(shown[keep], pixels[keep])
    assert (shown[~keep] != pixels[~keep]).float().mean() > 0.99
    assert not shown.requires_grad


def test_a_normalised_prediction_of_zero_shows_each_patchs_mean():
    mae, pixels, mask = bound().eval(), images(), random_mask()
    mae.decode = lambda *_: torch.zeros(3, 16, VALUES)
    shown = mae({"pixels": pixels}, mask).outputs["reconstruction"]
    hidden = mask.flatten().as_removed()
    means = patchify(pixels, PATCH).mean(-1, keepdim=True).expand(-1, -1, VALUES)
    torch.testing.assert_close(patchify(shown, PATCH)[hidden], means[hidden])


# -- what it refuses -----------------------------------------------------------------------------------------------


def test_unequal_counts_are_refused_with_a_way_out():
    keep = torch.ones(2, 4, 4, dtype=torch.bool)
    keep[0, 0] = False
    with pytest.raises(UnequalMaskCounts, match=r"same number of them.*Or use the objective 'simmim'"):
        bound()({"pixels": images(2)}, Mask(keep))


def test_heads_must_divide_the_width():
    with pytest.raises(BadParameter, match="decoder_heads=3 must divide decoder_width=512"):
        MaskedAutoencoder(decoder_heads=3)


def test_a_module_without_patches_is_refused():
    with pytest.raises(BackboneMismatch, match=r"Linear is no PatchBackbone: it lacks patches\(pixels"):
        MaskedAutoencoder(**SMALL).bind(nn.Linear(2, 2))


# -- in company ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["random", "simmim-blocks", "colormae", "hard-patches", "block"])
def test_it_trains_under_masks_of_other_papers(strategy):
    """On a transformers ViT of 8 × 8 patches; a strategy that needs a signal is refused before the first step."""
    made = maskwright.create("mask-strategy", strategy, **({"exact": True} if strategy == "block" else {}))
    objective = MaskedAutoencoder(**SMALL)
    vit = vision_transformer(width=16, depth=1, heads=2)
    if made.needs:
        with pytest.raises(MissingSignal, match=f"'{strategy}' needs the signal"):
            check_fit(made, objective)
        return
    with seeded(0):
        model = MaskedTraining(vit, made, objective, seed=0)
    pixels = torch.randn(4, 3, 32, 32, generator=generator())
    loss = model(pixels=pixels)["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(one.grad is not None for one in vit.layernorm.parameters())


def test_a_strategy_of_unequal_counts_is_refused_before_the_first_step():
    with pytest.raises(CountsMismatch, match=r"'block' .* 'mae' needs; give 'block' exact=True"):
        MaskedTraining(
            vision_transformer(width=16, depth=1, heads=2),
            maskwright.create("mask-strategy", "block"),
            MaskedAutoencoder(**SMALL),
        )
    with pytest.raises(CountsMismatch, match=r"'uniform-count' .* use one that does: .*'random'"):
        check_fit(maskwright.create("mask-strategy", "uniform-count"), MaskedAutoencoder(**SMALL))


def test_it_learns_what_a_neighbour_tells():
    """Stripes: a hidden patch is what is beside it. From about 1 (normalised pixels) down to less than half."""
    phase = torch.rand(16, 1, 1, 1, generator=generator()) * 6.3
    pixels = (
        torch.sin(torch.arange(16.0)[None, None, :, None] * 1.3 + phase).expand(16, 3, 16, 16).contiguous()
    )
    mae = bound()
    optimizer = torch.optim.AdamW(mae.parameters(), lr=5e-3)
    losses = []
    for step in range(80):
        total = mae({"pixels": pixels}, random_mask(0.5, 16, seed=step)).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert 0.8 < losses[0] < 3
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
