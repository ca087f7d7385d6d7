"""Training losses of the image objectives as one writes them for oneself: one network, one mask, one loss, nothing to choose.

Each is a module whose `forward(pixels)` draws its mask and returns the loss, with the sizes of `benchmarks.objectives`;
`after_step`, where it has one, moves a teacher. The networks are the ones that maskwright trains, from `backbones.defaults`.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.backbones import defaults

SIZE, PATCH, WIDTH, DEPTH, HEADS = 64, 8, 128, 4, 4
SIDE, COUNT, PIXELS = SIZE // PATCH, (SIZE // PATCH) ** 2, PATCH * PATCH * 3
DECODER = {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4}
NARROW = DECODER["decoder_width"]
CONV = {"channels": 3, "width": 32, "depth": 2}


def vit() -> Any:
    """The vision transformer that is trained."""
    return defaults.vision_transformer(
        image_size=SIZE, patch_size=PATCH, width=WIDTH, depth=DEPTH, heads=HEADS, seed=0
    )


def resnet() -> Any:
    """The convolutional network that is trained."""
    return defaults.convolutional_network(**CONV, seed=0)


def blocks(width: int = NARROW, depth: int = DECODER["decoder_depth"]) -> nn.Module:
    """A decoder's transformer."""
    block = nn.TransformerEncoderLayer(
        width, DECODER["decoder_heads"], 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)


def take(x: Tensor, index: Tensor) -> Tensor:
    """[B, N, D], int64 [B, K] → [B, K, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def embedded(network: Any, pixels: Tensor) -> Tensor:
    """[B, C, H, W] → [B, N, D], with positions."""
    embeddings = network.embeddings
    return embeddings.patch_embeddings(pixels) + embeddings.position_embeddings[:, 1:]


def encoded(network: Any, tokens: Tensor) -> Tensor:
    """[B, K, D] → [B, 1 + K, D], the class token before them."""
    embeddings = network.embeddings
    first = embeddings.cls_token + embeddings.position_embeddings[:, :1]
    x = torch.cat([first.expand(len(tokens), -1, -1), tokens], 1)
    for layer in network.layers:
        x = layer(x)
    return network.layernorm(x)


def patches(pixels: Tensor, patch: int = PATCH) -> Tensor:
    """[B, C, H, W] → [B, N, p·p·C]."""
    b, c, h, w = pixels.shape
    cells = pixels.reshape(b, c, h // patch, patch, w // patch, patch)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def normal(target: Tensor) -> Tensor:
    """Each patch with mean 0 and deviation 1."""
    variance, mean = torch.var_mean(target, -1, keepdim=True)
    return (target - mean) / (variance + 1e-6).sqrt()


class Mae(nn.Module):
    """Three quarters dropped, a light decoder, normalised pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit()
        self.embed = nn.Linear(WIDTH, NARROW)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, NARROW))
        self.register_buffer("positions", torch.randn(1, COUNT, NARROW))
        self.decoder = blocks()
        self.predict = nn.Linear(NARROW, PIXELS)

    def forward(self, pixels: Tensor) -> Tensor:
        batch, kept = len(pixels), COUNT // 4
        order = torch.rand(batch, COUNT).argsort(1)
        back = order.argsort(1)
        x = self.embed(encoded(self.vit, take(embedded(self.vit, pixels), order[:, :kept])))
        full = torch.cat([x[:, 1:], self.mask_token.expand(batch, COUNT - kept, -1)], 1)
        full = take(full, back) + self.positions
        predicted = self.predict(self.decoder(torch.cat([x[:, :1], full], 1))[:, 1:])
        error = (predicted - normal(patches(pixels))).square().mean(-1)
        hidden = back >= kept
        return (error * hidden).sum() / hidden.sum()


class SimMim(nn.Module):
    """Ten of sixteen squares replaced by a token, pixels by a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.head = nn.Conv2d(WIDTH, PIXELS, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        batch, square = len(pixels), 16
        side = SIZE // square
        order = torch.rand(batch, side * side).argsort(1).argsort(1)
        squares = (order < math.ceil(0.6 * side * side)).view(batch, side, side)
        hidden = squares.repeat_interleave(square // PATCH, 1).repeat_interleave(square // PATCH, 2)
        x = self.vit.embeddings.patch_embeddings(pixels)
        x = torch.where(hidden.flatten(1)[..., None], self.mask_token, x)
        x = encoded(self.vit, x + self.vit.embeddings.position_embeddings[:, 1:])[:, 1:]
        predicted = F.pixel_shuffle(self.head(x.transpose(1, 2).reshape(batch, WIDTH, SIDE, SIDE)), PATCH)
        where = hidden.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
        return ((predicted - pixels).abs() * where).sum() / (where.sum() + 1e-5) / 3


class Hpm(nn.Module):
    """Two decoders, a teacher that says where it is hard, and the order of the losses to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.student = self.Network()
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Hpm:
        super().train(mode)
        self.teacher.eval()
        return self

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit()
            self.embed = nn.Linear(WIDTH, NARROW)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, NARROW))
            self.register_buffer("positions", torch.randn(1, COUNT, NARROW))
            self.pixels, self.loss = blocks(), blocks()
            self.to_pixels, self.to_loss = nn.Linear(NARROW, PIXELS), nn.Linear(NARROW, PIXELS)

        def forecast(self, x: Tensor) -> Tensor:
            return self.to_loss(self.loss(x)[:, 1:]).mean(-1)

    @torch.no_grad()
    def _forecast(self, pixels: Tensor) -> Tensor:
        x = self.teacher.embed(encoded(self.teacher.vit, embedded(self.teacher.vit, pixels)))
        return self.teacher.forecast(torch.cat([x[:, :1], x[:, 1:] + self.teacher.positions], 1))

    def forward(self, pixels: Tensor) -> Tensor:
        batch, kept, student = len(pixels), COUNT // 4, self.student
        hardest = self._forecast(pixels).argsort(1, descending=True)[:, : (COUNT - kept) // 4]
        order = torch.rand(batch, COUNT).scatter(1, hardest, -1.0).argsort(1, descending=True)
        back = order.argsort(1)
        x = student.embed(encoded(student.vit, take(embedded(student.vit, pixels), order[:, :kept])))
        full = torch.cat([x[:, 1:], student.mask_token.expand(batch, COUNT - kept, -1)], 1)
        x = torch.cat([x[:, :1], take(full, back) + student.positions], 1)
        predicted, forecast = student.to_pixels(student.pixels(x)[:, 1:]), student.forecast(x)
        error = (predicted - patches(pixels)).square().mean(-1).gather(1, order[:, kept:])
        said, true = forecast.gather(1, order[:, kept:]), error.detach()
        harder = true[:, None, :] > true[:, :, None]
        cost = -torch.log((said[:, None, :] - said[:, :, None]).sigmoid() + 1e-6)
        return error.mean() + (cost * harder).sum() / harder.sum()

    @torch.no_grad()
    def after_step(self) -> None:
        for mine, its in zip(self.teacher.parameters(), self.student.parameters()):
            mine.lerp_(its, 1 - 0.999)


class Spark(nn.Module):
    """A ResNet whose maps are zero in hidden cells, decoded from all scales."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = resnet()
        sizes = [CONV["width"] * 2**stage for stage in range(3)][::-1]  # from coarse to fine
        width = NARROW
        self.widths = [width // 2**level for level in range(5)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes)
        self.tokens = nn.ParameterList(torch.zeros(1, size, 1, 1) for size in sizes)
        self.projections = nn.ModuleList(
            nn.Conv2d(size, self.widths[level], 3 if level else 1, padding=1 if level else 0)
            for level, size in enumerate(sizes)
        )
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(one, one, 4, stride=2, padding=1) for one in self.widths[:-1]
        )
        self.mixes = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(one, one, 3, padding=1, bias=False),
                nn.BatchNorm2d(one),
                nn.ReLU6(inplace=True),
                nn.Conv2d(one, two, 3, padding=1, bias=False),
                nn.BatchNorm2d(two),
            )
            for one, two in zip(self.widths, self.widths[1:])
        )
        self.pixels = nn.Conv2d(self.widths[-1], 3, 1)

    def _at(self, side: int) -> tuple[Tensor, Tensor]:
        """The mask at the size of a map, and the places where it is visible; made once a size and step."""
        if side not in self.masks:
            times = side // self.keep.shape[-1]
            keep = self.keep.repeat_interleave(times, 1).repeat_interleave(times, 2)
            self.masks[side] = keep[:, None], keep.flatten().nonzero()[:, 0]
        return self.masks[side]

    def _norm(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        """Batch norm of the visible vectors."""
        b, c, h, w = x.shape
        places = self._at(h)[1]
        rows = x.permute(0, 2, 3, 1).reshape(-1, c)
        seen = F.batch_norm(
            rows[places], norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1, norm.eps
        )
        full = torch.zeros_like(rows).index_copy(0, places, seen)
        return full.view(b, h, w, c).permute(0, 3, 1, 2)

    def _layer(self, layer: Any, x: Tensor) -> Tensor:
        x = layer.convolution(x)
        x = x * self._at(x.shape[2])[0]
        return getattr(layer, "activation", nn.Identity())(self._norm(layer.normalization, x))

    def _block(self, block: Any, x: Tensor) -> Tensor:
        y = self._layer(block.layer[1], self._layer(block.layer[0], x))
        skip = x if isinstance(block.shortcut, nn.Identity) else self._layer(block.shortcut, x)
        return block.activation(y + skip)

    def forward(self, pixels: Tensor) -> Tensor:
        batch, side, cell = len(pixels), SIZE // 16, 16
        order = torch.rand(batch, side * side).argsort(1).argsort(1)
        self.keep = (order < round(0.4 * side * side)).view(batch, side, side)
        self.masks: dict[int, tuple[Tensor, Tensor]] = {}
        x = pixels * self._at(SIZE)[0]
        embedder = self.resnet.embedder
        x = embedder.pooler(self._layer(embedder.embedder, x))
        x = x * self._at(x.shape[2])[0]
        maps = []
        for stage in self.resnet.encoder.stages:
            for block in stage.layers:
                x = self._block(block, x)
            maps.insert(0, x)
        x = None
        for level, (up, mix) in enumerate(zip(self.ups, self.mixes)):
            if level < len(maps):
                full = self._norm(self.norms[level], maps[level])
                full = torch.where(self._at(full.shape[2])[0], full, self.tokens[level])
                full = self.projections[level](full)
                x = full if x is None else x + full
            x = mix(up(x))
        predicted = patches(self.pixels(x), cell)
        error = (predicted - normal(patches(pixels, cell))).square().mean(-1)
        hidden = ~self.keep.flatten(1)
        return (error * hidden).sum() / hidden.sum()


class Croco(nn.Module):
    """Nine tenths of the first view dropped, completed from the second by a decoder that attends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit()
        self.embed = nn.Linear(WIDTH, NARROW)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, NARROW))
        self.register_buffer("positions", torch.randn(1, COUNT, NARROW))
        depth, heads = DECODER["decoder_depth"], DECODER["decoder_heads"]
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(
                NARROW, heads, 4 * NARROW, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.memory_norms = nn.ModuleList(nn.LayerNorm(NARROW) for _ in range(depth))
        self.norm = nn.LayerNorm(NARROW)
        self.predict = nn.Linear(NARROW, PIXELS)

    def forward(self, pixels: Tensor, pixels_other_view: Tensor) -> Tensor:
        batch, kept = len(pixels), COUNT - int(0.9 * COUNT)
        order = torch.rand(batch, COUNT).argsort(1)
        back = order.argsort(1)
        x = self.embed(encoded(self.vit, take(embedded(self.vit, pixels), order[:, :kept]))[:, 1:])
        full = torch.cat([x, self.mask_token.expand(batch, COUNT - kept, -1)], 1)
        x = take(full, back) + self.positions
        other = self.embed(encoded(self.vit, embedded(self.vit, pixels_other_view))[:, 1:]) + self.positions
        for block, norm in zip(self.blocks, self.memory_norms):
            x = block(x, norm(other))
        error = (self.predict(self.norm(x)) - normal(patches(pixels))).square().mean(-1)
        hidden = back >= kept
        return (error * hidden).sum() / hidden.sum()


BY_HAND: dict[str, type[nn.Module]] = {
    "mae": Mae,
    "simmim": SimMim,
    "hpm": Hpm,
    "spark": Spark,
    "croco": Croco,
}
"""The loops written by hand, by the name of the objective."""
