"""CAE: who may look at what, exactly; the regressor's block; the alignment and where its gradient goes."""

import pytest
import torch
from torch import nn

import maskwright
from maskwright import Layout, Mask
from maskwright.backbones.defaults import vision_transformer
from maskwright.errors import BadData, BadParameter, UnequalMaskCounts
from maskwright.plugins.cae.codes import PatchCodes
from maskwright.plugins.cae.objective import ContextAutoencoder, RegressorBlock, alignment, survival
from maskwright.testing import conformance

SMALL = {"regressor_depth": 2, "decoder_depth": 1}
ALL = torch.ones(2, 1, 1, 1)
"""Nothing is dropped."""


def vit(seed=1):
    return vision_transformer(image_size=16, patch_size=4, width=16, depth=2, heads=2, seed=seed)


def bound(**settings):
    torch.manual_seed(0)
    return ContextAutoencoder(**{**SMALL, **settings}).bind(vit()).eval()


def batch(count=3, seed=0):
    return {"pixels": torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def mask(count=3, keep=9, seed=0):
    order = torch.rand(count, 16, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return Mask((order < keep).view(count, 4, 4))


def changed(data, drawn, *, hidden):
    """The batch with other pixels in hidden (or in visible) patches."""
    shown = drawn.upsample((16, 16)).keep[:, None]
    other = torch.randn(data["pixels"].shape, generator=torch.Generator().manual_seed(9))
    return {"pixels": torch.where(shown == hidden, data["pixels"], other)}


# -- who looks at what -----------------------------------------------------------------------------------------


def test_hidden_pixels_reach_only_the_targets():
    one, data, drawn = bound(), batch(), mask()
    other = changed(data, drawn, hidden=True)
    before, after = one(data, drawn), one(other, drawn)
    for name in ("features", "latents", "prediction"):
        assert torch.equal(before.outputs[name], after.outputs[name]), name
    hidden = ~drawn.flatten()
    assert not torch.equal(one.encode(data["pixels"], hidden)[0], one.encode(other["pixels"], hidden)[0])


def test_visible_pixels_do_not_reach_the_aligned_latents():
    one, data, drawn = bound(), batch(), mask()
    other, hidden = changed(data, drawn, hidden=False), ~drawn.flatten()
    assert torch.equal(one.encode(data["pixels"], hidden)[0], one.encode(other["pixels"], hidden)[0])
    assert not torch.equal(one(data, drawn).outputs["prediction"], one(other, drawn).outputs["prediction"])


def test_the_decoder_sees_no_visible_latent():
    one, data, drawn = bound(), batch(), mask()
    expected = one(data, drawn).outputs
    seen = []
    one.decoder[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    assert torch.equal(one.decode(expected["latents"], drawn.flatten()), expected["prediction"])
    at = drawn.flatten().gather_hidden(one.positions.expand(3, -1, -1))
    assert torch.equal(seen[0], expected["latents"] + at)


def test_the_target_is_the_same_encoder_on_the_complement():
    one, data, drawn = bound(), batch(), mask()
    loss = one(data, drawn)
    target = one.encode(data["pixels"], ~drawn.flatten())[1]
    assert torch.allclose(loss.parts["alignment"], 2 * (loss.outputs["latents"] - target).square().mean())


def test_without_weight_the_target_is_not_even_computed():
    one, data, drawn = bound(weight=0.0), batch(), mask()
    loss = one(data, drawn)
    assert loss.parts["alignment"] == 0
    assert loss.total == loss.parts["target"]


# -- the regressor ---------------------------------------------------------------------------------------------


def test_a_regressor_block_is_what_its_equations_say():
    torch.manual_seed(0)
    block = RegressorBlock(8, 2, 0.1)
    for norm in (block.norm_query, block.norm_key, block.norm_value, block.norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    q, x, ph, pv = torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    context, positions = torch.cat([x, q], 1)[0], torch.cat([pv, ph], 1)[0]
    queries = block.attention.query(block.norm_query(q + ph))[0]
    keys, values = (
        block.attention.key(block.norm_key(context + positions)),
        block.attention.value(block.norm_value(context)),
    )
    rows = []
    for m in range(3):
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            weights = torch.softmax(torch.stack([queries[m, h] @ key[h] for key in keys]) / 2, 0)
            heads.append(sum(w * value[h] for w, value in zip(weights, values)))
        rows.append(torch.cat(heads))
    h = block.norm(q[0] + 0.1 * block.attention.out(torch.stack(rows)))
    assert torch.allclose(block(q, x, ph, pv, ALL)[0], h + 0.1 * block.mlp(h), atol=1e-5)


def test_visible_latents_stay_fixed_and_queries_see_each_other():
    one, drawn = bound(), mask(1).flatten()
    visible = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(1))
    blocks = []
    for block in one.regressor:
        block.register_forward_pre_hook(lambda module, given: blocks.append(given[1]))
    one.regress(visible, drawn)
    assert all(torch.equal(given, visible) for given in blocks)
    block, q, p = one.regressor[0], torch.randn(1, 7, 16), torch.zeros(1, 7, 16)
    other = q.clone()
    other[:, 6] = torch.randn(16)
    at = torch.zeros(1, 9, 16)
    assert not torch.equal(block(q, visible, p, at, ALL)[:, 0], block(other, visible, p, at, ALL)[:, 0])


def test_a_permutation_of_hidden_patches_permutes_latents_and_predictions():
    one, visible = bound(), torch.randn(1, 9, 16)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    at_hidden, at_visible, q = torch.randn(1, 7, 16), torch.randn(1, 9, 16), one.mask_token.expand(1, 7, 16)
    straight, turned = q, q
    for block in one.regressor:
        straight = block(straight, visible, at_hidden, at_visible, ALL)
        turned = block(turned, visible, at_hidden[:, order], at_visible, ALL)
    assert torch.allclose(straight[:, order], turned, atol=1e-6)
    (block,) = one.decoder
    assert torch.allclose(block(straight, ALL)[:, order], block(straight[:, order], ALL), atol=1e-5)


def test_a_regressor_of_no_depth_knows_only_its_token():
    one, drawn = bound(regressor_depth=0), mask().flatten()
    latents = one.regress(torch.randn(3, 9, 16), drawn)
    assert torch.equal(latents, one.regressor_norm(one.mask_token).expand(3, 7, 16))


# -- the loss --------------------------------------------------------------------------------------------------


def test_an_offset_of_the_latents_costs_its_square():
    target = torch.randn(2, 5, 8)
    assert alignment(target, target) == 0
    assert torch.allclose(2 * alignment(target + 0.3, target), torch.tensor(2 * 0.09), atol=1e-6)


def test_the_alignment_is_all_that_its_weight_adds():
    one, data, drawn = bound(tokenizer=Codes()), batch(), mask()
    loss, alone = one(data, drawn), bound(tokenizer=Codes(), weight=0.0)
    alone.load_state_dict(one.state_dict())
    target = one.encode(data["pixels"], ~drawn.flatten())[1]
    # Z = Z̄ + c costs 2 c².
    nn.init.zeros_(one.regressor_norm.weight)
    one.regressor_norm.register_forward_hook(lambda module, given, output: target + 0.3)
    moved = one(data, drawn)
    assert torch.allclose(moved.total - moved.parts["target"], torch.tensor(2 * 0.3**2), atol=1e-5)
    assert torch.allclose(loss.total - alone(data, drawn).total, loss.parts["alignment"], atol=1e-5)


def test_branches_are_dropped_in_training_by_the_generator_alone():
    rates = torch.tensor([0.0, 0.5])
    drawn = survival(rates, 4000, torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 2, 4000, 1, 1)
    assert (drawn[0] == 1).all()
    assert set(drawn[1].unique().tolist()) == {0.0, 2.0}
    assert abs(float(drawn[1].mean()) - 1) < 0.05
    one, data, flat = bound(drop_path=0.9).train(), batch(), mask()

    def loss(seed):
        return one(data, flat, generator=torch.Generator().manual_seed(seed)).total

    assert loss(1) == loss(1)
    assert len({loss(seed).item() for seed in range(8)}) > 1
    assert one(data, flat).total == one.eval()(data, flat, generator=torch.Generator()).total


def test_the_target_branch_receives_no_gradient():
    one, data, drawn = bound(), batch(), mask()
    one(data, drawn).parts["alignment"].backward()
    through = {name: p.grad.clone() for name, p in one.backbone.named_parameters() if p.grad is not None}
    one.zero_grad()
    frozen = bound()
    with torch.no_grad():
        target = frozen.encode(data["pixels"], ~drawn.flatten())[1]
    latents = one.regress(one.encode(data["pixels"], drawn.flatten())[1], drawn.flatten())
    (2 * (latents - target).square().mean()).backward()
    apart = {name: p.grad for name, p in one.backbone.named_parameters() if p.grad is not None}
    assert through.keys() == apart.keys()
    assert through
    assert all(torch.allclose(through[name], apart[name], atol=1e-7) for name in through)
    assert one.mask_token.grad.abs().sum() > 0


class Codes:
    """A tokenizer of eight codes: the brightness of a patch."""

    vocabulary = 8

    def codes(self, pixels):
        means = nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 4).flatten(1)
        return (means * 8 + 4).long().clamp(0, 7)


def test_discrete_targets_are_learned_by_cross_entropy():
    one, data, drawn = bound(tokenizer=Codes()), batch(), mask()
    loss = one(data, drawn)
    assert loss.outputs["prediction"].shape == (3, 7, 8)
    codes = Codes().codes(data["pixels"])[~drawn.flatten().keep]
    expected = nn.functional.cross_entropy(loss.outputs["prediction"].flatten(0, 1), codes)
    assert torch.allclose(loss.parts["target"], expected)
    assert "reconstruction" not in loss.outputs


def test_pixels_are_learned_where_there_is_no_tokenizer():
    one, data, drawn = bound(), batch(), mask()
    loss = one(data, drawn)
    row, column = (~drawn.keep[0]).nonzero()[0].tolist()
    patch = (
        data["pixels"][0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].permute(1, 2, 0).flatten()
    )
    first = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
    errors = (loss.outputs["prediction"][0, 0] - first).square()
    rest = bound()(data, drawn)
    assert torch.allclose(loss.parts["target"], rest.parts["target"])
    loss.outputs["prediction"].retain_grad()
    loss.parts["target"].backward()
    gradient = loss.outputs["prediction"].grad[0, 0]
    assert torch.allclose(gradient.square(), 4 * errors / (3 * 7 * 48) ** 2, atol=1e-10)


def test_codes_of_patches_are_the_nearest_centres_of_k_means():
    data = batch(20)["pixels"]
    made = PatchCodes.fit(data, 4, 6, torch.Generator().manual_seed(0))
    codes = made.codes(data)
    assert codes.shape == (20, 16)
    assert codes.unique().tolist() == list(range(6))
    patch = data[3, :, 4:8, 8:12].permute(1, 2, 0).flatten()
    assert codes[3, 6] == (made.centres - patch).norm(dim=1).argmin()
    again = PatchCodes.fit(data, 4, 6, torch.Generator().manual_seed(0))
    assert torch.equal(made.centres, again.centres)
    # It has settled: each centre is nearly the mean of the patches that are nearest to it.
    patches = data.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(20, 16, -1)
    means = torch.stack([patches[codes == code].mean(0) for code in range(6)])
    start = PatchCodes.fit(data, 4, 6, torch.Generator().manual_seed(0), steps=0)
    assert (means - made.centres).norm() < 0.1 * (means - start.centres).norm()
    with pytest.raises(BadData, match="1 different patches cannot make 6 codes"):
        PatchCodes.fit(torch.zeros(2, 3, 16, 16), 4, 6, torch.Generator())


def test_another_width_aligns_in_the_mapped_space():
    one = bound(width=24, heads=3)
    loss = one(batch(), mask())
    assert loss.outputs["latents"].shape == (3, 7, 24)
    assert loss.outputs["features"].shape == (3, 9, 16)
    assert torch.isfinite(loss.total)


def test_what_cannot_be_is_refused():
    with pytest.raises(BadParameter, match="heads=3 must divide"):
        bound(heads=3)
    uneven = Mask(torch.tensor([[True] * 8 + [False] * 8, [True] * 4 + [False] * 12]).view(2, 4, 4))
    with pytest.raises(UnequalMaskCounts, match="cae encodes"):
        bound()(batch(2), uneven)


# -- masks, and other papers' components -------------------------------------------------------------------------


def test_its_masks_are_blocks_of_exactly_98_of_196():
    strategy = maskwright.create("mask-strategy", "block", hidden=98, exact=True)
    drawn = strategy.draw(
        Layout(400, (14, 14)), signals={}, progress=0, generator=torch.Generator().manual_seed(0)
    )
    hidden = (~drawn.keep).double()
    assert (hidden.sum((1, 2)) == 98).all()
    kernel = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=torch.float64)[None, None]
    beside = nn.functional.conv2d(hidden[:, None], kernel, padding=1)[:, 0]
    assert abs(float((beside * hidden).sum() / hidden.sum()) - 3.45) < 0.05
    frequency = hidden.mean(0)
    assert frequency[0, 0] < 0.12
    assert frequency[6:8, 6:8].mean() > 0.8


@pytest.mark.parametrize("strategy", ["random", "block", "simmim-blocks"])
def test_it_trains_under_any_strategy_with_equal_counts(strategy):
    settings = {"block": {"exact": True, "min_block": 4}, "simmim-blocks": {"mask_patch": 8}}.get(
        strategy, {}
    )
    chosen = maskwright.create("mask-strategy", strategy, **settings)
    model = maskwright.MaskedTraining(vit(), chosen, ContextAutoencoder(**SMALL))
    model(**batch())["loss"].backward()
    assert torch.isfinite(model.bound.mask_token.grad).all()


@pytest.mark.parametrize("check", conformance(ContextAutoencoder), ids=lambda pair: pair[0])
def test_the_conformance_kit_passes(check):
    check[1]()
