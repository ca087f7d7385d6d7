"""MixedAE: the assignment, mixing and back, top-k attention, the contrastive loss, and that one image alone is MAE."""

import itertools
import json
import math

import attrs
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import maskwright
from maskwright import AttentionMask, Layout, Mask
from maskwright.backbones.defaults import vision_transformer
from maskwright.errors import (
    BackboneMismatch,
    BadParameter,
    OverlappingMasks,
    UnequalMaskCounts,
    UnsupportedLayout,
)
from maskwright.jobs import execute
from maskwright.jobs.settings import resolve
from maskwright.plugins.mixedae.claim import CHANCE, CLAIM, Watched, bind, masks, recognition, textures
from maskwright.plugins.mixedae.masks import MixAssignment, assignment
from maskwright.plugins.mixedae.objective import (
    MixedAutoencoder,
    homologous_attention,
    homologous_contrast,
    mix,
    top_keys,
    unmix,
)
from maskwright.registry import check_fit
from maskwright.testing import conformance
from maskwright.testing.backbones import PlainViT
from maskwright.toolkit.attention import ScoreRule
from maskwright.toolkit.images import normalize_patches, patchify

SMALL = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
NAIVE = {"homologous": False, "segments": False, "contrast": 0.0}


@pytest.mark.parametrize(
    "check",
    [check for _, check in conformance(MixAssignment) + conformance(MixedAutoencoder)],
    ids=lambda check: f"{check.component.name}-{check.name}",
)
def test_conforms(check):
    check()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(strategy, batch, grid=(4, 4), seed=0):
    return strategy.draw(Layout(batch, grid), signals={}, progress=0.0, generator=generator(seed))


def vit(seed=0, **changes):
    """Weights large enough for every part to show in what comes out."""
    sizes = {"image_size": 16, "patch_size": 4, "channels": 3, "width": 16, "depth": 2, "heads": 2}
    model = vision_transformer(seed=seed, **{**sizes, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator(seed))
    return model


def seeded(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def bound(backbone=None, seed=0, **settings):
    backbone = vit() if backbone is None else backbone
    made = seeded(lambda: MixedAutoencoder(**{**SMALL, **settings}).bind(backbone), seed)
    if made.segments is not None:
        made.segments.data.mul_(20)
    return made


def mae(backbone=None, seed=0):
    backbone = vit() if backbone is None else backbone
    return seeded(lambda: maskwright.create("objective", "mae", **SMALL).bind(backbone), seed)


def pixels(batch, seed=1, side=16, channels=3):
    return torch.randn(batch, channels, side, side, generator=generator(seed))


# -- the assignment ----------------------------------------------------------------------------------------------


def test_each_image_keeps_a_quarter_and_the_masks_of_a_group_cover_the_grid_once():
    mask = draw(MixAssignment(), 12, (14, 14))
    assert mask.counts.tolist() == [49] * 12
    assert torch.equal(mask.removed_ratio, torch.full((12,), 0.75))
    assert (mask.keep.unflatten(0, (3, 4)).sum(1) == 1).all()
    first, second, _ = mask.keep.unflatten(0, (3, 4))
    assert not torch.equal(first, second)


def test_the_assignment_is_a_walk_through_the_order():
    noise = torch.rand(5, 50, generator=generator(), dtype=torch.float64)
    ours = assignment(noise, 4)
    for row, numbers in zip(ours, noise.tolist()):
        for place, position in enumerate(sorted(range(50), key=numbers.__getitem__)):
            assert row[position] == min(place // 12, 4)
    assert [int((ours[0] == image).sum()) for image in range(5)] == [12, 12, 12, 12, 2]


def test_every_image_is_as_likely_at_every_position():
    groups = 4000
    mask = draw(MixAssignment(images=4), 4 * groups)
    share = mask.keep.unflatten(0, (groups, 4)).double().mean(0)
    # Five standard deviations of a binomial share.
    assert (share - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / groups)


def test_images_left_over_keep_their_share_and_leave_the_rest_to_nobody():
    mask = draw(MixAssignment(images=4), 7)
    assert mask.counts.tolist() == [4] * 7
    assert mask.keep[:4].sum(0).eq(1).all()
    assert mask.keep[4:].sum(0).le(1).all()
    assert mask.keep[4:].sum() == 12


def test_one_image_keeps_everything():
    assert draw(MixAssignment(images=1), 3).keep.all()


def test_more_images_than_positions_are_refused():
    with pytest.raises(UnsupportedLayout, match="17 images cannot share 16 positions; `images` must be at"):
        draw(MixAssignment(images=17), 2)
    assert draw(MixAssignment(images=16), 16).counts.tolist() == [1] * 16


# -- mixing and back -----------------------------------------------------------------------------------------------


def test_four_images_mixed_by_hand():
    images = (10.0 * torch.arange(4)[:, None] + torch.arange(4)).view(1, 4, 1, 2, 2)
    source = torch.tensor([[[2, 0], [3, 1]]])
    mixed = mix(images, source)
    assert mixed.flatten().tolist() == [20, 1, 32, 13]
    mask = Mask(source.flatten() == torch.arange(4)[:, None])
    taken = Mask(torch.ones(1, 4, dtype=torch.bool))
    own = unmix(mixed.view(1, 4, 1), taken, mask)
    assert own.flatten().tolist() == [1, 13, 20, 32]
    again = mask.scatter_visible(own, -1.0).view(1, 4, 1, 2, 2)
    assert torch.equal(mix(again, source), mixed)


@pytest.mark.parametrize("seed", range(3))
def test_mixing_takes_patch_after_patch(seed):
    images = torch.randn(3, 2, 3, 8, 12, generator=generator(seed))
    source = torch.randint(0, 2, (3, 2, 3), generator=generator(seed))
    mixed = mix(images, source)
    for group, row, column in itertools.product(range(3), range(8), range(12)):
        chosen = int(source[group, row // 4, column // 4])
        assert torch.equal(mixed[group, :, row, column], images[group, chosen, :, row, column])


def test_unmixing_gives_each_image_its_own_tokens():
    mask = draw(MixAssignment(images=4), 8).flatten()
    tokens = torch.randn(2, 16, 5, generator=generator())
    own = unmix(tokens, Mask(mask.keep.unflatten(0, (2, 4)).any(1)), mask)
    for image in range(8):
        expected = [tokens[image // 4, place] for place in range(16) if mask.keep[image, place]]
        assert torch.equal(own[image], torch.stack(expected))


# -- homologous attention --------------------------------------------------------------------------------------------

QUERIES = torch.tensor([[1.0, 0], [0, 1], [1, 1], [-1, 0]])
KEYS = torch.tensor([[1.0, 0], [0, 2], [1, -1], [-1, 0.5]])


def attended(rule, query, key, value):
    return rule.attend(query[None, None], key[None, None], value[None, None])[0, 0]


def test_two_keys_by_hand():
    weights = attended(homologous_attention(2), QUERIES, KEYS, torch.eye(4))
    expected = [
        [0.5, 0, 0.5, 0],
        [0, 0.742817, 0, 0.257183],
        [0.330238, 0.669762, 0, 0],
        [0, 0.330238, 0, 0.669762],
    ]
    assert torch.allclose(weights, torch.tensor(expected), atol=1e-6)
    assert torch.equal(weights == 0, torch.tensor(expected) == 0)


def test_all_keys_are_plain_attention_and_one_key_is_copied():
    q, k, v = torch.randn(3, 2, 2, 9, 8, generator=generator()).unbind(0)
    plain = nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(homologous_attention(9).attend(q, k, v), plain, atol=1e-6)
    best = (q @ k.mT).argmax(-1)
    copied = v.gather(2, best[..., None].expand_as(v))
    assert torch.equal(homologous_attention(1).attend(q, k, v), copied)


@pytest.mark.parametrize(("count", "prefix"), [(1, 0), (3, 0), (3, 1), (2, 2)])
def test_exactly_the_top_keys_are_kept_for_each_head_and_query(count, prefix):
    # Whole numbers: most of them are tied.
    scores = torch.randint(-2, 3, (2, 3, 7, 7), generator=generator()).float()
    keep = top_keys(scores, count, prefix)
    for b, h, q in itertools.product(range(2), range(3), range(7)):
        row = scores[b, h, q].tolist()
        best = sorted(range(prefix, 7), key=lambda key: -row[key])[:count]
        expected = range(7) if q < prefix else [*range(prefix), *best]
        assert keep[b, h, q].nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize(("images", "keys", "expected"), [(4, None, 4), (2, None, 8), (4, 7, 7)])
def test_every_block_of_a_model_keeps_exactly_the_top_keys(images, keys, expected):
    objective = bound(vit(depth=3), images=images, keys=keys)
    seen = []
    inner = objective.attention

    def watched(*arguments):
        rule = inner(*arguments)

        def keep(scores):
            seen.append((scores, rule.keep(scores)))
            return seen[-1][1]

        return ScoreRule(keep)

    objective.attention = watched
    objective({"pixels": pixels(8)}, draw(MixAssignment(images=images), 8))
    assert len(seen) == 3
    for scores, keep in seen:
        assert scores.shape == (8 // images, 2, 17, 17)
        assert (keep[:, :, 1:].sum(-1) == expected + 1).all()
        assert keep[:, :, 0].all()
        assert keep[..., 0].all()
        least = scores.masked_fill(~keep, math.inf)[:, :, 1:, 1:].amin(-1)
        assert (scores.masked_fill(keep, -math.inf)[:, :, 1:, 1:].amax(-1) <= least).all()
    assert not torch.equal(seen[0][1], seen[1][1])


def test_with_every_key_the_model_runs_its_own_attention():
    assert bound(keys=16).attention(16, 4, 1) is None
    assert bound(homologous=False).attention(16, 4, 1) is None
    assert bound(images=1).attention(9, 1, 1) is None
    assert isinstance(bound(keys=15).attention(16, 4, 1), ScoreRule)


# -- the contrastive loss --------------------------------------------------------------------------------------------

FEATURES = torch.tensor([[[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]]])
PAIRS = torch.tensor([[0, 0, 1, 1]])


def test_the_contrastive_loss_by_hand():
    losses, counts = homologous_contrast(FEATURES, PAIRS, 0.25)
    assert counts.all()
    expected = torch.tensor([[0.0435001, 0.3988373, 0.3988373, 0.0435001]])
    assert torch.allclose(losses, expected, atol=1e-6)
    assert losses.mean().item() == pytest.approx(0.2211687, abs=1e-6)
    crossed, _ = homologous_contrast(FEATURES, torch.tensor([[0, 1, 0, 1]]), 0.25)
    assert crossed.mean().item() == pytest.approx(3.4211687, abs=1e-6)
    warm, _ = homologous_contrast(FEATURES, PAIRS, 1.0)
    assert warm.mean().item() == pytest.approx(0.6735768, abs=1e-6)


def test_lengths_do_not_matter():
    lengths = torch.tensor([[[2.0], [0.1], [5.0], [1.0]]])
    assert torch.allclose(
        homologous_contrast(FEATURES * lengths, PAIRS, 0.25)[0],
        homologous_contrast(FEATURES, PAIRS, 0.25)[0],
        atol=1e-6,
    )


def test_perfect_clusters_and_a_collapse_have_their_known_values():
    source = torch.arange(4).repeat_interleave(49)[None]
    clusters, _ = homologous_contrast(torch.eye(4)[source[0]][None], source, 0.25)
    assert clusters.mean().item() == pytest.approx(math.log(48 + 147 * math.exp(-4)), abs=1e-5)
    assert clusters.mean().item() == pytest.approx(3.9257760, abs=1e-5)
    collapsed, _ = homologous_contrast(torch.ones(1, 196, 4), source, 0.25)
    assert collapsed.mean().item() == pytest.approx(math.log(195), abs=1e-5)


def by_hand(features, source, temperature):
    """Anchor by anchor; None where it does not count."""
    losses = []
    for anchor in range(len(source)):
        others = [n for n in range(len(source)) if n != anchor]
        s = {
            n: float(nn.functional.cosine_similarity(features[anchor], features[n], dim=0)) / temperature
            for n in others
        }
        positives = [n for n in others if source[n] == source[anchor]]
        total = math.log(sum(math.exp(value) for value in s.values()))
        counts = positives and len(positives) < len(others)
        losses.append(sum(total - s[n] for n in positives) / len(positives) if counts else None)
    return losses


@pytest.mark.parametrize("seed", range(3))
def test_the_contrastive_loss_is_the_loop(seed):
    features = torch.randn(2, 9, 5, generator=generator(seed))
    source = torch.randint(0, 4, (2, 9), generator=generator(seed))
    losses, counts = homologous_contrast(features, source, 0.3)
    for row in range(2):
        expected = by_hand(features[row], source[row].tolist(), 0.3)
        assert counts[row].tolist() == [one is not None for one in expected]
        assert losses[row].tolist() == pytest.approx([one or 0.0 for one in expected], abs=1e-5)


@pytest.mark.parametrize("source", [[0, 1, 2, 2], [0, 1, 2, 3], [1, 1, 1, 1]])
def test_a_token_alone_or_among_its_own_only_is_left_out(source):
    features = FEATURES.clone().requires_grad_()
    losses, counts = homologous_contrast(features, torch.tensor([source]), 0.25)
    losses.sum().backward()
    assert counts.tolist() == [[1 < source.count(one) < 4 for one in source]]
    assert losses.isfinite().all()
    assert features.grad.isfinite().all()
    one, count = homologous_contrast(features[:, :1], torch.tensor([[0]]), 0.25)
    assert (one.tolist(), count.tolist()) == ([[0.0]], [[False]])


# -- one image is MAE ------------------------------------------------------------------------------------------------


def same(one, two, batch, mask):
    """Whether two objectives give the same loss, predictions and gradients of the backbone, to the last bit."""
    first, second = one(batch, mask), two(batch, mask)
    first.total.backward()
    second.total.backward()
    gradients = [
        {name: p.grad for name, p in objective.backbone.named_parameters()} for objective in (one, two)
    ]
    return (
        torch.equal(first.total, second.total)
        and all(torch.equal(first.outputs[name], second.outputs[name]) for name in second.outputs)
        and all(
            (value is None and gradients[1][name] is None) or torch.equal(value, gradients[1][name])
            for name, value in gradients[0].items()
        )
    )


@pytest.mark.parametrize("strategy", ["random", "mix-assignment"])
def test_a_ratio_of_one_is_mae_to_the_last_bit(strategy):
    ours, theirs = bound(images=1), mae(seed=5)
    theirs.load_state_dict(ours.state_dict())
    batch = {"pixels": pixels(5)}
    mask = draw(maskwright.create("mask-strategy", strategy), 5)
    assert same(ours, theirs, batch, mask)
    assert ours(batch, mask).parts["pixels"] > 0.1


def test_a_ratio_of_one_hides_nothing_and_costs_nothing():
    mask = draw(MixAssignment(images=1), 3)
    assert bound(images=1)({"pixels": pixels(3)}, mask).total == 0
    assert mae()({"pixels": pixels(3)}, mask).total == 0


def test_a_single_image_left_over_is_mae_to_the_last_bit():
    ours, theirs = bound(images=4, segments=False), mae(seed=5)
    theirs.load_state_dict(ours.state_dict())
    mask = draw(MixAssignment(images=4), 5)
    assert same(ours, theirs, {"pixels": pixels(1)}, Mask(mask.keep[4:]))
    together = ours({"pixels": pixels(5)}, mask).outputs["prediction"][4:]
    alone = theirs({"pixels": pixels(5)[4:]}, Mask(mask.keep[4:])).outputs["prediction"]
    assert torch.allclose(together, alone, atol=1e-6)


def test_mixing_is_not_mae():
    ours, theirs = bound(images=4, **NAIVE), mae(seed=5)
    theirs.load_state_dict(ours.state_dict())
    batch, mask = {"pixels": pixels(4)}, draw(MixAssignment(images=4), 4)
    one, two = (objective(batch, mask) for objective in (ours, theirs))
    assert (one.outputs["prediction"] - two.outputs["prediction"]).abs().max() > 0.01
    assert (one.total - two.total).abs() > 1e-5


# -- the whole -------------------------------------------------------------------------------------------------------


def slowly(objective, images, mask):
    """(prediction, pixels' loss, contrastive loss), group by group and image by image."""
    backbone, of = objective.backbone, objective.settings
    predictions, errors, contrasts = [], [], []
    target = normalize_patches(patchify(images, 4))
    for first in range(0, len(images), of.images):
        group = range(first, min(first + of.images, len(images)))
        places = [place for place in range(16) if any(mask.keep.flatten(1)[row, place] for row in group)]
        owners = [next(row for row in group if mask.keep.flatten(1)[row, place]) for place in places]
        tokens = []
        for place, owner in zip(places, owners):
            token = (backbone.patches(images[owner : owner + 1]) + backbone.positions)[0, place]
            tokens.append(token + (objective.segments[owner - first] if of.segments else 0))
        count = len(places) // len(group)
        rule = homologous_attention(count, 1) if of.homologous and count < len(places) else None
        sequence = torch.cat([backbone.prefix(1)[0], torch.stack(tokens)])[None]
        encoded = backbone.encode(sequence, attention=rule)[0]
        contrasts += [one for one in by_hand(encoded[1:].detach(), owners, of.temperature) if one is not None]
        embedded = objective.decoder_input.embed(encoded)
        for row in group:
            full = [
                embedded[1 + places.index(place)]
                if place in places and owners[places.index(place)] == row
                else objective.decoder_input.mask_token[0, 0]
                for place in range(16)
            ]
            shown = torch.stack(full) + objective.decoder_input.positions[0]
            decoded = objective.decoder(torch.cat([embedded[:1], shown])[None])[0, 1:]
            predictions.append(objective.predict(decoded))
            error = (predictions[-1] - target[row]).square().mean(-1)
            errors += [error[place] for place in range(16) if not mask.keep.flatten(1)[row, place]]
    contrast = sum(contrasts) / len(contrasts) if contrasts else 0.0
    return torch.stack(predictions), torch.stack(errors).mean(), of.contrast * contrast


@pytest.mark.parametrize("settings", [{}, NAIVE, {"segments": False}], ids=["whole", "naive", "no segments"])
@pytest.mark.parametrize("batch", [4, 7])
@torch.no_grad()
def test_the_loss_is_that_of_a_loop_over_images(settings, batch):
    objective = bound(images=4, **settings)
    images, mask = pixels(batch), draw(MixAssignment(images=4), batch)
    prediction, error, contrast = slowly(objective, images, mask)
    loss = objective({"pixels": images}, mask)
    assert torch.allclose(loss.outputs["prediction"], prediction, atol=1e-5)
    assert float(loss.parts["pixels"]) == pytest.approx(float(error), rel=1e-5)
    assert float(loss.parts.get("contrast", 0.0)) == pytest.approx(contrast, rel=1e-5)
    assert ("contrast" in loss.parts) == (settings is not NAIVE)


def test_the_encoder_sees_as_many_patches_of_each_image_as_with_mae(monkeypatch):
    mask = draw(MixAssignment(), 8)
    seen = {}
    for name, objective in (("mixedae", bound()), ("mae", mae())):
        inner = objective.backbone.encode

        def encode(tokens, *arguments, name=name, inner=inner, **rules):
            seen[name] = tokens.shape[0] * (tokens.shape[1] - 1)
            return inner(tokens, *arguments, **rules)

        monkeypatch.setattr(objective.backbone, "encode", encode)
        objective({"pixels": pixels(8)}, mask)
    assert seen == {"mixedae": 2 * 16, "mae": 8 * 4}


@torch.no_grad()
def test_what_an_image_keeps_changes_its_neighbours_and_no_other_group():
    objective = bound(**NAIVE)
    images, mask = pixels(8), draw(MixAssignment(), 8)
    before = objective({"pixels": images}, mask).outputs["prediction"]
    other = images.clone()
    other[1] += 1
    changed = (objective({"pixels": other}, mask).outputs["prediction"] - before).abs().amax((1, 2))
    assert (changed[:4] > 1e-5).all()
    assert not changed[4:].any()


def test_pairs_of_masks_that_cover_only_half_leave_the_other_half_out():
    objective = bound(images=2)
    mask = draw(MixAssignment(images=4), 4)
    check_fit(MixAssignment(images=4), MixedAutoencoder(images=2))
    loss = objective({"pixels": pixels(4)}, mask)
    prediction, error, contrast = slowly(objective, pixels(4), mask)
    assert torch.allclose(loss.outputs["prediction"], prediction, atol=1e-5)
    assert loss.total.item() == pytest.approx(error.item() + contrast, rel=1e-5)


@pytest.mark.parametrize("keep", [1, 16])
def test_extreme_masks_have_finite_gradients(keep):
    objective = bound(images=16 // keep)
    mask = draw(MixAssignment(images=16 // keep), 16)
    assert mask.counts.tolist() == [keep] * 16
    objective({"pixels": pixels(16)}, mask).total.backward()
    assert all(one.grad is None or bool(one.grad.isfinite().all()) for one in objective.parameters())


def test_the_reconstruction_keeps_what_an_image_keeps():
    images, mask = pixels(4), draw(MixAssignment(), 4)
    objective = bound()
    assert "reconstruction" not in objective({"pixels": images}, mask).outputs
    shown = objective.eval()({"pixels": images}, mask).outputs["reconstruction"]
    keep = mask.upsample((16, 16)).keep[:, None].expand_as(images)
    assert torch.equal(shown[keep], images[keep])
    assert not torch.isclose(shown[~keep], images[~keep]).all()


def test_a_model_with_two_prefix_tokens_works():
    from transformers import DeiTConfig, DeiTModel

    config = DeiTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    objective = bound(seeded(lambda: DeiTModel(config, add_pooling_layer=False)))
    loss = objective({"pixels": pixels(6)}, draw(MixAssignment(), 6))
    assert loss.outputs["features"].shape == (6, 4, 16)
    loss.total.backward()


# -- what does not fit -----------------------------------------------------------------------------------------------


def test_masks_that_overlap_are_refused_when_the_run_is_set_up():
    with pytest.raises(OverlappingMasks, match="'random' draws each by itself; use 'mix-assignment'"):
        check_fit(maskwright.create("mask-strategy", "random"), MixedAutoencoder())
    with pytest.raises(OverlappingMasks, match="keeps only 2 disjoint; give both the same number"):
        maskwright.MaskedTraining(vit(), MixAssignment(images=2), MixedAutoencoder(**SMALL))
    check_fit(maskwright.create("mask-strategy", "random"), MixedAutoencoder(images=1))
    check_fit(MixAssignment(), maskwright.create("objective", "mae"))


def test_masks_that_overlap_are_refused_when_they_come():
    keep = torch.zeros(8, 4, 4, dtype=torch.bool)
    keep[torch.arange(8), torch.arange(8) // 4, torch.arange(8) % 4] = True
    keep[[5, 6]] = keep[[6, 6]]
    with pytest.raises(OverlappingMasks, match=r"and 2 of those from row 4 on keep position 6; draw the"):
        bound()({"pixels": pixels(8)}, Mask(keep))
    keep[0, 0] = True
    with pytest.raises(UnequalMaskCounts, match="mixedae gives each image the same number"):
        bound()({"pixels": pixels(8)}, Mask(keep))


class TakesRules(PlainViT):
    """Anyone's transformer that lets a rule into its attention: one block, one head."""

    def encode(self, tokens, levels=(), attention=None):
        q, k, v = self.norm(tokens)[:, None].expand(-1, 3, -1, -1).unbind(1)
        heads = (x[:, None] for x in (q, k, v))
        rule = attention or AttentionMask.full(tokens.shape[1])
        if isinstance(rule, AttentionMask):
            rule = ScoreRule(lambda scores: scores > -math.inf)
        return self.norm(tokens + rule.attend(*heads)[:, 0])


def test_a_model_that_takes_no_rules_is_told_what_to_add_and_one_that_does_works():
    with pytest.raises(
        BackboneMismatch, match=r"PlainViT does not take: give its encode a third argument, encode\(tokens"
    ):
        bound(PlainViT())
    mask = draw(MixAssignment(), 4)
    assert bound(PlainViT(), homologous=False)({"pixels": pixels(4)}, mask).total > 0
    objective = bound(seeded(TakesRules))
    few, all_of_them = objective({"pixels": pixels(4)}, mask), bound(seeded(TakesRules), keys=16)
    assert not torch.allclose(few.total, all_of_them({"pixels": pixels(4)}, mask).total, atol=1e-4)


def test_heads_must_divide_the_width():
    with pytest.raises(BadParameter, match="mixedae: decoder_heads=3 must divide decoder_width=16"):
        MixedAutoencoder(decoder_width=16, decoder_heads=3)


def test_the_defaults_are_the_papers():
    settings = MixedAutoencoder()
    assert (settings.images, settings.keys, settings.contrast, settings.temperature) == (4, None, 0.1, 0.25)
    assert attrs.asdict(settings)["decoder_depth"] == 8
    sized = attrs.evolve(settings, **SMALL).bind(vit(image_size=56))
    assert sized.attention(196, 4, 1).keep(torch.randn(1, 1, 197, 197))[0, 0, 1:].sum(-1).eq(50).all()


# -- why -------------------------------------------------------------------------------------------------------------


def information(joint):
    """Mutual information in bits of (left, right) pairs with their probabilities."""
    left, right = {}, {}
    for (one, two), p in joint.items():
        left[one] = left.get(one, 0) + p
        right[two] = right.get(two, 0) + p
    return sum(p * math.log2(p / left[one] / right[two]) for (one, two), p in joint.items() if p)


@pytest.mark.parametrize(("alike", "expected"), [(0.9, 1.3577508), (0.5, 1.0)])
def test_a_neighbour_that_is_alike_tells_of_the_image_behind_it(alike, expected):
    """The paper's argument: mixing shows, instead of nothing, something that depends on what is hidden."""
    masked, mixed = {}, {}
    for a1, a2, b2 in itertools.product((0, 1), repeat=3):
        p = 0.5 * (0.8 if a2 == a1 else 0.2) * (alike if b2 == a2 else 1 - alike)
        for joint, shown in ((masked, a1), (mixed, (a1, b2))):
            joint[shown, (a1, a2)] = joint.get((shown, (a1, a2)), 0) + p
    assert information(masked) == pytest.approx(1.0)
    assert information(mixed) == pytest.approx(expected, abs=1e-7)


# -- the claim -------------------------------------------------------------------------------------------------------


def measured(mae=0.6, naive=0.5, whole=0.55, told=0.5, untold=0.3):
    return {
        "MAE: kNN accuracy": mae,
        "naive mixing: kNN accuracy": naive,
        "MixedAE: kNN accuracy": whole,
        "keys of the own image, with the contrastive loss": told,
        "keys of the own image, without the contrastive loss": untold,
    }


def test_the_claim_needs_every_part_in_every_seed():
    assert CLAIM.decide([measured()] * 3)
    failing = ({"mae": 0.45}, {"whole": 0.4}, {"told": 2 * CHANCE}, {"untold": 0.6})
    assert not any(CLAIM.decide([measured(), measured(**one), measured()]) for one in failing)


def test_the_share_of_keys_of_the_own_image_is_counted_key_by_key():
    settings = MixedAutoencoder(segments=False, **SMALL)
    watched = bind(lambda backbone: Watched(settings, backbone), channels=3, patch_size=4, seed=0)
    share = recognition(watched, generator())
    again = generator()
    textures(256, again)
    source = masks(256, again).keep.flatten(1).unflatten(0, (64, 4)).int().argmax(1)
    own = [
        int(source[group, q] == source[group, k])
        for keep in watched.kept
        for group, _, q, k in keep[:, :, 1:, 1:].nonzero().tolist()
        if q != k
    ]
    assert len(watched.kept) == 2
    assert share == pytest.approx(sum(own) / len(own), abs=1e-6)
    assert CHANCE == 0.2


def test_textures_differ_from_image_to_image_and_not_from_draw_to_draw():
    drawn = textures(8, generator(3))
    assert torch.equal(drawn, textures(8, generator(3)))
    assert drawn.shape == (8, 3, 16, 16)
    assert (
        drawn.mean((2, 3)).std(0).min()
        > 2 * drawn.flatten(2)[..., :128].mean(-1).sub(drawn.mean((2, 3))).std()
    )


def test_a_job_trains_measures_and_shows_it(tmp_path):
    settings = {
        "objective": {"name": "mixedae", **SMALL},
        "run": {"steps": 3, "batch_size": 8},
        "model": {"width": 16, "depth": 1, "heads": 2},
        "data": {"source": "digits"},
    }
    result = execute(resolve("pretrain", None, settings), folder=tmp_path, quiet=True)
    assert result.summary["strategy"] == "mix-assignment"
    assert math.isfinite(result.summary["held_out_loss"])
    assert {"part.pixels", "part.contrast"} <= json.loads(
        (tmp_path / "metrics.jsonl").read_text().split("\n")[0]
    ).keys()
    shown = load_file(tmp_path / "pictures.safetensors")
    assert shown["masks"].bool().unflatten(0, (2, 4)).sum(1).eq(1).all()
    keep = Mask(shown["masks"].bool()).upsample(tuple(shown["originals"].shape[2:])).keep[:, None]
    changed = (shown["reconstructions"] - shown["originals"]).abs() * keep
    assert changed.max() < 0.01
    assert not torch.allclose(shown["reconstructions"], shown["originals"], atol=0.05)
