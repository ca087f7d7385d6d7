"""The prune job: what it leaves, that it is what was saved, exports, resuming, and mistakes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import compressed_tensors
import pytest
import tokenizers
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers, trainers

from maskwright import PruneResult, SparsityReport, load_masks
from maskwright.backbones.defaults import causal_language_model
from maskwright.errors import BadBudget, BadModel, BadRunFile, NumericalError, OutputError, UsageError
from maskwright.jobs import execute, pretrain
from maskwright.jobs.prune import prune, rule_of
from maskwright.jobs.settings import resolve
from maskwright.mask import masks_of
from maskwright.registry import Registry
from maskwright.sources.text import load_text
from maskwright.toolkit.prunable import prunable_weights

WORDS = [
    "mask",
    "token",
    "weight",
    "layer",
    "row",
    "column",
    "keep",
    "remove",
    "the",
    "of",
    "a",
    "to",
    "and",
    "pattern",
    "block",
    "score",
    "input",
    "norm",
]
LENGTH = 16


SMALL_BERT = transformers.BertConfig(
    **{"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"intermediate_size": 32, "max_position_embeddings": 32},
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of sentences that a model can learn something about."""
    draw = random.Random(0)
    lines = [" ".join(draw.choice(WORDS) for _ in range(12)) + "." for _ in range(600)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines), "utf-8")
    return path


def saved_model(folder, text, dtype=torch.float32, model=None):
    source = load_text(text, length=LENGTH, vocabulary=300)
    model = model or causal_language_model(
        vocabulary=source.vocabulary, length=32, width=32, depth=2, heads=2, eos_token=source.eos_token
    )
    # Weights of unequal size, so that what is kept matters.
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 1 + 3 * torch.rand(parameter.shape, generator=generator)
    model.to(dtype).save_pretrained(folder)
    source.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory, text):
    return saved_model(tmp_path_factory.mktemp("llama") / "model", text)


def run(folder, text, model="default", *, resume=False, **changes):
    settings = resolve(
        "prune",
        None,
        {
            **{"data.source": str(text), "data.length": LENGTH, "model.source": str(model)},
            **{"run.calibration": 12, "run.batch_size": 4, "pruner.name": "magnitude"},
            **{name.replace("__", "."): value for name, value in changes.items()},
        },
    )
    return execute(settings, folder=folder, resume=resume, quiet=True)


SMALL = {"model__width": 16, "model__depth": 1, "model__heads": 2, "data__vocabulary": 300}


@pytest.fixture
def quick(monkeypatch):
    """The embedded model, trained for a moment."""
    monkeypatch.setattr(pretrain, "EMBEDDED_STEPS", 6)


def reloaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")


# -- what it leaves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["magnitude", "random", "wanda", "sparsegpt"])
def test_a_users_model_is_pruned_and_what_was_saved_is_counted(tmp_path, text, llama, name):
    result = run(tmp_path / "run", text, llama, pruner__name=name)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert (summary["job"], summary["finished"], summary["pruner"]) == ("prune", True, name)
    assert summary["budget"] == {"pattern": "2:4"}
    assert summary["sparsity"] == 0.5
    assert summary["quality"]["before"] > 1
    assert summary["quality"]["after"] != summary["quality"]["before"]
    assert summary["calibration_samples"] == 12
    masks, saved = load_masks(tmp_path / "run" / "masks.safetensors"), reloaded(tmp_path / "run" / "model")
    assert [layer["name"] for layer in summary["layers"]] == list(masks)
    for layer in summary["layers"]:
        weight = saved.get_parameter(layer["name"]).detach()
        assert (weight[~masks[layer["name"]].keep] == 0).all()
        assert layer["kept"] == weight.count_nonzero() == layer["total"] / 2
    assert summary["sizes"]["masks file"] == (tmp_path / "run" / "masks.safetensors").stat().st_size
    assert summary["sizes"]["bit-packed"] < summary["sizes"]["dense"] <= summary["sizes"]["model folder"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "perplexity before" in report
    assert "Removed share by layer" in report


def test_the_tokenizer_and_the_text_survive(tmp_path, text, llama):
    run(tmp_path / "run", text, llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.decode(tokenizer("mask the token")["input_ids"]) == "mask the token"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_model_is_kept(tmp_path, text, dtype):
    model = saved_model(tmp_path / "model", text, dtype)
    run(tmp_path / "run", text, model, pruner__name="sparsegpt")
    assert {parameter.dtype for parameter in reloaded(tmp_path / "run" / "model").parameters()} == {dtype}


def test_a_sparsity_is_met_exactly(tmp_path, text, llama):
    summary = run(tmp_path / "run", text, llama, budget__sparsity=0.3).summary
    for layer in summary["layers"]:
        assert layer["total"] - layer["kept"] == int(layer["total"] * 3 / 10)
    assert run(tmp_path / "none", text, llama, budget__sparsity=0.0).summary["sparsity"] == 0


def test_without_a_model_the_embedded_one_is_trained_first(tmp_path, text, quick):
    result = run(tmp_path / "run", text, **SMALL)
    base = json.loads((tmp_path / "run" / "base" / "summary.json").read_text())
    assert base["perplexity"] == pytest.approx(result.summary["quality"]["before"], rel=0.05)
    dense, pruned = (reloaded(tmp_path / "run" / part / "model") for part in ("base", "."))
    masks = load_masks(tmp_path / "run" / "masks.safetensors")
    for name, parameter in dense.named_parameters():
        expected = parameter * masks[name].keep if name in masks else parameter
        assert torch.equal(pruned.get_parameter(name), expected)


def test_the_prunable_weights_are_chosen_in_the_run_file(tmp_path, text, llama):
    summary = run(
        tmp_path / "run", text, llama, prunable__include=["*.mlp.*"], prunable__exclude=["*.0.*"]
    ).summary
    assert [layer["name"] for layer in summary["layers"]] == [
        f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    ]
    again = resolve("prune", tmp_path / "run" / "run.toml")
    assert rule_of(again).include == ("*.mlp.*",)


def test_calibration_is_as_long_as_asked(tmp_path, text, llama):
    summary = run(tmp_path / "run", text, llama, run__calibration=6, pruner__name="wanda").summary
    assert summary["calibration_samples"] == 6


# -- a tokenizer of the user's own -----------------------------------------------------------------------------------


def test_a_tokenizer_that_has_no_end_of_document_adds_nothing_to_the_model(tmp_path, text):
    codec = tokenizers.Tokenizer(tokenizer_models.BPE(unk_token="[UNK]"))
    codec.pre_tokenizer = pre_tokenizers.Whitespace()
    codec.train(
        [str(text)], trainers.BpeTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    )
    size = codec.get_vocab_size()
    model = causal_language_model(vocabulary=size, length=32, width=32, depth=1, heads=2)
    model.save_pretrained(tmp_path / "model")
    codec.save(str(tmp_path / "model" / "tokenizer.json"))
    result = run(tmp_path / "run", text, tmp_path / "model")
    assert reloaded(tmp_path / "run" / "model").config.vocab_size == size
    # An untrained model of this size guesses among its tokens.
    assert result.summary["quality"]["before"] == pytest.approx(size, rel=0.2)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, text, llama):
    model = causal_language_model(vocabulary=60, length=32, width=32, depth=1, heads=2)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes((llama / "tokenizer.json").read_bytes())
    with pytest.raises(
        BadModel, match=r"makes the token \d+, the model knows 60; they do not belong together"
    ):
        run(tmp_path / "run", text, tmp_path / "model")


# -- the layout that others read -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tmp_path_factory, text):
    """A pruned float16 model with both exports."""
    folder = tmp_path_factory.mktemp("half")
    model = saved_model(folder / "model", text, torch.float16)
    for export in ("compressed-tensors", "compressed-tensors-bitmask"):
        run(folder / export, text, model, output__export=export, pruner__name="wanda")
    return folder


def test_two_of_four_fits_semi_structured_sparsity(half):
    """The layout of torch.sparse.to_sparse_semi_structured: no more than two of four consecutive inputs, and no loss."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    saved = reloaded(half / "compressed-tensors" / "model")
    for name in load_masks(half / "compressed-tensors" / "masks.safetensors"):
        weight = saved.get_parameter(name).detach()
        assert (weight.unflatten(1, (-1, 4)).count_nonzero(-1) <= 2).all()
        # The tensor class itself wants a GPU; its conversions run anywhere.
        again = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))
        assert torch.equal(again, weight)
        compressed_tensors.utils.tensor_follows_mask_structure(weight, "2:4")


def test_compressed_tensors_reads_its_export(half):
    """Transformers reads the folder through the library, which also knows what the config says of its sparsity."""
    folder = half / "compressed-tensors" / "compressed-tensors"
    plain, exported = reloaded(half / "compressed-tensors" / "model"), reloaded(folder)
    assert type(exported.hf_quantizer.compressor) is compressed_tensors.compressors.ModelCompressor
    for name, parameter in plain.named_parameters():
        assert torch.equal(exported.get_parameter(name), parameter)
    ids = torch.arange(8)[None]
    assert torch.equal(exported(input_ids=ids).logits, plain(input_ids=ids).logits)
    told = json.loads((folder / "config.json").read_text())["quantization_config"]["sparsity_config"]
    config = compressed_tensors.SparsityCompressionConfig.load_from_registry(told["format"], **told)
    assert isinstance(config, compressed_tensors.DenseSparsityConfig)
    assert (config.sparsity_structure, config.global_sparsity) == ("2:4", 0.5)
    assert (config.targets, config.ignore) == (["Linear"], ["lm_head"])
    assert "quantization_config" not in json.loads(
        (half / "compressed-tensors" / "model" / "config.json").read_text()
    )


def test_the_bitmask_export_is_smaller_and_holds_every_weight(half):
    run_folder = half / "compressed-tensors-bitmask"
    folder = run_folder / "compressed-tensors-bitmask"
    plain = reloaded(run_folder / "model")
    told = json.loads((folder / "config.json").read_text())["quantization_config"]["sparsity_config"]
    config = compressed_tensors.SparsityCompressionConfig.load_from_registry(told["format"], **told)
    assert isinstance(config, compressed_tensors.Sparse24BitMaskConfig)
    stored = load_file(folder / "model.safetensors")
    for name in load_masks(run_folder / "masks.safetensors"):
        prefix = name.removesuffix(".weight")
        shape = stored.pop(f"{prefix}.shape").flatten().tolist()
        keep = compressed_tensors.utils.unpack_bitmasks(stored.pop(f"{prefix}.bitmask"), shape)
        weight = torch.zeros(shape, dtype=torch.float16)
        values = stored.pop(f"{prefix}.compressed")
        assert values.shape == (shape[0], shape[1] // 2)
        weight[keep] = values.flatten()
        assert torch.equal(weight, plain.get_parameter(name).detach())
        assert name not in stored
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in stored.items())
    sizes = json.loads((run_folder / "summary.json").read_text())["sizes"]
    assert sizes["compressed-tensors-bitmask"] < 0.8 * sizes["model folder"]


def test_an_unstructured_export_keeps_each_rows_values_apart(tmp_path, text, llama):
    run(
        tmp_path / "run",
        text,
        llama,
        budget__sparsity=0.6,
        output__export="compressed-tensors-bitmask",
    )
    folder = tmp_path / "run" / "compressed-tensors-bitmask"
    told = json.loads((folder / "config.json").read_text())["quantization_config"]["sparsity_config"]
    assert (told["format"], told["sparsity_structure"]) == ("sparse-bitmask", "unstructured")
    plain = reloaded(tmp_path / "run" / "model")
    with safe_open(folder / "model.safetensors", "pt") as file:
        prefix = "model.layers.0.mlp.down_proj"
        offsets = file.get_tensor(f"{prefix}.row_offsets").tolist()
        values = file.get_tensor(f"{prefix}.compressed")
        keep = compressed_tensors.utils.unpack_bitmasks(
            file.get_tensor(f"{prefix}.bitmask"), file.get_tensor(f"{prefix}.shape").tolist()
        )
    weight = plain.get_parameter(f"{prefix}.weight").detach()
    for row, start, end in zip(range(len(offsets)), offsets, [*offsets[1:], len(values)]):
        assert torch.equal(values[start:end], weight[row][keep[row]])


def test_sharded_models_stay_sharded(tmp_path, text, monkeypatch):
    model = saved_model(tmp_path / "model", text)
    save = transformers.PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        transformers.PreTrainedModel,
        "save_pretrained",
        lambda self, folder, **kwargs: save(self, folder, max_shard_size="40KB", **kwargs),
    )
    run(tmp_path / "run", text, model, output__export="compressed-tensors-bitmask")
    folder = tmp_path / "run" / "compressed-tensors-bitmask"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    for name, file in index.items():
        with safe_open(folder / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert "model.layers.0.mlp.up_proj.bitmask" in index


# -- resuming --------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from maskwright.jobs import execute, pretrain
from maskwright.jobs.settings import resolve
pretrain.EMBEDDED_STEPS = 6
execute(resolve("prune", None, json.loads(sys.argv[1])), folder=sys.argv[2], quiet=True)
"""
MASKLLM = {
    **{"pruner__name": "maskllm", "pruner__steps": 30, "pruner__prior": "wanda", "pruner__lr": 0.02},
    **{"run__save_every": 3, **SMALL},
}


def test_a_trained_pruner_that_was_killed_comes_to_the_same_masks(tmp_path, text, quick):
    given = {
        **{"data.source": str(text), "data.length": LENGTH, "run.calibration": 12, "run.batch_size": 4},
        **{name.replace("__", "."): value for name, value in MASKLLM.items()},
    }
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(given), str(killed)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    metrics = killed / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 8:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "summary.json").exists()
    assert (killed / "base" / "summary.json").exists()

    resumed = run(killed, text, resume=True, **MASKLLM)
    whole = run(tmp_path / "whole", text, **MASKLLM)
    one, other = (load_masks(folder / "masks.safetensors") for folder in (killed, tmp_path / "whole"))
    assert all(torch.equal(one[name].keep, other[name].keep) for name in other)
    assert resumed.summary["quality"]["after"] == whole.summary["quality"]["after"]

    def lines_of(path):
        return [{**json.loads(line), "seconds": None} for line in path.read_text().splitlines()]

    lines = lines_of(metrics)
    assert lines == lines_of(tmp_path / "whole" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 31))


def test_training_sees_more_text_than_calibration(tmp_path, text, llama):
    """Each step has its own batch: twelve calibration sequences would be three batches again and again."""
    from maskwright.jobs.prune import RunTask
    from maskwright.jobs.run import Run
    from maskwright.jobs.workloads import causal_text
    from maskwright.protocols import Budget, Step

    settings = resolve("prune", None, {"data.source": str(text), "run.batch_size": 4})
    source = load_text(text, length=LENGTH, vocabulary=300)
    with Run(settings, folder=tmp_path / "run", quiet=True) as opened:
        work = causal_text(None, source)
        task = RunTask(budget=Budget(sparsity=0.5), run=opened, work=work)
        batches = [task.batch(Step(index, 100))["tokens"] for index in range(len(source) // 4 + 2)]
    assert {batch.shape for batch in batches} == {(4, LENGTH)}
    rows = {tuple(row) for batch in batches for row in batch.tolist()}
    assert len(rows) == 4 * len(batches)


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_refused(tmp_path, text, llama):
    broken = tmp_path / "model"
    broken.mkdir()
    for path in llama.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NumericalError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* 1 weights that are NaN"
    ):
        run(tmp_path / "run", text, broken)
    assert not (tmp_path / "run" / "model").exists()


def test_budgets_are_checked_before_the_embedded_model_is_trained(tmp_path, text):
    with pytest.raises(
        BadBudget, match=r"3:7 does not fit model\.layers\.0\.self_attn\.q_proj\.weight \[16, 16\]"
    ):
        run(tmp_path / "a", text, budget__pattern="3:7", **SMALL)
    with pytest.raises(BadBudget, match="magnitude does not meet a budget of flops"):
        run(tmp_path / "b", text, budget__flops=0.5, **SMALL)
    with pytest.raises(BadBudget, match=r"sparsity=1\.5 must be in \[0, 1\)"):
        run(tmp_path / "c", text, budget__sparsity=1.5, **SMALL)
    with pytest.raises(BadBudget, match="pattern='4:2' must be N:M with 0 < N < M"):
        run(tmp_path / "d", text, budget__pattern="4:2", **SMALL)
    assert not list(tmp_path.glob("*/base"))


def test_folders_that_hold_no_causal_language_model_in_safetensors_are_refused(tmp_path, text, llama):
    with pytest.raises(BadModel, match="does not exist"):
        run(tmp_path / "a", text, tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BadModel, match=r"has no config\.json"):
        run(tmp_path / "b", text, empty)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((llama / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BadModel, match="pickle only"):
        run(tmp_path / "c", text, pickled)
    tagger = transformers.BertForTokenClassification(SMALL_BERT)
    saved_model(tmp_path / "bert", text, model=tagger)
    with pytest.raises(BadModel, match="is a BertForTokenClassification; this job measures"):
        run(tmp_path / "d", text, tmp_path / "bert")
    with pytest.raises(BadModel, match=r"takes 32 tokens, data\.length=64"):
        run(tmp_path / "e", text, llama, data__length=64)


def test_a_pruner_that_needs_more_than_text_is_refused(tmp_path, text, llama):
    registry = Registry(third_party=False)

    @registry.register
    class Merging:
        kind = "pruner"
        name = "merging"
        modalities = frozenset({"text"})
        needs = frozenset({"batches", "teacher"})
        budgets = frozenset({"sparsity"})
        changes_weights = True

        def prune(self, model, task):
            raise AssertionError

    settings = resolve("prune", None, {"pruner.name": "merging"}, registry=registry)
    with pytest.raises(UsageError, match="'merging' needs teacher, which this job does not have"):
        execute(settings, folder=tmp_path / "run", registry=registry, quiet=True)


class Asks:
    """Keeps everything, and remembers what it was given."""

    kind = "pruner"
    name = "asks"
    modalities = frozenset({"text"})
    needs = frozenset({"experts", "clients"})
    budgets = frozenset()
    changes_weights = False
    seen = None

    def prune(self, model, task):
        type(self).seen = (
            task.extras,
            {name: one.score(model) for name, one in task.extras["experts"].items() if one.score is not None},
        )
        masks = {
            weight.name: weight.mask(torch.ones(weight.shape, dtype=torch.bool))
            for weight in prunable_weights(model, task.prunable)
        }
        return PruneResult(model, masks, SparsityReport.of(masks))


def test_experts_and_clients_come_from_the_run_file(tmp_path, text, llama):
    registry = Registry(third_party=False)
    registry.register(Asks)
    tuned = tmp_path / "tuned"
    shutil.copytree(llama, tuned)
    tensors = load_file(tuned / "model.safetensors")
    save_file(
        {name: one + 0.5 for name, one in tensors.items()}, tuned / "model.safetensors", {"format": "pt"}
    )
    changes = {
        **{
            "pruner.name": "asks",
            "model.source": str(llama),
            "data.source": str(text),
            "data.length": LENGTH,
        },
        **{"run.clients": 3, "run.batch_size": 8},
        **{
            "experts.tuned.model": str(tuned),
            "experts.tuned.data": str(text),
            "experts.same.model": str(llama),
        },
    }
    settings = resolve("prune", None, changes, registry=registry)
    again = tmp_path / "run.toml"
    again.write_text(settings.toml())
    assert resolve("prune", again, registry=registry).experts == settings.experts
    result = execute(settings, folder=tmp_path / "run", registry=registry, quiet=True)
    extras, scores = Asks.seen
    assert set(extras["experts"]) == {"tuned", "same"}
    assert scores == {"tuned": pytest.approx(-result.summary["quality"]["before"])}, (
        "it has data; same has none"
    )
    moved = extras["experts"]["tuned"].state["model.norm.weight"] - tensors["model.norm.weight"]
    assert torch.allclose(moved, torch.full_like(moved, 0.5))
    rows = [
        {tuple(row) for batch in client for row in batch["tokens"].tolist()} for client in extras["clients"]
    ]
    assert len(rows) == 3
    assert len(rows[0] | rows[1] | rows[2]) == sum(map(len, rows)), "no sample is with two clients"
    sizes = [sum(len(batch["tokens"]) for batch in client) for client in extras["clients"]]
    assert max(sizes) - min(sizes) <= 1


def test_experts_that_are_missing_or_of_another_architecture_are_told(tmp_path, text, llama):
    registry = Registry(third_party=False)
    registry.register(Asks)
    changes = {
        "pruner.name": "asks",
        "model.source": str(llama),
        "data.source": str(text),
        "data.length": LENGTH,
    }

    def failed(**more):
        settings = resolve("prune", None, {**changes, **more}, registry=registry)
        folder = tmp_path / str(len(more))
        execute(settings, folder=folder, registry=registry, quiet=True)

    with pytest.raises(UsageError, match=r"name them with --set experts\.NAME\.model=FOLDER"):
        failed()
    other = causal_language_model(vocabulary=300, length=32, width=16, depth=1, heads=2)
    saved_model(tmp_path / "other", text, model=other)
    with pytest.raises(BadModel, match=r"'wide' in .* is of another architecture"):
        failed(**{"experts.wide.model": str(tmp_path / "other")})
    with pytest.raises(BadRunFile, match="wide must have a `model`, a folder"):
        failed(**{"experts.wide.folder": "x"})


class ShiftsSomeRows:
    """Moves the first row of each weight and masks the change; takes no budget."""

    kind = "pruner"
    name = "shifts"
    modalities = frozenset({"text"})
    needs = frozenset()
    budgets = frozenset()
    changes_weights = True
    prunes = "difference"

    def prune(self, model, task):
        assert task.budget is None
        masks, moved = {}, {}
        for weight in prunable_weights(model, task.prunable):
            keep = torch.zeros(weight.shape, dtype=torch.bool)
            keep[0] = True
            masks[weight.name] = weight.mask(keep)
            moved[weight.name] = torch.full((weight.shape[1],), 0.5)
            weight.write(weight.matrix + 0.5 * keep)
        artifacts = {"rows": masks, "shift": moved}
        return PruneResult(model, masks, SparsityReport.of(masks), artifacts=artifacts, facts={"rows": 1.0})


def test_a_pruner_of_differences_needs_no_budget_and_leaves_its_artifacts(tmp_path, text, llama):
    registry = Registry(third_party=False)
    registry.register(ShiftsSomeRows)
    changes = {
        "pruner.name": "shifts",
        "model.source": str(llama),
        "data.source": str(text),
        "data.length": 32,
    }
    settings = resolve("prune", None, changes, registry=registry)
    assert not settings.budget
    result = execute(settings, folder=tmp_path / "run", registry=registry, quiet=True)
    weights = prunable_weights(transformers.AutoModelForCausalLM.from_pretrained(llama))
    kept = sum(weight.shape[1] for weight in weights)
    total = sum(weight.parameter.numel() for weight in weights)
    assert result.summary["sparsity"] == pytest.approx(1 - kept / total)
    assert result.summary["facts"] == {"rows": 1.0}
    assert result.summary["prunes"] == "difference"
    packed = sum(4 * weight.shape[1] + -(-weight.parameter.numel() // 8) for weight in weights)
    assert result.summary["sizes"]["change, bit-packed"] == packed
    assert "bit-packed" not in result.summary["sizes"]
    assert masks_of(tmp_path / "run" / "masks.safetensors") == "difference"
    assert "weights unchanged" in result.report.read_text()
    exported = resolve("prune", None, {**changes, "output.export": "compressed-tensors"}, registry=registry)
    with pytest.raises(UsageError, match="masks their change"):
        execute(exported, folder=tmp_path / "exported", registry=registry, quiet=True)
    rows = load_masks(tmp_path / "run" / "rows.safetensors")
    shift = load_file(tmp_path / "run" / "shift.safetensors")
    assert set(rows) == set(shift) == {weight.name for weight in weights}
    assert all(bool(mask.keep[0].all()) and not mask.keep[1:].any() for mask in rows.values())

    refused = resolve("prune", None, {**changes, "budget.sparsity": 0.5}, registry=registry)
    with pytest.raises(BadBudget, match=r"shifts finds out itself .* leave the sparsity out"):
        execute(refused, folder=tmp_path / "refused", registry=registry, quiet=True)


def test_the_budget_that_is_not_said_is_one_that_the_pruner_meets():
    registry = Registry(third_party=False)

    @registry.register
    class Shares:
        kind = "pruner"
        name = "shares"
        modalities = frozenset({"text"})
        needs = frozenset()
        budgets = frozenset({"params", "sparsity"})
        changes_weights = False

        def prune(self, model, task):
            raise AssertionError

    assert resolve("prune", None, {"pruner.name": "shares"}, registry=registry).budget == {"sparsity": 0.5}


def test_what_cannot_be_exported_is_said_before_the_work(tmp_path, text):
    config = transformers.GPT2Config(
        **{"vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32},
        **{"bos_token_id": 1, "eos_token_id": 1},
    )
    model = saved_model(tmp_path / "gpt2", text, model=transformers.GPT2LMHeadModel(config))
    with pytest.raises(
        UsageError, match=r"describes nn\.Linear layers only, and transformer\.h\.0\.attn\.c_attn"
    ):
        run(tmp_path / "run", text, model, output__export="compressed-tensors")
    assert not (tmp_path / "run" / "masks.safetensors").exists()
    summary = run(tmp_path / "plain", text, model, pruner__name="sparsegpt").summary
    assert summary["sparsity"] == 0.5
    with pytest.raises(
        BadRunFile, match="must be one of none, compressed-tensors, compressed-tensors-bitmask"
    ):
        run(tmp_path / "other", text, model, output__export="gguf")


def test_a_saved_model_that_lost_its_zeros_is_noticed(tmp_path, text, llama, monkeypatch):
    save = transformers.PreTrainedModel.save_pretrained

    def spoiled(self, folder, **kwargs):
        self.model.layers[0].mlp.up_proj.weight.data.add_(1)
        save(self, folder, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", spoiled)
    with pytest.raises(OutputError, match=r"up_proj\.weight has weights outside its mask"):
        run(tmp_path / "run", text, llama)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_job_is_named_after_its_function():
    assert prune.__name__ == "prune"
