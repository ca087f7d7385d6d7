"""What goes wrong around a pruning: a full disk, a NaN, a pattern that does not divide; one sentence each, and originals untouched."""

import contextlib
import json
import resource

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_prune import LENGTH, llama, saved_model, text  # noqa: F401 - fixtures
from test_prune_models import pruned

from maskwright.errors import BadBudget, BadData, NumericalError, OutputError
from maskwright.jobs.apply import apply_masks
from maskwright.jobs.export import BITMASK, export
from maskwright.mask import load_masks
from maskwright.toolkit.prunable import prunable_weights

SHORT = {"data.length": LENGTH}


@contextlib.contextmanager
def full_disk(room):
    """No file grows beyond `room` bytes: what writes more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def names(folder):
    return {path.name for path in folder.iterdir()}


# -- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pruner", "stream"), [("magnitude", False), ("magnitude", True), ("channel-magnitude", False)]
)
def test_a_disk_that_fills_while_the_model_is_saved(tmp_path, llama, text, pruner, stream):  # noqa: F811
    before = contents(llama)
    changes = {**SHORT, "pruner.name": pruner, **({"model.stream": True} if stream else {})}
    if pruner == "channel-magnitude":
        changes["budget.params"] = 0.9
    with (
        full_disk(12_000),
        pytest.raises(OutputError, match=r"cannot be written \(.+\); free the disk") as caught,
    ):
        pruned(tmp_path / "run", llama, text, **changes)
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "run") == {"run.toml", "metrics.jsonl"}, "no half-written model, no summary"
    assert contents(llama) == before


def test_a_disk_that_fills_while_masks_are_applied_or_exported(tmp_path, llama, text):  # noqa: F811
    before = contents(llama)
    run = pruned(tmp_path / "run", llama, text, **SHORT).folder
    masks = load_masks(run / "masks.safetensors")
    with full_disk(12_000):
        with pytest.raises(OutputError, match=r"masked cannot be written \(.+\); .* is untouched"):
            apply_masks(llama, run / "masks.safetensors", tmp_path / "masked")
        network = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
        kept = names(run)
        with pytest.raises(OutputError, match=r"cannot be written \(.+\); the model in .* is whole"):
            export(run, BITMASK, network, masks, 0.5)
    assert names(tmp_path) == {"run"}
    assert names(run) == kept
    assert contents(llama) == before


# -- weights and data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruner", ["magnitude", "channel-magnitude"])
def test_a_weight_that_is_not_finite(tmp_path, llama, text, pruner):  # noqa: F811
    broken = tmp_path / "broken"
    broken.mkdir()
    for name, content in contents(llama).items():
        (broken / name).write_bytes(content)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj\.weight .* 1 weights that are NaN"):
        pruned(tmp_path / "run", broken, text, **SHORT, **{"pruner.name": pruner})
    assert not (tmp_path / "run" / "model").exists()


def test_data_too_small_to_calibrate_on(tmp_path, llama):  # noqa: F811
    empty = tmp_path / "data"
    empty.mkdir()
    (empty / "a.txt").write_text("")
    with pytest.raises(BadData) as caught:
        pruned(tmp_path / "run", llama, empty, **SHORT, **{"pruner.name": "wanda"})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "model").exists()


# -- a pattern that does not divide ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(tmp_path_factory, text):  # noqa: F811
    """A Llama whose down projections have 34 inputs."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 34}
    config = transformers.LlamaConfig(vocab_size=300, max_position_embeddings=32, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    return saved_model(tmp_path_factory.mktemp("odd") / "model", text, model=model)


DOWN = ["model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"]


def test_it_is_refused_unless_the_user_chose(tmp_path, odd, text):  # noqa: F811
    with pytest.raises(
        BadBudget, match=r"2:4 does not fit model\.layers\.0\.mlp\.down_proj\.weight \[16, 34\]"
    ):
        pruned(tmp_path / "run", odd, text, **SHORT, **{"budget.pattern": "2:4"})
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("remainder", ["skip", "pad"])
def test_it_is_skipped_or_padded_as_the_user_chose(tmp_path, odd, text, capfd, remainder, stream):  # noqa: F811
    from maskwright.jobs import execute
    from maskwright.jobs.settings import resolve

    changes = {
        **{"model.source": str(odd), "data.source": str(text), "run.calibration": 8, "run.batch_size": 4},
        **{"pruner.name": "wanda", "budget.pattern": "2:4", "prunable.remainder": remainder, **SHORT},
        **({"model.stream": True} if stream else {}),
    }
    summary = execute(resolve("prune", None, changes), folder=tmp_path / "run").summary
    done = {"skip": "they stay dense", "pad": "their last group is filled up with zeros"}[remainder]
    assert f"{DOWN[0]} (34 inputs), {DOWN[1]} (34 inputs): {done}" in capfd.readouterr().err
    assert summary[{"skip": "skipped weights", "pad": "padded weights"}[remainder]] == DOWN
    masks = load_masks(tmp_path / "run" / "masks.safetensors")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    for weight in prunable_weights(network):
        zero = (weight.parameter == 0).sum(1)
        if weight.name not in DOWN:
            assert bool((zero == weight.inputs // 2).all())
        elif remainder == "skip":
            assert weight.name not in masks
            assert not bool(zero.any())
        else:
            assert tuple(masks[weight.name].shape) == (16, 34)
            assert bool((zero == 16).all()), "two of each four, and none of the last two"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]
