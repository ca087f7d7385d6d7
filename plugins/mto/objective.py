"""Recalibrated attention and three auxiliary losses around the objective that holds the mask tokens.

The formulas are a reading of the paper's abstract and of summaries, not the paper's own (see README.md). Symbols: A^l are the
attention weights of layer l = 0 … L-1 of a network that holds mask tokens, X^l the tokens that the layer reads (X^0 the initial
embedding), M the masked and V the visible tokens, l0 the first layer that is not early.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import (
    Batch,
    BoundObjective,
    Layout,
    Loss,
    Mask,
    Objective,
    Signals,
    adapt,
    component,
    setting,
)
from maskwright.errors import BackboneMismatch, BadParameter
from maskwright.toolkit.calibration import evaluating
from maskwright.toolkit.interception import AttentionCall, intercepted

HAVE_MASK_TOKENS = "such as 'simmim' (in the encoder), 'mae' or 'hpm' (in the decoder)"


# -- the equations -----------------------------------------------------------------------------------------------


def keep_factor(layer: int, first_late: float) -> float:
    """κ_l = min(1, l / l0): 0 in the first layer, 1 from l0 on."""
    return 1.0 if layer >= first_late else layer / first_late


def recalibration(hidden: Tensor, keep: float) -> Tensor:
    """What is added to the logits: ln κ in visible rows and masked columns, 0 elsewhere. bool [B, T] → [B, 1, T, T].

    After softmax A'_{v,m} ∝ κ · A_{v,m}, and rows sum to 1; κ = 0 gives -inf. Masked rows stay as they are.
    """
    towards_visible = ~hidden[:, None, :, None] & hidden[:, None, None, :]
    factor = math.log(keep) if keep > 0 else -math.inf
    return torch.zeros_like(towards_visible, dtype=torch.float32).masked_fill(towards_visible, factor)


def mean_per_sample(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the chosen places of each sample, then over the samples that have any: [B, T] and bool [B, T] → []."""
    counts = chosen.sum(1)
    each = (values * chosen).sum(1) / counts.clamp(min=1)
    return each.sum() / (counts > 0).sum().clamp(min=1)


def sparsity_loss(weights: Tensor, hidden: Tensor) -> Tensor:
    """L_spa of one layer: mean over heads and visible rows of Σ_m A_{v,m}. [B, H, T, T], bool [B, T] → []."""
    towards_masked = (weights * hidden[:, None, None, :]).sum(-1).mean(1)
    return mean_per_sample(towards_masked, ~hidden)


def entropy_loss(weights: Tensor, hidden: Tensor) -> Tensor:
    """L_r of one layer: mean over heads and masked rows of -Σ_j A_{m,j} ln A_{m,j} / ln T. [B, H, T, T], bool [B, T] → []."""
    return mean_per_sample(entropy(weights).mean(1) / max(math.log(weights.shape[-1]), 1e-9), hidden)


def heterogeneity(tokens: Tensor, hidden: Tensor) -> Tensor:
    """H_l in [0, 1]: the entropy of p_m = softmax over v of ⟨x_m, x_v⟩ / √D, over ln |V|. [B, T, D], bool [B, T] → [].

    1: mask tokens are singular, related to no visible token in particular; so they are where fewer than two are visible, and
    where there are none.
    """
    tokens = tokens.float()
    scores = (tokens * tokens.shape[-1] ** -0.5) @ tokens.mT
    # A finite number, so that a row without visible tokens has a gradient.
    related = scores.masked_fill(hidden[:, None, :], torch.finfo(scores.dtype).min).softmax(-1)
    visible = (~hidden).sum(1)
    share = entropy(related) / visible.clamp(min=2).log()[:, None]
    lacking = torch.where((visible >= 2)[:, None], 1 - share, 0.0)
    return 1 - mean_per_sample(lacking, hidden)


def entropy(weights: Tensor) -> Tensor:
    """-Σ w ln w over the last axis, with 0 · ln 0 = 0 and a finite gradient there."""
    return torch.special.entr(weights.clamp(min=torch.finfo(weights.dtype).tiny)).sum(-1)


# -- the component -----------------------------------------------------------------------------------------------


@attrs.frozen
class MaskedTokenOptimization:
    """Mask tokens kept out of early layers' sums of visible tokens and apart from them, around any objective that has them.

    Choi et al., arXiv:2404.08330, with reconstructed formulas: every knob below is this project's. Works on objectives on patch
    backbones whose mask tokens meet visible ones in an attention of torch: in the encoder or in a decoder.
    """

    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "mto"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    backbone: ClassVar[str] = "patch"

    inner: Objective = component("objective", "simmim", "the objective that is wrapped")
    early: float = setting(0.5, "share of the layers that are early: l0 = early · L", ge=0, le=1)
    recalibrate: bool = setting(True, "weaken what visible tokens take from mask tokens in early layers")
    lambda_spa: float = setting(
        0.1, "weight of the attention that visible tokens pay to mask tokens in early layers", ge=0
    )
    lambda_e: float = setting(
        0.1, "weight of the likeness of mask tokens to single visible ones in early layers", ge=0
    )
    lambda_r: float = setting(0.1, "weight of the entropy of mask tokens' attention in late layers", ge=0)

    def __attrs_post_init__(self) -> None:
        if self.inner.backbone not in (self.backbone, "grid"):
            raise BadParameter(
                f"mto: the objective {self.inner.name!r} works on a {self.inner.backbone!r} backbone, not on image patches; wrap "
                f"one that has mask tokens among patches, {HAVE_MASK_TOKENS}."
            )

    @property
    def needs(self) -> frozenset[str]:
        """Those of the wrapped objective."""
        return self.inner.needs

    @property
    def provides(self) -> frozenset[str]:
        """Those of the wrapped objective."""
        return self.inner.provides

    @property
    def counts(self) -> str:
        """As the wrapped objective has it."""
        return str(getattr(self.inner, "counts", "any"))

    @property
    def disjoint_rows(self) -> int:
        """As the wrapped objective has it."""
        return int(getattr(self.inner, "disjoint_rows", 1))

    def bind(self, backbone: nn.Module) -> BoundMaskedTokenOptimization:
        """The wrapped objective, bound, and the layers that hold its mask tokens: found by running it on two noise images.

        Raises `BadParameter` when it has no mask tokens, and `BackboneMismatch` when no attention of it is torch's.
        """
        inner = self.inner.bind(adapt(backbone, self.backbone))
        return BoundMaskedTokenOptimization(self, inner, layers_with_mask_tokens(self.inner, inner))


@attrs.frozen
class Place:
    """Where an attention stands: layer `index` of the `depth` of its network."""

    index: int
    depth: int


Places = Mapping[tuple[str, int], Place]
"""By block and ordinal of an `AttentionCall`."""


def layers_with_mask_tokens(objective: Objective, bound: BoundObjective) -> dict[tuple[str, int], Place]:
    """The attentions of the networks that mask tokens enter.

    Two images of noise under one mask tell: what stands for a hidden patch has no content, so that its key in the first layer is
    the same for both images, and only there. Blocks whose names differ in their numbers only are the layers of one network.
    """
    with evaluating(bound), torch.no_grad():
        batch, mask = _example(objective, bound)
        signals = bound.signals(batch)
        hidden = ~mask.flatten().keep[0]
        networks: dict[tuple[str, int], list[tuple[str, int]]] = {}
        chosen = []

        def visit(call: AttentionCall) -> Tensor:
            network = re.sub(r"\d+", "*", call.block), call.ordinal
            if network not in networks and _holds_mask_tokens(call, hidden):
                chosen.append(network)
            networks.setdefault(network, []).append((call.block, call.ordinal))
            return call.attend()

        with intercepted(bound, visit):
            bound(batch, mask, signals=signals, generator=_generator(hidden.device))
    if not networks:
        raise BackboneMismatch(
            f"mto: no attention of {objective.name!r} on this backbone is computed by torch's scaled_dot_product_attention or "
            'MultiheadAttention; load a model of transformers with attn_implementation="sdpa".'
        )
    if not chosen:
        raise BadParameter(
            f"mto: the objective {objective.name!r} has no mask tokens in an attention with visible ones, so there is nothing to "
            f"recalibrate; wrap one that has them, {HAVE_MASK_TOKENS}."
        )
    return {
        call: Place(index, len(networks[network]))
        for network in chosen
        for index, call in enumerate(networks[network])
    }


def _holds_mask_tokens(call: AttentionCall, hidden: Tensor) -> bool:
    batch, _, length, _ = call.key.shape
    prefix = length - len(hidden)
    tokens = call.tokens
    if (
        batch != 2
        or prefix < 0
        or call.query.shape[2] != length
        or tokens is None
        or tokens.shape[:2] != (2, length)
    ):
        return False
    far = (call.key[0] - call.key[1]).abs().amax((0, 2))
    return torch.equal(far[prefix:] <= 1e-5 * call.key.abs().max(), hidden)


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(0)


def _example(objective: Any, bound: BoundObjective) -> tuple[dict[str, Tensor], Mask]:
    """Two rows of noise and a mask that hides the same irregular half of both."""
    backbone = bound.backbone
    weight = next(bound.parameters())
    generator = _generator(weight.device)
    if hasattr(objective, "example_batch"):
        batch = dict(objective.example_batch(backbone, 2, generator))
    else:
        sides = [side * backbone.patch_size for side in backbone.grid]
        noise = partial(torch.randn, 2, backbone.channels, *sides, generator=generator, device=weight.device)
        if others := sorted(name for name in objective.needs if not name.startswith("pixels")):
            raise BadParameter(
                f"mto cannot make an example of the batch column {others[0]!r} to find the mask tokens of {objective.name!r}; give "
                "its class a static method `example_batch(backbone, rows, generator)`."
            )
        batch = {name: noise(dtype=weight.dtype) for name in sorted(objective.needs)}
    layout = Layout.of(backbone, batch)
    if hasattr(objective, "example_mask"):
        keep = objective.example_mask(layout, generator).keep
    else:
        order = torch.rand(layout.positions, generator=generator, device=layout.device).argsort()
        keep = (order < max(1, layout.positions // 2)).view(1, *layout.grid)
    return batch, Mask(keep[:1].expand(2, *keep.shape[1:]).contiguous())


class BoundMaskedTokenOptimization(BoundObjective):
    """`inner` is the wrapped objective, `places` the attentions that hold its mask tokens.

    Outputs are the wrapped objective's; in evaluation mode also `heterogeneity` [layers], H of every such layer.
    """

    def __init__(self, settings: MaskedTokenOptimization, inner: BoundObjective, places: Places) -> None:
        super().__init__()
        self.settings = settings
        self.inner = inner
        self.places = places

    @property
    def backbone(self) -> Any:
        """The wrapped objective's."""
        return self.inner.backbone

    def signals(self, batch: Batch) -> Signals:
        """The wrapped objective's."""
        return self.inner.signals(batch)

    def after_step(self, progress: float) -> None:
        """The wrapped objective's."""
        self.inner.after_step(progress)

    def forward(
        self,
        batch: Batch,
        mask: Mask,
        *,
        signals: Signals | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Loss:
        """The wrapped loss under recalibrated attention, plus λ_spa · L_spa + λ_e · L_e + λ_r · L_r."""
        of, hidden = self.settings, ~mask.flatten().keep
        found: dict[str, list[tuple[float, Tensor]]] = {
            "l_spa": [],
            "l_e": [],
            "l_r": [],
            "heterogeneity": [],
        }

        def visit(call: AttentionCall) -> Tensor:
            place = self.places.get((call.block, call.ordinal))
            prefix = call.key.shape[2] - hidden.shape[1]
            if place is None or prefix < 0 or call.tokens is None:
                return call.attend()
            # Class and register tokens come first, and count as visible.
            masked = nn.functional.pad(hidden, (prefix, 0))
            first_late = of.early * place.depth
            is_early = place.index < first_late
            if (is_early and of.lambda_e) or not self.training:
                singular = heterogeneity(call.tokens, masked)
                found["heterogeneity"].append((1.0, singular.detach()))
                if is_early and of.lambda_e:
                    found["l_e"].append((1 - place.index / first_late, 1 - singular))
            keep = keep_factor(place.index, first_late) if of.recalibrate else 1.0
            bias = None if keep == 1 else recalibration(masked, keep)
            if not (of.lambda_spa if is_early else of.lambda_r):
                return call.attend(bias)
            logits = call.logits().float()
            weights = logits.softmax(-1)
            if is_early:
                found["l_spa"].append((1.0, sparsity_loss(weights, masked)))
            else:
                found["l_r"].append((1.0, entropy_loss(weights, masked)))
            return call.weigh(weights if bias is None else (logits + bias).softmax(-1))

        with intercepted(self.inner, visit):
            loss = self.inner(batch, mask, signals=signals, progress=progress, generator=generator)
        factors = {"l_spa": of.lambda_spa, "l_e": of.lambda_e, "l_r": of.lambda_r}
        extra = {name: factor * _mean(found[name]) for name, factor in factors.items() if found[name]}
        outputs = dict(loss.outputs)
        if not self.training:
            outputs["heterogeneity"] = torch.stack([value for _, value in found["heterogeneity"]])
        return Loss(total=sum(extra.values(), loss.total), parts={**loss.parts, **extra}, outputs=outputs)


def _mean(weighted: list[tuple[float, Tensor]]) -> Tensor:
    """Over the layers: Σ w · x / Σ w."""
    return torch.stack([weight * value for weight, value in weighted]).sum() / sum(
        weight for weight, _ in weighted
    )
