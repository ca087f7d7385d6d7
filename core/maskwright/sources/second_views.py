"""Two views of what a sample shows: crops and colours that are drawn for each of them on its own.

As in CroCo's data (Weinzaepfel et al., arXiv:2210.10716). Of two crops of one picture, at least half of each is seen in the other
one, which is what CroCo's pairs of rendered views are chosen for.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from maskwright.sources.pictures import Paired, Pictures
from maskwright.sources.randomness import uniforms
from maskwright.sources.views import Views, resized_crops, sizes_of

OVERLAP = 0.5
TRIES = 32
"""Crops proposed for a second view before one is moved towards the first."""

STRENGTH = 0.4
GREY = (0.299, 0.587, 0.114)


@attrs.frozen(eq=False)
class SecondView:
    """How two views of each sample are drawn.

    `crops` is the law of the second one's place, `jitter` says whether colours change, `paired` whether the two are pictures of
    their own.
    """

    crops: Views
    jitter: bool
    paired: bool

    @property
    def words(self) -> str:
        """What there are so many of, for people."""
        return "pairs of images" if self.paired else "images (two crops of each)"

    def draw(
        self,
        pictures: Pictures,
        views: Views,
        indices: Tensor,
        *,
        seed: int,
        epoch: int,
        size: int,
        channels: int,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """`pixels` and `pixels_other_view` float32 [B, C, size, size] in [0, 1], and labels int64 [B].

        The first crop is the one that there is without a second view. Where it is mirrored both are.
        """
        if isinstance(pictures, Paired):
            shown, others, labels = pictures.take_both(indices)
        else:
            shown, labels = pictures.take(indices)
            others = shown
        boxes, mirrored = views(uniforms(seed, epoch, indices, 5), sizes_of(shown))
        tries = 1 if self.paired else TRIES
        u = uniforms(seed, epoch, indices, 5 * tries, stream=2).view(-1, 5)
        proposed = self.crops(u, sizes_of(others).repeat_interleave(tries, 0))[0].view(-1, tries, 4)
        other_boxes = proposed[:, 0] if self.paired else overlapping(boxes, proposed)
        columns = {
            "pixels": resized_crops(shown, boxes, mirrored, size, channels),
            "pixels_other_view": resized_crops(others, other_boxes, mirrored, size, channels),
        }
        if self.jitter:
            columns = {
                name: jittered(pixels, uniforms(seed, epoch, indices, 6, stream=stream))
                for stream, (name, pixels) in enumerate(columns.items(), start=3)
            }
        return columns, labels


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Shared area of boxes [..., 4] (top, left, height, width) as a share of the larger one."""
    low = torch.maximum(one[..., :2], other[..., :2])
    high = torch.minimum(one[..., :2] + one[..., 2:], other[..., :2] + other[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    return shared / torch.maximum(one[..., 2:].prod(-1), other[..., 2:].prod(-1))


def overlapping(boxes: Tensor, proposed: Tensor, least: float = OVERLAP) -> Tensor:
    """The first of the boxes `proposed` [B, T, 4] that overlaps each of `boxes` [B, 4] by `least`.

    Where none does, the one that overlaps most is moved and stretched towards the box in 64ths of the way, until it does.
    """
    shares = overlap(boxes[:, None], proposed)
    enough = shares >= least
    chosen = torch.where(enough.any(1), enough.long().argmax(1), shares.argmax(1))
    best = proposed[torch.arange(len(boxes)), chosen]
    way = torch.linspace(0, 1, 65, dtype=boxes.dtype)[:, None]
    between = torch.lerp(best[:, None], boxes[:, None], way)
    # Rounding must not keep the end of the way, the box itself, from counting.
    reached = (overlap(boxes[:, None], between) >= least).long()
    reached[:, -1] = 1
    return between[torch.arange(len(boxes)), reached.argmax(1)]


def jittered(pixels: Tensor, u: Tensor, strength: float = STRENGTH) -> Tensor:
    """Brightness, contrast and saturation times a factor in 1 ± `strength` each, in an order of each image's own.

    `pixels` [B, C, H, W] in [0, 1], `u` uniform [B, 6]: three factors, and three numbers whose order is the order. Each of the
    three is a blend with a reference (black, the mean grey, the grey image) that is cut to [0, 1] afterwards, as in
    torchvision's ColorJitter.
    """
    factors = (1 + strength * (2 * u[:, :3] - 1)).to(pixels)
    weights = pixels.new_tensor(GREY if pixels.shape[1] == 3 else (1.0,))
    for step in u[:, 3:].argsort(1).unbind(1):
        factor = factors.gather(1, step[:, None])[:, :, None]
        grey = torch.einsum("bchw,c->bhw", pixels, weights)
        which = step[:, None, None]
        reference = torch.where(which == 1, grey.mean((1, 2), keepdim=True), grey).masked_fill_(which == 0, 0)
        # reference + factor · (pixels - reference), with one pass over the colours.
        pixels = torch.addcmul((reference * (1 - factor))[:, None], pixels, factor[..., None]).clamp_(0, 1)
    return pixels
