"""Several prompts in one row of a batch, each as if it were alone, so that a batch of unequal prompts is hardly padded.

Siyan Zhao, Daniel Israel, Guy Van den Broeck, Aditya Grover, "Prepacking: A Simple Method for Fast Prefilling and Increased
Throughput in Large Language Models", AISTATS 2025, arXiv:2404.09529.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from maskwright import hookimpl

if TYPE_CHECKING:
    from maskwright.plugins.prepacking.prefilling import Prefilled as Prefilled
    from maskwright.plugins.prepacking.prefilling import prefill as prefill


@hookimpl
def maskwright_components():
    from maskwright.plugins.prepacking import masks

    return masks.COMPONENTS


def __getattr__(name: str) -> Any:
    if name in ("prefill", "Prefilled"):
        from maskwright.plugins.prepacking import prefilling

        return getattr(prefilling, name)
    raise AttributeError(f"module 'maskwright.plugins.prepacking' has no attribute {name!r}")
