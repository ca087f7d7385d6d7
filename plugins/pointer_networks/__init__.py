"""Pointer Networks.

Decides which input element comes next in an output sequence: attention over the inputs is the output distribution itself, and
positions that were used are masked when a sequence is decoded.

Vinyals, Fortunato and Jaitly, arXiv:1506.03134, NIPS 2015.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.pointer_networks import objective, sampler

    return (*objective.COMPONENTS, *sampler.COMPONENTS)
