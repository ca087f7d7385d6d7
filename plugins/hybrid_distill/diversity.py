"""How diverse attention is: what the paper looks at in teachers and students."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_distance(attention: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Pixels between a patch and what it attends to, on average over the queries: [..., N, N] with rows of sum 1 → [...].

    Raghu et al., arXiv:2108.08810. Uniform attention has a large distance and says nothing, so it needs the NMI beside it.
    """
    row, column = torch.meshgrid(*(torch.arange(side, dtype=attention.dtype) for side in grid), indexing="ij")
    places = torch.stack([row, column], -1).reshape(-1, 2)
    return (attention * (torch.cdist(places, places) * patch_size)).sum(-1).mean(-1)


def normalized_mutual_information(attention: Tensor) -> Tensor:
    """I(query; key) / √(H(query) · H(key)) with queries equally likely: [..., N, N] with rows of sum 1 → [...], in [0, 1].

    Park et al., arXiv:2305.00729. 0 where attention does not depend on the query, 1 where each query has a key of its own.
    """
    joint = attention / attention.shape[-2]
    keys = joint.sum(-2)
    of_queries = torch.log(torch.tensor(float(attention.shape[-2]), dtype=attention.dtype))
    of_keys = -torch.special.xlogy(keys, keys).sum(-1)
    information = of_queries + of_keys + torch.special.xlogy(joint, joint).sum((-2, -1))
    # Where all look at one key its entropy is 0, and so is the information.
    return information / (of_queries * of_keys.clamp(min=1e-12)).sqrt()
