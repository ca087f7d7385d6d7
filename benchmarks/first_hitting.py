"""First-hitting against ancestral sampling at T = 1000 steps: network calls and wall time, on a small masked language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import interleaved, row
from maskwright import SampleRequest, Samples, adapt, create
from maskwright.backbones.defaults import masked_language_model
from maskwright.backbones.transformers import denoiser

NAME = "first-hitting against ancestral sampling (T = 1000), one text, BERT of 4 layers × 128, 1,024 tokens"
LENGTHS = (32, 64, 128)
STEPS, VOCABULARY, MASK = 1000, 1024, 2
ROUNDS = 2


def run() -> list[dict[str, Any]]:
    """Two rows a length: against MDLM's sampler without its cache, which calls at every step, and with it."""
    rows = []
    hitting = create("sampler", "first-hitting")
    peers = {
        "every step": create("sampler", "ancestral", steps=STEPS, cache=False),
        "cached": create("sampler", "ancestral", steps=STEPS),
    }
    for length in LENGTHS:
        model = masked_language_model(vocabulary=VOCABULARY, length=length, mask_token=MASK).eval()
        predict = denoiser(adapt(model, "token"))
        made: dict[str, Samples] = {}

        def draw(
            name: str, sampler: Any, length: int = length, predict: Any = predict, made: Any = made
        ) -> None:
            made[name] = sampler.sample(predict, request(length))

        times = interleaved(
            {
                name: lambda name=name, sampler=sampler: draw(name, sampler)  # type: ignore[misc]
                for name, sampler in {"first-hitting": hitting, **peers}.items()
            },
            ROUNDS,
        )
        for name in peers:
            rows.append(
                row(
                    f"L = {length}, ancestral {name}",
                    times["first-hitting"],
                    times[name],
                    note=f"network calls {made['first-hitting'].evaluations} against {made[name].evaluations}, draws "
                    f"{spelled(made['first-hitting'])} against {spelled(made[name])}",
                )
            )
    return rows


def request(length: int) -> SampleRequest:
    """One text of nothing but masks."""
    tokens: Tensor = torch.full((1, length), MASK)
    return SampleRequest(tokens, MASK, torch.Generator().manual_seed(0))


def spelled(samples: Samples) -> str:
    """Its categorical draws."""
    return f"{samples.facts['categorical_draws']:,.0f}"
