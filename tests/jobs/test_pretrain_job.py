"""The pretrain job on tiny models: numbers that repeat, models that others load, mistakes that are said in one sentence."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import SMALL, changed, lines, process, run, small, wait_for_steps
from torch import nn

import maskwright
from maskwright.backbones import defaults
from maskwright.errors import (
    BackboneMismatch,
    BadData,
    BadModel,
    MissingSignal,
    NumericalError,
    OutputError,
    UnknownComponent,
    UsageError,
)
from maskwright.jobs import execute
from maskwright.jobs import pretrain as job
from maskwright.jobs.batches import Batches
from maskwright.jobs.settings import resolve
from maskwright.protocols import Step
from maskwright.sources.images import load_images

TEXT = {
    "objective.name": "next-token",
    "run.steps": 3,
    "run.batch_size": 4,
    "model.width": 16,
    "model.depth": 1,
    "model.heads": 2,
    "data.length": 16,
    "data.vocabulary": 300,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return run(folder)


@pytest.fixture
def book(tmp_path):
    """A text file."""
    path = tmp_path / "book.txt"
    path.write_text(
        "".join(f"Chapter {i}: the {i % 7}th fox jumps over {i * i} lazy dogs.\n" for i in range(400))
    )
    return path


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    """A ViT as a user has it: for 16 × 16 grey images, with a classifier on top."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    folder = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def pictures_folder(path, count=6, side=20):
    generator = np.random.default_rng(0)
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(generator.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path / f"{i}.png")
    return path


# -- what a run does -----------------------------------------------------------------------------------------------


def test_the_loss_falls(tmp_path):
    run(tmp_path / "run", run__steps=60, run__batch_size=32, run__lr=0.01)
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])


def test_two_runs_of_one_seed_are_the_same_and_of_two_seeds_are_not(finished, tmp_path):
    run(tmp_path / "again")
    run(tmp_path / "other", run__seed=1)
    assert lines(tmp_path / "again") == lines(finished.folder)
    assert lines(tmp_path / "other") != lines(finished.folder)


def test_a_job_leaves_the_global_generators_as_they_were(tmp_path):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    run(tmp_path / "run", run__steps=1)
    assert torch.equal(before, torch.get_rng_state())


def test_the_numbers_are_those_of_a_loop_written_by_hand(finished):
    settings = small()
    source = load_images("digits", size=8, seed=0)
    vit = defaults.vision_transformer(image_size=8, patch_size=2, width=16, depth=1, heads=2, seed=0)
    torch.manual_seed(0)
    strategy = settings.require("strategy").create()
    objective = settings.require("objective").create()
    model = maskwright.MaskedTraining(vit, strategy, objective, seed=0, total_steps=6)
    matrices = [one for one in model.parameters() if one.requires_grad and one.squeeze().ndim > 1]
    others = [one for one in model.parameters() if one.requires_grad and one.squeeze().ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    losses = []
    for step, rate in enumerate(1.5e-3 * 0.5 * (1 + math.cos(math.pi * i / 5)) for i in (0, 0, 1, 2, 3, 4)):
        batch = source.batch(source.order(0)[8 * step : 8 * step + 8])
        loss = model(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    assert [line["loss"] for line in lines(finished.folder)] == pytest.approx(losses, rel=1e-5)


def test_warm_up_rises_and_the_cosine_falls_to_zero():
    rates = [job.learning_rate(Step(i, 100), 1.0, 0.1) for i in range(100)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.001


def test_the_summary_has_the_held_out_loss_and_the_probes(finished):
    summary = finished.summary
    assert summary["final_loss"] == pytest.approx(lines(finished.folder)[-1]["loss"])
    assert 0.1 < summary["held_out_loss"] < 3
    assert 0.1 < summary["linear_probe"] <= 1
    assert 0.1 < summary["knn_probe"] <= 1
    assert summary["chance"] < 0.15
    assert (summary["strategy"], summary["objective"], summary["steps"]) == ("random", "mae", 6)


def test_the_pictures_are_in_range_and_visible_patches_stay_as_they_are(finished):
    tensors = load_file(finished.folder / "pictures.safetensors")
    maps = {"chosen", "similarity", "components"}
    assert set(tensors) == {"originals", "masks", "reconstructions", *maps}
    for name in ("originals", "reconstructions"):
        assert tensors[name].shape == (8, 3, 8, 8)
        assert 0 <= tensors[name].min() <= tensors[name].max() <= 1
    shown = tensors["masks"].repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand(-1, 3, -1, -1)
    assert torch.allclose(tensors["originals"][shown], tensors["reconstructions"][shown], atol=1e-5)
    assert not torch.allclose(tensors["originals"][~shown], tensors["reconstructions"][~shown], atol=1e-2)
    page = (finished.folder / "report.html").read_text()
    assert page.count("<img") >= 24
    assert "Unfinished" not in page
    assert "could not be read" not in page


def test_detailed_images_are_chosen_from_every_class():
    pixels = torch.arange(12.0).view(12, 1, 1, 1) * torch.tensor([[[-1.0, 1.0]]])
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 2, 2, 2, 2])
    assert job.most_detailed(pixels, labels, 3).tolist() == [4, 5, 10]
    assert job.most_detailed(pixels, labels, 99).tolist() == [4, 5, 10, 6, 7, 11]


# -- batches -------------------------------------------------------------------------------------------------------


def test_processes_share_each_global_batch_and_epochs_follow_one_another():
    source = load_images("photographs", size=8, crops=10)
    whole = Batches(source, 4)
    halves = [Batches(source, 4, process=r, processes=2) for r in (0, 1)]
    seen = []
    for step in range(6):
        batch = whole[step]["pixels"]
        assert torch.equal(batch, torch.cat([half[step]["pixels"] for half in halves]))
        seen.append(batch)
    expected = [source.batch(source.order(epoch), epoch)["pixels"] for epoch in range(3)]
    assert torch.equal(torch.cat(seen), torch.cat(expected)[:24])


def test_a_batch_may_be_larger_than_an_epoch():
    source = load_images("photographs", size=8, crops=3)
    with Batches(source, 8) as batches:
        assert batches[0]["pixels"].shape[0] == 8


def test_an_error_in_the_thread_reaches_the_loop():
    class Broken:
        def __len__(self):
            return 4

        def order(self, epoch):
            return torch.arange(4)

        def batch(self, indices, epoch=0):
            raise BadData("nothing here")

    with Batches(Broken(), 2) as batches, pytest.raises(BadData, match="nothing here"):
        batches[0]


# -- stopping and resuming -------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_resumes_to_exactly_the_same_numbers(tmp_path):
    started = process(tmp_path / "run", run__steps=120, run__save_every=7)
    wait_for_steps(started, tmp_path / "run", 40)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert 40 <= len(lines_of_a_killed_run(tmp_path / "run")) < 120
    for folder, resume in (("run", True), ("whole", False)):
        run(tmp_path / folder, resume=resume, run__steps=120, run__save_every=7)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "whole"))
    taken = dict.fromkeys(("seconds", "seconds_per_step", "peak_memory", "waiting_for_data"))
    assert {**one, **taken} == {**two, **taken}


def lines_of_a_killed_run(folder):
    return (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]


def test_ctrl_c_ends_a_run_with_a_checkpoint_a_sentence_and_130(tmp_path):
    started = process(tmp_path / "run", run__steps=2000, run__save_every=5000)
    wait_for_steps(started, tmp_path / "run", 5)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130
    assert "Traceback" not in err
    stopped = re.search(
        r"Stopped after step (\d+) of 2000; go on with: maskwright pretrain --resume (\S+)", err
    )
    assert stopped[2] == str(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint" / "loop-1.safetensors").exists()
    assert len(lines(tmp_path / "run")) == int(stopped[1])
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_full_disk_in_the_middle_is_one_sentence_and_the_checkpoint_is_whole(tmp_path, monkeypatch):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = job._step
    count = iter(range(99))

    def filling(*given):
        if next(count) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        return real(*given)

    monkeypatch.setattr(job, "_step", filling)
    try:
        with pytest.raises(
            OutputError,
            match=r"checkpoint.* cannot be written \(File too large.*earlier checkpoint is intact",
        ):
            run(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    run(tmp_path / "run", resume=True)
    run(tmp_path / "whole")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_a_loss_that_is_not_finite_is_one_sentence_and_never_reaches_the_weights(tmp_path):
    with pytest.raises(NumericalError, match=r"at step \d+ of 60.*try a lower run.lr"):
        run(tmp_path / "run", run__steps=60, run__save_every=1, run__lr=1e30, run__clip=0.0)
    states = load_file(tmp_path / "run" / "checkpoint" / "loop-1.safetensors")
    assert all(bool(value.isfinite().all()) for value in states.values() if value.is_floating_point())


# -- models ----------------------------------------------------------------------------------------------------------


def without_maskwright(code, *arguments):
    """Run code in a Python in which maskwright cannot be imported."""
    blocked = "import sys; sys.modules['maskwright'] = None\n"
    return subprocess.run(
        [sys.executable, "-c", blocked + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    ).stdout


def test_transformers_alone_loads_the_model_with_the_weights_that_were_trained(finished):
    said = without_maskwright(
        """
        import torch
        from transformers import AutoModel
        model, info = AutoModel.from_pretrained(sys.argv[1], output_loading_info=True, add_pooling_layer=False)
        assert not any(info.values()), info
        print(type(model).__name__, model(torch.ones(1, 3, 8, 8)).last_hidden_state.sum().item())
        """,
        finished.folder / "model",
    )
    kind, total = said.split()
    from transformers import AutoModel

    mine = AutoModel.from_pretrained(finished.folder / "model", add_pooling_layer=False)
    assert kind == "ViTModel"
    assert float(total) == pytest.approx(
        mine(torch.ones(1, 3, 8, 8)).last_hidden_state.sum().item(), abs=1e-4
    )
    state = load_file(finished.folder / "checkpoint" / "loop-1.safetensors")
    name = "embeddings.patch_embeddings.projection.weight"
    saved = next(value for key, value in state.items() if key.startswith("model/") and key.endswith(name))
    assert torch.equal(mine.state_dict()[name], saved)


def test_the_folder_says_how_images_are_prepared(finished):
    config = json.loads((finished.folder / "model" / "preprocessor_config.json").read_text())
    assert config["size"] == {"height": 8, "width": 8}
    assert len(config["image_mean"]) == len(config["image_std"]) == 3


def test_a_users_own_vit_is_trained_at_its_own_sizes(tmp_path, vit_folder):
    from transformers import AutoModel

    settings = resolve(
        "pretrain",
        None,
        {
            **{key: value for key, value in SMALL.items() if not key.startswith(("model", "data"))},
            "model.source": str(vit_folder),
            "data.source": "digits",
        },
    )
    assert "decoder_width" in settings.objective.params
    result = execute(settings, folder=tmp_path / "run", quiet=True)
    before, after = (
        AutoModel.from_pretrained(folder).state_dict() for folder in (vit_folder, result.folder / "model")
    )
    assert load_file(result.folder / "pictures.safetensors")["originals"].shape == (8, 1, 16, 16)
    name = "embeddings.patch_embeddings.projection.weight"
    assert 0 < (before[name] - after[name]).abs().max() < 0.1


def test_a_pretrained_model_is_pretrained_further(finished, tmp_path):
    settings = resolve(
        "pretrain",
        None,
        {
            "run.steps": 1,
            "run.batch_size": 4,
            "model.source": str(finished.folder / "model"),
            "data.source": "digits",
            "objective.decoder_width": 16,
            "objective.decoder_depth": 1,
            "objective.decoder_heads": 2,
        },
    )
    assert (
        execute(settings, folder=tmp_path / "run", quiet=True).summary["parameters"]
        == finished.summary["parameters"]
    )


def test_text_is_trained_and_read_by_transformers_alone(tmp_path, book):
    result = execute(
        resolve("pretrain", None, {**TEXT, "data.source": str(book)}), folder=tmp_path / "run", quiet=True
    )
    assert result.summary["perplexity"] == pytest.approx(math.exp(result.summary["held_out_loss"]), rel=1e-3)
    assert 100 < result.summary["perplexity"] < 400
    said = without_maskwright(
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
        assert not any(info.values()), info
        ids = tokenizer("the fox jumps", return_tensors="pt")
        print(type(model).__name__, tokenizer.decode(ids["input_ids"][0]), model(**ids).logits.shape[-1] == len(tokenizer))
        """,
        result.folder / "model",
    )
    assert said.strip() == "LlamaForCausalLM the fox jumps True"
    page = (result.folder / "report.html").read_text()
    assert "perplexity" in page
    assert "What it writes on held-out text" in page
    written = [json.loads(line) for line in (result.folder / "samples.jsonl").read_text().splitlines()]
    assert [line["order"] for line in written] == [[-1] * 4 + list(range(12))] * 4
    assert all(len(line["tokens"]) == 16 for line in written)
    assert all(line["text"].startswith("".join(line["tokens"][:4])) for line in written)


@pytest.mark.parametrize(
    ("content", "said"), [({}, "has no config.json"), ({"config.json": "{"}, "cannot be read")]
)
def test_a_model_folder_without_a_config_is_refused(tmp_path, content, said):
    (tmp_path / "model").mkdir()
    for name, text in content.items():
        (tmp_path / "model" / name).write_text(text)
    assert_refused(tmp_path, BadModel, said, model__source=str(tmp_path / "model"))


def test_a_model_folder_with_pickle_weights_only_is_refused_unread(tmp_path, vit_folder):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((vit_folder / "config.json").read_text())
    (model / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch sprung'\ntR.")
    assert_refused(
        tmp_path,
        BadModel,
        "as a pickle only .*call save_pretrained, which writes safetensors",
        model__source=str(model),
    )


def test_damaged_weights_and_unknown_kinds_of_model_are_refused(tmp_path, vit_folder):
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((vit_folder / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config))
    assert_refused(tmp_path, BadModel, "has no weights", model__source=str(model))
    (model / "model.safetensors").write_bytes(b"\0" * 64)
    assert_refused(tmp_path, BadModel, "is damaged", model__source=str(model))
    other = {"other.weight": torch.zeros(2)}
    save_file(other, model / "model.safetensors", metadata={"format": "pt"})
    assert_refused(tmp_path, BadModel, "holds no weight of a ViTModel", model__source=str(model))
    (model / "config.json").write_text(json.dumps({**config, "model_type": "vitreous"}))
    assert_refused(tmp_path, BadModel, r"\(vitreous\) cannot be read as AutoModel", model__source=str(model))
    assert_refused(
        tmp_path, BadModel, "does not exist; give a folder", model__source=str(tmp_path / "google" / "vit")
    )


# -- mistakes ----------------------------------------------------------------------------------------------------------


def assert_refused(tmp_path, error, said, **changes):
    """One sentence, the exit code of bad usage, and nothing written."""
    given = changed(**changes)
    if given.get("model.source", "default") != "default":
        for name in ("model.width", "model.depth", "model.heads"):
            given.pop(name)
    with pytest.raises(error, match=said) as caught:
        execute(resolve("pretrain", None, given), folder=tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_an_empty_or_missing_image_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path, BadData, "has no images", data__source=str(tmp_path / "empty"))
    assert_refused(tmp_path, BadData, "does not exist", data__source=str(tmp_path / "nowhere"))


def test_a_folder_whose_images_are_none_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("no image")
    assert_refused(
        tmp_path, BadData, "a readable image, such as a.png", data__source=str(tmp_path / "photos")
    )


def test_one_image_that_is_no_image_is_passed_over_and_said(tmp_path):
    folder = pictures_folder(tmp_path / "photos")
    (folder / "broken.png").write_text("no image")
    result = run(tmp_path / "run", data__source=str(folder), data__size=8, model__patch_size=2, run__steps=2)
    assert "1 unreadable file skipped" in result.summary["data"]
    assert "linear_probe" not in result.summary


def test_text_that_is_not_utf_8_is_refused_with_its_place(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"caf\xe9 " * 100)
    given = {**TEXT, "data.source": str(tmp_path / "book.txt")}
    with pytest.raises(BadData, match="is not UTF-8: byte 3 is 0xe9") as caught:
        execute(resolve("pretrain", None, given), folder=tmp_path / "run", quiet=True)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_a_strategy_that_needs_a_signal_nobody_provides_is_refused_before_the_first_step(tmp_path):
    given = changed(strategy__name="hard-patches")
    with pytest.raises(MissingSignal, match="which objective 'mae' does not provide"):
        execute(resolve("pretrain", None, given), folder=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_sizes_that_do_not_fit_are_refused(tmp_path):
    assert_refused(tmp_path, BadModel, "data.size=9 must be a multiple of model.patch_size=2", data__size=9)
    assert_refused(
        tmp_path,
        UnknownComponent,
        "no mask-strategy 'randon'. Did you mean 'random'",
        strategy__name="randon",
    )


def test_an_objective_of_another_kind_of_network_is_refused(tmp_path):
    registry = maskwright.Registry(third_party=False)

    @registry.register
    class Denoise:
        kind, name, modalities = "objective", "denoise", frozenset({"image"})
        needs, provides, backbone = frozenset({"pixels"}), frozenset(), "denoiser"

        def bind(self, backbone):
            raise AssertionError

    settings = resolve("pretrain", None, {"objective.name": "denoise"}, registry=registry)
    with pytest.raises(BackboneMismatch, match="works on a denoiser"):
        execute(settings, folder=tmp_path / "run", registry=registry, quiet=True)


def test_a_batch_that_does_not_divide_among_processes_is_refused(tmp_path, monkeypatch):
    from maskwright.jobs.run import Run

    monkeypatch.setattr(Run, "processes", 3)
    monkeypatch.setattr(Run, "_on_main", lambda self, make: make())
    assert_refused(tmp_path, UsageError, "must be a multiple of their number, 3", run__batch_size=8)


# -- the embedded model -----------------------------------------------------------------------------------------------


def test_the_embedded_language_model_is_trained_once_and_found_again(tmp_path, book, monkeypatch):
    from maskwright.jobs.run import Run

    monkeypatch.setattr(job, "EMBEDDED_STEPS", 3)
    given = {
        "model.width": 16,
        "model.depth": 1,
        "model.heads": 2,
        "data.source": str(book),
        "data.length": 16,
        "data.vocabulary": 300,
    }
    settings = resolve("prune", None, given)
    weights = []
    for resume in (False, True):
        with Run(settings, folder=tmp_path / "run", resume=resume, quiet=True) as outer:
            trained = job.embedded_language_model(outer)
        assert isinstance(trained.network, nn.Module)
        assert not trained.network.training
        assert trained.source.length == 16
        weights.append(trained.network.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert len(lines(tmp_path / "run" / "base")) == 3
    assert (tmp_path / "run" / "base" / "model" / "config.json").exists()
