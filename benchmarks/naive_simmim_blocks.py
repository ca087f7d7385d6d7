"""SimMIM's squares one image at a time: the reference for the throughput and for the law of `simmim-blocks`.

The steps are those of the method's published procedure: a permutation of the squares, the first ones hidden, each square repeated
down to the model's patches. Nothing is shared with the plugin.
"""

from __future__ import annotations

import numpy as np


def draw(
    batch: int,
    generator: np.random.Generator,
    *,
    image: int = 224,
    mask_patch: int = 32,
    model_patch: int = 16,
    ratio: float = 0.6,
) -> np.ndarray:
    """bool [B, image / model_patch, image / model_patch], True = visible."""
    side, scale = image // mask_patch, mask_patch // model_patch
    hidden = int(np.ceil(side**2 * ratio))
    masks = []
    for _ in range(batch):
        squares = np.ones(side**2, dtype=bool)
        squares[generator.permutation(side**2)[:hidden]] = False
        masks.append(squares.reshape(side, side).repeat(scale, axis=0).repeat(scale, axis=1))
    return np.stack(masks)
