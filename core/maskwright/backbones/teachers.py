"""Frozen vision models that others learn from, and what happens inside transformers' attention, for those who compare it.

teacher = VisionTeacher("./clip-vit-base", student)
seen = teacher(pixels, levels=(10, 11), projections=(6,), attention=True)
"""

from __future__ import annotations

import copy
import inspect
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from maskwright.backbones import PatchBackbone
from maskwright.backbones.folders import quiet_transformers, read_model
from maskwright.backbones.transformers import ENTRANCES, attention_forward, mask_forward
from maskwright.errors import BackboneMismatch, BadParameter, CheckpointError, reason

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Channel means and deviations that the image sources normalise with."""

NORMALIZATIONS = {
    "imagenet": IMAGENET,
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""What teachers were trained with, by name: "clip" is CLIP's own, "half" that of Google's ViT and of BEiT."""

MODELS = "ViTModel, DeiTModel, BeitModel, Dinov2Model, CLIPVisionModel, SwinModel"

# -- what attention is computed from -------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Projections:
    """What one attention is computed from, each [B, heads, T, d]: as its softmax sees them, after any rotation by position.

    `bias` is added to query · key · `scale`, if there is one (relative positions), broadcastable to [B, heads, T, T].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    bias: Tensor | None

    def first_row(self) -> Tensor:
        """[B, heads, T]: how much the first token attends to each, the class token where there is one."""
        scores = (self.query[:, :, :1] @ self.key.transpose(2, 3)).float() * self.scale
        if self.bias is not None:
            row = self.bias[..., :1, :]
            scores = scores.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else scores + row
        return scores.softmax(-1)[:, :, 0]


WATCHED = "maskwright-watched"
"""The attention implementation of models that can be watched; without a rule it is transformers' "sdpa"."""
ENTRANCES.add(WATCHED)


@attrs.define(eq=False)
class _Watch:
    wanted: Callable[[int], bool]
    found: dict[int, Projections]
    modules: list[nn.Module]


_WATCH: ContextVar[_Watch | None] = ContextVar("maskwright_watch", default=None)


@contextmanager
def watch(blocks: Collection[int] | None = None) -> Iterator[dict[int, Projections]]:
    """The projections of the attentions that run inside, by the order in which they run (0 is the first block's).

    Of models for which `make_watchable` was called. `blocks` limits what is kept. Gradients pass through what is found, so
    that a student's can be compared with a teacher's.
    """
    with _watching(lambda index: blocks is None or index in blocks) as found:
        yield found.found


@contextmanager
def _watching(wanted: Callable[[int], bool]) -> Iterator[_Watch]:
    one = _Watch(wanted, {}, [])
    token = _WATCH.set(one)
    try:
        yield one
    finally:
        _WATCH.reset(token)


def make_watchable(model: Any) -> None:
    """Let `watch` see a model of transformers: its attention implementation becomes `WATCHED`, through their own registry.

    Raises `BackboneMismatch` for the few models that do not use it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(WATCHED, _attention)
    AttentionMaskInterface.register(WATCHED, mask_forward)
    with quiet_transformers():
        model.set_attn_implementation(WATCHED)
    # Models with an attention of their own only warn, and keep it.
    if model.config._attn_implementation != WATCHED:
        raise BackboneMismatch(
            f"{type(model).__name__} computes attention on its own, so that nothing can be seen of it; choose a model that uses the "
            f"attention interface of transformers ({MODELS})."
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **arguments: Any,
) -> Any:
    """Called by every layer of a watched model; rules and places go on to where the others' go."""
    if (one := _WATCH.get()) is not None:
        if one.wanted(len(one.modules)):
            scale = arguments.get("scaling") or query.shape[-1] ** -0.5
            one.found[len(one.modules)] = Projections(query, key, value, scale, attention_mask)
        one.modules.append(module)
    return attention_forward(module, query, key, value, attention_mask, **arguments)


# -- teachers ------------------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Seen:
    """What a teacher makes of whole images. The class and register tokens, P of them, come first.

    `final` [B, P+N, D] is the output after the final norm. `levels` are outputs of blocks before it, `projections` what their
    attentions are computed from; both by block, 0-based, those that were asked for. `class_attention` [B, N] is how much the
    class token of the last block attends to each patch, averaged over heads; None unless asked for.
    """

    final: Tensor
    levels: Mapping[int, Tensor]
    projections: Mapping[int, Projections]
    class_attention: Tensor | None


class VisionTeacher(nn.Module):
    """A vision transformer that looks at whole images, takes no gradient and stays in evaluation mode.

    `model` is one of transformers (ViT, DeiT, BEiT, MAE, DINO, CLIP, SigLIP, Swin; with a head too) or a
    folder of one. A module is copied: the user's own is left as it was. Images are resized so that the teacher's patches are
    the student's; of a Swin, whose grid shrinks, the blocks of the last stage count. `normalization`, a key of
    `NORMALIZATIONS`, is what the teacher's pixels are normalised with; what comes in is taken for ImageNet's.

    Its weights are no part of any state_dict, list of parameters or checkpoint: they never change, and who resumes a run names
    the teacher again. A checksum of them is, so that a run is not resumed with another one.

    `depth` blocks, `width` D, `prefix` P, `has_class_token`. Raises `BadModel` for a folder that cannot be read,
    `BackboneMismatch` for a module that is no such model or does not fit the student's grid or channels.
    """

    model: Any
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        student: PatchBackbone,
        *,
        normalization: str = "imagenet",
    ) -> None:
        super().__init__()
        if normalization not in NORMALIZATIONS:
            raise BadParameter(
                f"normalization={normalization!r} is none of {', '.join(map(repr, NORMALIZATIONS))}."
            )
        if isinstance(model, nn.Module):
            tower = copy.deepcopy(_tower(model))
        else:
            # What the folder lacks, such as a pooler that no teacher uses, is drawn: not from the user's generator.
            with torch.random.fork_rng(devices=[]):
                tower = _tower(read_model(Path(model), "AutoModel"))
        make_watchable(tower)
        # Beside the submodules, so that what walks over those (state_dict, parameters, train, apply) does not find it.
        self.__dict__["model"] = tower.eval().requires_grad_(False)
        self.grid, self.channels = tuple(student.grid), student.channels
        config = tower.config
        self.name = type(tower).__name__
        # Stages halve the grid, one after the other.
        cell = _side(config.patch_size) * 2 ** (max(1, len(getattr(config, "depths", ()))) - 1)
        self.size = (self.grid[0] * cell, self.grid[1] * cell)
        self.told: dict[str, Any] = {"interpolate_pos_encoding": True} if self._interpolates(config) else {}
        if hasattr(config, "mask_ratio") and "noise" in inspect.signature(tower.forward).parameters:
            # transformers' MAE hides patches and shuffles the others by this noise, unless it is told better.
            config.mask_ratio = 0.0
            self.told["noise"] = torch.arange(self.grid[0] * self.grid[1], dtype=torch.float32)[None]
        self._set_normalization(normalization)
        self._look_once()
        self.checksum = _checksum(tower)

    def _interpolates(self, config: Any) -> bool:
        knows = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        own = getattr(config, "image_size", None)
        return knows and self.size != (own if isinstance(own, list | tuple) else (own, own))

    def _set_normalization(self, name: str) -> None:
        if name != "imagenet" and self.channels != 3:
            raise BadParameter(
                f"normalization={name!r} is of three colours, the images have {self.channels} channels; leave it at 'imagenet', which "
                "changes nothing."
            )
        mean, deviation = NORMALIZATIONS[name]
        scale = [old / new for old, new in zip(IMAGENET[1], deviation)]
        shift = [(old - new) / by for old, new, by in zip(IMAGENET[0], mean, deviation)]
        self.register_buffer("scale", torch.tensor(scale).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(1, -1, 1, 1), persistent=False)
        self.renormalizes = name != "imagenet"

    def _look_once(self) -> None:
        """Learn from one blank image what there is, so that what does not fit shows before a run begins."""
        config, rows_columns = self.model.config, " × ".join(map(str, self.grid))
        channels = getattr(config, "num_channels", self.channels)
        if channels != self.channels:
            raise BackboneMismatch(
                f"The teacher ({self.name}) takes images of {channels} channels, the student of {self.channels}; "
                "choose models that take the same images."
            )
        blank = next(self.model.parameters()).new_zeros(1, channels, *self.size)
        outputs: list[Tensor] = []
        with torch.no_grad(), _watching(lambda index: False) as seen:
            try:
                self.blocks = []
                final = self._run(blank)
                self.blocks = _blocks(self.model, seen.modules)
                with _outputs(dict(enumerate(self.blocks))) as found:
                    self._run(blank)
                outputs = [found[index] for index in sorted(found)]
            except (ValueError, RuntimeError, TypeError) as error:
                raise BackboneMismatch(
                    f"The teacher ({self.name}) cannot see images as the student's {rows_columns} patches: at "
                    f"{self.size[0]} × {self.size[1]} pixels it says: {reason(error)}. Choose a teacher whose grid can be that."
                ) from error
        positions = self.grid[0] * self.grid[1]
        if not outputs or final.ndim != 3 or final.shape[1] < positions:
            got = f"{final.shape[1]} tokens" if final.ndim == 3 else f"outputs of shape {list(final.shape)}"
            raise BackboneMismatch(
                f"The teacher ({self.name}) gives {got} for images of {self.size[0]} × {self.size[1]} pixels, which cannot be the "
                f"student's {rows_columns} patches; choose a vision transformer of transformers ({MODELS})."
            )
        # Blocks of earlier stages see another grid.
        self.first = next(i for i, one in enumerate(outputs) if one.shape == final.shape)
        self.blocks = self.blocks[self.first :]
        self.depth, self.width = len(self.blocks), final.shape[2]
        self.prefix = final.shape[1] - positions
        self.has_class_token = self.prefix > 0

    def _run(self, pixels: Tensor) -> Tensor:
        told = {
            name: value.to(pixels.device).expand(len(pixels), -1) if isinstance(value, Tensor) else value
            for name, value in self.told.items()
        }
        return self.model(pixel_values=pixels, **told).last_hidden_state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VisionTeacher:
        self.model._apply(fn)
        return super()._apply(fn, recurse)

    def get_extra_state(self) -> Tensor:
        """The checksum of the weights, int64 []."""
        return torch.tensor(self.checksum)

    def set_extra_state(self, state: Tensor) -> None:
        """Raises `CheckpointError` when the checkpoint's teacher had other weights."""
        if int(state) != self.checksum:
            raise CheckpointError(
                f"The teacher ({self.name}) is not the one that this checkpoint was trained with: its weights differ. Give the "
                "same teacher again, or begin a new run."
            )

    @torch.no_grad()
    def forward(
        self,
        pixels: Tensor,
        *,
        levels: Collection[int] = (),
        projections: Collection[int] = (),
        attention: bool = False,
    ) -> Seen:
        """Whole images [B, C, H, W] as `Seen`; `levels` and `projections` name blocks, 0-based, -1 is the last.

        Raises `BackboneMismatch` for projections of a model that attends within windows, and for the attention of a class token
        that the model does not have.
        """
        if tuple(pixels.shape[-2:]) != self.size:
            pixels = nn.functional.interpolate(pixels, size=self.size, mode="bicubic", antialias=True)
        if self.renormalizes:
            pixels = pixels * self.scale + self.shift
        if attention and not self.has_class_token:
            raise BackboneMismatch(
                f"The teacher ({self.name}) has no class token, and so no attention of one; choose a teacher that has it "
                "(ViT, DeiT, BEiT, DINOv2, CLIP)."
            )
        chosen = {index % self.depth for index in levels}
        last = {self.depth - 1} if attention else set()
        asked = {index % self.depth for index in projections}
        with (
            _outputs({index: self.blocks[index] for index in chosen}) as outputs,
            _watching(lambda index: index - self.first in asked | last) as seen,
        ):
            final = self._run(pixels)
        found = {index - self.first: one for index, one in seen.found.items()}
        for one in found.values():
            if one.query.shape[0] != len(pixels) or one.query.shape[2] != final.shape[1]:
                raise BackboneMismatch(
                    f"The teacher ({self.name}) attends within windows, so that its tokens have no relations to all others; "
                    "choose a teacher whose blocks attend to the whole image (ViT, DeiT, BEiT, DINOv2, CLIP)."
                )
        row = found[self.depth - 1].first_row().mean(1)[:, self.prefix :] if attention else None
        return Seen(
            final,
            {index: outputs[index] for index in sorted(chosen)},
            {index: found[index] for index in sorted(asked)},
            row,
        )


def _tower(model: Any) -> Any:
    """What sees images in a model of transformers: without heads, and without a text tower."""
    inner = getattr(model, "base_model", model)
    tower = getattr(inner, "vision_model", inner)
    if "pixel_values" not in inspect.signature(tower.forward).parameters:
        tower = model
    if not (
        hasattr(getattr(tower, "config", None), "patch_size") and hasattr(tower, "set_attn_implementation")
    ):
        raise BackboneMismatch(
            f"{type(model).__name__} cannot be a teacher: it must be a vision transformer of transformers ({MODELS}), or the "
            "folder of one."
        )
    return tower


def _blocks(model: nn.Module, attentions: list[nn.Module]) -> list[nn.Module]:
    """The entries of lists of modules that the attentions lie in, in the order in which they run."""
    names = {id(module): name for name, module in model.named_modules()}
    blocks: list[nn.Module] = []
    for attention in attentions:
        path = names[id(attention)].split(".")
        for end in range(len(path), 0, -1):
            if isinstance(model.get_submodule(".".join(path[: end - 1])), nn.ModuleList):
                blocks.append(model.get_submodule(".".join(path[:end])))
                break
    return blocks


@contextmanager
def _outputs(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """The outputs of modules that run inside, by their number."""
    found: dict[int, Tensor] = {}

    def keep(index: int, module: nn.Module, given: Any, output: Any) -> None:
        found[index] = output[0] if isinstance(output, tuple) else output

    hooks = [module.register_forward_hook(partial(keep, index)) for index, module in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _side(size: Any) -> int:
    return int(size) if isinstance(size, int) else int(size[0])


def _checksum(model: nn.Module) -> int:
    total = 0
    for name, tensor in sorted(model.state_dict().items()):
        total = zlib.crc32(name.encode(), total)
        if tensor.numel():
            total = zlib.crc32(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return total
