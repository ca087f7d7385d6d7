"""LT-SFT: which entries of a model may differ from their pretrained values, so that such differences can be added up.

Ansell, Ponti, Korhonen, Vulić: "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022, arXiv:2110.07560.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.composable_sft.pruner import LtSft

    return (LtSft,)
