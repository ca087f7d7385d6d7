"""A training step of a mask on frozen weights against the same step of the dense weights."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import maskwright
from benchmarks.timing import Row, row
from maskwright import Budget, PruneTask
from maskwright.protocols import Step

NAME = "a masked training step over the dense one, with the same batch and optimizer"
WARM, STEPS = 2, 12
BOUND = 1.25


class Timed(PruneTask):
    """A task that between the steps of a pruner does one of the dense weights, and takes the time of both."""

    def beside(self, peer: Callable[[], object]) -> tuple[list[float], list[float]]:
        """Where the seconds of the pruner's steps and of the dense ones will be."""
        self.peer, self.left = peer, 0.0
        self.masked: list[float] = []
        self.dense: list[float] = []
        return self.masked, self.dense

    def batch(self, step: Step) -> Mapping[str, Tensor]:
        """The batch, asked for once in each step."""
        start = time.perf_counter()
        self.peer()
        end = time.perf_counter()
        if step.index > WARM:
            self.masked.append(start - self.left)
            self.dense.append(end - start)
        self.left = time.perf_counter()
        return super().batch(step)


def convnet() -> tuple[nn.Module, dict[str, Tensor]]:
    """ResNet-32 for CIFAR-10 sized images, as the paper on jackpots has it, at a batch of 64."""
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[5, 5, 5], layer_type="basic", num_labels=10
    )
    model = transformers.ResNetForImageClassification(config)
    # The stem of ImageNet's networks would leave 8 × 8 places of 32 × 32.
    model.resnet.embedder.embedder.convolution.stride = (1, 1)
    model.resnet.embedder.pooler = nn.Identity()
    return model, {"pixels": torch.randn(64, 3, 32, 32), "labels": torch.randint(0, 10, (64,))}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    """A ViT of width 192 with 65 tokens, at a batch of 32."""
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768, image_size=32,
        patch_size=4, num_labels=10,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    return model, {"pixels": torch.randn(32, 3, 32, 32), "labels": torch.randint(0, 10, (32,))}


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of the classes."""
    return nn.functional.cross_entropy(model(pixel_values=batch["pixels"]).logits, batch["labels"])


def dense(model: nn.Module, batch: Mapping[str, Tensor], optimizer: str) -> Callable[[], object]:
    """A step of all weights, by the optimizer that the masks have."""
    model = copy.deepcopy(model).train()
    made = (
        torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)
        if optimizer == "SGD"
        else torch.optim.Adam(model.parameters(), 1e-5)
    )

    def step() -> None:
        loss = loss_of(model, batch)
        made.zero_grad()
        loss.backward()
        made.step()
        float(loss.detach())

    return step


SPARSE = Budget(sparsity=0.9)
CASES: tuple[
    tuple[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]], str, str, Budget | None, dict[str, Any]],
    ...,
] = (
    ("lottery-jackpot, ResNet-32", convnet, "SGD", "lottery-jackpot", SPARSE, {}),
    ("lottery-jackpot, ViT", vit, "SGD", "lottery-jackpot", SPARSE, {}),
    ("lottery-jackpot, ViT, ρ falling", vit, "SGD", "lottery-jackpot", SPARSE, {"restriction": "quartic"}),
    (
        "mask-tuning of all layers, λ = 0, ViT",
        vit,
        "Adam",
        "mask-tuning",
        None,
        {"dropout": 0.0, "where": "all"},
    ),
    ("mask-tuning, λ = 1, ViT", vit, "Adam", "mask-tuning", None, {}),
)


def run() -> list[Row]:
    """A row for each; gradient dropout, which needs two more passes, is reported without a bound."""
    rows = []
    state = torch.get_rng_state()
    torch.manual_seed(0)
    for what, make, optimizer, name, budget, parameters in CASES:
        model, batch = make()
        task = Timed(budget, [batch], loss_of)
        masked, peer = task.beside(dense(model, batch, optimizer))
        maskwright.create("pruner", name, steps=WARM + 1 + STEPS, **parameters).prune(model, task)
        dropout = name == "mask-tuning" and not parameters
        note = (
            "with a forward of the teacher and a second backward, which gradient dropout is"
            if dropout
            else ""
        )
        rows.append(
            row(what, statistics.median(masked), statistics.median(peer), None if dropout else BOUND, note)
        )
    torch.set_rng_state(state)
    return rows
