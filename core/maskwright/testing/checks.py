"""Checks: the rules of a component's kind, applied to it one by one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from maskwright.testing.rules import KINDS, Check, CheckResult, Complaint, Rule, applicable, made

_MODULES = {
    "mask-strategy": "masks",
    "objective": "objectives",
    "pruner": "pruners",
    "sampler": "samplers",
}


def rules_for(kind: str) -> tuple[Rule, ...]:
    """Every rule of a kind of component, in the order in which they are checked."""
    return importlib.import_module(f"maskwright.testing.{_MODULES[kind]}").RULES


def checks_for(component: Any) -> Iterator[tuple[str, Check | Complaint]]:
    """(name, check) pairs, one per rule, for a component or its class; `check()` raises when the rule is broken.

    A class is made with its `example_parameters`, or its defaults. `check(max_examples=200)` looks longer.
    A failure is a `ConformanceFailure`; a rule that could not be tried, or a declared exemption, raises a
    `unittest.SkipTest`, which test runners count as skipped.
    """
    if getattr(component, "kind", None) not in KINDS:
        yield _complaint(component, "kind-is-known", f"`kind` must be one of {', '.join(KINDS)}.")
        return
    try:
        one = made(component)
    except Exception as error:
        text = f"{type(error).__name__}: {error} Give the class `example_parameters` if it has no defaults."
        yield _complaint(component, "can-be-made", text)
        return
    rules = applicable(one, rules_for(one.kind))
    exempt = dict(getattr(one, "exempt", {}))
    for rule in rules:
        yield rule.name, Check(one, rule, exempt.pop(rule.name, None))
    for name in exempt:
        known = ", ".join(rule.name for rule in rules)
        yield _complaint(
            one, "exemptions-name-rules", f"`exempt` names {name!r}; this component's rules are {known}."
        )


def _complaint(component: Any, name: str, message: str) -> tuple[str, Complaint]:
    return name, Complaint(component, name, message)


def conformance(component: Any) -> list[tuple[str, Check | Complaint]]:
    """`checks_for` as a list, for a test runner's parametrization: see the first lines of `maskwright.testing`."""
    return list(checks_for(component))


def run_checks(
    components: Any,
    on_result: Callable[[CheckResult], None] | None = None,
    *,
    only: Collection[str] | None = None,
    max_examples: int | None = None,
) -> list[CheckResult]:
    """Run every check of a component, a component class, or several of them, and return what became of each.

    `on_result` is called after each check; `only` names the rules to run. Nothing is raised for a broken rule.
    """
    several = (
        components if isinstance(components, Iterable) and not isinstance(components, type) else [components]
    )
    results = []
    for component in several:
        for name, check in checks_for(component):
            if only is None or name in only:
                results.append(check.result(max_examples=max_examples))
                if on_result is not None:
                    on_result(results[-1])
    return results


def repeat(name: str, component: Any, *case: Any) -> None:
    """Try one rule on one example again, as the last line of a failure says."""
    rule = next((one for one in rules_for(component.kind) if one.name == name), None)
    if rule is None:
        known = ", ".join(one.name for one in rules_for(component.kind))
        raise ValueError(f"There is no rule {name!r} for a {component.kind}; rules are {known}.")
    rule.once(component, *case)
