"""What every sampler of tokens does with a denoiser: ask it, and read its answer as probabilities over real tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskwright.errors import BackboneMismatch, BadData, BadParameter
from maskwright.protocols import SampleRequest


class Asked:
    """A denoiser and how often it was called. `asked(tokens, time)` gives logits [B, L, V]."""

    def __init__(self, denoiser: Callable[..., Tensor], request: SampleRequest) -> None:
        if request.tokens.ndim != 2:
            raise BadData(f"A request's tokens must be [B, L], not {list(request.tokens.shape)}.")
        if request.steps is not None and request.steps < 1:
            raise BadParameter(f"steps={request.steps} must be at least 1.")
        self.denoiser = denoiser
        self.timed = request.time_conditioned
        self.calls = 0

    @torch.no_grad()
    def __call__(self, tokens: Tensor, time: Tensor) -> Tensor:
        """`time` [B] is given only to a denoiser that wants one."""
        self.calls += 1
        # A copy: the sampler goes on writing into `tokens`.
        given = {"time": time.float()} if self.timed else {}
        logits = self.denoiser(tokens.clone(), **given)
        if logits.shape[:-1] != tokens.shape:
            raise BackboneMismatch(
                f"A denoiser of tokens {list(tokens.shape)} must return logits [B, L, V], not {list(logits.shape)}."
            )
        return logits


def without_mask(logits: Tensor, mask_token: int) -> Tensor:
    """Logits [..., V] in float64 with -inf for the mask token, which is never to be sampled.

    A `mask_token` of V or more has no logit: then nothing is taken out.
    """
    logits = logits.double()
    if mask_token >= logits.shape[-1]:
        return logits
    return logits.index_fill(-1, torch.tensor([mask_token], device=logits.device), -torch.inf)


def log_probabilities(logits: Tensor, mask_token: int) -> Tensor:
    """Logits [..., V] → log-probabilities over the real tokens, float64."""
    return without_mask(logits, mask_token).log_softmax(-1)
