"""Adapters of vision transformers: the library's own forward on everything, and the same network on some of the patches."""

import math

import pytest
import torch
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitModel,
    DeiTConfig,
    DeiTForMaskedImageModeling,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SwinConfig,
    SwinForMaskedImageModeling,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import maskwright
from maskwright import Layout, MaskedTraining, adapt
from maskwright.backbones import GridBackbone, PatchBackbone, encode_visible
from maskwright.errors import BackboneMismatch, UnequalMaskCounts
from maskwright.mask import Mask
from maskwright.toolkit.selection import random_mask

SIZE = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
RELATIVE, SHARED, ABSOLUTE = (
    {"use_relative_position_bias": True},
    {"use_shared_relative_position_bias": True},
    {"use_absolute_position_embeddings": True},
)
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "num_heads": [1, 2, 4], "window_size": 4}


def beit(**other):
    return lambda: BeitModel(BeitConfig(**SIZE, drop_path_rate=0.0, **other), add_pooling_layer=False)


PREFIXES = {
    "vit": (lambda: ViTModel(ViTConfig(**SIZE)), 1),
    "deit": (lambda: DeiTModel(DeiTConfig(**SIZE)), 2),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**SIZE)), 1),
    "dinov2-swiglu": (lambda: Dinov2Model(Dinov2Config(**SIZE, use_swiglu_ffn=True)), 1),
    "dinov2-registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZE, num_register_tokens=3)),
        4,
    ),
    "beit": (beit(), 1),
    "beit-absolute": (beit(**ABSOLUTE), 1),
    "beit-relative": (beit(**RELATIVE), 1),
    "beit-shared": (beit(**SHARED, use_mean_pooling=False), 1),
    "beit-all": (beit(**RELATIVE, **SHARED, **ABSOLUTE, use_mask_token=True), 1),
}


def made(make):
    """The model with weights that are random everywhere: tables and tokens that begin at zero would hide mistakes."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(rows=3, side=16):
    return torch.randn(rows, 3, side, side, generator=generator())


def everything(backbone, pixels, **levels):
    prefix = backbone.prefix(len(pixels))
    return backbone.encode(torch.cat([prefix, backbone.patches(pixels) + backbone.positions], 1), **levels)


@pytest.fixture(params=PREFIXES)
def model(request):
    return made(PREFIXES[request.param][0])


@pytest.mark.parametrize("name", PREFIXES)
def test_the_whole_image_gives_the_models_own_output(name):
    make, prefix = PREFIXES[name]
    model, pixels = made(make), images()
    backbone = adapt(model, PatchBackbone)
    assert (backbone.grid, backbone.patch_size, backbone.width, backbone.depth) == ((4, 4), 4, 24, 3)
    assert backbone.prefix(3).shape == (3, prefix, 24)
    assert backbone.positions.shape == (1, 16, 24)
    own = model(pixels).last_hidden_state
    assert own.shape == (3, prefix + 16, 24)
    assert torch.allclose(everything(backbone, pixels), own, rtol=1e-5, atol=1e-6)


def test_levels_are_the_blocks_outputs(model):
    backbone = adapt(model, "patch")
    blocks, levels = [], everything(backbone, images(), levels=(0, -1, 1))
    for layer in backbone._layers:
        layer.register_forward_hook(
            lambda module, given, output: blocks.append(output[0] if isinstance(output, tuple) else output)
        )
    model(images())
    for level, block in zip(levels, (blocks[0], blocks[2], blocks[1]), strict=True):
        assert torch.allclose(level, block, rtol=1e-5, atol=1e-6)


def test_some_patches_are_encoded_as_if_attention_saw_no_others(model):
    """The library's own forward with every key hidden but those of the prefix and the visible patches."""
    pixels = images()
    backbone = adapt(model, "patch")
    mask = random_mask(Layout.of(backbone, {"pixels": pixels}), 5, generator(1))
    encoded = encode_visible(backbone, backbone.patches(pixels) + backbone.positions, mask)
    levels = encode_visible(backbone, backbone.patches(pixels) + backbone.positions, mask, levels=(-1,))

    model.set_attn_implementation("eager")
    prefix = encoded.shape[1] - 5
    seen = torch.cat([torch.ones(3, prefix, dtype=torch.bool), mask.flatten().keep], 1)
    own = model(pixels, attention_mask=seen.long()).last_hidden_state
    assert torch.allclose(encoded[:, :prefix], own[:, :prefix], rtol=1e-4, atol=1e-5)
    assert torch.allclose(encoded[:, prefix:], mask.gather_visible(own[:, prefix:]), rtol=1e-4, atol=1e-5)
    assert torch.allclose(model.layernorm(levels[0]), encoded, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(own[:, 0], model(pixels).last_hidden_state[:, 0], rtol=1e-3, atol=1e-3)


def test_hidden_pixels_change_nothing_of_the_visible(model):
    backbone = adapt(model, "patch")
    mask = random_mask(Layout.of(backbone, {"pixels": images()}), 6, generator(1))
    keep = mask.upsample((16, 16)).keep[:, None]

    def encoded(pixels):
        return encode_visible(backbone, backbone.patches(pixels) + backbone.positions, mask)

    assert torch.equal(encoded(images()), encoded(torch.where(keep, images(), torch.inf)))


def beit_attention_by_hand(layer, hidden, tables, places, grid):
    """One head, one pair of tokens at a time. `places` are rows and columns of patches; token 0 is the class token."""
    attention = layer.attention
    batch, length, width = hidden.shape
    heads, size = attention.num_attention_heads, attention.head_dim
    q, k, v = (
        project(hidden).view(batch, length, heads, size)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    out = torch.zeros(batch, length, heads, size)
    last = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    for b in range(batch):
        for head in range(heads):
            for i in range(length):
                scores = []
                for j in range(length):
                    if i == 0 and j == 0:
                        index = last + 2
                    elif i == 0:
                        index = last
                    elif j == 0:
                        index = last + 1
                    else:
                        down = places[b][i - 1][0] - places[b][j - 1][0] + grid[0] - 1
                        across = places[b][i - 1][1] - places[b][j - 1][1] + grid[1] - 1
                        index = down * (2 * grid[1] - 1) + across
                    bias = sum(table[index, head] for table in tables)
                    scores.append(q[b, i, head] @ k[b, j, head] / math.sqrt(size) + bias)
                out[b, i, head] = torch.stack(scores).softmax(0) @ v[b, :, head]
    return attention.o_proj(out.flatten(2))


@pytest.mark.parametrize("name", ["beit-relative", "beit-shared", "beit-all"])
@torch.no_grad()
def test_beit_biases_the_pairs_that_are_left_by_their_own_distance(name):
    """Against loops over rows, heads and pairs of tokens, with the index of each pair written out."""
    model, pixels = made(PREFIXES[name][0]), images(2)
    backbone = adapt(model, "patch")
    mask = random_mask(Layout.of(backbone, {"pixels": pixels}), 5, generator(2))
    tokens = mask.gather_visible(backbone.patches(pixels) + backbone.positions)
    places = [[divmod(int(place), 4) for place in row] for row in mask.visible_indices()]
    x = torch.cat([backbone.prefix(2), tokens], 1)
    for layer in model.layers:
        biases = [
            one for one in (model.shared_position_bias, layer.relative_position_bias) if one is not None
        ]
        tables = [bias.relative_position_bias_table for bias in biases]
        x = x + layer.lambda_1 * beit_attention_by_hand(
            layer, layer.layernorm_before(x), tables, places, (4, 4)
        )
        x = x + layer.lambda_2 * layer.mlp(layer.layernorm_after(x))
    told = backbone.encode(torch.cat([backbone.prefix(2), tokens], 1), places=mask.visible_indices())
    assert torch.allclose(told, model.layernorm(x), rtol=1e-4, atol=1e-5)


def test_beit_must_be_told_which_patches_it_is_given():
    backbone = adapt(made(beit(**RELATIVE)), "patch")
    tokens = torch.zeros(2, 1 + 5, 24)
    with pytest.raises(BackboneMismatch, match="told which 5 of the 16 patches it is given: encode"):
        backbone.encode(tokens)
    assert adapt(made(beit()), "patch").encode(tokens).shape == (2, 6, 24)


def test_beit_recomputes_its_blocks_with_the_same_patches():
    """Gradient checkpointing runs the blocks again in backward, when the forward is long over."""
    model = made(beit(**RELATIVE))
    backbone = adapt(model, "patch")
    mask = random_mask(Layout.of(backbone, {"pixels": images()}), 5, generator(1))

    def gradient():
        model.zero_grad()
        tokens = backbone.patches(images()) + backbone.positions
        encode_visible(backbone, tokens, mask).square().mean().backward()
        return model.layers[0].relative_position_bias.relative_position_bias_table.grad.clone()

    once = gradient()
    model.train()
    model.activation_checkpointing_enable()
    assert once.any()
    assert torch.allclose(gradient(), once, rtol=1e-4, atol=1e-7)


def test_a_model_that_was_given_patches_is_saved_as_it_was(tmp_path):
    model = made(beit(**RELATIVE))
    backbone = adapt(model, "patch")
    mask = random_mask(Layout.of(backbone, {"pixels": images()}), 5, generator(1))
    encode_visible(backbone, backbone.patches(images()) + backbone.positions, mask)
    own = model(images()).last_hidden_state
    model.save_pretrained(tmp_path)
    assert "maskwright" not in (tmp_path / "config.json").read_text()
    again = BeitModel.from_pretrained(tmp_path).eval()
    assert torch.allclose(again(images()).last_hidden_state, own, rtol=1e-5, atol=1e-6)


def test_unequal_counts_have_no_tensor(model):
    backbone = adapt(model, "patch")
    keep = torch.ones(3, 4, 4, dtype=torch.bool)
    keep[0, 0, 0] = False
    with pytest.raises(UnequalMaskCounts):
        encode_visible(backbone, backbone.patches(images()) + backbone.positions, Mask(keep))


@pytest.mark.parametrize(
    ("whole", "inside"),
    [
        (lambda: ViTForImageClassification(ViTConfig(**SIZE)), "vit"),
        (lambda: DeiTForMaskedImageModeling(DeiTConfig(**SIZE)), "deit"),
        (lambda: BeitForImageClassification(BeitConfig(**SIZE, **RELATIVE)), "beit"),
        (lambda: Dinov2ForImageClassification(Dinov2Config(**SIZE)), "dinov2"),
        (lambda: SwinForMaskedImageModeling(SwinConfig(**SWIN, depths=[1, 1, 1])), "swin"),
    ],
    ids=["vit", "deit", "beit", "dinov2", "swin"],
)
def test_the_encoder_inside_a_model_with_a_head_is_found(whole, inside):
    model = made(whole)
    assert adapt(model, "grid").model is getattr(model, inside)


def test_parameters_are_named_once(model):
    backbone = adapt(model, "patch")
    assert len(list(backbone.parameters())) == len(list(model.parameters()))
    assert set(backbone.state_dict()) == {f"model.{name}" for name in model.state_dict()}


def test_images_of_another_size_are_refused(model):
    for pixels in (images(side=20), images()[:, :1]):
        with pytest.raises(BackboneMismatch, match="The model takes images of 3 × 16 × 16, got"):
            adapt(model, "patch").patches(pixels)


# -- Swin ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "absolute"])
def swin(request):
    other = {"use_absolute_embeddings": request.param == "absolute"}
    config = SwinConfig(**SWIN, depths=[2, 2, 1], drop_path_rate=0.0, **other)
    return made(lambda: SwinModel(config, add_pooling_layer=False))


def test_swin_gives_its_last_stage(swin):
    backbone, pixels = adapt(swin, GridBackbone), images(side=32)
    own = swin(pixels, output_hidden_states=True)
    assert (backbone.grid, backbone.patch_size, backbone.width, backbone.depth) == ((16, 16), 2, 8, 5)
    assert (backbone.feature_stride, backbone.feature_width) == (8, 32)
    assert own.last_hidden_state.shape == (3, 16, 32)
    assert torch.allclose(everything(backbone, pixels), own.last_hidden_state, rtol=1e-5, atol=1e-6)
    levels = everything(backbone, pixels, levels=(-1, 1))
    assert torch.allclose(levels[0], own.hidden_states[-1], rtol=1e-5, atol=1e-6)
    assert levels[1].shape == (3, 256, 8)


def test_swin_masks_as_its_own_mask_token_does(swin):
    """SimMIM of the library itself: the token after the embedding's norm, before the positions."""
    masked = made(lambda: SwinModel(swin.config, add_pooling_layer=False, use_mask_token=True))
    pixels, backbone = images(side=32), adapt(masked, "grid")
    hidden = ~random_mask(Layout.of(backbone, {"pixels": pixels}), 100, generator()).flatten().keep
    token = masked.embeddings.mask_token
    tokens = torch.where(hidden[..., None], token, backbone.patches(pixels)) + backbone.positions
    own = masked(pixels, bool_masked_pos=hidden).last_hidden_state
    assert torch.allclose(backbone.encode(tokens), own, rtol=1e-4, atol=1e-5)


def test_swin_is_refused_where_hidden_patches_are_left_out(swin):
    said = r"SwinModel encodes every patch of an image, .* can leave hidden ones out; use a model that can \(ViTModel.*\), or an objective .*: .*'simmim'"
    objective = maskwright.create("objective", "mae", decoder_width=16, decoder_depth=1, decoder_heads=2)
    for model in (swin, adapt(swin, "grid")):
        with pytest.raises(BackboneMismatch, match=said):
            MaskedTraining(model, maskwright.create("mask-strategy", "random"), objective)


def test_a_swin_whose_merges_do_not_divide_its_grid_is_refused():
    config = SwinConfig(
        image_size=36, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 4], window_size=3
    )
    with pytest.raises(BackboneMismatch, match="must be multiples of 8 pixels"):
        adapt(SwinModel(config), "grid")


def test_swin_trains_with_simmim(swin):
    """One feature for 8 × 8 pixels, so that its head predicts 8 × 8 pixels of each; squares of four patches a side."""
    strategy = maskwright.create("mask-strategy", "simmim-blocks", mask_patch=8)
    objective = maskwright.create("objective", "simmim")
    with torch.random.fork_rng(devices=[]):
        model = MaskedTraining(swin, strategy, objective)
    swin.train()
    out = model(pixels=images(side=32))
    out["loss"].backward()
    assert model.bound.head[0].weight.shape[:2] == (8 * 8 * 3, 32)
    assert out["outputs"]["prediction"].shape == (3, 256, 2 * 2 * 3)
    assert out["outputs"]["features"].shape == (3, int(out["mask"].counts[0]) // 16, 32)
    assert all(one.grad is not None and one.grad.isfinite().all() for one in swin.parameters())


@pytest.mark.parametrize("objective", ["mae", "simmim", "hpm"])
@pytest.mark.parametrize("name", ["deit", "beit-relative", "beit-shared", "dinov2-registers"])
def test_they_train_with_objectives_of_both_kinds(name, objective):
    vit = made(PREFIXES[name][0]).train()
    small = {} if objective == "simmim" else {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    with torch.random.fork_rng(devices=[]):
        model = MaskedTraining(
            vit,
            maskwright.create("mask-strategy", "random"),
            maskwright.create("objective", objective, **small),
        )
    loss = model(pixels=images())["loss"]
    loss.backward()
    assert loss.isfinite()
    unused = {part for part, one in vit.named_parameters() if one.grad is None}
    assert {part for part in unused if not part.startswith("pooler.")} <= {"embeddings.mask_token"}
