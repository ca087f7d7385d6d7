"""Drawing the masks of a batch of 256 images of 14 × 14 patches.

`hard-patches` and `simmim-blocks` are measured against numpy loops over the images that do the same (`naive_…`, beside this
file), `colormae` against uniform random masking, which its paper promises to cost no more than.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

import maskwright
from benchmarks import naive_hard_patches, naive_simmim_blocks
from benchmarks.timing import Row, interleaved, row
from maskwright import Layout

NAME = "masks"
LAYOUT = Layout(256, (14, 14), patch_size=16)
REPEATS = 200


def run() -> list[Row]:
    """The rows of the table, measured on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [hard_patches(), simmim_blocks(), colormae()]
    finally:
        torch.set_num_threads(threads)


def hard_patches() -> Row:
    """`hard-patches` at half of the training against the loop."""
    losses = torch.rand(256, 196, generator=torch.Generator().manual_seed(0))
    table, random = losses.numpy(), np.random.default_rng(0)
    times = interleaved(
        {
            "ours": drawing("hard-patches", patch_loss=losses),
            "loop": lambda: naive_hard_patches.draw(table, random, progress=0.5),
        },
        REPEATS,
    )
    return row("hard-patches, against a numpy loop over images", times["ours"], times["loop"], 1 / 5)


def simmim_blocks() -> Row:
    """`simmim-blocks` against the loop."""
    random = np.random.default_rng(0)
    times = interleaved(
        {"ours": drawing("simmim-blocks"), "loop": lambda: naive_simmim_blocks.draw(256, random)}, REPEATS
    )
    return row("simmim-blocks, against a numpy loop over images", times["ours"], times["loop"], 1 / 3)


def colormae() -> Row:
    """`colormae` against `random`, with the fields made before."""
    times = interleaved({"ours": drawing("colormae"), "random": drawing("random")}, REPEATS)
    return row("colormae, against random", times["ours"], times["random"], 1.3)


def drawing(name: str, **signals: torch.Tensor) -> Callable[[], object]:
    """One draw of a strategy with its defaults; each call goes on with the same generator."""
    strategy = maskwright.create("mask-strategy", name)
    generator = torch.Generator().manual_seed(0)
    return lambda: strategy.draw(LAYOUT, signals=signals, progress=0.5, generator=generator)
