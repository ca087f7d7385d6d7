"""MTO: how mask tokens and visible tokens may influence each other, around any objective that has mask tokens.

Choi et al., "Emerging Property of Masked Token for Effective Pre-training", ECCV 2024, arXiv:2404.08330. Formulas
reconstructed, not the paper's.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.mto import objective

    return (objective.MaskedTokenOptimization,)
