"""Runs side by side: what is grouped, what is said of what cannot be compared, and a page that needs nothing else."""

from __future__ import annotations

import json
import math

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_report import Page, assert_is_sound, run_folder

from maskwright.cli import cli
from maskwright.errors import OutputError, UsageError
from maskwright.jobs import compare, pictures
from maskwright.mask import Mask, save_masks

SETTINGS = """
[run]
job = "pretrain"
seed = {seed}
steps = {steps}
batch_size = 8
[strategy]
name = "{strategy}"
ratio = {ratio}
[objective]
name = "{objective}"
[data]
source = "{data}"
[model]
width = 16
"""


def pretrained(path, *, finished=True, linear=0.9, reconstructs=True, **changes):
    given = {
        "seed": 0,
        "steps": 20,
        "strategy": "random",
        "ratio": 0.75,
        "objective": "mae",
        "data": "digits",
    }
    given |= changes
    generator = torch.Generator().manual_seed(given["seed"])
    tensors = {
        "originals": torch.rand(6, 3, 8, 8, generator=generator),
        "masks": torch.rand(6, 4, 4, generator=generator) < 0.3,
        "chosen": torch.ones(6, 2, dtype=torch.int64),
        "similarity": torch.rand(6, 4, 4, generator=generator) * 2 - 1,
        "components": torch.rand(6, 3, 4, 4, generator=generator),
    }
    if reconstructs:
        tensors["reconstructions"] = torch.rand(6, 3, 8, 8, generator=generator)
    summary = {
        "job": "pretrain",
        "finished": True,
        "linear_probe": linear,
        "linear_probe_before": 0.8,
        "knn_probe": 0.5,
        "knn_probe_before": 0.45,
        "chance": 0.1,
        "held_out_loss": 0.4,
        "seconds_per_step": 0.25,
        "flops_per_step": 2_220_000_000,
        "flops_without_gradient": 0,
        "peak_memory": 605_000_000,
        "seconds": 12.0,
    }
    metrics = [{"step": s, "seconds": 2 + s / 4, "loss": 2 / s} for s in range(1, 21 if finished else 8)]
    return run_folder(
        path,
        settings=SETTINGS.format(**given),
        summary=summary if finished else None,
        metrics=metrics,
        **(tensors if finished else {}),
    )


@pytest.fixture(autouse=True)
def quick_charts(monkeypatch):
    """Charts cost most of the time: what would be drawn is noted."""
    drawn = []
    small = pictures.png(Image.new("RGB", (8, 6)))
    monkeypatch.setattr(
        pictures, "compared_curves", lambda groups, **how: drawn.append((groups, how)) or small
    )
    monkeypatch.setattr(
        pictures, "dots", lambda names, values, **how: drawn.append((names, values, how)) or small
    )
    return drawn


def page_of(*folders):
    page = Page(compare.render(compare.compare(list(folders))))
    assert_is_sound(page)
    return page


def invoke(*arguments):
    result = CliRunner().invoke(cli, ["compare", *map(str, arguments)], prog_name="maskwright")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


# -- groups ------------------------------------------------------------------------------------------------------


def test_seeds_of_the_same_settings_are_one_group_with_mean_and_spread(tmp_path):
    folders = [pretrained(tmp_path / f"r{s}", seed=s, linear=0.9 + s / 100) for s in (2, 0, 1)]
    told = compare.compare([*folders, pretrained(tmp_path / "other", ratio=0.5)])
    assert [group.label for group in told.groups] == ["random × mae, ratio 0.75", "random × mae, ratio 0.5"]
    group = told.as_json()["groups"][0]
    assert [one["seed"] for one in group["runs"]] == [0, 1, 2]
    assert group["numbers"]["linear_probe"]["mean"] == pytest.approx(0.91)
    assert group["numbers"]["linear_probe"]["spread"] == pytest.approx(0.01)
    assert group["numbers"]["linear_probe"]["values"] == pytest.approx([0.9, 0.91, 0.92])
    assert told.differ == {"pretrain": ("strategy.ratio",)}
    assert told.notices == ()


def test_a_folder_named_twice_counts_once(tmp_path):
    folder = pretrained(tmp_path / "r")
    assert len(compare.compare([folder, folder / ".." / "r"]).groups[0].runs) == 1


def test_the_same_seed_twice_is_said(tmp_path):
    told = compare.compare([pretrained(tmp_path / "a"), pretrained(tmp_path / "b")])
    assert told.notices == ("random × mae: seed 0 is there 2 times, so that its spread says too little.",)


def test_labels_say_what_sets_groups_of_one_title_apart_and_no_more(tmp_path):
    told = compare.compare(
        [
            pretrained(tmp_path / "a", steps=10),
            pretrained(tmp_path / "b"),
            pretrained(tmp_path / "c", objective="hpm"),
        ]
    )
    assert [group.label for group in told.groups] == [
        "random × mae, steps 10",
        "random × mae, steps 20",
        "random × hpm",
    ]


# -- what cannot be compared -------------------------------------------------------------------------------------


def test_labels_begin_with_what_tells_most(tmp_path):
    told = compare.compare(
        [pretrained(tmp_path / "a"), pretrained(tmp_path / "b", steps=40, ratio=0.5, data="photographs")]
    )
    assert told.groups[1].label == "random × mae, ratio 0.5, source photographs, steps 40"


def test_other_data_and_another_budget_are_said(tmp_path):
    told = compare.compare(
        [pretrained(tmp_path / "a"), pretrained(tmp_path / "b", data="photographs", steps=40, seed=1)]
    )
    notices = " ".join(told.notices)
    assert "Different data (digits; photographs): losses and probes can be compared only" in notices
    assert "Not the same budget: 20 and 40 steps." in notices
    assert "One seed of each pretrain run: small differences may be chance." in notices


def test_an_unfinished_run_counts_with_its_curve_only(tmp_path, quick_charts):
    folders = [pretrained(tmp_path / "a"), pretrained(tmp_path / "b", objective="hpm", finished=False)]
    told = compare.compare(folders)
    assert f"{folders[1]} is unfinished (after step 7 of 20): only its curves count." in told.notices
    assert told.as_json()["groups"][1]["numbers"] == {}
    page = page_of(*folders)
    assert "unfinished" in page.text
    curves = [list(groups) for groups, how in (one for one in quick_charts if len(one) == 2)]
    assert ["2  random × hpm"] in curves
    assert told.jobs == ["pretrain"], "what kind it is of, its run.toml says"


def test_runs_of_different_kinds_have_tables_of_their_own(tmp_path):
    pruned = run_folder(
        tmp_path / "p",
        settings='[run]\njob = "prune"\n[pruner]\nname = "wanda"\n[budget]\npattern = "2:4"\n',
        summary={
            "job": "prune",
            "finished": True,
            "quality": {"measure": "perplexity", "before": 20.0, "after": 31.5},
        },
    )
    save_masks(pruned / "masks.safetensors", {"layer.weight": Mask(torch.rand(8, 8) < 0.5)})
    page = page_of(pretrained(tmp_path / "a"), pruned)
    assert "runs of different kinds (pretrain, prune): each kind has a table of its own" in page.text
    assert "pretrain: results" in page.text
    assert "prune: results" in page.text
    assert "perplexity, pruned" in page.text
    assert "31.5" in page.text
    assert any("Mask of layer.weight" in image["alt"] for image in page.images)


def test_a_folder_that_is_no_run_is_refused_in_one_sentence(tmp_path):
    pretrained(tmp_path / "runs" / "one")
    for folder, said in (
        (tmp_path / "none", "it is no folder"),
        (tmp_path / "runs", r"no run.toml; the folders in it are runs, such as .*one: name those"),
    ):
        with pytest.raises(UsageError, match=said):
            compare.compare([folder])
    (tmp_path / "empty").mkdir()
    result = invoke(tmp_path / "runs" / "one", tmp_path / "empty")
    assert result.exit_code == 2
    assert "is no run, for it has no run.toml; name folders that" in result.output
    assert len(result.stderr.splitlines()) == 1


def test_a_damaged_file_is_said_and_the_rest_is_compared(tmp_path):
    folder = pretrained(tmp_path / "a")
    (folder / "pictures.safetensors").write_bytes(b"nonsense")
    page = page_of(folder, pretrained(tmp_path / "b", objective="hpm"))
    assert "pictures.safetensors could not be read" in page.text
    assert "90 %" in page.text


def test_a_run_whose_settings_cannot_be_read_is_a_group_of_its_own(tmp_path):
    for name in "ab":
        (pretrained(tmp_path / name) / "run.toml").write_text("[run")
    told = compare.compare([tmp_path / "a", tmp_path / "b"])
    assert [group.label for group in told.groups] == ["a", "b"]
    page_of(tmp_path / "a", tmp_path / "b")


# -- the page ----------------------------------------------------------------------------------------------------


def test_the_page_has_numbers_with_their_trivial_levels(tmp_path, quick_charts):
    page = page_of(
        *(pretrained(tmp_path / f"m{s}", seed=s, linear=0.9 + s / 100) for s in (0, 1)),
        pretrained(tmp_path / "h", objective="hpm", strategy="hard-patches", linear=0.7),
    )
    for said in (
        *(
            "3 runs in 2 groups compared",
            "90.5 %",
            "± 0.7",
            "70 %",
            "2 seeds",
            "250 ms",
            "2.22 GFLOPs",
            "605 MB",
        ),
        *("0.4 from 2", "encoder before training 80 % 45 %", "always the commonest label 10 % 10 %"),
        *("strategy.name", "hard-patches", "Mean ± standard deviation"),
    ):
        assert said in page.text
    names, values, how = next(one for one in quick_charts if len(one) == 3)
    assert names == ["1", "2"]
    assert values == [pytest.approx([0.9, 0.91]), [0.7]]
    assert how["references"] == {
        "encoder before training": pytest.approx(0.8),
        "always the commonest label": pytest.approx(0.1),
    }
    assert page.html.count('class="best"') == 1, (
        "one leads in the linear probe, and they are level in the other"
    )


def test_the_best_is_marked_among_what_can_be_compared_only(tmp_path):
    told = compare.compare(
        [
            pretrained(tmp_path / "a", linear=0.9),
            pretrained(tmp_path / "b", objective="hpm", linear=0.7),
            pretrained(tmp_path / "c", data="photographs", linear=0.95),
        ]
    )
    linear, loss = (
        next(one for one in compare.COLUMNS["pretrain"] if one.key == key)
        for key in ("linear_probe", "held_out_loss")
    )
    assert compare._best(linear, told.groups) == {1}
    assert compare._best(loss, told.groups) == set(), "losses of two objectives are not compared"


def test_curves_go_over_steps_and_over_seconds_from_the_first_step(tmp_path, quick_charts):
    page_of(
        pretrained(tmp_path / "a"), pretrained(tmp_path / "b", seed=1), pretrained(tmp_path / "c", ratio=0.5)
    )
    steps, seconds = (one for one in quick_charts if len(one) == 2)
    assert steps[1]["x_label"] == "step"
    assert [len(runs) for runs in steps[0].values()] == [2, 1]
    assert steps[1]["places"] == [0, 1]
    assert steps[0]["1  random × mae, ratio 0.75"][0][0][:3] == [1, 2, 3]
    assert seconds[0]["1  random × mae, ratio 0.75"][0][0][:3] == [0, 0.25, 0.5]


def test_objectives_have_charts_of_their_own(tmp_path, quick_charts):
    page = page_of(pretrained(tmp_path / "a"), pretrained(tmp_path / "b", objective="hpm"))
    assert "Loss of mae over steps" in page.text
    assert "Loss of hpm over seconds" in page.text


def test_maps_of_features_are_shown_as_soon_as_one_group_has_nothing_else(tmp_path):
    folders = [
        pretrained(tmp_path / "a"),
        pretrained(tmp_path / "b", objective="aligner", reconstructs=False),
    ]
    alone = [image["alt"] for image in page_of(folders[0]).images]
    both = [image["alt"] for image in page_of(*folders).images]
    assert not any("components" in alt for alt in alone)
    assert sum("main components" in alt for alt in both) == 2 * compare.IMAGES
    assert sum("hidden part predicted" in alt for alt in both) == compare.IMAGES


def test_texts_of_sample_runs_stand_side_by_side(tmp_path):
    folder = run_folder(
        tmp_path / "s",
        settings='[run]\njob = "sample"\n[sampler]\nname = "greedy"\n',
        summary={"job": "sample", "finished": True, "evaluations": 12},
    )
    (folder / "samples.jsonl").write_text(json.dumps({"text": "<b>words"}) + "\n")
    page = page_of(folder)
    assert "<b>words" in page.text
    assert "&lt;b&gt;words" in page.html


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_prints_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrained(tmp_path / "a")
    result = invoke("a", pretrained(tmp_path / "b", objective="hpm"))
    assert result.exit_code == 0
    assert "page  compare.html" in result.output
    assert (tmp_path / "compare.html").read_text().startswith("<!doctype html>")
    assert "2 random × hpm" in result.output
    assert "always the commonest label" in result.output


def test_json_is_the_tables_data_and_writes_a_page_only_when_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrained(tmp_path / "a")
    document = json.loads(invoke("a", "--json").stdout)
    assert document["schema"] == 1
    assert document["groups"][0]["numbers"]["flops_per_step"]["mean"] == 2_220_000_000
    assert not (tmp_path / "compare.html").exists()
    invoke("a", "--json", "--out", "deep/page.html")
    assert (tmp_path / "deep" / "page.html").exists()


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    told = compare.compare([pretrained(tmp_path / "a")])
    with pytest.raises(OutputError, match=r"The page .* cannot be written"):
        compare.write_comparison(told, tmp_path / "file" / "page.html")


# -- charts ----------------------------------------------------------------------------------------------------------


def test_charts_are_drawn(monkeypatch):
    monkeypatch.undo()
    figures = []
    real = pictures._rendered
    monkeypatch.setattr(pictures, "_rendered", lambda figure: figures.append(figure) or real(figure))
    line = (list(range(30)), [1 / (x + 1) for x in range(30)])
    short = (list(range(0, 20, 2)), [math.nan, *(2.0,) * 9])
    assert pictures.compared_curves({"a": [line, short], "b": [line]}, places=[3, 9])[:4] == b"\x89PNG"
    one, other = figures[0].axes[0].get_lines()
    # The mean of both, where both have numbers: from 2, the short one's first finite place, to 18.
    assert (one.get_xdata()[0], one.get_xdata()[-1]) == (2, 18)
    assert one.get_ydata()[0] == pytest.approx((1 / 3 + 2) / 2)
    assert one.get_color() == pictures.COLOURS[3]
    assert (other.get_color(), other.get_linestyle()) == (pictures.COLOURS[1], "--")
    assert pictures.dots(["1", "2"], [[0.5, 0.7], []], references={"chance": 0.1})[:4] == b"\x89PNG"
    means = [line for line in figures[1].axes[0].get_lines() if line.get_linestyle() == "-"]
    assert list(means[0].get_xdata()) == pytest.approx([0.6, 0.6])


def test_cosines_are_painted_from_orange_over_pale_to_blue():
    image = pictures.similarity_image(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), (1, 1), side=40)
    assert image.size == (40, 40)
    assert image.getpixel((10, 10)) == pictures.KEPT_CELL
    assert image.getpixel((30, 10)) == pictures.HIDDEN_CELL
    assert image.getpixel((10, 30)) == pictures.OPPOSITE_CELL
    assert image.getpixel((20, 20)) != image.getpixel((30, 30)), "the chosen place is framed"


def test_teachers_of_each_seed_are_one_setting(tmp_path):
    """A teacher that was trained with the run's own seed lies in a folder of that seed; another one is another setting."""
    own = [
        pretrained(tmp_path / f"own-{seed}", seed=seed, data=f"/teachers/seed-{seed}/model")
        for seed in (0, 1)
    ]
    assert len(compare.compare(own).groups) == 1
    other = pretrained(tmp_path / "other", seed=2, data="/teachers/seed-1/model")
    assert len(compare.compare([*own, other]).groups) == 2
