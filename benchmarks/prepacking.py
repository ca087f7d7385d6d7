"""Prefilling 64 prompts of log-normal lengths in batches of 32: packed against padded, on a Llama of 4 layers × 128."""

from __future__ import annotations

from typing import Any

from benchmarks.timing import row
from maskwright.plugins.prepacking.claim import BATCH, BATCHES, lengths, model_of, slots, timed, variation

NAME = "prefill of transformers, prompts with a log-normal number of tokens (mean 50, 2 to 400), Llama of 4 layers × 128"
SIGMAS = (0.0, 0.1, 0.25, 0.5, 1.0, 1.4)


def run() -> list[dict[str, Any]]:
    """A row for each spread of the lengths, against padded batches, and one against batches in the order of the lengths."""
    rows, model = [], model_of("llama", 0)
    for sigma in SIGMAS:
        times, spread = timed(model, sigma, 0), variation(lengths(sigma, 0, BATCH * BATCHES))
        bound = 1 / 2 if spread >= 1 else 1 / 0.95
        what = f"σ = {sigma:g}, coefficient of variation {spread:.2f}"
        note = f"token places padded / packed: {slots(sigma, 0):.2f}"
        rows.append(row(f"{what}, against padded", times["prepacked"], times["padded"], bound, note))
        rows.append(row(f"{what}, against length-ordered", times["prepacked"], times["length-ordered"]))
    return rows
