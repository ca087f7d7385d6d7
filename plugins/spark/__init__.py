"""SparK: a convolutional network sees visible blocks only, as if sparsely convolved, and a hierarchical decoder fills in the rest.

Keyu Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", ICLR 2023,
arXiv:2301.03580.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.spark import masks, objective

    return masks.SparkBlocks, objective.Spark
