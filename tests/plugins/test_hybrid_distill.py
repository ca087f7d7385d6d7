"""Hybrid Distillation: relations by hand, the redundant dropped in nested stages, two teachers, and what diversity is."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskwright
from maskwright import Layout, Mask, MaskedTraining, StagedMask
from maskwright.backbones.defaults import vision_transformer
from maskwright.backbones.teachers import VisionTeacher
from maskwright.errors import (
    BackboneMismatch,
    BadModel,
    BadParameter,
    MaskShapeError,
    MissingSignal,
    UnequalMaskCounts,
)
from maskwright.plugins.hybrid_distill.diversity import attention_distance, normalized_mutual_information
from maskwright.plugins.hybrid_distill.masks import (
    ProgressiveRedundant,
    alive_counts,
    drop_redundant,
    redundancy,
)
from maskwright.plugins.hybrid_distill.objective import (
    HybridDistill,
    relation,
    relation_distance,
    stage_starts,
)
from maskwright.testing import conformance
from maskwright.testing.backbones import PlainViT

TINY = {"image_size": 16, "patch_size": 4}
seeds = st.integers(0, 2**31)


def checks_of(component):
    return [pytest.param(check, id=name) for name, check in conformance(component)]


@pytest.mark.parametrize("check", [*checks_of(ProgressiveRedundant), *checks_of(HybridDistill)])
def test_conforms(check):
    check()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(value, expected, atol=1e-5):
    return torch.allclose(torch.as_tensor(value).double(), torch.tensor(expected).double(), atol=atol)


# -- relations -----------------------------------------------------------------------------------------------------

Q = torch.tensor([[1.0, 0], [0, 1], [1, 1]], dtype=torch.float64)[None, None]
K = torch.tensor([[1.0, 0], [0, 2], [1, -1]], dtype=torch.float64)[None, None]
V = torch.tensor([[1.0, 2], [0, 1], [-1, 0]], dtype=torch.float64)[None, None]


def test_relations_equal_the_definition_on_hand_made_queries_keys_and_values():
    root = math.sqrt(2)
    assert close(relation(Q, K), [[[[1 / root, 0, 1 / root], [0, root, -1 / root], [1 / root, root, 0]]]])
    assert close(
        relation(Q, K).softmax(-1),
        [[[[0.40111, 0.19778, 0.40111], [0.17837, 0.73368, 0.08795], [0.28400, 0.57598, 0.14003]]]],
    )
    assert close(
        relation(V, V).softmax(-1),
        [[[[0.88165, 0.10569, 0.01267], [0.57598, 0.28400, 0.14003], [0.14003, 0.28400, 0.57598]]]],
    )


def test_distances_to_a_student_without_queries_are_those_computed_by_hand():
    its, mine = relation(Q, K), relation(torch.zeros_like(Q), K)
    assert close(relation_distance(mine, its), 0.3142697, atol=1e-7)
    assert close(relation_distance(mine, its, "kl"), 0.1811451, atol=1e-7)
    # What would vanish beside the features.
    assert close(relation_distance(mine.softmax(-1), its.softmax(-1)), 0.0205970, atol=1e-7)


@given(seed=seeds, measure=st.sampled_from(["smooth-l1", "kl"]))
@settings(max_examples=20, deadline=None)
def test_one_rotation_of_both_sides_changes_nothing(seed, measure):
    q, k, v = random(3, 2, 2, 5, 4, seed=seed)
    other = relation(*random(2, 2, 2, 5, 4, seed=seed + 1))
    rotation = torch.linalg.qr(random(4, 4, seed=seed + 2)).Q
    for x, y in ((q, k), (v, v)):
        before = relation_distance(relation(x, y), other, measure)
        after = relation_distance(relation(x @ rotation, y @ rotation), other, measure)
        assert abs(float(before - after)) < 1e-12
        assert float(before) > 0
        # One side alone is no symmetry.
        assert abs(float(relation_distance(relation(x @ rotation, y), other, measure) - before)) > 1e-6
        assert abs(float(relation_distance(relation(x, y), relation(x, y), measure))) < 1e-12


def test_unequal_numbers_of_heads_are_averaged():
    mine, its = random(2, 4, 5, 5), random(2, 3, 5, 5, seed=1)
    by_hand = relation_distance(mine.mean(1, keepdim=True), its.mean(1, keepdim=True))
    assert torch.equal(relation_distance(mine, its), by_hand)


def test_raw_relations_weigh_as_much_as_features_and_soft_maxed_ones_nothing():
    one, two = torch.randn(2, 2, 4, 197, 197, generator=torch.Generator().manual_seed(0))
    assert close(relation_distance(one, two), 0.72, atol=0.01)
    assert close(relation_distance(one, two, "kl"), 0.99, atol=0.02)
    assert float(relation_distance(one.softmax(-1), two.softmax(-1))) < 5e-5


# -- masks ---------------------------------------------------------------------------------------------------------

TOKENS = torch.tensor([[1, 0], [2, 0], [1, 0.1], [0, 1], [-1, 0.2], [0.6, 0.8]], dtype=torch.float64)[None]


def drawn(features, grid=None, **parameters):
    return ProgressiveRedundant(**parameters).draw(
        Layout(len(features), grid or (features.shape[1],)),
        signals={"teacher_features": features},
        progress=0.0,
        generator=torch.Generator(),
    )


def test_the_scores_and_what_is_dropped_are_those_computed_by_hand():
    alive = torch.ones(1, 6, dtype=torch.bool)
    assert close(redundancy(TOKENS, alive), [[0.32289, 0.32289, 0.36200, 0.21912, -0.63054, 0.44903]])
    alive = drop_redundant(TOKENS, alive, 4)
    assert alive.tolist() == [[True, True, False, True, True, False]]
    assert close(redundancy(TOKENS, alive)[alive], [0.00647, 0.00647, 0.06537, -0.58835])
    assert drop_redundant(TOKENS, alive, 3).tolist() == [[True, True, False, False, True, False]]


def test_dropping_one_of_the_most_similar_pair_is_another_method():
    directions = torch.nn.functional.normalize(TOKENS[0], dim=-1)
    similar = (directions @ directions.T).triu(1) - 2 * torch.ones(6, 6).tril()
    dropped = []
    for _ in range(2):
        dropped.append(int(similar.argmax()) % 6)
        similar[dropped[-1]] = similar[:, dropped[-1]] = -2
    assert dropped == [1, 2]
    assert sorted(
        (~drop_redundant(TOKENS, torch.ones(1, 6, dtype=torch.bool), 4)[0]).nonzero().flatten()
    ) == [2, 5]


def test_the_strategy_drops_the_same_in_two_stages():
    mask = drawn(TOKENS, keep=0.7, stages=2)  # 6 → 4 → 2
    assert alive_counts(6, 0.7, 2) == [4, 2]
    assert mask.stage(0).keep.tolist() == [[True, True, False, True, True, False]]
    # After 3 the next most redundant would be 0 or 1, of equal score in the same draw: the higher position goes.
    assert mask.keep.tolist() == [[True, False, False, False, True, False]]


def test_counts_are_floored_at_every_stage():
    assert alive_counts(196, 0.7, 3) == [137, 95, 66]
    assert alive_counts(196, 0.5, 3) == [98, 49, 24]
    assert alive_counts(196, 0.9, 3) == [176, 158, 142]
    assert alive_counts(100, 0.29, 1) == [29]
    assert alive_counts(10, 0.7, 1) == [7]
    assert alive_counts(2, 0.1, 3) == [1, 1, 1]
    mask = drawn(random(2, 196, 3, 5), (14, 14))
    assert [mask.stage(stage).counts.tolist() for stage in range(3)] == [[137] * 2, [95] * 2, [66] * 2]
    assert mask.counts.tolist() == [66, 66]


@given(seed=seeds, keep=st.sampled_from([0.5, 0.7, 0.9]), stages=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_stages_are_nested_scales_do_not_count_and_masks_move_with_the_tokens(seed, keep, stages):
    features = random(2, 48, stages, 5, seed=seed)
    mask = drawn(features, keep=keep, stages=stages)
    for before, after in zip(range(stages), range(1, stages)):
        assert not (mask.stage(after).keep & ~mask.stage(before).keep).any()
    scaled = features * random(2, 48, 1, 1, seed=seed + 1).exp()
    assert torch.equal(drawn(scaled, keep=keep, stages=stages).survived, mask.survived)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(drawn(features[:, order], keep=keep, stages=stages).survived, mask.survived[:, order])


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_redundancy_is_the_mean_cosine_to_the_others_alive(seed):
    features = random(2, 7, 3, seed=seed)
    alive = torch.rand(2, 7, generator=torch.Generator().manual_seed(seed)) < 0.7
    scores = redundancy(features, alive)
    for row in range(2):
        for token in range(7):
            others = [other for other in range(7) if alive[row, other] and other != token]
            if not alive[row, token]:
                assert scores[row, token] == -math.inf
                continue
            similar = [
                float(
                    torch.nn.functional.cosine_similarity(features[row, token], features[row, other], dim=0)
                )
                for other in others
            ]
            assert abs(float(scores[row, token]) - sum(similar) / max(1, len(similar))) < 1e-12


def test_the_most_similar_are_hidden_and_not_the_least():
    crowd, loners = torch.tensor([1.0, 0, 0]).repeat(8, 1), torch.eye(3)[1:]
    features = torch.cat([crowd + 0.01 * random(8, 3).float(), loners])[None]
    assert drawn(features, keep=0.5, stages=1).keep[0, 8:].all()


def test_one_vector_a_patch_serves_all_stages_and_keeping_all_masks_nothing():
    features = random(2, 16, 5)
    same = features[:, :, None].expand(-1, -1, 3, -1)
    assert torch.equal(drawn(features).survived, drawn(same).survived)
    assert drawn(features, keep=1.0).keep.all()


def test_half_precision_features_and_patches_without_content_are_taken():
    features = random(2, 16, 3, 5)
    features[:, :4] = 0
    assert drawn(features.half()).counts.tolist() == [4, 4]


def test_signals_that_are_missing_or_do_not_fit_are_refused():
    strategy, layout = ProgressiveRedundant(), Layout(2, (4, 4))

    def draw(**signals):
        return strategy.draw(layout, signals=signals, progress=0, generator=torch.Generator())

    with pytest.raises(MissingSignal, match="'hybrid-distill' provides it"):
        draw()
    with pytest.raises(MaskShapeError, match="has 2 stages, stages=3"):
        draw(teacher_features=random(2, 16, 2, 5))
    for wrong in (random(2, 15, 3, 5), random(2, 16), random(1, 16, 5)):
        with pytest.raises(MaskShapeError, match="2 × 16 patches"):
            draw(teacher_features=wrong)


# -- diversity -----------------------------------------------------------------------------------------------------


def test_the_measures_of_diversity_are_those_computed_by_hand():
    identity, uniform = torch.eye(4, dtype=torch.float64), torch.full((4, 4), 0.25, dtype=torch.float64)
    neighbours = identity[[1, 0, 3, 2]]
    for attention, distance, information in (
        (uniform, 13.6569, 0),
        (identity, 0, 1),
        ((identity + uniform) / 2, 6.8284, 0.2256),
        (neighbours, 16, 1),
        (identity[[0, 0, 0, 0]], None, 0),
    ):
        assert distance is None or close(attention_distance(attention, (2, 2), 16), distance, atol=1e-4)
        assert close(normalized_mutual_information(attention), information, atol=1e-4)
    assert close(attention_distance(torch.full((196, 196), 1 / 196), (14, 14), 16), 116.49, atol=0.01)


def test_heads_and_images_are_measured_on_their_own():
    attention = random(3, 2, 6, 6).softmax(-1)
    distance = attention_distance(attention, (2, 3), 4)
    information = normalized_mutual_information(attention)
    assert distance.shape == information.shape == (3, 2)
    assert torch.allclose(distance[1, 1], attention_distance(attention[1, 1], (2, 3), 4))
    assert torch.allclose(information[2, 0], normalized_mutual_information(attention[2, 0]))


# -- the objective -------------------------------------------------------------------------------------------------


def vit(width=16, depth=3, heads=2, seed=1, **other):
    """A ViT whose attention is far from uniform, unlike that of a new one."""
    model = vision_transformer(width=width, depth=depth, heads=heads, seed=seed, **{**TINY, **other})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= 12
    return model


def bound(student=None, **settings):
    settings = {
        "mim_teacher": vit(seed=7),
        "feature_teacher": vit(width=24, seed=8),
        "layers": (-2,),
        **settings,
    }
    return HybridDistill(**settings).bind(vit() if student is None else student)


def batch(count=3, seed=0, size=16):
    return {"pixels": torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))}


def staged_mask(count=3, seed=0, counts=(11, 7, 5)):
    order = torch.rand(count, 16, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    survived = torch.stack([order < kept for kept in counts]).sum(0)
    return StagedMask(survived.view(count, 4, 4), len(counts))


def everything(count=3):
    return Mask(torch.ones(count, 4, 4, dtype=torch.bool))


def whole(model, pixels):
    """What a model of transformers gives, and its queries, keys and values block by block, from its own modules."""
    caught = {}
    hooks = [
        getattr(module, name).register_forward_hook(
            lambda module, given, output, key=(block, name): caught.__setitem__(key, output)
        )
        for block, module in enumerate(one for one in model.modules() if hasattr(one, "q_proj"))
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    with torch.no_grad():
        final = model(pixel_values=pixels).last_hidden_state
    for hook in hooks:
        hook.remove()
    heads = model.config.num_attention_heads
    split = {key: value.unflatten(-1, (heads, -1)).transpose(1, 2) for key, value in caught.items()}
    return final, split


def test_without_a_mask_the_loss_is_the_definition():
    mim, features, student = vit(seed=7), vit(width=16, seed=8), vit()
    pixels = batch()["pixels"]
    loss = bound(student, mim_teacher=mim, feature_teacher=features, alpha=0.5, beta=2.0, layers=(0, -2))(
        {"pixels": pixels}, everything()
    )
    (final, mine), (_, its), (target, _) = (whole(model, pixels) for model in (student, mim, features))
    distances = []
    for block in (0, 1):
        for one, other in (("q_proj", "k_proj"), ("v_proj", "v_proj")):
            pair = [split[block, one] @ split[block, other].mT / math.sqrt(8) for split in (mine, its)]
            distances.append(torch.nn.functional.smooth_l1_loss(*pair))
    standard = (target - target.mean(-1, keepdim=True)) / (
        target.var(-1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    assert close(loss.parts["relations"], 0.5 * float(sum(distances)) / 4, atol=1e-6)
    wanted = torch.nn.functional.smooth_l1_loss(final, standard)
    assert close(loss.parts["features"], 2 * float(wanted), atol=1e-6)


def relations_of(objective, mask):
    return float(objective(batch(), mask).parts["relations"].detach())


def test_a_student_that_is_its_teacher_has_no_relation_loss_under_a_mask_of_one_stage_and_before_it():
    student = vit()
    one = bound(student, mim_teacher=student, layers=(0,))
    assert relations_of(one, everything()) < 1e-10
    # Tokens are dropped before the first block, so its queries, keys and values are those of the whole image.
    assert relations_of(one, staged_mask()) < 1e-10
    other = bound(student, mim_teacher=student, layers=(1,))
    assert relations_of(other, everything()) < 1e-10
    assert relations_of(other, staged_mask()) > 1e-6


def by_blocks(student, pixels, mask):
    """The student in stages, written out: raster positions of the tokens alive, image by image."""
    rows, inputs = [], []
    for row in range(len(pixels)):
        embedded = student.embeddings(pixels[row : row + 1])[0]
        alive = list(range(16))
        tokens = embedded
        seen = []
        for block, layer in enumerate(student.layers):
            if block < mask.stages:
                kept = [i for i in alive if int(mask.survived[row].flatten()[i]) > block]
                tokens = tokens[[0] + [1 + alive.index(i) for i in kept]]
                alive = kept
            seen.append(len(tokens))
            tokens = layer(tokens[None])[0]
        rows.append(student.layernorm(tokens))
        inputs.append(seen)
    return torch.stack(rows), inputs


def test_the_student_runs_the_tokens_of_each_stage_and_no_others():
    student, pixels, mask = vit(), batch()["pixels"], staged_mask()
    lengths = []
    for layer in student.layers:
        layer.register_forward_pre_hook(lambda module, given: lengths.append(given[0].shape[1]))
    output = bound(student)({"pixels": pixels}, mask).outputs["features"]
    assert lengths == [12, 8, 6]
    expected, inputs = by_blocks(student, pixels, mask)
    assert inputs == [lengths[:3]] * 3
    assert torch.allclose(output, expected[:, 1:], atol=1e-5)


def test_relations_and_features_are_those_of_the_tokens_alive_there():
    mim, features, student = vit(seed=7), vit(width=16, seed=8), vit()
    pixels, mask = batch()["pixels"], staged_mask()
    loss = bound(student, mim_teacher=mim, feature_teacher=features, layers=(1,), relations=["qk"])(
        {"pixels": pixels}, mask
    )
    _, its = whole(mim, pixels)
    target = whole(features, pixels)[0]
    with torch.no_grad():
        final, _ = by_blocks(student, pixels, mask)
    relations, wanted = [], []
    for row in range(3):
        middle = [0] + [1 + i for i in range(16) if int(mask.survived[row].flatten()[i]) > 1]
        last = [0] + [1 + i for i in range(16) if int(mask.survived[row].flatten()[i]) > 2]
        teacher = its[1, "q_proj"][row] @ its[1, "k_proj"][row].mT / math.sqrt(8)
        relations.append(teacher[:, middle][:, :, middle])
        wanted.append(torch.nn.functional.layer_norm(target[row], (16,))[last])
    assert loss.parts["features"].item() == pytest.approx(
        float(torch.nn.functional.smooth_l1_loss(final, torch.stack(wanted))), abs=1e-6
    )
    tokens = student_queries(student, pixels, mask)
    expected = torch.nn.functional.smooth_l1_loss(tokens, torch.stack(relations))
    assert loss.parts["relations"].item() == pytest.approx(float(expected), abs=1e-6)


def student_queries(student, pixels, mask):
    """q · kᵀ / √d of the student's second block among the tokens of the second stage."""
    caught = {}
    attention = student.layers[1].attention
    hooks = [
        getattr(attention, name).register_forward_hook(
            lambda module, given, output, name=name: caught.setdefault(name, []).append(output[0])
        )
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        by_blocks(student, pixels, mask)
    for hook in hooks:
        hook.remove()
    q, k = (torch.stack(caught[name]).unflatten(-1, (2, 8)).transpose(1, 2) for name in ("q_proj", "k_proj"))
    return q @ k.mT / math.sqrt(8)


def test_no_weight_on_relations_is_feature_distillation_on_any_backbone_and_asks_for_no_second_teacher():
    student = PlainViT()
    one = HybridDistill(alpha=0.0, feature_teacher=vit(width=24, seed=8)).bind(student)
    loss = one(batch(), everything())
    assert set(loss.parts) == {"features"}
    assert one.mim_teacher is None
    with pytest.raises(BackboneMismatch, match="PlainViT cannot be seen"):
        bound(student)
    with pytest.raises(BackboneMismatch, match="takes no `between`"):
        one(batch(), staged_mask())


def test_no_weight_on_features_is_relation_distillation():
    one = HybridDistill(beta=0.0, mim_teacher=vit(seed=7), layers=(-2,)).bind(vit())
    loss = one(batch(), everything())
    assert set(loss.parts) == {"relations"}
    assert loss.total.item() == loss.parts["relations"].item()
    assert one.feature_teacher is None
    assert one.signals(batch())["teacher_features"].shape == (3, 16, 3, 16)


def test_signals_of_others_do_not_stand_in_for_the_teachers():
    one = bound()
    alone = one(batch(), everything(), signals={"teacher_features": torch.zeros(3, 16, 3, 24)}).total
    assert torch.equal(alone, one(batch(), everything(), signals=one.signals(batch())).total)


def test_both_weights_scale_their_terms():
    parts = bound()(batch(), everything()).parts
    scaled = bound(alpha=3.0, beta=0.25)
    scaled.load_state_dict(bound().state_dict())
    relations = scaled(batch(), everything()).parts["relations"].item()
    assert relations == pytest.approx(3 * parts["relations"].item(), rel=1e-5)


def test_the_signal_is_what_the_feature_teacher_makes_of_each_third_of_its_depth():
    teacher = vit(width=24, depth=6, seed=8)
    given = bound(feature_teacher=teacher).signals(batch())
    with torch.no_grad():
        levels = teacher(pixel_values=batch()["pixels"], output_hidden_states=True).hidden_states
    expected = torch.stack([levels[after][:, 1:] for after in (2, 4, 6)], 2)
    assert torch.allclose(given["teacher_features"], expected, atol=1e-5)
    assert stage_starts(12, 3) == [0, 4, 8]
    assert stage_starts(2, 3) == [0, 0, 1]


def test_teachers_run_once_a_step(monkeypatch):
    runs = []
    run = VisionTeacher.forward
    monkeypatch.setattr(
        VisionTeacher,
        "forward",
        lambda self, *given, **named: runs.append(self) or run(self, *given, **named),
    )
    model = MaskedTraining(vit(), ProgressiveRedundant(), HybridDistill(**small()))
    out = model(**batch())
    assert len(runs) == 2
    assert out["mask"].counts.tolist() == [4, 4, 4]
    out["loss"].backward()
    assert all(one.grad is None for teacher in runs for one in teacher.model.parameters())


def small():
    return {"mim_teacher": vit(seed=7), "feature_teacher": vit(width=24, seed=8), "layers": (-2,)}


def test_teachers_of_other_widths_heads_depths_and_sizes_are_taken():
    loss = bound(
        mim_teacher=vit(width=24, depth=5, heads=3, seed=7),
        feature_teacher=vit(width=32, depth=2, heads=4, seed=8, image_size=32, patch_size=8),
    )(batch(), staged_mask())
    assert loss.total.isfinite()
    loss.total.backward()


def test_a_few_steps_bring_the_student_nearer_to_both_teachers():
    torch.manual_seed(0)
    model = MaskedTraining(vit(), ProgressiveRedundant(), HybridDistill(**small()), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(30):
        out = model(**batch())
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append([float(out["parts"][name].detach()) for name in ("relations", "features")])
    assert history[-1][0] < 0.7 * history[0][0]
    assert history[-1][1] < 0.9 * history[0][1]


def test_other_masks_are_taken_and_unequal_counts_refused():
    one = bound()
    for name in ("random", "simmim-blocks"):
        strategy = maskwright.create("mask-strategy", name)
        mask = strategy.draw(
            Layout(3, (4, 4), patch_size=4), signals={}, progress=0, generator=torch.Generator()
        )
        assert one(batch(), mask).total.isfinite()
    unequal = torch.ones(3, 4, 4, dtype=torch.bool)
    unequal[0, 0] = False
    with pytest.raises(UnequalMaskCounts, match="hybrid-distill drops hidden patches"):
        one(batch(), Mask(unequal))


def test_other_objectives_see_what_survives_all_stages():
    mae = maskwright.create("objective", "mae", decoder_width=16, decoder_depth=1, decoder_heads=2).bind(
        vit()
    )
    mask = staged_mask()
    torch.testing.assert_close(mae(batch(), mask).total, mae(batch(), Mask(mask.keep)).total)


def test_folders_are_teachers_too(tmp_path):
    for name, model in (("mae", vit(seed=7)), ("deit", vit(width=24, seed=8))):
        model.save_pretrained(tmp_path / name)
    told = {"mim_teacher": str(tmp_path / "mae"), "feature_teacher": str(tmp_path / "deit")}
    torch.manual_seed(0)
    from_folders = bound(**told)(batch(), staged_mask()).total
    torch.manual_seed(0)
    torch.testing.assert_close(from_folders, bound()(batch(), staged_mask()).total)
    with pytest.raises(BadModel, match="does not exist"):
        bound(mim_teacher=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mim_teacher": None}, "has no mim_teacher"),
        ({"feature_teacher": None}, "has no feature_teacher"),
        ({"layers": (3,)}, r"layers has 3, and the student has 3 blocks: give numbers from -3 to 2"),
        ({"layers": ()}, "layers="),
        ({"relations": ("kk",)}, "must be some of qk, vv"),
        ({"alpha": 0.0, "beta": 0.0}, "nothing is learned"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(BadParameter, match=message):
        bound(**settings)


def test_it_runs_from_the_command_line_with_teachers_given_as_folders(tmp_path):
    from maskwright.jobs import execute
    from maskwright.jobs.settings import resolve

    for name, seed in (("mae", 7), ("deit", 8)):
        vit(width=32, depth=4, heads=4, seed=seed).save_pretrained(tmp_path / name)
    overrides = {
        "objective": {
            "name": "hybrid-distill",
            "mim_teacher": str(tmp_path / "mae"),
            "feature_teacher": str(tmp_path / "deit"),
        },
        "strategy": {"name": "progressive-redundant"},
        "data": {"source": "digits", "size": 16},
        "model": {"width": 16, "depth": 4, "heads": 2},
        "run": {"steps": 3, "batch_size": 16},
    }
    result = execute(resolve("pretrain", None, overrides), folder=tmp_path / "run", quiet=True)
    assert math.isfinite(result.summary["held_out_loss"])
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
