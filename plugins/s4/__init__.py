"""Efficiently Modeling Long Sequences with Structured State Spaces.

Decides which part of the past a sequence model keeps: a linear state of N numbers a channel, which HiPPO-LegS makes an optimal
compression of the whole history; one long convolution in training, one step of constant cost in generation.

Gu, Goel and Ré, arXiv:2111.00396, ICLR 2022.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.s4 import objective, sampler

    return (*objective.COMPONENTS, *sampler.COMPONENTS)
