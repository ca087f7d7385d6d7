"""Attention rules that look at a layer's own scores: against loops, and in the blocks of transformers' vision models."""

import copy
import json

import pytest
import torch

from maskwright import AttentionMask, adapt
from maskwright.backbones import takes_attention
from maskwright.backbones.defaults import vision_transformer
from maskwright.errors import MaskShapeError
from maskwright.testing.backbones import PlainViT
from maskwright.toolkit.attention import ScoreRule


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def positive(scores):
    """Keys that score above zero: another number for each query."""
    return scores > 0


def tensors(batch=2, heads=4, groups=4, queries=5, keys=7, seed=0):
    draw = generator(seed)
    return (
        torch.randn(batch, heads, queries, 6, generator=draw),
        torch.randn(batch, groups, keys, 6, generator=draw),
        torch.randn(batch, groups, keys, 3, generator=draw),
    )


def by_hand(query, key, value, rule, scale):
    """Query by query; zeros for one that attends to nothing."""
    out = torch.zeros(*query.shape[:3], value.shape[-1])
    share = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for q in range(query.shape[2]):
                scores = scale * key[b, h // share] @ query[b, h, q]
                keep = rule(scores)
                if keep.any():
                    out[b, h, q] = scores[keep].softmax(0) @ value[b, h // share][keep]
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_a_rule_on_scores_is_attention_to_what_it_keeps(groups, scale):
    query, key, value = tensors(groups=groups)
    expected = by_hand(query, key, value, positive, scale or 6**-0.5)
    ours = ScoreRule(positive).attend(query, key, value, scale=scale)
    assert torch.allclose(ours, expected, atol=1e-6)
    assert not torch.allclose(ours, by_hand(query, key, value, lambda s: s > -9, scale or 6**-0.5), atol=1e-2)


def test_a_query_that_attends_to_nothing_gets_zeros_and_no_gradient_is_lost():
    query, key, value = (x.requires_grad_() for x in tensors())
    out = ScoreRule(lambda scores: (scores > 0) & (torch.arange(5) > 0)[:, None]).attend(query, key, value)
    assert not out[:, :, 0].any()
    assert out[:, :, 1:].any()
    out.sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (query, key, value))
    assert not query.grad[:, :, 0].any()


def test_what_is_not_kept_gets_no_gradient():
    query, key, value = (x.requires_grad_() for x in tensors())
    ScoreRule(lambda scores: torch.arange(7).lt(3).expand_as(scores)).attend(
        query, key, value
    ).square().sum().backward()
    assert not key.grad[:, :, 3:].any()
    assert not value.grad[:, :, 3:].any()
    assert key.grad[:, :, :3].any()


@pytest.mark.parametrize("rule", [lambda s: s, lambda s: (s > 0)[:, :1], lambda s: (s > 0).long()])
def test_an_answer_that_is_no_bool_for_each_score_is_refused(rule):
    with pytest.raises(MaskShapeError, match=r"must answer with bool of that shape, True = attended"):
        ScoreRule(rule).attend(*tensors())


# -- in a model ------------------------------------------------------------------------------------------------


def deit():
    from transformers import DeiTConfig, DeiTModel

    torch.manual_seed(0)
    return DeiTModel(
        DeiTConfig(
            image_size=16,
            patch_size=4,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
        ),
        add_pooling_layer=False,
    ).eval()


def vit():
    return vision_transformer(image_size=16, patch_size=4, width=16, depth=3, heads=2).eval()


@pytest.mark.parametrize("make", [vit, deit])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_each_block_evaluates_the_rule_on_its_own_queries_and_keys(make, implementation):
    model = make()
    model.set_attn_implementation(implementation)
    backbone = adapt(model, "patch")
    x = torch.randn(2, 9, 16, generator=generator())
    seen = []

    def rule(scores):
        seen.append(scores)
        return positive(scores)

    levels = backbone.encode(x, levels=range(3), attention=ScoreRule(rule))
    assert [tuple(scores.shape) for scores in seen] == [(2, 2, 9, 9)] * 3
    for number, layer in enumerate(model.layers):
        normed = layer.layernorm_before(x)
        q, k, v = (
            project(normed).view(2, 9, 2, 8).transpose(1, 2)
            for project in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj)
        )
        assert torch.allclose(seen[number], q @ k.mT * 8**-0.5, atol=1e-5)
        x = x + layer.attention.o_proj(by_hand(q, k, v, positive, 8**-0.5).transpose(1, 2).reshape(2, 9, 16))
        x = x + layer.mlp(layer.layernorm_after(x))
        assert torch.allclose(levels[number], x, atol=1e-5)


@pytest.mark.parametrize("make", [vit, deit])
def test_a_rule_over_positions_enters_a_vision_model_too(make):
    backbone = adapt(make(), "patch")
    x = torch.randn(2, 9, 16, generator=generator())
    own = AttentionMask.segments(torch.tensor([[0] * 4 + [1] * 5]))
    together = backbone.encode(x, attention=own)
    assert torch.allclose(together[:, :4], backbone.encode(x[:, :4]), atol=1e-5)
    assert torch.allclose(together[:, 4:], backbone.encode(x[:, 4:]), atol=1e-5)


def test_without_a_rule_a_model_that_had_one_is_as_before_and_saves_as_before(tmp_path):
    model = vit()
    backbone = adapt(model, "patch")
    x = torch.randn(2, 9, 16, generator=generator())
    before = backbone.encode(x)
    pixels = torch.randn(1, 3, 16, 16, generator=generator())
    whole = model(pixels).last_hidden_state
    assert not torch.allclose(backbone.encode(x, attention=ScoreRule(positive)), before, atol=1e-3)
    assert torch.equal(backbone.encode(x), before)
    assert torch.equal(model(pixels).last_hidden_state, whole)
    everything = copy.deepcopy(backbone).encode(x, attention=ScoreRule(torch.isfinite))
    assert torch.allclose(everything, before, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert "maskwright" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_a_backbone_says_whether_it_takes_rules():
    assert takes_attention(adapt(vit(), "patch"))
    assert not takes_attention(PlainViT())
