"""MTO: the equations, equality with what is wrapped, which layers are found, and objectives that it was not written for."""

import copy
import math
from typing import Any, ClassVar

import attrs
import pytest
import torch
from torch import nn

import maskwright
from maskwright import BoundObjective, Layout, Loss, Mask, MaskedTraining, adapt
from maskwright.backbones.defaults import vision_transformer
from maskwright.errors import BackboneMismatch, BadParameter, UnknownComponent
from maskwright.plugins.mto.objective import (
    MaskedTokenOptimization,
    entropy,
    entropy_loss,
    heterogeneity,
    keep_factor,
    mean_per_sample,
    recalibration,
    sparsity_loss,
)
from maskwright.testing import conformance
from maskwright.toolkit.decoders import transformer
from maskwright.toolkit.interception import intercepted

GRID, PATCH, DEPTH = (4, 4), 4, 4
MAE = {"name": "mae", "decoder_width": 16, "decoder_depth": 3, "decoder_heads": 2}
HPM = {"name": "hpm", "decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}
INNER = pytest.mark.parametrize("inner", ["simmim", MAE, HPM], ids=["simmim", "mae", "hpm"])
NOTHING = {"recalibrate": False, "lambda_spa": 0, "lambda_e": 0, "lambda_r": 0}


@pytest.mark.parametrize(
    "check",
    [check for _, check in conformance(MaskedTokenOptimization)]
    + [check for _, check in conformance(MaskedTokenOptimization(inner={**MAE, "decoder_depth": 2}))],
    ids=lambda check: f"{getattr(check.component, 'inner', check.component).name}-{check.name}",
)
def test_conforms(check):
    check()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def vit(**changes):
    sizes = {"image_size": 16, "patch_size": PATCH, "channels": 3, "width": 16, "depth": DEPTH, "heads": 2}
    return vision_transformer(**{**sizes, **changes})


def bound(objective, backbone=None, scale=1.0):
    """With the same weights for the same objective; `scale` > 1 gives attention something to decide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = objective.bind(backbone if backbone is not None else vit())
    with torch.no_grad():
        for one in made.parameters():
            if one.ndim > 1 and one.requires_grad:
                one.mul_(scale)
    return made


def batch(rows=3, seed=1):
    return {"pixels": torch.randn(rows, 3, 16, 16, generator=generator(seed))}


def half(rows=3, seed=2):
    return maskwright.create("mask-strategy", "random", ratio=0.5).draw(
        Layout(rows, GRID, patch_size=PATCH), signals={}, progress=0.0, generator=generator(seed)
    )


def unequal():
    keep = torch.zeros(3, 16, dtype=torch.bool)
    keep[0, :3] = keep[1, 2:14] = keep[2, ::2] = True
    return Mask(keep.view(3, *GRID))


# -- exact check 1: without its parts it is the wrapped objective ---------------------------------------------------


@INNER
@pytest.mark.parametrize("nothing", [NOTHING, {**NOTHING, "recalibrate": True, "early": 0}])
def test_without_its_parts_loss_and_gradients_are_those_of_the_wrapped_objective(inner, nothing):
    wrapped = MaskedTokenOptimization(inner=inner, **nothing)
    alone, around = bound(wrapped.inner, scale=4), bound(wrapped, scale=4)
    expected, found = alone(batch(), half()), around(batch(), half())
    expected.total.backward()
    found.total.backward()
    assert torch.equal(expected.total, found.total)
    assert expected.parts.keys() == found.parts.keys()
    assert torch.equal(expected.outputs["prediction"], found.outputs["prediction"])
    grads = dict(around.inner.named_parameters())
    for name, parameter in alone.named_parameters():
        assert (parameter.grad is None) == (grads[name].grad is None)
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name].grad), name


@INNER
def test_explicit_weights_change_the_wrapped_loss_by_rounding_only(inner):
    wrapped = MaskedTokenOptimization(inner=inner, recalibrate=False)
    expected, found = (bound(one, scale=4)(batch(), half()) for one in (wrapped.inner, wrapped))
    for name, part in expected.parts.items():
        torch.testing.assert_close(found.parts[name], part, rtol=1e-5, atol=1e-6)
    assert found.total > expected.total


@INNER
def test_with_its_parts_it_is_not(inner):
    wrapped = MaskedTokenOptimization(inner=inner, lambda_spa=0, lambda_e=0, lambda_r=0)
    expected, found = (bound(one, scale=4)(batch(), half()) for one in (wrapped.inner, wrapped))
    assert abs((expected.total - found.total).item()) > 1e-4


# -- exact check 2: with κ = 0 everywhere visible tokens do not know of mask tokens ---------------------------------


def test_with_no_weight_on_mask_tokens_visible_tokens_are_as_if_there_were_none():
    encoder = adapt(vit(), "patch").double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = transformer(16, 3, 2).double()
    x = torch.randn(2, 9, 16, generator=generator(), dtype=torch.float64)
    hidden = torch.tensor([[0, 0, 1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 1, 1, 0, 1, 0, 0]], dtype=torch.bool)
    bias = recalibration(hidden, 0.0)
    for module, run in ((encoder, encoder.encode), (decoder, decoder)):
        alone = run(x[~hidden].view(2, 5, 16))
        outputs = []
        for seed in range(3):
            token = 5 * torch.randn(16, generator=generator(seed), dtype=torch.float64)
            replaced = torch.where(hidden[..., None], token, x)
            with intercepted(module, lambda call: call.attend(bias)):
                outputs.append(run(replaced))
            torch.testing.assert_close(outputs[-1][~hidden].view(2, 5, 16), alone, rtol=0, atol=1e-14)
        assert (outputs[0][hidden] - outputs[1][hidden]).abs().max() > 0.1
        assert (run(x)[~hidden].view(2, 5, 16) - alone).abs().max() > 1e-3


# -- exact checks 3 to 6: numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "row"), [(0.0, (1 / 2, 1 / 2, 0)), (0.5, (0.4, 0.4, 0.2)), (1.0, (1 / 3, 1 / 3, 1 / 3))]
)
def test_equal_logits_become_what_the_hand_case_says(keep, row):
    hidden = torch.tensor([[False, False, True]])
    logits = torch.full((1, 2, 3, 3), 0.7)
    weights = (logits + recalibration(hidden, keep)).softmax(-1)
    expected = torch.tensor([row, row, (1 / 3, 1 / 3, 1 / 3)]).expand(1, 2, 3, 3)
    torch.testing.assert_close(weights, expected)


def test_losses_of_the_hand_case():
    hidden, weights = torch.tensor([[False, False, True]]), torch.full((1, 2, 3, 3), 1 / 3)
    assert sparsity_loss(weights, hidden).item() == pytest.approx(1 / 3)
    assert entropy_loss(weights, hidden).item() == pytest.approx(1)


def test_a_mask_token_orthogonal_to_what_is_visible_is_singular_and_a_copy_is_not():
    visible = torch.eye(6)[:4]
    hidden = torch.tensor([[False] * 4 + [True]])

    def of(token):
        return heterogeneity(torch.cat([visible, token[None]])[None], hidden).item()

    assert of(torch.eye(6)[5]) == pytest.approx(1, abs=1e-6)
    between = [of(size * visible[2]) for size in (0.0, 1.0, 5.0, 20.0, 100.0)]
    assert between == sorted(between, reverse=True)
    assert between[0] == pytest.approx(1, abs=1e-6)
    assert between[-1] < 1e-6


def test_the_schedule_of_eight_layers():
    assert [keep_factor(layer, 4) for layer in range(8)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert [keep_factor(layer, 1.5) for layer in range(3)] == [0, 2 / 3, 1]
    assert keep_factor(0, 0) == 1


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_recalibrated_rows_are_scaled_and_renormalised_and_others_left(keep):
    hidden = torch.rand(3, 7, generator=generator()) < 0.5
    hidden[:, 0], hidden[:, 1] = False, True
    logits = 3 * torch.randn(3, 2, 7, 7, generator=generator(1), dtype=torch.float64)
    weights, found = logits.softmax(-1), (logits + recalibration(hidden, keep)).softmax(-1)
    expected = weights.clone()
    for b in range(3):
        for v in range(7):
            if not hidden[b, v]:
                row = torch.where(hidden[b], keep * weights[b, :, v], weights[b, :, v])
                expected[b, :, v] = row / row.sum(-1, keepdim=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 2, 7, dtype=torch.float64))


# -- the losses against loops -----------------------------------------------------------------------------------------


def loop_over(weights, tokens, hidden):
    """(Σ_m A_vm of every visible row, entropy ratio of every masked row, H of every masked token), averaged per sample."""
    spa, spread, singular = [], [], []
    for b in range(len(hidden)):
        masked = [i for i in range(hidden.shape[1]) if hidden[b, i]]
        visible = [i for i in range(hidden.shape[1]) if not hidden[b, i]]
        spa.append([float(weights[b, h, v, masked].sum()) for h in range(weights.shape[1]) for v in visible])
        spread.append([])
        singular.append([])
        for m in masked:
            for row in weights[b, :, m]:
                total = -sum(float(p) * math.log(p) for p in row if p > 0)
                spread[-1].append(total / math.log(len(row)))
            related = [float(tokens[b, m] @ tokens[b, v]) / math.sqrt(tokens.shape[-1]) for v in visible]
            shares = torch.tensor(related, dtype=torch.float64).softmax(0).tolist()
            singular[-1].append(-sum(p * math.log(p) for p in shares if p > 0) / math.log(len(visible)))
    return [sum(sum(one) / len(one) for one in each) / len(each) for each in (spa, spread, singular)]


@pytest.mark.parametrize("mask", [half(), unequal()], ids=["equal", "unequal"])
def test_the_parts_are_the_formulas_summed_by_loops(mask):
    settings = {"lambda_spa": 0.3, "lambda_e": 0.2, "lambda_r": 0.7}
    model = bound(MaskedTokenOptimization(inner="simmim", **settings), scale=6).eval()
    hidden = nn.functional.pad(~mask.flatten().keep, (1, 0))
    loss, calls = model(batch(), mask), []

    def recalibrated(call):
        calls.append((call.logits().softmax(-1), call.tokens))
        factor = (0.0, 0.5, 1.0, 1.0)[len(calls) - 1]
        return call.attend(recalibration(hidden, factor))

    with intercepted(model.inner, recalibrated):
        plain = model.inner(batch(), mask)
    found = [loop_over(weights.detach(), tokens.detach(), hidden) for weights, tokens in calls]
    torch.testing.assert_close(loss.parts["pixels"], plain.total)
    expected = {
        "l_spa": 0.3 * (found[0][0] + found[1][0]) / 2,
        "l_e": 0.2 * ((1 - found[0][2]) + 0.5 * (1 - found[1][2])) / 1.5,
        "l_r": 0.7 * (found[2][1] + found[3][1]) / 2,
    }
    for name, value in expected.items():
        assert loss.parts[name].item() == pytest.approx(value, rel=1e-4), name
        assert value > 1e-4, name
    assert loss.outputs["heterogeneity"].tolist() == pytest.approx([one[2] for one in found], rel=1e-4)
    assert loss.total.item() == pytest.approx(plain.total.item() + sum(expected.values()), rel=1e-5)


def test_samples_count_alike_whatever_they_hide():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    chosen = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])
    assert mean_per_sample(values, chosen).item() == pytest.approx((1 + 5) / 2)
    assert mean_per_sample(values, chosen & False).item() == 0


def test_entropy_of_exact_zeros_is_zero_with_a_finite_gradient():
    logits = torch.tensor([[0.0, -math.inf, -math.inf], [1.0, 1.0, -math.inf]], requires_grad=True)
    found = entropy(logits.softmax(-1))
    torch.testing.assert_close(found, torch.tensor([0.0, math.log(2)]))
    found.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("visible", [0, 1, 2])
def test_heterogeneity_where_little_is_visible(visible):
    tokens = torch.randn(2, 5, 8, generator=generator(), requires_grad=True)
    hidden = torch.arange(5).expand(2, 5) >= visible
    found = heterogeneity(9 * tokens, hidden)
    assert found.item() == 1 if visible < 2 else 0 <= found.item() < 1
    found.backward()
    assert tokens.grad.isfinite().all()


def test_a_class_token_counts_as_visible():
    """κ = 0 in layer 0: the class token there is as if the image had its visible patches only."""
    model, mask = bound(MaskedTokenOptimization(inner="simmim", early=0.25), scale=6).eval(), half(1)
    firsts = []
    layer = model.backbone.model.layers[0]
    handle = layer.register_forward_hook(lambda module, args, out: firsts.append(out))
    model(batch(1), mask)
    tokens = model.backbone.patches(batch(1)["pixels"]) + model.backbone.positions
    shown = torch.cat([model.backbone.prefix(1), mask.flatten().gather_visible(tokens)], dim=1)
    layer(shown)
    handle.remove()
    torch.testing.assert_close(firsts[0][:, 0], firsts[1][:, 0])


# -- which layers ------------------------------------------------------------------------------------------------------


def places(objective, backbone=None):
    return {
        f"{block}#{ordinal}": (place.index, place.depth)
        for (block, ordinal), place in bound(objective, backbone).places.items()
    }


def test_simmim_has_its_mask_tokens_in_the_encoder():
    expected = {f"backbone.model.layers.{i}#0": (i, DEPTH) for i in range(DEPTH)}
    assert places(MaskedTokenOptimization(inner="simmim")) == expected


def test_mae_has_them_in_the_decoder_and_its_encoder_is_left_alone():
    expected = {f"decoder.layers.{i}#0": (i, 3) for i in range(3)}
    assert places(MaskedTokenOptimization(inner=MAE)) == expected
    everything = Mask(torch.ones(3, *GRID, dtype=torch.bool))
    loss = bound(MaskedTokenOptimization(inner=MAE))(batch(), everything)
    assert {name: float(part.detach()) for name, part in loss.parts.items()} == {
        **dict.fromkeys(("pixels", "l_spa", "l_r"), 0.0),
        "l_e": pytest.approx(0, abs=1e-7),
    }


def test_hpm_has_them_in_two_decoders_and_its_teacher_is_left_alone():
    found = places(MaskedTokenOptimization(inner=HPM))
    expected = {
        f"network.{decoder}.layers.{i}#0": (i, 2)
        for decoder in ("reconstructor", "loss_predictor")
        for i in range(2)
    }
    assert found == expected


def test_a_users_own_encoder_is_reached_too():
    from maskwright.testing.backbones import backbone

    found = places(MaskedTokenOptimization(inner="simmim"), backbone("plain-vit", 0))
    assert found == {"backbone.blocks.0#0": (0, 2), "backbone.blocks.1#0": (1, 2)}


def test_binding_leaves_training_mode_and_the_global_generator_alone():
    network = vit().train()
    network.layers[1].eval()
    torch.manual_seed(5)
    inner = maskwright.create("objective", "simmim").bind(network)
    after_inner = torch.get_rng_state()
    torch.manual_seed(5)
    MaskedTokenOptimization().bind(network)
    assert torch.equal(torch.get_rng_state(), after_inner)
    assert network.training
    assert not network.layers[1].training
    assert inner.backbone.model is network


# -- objectives of others -----------------------------------------------------------------------------------------------


class OwnAttention(nn.Module):
    """A block that somebody wrote: attention from torch's function, no list of modules, numbered attributes around it."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, memory=None):
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        if memory is not None:
            key, value = self.qkv(memory).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)[1:]
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return x + self.out(attended.transpose(1, 2).flatten(2))


@attrs.frozen
class Distilling:
    """A third party's: masked and whole images through one encoder, then a decoder that looks back at the whole."""

    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "distilling"
    modalities: ClassVar[frozenset] = frozenset({"image"})
    needs: ClassVar[frozenset] = frozenset({"pixels"})
    provides: ClassVar[frozenset] = frozenset()
    backbone: ClassVar[str] = "patch"

    def bind(self, backbone):
        return BoundDistilling(adapt(backbone, "patch"))


class BoundDistilling(BoundObjective):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.token = nn.Parameter(0.1 * torch.randn(backbone.width))
        self.block1, self.block2 = OwnAttention(backbone.width), OwnAttention(backbone.width)

    def encode(self, tokens):
        return self.backbone.encode(torch.cat([self.backbone.prefix(len(tokens)), tokens], dim=1))[:, 1:]

    def forward(self, batch, mask, *, signals=None, progress=1.0, generator=None):
        hidden = ~mask.flatten().keep
        tokens = self.backbone.patches(batch["pixels"]) + self.backbone.positions
        whole = self.encode(tokens)
        seen = self.encode(torch.where(hidden[..., None], self.token, tokens))
        again = torch.where(hidden[..., None], self.token, seen)
        decoded = self.block2(self.block2(self.block1(again)), whole)
        error = (decoded - whole.detach()).square().mean(-1)
        loss = (error * hidden).sum() / hidden.sum().clamp(min=1)
        return Loss(total=loss, parts={"distance": loss}, outputs={"prediction": decoded})


def test_a_third_partys_objective_is_wrapped_where_its_mask_tokens_are():
    """Not in the pass over the whole image, not in the attention to a memory; in the second pass, and in the first block."""
    found = places(MaskedTokenOptimization(inner=Distilling()))
    expected = {f"backbone.model.layers.{i}#1": (i, DEPTH) for i in range(DEPTH)}
    assert {name: place for name, place in found.items() if "layers" in name} == expected
    assert {name for name in found if "block" in name} == {"block1#0", "block2#0"}


def test_a_third_partys_objective_trains():
    wrapped = MaskedTokenOptimization(inner=Distilling(), lambda_e=1)
    alone = bound(wrapped.inner)(batch(), half()).total
    nothing = attrs.evolve(wrapped, **NOTHING)
    assert torch.equal(bound(nothing)(batch(), half()).total, alone)
    model = bound(wrapped)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(30):
        loss = model(batch(8), half(8)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@attrs.frozen
class VisibleOnly(Distilling):
    """A third party's without mask tokens: the encoder's mean of what is visible predicts the mean colour."""

    name: ClassVar[str] = "visible-only"

    def bind(self, backbone):
        return BoundVisibleOnly(adapt(backbone, "patch"))


class BoundVisibleOnly(BoundDistilling):
    def forward(self, batch, mask, *, signals=None, progress=1.0, generator=None):
        tokens = self.backbone.patches(batch["pixels"]) + self.backbone.positions
        loss = self.encode(mask.flatten().gather_visible(tokens)).mean(1).square().mean()
        return Loss(total=loss, parts={"loss": loss})


def test_an_objective_without_mask_tokens_is_refused_with_names_of_those_that_have_them():
    with pytest.raises(BadParameter, match=r"'visible-only' has no mask tokens.*'simmim'.*'mae'") as refused:
        MaskedTokenOptimization(inner=VisibleOnly()).bind(vit())
    assert str(refused.value).count(". ") == 0


@pytest.mark.parametrize(("inner", "kind"), [("spark", "conv"), ("next-token", "token")])
def test_objectives_on_other_backbones_are_refused_when_it_is_made(inner, kind):
    with pytest.raises(BadParameter, match=f"'{inner}' works on a '{kind}' backbone.*'simmim'"):
        maskwright.create("objective", "mto", inner=inner)


def test_attention_that_torch_does_not_compute_is_refused_with_what_to_do():
    network = vit()
    network.set_attn_implementation("eager")
    with pytest.raises(BackboneMismatch, match='attn_implementation="sdpa"'):
        MaskedTokenOptimization().bind(network)
    # Its mask tokens are in a decoder of torch's, whatever the encoder is.
    assert places(MaskedTokenOptimization(inner=MAE), network)


@attrs.frozen
class Captioned(Distilling):
    name: ClassVar[str] = "captioned"
    needs: ClassVar[frozenset] = frozenset({"pixels", "captions"})


def test_a_column_that_cannot_be_made_up_is_asked_for():
    with pytest.raises(BadParameter, match=r"'captions'.*example_batch"):
        MaskedTokenOptimization(inner=Captioned()).bind(vit())

    class WithExample(Captioned):
        @staticmethod
        def example_batch(backbone, rows, generator):
            return {**batch(rows), "captions": torch.zeros(rows)}

    assert places(MaskedTokenOptimization(inner=WithExample()))


def test_a_mask_that_must_have_a_form_is_taken_from_the_class():
    class Below(Distilling):
        @staticmethod
        def example_mask(layout, generator):
            keep = torch.ones(layout.batch, *layout.grid, dtype=torch.bool)
            keep[:, 2:] = False
            return Mask(keep)

    assert len(places(MaskedTokenOptimization(inner=Below()))) == DEPTH + 2


# -- as a component ------------------------------------------------------------------------------------------------------


def test_the_inner_objective_is_given_by_name_table_or_made():
    by_name = maskwright.create("objective", "mto", inner="mae")
    made = maskwright.create("objective", "mto", inner=maskwright.create("objective", "mae"))
    assert by_name == made
    assert maskwright.create("objective", "mto", inner=MAE).inner.decoder_depth == 3
    assert maskwright.create("objective", "mto").inner.name == "simmim"
    with pytest.raises(UnknownComponent, match="simmim"):
        maskwright.create("objective", "mto", inner="simmin")


def test_gradients_reach_the_mask_token_from_every_part():
    model = bound(MaskedTokenOptimization(), scale=4)
    loss = model(batch(), half())
    for name in ("l_spa", "l_e", "l_r"):
        (gradient,) = torch.autograd.grad(loss.parts[name], model.inner.mask_token, retain_graph=True)
        assert gradient.abs().max() > 0, name
    loss.total.backward()
    assert [name for name, one in model.named_parameters() if one.grad is None] == []


@pytest.mark.parametrize(
    ("part", "measure"), [("lambda_spa", "l_spa"), ("lambda_e", "l_e"), ("lambda_r", "l_r")]
)
def test_each_part_is_learned(part, measure):
    settings = {"lambda_spa": 0, "lambda_e": 0, "lambda_r": 0, part: 1.0}
    model = bound(MaskedTokenOptimization(**settings), scale=4)
    optimizer, values = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(20):
        loss = model(batch(), half())
        optimizer.zero_grad()
        loss.parts[measure].backward()
        optimizer.step()
        values.append(float(loss.parts[measure].detach()))
    assert values[-1] < 0.9 * values[0]


def test_what_the_wrapped_objective_offers_is_offered():
    """HPM's teacher forecasts, follows, and its strategy chooses by it."""
    wrapped = MaskedTokenOptimization(inner=HPM)
    assert (wrapped.needs, wrapped.provides) == ({"pixels"}, {"patch_loss"})
    model = MaskedTraining(vit(), maskwright.create("mask-strategy", "hard-patches"), wrapped, total_steps=2)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    before = copy.deepcopy(model.bound.inner.teacher.state_dict())
    model(**batch())["loss"].backward()
    optimizer.step()
    after = model.bound.inner.teacher.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("strategy", ["block", "colormae", "simmim-blocks"])
def test_masks_of_other_papers_train_it(strategy):
    given = {"min_block": 2} if strategy == "block" else {}
    model = MaskedTraining(
        vit(), maskwright.create("mask-strategy", strategy, **given), MaskedTokenOptimization()
    )
    out = model(**batch())
    out["loss"].backward()
    assert {"pixels", "l_spa", "l_e", "l_r"} == set(out["parts"])


def test_copies_and_saved_states_are_whole():
    model = bound(MaskedTokenOptimization(inner=MAE), scale=4)
    twin = copy.deepcopy(model)
    expected = model(batch(), half()).total
    assert torch.equal(twin(batch(), half()).total, expected)
    other = MaskedTokenOptimization(inner=MAE).bind(vit(seed=3))
    assert not torch.equal(other(batch(), half()).total, expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch(), half()).total, expected)


@pytest.mark.parametrize(
    "pairs",
    [{}, {"objective.inner.name": "mae", "objective.lambda_e": 0.5}],
    ids=["simmim", "mae"],
)
def test_the_job_trains_it(tmp_path, pairs):
    from maskwright.jobs import execute
    from maskwright.jobs.settings import resolve

    given: dict[str, Any] = {
        "objective.name": "mto",
        "run.steps": 2,
        "run.batch_size": 8,
        "data.source": "digits",
        "model": {"width": 16, "depth": 2, "heads": 2},
        **pairs,
    }
    result = execute(resolve("pretrain", None, given), folder=tmp_path / "run", quiet=True)
    assert math.isfinite(result.summary["held_out_loss"])
    assert 'name = "mto"' in (tmp_path / "run" / "run.toml").read_text()
