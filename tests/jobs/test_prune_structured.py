"""The prune job with pruners that make the model smaller: what is saved, counted, shown and applied, and what is refused."""

import pytest
import torch
import transformers
from safetensors import safe_open
from test_prune import LENGTH, saved_model, text  # noqa: F401 - a fixture
from test_prune_models import image_model, pruned

from maskwright.errors import BadModel, UsageError
from maskwright.jobs.apply import apply_masks
from maskwright.jobs.candidates import Plan, compare
from maskwright.mask import load_masks

SMALLER = {"pruner.name": "channel-magnitude", "data.length": LENGTH}


def tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


@pytest.fixture(scope="module")
def language_run(tmp_path_factory, text):  # noqa: F811
    """(dense folder, run folder, summary) of a Llama pruned to 0.8 of its parameters."""
    place = tmp_path_factory.mktemp("structured")
    dense = saved_model(place / "dense", text)
    result = pruned(place / "run", dense, text, **SMALLER, **{"budget.params": 0.8})
    return dense, place / "run", result.summary


def test_what_is_left_is_counted_from_the_saved_file(language_run):
    dense, folder, summary = language_run
    before, after = (sum(one.numel() for one in tensors(at).values()) for at in (dense, folder / "model"))
    assert summary["left"]["params"] == pytest.approx(after / before)
    assert 0.78 < summary["left"]["params"] <= 0.8
    assert summary["left"]["flops"] < 1
    assert summary["parameters"] == after
    assert summary["facts"]["dense_parameters"] == before
    assert summary["sizes"]["dense"] == 4 * before
    assert summary["sizes"]["bit-packed"] < 4 * before
    assert summary["sizes"]["model folder"] < 4 * before
    gone = sum(layer["total"] - layer["kept"] for layer in summary["layers"])
    assert gone == before - after, "no biases here: what is gone is gone from prunable weights"
    assert "parameters left" in (folder / "report.html").read_text()


def test_the_smaller_model_loads_and_is_the_dense_one_under_the_saved_masks(language_run, tmp_path):
    dense, folder, _ = language_run
    small = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    assert small.config.intermediate_size < transformers.AutoConfig.from_pretrained(dense).intermediate_size
    apply_masks(dense, folder / "masks.safetensors", tmp_path / "masked")
    masked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "masked")
    tokens = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        here, there = (model.eval()(input_ids=tokens).logits for model in (small, masked))
    assert torch.allclose(here, there, atol=1e-4)
    shapes = {name: list(one.shape) for name, one in tensors(dense).items()}
    assert all(
        list(mask.shape) == shapes[name] for name, mask in load_masks(folder / "masks.safetensors").items()
    )


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ResNetForImageClassification"])
def test_image_classifiers_become_smaller_to_a_budget_of_flops(tmp_path, kind):
    folder = image_model(tmp_path / "model", kind)
    changes = {**SMALLER, "data.size": 16, "budget.flops": 0.8}
    del changes["data.length"]
    if kind.startswith("ResNet"):
        # The rule takes the stem for an embedding; without it, stem and first stage shrink together, as the config demands.
        changes["prunable.exclude"] = ["classifier.*"]
    summary = pruned(tmp_path / "run", folder, "digits", **changes).summary
    assert 0.6 < summary["left"]["flops"] <= 0.8
    assert summary["quality"]["measure"] == "accuracy"
    again = getattr(transformers, kind).from_pretrained(tmp_path / "run" / "model")
    assert sum(one.numel() for one in again.parameters()) == summary["parameters"]
    if kind.startswith("ResNet"):
        assert again.config.embedding_size == again.config.hidden_sizes[0] < 8


def test_what_does_not_fit_a_smaller_model_is_refused(language_run, text, tmp_path):  # noqa: F811
    dense = language_run[0]
    with pytest.raises(UsageError, match=r"makes the model itself smaller"):
        pruned(tmp_path / "a", dense, text, **SMALLER, **{"output.export": "compressed-tensors"})
    with pytest.raises(UsageError, match=r"leave model\.stream out"):
        pruned(tmp_path / "b", dense, text, **SMALLER, **{"model.stream": True})
    config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    other = saved_model(tmp_path / "model", text, model=transformers.GPT2LMHeadModel(config))
    with pytest.raises(BadModel, match="no number in its config"):
        pruned(tmp_path / "c", other, text, **SMALLER)
    assert not (tmp_path / "c" / "model").exists()


def test_a_comparison_asks_for_no_format_of_zeros(tmp_path):
    folder = image_model(tmp_path / "model", "ViTForImageClassification")
    shared = {"model.source": str(folder), "data.source": "digits", "data.size": 16, "run.calibration": 8}
    plan = Plan(("channel-magnitude",), shared={**shared, "budget.flops": 0.8})
    (outcome,) = compare(plan, tmp_path / "out").outcomes
    assert not outcome.failures
    assert outcome.summaries[0]["left"]["flops"] <= 0.8
    sizes = outcome.summaries[0]["sizes"]
    assert sizes["bit-packed"] < sizes["dense"]
    assert "compressed-tensors-bitmask" not in sizes
