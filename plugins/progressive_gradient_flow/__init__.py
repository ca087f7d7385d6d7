"""Progressive gradient flow: how strongly weights outside the N:M mask still act while a model is trained towards it.

Bambhaniya, Yazdanbakhsh, Subramanian, Kao, Agrawal, Evci, Krishna: "Progressive Gradient Flow for Robust N:M Sparsity
Training in Transformers", arXiv:2402.04744.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.progressive_gradient_flow.pruner import NmDecay

    return (NmDecay,)
