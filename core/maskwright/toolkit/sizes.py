"""How large a model is: as dense tensors, and with its pruned weights as kept values beside one bit each."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from maskwright.mask import Mask


def dense_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and of the buffers that are saved; shared ones count once."""
    return sum(tensor.nbytes for tensor in _tensors(model).values())


def packed_bytes(model: nn.Module, masks: Mapping[str, Mask]) -> int:
    """The same with each pruned tensor as its kept values and one bit for each of its elements (rounded up to bytes)."""
    total = 0
    for name, tensor in _tensors(model).items():
        if name in masks:
            total += int(masks[name].keep.sum()) * tensor.element_size() + -(-tensor.numel() // 8)
        else:
            total += tensor.nbytes
    return total


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = model.state_dict()
    seen: set[tuple[int, int]] = set()
    unique = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and key not in seen:
            seen.add(key)
            unique[name] = tensor
    return unique
