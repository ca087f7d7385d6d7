"""The light transformers that masked autoencoders reconstruct with, from one view or from two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskwright.errors import BadParameter
from maskwright.mask import Mask
from maskwright.toolkit.images import sincos_positions


def check_heads(component: Any) -> None:
    """Raise `BadParameter` unless a component's `decoder_heads` divide its `decoder_width`."""
    heads, width = component.decoder_heads, component.decoder_width
    if width % heads:
        raise BadParameter(f"{component.name}: decoder_heads={heads} must divide decoder_width={width}.")


def transformer(width: int, depth: int, heads: int, mlp_ratio: float = 4.0) -> nn.Module:
    """Pre-norm GELU blocks without dropout, and a final norm: [B, T, width] → [B, T, width]."""
    block = nn.TransformerEncoderLayer(
        width,
        heads,
        int(width * mlp_ratio),
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
        layer_norm_eps=1e-6,
    )
    return nn.TransformerEncoder(block, depth, norm=nn.LayerNorm(width, eps=1e-6), enable_nested_tensor=False)


class CrossBlock(nn.Module):
    """Self-attention, cross-attention to a memory, MLP: pre-norm, each with its residual, without dropout.

    `forward(x [B, T, width], memory [B, M, width])` → [B, T, width]. The memory is only read. With `norm_memory` each block
    has a norm of its own for it, shared by keys and values.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, *, norm_memory: bool = True) -> None:
        super().__init__()
        self.norm_memory = nn.LayerNorm(width, eps=1e-6) if norm_memory else nn.Identity()
        self.layer = nn.TransformerDecoderLayer(
            width,
            heads,
            int(width * mlp_ratio),
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
            layer_norm_eps=1e-6,
        )

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        out: Tensor = self.layer(x, self.norm_memory(memory))
        return out


class CrossTransformer(nn.Module):
    """`CrossBlock`s that all read the same memory, and a final norm: [B, T, width], [B, M, width] → [B, T, width]."""

    def __init__(
        self, width: int, depth: int, heads: int, mlp_ratio: float = 4.0, *, norm_memory: bool = True
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            CrossBlock(width, heads, mlp_ratio, norm_memory=norm_memory) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, memory)
        out: Tensor = self.norm(x)
        return out


class DecoderInput(nn.Module):
    """What an MAE decoder sees: encoded prefix and visible tokens, mask tokens elsewhere, fixed positions on all.

    `forward(encoded [B, P+K, D], mask, prefix=P)` → [B, P+N, width] in raster order.
    """

    def __init__(self, encoder_width: int, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("positions", sincos_positions(width, grid), persistent=False)

    positions: Tensor

    def forward(self, encoded: Tensor, mask: Mask, prefix: int) -> Tensor:
        tokens = self.embed(encoded)
        full = mask.scatter_visible(tokens[:, prefix:], self.mask_token) + self.positions
        return torch.cat([tokens[:, :prefix], full], dim=1)


def initialize_linear(module: nn.Module) -> None:
    """Linear layers as in MAE: Xavier-uniform weights, zero biases.

    For `module.apply`. Query, key and value are one matrix in self-attention, and three in cross-attention, as they are in
    the official code of MAE and CroCo: Xavier's bound is another.
    """
    if isinstance(module, nn.MultiheadAttention):
        nn.init.xavier_uniform_(module.in_proj_weight)
        nn.init.zeros_(module.in_proj_bias)
    elif isinstance(module, nn.TransformerDecoderLayer):
        # After its children, which `apply` visits first.
        for weight in module.multihead_attn.in_proj_weight.chunk(3):
            nn.init.xavier_uniform_(weight)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
