"""S4 as a language model: a causal TokenBackbone with a recurrent step."""

from __future__ import annotations

import math
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from maskwright import AttentionMask
from maskwright.errors import BackboneMismatch, BadParameter
from maskwright.plugins.s4 import ssm
from maskwright.plugins.s4.ssm import Recurrence

CHUNK = 256
"""Inputs that a state takes in at once."""


class S4Layer(nn.Module):
    """H independent systems of N states each, from [B, L, H] to [B, L, H].

    `C` is C̃ for `length`, always: an input that is longer gets C̃ by doubling, without a change of the parameter.
    """

    KERNEL = ("log_dt", "log_decay", "frequency", "B", "P")
    """Parameters that are trained at a rate of their own and without weight decay."""

    def __init__(
        self,
        width: int,
        state: int = 64,
        *,
        length: int,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if length < 1:
            raise BadParameter(f"S4: length={length} must be at least 1.")
        if not 0 < dt_min <= dt_max:
            raise BadParameter(f"S4: dt_min={dt_min} and dt_max={dt_max} must be 0 < dt_min <= dt_max.")
        self.length = length
        dtype = torch.get_default_dtype()
        Lambda, P, B = (one.expand(width, -1) for one in ssm.nplr(state)[:3])
        low, high = math.log(dt_min), math.log(dt_max)
        log_dt = low + (high - low) * torch.rand(width, dtype=torch.float64, generator=generator)
        C = torch.randn(width, state // 2, dtype=torch.complex128, generator=generator)
        D = torch.randn(width, dtype=torch.float64, generator=generator)
        system = ssm.bilinear(Lambda, P, B, C, log_dt.exp(), D)
        C = ssm.truncated(C, system.transition(), length)

        self.log_dt = nn.Parameter(log_dt.to(dtype))
        self.log_decay = nn.Parameter((-Lambda.real).log().to(dtype))
        self.frequency = nn.Parameter((-Lambda.imag).to(dtype))
        self.P, self.B, self.C = (
            nn.Parameter(torch.view_as_real(one.resolve_conj().contiguous()).to(dtype)) for one in (P, B, C)
        )
        self.D = nn.Parameter(D.to(dtype))

    def system(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Λ, P, B, C̃ [H, N/2] and Δ [H]. The real parts of Λ are negative whatever the parameters are."""
        Lambda = torch.complex(-self.log_decay.exp(), -self.frequency)
        P, B, C = (torch.view_as_complex(one) for one in (self.P, self.B, self.C))
        return Lambda, P, B, C, self.log_dt.exp()

    def kernel(self, length: int, state: Tensor | None = None) -> Tensor:
        """C Āʲ B̄ for j < length: [H, L]; with a state [B, H, N/2] what it adds to outputs instead, [B, H, L]."""
        Lambda, P, B, C, dt = self.system()
        tuned = self.length
        if tuned < length:
            double = (one.to(torch.complex128) for one in (Lambda, P, B, C))
            transition = ssm.bilinear(*double, dt.double(), self.D.double()).transition()
            longer = C.to(torch.complex128)
            while tuned < length:
                longer, tuned = ssm.lengthened(longer, transition, tuned), 2 * tuned
            C = longer.to(C)
        if state is not None:
            B = ssm.before_step(state, Lambda, P, dt)
        return ssm.cauchy_kernel(Lambda, P, B, C, dt, tuned)[..., :length]

    def forward(self, u: Tensor, state: Tensor | None = None) -> Tensor:
        """The convolution mode: [B, L, H] → [B, L, H], from a state [B, H, N/2] or from nothing."""
        if not u.shape[1]:
            return u
        u = u.transpose(1, 2)
        y = ssm.convolve(u, self.kernel(u.shape[-1])) + self.D[:, None] * u
        if state is not None:
            y = y + self.kernel(u.shape[-1], state)
        return y.transpose(1, 2)

    @torch.no_grad()
    def recurrence(self) -> Recurrence:
        """The recurrent mode of the same parameters, for stepping. Made in double precision, where C is found from C̃."""
        system = self._exact()
        C = ssm.untruncated(system.C, system.transition(), self.length)
        dtype = torch.view_as_complex(self.B).dtype
        made = attrs.asdict(attrs.evolve(system, C=C), recurse=False)
        return Recurrence(
            **{name: one.to(dtype if one.is_complex() else self.D.dtype) for name, one in made.items()}
        )

    @torch.no_grad()
    def final_state(self, u: Tensor, state: Tensor | None = None) -> Tensor:
        """The state after inputs [B, L, H], and after a state before them: complex [B, H, N/2]."""
        system = self._exact()
        transition = system.transition()
        size = min(CHUNK, max(u.shape[1], 1))
        columns = ssm.krylov(transition, ssm.whole(system.B), size).flip(-1)
        jump = torch.linalg.matrix_power(transition, size)
        # Zeros before the first input leave a state of zeros as it is.
        padded = nn.functional.pad(u.transpose(1, 2), (-u.shape[1] % size, 0)).to(columns)
        x = columns.new_zeros(*padded.shape[:2], columns.shape[1])
        for chunk in padded.split(size, dim=-1):
            if chunk.shape[-1]:
                x = torch.einsum("hmn,bhn->bhm", jump, x) + torch.einsum("hnl,bhl->bhn", columns, chunk)
        if state is not None:
            power = torch.linalg.matrix_power(transition, u.shape[1])
            x = x + torch.einsum("hmn,bhn->bhm", power, ssm.whole(state).to(power))
        return x[..., : x.shape[-1] // 2].to(torch.view_as_complex(self.B).dtype)

    def _exact(self) -> Recurrence:
        Lambda, P, B, C, dt = self.system()
        double = [one.to(torch.complex128) for one in (Lambda, P, B, C)]
        return ssm.bilinear(*double, dt.double(), self.D.double())


class S4Block(nn.Module):
    """x + GLU(linear(GELU(S4(norm(x))))), with dropout (section 3.4)."""

    def __init__(self, width: int, dropout: float, **settings: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layer = S4Layer(width, **settings)
        self.mix = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)

    def inward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """What the layer is given: nothing where a token does not exist."""
        u = self.norm(x)
        return u if keep is None else u * keep[..., None]

    def outward(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual stream after the layer's output."""
        mixed = self.mix(self.dropout(nn.functional.gelu(y)))
        return x + self.dropout(nn.functional.glu(mixed, dim=-1))


@attrs.frozen(eq=False)
class S4State:
    """What generation carries from token to token: the blocks' states, complex [depth, B, H, N/2], and their recurrences."""

    x: Tensor
    recurrences: tuple[Recurrence, ...]


class S4LanguageModel(nn.Module):
    """A causal TokenBackbone of S4 blocks.

    `length` is what kernels are tuned to; longer and shorter texts are the same function of their past. Beside a
    TokenBackbone's methods it has `prefill` and `step`, with a state of constant size. It has no attention and no positions.
    """

    shift = 1

    def __init__(
        self,
        vocabulary: int,
        *,
        length: int,
        width: int = 128,
        depth: int = 4,
        state: int = 64,
        dropout: float = 0.0,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        mask_token: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.vocabulary, self.width, self.mask_token = vocabulary, width, mask_token
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            self.embedding = nn.Embedding(vocabulary, width)
            self.blocks = nn.ModuleList(
                S4Block(
                    width,
                    dropout,
                    state=state,
                    length=length,
                    dt_min=dt_min,
                    dt_max=dt_max,
                    generator=generator,
                )
                for _ in range(depth)
            )
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, vocabulary)

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)

    def logits(
        self,
        tokens: Tensor,
        attention: AttentionMask | None = None,
        positions: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """[B, L] or [B, L, D] → [B, L, V]. Where `keep` [B, L] is False, no layer is given anything."""
        if attention is not None or positions is not None:
            raise BackboneMismatch(
                "S4LanguageModel has neither attention nor positions, so it takes no attention rule; hide tokens with a mask of tokens "
                "under the objective 's4-sequence', or use a Transformer."
            )
        x = self.embed(tokens) if tokens.dtype == torch.int64 else tokens
        x = x if keep is None else x * keep[..., None]
        for block in self.blocks:
            x = block.outward(x, block.layer(block.inward(x, keep)))
        return self.head(self.norm(x))

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> tuple[Tensor, S4State]:
        """int64 [B, P] → logits [B, V] of the token that follows, and the state; by convolution. P may be 0: logits are 0 then."""
        x, states = self.embed(tokens), []
        for block in self.blocks:
            u = block.inward(x)
            states.append(block.layer.final_state(u))
            x = block.outward(x, block.layer(u))
        last = self.head(self.norm(x[:, -1])) if tokens.shape[1] else x.new_zeros(len(x), self.vocabulary)
        return last, S4State(torch.stack(states), tuple(block.layer.recurrence() for block in self.blocks))

    @torch.no_grad()
    def step(self, tokens: Tensor, state: S4State) -> tuple[Tensor, S4State]:
        """int64 [B] → logits [B, V] of the token that follows, and the next state. Its cost does not depend on the past."""
        x, states = self.embed(tokens), []
        for block, recurrence, carried in zip(self.blocks, state.recurrences, state.x):
            y, after = recurrence.step(block.inward(x), carried)
            states.append(after)
            x = block.outward(x, y)
        return self.head(self.norm(x)), attrs.evolve(state, x=torch.stack(states))


def parameter_groups(
    model: nn.Module, *, lr: float = 0.004, weight_decay: float = 0.05, kernel_lr: float = 0.001
) -> list[dict[str, Any]]:
    """Groups for an optimiser: the systems at `kernel_lr` (or `lr`, if lower), without weight decay except for C.

    At the rate of the rest A and Δ become unstable (the official training does the same).
    """
    slow = min(lr, kernel_lr)
    layers = [module for module in model.modules() if isinstance(module, S4Layer)]
    kernel = [getattr(layer, name) for layer in layers for name in S4Layer.KERNEL]
    outputs = [layer.C for layer in layers]
    own = {id(one) for one in (*kernel, *outputs)}
    rest = [one for one in model.parameters() if id(one) not in own and one.requires_grad]
    groups = [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": kernel, "lr": slow, "weight_decay": 0.0},
        {"params": outputs, "lr": slow, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]
