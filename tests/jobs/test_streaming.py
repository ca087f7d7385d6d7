"""A model pruned block by block from its shards: the same masks and numbers as in memory, and what is refused."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_prune import LENGTH, llama, saved_model, text  # noqa: F401 - fixtures

from maskwright import load_masks
from maskwright.errors import BadBudget, BadModel, NumericalError, UsageError
from maskwright.jobs import execute
from maskwright.jobs.settings import resolve

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def pruned(folder, model, data, **changes):
    settings = resolve(
        "prune",
        None,
        {
            **{"model.source": str(model), "data.source": str(data), "data.length": LENGTH},
            **{"run.calibration": 12, "run.batch_size": 4, "pruner.name": "wanda"},
            **changes,
        },
    )
    return execute(settings, folder=folder, quiet=True)


def model_of(kind, folder, data):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=3, n_head=2, n_positions=32)
            model = transformers.GPT2LMHeadModel(config)
        else:
            sizes = {**SIZES, "vocab_size": 300, "num_key_value_heads": 2, "max_position_embeddings": 32}
            made = transformers.Qwen2Config(**sizes, tie_word_embeddings=True)
            model = transformers.Qwen2ForCausalLM(made)
        return saved_model(folder, data, model=model)


@pytest.mark.parametrize(
    ("kind", "pruner", "budget"),
    [
        ("qwen2", "wanda", {"budget.pattern": "2:4"}),
        ("qwen2", "sparsegpt", {"budget.sparsity": 0.5}),
        ("gpt2", "magnitude", {"budget.sparsity": 0.5}),
        ("gpt2", "wanda", {"budget.pattern": "1:4"}),
    ],
)
def test_streamed_is_the_same_as_in_memory(tmp_path, text, kind, pruner, budget):  # noqa: F811
    model = model_of(kind, tmp_path / "model", text)
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    shutil.rmtree(model / "model.safetensors", ignore_errors=True)
    (model / "model.safetensors").unlink()
    network.save_pretrained(model, max_shard_size="8KB")
    assert len(list(model.glob("*.safetensors"))) > 2
    changes = {"pruner.name": pruner, **budget}
    whole = pruned(tmp_path / "whole", model, text, **changes)
    streamed = pruned(tmp_path / "streamed", model, text, **changes, **{"model.stream": True})
    masks, others = (load_masks(run.folder / "masks.safetensors") for run in (whole, streamed))
    assert masks.keys() == others.keys()
    assert all(torch.equal(masks[name].keep, others[name].keep) for name in masks)
    for when in ("before", "after"):
        assert streamed.summary["quality"][when] == pytest.approx(whole.summary["quality"][when], rel=1e-5)
    assert streamed.summary["sparsity"] == whole.summary["sparsity"]
    assert streamed.summary["parameters"] == whole.summary["parameters"]
    one, two = (
        transformers.AutoModelForCausalLM.from_pretrained(run.folder / "model").state_dict()
        for run in (whole, streamed)
    )
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert not list(streamed.folder.glob(".*"))
    assert (streamed.folder / "report.html").is_file()


def test_what_cannot_be_streamed_is_said_before_the_work(tmp_path, llama, text):  # noqa: F811
    stream = {"model.stream": True}
    with pytest.raises(UsageError, match="maskllm needs loss of the whole model"):
        pruned(tmp_path / "a", llama, text, **stream, **{"pruner.name": "maskllm"})
    with pytest.raises(UsageError, match="compare=global compares all weights"):
        pruned(
            tmp_path / "b", llama, text, **stream, **{"pruner.name": "magnitude", "pruner.compare": "global"}
        )
    with pytest.raises(UsageError, match=r"leave output\.export out"):
        pruned(tmp_path / "c", llama, text, **stream, **{"output.export": "compressed-tensors"})
    with pytest.raises(UsageError, match="reads causal language models from a folder"):
        pruned(tmp_path / "d", "default", text, **stream)
    with pytest.raises(BadBudget, match="3:7"):
        pruned(tmp_path / "e", llama, text, **stream, **{"budget.pattern": "3:7"})


def test_damage_is_named_and_nothing_half_written(tmp_path, llama, text):  # noqa: F811
    network = transformers.AutoModelForCausalLM.from_pretrained(llama)
    for name in ("missing", "broken"):
        shutil.copytree(llama, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        if name == "broken":
            with torch.no_grad():
                network.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
        network.save_pretrained(tmp_path / name, max_shard_size="16KB")
    listed = json.loads((tmp_path / "missing" / "model.safetensors.index.json").read_text())
    lost = sorted(set(listed["weight_map"].values()))[1]
    (tmp_path / "missing" / lost).unlink()
    stream = {"model.stream": True}
    with pytest.raises(BadModel, match=f"lacks 1 of its shards, such as {lost}"):
        pruned(tmp_path / "a", tmp_path / "missing", text, **stream)
    with pytest.raises(
        NumericalError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* 1 weights that are NaN"
    ):
        pruned(tmp_path / "b", tmp_path / "broken", text, **stream, **{"pruner.name": "magnitude"})
    assert not (tmp_path / "b" / "model").exists()
    assert not list((tmp_path / "b").glob(".*"))


def test_a_streamed_model_keeps_its_dtype(tmp_path, text):  # noqa: F811
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {**SIZES, "vocab_size": 300, "num_key_value_heads": 2, "max_position_embeddings": 32}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    saved_model(tmp_path / "model", text, dtype=torch.bfloat16, model=model)
    run = pruned(tmp_path / "run", tmp_path / "model", text, **{"model.stream": True})
    tensors = {}
    for path in (run.folder / "model").glob("*.safetensors"):
        tensors |= load_file(path)
    assert {one.dtype for one in tensors.values()} == {torch.bfloat16}
