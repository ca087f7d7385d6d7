"""Sparse layers without touching a network: within a context, its own layers see and make visible positions only.

A convolution is computed densely and masked again, which gives what a submanifold sparse convolution gives (section 3.1 of
SparK): the pattern of empty positions stays what it is, however many layers follow. Statistics are of visible positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from maskwright import Mask
from maskwright.errors import BackboneMismatch, MaskShapeError


def remask(x: Tensor, keep: Tensor) -> Tensor:
    """x · m, in place: `x` is what a layer just made; `keep` bool broadcasts to it."""
    return x.mul_(keep)


def visible_batch_norm(
    x: Tensor,
    places: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm of the visible vectors of a batch [B, C, H, W]; zero elsewhere.

    `places` int64 [n] are the visible positions of the flattened B × H × W. Batch statistics and the running ones, which are
    updated, are of those n vectors. One vector alone has no variance: the running statistics normalise it.
    """
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
    training = training and (len(places) > 1 or running_mean is None)
    seen = F.batch_norm(
        rows.index_select(0, places), running_mean, running_var, weight, bias, training, momentum, eps
    )
    full = seen.new_zeros(rows.shape).index_copy(0, places, seen)
    return full.view(batch, height, width, channels).permute(0, 3, 1, 2)


def visible_group_norm(
    x: Tensor,
    keep: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Group norm [B, C, H, W] with each image's statistics over its visible positions, bool [B, 1, H, W]; zero elsewhere."""
    parts, seen = x.unflatten(1, (groups, -1)), keep[:, None]
    count = (seen.sum((2, 3, 4), keepdim=True) * parts.shape[2]).clamp(min=1)
    mean = (parts * seen).sum((2, 3, 4), keepdim=True) / count
    centred = (parts - mean) * seen
    variance = centred.square().sum((2, 3, 4), keepdim=True) / count
    normal = (centred * (variance + eps).rsqrt()).flatten(1, 2)
    if weight is not None:
        normal = normal * weight[:, None, None]
    return (normal if bias is None else normal + bias[:, None, None]) * keep


def visible_mean(x: Tensor, keep: Tensor, axes: Sequence[int], keepdim: bool = False) -> Tensor:
    """The mean over the visible positions: `axes` are the rows and columns of `x` [B, …], `keep` bool broadcasts to it."""
    total, count = (x * keep).sum(axes, keepdim=keepdim), keep.sum(axes, keepdim=keepdim)
    return total / count.clamp(min=1)


@attrs.frozen(eq=False)
class Scale:
    """A mask at the size of one map: `keep` bool [B, 1, H, W], and `places` int64 [n], where the flattened B × H × W is visible."""

    keep: Tensor
    places: Tensor

    @property
    def last(self) -> Tensor:
        """bool [B, H, W, 1], for maps whose channels are last."""
        return self.keep.permute(0, 2, 3, 1)


class Sparse(TorchFunctionMode):
    """`with Sparse(mask):` every layer that is called makes zeros where the mask [B, rows, columns] hides.

    It changes what PyTorch's functions do in this thread, and no module: nothing is left of it afterwards. Maps may have any
    size that the mask's grid divides. Convolutions, pooling, and layers that act on each position (linear, layer norm, RMS
    norm; channels last) are masked again; batch norm, group norm and global means are of visible positions. Maps of 1 × 1
    position are taken for summaries of an image and left alone. Layers that mix positions and have no such form raise
    `BackboneMismatch`.
    """

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask
        self._scales: dict[tuple[int, int], Scale] = {}

    def at(self, size: Sequence[int]) -> Scale | None:
        """The mask at the size of a map; None for a summary of an image."""
        height, width = (int(side) for side in size)
        if (height, width) not in self._scales:
            if (height, width) == (1, 1) != tuple(self.mask.shape[1:]):
                return None
            try:
                keep = self.mask.upsample((height, width)).keep
            except MaskShapeError:
                raise BackboneMismatch(
                    f"A layer makes a map of {height} × {width}, of which the mask's grid {tuple(self.mask.shape[1:])} is no "
                    "divisor: sparse convolution needs maps that are whole multiples of the coarsest (even sides, and padding "
                    "that keeps them so)."
                ) from None
            self._scales[height, width] = Scale(keep[:, None], keep.flatten().nonzero()[:, 0])
        return self._scales[height, width]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WITHOUT:
            raise BackboneMismatch(
                f"{func.__name__} has no sparse form here: a network for 'spark' is made of convolutions, max and average "
                "pooling, linear layers, batch, layer, RMS and group norm, and means over all positions."
            )
        rule = _RULES.get(func)
        return func(*args, **kwargs) if rule is None else rule(self, func, *args, **kwargs)


def _first(sparse: Sparse, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer that makes [B, C, H, W], masked again; max pooling may also make indices."""
    made = function(*args, **kwargs)
    x = made[0] if isinstance(made, tuple) else made
    scale = sparse.at(x.shape[2:]) if x.ndim == 4 else None
    if scale is not None:
        remask(x, scale.keep)
    return made


def _convolution(
    sparse: Sparse,
    function: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Computed densely and masked again, unless no window reaches beyond its cell: nothing in, nothing out."""
    arguments = (x, weight, bias, stride, padding, dilation, groups)
    reach = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], _pair(dilation))]
    within = all(size <= step for size, step in zip(reach, _pair(stride)))
    if bias is None and within and padding in ("valid", 0, (0, 0), [0, 0]):
        y = function(*arguments)
        sparse.at(y.shape[2:])
        return y
    return _first(sparse, function, *arguments)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _last(sparse: Sparse, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A layer that makes [B, H, W, C] of each position alone, masked again: its bias is no feature of an empty position."""
    made = function(*args, **kwargs)
    scale = sparse.at(made.shape[1:3]) if made.ndim == 4 else None
    return made if scale is None else remask(made, scale.last)


def _layer_norm(
    sparse: Sparse,
    function: Callable[..., Tensor],
    x: Tensor,
    shape: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    if x.ndim == 4 and len(shape) > 1:
        raise BackboneMismatch(
            f"A layer norm over {tuple(shape)} averages over positions, hidden ones too; 'spark' takes those over channels."
        )
    return _last(sparse, function, x, shape, *args, **kwargs)


def _batch_norm(
    sparse: Sparse, function: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    scale = sparse.at(x.shape[2:]) if x.ndim == 4 else None
    if scale is None:
        return function(x, *args, **kwargs)
    return visible_batch_norm(x, scale.places, *args, **kwargs)


def _group_norm(
    sparse: Sparse, function: Callable[..., Tensor], x: Tensor, groups: int, *args: Any, **kwargs: Any
) -> Tensor:
    scale = sparse.at(x.shape[2:]) if x.ndim == 4 else None
    if scale is None:
        return function(x, groups, *args, **kwargs)
    return visible_group_norm(x, scale.keep, groups, *args, **kwargs)


def _adaptive_mean(sparse: Sparse, function: Callable[..., Tensor], x: Tensor, size: Any) -> Tensor:
    if x.ndim != 4 or size not in (1, (1, 1), [1, 1]):
        raise BackboneMismatch(
            f"adaptive_avg_pool2d to {size} has no sparse form; 'spark' takes the one to 1 × 1."
        )
    scale = sparse.at(x.shape[2:])
    return function(x, size) if scale is None else visible_mean(x, scale.keep, (2, 3), keepdim=True)


def _mean(
    sparse: Sparse,
    function: Callable[..., Tensor],
    x: Tensor,
    dim: Any = None,
    keepdim: bool = False,
    **kwargs: Any,
) -> Tensor:
    axes = sorted(axis % 4 for axis in dim) if x.ndim == 4 and isinstance(dim, tuple | list) else []
    if axes == [2, 3] and (scale := sparse.at(x.shape[2:])) is not None:
        return visible_mean(x, scale.keep, (2, 3), keepdim)
    if axes == [1, 2] and (scale := sparse.at(x.shape[1:3])) is not None:
        return visible_mean(x, scale.last, (1, 2), keepdim)
    return function(x, **kwargs) if dim is None else function(x, dim, keepdim, **kwargs)


_RULES: dict[Any, Callable[..., Any]] = {
    torch.conv2d: _convolution,
    F.max_pool2d: _first,
    F.max_pool2d_with_indices: _first,
    torch.max_pool2d: _first,
    F.avg_pool2d: _first,
    F.linear: _last,
    F.rms_norm: _last,
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    F.adaptive_avg_pool2d: _adaptive_mean,
    torch.mean: _mean,
    Tensor.mean: _mean,
}

_WITHOUT = frozenset(
    {
        *(F.instance_norm, F.local_response_norm, F.interpolate, F.adaptive_max_pool2d, F.lp_pool2d),
        *(F.conv_transpose2d, F.scaled_dot_product_attention),
    }
)
