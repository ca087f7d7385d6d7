"""The next token, in any causal model, where a hidden token is no input."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import AttentionMask, Batch, BoundObjective, Loss, Mask, Signals, adapt, setting
from maskwright.errors import BackboneMismatch


def predicted_places(keep: Tensor, which: str) -> Tensor:
    """Which tokens are predicted, bool [B, L]: those that are visible, hidden, or all; never the first."""
    chosen = {"visible": keep, "hidden": ~keep, "all": torch.ones_like(keep)}[which].clone()
    chosen[:, 0] = False
    return chosen


@attrs.frozen
class S4Sequence:
    """Each token from those before it, where a hidden token is a place without input: time passes, the state decays.

    A mask of tokens [B, L] says which are given (S4 multiplies padding by 0 before each of its layers); `predict="visible"` counts those
    in the loss, as for padding, and "hidden" the others, as in recall and copying tasks whose answers are not shown. Any other causal
    model gets embeddings of zero at hidden places. An attention rule is ANDed with causality, for models that have attention.
    """

    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "s4-sequence"
    modalities: ClassVar[frozenset[str]] = frozenset({"text"})
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    provides: ClassVar[frozenset[str]] = frozenset()
    backbone: ClassVar[str] = "token"
    causal: ClassVar[bool] = True
    default_strategy: ClassVar[dict[str, Any]] = {"name": "random", "ratio": 0.0}

    predict: str = setting(
        "visible", "which tokens are counted in the loss", choices=("visible", "hidden", "all")
    )

    def bind(self, backbone: nn.Module) -> BoundS4Sequence:
        """On a causal TokenBackbone (or a model that has an adapter): an S4 model or a Transformer."""
        adapted = adapt(backbone, self.backbone)
        if adapted.shift != 1:
            raise BackboneMismatch(
                f"s4-sequence needs a causal language model, and {type(backbone).__name__} predicts each token at its own place; "
                "use an objective for masked models, such as 'masked-diffusion'."
            )
        return BoundS4Sequence(adapted, self.predict)


class BoundS4Sequence(BoundObjective):
    """Outputs: `prediction` [B, L, V], where [:, i] are the logits of token i; zero where none is counted."""

    def __init__(self, backbone: nn.Module, predict: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.predict = predict
        self.takes_keep = "keep" in inspect.signature(backbone.logits).parameters

    def forward(
        self,
        batch: Batch,
        mask: Mask,
        *,
        signals: Signals | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Loss:
        """Mean cross-entropy in nats over the tokens that are counted; exactly 0 when there are none."""
        tokens = batch["tokens"]
        keep = torch.ones_like(tokens, dtype=torch.bool)
        if isinstance(mask, AttentionMask):
            rule = AttentionMask.causal(tokens.shape[1], device=mask.device)
            itself = AttentionMask.window(tokens.shape[1], 0, device=mask.device)
            logits = self.backbone.logits(tokens, attention=rule & mask | itself)
        else:
            keep = mask.keep
            logits = self._logits(tokens, keep)
        counted = predicted_places(keep, self.predict)
        prediction = nn.functional.pad(logits[:, :-1], (0, 0, 1, 0))
        prediction = torch.where(counted[..., None], prediction, 0.0)
        each = nn.functional.cross_entropy(prediction.flatten(0, 1), tokens.flatten(), reduction="none")
        loss = (each * counted.flatten()).sum() / counted.sum().clamp(min=1)
        return Loss(total=loss, parts={"nll": loss}, outputs={"prediction": prediction})

    def _logits(self, tokens: Tensor, keep: Tensor) -> Tensor:
        if bool(keep.all()):
            return self.backbone.logits(tokens)
        if self.takes_keep:
            return self.backbone.logits(tokens, keep=keep)
        return self.backbone.logits(self.backbone.embed(tokens) * keep[..., None])


COMPONENTS = (S4Sequence,)
