"""Greedy and nucleus sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from maskwright import SampleRequest, Samples, setting
from maskwright.toolkit.categorical import categorical
from maskwright.toolkit.denoising import Asked, log_probabilities, without_mask
from maskwright.toolkit.schedules import groups


def nucleus(log_weights: Tensor, p: float) -> Tensor:
    """Log-weights [..., V] with -inf outside of the nucleus: the fewest most likely classes that together have at least `p`.

    Holtzman et al., arXiv:1904.09751, section 3.1. The most likely class always stays; p = 1 leaves everything.
    """
    if p >= 1:
        return log_weights
    probability, order = log_weights.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probability.cumsum(-1) - probability
    outside = torch.zeros_like(log_weights, dtype=torch.bool).scatter_(-1, order, before >= p)
    outside.scatter_(-1, order[..., :1], False)
    return log_weights.masked_fill(outside, -torch.inf)


def masked_share(tokens: Tensor, mask_token: int) -> Tensor:
    """float64 [B]: the time that a time-conditioned denoiser is given, the share of its tokens that is masked."""
    return (tokens == mask_token).double().mean(1)


def left_to_right(
    asked: Asked, request: SampleRequest, choose: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Fill the first masked place of each row until none is left: (values, order), both int64 [B, L].

    `choose` takes float64 logits [M, V] without the mask token and returns int64 [M].
    """
    tokens = request.tokens.clone()
    order = torch.full_like(tokens, -1)
    masked = tokens == request.mask_token
    for event in range(int(masked.sum(1).max())):
        logits = asked(tokens, masked_share(tokens, request.mask_token))
        row = masked.any(1).nonzero().squeeze(1)
        place = masked[row].long().argmax(1)
        tokens[row, place] = choose(without_mask(logits[row, place], request.mask_token))
        order[row, place] = event
        masked[row, place] = False
    return tokens, order


@attrs.frozen
class Greedy:
    """The most likely token at each place, with no chance in it.

    With `order="confidence"`, for masked denoisers: each call fills the places whose token is most certain, one of them, or as
    many as fit `request.steps` calls (MaskGIT without its noise, Chang et al., arXiv:2202.04200). With
    `order="left-to-right"`, for causal models: the first masked place, one a call.
    """

    kind: ClassVar[str] = "sampler"
    name: ClassVar[str] = "greedy"
    modalities: ClassVar[frozenset[str]] = frozenset({"text"})
    domain: ClassVar[str] = "discrete"

    order: str = setting("confidence", "which place is filled first", choices=("confidence", "left-to-right"))

    @property
    def left_to_right(self) -> bool:
        """Whether only tokens to the left of a place decide it, when the denoiser is causal."""
        return self.order == "left-to-right"

    def sample(self, denoiser: Callable[..., Tensor], request: SampleRequest) -> Samples:
        """A time-conditioned denoiser is given the masked share as its time."""
        asked = Asked(denoiser, request)
        if self.left_to_right:
            tokens, order = left_to_right(asked, request, lambda logits: logits.argmax(-1))
        else:
            tokens, order = self._by_confidence(asked, request)
        return Samples(tokens, asked.calls, order)

    def _by_confidence(self, asked: Asked, request: SampleRequest) -> tuple[Tensor, Tensor]:
        tokens = request.tokens.clone()
        order = torch.full_like(tokens, -1)
        begin = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        for size in groups((tokens == request.mask_token).sum(1), request.steps).unbind(1):
            logits = asked(tokens, masked_share(tokens, request.mask_token))
            confidence, best = log_probabilities(logits, request.mask_token).max(-1)
            confidence = confidence.masked_fill(tokens != request.mask_token, -torch.inf)
            rank = confidence.argsort(dim=1, descending=True, stable=True)
            row, slot = (torch.arange(int(size.max()), device=tokens.device) < size[:, None]).nonzero(
                as_tuple=True
            )
            place = rank[row, slot]
            tokens[row, place] = best[row, place]
            order[row, place] = begin[row] + slot
            begin = begin + size
        return tokens, order


@attrs.frozen
class TopP:
    """Nucleus sampling from left to right: each token from the fewest most likely ones that together have probability p.

    Holtzman et al., arXiv:1904.09751. Draws are in float64. For a causal model, whose first token has to be given.
    """

    kind: ClassVar[str] = "sampler"
    name: ClassVar[str] = "top-p"
    modalities: ClassVar[frozenset[str]] = frozenset({"text"})
    domain: ClassVar[str] = "autoregressive"
    left_to_right: ClassVar[bool] = True

    p: float = setting(0.95, "probability that the nucleus has at least", gt=0, le=1)
    temperature: float = setting(1.0, "divides the logits, before the nucleus is taken", gt=0)

    def sample(self, denoiser: Callable[..., Tensor], request: SampleRequest) -> Samples:
        """One call and one draw for each wanted token of the longest row; `request.steps` changes nothing."""
        asked = Asked(denoiser, request)

        def choose(logits: Tensor) -> Tensor:
            return categorical(nucleus(logits / self.temperature, self.p), request.generator)

        tokens, order = left_to_right(asked, request, choose)
        draws = int((request.tokens == request.mask_token).sum())
        return Samples(tokens, asked.calls, order, {"categorical_draws": draws})


COMPONENTS = (Greedy, TopP)
