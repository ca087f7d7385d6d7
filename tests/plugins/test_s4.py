"""S4: the HiPPO matrix and its diagonal-plus-low-rank form, the kernel, both modes, the objective and the sampler."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import legendre

import maskwright
from maskwright import AttentionMask, Layout, Mask, MaskedTraining, SampleRequest, adapt
from maskwright.backbones import TokenBackbone
from maskwright.backbones.defaults import causal_language_model, masked_language_model
from maskwright.backbones.transformers import denoiser
from maskwright.errors import BackboneMismatch, BadParameter
from maskwright.plugins.s4 import ssm
from maskwright.plugins.s4.backbone import S4LanguageModel, S4Layer, parameter_groups
from maskwright.plugins.s4.objective import S4Sequence, predicted_places
from maskwright.plugins.s4.sampler import S4Recurrent
from maskwright.testing import conformance

VOCABULARY = 20


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(width=3, state=8, length=16, dtype=torch.float64, seed=0, **settings):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return S4Layer(width, state, length=length, generator=seeded(seed), **settings)
    finally:
        torch.set_default_dtype(before)


def moved(one, by=0.3, seed=1):
    """A layer whose every parameter is no longer what it began as."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(
                parameter
            )
    return one


def language_model(**other):
    sizes = {"length": 12, "width": 8, "depth": 2, "state": 8, **other}
    return S4LanguageModel(VOCABULARY, **sizes).eval()


def llama(**other):
    return causal_language_model(
        vocabulary=VOCABULARY, length=64, width=16, depth=2, heads=2, seed=0, **other
    )


def tokens_of(rows, length, seed=0):
    return torch.randint(0, VOCABULARY, (rows, length), generator=seeded(seed))


def checks(*components):
    return [
        pytest.param(check, id=f"{component.name}-{number}-{name}")
        for number, component in enumerate(components)
        for name, check in conformance(component)
    ]


@pytest.mark.parametrize("check", checks(S4Sequence, S4Recurrent, S4Recurrent(temperature=0.0)))
def test_conforms(check):
    check()


# -- naive references ------------------------------------------------------------------------------------------


def naive_discretisation(A, B, dt):
    """Ā and B̄ by inverting, full matrices."""
    half = A * dt / 2
    identity = torch.eye(len(A), dtype=A.dtype)
    inverse = torch.linalg.inv(identity - half)
    return inverse @ (identity + half), inverse @ (B * dt)


def naive_kernel(A_bar, B_bar, C, length):
    """C Āʲ B̄, one power after the other."""
    x, terms = B_bar, []
    for _ in range(length):
        terms.append((C * x).sum())
        x = A_bar @ x
    return torch.stack(terms)


def naive_kernels(one, length):
    """The kernels of a layer from its full matrices, [H, L], in double."""
    Lambda, P, B, C_tilde, dt = (part.detach() for part in one.double().system())
    found = []
    for h in range(len(dt)):
        full = [ssm.whole(part[h]) for part in (Lambda, P, B, C_tilde)]
        A = torch.diag(full[0]) - torch.outer(full[1], full[1].conj())
        A_bar, B_bar = naive_discretisation(A, full[2], dt[h])
        left = torch.eye(len(A), dtype=A.dtype) - torch.linalg.matrix_power(A_bar, one.length)
        C = torch.linalg.solve(left.T, full[3])
        found.append(naive_kernel(A_bar, B_bar, C, length).real)
    return torch.stack(found)


def stepped(one, u, state=None):
    """Outputs [B, L, H] and last state, one step after the other."""
    recurrence = one.recurrence()
    x = torch.zeros(len(u), *recurrence.E.shape, dtype=recurrence.E.dtype) if state is None else state
    outputs = []
    for place in range(u.shape[1]):
        y, x = recurrence.step(u[:, place], x)
        outputs.append(y)
    return torch.stack(outputs, 1), x


# -- HiPPO ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_legs_is_what_its_formula_says(n):
    A, B = ssm.legs(n)
    for i in range(n):
        assert B[i] == pytest.approx((2 * i + 1) ** 0.5, abs=1e-15)
        for k in range(n):
            want = -((2 * i + 1) ** 0.5) * (2 * k + 1) ** 0.5 if i > k else -(i + 1) if i == k else 0.0
            assert A[i, k] == pytest.approx(want, abs=1e-14)


@pytest.mark.parametrize("power", range(5))
def test_legs_moves_the_legendre_coefficients_of_the_history(power):
    """d/dt c = (A c + B u(t)) / t, where c are the coefficients of u on [0, t] in normalised Legendre polynomials."""
    n, t = 6, 1.7
    points, weights = legendre.leggauss(24)

    def coefficients(end):
        past = (points + 1) / 2 * end  # u(s) = s^power on [0, end]
        basis = np.stack([(2 * i + 1) ** 0.5 * legendre.Legendre.basis(i)(points) for i in range(n)])
        return torch.from_numpy(basis @ (weights / 2 * past**power))

    h = 1e-4
    slope = (coefficients(t + h) - coefficients(t - h)) / (2 * h)
    A, B = ssm.legs(n)
    assert slope == pytest.approx((A @ coefficients(t) + B * t**power) / t, abs=1e-6)


def test_the_numbers_of_legs_with_two_states():
    A, B = ssm.legs(2)
    P = ssm.legs_low_rank(2)
    assert A.flatten().tolist() == pytest.approx([-1, 0, -1.7320508, -2], abs=1e-7)
    assert B.tolist() == pytest.approx([1, 1.7320508], abs=1e-7)
    assert P.tolist() == pytest.approx([0.7071068, 1.2247449], abs=1e-7)
    skew = (A + torch.outer(P, P)).flatten().tolist()
    assert skew == pytest.approx([-0.5, 0.8660254, -0.8660254, -0.5], abs=1e-7)

    Lambda, P_hat, B_hat, V = ssm.nplr(2)
    assert Lambda[0].item() == pytest.approx(-0.5 - 0.8660254j, abs=1e-7)
    dt, ones = torch.tensor([0.1], dtype=torch.float64), torch.ones(2, dtype=torch.complex128)
    C = (V.T @ ones)[None]  # y = C x = (C V) x̂
    system = ssm.bilinear(Lambda[None], P_hat[None], B_hat[None], C, dt, torch.zeros(1))
    full = torch.cat([V, V.conj()], 1)
    A_bar = (full @ system.transition()[0] @ full.mH).real
    assert A_bar.flatten().tolist() == pytest.approx([0.9047619, 0, -0.1499611, 0.8181818], abs=1e-7)
    B_bar = (full @ ssm.whole(system.B)[0]).real
    assert B_bar.tolist() == pytest.approx([0.0952381, 0.1499611], abs=1e-7)

    truncated = ssm.truncated(C, system.transition(), 4)
    C_tilde = (full.conj() @ ssm.whole(truncated)[0]).real
    assert C_tilde.tolist() == pytest.approx([0.7143691, 0.5518749], abs=1e-7)
    K = ssm.cauchy_kernel(Lambda[None], P_hat[None], B_hat[None], truncated, dt, 4)[0]
    assert K.tolist() == pytest.approx([0.2451992, 0.1945812, 0.1537414, 0.1208472], abs=1e-7)
    # At the Nyquist frequency only Δ/2 C̃ B is left.
    nyquist = float((K * torch.tensor([1, -1, 1, -1])).sum())
    assert nyquist == pytest.approx(0.0835122, abs=1e-7)
    assert nyquist == pytest.approx(float(0.05 * C_tilde @ B), abs=1e-12)


def test_the_scalar_system():
    one = torch.ones(1, 1, dtype=torch.complex128)
    dt = torch.ones(1, dtype=torch.float64)
    # C = 1/2, because the conjugate counts as well.
    system = ssm.bilinear(-one, 0 * one, one, one / 2, dt, dt)
    assert system.E.real.item() == pytest.approx(1 / 3)
    assert system.B.real.item() == pytest.approx(2 / 3)
    C_tilde = ssm.truncated(one / 2, system.transition(), 3)
    K = ssm.cauchy_kernel(-one, 0 * one, one, C_tilde, dt, 3)[0]
    assert K.tolist() == pytest.approx([2 / 3, 2 / 9, 2 / 27], abs=1e-14)


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32, 64])
def test_the_low_rank_form_is_legs_without_a_clip(n):
    A, B = ssm.legs(n)
    Lambda, P, B_hat, V = ssm.nplr(n)
    full = torch.cat([V, V.conj()], 1)
    Lambda, P, B_hat = map(ssm.whole, (Lambda, P, B_hat))
    rebuilt = full @ (torch.diag(Lambda) - torch.outer(P, P.conj())) @ full.mH
    assert (rebuilt - A).abs().max() < 1e-12
    assert (full.mH @ full - torch.eye(n)).abs().max() < 1e-12
    assert (full @ B_hat - B).abs().max() < 1e-12
    assert (Lambda.real == -0.5).all()
    assert (Lambda[: n // 2].imag < 0).all()


def test_a_clipped_input_is_no_longer_legs():
    """Why the official clip of the imaginary part of V* B to ±2 is left out: at N = 64 it makes another system."""
    A, B = ssm.legs(64)
    P = ssm.legs_low_rank(64)
    V = torch.linalg.eigh(-1j * (A + torch.outer(P, P)))[1][:, :32]
    B_hat = V.mH @ B.to(V)
    clipped = torch.complex(B_hat.real, B_hat.imag.clamp(-2, 2))
    assert (2 * (V @ B_hat).real - B).abs().max() < 1e-12
    assert (2 * (V @ clipped).real - B).abs().max() > 1


@pytest.mark.parametrize("n", [0, 1, 5])
def test_a_state_without_pairs_is_refused(n):
    with pytest.raises(BadParameter, match="must be even"):
        ssm.nplr(n)


# -- the kernel ----------------------------------------------------------------------------------------------


def test_the_kernel_is_the_power_series_at_256_steps_in_double():
    one = moved(layer(width=3, state=64, length=256), by=0.1)
    assert (one.kernel(256) - naive_kernels(one, 256)).abs().max() < 1e-11


def test_the_kernel_is_the_power_series_at_4096_steps_in_single():
    one = layer(width=4, state=64, length=4096, dtype=torch.float32)
    kernel = one.kernel(4096)
    assert kernel.dtype == torch.float32
    assert (kernel - naive_kernels(one, 4096)).abs().max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 40), state=st.sampled_from([2, 4, 10]), seed=st.integers(0, 99))
def test_the_kernel_is_the_power_series_at_any_length(length, state, seed):
    one = moved(layer(state=state, length=length, seed=seed, dt_min=0.01), seed=seed)
    assert (one.kernel(length) - naive_kernels(one, length)).abs().max() < 1e-9


@pytest.mark.parametrize("asked", [1, 8, 15, 16, 17, 33, 100])
def test_kernels_of_other_lengths_begin_alike_and_change_no_parameter(asked):
    one = moved(layer(length=16))
    before = {name: value.clone() for name, value in one.state_dict().items()}
    assert (one.kernel(asked) - naive_kernels(one, asked)).abs().max() < 1e-11
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


def test_the_output_comes_back_from_its_truncation():
    one = moved(layer(length=16))
    system = one._exact()
    C = ssm.untruncated(system.C, system.transition(), 16)
    assert (ssm.truncated(C, system.transition(), 16) - system.C).abs().max() < 1e-12
    longer = ssm.lengthened(system.C, system.transition(), 16)
    assert (ssm.truncated(C, system.transition(), 32) - longer).abs().max() < 1e-12


@pytest.mark.parametrize("length", [1, 8, 31])
def test_a_new_layer_is_the_same_system_whatever_its_length(length):
    one, other = layer(length=length), layer(length=100)
    assert (one.kernel(20) - other.kernel(20)).abs().max() < 1e-10


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), log_dt=st.floats(-7, 5), by=st.floats(0, 2))
def test_every_system_is_stable(seed, log_dt, by):
    one = moved(layer(state=6, length=4), by=by, seed=seed)
    with torch.no_grad():
        one.log_dt.fill_(log_dt)
    assert torch.linalg.eigvals(one._exact().transition()).abs().max() < 1


def test_gradients_reach_every_parameter_and_are_those_of_the_power_series():
    one = moved(layer(width=2, state=4, length=9))
    weights = torch.randn(2, 9, generator=seeded(3), dtype=torch.float64)

    def series():
        Lambda, P, B, C, dt = one.system()
        system = ssm.bilinear(Lambda, P, B, C, dt, one.D)
        left = torch.eye(4) - torch.linalg.matrix_power(system.transition(), 9).mT
        C = torch.linalg.solve(left, ssm.whole(C)[..., None]).squeeze(-1)
        columns = ssm.krylov(system.transition(), ssm.whole(system.B), 9)
        return torch.einsum("hn,hnl->hl", C, columns).real

    parameters = [value for name, value in one.named_parameters() if name != "D"]
    fast = torch.autograd.grad((one.kernel(9) * weights).sum(), parameters)
    slow = torch.autograd.grad((series() * weights).sum(), parameters)
    for got, want in zip(fast, slow):
        assert want.abs().max() > 1e-6
        assert (got - want).abs().max() < 1e-9 * max(1, float(want.abs().max()))


# -- both modes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "length", "bound"), [(torch.float64, 200, 1e-12), (torch.float32, 1024, 1e-4)]
)
def test_the_convolution_is_the_recurrence(dtype, length, bound):
    one = layer(width=4, state=64, length=length, dtype=dtype)
    u = torch.randn(2, length, 4, generator=seeded(1), dtype=dtype)
    y, state = stepped(one, u)
    assert (one(u) - y).abs().max() < bound
    assert (one.final_state(u) - state).abs().max() < bound


@pytest.mark.parametrize("cut", [1, 13, 16, 39])
def test_two_chunks_are_one(cut):
    one = moved(layer(length=16))
    u = torch.randn(2, 40, 3, generator=seeded(1), dtype=torch.float64)
    state = one.final_state(u[:, :cut])
    assert (one(u[:, cut:], state) - one(u)[:, cut:]).abs().max() < 1e-12
    assert (one.final_state(u[:, cut:], state) - one.final_state(u)).abs().max() < 1e-12
    y, last = stepped(one, u[:, cut:], state)
    assert (one(u)[:, cut:] - y).abs().max() < 1e-12
    assert (one.final_state(u) - last).abs().max() < 1e-12


def test_a_state_takes_in_long_inputs_in_chunks():
    one = layer(width=2, state=4, length=16)
    u = torch.randn(1, 700, 2, generator=seeded(1), dtype=torch.float64)
    assert (one.final_state(u) - stepped(one, u)[1]).abs().max() < 1e-12


def test_an_impulse_gives_the_kernel_and_nothing_comes_before_its_cause():
    one = moved(layer(length=32))
    u = torch.zeros(1, 32, 3, dtype=torch.float64)
    u[:, 0] = 1
    want = one.kernel(32).clone()
    want[:, 0] += one.D
    assert (one(u)[0].T - want).abs().max() < 1e-12
    u = torch.randn(1, 32, 3, generator=seeded(1), dtype=torch.float64)
    other = u.clone()
    other[:, 20:] += 1
    assert (one(u) - one(other))[:, :20].abs().max() < 1e-12
    assert (one(u) - one(other))[:, 20].abs().min() > 1e-6


def test_the_state_of_generation_has_one_size():
    model = language_model()
    sizes = set()
    _, state = model.prefill(tokens_of(2, 5))
    for place in range(30):
        _, state = model.step(tokens_of(2, 1, place)[:, 0], state)
        sizes.add(tuple(state.x.shape))
    assert sizes == {(2, 2, 8, 4)}


# -- the language model --------------------------------------------------------------------------------------


def test_the_model_is_a_causal_token_backbone():
    model = language_model()
    assert isinstance(model, TokenBackbone)
    assert adapt(model, "token") is model
    tokens = tokens_of(2, 12)
    with torch.no_grad():
        assert model.logits(tokens).shape == (2, 12, VOCABULARY)
        assert (model.logits(model.embed(tokens)) - model.logits(tokens)).abs().max() == 0


@pytest.mark.parametrize("given_first", [0, 1, 7])
def test_steps_continue_a_prefill_as_the_convolution_goes_on(given_first):
    model = language_model().double()
    tokens = tokens_of(3, 30)
    with torch.no_grad():
        want = model.logits(tokens)
    logits, state = model.prefill(tokens[:, :given_first])
    for place in range(given_first, 30):
        if place:
            assert (logits - want[:, place - 1]).abs().max() < 1e-10
        logits, state = model.step(tokens[:, place], state)
    assert (logits - want[:, -1]).abs().max() < 1e-10


def test_the_same_seed_gives_the_same_model_and_moves_no_global_generator():
    before = torch.random.get_rng_state()
    one, two, other = language_model(seed=3), language_model(seed=3), language_model(seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = zip(one.state_dict().values(), two.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.blocks[0].layer.C, other.blocks[0].layer.C)
    assert not torch.equal(one.blocks[0].layer.C, one.blocks[1].layer.C)


def test_rules_of_attention_are_refused():
    model = language_model()
    with pytest.raises(BackboneMismatch, match="neither attention nor positions"):
        model.logits(tokens_of(1, 6), AttentionMask.causal(6))
    with pytest.raises(BackboneMismatch, match="neither attention nor positions"):
        model.logits(tokens_of(1, 6), positions=torch.arange(6)[None])


def test_the_systems_have_a_rate_of_their_own():
    model = language_model()
    rest, kernel, outputs = parameter_groups(model, lr=0.01, weight_decay=0.1)
    names = {id(value): name for name, value in model.named_parameters()}
    assert {names[id(one)].rpartition(".")[2] for one in kernel["params"]} == {
        "log_dt",
        "log_decay",
        "frequency",
        "B",
        "P",
    }
    assert (kernel["lr"], kernel["weight_decay"]) == (0.001, 0.0)
    assert (outputs["lr"], outputs["weight_decay"]) == (0.001, 0.1)
    assert (rest["lr"], rest["weight_decay"]) == (0.01, 0.1)
    count = sum(len(group["params"]) for group in (rest, kernel, outputs))
    assert count == len(list(model.parameters()))


def test_steps_of_time_are_spread_over_their_range():
    log_dt = layer(width=400, state=2, length=4, dt_min=0.01, dt_max=0.1).log_dt
    assert log_dt.exp().min() >= 0.01
    assert log_dt.exp().max() <= 0.1
    assert abs(log_dt.mean() - np.log(0.001**0.5)) < 0.1  # log-uniform
    with pytest.raises(BadParameter, match="dt_min"):
        layer(dt_min=0.2, dt_max=0.1)


# -- the objective -------------------------------------------------------------------------------------------


def test_what_is_predicted():
    keep = torch.tensor([[True, False, True, True]])
    assert predicted_places(keep, "visible").tolist() == [[False, False, True, True]]
    assert predicted_places(keep, "hidden").tolist() == [[False, True, False, False]]
    assert predicted_places(keep, "all").tolist() == [[False, True, True, True]]
    assert keep.tolist() == [[True, False, True, True]]


@pytest.mark.parametrize("make", [language_model, llama])
@pytest.mark.parametrize("predict", ["visible", "hidden", "all"])
def test_the_loss_is_the_mean_over_what_is_predicted(make, predict):
    tokens, keep = tokens_of(2, 12), torch.rand(2, 12, generator=seeded(5)) > 0.3
    bound = maskwright.create("objective", "s4-sequence", predict=predict).bind(make()).eval()
    loss = bound({"tokens": tokens}, Mask(keep))
    embedded = bound.backbone.embed(tokens) * keep[..., None]
    told = {"keep": keep} if make is language_model else {}
    logits = bound.backbone.logits(embedded, **told).log_softmax(-1)
    places = predicted_places(keep, predict).nonzero().tolist()
    each = [-logits[row, place - 1, tokens[row, place]] for row, place in places]
    assert abs(loss.total - torch.stack(each).mean()) < 1e-5


def test_hidden_tokens_are_places_without_input():
    model = language_model().double()
    tokens, keep = tokens_of(1, 12), torch.ones(1, 12, dtype=torch.bool)
    keep[:, 4:7] = False
    inputs = []
    for block in model.blocks:
        block.norm.bias.data += 1
        block.layer.register_forward_pre_hook(lambda layer, given: inputs.append(given[0]))
    other = torch.where(keep, tokens, (tokens + 1) % VOCABULARY)
    with torch.no_grad():
        shown = model.logits(tokens, keep=keep)
        assert all((u[:, 4:7] == 0).all() and (u[keep] != 0).any() for u in inputs)
        assert len(inputs) == 2
        assert torch.equal(shown, model.logits(other, keep=keep))
        assert not torch.equal(shown, model.logits(tokens))


def test_padding_after_a_text_changes_nothing():
    bound = maskwright.create("objective", "s4-sequence").bind(language_model().double())
    tokens, keep = tokens_of(1, 12), torch.arange(12)[None] < 8
    padded = bound({"tokens": tokens}, Mask(keep)).total
    alone = bound({"tokens": tokens[:, :8]}, Mask(keep[:, :8])).total
    assert abs(padded - alone) < 1e-12


def test_an_attention_rule_reaches_a_transformer_and_is_refused_by_s4():
    objective = maskwright.create("objective", "s4-sequence")
    tokens, rule = {"tokens": tokens_of(2, 12)}, AttentionMask.window(12, 1)
    bound = objective.bind(llama()).eval()
    assert bound(tokens, rule).total != bound(tokens, Mask(torch.ones(2, 12, dtype=torch.bool))).total
    with pytest.raises(BackboneMismatch, match="takes no attention rule"):
        objective.bind(language_model())(tokens, rule)


def test_a_masked_language_model_is_refused():
    bert = masked_language_model(vocabulary=VOCABULARY, length=12, mask_token=2, width=16, depth=1, heads=2)
    with pytest.raises(BackboneMismatch, match="causal"):
        S4Sequence().bind(bert)


@pytest.mark.parametrize("objective", ["s4-sequence", "next-token"])
@pytest.mark.parametrize("make", [language_model, llama])
def test_models_learn_under_either_objective(objective, make):
    strategy = maskwright.create("mask-strategy", "random", ratio=0.0)
    model = MaskedTraining(make(), strategy, maskwright.create("objective", objective))
    tokens = torch.arange(12).repeat(4, 1) % 6
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.02, weight_decay=0.0))
    losses = []
    for _ in range(25):
        loss = model(tokens=tokens)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_strategies_of_other_plugins_hide_tokens():
    strategy = maskwright.create("mask-strategy", "uniform-count")
    objective = maskwright.create("objective", "s4-sequence", predict="hidden")
    model = MaskedTraining(language_model(), strategy, objective)
    made = model(tokens=tokens_of(4, 12))
    made["loss"].backward()
    assert made["loss"] > 0
    assert Layout.of(model.backbone, {"tokens": tokens_of(4, 12)}).grid == (12,)


# -- the sampler ---------------------------------------------------------------------------------------------


def request(tokens, seed=0):
    return SampleRequest(tokens, VOCABULARY, seeded(seed))


def prompted(lengths, length=14):
    tokens = tokens_of(len(lengths), length)
    for row, given_first in enumerate(lengths):
        tokens[row, given_first:] = VOCABULARY
    return tokens


class Counted:
    """A denoiser whose full calls, prefills and steps are counted."""

    def __init__(self, model):
        predict = denoiser(model)
        self.calls = {"full": 0, "prefill": 0, "step": 0}

        def count(name, call):
            def counted(*given):
                self.calls[name] += 1
                return call(*given)

            return counted

        # No logit of the id that stands for a wanted token, which has no embedding either.
        self.full = count("full", lambda tokens: predict(tokens.clamp(max=VOCABULARY - 1)))
        self.prefill, self.step = count("prefill", predict.prefill), count("step", predict.step)

    def __call__(self, tokens):
        return self.full(tokens)


@pytest.mark.parametrize("lengths", [(1, 1), (4, 4), (2, 9, 5)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_and_full_calls_give_the_same_samples(lengths, temperature):
    model, tokens = language_model().double(), prompted(lengths)
    made, counted = {}, {}
    for mode in ("recurrent", "full"):
        counted[mode] = Counted(model)
        sampler = maskwright.create("sampler", "s4-recurrent", mode=mode, temperature=temperature)
        made[mode] = sampler.sample(counted[mode], request(tokens))
    assert torch.equal(made["recurrent"].values, made["full"].values)
    assert torch.equal(made["recurrent"].order, made["full"].order)
    wanted = 14 - min(lengths)
    assert counted["recurrent"].calls == {"full": 0, "prefill": 1, "step": wanted - 1}
    assert counted["full"].calls == {"full": wanted, "prefill": 0, "step": 0}
    assert made["recurrent"].evaluations == made["full"].evaluations == wanted
    assert made["recurrent"].facts["recurrent_steps"] == wanted - 1
    assert torch.equal(made["full"].values[tokens < VOCABULARY], tokens[tokens < VOCABULARY])


def test_another_sampler_draws_from_the_model_and_greedy_agrees():
    tokens, predict = prompted((1, 3)), Counted(language_model().double())
    greedy = maskwright.create("sampler", "greedy", order="left-to-right").sample(predict, request(tokens))
    mine = S4Recurrent(temperature=0.0, mode="recurrent").sample(predict, request(tokens))
    assert torch.equal(greedy.values, mine.values)


def test_a_model_without_a_state_is_called_in_full_or_refused():
    model = llama().eval()
    predict = denoiser(adapt(model, "token"))
    tokens = prompted((3, 3))

    def within(given_tokens):
        return predict(given_tokens.clamp(max=VOCABULARY - 1))

    made = S4Recurrent(temperature=0.0).sample(within, request(tokens))
    assert made.evaluations == 11
    assert made.facts["recurrent_steps"] == 0
    want = model.generate(
        tokens[:, :3], max_new_tokens=11, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(made.values, want)
    with pytest.raises(BackboneMismatch, match="`prefill` and `step`"):
        S4Recurrent(mode="recurrent").sample(within, request(tokens))


def test_samples_follow_the_model():
    """The first of many samples against the model's own probabilities."""
    from scipy.stats import chisquare

    model = language_model().double()
    tokens = prompted((3,), length=4).expand(4000, -1)
    drawn = S4Recurrent(mode="recurrent").sample(denoiser(model), request(tokens)).values[:, 3]
    with torch.no_grad():
        law = model.logits(tokens[:1, :3])[0, -1].softmax(-1)
    counts = drawn.bincount(minlength=VOCABULARY)
    assert chisquare(counts.numpy(), (law * 4000).numpy()).pvalue > 1e-3
