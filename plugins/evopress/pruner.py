"""Evolution over the levels of layers: (1 + λ), level-switch mutation, selection in stages of growing data."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import Pruner, PruneResult, PruneTask, component, setting
from maskwright.errors import BadData, BadParameter
from maskwright.plugins.evopress.fitness import Fitness, Parent, measure_of
from maskwright.plugins.evopress.levels import (
    Unit,
    default_difference,
    dropped_units,
    level_range,
    sparse_units,
    uniform_counts,
)
from maskwright.plugins.evopress.search import (
    Space,
    Stage,
    best,
    movable,
    offspring,
    random_states,
    selected,
)
from maskwright.toolkit.masked import replaced
from maskwright.toolkit.patterns import check_budget
from maskwright.toolkit.prunable import Weight, finish, prunable_weights

SPARSITY: dict[str, Any] = {
    "generations": 400,
    "offspring": 64,
    "survivors": (8, 2, 1),
    "tokens": (2048, 16384, 65536),
}
LAYERS: dict[str, Any] = {"offspring": 32, "survivors": (2, 1), "tokens": (2048, 32768)}
"""The paper's settings for each kind of budget, where none are given."""


@attrs.frozen
class EvoPress:
    """Each layer's share of one budget is searched by evolution: levels switch between layers, and the total stays.

    Sieberling et al., arXiv:2410.14649; defaults are those of the official scripts, by the kind of budget. Levels of sparsity are
    made by another pruner, layer by layer; a budget of layers drops attention and MLPs by themselves.
    """

    kind: ClassVar[str] = "pruner"
    name: ClassVar[str] = "evopress"
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    needs: ClassVar[frozenset[str]] = frozenset({"batches"})
    budgets: ClassVar[frozenset[str]] = frozenset({"sparsity", "layers"})
    changes_weights: ClassVar[bool] = True
    example_parameters: ClassVar[dict[str, Any]] = {
        **{"generations": 2, "offspring": 4, "survivors": (2, 1), "tokens": (8, 24), "num_levels": 1},
        **{"drop": "blocks", "initially_generated": 2, "level": {"name": "wanda", "compare": "layer"}},
    }

    small_parameters: ClassVar[dict[str, Any]] = {
        **{"generations": 30, "offspring": 16, "survivors": [4, 1], "tokens": [512, 4096]},
    }

    level: Pruner = component("pruner", "sparsegpt", "what makes a layer's levels of sparsity")
    generations: int | None = setting(
        None, "generations; 400 for a sparsity, k(n-k)/1.5 for k of n layers dropped", ge=1, optional=True
    )
    offspring: int | None = setting(
        None, "candidates of a generation, λ; 64 for a sparsity, 32 for layers", ge=1, optional=True
    )
    survivors: tuple[int, ...] = setting(
        (), "candidates that each stage of the selection keeps; (8, 2, 1) for a sparsity, (2, 1) for layers"
    )
    tokens: tuple[int, ...] = setting(
        (),
        "tokens that each stage looks at; (2048, 16384, 65536) for a sparsity, (2048, 32768) for layers",
    )
    fitness: str = setting(
        "auto",
        "what is kept low: kl to the dense model's logits, the task's loss, or auto, the loss only where there are no logits",
        choices=("auto", "kl", "loss"),
    )
    num_levels: int = setting(8, "levels above and below the uniform one", ge=1)
    weights_diff: int | None = setting(
        None,
        "weights from one level to the next, Δ; ½ · min(s, 1-s) / num_levels of the median layer",
        ge=1,
        optional=True,
    )
    max_mutations: int = setting(3, "most level switches of a child", ge=1)
    max_level: int | None = setting(
        None, "largest distance of a level from the uniform one", ge=1, optional=True
    )
    max_total_deviation: int | None = setting(None, "largest sum of these distances", ge=2, optional=True)
    drop: str = setting(
        "sub-blocks",
        "what a budget of layers removes: attention and MLPs, as many of each, or whole blocks",
        choices=("sub-blocks", "blocks"),
    )
    initially_generated: int = setting(
        64, "random states of which a search over layers starts from the best", ge=1
    )
    initial_tokens: int = setting(2048, "tokens on which that one is chosen", ge=2)

    def __attrs_post_init__(self) -> None:
        for name in ("survivors", "tokens"):
            if not all(isinstance(one, int) and one > 0 for one in getattr(self, name)):
                raise BadParameter(
                    f"evopress: {name}={getattr(self, name)!r} must be whole numbers above 0, one for each stage."
                )
        if len(self.survivors) != len(self.tokens):
            raise BadParameter(
                f"evopress: survivors={self.survivors} and tokens={self.tokens} must name the same number of stages."
            )
        if self.survivors and (self.survivors[-1] != 1 or min(self.tokens) < 2):
            raise BadParameter(
                f"evopress: survivors={self.survivors}, tokens={self.tokens}: the last stage must keep 1 candidate, and every "
                "stage look at 2 tokens or more."
            )
        if lacking := self.level.needs - {"batches"}:
            raise BadParameter(
                f"evopress: level={self.level.name!r} needs {', '.join(sorted(lacking))}, and is given one layer at a time with its "
                "inputs; take a pruner that needs no more, such as 'magnitude', 'wanda' or 'sparsegpt'."
            )
        if "sparsity" not in self.level.budgets:
            raise BadParameter(f"evopress: level={self.level.name!r} must be a pruner that meets a sparsity.")

    def prune(self, model: nn.Module, task: PruneTask) -> PruneResult:
        """Raises `BadBudget`, `BadData` without batches, `BadModel` for layers that cannot be dropped or a model without logits."""
        weights = prunable_weights(model, task.prunable)
        budget = check_budget(self, weights, task.budget)
        if not task.batches:
            raise BadData("evopress measures candidates on batches; give the task at least one.")
        measure = measure_of(model, task, self.fitness)
        device = task.generator.device
        if budget.layers is not None:
            units, kinds, dropped = dropped_units(model, weights, budget.layers, whole=self.drop == "blocks")
            groups = torch.tensor(kinds, device=device)
            space = Space(torch.zeros_like(groups), torch.ones_like(groups), groups)
            generations, count, stages = self._plan(LAYERS, int(dropped * budget.layers / 1.5))
        else:
            assert budget.sparsity is not None
            units, space = self.sparse(model, weights, task, budget.sparsity, device)
            dropped = 0
            generations, count, stages = self._plan(SPARSITY, SPARSITY["generations"])
        with torch.no_grad(), replaced(model, weights) as replace:
            fitness = Fitness(model, task, units, replace, measure)
            start = torch.zeros_like(space.lowest)
            if dropped:
                states = random_states(space.groups, dropped, self.initially_generated, task.generator)
                start = best(states, 1, self.initial_tokens, fitness)[0][0]
            facts = {"fitness_at_the_start": fitness.over_all(start)}
            parent = Parent(start.clone())
            history = self.evolve(parent, space, fitness, task, generations, count, stages)
            facts["fitness"] = fitness.over_all(parent.levels)
            facts["evaluations"] = int(parent.evaluations)
        return _finished(model, weights, units, parent.levels, history, facts)

    def sparse(
        self, model: nn.Module, weights: list[Weight], task: PruneTask, sparsity: float, device: torch.device
    ) -> tuple[list[Unit], Space]:
        """Every weight's levels around a uniform sparsity, and which vectors of them are legal."""
        sizes = [weight.parameter.numel() for weight in weights]
        uniform = uniform_counts(sizes, sparsity)
        difference = self.weights_diff or default_difference(sizes, sparsity, self.num_levels)
        most = min(self.num_levels, self.max_level or self.num_levels)
        ranges = [level_range(size, removed, difference, most) for size, removed in zip(sizes, uniform)]
        units = sparse_units(model, weights, task, self.level, uniform, difference, ranges)
        lowest, highest = torch.tensor(ranges, device=device).T
        return units, Space(lowest, highest, torch.zeros_like(lowest), self.max_total_deviation)

    def evolve(
        self,
        parent: Parent,
        space: Space,
        fitness: Fitness,
        task: PruneTask,
        generations: int,
        count: int,
        stages: list[Stage],
    ) -> list[dict[str, float]]:
        """Improve the parent generation after generation; returns numbers by generation."""
        history: list[dict[str, float]] = []
        if not movable(parent.levels, space):
            return history
        for step in task.steps(generations, {"parent": parent, "generator": task.generator}):
            children = offspring(parent.levels, space, count, self.max_mutations, task.generator)
            before = fitness.evaluations
            levels, value = selected(children, parent.levels, stages, fitness)
            numbers = {
                "fitness": value,
                "switched": float((levels - parent.levels).abs().sum()) / 2,
                "deviation": float(levels.abs().sum()),
            }
            parent.become(levels, fitness.evaluations - before)
            task.log(step, **numbers)
            history.append({"generation": float(step.index + 1), **numbers})
        return history

    def _plan(self, usual: dict[str, Any], generations: int) -> tuple[int, int, list[Stage]]:
        """Generations, λ, and the stages, as given or as the paper has them for this kind of budget."""
        stages = zip(self.survivors or usual["survivors"], self.tokens or usual["tokens"])
        return self.generations or max(1, generations), self.offspring or usual["offspring"], list(stages)


def _finished(
    model: nn.Module,
    weights: list[Weight],
    units: list[Unit],
    levels: Tensor,
    history: list[dict[str, float]],
    facts: dict[str, float],
) -> PruneResult:
    """Write the weights of these levels into the model."""
    keep = {weight.name: torch.ones_like(weight.matrix, dtype=torch.bool) for weight in weights}
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for unit, level in zip(units, levels.tolist()):
            for name, version in unit.at(level).items():
                model.get_parameter(name).copy_(version.values)
                keep[name] = version.keep
                found[name] = torch.tensor([level])
    result = finish(model, weights, keep, history)
    return attrs.evolve(result, artifacts={"levels": found}, facts=facts)


COMPONENTS = (EvoPress,)
