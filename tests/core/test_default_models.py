"""The small default models: no download, a seed's weights, sizes that fit, adapters that take them."""

import pytest
import torch

from maskwright.backbones import adapt
from maskwright.backbones.defaults import (
    causal_language_model,
    masked_denoiser,
    masked_language_model,
    vision_transformer,
)

SMALL = {"width": 32, "depth": 1, "heads": 2}


def makers():
    return {
        "llama": lambda seed: causal_language_model(vocabulary=50, length=16, seed=seed, **SMALL),
        "bert": lambda seed: masked_language_model(
            vocabulary=50, length=16, mask_token=2, seed=seed, **SMALL
        ),
        "modernbert": lambda seed: masked_denoiser(
            vocabulary=50, length=16, mask_token=2, seed=seed, **SMALL
        ),
        "vit": lambda seed: vision_transformer(seed=seed, **SMALL),
    }


@pytest.mark.parametrize("name", ["llama", "bert", "modernbert", "vit"])
def test_a_seed_gives_its_weights_and_the_global_generator_stays(name):
    make = makers()[name]
    before = torch.random.get_rng_state()
    first, again, other = (list(make(seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert any(not torch.equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize(("name", "shift"), [("llama", 1), ("bert", 0), ("modernbert", 0)])
def test_language_models_are_token_backbones(name, shift):
    backbone = adapt(makers()[name](0), "token")
    assert backbone.shift == shift
    assert backbone.logits(torch.zeros(2, 16, dtype=torch.int64)).shape == (2, 16, 50)


def test_the_masked_model_knows_its_mask_token():
    assert adapt(makers()["bert"](0), "token").mask_token == 2
    assert (
        adapt(causal_language_model(vocabulary=9, length=8, mask_token=7, **SMALL), "token").mask_token == 7
    )


def test_the_masked_model_has_no_dropout():
    model = makers()["bert"](0).train()
    ids = torch.arange(16)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_vit_sees_64_patches_of_32_pixel_images():
    backbone = adapt(vision_transformer(**SMALL), "patch")
    assert backbone.grid == (8, 8)
    assert backbone.patches(torch.zeros(2, 3, 32, 32)).shape == (2, 64, 32)


@pytest.mark.parametrize("name", ["llama", "bert", "modernbert", "vit"])
def test_transformers_loads_what_the_model_saves(name, tmp_path):
    model = makers()[name](0)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, local_files_only=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not list(tmp_path.glob("*.bin"))


def test_the_masked_denoiser_sees_all_in_its_first_layer_and_neighbours_in_the_others():
    model = masked_denoiser(vocabulary=50, length=64, mask_token=2, width=32, depth=3, heads=2).eval()
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    backbone = adapt(model, "token")
    assert backbone.mask_token == 2
    ids = torch.arange(64)[None] % 47 + 3
    far = ids.clone()
    far[0, 60] = 2
    assert not torch.equal(backbone.logits(ids)[0, 0], backbone.logits(far)[0, 0])
