"""Hard-patch masks one image at a time: the reference for the throughput and for the law of `hard-patches`.

The steps are those of the method's published procedure: order the patches by predicted loss, put the hardest at the end of a
list, shuffle what is left before them, keep the first patches of the list. Nothing is shared with the plugin.
"""

from __future__ import annotations

import numpy as np


def draw(
    patch_loss: np.ndarray,
    generator: np.random.Generator,
    *,
    ratio: float = 0.75,
    progress: float = 1.0,
    alpha_start: float = 0.0,
    alpha_end: float = 0.5,
) -> np.ndarray:
    """bool [B, N], True = visible, from the predicted losses [B, N]."""
    batch, patches = patch_loss.shape
    kept = int(patches * (1 - ratio))
    hard = int((patches - kept) * (alpha_start + (alpha_end - alpha_start) * progress))
    keep = np.zeros((batch, patches), dtype=bool)
    for row in range(batch):
        order = np.argsort(patch_loss[row])
        hardest = order[patches - hard :]
        others = np.delete(np.arange(patches), hardest)
        generator.shuffle(others)
        listed = np.concatenate([others, hardest])
        place = np.argsort(listed)
        keep[row] = place < kept
    return keep
