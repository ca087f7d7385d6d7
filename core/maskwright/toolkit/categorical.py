"""Categorical draws in float64 by the Gumbel-max trick, with the grain of the uniforms as an option.

A uniform of k random bits is at most 1 - 2^-k, so its Gumbel is at most M = -ln(-ln(1 - 2^-k)): 16.6 for float32's 24 bits,
36.7 for 53. Where a class competes with one that is much larger, the cut is felt as a lower temperature
(Zheng et al., arXiv:2409.02908). `truncated_gumbel_law` is that law, exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskwright.errors import BadParameter

BITS = 53
"""Random bits of a float64 uniform; 24 are float32's, 11 float16's, 8 bfloat16's."""


def uniforms(shape: tuple[int, ...], generator: torch.Generator, *, bits: int = BITS) -> Tensor:
    """Float64 numbers on the grid {1, …, 2^bits - 1} / 2^bits, strictly inside (0, 1), on the generator's device.

    Raises `BadParameter` unless 1 < bits <= 53.
    """
    if not 1 < bits <= BITS:
        raise BadParameter(f"bits={bits} must be between 2 and {BITS}, the random bits of a float64 uniform.")
    u = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    if bits < BITS:
        u.mul_(2**bits).floor_().div_(2**bits)
    # Zero has the probability of any other cell; it joins its neighbour, since its logarithm is no number.
    return u.clamp_(min=2.0**-bits)


def categorical(log_weights: Tensor, generator: torch.Generator, *, bits: int = BITS) -> Tensor:
    """One class for each row: [..., V] → int64 [...], class k with probability proportional to exp(log_weights[..., k]).

    Weights need not be normalised; -inf is a class that is never drawn (a row of nothing else gives class 0).
    """
    u = uniforms(tuple(log_weights.shape), generator, bits=bits).to(log_weights.device)
    return gumbel_argmax(log_weights, u)


def gumbel_argmax(log_weights: Tensor, u: Tensor) -> Tensor:
    """The same from float64 uniforms in (0, 1) that were drawn before: argmax of log_weights - ln(-ln u).

    Casting the weights to float64 is of no use beside float32 uniforms: it is the uniform that must be float64.
    """
    return (log_weights - u.log().neg_().log_()).argmax(-1)


def largest_gumbel(bits: int) -> float:
    """M = -ln(-ln(1 - 2^-bits)): the largest Gumbel number that a uniform of so many bits gives."""
    return -math.log(-math.log1p(-(2.0**-bits)))


def truncated_gumbel_law(probabilities: Tensor, largest: float) -> Tensor:
    """What Gumbel-max draws from `probabilities` [..., K] when every Gumbel number is cut at `largest`: [..., K], float64.

    With e = exp(-largest), classes in ascending order, S_i = Σ_{k≥i} π_k and π_0 = 0,
    P(n) = π_n Σ_{i≤n} exp((K+1-i) e) [exp(-e S_i/π_i) - exp(-e S_i/π_{i-1})] / S_i. Large classes gain, small ones lose.
    """
    e = math.exp(-largest)
    ascending, order = probabilities.double().sort(dim=-1)
    classes = ascending.shape[-1]
    from_here = ascending.flip(-1).cumsum(-1).flip(-1)
    before = torch.nn.functional.pad(ascending, (1, 0))[..., :-1]
    above = torch.arange(classes, 0, -1, dtype=torch.float64, device=ascending.device)  # K + 1 - i
    low, high = e * from_here / ascending, e * from_here / before
    # exp(-low) - exp(-high), without the cancellation of two numbers near one; a class of weight zero adds nothing.
    piece = (above * e - low).exp() * -torch.expm1(low - high) / from_here
    piece = torch.where(ascending > 0, piece, 0.0)
    law = ascending * piece.cumsum(-1)
    return torch.empty_like(law).scatter_(-1, order, law)
