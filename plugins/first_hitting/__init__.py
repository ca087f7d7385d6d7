"""Masked Diffusion Models are Secretly Time-Agnostic Masked Models and Exploit Inaccurate Categorical Sampling.

Decides in which order and when masked tokens are revealed: one at a time, at places chosen uniformly, at times drawn from the
law of the next event; and, in training, that a uniform number of tokens is hidden, since the loss does not depend on time.

Zheng, Chen, Mao, Liu, Zhu and Zhang, arXiv:2409.02908, ICLR 2025.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.first_hitting import masks, objective, sampler

    return (*masks.COMPONENTS, *objective.COMPONENTS, *sampler.COMPONENTS)
