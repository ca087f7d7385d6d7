"""The doctor: every plugin in a process of its own."""

from __future__ import annotations

import time

import pytest

from maskwright.diagnosis import Diagnosis, diagnose, explain, unmet_requirements
from maskwright.registry import Registry
from sites import Site, catalogue, plugin_source


def diagnosed(registry: Registry, *slugs: str, timeout: float = 20.0) -> list[Diagnosis]:
    return list(diagnose(registry, [registry.plugin(slug) for slug in slugs], timeout=timeout))


def test_each_plugin_fails_alone_and_in_its_own_way(site: Site):
    site.good("fine", top="import time\ntime.sleep(0.2)")
    site.good("raises", top="raise RuntimeError('boom')")
    site.good("exits", top="import sys\nsys.exit('bye')")
    site.good("crashes", top="import os\nos._exit(7)")
    site.good("noisy", top="import sys\nprint('x' * 100000)\nprint('y', file=sys.stderr)\nsys.stdin.read()")
    site.good("typo", top="def broken(:")
    table = catalogue("gpu", "gpu", "gpu", extra='extras = ["gpu"]')
    site.install("gpu", {"gpu/__init__.py": "import no_such_module_here", "gpu/registry.toml": table})
    lie = catalogue("lie", "lie", "promise")
    site.install("lie", {"lie/__init__.py": plugin_source("truth"), "lie/registry.toml": lie})
    site.install("shy", {"shy/__init__.py": plugin_source("shy")})
    site.install("torn", {"torn/__init__.py": "", "torn/registry.toml": "[oops"})
    slugs = ["fine", "raises", "exits", "crashes", "noisy", "typo", "gpu", "lie", "shy", "torn"]
    fine, raises, exits, crashes, noisy, typo, gpu, lie_, shy, torn = diagnosed(Registry(), *slugs)

    assert (fine.result, fine.problems, fine.notes) == ("ok", (), ())
    assert fine.seconds is not None
    assert fine.seconds >= 0.2
    assert raises.result == "failed"
    assert raises.problems[0].startswith("RuntimeError: boom (")
    assert raises.problems[0].endswith("raises/__init__.py:2)")
    assert exits.problems[0].startswith("SystemExit: bye (")
    assert (crashes.result, crashes.problems) == (
        "crashed",
        ("its import ended the process with exit code 7",),
    )
    assert noisy.ok
    assert typo.problems[0].startswith("SyntaxError: ")
    assert typo.problems[0].endswith("typo/__init__.py:2)")
    assert gpu.ok
    assert gpu.result == "needs-extra"
    assert "needs the extra gpu" in gpu.notes[0]
    assert lie_.result == "ok"
    assert lie_.problems == (
        "catalogue: mask-strategy promise is described but not registered",
        "catalogue: mask-strategy truth is registered but not described",
    )
    assert shy.ok
    assert "`maskwright describe shy` prints one" in shy.notes[0]
    assert torn.result == "unreadable"
    assert "no valid TOML" in torn.problems[0]


def test_a_plugin_that_hangs_is_ended_in_time(site: Site):
    site.good("hangs", top="import time\ntime.sleep(600)")
    diagnosed(Registry(third_party=False), "baselines")  # whatever must be started is started
    begun = time.monotonic()
    (one,) = diagnosed(Registry(), "hangs", timeout=0.5)
    assert one.result == "timeout"
    assert one.problems == ("its import did not end within 0.5 seconds",)
    assert time.monotonic() - begun < 20


def test_the_environment_of_now_is_what_counts(site: Site, monkeypatch):
    site.good("asks", top="import os\nassert os.environ['OF_THIS_TEST'] == 'yes'")
    monkeypatch.setenv("OF_THIS_TEST", "yes")
    assert diagnosed(Registry(), "asks")[0].ok
    monkeypatch.setenv("OF_THIS_TEST", "no")
    assert not diagnosed(Registry(), "asks")[0].ok


def test_an_exception_without_a_place_is_still_a_line():
    assert explain(RuntimeError()) == "RuntimeError"
    assert explain(SyntaxError("bad")) == "SyntaxError: bad"


def test_requirements_that_are_not_met(site: Site):
    site.install(
        "demanding",
        {},
        {},
        requires=(
            "attrs>=1",
            "pluggy>=999",
            "surely-not-installed",
            "nothing-here; extra == 'gpu'",
            "nothing-here; python_version < '3'",
            "what is this?",
        ),
    )
    unmet = unmet_requirements(["demanding", "demanding", "a-distribution-that-is-not-there"])
    assert [one.requirement for one in unmet] == ["pluggy>=999", "surely-not-installed", "what is this?"]
    assert str(unmet[0]).startswith("demanding requires pluggy>=999; ")
    assert str(unmet[0]).endswith(" is installed")
    assert str(unmet[1]) == "demanding requires surely-not-installed; it is not installed"


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_the_order_of_the_plugins(site: Site, processes):
    site.good("slow", top="import time\ntime.sleep(0.3)")
    site.good("fast")
    registry = Registry()
    plugins = [registry.plugin("slow"), registry.plugin("fast")]
    found = list(diagnose(registry, plugins, timeout=20, processes=processes))
    assert [one.plugin.slug for one in found] == ["slow", "fast"]
