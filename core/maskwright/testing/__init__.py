"""The conformance kit: what a component must hold to, checked on examples that hypothesis makes.

One line of test code for a plugin author (the kit itself does not depend on pytest):

    @pytest.mark.parametrize("check", dict(maskwright.testing.conformance(MyMask)).values())
    def test_my_mask_conforms(check): check()

and the same from a program: `maskwright.testing.run_checks(MyMask)`. With pytest there is a marker for it too, in
`maskwright.testing.pytest_plugin`.

A class that must break a rule says so, `exempt = {"rows-are-independent": "Sinkhorn balances over the batch"}`. What else
a class may say about itself is in `maskwright.testing.strategies` (mask strategies), `.objectives`, `.pruners` and
`.samplers`.

Everything here is imported when it is first used, so that the pytest plugin costs other users nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskwright.testing.checks import checks_for as checks_for
    from maskwright.testing.checks import conformance as conformance
    from maskwright.testing.checks import repeat as repeat
    from maskwright.testing.checks import rules_for as rules_for
    from maskwright.testing.checks import run_checks as run_checks
    from maskwright.testing.objectives import Pass as Pass
    from maskwright.testing.pictures import picture as picture
    from maskwright.testing.pruners import Pruning as Pruning
    from maskwright.testing.rules import Check as Check
    from maskwright.testing.rules import CheckResult as CheckResult
    from maskwright.testing.rules import ConformanceFailure as ConformanceFailure
    from maskwright.testing.rules import Exempted as Exempted
    from maskwright.testing.rules import NotTried as NotTried
    from maskwright.testing.samplers import Sampling as Sampling
    from maskwright.testing.strategies import Draw as Draw
    from maskwright.testing.strategies import Growth as Growth

_HOMES = {
    "checks": ("checks_for", "conformance", "repeat", "rules_for", "run_checks"),
    "objectives": ("Pass",),
    "pictures": ("picture",),
    "pruners": ("Pruning",),
    "rules": ("Check", "CheckResult", "ConformanceFailure", "Exempted", "NotTried"),
    "samplers": ("Sampling",),
    "strategies": ("Draw", "Growth"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"maskwright.testing.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'maskwright.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
