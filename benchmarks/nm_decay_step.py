"""A training step of nm-decay, masks made anew in each, against the same step of an ordinary loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import maskwright
from benchmarks.timing import Row, interleaved, row
from maskwright import Budget, PruneTask
from maskwright.backbones.defaults import causal_language_model

NAME = "a step of nm-decay, Llama of width 256 and depth 4, 16 × 64 tokens"
BOUND = 1.25
STEPS, REPEATS = 4, 5

WAYS = {
    "2:4, straight-through": ("2:4", {"decay": "none", "gradient": "straight-through"}),
    "2:4, SR-STE": ("2:4", {"decay": "none", "gradient": "sr-ste"}),
    "2:4, exponential mask decay": ("2:4", {}),
    "1:16, exponential mask decay": ("1:16", {}),
}


def run() -> list[Row]:
    """One row for each way: STEPS steps with all that begins and ends them, over as many of plain AdamW with clipping."""
    generator = torch.Generator().manual_seed(0)
    model = causal_language_model(vocabulary=512, length=64, width=256, depth=4)
    batch = {"tokens": torch.randint(0, 512, (16, 64), generator=generator)}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["tokens"], use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())

    def dense() -> None:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for _ in range(STEPS):
            found = loss(model, batch)
            optimizer.zero_grad()
            found.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    def masked(name: str) -> None:
        pattern, options = WAYS[name]
        task = PruneTask(Budget(pattern=pattern), [batch], loss, generator)
        maskwright.create("pruner", "nm-decay", steps=STEPS, lr=1e-4, **options).prune(model, task)

    measured = interleaved(
        {"dense": dense, **{name: (lambda name=name: masked(name)) for name in WAYS}}, REPEATS
    )
    return [row(f"{NAME}, {name}", measured[name] / STEPS, measured["dense"] / STEPS, BOUND) for name in WAYS]
