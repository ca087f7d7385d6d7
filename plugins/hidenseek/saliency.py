"""Synaptic saliency: S = ∂R/∂|θ| ⊙ |θ|, where R is what a network of absolute weights puts out for an input of ones.

On a chain of linear layers without biases the sum of S over a layer is R for every layer. To have that in other networks too, what
is not linear is taken as a factor that stays: norms divide by a size that has no gradient, activations pass what they get (as a
ReLU does here, where nothing is negative), and attention weighs by q·k, divided by a sum that has no gradient, instead of a softmax.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from maskwright import Batch
from maskwright.errors import NumericalError
from maskwright.toolkit.calibration import run
from maskwright.toolkit.patterns import keep_largest
from maskwright.toolkit.prunable import Weight

ATTENTION = "maskwright-linear"
"""The attention implementation of transformers under which the copy runs."""


class Flow:
    """A float64 copy of a model in which every weight is its absolute value: the model itself is never touched."""

    def __init__(self, model: nn.Module, weights: Sequence[Weight], batch: Batch) -> None:
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)
        with torch.no_grad():
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                if tensor.is_floating_point():
                    tensor.abs_()
        self.parameters = [self.model.get_parameter(weight.name).requires_grad_() for weight in weights]
        self.probe = ones(batch, next(self.model.parameters()).device)
        for module in self.model.modules():
            if hook := _linear(module):
                module.register_forward_hook(hook)
        if hasattr(self.model, "set_attn_implementation"):
            _register()
            self.model.set_attn_implementation(ATTENTION)

    def scores(self) -> list[Tensor]:
        """|S| of each weight, in the parameter's shape and float64. Raises `NumericalError` when R overflows."""
        total = first_tensor(run(self.model, self.probe)).sum()
        if not bool(total.isfinite()):
            raise NumericalError(
                f"hidenseek: the saliency's flow is {float(total.detach())} in float64; the network is too deep or its weights are too "
                "large for it, prune a smaller one or give it norms."
            )
        gradients = torch.autograd.grad(total, self.parameters, allow_unused=True)
        return [
            torch.zeros_like(one) if slope is None else (slope * one.detach()).abs()
            for one, slope in zip(self.parameters, gradients)
        ]

    @torch.no_grad()
    def mask(self, keep: Sequence[Tensor]) -> None:
        """Set what is not kept to zero."""
        for parameter, one in zip(self.parameters, keep):
            parameter.mul_(one)


def ones(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The input: one sample of ones in the shape of a batch; one token where there are tokens. Its values are not looked at."""
    probe = {}
    for name, column in batch.items():
        if name != "labels":
            size = column.shape[1:] if column.is_floating_point() else [1] * (column.ndim - 1)
            dtype = torch.float64 if column.is_floating_point() else column.dtype
            probe[name] = torch.ones(1, *size, dtype=dtype, device=device)
    return probe


def first_tensor(answer: Any) -> Tensor:
    """The logits of a model, or its last features."""
    if isinstance(answer, Tensor):
        return answer
    logits = getattr(answer, "logits", None)
    return logits if logits is not None else answer[0]


def _linear(module: nn.Module) -> Any:
    """A hook that makes a module linear in its input, or None for one that stays as it is."""
    kind = type(module)
    if isinstance(module, nn.Embedding):
        return lambda module, inputs, output: torch.ones_like(output)
    if kind.__module__ in ("torch.nn.modules.activation", "transformers.activations"):
        # nn.MultiheadAttention lies there too, and gives a pair.
        return lambda module, inputs, output: inputs[0] if isinstance(output, Tensor) else output
    if any(word in kind.__name__ for word in ("LayerNorm", "RMSNorm", "GroupNorm")):
        return _scaled
    return None


def _scaled(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A norm that keeps the mean, which is all there is of an input of ones, and whose size has no gradient."""
    x = inputs[0]
    size = x.detach().square().flatten(1).mean(1).sqrt().view(-1, *[1] * (x.ndim - 1))
    x = x / size.clamp(min=torch.finfo(x.dtype).tiny)
    for name, apply in (("weight", torch.mul), ("bias", torch.add)):
        one = getattr(module, name, None)
        if one is not None:
            x = apply(x, one if one.shape == x.shape[-one.ndim :] else one.view(-1, *[1] * (x.ndim - 2)))
    return x


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, lambda *sizes, **arguments: None)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """[B, H, Q, D], [B, G, K, D], [B, G, K, E] → [B, Q, H, E]: linear in each of the three."""
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    scores = query @ key.mT
    size = scores.detach().sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return (scores / size @ value).transpose(1, 2).contiguous(), None


# -- which weights survive -------------------------------------------------------------------------------------------


def kept_count(total: int, sparsity: float) -> int:
    """k = round(keep · n), of the share kept as a decimal number."""
    return round((1 - Fraction(repr(float(sparsity)))) * total)


def shares(total: int, sparsity: float, rounds: int) -> list[int]:
    """How many are kept after each round: keep^(i / rounds) of all, and exactly `kept_count` in the end."""
    keep = 1 - sparsity
    return [
        *(round(total * keep ** (number / rounds)) for number in range(1, rounds)),
        kept_count(total, sparsity),
    ]


def survivors(
    model: nn.Module, weights: Sequence[Weight], batch: Batch, sparsity: float, rounds: int
) -> dict[str, Tensor]:
    """m by name, bool of the parameters' shapes: the largest saliencies over all layers, scored anew after each round."""
    flow = Flow(model, weights, batch)
    sizes = [weight.parameter.numel() for weight in weights]
    keep = [torch.ones_like(weight.parameter, dtype=torch.bool) for weight in weights]
    for count in shares(sum(sizes), sparsity, rounds):
        # What is gone stays gone, also where what is left has no flow.
        scores = [score.masked_fill(~one, -1.0) for score, one in zip(flow.scores(), keep)]
        joined = torch.cat([score.flatten() for score in scores])
        chosen = keep_largest(joined[None], count)[0].split(sizes)
        keep = [one.view(score.shape) for one, score in zip(chosen, scores)]
        flow.mask(keep)
    return {weight.name: one for weight, one in zip(weights, keep)}


def densities(keep: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of each layer that is kept."""
    return {name: float(one.double().mean()) for name, one in keep.items()}
