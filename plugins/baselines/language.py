"""Next-token prediction."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import AttentionMask, Batch, BoundObjective, Loss, Mask, Signals, adapt
from maskwright.errors import BackboneMismatch, MaskShapeError


def attention_rule(mask: Mask, length: int) -> AttentionMask | None:
    """Who attends to whom among `length` tokens when a mask of tokens, or a rule, is ANDed with causality.

    Every token attends to itself besides: the residual stream shows it to itself anyway, and no row of attention is empty then.
    None where that is the causal model's own rule.
    """
    if isinstance(mask, AttentionMask):
        if (mask.q_len, mask.kv_len) != (length, length):
            raise MaskShapeError(
                f"An attention rule for {length} tokens must be {length} × {length}, not {mask!r}."
            )
        visible = mask
    elif bool(mask.keep.all()):
        return None
    else:
        visible = AttentionMask.keys(mask)
    itself = AttentionMask.window(length, 0, device=mask.device)
    return AttentionMask.causal(length, device=mask.device) & visible | itself


def predicted_tokens(mask: Mask, tokens: Tensor) -> Tensor:
    """bool [B, L]: the tokens that are predicted, those that are visible and follow a visible one."""
    keep = torch.ones_like(tokens, dtype=torch.bool) if isinstance(mask, AttentionMask) else mask.keep
    return torch.nn.functional.pad(keep[:, 1:] & keep[:, :-1], (1, 0))


@attrs.frozen
class NextToken:
    """The next token from those before it, in a causal language model.

    A mask of tokens [B, L] says which exist: a hidden one is treated as padding, neither attended to nor predicted, and nothing
    is predicted from its place. An attention rule (`AttentionMask`) is ANDed with causality and hides no token.
    """

    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "next-token"
    modalities: ClassVar[frozenset[str]] = frozenset({"text"})
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    provides: ClassVar[frozenset[str]] = frozenset()
    backbone: ClassVar[str] = "token"
    causal: ClassVar[bool] = True
    default_strategy: ClassVar[dict[str, Any]] = {"name": "random", "ratio": 0.0}

    def bind(self, backbone: nn.Module) -> BoundNextToken:
        """On a causal TokenBackbone (or a model that has an adapter)."""
        adapted = adapt(backbone, self.backbone)
        if adapted.shift != 1:
            raise BackboneMismatch(
                f"next-token needs a causal language model, and {type(backbone).__name__} predicts each token at its own place; "
                "use an objective for masked models, such as 'masked-diffusion'."
            )
        return BoundNextToken(adapted)


class BoundNextToken(BoundObjective):
    """Outputs: `prediction` [B, L, V], where [:, i] are the logits of token i; zero where none is predicted."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self,
        batch: Batch,
        mask: Mask,
        *,
        signals: Signals | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Loss:
        """Mean cross-entropy in nats over the predicted tokens of the batch; exactly 0 when there are none."""
        tokens = batch["tokens"]
        logits = self.backbone.logits(tokens, attention=attention_rule(mask, tokens.shape[1]))
        prediction = torch.nn.functional.pad(logits[:, :-1], (0, 0, 1, 0))
        predicted = predicted_tokens(mask, tokens)
        prediction = torch.where(predicted[..., None], prediction, 0.0)
        each = torch.nn.functional.cross_entropy(prediction.flatten(0, 1), tokens.flatten(), reduction="none")
        loss = (each * predicted.flatten()).sum() / predicted.sum().clamp(min=1)
        return Loss(total=loss, parts={"nll": loss}, outputs={"prediction": prediction})


COMPONENTS = (NextToken,)
