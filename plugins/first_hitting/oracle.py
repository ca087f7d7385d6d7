"""A Markov chain whose law is known and whose exact posterior is the denoiser: what samplers are measured against."""

from __future__ import annotations

from functools import cached_property

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False, slots=False)
class MarkovChain:
    """S states, sequences of `length`; state S is the mask token. Everything is enumerated: keep (S + 1)^length small."""

    start: Tensor
    transition: Tensor
    length: int

    @classmethod
    def random(cls, seed: int, *, states: int = 3, length: int = 4) -> MarkovChain:
        """Each state goes on mostly to one other, so that neighbours tell much about each other. Float64."""
        generator = torch.Generator().manual_seed(seed)
        start = torch.rand(states, generator=generator, dtype=torch.float64) + 0.3
        transition = torch.rand(states, states, generator=generator, dtype=torch.float64) + 0.2
        transition += 2 * torch.eye(states, dtype=torch.float64)[torch.randperm(states, generator=generator)]
        return cls(start / start.sum(), transition / transition.sum(1, keepdim=True), length)

    @property
    def mask_token(self) -> int:
        """S."""
        return len(self.start)

    @cached_property
    def sequences(self) -> Tensor:
        """Every sequence, int64 [S^L, L]: the digits of its number in base S."""
        return _digits(len(self.start), self.length)

    @cached_property
    def law(self) -> Tensor:
        """The probability of each of `sequences`."""
        steps = self.transition[self.sequences[:, :-1], self.sequences[:, 1:]]
        return self.start[self.sequences[:, 0]] * steps.prod(1)

    @cached_property
    def partial(self) -> Tensor:
        """Every sequence with or without masks, int64 [(S + 1)^L, L]."""
        return _digits(self.mask_token + 1, self.length)

    @cached_property
    def _posteriors(self) -> Tensor:
        """log p(x_l | what is visible) for each of `partial`: [(S + 1)^L, L, S + 1]; the mask's entry is no number to use."""
        fits = (self.partial[:, None] == self.sequences) | (self.partial[:, None] == self.mask_token)
        weight = fits.all(-1) * self.law
        classes = torch.nn.functional.one_hot(self.sequences, self.mask_token).double()
        posterior = torch.einsum("pn,nls->pls", weight / weight.sum(1, keepdim=True), classes)
        return torch.nn.functional.pad(posterior.log(), (0, 1), value=3.0)

    def denoiser(self, tokens: Tensor) -> Tensor:
        """int64 [B, L] → logits [B, L, S + 1]: the posterior, and a mask logit that a sampler has to ignore."""
        return self._posteriors[_number(tokens, self.mask_token + 1)]

    def number(self, tokens: Tensor) -> Tensor:
        """Which of `sequences` each row is, int64 [B]."""
        return _number(tokens, len(self.start))

    def blank(self, batch: int) -> Tensor:
        """Nothing but masks, int64 [batch, L]."""
        return torch.full((batch, self.length), self.mask_token)

    def ancestral_law(self, steps: int) -> Tensor:
        """The exact law of ancestral sampling with so many equal steps of the linear schedule down to t = 0: [S^L]."""
        masked = self.partial == self.mask_token
        mu = self._posteriors[..., :-1].exp()
        now = torch.zeros(len(self.partial), dtype=torch.float64)
        now[-1] = 1.0
        for step in range(steps):
            reveal = 1 / (steps - step)
            # Each masked token of a state independently stays or becomes one of the S classes.
            choices = torch.cat([mu * reveal, torch.full_like(mu[..., :1], 1 - reveal)], dim=-1)
            kept = torch.nn.functional.one_hot(self.partial, self.mask_token + 1).double()
            choices = torch.where(masked[..., None], choices, kept)
            index = self.partial.T[None].expand(len(choices), -1, -1)
            now = now @ choices.gather(2, index).prod(1)
        return now[(~masked).all(1)]


def _digits(base: int, length: int) -> Tensor:
    number = torch.arange(base**length)
    return torch.stack([number // base**place % base for place in reversed(range(length))], dim=1)


def _number(tokens: Tensor, base: int) -> Tensor:
    places = base ** torch.arange(tokens.shape[1] - 1, -1, -1)
    return (tokens * places).sum(1)
