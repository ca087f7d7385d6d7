"""MaskAlign: the student sees the patches that a teacher attends to, and aligns their features with the teacher's.

Hongwei Xue et al., "Stare at What You See: Masked Image Modeling without Reconstruction", CVPR 2023, arXiv:2211.08887.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.maskalign import masks, objective

    return masks.Attentive, objective.MaskAlign
