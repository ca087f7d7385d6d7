"""Prepacked against padded prefill: the same numbers as one by one, and less time the more the lengths vary."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskwright.backbones.defaults import causal_language_model
from maskwright.jobs.claims import Claim
from maskwright.plugins.prepacking.prefilling import packed_rows, padded_left, prefill
from maskwright.toolkit.packing import fewest_bins, first_fit_decreasing, lower_bound

SIGMAS = (0.0, 0.5, 1.0, 1.4)
MEAN, LONGEST, VOCABULARY, BATCH, BATCHES = 50, 400, 256, 32, 2
TURNS = {0.0: 20, 0.1: 20, 0.25: 20, 0.5: 10, 1.0: 5, 1.4: 5}
"""Times that each way is measured, by σ: what takes less is measured more often."""


def lengths(sigma: float, seed: int, number: int) -> list[int]:
    """Of prompts: log-normal with a mean of 50 and a spread of σ, 2 to 400 tokens."""
    drawn = np.random.default_rng(seed).lognormal(math.log(MEAN) - sigma**2 / 2, sigma, number)
    return [int(length) for length in drawn.round().astype(int).clip(2, LONGEST)]


def prompts(sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (size,), generator=generator) for size in sizes]


def variation(sizes: Sequence[int]) -> float:
    """Coefficient of variation: standard deviation over mean."""
    return float(np.std(sizes) / np.mean(sizes))


def model_of(kind: str, seed: int) -> Any:
    """Four layers of width 128: a Llama, or a GPT-2 with learned positions; its weights are random."""
    if kind == "llama":
        return causal_language_model(
            vocabulary=VOCABULARY, length=LONGEST + 16, width=128, depth=4, heads=4, seed=seed
        ).eval()
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": LONGEST + 16}
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)
        ).eval()


@torch.no_grad()
def padded_prefill(model: Any, batch: Sequence[Tensor]) -> Any:
    """What transformers does at the start of `generate` with a padded batch."""
    ids, attention = padded_left(batch, 0)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    return model(ids, attention_mask=attention, position_ids=positions, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def worst_difference(model: Any, batch: Sequence[Tensor]) -> tuple[float, float]:
    """Of logits, and of keys and values, between packed prompts and each alone."""
    from transformers import DynamicCache

    packed = prefill(model, batch)
    logits, cached = 0.0, 0.0
    for number, prompt in enumerate(batch):
        alone = DynamicCache(config=model.config)
        expected = model(prompt[None, :-1], past_key_values=alone, use_cache=True).logits[0]
        logits = max(logits, float((packed.logits[number] - expected).abs().max()))
        for ours, theirs in zip(packed.cache.layers, alone.layers, strict=True):
            for one, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                own = one[number, :, one.shape[2] - len(prompt) + 1 :]
                cached = max(cached, float((own - other[0]).abs().max()))
    return logits, cached


def equal_continuations(model: Any, batch: Sequence[Tensor], tokens: int = 8) -> float:
    """Share of the prompts that `generate` continues with the same tokens from the packed cache as from the prompt alone."""
    told = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(**prefill(model, batch, logits=False).inputs(), **told)[:, -tokens:]
    alone = [model.generate(prompt[None], **told)[0, -tokens:] for prompt in batch]
    return sum(torch.equal(one, other) for one, other in zip(made, alone, strict=True)) / len(batch)


def seconds(calls: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Least CPU time of each on one thread, by turns, after one turn that does not count."""
    threads, taken = torch.get_num_threads(), dict.fromkeys(calls, math.inf)
    torch.set_num_threads(1)
    try:
        for turn in range(turns + 1):
            for name, call in calls.items():
                begun = time.process_time()
                call()
                if turn:
                    taken[name] = min(taken[name], time.process_time() - begun)
    finally:
        torch.set_num_threads(threads)
    return taken


def batches(texts: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Of 32 prompts each."""
    return [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]


def timed(model: Any, sigma: float, seed: int) -> dict[str, float]:
    """Seconds for all batches: padded as they come, padded in the order of their lengths, and prepacked."""
    texts = prompts(lengths(sigma, seed, BATCH * BATCHES), seed)
    ordered = sorted(texts, key=len)
    return seconds(
        {
            "padded": lambda: [padded_prefill(model, batch) for batch in batches(texts)],
            "length-ordered": lambda: [padded_prefill(model, batch) for batch in batches(ordered)],
            "prepacked": lambda: [prefill(model, batch, logits=False) for batch in batches(texts)],
        },
        TURNS[sigma],
    )


def slots(sigma: float, seed: int) -> float:
    """Token places of the padded batches over those of the packed ones."""
    sizes = lengths(sigma, seed, BATCH * BATCHES)
    groups = [sizes[first : first + BATCH] for first in range(0, len(sizes), BATCH)]
    packed = sum(math.prod(packed_rows(group).shape) for group in groups)
    return sum(BATCH * max(group) for group in groups) / packed


def measure(seed: int) -> Mapping[str, float]:
    """One seed's model, prompts and times."""
    result: dict[str, float] = {}
    sizes = lengths(1.0, 100 + seed, 12)
    for kind in ("llama", "gpt2"):
        model, texts = model_of(kind, seed), prompts(sizes, seed)
        result[f"{kind}, prompts continued alike"] = equal_continuations(model, texts)
        for dtype in (torch.float32, torch.float64):
            found = worst_difference(model.to(dtype), texts)
            for what, value in zip(("logits", "keys and values"), found, strict=True):
                result[f"{kind}, {what}, {str(dtype)[6:]}, largest difference"] = value
    tail = lengths(1.0, seed, 1000)
    bins = len(fewest_bins(tail, max(tail)))
    result["1,000 long-tail lengths, bins over the lower bound"] = bins / lower_bound(tail, max(tail))
    result["1,000 long-tail lengths, bins over first-fit decreasing"] = bins / len(
        first_fit_decreasing(tail, max(tail))
    )
    model = model_of("llama", seed)
    for sigma in SIGMAS:
        times = timed(model, sigma, seed)
        result[f"σ = {sigma:g}, coefficient of variation"] = variation(lengths(sigma, seed, BATCH * BATCHES))
        result[f"σ = {sigma:g}, token places padded / packed"] = slots(sigma, seed)
        result[f"σ = {sigma:g}, time padded / prepacked"] = times["padded"] / times["prepacked"]
        result[f"σ = {sigma:g}, time length-ordered / prepacked"] = (
            times["length-ordered"] / times["prepacked"]
        )
    return result


def decide(measurements: Sequence[Mapping[str, float]]) -> bool:
    """The criterion in code."""

    def holds(one: Mapping[str, float]) -> bool:
        exact = all(
            value <= (1e-10 if "float64" in name else 1e-5)
            for name, value in one.items()
            if name.endswith("largest difference")
        )
        alike = all(value == 1 for name, value in one.items() if name.endswith("continued alike"))
        bins = (
            one["1,000 long-tail lengths, bins over the lower bound"] <= 1.02
            and one["1,000 long-tail lengths, bins over first-fit decreasing"] <= 1
        )
        ratios = [one[f"σ = {sigma:g}, time padded / prepacked"] for sigma in SIGMAS]
        fast = all(
            ratio >= 2
            for sigma, ratio in zip(SIGMAS, ratios, strict=True)
            if one[f"σ = {sigma:g}, coefficient of variation"] >= 1
        )
        return exact and alike and bins and fast and min(ratios) >= 0.95

    means = [
        statistics.fmean(one[f"σ = {sigma:g}, time padded / prepacked"] for one in measurements)
        for sigma in SIGMAS
    ]
    return all(map(holds, measurements)) and means == sorted(means)


CLAIM = Claim(
    statement="prepacked prefill gives the logits, keys and values of each prompt alone, and its speed-up over padded prefill grows "
    "with the variance of the lengths",
    baseline="padded prefill of transformers (sdpa) on the same model, prompts and batches of 32; padded in the order of the lengths",
    criterion="in every seed: differences at most 1e-5 in float32 and 1e-10 in float64, all prompts continued alike, at most 2 % more bins "
    "than the lower bound and no more than first-fit decreasing; the time ratio padded / prepacked is at least 2 where the coefficient of "
    "variation is at least 1, and never below 0.95; its mean over the seeds rises from each σ to the next",
    measure=measure,
    decide=decide,
    paper="up to 6 times faster to the first token and 16 times larger batches; 0.441 s against 2.299 s padded and 0.658 s length-ordered "
    "(MMLU, batches of 64, 1.3 billion parameters, A6000)",
    seeds=(3, 4, 5),
    note="Llama of 4 layers × 128 with random weights, 64 prompts of log-normal lengths with a mean of 50, cut at 2 and 400, without the "
    "logits of all tokens; CPU time on one thread, the least of 5 to 20, packing and unpacking included. This is the second measurement: "
    "the first (seeds 0 to 2) had lengths of exp(N(3.9, σ)) and was not reproduced: at σ = 0 the ratio was 0.91, because caches of equal prompts "
    "were copied needlessly, and from σ = 1 to 1.4 it fell from 4.0 to 3.6, because the cut at 400 lengthened the mean and hardly the "
    "variation (1.01 to 1.12). The copy is gone and the mean is held; the criterion is the same",
)
