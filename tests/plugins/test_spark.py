"""SparK: sparse layers that leave no trace, exact leak tests through every stage, the hierarchy, and company."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2Model,
    ResNetConfig,
    ResNetModel,
)

import maskwright
from maskwright import Layout, Mask, adapt
from maskwright.backbones.defaults import vision_transformer
from maskwright.errors import BackboneMismatch, BadParameter, MaskShapeError, UnsupportedLayout
from maskwright.plugins.spark.claim import CLAIM, decide, visible_shares
from maskwright.plugins.spark.decoder import Decoder, fill_empty, widths
from maskwright.plugins.spark.masks import SparkBlocks, visible_count
from maskwright.plugins.spark.objective import Spark, hidden_l2
from maskwright.plugins.spark.schedule import learning_rate, weight_decay
from maskwright.plugins.spark.sparse import Sparse, remask, visible_batch_norm, visible_group_norm
from maskwright.testing import conformance
from maskwright.testing.backbones import PlainConvNet
from maskwright.toolkit.images import normalize_patches, patchify

SIZES = {"hidden_sizes": [8, 12, 16], "depths": [1, 2, 1]}


def _convnext(kind, config, **more):
    """With layer scale and response norm at work, which start at almost nothing."""
    model = kind(config(num_stages=3, patch_size=2, **SIZES, **more))
    for name, parameter in model.named_parameters():
        if "grn" in name or "layer_scale" in name or "norm" in name:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model


def _resnet(**more):
    model = ResNetModel(ResNetConfig(embedding_size=8, **SIZES, **more))
    for name, parameter in model.named_parameters():
        if "normalization.bias" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


NETWORKS = {
    "plain": PlainConvNet,
    "resnet-basic": lambda: _resnet(layer_type="basic"),
    "resnet-bottleneck": lambda: _resnet(layer_type="bottleneck"),
    "convnext": lambda: _convnext(ConvNextModel, ConvNextConfig),
    "convnextv2": lambda: _convnext(ConvNextV2Model, ConvNextV2Config),
}


def network(name, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name]()


def bound(name="resnet-basic", seed=0, **settings):
    model = network(name, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Spark(**{"decoder_width": 16, **settings}).bind(model)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(objective, batch=3, grid=(3, 4), seed=1):
    cell = objective.patch_size
    return torch.randn(batch, 3, grid[0] * cell, grid[1] * cell, generator=generator(seed))


def blocks(batch=3, grid=(3, 4), seed=2, ratio=0.6):
    layout = Layout(batch, grid, patch_size=8)
    return SparkBlocks(ratio=ratio).draw(layout, signals={}, progress=0.0, generator=generator(seed))


def dense_maps(backbone, x):
    maps = []
    x = backbone.stem(x)
    for stage in backbone.stages:
        x = stage(x)
        maps.append(x)
    return maps


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


@pytest.mark.parametrize(
    "check",
    [check for _, check in conformance(SparkBlocks) + conformance(Spark)],
    ids=lambda check: f"{check.component.kind}-{check.name}",
)
def test_conforms(check):
    check()


# -- the blocks (exact check 7) ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "ratio", "visible"),
    [(7, 0.6, 20), (14, 0.6, 78), (12, 0.75, 36), (4, 0.6, 6), (2, 0.75, 1), (5, 0.5, 12), (7, 0.625, 18)],
)
def test_visible_counts_are_the_official_ones(side, ratio, visible):
    assert visible_count(side * side, ratio) == visible
    assert blocks(5, (side, side), ratio=ratio).counts.tolist() == [visible] * 5


def test_every_cell_is_as_likely_to_stay():
    draws = 20_000
    share = blocks(draws, (4, 4)).keep.double().mean(0)
    # Five standard errors, for 16 numbers.
    assert (share - 6 / 16).abs().max() < 5 * math.sqrt(6 / 16 * 10 / 16 / draws)


def test_a_ratio_that_leaves_nothing_visible_is_refused():
    with pytest.raises(UnsupportedLayout, match="none visible"):
        blocks(1, (2, 2), ratio=0.9)


def test_a_wrong_ratio_is_refused():
    with pytest.raises(BadParameter, match=r"in \[0, 1\)"):
        SparkBlocks(ratio=1.0)


# -- sparse layers against references written for clarity ----------------------------------------------------------


def naive_positions(x, keep):
    """(row of the batch, y, x) of every visible place."""
    return [tuple(place) for place in keep.nonzero().tolist()]


def naive_convolution(x, keep, weight, bias, stride, padding, groups, made):
    """At each visible place of the output, a sum over the visible places of the input under the kernel."""
    out = torch.zeros(made, dtype=x.dtype)
    outputs, inside, size, _ = weight.shape
    block = outputs // groups
    step = x.shape[2] // keep.shape[1]
    keep_in = keep.repeat_interleave(step, 1).repeat_interleave(step, 2)
    keep_out = keep.repeat_interleave(made[2] // keep.shape[1], 1).repeat_interleave(
        made[3] // keep.shape[2], 2
    )
    for b, i, j in naive_positions(out, keep_out):
        total = bias.clone()
        for di in range(size):
            for dj in range(size):
                y, z = i * stride + di - padding, j * stride + dj - padding
                if 0 <= y < x.shape[2] and 0 <= z < x.shape[3] and keep_in[b, y, z]:
                    for group in range(groups):
                        rows = slice(group * block, (group + 1) * block)
                        seen = x[b, group * inside : (group + 1) * inside, y, z]
                        total[rows] += weight[rows, :, di, dj] @ seen
        out[b, :, i, j] = total
    return out


@pytest.mark.parametrize(
    ("size", "stride", "padding", "groups"),
    [(3, 1, 1, 1), (3, 2, 1, 1), (1, 2, 0, 1), (7, 1, 3, 4), (2, 2, 0, 2)],
)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_a_convolution_is_the_gather_and_scatter_one(size, stride, padding, groups, biased):
    layer = nn.Conv2d(4, 8, size, stride, padding, groups=groups, bias=biased).double()
    mask = blocks(2, (2, 3), ratio=0.5)
    keep = mask.upsample((4, 6)).keep
    x = torch.randn(2, 4, 4, 6, generator=generator(), dtype=torch.float64) * keep[:, None]
    with torch.no_grad(), Sparse(mask):
        ours = layer(x)
    bias = layer.bias.detach() if biased else torch.zeros(8, dtype=torch.float64)
    naive = naive_convolution(x, mask.keep, layer.weight.detach(), bias, stride, padding, groups, ours.shape)
    torch.testing.assert_close(ours, naive)
    assert not ours[(~mask.upsample(tuple(ours.shape[2:])).keep)[:, None].expand_as(ours)].any()
    assert ours.abs().sum() > 0


def test_a_convolution_of_ones_keeps_the_pattern():
    """Exact check 5."""
    mask = Mask(torch.tensor([[[True, False], [False, False]]]))
    x = mask.upsample((4, 4)).keep[:, None].float()
    weight = torch.ones(1, 1, 3, 3)
    dense = F.conv2d(x, weight, padding=1)
    with Sparse(mask):
        sparse = F.conv2d(x, weight, padding=1)
    assert dense[0, 0].tolist() == [[4, 4, 2, 0], [4, 4, 2, 0], [2, 2, 1, 0], [0, 0, 0, 0]]
    assert sparse[0, 0].tolist() == [[4, 4, 0, 0], [4, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_batch_norm_is_of_visible_values():
    """Exact check 6, and the running statistics with it."""
    layer = nn.BatchNorm2d(1, eps=1e-12)
    x = torch.tensor([1.0, 0.0, 0.0, 3.0]).view(1, 1, 2, 2)
    with Sparse(Mask(torch.tensor([[[True, False], [False, True]]]))):
        y = layer(x)
    assert y.flatten().tolist() == [-1, 0, 0, 1]
    assert layer.running_mean.item() == pytest.approx(0.1 * 2)
    assert layer.running_var.item() == pytest.approx(0.9 + 0.1 * 2)
    dense = nn.BatchNorm2d(1, eps=1e-12)(x).flatten()
    torch.testing.assert_close(dense, torch.tensor([0.0, -0.8165, -0.8165, 1.6330]), atol=1e-4, rtol=0)


def naive_batch_norm(x, keep, weight, bias, eps):
    """One channel after the other, over a list of the visible values of the batch."""
    out = torch.zeros_like(x)
    places = naive_positions(x, keep)
    for c in range(x.shape[1]):
        values = torch.stack([x[b, c, i, j] for b, i, j in places])
        mean, variance = values.mean(), values.var(unbiased=False)
        for b, i, j in places:
            out[b, c, i, j] = (x[b, c, i, j] - mean) / (variance + eps).sqrt() * weight[c] + bias[c]
    return out


def test_batch_norm_and_its_gradient_are_the_naive_ones():
    layer = nn.BatchNorm2d(3).double()
    nn.init.normal_(layer.weight, generator=generator(3))
    nn.init.normal_(layer.bias, generator=generator(4))
    mask = blocks(2, (2, 3), ratio=0.5)
    keep = mask.upsample((4, 6)).keep
    x, naive_x = (
        torch.randn(2, 3, 4, 6, generator=generator(), dtype=torch.float64).requires_grad_() for _ in range(2)
    )
    with Sparse(mask):
        ours = layer(x)
    naive = naive_batch_norm(naive_x, keep, layer.weight, layer.bias, layer.eps)
    torch.testing.assert_close(ours, naive)
    weights = torch.randn(ours.shape, generator=generator(5), dtype=torch.float64)
    (ours * weights).sum().backward()
    (naive * weights).sum().backward()
    torch.testing.assert_close(x.grad, naive_x.grad)
    assert not x.grad[(~keep)[:, None].expand_as(x)].any()


def test_one_visible_vector_alone_takes_the_running_statistics():
    x = torch.full((1, 2, 2, 2), 3.0)
    mean, variance = torch.ones(2), torch.full((2,), 4.0)
    y = visible_batch_norm(x, torch.tensor([2]), mean, variance, training=True, eps=0.0)
    assert y[0, 0].flatten().tolist() == [0, 0, 1, 0]
    assert mean.tolist() == [1, 1]


def test_layer_norm_is_of_the_channels_of_each_visible_place_in_both_formats():
    from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

    mask = blocks(2, (2, 3), ratio=0.5)
    keep = mask.keep
    x = torch.randn(2, 5, 2, 3, generator=generator())
    expected = torch.zeros_like(x)
    bias = torch.arange(5.0)
    for b, i, j in naive_positions(x, keep):
        seen = x[b, :, i, j]
        expected[b, :, i, j] = (seen - seen.mean()) / (seen.var(unbiased=False) + 1e-6).sqrt() + bias
    for layout in ("channels_first", "channels_last"):
        layer = ConvNextLayerNorm(5, data_format=layout)
        layer.bias.data.copy_(bias)
        with Sparse(mask):
            y = layer(x) if layout == "channels_first" else layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(y, expected)


def test_pooling_sees_zeros_at_empty_places_and_divides_by_the_whole_window():
    mask = Mask(torch.tensor([[[True, False], [False, True]]]))
    x = torch.arange(1.0, 17).view(1, 1, 4, 4) * mask.upsample((4, 4)).keep[:, None]
    with Sparse(mask):
        largest, mean = F.max_pool2d(x, 2), F.avg_pool2d(x, 2)
        padded = nn.MaxPool2d(3, 2, 1)(x)
        pooled, index = F.max_pool2d(x, 2, return_indices=True)
    assert largest.flatten().tolist() == [6, 0, 0, 16]
    assert mean.flatten().tolist() == [3.5, 0, 0, 13.5]
    assert padded.flatten().tolist() == [6, 0, 0, 16]
    assert pooled.flatten().tolist() == [6, 0, 0, 16]
    assert index.shape == pooled.shape
    with Sparse(mask):
        across = F.avg_pool2d(x, 3, 1, 1)
    assert across[0, 0, 1, 1].item() == pytest.approx((1 + 2 + 5 + 6 + 11) / 9)


def test_global_means_and_group_norm_are_of_visible_places():
    mask = blocks(2, (2, 3), ratio=0.5)
    keep = mask.upsample((4, 6)).keep
    x = torch.randn(2, 4, 4, 6, generator=generator()) + 2
    expected = torch.stack([x[b][:, keep[b]].mean(1) for b in range(2)])
    layer = nn.GroupNorm(2, 4)
    nn.init.normal_(layer.weight, generator=generator(1))
    nn.init.normal_(layer.bias, generator=generator(2))
    with Sparse(mask):
        means = [
            nn.AdaptiveAvgPool2d(1)(x).flatten(1),
            x.mean((2, 3)),
            torch.mean(x, dim=(-2, -1), keepdim=True).flatten(1),
            x.permute(0, 2, 3, 1).mean([1, 2]),
        ]
        normal = layer(x)
        summary = F.conv2d(nn.AdaptiveAvgPool2d(1)(x), torch.ones(4, 4, 1, 1), torch.ones(4))
    for mean in means:
        torch.testing.assert_close(mean, expected)
    assert summary.shape == (2, 4, 1, 1)
    torch.testing.assert_close(summary.flatten(1), (expected.sum(1, keepdim=True) + 1).expand(2, 4))
    for b in range(2):
        for group in range(2):
            rows = slice(2 * group, 2 * group + 2)
            seen = x[b, rows][:, keep[b]]
            own = (seen - seen.mean()) / (seen.var(unbiased=False) + 1e-5).sqrt()
            own = own * layer.weight[rows, None] + layer.bias[rows, None]
            torch.testing.assert_close(normal[b, rows][:, keep[b]], own)
    assert not normal[(~keep)[:, None].expand_as(normal)].any()
    everything = torch.ones(2, 1, 4, 6, dtype=torch.bool)
    torch.testing.assert_close(visible_group_norm(x, everything, 2, layer.weight, layer.bias), layer(x))


def test_remasking_works_in_low_precision_and_passes_gradient_at_visible_places_only():
    keep = torch.tensor([[[[True, False]]]])
    x = torch.ones(1, 2, 1, 2, dtype=torch.bfloat16, requires_grad=True)
    y = remask(x * 3, keep)
    assert y.dtype == torch.bfloat16
    assert y[0, 0].tolist() == [[3, 0]]
    y.sum().backward()
    assert x.grad[0, 0].tolist() == [[3, 0]]


@pytest.mark.parametrize(
    "layer",
    [
        nn.InstanceNorm2d(4),
        nn.Upsample(scale_factor=2),
        nn.AdaptiveMaxPool2d(1),
        nn.AdaptiveAvgPool2d(2),
        nn.LayerNorm((4, 4, 4)),
        nn.ConvTranspose2d(4, 4, 2, 2),
        nn.Conv2d(4, 4, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_has_no_sparse_form_is_refused(layer):
    with pytest.raises(BackboneMismatch), Sparse(blocks(2, (2, 2))):
        layer(torch.randn(2, 4, 4, 4))


# -- the whole network (exact checks 1 to 3) -----------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_hidden_pixels_reach_no_map_and_no_prediction(name, training):
    """Exact check 1: bit-identical, whatever is hidden; the loss moves, since its target is what is hidden."""
    objective = bound(name).train(training)
    x, mask = images(objective), blocks()
    seen = mask.upsample(tuple(x.shape[2:])).keep[:, None]
    state = {key: value.clone() for key, value in objective.state_dict().items()}
    before = objective({"pixels": x}, mask)
    maps, _ = objective.encode(x, mask)
    for content in (torch.randn(x.shape, generator=generator(8)), torch.full_like(x, 1e6)):
        objective.load_state_dict(state)
        other = torch.where(seen, x, content)
        after = objective({"pixels": other}, mask)
        assert torch.equal(before.outputs["prediction"], after.outputs["prediction"])
        assert torch.equal(before.outputs["features"], after.outputs["features"])
        for one, two in zip(maps, objective.encode(other, mask)[0]):
            assert torch.equal(one, two)
        if content.std() > 0:
            assert before.total.item() != after.total.item()


def test_what_is_visible_reaches_the_maps(name):
    objective = bound(name).eval()
    x, mask = images(objective), blocks()
    place = mask.upsample(tuple(x.shape[2:])).keep[0].nonzero()[0].tolist()
    changed = x.clone()
    changed[0, :, place[0], place[1]] += 1
    for one, two in zip(objective.encode(x, mask)[0], objective.encode(changed, mask)[0]):
        assert not torch.equal(one[0], two[0])
        assert torch.equal(one[1:], two[1:])


def test_every_map_has_the_pattern_of_the_repeated_mask(name):
    """Exact check 2, and more: at visible places something is there."""
    objective = bound(name)
    x, mask = images(objective), blocks()
    maps, normal = objective.encode(x, mask)
    assert len(maps) == len(objective.backbone.strides) - 1
    for one, stride in zip(maps, objective.backbone.strides[1:]):
        size = tuple(side // stride for side in x.shape[2:])
        assert tuple(one.shape[2:]) == size
        assert torch.equal(one.abs().sum(1) > 0, mask.upsample(size).keep)
    for one in normal:
        if one is not None:
            assert not one[(~mask.upsample(tuple(one.shape[2:])).keep)[:, None].expand_as(one)].any()


def test_with_everything_visible_it_is_the_dense_network(name):
    """Exact check 3: training mode, running statistics included."""
    sparse, dense = bound(name).double(), adapt(network(name).double(), "conv")
    x = images(sparse).double()
    everything = Mask(torch.ones(3, 3, 4, dtype=torch.bool))
    for one, two in zip(sparse.encode(x, everything)[0], dense_maps(dense, x)):
        torch.testing.assert_close(one, two)
    ours, theirs = sparse.backbone.state_dict(), dense.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value)


def test_a_small_network_is_the_composition_of_naive_layers():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.channels, self.strides, self.widths = 3, (1, 2), (4, 6)
            self.first = nn.Conv2d(3, 4, 3, padding=1)
            self.stages = nn.ModuleList(
                [nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1))]
            )

        def stem(self, pixels):
            return self.first(pixels)

    torch.manual_seed(0)
    small = Small().double()
    objective = Spark(decoder_width=4).bind(small).double()
    mask = blocks(2, (2, 3), ratio=0.5)
    x = torch.randn(2, 3, 4, 6, generator=generator(), dtype=torch.float64)
    keep = mask.upsample((4, 6)).keep
    first, (norm, _, second) = small.first, small.stages[0]
    shown = torch.where(keep[:, None], x, 0)
    y = naive_convolution(shown, mask.keep, first.weight, first.bias, 1, 1, 1, (2, 4, 4, 6))
    y = naive_batch_norm(y, keep, norm.weight, norm.bias, norm.eps).clamp(min=0)
    y = naive_convolution(y, mask.keep, second.weight, second.bias, 2, 1, 1, (2, 6, 2, 3))
    torch.testing.assert_close(objective.encode(x, mask)[0][0], y)


# -- no trace ------------------------------------------------------------------------------------------------------


def test_nothing_is_left_on_the_users_network(name, tmp_path):
    model, untouched = network(name), network(name)
    objective = Spark(decoder_width=16).bind(model).eval()
    x, mask = images(objective), blocks()
    before = [one.detach() for one in dense_maps(adapt(untouched.eval(), "conv"), x)]
    loss = objective({"pixels": x}, mask)
    for one, two in zip(dense_maps(adapt(model, "conv"), x), before):
        assert torch.equal(one, two)
    loss.total.backward()
    assert [type(one) for one in model.modules()] == [type(one) for one in untouched.modules()]
    assert list(model.state_dict()) == list(untouched.state_dict())
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    if name == "plain":
        return
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(x).last_hidden_state, untouched(x).last_hidden_state)


def test_the_mask_belongs_to_the_context_and_to_its_thread():
    layer = nn.Conv2d(1, 1, 3, padding=1)
    x, one, two = torch.ones(1, 1, 2, 2), blocks(1, (2, 2), seed=0), blocks(1, (2, 2), seed=3)
    assert not torch.equal(one.keep, two.keep)
    seen = []
    with Sparse(one):
        with Sparse(two):
            pass
        seen.append(layer(x))
        thread = threading.Thread(target=lambda: seen.append(layer(x)))
        thread.start()
        thread.join()
    dense = layer(x)
    assert torch.equal(seen[0] != 0, one.keep[:, None])
    assert torch.equal(seen[1], dense)
    with pytest.raises(ZeroDivisionError), Sparse(one):
        _ = 1 / 0
    assert torch.equal(layer(x), dense)


# -- the hierarchy -------------------------------------------------------------------------------------------------


def test_the_decoder_takes_every_scale_from_coarse_to_fine():
    objective = bound("resnet-basic", decoder_width=32)
    assert objective.patch_size == 16
    assert objective.stage_of == [2, 1, 0, None]
    assert widths(32, 4) == [32, 16, 8, 4, 2]
    kinds = [type(objective.projections[key]) for key in "012"]
    assert kinds == [nn.Conv2d] * 3
    sizes = [objective.projections[key].kernel_size for key in "012"]
    assert sizes == [(1, 1), (3, 3), (3, 3)]
    made = [(one.in_channels, one.out_channels) for one in objective.projections.values()]
    assert made == [(16, 32), (12, 16), (8, 8)]
    assert all(one.bias is not None for one in objective.projections.values())
    assert [tuple(one.shape) for one in objective.mask_embeddings.values()] == [
        (1, 16, 1, 1),
        (1, 12, 1, 1),
        (1, 8, 1, 1),
    ]
    for embedding in objective.mask_embeddings.values():
        assert 0 < float(embedding.detach().abs().max()) <= 0.02
    block = objective.decoder.blocks[0]
    assert [type(layer) for layer in block.mix] == [
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.ReLU6,
        nn.Conv2d,
        nn.BatchNorm2d,
    ]
    assert (block.up.kernel_size, block.up.stride, block.up.padding) == ((4, 4), (2, 2), (1, 1))
    assert len(objective.decoder.blocks) == 4


def test_the_coarsest_map_of_the_decoders_width_is_taken_as_it_is():
    assert isinstance(bound("resnet-basic", decoder_width=16).projections["0"], nn.Identity)


def test_norms_follow_the_network_unless_told():
    from maskwright.plugins.spark.decoder import ChannelNorm

    assert isinstance(bound("resnet-basic").norms["0"], nn.BatchNorm2d)
    assert isinstance(bound("convnext").norms["0"], ChannelNorm)
    assert bound("convnext").norms["0"].eps == 1e-6
    assert isinstance(bound("convnext", densify_norm="none").norms["0"], nn.Identity)
    with pytest.raises(BadParameter, match="one of auto, batch, layer, none"):
        Spark(densify_norm="group")


def test_stages_of_one_size_give_the_last_one():
    """The kit's ResNet has strides 4, 4, 8: of the two maps at 4 the stage's counts, and the stem's never does."""
    from maskwright.testing.backbones import backbone

    objective = Spark(decoder_width=16).bind(backbone("transformers-resnet", 0))
    assert tuple(objective.backbone.strides) == (4, 4, 8)
    assert objective.stage_of == [1, 0, None]


def test_empty_places_take_the_embedding_of_their_scale():
    keep = torch.tensor([[[[True, False]]]])
    x = torch.ones(1, 2, 1, 2).requires_grad_()
    embedding = torch.tensor([5.0, 7.0]).view(1, 2, 1, 1).requires_grad_()
    filled = fill_empty(x, embedding, keep)
    assert filled[0].tolist() == [[[1, 5]], [[1, 7]]]
    filled.sum().backward()
    assert embedding.grad.flatten().tolist() == [1, 1]
    assert x.grad[0, 0].tolist() == [[1, 0]]


def test_the_decoder_adds_finer_maps_on_the_way():
    torch.manual_seed(0)
    decoder = Decoder(8, 2, 3).eval()
    coarse, fine = torch.randn(1, 8, 2, 2), torch.randn(1, 4, 4, 4)
    first, second = decoder.blocks
    expected = decoder.pixels(second(first(coarse) + fine))
    assert torch.equal(decoder([coarse, fine]), expected)
    assert torch.equal(decoder([coarse, None]), decoder.pixels(second(first(coarse))))
    assert expected.shape == (1, 3, 8, 8)


def test_gradients_reach_every_parameter(name):
    objective = bound(name)
    objective({"pixels": images(objective)}, blocks()).total.backward()
    idle = [key for key, one in objective.named_parameters() if one.grad is None or not one.grad.any()]
    # The norm after ConvNeXt's global pooling is no part of its maps.
    assert [
        key for key in idle if key not in ("backbone.model.layernorm.weight", "backbone.model.layernorm.bias")
    ] == []


# -- the loss (exact check 4) --------------------------------------------------------------------------------------


def test_loss_of_the_hand_case():
    target = normalize_patches(torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]))
    torch.testing.assert_close(
        target, torch.tensor([[[-1.1619, -0.3873, 0.3873, 1.1619]]]), atol=1e-4, rtol=0
    )
    hidden = torch.tensor([[True]])
    assert hidden_l2(torch.zeros_like(target), target, hidden).item() == pytest.approx(0.75, abs=1e-5)


def test_only_hidden_blocks_cost_and_the_batch_has_one_denominator():
    objective = bound()
    nn.init.normal_(objective.decoder.pixels.weight, generator=generator(5))
    x = images(objective, 2)
    keep = torch.ones(2, 3, 4, dtype=torch.bool)
    keep[0, 0, 0] = False
    keep[1, 1:] = False
    loss = objective({"pixels": x}, Mask(keep))
    target = normalize_patches(patchify(x, objective.patch_size))
    error = (loss.outputs["prediction"] - target).square().mean(-1)
    hidden = ~keep.flatten(1)
    assert loss.total.item() == pytest.approx(error[hidden].mean().item(), rel=1e-5)
    assert loss.total.item() != pytest.approx(
        (error[0][hidden[0]].mean() + error[1][hidden[1]].mean()).item() / 2, rel=1e-4
    )


def test_an_empty_mask_costs_nothing():
    objective = bound()
    loss = objective({"pixels": images(objective)}, Mask(torch.ones(3, 3, 4, dtype=torch.bool)))
    assert loss.total.item() == 0
    loss.total.backward()


def test_the_picture_is_the_image_where_visible_and_the_prediction_in_pixels_elsewhere():
    objective = bound().eval()
    x, mask = images(objective), blocks()
    outputs = objective({"pixels": x}, mask).outputs
    seen = mask.upsample(tuple(x.shape[2:])).keep[:, None].expand_as(x)
    assert torch.equal(outputs["reconstruction"][seen], x[seen])
    shown = patchify(outputs["reconstruction"], objective.patch_size)
    normal = normalize_patches(patchify(x, objective.patch_size))
    told = outputs["prediction"]
    hidden = ~mask.flatten().keep
    true = patchify(x, objective.patch_size)
    deviation = (true.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(
        ((shown - true) / deviation)[hidden], (told - normal)[hidden], rtol=1e-3, atol=1e-4
    )
    maps, _ = objective.encode(x, mask)
    assert torch.equal(
        outputs["features"], mask.gather_visible(maps[-1].flatten(2).transpose(1, 2).contiguous())
    )


def test_schedules_are_the_official_ones():
    """Exact check 8."""
    rates = {step: learning_rate(step, peak=1.0, warmup=10, total=100) for step in (0, 9, 10, 50, 99)}
    assert rates == pytest.approx({0: 0.005, 9: 0.9005, 10: 1.0, 50: 0.57951, 99: 0.001}, abs=1e-5)
    assert weight_decay(0, total=100) == pytest.approx(0.04)
    assert weight_decay(99, total=100) == pytest.approx(0.2)


# -- what does not fit ---------------------------------------------------------------------------------------------


def test_images_and_masks_that_do_not_fit_are_refused():
    objective = bound()
    with pytest.raises(MaskShapeError, match="no multiples of the network's total stride of 16"):
        objective({"pixels": torch.randn(2, 3, 50, 32)}, blocks(2, (3, 2)))
    with pytest.raises(MaskShapeError, match=r"\[2, 3, 3\].*\[2, 3, 4\]"):
        objective({"pixels": images(objective, 2)}, blocks(2, (3, 3)))


class Odd(PlainConvNet):
    """`PlainConvNet` with another last layer."""

    def __init__(self, last, strides=(2, 4, 8)):
        super().__init__()
        self.strides = strides
        self.stages[1].append(last)


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(BackboneMismatch, match=r"2, 4, 8, …, not 12"):
        Spark().bind(Odd(nn.Identity(), (3, 6, 12)))
    with pytest.raises(BadParameter, match="at least 8"):
        Spark(decoder_width=4).bind(PlainConvNet())
    for last, words in (
        (nn.Sigmoid(), "stage 2 makes features where the mask hides"),
        (nn.MaxPool2d(3, 1, 1), None),
        (nn.Conv2d(16, 16, 2, stride=2), "stage 2 makes maps of|no divisor"),
    ):
        objective = Spark(decoder_width=16).bind(Odd(last))
        if words is None:
            objective({"pixels": images(objective)}, blocks())
            continue
        with pytest.raises(BackboneMismatch, match=words):
            objective({"pixels": images(objective, grid=(4, 4))}, blocks(3, (4, 4)))


# -- company -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["spark", "random", "block", "colormae", "simmim-blocks"])
def test_any_strategys_mask_trains_it(strategy):
    drawn = maskwright.create("mask-strategy", strategy, **({"min_block": 2} if strategy == "block" else {}))
    objective, random = bound("plain"), generator()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
    coarse = torch.rand(8, 3, 2, 2, generator=generator(4))
    batch = {"pixels": F.interpolate(coarse, 32, mode="bilinear")}
    layout = Layout.of(objective.backbone, batch)
    assert (layout.grid, layout.patch_size) == ((4, 4), 8)
    losses = []
    for _ in range(40):
        mask = drawn.draw(layout, signals={}, progress=0.5, generator=random)
        loss = objective(batch, mask).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("mae", {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}), ("simmim", {})],
)
def test_its_blocks_serve_transformers(name, sizes):
    vit = vision_transformer(image_size=16, patch_size=4, width=16, depth=1, heads=2)
    model = maskwright.MaskedTraining(vit, SparkBlocks(), maskwright.create("objective", name, **sizes))
    out = model(pixels=torch.randn(2, 3, 16, 16, generator=generator()))
    assert out["mask"].counts.tolist() == [6, 6]
    out["loss"].backward()


@pytest.mark.parametrize("name", ["resnet-basic", "convnext"])
def test_masked_training_takes_transformers_networks(name):
    model = maskwright.MaskedTraining(network(name), SparkBlocks(), Spark(decoder_width=16))
    out = model(pixels=images(model.bound))
    out["loss"].backward()
    assert "reconstruction" not in out["outputs"], "drawn when somebody looks"
    shown = model.eval()(pixels=images(model.bound))["outputs"]["reconstruction"]
    assert shown.shape == (3, 3, *images(model.bound).shape[2:])


def test_the_job_leaves_pictures_probes_and_an_ordinary_resnet(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModel

    from maskwright.jobs import execute
    from maskwright.jobs.settings import resolve

    settings = resolve(
        "pretrain",
        None,
        {
            "objective": {"name": "spark", "decoder_width": 16},
            "run": {"steps": 2, "batch_size": 8},
            "model": {"width": 4, "depth": 1},
            "data": {"source": "digits"},
        },
    )
    assert settings.strategy.name == "spark"
    assert settings.data.size == 64
    assert settings.model.heads is settings.model.patch_size is None
    result = execute(settings, folder=tmp_path / "run", quiet=True)
    assert 0 <= result.summary["linear_probe"] <= 1
    assert 0 <= result.summary["knn_probe"] <= 1
    pictures = load_file(result.folder / "pictures.safetensors")
    assert {"originals", "masks", "reconstructions"} <= set(pictures)
    model = AutoModel.from_pretrained(result.folder / "model")
    assert isinstance(model, ResNetModel)


def test_the_job_takes_a_folder_of_a_convolutional_network(tmp_path):
    from maskwright.jobs.pretrain import data, model
    from maskwright.jobs.settings import resolve

    network("convnext").save_pretrained(tmp_path)
    settings = resolve("pretrain", None, {"objective": {"name": "spark"}, "model": {"source": str(tmp_path)}})
    source = data(settings, Spark())
    assert source.size == 224
    assert isinstance(model(settings, Spark(), source), ConvNextModel)


# -- the claim and the benchmark -------------------------------------------------------------------------------------


def test_dense_convolutions_spread_and_sparse_ones_do_not():
    dense, sparse = visible_shares(0, draws=40)
    assert sparse == [0.375] * 9
    assert dense[0] == 0.375
    torch.testing.assert_close(
        torch.tensor(dense),
        torch.tensor([0.375, 0.470, 0.565, 0.659, 0.753, 0.811, 0.864, 0.912, 0.957]),
        atol=0.02,
        rtol=0,
    )


def test_the_claim_is_refused_when_anything_leaks_or_spreads():
    good = {
        "sparse: largest change of visible features": 0.0,
        "dense: largest change of visible features": 0.5,
        **{f"dense: share of non-zero places after {k} convolutions": 0.375 + 0.07 * k for k in range(9)},
        **{f"sparse: share of non-zero places after {k} convolutions": 0.375 for k in range(9)},
    }
    assert decide([good] * 3)
    for key, value in (
        ("sparse: largest change of visible features", 1e-9),
        ("dense: largest change of visible features", 0.0),
        ("sparse: share of non-zero places after 8 convolutions", 0.376),
        ("dense: share of non-zero places after 8 convolutions", 0.7),
    ):
        assert not decide([good, {**good, key: value}, good])
    assert len(CLAIM.seeds) >= 3


def test_the_benchmark_has_a_row_for_each_layer(monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    import benchmarks.spark_convolution as benchmark

    monkeypatch.setattr(benchmark, "REPEATS", 1)
    monkeypatch.setattr(benchmark, "BATCH", 1)
    assert len(benchmark.LAYERS) >= 5
    small = {"3 × 3": (lambda: nn.Conv2d(3, 4, 3, padding=1), 14), "1 × 1": (lambda: nn.Conv2d(4, 4, 1), 7)}
    monkeypatch.setattr(benchmark, "LAYERS", small)
    rows = benchmark.run()
    layers = len(benchmark.LAYERS)
    assert [row["bound"] for row in rows] == [1.3] * layers + [None] * layers + [1.3]
    assert all(row["seconds"] > 0 for row in rows)
