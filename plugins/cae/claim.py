"""Does the alignment make the regressed latents those of the encoder, without collapse, and do the features suffer?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import maskwright
from maskwright import Layout, Mask
from maskwright.backbones.defaults import vision_transformer
from maskwright.jobs.claims import Claim
from maskwright.jobs.pretrain import learning_rate, parameter_groups, pooled
from maskwright.jobs.probes import knn_accuracy, linear_accuracy
from maskwright.plugins.cae.codes import PatchCodes
from maskwright.plugins.cae.objective import BoundContextAutoencoder
from maskwright.protocols import Step
from maskwright.sources.images import ImageSource, load_images

IMAGE, PATCH, CODES = 16, 2, 64
STEPS, BATCH, RATE, WARMUP = 300, 32, 1e-3, 0.1


def blocks(batch: int, generator: torch.Generator) -> Mask:
    """Half of the 8 × 8 patches hidden in blocks of at least 5, the paper's 16 of 196."""
    strategy = maskwright.create("mask-strategy", "block", ratio=0.5, exact=True, min_block=5)
    side = IMAGE // PATCH
    return strategy.draw(Layout(batch, (side, side)), signals={}, progress=0.0, generator=generator)


def whole(source: ImageSource) -> Mapping[str, Tensor]:
    """All images of a source in one batch."""
    return source.batch(torch.arange(len(source)))


def train(source: ImageSource, seed: int, weight: float) -> BoundContextAutoencoder:
    """A small ViT pretrained by cae; the same seed has the same weights, images and masks under every λ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = vision_transformer(
            image_size=IMAGE, patch_size=PATCH, channels=1, width=64, depth=4, seed=seed
        )
        images = whole(source.evaluation("train"))["pixels"]
        tokenizer = PatchCodes.fit(images, PATCH, CODES, torch.Generator().manual_seed(seed))
        objective = maskwright.create(
            "objective",
            "cae",
            tokenizer=tokenizer,
            weight=weight,
            regressor_depth=2,
            decoder_depth=2,
            heads=4,
        )
        bound: BoundContextAutoencoder = objective.bind(vit)
    optimizer = torch.optim.AdamW(parameter_groups(bound, 0.05), lr=RATE, betas=(0.9, 0.999))
    generator = torch.Generator().manual_seed(seed)
    for index in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(Step(index, STEPS), RATE, WARMUP)
        epoch, place = divmod(index, len(source) // BATCH)
        batch = source.batch(source.order(epoch)[place * BATCH : (place + 1) * BATCH], epoch)
        loss = bound(batch, blocks(BATCH, generator), generator=generator).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bound.parameters(), 3.0)
        optimizer.step()
    return bound.eval()


@torch.no_grad()
def latents(bound: BoundContextAutoencoder, source: ImageSource) -> dict[str, float]:
    """How far Z lies from Z̄ on images that were held out, under one set of masks for all models."""
    batch = whole(source.evaluation("held_out"))
    mask = blocks(len(batch["pixels"]), torch.Generator().manual_seed(99)).flatten()
    target = bound.encode(batch["pixels"], ~mask)[1]
    outputs = bound(batch, mask).outputs
    variance = target.flatten(0, 1).var(0).mean()
    # The mean at each place is what a predictor that looks at nothing can say.
    spread = (~mask).scatter_visible(target, 0.0)
    hidden = (~mask.keep)[..., None].float()
    mean = spread.sum(0) / hidden.sum(0).clamp(min=1)
    blind = ((spread - mean).square() * hidden).sum() / hidden.sum() / target.shape[-1]
    codes = mask.gather_hidden(bound.settings.tokenizer.codes(batch["pixels"]))
    return {
        "latent error / variance": float((outputs["latents"] - target).square().mean() / variance),
        "error of the mean at each place / variance": float(blind / variance),
        "variance of the latents": float(variance),
        "hidden codes foretold": float((outputs["prediction"].argmax(-1) == codes).float().mean()),
    }


@torch.no_grad()
def probes(bound: BoundContextAutoencoder, source: ImageSource) -> dict[str, float]:
    """Accuracy of probes on the mean patch feature of held-out digits, nothing hidden."""
    given: list[Tensor] = []
    for split in ("train", "held_out"):
        batch = whole(source.evaluation(split))
        given += [pooled(bound.backbone, batch["pixels"]), batch["labels"]]
    return {"kNN accuracy": knn_accuracy(*given), "linear accuracy": linear_accuracy(*given)}


def measure(seed: int) -> Mapping[str, float]:
    """Two trainings that differ in λ alone."""
    source = load_images("digits", size=IMAGE, channels=1, seed=seed)
    numbers = {}
    for weight in (2.0, 0.0):
        bound = train(source, seed, weight)
        found = latents(bound, source) | probes(bound, source)
        numbers |= {f"λ = {weight:g}: {name}": value for name, value in found.items()}
    return numbers
