"""MaskLLM: which N of every M consecutive weights stay, learned as a choice among the legal patterns.

Fang, Yin, Muralidharan, Heinrich, Pool, Kautz, Molchanov, Wang: "MaskLLM: Learnable Semi-Structured Sparsity for Large
Language Models", NeurIPS 2024, arXiv:2409.17481.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.maskllm.pruner import MaskLlm

    return (MaskLlm,)
