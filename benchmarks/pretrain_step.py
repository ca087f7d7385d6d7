"""A step of `maskwright pretrain`, all that the job does between two steps included, against a loop written by hand."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from maskwright.backbones import defaults
from maskwright.jobs import pretrain
from maskwright.jobs.run import Run
from maskwright.jobs.settings import resolve
from maskwright.sources.images import load_images

NAME = "a pretrain step: default ViT, random masks, MAE, AdamW"
STEPS, WARM = 60, 10
SIZE, PATCH, WIDTH, DEPTH, HEADS, BATCH, KEPT = 64, 8, 128, 4, 4, 64, 16
DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS = 64, 2, 4


class HandWritten(nn.Module):
    """The masked autoencoder as one writes it for oneself: one ViT, one mask, one loss."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = defaults.vision_transformer(
            image_size=SIZE, patch_size=PATCH, width=WIDTH, depth=DEPTH, heads=HEADS
        )
        self.embed = nn.Linear(WIDTH, DECODER_WIDTH)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, DECODER_WIDTH))
        self.register_buffer("positions", torch.randn(1, (SIZE // PATCH) ** 2, DECODER_WIDTH))
        block = nn.TransformerEncoderLayer(
            DECODER_WIDTH, DECODER_HEADS, 4 * DECODER_WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerEncoder(
            block, DECODER_DEPTH, nn.LayerNorm(DECODER_WIDTH), enable_nested_tensor=False
        )
        self.predict = nn.Linear(DECODER_WIDTH, PATCH * PATCH * 3)

    def forward(self, pixels: Tensor) -> Tensor:
        embeddings = self.vit.embeddings
        x = embeddings.patch_embeddings(pixels) + embeddings.position_embeddings[:, 1:]
        batch, count, _ = x.shape
        order = torch.rand(batch, count).argsort(1)
        back = order.argsort(1)
        x = x.gather(1, order[:, :KEPT, None].expand(-1, -1, WIDTH))
        first = (embeddings.cls_token + embeddings.position_embeddings[:, :1]).expand(batch, -1, -1)
        x = torch.cat([first, x], 1)
        for layer in self.vit.layers:
            x = layer(x)
        x = self.embed(self.vit.layernorm(x))
        full = torch.cat([x[:, 1:], self.mask_token.expand(batch, count - KEPT, -1)], 1)
        full = full.gather(1, back[..., None].expand(-1, -1, DECODER_WIDTH)) + self.positions
        predicted = self.predict(self.decoder(torch.cat([x[:, :1], full], 1)))[:, 1:]
        side = SIZE // PATCH
        target = pixels.reshape(batch, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 3, 5, 1).flatten(3)
        target = target.reshape(batch, count, -1)
        variance, mean = torch.var_mean(target, -1, keepdim=True)
        error = (predicted - (target - mean) / (variance + 1e-6).sqrt()).square().mean(-1)
        hidden = back >= KEPT
        return (error * hidden).sum() / hidden.sum()


def by_hand(next_batch: Callable[[int], Tensor]) -> Iterator[float]:
    """The training loop as one writes it for oneself; each step's loss, which is looked at as the job looks at its own."""
    torch.manual_seed(0)
    model = HandWritten()
    matrices = [one for one in model.parameters() if one.ndim >= 2]
    others = [one for one in model.parameters() if one.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for step in range(10**6):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * 0.5 * (1 + math.cos(math.pi * min(step / STEPS, 1)))
        loss = model(next_batch(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


class Ready:
    """A source whose batches are in memory, so that only the step is measured."""

    columns = frozenset({"pixels", "labels"})

    def __init__(self) -> None:
        source = load_images("photographs", size=SIZE)
        self.size = SIZE
        self.made = source.batch(torch.arange(BATCH))

    def __len__(self) -> int:
        return BATCH * 100

    def order(self, epoch: int) -> Tensor:
        return torch.arange(len(self))

    def batch(self, indices: Tensor, epoch: int = 0) -> dict[str, Tensor]:
        return self.made


def run() -> list[dict[str, Any]]:
    """The step alone, the two loops taking turns; and, without a bound, with each loop's own way to its batches."""
    return [_step_alone(), _with_batches()]


def _settings(steps: int) -> Any:
    return resolve("pretrain", None, {"run.steps": steps, "run.batch_size": BATCH, "data.size": SIZE})


def _step_alone() -> dict[str, Any]:
    source = Ready()
    peer = by_hand(lambda _: source.made["pixels"])
    mine, its = [], []
    real, last = pretrain._step, time.perf_counter()

    def timed(*given: Any) -> Any:
        """The job's step; all since the peer's last one is the job's. Then a step of the peer."""
        nonlocal last
        numbers = real(*given)
        stepped = time.perf_counter()
        next(peer)
        mine.append(stepped - last)
        last = time.perf_counter()
        its.append(last - stepped)
        return numbers

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(pretrain, "_step", timed),
        mock.patch.object(pretrain, "data", return_value=source),
        Run(_settings(STEPS), folder=Path(folder) / "run", quiet=True) as job,
    ):
        pretrain.train(job)
    seconds, peer_seconds = (statistics.median(times[WARM:]) for times in (mine, its))
    return {
        "what": "the step, its batch in memory",
        "ratio": seconds / peer_seconds,
        "bound": 1.05,
        "seconds": seconds,
        "peer_seconds": peer_seconds,
    }


def _with_batches() -> dict[str, Any]:
    source = load_images("photographs", size=SIZE)
    peer = by_hand(lambda step: source.batch(torch.arange(BATCH) + step * BATCH % 1024)["pixels"])
    mine, its = [], []
    for _ in range(3):
        stamps: list[float] = []
        real = pretrain._step

        def stamped(*given: Any, real: Any = real, stamps: list[float] = stamps) -> Any:
            numbers = real(*given)
            stamps.append(time.perf_counter())
            return numbers

        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(pretrain, "_step", stamped),
            Run(_settings(STEPS // 2), folder=Path(folder) / "run", quiet=True) as job,
        ):
            pretrain.train(job)
        mine.append((stamps[-1] - stamps[WARM]) / (len(stamps) - 1 - WARM))
        for _ in range(WARM):
            next(peer)
        start = time.perf_counter()
        for _ in range(STEPS // 2 - WARM):
            next(peer)
        its.append((time.perf_counter() - start) / (STEPS // 2 - WARM))
    return {
        "what": "the step and its batch",
        "ratio": min(mine) / min(its),
        "bound": None,
        "seconds": min(mine),
        "peer_seconds": min(its),
        "note": "a thread cuts the job's crops while the model works; the loop by hand cuts its own",
    }
