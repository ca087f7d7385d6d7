"""Frozen vision models that other models learn from: any vision transformer of transformers, as a module or a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from maskwright.errors import BackboneMismatch, BadModel

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Channel means and deviations that the image sources normalise with."""

NORMALIZATIONS = {
    "imagenet": IMAGENET,
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""What teachers were trained with, by name: "clip" is CLIP's own, "half" that of Google's ViT and of BEiT."""


@attrs.frozen(eq=False)
class Seen:
    """What a teacher makes of whole images.

    `levels` are its hidden states: the embeddings, then the output of each block, before the final norm, each [B, P+N, D].
    `attention` is the last block's, [B, heads, P+N, P+N]. P = `prefix` class and register tokens come first.
    """

    levels: tuple[Tensor, ...]
    attention: Tensor
    prefix: int

    @property
    def class_attention(self) -> Tensor:
        """[B, N]: how much the class token attends to each patch, averaged over heads."""
        return self.attention.mean(1)[:, 0, self.prefix :]


class VisionTeacher(nn.Module):
    """A vision transformer that takes no gradient, stays in evaluation mode and looks at whole images.

    `model` is a module of transformers (ViT, DeiT, BEiT, DINOv2, the vision tower of CLIP) or a folder that it reads.
    `normalization` is what its pixels are normalised with, a key of `NORMALIZATIONS`; what comes in is taken for ImageNet's.
    Images are resized so that its patch grid is that of the student. Raises `BadModel` for a folder that cannot be read and
    `BackboneMismatch` for a module that reports neither hidden states nor attention.
    """

    def __init__(self, model: nn.Module | str | os.PathLike[str], *, normalization: str = "imagenet") -> None:
        super().__init__()
        given: Any = model if isinstance(model, nn.Module) else _read(Path(model))
        tower: Any = getattr(given, "vision_model", given)
        if not (hasattr(tower, "config") and hasattr(tower, "set_attn_implementation")):
            raise BackboneMismatch(
                f"{type(tower).__name__} cannot be a teacher: it must be a vision transformer of transformers, which reports "
                "hidden states and attention (ViTModel, DeiTModel, BeitModel, Dinov2Model, CLIPVisionModel), or its folder."
            )
        # Only this implementation returns its attention.
        tower.set_attn_implementation("eager")
        self.model = tower.eval().requires_grad_(False)
        self.patch_size = int(tower.config.patch_size)
        self.width = int(tower.config.hidden_size)
        self.depth = int(tower.config.num_hidden_layers)
        self.image_size = _size(tower.config.image_size)
        mean, deviation = NORMALIZATIONS[normalization]
        scale = [old / new for old, new in zip(IMAGENET[1], deviation)]
        shift = [(old - new) / by for old, new, by in zip(IMAGENET[0], mean, deviation)]
        self.register_buffer("scale", torch.tensor(scale).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(1, -1, 1, 1), persistent=False)
        self.renormalizes = normalization != "imagenet"

    scale: Tensor
    shift: Tensor

    def train(self, mode: bool = True) -> VisionTeacher:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor, grid: tuple[int, int]) -> Seen:
        """Whole images [B, C, H, W], seen as `grid` patches."""
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        if tuple(pixels.shape[-2:]) != size:
            pixels = nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        if self.renormalizes:
            pixels = pixels * self.scale + self.shift
        told: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
        if size != self.image_size:
            told["interpolate_pos_encoding"] = True
        seen = self.model(pixel_values=pixels, **told)
        prefix = seen.hidden_states[0].shape[1] - grid[0] * grid[1]
        return Seen(tuple(seen.hidden_states), seen.attentions[-1], prefix)


def _size(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _read(folder: Path) -> Any:
    from transformers import AutoModel

    if not (folder / "config.json").is_file():
        raise BadModel(
            f"The teacher {folder} is no model folder: it has no config.json; save_pretrained writes one."
        )
    try:
        # What the folder lacks, such as a pooler that a teacher does not use, is drawn: not from the user's generator.
        with torch.random.fork_rng(devices=[]):
            return AutoModel.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
            )
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        raise BadModel(f"The teacher {folder} cannot be read: {first}") from error
