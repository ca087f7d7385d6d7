"""Generation with a state of constant size."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from maskwright import SampleRequest, Samples, setting
from maskwright.errors import BackboneMismatch
from maskwright.toolkit.categorical import categorical
from maskwright.toolkit.denoising import Asked, without_mask


@attrs.frozen
class S4Recurrent:
    """Tokens from left to right, one step of a recurrent model for each: the past is its state, not its tokens.

    It works on any denoiser that has `prefill(tokens [B, P]) -> (logits [B, V], state)` and `step(tokens [B], state)` beside its call
    (see `maskwright.backbones.TokenBackbone`). One without is called on all tokens for each new one, or refused with
    `mode="recurrent"`.
    """

    kind: ClassVar[str] = "sampler"
    name: ClassVar[str] = "s4-recurrent"
    modalities: ClassVar[frozenset[str]] = frozenset({"text"})
    domain: ClassVar[str] = "autoregressive"
    left_to_right: ClassVar[bool] = True

    mode: str = setting(
        "auto", "auto uses a state where the model has one", choices=("auto", "recurrent", "full")
    )
    temperature: float = setting(1.0, "divides the logits; 0 takes the most likely token", ge=0)

    def sample(self, denoiser: Callable[..., Tensor], request: SampleRequest) -> Samples:
        """One prefill of what all rows begin with and one step a place, or a full call a place; `request.steps` changes nothing.

        Raises `BackboneMismatch` when a state is demanded and the denoiser has none.
        """
        asked = Asked(denoiser, request)
        able = hasattr(denoiser, "prefill") and hasattr(denoiser, "step") and not request.time_conditioned
        if self.mode == "recurrent" and not able:
            raise BackboneMismatch(
                f"s4-recurrent with mode='recurrent' needs a denoiser with `prefill` and `step` that is not conditioned on time, "
                f"and {type(denoiser).__name__} is none; use an S4LanguageModel, or mode='auto' for full calls."
            )
        recurrent = able and self.mode != "full"
        tokens = request.tokens.clone()
        wanted = tokens == request.mask_token
        order = torch.full_like(tokens, -1)
        places = wanted.any(0).nonzero().squeeze(1).tolist()
        if not places:
            return Samples(tokens, 0, order)
        first, last, calls = places[0], places[-1], 0
        if recurrent:
            with torch.no_grad():
                logits, state = denoiser.prefill(tokens[:, :first])  # type: ignore[attr-defined]
            calls = 1
        for place in range(first, last + 1):
            here = wanted[:, place]
            if bool(here.any()):
                if not recurrent:
                    share = (wanted & (order < 0)).double().mean(1)
                    logits = asked(tokens, share)[:, place]
                drawn = self._choose(without_mask(logits, request.mask_token), request.generator)
                tokens[:, place] = torch.where(here, drawn, tokens[:, place])
                order[:, place] = torch.where(here, place - first, -1)
            if recurrent and place < last:
                with torch.no_grad():
                    logits, state = denoiser.step(tokens[:, place], state)  # type: ignore[attr-defined]
                calls += 1
        return Samples(tokens, calls or asked.calls, order, {"recurrent_steps": max(calls - 1, 0)})

    def _choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        if not self.temperature:
            return logits.argmax(-1)
        # For every row, so that a row's numbers do not depend on how long the others' prompts are.
        return categorical(logits / self.temperature, generator)


COMPONENTS = (S4Recurrent,)
