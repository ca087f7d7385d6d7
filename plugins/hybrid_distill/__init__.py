"""Hybrid Distillation: token relations of an MIM teacher, features of a supervised or contrastive one, on few tokens.

Shi, Zhang, Wang, Li, Dai, Zou, Xiong, Tian: "Hybrid Distillation: Connecting Masked Autoencoders with Contrastive Learners",
ICLR 2024, arXiv:2306.15876.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.hybrid_distill.masks import ProgressiveRedundant
    from maskwright.plugins.hybrid_distill.objective import HybridDistill

    return ProgressiveRedundant, HybridDistill
