"""`check`, `describe`, `doctor` and `verify`: a plugin's proof, its catalogue, its health, its claim."""

from __future__ import annotations

import json
import sys
import tomllib

import attrs
import pytest
from click.testing import CliRunner, Result

from maskwright import setting
from maskwright.cli import cli
from maskwright.cli.describe import plugin_table
from maskwright.jobs import claims
from maskwright.registry import PluginInfo, Registry, built_in_catalogue, describe_component, read_catalogue
from sites import Site, catalogue, plugin_source


def run(*args: str, **env: str) -> Result:
    result = CliRunner().invoke(cli, list(args), env=env, prog_name="maskwright")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


STRATEGY = '''
import attrs, torch
from maskwright import Mask, hookimpl, setting

@attrs.frozen
class Mine:
    """Every second position."""
    kind, name = "mask-strategy", "NAME"
    modalities, needs = frozenset({"image"}), frozenset()
    EXTRA

    def draw(self, layout, *, signals, progress, generator):
        keep = torch.arange(layout.positions).view(layout.grid) % 2 == 0
        return Mask(keep.expand(layout.shape).KEEP)

@hookimpl
def maskwright_components():
    return [Mine]
'''


def strategy(name: str, extra: str = "pass", keep: str = "clone()") -> str:
    return STRATEGY.replace("NAME", name).replace("EXTRA", extra).replace("KEEP", keep)


# -- check ---------------------------------------------------------------------------------------------------


def test_check_prints_a_line_a_rule_and_ends_well():
    result = run("check", "tube", "--rule", "shape-is-the-layouts", "--rule", "component-is-frozen")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "mask-strategy tube",
        "  passed   shape-is-the-layouts",
        "  passed   component-is-frozen",
        "2 passed.",
    ]


def test_check_shows_what_breaks_a_rule_and_how_to_repeat_it(tmp_path):
    path = tmp_path / "bad_mask.py"
    path.write_text(strategy("bad", keep="long()").replace("return Mask(", "return ("))
    result = run("check", str(path), "--rule", "draws-a-boolean-mask")
    assert result.exit_code == 1
    assert "mask-strategy bad" in result.stdout
    assert "  failed   draws-a-boolean-mask\n" in result.stdout
    assert "Repeat it: from maskwright_file_bad_mask_" in result.stdout
    assert "1 failed." in result.stdout


def test_check_prints_an_exemption_with_its_reason_and_one_that_is_not_needed(tmp_path):
    path = tmp_path / "exempt_mask.py"
    path.write_text(
        strategy("exempt-mask", 'exempt = {"component-is-frozen": "it is not"}').replace(
            "attrs.frozen", "attrs.define(slots=False)"
        )
    )
    result = run("check", str(path), "--rule", "component-is-frozen")
    assert result.exit_code == 0
    assert "  exempt   component-is-frozen: it is not\n1 exempt.\n" in result.stdout
    path = tmp_path / "needless_mask.py"
    path.write_text(strategy("needless", 'exempt = {"component-is-frozen": "it is not"}'))
    result = run("check", str(path), "--rule", "component-is-frozen")
    assert result.exit_code == 1
    assert "declared exempt (it is not), but the check passes; remove it" in result.stdout


def test_check_takes_components_plugins_distributions_modules_and_folders(site: Site):
    files = {
        "several/__init__.py": strategy("first-mask"),
        "several/registry.toml": catalogue("slug", "several", "first-mask"),
    }
    site.install("several-dist", files, {"slug": "several"})
    site.install("shy", {"shy/__init__.py": strategy("shy-mask")})
    (site.folder / "loose.py").write_text(strategy("loose-mask"))
    package = site.folder / "unlisted"
    package.mkdir()
    (package / "__init__.py").write_text(strategy("unlisted-mask"))
    for name, shown in (
        ("first-mask", "first-mask"),
        ("several-dist/first-mask", "first-mask"),
        ("slug", "first-mask"),
        ("several-dist", "first-mask"),
        ("shy", "shy-mask"),
        ("loose", "loose-mask"),
        (str(site.folder / "loose.py"), "loose-mask"),
        (str(package), "unlisted-mask"),
    ):
        result = run("check", name, "--rule", "component-is-frozen")
        assert result.exit_code == 0, (name, result.output)
        assert result.stdout.startswith(f"mask-strategy {shown}\n"), name


def test_check_of_several_names_checks_each_once():
    result = run(
        "check", "tube", "baselines", "tube", "--kind", "mask-strategy", "--rule", "component-is-frozen"
    )
    titles = [line for line in result.stdout.splitlines() if line.startswith("mask-strategy ")]
    assert titles[0] == "mask-strategy tube"
    assert len(titles) == len(set(titles)) >= 3


def test_check_all_goes_on_after_a_plugin_that_does_not_import(site: Site):
    site.good("breaks", "broken-mask", top="raise RuntimeError('boom')")
    args = ("check", "--all", "--kind", "mask-strategy", "--rule", "component-is-frozen")
    result = run(*args)
    assert result.exit_code == 1
    assert (
        "mask-strategy broken-mask\n  failed   Plugin 'breaks' of breaks could not be imported"
        in result.stdout
    )
    assert "mask-strategy tube\n  passed   component-is-frozen" in result.stdout
    assert "; 1 could not be imported." in result.stdout
    document = json.loads(run(*args, "--json").stdout)
    assert document["ok"] is False
    assert "boom" in document["broken"][0]


def test_check_as_json():
    result = run("check", "tube", "--json", "--rule", "monotone", "--examples", "2")
    document = json.loads(result.stdout)
    (one,) = document["results"]
    assert document["ok"] is True
    assert (one["component"], one["rule"], one["status"], one["message"]) == (
        "mask-strategy tube",
        "monotone",
        "passed",
        "",
    )


def test_a_named_plugin_that_does_not_import_is_an_error(site: Site):
    site.good("breaks", "broken-mask", top="raise RuntimeError('boom')")
    result = run("check", "broken-mask")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "Error: Plugin 'breaks' of breaks could not be imported: RuntimeError: boom"
    )


# -- describe ------------------------------------------------------------------------------------------------


def test_describe_prints_the_repositorys_own_tables(tmp_path):
    origin = PluginInfo("", "")
    for plugin, components in read_catalogue(built_in_catalogue(), origin):
        printed = tmp_path / f"{plugin.slug}.toml"
        printed.write_text(run("--no-third-party", "describe", plugin.slug).stdout, "utf-8")
        ((same, said),) = read_catalogue(printed, origin)
        assert same == plugin
        assert sorted(said, key=lambda info: info.qualified + info.kind) == sorted(
            components, key=lambda info: info.qualified + info.kind
        )


def test_a_plugin_of_a_catalogue_may_be_named_by_its_module():
    by_module = run("describe", "maskwright.plugins.baselines").stdout
    assert by_module == run("describe", "baselines").stdout
    assert by_module.startswith("[plugins.baselines]\n")


def test_describe_of_a_module_and_a_file(site: Site, tmp_path, monkeypatch):
    (site.folder / "fresh_plugin.py").write_text(
        '"""A fresh plugin.\n\nMore."""\n' + plugin_source("fresh-mask")
    )
    expected = tomllib.loads(
        catalogue("fresh_plugin", "fresh_plugin", "fresh-mask", extra='title = "A fresh plugin"')
    )
    assert tomllib.loads(run("describe", "fresh_plugin").stdout) == expected
    monkeypatch.chdir(site.folder)
    expected["plugins"]["fresh_plugin"]["module"] = "./fresh_plugin.py"
    assert tomllib.loads(run("describe", "./fresh_plugin.py").stdout) == expected


def test_what_describe_prints_is_a_catalogue_that_works(tmp_path):
    (tmp_path / "my_mask.py").write_text(plugin_source("my-mask"))
    printed = run("describe", str(tmp_path / "my_mask.py")).stdout
    path = tmp_path / "registry.toml"
    path.write_text(printed)
    document = json.loads(run("--registry", str(path), "list", "my-mask", "--json").stdout)
    assert document["components"][0]["summary"] == "What my-mask decides"
    assert Registry(files=[path], third_party=False).create("mask-strategy", "my-mask").ratio == 0.5
    assert run("--registry", str(path), "describe", "my_mask").stdout == printed


def test_describe_mends_an_installed_catalogue_that_is_torn(site: Site):
    site.install("torn", {"torn/__init__.py": plugin_source("torn-mask"), "torn/registry.toml": "[oops"})
    assert (
        tomllib.loads(run("describe", "torn").stdout)["plugins"]["torn"]["components"][0]["name"]
        == "torn-mask"
    )


def test_describe_of_a_module_that_breaks_or_registers_nothing(site: Site):
    (site.folder / "boom_module.py").write_text("raise RuntimeError('boom')")
    (site.folder / "nothing_module.py").write_text("")
    assert "could not be imported: RuntimeError: boom" in run("describe", "boom_module").stderr
    assert "has no `maskwright_components` hook" in run("describe", "nothing_module").stderr
    assert run("describe", "nothing_module").exit_code == 1


def test_every_key_survives_the_way_there_and_back(tmp_path):
    @attrs.frozen
    class Odd:
        """Says "quotes", a back\\slash and – more."""

        kind, name = "pruner", "odd"
        modalities = frozenset({"text", "image"})
        needs = frozenset({"batches"})
        provides = frozenset({"heat"})
        backbone, domain = "patch", "discrete"
        budgets = frozenset({"bits", "layers"})
        exempt = {"budget-is-met": "it rounds \x7f up"}

        colour: str = setting("red", 'one "colour"', choices=("red", "green"))

        def prune(self, model, task): ...

    plugin = PluginInfo(
        "odd one", "odd", title="T\t1", paper="arXiv:1", code="https://x", family="f", extras=("a", "b")
    )
    info = describe_component(Odd, plugin)
    path = tmp_path / "registry.toml"
    path.write_text(plugin_table(plugin, [info]), "utf-8")
    assert read_catalogue(path, PluginInfo("", "")) == [(plugin, [info])]


# -- doctor --------------------------------------------------------------------------------------------------


def test_doctor_of_what_works_ends_well():
    result = run("--no-third-party", "doctor")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].startswith("ok       baselines  ")
    assert result.stdout.splitlines()[-1].endswith("plugins work.")


def test_doctor_names_everything_that_is_wrong_and_list_remembers(site: Site):
    site.good("raises", top="raise RuntimeError('boom')")
    site.good("taker", "tube")
    site.good("picky")
    site.install("picky-needs", {}, {}, requires=())
    lie = catalogue("lie", "lie", "promise")
    site.install(
        "lie",
        {"lie/__init__.py": plugin_source("truth"), "lie/registry.toml": lie},
        requires=("pluggy>=999",),
    )
    site.good("slow", top="import time\ntime.sleep(60)")
    result = run("doctor", "--timeout", "3")
    output = result.stdout
    assert result.exit_code == 1
    assert "FAILED   raises  raises 1.0" in output
    assert "RuntimeError: boom (" in output
    assert "HANGS    slow  slow 1.0  3.00 s" in output
    assert "ok       picky  picky 1.0" in output
    assert "DRIFT    lie  lie 1.0" in output
    assert "catalogue: mask-strategy promise is described but not registered" in output
    assert "BROKEN   the mask-strategy 'tube' is claimed by maskwright" in output
    assert "they are reached as tube, taker/tube" in output
    assert "BROKEN   lie requires pluggy>=999; " in output
    assert "1 name in conflict; 1 requirement not met." in output.splitlines()[-1]
    listed = run("list").stdout
    assert "!  raises " in listed
    assert "!  slow " in listed
    assert "!  picky" not in listed
    assert "!  lie" not in listed


def test_doctor_of_one_plugin_looks_at_that_one(site: Site):
    site.good("raises", top="raise RuntimeError('boom')")
    assert run("doctor", "baselines").exit_code == 0
    result = run("doctor", "raises", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 1
    assert document["ok"] is False
    (one,) = document["plugins"]
    assert (one["slug"], one["distribution"], one["version"], one["result"]) == (
        "raises",
        "raises",
        "1.0",
        "failed",
    )
    assert one["problems"][0].startswith("RuntimeError: boom (")
    assert document["conflicts"] == document["requirements"] == []


def test_doctor_json_lists_conflicts_and_requirements(site: Site):
    site.good("dist-a", "same")
    site.good("dist-b", "same")
    site.install(
        "wants", {"wants/__init__.py": plugin_source("wanting")}, requires=("surely-not-installed>2",)
    )
    document = json.loads(run("doctor", "--json").stdout)
    assert document["conflicts"] == [
        {"kind": "mask-strategy", "name": "same", "claims": ["dist-a/same", "dist-b/same"]}
    ]
    assert document["requirements"] == [
        {"distribution": "wants", "requirement": "surely-not-installed>2", "installed": ""}
    ]
    notes = {one["slug"]: one["notes"] for one in document["plugins"]}
    assert "has no registry.toml" in notes["wants"][0]


# -- verify --------------------------------------------------------------------------------------------------

CLAIM = """
from maskwright.jobs.claims import Claim
CLAIM = Claim("A holds", "B", "a > 1", lambda seed: {MEASURE}, lambda all: all[0]["a"] > 1, seeds=(0, 1, 2))
"""


def claimer(site: Site, name: str, measure: str = '{"a": 2.0 + seed}') -> None:
    folder = site.good(name)
    (folder / "claim.py").write_text(CLAIM.replace("{MEASURE}", measure))


def test_verify_prints_the_claim_with_its_numbers(site: Site):
    claimer(site, "claimer")
    result = run("verify", "claimer")
    assert result.exit_code == 0
    assert result.stdout.startswith("claimer: reproduced\n  claim     A holds\n")
    assert "a  3 ± 1" in result.stdout


def test_what_is_not_reproduced_is_a_result_and_no_failure(site: Site):
    claimer(site, "weak", '{"a": 0.5}')
    result = run("verify", "weak")
    assert result.exit_code == 0
    assert result.stdout.startswith("weak: not reproduced at this scale")


def test_verify_goes_on_after_a_claim_that_breaks(site: Site):
    claimer(site, "bad-claim", "1 / 0")
    claimer(site, "good-claim")
    result = run("verify", "bad-claim", "good-claim")
    assert result.exit_code == 1
    assert "bad-claim: could not be measured: ZeroDivisionError: division by zero" in result.stderr
    assert "good-claim: reproduced" in result.stdout
    assert "1 of 2 claims reproduced, 1 could not be measured." in result.stdout
    alone = run("verify", "bad-claim")
    assert alone.exit_code == 1
    assert alone.stderr.startswith("Error: ZeroDivisionError: division by zero")


def test_verify_as_json_and_recorded(site: Site, monkeypatch):
    claimer(site, "claimer")
    wrote = []
    monkeypatch.setattr(claims, "record_papers", lambda registry: wrote.append(registry))
    document = json.loads(run("verify", "claimer", "--json", "--record").stdout)
    assert document["failures"] == {}
    assert document["results"][0]["verdict"] == "reproduced"
    assert json.loads((site.folder / "claimer" / "claim.json").read_text()) == document["results"][0]
    assert len(wrote) == 1
    info = run("info", "claimer").stdout
    assert "reproduced" in info
    assert "3 (2 to 4, 3 seeds)" in info
    assert "claimer.claim" in sys.modules


def test_recording_says_which_readme_it_wrote(site: Site, monkeypatch, tmp_path):
    claimer(site, "claimer")
    monkeypatch.setattr(claims, "built_in_catalogue", lambda: tmp_path / "registry.toml")
    (tmp_path / "README.md").write_text("<!-- papers -->\n<!-- /papers -->")
    monkeypatch.chdir(tmp_path)
    assert "wrote README.md" in run("verify", "claimer", "--record").stderr
    assert "| paper | components |" in (tmp_path / "README.md").read_text()


def test_without_a_name_all_built_in_claims_are_measured(site: Site, monkeypatch):
    claimer(site, "claimer")
    seen = []
    result_of = claims.ClaimResult("x", claims.Claim("A", "B", "C", dict, lambda all: True), ({"a": 1.0},))  # type: ignore[arg-type]
    monkeypatch.setattr(claims, "verify", lambda plugin, progress: seen.append(plugin.slug) or result_of)
    assert run("verify").exit_code == 0
    assert seen
    assert "claimer" not in seen
    seen.clear()
    assert run("verify", "--all").exit_code == 0
    assert "claimer" in seen


def test_nothing_to_verify_is_said(monkeypatch):
    monkeypatch.setattr(claims, "with_claims", lambda *_, **__: [])
    result = run("verify")
    assert result.exit_code == 2
    assert "No plugin that is asked for has a claim." in result.stderr


@pytest.mark.parametrize(("tty", "said"), [(True, "claimer: seed 3 of 3"), (False, "")])
def test_progress_is_for_people_who_wait(site: Site, monkeypatch, tty, said):
    import io

    claimer(site, "claimer")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return tty

    written = Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit):
        cli.main(["verify", "claimer"], prog_name="maskwright")
    assert said in written.getvalue()
    assert bool(said) == bool(written.getvalue())
