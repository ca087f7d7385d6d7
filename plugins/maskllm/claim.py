"""MaskLLM's headline effect: a learned 2:4 mask leaves a language model better than the masks of one-shot pruners."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import maskwright
from maskwright import Budget, PruneTask
from maskwright.backbones.defaults import causal_language_model
from maskwright.jobs.claims import Claim
from maskwright.sources.text import TextSource, load_text

LENGTH, VOCABULARY, WIDTH, DEPTH = 64, 512, 64, 2
BATCH, STEPS, RATE = 32, 300, 4e-3
MASK_STEPS = 200
CALIBRATION = 4
"""Batches that the one-shot pruners calibrate on; their control has all MASK_STEPS."""


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the tokens after the first, in nats."""
    logits = model(input_ids=batch["tokens"], use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())


def batches(source: TextSource, first: int, count: int) -> list[dict[str, Tensor]]:
    """Training batches number `first` to `first + count - 1`, each epoch in its own order."""
    chosen = []
    for number in range(first, first + count):
        epoch, place = divmod(number, len(source) // BATCH)
        chosen.append(source.batch(source.order(epoch)[place * BATCH : (place + 1) * BATCH], epoch))
    return chosen


def train(seed: int, source: TextSource) -> nn.Module:
    """A small Llama trained on the standard library's documentation."""
    model: nn.Module = causal_language_model(
        vocabulary=source.vocabulary, length=LENGTH, width=WIDTH, depth=DEPTH, seed=seed
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05, fused=True)
    for step, batch in enumerate(batches(source, 0, STEPS)):
        rising, falling = (step + 1) / 30, 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.param_groups[0]["lr"] = RATE * min(rising, falling)
        loss = next_token_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def perplexity(model: nn.Module, source: TextSource) -> float:
    """On the first 256 held-out sequences."""
    held_out = source.held_out
    rows = torch.arange(min(256, len(held_out))).split(64)
    losses = [next_token_loss(model, held_out.batch(part)) * len(part) for part in rows]
    return math.exp(float(sum(losses)) / sum(map(len, rows)))


def measure(seed: int) -> dict[str, float]:
    """Held-out perplexity of the dense model, and of it pruned to 2:4 in each way."""
    source = load_text(length=LENGTH, vocabulary=VOCABULARY, seed=seed)
    dense = train(seed, source)
    training = batches(source, STEPS, MASK_STEPS)

    def pruned(name: str, given: Sequence[Mapping[str, Tensor]], **parameters: Any) -> float:
        model = copy.deepcopy(dense)
        generator = torch.Generator().manual_seed(seed)
        task = PruneTask(Budget(pattern="2:4"), given, next_token_loss, generator)
        maskwright.create("pruner", name, **parameters).prune(model, task)
        return perplexity(model, source)

    few = training[:CALIBRATION]
    return {
        "dense": perplexity(dense, source),
        "magnitude": pruned("magnitude", few),
        "wanda": pruned("wanda", few),
        "wanda, all batches": pruned("wanda", training),
        "sparsegpt": pruned("sparsegpt", few),
        "sparsegpt, all batches": pruned("sparsegpt", training),
        "sparsegpt, mask only": pruned("sparsegpt", few, update=False),
        "maskllm": pruned("maskllm", training, steps=MASK_STEPS),
    }


def decide(measurements: Sequence[Mapping[str, float]]) -> bool:
    """The criterion, seed by seed."""
    others = ("magnitude", "wanda", "wanda, all batches", "sparsegpt", "sparsegpt, all batches")
    return all(one["maskllm"] < min(one[name] for name in others) for one in measurements)


CLAIM = Claim(
    statement="at 2:4, a learned mask on frozen weights gives a lower held-out perplexity than magnitude, Wanda and SparseGPT "
    "with its weight update",
    baseline=f"magnitude, Wanda and SparseGPT of this registry, calibrated on {CALIBRATION} batches, and on all {MASK_STEPS} "
    "that MaskLLM trains on",
    criterion="in every seed, MaskLLM's perplexity is below each of the five",
    measure=measure,
    decide=decide,
    paper="Llama-2 7B, 2:4, Wikitext-2: dense 5.12, SparseGPT 10.42, MaskLLM 6.72",
    note=f"a Llama of width {WIDTH} and depth {DEPTH}, trained here for {STEPS} steps on the standard library's documentation; "
    f"numbers are perplexities of held-out text. MaskLLM has the official constants but {MASK_STEPS} steps instead of 2000. It "
    "trains on the data, which the others only calibrate on: choosing a mask is itself a way to fit.",
)
