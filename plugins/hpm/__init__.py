"""Hard Patches Mining: hide the patches whose reconstruction loss the model itself expects to be the largest.

Wang, Song, Fan, Wang, Xie, Zhang: "Hard Patches Mining for Masked Image Modeling", CVPR 2023, arXiv:2304.05919.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.hpm.masks import HardPatches
    from maskwright.plugins.hpm.objective import HardPatchesMining

    return HardPatches, HardPatchesMining
