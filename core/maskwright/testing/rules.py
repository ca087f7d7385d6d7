"""What a rule is: a property of a component, checked on examples that hypothesis makes, that also runs alone."""

from __future__ import annotations

import random
import time
import unittest
from collections.abc import Callable, Iterable
from typing import Any, Literal, NoReturn

import attrs
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.errors import Flaky, Unsatisfiable, UnsatisfiedAssumption
from hypothesis.strategies import SearchStrategy

from maskwright.mask import Mask
from maskwright.testing.pictures import picture

KINDS = ("mask-strategy", "objective", "pruner", "sampler")
_FEWEST = 3
"""Examples that are tried even when they take long."""
_REFUSED, _HOPELESS = 3, 20
"""So many refusals count as one example; after so many without an example there is none."""


class ConformanceFailure(AssertionError):
    """A component broke a rule. The message says how, with a picture of the mask and a line that repeats it."""


class NotTried(unittest.SkipTest):
    """The rule could not be tried on this component; test runners count it as skipped."""


class Exempted(unittest.SkipTest):
    """The component breaks the rule and says why (`exempt`); test runners count it as skipped."""


class _Enough(unittest.SkipTest):
    """Raised to stop looking: hypothesis lets skipped tests end at once."""

    def __init__(self) -> None:
        super().__init__("enough was tried")


class _Broken(Exception):
    """Raised inside a rule's body; becomes a `ConformanceFailure` once the smallest example is known."""

    def __init__(self, message: str, masks: tuple[Mask, ...] = ()) -> None:
        super().__init__(message)
        self.masks = masks


def require(holds: bool | torch.Tensor, message: str, *masks: Mask) -> None:
    """Inside a rule: it is broken unless `holds`. The masks are drawn in the message."""
    if not bool(holds):
        raise _Broken(message, masks)


def not_tried(reason: str) -> NoReturn:
    """Inside a rule: this component cannot be tried at all."""
    raise NotTried(reason)


Body = Callable[..., None]
Cases = Callable[[Any], SearchStrategy[Any]]


@attrs.frozen(eq=False)
class Rule:
    """One rule. Call it with a component (or its class) to check it; `once(component, case)` tries one example.

    The name is that of its function: `check_rows_are_independent` is "rows-are-independent".
    """

    name: str
    kinds: frozenset[str]
    body: Body
    cases: Cases | None
    applies: Callable[[Any], bool]
    examples: int
    seconds: float

    @property
    def meaning(self) -> str:
        """What the rule asks, in one line."""
        return (self.body.__doc__ or "").strip().partition("\n")[0]

    def __call__(self, component: Any, *, max_examples: int | None = None) -> None:
        """Check a component. Raises `ConformanceFailure`, or `NotTried` when no example was accepted.

        The examples are the same in every run. After a few of them the rest are left out when they take too long,
        unless `max_examples` is given.
        """
        component = made(component)
        if self.cases is None:
            self.once(component)
            return
        broken: list[tuple[_Broken | Exception, Any]] = []
        tried = seen = 0
        # Time of this process: what is found must not depend on what else the machine does.
        started = time.process_time()
        patience = self.seconds if max_examples is None else float("inf")
        hopeless = min(_HOPELESS, 4 * (max_examples or self.examples))

        @settings(
            max_examples=max_examples or self.examples,
            derandomize=True,
            database=None,
            deadline=None,
            verbosity=Verbosity.quiet,
            report_multiple_bugs=False,
            print_blob=False,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(self.cases(component))
        def holds(case: Any) -> None:
            nonlocal tried, seen
            seen += 1
            late = time.process_time() - started > patience
            # When something was found, the last example is the smallest so far.
            if late and (broken or max(tried, seen // _REFUSED) >= _FEWEST):
                raise _Enough()
            if seen > hopeless and not (tried or broken):
                raise _Enough()
            try:
                self.body(component, case)
            except (UnsatisfiedAssumption, NotTried):
                raise
            except Exception as error:
                broken.append((error, case))
                raise
            tried += 1

        try:
            holds()
        except NotTried:
            raise
        except (_Enough, Unsatisfiable, Flaky):
            pass
        except Exception:
            if not broken:
                raise
        if broken:
            error, case = broken[-1]
            raise self._failure(error, component, case) from (None if isinstance(error, _Broken) else error)
        if not tried:
            raise NotTried("the component accepted none of the examples")

    def once(self, component: Any, *case: Any) -> None:
        """Try one example, as a failure's last line does."""
        component = made(component)
        try:
            self.body(component, *case)
        except UnsatisfiedAssumption:
            raise NotTried("the component does not accept this example") from None
        except NotTried:
            raise
        except _Broken as error:
            raise self._failure(error, component, *case) from None
        except Exception as error:
            raise self._failure(error, component, *case) from error

    def _failure(self, error: Exception, component: Any, *case: Any) -> ConformanceFailure:
        masks = error.masks if isinstance(error, _Broken) else ()
        text = str(error) if isinstance(error, _Broken) else f"{type(error).__name__}: {error}"
        imports = "".join(f"from {module} import {name}; " for module, name in _classes(component))
        arguments = ", ".join([repr(self.name), _spelled(component), *map(repr, case)])
        line = f"{imports}from maskwright.testing import *; repeat({arguments})"
        pictures = [picture(mask) for mask in masks]
        return ConformanceFailure("\n".join([f"{self.name}: {text}", *pictures, f"Repeat it: {line}"]))


def _spelled(component: Any) -> str:
    """A component as Python: its repr, or its class where that is no Python, since it holds a network."""
    return type(component).__qualname__ if _holds_a_network(component) else repr(component)


def _holds_a_network(value: Any) -> bool:
    if not attrs.has(type(value)):
        return isinstance(value, torch.nn.Module | torch.Tensor)
    return any(_holds_a_network(getattr(value, field.name, None)) for field in attrs.fields(type(value)))


def _classes(component: Any) -> list[tuple[str, str]]:
    """(module, name) of the class of a component and of those that it holds: what its repr needs."""
    kind = type(component)
    found = {(kind.__module__, kind.__qualname__.partition(".")[0]): None}
    for field in attrs.fields(kind) if attrs.has(kind) else ():
        if attrs.has(type(value := getattr(component, field.name, None))):
            found |= dict.fromkeys(_classes(value))
    return list(found)


def rule(
    *kinds: str,
    cases: Cases | None = None,
    applies: Callable[[Any], bool] = lambda component: True,
    examples: int = 20,
    seconds: float = 0.7,
) -> Callable[[Body], Rule]:
    """Make a function `check_…(component, case)` a `Rule` of these kinds of component.

    `cases(component)` is the hypothesis strategy of its examples (None: it makes its own); the rule is left out for
    components to which it does not apply.
    """

    def wrap(body: Body) -> Rule:
        name = body.__name__.removeprefix("check_").replace("_", "-")
        return Rule(name, frozenset(kinds), body, cases, applies, examples, seconds)

    return wrap


def made(component: Any) -> Any:
    """The component itself, or one made from the class with its `example_parameters` (none: its defaults)."""
    if not isinstance(component, type):
        return component
    given = getattr(component, "example_parameters", {})
    return component(**(given() if callable(given) else given))


def unwanted(condition: bool) -> None:
    """Leave an example out: what the rule is about does not exist there, or another rule already says why not."""
    if condition:
        raise UnsatisfiedAssumption


# -- the global generators -----------------------------------------------------------------------------------


def global_generators() -> dict[str, Any]:
    """The states of every global source of randomness, to compare."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (kind, np.asarray(keys).tobytes(), position, has_gauss, gauss),
        "random": random.getstate(),
    }


def require_untouched(before: dict[str, Any], by: str) -> None:
    """Broken when a global generator has moved since `before`."""
    after = global_generators()
    moved = [name for name, state in before.items() if after[name] != state]
    require(
        not moved,
        f"{by} moved the global random state of {' and '.join(moved)}; draw from the generator given.",
    )


# -- rules of every kind -------------------------------------------------------------------------------------


@rule(*KINDS)
def check_component_is_frozen(component: Any) -> None:
    """Hyper-parameters cannot be set once it is made: state lives in what it makes."""
    fields = [field.name for field in attrs.fields(type(component))] if attrs.has(type(component)) else []
    for name in fields or ["anything"]:
        before = getattr(component, name, None)
        try:
            setattr(component, name, before)
        except AttributeError:
            continue
        require(False, f"{name!r} can be set; declare the class with @attrs.frozen.")


Status = Literal["passed", "failed", "exempt", "skipped"]


@attrs.frozen
class CheckResult:
    """What became of one rule: `status` is "passed", "failed", "exempt" (declared, with its reason) or "skipped"."""

    component: str
    name: str
    status: Status
    message: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: only "failed" is."""
        return self.status != "failed"


@attrs.frozen(eq=False)
class Check:
    """A rule applied to a component: `check()` raises when it is broken. Its exemption is heeded.

    An exemption whose rule holds after all is itself a failure.
    """

    component: Any
    rule: Rule
    reason: str | None = None

    @property
    def name(self) -> str:
        """The rule's name."""
        return self.rule.name

    @property
    def __name__(self) -> str:
        """For the ids of test runners."""
        return self.rule.name

    def __str__(self) -> str:
        return self.rule.name

    def __call__(self, *, max_examples: int | None = None) -> None:
        if self.reason is None:
            self.rule(self.component, max_examples=max_examples)
            return
        try:
            self.rule(self.component, max_examples=max_examples)
        except ConformanceFailure:
            raise Exempted(self.reason) from None
        raise ConformanceFailure(
            f"{self.name}: declared exempt ({self.reason}), but the check passes; remove it."
        )

    def result(self, *, max_examples: int | None = None) -> CheckResult:
        """Run it and say what became of it; nothing is raised."""
        started = time.monotonic()
        status: Status = "passed"
        message = ""
        try:
            self(max_examples=max_examples)
        except Exempted as exemption:
            status, message = "exempt", str(exemption)
        except unittest.SkipTest as skipped:
            status, message = "skipped", str(skipped)
        except ConformanceFailure as failure:
            status, message = "failed", str(failure)
        return CheckResult(
            name_of(self.component), self.name, status, message, round(time.monotonic() - started, 3)
        )


@attrs.frozen(eq=False)
class Complaint:
    """A check that can only fail: the component cannot be made, or its exemptions name no rule."""

    component: Any
    name: str
    message: str

    @property
    def __name__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name

    def __call__(self, *, max_examples: int | None = None) -> None:
        raise ConformanceFailure(f"{self.name}: {self.message}")

    def result(self, *, max_examples: int | None = None) -> CheckResult:
        """The failure."""
        return CheckResult(name_of(self.component), self.name, "failed", f"{self.name}: {self.message}")


def name_of(component: Any) -> str:
    """`kind name`, or the class's name when it has none."""
    owner = component if isinstance(component, type) else type(component)
    return f"{getattr(owner, 'kind', 'component')} {getattr(owner, 'name', owner.__name__)}"


def applicable(component: Any, rules: Iterable[Rule]) -> list[Rule]:
    """The rules for this kind of component that have something to say about it."""
    return [one for one in rules if component.kind in one.kinds and one.applies(component)]
