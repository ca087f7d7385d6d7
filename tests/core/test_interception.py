"""Attention reached from outside: what is seen, what may be changed, and that nothing stays behind."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from maskwright.backbones.defaults import vision_transformer
from maskwright.errors import BackboneMismatch
from maskwright.toolkit.decoders import transformer
from maskwright.toolkit.interception import intercepted

WIDTH, HEADS = 16, 2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(length=5, seed=1):
    return torch.randn(3, length, WIDTH, generator=generator(seed))


@pytest.fixture
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformer(WIDTH, 3, HEADS)


def plain(call):
    return call.attend()


def gradients(module, x, visit=None):
    module.zero_grad()
    if visit is None:
        out = module(x)
    else:
        with intercepted(module, visit):
            out = module(x)
    out.square().sum().backward()
    return out.detach(), [one.grad.clone() for one in module.parameters()]


def test_an_attention_that_is_left_as_it_is_changes_no_bit_of_outputs_and_gradients(network):
    out, grads = gradients(network, tokens())
    seen, again = gradients(network, tokens(), plain)
    assert torch.equal(out, seen)
    assert all(torch.equal(one, other) for one, other in zip(grads, again))


def test_explicit_weights_give_what_the_fused_kernel_gives(network):
    out, grads = gradients(network, tokens())
    seen, again = gradients(network, tokens(), lambda call: call.weigh(call.logits().softmax(-1)))
    torch.testing.assert_close(seen, out)
    for one, other in zip(grads, again):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_every_layer_of_torchs_encoder_is_seen_whatever_fast_path_it_has(network, mode):
    network.train(mode == "train")
    calls = []
    with torch.set_grad_enabled(mode != "no_grad"):
        with intercepted(network, lambda call: calls.append(call) or call.attend()):
            network(tokens())
    assert [(one.block, one.ordinal) for one in calls] == [("layers.0", 0), ("layers.1", 0), ("layers.2", 0)]
    assert torch.equal(calls[0].tokens, tokens())
    assert calls[0].query.shape == calls[0].key.shape == (3, HEADS, 5, WIDTH // HEADS)
    assert not torch.equal(calls[0].tokens, calls[1].tokens)


@pytest.mark.parametrize("implementation", ["sdpa", "maskwright"])
def test_a_model_of_transformers_is_seen(implementation):
    from maskwright.backbones.transformers import register_attention

    register_attention()
    vit = vision_transformer(image_size=8, patch_size=4, width=WIDTH, depth=2, heads=HEADS)
    vit.set_attn_implementation(implementation)
    pixels, calls = torch.randn(2, 3, 8, 8, generator=generator()), []
    before = vit(pixels).last_hidden_state
    with intercepted(vit, lambda call: calls.append(call) or call.attend()):
        after = vit(pixels).last_hidden_state
    assert [one.block.rpartition(".")[2] for one in calls] == ["0", "1"]
    assert torch.equal(before, after)


def test_second_passes_and_cross_attention_have_ordinals_of_their_own():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, 0.0, batch_first=True)
    module, calls = nn.ModuleList([layer]), []
    with intercepted(module, lambda call: calls.append(call) or call.attend()):
        for _ in range(2):
            module[0](tokens(4), tokens(7))
    assert [(one.block, one.ordinal, one.key.shape[2]) for one in calls] == [
        ("0", 0, 4),
        ("0", 1, 7),
        ("0", 2, 4),
        ("0", 3, 7),
    ]


def naive(query, key, value, scale, allowed=None, bias=None):
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
    logits = logits if bias is None else logits + bias
    logits = logits if allowed is None else logits.masked_fill(~allowed, -math.inf)
    return torch.einsum("bhqk,bhke->bhqe", logits.softmax(-1), value)


@pytest.mark.parametrize("form", ["none", "bool", "additive", "causal", "grouped"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_biases_and_explicit_weights_respect_the_modules_own_mask(form, scale):
    shape = (2, 4, 6, 8)
    query, key, value = (torch.randn(shape, generator=generator(seed)) for seed in range(3))
    allowed = (torch.rand(2, 1, 6, 6, generator=generator(3)) < 0.6) | torch.eye(6, dtype=torch.bool)
    given, heads = {}, 4
    if form == "bool":
        given["attn_mask"] = allowed
    elif form == "additive":
        given["attn_mask"] = torch.zeros(2, 1, 6, 6).masked_fill(~allowed, -math.inf)
    elif form == "causal":
        given["is_causal"], allowed = True, torch.ones(6, 6, dtype=torch.bool).tril()
    else:
        allowed = None
        if form == "grouped":
            given["enable_gqa"], heads = True, 2
    key, value = key[:, :heads], value[:, :heads]
    bias = torch.randn(2, 1, 6, 6, generator=generator(4))
    module, found = nn.Identity(), []

    def visit(call):
        found.extend([call.attend(bias), call.weigh((call.logits() + bias).softmax(-1)), call.logits()])
        return call.attend()

    with intercepted(module, visit):
        out = F.scaled_dot_product_attention(query, key, value, scale=scale, **given)
    key, value = (one.repeat_interleave(4 // heads, dim=1) for one in (key, value))
    used = 8**-0.5 if scale is None else scale
    torch.testing.assert_close(out, naive(query, key, value, used, allowed))
    torch.testing.assert_close(found[0], naive(query, key, value, used, allowed, bias))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("shape", [(5, 5), (3 * HEADS, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_the_masks_of_multi_head_attention_keep_their_meaning(shape, dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    hidden = (torch.rand(shape, generator=generator()) < 0.4) & ~torch.eye(5, dtype=torch.bool)
    mask = hidden if dtype == torch.bool else torch.zeros(shape).masked_fill(hidden, -math.inf)
    x, memory, calls = tokens(), tokens(seed=2), []

    def visit(call):
        calls.append(call)
        return call.weigh(call.logits().softmax(-1))

    for key in (x, memory):
        expected, _ = attention(x, key, key, attn_mask=mask, need_weights=False)
        with intercepted(attention, visit):
            found, _ = attention(x, key, key, attn_mask=mask, need_weights=False)
        torch.testing.assert_close(found, expected)
    assert len(calls) == 2


def test_attention_that_is_asked_for_its_weights_is_left_alone():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    x, calls = tokens(), []
    with intercepted(attention, lambda call: calls.append(call) or call.attend()):
        _, weights = attention(x, x, x)
    assert weights.shape == (3, 5, 5)
    assert calls == []


def test_what_a_visit_returns_is_what_the_module_goes_on_with(network):
    with intercepted(network, lambda call: torch.zeros_like(call.query)):
        silent = network(tokens())
    assert not torch.allclose(silent, network(tokens()))
    alone = torch.cat([network(tokens()[:, i : i + 1]) for i in range(5)], dim=1)
    with intercepted(network, lambda call: call.weigh(torch.eye(5).expand(3, HEADS, 5, 5))):
        itself = network(tokens())
    torch.testing.assert_close(itself, alone)


def test_nothing_stays_behind_after_an_error(network):
    def fail(call):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), intercepted(network, fail):
        network(tokens())
    hooks = [one for part in network.modules() for one in (part._forward_hooks, part._forward_pre_hooks)]
    assert not any(hooks)
    calls = []
    with intercepted(network, lambda call: calls.append(call.block) or call.attend()):
        network(tokens())
    assert calls == ["layers.0", "layers.1", "layers.2"]


def test_dropout_is_the_modules_own(network):
    x = tokens()
    for layer in network.layers:
        layer.self_attn.dropout = 0.5
    seen = []
    for train in (True, False):
        network.train(train)
        with intercepted(network, lambda call: seen.append(call.dropout) or call.attend()):
            network(x)
    assert seen == [0.5] * 3 + [0.0] * 3
    network.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = network(x)
        torch.manual_seed(3)
        with intercepted(network, plain):
            assert torch.equal(network(x), expected)


def test_gradient_checkpointing_is_refused_in_training_only():
    vit = vision_transformer(image_size=8, patch_size=4, width=WIDTH, depth=2, heads=HEADS)
    vit.gradient_checkpointing_enable()
    pixels, calls = torch.randn(2, 3, 8, 8, generator=generator()), []
    with pytest.raises(BackboneMismatch, match="gradient_checkpointing_disable"):
        with intercepted(vit.train(), plain):
            vit(pixels)
    with intercepted(vit.eval(), lambda call: calls.append(call) or call.attend()):
        vit(pixels)
    assert len(calls) == 2
