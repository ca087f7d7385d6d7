"""Exponential moving average teachers."""

from __future__ import annotations

import copy

import torch
from torch import nn


def teacher_of(student: nn.Module) -> nn.Module:
    """A copy that takes no gradient and stays in evaluation mode."""
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    teacher.train = lambda mode=True: teacher  # type: ignore[method-assign]
    return teacher


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher ← decay · teacher + (1 - decay) · student for every parameter; buffers are copied."""
    mine, theirs = list(teacher.parameters()), [p.detach() for p in student.parameters()]
    if mine:
        torch._foreach_lerp_(mine, theirs, 1 - decay)
    for ours, its in zip(teacher.buffers(), student.buffers()):
        ours.copy_(its)
