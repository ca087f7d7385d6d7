"""Does the forecast rank the true losses, does hiding by it make the task harder, and does easy-to-hard help the features?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import maskwright
from maskwright import Layout, Mask, MaskedTraining
from maskwright.backbones.defaults import vision_transformer
from maskwright.jobs.claims import Claim
from maskwright.jobs.probes import knn_accuracy, linear_accuracy
from maskwright.sources.images import ImageSource, load_images
from maskwright.toolkit.images import patchify, sincos_positions

STEPS, BATCH, RATE, WARMUP = 300, 32, 2e-3, 30
LOOKS = 8
"""Random masks over which a patch's true loss is averaged."""

PAPER_STEPS = 200 * 1_281_167 // 1024
ARMS = {"random": (0.0, 0.0), "easy to hard": (0.0, 0.5), "always hard": (1.0, 1.0)}


def memory(decay: float) -> float:
    """The decay with which a teacher's memory is the same share of these steps as the paper's of its 200 epochs."""
    return max(0.0, 1 - (1 - decay) * PAPER_STEPS / STEPS)


def train(
    source: ImageSource, seed: int, patch_size: int, alpha: tuple[float, float], norm_pix: bool = False
) -> MaskedTraining:
    """A small ViT pretrained by hpm with masks of `hard-patches`; the same seed sees the same images in every arm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = as_in_mae(
            vision_transformer(
                image_size=source.size,
                patch_size=patch_size,
                channels=source.channels,
                width=48,
                depth=3,
                seed=seed,
            )
        )
        objective = maskwright.create(
            "objective",
            "hpm",
            norm_pix=norm_pix,
            decoder_width=32,
            decoder_depth=2,
            decoder_heads=4,
            ema_start=memory(0.999),
            ema_end=memory(0.9999),
        )
        strategy = maskwright.create(
            "mask-strategy", "hard-patches", alpha_start=alpha[0], alpha_end=alpha[1]
        )
        model = MaskedTraining(vit, strategy, objective, seed=seed, total_steps=STEPS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARMUP, 1 - step / STEPS)
        epoch, place = divmod(step, len(source) // BATCH)
        batch = source.batch(source.order(epoch)[place * BATCH : (place + 1) * BATCH], epoch)
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def as_in_mae(vit: Any) -> Any:
    """Fixed sine-cosine positions (none for the class token) and Xavier-uniform weights, as the official encoder begins."""
    config, embeddings = vit.config, vit.embeddings
    side = config.image_size // config.patch_size
    positions = sincos_positions(config.hidden_size, (side, side))
    embeddings.position_embeddings.copy_(torch.nn.functional.pad(positions, (0, 0, 1, 0)))
    embeddings.position_embeddings.requires_grad_(False)
    torch.nn.init.xavier_uniform_(embeddings.patch_embeddings.projection.weight.flatten(1))
    for module in vit.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    return vit


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation within each row [B, N], averaged over the rows; ties count by position."""
    ranks = [x.double().argsort(dim=1, stable=True).argsort(1).double() for x in (one, other)]
    ranks = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    norms = ranks[0].norm(dim=1) * ranks[1].norm(dim=1)
    return float(((ranks[0] * ranks[1]).sum(1) / norms).mean())


def forecast(seed: int, norm_pix: bool) -> dict[str, float]:
    """How the forecast and the variance of a patch rank the true losses of held-out crops."""
    source = load_images("photographs", size=24, crops=2048, seed=seed)
    model = train(source, seed, 4, ARMS["easy to hard"], norm_pix)
    batch = source.evaluation("held_out").batch(torch.arange(256))
    with torch.no_grad():
        return ranking(model, batch, seed)


def ranking(model: MaskedTraining, batch: Mapping[str, Tensor], seed: int) -> dict[str, float]:
    """The correlations of one model on one batch, and how much harder its masks are."""
    layout = Layout.of(model.backbone, batch)
    signals = model.bound.signals(batch)
    generator = torch.Generator().manual_seed(seed)
    total, looks, ranked = 0.0, 0.0, []
    for _ in range(LOOKS):
        mask = _mask("random", layout, {}, generator)
        outputs = model.bound(batch, mask).outputs
        hidden = (~mask.flatten().keep).double()
        total, looks = total + outputs["patch_error"] * hidden, looks + hidden
        pair = (mask.flatten().gather_hidden(outputs[name]) for name in ("patch_loss", "patch_error"))
        ranked.append(spearman(*pair))
    error = total / looks.clamp(min=1)
    variance = patchify(batch["pixels"], 4).var(-1)

    def hidden_error(mask: Mask) -> float:
        return float(model.bound(batch, mask).parts["pixels"])

    harder = hidden_error(_mask("hard-patches", layout, signals, generator))
    random = hidden_error(_mask("random", layout, {}, generator))
    return {
        "teacher's forecast and loss (Spearman)": spearman(signals["patch_loss"], error),
        "patch variance and loss (Spearman)": spearman(variance, error),
        "student's forecast and loss, hidden patches (Spearman)": sum(ranked) / LOOKS,
        "loss on hard masks / on random masks": harder / random,
    }


def probes(seed: int, alpha: tuple[float, float]) -> dict[str, float]:
    """Accuracy of probes on the mean patch feature of held-out digits."""
    source = load_images("digits", size=12, channels=1, seed=seed)
    model = train(source, seed, 2, alpha)
    features, labels = [], []
    for split in ("train", "held_out"):
        images = source.evaluation(split)
        batch = images.batch(torch.arange(len(images)))
        vit = model.backbone
        with torch.no_grad():
            tokens = vit.patches(batch["pixels"]) + vit.positions
            encoded = vit.encode(torch.cat([vit.prefix(len(tokens)), tokens], dim=1))
        features.append(encoded[:, 1:].mean(1))
        labels.append(batch["labels"])
    given = features[0], labels[0], features[1], labels[1]
    return {"kNN accuracy": knn_accuracy(*given), "linear accuracy": linear_accuracy(*given)}


def measure(seed: int) -> Mapping[str, float]:
    """Two forecasts on photographs, three pretrainings on digits."""
    numbers = {}
    for name, norm_pix in (("raw pixels", False), ("normalised pixels", True)):
        numbers |= {f"{name}: {what}": value for what, value in forecast(seed, norm_pix).items()}
    for name, alpha in ARMS.items():
        numbers |= {f"{name}: {what}": value for what, value in probes(seed, alpha).items()}
    return numbers


def decide(measurements: Sequence[Mapping[str, float]]) -> bool:
    """The criterion in code."""

    def mean(name: str) -> float:
        return sum(one[name] for one in measurements) / len(measurements)

    ranks = all(one["raw pixels: teacher's forecast and loss (Spearman)"] > 0.1 for one in measurements)
    harder = all(one["raw pixels: loss on hard masks / on random masks"] > 1 for one in measurements)
    helps = mean("easy to hard: kNN accuracy") >= mean("random: kNN accuracy")
    return ranks and harder and helps


def _mask(name: str, layout: Layout, signals: Mapping[str, Tensor], generator: torch.Generator) -> Mask:
    strategy = maskwright.create("mask-strategy", name)
    return strategy.draw(layout, signals=signals, progress=1.0, generator=generator)


CLAIM = Claim(
    statement="the teacher's forecast ranks the true losses of unseen images, masks drawn by it are harder, and going from easy "
    "to hard helps the features",
    baseline="a Spearman correlation of 0, random masks under the same weights, and random masks in pretraining; beside them the "
    "patch's own variance as a predictor, and α = 1 throughout",
    criterion="raw pixels: Spearman above 0.1 and loss ratio above 1 in every seed; mean kNN accuracy of easy to hard at least "
    "that of random",
    measure=measure,
    decide=decide,
    paper="ViT-B/16 on ImageNet, 200 epochs, fine-tuned: MAE 82.2 %, HPM 83.0 %",
    note="ViT of width 48 and depth 3; crops of 24 pixels of two photographs for the forecast, 1,437 digits for the probes; "
    "300 steps of 32; the teacher's decays are scaled so that its memory is the paper's share of the training. The size and "
    "the initialisation were chosen after looks at seeds 8 and 9. The ranking holds in every seed and easy to hard is level with random; what fails is the "
    "middle: the masks are not reliably harder, for a teacher trained at mask tokens and asked at visible ones is a weak guide "
    "after so few steps",
)
