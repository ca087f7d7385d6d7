"""SparK's structural claim: nothing hidden reaches what is visible, and the mask pattern does not vanish with depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import maskwright
from maskwright import Layout, Mask, adapt
from maskwright.jobs.claims import Claim
from maskwright.jobs.comparison import Entry
from maskwright.jobs.pretrain import parameter_groups, pooled
from maskwright.jobs.probes import knn_accuracy, linear_accuracy
from maskwright.plugins.spark.objective import BoundSpark, Spark
from maskwright.plugins.spark.schedule import learning_rate, weight_decay
from maskwright.plugins.spark.sparse import Sparse
from maskwright.sources.images import ImageSource, load_images

RATIO, GRID, CELL, DEPTH, DRAWS = 0.6, (4, 4), 8, 8, 200
STEPS, WARMUP, BATCH, PEAK = 100, 10, 64, 2e-3


class ZeroFilled(BoundSpark):
    """The same network and decoder without sparse layers: hidden pixels are zeros, and everything is convolved."""

    def encode(self, pixels: Tensor, mask: Mask) -> tuple[list[Tensor], list[Tensor | None]]:
        keep = mask.upsample(tuple(pixels.shape[2:])).keep[:, None]
        maps = dense_maps(self.backbone, torch.where(keep, pixels, 0.0))
        normal = [
            None if stage is None else self.norms[str(level)](maps[stage])
            for level, stage in enumerate(self.stage_of)
        ]
        return maps, normal


def dense_maps(backbone: Any, x: Tensor) -> list[Tensor]:
    """The map of each stage of the network as it is."""
    maps = []
    x = backbone.stem(x)
    for stage in backbone.stages:
        x = stage(x)
        maps.append(x)
    return maps


def network(seed: int) -> Any:
    """A ResNet of two stages whose coarsest map has one place for 8 × 8 pixels."""
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(
        num_channels=1, embedding_size=32, hidden_sizes=[32, 64], depths=[2, 2], layer_type="basic"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNetModel(config)


def blocks(batch: int, generator: torch.Generator) -> Mask:
    """Masks of `spark`: 6 of 16 cells visible."""
    strategy = maskwright.create("mask-strategy", "spark", ratio=RATIO)
    layout = Layout(batch, GRID, patch_size=CELL)
    return strategy.draw(layout, signals={}, progress=0.0, generator=generator)


def visible_shares(seed: int, draws: int = DRAWS) -> tuple[list[float], list[float]]:
    """Shares of non-zero places after 0, 1, …, 8 convolutions of 3 × 3 with positive weights: dense, and sparse."""
    mask = blocks(draws, torch.Generator().manual_seed(seed))
    kernel = torch.full((1, 1, 3, 3), 1 / 9)
    dense = sparse = mask.upsample((GRID[0] * CELL, GRID[1] * CELL)).keep[:, None].float()
    shares = [(float((dense != 0).float().mean()), float((sparse != 0).float().mean()))]
    for _ in range(DEPTH):
        dense = F.conv2d(dense, kernel, padding=1)
        with Sparse(mask):
            sparse = F.conv2d(sparse, kernel, padding=1)
        shares.append((float((dense != 0).float().mean()), float((sparse != 0).float().mean())))
    return [one for one, _ in shares], [two for _, two in shares]


@torch.no_grad()
def changes(seed: int, batch: Mapping[str, Tensor]) -> tuple[float, float]:
    """The largest change of a visible feature of any stage when noise takes the place of what is hidden.

    For the sparse network, and for the dense one, in which it replaces zeros; in units of the map's standard deviation.
    """
    pixels = batch["pixels"]
    generator = torch.Generator().manual_seed(seed)
    mask = blocks(len(pixels), generator)
    keep = mask.upsample(tuple(pixels.shape[2:])).keep[:, None]
    noisy = torch.where(keep, pixels, torch.randn(pixels.shape, generator=generator))
    backbone: Any = adapt(network(seed), "conv")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bound = Spark(decoder_width=8).bind(backbone)
    sparse = [bound.encode(one, mask)[0] for one in (pixels, noisy)]
    dense = [dense_maps(backbone, one) for one in (torch.where(keep, pixels, 0.0), noisy)]

    def largest(pair: Sequence[Sequence[Tensor]]) -> float:
        far = []
        for one, two in zip(*pair):
            seen = mask.upsample(tuple(one.shape[2:])).keep[:, None]
            far.append(float(((one - two).abs() * seen).max() / one.std()))
        return max(far)

    return largest(sparse), largest(dense)


def train(seed: int, source: ImageSource, kind: type[BoundSpark]) -> dict[str, float]:
    """Pre-train on digits with the paper's schedules; probes on the features of whole images, before and after."""
    backbone: Any = adapt(network(seed), "conv")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bound = kind(Spark(decoder_width=64), backbone)
    optimizer = torch.optim.AdamW(parameter_groups(bound, 0.04), lr=PEAK, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        for group, decayed in zip(optimizer.param_groups, (True, False)):
            group["lr"] = learning_rate(step, peak=PEAK, warmup=WARMUP, total=STEPS)
            group["weight_decay"] = weight_decay(step, total=STEPS) if decayed else 0.0
        epoch, place = divmod(step, len(source) // BATCH)
        batch = source.batch(source.order(epoch)[place * BATCH : (place + 1) * BATCH], epoch)
        loss = bound(batch, blocks(BATCH, generator)).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bound.parameters(), 5.0)
        optimizer.step()
    return {"loss at the end": float(loss.detach()), **probes(backbone.eval(), source)}


@torch.no_grad()
def probes(backbone: Any, source: ImageSource) -> dict[str, float]:
    """Accuracies on held-out digits of classifiers on the mean of the coarsest map, nothing hidden."""
    sets: list[Tensor] = []
    for split in ("train", "held_out"):
        known = source.evaluation(split)
        batch = known.batch(torch.arange(len(known)))
        sets += [pooled(backbone, batch["pixels"]), batch["labels"]]
    return {"linear probe": linear_accuracy(*sets), "kNN probe": knn_accuracy(*sets)}


def measure(seed: int) -> Mapping[str, float]:
    """One seed: leaks, patterns, and two trainings."""
    source = load_images("digits", size=GRID[0] * CELL, channels=1, seed=seed)
    dense, sparse = visible_shares(seed)
    here, there = changes(seed, source.batch(torch.arange(16)))
    numbers = {
        "sparse: largest change of visible features": here,
        "dense: largest change of visible features": there,
    }
    for who, shares in (("dense", dense), ("sparse", sparse)):
        numbers |= {
            f"{who}: share of non-zero places after {k} convolutions": share for k, share in enumerate(shares)
        }
    runs = {
        "untrained": probes(adapt(network(seed), "conv").eval(), source),
        "sparse": train(seed, source, BoundSpark),
        "zero-filled dense": train(seed, source, ZeroFilled),
    }
    return numbers | {f"{who}: {what}": value for who, run in runs.items() for what, value in run.items()}


def decide(measurements: Sequence[Mapping[str, float]]) -> bool:
    """The criterion, seed by seed."""

    def holds(one: Mapping[str, float]) -> bool:
        def shares(who: str) -> list[float]:
            return [one[f"{who}: share of non-zero places after {k} convolutions"] for k in range(DEPTH + 1)]

        leaks = one["sparse: largest change of visible features"]
        dense_leaks = one["dense: largest change of visible features"]
        grows = all(before < after for before, after in pairwise(shares("dense")))
        still = set(shares("sparse")) == {shares("dense")[0]}
        return leaks == 0 and dense_leaks > 0.1 and grows and shares("dense")[-1] > 0.9 and still

    return all(map(holds, measurements))


CLAIM = Claim(
    statement="with sparse layers, features of visible blocks do not depend on hidden pixels at all, and the mask pattern is the "
    "same at every depth; dense convolutions on the masked image let it vanish",
    baseline="the same network run densely on the same masked images",
    criterion="in every seed: replacing what is hidden by noise changes no visible feature of the sparse network, in any stage, by "
    "any bit, and some of the dense network by more than 0.1 standard deviations; the share of non-zero places is the same after "
    "0 to 8 sparse convolutions, and after dense ones grows at each and ends above 0.9",
    measure=measure,
    decide=decide,
    paper="ResNet-50 80.6 %, ConvNeXt-B 84.8 % on ImageNet after fine-tuning (the repository's table); that zero-filling loses most "
    "of the gain is said by the paper's ablation, whose numbers could not be read",
    note="the verdict is about the structure alone. The trainings beside it (a ResNet of two stages, 100 steps of 64 digits at 32 px, "
    "cells of 8 px, decoder of width 64, AdamW in place of LAMB) decide nothing. In the dense network noise takes the place of zeros.",
)

ENTRIES = (
    Entry(
        {
            "objective.name": "spark",
            "objective.decoder_width": 32,
            "model.width": 16,
            "model.depth": 2,
            "data.size": 64,
        },
        note="a ResNet, whose features lie 16 pixels apart: images are enlarged to 4 × 4 of them",
    ),
)
