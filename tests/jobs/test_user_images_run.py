"""Pretraining on a user's own images, damaged ones among them: what is said, what is left, and that it can be killed."""

import json
import shutil
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from small_runs import lines, process, run
from test_several_processes import TORCHRUN

from maskwright.cli import cli
from maskwright.errors import BadData
from maskwright.jobs import pretrain as job
from maskwright.jobs.batches import Batches
from maskwright.jobs.skipped import Skipped
from maskwright.sources.pictures import Encoded
from user_images import (
    cut_short,
    dataset,
    encoded,
    members,
    picture,
    rows,
    write_folder,
    write_shards,
    write_tar,
)

SIZE = {"data__size": 8, "model__patch_size": 2}


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars():
    pytest.importorskip("datasets").disable_progress_bars()


def mixed(folder):
    """Images of all modes and of unequal sizes, and two that are none."""
    write_folder(folder, 15)
    for mode, name in (("RGBA", "ape/a.png"), ("LA", "ape/b.png"), ("P", "bee/a.gif"), ("1", "bee/b.png")):
        picture(1, 40, (31, 17)).convert(mode).save(folder / name)
    picture(2, 41, (9, 64)).convert("CMYK").save(folder / "cow" / "a.jpg")
    deep = np.linspace(0, 65535, 30 * 40).round().astype(np.uint16).reshape(30, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(deep).save(folder / "cow" / "b.png", exif=exif)
    cut_short(folder / "bee" / "04.png")
    (folder / "cow" / "letter.jpg").write_text("Dear reader")
    return folder


def test_a_folder_of_all_modes_with_damaged_images_is_trained_on_and_they_are_named(tmp_path):
    photos = mixed(tmp_path / "photos")
    given = ["model.width=16", "model.depth=1", "model.heads=2", "data.size=16", "objective.decoder_depth=1"]
    done = CliRunner().invoke(
        cli,
        [
            *("pretrain", "--data", str(photos), "--steps", "6", "--batch-size", "8"),
            *("--out", str(tmp_path / "run")),
            *(word for pair in given for word in ("--set", pair)),
        ],
    )
    assert done.exit_code == 0, done.output
    assert "(a folder of images): 18 images, 3 held out, 3 classes" in done.stderr
    last = done.stdout.splitlines()[-5:]
    assert last[:3] == [
        "unreadable, and skipped:",
        "  bee/04.png: image file is truncated",
        "  cow/letter.jpg: it is no image",
    ]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["skipped"] == 2
    assert [one["file"] for one in summary["skipped_files"]] == ["bee/04.png", "cow/letter.jpg"]
    assert summary["labels"] == "the sub-folder"
    assert 0 <= summary["waiting_for_data"] < 1
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("bee/04.png", "image file is truncated", "The label that the probes name: the sub-folder."):
        assert words in page
    assert all("waiting" not in line for line in map(json.dumps, lines(tmp_path / "run")))


def damaged(kind, path):
    """Fifteen images, number 4 and (in training) number 6 of which cannot be decoded."""
    contents = [encoded(picture(n % 3, n)) for n in range(15)]
    for n in (4, 6):
        contents[n] = contents[n][:200]
    if kind == "folder":
        write_folder(path)
        (path / "bee" / "04.png").write_bytes(contents[4])
        (path / "ape" / "06.png").write_bytes(contents[6])
    elif kind == "shards":
        whole = [
            (name, contents[int(name[:4])] if name.endswith("png") else content)
            for name, content in members(range(15))
        ]
        write_tar(path / "a-0.tar", whole[:16])
        write_tar(path / "a-1.tar", whole[16:])
    else:
        given = rows(range(15))
        for n in (4, 6):
            given["image"][n]["bytes"] = contents[n]
        dataset(given).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("kind", ["folder", "shards", "dataset"])
def test_a_killed_run_comes_to_the_same_numbers_and_names_all_that_it_skipped(tmp_path, monkeypatch, kind):
    given = {"data__source": damaged(kind, tmp_path / "data"), **SIZE}
    run(tmp_path / "whole", **given)
    real = job._step

    def killed(a_run, step, *rest):
        if step.index == 5:
            raise RuntimeError("killed")
        return real(a_run, step, *rest)

    monkeypatch.setattr(job, "_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "run", **given)
    monkeypatch.setattr(job, "_step", real)
    assert len(Skipped(tmp_path / "run").all()) == 2
    resumed = run(tmp_path / "run", resume=True, **given)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    told = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert resumed.summary["skipped_files"] == told["skipped_files"]
    assert len(told["skipped_files"]) == 2
    for name in ("held_out_loss", "linear_probe", "knn_probe"):
        assert resumed.summary[name] == told[name]


def test_names_outlive_the_process_that_found_them(tmp_path):
    first, second = Skipped(tmp_path), Skipped(tmp_path)
    assert first.all() == {}
    assert not first.path.exists()
    first.note({"b.png": "it breaks off"})
    second.note({"a.png": "it is no image", "b.png": "it breaks off"})
    first.note({"b.png": "it breaks off"})
    with first.path.open("a") as file:
        file.write('{"file": "c.p')  # a kill
    assert Skipped(tmp_path).all() == {"a.png": "it is no image", "b.png": "it breaks off"}
    assert len(first.path.read_text().splitlines()) == 4  # each wrote what it had not read when it began


def test_data_that_are_all_damaged_end_the_run_before_it_begins(tmp_path):
    write_folder(tmp_path / "photos", 6)
    for path in (tmp_path / "photos").rglob("*.png"):
        cut_short(path)
    given = ["pretrain", "--data", str(tmp_path / "photos"), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(cli, given)
    assert done.exit_code == 2
    assert "None of the 6 images in" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_whose_data_vanish_keeps_its_folder(tmp_path, monkeypatch):
    photos = write_folder(tmp_path / "photos")
    monkeypatch.setattr("maskwright.sources.pictures._CACHE_BYTES", 0)
    real = job._step

    def unplugged(a_run, step, *rest):
        if step.index == 3:
            shutil.rmtree(photos)
        return real(a_run, step, *rest)

    monkeypatch.setattr(job, "_step", unplugged)
    with pytest.raises(
        BadData, match=r"None of 12 images can be decoded any more, such as .*\(it is not there\)"
    ):
        run(tmp_path / "run", data__source=str(photos), run__steps=20, **SIZE)
    assert (tmp_path / "run" / "run.toml").exists()
    assert len(lines(tmp_path / "run")) >= 3
    write_folder(photos)
    monkeypatch.setattr(job, "_step", real)
    assert run(tmp_path / "run", resume=True, data__source=str(photos), run__steps=20, **SIZE).summary[
        "finished"
    ]


class Paced:
    """A source that takes its time."""

    columns = frozenset({"pixels"})

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 1000

    def order(self, epoch):
        return torch.arange(1000)

    def batch(self, indices, epoch=0):
        time.sleep(self.seconds)
        return {"pixels": torch.zeros(len(indices), 3, 8, 8)}


def test_waiting_is_what_a_step_cannot_hide():
    """Batches of 20 ms behind steps of 30 ms are waited for once, in front of the first; behind no steps, always."""
    with Batches(Paced(0.02), 2) as hidden:
        for step in range(20):
            hidden[step]
            time.sleep(0.03)
        share = hidden.waiting
    with Batches(Paced(0.02), 2) as bare:
        for step in range(10):
            bare[step]
        assert bare.waiting > 0.9
    assert share < 0.3


def test_a_batch_is_decoded_while_the_step_before_is_at_work(tmp_path):
    """All of an epoch's images are decoded by two steps ahead, in another thread than the one that asks."""
    import threading

    from maskwright.sources.images import load_images

    threads = set()
    source = load_images(write_folder(tmp_path), size=8)
    real = source.batch
    source.batch = lambda *given: threads.add(threading.current_thread().name) or real(*given)
    with Batches(source, 4) as batches:
        batches[0]
        deadline = time.monotonic() + 20
        while not all(batches._coming[step].done() for step in (1, 2)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(batches._coming[step].done() for step in (1, 2))
    assert threading.current_thread().name not in threads


def test_the_first_readable_is_found_and_kept(tmp_path, monkeypatch):
    calls = []
    real = Encoded._nearest_readable
    monkeypatch.setattr(
        Encoded, "_nearest_readable", lambda self, index: calls.append(index) or real(self, index)
    )
    from maskwright.sources.images import load_images

    load_images(write_shards(tmp_path), size=8)
    assert calls == [0, 0]  # one of each part, not the whole of the data


@pytest.mark.slow
def test_what_another_process_skipped_is_named_too(tmp_path):
    """Two processes: each sees half of every batch, and the summary is the first one's."""
    path = damaged("folder", tmp_path / "data")
    started = process(
        tmp_path / "two", launcher=TORCHRUN, data__source=path, run__steps=3, run__batch_size=4, **SIZE
    )
    _, said = started.communicate(timeout=240)
    assert started.returncode == 0, said
    run(tmp_path / "one", data__source=path, run__steps=3, run__batch_size=4, **SIZE)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    told = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert told[0]["skipped_files"] == told[1]["skipped_files"]
