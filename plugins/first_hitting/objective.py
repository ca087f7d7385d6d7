"""The likelihood bound of masked diffusion, without time."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import Batch, BoundObjective, Loss, Mask, Signals, adapt
from maskwright.backbones.transformers import denoiser
from maskwright.errors import BackboneMismatch


def substitution(logits: Tensor, tokens: Tensor, mask_token: int) -> Tensor:
    """SUBS (Sahoo et al., arXiv:2406.07524, section 3.2.3): logits [B, L, V] → log μ(x), [B, L, V].

    The mask token has probability zero, and a visible token of `tokens` [B, L] stays what it is.
    """
    real = logits.index_fill(-1, torch.tensor([mask_token], device=logits.device), -torch.inf)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    itself = torch.zeros_like(logits).masked_fill(classes != tokens[..., None], -torch.inf)
    return torch.where((tokens == mask_token)[..., None], real.log_softmax(-1), itself)


def time_free_nll(nll: Tensor, hidden: Tensor) -> Tensor:
    """Each sample's mean over its n hidden tokens: [B, L], bool [B, L] → [B]; exactly 0 where nothing is hidden.

    With n ~ U{1..L} its expectation is the bound per token, -1/L ∫ α'/(1-α) E[Σ_hidden -log μ] dt, for every schedule α.
    """
    return (nll * hidden).sum(1) / hidden.sum(1).clamp(min=1)


@attrs.frozen
class MaskedDiffusion:
    """Hidden tokens predicted from the visible ones; each sample's mean cross-entropy, whatever share is hidden.

    With the strategy `uniform-count` this is the continuous-time bound of masked diffusion, without its time (Zheng et al.,
    arXiv:2409.02908). The network gets no time.
    """

    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "masked-diffusion"
    modalities: ClassVar[frozenset[str]] = frozenset({"text"})
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    provides: ClassVar[frozenset[str]] = frozenset()
    backbone: ClassVar[str] = "token"
    default_strategy: ClassVar[str] = "uniform-count"

    def bind(self, backbone: nn.Module) -> BoundMaskedDiffusion:
        """On a TokenBackbone (or a model that has an adapter) that has a mask token."""
        adapted = adapt(backbone, self.backbone)
        if adapted.mask_token is None:
            raise BackboneMismatch(
                f"masked-diffusion needs a mask token, and {type(backbone).__name__} names none: add one to the tokenizer and "
                "the embeddings, and set config.mask_token_id."
            )
        if not 0 <= adapted.mask_token < adapted.vocabulary:
            raise BackboneMismatch(
                f"The mask token {adapted.mask_token} is outside the vocabulary of {adapted.vocabulary}; "
                "enlarge the embeddings, or correct config.mask_token_id."
            )
        return BoundMaskedDiffusion(adapted)


class BoundMaskedDiffusion(BoundObjective):
    """Outputs: `prediction` [B, L, V], the logits; `log_probability` [B, L] of the hidden token, 0 where it is visible;
    `bound` [B], the sequence's in nats.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.mask_token: int = backbone.mask_token
        self.denoiser = denoiser(backbone)

    def forward(
        self,
        batch: Batch,
        mask: Mask,
        *,
        signals: Signals | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Loss:
        """Mean over the samples of the mean cross-entropy on hidden tokens.

        A token of the batch that is the mask token itself is not predicted: nobody knows what stood there.
        """
        tokens = batch["tokens"]
        shown = torch.where(mask.keep, tokens, self.mask_token)
        hidden = ~mask.keep & (tokens != self.mask_token)
        logits = self.denoiser(shown)
        log_mu = substitution(logits, shown, self.mask_token)
        chosen = log_mu.gather(-1, tokens[..., None]).squeeze(-1)
        log_probability = torch.where(hidden, chosen, 0.0)
        each = time_free_nll(-log_probability, hidden)
        outputs = {
            "prediction": logits,
            "log_probability": log_probability,
            "bound": each.detach() * tokens.shape[1],
        }
        return Loss(total=each.mean(), parts={"nll": each.mean()}, outputs=outputs)


COMPONENTS = (MaskedDiffusion,)
