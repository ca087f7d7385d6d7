"""ColorMAE: the filters, the windows, the ranking, and that masks depend on the generator alone."""

import math

import numpy as np
import pytest
import torch

import maskwright
from maskwright import Layout
from maskwright.backbones.defaults import vision_transformer
from maskwright.errors import BadParameter, UnsupportedLayout
from maskwright.plugins.colormae.claim import (
    CLAIM,
    ORDER,
    decide,
    masks_of,
    radial_power,
    seconds_by_turns,
    visible_neighbours,
)
from maskwright.plugins.colormae.masks import (
    COLORS,
    MEASURED,
    ColorMae,
    blur_response,
    color_noise,
    color_response,
    fields_of,
    keep_highest,
    windows,
)
from maskwright.testing import conformance

HAND = torch.tensor([[[3, 1, 4, 1.5], [9, 2, 6, 5], [3.5, 8, 7, 9.5], [0, -1, -2, 2.5]]], dtype=torch.float64)
GRID = (14, 14)


@pytest.mark.parametrize("check", [check for _, check in conformance(ColorMae)], ids=lambda check: check.name)
def test_conforms(check):
    check()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(strategy, batch=4, grid=GRID, *, seed=0, progress=0.0):
    return strategy.draw(Layout(batch, grid), signals={}, progress=progress, generator=generator(seed)).keep


def small(color="green", **settings):
    return ColorMae(color=color, **{"fields": 3, "field_side": 16, **settings})


def fields(strategy, grid, color=None):
    color = color or strategy.color
    size = (strategy.fields, strategy.field_side, strategy.field_seed)
    return fields_of(color, strategy.filter(color), size, grid, torch.device("cpu"))


# -- counts and ranking (exact checks 1 to 3) --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "ratio", "kept"), [(14, 0.75, 49), (10, 0.9, 9), (10, 0.8, 19), (12, 0.6, 57), (8, 0.9, 6)]
)
@pytest.mark.parametrize("color", COLORS)
def test_every_image_keeps_the_truncated_number(color, side, ratio, kept):
    keep = draw(small(color, ratio=ratio), 64, (side, side))
    assert keep.sum((1, 2)).tolist() == [kept] * 64


def test_the_highest_values_stay():
    keep = keep_highest(HAND, 0.75).flatten()
    kept = keep.nonzero().flatten()
    by_value = kept[HAND.flatten()[kept].argsort(descending=True)]
    assert by_value.tolist() == [11, 4, 9, 10]


def test_ranking_ignores_shift_and_scale_and_turns_with_the_sign():
    noise = torch.randn(5, 6, 6, generator=generator(), dtype=torch.float64)
    keep = keep_highest(noise, 0.75)
    for same in (noise + 100, noise - 100, 7 * noise, 0.01 * noise):
        assert torch.equal(keep_highest(same, 0.75), keep)
    lowest = noise.flatten(1).argsort(1)[:, :9]
    negated = keep_highest(-noise, 0.75).flatten(1)
    assert negated.gather(1, lowest).all()
    assert not (negated & keep.flatten(1)).any()


def test_a_window_of_negative_values_is_ranked_the_right_way_round():
    """Divided by its maximum, as officially, it would be turned upside down."""
    noise = HAND - 10
    assert noise.max() < 0
    assert torch.equal(keep_highest(noise, 0.75), keep_highest(HAND, 0.75))
    assert not torch.equal(keep_highest(noise / noise.max(), 0.75), keep_highest(HAND, 0.75))


def test_constant_windows_keep_the_exact_number_too():
    assert keep_highest(torch.zeros(2, 4, 4), 0.75).flatten(1).sum(1).tolist() == [4, 4]


# -- what the masks look like (exact checks 4 to 6, 8) ----------------------------------------------------------------


@pytest.fixture(scope="module")
def masks():
    return {color: masks_of(color, 0, 4000, passes=7.0) for color in COLORS}


def test_white_is_uniform_random_masking(masks):
    keep = masks["white"]
    assert visible_neighbours(keep) == pytest.approx(2 * 364 * 48 / (196 * 195), abs=0.03)
    often = keep.double().mean(0)
    assert (often - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 4000)


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        (7.0, {"red": 3.15, "green": 2.04, "purple": 0.21, "blue": 0.12}),
        (1.0, {"red": 2.79, "green": 1.48, "purple": 0.59, "blue": 0.53}),
    ],
)
def test_visible_neighbours_by_colour(masks, passes, expected):
    found = {
        color: visible_neighbours(masks[color] if passes == 7 else masks_of(color, 0, 3000, passes=passes))
        for color in expected
    }
    assert found == pytest.approx(expected, abs=0.04)


def test_visible_neighbours_of_a_hand_case():
    keep = torch.tensor([[[True, True, False], [False, True, False]]])
    assert visible_neighbours(keep) == pytest.approx((1 + 2 + 1) / 3)


@pytest.mark.parametrize(
    ("color", "power", "radius"),
    [
        ("red", [21.6, 3.9, 0.65, 0.25, 0.17, 0.12], 0.152),
        ("green", [1.2, 2.7, 2.3, 0.67, 0.44, 0.33], 0.277),
        ("blue", [0.80, 0.71, 0.58, 0.52, 0.77, 2.0], 0.460),
        ("purple", [3.5, 1.0, 0.55, 0.40, 0.50, 2.1], 0.448),
    ],
)
def test_radial_power_by_colour(masks, color, power, radius):
    white, white_radius = radial_power(masks["white"])
    assert white_radius == pytest.approx(0.386, abs=0.004)
    found, mean_radius = radial_power(masks[color])
    assert mean_radius == pytest.approx(radius, abs=0.008)
    assert (found / white).tolist() == pytest.approx(power, rel=0.12, abs=0.03)


def test_mirrored_positions_are_visible_equally_often(masks):
    for color in ("red", "green", "purple"):
        often = masks[color].double().mean(0)
        deviation = 5 * math.sqrt(2 * 0.25 * 0.75 / 4000)
        assert (often - often.flip(0)).abs().max() < deviation
        assert (often - often.flip(1)).abs().max() < deviation


# -- the filters (exact check 7) ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigmas", "peak"), [((0.5, 2), 0.1935), ((0.8, 1.6), 0.1913), ((1, 2), 0.153)])
def test_the_difference_of_gaussians_peaks_where_the_formula_says(sigmas, peak):
    one, two = sigmas
    assert math.sqrt(math.log(two**2 / one**2) / (2 * math.pi**2 * (two**2 - one**2))) == pytest.approx(
        peak, abs=1e-4
    )
    frequency = torch.linspace(0, 0.7, 7001, dtype=torch.float64)
    response = color_response("green", frequency**2, one, two)
    assert frequency[response.argmax()].item() == pytest.approx(peak, abs=2e-4)


def test_green_and_purple_add_up_to_white_field_by_field():
    white = torch.randn(3, 32, 32, generator=generator(), dtype=torch.float64)
    green, purple = (color_noise(white, color, 0.55, 2.0, 1.0) for color in ("green", "purple"))
    torch.testing.assert_close(green + purple, white)
    red, blue = (color_noise(white, color, 0.64, math.inf, 1.0) for color in ("red", "blue"))
    torch.testing.assert_close(red + blue, white)


def test_filters_are_circular_convolutions_with_gaussians():
    """Against scipy's Gaussian blur with periodic borders, which truncates its kernel far out."""
    from scipy.ndimage import gaussian_filter

    white = torch.randn(2, 48, 48, generator=generator(), dtype=torch.float64)
    blurred = {
        sigma: torch.from_numpy(
            np.stack([gaussian_filter(one, sigma, mode="wrap", truncate=8) for one in white.numpy()])
        )
        for sigma in (1.2, 2.5)
    }
    expected = {
        "red": blurred[1.2],
        "blue": white - blurred[1.2],
        "green": blurred[1.2] - blurred[2.5],
        "purple": white - (blurred[1.2] - blurred[2.5]),
        "white": white,
    }
    for color, noise in expected.items():
        torch.testing.assert_close(color_noise(white, color, 1.2, 2.5, 1.0), noise, rtol=0, atol=2e-3)


def test_passes_apply_the_filter_again():
    white = torch.randn(2, 32, 32, generator=generator(), dtype=torch.float64)
    once = color_noise(white, "green", 0.55, 2.0, 1.0)
    twice, together = color_noise(once, "green", 0.55, 2.0, 1.0), color_noise(white, "green", 0.55, 2.0, 2.0)
    torch.testing.assert_close(twice / twice.std(), together / together.std())


def test_an_infinite_blur_lets_nothing_through():
    assert blur_response(torch.tensor([0.0, 0.1]), math.inf).tolist() == [0, 0]
    assert blur_response(torch.tensor([0.0, 0.1]), 0.0).tolist() == [1, 1]


# -- fields and windows --------------------------------------------------------------------------------------------


def naive_windows(base, grid, places):
    """One image after the other: orientation, field, corner; then row by row, around the border."""
    count, side, _ = base.shape
    found = []
    for place in places:
        oriented, corner = divmod(place, side * side)
        flip, field = divmod(oriented, count)
        picture = base[field].numpy()
        picture = {0: picture, 1: picture[::-1], 2: picture[:, ::-1], 3: picture[::-1, ::-1]}[flip]
        top, left = divmod(corner, side)
        found.append(
            [[picture[(top + i) % side, (left + j) % side] for j in range(grid[1])] for i in range(grid[0])]
        )
    return torch.tensor(np.array(found))


def test_windows_are_the_naive_ones():
    strategy, grid = small(), (5, 7)
    made = fields(strategy, grid)
    places = torch.randint(4 * 3 * 16 * 16, (40,), generator=generator(3)).tolist()
    assert len({place // (3 * 256) for place in places}) == 4
    base = fields(strategy, (1, 1))[:3]
    assert torch.equal(windows(made, grid, 40, generator(3)), naive_windows(base, grid, places))


def test_fields_have_variance_1_and_no_mean_and_share_their_white_noise():
    made = {color: fields(small(color, passes=1.0, sigma1=0.6, sigma2=2.0), (1, 1))[:3] for color in COLORS}
    for field in made.values():
        assert field.mean().abs() < 1e-5
        assert field.std().item() == pytest.approx(1, abs=1e-5)
    mix = torch.stack([made["green"].flatten(), made["purple"].flatten()], 1)
    solution = torch.linalg.lstsq(mix, made["white"].flatten()[:, None])
    torch.testing.assert_close(
        (mix @ solution.solution).flatten(), made["white"].flatten(), atol=1e-4, rtol=1e-4
    )


def test_the_same_generator_gives_the_same_mask_with_fields_made_or_kept():
    fields_of.cache_clear()
    cold = draw(ColorMae(), 8, seed=5)
    made = fields_of.cache_info()
    warm = draw(ColorMae(), 8, seed=5)
    kept = fields_of.cache_info()
    assert torch.equal(cold, warm)
    assert (made.misses, kept.misses, kept.hits) == (1, 1, 1)
    draw(ColorMae(color="red"), 8, seed=6)
    assert torch.equal(draw(ColorMae(), 8, seed=5), cold)


def test_another_field_seed_gives_other_masks():
    assert not torch.equal(draw(small(), 8), draw(small(field_seed=1), 8))


def test_images_of_a_batch_have_their_own_windows():
    keep = draw(ColorMae(), 256).flatten(1)
    assert len(keep.unique(dim=0)) == 256


def test_fields_grow_with_the_grid():
    fields_of.cache_clear()
    strategy = ColorMae(fields=2)
    assert draw(strategy, 3, (4, 24)).flatten(1).sum(1).tolist() == [24] * 3
    kept = fields_of("green", strategy.filter("green"), (2, 96, 0), (4, 24), torch.device("cpu"))
    assert fields_of.cache_info().misses == 1
    assert kept.shape == (4 * 2, 96 + 4 - 1, 96 + 24 - 1)


def test_more_images_than_fields_still_differ():
    assert len(draw(small(fields=1, field_side=64), 128).flatten(1).unique(dim=0)) > 120


@pytest.mark.parametrize("grid", [(6, 10), (1, 12), (16, 3)])
def test_wide_grids_have_windows_of_their_shape(grid):
    keep = draw(small(ratio=0.5), 5, grid)
    assert keep.shape == (5, *grid)
    assert keep.flatten(1).sum(1).tolist() == [math.prod(grid) // 2] * 5


# -- the schedule ----------------------------------------------------------------------------------------------------


def test_the_colour_follows_the_schedule():
    strategy = ColorMae(schedule=((0.5, "blue"), (0.9, "red")))
    assert [strategy.color_at(p) for p in (0, 0.49, 0.5, 0.89, 0.9, 1)] == [
        *("green", "green", "blue", "blue", "red", "red")
    ]
    for progress, color in ((0.2, "green"), (0.7, "blue"), (1.0, "red")):
        assert torch.equal(draw(strategy, progress=progress), draw(ColorMae(color=color)))


def test_a_schedule_may_come_from_a_run_file():
    strategy = maskwright.create("mask-strategy", "colormae", schedule=[[0.5, "purple"]])
    assert strategy.color_at(0.6) == "purple"


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"color": "pink"}, "one of green, red"),
        ({"ratio": 1.0}, r"\[0, 1\)"),
        ({"sigma1": 2.5}, "below sigma2"),
        ({"color": "red", "schedule": ((0.5, "purple"),), "sigma1": 1.8}, "below sigma2"),
        ({"schedule": ((0.5, "pink"),)}, "rising progress"),
        ({"schedule": ((0.5, "red"), (0.4, "blue"))}, "rising progress"),
        ({"schedule": ((1.5, "red"),)}, "rising progress"),
        ({"schedule": (("red", 0.5),)}, "rising progress"),
        ({"schedule": "red"}, "rising progress"),
        ({"passes": 0}, "> 0"),
        ({"fields": 0}, ">= 1"),
    ],
)
def test_wrong_parameters_are_refused(wrong, words):
    with pytest.raises(BadParameter, match=words):
        ColorMae(**wrong)


@pytest.mark.parametrize(
    ("grid", "settings", "words"),
    [
        ((196,), {}, "rows × columns"),
        ((8, 14, 14), {}, "rows × columns"),
        ((17, 4), {"field_side": 16}, "field_side=16 must be at least 17"),
        ((3, 3), {"ratio": 0.95}, "nothing visible of 9"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(grid, settings, words):
    with pytest.raises(UnsupportedLayout, match=words):
        draw(ColorMae(**settings), 2, grid)


@pytest.mark.parametrize("settings", [{"color": "red", "sigma1": 90.0}, {"color": "blue", "sigma1": 1e-12}])
def test_a_filter_that_leaves_nothing_is_refused(settings):
    with pytest.raises(BadParameter, match="leaves nothing"):
        draw(small(**settings))


def test_many_passes_do_not_vanish():
    assert draw(small(passes=500.0), 6).flatten(1).sum(1).tolist() == [49] * 6


# -- company -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [("mae", {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}), ("simmim", {})],
    ids=str,
)
def test_its_masks_train_objectives_that_know_nothing_of_it(objective):
    name, settings = objective
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = vision_transformer(image_size=16, patch_size=2, channels=1, width=16, depth=1, heads=2)
        bound = maskwright.create("objective", name, **settings).bind(vit)
    optimizer, random, strategy = torch.optim.AdamW(bound.parameters(), lr=3e-3), generator(), ColorMae()
    batch = {"pixels": torch.nn.functional.interpolate(torch.rand(8, 1, 2, 2, generator=generator(4)), 16)}
    batch["pixels"] = batch["pixels"] + 0.1 * torch.randn(8, 1, 16, 16, generator=generator(5))
    losses = []
    for _ in range(40):
        mask = strategy.draw(Layout.of(bound.backbone, batch), signals={}, progress=0.0, generator=random)
        loss = bound(batch, mask).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


# -- the claim -----------------------------------------------------------------------------------------------------------


def test_the_criterion_can_fail():
    radius = dict(zip(ORDER, (0.15, 0.28, 0.39, 0.45, 0.46)))
    good = {f"{color}: mean radius (cycles a patch)": value for color, value in radius.items()}
    good |= {"green: power in 0.1-0.2": 2.7, "green: power in 0.2-0.3": 2.3, "green: power in 0.4-0.5": 0.44}
    good |= {
        "green: power above 0.5": 0.33,
        "red: power in 0-0.1": 21.6,
        "time to draw, relative to random": 0.9,
    }
    assert decide([good, good])
    for name, bad in (
        ("blue: mean radius (cycles a patch)", 0.44),
        ("green: power in 0.2-0.3", 1.9),
        ("green: power above 0.5", 0.61),
        ("red: power in 0-0.1", 9.0),
        ("time to draw, relative to random", 1.4),
    ):
        assert not decide([good, {**good, name: bad}])
    assert len(CLAIM.seeds) >= 3
    assert set(ORDER) == set(COLORS) == set(MEASURED)


def test_medians_are_taken_by_turns():
    calls = []
    first, second = seconds_by_turns(lambda: calls.append("a"), lambda: calls.append("b"), rounds=3)
    assert calls == ["a", "b"] * 3
    assert first >= 0
    assert second >= 0
