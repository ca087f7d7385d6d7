"""The kit finds each fault, finds nothing in what is right, and says what it found so that it can be tried again."""

import subprocess
import sys
import time
from functools import lru_cache
from typing import ClassVar

import attrs
import broken_masks
import broken_objectives
import broken_pruners
import broken_samplers
import pytest
import torch
from torch import nn

from maskwright import Layout, Mask
from maskwright.testing import (
    ConformanceFailure,
    Draw,
    Exempted,
    NotTried,
    Pass,
    Pruning,
    Sampling,
    checks_for,
    conformance,
    repeat,
    rules_for,
    run_checks,
)
from maskwright.testing.backbones import backbone

MODULES = {
    "mask-strategy": broken_masks,
    "objective": broken_objectives,
    "pruner": broken_pruners,
    "sampler": broken_samplers,
}
RIGHT = [component for module in MODULES.values() for component in module.RIGHT]
BROKEN = [(rule, component) for module in MODULES.values() for rule, component in module.BROKEN]


def name_of(value):
    return value if isinstance(value, str) else f"{value.__module__.removeprefix('broken_')}.{value.__name__}"


# -- what is wrong is found ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODULES)
def test_every_rule_has_a_component_that_breaks_it(kind):
    tried = {rule for rule, _ in MODULES[kind].BROKEN}
    assert tried == {rule.name for rule in rules_for(kind)}


@pytest.mark.parametrize(("rule", "component"), BROKEN, ids=name_of)
def test_a_fault_breaks_its_own_rule_and_no_other(rule, component):
    (own,) = run_checks(component, only=[rule])
    others = [name for name, _ in checks_for(component) if name != rule]
    results = run_checks(component, only=others, max_examples=2)
    assert own.status == "failed"
    assert [f"{one.name}: {one.message}" for one in results if one.status == "failed"] == []


@lru_cache
def checked(component):
    """(results, seconds of this process, which other processes do not change)."""
    started = time.process_time()
    results = run_checks(component)
    return results, time.process_time() - started


@pytest.fixture(scope="module")
def models_imported():
    """transformers takes its time, once."""
    for name in ("transformers-vit", "transformers-llama", "transformers-bert", "transformers-resnet"):
        backbone(name, 0)


@pytest.mark.parametrize("component", RIGHT, ids=name_of)
@pytest.mark.usefixtures("models_imported")
def test_what_is_right_passes_quickly(component):
    results, seconds = checked(component)
    assert [f"{one.name}: {one.message}" for one in results if not one.ok] == []
    # A rule that is skipped found nothing to look at, or is one of the class's exemptions.
    assert sum(one.status == "passed" for one in results) >= 0.6 * len(results)
    limits = {"mask-strategy": 3, "objective": 10, "pruner": 8, "sampler": 3}
    assert seconds < limits[component.kind]


@pytest.mark.parametrize("kind", MODULES)
def test_every_rule_passes_for_some_component_that_is_right(kind):
    """None is skipped everywhere."""
    passed = {
        one.name
        for component in MODULES[kind].RIGHT
        for one in checked(component)[0]
        if one.status == "passed"
    }
    assert passed == {rule.name for rule in rules_for(kind)}


# -- what a failure says -----------------------------------------------------------------------------------------


def failure_of(component, rule):
    (result,) = run_checks(component, only=[rule])
    assert result.status == "failed"
    return result.message


REPEATED = [
    ("counts-are-equal", broken_masks.Thresholds),
    ("monotone", broken_masks.ForgetsWhatWasHidden),
    ("draws-a-boolean-mask", broken_masks.Raises),
    ("every-signal-is-used", broken_masks.NeedsMoreThanItUses),
    ("hidden-content-does-not-leak", broken_objectives.Late),
    ("budget-is-met", broken_pruners.OneTooMany),
    ("prompt-is-kept", broken_samplers.RewritesThePrompt),
]


@pytest.mark.parametrize(("rule", "component"), REPEATED, ids=name_of)
def test_the_last_line_of_a_failure_repeats_it(rule, component):
    message = failure_of(component, rule)
    words, _, line = message.splitlines()[-1].partition(": ")
    assert words == "Repeat it"
    with pytest.raises(ConformanceFailure) as caught:
        exec(line, {})
    assert str(caught.value) == message


def test_the_line_works_in_a_fresh_interpreter():
    line = failure_of(broken_masks.Thresholds, "counts-are-equal").splitlines()[-1].partition(": ")[2]
    path = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, env=path)
    assert done.returncode == 1
    assert "ConformanceFailure: counts-are-equal: rows keep" in done.stderr


@pytest.mark.parametrize(("rule", "component"), [*REPEATED[:2], *REPEATED[4:]], ids=name_of)
def test_a_failure_shows_the_masks(rule, component):
    lines = failure_of(component, rule).splitlines()
    assert lines[1].startswith("row 0")
    assert any(set(line) & set("■·") for line in lines[1:-1])


def test_the_example_in_a_failure_is_a_small_one():
    """`Thresholds` fails for two rows on any grid: the first grid, two rows, seeds as small as they go."""
    draw = failure_of(broken_masks.Thresholds, "counts-are-equal").splitlines()[-1]
    assert "Draw(batch=2, grid=(4, 4), patch_size=16" in draw


def test_a_component_inside_another_is_imported_too():
    message = failure_of(Wraps(broken_masks.Thresholds(ratio=0.5)), "counts-are-equal")
    line = message.splitlines()[-1].partition(": ")[2]
    with pytest.raises(ConformanceFailure, match="counts-are-equal"):
        exec(line, {})


def test_a_component_that_holds_a_network_is_named_by_its_class():
    message = failure_of(HoldsANetwork, "no-row-is-all-hidden")
    assert "repeat('no-row-is-all-hidden', HoldsANetwork, Draw(" in message


def test_no_rule_of_that_name_can_be_repeated():
    with pytest.raises(
        ValueError, match="There is no rule 'monotony' for a mask-strategy; rules are draws-a"
    ):
        repeat("monotony", broken_masks.Right())


def test_an_example_that_is_refused_is_not_tried():
    with pytest.raises(NotTried, match="does not accept this example"):
        repeat("counts-are-equal", broken_masks.Raises(), Draw(2, (4, 4)))


@attrs.frozen
class Wraps:
    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "wraps"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"patch_loss"})

    inner: broken_masks.Right

    def draw(self, layout, **others):
        return self.inner.draw(layout, **others)


@attrs.frozen(eq=False)
class HoldsANetwork:
    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "holds"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset()
    example_parameters: ClassVar = staticmethod(lambda: {"network": nn.Linear(2, 2)})

    network: nn.Module

    def draw(self, layout, **others):
        return Mask(torch.zeros(layout.shape, dtype=torch.bool))


# -- exemptions and complaints -----------------------------------------------------------------------------------


class Excused(broken_masks.LooksAtTheBatch):
    exempt = {"rows-are-independent": "scores are relative to the batch"}


class ExcusedForNothing(broken_masks.Right):
    exempt = {"rows-are-independent": "scores are relative to the batch"}


class ExcusedFromNothing(broken_masks.Right):
    exempt = {"rows-are-free": "they are"}


class ExcusedFromAnotherKind(broken_masks.Right):
    exempt = {"hidden-content-does-not-leak": "it is no objective"}


def test_an_exemption_is_reported_with_its_reason():
    results = {one.name: one for one in run_checks(Excused)}
    assert results["rows-are-independent"].status == "exempt"
    assert results["rows-are-independent"].message == "scores are relative to the batch"
    assert {one.status for one in results.values()} == {"passed", "exempt"}


def test_an_exempt_check_skips_in_a_test_runner():
    check = dict(conformance(Excused))["rows-are-independent"]
    with pytest.raises(Exempted, match="relative to the batch"):
        check()


def test_an_exemption_that_is_not_needed_is_a_failure():
    (result,) = run_checks(ExcusedForNothing, only=["rows-are-independent"])
    assert result.status == "failed"
    assert "declared exempt (scores are relative to the batch), but the check passes" in result.message


@pytest.mark.parametrize("component", [ExcusedFromNothing, ExcusedFromAnotherKind], ids=name_of)
def test_an_exemption_from_no_rule_is_a_failure(component):
    (failed,) = [one for one in run_checks(component) if one.status == "failed"]
    (rule,) = component.exempt
    assert failed.name == "exemptions-name-rules"
    assert f"`exempt` names {rule!r}; this component's rules are draws-a-boolean-mask" in failed.message


class OfNoKind(broken_masks.Right):
    kind = "mask"


@attrs.frozen
class Required(broken_masks.Right):
    network: object = attrs.field(kw_only=True)


def test_a_class_of_no_known_kind_is_one_failure():
    (result,) = run_checks(OfNoKind)
    assert (result.name, result.status) == ("kind-is-known", "failed")
    assert "mask-strategy, objective, pruner, sampler" in result.message


def test_a_class_that_cannot_be_made_is_one_failure():
    (result,) = run_checks(Required)
    assert (result.name, result.status) == ("can-be-made", "failed")
    assert "example_parameters" in result.message


# -- running it --------------------------------------------------------------------------------------------------


def test_a_component_is_checked_as_it_was_made():
    """The class hides everything at 0.7 and more only."""
    whole, half = (
        run_checks(broken_masks.HidesAll(ratio=ratio), only=["draws-a-boolean-mask"]) for ratio in (0.9, 0.5)
    )
    assert whole[0].component == half[0].component == "mask-strategy right"


def test_several_components_are_checked_one_after_the_other():
    seen = []
    results = run_checks(
        [broken_masks.Right, broken_samplers.Right], seen.append, only=["component-is-frozen"]
    )
    assert [one.component for one in results] == ["mask-strategy right", "sampler right"]
    assert seen == results


def test_more_examples_look_longer():
    """Without a limit of time: hypothesis tries as many as are asked for."""
    calls = []

    class Counts(broken_masks.Right):
        def draw(self, layout, **others):
            calls.append(layout)
            return super().draw(layout, **others)

    for examples in (5, 60):
        calls.clear()
        run_checks(Counts, only=["shape-is-the-layouts"], max_examples=examples)
        assert len(calls) == examples


def test_examples_are_the_same_in_every_run():
    seen = []

    class Notes(broken_masks.Right):
        def draw(self, layout, *, generator, **others):
            seen.append((layout, generator.initial_seed()))
            return super().draw(layout, generator=generator, **others)

    for _ in range(2):
        run_checks(Notes, only=["shape-is-the-layouts"], max_examples=10)
    assert seen[:10] == seen[10:]


def test_a_component_that_refuses_everything_ends_soon():
    started = time.process_time()
    results = run_checks(broken_objectives.RefusesAll, max_examples=1000)
    assert time.process_time() - started < 10
    assert sum(one.status == "skipped" for one in results) > 10


# -- the examples ------------------------------------------------------------------------------------------------


def test_prompts_are_what_they_are_called():
    tokens = {
        kind: Sampling(rows=3, length=9, prompt=kind, mask_token=0, seed=1).tokens()
        for kind in ("empty", "first", "prefix", "uneven", "some", "full")
    }
    given = {kind: rows != 0 for kind, rows in tokens.items()}
    assert not given["empty"].any()
    assert given["full"].all()
    assert given["first"].sum(1).tolist() == [1, 1, 1]
    assert len(set(given["prefix"].sum(1).tolist())) == 1
    assert len(set(given["uneven"].sum(1).tolist())) > 1
    for kind in ("prefix", "uneven"):
        assert not (given[kind][:, 1:] & ~given[kind][:, :-1]).any()
    assert (given["some"][:, 1:] & ~given["some"][:, :-1]).any()


def test_other_prompts_stand_at_the_same_places():
    example = Sampling(rows=3, length=9, prompt="some", seed=4)
    one, two = example.tokens(), example.tokens(77)
    assert torch.equal(one == 7, two == 7)
    assert not torch.equal(one, two)


def test_a_pruning_example_makes_the_same_model_again():
    one, two, other = (Pruning(seed=seed).network(broken_pruners.Right()) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one[0].weight, other[0].weight)


def test_examples_can_be_spelled_and_read_back():
    for example in (Draw(2, (4, 4)), Pass("plain-vit", seed=3), Pruning(amount="2:4"), Sampling(timed=True)):
        assert eval(repr(example)) == example


def test_an_unknown_column_asks_for_an_example():
    class NeedsDepth(broken_objectives.Right):
        needs = frozenset({"depth"})

    message = failure_of(NeedsDepth, "needed-columns-are-enough")
    assert "no example of the batch column 'depth'" in message
    assert "`example_batch`" in message


@pytest.mark.parametrize(
    ("kind", "attributes", "rule", "asked"),
    [
        ("objective", {"backbone": "graph"}, "binds-to-its-kind-of-backbone", "`example_backbone"),
        ("sampler", {"domain": "continuous"}, "requests-are-answered", "`example_request`"),
        ("pruner", {"needs": frozenset({"clients"})}, "declared-budgets-are-accepted", "`example_extras"),
    ],
)
def test_what_the_kit_does_not_have_is_asked_for(kind, attributes, rule, asked):
    component = attrs.frozen(type("Unusual", (MODULES[kind].Right,), attributes))
    (result,) = run_checks(component, only=[rule])
    assert result.status == "skipped"
    assert asked in result.message


def test_layouts_of_a_class_replace_those_of_its_modality():
    grids = set()

    class Motion(broken_masks.Right):
        example_grids = ((6, 22),)

        def draw(self, layout, **others):
            grids.add(layout.grid)
            return super().draw(layout, **others)

    assert all(one.ok for one in run_checks(Motion, max_examples=3))
    assert grids == {(6, 22)}


def test_importing_the_kit_imports_no_torch():
    code = "import sys, maskwright.testing; print('torch' in sys.modules, 'hypothesis' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_global_generator_does_not_choose_the_examples():
    torch.manual_seed(1)
    one = run_checks(broken_masks.Thresholds, only=["counts-are-equal"])
    torch.manual_seed(2)
    two = run_checks(broken_masks.Thresholds, only=["counts-are-equal"])
    assert one[0].message == two[0].message


def test_layout_of_a_draw():
    assert Draw(3, (4, 6), 16).layout == Layout(3, (4, 6), patch_size=16)
