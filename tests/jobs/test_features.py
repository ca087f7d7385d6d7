"""Features of places: the same for both kinds of encoder, and two maps of them with known answers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from small_runs import run

from maskwright.backbones import adapt, defaults
from maskwright.jobs import features, pretrain


@pytest.mark.parametrize("kind", ["patch", "conv"])
def test_the_pooled_feature_is_the_mean_of_the_places(kind):
    model = (
        defaults.vision_transformer(image_size=32, patch_size=8, width=16, depth=1, heads=2)
        if kind == "patch"
        else defaults.convolutional_network(width=8, depth=1)
    )
    backbone, pixels = adapt(model.eval(), kind), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        each = features.places(backbone, pixels)
        assert each.shape == ((2, 4, 4, 16) if kind == "patch" else (2, 2, 2, 32))
        assert torch.allclose(pretrain.pooled(backbone, pixels), each.mean((1, 2)), atol=1e-6)


def test_similarity_is_the_cosine_with_the_chosen_place():
    x = torch.randn(2, 3, 4, 5)
    chosen = torch.tensor([[0, 1], [2, 3]])
    told = features.similarity(x, chosen)
    for image, (row, column) in enumerate(chosen.tolist()):
        for r in range(3):
            for c in range(4):
                cosine = torch.cosine_similarity(x[image, r, c], x[image, row, column], dim=0)
                assert told[image, r, c] == pytest.approx(float(cosine), abs=1e-5)
    assert torch.allclose(told[[0, 1], [0, 2], [1, 3]], torch.ones(2))


def test_the_main_components_are_colours_that_every_image_shares():
    # Two kinds of places, which differ along one axis: one colour each, in both images.
    one, other = torch.randn(2, 6)
    kinds = torch.tensor([[[0, 1], [1, 1]], [[1, 0], [0, 0]]])
    colours = features.principal_colours(torch.stack([one, other])[kinds])
    assert colours.shape == (2, 3, 2, 2)
    first = colours[:, 0]
    assert len(first[kinds == 0].unique()) == len(first[kinds == 1].unique()) == 1
    assert {first.min().item(), first.max().item()} == {0.0, 1.0}
    assert torch.allclose(colours[:, 1:], torch.tensor(0.5))


def test_features_that_are_all_alike_are_grey_and_alike():
    same = torch.ones(1, 2, 2, 3)
    assert torch.equal(features.principal_colours(same), torch.full((1, 3, 2, 2), 0.5))
    assert torch.allclose(features.similarity(same, torch.tensor([[0, 0]])), torch.ones(1, 2, 2))
    assert torch.isfinite(features.principal_colours(torch.randn(1, 2, 2, 2))).all()


def test_the_liveliest_place_is_where_pixels_spread_widest():
    pixels = torch.full((2, 3, 8, 8), 5.0)
    pixels[0, :, 4:6, 2:4] += torch.randn(3, 2, 2)
    pixels[1, 1, 0, 7] = 9.0
    assert features.liveliest(pixels, (4, 4)).tolist() == [[2, 1], [0, 3]]


def test_a_pretraining_leaves_the_maps_and_the_probes_of_the_untrained_encoder(tmp_path):
    summary = run(tmp_path / "run", run__steps=2, run__lr=1e-9).summary
    # At such a rate nothing is learned: the encoder before is the encoder after.
    assert summary["linear_probe_before"] == pytest.approx(summary["linear_probe"], abs=0.01)
    assert summary["knn_probe_before"] == pytest.approx(summary["knn_probe"], abs=0.01)
    tensors = load_file(tmp_path / "run" / "pictures.safetensors")
    count = len(tensors["originals"])
    assert tensors["similarity"].shape == (count, 4, 4)
    assert tensors["components"].shape == (count, 3, 4, 4)
    assert tensors["chosen"].shape == (count, 2)
    place = (torch.arange(count), tensors["chosen"][:, 0], tensors["chosen"][:, 1])
    assert torch.allclose(tensors["similarity"][place], torch.ones(count))
