"""The paper's network: one LSTM that reads the inputs, and one that writes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class PointerLSTM(nn.Module):
    """A backbone of kind "pointer": two single-layer LSTMs, weights uniform in [-0.08, 0.08] (section 4.1).

    The decoder starts from the encoder's last hidden and cell state (section 2.1).
    """

    def __init__(self, features: int = 2, width: int = 256, *, spread: float = 0.08) -> None:
        super().__init__()
        self.features, self.width = features, width
        self.reader = nn.LSTM(features, width, batch_first=True)
        self.writer = nn.LSTM(features, width, batch_first=True)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-spread, spread)

    def encode(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """[B, n, F], int64 [B] → ([B, n, H], (h [B, H], c [B, H])), which are those of each row's own last input."""
        packed = pack_padded_sequence(inputs, lengths.cpu(), batch_first=True, enforce_sorted=False)
        read, (h, c) = self.reader(packed)
        memory, _ = pad_packed_sequence(read, batch_first=True, total_length=inputs.shape[1])
        return memory, (h[0], c[0])

    def decode(self, inputs: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """[B, T, F] → [B, T, H]."""
        h, c = (one[None].contiguous() for one in state)
        written, _ = self.writer(inputs, (h, c))
        return written
