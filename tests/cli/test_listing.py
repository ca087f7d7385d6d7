"""`list`, `info` and completion: from the catalogue alone, for people and for programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch
from click.testing import CliRunner, Result

from maskwright.cli import COMMANDS, cli, health
from maskwright.cli.info import bibtex_entry, example
from maskwright.registry import PluginInfo, Registry
from sites import Site, catalogue


def run(*args: str, **env: str) -> Result:
    """As typed; errors of the program itself are raised here."""
    result = CliRunner().invoke(cli, list(args), env=env, prog_name="maskwright")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def registry_file(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, "utf-8")
    return str(path)


# -- list ----------------------------------------------------------------------------------------------------


def test_list_groups_by_kind_and_sorts():
    lines = run("--no-third-party", "list", "--plugin", "baselines").stdout.splitlines()
    headings = [line.split(" (")[0] for line in lines if line and not line.startswith(" ")]
    assert headings[:2] == ["Mask strategies", "Objectives"]
    names = [line.split()[0] for line in lines if line.startswith(" ")]
    first = names[: names.index("mae")]
    assert {"block", "random", "tube"} <= set(first)
    strategies = [name for name in first if name in ("block", "random", "tube")]
    assert strategies == sorted(strategies)


@pytest.mark.parametrize(
    ("args", "has", "lacks"),
    [
        (["*and*"], ["random"], ["tube"]),
        (["ube"], ["tube"], ["random"]),
        (["--kind", "objective"], ["mae"], ["random"]),
        (["--modality", "motion"], ["random", "tube"], ["block"]),
        (["--needs", "pixels"], ["mae"], ["random"]),
        (["--plugin", "baselines", "tube"], ["tube"], ["mae"]),
        (["maskwright/tube"], ["tube"], ["mae"]),
    ],
)
def test_list_takes_patterns_and_filters(args, has, lacks):
    document = json.loads(run("--no-third-party", "list", "--json", *args).stdout)
    names = {one["name"] for one in document["components"]}
    assert set(has) <= names
    assert names.isdisjoint(lacks)


def test_list_of_what_a_plugin_provides(tmp_path):
    text = catalogue("one", "./a.py", "teller", kind="objective") + 'provides = ["echo"]\n'
    path = registry_file(tmp_path, text)
    document = json.loads(run("--registry", path, "list", "--provides", "echo", "--json").stdout)
    assert [one["name"] for one in document["components"]] == ["teller"]


def test_nothing_that_matches_is_said_and_no_failure():
    result = run("list", "unheard-of")
    assert result.exit_code == 0
    assert "No component matches" in result.stderr


def test_third_parties_show_distribution_and_version_and_built_in_ones_do_not(site: Site):
    site.good("my-dist", "third-mask", version="4.5")
    lines = run("list").stdout.splitlines()
    (third,) = [line for line in lines if "third-mask" in line]
    assert third.endswith("my-dist 4.5")
    (own,) = [line for line in lines if line.split()[:1] == ["tube"]]
    assert "maskwright" not in own
    assert "1 of others" in lines[-1]


def test_a_conflicting_name_is_listed_as_it_must_be_typed(site: Site):
    site.good("dist-a", "same")
    site.good("dist-b", "same")
    site.good("taker", "tube")
    output = run("list").stdout
    assert " dist-a/same " in output
    assert " dist-b/same " in output
    assert " taker/tube " in output
    assert " tube " in output


def test_unreadable_and_undescribed_plugins_are_set_apart(site: Site):
    site.install("torn", {"torn/__init__.py": "", "torn/registry.toml": "[oops"})
    site.install("shy", {"shy/__init__.py": ""})
    output = run("list").stdout
    block = output.split("Plugins with a note")[1]
    assert "!  torn  torn 1.0" in block
    assert "no valid TOML" in block
    assert "not described: `maskwright describe shy`" in block
    assert "1 plugin cannot be used (!)" in output
    assert "Plugins with a note" not in run("list", "tube").stdout


def test_list_is_as_wide_as_the_terminal_and_whole_when_piped():
    narrow = run("list", COLUMNS="60").stdout.splitlines()
    assert max(map(len, narrow)) <= 60
    assert any(line.endswith("…") for line in narrow)
    piped = run("list").stdout
    assert "…" not in piped
    assert max(map(len, piped.splitlines())) > 80


def test_list_long_says_the_plugin_and_the_parameters():
    output = run("list", "--long", "tube").stdout
    assert "ratio=0.9" in output
    assert "baselines (maskwright.plugins.baselines), built-in, maskwright" in output
    assert max(map(len, run("list", "--long", "block", COLUMNS="70").stdout.splitlines())) <= 70


def test_the_json_schema_is_what_it_says(site: Site):
    site.good("my-dist", "third-mask", version="4.5")
    document = json.loads(run("list", "--json").stdout)
    assert set(document) == {"schema", "maskwright", "components", "plugins"}
    assert document["schema"] == 1
    component = next(one for one in document["components"] if one["name"] == "third-mask")
    assert component == {
        "kind": "mask-strategy",
        "name": "third-mask",
        "address": "third-mask",
        "qualified": "my-dist/third-mask",
        "summary": "What third-mask decides",
        "modalities": ["image"],
        "needs": [],
        "provides": [],
        "budgets": [],
        "counts": "",
        "exact_with": {},
        "disjoint_rows": 1,
        "backbone": "",
        "domain": "",
        "parameters": [
            {
                "name": "ratio",
                "type": "float",
                "default": "0.5",
                "range": "in [0, 1)",
                "help": "share that is hidden",
            }
        ],
        "exempt": {},
        "plugin": "my-dist",
        "module": "my_dist",
        "distribution": "my-dist",
        "version": "4.5",
        "source": "third-party",
        "problem": "",
    }
    plugin = next(one for one in document["plugins"] if one["slug"] == "my-dist")
    assert plugin == {
        "slug": "my-dist",
        "module": "my_dist",
        "title": "",
        "paper": "",
        "code": "",
        "family": "",
        "extras": [],
        "distribution": "my-dist",
        "version": "4.5",
        "source": "third-party",
        "described": True,
        "problem": "",
        "components": 1,
    }


def test_what_doctor_remembered_marks_a_plugin_until_it_changes(site: Site):
    folder = site.good("breaks", top="raise RuntimeError('boom')")
    plugin = Registry().plugin("breaks")
    health.remember({plugin: "RuntimeError: boom"})
    assert "!  breaks" in run("list").stdout
    assert "broken      RuntimeError: boom" in run("info", "breaks").stdout
    document = json.loads(run("list", "breaks", "--json").stdout)
    assert document["components"][0]["problem"] == "RuntimeError: boom"
    source = folder / "__init__.py"
    source.write_text("# mended\n")
    os.utime(source, ns=(1, 1))
    assert "!" not in run("list").stdout.replace("(!)", "")


def test_a_memory_that_cannot_be_read_or_written_is_nothing(tmp_path, monkeypatch):
    plugin = PluginInfo("x", "x")
    monkeypatch.setenv("MASKWRIGHT_CACHE", str(tmp_path / "cache"))
    health.remember({plugin: "broken"})
    assert health.problems([plugin]) == {plugin.key: "broken"}
    health.remember({plugin: ""})
    assert health.problems([plugin]) == {}
    for damaged in ("{", "[]", '{"a": 1}'):
        health.cache_file().write_text(damaged)
        assert health.problems([plugin]) == {}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MASKWRIGHT_CACHE", str(tmp_path / "file"))
    health.remember({plugin: "broken"})
    assert health.problems([plugin]) == {}


@pytest.mark.parametrize(
    ("platform", "variable", "ending"),
    [
        ("linux", "XDG_CACHE_HOME", "maskwright/health.json"),
        ("win32", "LOCALAPPDATA", "maskwright/health.json"),
        ("darwin", "HOME", "Library/Caches/maskwright/health.json"),
    ],
)
def test_where_the_memory_is(monkeypatch, tmp_path, platform, variable, ending):
    monkeypatch.delenv("MASKWRIGHT_CACHE")
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(sys, "platform", platform)
    assert health.cache_file() == tmp_path / ending


# -- info ----------------------------------------------------------------------------------------------------

OBJECTIVE = """
[plugins.duo]
module = "./duo.py"
title = "A paper of two"
paper = "arXiv:2101.00001"
code = "https://example.org/duo"
extras = ["gpu"]
[[plugins.duo.components]]
kind = "mask-strategy"
name = "listener"
modalities = ["image"]
summary = "Hides what is loud"
needs = ["echo"]
exempt = { "rows-are-independent" = "it balances over the batch" }
parameters = [{ name = "size", type = "int", help = "how many" }]
[[plugins.duo.components]]
kind = "objective"
name = "speaker"
modalities = ["image"]
summary = "Learns what is loud"
needs = ["pixels"]
provides = ["echo"]
backbone = "patch"
[[plugins.duo.components]]
kind = "pruner"
name = "twin"
modalities = ["text"]
summary = "Cuts"
budgets = ["params"]
[[plugins.duo.components]]
kind = "sampler"
name = "twin"
modalities = ["text"]
summary = "Fills"
domain = "discrete"
"""


@pytest.fixture
def duo(tmp_path) -> str:
    (tmp_path / "claim.json").write_text(
        json.dumps(
            {
                "slug": "duo",
                "verdict": "reproduced",
                "statement": "It is louder.",
                "baseline": "silence",
                "measurements": [{"volume": 1.0}, {"volume": 3.0}],
            }
        )
    )
    return registry_file(tmp_path, OBJECTIVE)


def test_info_says_all_that_the_catalogue_knows(duo):
    output = run("--registry", duo, "info", "listener").stdout
    for said in (
        "listener  mask-strategy",
        "Hides what is loud.",
        "A paper of two (arXiv:2101.00001)",
        "https://example.org/duo",
        "echo: provided by speaker",
        "works with  speaker",
        "required",
        "how many",
        "rows-are-independent  it balances over the batch",
        "reproduced",
        "It is louder.",
        "2 (1 to 3, 2 seeds)",
        "maskwright pretrain --strategy listener --objective speaker",
        'strategy = maskwright.create("mask-strategy", "listener", size=...)',
        '"echo": torch.rand(4, 196)',
        "extras",
    ):
        assert said in output, said


def test_info_of_an_objective_names_its_strategies(duo):
    output = run("info", "speaker", "--registry", duo).stdout
    assert "provides    echo" in output
    assert "works with  " in output
    assert "listener" in output.split("works with")[1].splitlines()[0]
    assert 'create("mask-strategy", "listener")' in output


def test_info_of_a_name_of_two_kinds_shows_both_or_the_one_asked_for(duo):
    both = run("info", "twin", "--registry", duo).stdout
    assert "twin  pruner" in both
    assert "twin  sampler" in both
    assert "maskwright prune --pruner twin --params 0.7" in both
    assert "maskwright sample --sampler twin" in both
    one = run("info", "twin", "--kind", "sampler", "--registry", duo).stdout
    assert "pruner" not in one
    documents = json.loads(run("info", "twin", "--json", "--registry", duo).stdout)
    assert [document["kind"] for document in documents] == ["pruner", "sampler"]


def test_info_as_json(duo):
    document = json.loads(run("info", "listener", "--json", "--registry", duo).stdout)
    assert document["providers"] == {"echo": ["speaker"]}
    assert document["partners"] == ["speaker"]
    assert document["claim"]["verdict"] == "reproduced"
    assert document["exempt"] == {"rows-are-independent": "it balances over the batch"}
    assert document["parameters"][0]["default"] == ""
    assert document["bibtex"].startswith("@misc{duo,")
    assert json.loads(run("info", "tube", "--json").stdout)["claim"] is None


def test_a_signal_that_nobody_provides_is_said(tmp_path):
    path = registry_file(tmp_path, OBJECTIVE.replace('provides = ["echo"]\n', ""))
    output = run("info", "listener", "--registry", path).stdout
    assert "echo: provided by no objective registered here" in output
    assert "maskwright show listener" in output


PAIRS = """
[plugins.two]
module = "./two.py"
[[plugins.two.components]]
kind = "mask-strategy"
name = "uneven"
modalities = ["sound"]
counts = "bounded"
exact_with = { exact = "True" }
[[plugins.two.components]]
kind = "mask-strategy"
name = "never-even"
modalities = ["sound"]
counts = "bounded"
[[plugins.two.components]]
kind = "objective"
name = "strict"
modalities = ["sound"]
counts = "exact"
[[plugins.two.components]]
kind = "objective"
name = "tolerant"
modalities = ["sound"]
"""


def test_info_suggests_only_pairs_that_a_run_takes(tmp_path):
    """Unequal counts go with objectives that take them; with the parameter that makes them equal, with all."""
    path = registry_file(tmp_path, PAIRS)

    def said(name):
        document = json.loads(run("info", name, "--json", "--registry", path).stdout)
        return document["partners"], document["partners_with"]

    assert said("uneven") == (["tolerant"], {"exact=True": ["strict"]})
    assert said("never-even") == (["tolerant"], {})
    assert said("strict") == ([], {"exact=True": ["uneven"]})
    assert said("tolerant") == (["never-even", "uneven"], {})
    page = run("info", "uneven", "--registry", path).stdout
    assert "works with       tolerant" in page
    assert "with exact=True  strict" in page
    assert "--strategy uneven --objective tolerant" in page


def test_bibtex(duo):
    output = run("info", "speaker", "--bibtex", "--registry", duo).stdout
    assert output.splitlines() == [
        "@misc{duo,",
        "  title = {{A paper of two}},",
        "  year = {2021},",
        "  eprint = {2101.00001},",
        "  archivePrefix = {arXiv},",
        "  url = {https://arxiv.org/abs/2101.00001}",
        "}",
    ]


@pytest.mark.parametrize(
    ("paper", "line"),
    [
        ("doi:10.1/x", "  doi = {10.1/x},"),
        ("https://openreview.net/x", "  url = {https://openreview.net/x}"),
        ("NeurIPS 2015", "  note = {NeurIPS 2015}"),
        ("", "% s: the catalogue names no paper."),
    ],
)
def test_bibtex_of_papers_elsewhere(paper, line):
    assert line in bibtex_entry(PluginInfo("s", "s", title="T", paper=paper)).splitlines()


def test_the_python_of_info_runs():
    registry = Registry(third_party=False)
    names: dict[str, object] = {}
    exec(example(registry, registry.info("random", "mask-strategy")), names)
    assert names["mask"].shape == (4, 14, 14)  # type: ignore[attr-defined]
    tube = registry.info("tube")
    exec(example(registry, tube), names)
    assert names["mask"].shape == (4, 8, 14, 14)  # type: ignore[attr-defined]


def test_the_python_of_info_runs_for_an_objective():
    from maskwright.backbones.defaults import vision_transformer

    registry = Registry(third_party=False)
    vit = vision_transformer(image_size=16, patch_size=4, width=16, depth=1, heads=1)
    names: dict[str, object] = {"backbone": vit, "images": torch.rand(2, 3, 16, 16)}
    exec(example(registry, registry.info("mae")), names)
    assert any(one.grad is not None for one in vit.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budgets": frozenset({"pattern", "bits"})}, 'pattern="2:4"'),
        ({"budgets": frozenset()}, "sparsity=0.5"),
        ({"kind": "sampler"}, "maskwright.SampleRequest(tokens, mask_token"),
        ({"kind": "objective", "needs": frozenset({"tokens"})}, 'model(tokens=tokens)["loss"]'),
        (
            {"kind": "mask-strategy", "modalities": frozenset({"graph"}), "needs": frozenset({"tokens"})},
            "torch.randint",
        ),
    ],
)
def test_examples_fit_the_component(change, said):
    registry = Registry(third_party=False)
    info = attrs.evolve(registry.info("mae"), kind="pruner")
    text = example(registry, attrs.evolve(info, **change))
    assert said in text
    assert len(text.splitlines()) == 5
    compile(text, "example", "exec")


# -- no code of a plugin -------------------------------------------------------------------------------------


def test_list_info_and_completion_run_no_code_of_a_plugin(site: Site, tmp_path):
    trace = tmp_path / "ran"
    site.good("loud", top=f"open({str(trace)!r}, 'w').close()")
    assert "loud" in run("list").stdout
    assert "loud" in run("list", "--long", "--plugin", "loud").stdout
    assert "loud" in run("info", "loud").stdout
    assert "loud" in complete("bash", "info lo")
    assert "loud" in complete("fish", "pretrain --strategy lo")
    assert not trace.exists()


def test_list_info_help_and_completion_import_neither_torch_nor_a_plugin(tmp_path):
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from maskwright.cli import cli\n"
        "runner = CliRunner()\n"
        "for args in (['list'], ['list', '--json'], ['list', '--long'], ['info', 'random', '--kind', 'mask-strategy'],\n"
        "             ['--help'], ['pretrain', '--help'], ['show', '--help'], ['doctor', '--help'], ['--version']):\n"
        "    result = runner.invoke(cli, args)\n"
        "    assert result.exit_code == 0, (args, result.output)\n"
        "env = {'_MASKWRIGHT_COMPLETE': 'bash_complete', 'COMP_WORDS': 'maskwright info ra', 'COMP_CWORD': '2'}\n"
        "assert 'random' in runner.invoke(cli, [], env=env, prog_name='maskwright').output\n"
        "heavy = ('torch', 'rich', 'numpy', 'transformers', 'matplotlib', 'hypothesis')\n"
        "print([m for m in sys.modules if m in heavy or m.startswith('maskwright.plugins.')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# -- completion ----------------------------------------------------------------------------------------------


def complete(shell: str, typed: str, **env: str) -> str:
    words = f"maskwright {typed}"
    given = {"_MASKWRIGHT_COMPLETE": f"{shell}_complete", "COMP_WORDS": words, **env}
    if shell == "fish":
        given["COMP_CWORD"] = typed.rpartition(" ")[2]
    else:
        given["COMP_CWORD"] = str(len(words.split(" ")) - 1)
    return run(**given).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("typed", "has", "lacks"),
    [
        ("ins", "install", "info"),
        ("info tu", "tube", "random"),
        ("show b", "block", "mae"),
        ("show m", "", "mae"),
        ("pretrain --objective m", "mae", "random"),
        ("list --plugin base", "baselines", "random"),
        ("list --modality vi", "video", "image"),
        ("check base", "baselines", "tube"),
        ("doctor base", "baselines", "tube"),
        ("list --kind ob", "objective", "pruner"),
    ],
)
def test_completion_knows_commands_components_plugins_and_words(shell, typed, has, lacks):
    output = complete(shell, typed)
    assert has in output
    found = (
        output.split("\n")[1::3]
        if shell == "zsh"
        else [line.partition("\t")[0] for line in output.split("\n")]
    )
    assert lacks not in [name.rpartition(",")[2] for name in found]


def test_completion_heeds_the_global_options_and_stays_silent_about_mistakes(tmp_path):
    path = registry_file(tmp_path, catalogue("mine", "./a.py", "tulip"))
    assert "tulip" in complete("bash", f"--registry {path} info tu")
    broken = tmp_path / "broken.toml"
    broken.write_text("[oops")
    assert complete("bash", f"--registry {broken} info tu").strip() == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(shell):
    output = run("completion", shell).stdout
    assert f"_MASKWRIGHT_COMPLETE={shell}_complete" in output
    assert "maskwright" in output


def test_another_shell_is_refused():
    result = run("completion", "tcsh")
    assert result.exit_code == 2
    assert "'tcsh' is not one of" in result.stderr


def test_the_table_of_commands_names_commands_that_exist():
    context = cli.make_context("maskwright", ["list"])
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert "Example" in (command.epilog or ""), name
        assert command.help, name
