"""Masks on a merged task vector. θ₀ is the given model, θₜ an expert, τₜ = θₜ - θ₀ its task vector, τₘ their merger.

Vectors are flat over all P merged entries; several tasks are rows of [T, P]. 1 in a mask means that τₘ is used there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from maskwright import Expert, Mask, PruneResult, PruneTask, SparsityReport, load_masks, setting
from maskwright.errors import BadData, BadModel, BadParameter, NumericalError
from maskwright.toolkit.calibration import evaluating
from maskwright.toolkit.patterns import keep_largest, refuse_budget
from maskwright.toolkit.patterns import removed_count as exact_share
from maskwright.toolkit.prunable import Weight, identity, prunable_weights
from maskwright.toolkit.sizes import dense_bytes

HEADS = tuple(
    pattern
    for head in ("classifier", "score", "head", "heads", "fc", "qa_outputs")
    for pattern in (f"{head}.*", f"*.{head}.*")
)
"""Name patterns of classification heads as libraries call them: each task has its own."""

# -- the equations ---------------------------------------------------------------------------------------------------


def summed(vectors: Tensor) -> Tensor:
    """τₘ [P] of task arithmetic: Σₜ τₜ, a sum and not a mean."""
    return vectors.sum(0)


def ties(vectors: Tensor, share: float = 0.2, *, mean: bool = False) -> Tensor:
    """τₘ [P] of TIES: each task's largest `share` of entries, of which those that agree with the elected sign are added.

    The sign is that of the trimmed entries' sum; where that is zero, that of most entries. `mean` divides by how many agree.
    """
    trimmed = vectors * keep_largest(vectors.abs(), exact_share(vectors.shape[1], share))
    elected = trimmed.sum(0).sign()
    elected = torch.where(elected == 0, elected.sum().sign(), elected)
    agreeing = trimmed * torch.where(elected > 0, trimmed > 0, trimmed < 0)
    return agreeing.sum(0) / ((agreeing != 0).sum(0).clamp(min=1) if mean else 1)


def tall_mask(vector: Tensor, merged: Tensor, strength: float) -> Tensor:
    """mₜ [P] = |τₜ| > λ·|τₘ - τₜ|: where the merged entry is nearer to the task's own than none is. Larger λ keep fewer."""
    return vector.abs() > strength * (merged - vector).abs()


def reconstructed(base: Tensor, merged: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
    """θ₀ + α·(m ⊙ τₘ) in the dtype of θ₀; outside the mask the bits of θ₀."""
    return torch.where(mask, (base.to(merged.dtype) + scale * merged).to(base.dtype), base)


def consensus(masks: Tensor, k: int) -> Tensor:
    """bool [P]: entries that at least k of the masks [T, P] use. k = 0 is all of them, k > T none."""
    return masks.sum(0) >= k


def normalised(score: float, own: float) -> float:
    """How much of an expert's own score is left: their ratio, and for negative scores as much below 1 as it is worse."""
    return 1 + (score - own) / abs(own)


def stored_bits(entries: int, tasks: int, frozen: int = 0) -> int:
    """θ₀ and τₘ in 32 bits, one bit for each entry and task, frozen entries once."""
    return (64 + tasks) * entries + 32 * frozen


def checkpoint_bits(entries: int, tasks: int, frozen: int = 0) -> int:
    """T checkpoints that share their frozen entries."""
    return 32 * (tasks * entries + frozen)


# -- single-task models out of what is stored ------------------------------------------------------------------------

Artifacts = Mapping[str, Mapping[str, Mask] | Mapping[str, Tensor]]


def restored(base: Mapping[str, Tensor], artifacts: Artifacts, task: str) -> dict[str, Tensor]:
    """The state of a task's model from the base model's `state_dict()` and the artifacts of `tall-masks`.

    Tied parameters are stored once and recognised by the memory that they share in that state.
    Raises `BadData` for a task that the artifacts do not have, and `BadModel` when the base is of another architecture.
    """
    masks = _of_task(artifacts["task-masks"], task)
    if not masks:
        known = sorted({key.partition(":")[0] for key in artifacts["task-masks"]})
        raise BadData(f"There is no task {task!r} in these artifacts; they have {', '.join(known)}.")
    changes = dict(_of_task(artifacts.get("task-own", {}), task))
    for name, merged in artifacts["merged"].items():
        if name not in base or base[name].shape != merged.shape:
            raise BadModel(
                f"The base model has no {name} {list(merged.shape)}, which was merged; give the model that was given to tall-masks."
            )
        changes[name] = reconstructed(base[name], merged, masks[name].keep)
    owners = {identity(base[name]): name for name in changes if name in base}
    state = {}
    for name, tensor in base.items():
        # Tied parameters have several names and are stored under one.
        source = changes.get(name, changes.get(owners.get(identity(tensor), ""), tensor))
        state[name] = source.detach().clone()
    return state


def read(folder: str | Path) -> dict[str, Mapping[str, Mask] | Mapping[str, Tensor]]:
    """The artifacts that a run of `maskwright prune --pruner tall-masks` left in its folder."""
    from safetensors.torch import load_file

    path = Path(folder)
    found: dict[str, Any] = {"task-masks": load_masks(path / "task-masks.safetensors")}
    for name in ("merged", "task-own"):
        if (path / f"{name}.safetensors").is_file():
            found[name] = load_file(path / f"{name}.safetensors")
    if "merged" not in found:
        raise BadData(f"{path} has no merged.safetensors; give the folder of a run of tall-masks.")
    return found


def _of_task(held: Mapping[str, Any], task: str) -> dict[str, Any]:
    return {key.removeprefix(f"{task}:"): one for key, one in held.items() if key.startswith(f"{task}:")}


def _by_task(held: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{task}:{name}": one for task, ones in held.items() for name, one in ones.items()}


# -- what both pruners do first --------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Merger:
    """Experts beside the model: base and merged [P], task vectors and masks [T, P], and what is each task's own."""

    weights: list[Weight]
    experts: Mapping[str, Expert]
    base: Tensor
    vectors: Tensor
    own: Mapping[str, Mapping[str, Tensor]]
    """By task, whole tensors of its state that differ from the base and are not merged."""

    @classmethod
    def of(cls, name: str, model: nn.Module, task: PruneTask) -> Merger:
        """Raises `BadData` without experts, `BadModel` for one of another architecture, `NumericalError` for one with NaN."""
        experts: Mapping[str, Expert] = task.extras.get("experts") or {}
        if not experts:
            raise BadData(
                f'{name} needs models that were fine-tuned from this one: give the task extras={{"experts": '
                "{name: Expert(state, score)}}."
            )
        if colon := next((one for one in experts if ":" in one), None):
            raise BadData(f"The expert's name {colon!r} must not have a colon; call it otherwise.")
        weights = prunable_weights(model, task.prunable)
        state = model.state_dict()
        for expert, given in experts.items():
            _require_same_form(expert, given.state, state)
        base = _joined(state, weights)
        vectors = torch.stack(
            [_joined(one.state, weights).to(base.device) - base for one in experts.values()]
        )
        seen = {identity(weight.parameter) for weight in weights}
        others = {}
        for key, tensor in state.items():
            if identity(tensor) not in seen:
                seen.add(identity(tensor))
                others[key] = tensor
        own = {
            expert: {
                key: given.state[key].detach().clone()
                for key, tensor in others.items()
                if not torch.equal(given.state[key].to(tensor), tensor)
            }
            for expert, given in experts.items()
        }
        return cls(weights, experts, base, vectors, own)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """[P] as tensors of the parameters' shapes, by name."""
        pieces = flat.split([weight.parameter.numel() for weight in self.weights])
        return {
            weight.name: piece.view(weight.parameter.shape) for weight, piece in zip(self.weights, pieces)
        }

    def with_entries(self, merged: Tensor, mask: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        """`reconstructed` for each weight, in its own dtype."""
        vectors, masks = self.split(merged), self.split(mask)
        return {
            weight.name: reconstructed(
                weight.parameter.detach(), vectors[weight.name], masks[weight.name], scale
            )
            for weight in self.weights
        }

    def score(self, model: nn.Module, expert: str, tensors: Mapping[str, Tensor]) -> float:
        """An expert's score of the model with other tensors in it; the model is then as it was."""
        judge = self.experts[expert].score
        assert judge is not None
        with holding(model, tensors), torch.no_grad():
            score = float(judge(model))
        if math.isnan(score):
            raise NumericalError(f"The score of the expert {expert!r} is not a number; look at its data.")
        return score

    def masks(
        self, model: nn.Module, merged: Tensor, strengths: Sequence[float], unscored: float
    ) -> tuple[Tensor, list[dict[str, float]], dict[str, float]]:
        """[T, P] with each task's best λ, the scores of all that were tried, and facts.

        Of equally good λ the smallest is taken: it keeps most.
        """
        masks = torch.empty_like(self.vectors, dtype=torch.bool)
        history, facts = [], {}
        for row, (name, expert) in enumerate(self.experts.items()):
            tried = sorted(set(strengths))
            if expert.score is None and len(tried) > 1:
                tried = [unscored]
            best = -math.inf
            for number, strength in enumerate(tried):
                mask = tall_mask(self.vectors[row], merged, strength)
                score = math.nan
                if expert.score is not None:
                    score = self.score(model, name, {**self.with_entries(merged, mask), **self.own[name]})
                    history.append(
                        {"task": float(row), "lambda": strength, "score": score, "kept": _share(mask)}
                    )
                if number == 0 or score > best:
                    best, masks[row], facts[f"lambda {name}"] = score, mask, strength
            facts[f"kept {name}"] = _share(masks[row])
            if expert.score is not None:
                facts[f"score {name}"] = best
                facts[f"expert's score {name}"] = self.score(
                    model, name, {key: one for key, one in expert.state.items() if key in model.state_dict()}
                )
        counts = masks.sum(0)
        facts["catastrophic share"], facts["selfish share"] = _share(counts == 0), _share(counts == 1)
        return masks, history, facts

    def finish(
        self, model: nn.Module, merged: Tensor, mask: Tensor, scale: float = 1.0, **more: Any
    ) -> PruneResult:
        """The model as θ₀ + α·(m ⊙ τₘ)."""
        entries = self.with_entries(merged, mask, scale)
        with torch.no_grad():
            for weight in self.weights:
                weight.parameter.copy_(entries[weight.name])
        masks = {name: Mask(keep.clone()) for name, keep in self.split(mask).items()}
        return PruneResult(model, masks, SparsityReport.of(masks), **more)


@contextmanager
def holding(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model in evaluation mode with other tensors in its state, for a while."""
    state = model.state_dict()
    kept = {name: state[name].clone() for name in tensors}
    with evaluating(model):
        try:
            for name, tensor in tensors.items():
                state[name].copy_(tensor)
            yield
        finally:
            for name, tensor in kept.items():
                state[name].copy_(tensor)


def _joined(state: Mapping[str, Tensor], weights: Sequence[Weight]) -> Tensor:
    """[P] in float32, or float64 where a weight has it."""
    wide = any(weight.parameter.dtype == torch.float64 for weight in weights)
    kind = torch.float64 if wide else torch.float32
    return torch.cat([state[weight.name].detach().reshape(-1).to(kind) for weight in weights])


def _require_same_form(expert: str, state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    for name, tensor in base.items():
        if name not in state or state[name].shape != tensor.shape:
            found = f"it is {list(state[name].shape)}" if name in state else "it has none"
            raise BadModel(
                f"The expert {expert!r} is of another architecture: the model's {name} is {list(tensor.shape)}, {found}; merge "
                "models that were fine-tuned from the given one."
            )
        if tensor.is_floating_point() and not bool(state[name].isfinite().all()):
            raise NumericalError(f"The expert {expert!r} has entries in {name} that are NaN or infinite.")


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())


def _numbers(least: float) -> Any:
    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not (
            isinstance(value, tuple)
            and value
            and all(
                isinstance(one, int | float) and not isinstance(one, bool) and least <= one < math.inf
                for one in value
            )
        ):
            raise BadParameter(
                f"{instance.name}: {attribute.name}={value!r} must be numbers of at least {least:g}, one or more."
            )

    return check


def _listed(default: tuple[float, ...], help: str, least: float = 0.0) -> Any:
    return attrs.field(
        default=default,
        converter=lambda value: tuple(value) if isinstance(value, list | tuple) else (value,),
        validator=_numbers(least),
        metadata={"help": help, "range": f">= {least:g}"},
    )


def _examples(model: nn.Module, seed: int) -> dict[str, Any]:
    """Two experts, for the conformance kit, that are scored by how near a model is."""
    generator = torch.Generator().manual_seed(seed)

    def expert() -> Expert:
        state = {
            name: one + 0.1 * torch.randn(one.shape, generator=generator).to(one)
            if one.is_floating_point()
            else one.clone()
            for name, one in model.state_dict().items()
        }
        names = dict(model.named_parameters())

        def near(other: nn.Module) -> float:
            return 1 / (
                1 + sum(float((other.get_parameter(name) - state[name]).abs().sum()) for name in names)
            )

        return Expert(state, near)

    return {"experts": {"first": expert(), "second": expert()}}


# -- the pruners -----------------------------------------------------------------------------------------------------


@attrs.frozen
class TallMasks:
    """For each task, which entries of the merged task vector its own model is rebuilt from.

    Wang et al., arXiv:2405.07813. The masks, one merged vector and what is not merged are artifacts, from which `restored`
    makes each task's model. The model itself becomes θ₀ + τₘ where some task uses τₘ.
    """

    kind: ClassVar[str] = "pruner"
    name: ClassVar[str] = "tall-masks"
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    needs: ClassVar[frozenset[str]] = frozenset({"experts"})
    budgets: ClassVar[frozenset[str]] = frozenset()
    changes_weights: ClassVar[bool] = True
    prunes: ClassVar[str] = "difference"
    example_extras = staticmethod(_examples)

    lambdas: tuple[float, ...] = _listed(
        (0.2, 0.3, 0.4, 0.5, 0.6), "strengths λ among which each task's best is taken; larger keep fewer"
    )
    unscored: float = setting(1.0, "λ of a task that nobody can score: the nearest model in L1", ge=0)
    merge: str = setting("sum", "how task vectors become one", choices=("sum", "ties"))
    ties_share: float = setting(0.2, "share of each task's entries that TIES keeps", gt=0, le=1)

    def merged(self, vectors: Tensor) -> Tensor:
        """τₘ [P] of task vectors [T, P]."""
        return summed(vectors) if self.merge == "sum" else ties(vectors, self.ties_share)

    def prune(self, model: nn.Module, task: PruneTask) -> PruneResult:
        """Raises `BadBudget` for any budget, and `BadData`, `BadModel` or `NumericalError` for experts that cannot be merged."""
        refuse_budget(self, task.budget)
        merger = Merger.of(self.name, model, task)
        merged = self.merged(merger.vectors)
        masks, history, facts = merger.masks(model, merged, self.lambdas, self.unscored)
        used = consensus(masks, 1)
        names = list(merger.experts)
        artifacts: dict[str, Any] = {
            "task-masks": _by_task(
                {
                    name: {key: Mask(keep.clone()) for key, keep in merger.split(row).items()}
                    for name, row in zip(names, masks)
                }
            ),
            "merged": {key: one.clone() for key, one in merger.split(merged * used).items()},
        }
        if own := _by_task(merger.own):
            artifacts["task-own"] = own
        dense = dense_bytes(model)
        bits = sum(-(-mask.keep.numel() // 8) for mask in artifacts["task-masks"].values())
        facts["checkpoint bytes"] = float(len(names) * dense)
        facts["stored bytes"] = float(dense + merged.nbytes + bits + sum(one.nbytes for one in own.values()))
        return merger.finish(model, merged, used, history=history, artifacts=artifacts, facts=facts)


@attrs.frozen
class Consensus:
    """One model for all tasks: entries of the merged task vector that at least k tasks use, the rest as given.

    Wang et al., arXiv:2405.07813, Consensus Merging on TALL masks. k = 2 drops entries that one task or none uses.
    """

    kind: ClassVar[str] = "pruner"
    name: ClassVar[str] = "consensus"
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    needs: ClassVar[frozenset[str]] = frozenset({"experts"})
    budgets: ClassVar[frozenset[str]] = frozenset()
    changes_weights: ClassVar[bool] = True
    prunes: ClassVar[str] = "difference"
    example_extras = staticmethod(_examples)

    k: int = setting(2, "tasks that must use an entry: 0 keeps all, 1 drops what no task uses", ge=0)
    scales: tuple[float, ...] = _listed(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        "factors α of the merged vector, the best is taken",
    )
    lambdas: tuple[float, ...] = _listed(
        (0.2, 0.3, 0.4, 0.5, 0.6), "strengths λ among which each task's best is taken; larger keep fewer"
    )
    unscored: float = setting(1.0, "λ of a task that nobody can score: the nearest model in L1", ge=0)
    merge: str = setting("sum", "how task vectors become one", choices=("sum", "ties"))
    ties_share: float = setting(0.2, "share of each task's entries that TIES keeps", gt=0, le=1)
    heads: tuple[str, ...] = setting(HEADS, "name patterns of heads, which stay each task's own")

    def prune(self, model: nn.Module, task: PruneTask) -> PruneResult:
        """Raises what `tall-masks` does, and `BadData` when α is to be chosen and no expert has a score."""
        refuse_budget(self, task.budget)
        merger = Merger.of(self.name, model, task)
        scored = [name for name, expert in merger.experts.items() if expert.score is not None]
        if not scored and len(set(self.scales)) > 1:
            raise BadData(
                "consensus chooses its scale by the experts' scores and none has one; give experts data, or one scale."
            )
        tall = TallMasks(self.lambdas, self.unscored, self.merge, self.ties_share)
        merged = tall.merged(merger.vectors)
        masks, history, facts = merger.masks(model, merged, self.lambdas, self.unscored)
        kept = consensus(masks, self.k)
        heads = {
            name: {key: one for key, one in own.items() if any(fnmatchcase(key, head) for head in self.heads)}
            for name, own in merger.own.items()
        }
        best, chosen = -math.inf, min(self.scales)
        for scale in sorted(set(self.scales)) if scored else ():
            entries = merger.with_entries(merged, kept, scale)
            left = [
                normalised(
                    merger.score(model, name, {**entries, **heads[name]}),
                    _nonzero(facts[f"expert's score {name}"], name),
                )
                for name in scored
            ]
            mean = math.fsum(left) / len(left)
            history.append({"scale": scale, "normalised score": mean})
            if mean > best:
                best, chosen = mean, scale
        facts["scale"] = chosen
        if scored:
            facts["normalised score"] = best
        own_heads = _by_task(heads)
        return merger.finish(
            model,
            merged,
            kept,
            chosen,
            history=history,
            artifacts={"task-heads": own_heads} if own_heads else {},
            facts=facts,
        )


def _nonzero(score: float, name: str) -> float:
    if score == 0:
        raise BadData(
            f"The expert {name!r} scores 0 on its own task, so that nothing can be measured by it; look at its data."
        )
    return score


COMPONENTS = (TallMasks, Consensus)
