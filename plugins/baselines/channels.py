"""Channel magnitude: whole channels whose weights are small leave the model, which becomes smaller."""

from __future__ import annotations

from typing import ClassVar

import attrs
from torch import Tensor, nn

from maskwright import Budget, PruneResult, PruneTask
from maskwright.toolkit.patterns import check_budget
from maskwright.toolkit.structured import Channels, parameter_count, prune_channels


def group_norm(model: nn.Module, channels: Channels) -> Tensor:
    """float32 [channels]: ‖w‖₂² of all weights that leave with each channel, those that make it and those that read it.

    The group importance of DepGraph (Fang et al., arXiv:2301.12900, section 3.3) with p = 2.
    """
    return channels.squares(model)


@attrs.frozen
class ChannelMagnitude:
    """Channels with the smallest weights are removed, in all layers the same share of them; the model becomes smaller.

    Units of MLPs, filters of convolutions with their batch norms, and attention heads where a ViT's config can say how many. A
    model of transformers is one of its class again, with other numbers in its config.
    """

    kind: ClassVar[str] = "pruner"
    name: ClassVar[str] = "channel-magnitude"
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    needs: ClassVar[frozenset[str]] = frozenset({"batches"})
    budgets: ClassVar[frozenset[str]] = frozenset({"params", "flops"})
    changes_weights: ClassVar[bool] = False
    prunes: ClassVar[str] = "channels"

    @staticmethod
    def budget_spent(result: PruneResult, budget: Budget) -> float:
        """The share that is left, of the whole model."""
        facts = result.facts
        if budget.kind == "params":
            return parameter_count(result.model) / facts["dense_parameters"]
        return facts["flops"] / facts["dense_flops"]

    def prune(self, model: nn.Module, task: PruneTask) -> PruneResult:
        """Raises `BadModel` for models that cannot become smaller, `BadBudget`, and `BadData` for an empty calibration set."""
        return prune_channels(model, task, check_budget(self, (), task.budget), group_norm)


COMPONENTS = (ChannelMagnitude,)
