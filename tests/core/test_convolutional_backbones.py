"""The adapters of convolutional networks run the library's own layers, stage by stage."""

import pytest
import torch
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2Model,
    ResNetConfig,
    ResNetModel,
)

from maskwright import Layout, adapt
from maskwright.backbones import ConvBackbone

SIZES = {"hidden_sizes": [8, 16, 32], "depths": [1, 2, 1]}
MODELS = {
    "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=4, layer_type="basic", **SIZES)),
    "resnet-bottleneck": lambda: ResNetModel(
        ResNetConfig(embedding_size=4, layer_type="bottleneck", downsample_in_first_stage=True, **SIZES)
    ),
    "convnext": lambda: ConvNextModel(ConvNextConfig(num_stages=3, **SIZES)),
    "convnextv2": lambda: ConvNextV2Model(ConvNextV2Config(num_stages=3, **SIZES)),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def test_stem_and_stages_give_the_models_own_maps(model):
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    backbone = adapt(model, ConvBackbone)
    x = backbone.stem(pixels)
    for stage in backbone.stages:
        x = stage(x)
    assert torch.equal(x, model(pixels).last_hidden_state)


def test_strides_and_widths_are_those_of_the_maps(model):
    backbone = adapt(model, "conv")
    x = backbone.stem(torch.zeros(1, 3, 64, 64))
    seen = [(x.shape[1], 64 // x.shape[2])]
    for stage in backbone.stages:
        x = stage(x)
        seen.append((x.shape[1], 64 // x.shape[2]))
    assert seen == list(zip(backbone.widths, backbone.strides))


def test_parameters_are_named_once(model):
    backbone = adapt(model, "conv")
    assert len(list(backbone.parameters())) == len(list(model.parameters()))
    assert set(backbone.state_dict()) == {f"model.{name}" for name in model.state_dict()}


def test_layout_is_the_coarsest_map(model):
    backbone = adapt(model, "conv")
    layout = Layout.of(backbone, {"pixels": torch.zeros(2, 3, 64, 64)})
    cell = backbone.strides[-1]
    assert (layout.grid, layout.patch_size) == ((64 // cell, 64 // cell), cell)
