"""What a step of training costs: floating-point operations, seconds, and memory at its peak."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

TIMED = 1000
"""Steps whose seconds are remembered: the last ones."""


class Costs:
    """The costs of a run's steps, as its checkpoints hold them.

    The operations of the first step are counted, forward and backward, which makes it slower; all others are timed. Counted are
    matrix products, convolutions and attention, two operations a multiply-add; element-wise work is left out.
    """

    def __init__(self, device: torch.device, processes: int = 1) -> None:
        self.device = device
        self.processes = processes
        self.flops = 0
        self.without_gradient = 0
        self.peak = 0
        self.seconds: deque[float] = deque(maxlen=TIMED)
        _reset_peak(device)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one step, from the wait for its batch to the optimiser."""
        timed = bool(self.flops)
        started = time.perf_counter()
        yield
        if timed:
            self.seconds.append(time.perf_counter() - started)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around the forward pass, teachers included."""
        if self.flops:
            yield
            return
        counter = _counter()
        apart = _Apart(counter)
        with counter, apart:
            yield
        self._forward, self._apart = counter.get_total_flops(), apart.flops

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Around the backward pass that follows."""
        if self.flops:
            yield
            return
        with _counter() as counter:
            yield
        self.flops = (self._forward + counter.get_total_flops()) * self.processes
        self.without_gradient = self._apart * self.processes

    def summary(self) -> dict[str, float]:
        """What summary.json says: all FLOPs of a global step, those of them that no gradient follows, the median of the seconds
        of a step, and bytes."""
        self._look()
        told: dict[str, float] = {}
        if self.flops:
            told |= {"flops_per_step": self.flops, "flops_without_gradient": self.without_gradient}
        if self.seconds:
            told["seconds_per_step"] = float(f"{statistics.median(self.seconds):.4g}")
        return told | ({"peak_memory": self.peak} if self.peak else {})

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        self._look()
        return {
            "flops": self.flops,
            "without_gradient": self.without_gradient,
            "peak": self.peak,
            "seconds": torch.tensor(list(self.seconds), dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.flops, self.without_gradient = int(state["flops"]), int(state["without_gradient"])
        self.peak = int(state["peak"])
        self.seconds = deque(state["seconds"].tolist(), maxlen=TIMED)

    def _look(self) -> None:
        self.peak = max(self.peak, _peak(self.device))


class _Apart(TorchDispatchMode):
    """Inside a counter: how much of it belongs to operations that no gradient follows, such as a teacher's."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter = counter
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        counted = self.counter.get_total_flops() - before
        if counted and not (torch.is_grad_enabled() and _follows((args, kwargs))):
            self.flops += counted
        return result


def _follows(values: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(values))


def _counter() -> FlopCounterMode:
    """A counter that also knows PyTorch's attention on a CPU, which it leaves out by itself."""
    aten = torch.ops.aten
    own: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=own)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Queries times keys, and the weights times the values: shapes [B, H, L, D]."""
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[2] * (width + value[3]))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """The scores once more, and four products for the gradients, as PyTorch counts them elsewhere."""
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[2] * (3 * width + 2 * value[3]))


def _reset_peak(device: torch.device) -> None:
    if device.type != "cpu":
        memory = torch.get_device_module(device)
        if hasattr(memory, "reset_peak_memory_stats"):
            memory.reset_peak_memory_stats(device)
        return
    # Linux forgets a process's peak when it is asked to; elsewhere an earlier one in the same process still counts.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    """Bytes: what tensors took at most on an accelerator, what the process took at most on a CPU; 0 where nobody can say."""
    if device.type != "cpu":
        memory = torch.get_device_module(device)
        return int(memory.max_memory_allocated(device)) if hasattr(memory, "max_memory_allocated") else 0
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    try:
        import resource
    except ImportError:  # a platform without it goes without
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) if sys.platform == "darwin" else 1024 * int(most)
