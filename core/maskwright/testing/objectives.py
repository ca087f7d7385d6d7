"""The rules of objectives.

What an objective class may say about its examples, all optional class attributes:

- `example_parameters`: small sizes with which the kit makes it
- `example_backbone(seed) -> nn.Module`: a static method, for backbones of a kind that the kit does not have
- `example_batch(backbone, rows, generator) -> dict`: a static method, for columns beside `pixels…`, `tokens`, `labels`
- `example_mask(layout, generator) -> Mask`: a static method, for masks that must have a certain form
- `other_hidden_content(batch, mask, generator) -> dict`: a static method that returns the batch with other content where
  the mask hides it; needed when it hides something else than `pixels` or `tokens`
- `causal = True`: tokens are predicted from the tokens before them
- `exempt`: rules that the method must break, with the reason

The kit reads two of the outputs of a `Loss`. `features` is what the backbone shows of the positions (of the visible ones, or
of all). `prediction` [B, N, …] is what is predicted for each position, in raster order; for a causal objective
prediction[:, i] is of token i, or of token i + 1 when there are N - 1 of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import attrs
import hypothesis.strategies as st
import torch
from torch import Tensor, nn

from maskwright.backbones import KINDS as BACKBONE_KINDS
from maskwright.errors import BackboneMismatch, UnequalMaskCounts
from maskwright.mask import Layout, Mask
from maskwright.protocols import BoundObjective, Loss
from maskwright.registry import needs_equal_counts
from maskwright.testing.backbones import LENGTH, NAMES, VOCABULARY, backbone, seeded
from maskwright.testing.rules import (
    Rule,
    check_component_is_frozen,
    global_generators,
    not_tried,
    require,
    require_untouched,
    rule,
    unwanted,
)
from maskwright.testing.strategies import progresses, seeds
from maskwright.toolkit.selection import random_mask

KIND = "objective"
SHOWN = ("prediction", "features")
"""The outputs of a `Loss` in which the kit looks for leaks."""

OWN = "own"
"""The name of the backbone that a class's `example_backbone` makes."""


@attrs.frozen
class Pass:
    """One forward pass: the kit's backbone by name, rows, the share that is hidden, a seed for everything, and progress."""

    backbone: str = "plain-vit"
    rows: int = 2
    ratio: float = 0.5
    seed: int = 0
    progress: float = 1.0


def passes(component: Any, *, least: int = 1) -> st.SearchStrategy[Pass]:
    """Forward passes of an objective on the backbones of its kind, with at least `least` rows."""
    return st.builds(
        Pass,
        backbone=st.sampled_from(backbones_of(component)),
        rows=st.integers(least, least + 2),
        ratio=st.sampled_from((0.5, 0.25, 0.75)),
        seed=seeds,
        progress=progresses,
    )


def backbones_of(component: Any) -> tuple[str, ...]:
    """Names of the backbones that the kit has for an objective; the plain ones come first."""
    return (OWN,) if hasattr(component, "example_backbone") else NAMES.get(component.backbone, ())


def _module(component: Any, name: str, seed: int) -> nn.Module:
    if name != OWN:
        return backbone(name, seed)
    with seeded(seed):
        return component.example_backbone(seed)


def bound_to(component: Any, name: str, seed: int) -> BoundObjective:
    """The objective bound to one of the kit's backbones, with the weights of a seed.

    Every weight that is trained is moved a little afterwards: heads that start at zero would hide what the rules look for.
    """
    module = _module(component, name, seed)
    with seeded(seed):
        bound = component.bind(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bound.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return bound


def example_batch(component: Any, module: Any, rows: int, seed: int) -> dict[str, Tensor]:
    """The columns that an objective needs, by their names, and no other. KeyError names one that the kit cannot make."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(component, "example_batch"):
        return dict(component.example_batch(module, rows, generator))
    return {name: _column(name, module, rows, generator) for name in sorted(component.needs)}


def _column(name: str, module: Any, rows: int, generator: torch.Generator) -> Tensor:
    if name.startswith("pixels"):
        cell = module.strides[-1] if hasattr(module, "strides") else module.patch_size
        sides = [cell * side for side in getattr(module, "grid", (4, 4))]
        return torch.randn(rows, module.channels, *sides, generator=generator)
    if name == "tokens":
        # The last token of the vocabulary stands for a hidden one.
        return torch.randint(0, min(VOCABULARY, module.vocabulary) - 1, (rows, LENGTH), generator=generator)
    if name == "labels":
        return torch.randint(0, 3, (rows,), generator=generator)
    raise KeyError(
        f"the kit has no example of the batch column {name!r}: give the class a static method `example_batch`"
    )


@attrs.frozen(eq=False)
class Scene:
    """A bound objective with a batch, a mask and the signals of the batch, ready for forward passes."""

    example: Pass
    bound: BoundObjective
    batch: dict[str, Tensor]
    mask: Mask
    signals: Mapping[str, Tensor]

    def loss(self, **other: Any) -> Loss:
        """A forward pass; `other` are `batch`, `mask`, `signals` or `seed` in place of the scene's."""
        generator = torch.Generator().manual_seed(other.get("seed", self.example.seed))
        return self.bound(
            other.get("batch", self.batch),
            other.get("mask", self.mask),
            signals=other.get("signals", self.signals),
            progress=self.example.progress,
            generator=other.get("generator", generator),
        )


def staged(component: Any, example: Pass) -> Scene:
    """The scene of an example. What goes wrong on the way is raised."""
    bound = bound_to(component, example.backbone, example.seed)
    batch = example_batch(component, bound.backbone, example.rows, example.seed)
    layout = Layout.of(bound.backbone, batch)
    generator = torch.Generator().manual_seed(example.seed + 1)
    if hasattr(component, "example_mask"):
        mask = component.example_mask(layout, generator)
    else:
        mask = random_mask(layout, max(1, round(layout.positions * (1 - example.ratio))), generator)
    return Scene(example, bound, batch, mask, bound.signals(batch))


def ready(component: Any, example: Pass) -> Scene:
    """The scene of an example, which is left out when there is none: other rules say why."""
    scene = None
    try:
        scene = staged(component, example)
    except Exception:
        unwanted(True)
    assert scene is not None
    return scene


def played(scene: Scene, **other: Any) -> Loss:
    """The loss of a scene, which is left out when there is none: other rules say why."""
    loss = None
    try:
        loss = scene.loss(**other)
        loss.total + sum(loss.parts.values())
    except Exception:
        unwanted(True)
    assert loss is not None
    return loss


def _repeated(scene: Scene) -> Loss:
    """As `played`, where the loss is finite and the same when it is computed again: other rules are about that."""
    loss = played(scene)
    unwanted(not bool(loss.total.isfinite()) or not torch.equal(loss.total, played(scene).total))
    return loss


# -- binding -------------------------------------------------------------------------------------------------


@rule(KIND)
def check_binds_to_its_kind_of_backbone(component: Any) -> None:
    """`bind` takes some backbone of the kind that it names, and returns a `BoundObjective` that holds it."""
    names = backbones_of(component)
    if not names:
        not_tried(f"the kit has no {component.backbone!r} backbone: give the class `example_backbone(seed)`")
    refusals = []
    for name in names:
        try:
            bound = bound_to(component, name, 0)
        except BackboneMismatch as refusal:
            refusals.append(f"{name}: {refusal}")
            continue
        require(isinstance(bound, BoundObjective), f"bind returned a {type(bound).__name__}.")
        mine = {id(parameter) for parameter in bound.parameters()}
        held = getattr(bound, "backbone", None)
        require(isinstance(held, nn.Module), "the bound objective has no `backbone` that is a module.")
        assert held is not None
        require(all(id(one) in mine for one in held.parameters()), "it lacks parameters of its backbone.")
    require(len(refusals) < len(names), "it refuses every backbone of its kind: " + "; ".join(refusals))


@rule(
    KIND, applies=lambda component: component.backbone in BACKBONE_KINDS and component.backbone != "denoiser"
)
def check_other_backbones_are_refused(component: Any) -> None:
    """`bind` raises `BackboneMismatch` for a module that is no backbone of its kind (anything may be a denoiser)."""
    others: dict[str, nn.Module] = {"Linear": nn.Linear(2, 2)}
    own = NAMES.get(component.backbone, ())
    for names in NAMES.values():
        for name in [name for name in names if name not in own][:1]:
            others[name] = backbone(name, 0)
    for name, module in others.items():
        error: Exception | None = None
        try:
            with seeded(0):
                component.bind(module)
        except Exception as raised:
            error = raised
        found = "nothing was raised" if error is None else f"it raised {type(error).__name__}: {error}"
        require(
            isinstance(error, BackboneMismatch),
            f"bind({name}), which is no {component.backbone!r} backbone: {found}, not BackboneMismatch; "
            f"adapt(backbone, {component.backbone!r}) raises it.",
        )


# -- the loss ------------------------------------------------------------------------------------------------


@rule(KIND, cases=passes, examples=10)
def check_needed_columns_are_enough(component: Any, example: Pass) -> None:
    """A batch with just the columns in `needs` gives a `Loss` with a scalar total and scalar parts."""
    unwanted(not _starts(component, example))
    scene = staged(component, example)
    loss = scene.loss()
    require(isinstance(loss, Loss), f"forward returned a {type(loss).__name__}, not a Loss.", scene.mask)
    for name, value in {"total": loss.total, **loss.parts}.items():
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        require(shape == [], f"{name!r} is {shape}, not a scalar tensor.", scene.mask)
    require(bool(loss.parts), "the loss has no parts; give at least one, by name.", scene.mask)


def _starts(component: Any, example: Pass) -> bool:
    """Whether binding and signals work, which other rules are about."""
    try:
        bound = bound_to(component, example.backbone, example.seed)
        held = bound.backbone
    except Exception:
        return False
    if not isinstance(held, nn.Module):
        return False
    try:
        batch = example_batch(component, held, example.rows, example.seed)
    except Exception:
        return True
    try:
        bound.signals(batch)
    except Exception:
        return False
    return True


@rule(KIND, cases=passes, examples=10)
def check_loss_is_finite(component: Any, example: Pass) -> None:
    """Total and parts are finite numbers."""
    scene = ready(component, example)
    loss = played(scene)
    for name, value in {"total": loss.total, **loss.parts}.items():
        require(value.isfinite().all(), f"{name!r} is {value.tolist()}.", scene.mask)


@rule(KIND, cases=passes, examples=10)
def check_parts_sum_to_the_total(component: Any, example: Pass) -> None:
    """The weighted parts add up to the total."""
    scene = ready(component, example)
    loss = played(scene)
    unwanted(not bool(loss.parts) or not bool(loss.total.isfinite()))
    parts = {name: float(part.detach()) for name, part in loss.parts.items()}
    total, summed = float(loss.total.detach()), sum(parts.values())
    spelled = " + ".join(f"{name} {part:.6g}" for name, part in parts.items())
    fits = math.isclose(summed, total, rel_tol=1e-5, abs_tol=1e-6)
    require(fits, f"{spelled} = {summed:.6g}, but the total is {total:.6g}.", scene.mask)


@rule(KIND, cases=passes, examples=10, seconds=1.0)
def check_extreme_masks_are_survived(component: Any, example: Pass) -> None:
    """Loss and gradients are finite numbers when nothing is hidden, and when all but one position is."""
    scene = ready(component, example)
    unwanted(not bool(played(scene).total.isfinite()) or hasattr(component, "example_mask"))
    layout = Layout(scene.mask.shape[0], tuple(scene.mask.shape[1:]), scene.mask.device)
    generator = torch.Generator().manual_seed(example.seed)
    for words, keep in (("nothing is hidden", layout.positions), ("all but one position is hidden", 1)):
        mask = random_mask(layout, keep, generator)
        scene.bound.zero_grad(set_to_none=True)
        try:
            total = scene.loss(mask=mask).total
            value = float(total.detach())
            if total.requires_grad:
                total.backward()
        except Exception as error:
            require(False, f"when {words}, {type(error).__name__}: {error}", mask)
        require(total.isfinite(), f"when {words}, the loss is {value}.", mask)
        for name, parameter in scene.bound.named_parameters():
            finite = parameter.grad is None or bool(parameter.grad.isfinite().all())
            require(finite, f"when {words}, the gradient of {name} is not finite.", mask)


@rule(KIND, cases=passes, examples=10)
def check_unequal_counts_are_taken_or_refused(component: Any, example: Pass) -> None:
    """A mask that keeps another number in each row gives a finite loss, or `UnequalMaskCounts` from a class that says so.

    It says so with `counts = "exact"`: then a strategy of bounded counts is refused when a run is configured, not in step 1.
    """
    scene = ready(component, attrs.evolve(example, rows=max(2, example.rows)))
    unwanted(not bool(played(scene).total.isfinite()) or hasattr(component, "example_mask"))
    generator = torch.Generator().manual_seed(example.seed)
    layout = Layout(scene.mask.shape[0], tuple(scene.mask.shape[1:]), scene.mask.device)
    counts = 1 + torch.arange(layout.batch) * (layout.positions - 2) // max(1, layout.batch - 1)
    mask = random_mask(layout, counts, generator)
    needs_equal = needs_equal_counts(component)
    try:
        total = scene.loss(mask=mask).total.detach()
    except UnequalMaskCounts:
        require(needs_equal, 'it raised UnequalMaskCounts: say `counts = "exact"` on the class.', mask)
        return
    except Exception as error:
        require(False, f"{type(error).__name__}: {error}", mask)
    require(total.isfinite(), f"the loss is {float(total)} for rows that keep {counts.tolist()}.", mask)
    require(
        not needs_equal, f'rows that keep {counts.tolist()} were taken; leave `counts = "exact"` out.', mask
    )


# -- who learns ----------------------------------------------------------------------------------------------


@rule(KIND, cases=passes, examples=10)
def check_gradients_reach_the_backbone(component: Any, example: Pass) -> None:
    """The loss has a finite gradient that is not zero for at least half of the backbone's trained parameters."""
    scene = ready(component, example)
    total = played(scene).total
    unwanted(not bool(total.isfinite()))
    require(total.requires_grad, "the loss has no gradient.", scene.mask)
    total.backward()
    trained = {name: one for name, one in scene.bound.backbone.named_parameters() if one.requires_grad}
    infinite = [
        name
        for name, one in scene.bound.named_parameters()
        if one.grad is not None and not one.grad.isfinite().all()
    ]
    require(not infinite, f"the gradient of {infinite[:3]} is not finite.", scene.mask)
    without = [name for name, one in trained.items() if one.grad is None or not bool(one.grad.any())]
    require(
        bool(trained) and 2 * len(without) <= len(trained),
        f"{len(without)} of {len(trained)} parameters of the backbone receive none, such as {without[:3]}.",
        scene.mask,
    )


@rule(KIND)
def check_own_parameters_are_trained(component: Any) -> None:
    """Each parameter that asks for a gradient, outside the backbone, receives one in some pass.

    An optimiser would decay one that never does, and distributed training stops at it. A teacher that nobody froze is one.
    """
    waiting: dict[str, set[str]] = {}
    for name, seed in itertools.product(backbones_of(component)[:2], range(3)):
        example = Pass(name, ratio=(0.5, 0.25, 0.75)[seed], seed=seed, progress=seed / 2)
        try:
            scene = staged(component, example)
            scene.loss().total.backward()
        except Exception:
            continue
        inside = {id(parameter) for parameter in scene.bound.backbone.parameters()}
        idle = {
            label
            for label, one in scene.bound.named_parameters()
            if one.requires_grad and one.grad is None and id(one) not in inside
        }
        waiting[name] = waiting.get(name, idle) & idle
    if not waiting:
        not_tried("no forward pass gave a loss with a gradient")
    for name, idle in waiting.items():
        require(
            not idle,
            f"bound to {name}, these ask for a gradient and receive none: {', '.join(sorted(idle)[:3])}; "
            "use them in the loss, or freeze them with requires_grad_(False).",
        )


@rule(KIND, cases=passes, examples=10)
def check_teacher_receives_no_gradient(component: Any, example: Pass) -> None:
    """What is frozen stays without gradient and as it is through forward, backward and an optimiser step.

    Only `after_step` may move it. Modules that are called a teacher must be frozen.
    """
    scene = ready(component, example)
    for name, parameter in scene.bound.named_parameters():
        unfrozen = _called_a_teacher(name) and parameter.requires_grad
        require(not unfrozen, f"{name} asks for a gradient.", scene.mask)
    frozen = {name: one for name, one in scene.bound.named_parameters() if not one.requires_grad}
    before = {name: one.detach().clone() for name, one in frozen.items()}
    scene.bound.signals(scene.batch)
    total = played(scene).total
    trained = [one for one in scene.bound.parameters() if one.requires_grad]
    unwanted(not total.requires_grad or not trained)
    total.backward()
    torch.optim.SGD(trained, lr=0.1).step()
    for name, one in frozen.items():
        require(one.grad is None, f"{name} is frozen and has a gradient.", scene.mask)
        same = torch.equal(one, before[name])
        require(same, f"{name} is frozen and changed before after_step was called.", scene.mask)


def _called_a_teacher(name: str) -> bool:
    return any("teacher" in part for part in name.split(".")[:-1])


@rule(KIND, cases=passes, examples=6)
def check_after_step_leaves_the_student(component: Any, example: Pass) -> None:
    """`after_step` moves nothing that is trained: teachers follow the student, never the other way."""
    scene = ready(component, example)
    played(scene)
    trained = {
        name: one
        for name, one in scene.bound.named_parameters()
        if one.requires_grad and not _called_a_teacher(name)
    }
    before = {name: one.detach().clone() for name, one in trained.items()}
    scene.bound.after_step(example.progress)
    moved = [name for name, one in trained.items() if not torch.equal(one, before[name])]
    require(not moved, f"it changed {', '.join(moved[:3])}.")


# -- what is seen --------------------------------------------------------------------------------------------


@rule(KIND, cases=passes, examples=12, seconds=1.0)
def check_hidden_content_does_not_leak(component: Any, example: Pass) -> None:
    """`prediction` and `features` stay the same when what is hidden is replaced by other content.

    The signals are held, since a teacher may look at everything; so are seed and weights. For a causal objective the mask
    hides nothing of the future by itself: there everything from some position on is replaced as well, and what is predicted
    up to that position, and shown before it, must stay the same.
    """
    scene = ready(component, example)
    before = played(scene)
    names = [name for name in SHOWN if name in before.outputs]
    require(bool(names), "give `prediction` or `features` in Loss.outputs, for the kit to look at.")
    generator = torch.Generator().manual_seed(example.seed + 2)
    if (changed := other_hidden_content(component, scene, generator)) is not None:
        after = played(scene, batch=changed)
        for name in names:
            far = _distance(before.outputs[name], after.outputs[name])
            require(far == 0, f"{name!r} changed by {far:.2g} when only hidden content did.", scene.mask)
    if getattr(component, "causal", False):
        _require_causal(scene, before, names, generator)
    elif changed is None:
        not_tried("nothing of `pixels` or `tokens` is hidden: give the class `other_hidden_content`")


def other_hidden_content(
    component: Any, scene: Scene, generator: torch.Generator
) -> dict[str, Tensor] | None:
    """The batch with other pixels or tokens where the mask hides them, or None where it hides neither."""
    if hasattr(component, "other_hidden_content"):
        return component.other_hidden_content(scene.batch, scene.mask, generator)
    batch, mask = scene.batch, scene.mask
    if "tokens" in batch and batch["tokens"].shape == mask.shape:
        return {**batch, "tokens": torch.where(mask.keep, batch["tokens"], _other_tokens(batch, generator))}
    sides = tuple(batch["pixels"].shape[2:]) if "pixels" in batch else ()
    grid = mask.shape[1:]
    if len(sides) == len(grid) and not any(side % cell for side, cell in zip(sides, grid)):
        keep = mask.upsample(sides).keep[:, None]
        other = 3 * torch.randn(batch["pixels"].shape, generator=generator)
        return {**batch, "pixels": torch.where(keep, batch["pixels"], other)}
    return None


def _other_tokens(batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Another token at every place."""
    shift = torch.randint(1, VOCABULARY - 1, batch["tokens"].shape, generator=generator)
    return (batch["tokens"] + shift) % (VOCABULARY - 1)


def _require_causal(scene: Scene, before: Loss, names: list[str], generator: torch.Generator) -> None:
    tokens = scene.batch["tokens"]
    length = tokens.shape[1]
    cut = 1 + scene.example.seed % (length - 1)
    later = torch.arange(length) >= cut
    changed = {**scene.batch, "tokens": torch.where(later, _other_tokens(scene.batch, generator), tokens)}
    after = played(scene, batch=changed)
    for name in names:
        one, two = before.outputs[name], after.outputs[name]
        # The prediction of the token at the cut is made from those before it.
        end = cut + 1 - (length - one.shape[1]) if name == "prediction" else cut
        if name == "prediction" or one.shape[1] == length:
            far = _distance(one[:, :end], two[:, :end])
            require(
                far == 0,
                f"{name!r} of the first {end} places changed by {far:.2g} when tokens from {cut} on did.",
                scene.mask,
            )


def _distance(one: Tensor, two: Tensor) -> float:
    """The largest difference, 0 where it is rounding, infinite for other shapes or numbers that are none."""
    if one.shape != two.shape:
        return math.inf
    one, two = one.detach().double(), two.detach().double()
    far = float((one - two).abs().amax()) if one.numel() else 0.0
    scale = float(one.abs().amax()) if one.numel() else 0.0
    if math.isnan(far):
        return math.inf
    return 0.0 if far <= 1e-6 * max(1.0, scale) else far


@rule(KIND)
def check_visible_content_is_seen(component: Any) -> None:
    """`prediction` and `features` change with what is visible."""
    tried = False
    still: set[str] = set()
    for seed in range(3):
        scene, before = _quiet(component, seed)
        if scene is None or before is None:
            continue
        inverse = attrs.evolve(scene, mask=~scene.mask)
        changed = other_hidden_content(component, inverse, torch.Generator().manual_seed(seed + 2000))
        after = None if changed is None else _quiet_loss(scene, changed)
        if after is None:
            continue
        names = {name for name in SHOWN if name in before.outputs}
        same = {name for name in names if _distance(before.outputs[name], after.outputs[name]) == 0}
        still = same if not tried else still & same
        tried = True
    if not tried:
        not_tried("no forward pass on other visible content worked")
    require(not still, f"{', '.join(sorted(still))} never changed with the visible content.")


@rule(KIND)
def check_every_column_is_used(component: Any) -> None:
    """The loss changes with every column in `needs`, in some pass."""
    unused: set[str] | None = None
    for seed in range(4):
        scene, before = _quiet(component, seed)
        if scene is None or before is None:
            continue
        other = example_batch(component, scene.bound.backbone, scene.example.rows, seed + 1000)
        mine = set()
        for name in component.needs & other.keys():
            after = _quiet_loss(scene, {**scene.batch, name: other[name]})
            if after is not None and torch.equal(before.total, after.total):
                mine.add(name)
        unused = mine if unused is None else unused & mine
    if unused is None:
        not_tried("no forward pass worked")
    require(not unused, f"the loss never changed with {sorted(unused or ())}; drop it from `needs`.")


def _quiet(component: Any, seed: int) -> tuple[Scene | None, Loss | None]:
    """A scene and its loss, for rules that look at several; None where there is none."""
    names = backbones_of(component)
    for name in names:
        try:
            scene = staged(component, Pass(name, seed=seed))
            loss = scene.loss()
            if bool(loss.total.isfinite()):
                return scene, loss
        except Exception:
            continue
    return None, None


def _quiet_loss(scene: Scene, batch: dict[str, Tensor]) -> Loss | None:
    try:
        return scene.loss(batch=batch)
    except Exception:
        return None


# -- signals, state, randomness -------------------------------------------------------------------------------


@rule(KIND, cases=passes, examples=10)
def check_signals_are_as_declared(component: Any, example: Pass) -> None:
    """`signals` returns what `provides` names: finite, [B, N, …], without gradient, the same when asked again.

    It may return more, with a row for each sample, for its own forward pass: a teacher runs once in a step.
    """
    try:
        bound = bound_to(component, example.backbone, example.seed)
        batch = example_batch(component, bound.backbone, example.rows, example.seed)
        layout = Layout.of(bound.backbone, batch)
    except Exception:
        unwanted(True)
    signals, again = dict(bound.signals(batch)), dict(bound.signals(batch))
    missing = sorted(component.provides - signals.keys())
    require(not missing, f"it returned {sorted(signals)}, `provides` promises {missing}.")
    for name, value in signals.items():
        shape, wanted = list(value.shape), [layout.batch, layout.positions]
        known = 2 if name in component.provides else 1
        fits = shape[:known] == wanted[:known]
        require(
            fits, f"signal {name!r} is {shape}, not {wanted} (rows × positions), before any further axes."
        )
        require(not value.requires_grad, f"signal {name!r} carries a gradient.")
        require(value.isfinite().all(), f"signal {name!r} is not finite.")
        require(torch.equal(value, again[name]), f"signal {name!r} was another when asked again.")


@rule(KIND, cases=passes, examples=10)
def check_same_generator_same_loss(component: Any, example: Pass) -> None:
    """The generator's state decides: the same loss again, whatever was computed in between."""
    scene = ready(component, example)
    first = played(scene).total.detach()
    played(scene, seed=example.seed + 1)
    second = played(scene).total.detach()
    unwanted(not bool(first.isfinite()))
    require(torch.equal(first, second), f"the loss was {float(first)}, then {float(second)}.", scene.mask)


@rule(KIND, cases=passes, examples=10)
def check_global_random_state_is_untouched(component: Any, example: Pass) -> None:
    """Signals, forward, backward and `after_step` move no global generator (`bind` may)."""
    scene = ready(component, example)
    before = global_generators()
    scene.bound.signals(scene.batch)
    total = played(scene).total
    if total.requires_grad:
        total.backward()
    scene.bound.after_step(example.progress)
    require_untouched(before, "a step")


@rule(KIND, cases=passes, examples=8, seconds=1.0)
def check_state_dict_holds_everything(component: Any, example: Pass) -> None:
    """Loaded into the same objective with other weights, its `state_dict` gives the same loss."""
    scene = ready(component, example)
    loss = _repeated(scene).total.detach()
    fresh = bound_to(component, example.backbone, example.seed + 1)
    # Copied: a view of the first one's weights would hide what is missing.
    state = {name: value.clone() for name, value in scene.bound.state_dict().items()}
    try:
        fresh.load_state_dict(state)
    except Exception as error:
        require(False, f"{type(error).__name__}: {error}")
    again = played(attrs.evolve(scene, bound=fresh)).total.detach()
    require(
        math.isclose(float(loss), float(again), rel_tol=1e-5, abs_tol=1e-6),
        f"the loss was {float(loss)}, and {float(again)} with the loaded state; "
        "something that it depends on is neither a parameter nor a buffer.",
        scene.mask,
    )


@rule(KIND, cases=passes, examples=8)
def check_batch_and_mask_are_left_alone(component: Any, example: Pass) -> None:
    """Neither the batch nor the mask nor the signals are written to."""
    scene = ready(component, example)
    before = {name: value.clone() for name, value in scene.batch.items()}
    signals = {name: value.clone() for name, value in scene.signals.items()}
    keep = scene.mask.keep.clone()
    scene.bound.signals(scene.batch)
    played(scene)
    changed = [name for name, value in before.items() if not _same(value, scene.batch.get(name))]
    changed += [name for name, value in signals.items() if not _same(value, scene.signals[name])]
    changed += [name for name in scene.batch if name not in before]
    require(not changed, f"it changed {', '.join(sorted(changed))}; work on a copy.", scene.mask)
    require(torch.equal(keep, scene.mask.keep), "it changed the mask; work on a copy.", scene.mask)


def _same(one: Tensor, two: Tensor | None) -> bool:
    return two is not None and one.shape == two.shape and torch.equal(one, two)


@rule(KIND, cases=lambda component: passes(component, least=2), examples=10)
def check_rows_move_with_the_batch(component: Any, example: Pass) -> None:
    """The batch in another order gives the same loss and the same outputs in that order (unless noise is drawn)."""
    scene = ready(component, example)
    generator = torch.Generator().manual_seed(example.seed)
    start = generator.get_state()
    before = played(scene, generator=generator)
    # Noise is drawn in the order of the rows.
    unwanted(not torch.equal(start, generator.get_state()))
    _repeated(scene)
    order = torch.roll(torch.arange(example.rows), 1)
    moved = {
        name: value[order] if len(value) == example.rows else value for name, value in scene.batch.items()
    }
    signals = {name: value[order] for name, value in scene.signals.items()}
    after = played(scene, batch=moved, mask=Mask(scene.mask.keep[order]), signals=signals)
    one, two = float(before.total.detach()), float(after.total.detach())
    require(
        math.isclose(one, two, rel_tol=1e-4, abs_tol=1e-5),
        f"the loss was {one}, and {two} with the rows in the order {order.tolist()}.",
        scene.mask,
    )
    for name in SHOWN:
        value = before.outputs.get(name)
        if value is not None and len(value) == example.rows and name in after.outputs:
            same = torch.allclose(value[order], after.outputs[name], rtol=1e-4, atol=1e-5)
            require(same, f"{name!r} did not follow the order of the rows.", scene.mask)


RULES: tuple[Rule, ...] = (
    check_binds_to_its_kind_of_backbone,
    check_other_backbones_are_refused,
    check_needed_columns_are_enough,
    check_loss_is_finite,
    check_parts_sum_to_the_total,
    check_extreme_masks_are_survived,
    check_unequal_counts_are_taken_or_refused,
    check_gradients_reach_the_backbone,
    check_own_parameters_are_trained,
    check_teacher_receives_no_gradient,
    check_after_step_leaves_the_student,
    check_hidden_content_does_not_leak,
    check_visible_content_is_seen,
    check_every_column_is_used,
    check_signals_are_as_declared,
    check_same_generator_same_loss,
    check_global_random_state_is_untouched,
    check_state_dict_holds_everything,
    check_batch_and_mask_are_left_alone,
    check_rows_move_with_the_batch,
    check_component_is_frozen,
)
