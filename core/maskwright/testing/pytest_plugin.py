"""The pytest plugin: a fixture `registry`, and a marker that runs the conformance kit, one line for each rule.

    @pytest.mark.maskwright_conformance("my-mask", kind="mask-strategy", ratio=0.6)
    def test_conforms(check):
        check()

pytest loads it in every project where maskwright is installed, so nothing is imported here before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from maskwright.registry import Registry

MARKER = "maskwright_conformance"
_USE = (
    f'write @pytest.mark.{MARKER}("name", kind="mask-strategy") or @pytest.mark.{MARKER}(MyMask) on a test that takes the '
    "argument `check` and calls it: def test_conforms(check): check()"
)


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}(component, kind=None, max_examples=None, **parameters): run maskwright's conformance kit on a component "
        "(its name, class or instance), one test for each rule; the test takes the argument `check` and calls it.",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each rule of the components that the marker names."""
    markers = list(metafunc.definition.iter_markers(MARKER))
    if not markers:
        return
    where = metafunc.definition.nodeid
    if "check" not in metafunc.fixturenames:
        raise pytest.UsageError(f"{where} has the marker {MARKER} and no argument `check`; {_USE}.")
    found = [one for marker in reversed(markers) for one in _checks(where, *marker.args, **marker.kwargs)]
    several = len({owner for owner, _, _ in found}) > 1
    pairs = [pytest.param(check, id=f"{owner}-{name}" if several else name) for owner, name, check in found]
    metafunc.parametrize("check", pairs)


def _checks(
    where: str, *components: Any, kind: str | None = None, max_examples: int | None = None, **parameters: Any
) -> list[tuple[str, str, Any]]:
    """(component's name, rule's name, check) for each rule; a component that cannot be made is one check, which fails."""
    from functools import partial

    from maskwright.testing.checks import checks_for

    if not components:
        raise pytest.UsageError(f"{where}: the marker {MARKER} names no component; {_USE}.")
    found: list[tuple[str, str, Any]] = []
    for component in components:
        owner = component if isinstance(component, str) else getattr(component, "name", str(component))
        try:
            one = _component(component, kind, parameters)
        except Exception as error:
            found.append((owner, "can-be-made", partial(_raise, error)))
            continue
        found += [
            (owner, name, check if max_examples is None else partial(check, max_examples=max_examples))
            for name, check in checks_for(one)
        ]
    return found


def _component(component: Any, kind: str | None, parameters: dict[str, Any]) -> Any:
    if isinstance(component, str):
        from maskwright.registry import default

        registry = default()
        kind = kind or registry.info(component).kind
        component = registry.component_class(kind, component)
    return component(**parameters) if parameters else component


def _raise(error: Exception, **_: Any) -> None:
    raise error


@pytest.fixture
def registry() -> Registry:
    """A fresh registry of the built-in and installed plugins; what a test registers in it is gone afterwards."""
    from maskwright.registry import Registry

    return Registry.from_environment()
