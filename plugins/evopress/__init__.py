"""EvoPress: how one budget is spread over layers, found by evolution on the compressed model's own loss.

Sieberling, Kuznedelev, Kurtic, Alistarh: "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", ICML 2025,
arXiv:2410.14649.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.evopress.pruner import EvoPress

    return (EvoPress,)
