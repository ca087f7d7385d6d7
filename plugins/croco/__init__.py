"""CroCo: nine tenths of one view are hidden and completed from a second view of the same scene.

Weinzaepfel, Leroy, Lucas, Brégier, Cabon, Arora, Antsfeld, Chidlovskii, Csurka, Revaud: "CroCo: Self-Supervised Pre-training
for 3D Vision Tasks by Cross-View Completion", NeurIPS 2022, arXiv:2210.10716.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.croco.objective import CrossViewCompletion

    return (CrossViewCompletion,)
