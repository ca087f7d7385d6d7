"""S4: its kernel against the power series, and generation by steps against a Transformer with a KV cache of equal width."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Row, interleaved, row
from maskwright.backbones.defaults import causal_language_model
from maskwright.plugins.s4 import ssm
from maskwright.plugins.s4.backbone import S4LanguageModel, S4Layer

NAME = "S4, N = 64: kernels of 4,096 steps, and 4,096 tokens at width 64 against a Llama with a KV cache"
CHANNELS = 16
"""Of the kernels."""

LENGTH, WIDTH, STATES, DEPTH, VOCABULARY = 4096, 64, 64, 2, 256
ENDS = 512
"""Tokens at the beginning and at the end of the generation whose time is compared."""


def run() -> list[Row]:
    """On one thread. The naive kernel multiplies by the dense Ā once a step, for all channels at once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return [*kernels(), *generation()]
    finally:
        torch.set_num_threads(threads)


def power_series(transition: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """[H, N, N], [H, N], [H, N] → C Āʲ B̄, [H, L], one power after the other."""
    x, terms = B[..., None], []
    for _ in range(length):
        terms.append((C[:, None] @ x)[:, 0, 0].real)
        x = transition @ x
    return torch.stack(terms, dim=-1)


def kernels() -> list[Row]:
    """Against the powers of Ā one by one (bounded), and against the same powers made by doubling, N² L numbers of work."""
    layer = S4Layer(CHANNELS, STATES, length=LENGTH, generator=torch.Generator().manual_seed(0))
    recurrence = layer.recurrence()
    # Its matrices are made beforehand: only the powers are timed.
    transition, B, C = recurrence.transition(), ssm.whole(recurrence.B), ssm.whole(recurrence.C)

    def doubling() -> Tensor:
        return (C[:, None] @ ssm.krylov(transition, B, LENGTH))[:, 0].real

    far = float((layer.kernel(LENGTH) - power_series(transition, B, C, LENGTH)).abs().max())
    times = interleaved({"fast": lambda: layer.kernel(LENGTH), "doubling": doubling}, 5)
    times |= interleaved({"naive": lambda: power_series(transition, B, C, LENGTH)}, 1)
    note = f"{times['naive'] / times['fast']:.0f} times faster, largest difference {far:.1g}"
    return [
        row(f"kernel of {LENGTH:,} steps over its power series", times["fast"], times["naive"], 1 / 20, note),
        row(f"kernel of {LENGTH:,} steps over powers by doubling", times["fast"], times["doubling"]),
    ]


def s4_steps() -> Callable[[], object]:
    """A function that generates one token more at each call, from one token."""
    model = S4LanguageModel(VOCABULARY, length=LENGTH, width=WIDTH, depth=DEPTH, state=STATES).eval()
    token = torch.zeros(1, dtype=torch.int64)
    carried: list[Any] = [model.prefill(token[:, None])]

    def step() -> None:
        logits, state = carried[0]
        carried[0] = model.step(logits.argmax(-1), state)

    return step


def llama_steps() -> Callable[[], object]:
    """The same with the cache of transformers."""
    model = causal_language_model(
        vocabulary=VOCABULARY, length=LENGTH + 2, width=WIDTH, depth=DEPTH, heads=4
    ).eval()
    carried: list[Any] = [model(torch.zeros(1, 1, dtype=torch.int64), use_cache=True)]

    def step() -> None:
        last = carried[0]
        token = last.logits[:, -1].argmax(-1, keepdim=True)
        carried[0] = model(token, past_key_values=last.past_key_values, use_cache=True)

    return step


def generation() -> list[Row]:
    """Both models generate by turns, so that a busy machine slows both alike."""
    steps = {"S4": s4_steps(), "Llama": llama_steps()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(LENGTH):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - started)
    each = {name: torch.tensor(times) for name, times in taken.items()}
    total = {name: float(times.sum()) for name, times in each.items()}
    first, last = (
        {name: float(times[where].median()) for name, times in each.items()}
        for where in (slice(0, ENDS), slice(-ENDS, None))
    )
    growth = {name: last[name] / first[name] for name in steps}
    return [
        row(f"{LENGTH:,} tokens, S4's steps over Llama's", total["S4"], total["Llama"]),
        row(f"a token among the first {ENDS}", first["S4"], first["Llama"]),
        row(
            f"a token among the last {ENDS}",
            last["S4"],
            last["Llama"],
            note=f"from the first to the last: S4 × {growth['S4']:.2f}, Llama × {growth['Llama']:.2f}",
        ),
    ]
