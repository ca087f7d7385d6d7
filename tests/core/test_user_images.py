"""A user's own images: what a path is recognised as, tar shards, saved datasets, splits, and what is damaged in them."""

import re
import shutil
import sys
import tarfile

import numpy as np
import pytest
import torch

from maskwright.errors import BadData
from maskwright.jobs.batches import Batches
from maskwright.sources.decoding import decode
from maskwright.sources.images import load_images
from maskwright.sources.tables import Rows
from user_images import (
    CLASSES,
    cut_short,
    dataset,
    encoded,
    members,
    picture,
    rows,
    tones,
    write_folder,
    write_shards,
    write_tar,
)


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets")


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars(datasets):
    datasets.disable_progress_bars()


@pytest.fixture
def write(tmp_path):
    """Writes fifteen images in one of three ways and returns their path."""

    def written(kind):
        path = tmp_path / kind
        if kind == "folder":
            return write_folder(path)
        if kind == "shards":
            return write_shards(path)
        dataset(rows(range(15))).save_to_disk(path)
        return path

    return written


KINDS = ("folder", "shards", "dataset")


def everything(source, epoch=0):
    return source.batch(torch.arange(len(source)), epoch)


# -- what all three have in common ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("folder", r"\(a folder of images\)"),
        ("shards", r"\(WebDataset, 3 tar shards\)"),
        ("dataset", r"\(a saved Hugging Face dataset, column 'image'\)"),
    ],
)
def test_a_path_is_recognised_and_what_it_is_is_said(write, kind, said):
    source = load_images(write(kind), size=16)
    with_counts = f"{said}: 12 images, 3 held out, 3 classes, 3 × 16 × 16; label: "
    assert re.search(with_counts, source.summary), source.summary


@pytest.mark.parametrize("kind", KINDS)
def test_labels_belong_to_their_images(write, kind):
    source = load_images(write(kind), size=16)
    for part in (source, source.evaluation("train"), source.evaluation()):
        batch = everything(part)
        assert batch["labels"].tolist() == tones(part, batch)
        assert set(batch["labels"].tolist()) == {0, 1, 2}
    assert source.classes == (("0", "1", "2") if kind == "shards" else CLASSES)


def test_the_same_images_give_the_same_pixels_however_they_are_kept(write):
    """Also the same split: number five of each class is held out. A folder has them in the order of its classes."""
    kept = [load_images(write(kind), size=16) for kind in KINDS]
    by_class = torch.tensor([3 * place + label for label in range(3) for place in range(4)])
    folder, shards, table = (everything(source.evaluation("train")) for source in kept)
    assert torch.equal(shards["pixels"], table["pixels"])
    assert torch.equal(folder["pixels"], table["pixels"][by_class])
    folder, shards, table = (everything(source.evaluation()) for source in kept)
    assert torch.equal(folder["pixels"], table["pixels"])
    assert torch.equal(shards["pixels"], table["pixels"])


@pytest.mark.parametrize("kind", KINDS)
def test_batches_depend_neither_on_the_number_of_processes_nor_on_where_a_run_began(write, kind):
    path = write(kind)
    damage(path, kind)
    with Batches(load_images(path, size=16, seed=1), 4) as alone:
        whole = [alone[step] for step in range(7)]
    for rank in (0, 1):
        with Batches(load_images(path, size=16, seed=1), 4, process=rank, processes=2) as part:
            for step in (2, 3, 6):  # as after a resume, and over the end of an epoch
                half = slice(2 * rank, 2 * rank + 2)
                assert torch.equal(part[step]["pixels"], whole[step]["pixels"][half])
                assert torch.equal(part[step]["labels"], whole[step]["labels"][half])


def damage(path, kind):
    """Make image number 4 (of the second class) unreadable though it is there."""
    if kind == "folder":
        (path / "bee" / "04.png").write_bytes(encoded(picture(1, 4))[:200])
    elif kind == "shards":
        given = members(range(0, 5))
        given[8] = (given[8][0], given[8][1][:200])
        write_tar(path / "data-000.tar", given)
    else:
        given = rows(range(15))
        given["image"][4]["bytes"] = given["image"][4]["bytes"][:200]
        shutil.rmtree(path)
        dataset(given).save_to_disk(path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("folder", "bee/04.png"), ("shards", "data-000.tar: 0004.png"), ("dataset", "rows[4] (4.png)")],
)
def test_a_damaged_image_is_named_with_the_reason_and_another_stands_in(write, kind, name):
    path = write(kind)
    damage(path, kind)
    source = load_images(path, size=16)
    batch = everything(source)
    assert source.damage == {name: "image file is truncated"}
    assert batch["labels"].tolist() == tones(source, batch)
    assert len(batch["pixels"]) == 12
    assert "1 unreadable file skipped" in source.summary


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_are_all_damaged_are_refused_when_they_are_looked_for(tmp_path, kind):
    path = tmp_path / kind
    broken = [encoded(picture(0, n))[:200] for n in range(6)]
    if kind == "folder":
        path.mkdir()
        for n, content in enumerate(broken):
            (path / f"{n}.png").write_bytes(content)
    elif kind == "shards":
        write_tar(path / "a.tar", [(f"{n}.png", content) for n, content in enumerate(broken)])
    else:
        cells = [{"bytes": content, "path": None} for content in broken]
        dataset({"image": cells, "label": [0] * 6}).save_to_disk(path)
    with pytest.raises(
        BadData, match=r"None of the 6 images in .* can be read: .* \(image file is truncated"
    ):
        load_images(path, size=16)


def test_where_all_that_would_be_held_out_is_damaged_others_are_held_out(tmp_path):
    write_folder(tmp_path / "pets")
    for name in ("ape/12.png", "bee/13.png", "cow/14.png"):
        cut_short(tmp_path / "pets" / name)
    source = load_images(tmp_path / "pets", size=16)
    assert len(source.damage) == 3
    assert (len(source), len(source.evaluation())) == (11, 1)
    held_out = everything(source.evaluation())["pixels"][0]
    assert not (everything(source.evaluation("train"))["pixels"] == held_out).flatten(1).all(1).any()


# -- splits -----------------------------------------------------------------------------------------------------------


def test_folders_named_as_splits_are_splits_and_those_below_are_labels(tmp_path):
    for split, count in (("train", 9), ("val", 3), ("test", 6)):
        write_folder(tmp_path / "pets" / split, count)
    source = load_images(tmp_path / "pets", size=16)
    assert (len(source), len(source.evaluation())) == (9, 3)
    assert source.classes == CLASSES
    assert "trained on 'train', held out 'val', 'test' left alone" in source.summary


def test_a_lone_train_folder_is_no_label(tmp_path):
    write_folder(tmp_path / "pets" / "train", 15)
    source = load_images(tmp_path / "pets", size=16)
    assert source.classes == CLASSES
    assert (len(source), len(source.evaluation())) == (12, 3)


def test_classes_are_not_taken_for_splits(tmp_path):
    for name in ("train", "car"):
        write_folder(tmp_path / "vehicles" / name, 6)
    assert load_images(tmp_path / "vehicles", size=16).classes == ("car", "train")


@pytest.mark.parametrize("layout", ["names", "folders"])
def test_shards_named_as_splits_are_splits(tmp_path, layout):
    for split, first in (("train", 0), ("test", 9)):
        name = f"{split}-000.tar" if layout == "names" else f"{split}/000.tar"
        write_tar(tmp_path / name, members(range(first, first + (9 if split == "train" else 3))))
    source = load_images(tmp_path, size=16)
    assert (len(source), len(source.evaluation())) == (9, 3)
    assert "held out 'test'" in source.summary


def test_a_dataset_dict_has_splits(tmp_path, datasets):
    parts = {"train": range(9), "validation": range(9, 12), "test": range(12, 15)}
    whole = datasets.DatasetDict({name: dataset(rows(numbers)) for name, numbers in parts.items()})
    whole.save_to_disk(tmp_path / "saved")
    source = load_images(tmp_path / "saved", size=16)
    assert (len(source), len(source.evaluation())) == (9, 3)
    assert "trained on 'train', held out 'validation', 'test' left alone" in source.summary
    for part in (source, source.evaluation()):
        batch = everything(part)
        assert batch["labels"].tolist() == tones(part, batch)


def test_a_dataset_dict_of_one_split_is_parted_here(tmp_path, datasets):
    datasets.DatasetDict({"train": dataset(rows(range(15)))}).save_to_disk(tmp_path / "saved")
    source = load_images(tmp_path / "saved", size=16)
    assert (len(source), len(source.evaluation())) == (12, 3)


def test_splits_that_do_not_say_what_they_are_for_are_refused(tmp_path, datasets):
    parts = {name: dataset(rows(range(3))) for name in ("north", "south")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        BadData, match="has the splits 'north', 'south'; two of them must be named 'train' and"
    ):
        load_images(tmp_path / "saved", size=16)


def test_a_split_of_damaged_images_only_is_refused_before_anything_is_trained(tmp_path):
    for split in ("train", "val"):
        write_folder(tmp_path / split, 3)
    for path in (tmp_path / "val").rglob("*.png"):
        cut_short(path)
    with pytest.raises(BadData, match=r"A split of .* \(trained on 'train', held out 'val'\) has no image"):
        load_images(tmp_path, size=16)


# -- tar shards -------------------------------------------------------------------------------------------------------


def test_a_pattern_and_a_single_shard_are_read(tmp_path):
    write_shards(tmp_path / "shards")
    two = load_images(f"{tmp_path}/shards/data-{{000..001}}.tar", size=16)
    assert len(two) + len(two.evaluation()) == 10
    one = load_images(tmp_path / "shards" / "data-002.tar", size=16)
    assert len(one) + len(one.evaluation()) == 5
    assert "WebDataset, 1 tar shard)" in one.summary


def test_labels_may_stand_in_json_or_be_words(tmp_path):
    write_tar(tmp_path / "json.tar", members(range(10), "json"))
    source = load_images(tmp_path / "json.tar", size=16)
    assert everything(source)["labels"].tolist() == tones(source, everything(source))
    words = [
        (name, CLASSES[int(content)].encode() if name.endswith(".cls") else content)
        for name, content in members(range(10))
    ]
    write_tar(tmp_path / "words.tar", words)
    assert load_images(tmp_path / "words.tar", size=16).classes == CLASSES


def test_many_classes_are_in_the_order_of_their_numbers(tmp_path):
    given = [
        member
        for n in range(12)
        for member in ((f"{n}.png", encoded(picture(0, n))), (f"{n}.cls", str(n).encode()))
    ]
    write_tar(tmp_path / "a.tar", given)
    assert load_images(tmp_path / "a.tar", size=16).classes == tuple(map(str, range(12)))


def test_a_sample_without_a_label_takes_all_labels_away_and_that_is_said(tmp_path):
    write_tar(tmp_path / "a.tar", [one for one in members(range(10)) if one[0] != "0003.cls"])
    source = load_images(tmp_path / "a.tar", size=16)
    assert not source.labelled
    assert "no labels, as 1 of 10 samples have none" in source.summary


def test_samples_are_grouped_as_webdataset_groups_them(tmp_path):
    """Extensions begin at the first dot of the last part; members that describe the shard are no samples."""
    image = encoded(picture(1, 0))
    given = [
        ("__meta__/info.json", b"{}"),
        ("a/1.left.png", image),
        ("a/1.txt", b"words"),
        ("a/1.cls", b"7"),
        ("b/1.PNG", image),
        ("b/1.cls", b"8"),
    ]
    write_tar(tmp_path / "a.tar", given)
    webdataset = pytest.importorskip("webdataset")
    theirs = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False, empty_check=False))
    source = load_images(tmp_path / "a.tar", size=16)
    assert len(theirs) == len(source) + len(source.evaluation()) == 2
    assert source.classes == ("7", "8")


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.95])
def test_a_shard_that_breaks_off_is_named_and_its_whole_samples_are_used(tmp_path, share):
    write_shards(tmp_path / "shards")
    path = tmp_path / "shards" / "data-001.tar"
    with tarfile.open(path) as tar:
        ends = [member.offset_data + member.size for member in tar]
    path.write_bytes(path.read_bytes()[: int(share * ends[-1])])
    whole = sum(end <= path.stat().st_size for end in ends)
    source = load_images(tmp_path / "shards", size=16)
    found = len(source) + len(source.evaluation()) - 10
    assert found == max((whole + 1) // 2 - 1, 0)  # what came last may lack something, its label say
    assert source.damage == {"data-001.tar": f"it breaks off; {found} samples before that are used"}
    batch = everything(source)
    assert batch["labels"].tolist() == tones(source, batch)


def test_a_shard_that_breaks_off_between_two_members_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", members(range(10)))
    with tarfile.open(path) as tar:
        end = tar.getmembers()[12].offset
    path.write_bytes(path.read_bytes()[:end])
    assert load_images(path, size=16).damage == {"a.tar": "it breaks off; 5 samples before that are used"}


def test_a_shard_with_a_damaged_header_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", members(range(10)))
    with tarfile.open(path) as tar:
        place = tar.getmembers()[12].offset
    content = bytearray(path.read_bytes())
    content[place : place + 100] = b"\xff" * 100
    path.write_bytes(content)
    said = load_images(path, size=16).damage["a.tar"]
    assert said == f"byte {place} is no header of a member; 5 samples before that are used"


def test_a_file_that_is_no_shard_is_named_and_the_others_are_read(tmp_path):
    write_shards(tmp_path / "shards", 2)
    (tmp_path / "shards" / "data-009.tar").write_text("no archive")
    (tmp_path / "shards" / "data-010.tar").write_bytes(b"")
    source = load_images(tmp_path / "shards", size=16)
    assert len(source) + len(source.evaluation()) == 10
    assert set(source.damage) == {"data-009.tar", "data-010.tar"}
    assert all("it is no tar file" in said for said in source.damage.values())


def test_shards_without_images_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.txt", b"words"), ("1.cls", b"1")])
    with pytest.raises(BadData, match=r"The tar shards of .* \(1\) have no sample with an image \(jpg, "):
        load_images(tmp_path, size=16)


def test_a_name_that_a_sample_has_twice_is_named(tmp_path):
    given = members(range(5))
    write_tar(tmp_path / "a.tar", [*given[:2], ("0000.png", given[0][1]), *given[2:]])
    source = load_images(tmp_path / "a.tar", size=16)
    assert source.damage == {"a.tar: 0000.png": "the shard has this name twice"}
    assert len(source) + len(source.evaluation()) == 5


def test_shards_of_one_name_in_two_folders_are_told_apart(tmp_path):
    for folder in ("north", "south"):
        cut_short(write_tar(tmp_path / folder / "a.tar", members(range(6))))
    assert set(load_images(tmp_path, size=16).damage) == {"north/a.tar", "south/a.tar"}


# -- saved datasets ---------------------------------------------------------------------------------------------------


def test_any_column_of_images_and_any_class_label_will_do(tmp_path, datasets):
    made = dataset(rows(range(15))).rename_columns({"image": "photo", "label": "kind"})
    made.add_column("number", list(range(15))).save_to_disk(tmp_path / "saved")
    source = load_images(tmp_path / "saved", size=16)
    assert "column 'photo'" in source.summary
    assert source.label == "the column 'kind'"
    assert everything(source)["labels"].tolist() == tones(source, everything(source))


def test_a_dataset_without_labels_has_none(tmp_path, datasets):
    dataset(rows(range(10))).remove_columns("label").save_to_disk(tmp_path / "saved")
    source = load_images(tmp_path / "saved", size=16)
    assert not source.labelled
    assert "no labels" in source.summary


def test_rows_that_have_no_label_take_all_labels_away_and_that_is_said(tmp_path, datasets):
    given = rows(range(10))
    given["label"] = [-1] * 10
    dataset(given).save_to_disk(tmp_path / "saved")
    source = load_images(tmp_path / "saved", size=16)
    assert "no labels, as 10 of 10 rows have none in 'label'" in source.summary


def test_images_may_lie_beside_the_dataset_and_rows_may_be_empty(tmp_path, datasets):
    """As older versions of the package saved them; the present one takes the files' content in."""
    write_folder(tmp_path / "files", 1)
    file = str(tmp_path / "files" / "ape" / "00.png")
    made = dataset({"image": [file, None], "label": [0, 0]}).remove_columns("label")
    kept = Rows({"train": made.cast_column("image", datasets.Image(decode=False))}, "image")
    assert np.array_equal(np.asarray(decode(kept.open(0), 3, 99)), np.asarray(picture(0, 0)))
    assert [kept.name(index) for index in range(2)] == ["train[0] (00.png)", "train[1]"]
    with pytest.raises(ValueError, match="the row is empty"):
        kept.open(1)


def test_selected_and_shuffled_rows_are_those_that_were_saved(tmp_path, datasets):
    dataset(rows(range(30))).shuffle(seed=3).select(range(15)).save_to_disk(tmp_path / "saved")
    source = load_images(tmp_path / "saved", size=16)
    for part in (source, source.evaluation()):
        batch = everything(part)
        assert batch["labels"].tolist() == tones(part, batch)


def test_a_dataset_without_images_is_refused_with_its_columns(tmp_path, datasets):
    datasets.Dataset.from_dict({"text": ["a"], "number": [1]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        BadData, match=r"no column of images; its columns are text \(string\), number \(int64\)"
    ):
        load_images(tmp_path / "saved", size=16)


def test_a_dataset_whose_table_is_damaged_is_refused_in_one_sentence(tmp_path, datasets):
    dataset(rows(range(10))).save_to_disk(tmp_path / "saved")
    cut_short(next((tmp_path / "saved").glob("*.arrow")), 0.3)
    with pytest.raises(BadData, match=r"The saved dataset .*saved cannot be read: "):
        load_images(tmp_path / "saved", size=16)


# -- what a path may be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "package", "module"),
    [("shards", "webdataset", "webdataset.tariterators"), ("dataset", "datasets", "datasets")],
)
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    write, monkeypatch, kind, package, module
):
    path = write(kind)
    for name in (package, module):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadData, match=rf"pip install 'maskwright\[{package}\]'"):
        load_images(path, size=16)


def test_what_is_no_data_is_refused_with_what_was_found_and_what_is_legal(tmp_path):
    legal = r"Give a folder of images, WebDataset tar shards .* save_to_disk wrote, 'photographs'"
    (tmp_path / "tables").mkdir()
    for name in ("a.parquet", "b.parquet", "c.csv", ".hidden.png"):
        (tmp_path / "tables" / name).write_text("x")
    with pytest.raises(BadData, match=rf"no \.tar shards: it holds 2 \.parquet, 1 \.csv\. {legal}"):
        load_images(tmp_path / "tables", size=16)
    for name, said in (
        ("a.tar.gz", "are compressed"),
        ("words.txt", "no kind of file"),
        ("a.png", "one image"),
    ):
        (tmp_path / name).write_text("x")
        with pytest.raises(BadData, match=rf"{said}.*{legal}"):
            load_images(tmp_path / name, size=16)
    with pytest.raises(BadData, match=r"2 of 2 shards are not there, such as .*x-0\.tar"):
        load_images(f"{tmp_path}/x-{{0..1}}.tar", size=16)
    with pytest.raises(BadData, match=r"The tar shard .*none\.tar does not exist"):
        load_images(tmp_path / "none.tar", size=16)


def test_images_count_before_shards_that_lie_among_them(tmp_path):
    write_folder(tmp_path, 6)
    write_tar(tmp_path / "backup.tar", members(range(3)))
    assert "a folder of images" in load_images(tmp_path, size=16).summary


def test_hidden_files_are_left_alone(tmp_path):
    write_folder(tmp_path, 6)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.png").write_text("x")
    (tmp_path / "ape" / "._00.png").write_text("x")
    assert load_images(tmp_path, size=16).damage == {}
