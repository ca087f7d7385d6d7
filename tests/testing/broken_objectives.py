"""Objectives that keep every rule, and for each rule one that breaks it and no other."""

import os
from typing import ClassVar

import attrs
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from maskwright import BoundObjective, Loss, adapt
from maskwright.errors import BackboneMismatch
from maskwright.toolkit.images import patchify
from maskwright.toolkit.teachers import follow, teacher_of


class BoundRight(BoundObjective):
    """Mask tokens in the encoder, a linear head, and a teacher that says how hard each patch is."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.width))
        self.head = nn.Linear(backbone.width, backbone.patch_size**2 * backbone.channels)
        self.teacher = teacher_of(backbone)

    @torch.no_grad()
    def signals(self, batch):
        return {"patch_loss": self.features(self.teacher, batch["pixels"], None).square().mean(-1)}

    def features(self, backbone, pixels, hidden):
        tokens = backbone.patches(pixels)
        if hidden is not None:
            tokens = torch.where(hidden[..., None], self.mask_token, tokens)
        prefix = backbone.prefix(len(tokens))
        encoded = backbone.encode(torch.cat([prefix, tokens + backbone.positions], dim=1))
        return encoded[:, prefix.shape[1] :]

    def forward(self, batch, mask, *, signals=None, progress=1.0, generator=None):
        hidden = ~mask.flatten().keep
        features = self.features(self.backbone, batch["pixels"], hidden)
        prediction = self.predict(features, batch, generator)
        error = (prediction - patchify(batch["pixels"], self.backbone.patch_size)).square().mean(-1)
        pixels = (error * hidden).sum() / self.count(hidden)
        small = 0.1 * features.square().mean()
        return self.loss(pixels, small, {"features": features, "prediction": prediction})

    def predict(self, features, batch, generator):
        return self.head(features)

    def count(self, hidden):
        return hidden.sum().clamp(min=1)

    def loss(self, pixels, small, outputs):
        return Loss(pixels + small, {"pixels": pixels, "small": small}, outputs)

    def after_step(self, progress):
        follow(self.teacher, self.backbone, 0.9)


@attrs.frozen
class Right:
    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "right"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    provides: ClassVar[frozenset[str]] = frozenset({"patch_loss"})
    backbone: ClassVar[str] = "patch"
    bound: ClassVar[type] = BoundRight

    def bind(self, backbone):
        return self.bound(adapt(backbone, self.backbone))


class BoundNextToken(BoundObjective):
    """Tokens from those before them; hidden tokens are replaced by the mask token."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def inputs(self, tokens, mask):
        return torch.where(mask.keep, tokens, self.backbone.mask_token)

    def forward(self, batch, mask, *, signals=None, progress=1.0, generator=None):
        logits = self.backbone.logits(self.inputs(batch["tokens"], mask))
        prediction = self.aligned(logits)
        loss = cross_entropy(prediction.flatten(0, 1), batch["tokens"][:, 1:].flatten())
        return Loss(loss, {"tokens": loss}, {"prediction": prediction})

    def aligned(self, logits):
        return logits[:, :-1]


@attrs.frozen
class NextToken:
    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "next"
    modalities: ClassVar[frozenset[str]] = frozenset({"text"})
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    provides: ClassVar[frozenset[str]] = frozenset()
    backbone: ClassVar[str] = "token"
    causal: ClassVar[bool] = True
    bound: ClassVar[type] = BoundNextToken

    def bind(self, backbone):
        backbone = adapt(backbone, "token")
        if not backbone.shift:
            raise BackboneMismatch("next needs a causal model.")
        return self.bound(backbone)


class BoundMaskedTokens(BoundNextToken):
    def forward(self, batch, mask, *, signals=None, progress=1.0, generator=None):
        prediction = self.backbone.logits(self.inputs(batch["tokens"], mask))
        each = cross_entropy(prediction.transpose(1, 2), batch["tokens"], reduction="none")
        loss = (each * ~mask.keep).sum() / (~mask.keep).sum().clamp(min=1)
        return Loss(loss, {"tokens": loss}, {"prediction": prediction})


@attrs.frozen
class MaskedTokens(NextToken):
    causal: ClassVar[bool] = False
    bound: ClassVar[type] = BoundMaskedTokens

    def bind(self, backbone):
        return self.bound(adapt(backbone, "token"))


class BoundDenoising(BoundObjective):
    """Noise on everything, an error on what is hidden: the generator is used."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, batch, mask, *, signals=None, progress=1.0, generator=None):
        pixels = batch["pixels"]
        hidden = (~mask).upsample(tuple(pixels.shape[2:])).keep[:, None]
        noise = torch.randn(pixels.shape, generator=generator)
        time = torch.rand(len(pixels), generator=generator)
        shown = torch.where(hidden, noise, pixels)
        prediction = self.backbone(shown, time)
        error = (prediction - pixels).square() * hidden
        loss = error.sum() / hidden.expand_as(error).sum().clamp(min=1)
        return Loss(loss, {"noise": loss}, {"prediction": patchify(prediction, self.backbone.patch_size)})


@attrs.frozen
class Denoising(Right):
    provides: ClassVar[frozenset[str]] = frozenset()
    backbone: ClassVar[str] = "denoiser"
    bound: ClassVar[type] = BoundDenoising


class BoundConvolutional(BoundObjective):
    """The hidden cells of an image are grey, and are predicted from the last map."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(backbone.widths[-1], backbone.channels, 1)

    def forward(self, batch, mask, *, signals=None, progress=1.0, generator=None):
        pixels, labels = batch["pixels"], batch["labels"]
        keep = mask.upsample(tuple(pixels.shape[2:])).keep[:, None]
        maps = self.backbone.stem(pixels * keep)
        for stage in self.backbone.stages:
            maps = stage(maps)
        prediction = self.head(maps)
        target = nn.functional.adaptive_avg_pool2d(pixels, prediction.shape[2:])
        error = (prediction - target).square().mean(1) * ~mask.keep * (1 + labels)[:, None, None]
        loss = error.sum() / (~mask.keep).sum().clamp(min=1)
        features = maps.flatten(2).transpose(1, 2)
        return Loss(loss, {"pixels": loss}, {"features": features})


@attrs.frozen
class Convolutional(Right):
    provides: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset({"pixels", "labels"})
    backbone: ClassVar[str] = "conv"
    bound: ClassVar[type] = BoundConvolutional


class TinyGraph(nn.Module):
    """A backbone of a kind that the kit does not know."""

    def __init__(self):
        super().__init__()
        self.grid = (6,)
        self.layer = nn.Linear(3, 3)

    def forward(self, nodes):
        return self.layer(nodes) + self.layer(nodes).mean(1, keepdim=True)


class BoundGraph(BoundObjective):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, batch, mask, *, signals=None, progress=1.0, generator=None):
        prediction = self.backbone(batch["nodes"] * mask.keep[..., None])
        loss = ((prediction - batch["nodes"]).square().mean(-1) * ~mask.keep).sum() / len(mask.keep)
        return Loss(loss, {"nodes": loss}, {"prediction": prediction})


@attrs.frozen
class Graph(Right):
    """Everything that the kit does not have is on the class."""

    needs: ClassVar[frozenset[str]] = frozenset({"nodes"})
    provides: ClassVar[frozenset[str]] = frozenset()
    backbone: ClassVar[str] = "graph"
    bound: ClassVar[type] = BoundGraph

    def bind(self, backbone):
        return BoundGraph(backbone)

    @staticmethod
    def example_backbone(seed):
        return TinyGraph()

    @staticmethod
    def example_batch(backbone, rows, generator):
        return {"nodes": torch.randn(rows, 6, 3, generator=generator)}

    @staticmethod
    def example_mask(layout, generator):
        from maskwright.toolkit.selection import random_mask

        return random_mask(layout, 3, generator)

    @staticmethod
    def other_hidden_content(batch, mask, generator):
        other = torch.randn(batch["nodes"].shape, generator=generator)
        return {"nodes": torch.where(mask.keep[..., None], batch["nodes"], other)}


# -- one rule broken -------------------------------------------------------------------------------------------


def objective(name, bound, base=Right, **attributes):
    """A subclass of `base` in this module whose bound form is `bound`."""
    made = attrs.frozen(type(name, (base,), {"bound": bound, "__module__": __name__, **attributes}))
    globals()[name] = made
    return made


class RefusesAll(Right):
    def bind(self, backbone):
        raise BackboneMismatch("no backbone is good enough.")


class HoldsNoBackbone(Right):
    def bind(self, backbone):
        bound = super().bind(backbone)
        bound.backbone = None
        return bound


class TakesAnything(Right):
    def bind(self, backbone):
        try:
            return super().bind(backbone)
        except BackboneMismatch as error:
            raise AttributeError(f"{type(backbone).__name__} has no attribute 'patches'") from error


class ReadsMore(BoundRight):
    def forward(self, batch, mask, **others):
        batch["labels"]
        return super().forward(batch, mask, **others)


class ReturnsATensor(BoundRight):
    def loss(self, *parts):
        return super().loss(*parts).total


class Infinite(BoundRight):
    def loss(self, pixels, small, outputs):
        return super().loss(pixels / 0, small, outputs)


class ForgetsAWeight(BoundRight):
    def loss(self, pixels, small, outputs):
        return Loss(pixels + 0.5 * small, {"pixels": pixels, "small": small}, outputs)


class DividesByTheHidden(BoundRight):
    def count(self, hidden):
        return hidden.sum()


class RootOfNothing(BoundRight):
    """A finite loss whose gradient is not, when nothing is hidden."""

    def loss(self, pixels, small, outputs):
        return super().loss(pixels.sqrt(), small, outputs)


class AssumesEqualCounts(BoundRight):
    def forward(self, batch, mask, **others):
        torch.stack([row.nonzero() for row in mask.keep.flatten(1)])
        return super().forward(batch, mask, **others)


class Gathers(BoundRight):
    def forward(self, batch, mask, **others):
        mask.visible_indices()
        return super().forward(batch, mask, **others)


class Detaches(BoundRight):
    def features(self, backbone, pixels, hidden):
        if hidden is None:
            return super().features(backbone, pixels, hidden)
        return super().features(backbone, pixels, hidden).detach() + self.mask_token


class Idle(BoundRight):
    def __init__(self, backbone):
        super().__init__(backbone)
        self.projector = nn.Linear(4, 4)


class TrainsItsTeacher(BoundRight):
    def __init__(self, backbone):
        super().__init__(backbone)
        self.teacher.requires_grad_(True)

    def loss(self, pixels, small, outputs):
        mine = sum(one.square().sum() for one in self.teacher.parameters())
        return super().loss(pixels, small + 1e-3 * mine, outputs)


class FollowsTooEarly(BoundRight):
    def loss(self, *parts):
        follow(self.teacher, self.backbone, 0.9)
        return super().loss(*parts)


class FollowsTheTeacher(BoundRight):
    def after_step(self, progress):
        follow(self.backbone, self.teacher, 0.9)


class MasksAfterTheEncoder(BoundRight):
    """What is hidden was attended to."""

    def features(self, backbone, pixels, hidden):
        features = super().features(backbone, pixels, None)
        return features if hidden is None else features + hidden[..., None] * self.mask_token


class PeeksAtTheTarget(BoundRight):
    """Only the prediction knows the hidden pixels."""

    def predict(self, features, batch, generator):
        return self.head(features) + 0.1 * batch["pixels"].mean((1, 2, 3))[:, None, None]


class ShowsNothing(BoundRight):
    def loss(self, pixels, small, outputs):
        return super().loss(pixels, small, {})


class PredictsItsInput(BoundNextToken):
    """Aligned with the token that was given, not with the next one."""

    def aligned(self, logits):
        return logits[:, 1:]


class LooksAhead(BoundNextToken):
    def aligned(self, logits):
        return logits[:, :-1] + 0.1 * logits.mean(1, keepdim=True)


class KeepsTokensVisible(BoundMaskedTokens):
    def inputs(self, tokens, mask):
        return tokens


class ShowsAConstant(BoundRight):
    def loss(self, pixels, small, outputs):
        return super().loss(pixels, small, {**outputs, "features": torch.zeros_like(outputs["features"])})


class OtherSignals(BoundRight):
    def signals(self, batch):
        return {"hardness": super().signals(batch)["patch_loss"]}


class SignalsOfRows(BoundRight):
    def signals(self, batch):
        return {"patch_loss": super().signals(batch)["patch_loss"].mean(1)}


class SignalsWithGradient(BoundRight):
    def signals(self, batch):
        return {"patch_loss": self.features(self.backbone, batch["pixels"], None).square().mean(-1)}


class OtherRandomness(BoundRight):
    def loss(self, pixels, small, outputs):
        return super().loss(pixels + int.from_bytes(os.urandom(2), "big"), small, outputs)


class MovesTheGlobalState(BoundRight):
    def loss(self, *parts):
        torch.rand(1)
        return super().loss(*parts)


class ForgetsItsDirection(BoundRight):
    def __init__(self, backbone):
        super().__init__(backbone)
        self.direction = torch.randn(self.head.out_features)

    def predict(self, features, batch, generator):
        return self.head(features) + self.direction


class ClampsTheBatch(BoundRight):
    def forward(self, batch, mask, **others):
        batch["pixels"].clamp_(-1, 1)
        return super().forward(batch, mask, **others)


class CountsRows(BoundRight):
    def predict(self, features, batch, generator):
        return self.head(features) * torch.arange(1, len(features) + 1)[:, None, None]


class Changeable(Right):
    anything = 0

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)


Equal = objective("Equal", Gathers, counts="exact")

RIGHT = (Right, Equal, NextToken, MaskedTokens, Denoising, Convolutional, Graph)
BROKEN = [
    ("binds-to-its-kind-of-backbone", RefusesAll),
    ("binds-to-its-kind-of-backbone", HoldsNoBackbone),
    ("other-backbones-are-refused", TakesAnything),
    ("needed-columns-are-enough", objective("NeedsMore", ReadsMore)),
    ("needed-columns-are-enough", objective("Tensors", ReturnsATensor)),
    ("loss-is-finite", objective("Endless", Infinite)),
    ("parts-sum-to-the-total", objective("Unequal", ForgetsAWeight)),
    ("extreme-masks-are-survived", objective("Divides", DividesByTheHidden)),
    ("extreme-masks-are-survived", objective("Roots", RootOfNothing)),
    ("unequal-counts-are-taken-or-refused", objective("Assumes", AssumesEqualCounts)),
    ("unequal-counts-are-taken-or-refused", objective("Unsaid", Gathers)),
    ("unequal-counts-are-taken-or-refused", objective("Said", BoundRight, counts="exact")),
    ("gradients-reach-the-backbone", objective("Frozen", Detaches)),
    ("own-parameters-are-trained", objective("Unused", Idle)),
    ("teacher-receives-no-gradient", objective("Trains", TrainsItsTeacher)),
    ("teacher-receives-no-gradient", objective("Early", FollowsTooEarly)),
    ("after-step-leaves-the-student", objective("Backwards", FollowsTheTeacher)),
    ("hidden-content-does-not-leak", objective("Late", MasksAfterTheEncoder)),
    ("hidden-content-does-not-leak", objective("Peeks", PeeksAtTheTarget)),
    ("hidden-content-does-not-leak", objective("Silent", ShowsNothing)),
    ("hidden-content-does-not-leak", objective("OneTooFar", PredictsItsInput, NextToken)),
    ("hidden-content-does-not-leak", objective("Ahead", LooksAhead, NextToken)),
    ("hidden-content-does-not-leak", objective("Open", KeepsTokensVisible, MaskedTokens)),
    ("visible-content-is-seen", objective("Constant", ShowsAConstant)),
    ("every-column-is-used", objective("Greedy", BoundRight, needs=frozenset({"pixels", "labels"}))),
    ("signals-are-as-declared", objective("Others", OtherSignals)),
    ("signals-are-as-declared", objective("Rows", SignalsOfRows)),
    ("signals-are-as-declared", objective("Attached", SignalsWithGradient)),
    ("same-generator-same-loss", objective("Wild", OtherRandomness)),
    ("global-random-state-is-untouched", objective("Global", MovesTheGlobalState)),
    ("state-dict-holds-everything", objective("Forgets", ForgetsItsDirection)),
    ("batch-and-mask-are-left-alone", objective("Writes", ClampsTheBatch)),
    ("rows-move-with-the-batch", objective("Counts", CountsRows)),
    ("component-is-frozen", Changeable),
]
