"""TALL masks and Consensus Merging: which entries of a merged task vector each task uses, and which a shared model keeps.

Wang, Dimitriadis, Ortiz-Jimenez, Fleuret, Frossard: "Localizing Task Information for Improved Model Merging and Compression",
ICML 2024, arXiv:2405.07813.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.tall_masks.pruner import Consensus, TallMasks

    return (TallMasks, Consensus)
