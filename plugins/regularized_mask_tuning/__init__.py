"""Regularized mask tuning: which frozen weights of a pre-trained model stay on for a task, without losing what it knew.

Zheng, Wu, Feng, Zhu, Liu, Zhao, Zha, Chen, Shen: "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained
Vision-Language Models", ICCV 2023, arXiv:2307.15049.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.regularized_mask_tuning.pruner import MaskTuning

    return (MaskTuning,)
