"""The pytest plugin: the marker, the fixture, and that other users of pytest do not notice it."""

import importlib.metadata

import pytest

# What the tests inside need is imported here: pytester forgets modules between them, and numpy cannot be loaded twice.
import maskwright
import maskwright.plugins.baselines
import maskwright.testing.checks
import maskwright.testing.masks
from maskwright.testing import checks_for

assert maskwright.plugins.baselines.maskwright_components()

pytest_plugins = ["pytester"]

PLUGIN = "maskwright.testing.pytest_plugin"
# An environment that was set up before the plugin existed has no entry point for it.
INSTALLED = any(one.value == PLUGIN for one in importlib.metadata.entry_points(group="pytest11"))
WITH_PLUGIN = [] if INSTALLED else ["-p", PLUGIN]


@pytest.fixture
def run(pytester):
    """Run a test file in this process, with the plugin."""

    def tests(text, *options):
        pytester.makepyfile(text)
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", *WITH_PLUGIN, *options)

    return tests


COMPONENT = """
    from typing import ClassVar

    import attrs
    import pytest
    from maskwright import Layout, Mask, setting
    from maskwright.toolkit.selection import random_mask

    @attrs.frozen
    class Mine:
        kind: ClassVar[str] = "mask-strategy"
        name: ClassVar[str] = "mine"
        modalities: ClassVar[frozenset[str]] = frozenset({"image"})
        needs: ClassVar[frozenset[str]] = frozenset()
        least: int = setting(1, "visible at least", ge=0)

        def draw(self, layout, *, signals, progress, generator):
            return random_mask(layout, self.least, generator)
"""


def test_a_name_gives_one_line_for_each_rule(run):
    result = run(
        """
        import pytest

        @pytest.mark.maskwright_conformance("random", kind="mask-strategy", ratio=0.6)
        def test_conforms(check):
            check()
        """,
        "-v",
    )
    rules = [name for name, _ in checks_for(maskwright.create("mask-strategy", "random", ratio=0.6))]
    result.assert_outcomes(passed=len(rules))
    result.stdout.fnmatch_lines([f"*::test_conforms[[]{rule}[]] PASSED*" for rule in rules])


def test_the_kind_is_found_when_one_component_has_the_name(run):
    result = run(
        """
        import pytest

        @pytest.mark.maskwright_conformance("tube", max_examples=2)
        def test_conforms(check):
            check()
        """,
        "-q",
        "-k",
        "monotone or frozen",
    )
    assert result.parseoutcomes()["passed"] == 2


def test_a_class_is_checked_and_its_fault_shown(run):
    result = run(
        COMPONENT
        + """
    @pytest.mark.maskwright_conformance(Mine, least=0)
    def test_conforms(check):
        check()
        """
    )
    assert result.parseoutcomes()["failed"] == 1
    result.stdout.fnmatch_lines(
        [
            "*ConformanceFailure: no-row-is-all-hidden: rows keep [[]0[]] positions*",
            "*row 0*",
            "*Repeat it: *",
        ]
    )


def test_an_exemption_is_a_skip_with_its_reason(run):
    result = run(
        COMPONENT
        + """
    class Excused(Mine):
        exempt = {"no-row-is-all-hidden": "it hides everything on purpose"}

    @pytest.mark.maskwright_conformance(Excused(least=0))
    def test_conforms(check):
        check()
        """,
        "-rs",
    )
    assert result.parseoutcomes()["skipped"] == 1
    assert "failed" not in result.parseoutcomes()
    result.stdout.fnmatch_lines(["SKIPPED*it hides everything on purpose"])


def test_several_components_are_told_apart(run):
    result = run(
        """
        import pytest

        @pytest.mark.maskwright_conformance("random", kind="mask-strategy", max_examples=1)
        @pytest.mark.maskwright_conformance("tube", max_examples=1)
        def test_conforms(check):
            check()
        """,
        "-v",
        "-k",
        "frozen",
    )
    result.stdout.fnmatch_lines(
        ["*test_conforms[[]random-component-is-frozen[]]*", "*test_conforms[[]tube-component-is-frozen[]]*"]
    )


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ('"rondom"', "UnknownComponent: There is no component 'rondom'. Did you mean 'random'*"),
        ('"tube", ratio=2.0', "BadParameter: tube: ratio=2.0 must be in [[]0, 1)."),
    ],
)
def test_a_component_that_cannot_be_made_is_one_failure(run, marker, said):
    result = run(
        f"""
        import pytest

        @pytest.mark.maskwright_conformance({marker})
        def test_conforms(check):
            check()

        def test_another():
            pass
        """
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines([f"*{said}"])


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ('@pytest.mark.maskwright_conformance("tube")\n    def test_it(): pass', "*no argument `check`*"),
        ("@pytest.mark.maskwright_conformance()\n    def test_it(check): pass", "*names no component*"),
    ],
    ids=["no argument", "no component"],
)
def test_a_marker_that_is_used_wrongly_says_how(run, test, said):
    result = run(f"    import pytest\n\n    {test}\n")
    assert result.ret != 0
    result.stdout.fnmatch_lines([said])
    result.stdout.fnmatch_lines(["*def test_conforms(check): check()*"])


def test_the_registry_is_fresh_in_each_test(run):
    result = run(
        COMPONENT
        + """
    def test_registers(registry):
        registry.register(Mine)
        assert registry.create("mask-strategy", "mine", least=2).least == 2
        assert "random" in registry.names("mask-strategy")

    def test_does_not_see_it(registry):
        assert "mine" not in registry.names("mask-strategy")
        """
    )
    result.assert_outcomes(passed=2)


def test_the_marker_is_listed(run):
    result = run("", "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.maskwright_conformance(component, kind=None*"])


def test_strict_markers_know_it(run):
    result = run(COMPONENT + "\n    def test_nothing(): pass\n", "--strict-markers")
    result.assert_outcomes(passed=1)


def test_nobody_else_pays_for_it(pytester):
    """With the plugin, and without using it, neither torch nor hypothesis nor a plugin is imported."""
    pytester.makepyfile(
        """
        import sys

        def test_nothing_heavy_is_imported():
            assert "maskwright.testing.pytest_plugin" in sys.modules
            for module in ("torch", "hypothesis", "numpy", "transformers", "maskwright.plugins"):
                assert module not in sys.modules
        """
    )
    # hypothesis has a pytest plugin of its own.
    others = ["-p", "no:hypothesispytest", "-p", "no:_hypothesis_pytestplugin"]
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *others, *WITH_PLUGIN)
    result.assert_outcomes(passed=1)
