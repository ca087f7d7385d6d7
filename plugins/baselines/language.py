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


def previous_visible(keep: Tensor) -> Tensor:
    """The place of the last visible token before each place, -1 where there is none: bool [B, L] → int64 [B, L]."""
    places = torch.arange(keep.shape[1], device=keep.device)
    last = torch.where(keep, places, -1).cummax(1).values
    return torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)


@attrs.frozen
class NextToken:
    """The next token from those before it, in a causal language model.

    A mask of tokens [B, L] says which exist: a hidden one is neither attended to nor predicted nor counted in the positions, so
    that the loss is the one of the sequence without it. An attention rule (`AttentionMask`) is ANDed with causality and hides
    no token.
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
        rule = attention_rule(mask, tokens.shape[1])
        hides = rule is not None and not isinstance(mask, AttentionMask)
        keep = mask.keep if hides else torch.ones_like(tokens, dtype=torch.bool)
        positions = (keep.cumsum(1) - 1).clamp(min=0) if hides else None
        logits = self.backbone.logits(tokens, attention=rule, positions=positions)

        source = previous_visible(keep)
        predicted = keep & (source >= 0)
        prediction = logits.gather(1, source.clamp(min=0)[..., None].expand_as(logits))
        prediction = torch.where(predicted[..., None], prediction, 0.0)
        each = torch.nn.functional.cross_entropy(prediction.flatten(0, 1), tokens.flatten(), reduction="none")
        loss = (each * predicted.flatten()).sum() / predicted.sum().clamp(min=1)
        return Loss(total=loss, parts={"nll": loss}, outputs={"prediction": prediction})


COMPONENTS = (NextToken,)
