"""Samplers of masked diffusion: event by event, and step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from maskwright import SampleRequest, Samples, setting
from maskwright.toolkit.categorical import BITS, categorical, gumbel_argmax, uniforms
from maskwright.toolkit.denoising import Asked, log_probabilities, without_mask
from maskwright.toolkit.schedules import SCHEDULES, Schedule, groups


def hitting_times(counts: Tensor, u: Tensor, schedule: Schedule) -> Tensor:
    """When tokens are revealed, the first event first: counts int64 [B], u [B, E] in (0, 1) → float64 [B, E].

    With n tokens left at time t the next event is at t' with 1 - α(t') = u^(1/n) (1 - α(t)); it begins at t = 1 with n =
    counts. After its last event a row stays where it is.
    """
    left = counts[:, None] - torch.arange(u.shape[1], device=u.device)
    factor = torch.where(left > 0, u ** (1 / left.clamp(min=1)), 1.0)
    return schedule.time(factor.cumprod(1))


@attrs.frozen
class FirstHitting:
    """One masked token at a time, at a uniformly chosen place, at the time of the next event.

    Zheng et al., arXiv:2409.02908, section 4. As many network calls as tokens are wanted, or `request.steps` where that is
    fewer: then each call serves ⌊n/steps⌋ or ⌈n/steps⌉ consecutive events, drawn independently of one another.
    """

    kind: ClassVar[str] = "sampler"
    name: ClassVar[str] = "first-hitting"
    modalities: ClassVar[frozenset[str]] = frozenset({"text"})
    domain: ClassVar[str] = "discrete"

    schedule: str = setting(
        "linear", "of the times that a time-conditioned denoiser is given", choices=SCHEDULES
    )
    bits: int = setting(
        BITS, "random bits of the uniforms that draw tokens; fewer show what rounding does", ge=2, le=BITS
    )

    def sample(self, denoiser: Callable[..., Tensor], request: SampleRequest) -> Samples:
        """A time-conditioned denoiser is given the hitting time of the (first) event that it is asked for."""
        asked, generator = Asked(denoiser, request), request.generator
        tokens = request.tokens.clone()
        device = tokens.device
        masked = tokens == request.mask_token
        counts = masked.sum(1)
        sizes = groups(counts, request.steps)

        # A uniform order over the masked places is a uniform place at each event.
        place = uniforms(tuple(tokens.shape), generator).to(device).masked_fill(~masked, 2.0).argsort(1)
        events = int(counts.max())
        u = uniforms((len(tokens), max(events, 1)), generator).to(device)
        times = hitting_times(counts, u, SCHEDULES[self.schedule])

        order = torch.full_like(tokens, -1)
        begin = torch.zeros_like(counts)
        for size in sizes.unbind(1):
            time = times.gather(1, begin[:, None].clamp(max=times.shape[1] - 1)).squeeze(1)
            logits = asked(tokens, time)
            row, slot = (torch.arange(int(size.max()), device=device) < size[:, None]).nonzero(as_tuple=True)
            event = begin[row] + slot
            where = place[row, event]
            mu = without_mask(logits[row, where], request.mask_token)
            tokens[row, where] = categorical(mu, generator, bits=self.bits)
            order[row, where] = event
            begin = begin + size
        return Samples(tokens, asked.calls, order, {"categorical_draws": int(counts.sum())})


@attrs.frozen
class Ancestral:
    """Many small steps of time, in each of which every masked token may be revealed: the sampler of MDLM.

    Sahoo et al., arXiv:2406.07524. `request.steps` replaces `steps`. As in MDLM's `ddpm_cache`, the network is not asked again
    where the last step changed nothing (never with a time-conditioned denoiser), and what is still masked at the end takes its
    most likely token. Tokens are drawn at masked places only; MDLM draws them at every place and then discards the others.
    """

    kind: ClassVar[str] = "sampler"
    name: ClassVar[str] = "ancestral"
    modalities: ClassVar[frozenset[str]] = frozenset({"text"})
    domain: ClassVar[str] = "discrete"

    steps: int = setting(128, "steps of time", ge=1)
    schedule: str = setting("linear", "which share is masked at which time", choices=SCHEDULES)
    cache: bool = setting(True, "ask the network only where something changed")
    end: float = setting(1e-5, "time of the last step", ge=0, lt=1)
    bits: int = setting(
        BITS, "random bits of the uniforms that draw tokens; fewer show what rounding does", ge=2, le=BITS
    )

    def sample(self, denoiser: Callable[..., Tensor], request: SampleRequest) -> Samples:
        """`order` has the number of the step at which each token was revealed; what was left at the end has the last + 1."""
        asked, generator = Asked(denoiser, request), request.generator
        tokens = request.tokens.clone()
        steps = request.steps or self.steps
        times = torch.linspace(1, self.end, steps + 1, dtype=torch.float64, device=tokens.device)
        share = SCHEDULES[self.schedule].hidden(times)
        order = torch.full_like(tokens, -1)
        draws = 0
        reuse = self.cache and not request.time_conditioned
        mu: Tensor | None = None

        def predicted(step: int) -> Tensor:
            logits = asked(tokens, times[step].expand(len(tokens)))
            return log_probabilities(logits[masked], request.mask_token)

        masked = (tokens == request.mask_token).nonzero(as_tuple=True)
        for step in range(steps):
            if not len(masked[0]):
                break
            mu = predicted(step) if mu is None else mu
            # Unnormalised: each class with μ (c_t - c_s), staying masked with c_s, where c = 1 - α.
            reveal = mu + (share[step] - share[step + 1]).log()
            stay = share[step + 1].log().expand(len(mu), 1)
            # Uniforms for every place, so that a row's numbers do not depend on how much of the others is masked.
            u = uniforms((*tokens.shape, mu.shape[1] + 1), generator, bits=self.bits).to(tokens.device)
            drawn = gumbel_argmax(torch.cat([reveal, stay], dim=1), u[masked])
            draws += len(drawn)
            revealed = drawn < mu.shape[1]
            if bool(revealed.any()):
                now = tuple(index[revealed] for index in masked)
                tokens[now], order[now] = drawn[revealed], step
                masked = tuple(index[~revealed] for index in masked)
                mu = None
            elif not reuse:
                mu = None
        if len(masked[0]):
            mu = predicted(steps) if mu is None else mu
            tokens[masked], order[masked] = mu.argmax(1), steps
        return Samples(tokens, asked.calls, order, {"categorical_draws": draws})


COMPONENTS = (FirstHitting, Ancestral)
