"""Pixels of hidden patches, regressed by a one-layer head from an encoder that sees every position."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import Batch, BoundObjective, Loss, Mask, Signals, adapt
from maskwright.errors import MaskShapeError
from maskwright.toolkit.distributed import mean_over_processes
from maskwright.toolkit.images import patchify
from maskwright.toolkit.selection import at_visible

EPSILON = 1e-5
"""Added to the number of hidden pixels, so that an empty mask costs exactly nothing."""


def replace_hidden(embeddings: Tensor, token: Tensor, hidden: Tensor) -> Tensor:
    """x · (1 - w) + t · w: the token [D] in place of the embeddings [B, N, D] where `hidden` bool [B, N] (section 3.2).

    Written as a choice, so that not even an infinite hidden pixel gets through.
    """
    return torch.where(hidden[..., None], token, embeddings)


def hidden_l1(prediction: Tensor, target: Tensor, hidden: Tensor, count: Tensor | None = None) -> Tensor:
    """Σ |x - x̂| · m / (Σ m + 1e-5) / C over the whole batch (equation 1, and the official code's constants).

    `prediction`, `target` [B, C, H, W]; `hidden` bool [B, 1, H, W]. `count` stands for Σ m, the hidden pixels, when the
    batch is only a part of the global one.
    """
    pixels = (hidden.sum() if count is None else count).to(target.dtype)
    return ((prediction - target).abs() * hidden).sum() / (pixels + EPSILON) / target.shape[1]


@attrs.frozen
class SimMim:
    """Raw pixels of hidden patches in L1, from a linear head on an encoder that sees a token where patches are hidden.

    Xie et al., arXiv:2111.09886. The encoder runs on every position, so that any mask will do, with unequal counts too, and any
    encoder of patches, Swin too.
    """

    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "simmim"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    provides: ClassVar[frozenset[str]] = frozenset()
    backbone: ClassVar[str] = "grid"
    default_strategy: ClassVar[str] = "simmim-blocks"

    def bind(self, backbone: nn.Module) -> BoundSimMim:
        """A mask token and a head on a GridBackbone (or a model that has an adapter)."""
        return BoundSimMim(adapt(backbone, self.backbone))


class BoundSimMim(BoundObjective):
    """`encode`, `head` and `hidden_l1`, one after the other.

    Outputs: `features`, the encoder's outputs at visible positions, [B, K, D], or [ΣK, D] where images keep unequal
    numbers (where one stands for several patches, at those with a visible one); `prediction` [B, N, p·p·C], every patch's
    predicted pixels in the order of `toolkit.images.patchify`; in evaluation mode `reconstruction` [B, C, H, W], the visible
    patches as they are and the predicted ones.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        # A plain vector: optimisers that spare vectors from weight decay spare it, as the official one does.
        self.mask_token = nn.Parameter(torch.empty(backbone.width))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        # A hierarchical encoder gives one feature for several patches: the paper's Swin one for 32 × 32 pixels.
        stride = getattr(backbone, "feature_stride", backbone.patch_size)
        width = getattr(backbone, "feature_width", backbone.width)
        self.merged = stride // backbone.patch_size
        self.head = nn.Sequential(nn.Conv2d(width, stride**2 * backbone.channels, 1), nn.PixelShuffle(stride))

    def encode(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        """[B, C, H, W], bool [B, N] → [B, N', D']: the encoder on every position, hidden ones replaced."""
        tokens = self.backbone.patches(pixels)
        if hidden.shape != tokens.shape[:2]:
            raise MaskShapeError(
                f"simmim: the mask has {list(hidden.shape)} positions (rows, N), the images {list(tokens.shape[:2])}; "
                "draw it with Layout.of(backbone, batch)."
            )
        # Before the positions: a hidden patch still says where it is.
        tokens = replace_hidden(tokens, self.mask_token, hidden) + self.backbone.positions
        prefix = self.backbone.prefix(len(tokens))
        return self.backbone.encode(torch.cat([prefix, tokens], dim=1))[:, prefix.shape[1] :]

    def seen(self, grid: Mask) -> Tensor:
        """bool [B, rows, columns] of the features: where one of their patches is visible."""
        if self.merged == 1:
            return grid.keep
        return nn.functional.max_pool2d(grid.keep[:, None].float(), self.merged)[:, 0] > 0

    def forward(
        self,
        batch: Batch,
        mask: Mask,
        *,
        signals: Signals | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Loss:
        """Mean absolute error of hidden pixels. Any mask [B, *grid]; one denominator for the global batch."""
        pixels, keep = batch["pixels"], mask.flatten().keep
        encoded = self.encode(pixels, ~keep)
        places = tuple(side // self.merged for side in self.backbone.grid)
        predicted = self.head(encoded.transpose(1, 2).unflatten(2, places))
        grid = Mask(keep.unflatten(1, tuple(self.backbone.grid)))
        hidden = ~grid.upsample(tuple(pixels.shape[-2:])).keep[:, None]
        count = mean_over_processes(hidden.sum()) if self.training else hidden.sum()
        loss = hidden_l1(predicted, pixels, hidden, count)
        outputs = {
            "prediction": patchify(predicted, self.backbone.patch_size),
            "features": at_visible(encoded, self.seen(grid).flatten(1)),
        }
        if not self.training:
            outputs["reconstruction"] = torch.where(hidden, predicted, pixels).detach()
        return Loss(total=loss, parts={"pixels": loss}, outputs=outputs)
