"""HideNseek: which random weights survive, found without data, and then the sign of each, which clients learn together.

"HideNseek: Federated Lottery Ticket via Server-side Pruning and Sign Supermask", arXiv:2206.04385.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.hidenseek.pruner import HideNSeek

    return (HideNSeek,)
