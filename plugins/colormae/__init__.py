"""ColorMAE: patches are hidden by ranking filtered noise; the filter's pass band is the size and spacing of what stays.

Hinojosa, Liu, Ghanem, "ColorMAE: Exploring data-independent masking strategies in Masked AutoEncoders", ECCV 2024,
arXiv:2407.13036.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.colormae import masks

    return (masks.ColorMae,)
