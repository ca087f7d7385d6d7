"""CAE: a regressor predicts the latents of hidden patches; a decoder that never sees a visible latent finishes the task.

Xiaokang Chen et al., "Context Autoencoder for Self-Supervised Representation Learning", IJCV 2024, arXiv:2202.03026.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.cae import objective

    return (objective.ContextAutoencoder,)
