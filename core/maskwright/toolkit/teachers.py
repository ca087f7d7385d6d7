"""Exponential moving average teachers."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn


def teacher_of(student: nn.Module) -> nn.Module:
    """A copy that takes no gradient and stays in evaluation mode."""
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    # Not a lambda: a copy of the teacher must hold itself, and be picklable.
    teacher.train = partial(_stay, teacher)  # type: ignore[method-assign]
    return teacher


def _stay(teacher: nn.Module, mode: bool = True) -> nn.Module:
    return teacher


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher ← decay · teacher + (1 - decay) · student for every parameter; buffers are copied."""
    for mine, its in zip(teacher.parameters(), student.parameters()):
        mine.lerp_(its, 1 - decay)
    for held, current in zip(teacher.buffers(), student.buffers()):
        held.copy_(current)
