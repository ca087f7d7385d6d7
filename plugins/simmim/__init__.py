"""SimMIM: coarse squares are hidden, one learned token replaces them, a one-layer head regresses their pixels.

Xie et al., "SimMIM: a Simple Framework for Masked Image Modeling", CVPR 2022, arXiv:2111.09886.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.simmim import masks, objective

    return (masks.SimMimBlocks, objective.SimMim)
