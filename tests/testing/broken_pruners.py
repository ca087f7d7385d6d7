"""Pruners that keep every rule, and for each rule one that breaks it and no other."""

import copy
import os
from typing import ClassVar

import attrs
import torch
from torch import nn

from maskwright import Budget, Mask, PruneResult, SparsityReport
from maskwright.errors import BadBudget, BadData
from maskwright.toolkit.prunable import prunable_weights


@attrs.frozen
class Right:
    """Keeps where weight × gradient of the loss is large, within each layer or each group of M."""

    kind: ClassVar[str] = "pruner"
    name: ClassVar[str] = "right"
    modalities: ClassVar[frozenset[str]] = frozenset({"text", "image"})
    needs: ClassVar[frozenset[str]] = frozenset({"batches", "loss"})
    budgets: ClassVar[frozenset[str]] = frozenset({"sparsity", "pattern"})
    changes_weights: ClassVar[bool] = False

    def prune(self, model, task):
        self.refuse(task)
        weights = prunable_weights(model, task.prunable)
        self.require_fit(weights, task.budget)
        scores = self.scores(model, weights, task)
        masks = {w.name: w.mask(self.keep(scores[w.name], task.budget)) for w in weights}
        for weight in weights:
            self.apply(weight, masks[weight.name])
        return self.result(model, masks)

    def refuse(self, task):
        if task.budget is None or task.budget.kind not in self.budgets:
            raise BadBudget(f"right meets {', '.join(self.budgets)}, not {task.budget}.")
        if not task.batches or task.loss is None:
            raise BadData("right needs batches and a loss.")

    def require_fit(self, weights, budget):
        for weight in weights:
            if budget.kind == "pattern" and weight.inputs % budget.n_of_m[1]:
                raise BadBudget(f"{budget} does not fit {weight.name}.")

    def scores(self, model, weights, task):
        loss = self.watched(model, task)
        gradients = torch.autograd.grad(loss, [weight.parameter for weight in weights])
        return {
            weight.name: (weight.matrix * weight.as_matrix(gradient)).float().abs()
            for weight, gradient in zip(weights, gradients)
        }

    def watched(self, model, task):
        modes = {module: module.training for module in model.modules()}
        model.eval()
        loss = sum(task.loss(model, batch) for batch in task.batches)
        for module, mode in modes.items():
            module.training = mode
        return loss

    def keep(self, scores, budget):
        if budget.kind == "pattern":
            n, m = budget.n_of_m
            groups = scores.reshape(-1, m)
            chosen = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
            return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, chosen, True).view(scores.shape)
        count = scores.numel() - int(scores.numel() * budget.sparsity)
        chosen = scores.flatten().argsort(descending=True, stable=True)[:count]
        return torch.zeros(scores.numel(), dtype=torch.bool).index_fill_(0, chosen, True).view(scores.shape)

    def apply(self, weight, mask):
        weight.apply(mask)

    def result(self, model, masks):
        return PruneResult(model, masks, SparsityReport.of(masks))


@attrs.frozen
class FindsOut(Right):
    """Moves the weights against the gradient where that is larger than on average; takes no budget."""

    name: ClassVar[str] = "finds-out"
    budgets: ClassVar[frozenset[str]] = frozenset()
    changes_weights: ClassVar[bool] = True
    prunes: ClassVar[str] = "difference"

    def refuse(self, task):
        if task.budget is not None:
            raise BadBudget("finds-out takes no budget.")
        if not task.batches or task.loss is None:
            raise BadData("finds-out needs batches and a loss.")

    def require_fit(self, weights, budget):
        pass

    def keep(self, scores, budget):
        return scores > scores.mean()

    def apply(self, weight, mask):
        with torch.no_grad():
            weight.parameter.add_(mask.keep.to(weight.parameter))


@attrs.frozen
class DropsLayers:
    """Cuts the last layers off a language model."""

    kind: ClassVar[str] = "pruner"
    name: ClassVar[str] = "drops"
    modalities: ClassVar[frozenset[str]] = frozenset({"text"})
    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})
    budgets: ClassVar[frozenset[str]] = frozenset({"layers", "params"})
    changes_weights: ClassVar[bool] = False
    exempt: ClassVar[dict[str, str]] = {
        "only-prunable-weights-are-pruned": "a layer goes with its norms",
        "missing-needs-are-refused": "the teacher is optional in this test",
    }

    @staticmethod
    def example_extras(model, seed):
        return {"teacher": copy.deepcopy(model)}

    def prune(self, model, task):
        if task.budget is None or task.budget.kind not in self.budgets:
            raise BadBudget("drops meets layers and params.")
        task.extras.get("teacher")
        layers = getattr(getattr(model, "model", None), "layers", None)
        if layers is None:
            raise BadBudget("drops needs a model with layers.")
        names = [name for name, _ in model.named_parameters() if name.startswith("model.layers.")]
        count = task.budget.layers or 1
        masks = {
            name: Mask(torch.full(model.get_parameter(name).shape, int(name.split(".")[2]) < count))
            for name in names
        }
        del layers[count:]
        model.config.num_hidden_layers = count
        return PruneResult(model, masks, SparsityReport.of(masks))


# -- one rule broken -------------------------------------------------------------------------------------------


class PromisesLayers(Right):
    budgets = frozenset({"sparsity", "pattern", "layers"})

    def refuse(self, task):
        if task.budget is not None and task.budget.kind == "layers":
            raise BadBudget("not yet.")
        super().refuse(task)


class WordsOfItsOwn(Right):
    budgets = frozenset({"sparsity", "pattern", "density"})


class PrunesACopy(Right):
    def prune(self, model, task):
        return super().prune(copy.deepcopy(model), task)


class FallsOver(Right):
    """An error of its own for one amount."""

    def keep(self, scores, budget):
        if budget.sparsity == 0.75 or budget.pattern == "1:4":
            raise ZeroDivisionError("division by zero")
        return super().keep(scores, budget)


class TakesAnyBudget(Right):
    def refuse(self, task):
        if not task.batches or task.loss is None:
            raise BadData("right needs batches and a loss.")

    def keep(self, scores, budget):
        known = budget.kind in self.budgets
        return super().keep(scores, budget if known else Budget(sparsity=0.5))


class RefusesTooLate(Right):
    """The budget is refused when the weights have been changed."""

    def prune(self, model, task):
        if task.budget is None or task.budget.kind not in self.budgets:
            next(model.parameters()).data.zero_()
        return super().prune(model, task)


class LeavesTheRest(Right):
    """Columns that fill no group stay dense."""

    def require_fit(self, weights, budget):
        pass

    def keep(self, scores, budget):
        if budget.kind == "pattern" and scores.shape[1] % budget.n_of_m[1]:
            return torch.ones_like(scores, dtype=torch.bool)
        return super().keep(scores, budget)


class AssumesABatch(Right):
    def refuse(self, task):
        if task.budget is None or task.budget.kind not in self.budgets:
            raise BadBudget("no.")
        task.batches[0]
        task.loss.__call__  # noqa: B018


class NeverComputesTheLoss(Right):
    def scores(self, model, weights, task):
        list(task.batches)
        return {weight.name: weight.matrix.float().abs() for weight in weights}


class OneTooMany(Right):
    """A threshold that takes equal ones too, as official code often does."""

    def keep(self, scores, budget):
        keep = super().keep(scores, budget)
        if budget.kind == "sparsity" and keep.sum() > 1:
            kept = keep.flatten().nonzero()[:1]
            keep.view(-1)[kept] = False
        return keep


class TwoOfFourInAll(Right):
    """Half of each layer, not of each group."""

    def keep(self, scores, budget):
        if budget.kind == "pattern":
            n, m = budget.n_of_m
            budget = Budget(sparsity=1 - n / m)
        return super().keep(scores, budget)


class OtherNames(Right):
    def result(self, model, masks):
        return super().result(model, {f"module.{name}": mask for name, mask in masks.items()})


class OtherShapes(Right):
    def result(self, model, masks):
        return super().result(model, {name: mask.flatten().rows(slice(1)) for name, mask in masks.items()})


class Miscounts(Right):
    def result(self, model, masks):
        layers = SparsityReport.of(masks).layers
        return PruneResult(
            model, masks, SparsityReport(tuple(attrs.evolve(one, kept=one.kept + 1) for one in layers))
        )


class OwnRule(Right):
    def prune(self, model, task):
        return super().prune(model, attrs.evolve(task, prunable=None))


class AlmostZero(Right):
    def apply(self, weight, mask):
        weight.parameter.data.mul_(torch.where(mask.keep, 1.0, 1e-3))


class Rescales(Right):
    """The kept weights make up for the others."""

    def apply(self, weight, mask):
        weight.apply(mask)
        weight.parameter.data.mul_(1.5)


class MovesBiases(Right):
    def apply(self, weight, mask):
        weight.apply(mask)
        if getattr(weight.owner, "bias", None) is not None:
            weight.owner.bias.data.add_(0.1)


class MovesStatistics(Right):
    """Calibration in training mode: batch norm remembers it."""

    def watched(self, model, task):
        modes = {module: module.training for module in model.modules()}
        loss = sum(task.loss(model.train(), batch) for batch in task.batches)
        for module, mode in modes.items():
            module.training = mode
        return loss


class LeavesAHook(Right):
    def prune(self, model, task):
        model.register_forward_hook(lambda *_: None)
        return super().prune(model, task)


class LeavesGradients(Right):
    def watched(self, model, task):
        loss = super().watched(model, task)
        loss.backward(retain_graph=True)
        return loss


class LeavesItInEvaluation(Right):
    def watched(self, model, task):
        loss = super().watched(model, task)
        model.eval()
        return loss


class Freezes(Right):
    def apply(self, weight, mask):
        weight.apply(mask)
        weight.parameter.requires_grad_(False)


class Explodes(Right):
    changes_weights = True

    def apply(self, weight, mask):
        weight.apply(mask)
        weight.parameter.data[mask.keep] = torch.inf


class HidesAScale(Right):
    """What the model computes is not in its state."""

    def apply(self, weight, mask):
        weight.apply(mask)
        module = weight.owner
        forward = module.forward
        module.forward = lambda x: 2 * forward(x)


class Widens(Right):
    def apply(self, weight, mask):
        weight.apply(mask)
        weight.parameter.data = weight.parameter.data.float()


class OtherRandomness(Right):
    def scores(self, model, weights, task):
        self.watched(model, task)
        generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "big"))
        return {weight.name: torch.rand(weight.shape, generator=generator) for weight in weights}


class MovesTheGlobalState(Right):
    def scores(self, model, weights, task):
        nn.Linear(2, 2)
        return super().scores(model, weights, task)


class ZeroesWhatDidNotChange(FindsOut):
    def apply(self, weight, mask):
        weight.apply(mask)


class TakesAnyBudgetAtAll(FindsOut):
    def refuse(self, task):
        if not task.batches or task.loss is None:
            raise BadData("finds-out needs batches and a loss.")


class GuessesABudget(Right):
    def prune(self, model, task):
        return super().prune(model, attrs.evolve(task, budget=task.budget or Budget(sparsity=0.5)))


class Changeable(Right):
    anything = 0

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)


RIGHT = (Right, FindsOut, DropsLayers)
BROKEN = [
    ("declared-budgets-are-accepted", PromisesLayers),
    ("declared-budgets-are-accepted", WordsOfItsOwn),
    ("result-is-the-pruned-model", PrunesACopy),
    ("result-is-the-pruned-model", FallsOver),
    ("other-budgets-are-refused", TakesAnyBudget),
    ("other-budgets-are-refused", RefusesTooLate),
    ("other-budgets-are-refused", TakesAnyBudgetAtAll),
    ("other-budgets-are-refused", GuessesABudget),
    ("patterns-that-do-not-fit-are-refused", LeavesTheRest),
    ("missing-needs-are-refused", AssumesABatch),
    ("every-need-is-used", NeverComputesTheLoss),
    ("budget-is-met", OneTooMany),
    ("budget-is-met", TwoOfFourInAll),
    ("masks-name-parameters", OtherNames),
    ("masks-name-parameters", OtherShapes),
    ("report-counts-the-masks", Miscounts),
    ("only-prunable-weights-are-pruned", OwnRule),
    ("outside-the-mask-is-zero", AlmostZero),
    ("outside-the-mask-is-zero", ZeroesWhatDidNotChange),
    ("inside-is-untouched", Rescales),
    ("the-rest-is-untouched", MovesBiases),
    ("the-rest-is-untouched", MovesStatistics),
    ("model-is-left-clean", LeavesAHook),
    ("model-is-left-clean", LeavesGradients),
    ("model-is-left-clean", LeavesItInEvaluation),
    ("model-is-left-clean", Freezes),
    ("model-still-runs", Explodes),
    ("state-dict-round-trips", HidesAScale),
    ("dtype-is-kept", Widens),
    ("same-generator-same-masks", OtherRandomness),
    ("global-random-state-is-untouched", MovesTheGlobalState),
    ("component-is-frozen", Changeable),
]
