"""MixedAE: from which image of a small group each patch comes; the encoder must recognise what belongs together.

Chen et al., "Mixed Autoencoder for Self-supervised Visual Representation Learning", CVPR 2023, arXiv:2303.17152.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.mixedae import masks, objective

    return (masks.MixAssignment, objective.MixedAutoencoder)
