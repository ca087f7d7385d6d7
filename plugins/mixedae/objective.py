"""Every image of a group, reconstructed from one mixed image by an encoder that has to tell them apart."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import Batch, BoundObjective, Layout, Loss, Mask, Signals, adapt, setting
from maskwright.backbones import takes_attention
from maskwright.errors import BackboneMismatch, OverlappingMasks, UnequalMaskCounts
from maskwright.plugins.mixedae.masks import MixAssignment
from maskwright.toolkit.attention import ScoreRule
from maskwright.toolkit.decoders import DecoderInput, check_heads, initialize_linear, transformer
from maskwright.toolkit.images import fill_hidden, patch_targets
from maskwright.toolkit.selection import keep_largest


def mix(images: Tensor, source: Tensor) -> Tensor:
    """[G, g, C, H, W] → [G, C, H, W]: each patch is that of the image that `source`, int64 [G, rows, columns], names there.

    Patches stay where they are.
    """
    for axis, side in ((1, images.shape[3]), (2, images.shape[4])):
        cells = torch.arange(source.shape[axis], device=source.device)
        source = source.index_select(axis, cells.repeat_interleave(side // source.shape[axis]))
    shape = (len(images), 1, *images.shape[2:])
    return images.gather(1, source[:, None, None].expand(shape))[:, 0]


def unmix(mixed: Tensor, taken: Mask, mask: Mask) -> Tensor:
    """[G, T, D] → [g·G, K, D]: for each image the tokens that are its own.

    `taken` [G, N] has the T positions of any image of a group, `mask` [g·G, N] the K of each image.
    """
    everywhere = taken.scatter_visible(mixed, 0.0)
    return mask.gather_visible(everywhere.repeat_interleave(len(mask.keep) // len(mixed), 0))


def top_keys(scores: Tensor, count: int, prefix: int = 0) -> Tensor:
    """bool [B, H, Q, K]: for each head and query exactly the `count` keys with the highest scores; ties go to the first.

    The first `prefix` positions, class and register tokens, attend to everything and are attended by everything.
    """
    patches = scores[..., prefix:, prefix:]
    keep = torch.ones_like(scores, dtype=torch.bool)
    keep[..., prefix:, prefix:] = keep_largest(patches.flatten(0, 2), count).view(patches.shape)
    return keep


def homologous_attention(count: int, prefix: int = 0) -> ScoreRule:
    """softmax(TopK(q·kᵀ / √d)) · v: who belongs to whom is found in each layer, and told by nobody."""
    return ScoreRule(lambda scores: top_keys(scores, count, prefix))


def homologous_contrast(features: Tensor, source: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Each token's contrastive loss among those of its mixed image, and whether it counts, both [G, T].

    `features` [G, T, D], `source` int64 [G, T]. With s the cosines over the temperature, -mean over the other tokens m of the
    same image of (s_lm - log Σ_{n ≠ l} exp s_ln). A token without another one of its image, or of any other image, does not count.
    """
    directions = nn.functional.normalize(features.float(), dim=-1)
    similarity = directions @ directions.mT / temperature
    itself = torch.eye(source.shape[1], dtype=torch.bool, device=source.device)
    total = similarity.masked_fill(itself, torch.finfo(similarity.dtype).min).logsumexp(-1, keepdim=True)
    same = source[:, :, None] == source[:, None]
    positive = same & ~itself
    count = positive.sum(-1)
    losses = -torch.where(positive, similarity - total, 0.0).sum(-1) / count.clamp(min=1)
    counts = (count > 0) & ~same.all(-1)
    return torch.where(counts, losses, 0.0), counts


def check_masks(mask: Mask, images: int) -> None:
    """Raise unless the masks [B, N] keep equal counts, and no two of `images` consecutive ones the same position."""
    try:
        mask.visible_indices()
    except UnequalMaskCounts as error:
        raise UnequalMaskCounts(
            f"mixedae gives each image the same number of patches of the mixed one. {error}"
        ) from None
    missing = -len(mask.keep) % images
    groups = nn.functional.pad(mask.keep, (0, 0, 0, missing)).unflatten(0, (-1, images))
    if bool((most := groups.sum(1)).gt(1).any()):
        group, position = (int(place) for place in most.gt(1).nonzero()[0])
        raise OverlappingMasks(
            f"mixedae mixes {images} consecutive images, and {int(most[group, position])} of those from row {group * images} on "
            f"keep position {position}; draw the masks with 'mix-assignment' at the same number of images. With several "
            f"processes, the batch of each must be a multiple of {images}."
        )


@attrs.frozen
class MixedAutoencoder:
    """Pixels of several images, predicted from one that is mixed of their patches, by an encoder that has to tell them apart.

    Chen et al., arXiv:2303.17152. Takes masks that do not overlap within `images` consecutive rows and keep the same number in
    each. With one image it is 'mae'; with neither homologous attention nor segments nor contrast it is naive mixing, which the
    paper finds worse than 'mae'.
    """

    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "mixedae"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    provides: ClassVar[frozenset[str]] = frozenset()
    backbone: ClassVar[str] = "patch"
    counts: ClassVar[str] = "exact"
    default_strategy: ClassVar[str] = "mix-assignment"
    exempt: ClassVar[dict[str, str]] = {
        "rows-move-with-the-batch": "an image is mixed with its neighbours in the batch"
    }
    example_parameters: ClassVar[dict[str, int]] = {
        "images": 2,
        "decoder_width": 16,
        "decoder_depth": 1,
        "decoder_heads": 2,
    }

    images: int = setting(4, "images mixed into one: 1 / r for the paper's mixing ratio r", ge=1)
    norm_pix: bool = setting(True, "predict pixels normalised within each patch")
    decoder_width: int = setting(512, "width of the decoder", ge=4)
    decoder_depth: int = setting(8, "blocks of the decoder", ge=1)
    decoder_heads: int = setting(16, "attention heads of the decoder; they must divide its width", ge=1)
    homologous: bool = setting(True, "attend only to the highest scores; otherwise to every patch")
    keys: int | None = setting(
        None, "patches a query attends to; by default as many as an image keeps", ge=1, optional=True
    )
    segments: bool = setting(True, "add an embedding of the image that a patch is from")
    contrast: float = setting(0.1, "weight of the homologous contrastive loss", ge=0)
    temperature: float = setting(0.25, "of the contrastive loss", gt=0)

    def __attrs_post_init__(self) -> None:
        check_heads(self)

    @property
    def disjoint_rows(self) -> int:
        """As many as are mixed."""
        return self.images

    @staticmethod
    def example_backbone(seed: int) -> nn.Module:
        """One that takes rules on scores."""
        from maskwright.backbones.defaults import vision_transformer

        return vision_transformer(image_size=16, patch_size=4, width=16, depth=2, heads=2, seed=seed)

    @staticmethod
    def example_mask(layout: Layout, generator: torch.Generator) -> Mask:
        """Halves."""
        return MixAssignment(images=2).draw(layout, signals={}, progress=0.0, generator=generator)

    def bind(self, backbone: nn.Module) -> BoundMixedAutoencoder:
        """A decoder and segment embeddings on a PatchBackbone whose `encode` takes `attention` (or a model with an adapter)."""
        return BoundMixedAutoencoder(self, adapt(backbone, self.backbone))


class BoundMixedAutoencoder(BoundObjective):
    """`encode`, `decode` and the two losses, one after the other.

    Outputs: `features` [B, K, D], the encoded patches of each image; `prediction` [B, N, p·p·C] at every position, normalised
    pixels with `norm_pix`; in evaluation mode `reconstruction` [B, C, H, W], with the patches that an image keeps as they are.
    """

    def __init__(self, settings: MixedAutoencoder, backbone: Any) -> None:
        super().__init__()
        if settings.homologous and settings.images > 1 and not takes_attention(backbone):
            raise BackboneMismatch(
                f"mixedae puts a rule into the attention of every block, which {type(backbone).__name__} does not take: give its "
                "encode a third argument, encode(tokens [B, P+K, D], levels=(), attention=None), and let each block call "
                "attention.attend(query, key, value) where it is given; or set homologous=False."
            )
        self.settings = settings
        self.backbone = backbone
        width, pixels = settings.decoder_width, backbone.patch_size**2 * backbone.channels
        self.decoder_input = DecoderInput(backbone.width, width, tuple(backbone.grid))
        self.decoder = transformer(width, settings.decoder_depth, settings.decoder_heads)
        self.predict = nn.Linear(width, pixels)
        for module in (self.decoder_input, self.decoder, self.predict):
            module.apply(initialize_linear)
        self.segments = None
        if settings.segments and settings.images > 1:
            self.segments = nn.Parameter(torch.zeros(settings.images, backbone.width))
            nn.init.normal_(self.segments, std=0.02)

    def attention(self, tokens: int, images: int, prefix: int) -> ScoreRule | None:
        """The rule for `tokens` patches of `images` images after `prefix` other tokens; None where it keeps everything."""
        count = self.settings.keys or tokens // images
        if not self.settings.homologous or count >= tokens:
            return None
        return homologous_attention(count, prefix)

    def encode(self, pixels: Tensor, mask: Mask, images: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mix every `images` rows of [B, C, H, W], and encode: [B, P+K, D], prefix and own tokens of each image.

        Then the mixed tokens [B / images, T, D] and the number in its group of each one's image, int64 [B / images, T].
        """
        keep = mask.keep.unflatten(0, (-1, images))
        taken, source = Mask(keep.any(1)), keep.to(torch.uint8).argmax(1)
        mixed = mix(pixels.unflatten(0, (-1, images)), source.view(-1, *self.backbone.grid))
        tokens = self.backbone.patches(mixed) + self.backbone.positions
        if self.segments is not None:
            tokens = tokens + self.segments[source]
        tokens, source = taken.gather_visible(tokens), taken.gather_visible(source)
        prefix = self.backbone.prefix(len(tokens))
        rule = self.attention(tokens.shape[1], images, prefix.shape[1])
        rules = {} if rule is None else {"attention": rule}
        encoded = self.backbone.encode(torch.cat([prefix, tokens], dim=1), **rules)
        first, patches = encoded[:, : prefix.shape[1]], encoded[:, prefix.shape[1] :]
        own = torch.cat([first.repeat_interleave(images, 0), unmix(patches, taken, mask)], dim=1)
        return own, patches, source

    def decode(self, encoded: Tensor, mask: Mask) -> Tensor:
        """[B, P+K, D] → [B, N, p·p·C]: mask tokens stand where the mixed image shows another image."""
        prefix = encoded.shape[1] - mask.visible_indices().shape[1]
        decoded = self.decoder(self.decoder_input(encoded, mask, prefix))
        return self.predict(decoded[:, prefix:])

    def target(self, pixels: Tensor) -> Tensor:
        """[B, N, p·p·C]: what is to be predicted."""
        return patch_targets(pixels, self.backbone.patch_size, normalized=self.settings.norm_pix)

    def forward(
        self,
        batch: Batch,
        mask: Mask,
        *,
        signals: Signals | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Loss:
        """Mean squared error where the mixed image shows another image, over all images, plus the contrastive loss.

        Raises `OverlappingMasks` when two images of a group keep the same position, `UnequalMaskCounts` for unequal counts.
        """
        pixels, mask, images = batch["pixels"], mask.flatten(), self.settings.images
        check_masks(mask, images)
        # Groups that are complete go through the encoder together, and the images that are left over as one smaller group.
        complete = len(pixels) - len(pixels) % images
        groups = [(slice(complete), images), (slice(complete, None), len(pixels) - complete)]
        parts = [
            self.encode(pixels[rows], mask.rows(rows), size) for rows, size in groups if len(pixels[rows])
        ]
        encoded = torch.cat([own for own, _, _ in parts])
        prediction = self.decode(encoded, mask)
        hidden = (~mask).keep
        error = (prediction - self.target(pixels)).square().mean(-1)
        losses = {"pixels": (error * hidden).sum() / hidden.sum().clamp(min=1)}
        if self.settings.contrast and images > 1:
            contrasts = [homologous_contrast(*rest, self.settings.temperature) for _, *rest in parts]
            each, counts = (torch.cat([one.flatten() for one in several]) for several in zip(*contrasts))
            losses["contrast"] = self.settings.contrast * each.sum() / counts.sum().clamp(min=1)
        outputs = {
            "prediction": prediction,
            "features": encoded[:, encoded.shape[1] - mask.visible_indices().shape[1] :],
        }
        if not self.training:
            outputs["reconstruction"] = fill_hidden(
                pixels, prediction, hidden, tuple(self.backbone.grid), normalized=self.settings.norm_pix
            )
        return Loss(total=torch.stack(list(losses.values())).sum(), parts=losses, outputs=outputs)
