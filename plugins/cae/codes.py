"""Codes of patches from k-means: discrete targets where there is no trained tokenizer."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from maskwright.errors import BadData
from maskwright.toolkit.images import patchify


@attrs.frozen(eq=False)
class PatchCodes:
    """The nearest of `centres` [K, p·p·C] for each patch of `patch_size` pixels a side.

    A stand-in for the paper's tokenizer, a dVAE with 8192 codes: `vocabulary` is K, and `codes` are ids of the centres.
    """

    centres: Tensor
    patch_size: int

    @classmethod
    def fit(
        cls, pixels: Tensor, patch_size: int, vocabulary: int, generator: torch.Generator, steps: int = 20
    ) -> PatchCodes:
        """Lloyd's algorithm on the patches of images [B, C, H, W], from `vocabulary` different patches drawn at random.

        A centre that no patch is nearest to stays where it is. Raises `BadData` for fewer different patches than centres.
        """
        patches = patchify(pixels, patch_size).flatten(0, 1)
        different = patches.unique(dim=0)
        if len(different) < vocabulary:
            raise BadData(
                f"{len(different)} different patches cannot make {vocabulary} codes; give more images, or a smaller vocabulary."
            )
        order = torch.randperm(len(different), generator=generator, device=generator.device)
        made = cls(different[order[:vocabulary].to(different.device)], patch_size)
        for _ in range(steps):
            code = made._nearest(patches)
            sums = torch.zeros_like(made.centres).index_add_(0, code, patches)
            counts = code.bincount(minlength=vocabulary)[:, None]
            made = cls(torch.where(counts > 0, sums / counts.clamp(min=1), made.centres), patch_size)
        return made

    @property
    def vocabulary(self) -> int:
        """K."""
        return len(self.centres)

    @torch.no_grad()
    def codes(self, pixels: Tensor) -> Tensor:
        """[B, C, H, W] → int64 [B, N]."""
        return self._nearest(patchify(pixels, self.patch_size))

    def _nearest(self, patches: Tensor) -> Tensor:
        return torch.cdist(patches, self.centres.to(patches)).argmin(-1)
