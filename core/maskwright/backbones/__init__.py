"""Kinds of backbone, as small protocols, and `adapt`, which finds an adapter for a library's model.

A user's own module that has the methods *is* a backbone: structural typing, no base class, no registration.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from maskwright.errors import BackboneMismatch
from maskwright.mask import AttentionMask, Mask


@runtime_checkable
class GridBackbone(Protocol):
    """An encoder of image patches that may want every one of them: Swin, and every PatchBackbone.

    It has what a PatchBackbone has. `encode` gets all N tokens, hidden ones replaced, and may return fewer and wider features:

    - optional `every_patch = True`: it can drop none, and is no PatchBackbone
    - optional `feature_stride`: pixels a side of what one feature stands for; by default `patch_size`
    - optional `feature_width`: channels of a feature; by default `width`
    """

    grid: tuple[int, int]
    patch_size: int
    width: int
    depth: int
    channels: int

    @property
    def positions(self) -> Tensor: ...

    def patches(self, pixels: Tensor) -> Tensor: ...

    def prefix(self, batch_size: int) -> Tensor: ...

    def encode(self, tokens: Tensor, levels: Sequence[int] = ()) -> Any: ...


@runtime_checkable
class PatchBackbone(GridBackbone, Protocol):
    """An encoder of image patches, on all or some of them: ViT, DeiT, BEiT, DINOv2.

    Methods and attributes, with their shapes:

    - `patches(pixels [B, C, H, W]) -> [B, N, D]`: patch embeddings, without positions
    - `positions -> [1, N, D]`: position embeddings of the patches
    - `prefix(batch_size) -> [B, P, D]`: class and register tokens with their positions (P may be 0)
    - `encode(tokens [B, P+K, D], levels=()) -> [B, P+K, D]`: the blocks and the final norm, on any number of tokens;
      with `levels` a list with the outputs of those blocks, before the final norm (0-based; -1 is the last block)
    - optionally `encode(..., between=None)`, for objectives that drop tokens on the way: called before each block with its
      number and tokens, `between(index, tokens)` returns the tokens that go in
    - optionally `encode(..., attention=None)`: an `AttentionMask`, or a `maskwright.toolkit.attention.ScoreRule` that each
      block evaluates on its own queries and keys; objectives that need it ask `takes_attention`
    - `grid`: (rows, columns) of patches, N = rows × columns; `patch_size`: pixels a side; `width`: D; `depth`: blocks;
      `channels`: C
    - optional `relative_positions = True`: its blocks compare positions. `encode` then also takes `places` int64 [B, K], the
      patches that the tokens after the prefix are (None: all N, in order); `encode_visible` gives them
    """


@runtime_checkable
class ConvBackbone(Protocol):
    """A convolutional encoder, stage by stage: ResNet, ConvNeXt.

    - `stem(pixels [B, C, H, W]) -> [B, C0, H/s0, W/s0]`
    - `stages`: a list of modules, each [B, Ci, h, w] -> [B, Cj, h', w']
    - `strides`: total stride after the stem and after each stage; `widths`: channels at the same places; `channels`: C
    """

    stages: Any
    strides: tuple[int, ...]
    widths: tuple[int, ...]
    channels: int

    def stem(self, pixels: Tensor) -> Tensor: ...


@runtime_checkable
class TokenBackbone(Protocol):
    """A language model, causal or bidirectional.

    - `embed(ids int64 [B, L]) -> [B, L, D]`
    - `logits(ids or embeddings, attention: AttentionMask | None, positions int64 [B, L] | None) -> [B, L, V]`:
      raw outputs, at the places where the model makes them; `attention=None` is the model's own rule
    - `shift`: 1 when logits[:, i] predicts token i + 1 (causal models), 0 when it predicts token i
    - `vocabulary`: V; `width`: D; `mask_token`: the id that stands for a hidden token, or None
    - optionally, for causal models that carry a state: `prefill(ids [B, P]) -> (logits [B, V] of the next token, state)` and
      `step(ids [B], state) -> (logits [B, V], state)`
    """

    shift: int
    vocabulary: int
    width: int
    mask_token: int | None

    def embed(self, ids: Tensor) -> Tensor: ...

    def logits(
        self, tokens: Tensor, attention: AttentionMask | None = None, positions: Tensor | None = None
    ) -> Tensor: ...


@runtime_checkable
class Denoiser(Protocol):
    """A denoising network: `denoiser(x [B, ...], t [B], condition=None)` has the shape of `x`."""

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class PointerBackbone(Protocol):
    """An encoder of a sequence of vectors, and a decoder whose states can be compared with what it encoded.

    - `encode(inputs [B, n, F], lengths int64 [B]) -> (memory [B, n, H], state)`: reads the first `lengths` inputs of each row; the
      state is a tuple of tensors, each with a row for each of the batch. What lies behind a row's length has no influence
    - `decode(inputs [B, T, F], state) -> [B, T, H]`: the decoder's states as it reads T inputs, from an encoder's state on
    - `features`: F; `width`: H
    """

    features: int
    width: int

    def encode(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]: ...

    def decode(self, inputs: Tensor, state: tuple[Tensor, ...]) -> Tensor: ...


KINDS: dict[str, type] = {
    "patch": PatchBackbone,
    "grid": GridBackbone,
    "conv": ConvBackbone,
    "token": TokenBackbone,
    "denoiser": Denoiser,
    "pointer": PointerBackbone,
}
"""The kinds of backbone by the word that an objective's `backbone` attribute uses."""

_SHAPES: dict[Any, dict[str, str]] = {
    PatchBackbone: {
        "patches": "patches(pixels [B, C, H, W]) -> [B, N, D]",
        "positions": "positions: [1, N, D]",
        "prefix": "prefix(batch_size) -> [B, P, D]",
        "encode": "encode(tokens [B, P+K, D], levels=()) -> [B, P+K, D]",
        "grid": "grid: (rows, columns)",
        "patch_size": "patch_size: pixels a side",
        "width": "width: D",
        "depth": "depth: number of blocks",
        "channels": "channels: C",
    },
    ConvBackbone: {
        "stem": "stem(pixels [B, C, H, W]) -> [B, C0, h, w]",
        "stages": "stages: modules, one after the other",
        "strides": "strides: total stride after the stem and each stage",
        "widths": "widths: channels after the stem and each stage",
        "channels": "channels: C",
    },
    TokenBackbone: {
        "embed": "embed(ids [B, L]) -> [B, L, D]",
        "logits": "logits(ids or embeddings, attention=None, positions=None) -> [B, L, V]",
        "shift": "shift: 1 for causal models, 0 otherwise",
        "vocabulary": "vocabulary: V",
        "width": "width: D",
        "mask_token": "mask_token: an id or None",
    },
    PointerBackbone: {
        "encode": "encode(inputs [B, n, F], lengths [B]) -> (memory [B, n, H], state)",
        "decode": "decode(inputs [B, T, F], state) -> [B, T, H]",
        "features": "features: F",
        "width": "width: H",
    },
}

_SHAPES[GridBackbone] = {
    **_SHAPES[PatchBackbone],
    "encode": "encode(tokens [B, P+N, D], levels=()) -> [B, P+N', D']",
}

_ADAPTERS: dict[type, list[Callable[[nn.Module], nn.Module | None]]] = {}


def adapt(module: nn.Module, kind: type | str) -> Any:
    """The module as a backbone of a kind: itself when it has the methods, or an adapter around a library's model.

    `kind` is a protocol of this module or its word ("patch", "grid", "conv", "token", "pointer"). Raises `BackboneMismatch`, naming each
    method that is missing with its shapes, and the library models that have adapters.
    """
    protocol = KINDS[kind] if isinstance(kind, str) else kind
    shapes = _SHAPES.get(protocol, {})
    missing = [text for name, text in shapes.items() if not _has(module, name)]
    if not missing:
        _check_dropping(module, protocol)
        return module
    for adapters in ("transformers", "convolutional"):
        importlib.import_module(f"maskwright.backbones.{adapters}")
    for adapter in _ADAPTERS.get(protocol, []):
        if (adapted := adapter(module)) is not None:
            _check_dropping(adapted, protocol)
            return adapted
    raise BackboneMismatch(
        f"{type(module).__name__} is no {protocol.__name__}: it lacks {'; '.join(missing)}. Add them to your module (no base "
        f"class is needed), or pass a model of transformers that has an adapter ({supported(protocol)})."
    )


def _check_dropping(module: nn.Module, protocol: type) -> None:
    if protocol is not PatchBackbone or not getattr(module, "every_patch", False):
        return
    from maskwright.registry import default

    others = [info.name for info in default().find(kind="objective") if info.backbone == "grid"]
    raise BackboneMismatch(
        f"{type(getattr(module, 'model', module)).__name__} encodes every patch of an image, and this objective needs one that "
        f"can leave hidden ones out; use a model that can ({supported(PatchBackbone)}), or an objective that replaces them by a token: "
        f"{', '.join(map(repr, others)) or 'none is registered'}."
    )


def encode_visible(
    backbone: Any, tokens: Tensor, mask: Mask, levels: Sequence[int] = (), **arguments: Any
) -> Any:
    """[B, N, D] → [B, P+K, D]: prefix and visible tokens through a PatchBackbone, or a list of `levels`.

    Unequal visible counts raise `UnequalMaskCounts`. A backbone with relative positions is told which patches they are;
    `arguments` are others of its `encode`.
    """
    visible = mask.gather_visible(tokens)
    relative = getattr(backbone, "relative_positions", False)
    told = {"places": mask.visible_indices(), **arguments} if relative else arguments
    return backbone.encode(torch.cat([backbone.prefix(len(tokens)), visible], dim=1), levels, **told)


def takes_attention(backbone: PatchBackbone) -> bool:
    """Whether a patch backbone's `encode` has the argument `attention`, with which rules enter its blocks."""
    return "attention" in inspect.signature(backbone.encode).parameters


def _has(module: nn.Module, name: str) -> bool:
    return hasattr(module, name)


def adapter(protocol: type, *models: str) -> Callable[[Callable[[nn.Module], nn.Module | None]], Any]:
    """Register a function that wraps a library's model as a backbone of a kind, or returns None for other modules.

    `models` names what it takes, for error messages.
    """

    def register(
        function: Callable[[nn.Module], nn.Module | None],
    ) -> Callable[[nn.Module], nn.Module | None]:
        _ADAPTERS.setdefault(protocol, []).append(function)
        _MODELS.setdefault(protocol, []).extend(models)
        return function

    return register


_MODELS: dict[type, list[str]] = {}


def supported(protocol: type) -> str:
    """The library models that have an adapter for a kind, as a text."""
    return ", ".join(_MODELS.get(protocol, [])) or "none yet"
