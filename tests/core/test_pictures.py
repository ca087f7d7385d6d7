"""Pictures: what is hidden is covered, what is kept is shown, and every chart is drawn for light and dark pages."""

import importlib.util
import io
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.errors import MaskShapeError
from maskwright.jobs import pictures
from maskwright.mask import AttentionMask, Mask

KEEP = torch.tensor([[True, False], [False, False]])


def pixel(image, x, y):
    return image.getpixel((x, y))


def opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


# -- images ------------------------------------------------------------------------------------------------------------


def test_a_picture_is_rgb_and_clipped():
    values = torch.tensor(
        [[[0.0, 1.0], [2.0, -1.0]], [[0.5, 0.5], [0.5, 0.5]], [[math.nan, 0.2], [0.4, 1.0]]]
    )
    image = pictures.picture(values)
    assert image.mode == "RGB"
    assert pixel(image, 0, 0) == (0, 128, 0)
    assert pixel(image, 0, 1) == (255, 128, 102)
    assert pixel(image, 1, 1) == (0, 128, 255)


@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7)])
def test_grey_pictures_become_rgb(shape):
    image = pictures.picture(torch.full(shape, 0.2))
    assert image.size == (7, 5)
    assert pixel(image, 3, 3) == (51, 51, 51)


@pytest.mark.parametrize("shape", [(2, 5, 7), (4,), (1, 3, 5, 7)])
def test_other_shapes_are_no_pictures(shape):
    with pytest.raises(MaskShapeError, match=r"\[C, H, W\] with 1 or 3"):
        pictures.picture(torch.zeros(shape))


@pytest.mark.parametrize("mask", [KEEP, Mask(KEEP[None])], ids=["tensor", "Mask"])
def test_overlay_shows_what_is_visible_and_covers_the_rest(mask):
    photo = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    image = np.asarray(pictures.overlay(photo, mask)).astype(int)
    cover = [round(255 * value) for value in pictures.HIDDEN]
    assert (image[:4, :4] == np.asarray(pictures.picture(photo))[:4, :4]).all()
    assert (image[4:] == cover).all()
    assert (image[:, 4:] == cover).all()


def test_a_veil_lets_the_hidden_part_shine_through():
    photo = torch.zeros(1, 4, 4)
    image = pictures.overlay(photo, KEEP, hidden_colour=(1.0, 1.0, 0.0), veil=0.5)
    assert pixel(image, 0, 0) == (0, 0, 0)
    assert pixel(image, 3, 3) == (128, 128, 0)
    assert pixel(pictures.overlay(photo[0], KEEP, veil=0.0), 3, 3) == (0, 0, 0)


def test_overlay_refuses_masks_that_do_not_fit():
    with pytest.raises(MaskShapeError, match="multiples"):
        pictures.overlay(torch.zeros(3, 9, 8), KEEP)
    with pytest.raises(MaskShapeError, match="one mask"):
        pictures.overlay(torch.zeros(3, 8, 8), torch.ones(2, 2, 2, dtype=torch.bool))


# -- masks ---------------------------------------------------------------------------------------------------------------


def test_a_mask_image_has_a_square_for_each_position():
    image = pictures.mask_image(KEEP, cell=8)
    assert image.size == (16, 16)
    assert pixel(image, 4, 4) == (*pictures.KEPT_CELL, 255)
    assert pixel(image, 12, 4) == (*pictures.HIDDEN_CELL, 255)
    assert pixel(image, 0, 4)[3] == 0, "a transparent line lies between the squares"


def test_small_cells_have_no_lines_between_them():
    image = pictures.mask_image(KEEP, cell=2)
    assert {pixel(image, x, y)[3] for x in range(4) for y in range(4)} == {255}


def test_a_sequence_is_a_line_and_a_video_a_row_of_frames():
    assert pictures.mask_image(torch.tensor([True, False, True]), cell=8).size == (24, 8)
    video = torch.stack([KEEP, ~KEEP, KEEP])
    image = pictures.mask_image(Mask(video[None]), cell=8)
    assert image.size == (3 * 16 + 2 * 8, 16)
    assert pixel(image, 4, 4) == (*pictures.KEPT_CELL, 255)
    assert pixel(image, 24 + 4, 4) == (*pictures.HIDDEN_CELL, 255)
    assert pixel(image, 20, 4)[3] == 0


def test_masks_of_several_samples_or_axes_are_refused():
    with pytest.raises(MaskShapeError, match="one sample at a time: this mask has 2"):
        pictures.mask_image(Mask(torch.ones(2, 3, 3, dtype=torch.bool)))
    with pytest.raises(MaskShapeError, match="4 dimensions"):
        pictures.mask_image(torch.ones(1, 1, 2, 2, dtype=torch.bool))


def test_terminal_masks_are_two_rows_a_line():
    keep = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1]]).bool()
    assert pictures.terminal_mask(keep) == "█ ▀▄\n ▀ ▀"
    assert pictures.terminal_mask(torch.tensor([True, False])) == "▀ "
    assert pictures.terminal_mask(torch.stack([KEEP, ~KEEP])) == "▀ \n\n▄█"


def test_an_attention_rule_is_drawn_position_by_position():
    image = pictures.attention_image(AttentionMask.causal(4), side=8)
    assert image.size == (8, 8)
    assert pixel(image, 1, 7) == pictures.KEPT_CELL
    assert pixel(image, 7, 1) == pictures.HIDDEN_CELL
    assert pixel(image, 4, 4) == pictures.KEPT_CELL


def test_a_rule_of_a_million_positions_is_drawn_in_shares():
    image = pictures.attention_image(AttentionMask.window(1_000_000, 250_000), side=64)
    assert image.size == (64, 64)
    assert pixel(image, 30, 40) == pictures.KEPT_CELL
    assert pixel(image, 10, 60) == pictures.HIDDEN_CELL
    assert pixel(image, 60, 10) == pictures.HIDDEN_CELL
    border = pixel(image, 32, 32)
    assert all(min(a, b) < c < max(a, b) for a, b, c in zip(pictures.KEPT_CELL, pictures.HIDDEN_CELL, border))


def test_a_rule_is_drawn_for_the_sample_and_head_asked():
    ids = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]])
    rule = AttentionMask.segments(ids)
    assert pixel(pictures.attention_image(rule, side=4, batch=0), 3, 0) == pictures.KEPT_CELL
    assert pixel(pictures.attention_image(rule, side=4, batch=1), 3, 0) == pictures.HIDDEN_CELL
    assert pixel(pictures.attention_image(rule, side=4, batch=9, head=9), 3, 0) == pictures.HIDDEN_CELL


def test_enlarging_keeps_pixels_square_and_within_the_side():
    image = Image.new("RGB", (3, 2), "red")
    assert pictures.enlarged(image, 10).size == (9, 6)
    assert pictures.enlarged(image, 5) is image


# -- grids -----------------------------------------------------------------------------------------------------------------


def test_a_grid_has_rows_of_columns_and_is_transparent_between():
    images = [Image.new("RGB", (10, 10), colour) for colour in ("red", "green", "blue")]
    page = pictures.grid_of(images, columns=2, gap=4)
    assert page.size == (24, 24)
    assert pixel(page, 5, 5)[:3] == (255, 0, 0)
    assert pixel(page, 19, 5)[:3] == (0, 128, 0)
    assert pixel(page, 5, 19)[:3] == (0, 0, 255)
    assert pixel(page, 19, 19)[3] == pixel(page, 12, 5)[3] == 0


def test_a_grid_is_no_wider_than_its_images():
    assert pictures.grid_of([Image.new("RGB", (10, 10))], columns=5).size == (10, 10)


def test_labels_stand_below_their_images():
    images = [Image.new("RGB", (60, 10), "red")] * 2
    plain = pictures.grid_of(images, columns=2)
    page = pictures.grid_of(images, columns=2, labels=["one", ""], text_size=12)
    assert page.height > plain.height
    alpha = np.asarray(page)[..., 3]
    assert alpha[10:, :60].any()
    assert not alpha[10:, 64:].any()


def test_a_background_fills_the_page():
    page = pictures.grid_of([Image.new("RGB", (4, 4))] * 3, columns=2, gap=2, background=(9, 8, 7))
    assert pixel(page, 9, 9) == (9, 8, 7, 255)


def test_translucent_images_stay_translucent():
    assert pixel(pictures.grid_of([Image.new("RGBA", (4, 4), (1, 2, 3, 90))], columns=1), 2, 2)[3] == 90


def test_an_empty_grid_is_refused():
    with pytest.raises(MaskShapeError, match="at least one image"):
        pictures.grid_of([], columns=2)


def test_png_files_give_the_image_back():
    image = pictures.mask_image(KEEP)
    assert (np.asarray(opened(pictures.png(image))) == np.asarray(image)).all()


# -- charts ----------------------------------------------------------------------------------------------------------------


def luminance(colour):
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_ink_reads_on_white_and_on_near_black():
    assert contrast(pictures.INK, "#ffffff") >= 4
    assert contrast(pictures.INK, "#0d1117") >= 4
    for colour in pictures.COLOURS:
        assert contrast(colour, "#ffffff") >= 2.5
        assert contrast(colour, "#0d1117") >= 2.5


@pytest.fixture
def axes(monkeypatch):
    """Draws a chart and gives its axes instead of the PNG, which takes a tenth of the time."""
    monkeypatch.setattr(pictures, "_rendered", lambda figure: figure)
    return lambda chart, *given, **named: chart(*given, **named).axes[0]


def test_charts_are_pngs_with_a_transparent_page():
    for chart in (pictures.curve({"a": ([0, 1, 2], [3.0, 2.0, 1.0])}), pictures.bars(["a"], [0.5])):
        values = np.asarray(opened(chart).convert("RGBA")).astype(int)
        ink = values[..., 3] > 0
        assert 0.01 < ink.mean() < 0.6
        assert ((np.abs(values[..., :3] - (59, 130, 196)).max(-1) < 8) & (values[..., 3] > 250)).any()


def test_curves_have_the_numbers_the_names_and_colours_that_differ(axes):
    drawn = axes(
        pictures.curve, {"a": ([0, 1, 2], [3.0, 2.0, 1.0]), "b": ([0, 5], [1.0, 2.0])}, y_label="loss"
    )
    first, second = drawn.get_lines()
    assert first.get_xydata().tolist() == [[0, 3], [1, 2], [2, 1]]
    assert second.get_xydata().tolist() == [[0, 1], [5, 2]]
    assert first.get_color() != second.get_color()
    assert [text.get_text() for text in drawn.get_legend().get_texts()] == ["a", "b"]
    assert (drawn.get_xlabel(), drawn.get_ylabel()) == ("step", "loss")


def test_one_curve_needs_no_legend_and_few_points_are_marked(axes):
    few = axes(pictures.curve, {"a": ([0, 1], [3.0, 2.0])})
    many = axes(pictures.curve, {"a": (range(20), [1.0] * 20)})
    assert few.get_legend() is None
    assert few.get_lines()[0].get_marker() == "o"
    assert many.get_lines()[0].get_marker() == "None"


def test_more_curves_than_colours_are_drawn(axes):
    many = {f"line {i}": ([0, 1], [0, i]) for i in range(len(pictures.COLOURS) + 2)}
    assert len(axes(pictures.curve, many).get_lines()) == len(many)


def test_gaps_stay_gaps(axes):
    line = axes(pictures.curve, {"a": (range(4), [1.0, math.inf, math.nan, 2.0])}).get_lines()[0]
    assert np.isnan(line.get_ydata()).tolist() == [False, True, True, False]
    assert axes(pictures.curve, {"a": ([0, 1], [math.nan, math.nan])}).get_lines()


def test_long_noisy_lines_are_drawn_pale_with_their_mean(axes):
    noise, steady = np.random.default_rng(0).normal(size=400), np.linspace(1, 0, 400)
    assert len(axes(pictures.curve, {"a": (range(400), steady)}).get_lines()) == 1
    assert len(axes(pictures.curve, {"a": (range(100), noise[:100])}).get_lines()) == 1
    pale, mean = axes(pictures.curve, {"a": (range(400), noise)}).get_lines()
    assert (pale.get_ydata() == noise).all()
    assert pale.get_alpha() < 0.5
    assert mean.get_ydata().std() < 0.4 * noise.std()


def test_the_running_mean_is_the_naive_one_and_skips_gaps():
    y = np.array([1.0, 2.0, np.nan, 4.0, 8.0, np.nan, np.nan, np.nan, np.nan])
    x, mean = pictures._running_mean(np.arange(9), y, 1)
    windows = [y[max(i - 1, 0) : i + 2] for i in range(9)]
    naive = [np.nanmean(part) if np.isfinite(part).any() else np.nan for part in windows]
    np.testing.assert_allclose(mean, naive)
    assert (x == np.arange(9)).all()


def test_scales_are_what_was_asked(axes):
    series = {"a": ([0, 1, 2], [0.001, 0.1, 0.9])}
    assert axes(pictures.curve, series).get_yscale() == "linear"
    assert axes(pictures.curve, series, log_y=True).get_yscale() == "log"
    share = axes(pictures.curve, series, percent=True)
    assert share.get_ylim() == (0, 1)
    assert share.yaxis.get_major_formatter()(0.5) == "50\N{NO-BREAK SPACE}%"


def test_bars_are_as_long_as_their_values_and_say_them(axes):
    drawn = axes(pictures.bars, ["a", "b", "c"], [0.5, 0.25, math.nan], reference=0.4)
    assert [bar.get_width() for bar in drawn.patches] == [0.5, 0.25, 0]
    assert [text.get_text() for text in drawn.texts] == ["50.0\N{NO-BREAK SPACE}%", "25.0\N{NO-BREAK SPACE}%"]
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["a", "b", "c"]
    assert drawn.yaxis_inverted()
    assert list(drawn.get_lines()[0].get_xdata()) == [0.4, 0.4]
    plain = axes(pictures.bars, ["a"], [1234.5], percent=False, x_label="weights")
    assert plain.texts[0].get_text() == "1234"
    assert plain.get_xlabel() == "weights"


def test_bars_of_many_or_no_names_are_drawn(axes):
    few, many = axes(pictures.bars, ["x"] * 3, [0.5] * 3), axes(pictures.bars, ["x"] * 50, [0.5] * 50)
    assert many.figure.get_figheight() > few.figure.get_figheight()
    assert axes(pictures.bars, [], []).patches[:] == []


# -- text ------------------------------------------------------------------------------------------------------------------


class Spans(HTMLParser):
    """Attributes and text of every span, in order."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])

    def handle_data(self, data):
        self.found[-1][2] += data


def test_tokens_are_coloured_by_the_event_that_revealed_them():
    spans = Spans(pictures.reveal(torch.tensor([-1, 0, 2, 4]), ["the", " cat", " sat", "!"])).found
    assert [text for _, _, text in spans] == ["the", " cat", " sat", "!"]
    assert spans[0][1] == {"class": "prompt", "title": "prompt"}
    assert [attributes["title"] for _, attributes, _ in spans[1:]] == ["event 0", "event 2", "event 4"]
    colours = [attributes["style"] for _, attributes, _ in spans[1:]]
    assert colours[0] == "background:rgba(112,72,232,.38)"
    assert colours[2] == "background:rgba(255,176,0,.38)"
    assert len(set(colours)) == 3


def test_tokens_are_escaped():
    text = pictures.reveal([0], ["<script>alert(1)</script>&\"'"])
    assert "<script" not in text
    assert Spans(text).found[0][2] == "<script>alert(1)</script>&\"'"


def test_events_and_tokens_must_be_as_many():
    with pytest.raises(MaskShapeError, match="got 1 for 2 tokens"):
        pictures.reveal([0], ["a", "b"])
    assert pictures.reveal([], []) == ""


# -- the README's picture ------------------------------------------------------------------------------------------------------


def test_the_readmes_picture_is_made_by_its_script(tmp_path, monkeypatch):
    script = Path(__file__).parents[2] / "docs" / "pictures" / "strategies.py"
    spec = importlib.util.spec_from_file_location("strategies", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", ["strategies.py", str(tmp_path / "out.png")])
    module.main()
    made, kept = Image.open(tmp_path / "out.png"), Image.open(script.with_suffix(".png"))
    assert made.size == kept.size
    difference = np.abs(np.asarray(made).astype(int) - np.asarray(kept).astype(int))
    # Labels may be drawn a little differently by another version of FreeType; the masks may not.
    assert difference[: module.GRID * module.PATCH].max() <= 2
