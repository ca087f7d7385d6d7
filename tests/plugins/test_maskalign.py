"""MaskAlign: the law of the draw, the mixture before the head, the whitened target, gradients, the teacher's isolation."""

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import maskwright
from maskwright import Layout, Mask
from maskwright.backbones.defaults import vision_transformer
from maskwright.errors import BackboneMismatch, BadModel, BadParameter, CheckpointError, MissingSignal
from maskwright.jobs import execute
from maskwright.jobs.settings import resolve
from maskwright.plugins.maskalign.masks import Attentive, draw_without_replacement
from maskwright.plugins.maskalign.objective import MaskAlign, initial_mixture, smooth_l1, whiten
from maskwright.testing import conformance

TINY = {"image_size": 16, "patch_size": 4, "heads": 2}


def teacher(width=24, depth=3):
    return vision_transformer(width=width, depth=depth, seed=7, **TINY)


def bound(depth=3, **settings):
    settings.setdefault("teacher", teacher())
    return MaskAlign(**settings).bind(vision_transformer(width=16, depth=depth, seed=1, **TINY))


def batch(count=3, seed=0):
    return {"pixels": torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def mask(count=3, keep=5, seed=0):
    order = torch.rand(count, 16, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return Mask((order < keep).view(count, 4, 4))


def flops(run):
    """Floating-point operations of a call, attention counted as its matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


# -- the mask --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "ratio", "kept"),
    [((14, 14), 0.7, 58), ((14, 14), 0.75, 49), ((8, 8), 0.7, 19), ((10, 10), 0.8, 19)],
)
def test_the_count_is_truncated_as_in_the_code(grid, ratio, kept):
    layout = Layout(2, grid)
    signals = {"attention": torch.rand(2, layout.positions)}
    drawn = Attentive(ratio=ratio).draw(layout, signals=signals, progress=0, generator=torch.Generator())
    assert drawn.counts.tolist() == [kept, kept]


def test_inclusion_follows_sequential_draws_without_replacement():
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).expand(100_000, 4)
    u = torch.rand(100_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, both = draw_without_replacement(weights, 1, u), draw_without_replacement(weights, 2, u)
    assert torch.allclose(first.double().mean(0), weights[0], atol=0.006)
    expected = torch.tensor([0.71587, 0.60833, 0.44127, 0.23452], dtype=torch.float64)
    assert torch.allclose(both.double().mean(0), expected, atol=0.006)


def test_it_draws_and_does_not_take_the_top():
    layout = Layout(64, (4, 4))
    attention = torch.arange(1.0, 17).expand(64, 16)
    drawn = Attentive().draw(
        layout, signals={"attention": attention}, progress=0, generator=torch.Generator()
    )
    assert len(drawn.keep.flatten(1).unique(dim=0)) > 32
    assert drawn.keep.flatten(1)[:, 8:].sum() > drawn.keep.flatten(1)[:, :8].sum()


def test_equal_importance_is_uniform_masking():
    u = torch.rand(60_000, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = draw_without_replacement(torch.full((60_000, 6), 0.3), 3, u)
    sets, counts = drawn.unique(dim=0, return_counts=True)
    assert len(sets) == 20
    assert (counts / 60_000 - 1 / 20).abs().max() < 0.004


def test_a_constant_factor_on_the_importance_changes_nothing():
    layout, attention = Layout(8, (4, 4)), torch.rand(8, 16)

    def draw(values):
        generator = torch.Generator().manual_seed(3)
        return Attentive().draw(layout, signals={"attention": values}, progress=0, generator=generator).keep

    assert torch.equal(draw(attention), draw(attention * 64))


def test_patches_of_no_importance_are_kept_only_when_the_others_run_out():
    weights = torch.tensor([[0.0, 1e-12, 0.0, 5.0]]).expand(50, 4)
    u = torch.rand(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert draw_without_replacement(weights, 2, u).tolist() == [[False, True, False, True]] * 50
    three = draw_without_replacement(weights, 3, u)
    assert (three.sum(1) == 3).all()
    assert 0 < three[:, 0].sum() < 50


# -- the loss --------------------------------------------------------------------------------------------------


def test_whitening_and_the_doubled_smooth_l1():
    expected = torch.tensor([-1.3416354, -0.4472118, 0.4472118, 1.3416354])
    assert torch.allclose(whiten(torch.tensor([1.0, 2, 3, 4])), expected, atol=1e-6)
    zero = torch.zeros(1)
    assert [float(smooth_l1(torch.tensor([c]), zero)) for c in (0.5, 1.0, 2.0)] == [0.25, 1.0, 3.0]


def test_the_mixture_begins_as_the_identity_and_a_hundredth():
    assert torch.allclose(
        initial_mixture(range(1, 3), 3, 3), torch.tensor([[0.01, 1.01, 0.01], [0.01, 0.01, 1.01]])
    )
    assert torch.allclose(initial_mixture(range(0, 2), 2, 4), torch.full((2, 4), 0.25))


def test_the_loss_is_what_a_naive_loop_over_levels_computes():
    one, data, drawn = bound(levels=2), batch(), mask()
    loss = one(data, drawn)
    seen = one.teacher(data["pixels"], levels=(1, 2))
    vit = one.backbone
    tokens = vit.patches(data["pixels"]) + vit.positions
    expected = 0
    for row, a in enumerate((1, 2)):
        for b in range(3):
            kept = drawn.keep[b].flatten().nonzero()[:, 0]
            levels = vit.encode(torch.cat([vit.prefix(1), tokens[b : b + 1, kept]], 1), levels=(0, 1, 2))
            mixed = sum(one.weights.view(2, 3)[row, s] * levels[s] for s in range(3))
            target = torch.nn.functional.layer_norm(seen.levels[a][b], (24,))
            target = target[torch.cat([torch.zeros(1, dtype=torch.int64), kept + 1])]
            expected = expected + smooth_l1(one.heads[row](mixed)[0], target) / 3 / 2
    assert torch.allclose(loss.total, expected, atol=1e-5)
    assert torch.allclose(torch.stack(list(loss.parts.values())).sum(), loss.total)


@pytest.mark.parametrize(("name", "cost"), [("smooth-l1", 0.09), ("l2", 0.09), ("l1", 0.3)])
def test_perfect_alignment_costs_nothing_and_an_offset_its_square(name, cost):
    one, data, drawn = bound(levels=2, loss=name, mixture=False), batch(), mask()
    seen = one.teacher(data["pixels"], levels=(1, 2))
    for head, level, offset in zip(one.heads, (1, 2), (0.0, 0.3)):
        nn.init.zeros_(head.weight)
        whole = whiten(seen.levels[level])
        target = torch.cat([whole[:, :1], drawn.flatten().gather_visible(whole[:, 1:])], 1) + offset
        head.register_forward_hook(lambda module, given, output, target=target: target)
    parts = one(data, drawn).parts
    assert parts["level_2"] == 0
    assert torch.allclose(2 * parts["level_3"], torch.tensor(cost), atol=1e-6)


def test_the_identity_and_the_last_level_alone_is_plain_feature_alignment():
    one, data, drawn = bound(levels=1, teacher=teacher(width=16)), batch(), mask()
    with torch.no_grad():
        one.weights.copy_(torch.tensor([0.0, 0.0, 1.0]))
        one.heads[0].weight.copy_(torch.eye(16))
    plain = bound(levels=1, teacher=teacher(width=16), mixture=False)
    plain.load_state_dict({n: v for n, v in one.state_dict().items() if n != "weights"})
    flat = drawn.flatten()
    tokens = flat.gather_visible(one.backbone.patches(data["pixels"]) + one.backbone.positions)
    (last,) = one.backbone.encode(torch.cat([one.backbone.prefix(3), tokens], 1), levels=(-1,))
    whole = whiten(one.teacher(data["pixels"], levels=(-1,)).levels[2])
    expected = smooth_l1(last, torch.cat([whole[:, :1], flat.gather_visible(whole[:, 1:])], 1))
    assert torch.allclose(one(data, drawn).total, expected, atol=1e-6)
    assert torch.allclose(plain(data, drawn).total, expected, atol=1e-6)


def test_every_block_and_row_learns_and_the_teacher_does_not():
    one = bound(levels=2)
    one(batch(), mask()).total.backward()
    assert one.weights.shape == (2 * 3,)
    assert (one.weights.grad != 0).all()
    assert all(parameter.grad is None for parameter in one.teacher.model.parameters())
    assert not one.train().teacher.model.training
    assert not any(name.startswith("teacher") for name, _ in one.named_parameters())
    unreached = {n for n, p in one.named_parameters() if p.requires_grad and p.grad is None}
    assert unreached == {"backbone.model.layernorm.weight", "backbone.model.layernorm.bias"}


def test_hidden_pixels_reach_the_target_but_not_the_student():
    one, data, drawn = bound().eval(), batch(), mask()
    signals = one.signals(data)
    shown = drawn.upsample((16, 16)).keep[:, None]
    other = {"pixels": torch.where(shown, data["pixels"], torch.randn(3, 3, 16, 16))}
    before, after = one(data, drawn, signals=signals), one(other, drawn, signals=signals)
    assert torch.equal(before.outputs["prediction"], after.outputs["prediction"])
    assert not torch.equal(one(other, drawn).total, after.total)


def test_the_signal_is_the_class_tokens_mean_attention_to_the_patches():
    one, data = bound(), batch()
    model = teacher()
    model.set_attn_implementation("eager")
    weights = model.eval()(pixel_values=data["pixels"], output_attentions=True).attentions[-1]
    attention = one.signals(data)["attention"]
    assert attention.shape == (3, 16)
    assert torch.allclose(attention, weights.mean(1)[:, 0, 1:])


# -- teachers --------------------------------------------------------------------------------------------------


def teachers():
    from transformers import (
        BeitConfig,
        BeitModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        DeiTConfig,
        DeiTModel,
        Dinov2Config,
        Dinov2Model,
    )

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"image_size": 28, "patch_size": 7}
    pairs = [(CLIPVisionConfig, CLIPVisionModel), (DeiTConfig, DeiTModel), (BeitConfig, BeitModel)]
    return [make(config(**sizes)) for config, make in [*pairs, (Dinov2Config, Dinov2Model)]]


def test_any_vision_transformer_teaches_with_patches_of_its_own_size():
    for model in teachers():
        loss = bound(teacher=model)(batch(), mask())
        assert torch.isfinite(loss.total)
        # All have a class token; what else lies before the patches has no partner in the student.
        assert loss.outputs["prediction"].shape == (3, 1 + 5, 16)


def test_a_teacher_is_read_from_a_folder(tmp_path):
    teacher().save_pretrained(tmp_path)
    data, drawn = batch(), mask()
    one, other = bound(), bound(teacher=str(tmp_path))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(data, drawn).total, other(data, drawn).total)


def test_teachers_that_are_none_are_refused(tmp_path):
    with pytest.raises(BadParameter, match="needs a teacher"):
        bound(teacher=None)
    with pytest.raises(BadModel, match=r"no config\.json"):
        bound(teacher=str(tmp_path))
    with pytest.raises(BackboneMismatch, match="Linear cannot be a teacher"):
        bound(teacher=nn.Linear(2, 2))
    with pytest.raises(BadParameter, match="3 blocks and the student 2"):
        bound(depth=2, mixture=False)


def test_a_teacher_without_a_class_token_aligns_patches_and_gives_no_masks():
    from transformers import IJepaConfig, IJepaModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = IJepaModel(IJepaConfig(image_size=16, patch_size=4, **sizes)).eval()
    loss = bound(teacher=model)(batch(), mask())
    assert loss.outputs["prediction"].shape == (3, 5, 16)
    student = vision_transformer(width=16, depth=3, seed=1, **TINY)
    training = maskwright.MaskedTraining(student, Attentive(), MaskAlign(teacher=model))
    with pytest.raises(MissingSignal, match=r"'maskalign' gives no 'attention'"):
        training(**batch())


# -- what it costs -----------------------------------------------------------------------------------------------


def test_the_students_cost_is_in_proportion_to_what_it_sees():
    one, data = bound(depth=2, teacher=teacher(depth=2)), batch(1)
    embedding = flops(lambda: one.backbone.patches(data["pixels"]).sum().backward())
    for keep in (4, 8, 16):
        drawn, t, width = mask(1, keep=keep).flatten(), keep + 1, 16
        measured = flops(lambda drawn=drawn: one.encode(data["pixels"], drawn)[-1].sum().backward())
        # A block: four projections and a feed-forward part four times as wide, and attention's two products; all of it again
        # twice for the gradients.
        assert measured - embedding == 2 * 3 * 2 * (12 * t * width**2 + 2 * t**2 * width)


def test_nothing_but_linear_heads_comes_after_the_student():
    one, data, drawn = bound(depth=3), batch(1), mask(1, keep=4)
    told = one.signals(data)
    whole = flops(lambda: one(data, drawn, signals=told))
    encoder = flops(lambda: one.encode(data["pixels"], drawn.flatten()))
    mixing, heads = 2 * 3 * 3 * 5 * 16, 3 * 2 * 5 * 16 * 24
    assert whole - encoder == mixing + heads


def test_clip_pixels_are_renormalised():
    one = bound(normalization="clip")
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    raw = torch.rand(2, 3, 16, 16)
    seen = {}
    one.teacher.model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    one.signals({"pixels": (raw - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)})
    clip = (raw - torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    ).view(3, 1, 1)
    assert torch.allclose(seen["pixel_values"], clip, atol=1e-5)


# -- with other papers' components -------------------------------------------------------------------------------


def test_it_learns_under_other_masks_and_its_masks_need_its_signal():
    vit = vision_transformer(width=16, depth=3, seed=1, **TINY)
    for name in ("random", "attentive"):
        strategy = maskwright.create("mask-strategy", name)
        model = maskwright.MaskedTraining(vit, strategy, MaskAlign(teacher=teacher()))
        assert torch.isfinite(model(**batch())["loss"])
    with pytest.raises(MissingSignal, match=r"'attention'.*maskalign"):
        maskwright.MaskedTraining(vit, Attentive(), maskwright.create("objective", "mae"))


def test_other_papers_objectives_train_under_its_masks_with_its_signal():
    vit = vision_transformer(width=16, depth=3, seed=1, **TINY)
    signals = bound().signals(batch())
    drawn = Attentive().draw(
        Layout(3, (4, 4), patch_size=4), signals=signals, progress=0, generator=torch.Generator()
    )
    for name in ("mae", "simmim", "cae"):
        loss = maskwright.create("objective", name).bind(vit)(batch(), drawn)
        loss.total.backward()
        assert torch.isfinite(loss.total)


RUN = {
    "objective": {"name": "maskalign", "levels": 1},
    "data": {"size": 16},
    "model": {"width": 16, "depth": 1, "heads": 2},
    "run": {"steps": 3, "batch_size": 8, "save_every": 2},
}


def test_a_job_reads_its_teacher_and_does_not_go_on_with_another(tmp_path):
    def run(folder, **more):
        given = {**RUN, "objective": {**RUN["objective"], "teacher": str(folder)}}
        return execute(resolve("pretrain", None, given), folder=tmp_path / "run", quiet=True, **more)

    teacher(depth=1).save_pretrained(tmp_path / "teacher")
    summary = run(tmp_path / "teacher").summary
    assert summary["strategy"] == "attentive"
    saved = safetensors.torch.load_file(next((tmp_path / "run" / "checkpoint").glob("*.safetensors")))
    assert not any(tensor.shape == (24, 3, 4, 4) for tensor in saved.values())
    other = vision_transformer(width=24, depth=1, seed=8, **TINY)
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(CheckpointError, match="not the one that this checkpoint was trained with"):
        run(tmp_path / "teacher", resume=True)
    with pytest.raises(BadParameter, match=r"objective\.teacher=\./clip-vit"):
        execute(resolve("pretrain", None, RUN), folder=tmp_path / "none", quiet=True)


@pytest.mark.parametrize(
    "check", [*conformance(Attentive), *conformance(MaskAlign)], ids=lambda pair: pair[0]
)
def test_the_conformance_kit_passes(check):
    check[1]()
