"""Second views: crops that overlap, colours of their own, and pairs of files in a user's folder."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from maskwright.errors import BadData, BadRunFile
from maskwright.jobs import execute
from maskwright.jobs.settings import resolve
from maskwright.sources import second_views
from maskwright.sources.images import load_images, uniforms
from maskwright.sources.second_views import OVERLAP, jittered, overlap, overlapping
from maskwright.sources.views import shifted_squares


def noise_image(seed, side=24):
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def flat(value, side=24):
    return Image.new("RGB", (side, side), (value,) * 3)


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def everything(source, epoch=0):
    return source.batch(torch.arange(len(source)), epoch)


@pytest.fixture
def scenes(tmp_path):
    """Ten scenes of two grey files each: scene i is 20 · i bright from the one side, and 5 more from the other."""
    for index in range(10):
        save(flat(20 * index), tmp_path / "scenes" / f"scene{index}_1.png")
        save(flat(20 * index + 5), tmp_path / "scenes" / f"scene{index}_2.png")
    return tmp_path / "scenes"


# -- two crops of one picture ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "photographs", "folder"])
def test_both_views_depend_on_seed_epoch_and_index_alone(name, scenes):
    def load(seed):
        return load_images(scenes if name == "folder" else name, size=16, seed=seed, second_view="crops")

    one = load(3)
    together = one.batch(torch.tensor([7, 0, 4]), epoch=2)
    alone = load(3).batch(torch.tensor([0]), epoch=2)
    assert one.columns == {"pixels", "pixels_other_view", "labels"} == together.keys()
    for column in ("pixels", "pixels_other_view"):
        assert together[column].shape == (3, 3, 16, 16)
        assert torch.equal(alone[column][0], together[column][1])
        assert not torch.equal(one.batch(torch.tensor([7, 0, 4]), epoch=3)[column], together[column])
        assert not torch.equal(load(4).batch(torch.tensor([7, 0, 4]), epoch=2)[column], together[column])
    assert not torch.equal(together["pixels"], together["pixels_other_view"])


def test_without_being_asked_for_there_is_one_view_and_asking_does_not_change_the_first():
    plain, both = load_images("photographs", size=16), load_images("photographs", size=16, second_view="auto")
    assert plain.columns == {"pixels", "labels"} == plain.batch(torch.arange(2)).keys()
    for split in ("train", "held_out"):
        one, two = (everything(source.evaluation(split)) for source in (plain, both))
        assert torch.equal(one["pixels"], two["pixels"])
        assert torch.equal(one["labels"], two["labels"])
    assert "images (two crops of each), 512 held out" in both.summary


def naive_overlap(one, other):
    """Counted pixel by pixel."""

    def covered(box):
        top, left, height, width = box
        return {(y, x) for y in range(top, top + height) for x in range(left, left + width)}

    a, b = covered(one), covered(other)
    return len(a & b) / max(len(a), len(b))


boxes = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 12), st.integers(1, 12))


@given(boxes, boxes)
@settings(max_examples=60, deadline=None)
def test_the_overlap_is_the_shared_part_of_the_larger_box(one, other):
    found = overlap(torch.tensor(one).double(), torch.tensor(other).double())
    assert float(found) == pytest.approx(naive_overlap(one, other), abs=1e-12)


@given(boxes, st.lists(boxes, min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_the_first_crop_that_overlaps_is_taken_and_otherwise_one_is_moved(box, proposed):
    found = overlapping(torch.tensor([box]).double(), torch.tensor([proposed]).double())[0]
    enough = [one for one in proposed if naive_overlap(box, one) >= OVERLAP]
    if enough:
        assert found.tolist() == list(map(float, enough[0]))
        return
    assert float(overlap(torch.tensor(box).double(), found)) >= OVERLAP
    best = max(proposed, key=lambda one: naive_overlap(box, one))
    low, high = torch.tensor([box, best]).double().aminmax(dim=0)
    assert (found >= low - 1e-9).all()
    assert (found <= high + 1e-9).all()


@pytest.mark.parametrize("name", ["digits", "photographs", "folder"])
@pytest.mark.parametrize("split", [None, "held_out"])
def test_two_crops_share_at_least_half_of_each(name, split, scenes, monkeypatch):
    seen = []
    crops = second_views.resized_crops
    monkeypatch.setattr(
        second_views,
        "resized_crops",
        lambda pictures, boxes, *rest: (seen.append(boxes), crops(pictures, boxes, *rest))[1],
    )
    source = load_images(scenes if name == "folder" else name, size=16, second_view="crops")
    source = source if split is None else source.evaluation(split)
    source.batch(torch.arange(200) % len(source), epoch=1)
    first, second = seen
    shares = overlap(first, second)
    assert float(shares.min()) >= OVERLAP - 1e-9
    # They are drawn, not copied: some share little more than half, and hardly any box is the other one.
    assert float(shares.min()) < 0.65
    assert float((shares < 0.99).double().mean()) > 0.9


def test_where_one_view_is_mirrored_both_are(tmp_path):
    rising = np.repeat(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    save(Image.fromarray(rising), tmp_path / "one.png")
    source = load_images(tmp_path, size=16, second_view="crops")
    batches = [source.batch(torch.tensor([0]), epoch) for epoch in range(40)]
    ways = {
        tuple(
            bool(batch[name][0, :, :, -1].mean() > batch[name][0, :, :, 0].mean())
            for name in batch
            if name != "labels"
        )
        for batch in batches
    }
    assert ways == {(True, True), (False, False)}


# -- colours -----------------------------------------------------------------------------------------------------


def naive_jitter(image, u):
    """[C, H, W] → the same, as torchvision's ColorJitter of (0.6, 1.4) does it to one image of floats."""
    steps = sorted(range(3), key=lambda step: u[3 + step])
    for step in steps:
        factor = 0.6 + 0.8 * u[step]
        weights = (0.299, 0.587, 0.114) if len(image) == 3 else (1.0,)
        grey = sum(weight * channel for weight, channel in zip(weights, image))
        reference = (torch.zeros_like(grey), torch.full_like(grey, float(grey.mean())), grey)[step]
        image = (factor * image + (1 - factor) * reference).clamp(0, 1)
    return image


@pytest.mark.parametrize("channels", [3, 1])
def test_colours_change_as_those_of_one_image_after_the_other(channels):
    pixels = torch.rand(12, channels, 6, 5, generator=torch.Generator().manual_seed(0))
    u = uniforms(0, 0, torch.arange(12), 6)
    before = pixels.clone()
    expected = torch.stack([naive_jitter(image, row) for image, row in zip(pixels, u.tolist())])
    assert torch.allclose(jittered(pixels, u), expected, atol=1e-5)
    assert torch.equal(pixels, before)
    assert len({tuple(row.argsort().tolist()) for row in u[:, 3:]}) > 3, "in several orders"


@pytest.mark.parametrize(
    ("which", "enhancer"),
    [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)],
)
def test_each_of_the_three_is_pillows(which, enhancer):
    image = noise_image(1)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
    for share in (0.0, 0.3, 1.0):
        u = torch.full((1, 6), 0.5, dtype=torch.float64)
        u[0, which] = share
        theirs = np.asarray(enhancer(image).enhance(0.6 + 0.8 * share)).transpose(2, 0, 1)
        # Pillow rounds its references to whole numbers.
        assert np.abs(jittered(pixels, u)[0].numpy() * 255 - theirs).max() <= 1.6


def test_each_view_has_colours_of_its_own_in_training_and_the_pictures_own_in_evaluation(tmp_path):
    for index in range(10):
        save(flat(100), tmp_path / f"{index}.png")
    source = load_images(tmp_path, size=8, second_view="crops")
    batch = everything(source)
    one, two = (source.denormalize(batch[name]).mean((1, 2, 3)) for name in ("pixels", "pixels_other_view"))
    # A flat grey changes in brightness only: 100 times a factor in 0.6 … 1.4.
    for values in (one, two):
        assert float(values.min()) > 0.59 * 100 / 255
        assert float(values.max()) < 1.41 * 100 / 255
        assert float(values.std()) > 0.03
    assert float((one - two).abs().mean()) > 0.03
    held_out = source.evaluation("held_out")
    for name in ("pixels", "pixels_other_view"):
        shown = held_out.denormalize(everything(held_out)[name])
        assert torch.allclose(shown, torch.full_like(shown, 100 / 255), atol=1e-3)


# -- pairs of files ----------------------------------------------------------------------------------------------


def levels(source, column):
    """The brightness 0 … 255 of each flat picture, as whole numbers."""
    held = [source.evaluation(split) for split in ("train", "held_out")]
    values = [part.denormalize(everything(part)[column]).mean((1, 2, 3)) * 255 for part in held]
    return torch.cat(values).round().long().tolist()


def rename(folder, first, second):
    for path in list(folder.iterdir()):
        stem, number = path.stem.split("_")
        path.rename(path.with_stem(stem + (first if number == "1" else second)))


@pytest.mark.parametrize("ending", [("_1", "_2"), ("_a", "_b"), ("_left", "_right")])
def test_files_that_differ_in_their_ending_are_pairs(ending, scenes):
    rename(scenes, *ending)
    source = load_images(scenes, size=8, second_view="auto")
    assert len(source) == 8
    assert len(source.evaluation("held_out")) == 2
    firsts, others = levels(source, "pixels"), levels(source, "pixels_other_view")
    assert sorted(firsts) == [20 * index for index in range(10)]
    assert others == [level + 5 for level in firsts]
    assert f"{ending[0]} and {ending[1]}" in source.summary
    assert "8 pairs of images, 2 held out" in source.summary


def test_crops_of_a_pair_show_seven_eighths_of_the_middle_square():
    sizes = torch.tensor([[32.0, 64.0], [64.0, 32.0]]).double().repeat(200, 1)
    found, mirrored = shifted_squares(uniforms(0, 0, torch.arange(400), 5), sizes)
    assert not mirrored.any()
    assert (found[:, 2:] == 28).all()
    inside = found[:, :2] - (sizes - 32) / 2
    assert (inside >= 0).all()
    assert (inside <= 4).all()
    assert (inside.amin(0) < 0.5).all()
    assert (inside.amax(0) > 3.5).all()


def test_sub_folders_are_labels_and_pairs_lie_in_one(tmp_path):
    for name in ("indoors", "outdoors"):
        for index in range(5):
            save(flat(10 * index), tmp_path / name / f"{index}_a.png")
            save(flat(10 * index + 5), tmp_path / name / f"{index}_b.png")
    source = load_images(tmp_path, size=8, second_view="pairs")
    assert source.classes == ("indoors", "outdoors")
    assert everything(source)["labels"].tolist() == [0] * 4 + [1] * 4
    assert levels(source, "pixels_other_view") == [level + 5 for level in levels(source, "pixels")]


def test_a_list_says_what_the_pairs_are(scenes):
    scenes.joinpath("pairs.txt").write_text(
        "# a comment\nscene3_2.png scene0_1.png\n\nscene1_1.png\tscene2_1.png\nscene1_1.png scene5_2.png\n"
    )
    source = load_images(scenes, size=8, second_view="auto")
    assert levels(source, "pixels") == [65, 20, 20]
    assert levels(source, "pixels_other_view") == [0, 40, 105]
    assert "as pairs.txt has them" in source.summary
    assert levels(load_images(scenes, size=8, second_view="crops"), "pixels").count(20) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("scene0_1.png\n", r"line 1: 'scene0_1.png' must be two paths"),
        ("scene0_1.png scene0_2.png scene1_1.png\n", "line 1: .* must be two paths"),
        ("\nscene0_1.png nowhere.png\n", "line 2: there is no image 'nowhere.png'"),
        ("# nothing\n", "lists no pairs"),
    ],
)
def test_a_list_that_does_not_fit_is_refused_with_the_line(text, said, scenes):
    scenes.joinpath("pairs.txt").write_text(text)
    with pytest.raises(BadData, match=said):
        load_images(scenes, size=8, second_view="auto")


def test_a_list_may_hold_pairs_of_a_split_that_is_left_alone(tmp_path):
    lines = []
    for split, level in (("train", 50), ("val", 100), ("test", 150)):
        save(flat(level), tmp_path / split / "one.png")
        save(flat(level + 5), tmp_path / split / "two.png")
        lines.append(f"{split}/one.png {split}/two.png")
    tmp_path.joinpath("pairs.txt").write_text("\n".join(lines))
    source = load_images(tmp_path, size=8, second_view="auto")
    assert levels(source, "pixels") == [50, 100]
    assert levels(source, "pixels_other_view") == [55, 105]


def test_images_without_a_partner(scenes):
    save(flat(255), scenes / "holiday.png")
    for kind in ("auto", "pairs"):
        with pytest.raises(
            BadData, match=r"10 pairs .*, and 1 images without a partner \(holiday.png\).*data.views"
        ):
            load_images(scenes, size=8, second_view=kind)
    assert len(load_images(scenes, size=8, second_view="crops")) == 17
    # Two of many that happen to be called so make no pair.
    for index in range(30):
        save(flat(index), scenes / f"photo{index}.png")
    assert "two crops of each" in load_images(scenes, size=8, second_view="auto").summary
    with pytest.raises(BadData, match="31 images without a partner"):
        load_images(scenes, size=8, second_view="pairs")


def test_a_pair_with_a_damaged_file_is_left_out_and_named(scenes):
    scenes.joinpath("scene4_2.png").write_bytes(b"no image at all")
    whole = scenes.joinpath("scene6_1.png")
    # Damaged behind its beginning, where only decoding finds it.
    save(noise_image(3, 64), whole)
    whole.write_bytes(whole.read_bytes()[:600])
    source = load_images(scenes, size=8, second_view="auto")
    firsts, others = levels(source, "pixels"), levels(source, "pixels_other_view")
    assert others == [level + 5 for level in firsts], "what stands in is a pair too"
    assert {80, 120}.isdisjoint(firsts)
    assert set(source.skipped) == {"scene4_2.png", "scene6_1.png"}


def test_pairs_are_asked_for_where_there_are_files():
    with pytest.raises(BadData, match=r"'digits' have no pairs of files; set data\.views to 'crops'"):
        load_images("digits", size=8, second_view="pairs")
    with pytest.raises(BadData, match="second_view='both' must be one of auto, crops, pairs"):
        load_images("digits", size=8, second_view="both")
    with pytest.raises(BadRunFile, match="views='both' must be one of crops, pairs"):
        resolve("pretrain", None, {"data.views": "both"})


# -- in a run ----------------------------------------------------------------------------------------------------

TINY = {
    "objective.name": "croco",
    "objective.decoder_width": 16,
    "objective.decoder_depth": 1,
    "objective.decoder_heads": 2,
    "model.width": 16,
    "model.depth": 1,
    "model.heads": 2,
    "data.size": 16,
    "model.patch_size": 4,
    "run.steps": 3,
    "run.batch_size": 4,
}


def test_a_pretraining_on_pairs_shows_them(scenes, tmp_path):
    given = resolve("pretrain", None, {**TINY, "data.source": str(scenes), "data.views": "pairs"})
    result = execute(given, folder=tmp_path / "run", quiet=True)
    assert result.summary["held_out_loss"] > 0
    assert "8 pairs of images" in result.summary["data"]
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "Held-out image 1, second view" in page
    assert 'class="pictures" style="--rows: 4"' in page
    assert page.index(">second view<") < page.index(">reconstruction<")
    assert 'views = "pairs"' in (tmp_path / "run" / "run.toml").read_text("utf-8")


def test_an_objective_that_needs_one_view_is_given_one(scenes, tmp_path):
    given = resolve("pretrain", None, {**TINY, "objective.name": "mae", "data.source": str(scenes)})
    result = execute(given, folder=tmp_path / "run", quiet=True)
    assert "16 images" in result.summary["data"]
    assert "second view" not in (tmp_path / "run" / "report.html").read_text("utf-8")
