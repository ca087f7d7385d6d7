"""Which samples a step trains on, and a thread that prepares them while the model works."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

_AHEAD = 2
"""Batches that are prepared in advance."""


class Source(Protocol):
    """Samples by index, as `maskwright.sources` has them: pure functions of (seed, epoch, index)."""

    def __len__(self) -> int: ...

    def order(self, epoch: int) -> Tensor: ...

    def batch(self, indices: Tensor, epoch: int = 0) -> dict[str, Tensor]: ...


class Batches:
    """`batches[step]`: this process's rows of the global batch of a step, made ahead by a thread.

    The global batch of step s holds the samples s·size … (s + 1)·size - 1 of all epochs one after the other, each epoch in
    its own order; process r has the r-th of `processes` equal parts. So a run sees the same samples with any number of
    processes, and from any step on. It is a context manager, which ends the thread.
    """

    def __init__(self, source: Source, size: int, *, process: int = 0, processes: int = 1) -> None:
        self.source = source
        self.size = size
        self.process = process
        self.share = size // processes
        self._order = lru_cache(maxsize=2)(source.order)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="maskwright-batches")
        self._coming: dict[int, Future[dict[str, Tensor]]] = {}
        self._begun: float | None = None
        self._waited = 0.0

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __getitem__(self, step: int) -> Mapping[str, Tensor]:
        asked = time.perf_counter()
        if self._begun is None:
            self._begun = asked
        for index in range(step, step + 1 + _AHEAD):
            if index not in self._coming:
                self._coming[index] = self._thread.submit(self.make, index)
        batch = self._coming.pop(step).result()
        self._waited += time.perf_counter() - asked
        return batch

    @property
    def waiting(self) -> float:
        """The share of the time since the first batch was asked for, that one's included, in which one was waited for."""
        return self._waited / (time.perf_counter() - self._begun) if self._begun is not None else 0.0

    def make(self, step: int) -> dict[str, Tensor]:
        """The batch of a step, made now."""
        first = step * self.size + self.process * self.share
        numbers = torch.arange(first, first + self.share)
        epochs = numbers // len(self.source)
        parts = []
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            places = numbers[epochs == epoch] % len(self.source)
            parts.append(self.source.batch(self._order(epoch)[places], epoch))
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
