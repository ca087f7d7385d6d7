"""A vision transformer as anyone would write it: PyTorch only, with the methods of a PatchBackbone and no base class."""

import torch
from torch import nn


class PlainViT(nn.Module):
    def __init__(self, image=16, patch_size=4, channels=1, width=32, depth=2, heads=2):
        super().__init__()
        side = image // patch_size
        self.grid, self.patch_size, self.width, self.channels = (side, side), patch_size, width, channels
        self.embed = nn.Conv2d(channels, width, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, side * side, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm, self.depth = nn.LayerNorm(width), depth

    def patches(self, pixels):
        return self.embed(pixels).flatten(2).transpose(1, 2)

    def prefix(self, batch_size):
        return self.class_token.expand(batch_size, -1, -1)

    def encode(self, tokens, levels=()):
        outputs = []
        for block in self.blocks:
            tokens = block(tokens)
            outputs.append(tokens)
        return [outputs[level] for level in levels] if levels else self.norm(tokens)


def stripes(count, image=16, channels=1, seed=0):
    """Images [count, C, image, image] of sine waves: easy to learn, different from each other."""
    draw = torch.Generator().manual_seed(seed)
    phase, frequency, angle = (torch.rand(count, 1, 1, 1, generator=draw) for _ in range(3))
    across, down = torch.meshgrid(*(torch.arange(image) / image,) * 2, indexing="xy")
    wave = (across * (angle * 3).cos() + down * (angle * 3).sin()) * (4 + 12 * frequency)
    return (wave + 6 * phase).sin().expand(-1, channels, -1, -1).contiguous()
