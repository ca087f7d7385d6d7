"""Report pages: whole, self-contained and escaped, for every job, from folders that are complete, cut short or damaged."""

import base64
import io
import json
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from maskwright.errors import OutputError
from maskwright.jobs import pictures, report
from maskwright.mask import Mask, save_masks

EVIL = "<script>alert('x')</script> & \"more\""
VOID = {"meta", "img", "source", "br", "link", "hr"}


class Page(HTMLParser):
    """What a page says, what it shows, and whether every element is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.html = html
        self.open = []
        self.unbalanced = []
        self.images = []
        self.ids = []
        self.references = []
        self.tags = []
        self.parts = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.references += [given[key] for key in ("src", "srcset", "href", "action") if key in given]
        if tag == "img":
            self.images.append(given)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.parts.append(data)

    @property
    def text(self):
        """What is read, with single spaces."""
        return " ".join(" ".join(self.parts).split())


def page_of(folder):
    target = report.write_report(folder)
    assert target == folder / "report.html"
    html = target.read_text("utf-8")
    page = Page(html)
    assert_is_sound(page)
    return page


def assert_is_sound(page):
    """Valid in the ways that a parser can tell, and needing nothing from elsewhere."""
    assert page.html.startswith("<!doctype html>")
    assert page.unbalanced == []
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags
    assert "http://" not in page.html
    assert "https://" not in page.html
    assert "@import" not in page.html
    assert "url(" not in page.html
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page.html
    for reference in page.references:
        assert reference.startswith("data:image/png;base64,")
    for image in page.images:
        assert image["alt"].strip()
        assert int(image["width"]) > 0
        assert int(image["height"]) > 0
        opened = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2], validate=True)))
        opened.verify()


@pytest.fixture(autouse=True)
def quick_charts(request, monkeypatch):
    """Charts cost most of the time; where they are not looked at, a small image stands for them."""
    drawn = []
    if "real_charts" not in request.fixturenames:
        small = pictures.png(Image.new("RGB", (8, 6)))
        monkeypatch.setattr(pictures, "curve", lambda series, **kind: drawn.append((series, kind)) or small)
        monkeypatch.setattr(
            pictures, "bars", lambda names, values, **kind: drawn.append((names, values, kind)) or small
        )
    return drawn


@pytest.fixture
def real_charts():
    """Draws charts as they are."""


def run_folder(path, *, settings="", summary=None, metrics=(), **tensors):
    path.mkdir(parents=True, exist_ok=True)
    if settings:
        (path / "run.toml").write_text(settings, "utf-8")
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary), "utf-8")
    if metrics:
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics), "utf-8")
    if tensors:
        save_file(tensors, path / "pictures.safetensors")
    return path


PRETRAIN = """
[run]
job = "pretrain"
seed = 3
steps = 40
betas = [0.9, 0.95]
[strategy]
name = "hard-patches"
ratio = 0.75
[objective]
name = "hpm"
"""


def pretrained(path, *, count=10, **changes):
    generator = torch.Generator().manual_seed(0)
    keep = torch.zeros(count, 4, 4, dtype=torch.bool)
    keep[:, 0] = True
    tensors = {
        "originals": torch.rand(count, 3, 32, 32, generator=generator),
        "reconstructions": torch.rand(count, 3, 32, 32, generator=generator),
        "masks": keep,
    }
    summary = {
        "job": "pretrain",
        "finished": True,
        "final_loss": 0.51234,
        "held_out_loss": 0.6,
        "linear_probe": 0.913,
        "knn_probe": 0.8,
        "seconds": 125.0,
        "steps": 40,
    }
    metrics = [
        {
            "step": s,
            "loss": 2 - s / 40,
            "part.pixels": 1.5 - s / 40,
            "part.order": 0.5,
            "masked": 0.75,
            "lr": 1e-3,
        }
        for s in range(40)
    ]
    given = {"settings": PRETRAIN, "summary": summary, "metrics": metrics, **tensors}
    return run_folder(path, **{**given, **changes})


# -- pretrain --------------------------------------------------------------------------------------------------------------


def test_a_pretraining_shows_numbers_pictures_and_curves(tmp_path, quick_charts):
    page = page_of(pretrained(tmp_path / "run-7"))
    for said in ("hard-patches × hpm", "run-7", "0.5123", "91.3 %", "80 %", "75 %", "2 min 05 s", "40 steps"):
        assert said in page.text
    assert "Unfinished" not in page.text
    assert "Damaged" not in page.text
    assert "maskwright pretrain run.toml" in page.text
    rows = [image["alt"] for image in page.images if image["alt"].startswith("Held-out image")]
    assert len(rows) == 3 * report.IMAGES_SHOWN
    assert rows[:3] == [
        "Held-out image 1, original",
        "Held-out image 1 as the model saw it: 75\N{NO-BREAK SPACE}% hidden",
        "Held-out image 1, hidden part predicted",
    ]
    drawn = [set(series) for series, _ in quick_charts]
    assert {"loss"} in drawn
    assert {"part pixels", "part order"} in drawn
    assert {"lr"} in drawn
    assert not any("masked" in names for names in drawn), (
        "a share that never changes is a number, not a chart"
    )


def test_pictures_show_the_truth_where_it_was_visible(tmp_path):
    folder = pretrained(tmp_path, count=1)
    page = page_of(folder)
    original, seen, mended = (
        Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))).convert("RGB")
        for image in page.images[:3]
    )
    hidden = tuple(round(255 * value) for value in pictures.HIDDEN)
    for x in range(0, 32, 5):
        assert original.getpixel((x, 3)) == seen.getpixel((x, 3)) == mended.getpixel((x, 3))
        assert seen.getpixel((x, 20)) == hidden
        assert mended.getpixel((x, 20)) != original.getpixel((x, 20))


def test_without_reconstructions_there_are_two_pictures_an_image(tmp_path):
    folder = pretrained(tmp_path, count=2)
    save_file(
        {"originals": torch.rand(2, 1, 16, 16), "masks": torch.ones(2, 4, 4, dtype=torch.bool)},
        folder / "pictures.safetensors",
    )
    page = page_of(folder)
    assert sum(image["alt"].startswith("Held-out") for image in page.images) == 4
    assert "hidden part predicted" not in page.html
    assert 'class="pictures" style="--rows: 2"' in page.html


@pytest.mark.parametrize(
    "tensors",
    [
        {"masks": torch.ones(2, 4, 4, dtype=torch.bool)},
        {"originals": torch.rand(2, 3, 8, 8), "masks": torch.ones(2, 16, dtype=torch.bool)},
    ],
)
def test_tensors_that_are_no_image_rows_are_left_out(tmp_path, tensors):
    folder = pretrained(tmp_path, count=1)
    save_file(tensors, folder / "pictures.safetensors")
    assert "Held-out image" not in page_of(folder).html


def test_a_share_that_changes_is_drawn(tmp_path, quick_charts):
    lines = [{"step": s, "loss": 1.0, "masked": 0.5 + s / 100} for s in range(10)]
    page_of(pretrained(tmp_path, count=1, metrics=lines))
    (shares,) = [kind for series, kind in quick_charts if "masked" in series]
    assert shares["percent"] is True


def test_a_loss_of_one_part_is_drawn_once(tmp_path, quick_charts):
    lines = [{"step": s, "loss": 1.0 / (s + 1), "part.pixels": 1.0 / (s + 1)} for s in range(5)]
    page_of(pretrained(tmp_path, count=1, metrics=lines))
    assert not any("part pixels" in series for series, _ in quick_charts)


def test_held_out_loss_stands_beside_the_loss(tmp_path, quick_charts):
    lines = [{"step": s, "loss": 1.0, "held_out_loss": 1.5} for s in range(5)]
    page_of(pretrained(tmp_path, count=1, metrics=lines))
    assert any(set(series) == {"loss", "held out loss"} for series, _ in quick_charts)


def test_charts_are_described_in_words(tmp_path):
    lines = [{"step": 0, "loss": 2.0}, {"step": 10, "loss": float("nan")}, {"step": 20, "loss": 1.25}]
    page = page_of(pretrained(tmp_path, count=1, metrics=lines))
    assert "Loss by step: loss from 2 at step 0 to 1.25 at step 20." in [
        image["alt"] for image in page.images
    ]


def test_a_loss_that_was_never_finite_is_not_drawn(tmp_path, quick_charts):
    page_of(pretrained(tmp_path, count=1, metrics=[{"step": 0, "loss": float("inf")}]))
    assert quick_charts == []


@pytest.mark.usefixtures("real_charts")
def test_a_page_with_its_real_charts_is_sound(tmp_path):
    page = page_of(
        pretrained(tmp_path, count=1, metrics=[{"step": s, "loss": 1 / (s + 1)} for s in range(4)])
    )
    (chart,) = [image for image in page.images if image["alt"].startswith("Loss by step")]
    opened = Image.open(io.BytesIO(base64.b64decode(chart["src"].partition(",")[2])))
    assert (opened.width // 2, opened.height // 2) == (int(chart["width"]), int(chart["height"]))


# -- prune -----------------------------------------------------------------------------------------------------------------


def pruned(path, layers=3, **changes):
    each = [
        {"name": f"model.layers.{i}.mlp.weight", "shape": [8, 16], "kept": 64 + 8 * (i % 3), "total": 128}
        for i in range(layers)
    ]
    summary = {
        "job": "prune",
        "finished": True,
        "quality": {"measure": "perplexity", "better": "lower", "before": 21.5, "after": 30.25},
        "sparsity": 0.5,
        "budget": {"pattern": None, "sparsity": 0.5},
        "layers": each,
        "sizes": {"dense": 4_000_000, "2:4, packed": 2_300_000, "nothing": 0},
        "seconds": 3725,
    }
    settings = '[run]\njob = "prune"\n[pruner]\nname = "sparsegpt"\n[budget]\nsparsity = 0.5\n'
    folder = run_folder(path, **{"settings": settings, "summary": summary, **changes})
    generator = torch.Generator().manual_seed(0)
    masks = {f"layer.{i}.weight": Mask(torch.rand(40, 48, generator=generator) < 0.5) for i in range(5)}
    save_masks(folder / "masks.safetensors", masks | {"bias": Mask(torch.ones(4, dtype=torch.bool))})
    return folder


def test_a_pruning_shows_perplexities_layers_sizes_and_corners(tmp_path, quick_charts):
    page = page_of(pruned(tmp_path))
    for said in (
        "sparsegpt",
        "21.5",
        "30.25",
        "50 %",
        "asked: sparsity 0.5",
        "1 h 02 min",
        "4 MB",
        "2.3 MB",
    ):
        assert said in page.text
    names, values, kind = quick_charts[0]
    assert names == [f"model.layers.{i}.mlp" for i in range(3)]
    assert values == [0.5, 0.4375, 0.375]
    assert kind["reference"] == 0.5
    assert "Dashed: the 50 % that was asked." in page.text
    corners = [image["alt"] for image in page.images if image["alt"].startswith("Mask of")]
    assert len(corners) == 4
    assert corners[0].startswith("Mask of layer.0.weight, first 32 × 32 weights")
    assert corners[-1].startswith("Mask of layer.4.weight")
    assert page.html.count('class="bar"') == 2, "what has no size has no bar"


def test_many_layers_are_drawn_by_block(tmp_path, quick_charts):
    folder = pruned(tmp_path, layers=report.LAYERS_SHOWN + 1)
    summary = json.loads((folder / "summary.json").read_text())
    summary["layers"] += [{"name": "model.layers.0.attention.weight", "kept": 0, "total": 128}]
    summary["layers"] += [{"name": "head", "kept": 1, "total": 4}, {"name": "odd"}, "no layer"]
    (folder / "summary.json").write_text(json.dumps(summary))
    page_of(folder)
    names, values, _ = quick_charts[0]
    assert len(names) == report.LAYERS_SHOWN
    assert names[0] == "model.layers.0"
    assert values[0] == pytest.approx(1 - 64 / 256)


def test_a_pattern_is_said_as_it_was_asked(tmp_path, quick_charts):
    folder = pruned(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    del summary["sparsity"]
    (folder / "summary.json").write_text(json.dumps({**summary, "budget": "2:4"}))
    page = page_of(folder)
    assert "asked: 2:4" in page.text
    assert quick_charts[0][2]["reference"] is None
    assert "43.75 %" in page.text, "counted from the layers"


def test_a_pruner_that_trained_shows_its_loss(tmp_path, quick_charts):
    metrics = [{"step": s, "loss": 1.0 - s / 10, "temperature": 4.0 - s} for s in range(3)]
    page_of(pruned(tmp_path, metrics=metrics))
    assert [set(series) for series, *rest in quick_charts if isinstance(series, dict)] == [
        {"loss"},
        {"loss"},
        {"temperature"},
    ], "the wide chart is drawn for a phone too"


def test_a_pruning_without_layers_still_has_a_page(tmp_path):
    assert (
        "perplexity after"
        in page_of(
            run_folder(
                tmp_path,
                summary={
                    "job": "prune",
                    "finished": True,
                    "quality": {"measure": "perplexity", "after": 3.0},
                    "sizes": "?",
                },
            )
        ).text
    )


# -- sample ----------------------------------------------------------------------------------------------------------------


def sampled(path, samples):
    summary = {
        "job": "sample",
        "finished": True,
        "evaluations": 31,
        "draws": 1240,
        "samples": len(samples),
        "length": 32,
    }
    folder = run_folder(path, settings='[sampler]\nname = "first-hitting"\n', summary=summary)
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples), "utf-8")
    return folder


def test_samples_show_their_tokens_on_the_order_of_their_reveal(tmp_path):
    page = page_of(
        sampled(tmp_path, [{"text": "a b", "tokens": ["a", " b"], "order": [-1, 3]}, {"text": "plain text"}])
    )
    assert "first-hitting" in page.text
    assert "31" in page.text
    assert "1,240" in page.text
    assert '<span class="prompt" title="prompt">a</span>' in page.html
    assert 'title="event 3"> b</span>' in page.html
    assert "plain text" in page.text


def test_more_samples_than_are_shown_are_counted(tmp_path):
    page = page_of(sampled(tmp_path, [{"text": f"text {i}"} for i in range(report.SAMPLES_SHOWN + 3)]))
    assert f"The first {report.SAMPLES_SHOWN} of {report.SAMPLES_SHOWN + 3}" in page.text
    assert f"text {report.SAMPLES_SHOWN}" not in page.text


def test_an_order_that_does_not_fit_the_tokens_leaves_the_text(tmp_path):
    page = page_of(sampled(tmp_path, [{"text": "whole", "tokens": ["who", "le"], "order": [1]}]))
    assert "whole" in page.text


# -- what is missing, unfinished or damaged ----------------------------------------------------------------------------------


def test_an_empty_folder_has_a_page_that_says_so(tmp_path):
    page = page_of(run_folder(tmp_path / "nothing"))
    assert "There is nothing to show yet." in page.text
    assert "nothing" in page.text
    assert "Unfinished. This run has not finished. No step is on record." in page.text


def test_an_unfinished_run_says_where_it_stopped_and_how_to_go_on(tmp_path):
    page = page_of(pretrained(tmp_path, count=1, summary={"job": "pretrain", "finished": False}))
    assert "The last step on record is 39 of 40." in page.text
    assert "maskwright pretrain --resume ." in page.text


def test_any_other_job_gets_its_curves(tmp_path, quick_charts):
    page = page_of(run_folder(tmp_path / "x", settings='job = "dance"', metrics=[{"step": 1, "loss": 1.0}]))
    assert "maskwright dance" in page.text
    assert quick_charts


DAMAGES = {
    "run.toml": (b"[run\nsteps = 3", "run.toml could not be read"),
    "summary.json": (b'{"job": "pretrain", ', "summary.json could not be read"),
    "metrics.jsonl": (b'{"step": 0, "loss": 1}\nnonsense\n{"step": 2, "loss": 1}\n', "line 2 is not JSON"),
    "pictures.safetensors": (
        b"\x10\0\0\0\0\0\0\0nothing of the kind",
        "pictures.safetensors could not be read",
    ),
    "masks.safetensors": (b"", "masks.safetensors could not be read"),
    "samples.jsonl": (b"[1]\n{\n{}", "samples.jsonl could not be read: line 2"),
}


@pytest.mark.parametrize("file", DAMAGES)
def test_a_damaged_file_becomes_a_note_and_the_rest_is_drawn(tmp_path, file, quick_charts):
    folder = pretrained(tmp_path / "run", count=1)
    content, said = DAMAGES[file]
    (folder / file).write_bytes(content)
    page = page_of(folder)
    assert page.text.count("Damaged.") == 1
    assert said in page.text
    assert str(tmp_path) not in page.html
    if file not in ("metrics.jsonl", "summary.json"):
        assert quick_charts
    if file not in ("pictures.safetensors", "summary.json"):
        assert "Held-out image 1" in page.html


def test_all_files_may_be_damaged_at_once(tmp_path):
    for file, (content, _) in DAMAGES.items():
        (tmp_path / file).write_bytes(content)
    assert page_of(tmp_path).text.count("Damaged.") == len(DAMAGES)


def test_a_run_without_settings_is_named_by_its_summary(tmp_path):
    summary = {"job": "pretrain", "finished": True, "strategy": "random", "objective": {"name": "mae"}}
    assert "random × mae" in page_of(run_folder(tmp_path, summary=summary)).text


def test_files_that_hold_something_else_are_noted(tmp_path):
    folder = run_folder(tmp_path, summary=["a", "list"])
    assert "it does not hold an object" in page_of(folder).text


def test_a_last_line_that_a_kill_cut_short_is_left_out_in_silence(tmp_path, quick_charts):
    folder = pretrained(tmp_path, count=1, metrics=[{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0}])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert "Damaged" not in page_of(folder).text
    assert quick_charts[0][0]["loss"] == ([0, 1], [2.0, 1.0])


def test_bytes_that_are_no_text_do_not_stop_the_page(tmp_path):
    folder = pretrained(tmp_path, count=1)
    (folder / "run.toml").write_bytes(b'job = "\xff\xfe"')
    (folder / "metrics.jsonl").write_bytes(b'{"step": 0, "loss": 1.0, "\xff": 2}\n')
    assert "run.toml could not be read" in page_of(folder).text


def test_a_folder_that_cannot_be_written_is_one_error_and_leaves_nothing(tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "run")
    (folder / "report.html").write_text("the page before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("maskwright.mask.os.replace", full)
    with pytest.raises(OutputError, match=r"report\.html cannot be written \(No space left on device\)"):
        report.write_report(folder)
    assert (folder / "report.html").read_text() == "the page before"
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    with pytest.raises(OutputError, match="cannot be written"):
        report.write_report(tmp_path / "missing")


# -- escapes ---------------------------------------------------------------------------------------------------------------


def test_nothing_from_a_run_becomes_markup(tmp_path):
    settings = f"[strategy]\nname = '''{EVIL}'''\n[data]\nsource = '''{EVIL}'''\n['<b>key</b>']\nx = 1\n"
    summary = {
        "job": "prune",
        "finished": True,
        "<i>k</i>": EVIL,
        "budget": EVIL,
        "sparsity": 0.5,
        "sizes": {EVIL: 3},
    }
    summary["layers"] = [{"name": EVIL, "kept": 1, "total": 2}]
    folder = run_folder(
        tmp_path / "<u>run", settings=settings, summary=summary, metrics=[{"step": 1, EVIL: 2.0}]
    )
    save_masks(folder / "masks.safetensors", {EVIL: Mask(torch.ones(4, 4, dtype=torch.bool))})
    page = page_of(folder)
    assert EVIL in page.text
    assert "<u>run" in page.text
    assert not {"b", "i", "u", "script"} & set(page.tags)


def test_sampled_text_is_never_markup(tmp_path):
    lines = [{"text": EVIL}, {"text": "", "tokens": [EVIL, "</ol>"], "order": [0, 1]}]
    page = page_of(sampled(tmp_path, lines))
    assert page.text.count("alert('x')") == 2
    assert "</ol>" in page.text


def test_a_page_of_lone_surrogates_can_be_written(tmp_path):
    page_of(sampled(tmp_path, [{"text": "half \ud800 a pair"}]))


# -- words and numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (True, "yes"),
        (False, "no"),
        (None, "none"),
        (1234567, "1,234,567"),
        (3.0, "3"),
        (0.123456, "0.1235"),
        (1e-5, "1e-05"),
        (123456.7, "123,457"),
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
        ([0.9, 0.95], "0.9, 0.95"),
        ([], "none"),
        ("text", "text"),
    ],
)
def test_values_are_said_for_readers(value, said):
    assert report.say(value) == said


def test_shares_durations_and_sizes_are_said_for_readers():
    assert report.share(0.7551) == "75.5\N{NO-BREAK SPACE}%"
    assert report.share(0.5, 2) == "50\N{NO-BREAK SPACE}%"
    assert report.share(float("nan")) == "not finite"
    assert [report.duration(s) for s in (12.34, 59.96, 125, 3725)] == [
        "12.3 s",
        "60.0 s",
        "2 min 05 s",
        "1 h 02 min",
    ]
    assert [report.size(n) for n in (999, 2_300_000, 5e9, 7e12)] == ["999 B", "2.3 MB", "5 GB", "7e+03 GB"]


def test_figures_say_when_their_pixels_are_to_stay_square():
    small, large = (report.figure(Image.new("RGB", (side, side)), "x") for side in (32, 400))
    assert small.small
    assert not large.small
    assert (large.width, large.height) == (400, 400)


def test_a_run_says_its_series_and_names(tmp_path):
    lines = [
        {"step": 0, "loss": 1.0, "note": "x", "on": True},
        {"loss": 2.0},
        {"step": 2, "loss": 3, "lr": 0.1},
    ]
    run = report.read_run(run_folder(tmp_path, metrics=lines))
    assert run.series("loss") == ([0, 2], [1.0, 3])
    assert run.metric_names() == ["loss", "lr"]
    assert run.job == "run"
    assert SimpleNamespace(finished=run.finished).finished is False


# -- what a step costs, and what is there for nothing -------------------------------------------------------------


def test_costs_and_the_probes_before_stand_among_the_numbers(tmp_path):
    summary = {
        "job": "pretrain",
        "finished": True,
        "linear_probe": 0.9,
        "linear_probe_before": 0.8,
        "seconds_per_step": 0.0321,
        "flops_per_step": 2_220_000_000,
        "flops_without_gradient": 770_000_000,
        "peak_memory": 605_000_000,
    }
    page = page_of(pretrained(tmp_path, summary=summary))
    for said in (
        "90 % held out; 80 % before",
        "time a step 32.1 ms median",
        "FLOPs a step 2.22 G 770 M of them without gradient",
        "peak memory 605 MB",
    ):
        assert said in page.text


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 FLOPs"), (999, "999 FLOPs"), (1.04e12, "1.04 TFLOPs"), (3e18, "3e+03 PFLOPs")]
)
def test_operations_have_prefixes(count, said):
    assert report.flops(count).replace("\N{NO-BREAK SPACE}", " ") == said


def test_where_nothing_is_reconstructed_the_features_are_shown(tmp_path):
    folder = pretrained(tmp_path, count=2)
    maps = {
        "chosen": torch.ones(2, 2, dtype=torch.int64),
        "similarity": torch.rand(2, 4, 4),
        "components": torch.rand(2, 3, 4, 4),
    }
    pixels = {"originals": torch.rand(2, 3, 32, 32), "masks": torch.ones(2, 4, 4, dtype=torch.bool)}
    save_file({**pixels, **maps}, folder / "pictures.safetensors")
    page = page_of(folder)
    rows = [image["alt"] for image in page.images if image["alt"].startswith("Held-out image 1")]
    assert rows == [
        "Held-out image 1, original",
        "Held-out image 1 as the model saw it: 0\N{NO-BREAK SPACE}% hidden",
        "Held-out image 1, how much each patch's feature is like that of the framed one",
        "Held-out image 1, main components of the patches' features as colours",
    ]
    assert 'class="pictures" style="--rows: 4"' in page.html
    assert "cosine 1" in page.text
    save_file(
        {**pixels, **maps, "reconstructions": torch.rand(2, 3, 32, 32)}, folder / "pictures.safetensors"
    )
    page = page_of(folder)
    assert "cosine 1" not in page.text
    assert 'class="pictures" style="--rows: 3"' in page.html
