"""Image sources: pure functions of (seed, epoch, index), honest labels, and files of every kind, damaged ones included."""

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.errors import BadData
from maskwright.sources import embedded, images, pictures
from maskwright.sources.images import IMAGENET_MEAN, IMAGENET_STD, load_images, uniforms


def noise_image(seed, width=24, height=24, mode="RGB"):
    rng = np.random.default_rng(seed)
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2}[mode]
    values = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values, mode)


def flat_image(colour, size=(16, 16), mode="RGB"):
    return Image.new(mode, size, colour)


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Ten images in the folder itself: no labels."""
    for index in range(10):
        save(noise_image(index), tmp_path / "photos" / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture
def labelled(tmp_path):
    """Two classes in sub-folders, one of them nested: dark and bright."""
    for index in range(7):
        save(flat_image((10 + index,) * 3), tmp_path / "pets" / "cats" / f"{index}.png")
    for index in range(5):
        save(flat_image((240 + index,) * 3), tmp_path / "pets" / "dogs" / "deep" / f"{index}.jpg")
    return tmp_path / "pets"


def everything(source, epoch=0):
    return source.batch(torch.arange(len(source)), epoch)


# -- a pure function of (seed, epoch, index) -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "photographs", "folder"])
def test_a_sample_depends_on_seed_epoch_and_index_alone(name, folder):
    source = folder if name == "folder" else name
    one = load_images(source, size=16, seed=3)
    indices = torch.tensor([7, 0, 4])
    together = one.batch(indices, epoch=2)["pixels"]
    again = load_images(source, size=16, seed=3)
    again.batch(torch.tensor([1, 2]), epoch=9)
    assert torch.equal(again.batch(torch.tensor([0]), epoch=2)["pixels"][0], together[1])
    assert not torch.equal(one.batch(indices, epoch=3)["pixels"], together)
    assert not torch.equal(load_images(source, size=16, seed=4).batch(indices, epoch=2)["pixels"], together)


def test_global_random_state_is_neither_read_nor_moved(folder):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = everything(load_images(folder, size=16))["pixels"]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    torch.manual_seed(1)
    assert torch.equal(everything(load_images(folder, size=16))["pixels"], first)


def test_an_epoch_shows_every_sample_once_in_an_order_of_its_own():
    source = load_images("digits", size=8, seed=1)
    order = source.order(0)
    assert torch.equal(order.sort().values, torch.arange(len(source)))
    assert torch.equal(source.order(0), order)
    assert not torch.equal(source.order(1), order)
    assert not torch.equal(load_images("digits", size=8, seed=2).order(0), order)


def test_uniform_numbers_are_uniform_and_do_not_depend_on_company():
    numbers = uniforms(5, 1, torch.arange(20_000), 3)
    assert numbers.dtype == torch.float64
    assert 0 <= float(numbers.min()) < float(numbers.max()) < 1
    assert (numbers.mean(0) - 0.5).abs().max() < 5 * (1 / 12 / 20_000) ** 0.5
    assert torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max() < 0.03
    assert torch.equal(uniforms(5, 1, torch.tensor([137]), 3), numbers[137:138])
    assert torch.equal(uniforms(5, 1, torch.arange(20_000), 2), numbers[:, :2])
    others = [
        uniforms(*key, torch.arange(9), 3, stream=s) for key, s in (((6, 1), 0), ((5, 2), 0), ((5, 1), 1))
    ]
    assert all(not torch.isin(other, numbers).any() for other in others)


def test_seeds_and_epochs_do_not_stand_for_one_another():
    assert not torch.equal(uniforms(1, 2, torch.arange(4), 2), uniforms(2, 1, torch.arange(4), 2))
    assert uniforms(-3, 0, torch.arange(4), 2).isfinite().all()


# -- the embedded ones -----------------------------------------------------------------------------------------------


def test_digits_are_labelled_normalised_and_held_out_by_writer():
    source = load_images("digits", size=8, channels=1)
    held_out = source.evaluation()
    assert (len(source), len(held_out)) == (1438, 359)
    assert source.classes == tuple("0123456789")
    assert source.labelled
    batch = everything(source.evaluation("train"))
    assert batch["pixels"].shape == (1438, 1, 8, 8)
    assert batch["labels"].bincount().min() > 130
    assert float(batch["pixels"].mean()) == pytest.approx(0, abs=1e-4)
    assert float(batch["pixels"].std()) == pytest.approx(1, abs=1e-3)
    assert "1438 images, 359 held out, 10 classes, 1 × 8 × 8" in source.summary


def test_digits_at_their_own_size_are_the_pixels_of_scikit_learn():
    from sklearn.datasets import load_digits

    source = load_images("digits", size=8, channels=1)
    shown = source.denormalize(source.evaluation().batch(torch.arange(359))["pixels"])
    expected = torch.from_numpy(load_digits().images[1438:]).float()[:, None] / 16
    torch.testing.assert_close(shown, expected, atol=0.5 / 255 + 1e-6, rtol=0)


def test_digits_are_never_mirrored():
    """The sum over crops keeps the asymmetry of a 7; a mirrored half would cancel it."""
    source = load_images("digits", size=8, channels=1)
    labels = everything(source)["labels"]
    sevens = labels.eq(7).nonzero()[:, 0]
    mean = torch.stack([source.batch(sevens, epoch)["pixels"].mean(0) for epoch in range(4)]).mean(0)
    whole = source.evaluation("train").batch(sevens)["pixels"].mean(0)
    same = torch.nn.functional.cosine_similarity(mean.flatten(), whole.flatten(), dim=0)
    mirrored = torch.nn.functional.cosine_similarity(mean.flatten(), whole.flip(-1).flatten(), dim=0)
    assert same > mirrored + 0.1


def test_photographs_are_crops_labelled_with_their_photograph():
    source = load_images("photographs", size=32, crops=40)
    batch = everything(source)
    assert batch["pixels"].shape == (40, 3, 32, 32)
    assert batch["labels"].tolist() == [0, 1] * 20
    assert source.classes == ("china", "flower")
    assert len(source.evaluation()) == 10
    assert len(batch["pixels"].flatten(1).unique(dim=0)) == 40


def test_held_out_crops_come_from_parts_that_training_never_shows(monkeypatch):
    """Photographs in which a pixel's colour says where it is."""
    import sklearn.datasets

    rows, columns = np.mgrid[0:427, 0:640]
    colours = np.stack([rows * 255 / 426, columns * 255 / 639, 0 * rows], -1).round().astype(np.uint8)
    bundle = SimpleNamespace(images=[colours, colours], filenames=["a.jpg", "b.jpg"])
    monkeypatch.setattr(sklearn.datasets, "load_sample_images", lambda: bundle)
    source = load_images("photographs", size=32, crops=256)

    def places(part):
        shown = (source.denormalize(everything(part)["pixels"]) * 255).round().long()
        return set((shown[:, 0] * 256 + shown[:, 1]).flatten().tolist())

    train, held_out = places(source), places(source.evaluation())
    # At the border of the two parts a place that is rounded to 8 bits belongs to both.
    assert len(train & held_out) < 0.03 * len(held_out)
    assert len(train) > 2000


@pytest.fixture
def rotated(monkeypatch, tmp_path):
    """Rotated photographs of files of our own: red grows downwards, green to the right, blue says which one it is."""
    import sklearn.datasets

    def coloured(number, size):
        rows, columns = np.mgrid[0 : size[0], 0 : size[1]]
        blue = np.full(size, 20 + 25 * number)
        tones = np.stack([rows * 255 / size[0], columns * 255 / size[1], blue], -1)
        return tones.astype(np.uint8)

    bundle = SimpleNamespace(
        images=[coloured(n, (320, 360)) for n in (0, 1)], filenames=["china.jpg", "flower.jpg"]
    )
    monkeypatch.setattr(sklearn.datasets, "load_sample_images", lambda: bundle)
    for number, file in enumerate(embedded.UPRIGHT.values(), 2):
        picture = Image.fromarray(coloured(number, (320, 360)))
        save(picture, tmp_path / "skimage" / "data" / Path(file).with_suffix(".png").name)
        if file.endswith("jpg"):  # lossless, so that a pixel keeps its place in it
            (tmp_path / "skimage" / "data" / file).write_bytes(
                (tmp_path / "skimage" / "data" / Path(file).with_suffix(".png").name).read_bytes()
            )
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path / "skimage")])
    monkeypatch.setattr(embedded, "find_spec", lambda name: found)
    return load_images("rotated-photographs", size=16, crops=720)


def test_rotated_photographs_are_labelled_with_photograph_and_turn(rotated):
    assert len(rotated.classes) == 36
    assert (rotated.classes[0], rotated.classes[3], rotated.classes[-2]) == (
        "china 0°",
        "china 270°",
        "rocket 180°",
    )
    for part in (rotated, rotated.evaluation()):
        batch = everything(part)
        assert batch["labels"].bincount(minlength=36).min() > 0
        shown = part.denormalize(batch["pixels"]) * 255
        which = ((shown[:, 2].mean((1, 2)) - 20) / 25).round().long()
        down = (shown[:, :, -1] - shown[:, :, 0]).mean(-1)[:, :2]
        right = (shown[..., -1] - shown[..., 0]).mean(-1)[:, :2]
        # Red grows downwards in an upright picture, and after a quarter turn counter-clockwise to the right.
        growth = torch.stack([down[:, 0], right[:, 0], -down[:, 0], -right[:, 0]], 1)
        # Green grows to the right, then upwards: a mirrored picture would tell another turn than red does.
        other = torch.stack([right[:, 1], -down[:, 1], -right[:, 1], down[:, 1]], 1)
        assert torch.equal(batch["labels"], which * 4 + growth.argmax(1))
        assert torch.equal(growth.argmax(1), other.argmax(1))


def test_held_out_patches_of_rotated_photographs_come_from_the_quarter_between(rotated):
    def rows(part):
        batch = everything(part)
        return (part.denormalize(batch["pixels"])[:, 0] * 320).flatten()

    train, held_out = rows(rotated), rows(rotated.evaluation())
    assert ((train < 120 + 1.5) | (train > 200 - 1.5)).all()
    assert ((held_out > 120 - 1.5) & (held_out < 200 + 1.5)).all()


def test_labels_made_here_are_declared_as_such(rotated):
    assert rotated.label.startswith(
        "self-made: which of 9 photographs a patch is from, and by how many degrees"
    )
    assert rotated.label in rotated.summary
    assert load_images("photographs", size=16, crops=4).label == "self-made: which photograph a patch is from"
    assert not load_images("digits", size=8).label.startswith("self-made")


@pytest.mark.skipif(find_spec("skimage") is None, reason="scikit-image is not installed")
def test_the_pictures_inside_scikit_image_are_read_without_a_download(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    source = load_images("rotated-photographs", size=32, crops=72)
    batch = everything(source)
    assert batch["labels"].bincount().tolist() == [2] * 36
    assert len(batch["pixels"].flatten(1).unique(dim=0)) == 72
    assert "skimage.data" not in sys.modules


def test_scikit_image_that_is_missing_or_has_no_pictures_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(BadData, match=r"pip install 'maskwright\[photographs\]'"):
        load_images("rotated-photographs", size=16)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(embedded, "find_spec", lambda name: found)
    with pytest.raises(BadData, match=r"lacks its pictures astronaut\.png, .*rocket\.jpg"):
        load_images("rotated-photographs", size=16)


def test_details_of_photographs_keep_their_scale(monkeypatch):
    boxes = []
    cut = images.resized_crops
    monkeypatch.setattr(images, "resized_crops", lambda *given: boxes.append(given[1]) or cut(*given))
    everything(load_images("photographs", size=32, crops=64))
    sides = boxes[0][:, 2:]
    assert torch.equal(sides[:, 0], sides[:, 1])
    assert float(sides.min()) >= 32
    assert float(sides.max()) <= 64


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour(channels, folder):
    for source in ("digits", "photographs", folder):
        loaded = load_images(source, size=16, channels=channels)
        assert loaded.channels == len(loaded.mean) == len(loaded.std) == channels
        assert loaded.batch(torch.arange(2))["pixels"].shape == (2, channels, 16, 16)


def test_normalisation_is_imagenets_and_denormalize_undoes_it(tmp_path):
    save(flat_image((255, 0, 128)), tmp_path / "a.png")
    source = load_images(tmp_path, size=8)
    pixels = source.batch(torch.tensor([0]))["pixels"]
    expected = [(v / 255 - m) / s for v, m, s in zip((255, 0, 128), IMAGENET_MEAN, IMAGENET_STD)]
    torch.testing.assert_close(pixels[0, :, 3, 3], torch.tensor(expected), atol=1e-5, rtol=0)
    shown = source.denormalize(pixels)
    torch.testing.assert_close(shown[0, :, 0, 0], torch.tensor([1, 0, 128 / 255]), atol=1e-5, rtol=0)
    assert float(source.denormalize(pixels + 100).max()) == 1


# -- a folder ------------------------------------------------------------------------------------------------------------


def test_sub_folders_are_labels(labelled):
    source = load_images(labelled, size=8)
    assert source.classes == ("cats", "dogs")
    assert source.labelled
    for part in (source, source.evaluation("train"), source.evaluation()):
        batch = everything(part)
        bright = part.denormalize(batch["pixels"]).mean((1, 2, 3)) > 0.5
        assert torch.equal(batch["labels"], bright.long())
    assert (len(source), len(source.evaluation())) == (10, 2)
    assert everything(source.evaluation())["labels"].tolist() == [0, 1]


def test_a_flat_folder_has_no_labels(folder):
    source = load_images(folder, size=16)
    assert not source.labelled
    assert source.classes == ("photos",)
    assert everything(source)["labels"].tolist() == [0] * 8
    assert (len(source), len(source.evaluation())) == (8, 2)
    assert "no labels" in source.summary


def test_images_beside_sub_folders_mean_no_labels(labelled):
    save(flat_image("red"), labelled / "stray.png")
    assert not load_images(labelled, size=8).labelled


def test_every_fifth_image_of_a_label_is_held_out_and_never_trained_on(folder):
    source = load_images(folder, size=24)
    held_out = everything(source.evaluation())["pixels"]
    train = everything(source.evaluation("train"))["pixels"]
    expected = [images.decode(folder / f"{i}.png", 3, 48) for i in (4, 9)]
    shown = (source.denormalize(held_out) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert all((a == np.asarray(b)).all() for a, b in zip(shown, expected))
    assert not any(torch.equal(a, b) for a in train for b in held_out)


def test_few_images_still_leave_one_held_out(tmp_path):
    save(flat_image("red"), tmp_path / "a.png")
    alone = load_images(tmp_path, size=8)
    assert (len(alone), len(alone.evaluation())) == (1, 1)
    save(flat_image("blue"), tmp_path / "b.png")
    two = load_images(tmp_path, size=8)
    assert (len(two), len(two.evaluation())) == (1, 1)
    assert not torch.equal(
        everything(two.evaluation("train"))["pixels"], everything(two.evaluation())["pixels"]
    )


def test_training_crops_vary_and_evaluation_does_not(folder):
    source = load_images(folder, size=16)
    assert not torch.equal(everything(source, 0)["pixels"], everything(source, 1)["pixels"])
    fixed = source.evaluation("train")
    assert torch.equal(everything(fixed, 0)["pixels"], everything(fixed, 1)["pixels"])


def test_training_crops_are_mirrored_in_half_of_the_cases(tmp_path):
    ramp = np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[None], 24, axis=0)
    save(Image.fromarray(ramp), tmp_path / "ramp.png")
    source = load_images(tmp_path, size=16, channels=1)
    pixels = torch.cat([source.batch(torch.tensor([0]), epoch)["pixels"] for epoch in range(200)])
    rising = (pixels[:, 0, :, -1] > pixels[:, 0, :, 0]).all(1)
    assert 65 < int(rising.sum()) < 135


def test_images_of_unequal_sizes_become_squares_of_one_size(tmp_path):
    for index, size in enumerate([(10, 40), (300, 20), (8, 8), (33, 31)]):
        save(noise_image(index, *size), tmp_path / f"{index}.png")
    source = load_images(tmp_path, size=16)
    assert everything(source, 3)["pixels"].shape == (3, 3, 16, 16)
    assert source.evaluation().batch(torch.tensor([0]))["pixels"].isfinite().all()


def test_evaluation_shows_the_square_in_the_middle(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    save(Image.fromarray(wide), tmp_path / "wide.png")
    source = load_images(tmp_path, size=10)
    assert source.denormalize(everything(source.evaluation())["pixels"]).min() > 0.99


def shown(path, channels=3):
    """The image as RGB or L values, [H, W, C]."""
    values = np.asarray(images.decode(path, channels, 64))
    return values.reshape(*values.shape[:2], -1)


def test_transparent_pixels_lie_on_white(tmp_path):
    picture = flat_image((255, 0, 0, 0), mode="RGBA")
    picture.paste((0, 0, 255, 255), (0, 0, 8, 16))
    picture.paste((0, 0, 0, 128), (0, 0, 4, 16))
    values = shown(save(picture, tmp_path / "a.png"))
    assert values[0, 12].tolist() == [255, 255, 255]
    assert values[0, 6].tolist() == [0, 0, 255]
    assert values[0, 0].tolist() == pytest.approx([127] * 3, abs=1)
    grey = flat_image((0, 0), mode="LA")
    assert shown(save(grey, tmp_path / "b.png"), 1)[0, 0].tolist() == [255]


def test_a_palette_with_a_transparent_colour_lies_on_white(tmp_path):
    picture = Image.new("P", (16, 16), 0)
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.paste(1, (0, 0, 8, 16))
    picture.save(tmp_path / "a.png", transparency=0)
    values = shown(tmp_path / "a.png")
    assert values[0, 0].tolist() == [0, 255, 0]
    assert values[0, 15].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("mode", "white", "suffix"),
    [
        ("CMYK", (0, 0, 0, 0), "jpg"),
        ("CMYK", (0, 0, 0, 0), "tif"),
        ("1", 1, "png"),
        ("L", 255, "bmp"),
        ("LAB", (255, 128, 128), "tif"),
        ("RGB", (255, 255, 255), "jp2"),
        ("I;16", 65535, "pgm"),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, white, suffix):
    save(flat_image(white, mode=mode), tmp_path / f"a.{suffix}")
    assert shown(tmp_path / f"a.{suffix}")[5, 5].tolist() == pytest.approx([255] * 3, abs=1)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_keeps_its_tones(tmp_path, suffix):
    tones = np.linspace(0, 65535, 16 * 16).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(tones).save(tmp_path / f"deep.{suffix}")
    values = shown(tmp_path / f"deep.{suffix}", 1)[..., 0]
    assert (values == np.rint(tones / 257)).all()
    assert len(np.unique(values)) > 200


def test_sixteen_bit_grey_is_turned_upright_and_shrunk_like_any_other(tmp_path):
    tones = np.linspace(0, 65535, 20 * 40).round().astype(np.uint16).reshape(20, 40)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(tones).save(tmp_path / "deep.png", exif=exif)
    values = np.asarray(images.decode(tmp_path / "deep.png", 1, 10))
    assert values.shape == (10, 20)
    assert (np.diff(values[:, 0].astype(int)) < 0).all()


@pytest.mark.parametrize("brightest", [70_000, 2_000_000_000])
def test_tones_of_more_than_sixteen_bits_are_scaled_and_not_cut_off(tmp_path, brightest):
    tones = np.linspace(0, brightest, 256).round().astype(np.int32).reshape(16, 16)
    Image.fromarray(tones).save(tmp_path / "deep.tif")
    values = shown(tmp_path / "deep.tif", 1)[..., 0]
    assert (values.flatten() == np.arange(256)).all()


@pytest.mark.parametrize(("scale", "brightest"), [(1.0, 255), (200.0, 200), (5000.0, 255)])
def test_fractions_are_tones_of_white_and_larger_numbers_are_tones(tmp_path, scale, brightest):
    values = (np.linspace(0, 1, 256, dtype=np.float32) * scale).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "float.tif")
    said = shown(tmp_path / "float.tif", 1)
    assert said.max() == brightest
    assert len(np.unique(said)) > 190


def test_what_is_no_number_is_black(tmp_path):
    values = np.full((16, 16), np.nan, dtype=np.float32)
    values[0, 0] = 1
    Image.fromarray(values).save(tmp_path / "float.tif")
    assert shown(tmp_path / "float.tif", 1).flatten().tolist() == [255] + [0] * 255


def test_the_camera_decides_which_way_is_up(tmp_path):
    picture = flat_image("black", (20, 10))
    picture.paste("white", (0, 0, 20, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row of the file is the right side of the scene
    picture.save(tmp_path / "a.png", exif=exif)
    values = shown(tmp_path / "a.png")
    assert values.shape[:2] == (20, 10)
    assert values[10, 9].tolist() == [255] * 3
    assert values[10, 0].tolist() == [0] * 3


def test_animations_show_their_first_frame(tmp_path):
    frames = [flat_image(colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert shown(tmp_path / "a.gif")[0, 0].tolist() == [255, 0, 0]


def test_large_pictures_are_shrunk_to_what_is_needed(tmp_path):
    save(noise_image(0, 200, 100), tmp_path / "a.png")
    assert images.decode(tmp_path / "a.png", 3, 32).size == (64, 32)


# -- what cannot be read -----------------------------------------------------------------------------------------------


def test_files_that_are_no_images_are_skipped_and_named(folder):
    (folder / "notes.txt").write_text("not looked at: its suffix says so")
    (folder / "letter.jpg").write_text("Dear reader, I am no photograph.")
    (folder / "empty.png").write_bytes(b"")
    source = load_images(folder, size=16)
    assert sorted(source.skipped) == ["empty.png", "letter.jpg"]
    assert len(source) + len(source.evaluation()) == 10
    assert "2 unreadable files skipped" in source.summary


def cut_short(path, share=0.4):
    """An image whose header is right and whose pixels are not all there."""
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


def test_an_image_that_breaks_off_is_skipped_named_and_always_replaced_by_the_same(folder):
    cut_short(folder / "2.png")
    source = load_images(folder, size=24)
    assert source.skipped == ()
    fixed = source.evaluation("train")
    first = everything(fixed)["pixels"]
    assert source.skipped == ("2.png",)
    assert torch.equal(first[2], first[3])
    assert torch.equal(fixed.batch(torch.tensor([2]))["pixels"][0], first[2])
    everything(source, 7)
    assert source.skipped == ("2.png",)


def test_a_broken_last_image_is_replaced_by_the_first(folder):
    cut_short(folder / "8.png")
    source = load_images(folder, size=24).evaluation("train")
    pixels = everything(source)["pixels"]
    assert torch.equal(pixels[-1], pixels[0])


def test_a_replaced_image_brings_its_own_label(labelled):
    for path in (labelled / "cats").iterdir():
        if path.name != "0.png":
            cut_short(path, 0.8)
    source = load_images(labelled, size=8)
    batch = everything(source.evaluation("train"))
    bright = source.denormalize(batch["pixels"]).mean((1, 2, 3)) > 0.5
    assert torch.equal(batch["labels"], bright.long())


def test_a_file_that_disappears_is_a_skipped_file(folder):
    source = load_images(folder, size=16)
    (folder / "1.png").unlink()
    everything(source)
    assert source.skipped == ("1.png",)


def test_a_folder_of_nothing_but_broken_images_says_so_before_anything_is_trained(folder):
    for path in folder.iterdir():
        cut_short(path)
    with pytest.raises(
        BadData, match=r"None of the 10 images in .*0\.png \(image file is truncated.*and 7 more"
    ):
        load_images(folder, size=16)


def test_decoded_pictures_are_kept_within_a_limit(folder, monkeypatch):
    opened = []
    decode = pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda *given: opened.append(given[0]) or decode(*given))
    source = load_images(folder, size=16)
    assert len(opened) == 2  # one of each part, to see whether there is anything
    everything(source)
    everything(source, 1)
    assert len(opened) == 2 + 7
    opened.clear()
    monkeypatch.setattr(pictures, "_CACHE_BYTES", 3 * 24 * 24 * 3)
    source = load_images(folder, size=16)
    everything(source)
    everything(source, 1)
    assert len(opened) == 2 + 7 + 5


def test_folders_are_refused_with_what_is_wrong(tmp_path):
    with pytest.raises(BadData, match=r"does not exist.*'photographs', 'rotated-photographs' or 'digits'"):
        load_images(tmp_path / "nowhere", size=8)
    with pytest.raises(BadData, match="Did you mean 'photographs'"):
        load_images("photograph", size=8)
    file = save(flat_image("red"), tmp_path / "full" / "a.png")
    with pytest.raises(BadData, match="is no folder but one image"):
        load_images(file, size=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadData, match=r"has no images \(jpg, "):
        load_images(tmp_path / "empty", size=8)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("text")
    with pytest.raises(BadData, match=r"None of the 1 files .* is a readable image, such as a\.png"):
        load_images(tmp_path / "bad", size=8)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"size": 4}, "size=4 must be a whole number of at least 8"),
        ({"size": 16.0}, "size=16.0"),
        ({"size": True}, "size=True"),
        ({"size": 16, "crops": 0}, "crops=0"),
        ({"size": 16, "channels": 4}, r"channels=4 must be 3 \(colour\) or 1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(wrong, words):
    with pytest.raises(BadData, match=words):
        load_images("digits", **wrong)


def test_an_unknown_split_is_refused():
    with pytest.raises(BadData, match="'train', 'held_out'"):
        load_images("digits", size=8).evaluation("test")


def test_the_module_does_not_import_scikit_learn_or_pillow_by_itself():
    source = importlib.util.find_spec("maskwright.sources.images").loader.get_source(
        "maskwright.sources.images"
    )
    top = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert not any("sklearn" in line or "PIL" in line for line in top)
