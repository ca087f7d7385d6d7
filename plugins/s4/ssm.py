"""The equations: HiPPO-LegS, its diagonal-plus-low-rank form, the bilinear recurrence and the kernel by Cauchy sums.

Symbols as in the paper: A = Λ - P P*, input B, output C, step Δ (`dt`), Ā and B̄ discretised, K the kernel, C̃ = (I - Ā^L)ᵀ C.
Complex vectors hold N/2 numbers, one of each conjugate pair: v·x over all N is 2 Re Σ v x over these. Shapes: Λ, P, B, C
[H, N/2], Δ [H].
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from maskwright.errors import BadParameter


def legs(n: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS (equation 2): A [N, N] and B [N], float64."""
    odd = (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt()
    A = -torch.outer(odd, odd).tril(-1) - torch.diag(torch.arange(1, n + 1, dtype=torch.float64))
    return A, odd


def legs_low_rank(n: int) -> Tensor:
    """P [N] with A + P Pᵀ = -I/2 + S and S skew-symmetric (appendix C.1), float64."""
    return (torch.arange(n, dtype=torch.float64) + 0.5).sqrt()


def nplr(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Theorem 1 for LegS: Λ, P̂ = V* P and B̂ = V* B [N/2], V [N, N/2], complex128; A = V (Λ - P̂ P̂*) V* with the conjugates.

    Kept are the eigenvalues with negative imaginary part. Each eigenvector is turned so that its B̂ is positive: a phase is
    otherwise the linear algebra library's choice. Nothing is clipped. Raises `BadParameter` for an odd or empty N.
    """
    if n < 2 or n % 2:
        raise BadParameter(f"A state of {n} numbers has no conjugate pairs; N must be even, and at least 2.")
    A, B = legs(n)
    P = legs_low_rank(n)
    skew = A + torch.outer(P, P)
    frequencies, V = torch.linalg.eigh(-1j * skew)
    frequencies, V = frequencies[: n // 2], V[:, : n // 2]
    B = V.mH @ B.to(V)
    V = V * (B / B.abs())
    return -0.5 + 1j * frequencies, V.mH @ P.to(V), B.abs().to(V), V


def whole(half: Tensor) -> Tensor:
    """[..., N/2] → [..., N]: with the conjugates."""
    return torch.cat([half, half.conj()], dim=-1)


def twice_real(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a·b over all N from the half of each: [..., N/2] → [...], real."""
    return 2 * (a * b).real.sum(-1)


@attrs.frozen(eq=False)
class Recurrence:
    """x' = Ā x + B̄ u and y = C x' + D u, with Ā = diag(E) - F wᵀ: a step costs O(N). All [H, N/2], D [H]."""

    E: Tensor
    F: Tensor
    w: Tensor
    B: Tensor
    C: Tensor
    D: Tensor

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H], complex [B, H, N/2] → y [B, H] and the next state."""
        seen = twice_real(self.w, state)[..., None]
        state = self.E * state - self.F * seen + self.B * u[..., None]
        return twice_real(self.C, state) + self.D * u, state

    def transition(self) -> Tensor:
        """Ā [H, N, N], dense."""
        return torch.diag_embed(whole(self.E)) - whole(self.F)[..., None] * whole(self.w)[..., None, :]


def bilinear(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, D: Tensor) -> Recurrence:
    """The bilinear discretisation (equation 3), its inverse by Woodbury's identity: Ā is diagonal plus low rank again."""
    dt = dt[..., None]
    inverse = 1 / (2 / dt - Lambda)
    F = inverse * P
    kappa = 1 / (1 + twice_real(P.conj(), F)[..., None])
    bent = twice_real(P.conj(), inverse * B)[..., None]
    return Recurrence(
        E=(2 / dt + Lambda) * inverse,
        F=F,
        w=kappa * 4 / dt * P.conj() * inverse,
        B=2 * inverse * B - 2 * kappa * bent * F,
        C=C,
        D=D,
    )


def truncated(C: Tensor, transition: Tensor, length: int) -> Tensor:
    """C̃ = (I - Ā^L)ᵀ C: the output that makes the generating function the one of the first L terms."""
    return C - (whole(C)[..., None, :] @ torch.linalg.matrix_power(transition, length))[..., 0, : C.shape[-1]]


def untruncated(C: Tensor, transition: Tensor, length: int) -> Tensor:
    """C from C̃."""
    identity = torch.eye(transition.shape[-1], dtype=transition.dtype, device=transition.device)
    left = identity - torch.linalg.matrix_power(transition, length).mT
    return torch.linalg.solve(left, whole(C)[..., None])[..., : C.shape[-1], 0]


def lengthened(C: Tensor, transition: Tensor, length: int) -> Tensor:
    """C̃ for 2L from C̃ for L: C̃ + (Ā^L)ᵀ C̃."""
    return C + (whole(C)[..., None, :] @ torch.linalg.matrix_power(transition, length))[..., 0, : C.shape[-1]]


def cauchy_kernel(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """Algorithm 1: the first `length` terms C Āʲ B̄ from C̃ (`C`), real [..., H, L]; B may be a stack [..., H, N/2].

    At the root of unity exp(-2iθ), θ = πj/L, every Cauchy sum with poles ΔΛ at z = 2i tan θ is cos θ times the sum with poles
    cos θ ΔΛ at 2i sin θ, so that nothing is infinite at θ = π/2. A pair of conjugate poles is one real quadratic with a
    complex argument, and all sums are one real matrix product. O(N L) time and memory a channel, for the sums and the FFT.
    """
    half = length // 2 + 1
    theta = torch.arange(half, dtype=torch.float64, device=dt.device) * (math.pi / length)
    sin, cos = theta.sin().to(dt), theta.cos().to(dt)
    turn = torch.polar(torch.ones_like(theta), theta).to(Lambda)

    step = dt[:, None]
    radius = (Lambda.abs() * step)[..., None] * cos
    real = (radius - 2 * sin) * (radius + 2 * sin)
    imaginary = (-4 * Lambda.real * step)[..., None] * (sin * cos)
    size = real.square() + imaginary.square()
    inverse = torch.cat([real / size, -imaginary / size], dim=-1)  # of the quadratic, [H, N/2, 2F]

    batch = B.shape[:-2]
    right = torch.cat([B.reshape(-1, *B.shape[-2:]), P[None]])  # B…, P
    products = torch.stack([C, P.conj()])[:, None] * right * step  # [2, S + 1, H, N/2]
    sums = torch.stack([products.real, (products * Lambda.conj()).real * step])
    found = sums.flatten(0, 2).transpose(0, 1) @ inverse
    found = torch.complex(found[..., :half], found[..., half:])
    first, second = found.unflatten(1, sums.shape[:3]).movedim(0, -2)  # each [2, S + 1, H, F]
    r = 4j * sin * first - 2 * cos * second

    corrected = r[0, :-1] - cos * r[0, -1] * r[1, :-1] / (1 + cos * r[1, -1])
    kernel = torch.fft.irfft(turn * corrected, n=length)
    return kernel.reshape(*batch, *kernel.shape[-2:])


def before_step(state: Tensor, Lambda: Tensor, P: Tensor, dt: Tensor) -> Tensor:
    """The B whose B̄ is Ā x: with it the kernel is C Ā^(j+1) x, what a carried state [B, H, N/2] adds to the outputs."""
    moved = Lambda * state - P * twice_real(P.conj(), state)[..., None]
    return state / dt[..., None] + moved / 2


def krylov(transition: Tensor, B: Tensor, length: int) -> Tensor:
    """B̄, Ā B̄, …, Ā^(L-1) B̄ as columns: [H, N, N], [H, N] → [H, N, L], by doubling."""
    columns, power = B[..., None], transition
    while columns.shape[-1] < length:
        columns = torch.cat([columns, power @ columns], dim=-1)
        power = power @ power
    return columns[..., :length]


def convolve(u: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution [B, H, L] with [H, L], by FFTs of 2L points: nothing wraps round."""
    length = u.shape[-1]
    points = 2 * length
    product = torch.fft.rfft(u, n=points) * torch.fft.rfft(kernel[..., :length], n=points)
    return torch.fft.irfft(product, n=points)[..., :length]
