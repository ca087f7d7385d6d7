"""The registry: what it reads, what it resolves, what it loads, and what it never imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import attrs
import pytest

import maskwright
from maskwright import registry as module
from maskwright import setting
from maskwright.errors import (
    BadParameter,
    CountsMismatch,
    MissingColumn,
    MissingSignal,
    NameConflict,
    OverlappingMasks,
    PluginLoadError,
    RegistryFileError,
    UnknownComponent,
)
from maskwright.registry import (
    ComponentInfo,
    PluginInfo,
    Registry,
    check_fit,
    describe_component,
    drift,
    plugin_folder,
    recorded_claim,
)
from sites import Site, catalogue, plugin_source


def built_in() -> Registry:
    return Registry(third_party=False)


def user_file(folder: Path, text: str, name: str = "registry.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def of_file(path: Path) -> Registry:
    return Registry(files=[path], third_party=False, built_in=False)


# -- looking up ----------------------------------------------------------------------------------------------


def test_names_are_sorted_per_kind_and_take_wildcards():
    registry = built_in()
    strategies = registry.names("mask-strategy")
    assert strategies == sorted(strategies)
    assert {"random", "block", "tube"} <= set(strategies)
    assert "mae" not in strategies
    assert registry.names("mask-strategy", "*ub*") == ["tube"]
    assert "mae" in registry.names()


def test_find_takes_every_word_and_they_add_up(tmp_path):
    text = catalogue("one", "./a.py", "plain") + (
        '[[plugins.one.components]]\nkind = "objective"\nname = "teller"\nmodalities = ["text", "image"]\n'
        'needs = ["tokens"]\nprovides = ["attention"]\n'
    )
    registry = of_file(user_file(tmp_path, text))

    def names(**words: str) -> list[str]:
        return [info.name for info in registry.find(**words)]

    assert names() == ["plain", "teller"]
    assert names(kind="objective") == ["teller"]
    assert names(modality="text") == ["teller"]
    assert names(needs="tokens") == ["teller"]
    assert names(provides="attention") == ["teller"]
    assert names(provides="tokens") == []
    assert names(plugin="one") == ["plain", "teller"]
    assert names(plugin="other") == []
    assert names(name="pl*", modality="image") == ["plain"]
    assert names(name="pl*", modality="text") == []


def test_the_catalogue_says_what_the_class_will_say():
    info = built_in().info("random", "mask-strategy")
    assert info.summary.startswith("Positions hidden uniformly at random")
    assert info.qualified == "maskwright/random"
    assert info.plugin.origin == f"maskwright {maskwright.__version__}"
    ratio = info.parameters[0]
    assert (ratio.name, ratio.default, ratio.range) == ("ratio", "0.75", "in [0, 1)")


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("mask-strategy", "randm", "There is no mask-strategy 'randm'. Did you mean 'random'?"),
        ("objective", "tube", "'tube' is no objective; it is a mask-strategy."),
        ("strategy", "tube", "There is no kind 'strategy'. Did you mean 'mask-strategy'?"),
        ("mask-strategy", "maskwright/rndom", "Did you mean 'maskwright/random'?"),
        ("objective", "maskwright/tube", "'maskwright/tube' is no objective; it is a mask-strategy."),
    ],
)
def test_an_unknown_name_is_told_the_nearest(kind, name, said):
    with pytest.raises(UnknownComponent, match=said.replace("?", r"\?")) as caught:
        built_in().create(kind, name)
    assert caught.value.exit_code == 2


def test_an_empty_registry_says_so():
    registry = Registry(built_in=False, third_party=False)
    with pytest.raises(UnknownComponent, match="no plugin offers any"):
        registry.info("random")


def test_a_name_of_two_kinds_asks_which(tmp_path):
    text = catalogue("a", "./a.py", "same") + catalogue("b", "./b.py", "same", kind="objective")
    registry = of_file(user_file(tmp_path, text))
    with pytest.raises(NameConflict, match="'same' is a mask-strategy and an objective"):
        registry.info("same")
    assert registry.info("same", "objective").plugin.slug == "b"


def test_a_plugin_is_found_by_slug_distribution_and_both(site: Site):
    site.good("two-words", "first-thing")
    registry = Registry()
    one = registry.plugin("two-words")
    assert one.distribution == "two-words"
    assert registry.plugin("two_words") == registry.plugin("two-words/two-words") == one
    assert registry.plugin("baselines").source == "built-in"
    with pytest.raises(UnknownComponent, match=r"no plugin 'two-word'. Did you mean 'two-words'"):
        registry.plugin("two-word")


def test_a_distribution_means_its_plugin(site: Site):
    files = {
        "dist_of/__init__.py": plugin_source("x"),
        "dist_of/registry.toml": catalogue("slug", "dist_of", "x"),
    }
    site.install("dist-of", files)
    assert Registry().plugin("dist-of").slug == "slug"


# -- creating ------------------------------------------------------------------------------------------------


def test_create_gives_the_component_with_its_parameters():
    registry = built_in()
    assert registry.create("mask-strategy", "random", ratio=0.5).ratio == 0.5
    assert registry.create("mask-strategy", "maskwright/random") == registry.create("mask-strategy", "random")


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"ratoi": 0.5}, "random has no parameter 'ratoi'. Did you mean 'ratio'? Legal: ratio, truncated."),
        ({"ratio": 1.0}, "random: ratio=1.0 must be in [0, 1)."),
        ({"ratio": "much"}, "random: ratio='much' must be a number in [0, 1)."),
    ],
)
def test_a_wrong_parameter_is_told_the_legal_ones(params, said):
    with pytest.raises(BadParameter) as caught:
        built_in().create("mask-strategy", "random", **params)
    assert str(caught.value) == said


def test_a_missing_parameter_is_named(tmp_path):
    source = plugin_source("needy", body='size: int = setting(help="needed", ge=1)').replace(
        'ratio: float = setting(0.5, "share that is hidden", ge=0, lt=1)', ""
    )
    (tmp_path / "needy.py").write_text(source)
    registry = of_file(user_file(tmp_path, catalogue("needy", "./needy.py", "needy")))
    with pytest.raises(BadParameter, match="needy needs the parameter 'size'"):
        registry.create("mask-strategy", "needy")
    assert registry.create("mask-strategy", "needy", size=3).size == 3


@pytest.mark.parametrize("raised", ["ValueError", "TypeError"])
def test_a_value_that_the_class_itself_refuses_is_a_bad_parameter(tmp_path, raised):
    body = f"def __attrs_post_init__(self):\n        raise {raised}('ratio is odd')"
    (tmp_path / "fussy.py").write_text(plugin_source("fussy", body=body))
    registry = of_file(user_file(tmp_path, catalogue("fussy", "./fussy.py", "fussy")))
    with pytest.raises(BadParameter, match="fussy: ratio is odd") as caught:
        registry.create("mask-strategy", "fussy", ratio=0.3)
    assert type(caught.value.__cause__).__name__ == raised


def test_a_class_that_is_no_attrs_class_has_no_parameters(tmp_path):
    source = (
        plugin_source("plain").replace("@attrs.frozen", "").replace("ratio: float = setting", "_r = setting")
    )
    (tmp_path / "plain.py").write_text(source)
    registry = of_file(user_file(tmp_path, catalogue("plain", "./plain.py", "plain")))
    with pytest.raises(BadParameter, match=r"plain has no parameter 'ratio'. Legal: none."):
        registry.create("mask-strategy", "plain", ratio=0.5)


@attrs.frozen
class Around:
    kind, name = "mask-strategy", "around"
    inner: object = module.component("mask-strategy", "random", "what is wrapped")


def test_a_component_inside_is_given_by_name_by_table_or_made():
    random = maskwright.create("mask-strategy", "random", ratio=0.25)
    assert Around().inner == maskwright.create("mask-strategy", "random")
    assert Around("block").inner == maskwright.create("mask-strategy", "block")
    assert Around({"name": "random", "ratio": 0.25}).inner == random
    assert Around(random).inner is random
    described = describe_component(Around, PluginInfo("a", "a")).parameters
    assert [(one.name, one.default, one.range) for one in described] == [
        ("inner", "'random'", "name of a mask-strategy, or a table with a name")
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (7, "7 is no mask-strategy: give its name"),
        ({"ratio": 0.5}, "is no mask-strategy"),
        (maskwright.create("objective", "simmim"), "is no mask-strategy"),
        (type(maskwright.create("mask-strategy", "random")), "is no mask-strategy"),
        ({"name": "random", "ratios": 0.5}, "Did you mean 'ratio'"),
    ],
)
def test_what_is_no_component_inside_is_refused(given, said):
    with pytest.raises(BadParameter, match=said):
        Around(given)


def test_an_unknown_component_inside_is_told_the_nearest():
    with pytest.raises(UnknownComponent, match="'random'"):
        Around("randon")


def test_creating_loads_one_plugin_and_registers_it_with_pluggy(site: Site):
    site.good("quiet-one")
    site.good("never-asked", top="raise RuntimeError('imported')")
    registry = Registry()
    registry.create("mask-strategy", "quiet-one")
    assert registry.host.is_registered(sys.modules["quiet_one"])
    assert "never_asked" not in sys.modules


def test_a_plugin_is_loaded_once(site: Site):
    site.good(
        "counted", top="import builtins", hook="builtins.hook_calls = getattr(builtins, 'hook_calls', 0) + 1"
    )
    registry = Registry()
    import builtins

    try:
        first = registry.load(registry.plugin("counted"))
        assert registry.load(registry.plugin("counted")) == first
        assert registry.component_class("mask-strategy", "counted") is first[0]
        assert builtins.hook_calls == 1  # type: ignore[attr-defined]
    finally:
        del builtins.hook_calls  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_type_checker_knows_what_create_returns(tmp_path):
    snippet = tmp_path / "typed.py"
    snippet.write_text(
        "import maskwright\n"
        "from maskwright.registry import Registry\n"
        "a: maskwright.MaskStrategy = maskwright.create('mask-strategy', 'random')\n"
        "b: maskwright.Objective = Registry().create('objective', 'mae')\n"
        "c: maskwright.Sampler = Registry().create('pruner', 'magnitude')\n"
    )
    checkout = Path(module.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", str(snippet)],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    lines = [line for line in run.stdout.splitlines() if "typed.py" in line and "error" in line]
    assert len(lines) == 1, run.stdout
    assert ":5:" in lines[0]
    assert '"Pruner"' in lines[0]


# -- users' files --------------------------------------------------------------------------------------------


def test_a_users_file_names_modules_by_path(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_mask.py").write_text(plugin_source("my-mask"))
    package = tmp_path / "mine" / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import *\nfrom .inner import maskwright_components\n")
    (package / "inner.py").write_text(plugin_source("packed"))
    text = catalogue("a", "./my_mask.py", "my-mask") + catalogue("b", "./pack", "packed")
    user_file(tmp_path / "mine", text)
    monkeypatch.chdir(tmp_path)
    registry = Registry.from_files("mine/registry.toml")
    monkeypatch.chdir("/")  # what a relative path means was decided when it was given
    assert registry.create("mask-strategy", "my-mask").name == "my-mask"
    assert registry.create("mask-strategy", "packed").name == "packed"
    assert registry.info("my-mask").qualified == "a/my-mask"
    assert registry.create("mask-strategy", "a/my-mask").name == "my-mask"
    assert plugin_folder(registry.plugin("b")) == package
    assert plugin_folder(registry.plugin("a")) == tmp_path / "mine"


def test_two_registries_share_the_module_of_one_file(tmp_path):
    (tmp_path / "one.py").write_text(plugin_source("one"))
    path = user_file(tmp_path, catalogue("one", "./one.py", "one"))
    first, second = of_file(path), of_file(path)
    assert first.component_class("mask-strategy", "one") is second.component_class("mask-strategy", "one")


def test_nothing_is_read_from_the_working_directory(tmp_path, monkeypatch):
    user_file(tmp_path, catalogue("sneaky", "./x.py", "sneaky"))
    monkeypatch.chdir(tmp_path)
    assert "sneaky" not in Registry.from_environment(third_party=False).names()


def test_the_environment_names_files_and_switches_plugins_off(tmp_path, monkeypatch):
    one = user_file(tmp_path / "a", catalogue("one", "./x.py", "one"))
    two = user_file(tmp_path / "b", catalogue("two", "./x.py", "two"))
    monkeypatch.setenv("MASKWRIGHT_REGISTRY", f"{one}{os.pathsep}{two}{os.pathsep}")
    monkeypatch.setenv("MASKWRIGHT_DISABLE_PLUGINS", "baselines, TWO,")
    registry = Registry.from_environment(third_party=False)
    assert "one" in registry.names()
    assert {"two", "random"}.isdisjoint(registry.names())
    with pytest.raises(UnknownComponent, match="belongs to the plugin 'baselines', which is switched off"):
        registry.create("mask-strategy", "tube")


COMPONENT = '[plugins.a]\nmodule = "x"\n[[plugins.a.components]]\nkind = "pruner"\nname = "thin"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[plugins.a\n", "is no valid TOML"),
        ("[plugin.a]\n", "the top level: unknown key 'plugin'. Did you mean 'plugins'?"),
        ("plugins = 3\n", r"\[plugins\] must be a table, not 3"),
        ("[plugins]\na = 3\n", r"\[plugins.a\] must be a table, not 3"),
        ('[plugins.a]\nmodul = "x"\n', r"\[plugins.a\]: unknown key 'modul'. Did you mean 'module'"),
        ('[plugins.a]\ntitle = "x"\n', r"\[plugins.a\]: `module` is missing"),
        ("[plugins.a]\nmodule = 3\n", "`module` is missing"),
        ('[plugins.a]\nmodule = ""\n', "`module` is missing"),
        ('[plugins.a]\nmodule = "x"\ntitle = 3\n', "title must be a text, not 3"),
        ('[plugins.a]\nmodule = "x"\nextras = "gpu"\n', "extras must be a list of texts, not 'gpu'"),
        ('[plugins.a]\nmodule = "x"\ncomponents = 3\n', "must be an array of tables"),
        ('[plugins.a]\nmodule = "x"\ncomponents = [3]\n', "component 1 must be a table, not 3"),
        (COMPONENT.replace("pruner", "puner"), "kind 'puner' must be one of mask-strategy, objective"),
        (COMPONENT.replace("thin", "Thin One"), "name 'Thin One' must be kebab-case"),
        (COMPONENT.replace('"thin"', "3"), "name 3 must be kebab-case"),
        (COMPONENT + 'budget = ["bits"]\n', "unknown key 'budget'. Did you mean 'budgets'"),
        (COMPONENT + "needs = [1]\n", r"needs must be a list of texts, not \[1\]"),
        (COMPONENT + "parameters = 3\n", "parameters must be a list of tables, not 3"),
        (COMPONENT + "parameters = [3]\n", "parameters must be a table, not 3"),
        (
            COMPONENT + 'parameters = [{ name = "a", defalt = "1" }]\n',
            "unknown key 'defalt'. Did you mean 'default'",
        ),
        (COMPONENT + 'parameters = [{ name = "a", default = 1 }]\n', "default must be a text, not 1"),
        (COMPONENT + 'parameters = [{ help = "a" }]\n', "each needs a `name`"),
        (COMPONENT + "disjoint_rows = 0\n", "disjoint_rows 0 must be a whole number of at least 1"),
        (COMPONENT + 'exempt = "all"\n', "exempt must be a table, not 'all'"),
        (COMPONENT + "exempt = { monotone = 3 }\n", "monotone must be a text, not 3"),
        (COMPONENT + '[[plugins.a.components]]\nkind = "pruner"\nname = "thin"\n', "'thin' is listed twice"),
        (COMPONENT + COMPONENT.replace("plugins.a", "plugins.b"), r"listed twice, first in \[plugins.a\]"),
    ],
)
def test_a_malformed_users_file_is_one_clear_error(tmp_path, text, said):
    path = user_file(tmp_path, text)
    with pytest.raises(RegistryFileError, match=said) as caught:
        of_file(path).names()
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(RegistryFileError, match=r"does not exist; give the path of a registry.toml"):
        of_file(tmp_path / "none.toml").names()
    with pytest.raises(RegistryFileError, match="cannot be read: Is a directory"):
        of_file(tmp_path).names()
    (tmp_path / "latin.toml").write_bytes(b'[plugins.a]\nmodule = "caf\xe9"\n')
    with pytest.raises(RegistryFileError, match="no valid TOML"):
        of_file(tmp_path / "latin.toml").names()


def test_after_an_error_a_mended_file_is_read_once(tmp_path):
    path = user_file(tmp_path, catalogue("a", "./a.py", "one") + "[oops")
    registry = Registry(files=[path], third_party=False)
    for _ in range(2):
        with pytest.raises(RegistryFileError):
            registry.names()
    user_file(tmp_path, catalogue("a", "./a.py", "one"))
    assert len(registry.find(name="one")) == 1
    assert len(registry.find(name="random", kind="mask-strategy")) == 1


# -- third parties -------------------------------------------------------------------------------------------


def test_an_installed_plugin_is_found_through_its_entry_point(site: Site):
    site.good("good-one", version="2.3")
    info = Registry().info("good-one")
    assert info.plugin.origin == "good-one 2.3"
    assert info.plugin.source == "third-party"
    assert "good_one" not in sys.modules
    assert Registry().create("mask-strategy", "good-one", ratio=0.25).ratio == 0.25
    assert "good-one" not in Registry(third_party=False).names()


@pytest.mark.parametrize("switched_off", ["good-one", "good_one", "GOOD-ONE"])
def test_a_third_party_is_switched_off_before_it_is_read(site: Site, switched_off):
    site.good("good-one")
    assert "good-one" not in Registry(disabled=[switched_off]).names()


@pytest.mark.parametrize(
    ("files", "entry_points", "said"),
    [
        ({"bad/__init__.py": "", "bad/registry.toml": "[oops"}, {"bad": "bad"}, "no valid TOML"),
        ({"bad/__init__.py": "", "bad/registry.toml": "[plugin.x]"}, {"bad": "bad"}, "unknown key 'plugin'"),
        ({}, {"bad": "nowhere_to_be_found"}, "its module 'nowhere_to_be_found' is not found"),
        ({"bad/__init__.py": ""}, {"bad": "bad.sub.deeper"}, "its module 'bad.sub.deeper' is not found"),
    ],
)
def test_one_bad_distribution_touches_no_other(site: Site, files, entry_points, said):
    site.good("good-one")
    site.install("bad", files, entry_points)
    registry = Registry()
    assert {"good-one", "random"} <= set(registry.names())
    assert said in registry.plugin("bad").error
    with pytest.raises(PluginLoadError, match="Plugin 'bad' of bad cannot be used"):
        registry.load(registry.plugin("bad"))
    with pytest.raises(
        UnknownComponent, match=r"Some plugins cannot be used \(bad\): see `maskwright doctor`"
    ):
        registry.create("mask-strategy", "unheard-of")


def test_damaged_entry_points_hide_their_own_distribution_only(site: Site):
    site.good("good-one")
    site.install("damaged", {}, "[maskwright]\nthis is no entry point\n")
    names = Registry().names()
    assert {"good-one", "random"} <= set(names)


def test_two_entry_points_of_one_package_read_its_catalogue_once(site: Site):
    files = {
        "twin/__init__.py": "",
        "twin/left.py": plugin_source("left"),
        "twin/right.py": plugin_source("right"),
        "twin/registry.toml": catalogue("l", "twin.left", "left") + catalogue("r", "twin.right", "right"),
    }
    site.install("twin", files, {"l": "twin.left", "r": "twin.right"})
    registry = Registry()
    assert len(registry.find(name="left")) == 1
    assert registry.create("mask-strategy", "right").name == "right"


def test_a_single_module_has_its_catalogue_beside_it(site: Site):
    site.install(
        "single",
        {"single.py": plugin_source("single"), "registry.toml": catalogue("single", "single", "single")},
    )
    assert Registry().create("mask-strategy", "single").name == "single"


def test_without_a_catalogue_a_plugin_is_imported_only_to_create(site: Site):
    site.install("shy", {"shy/__init__.py": plugin_source("shy-mask")})
    registry = Registry()
    assert registry.plugin("shy").described is False
    assert "shy-mask" not in registry.names()
    with pytest.raises(UnknownComponent, match="What shy offers is not described: `maskwright describe shy`"):
        registry.info("shy-mask")
    assert "shy" not in sys.modules
    assert registry.create("mask-strategy", "shy-mask", ratio=0.1).ratio == 0.1
    assert registry.info("shy-mask").summary == "What shy-mask decides"


def test_an_undescribed_plugin_that_breaks_does_not_hide_another(site: Site):
    site.install("angry", {"angry/__init__.py": "raise RuntimeError('no')"})
    site.install("shy", {"shy/__init__.py": plugin_source("shy-mask")})
    registry = Registry()
    assert registry.create("mask-strategy", "shy-mask").name == "shy-mask"
    with pytest.raises(UnknownComponent):
        registry.create("mask-strategy", "unheard-of")


def test_looking_up_executes_no_code_of_a_plugin(site: Site, tmp_path):
    trace = tmp_path / "ran"
    site.good("loud", top=f"open({str(trace)!r}, 'w').close()")
    site.install("mute", {"mute/__init__.py": f"open({str(trace)!r}, 'w').close()"})
    registry = Registry()
    registry.names()
    registry.find(modality="image")
    registry.info("loud")
    registry.plugins()
    registry.conflicts()
    plugin_folder(registry.plugin("loud"))
    with pytest.raises(UnknownComponent):
        registry.info("unheard-of")
    assert not trace.exists()
    registry.create("mask-strategy", "loud")
    assert trace.exists()


# -- conflicts -----------------------------------------------------------------------------------------------


def test_two_distributions_with_one_name_are_both_reachable(site: Site):
    site.good("dist-a", "same", version="1.0")
    site.good("dist-b", "same", version="2.0")
    registry = Registry()
    with pytest.raises(
        NameConflict, match="claimed by dist-a and dist-b; ask for 'dist-a/same' or 'dist-b/same'"
    ):
        registry.create("mask-strategy", "same")
    a = registry.component_class("mask-strategy", "dist-a/same")
    assert (a.__module__, a.name) == ("dist_a", "same")  # type: ignore[attr-defined]
    assert registry.component_class("mask-strategy", "dist-b/same").__module__ == "dist_b"
    assert [registry.address(info) for info in registry.find(name="same")] == ["dist-a/same", "dist-b/same"]
    assert [[info.plugin.slug for info in claims] for claims in registry.conflicts()] == [
        ["dist-a", "dist-b"]
    ]
    with pytest.raises(UnknownComponent, match="Did you mean"):
        registry.create("mask-strategy", "dist-c/same")


def test_a_built_in_name_is_not_taken_over(site: Site):
    site.good("taker", "random")
    registry = Registry()
    assert registry.component_class("mask-strategy", "random").__module__.startswith("maskwright.")
    assert registry.component_class("mask-strategy", "taker/random").__module__ == "taker"
    assert registry.address(registry.info("taker/random")) == "taker/random"
    assert registry.address(registry.info("random", "mask-strategy")) == "random"


def test_two_files_with_one_slug_and_one_name_say_so(tmp_path):
    paths = [user_file(tmp_path / one, catalogue("mine", "./x.py", "same")) for one in "ab"]
    registry = Registry(files=paths, third_party=False, built_in=False)
    with pytest.raises(NameConflict, match="mine offers the mask-strategy 'same' more than once"):
        registry.info("mine/same")
    assert registry.info(f"{paths[1]}/same").plugin.folder == paths[1].parent


# -- plugins that break --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said", "cause"),
    [
        ("x = 1\nraise RuntimeError('boom')", "could not be imported: RuntimeError: boom", RuntimeError),
        ("import sys; sys.exit('bye')", "could not be imported: SystemExit: bye", SystemExit),
        ("import not_installed_anywhere", "No module named 'not_installed_anywhere'", ModuleNotFoundError),
        ("def broken(:", "SyntaxError", SyntaxError),
        ("x = 1", "registers nothing: breaker has no `maskwright_components` hook", None),
        ("def maskwright_components(): return []", "registers nothing", None),
        (plugin_source("breaker", hook="raise KeyError('k')"), "failed in its hook: KeyError: 'k'", KeyError),
        (
            plugin_source("breaker", hook="raise SystemExit(3)"),
            "failed in its hook: SystemExit: 3",
            SystemExit,
        ),
        (
            plugin_source("Not Kebab"),
            "its `kind` must be one of .* they are 'mask-strategy' and 'Not Kebab'",
            None,
        ),
        (
            plugin_source("breaker").replace("def draw", "def drew"),
            "a mask-strategy has a method `draw`",
            None,
        ),
        (
            plugin_source("breaker").replace("[Component0]", "[3]"),
            "registers 3: a component is a class",
            None,
        ),
        (
            plugin_source("breaker").replace(
                "def maskwright_components():", "def maskwright_components(what):"
            ),
            "failed in its hook: PluginValidationError",
            Exception,
        ),
    ],
)
def test_a_plugin_that_breaks_is_an_error_of_its_own(site: Site, source, said, cause):
    site.install(
        "breaker", {"breaker.py": source, "registry.toml": catalogue("breaker", "breaker", "breaker")}
    )
    registry = Registry()
    with pytest.raises(PluginLoadError, match=said) as caught:
        registry.create("mask-strategy", "breaker")
    assert caught.value.exit_code == 1
    assert "Plugin 'breaker' of breaker" in str(caught.value)
    if cause is not None:
        assert isinstance(caught.value.__cause__, cause)
    assert (
        said.split(":")[0].split(" must")[0] in registry.plugin("breaker").error
        or registry.plugin("breaker").error
    )
    assert registry.create("mask-strategy", "random").name == "random"
    with pytest.raises(PluginLoadError, match=said):  # and again, not something else
        registry.create("mask-strategy", "breaker")


def test_of_a_plugin_with_one_bad_component_none_is_taken(site: Site):
    source = plugin_source("fine", "Bad One")
    site.install("half", {"half/__init__.py": source})
    registry = Registry()
    with pytest.raises(PluginLoadError):
        registry.load(registry.plugin("half"))
    assert "fine" not in registry.names()
    assert not registry.host.is_registered(sys.modules["half"])


def test_a_plugin_that_is_mended_works_at_the_next_try(site: Site):
    folder = site.good("mended")
    good = (folder / "__init__.py").read_text()
    (folder / "__init__.py").write_text("import not_installed_yet\n" + good)
    registry = Registry()
    with pytest.raises(PluginLoadError):
        registry.create("mask-strategy", "mended")
    assert registry.plugin("mended").error
    site.install("not-installed-yet", {"not_installed_yet.py": ""}, {})
    assert registry.create("mask-strategy", "mended").name == "mended"
    assert not registry.plugin("mended").error


def test_advice_fits_the_plugin(site: Site, tmp_path):
    table = catalogue("extra", "extra", "extra", extra='extras = ["gpu"]')
    site.install("extra", {"extra/__init__.py": "import not_there_either", "extra/registry.toml": table})
    path = user_file(tmp_path / "mine", catalogue("mine", "my_mask", "my-mask"))
    registry = Registry(files=[path])
    with pytest.raises(PluginLoadError, match=r"pip install 'extra\[gpu\]'"):
        registry.create("mask-strategy", "extra")
    with pytest.raises(PluginLoadError, match=r"named by its path, such as './my_mask.py'"):
        registry.create("mask-strategy", "my-mask")


def test_a_users_file_whose_module_is_missing(tmp_path):
    path = user_file(tmp_path, catalogue("mine", "./none.py", "my-mask"))
    with pytest.raises(PluginLoadError, match=r"none.py does not exist"):
        of_file(path).create("mask-strategy", "my-mask")


def test_a_users_module_that_raises_leaves_nothing_behind(tmp_path):
    (tmp_path / "half.py").write_text("raise RuntimeError('half way')")
    registry = of_file(user_file(tmp_path, catalogue("mine", "./half.py", "my-mask")))
    with pytest.raises(PluginLoadError, match="half way"):
        registry.create("mask-strategy", "my-mask")
    (tmp_path / "half.py").write_text(plugin_source("my-mask"))
    assert registry.create("mask-strategy", "my-mask").name == "my-mask"


def test_a_plugin_that_is_uninstalled_meanwhile_says_so(site: Site):
    folder = site.good("goner")
    registry = Registry()
    assert "goner" in registry.names()
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    with pytest.raises(PluginLoadError, match="it was uninstalled meanwhile"):
        registry.create("mask-strategy", "goner")


def test_a_component_that_is_promised_but_not_registered(site: Site):
    files = {
        "liar/__init__.py": plugin_source("truth"),
        "liar/registry.toml": catalogue("liar", "liar", "promise"),
    }
    site.install("liar", files)
    registry = Registry()
    with pytest.raises(
        PluginLoadError, match="does not register it; `maskwright describe liar` prints the table"
    ):
        registry.create("mask-strategy", "promise")
    assert registry.create("mask-strategy", "truth").name == "truth"  # what it really has is there as well


def test_a_plugin_of_hooks_only_has_no_components(site: Site):
    source = "from maskwright import hookimpl\n@hookimpl\ndef maskwright_run_started(run): pass\n"
    site.install("watcher", {"watcher/__init__.py": source})
    registry = Registry()
    assert registry.load(registry.plugin("watcher")) == []


# -- threads and re-entrance ---------------------------------------------------------------------------------


def test_many_threads_load_one_plugin_once(tmp_path):
    top = "import builtins, time\nbuiltins.imports_seen.append(1)\ntime.sleep(0.05)"
    (tmp_path / "slow.py").write_text(plugin_source("slow", top=top, hook="builtins.hooks_seen.append(1)"))
    registry = of_file(user_file(tmp_path, catalogue("slow", "./slow.py", "slow")))
    import builtins

    builtins.imports_seen, builtins.hooks_seen = [], []  # type: ignore[attr-defined]
    barrier, made = threading.Barrier(16), []

    def work() -> None:
        barrier.wait()
        made.append(type(registry.create("mask-strategy", "slow")))

    try:
        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(made) == 16
        assert len(set(made)) == 1
        assert builtins.imports_seen == builtins.hooks_seen == [1]  # type: ignore[attr-defined]
    finally:
        del builtins.imports_seen, builtins.hooks_seen  # type: ignore[attr-defined]


def test_looking_up_does_not_wait_for_a_plugin_that_is_being_imported(site: Site, monkeypatch):
    gate = types.ModuleType("gate_of_test")
    gate.begun, gate.go = threading.Event(), threading.Event()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gate_of_test", gate)
    site.good("sluggish", top="import gate_of_test\ngate_of_test.begun.set()\ngate_of_test.go.wait(10)")
    registry = Registry()
    loader = threading.Thread(target=registry.create, args=("mask-strategy", "sluggish"))
    loader.start()
    assert gate.begun.wait(10)  # type: ignore[attr-defined]
    answers: list[list[str]] = []
    asker = threading.Thread(target=lambda: answers.append(registry.names()))
    asker.start()
    asker.join(5)
    waited = asker.is_alive()
    gate.go.set()  # type: ignore[attr-defined]
    loader.join(10)
    asker.join(10)
    assert not waited
    assert "sluggish" in answers[0]


def test_a_plugin_may_create_another_component_while_it_loads(site: Site, monkeypatch):
    held = types.ModuleType("held_registry")
    monkeypatch.setitem(sys.modules, "held_registry", held)
    site.good("inner")
    site.good(
        "outer",
        top="import held_registry\nINNER = held_registry.registry.create('mask-strategy', 'inner')",
        hook="held_registry.registry.find(kind='objective')",
    )
    held.registry = registry = Registry()  # type: ignore[attr-defined]
    registry.create("mask-strategy", "outer")
    assert sys.modules["outer"].INNER.name == "inner"


# -- from a program ------------------------------------------------------------------------------------------


@attrs.frozen
class Notebook:
    """A component of a notebook."""

    kind, name = "mask-strategy", "notebook"
    modalities, needs = frozenset({"image"}), frozenset()
    ratio: float = setting(0.5, "share", ge=0, lt=1)

    def draw(self, layout, *, signals, progress, generator): ...


def test_register_adds_to_this_registry_only():
    registry, other = built_in(), built_in()
    assert registry.register(Notebook) is Notebook
    assert registry.create("mask-strategy", "notebook", ratio=0.2).ratio == 0.2
    assert registry.info("notebook").summary == "A component of a notebook"
    assert registry.load(registry.plugin("program")) == [Notebook]
    assert "notebook" not in other.names()


def test_register_is_a_decorator_and_replaces_only_when_told():
    registry = built_in()

    @registry.register()
    @attrs.frozen
    class Other(Notebook):
        name = "random"
        kind = "objective"

        def bind(self, backbone): ...

    assert registry.create("objective", "random").name == "random"
    with pytest.raises(NameConflict, match="already registered by program"):
        registry.register(Other)
    with pytest.raises(NameConflict, match="already registered by maskwright"):
        registry.register(type("Random", (Notebook,), {"name": "random"}))
    mine = registry.register(type("Random", (Notebook,), {"name": "random"}), replace=True)
    assert registry.component_class("mask-strategy", "random") is mine
    assert registry.info("random", "mask-strategy").qualified == "program/random"


@pytest.mark.parametrize("change", [{"kind": "mask"}, {"name": "Note Book"}, {"name": 3}, {"draw": None}])
def test_register_refuses_what_is_no_component(change):
    with pytest.raises(BadParameter, match="cannot be registered: "):
        built_in().register(type("Bad", (Notebook,), change))


def test_the_modules_functions_are_those_of_the_process_registry(monkeypatch):
    module.default.cache_clear()
    try:
        assert maskwright.names("mask-strategy") == module.names("mask-strategy")
        assert maskwright.create("mask-strategy", "random", ratio=0.3).ratio == 0.3
        assert module.plugin("baselines").slug == "baselines"
    finally:
        module.default.cache_clear()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = module.nonsense
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = maskwright.nonsense
    assert "create" in dir(maskwright)
    assert maskwright.registry is module


def test_importing_maskwright_and_listing_imports_neither_torch_nor_plugins():
    code = (
        "import sys, maskwright, maskwright.registry as r\n"
        "r.names(); r.find(); r.info('mae')\n"
        "print([m for m in sys.modules if m == 'torch' or m.startswith('maskwright.plugins.')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# -- describing ----------------------------------------------------------------------------------------------


@attrs.frozen
class Spelled:
    """Says how parameters are spelled.

    And no more.
    """

    kind, name = "pruner", "spelled"
    modalities = frozenset({"text"})
    budgets = ("sparsity", "pattern")
    needs = property(lambda self: frozenset({"batches"}))

    required: int = setting(help="must be given", ge=1)
    words: frozenset[str] = setting(frozenset({"b", "a"}), "some")
    none: frozenset[str] = setting(frozenset(), "none")
    made: dict[str, int] = attrs.field(factory=dict)
    _private: float = setting(0.5, "an alias", gt=0)
    hidden: int = attrs.field(default=3, init=False)


def test_a_component_is_described_from_its_class():
    info = describe_component(Spelled, PluginInfo("s", "s"))
    assert info.summary == "Says how parameters are spelled"
    assert info.budgets == {"sparsity", "pattern"}
    assert info.needs == frozenset()  # it depends on the parameters: the class cannot say
    spelled = {one.name: (one.default, one.range) for one in info.parameters}
    assert spelled == {
        "required": ("", ">= 1"),
        "words": ("frozenset({'a', 'b'})", ""),
        "none": ("frozenset()", ""),
        "made": ("dict()", ""),
        "private": ("0.5", "> 0"),
    }


def test_drift_names_every_difference():
    plugin = PluginInfo("s", "s")
    real = describe_component(Spelled, plugin)
    assert drift([real], [attrs.evolve(real, plugin=attrs.evolve(plugin, title="other"))]) == []
    wrong = attrs.evolve(real, summary="else", budgets=frozenset(), parameters=real.parameters[:1])
    said = drift(
        [wrong, ComponentInfo("sampler", "gone", plugin)], [real, ComponentInfo("sampler", "new", plugin)]
    )
    assert said[0] == "pruner spelled: budgets should be 'pattern', 'sparsity', not nothing"
    assert said[1].startswith("pruner spelled: parameters should be required int >= 1 must be given; words")
    assert said[2] == "pruner spelled: summary should be 'Says how parameters are spelled', not 'else'"
    assert said[3:] == [
        "sampler gone is described but not registered",
        "sampler new is registered but not described",
    ]


@pytest.mark.parametrize(
    ("paper", "url"),
    [
        ("arXiv:2407.13036", "https://arxiv.org/abs/2407.13036"),
        ("2407.13036v2", "https://arxiv.org/abs/2407.13036"),
        ("doi:10.1000/x.y", "https://doi.org/10.1000/x.y"),
        ("https://openreview.net/forum?id=1", "https://openreview.net/forum?id=1"),
        ("NeurIPS 2015", ""),
        ("", ""),
    ],
)
def test_where_a_paper_is(paper, url):
    assert PluginInfo("s", "s", paper=paper).paper_url == url


def test_a_recorded_claim_is_read_without_importing(tmp_path):
    plugin = PluginInfo("mine", "./mine.py", source="file", folder=tmp_path)
    assert recorded_claim(plugin) is None
    (tmp_path / "claim.json").write_text("[1]")
    assert recorded_claim(plugin) is None
    (tmp_path / "claim.json").write_text("{")
    assert recorded_claim(plugin) is None
    (tmp_path / "claim.json").write_text(json.dumps({"verdict": "reproduced"}))
    assert recorded_claim(plugin) == {"verdict": "reproduced"}
    assert recorded_claim(PluginInfo("x", "not_a_module_at_all")) is None


def test_the_folder_of_a_built_in_plugin_is_found_without_importing_it():
    folder = plugin_folder(built_in().plugin("baselines"))
    assert folder is not None
    assert (folder / "masks.py").is_file()


# -- what fits what ------------------------------------------------------------------------------------------


def strategy_and_objective(needs=(), columns=(), provides=()):
    strategy = types.SimpleNamespace(name="chooser", needs=frozenset(needs))
    objective = types.SimpleNamespace(name="learner", needs=frozenset(columns), provides=frozenset(provides))
    return strategy, objective


def test_what_fits_is_let_through():
    check_fit(*strategy_and_objective(["loss"], ["pixels"], ["loss"]), frozenset({"pixels"}))
    check_fit(*strategy_and_objective(["tokens"], ["tokens"]))
    check_fit(*strategy_and_objective(["labels"], ["pixels"]), frozenset({"pixels", "labels"}))


def test_a_missing_column_names_what_the_data_have():
    with pytest.raises(
        MissingColumn, match="'learner' needs the batch column 'depth'; the data have 'pixels'"
    ):
        check_fit(*strategy_and_objective([], ["depth"]), frozenset({"pixels"}))


def test_a_missing_signal_names_who_provides_it(tmp_path):
    text = COMPONENT.replace("pruner", "objective").replace("thin", "teller") + 'provides = ["loss"]\n'
    registry = of_file(user_file(tmp_path, text))
    with pytest.raises(
        MissingSignal, match=r"'chooser' needs the signal 'loss'.* use one that does: 'teller'"
    ):
        check_fit(*strategy_and_objective(["loss"]), catalogue=registry)
    with pytest.raises(MissingSignal, match="no registered objective provides it"):
        check_fit(*strategy_and_objective(["sound"]), catalogue=registry)


def pair_of_counts(strategy=None, objective=None, **parameters):
    one, other = strategy_and_objective()
    for component, counts in ((one, strategy), (other, objective)):
        if counts:
            component.counts = counts
    one.exact_with = {"exact": True, "seed": 3}
    vars(one).update({"exact": False, "seed": 0, **parameters})
    return one, other


@pytest.mark.parametrize(
    ("strategy", "objective"), [(None, "exact"), ("exact", "exact"), ("bounded", None), ("bounded", "any")]
)
def test_counts_fit_unless_they_differ_and_must_not(strategy, objective):
    check_fit(*pair_of_counts(strategy, objective))


def test_unequal_counts_name_the_parameters_that_make_them_equal():
    said = r"'chooser' does not keep the same .* 'learner' needs; give 'chooser' exact=True, seed=3\.$"
    with pytest.raises(CountsMismatch, match=said) as caught:
        check_fit(*pair_of_counts("bounded", "exact", seed=3))
    assert caught.value.exit_code == 2
    check_fit(*pair_of_counts("bounded", "exact", seed=3, exact=True))


def test_unequal_counts_without_such_parameters_name_strategies_that_fit(tmp_path):
    strategy, objective = pair_of_counts("bounded", "exact")
    del strategy.exact_with
    objective.modalities = frozenset({"image"})
    table = '[[plugins.one.components]]\nkind = "mask-strategy"\nname = "{}"\nmodalities = ["{}"]\n{}\n'
    others = [
        ("even", "image", ""),
        ("uneven", "image", 'counts = "bounded"'),
        ("deaf", "image", 'needs = ["loss"]'),
        ("spoken", "text", ""),
    ]
    text = '[plugins.one]\nmodule = "./one.py"\n' + "".join(table.format(*other) for other in others)
    registry = of_file(user_file(tmp_path, text))
    with pytest.raises(CountsMismatch, match=r"needs; use one that does: 'even'\.$"):
        check_fit(strategy, objective, catalogue=registry)
    nothing = Registry(third_party=False, built_in=False)
    with pytest.raises(CountsMismatch, match="no registered strategy does"):
        check_fit(strategy, objective, catalogue=nothing)


def test_counts_may_depend_on_what_a_component_holds():
    """Described with its default parameters, or as what fits fewest; read from the instance when a run is configured."""

    @attrs.frozen
    class Wrapper:
        kind, name = "objective", "wrapper"
        modalities, needs, provides = frozenset({"image"}), frozenset({"pixels"}), frozenset()
        inner: str

        @property
        def counts(self):
            return self.inner

        def bind(self, backbone):
            return backbone

    strategy, _ = pair_of_counts("bounded")

    @attrs.frozen
    class WithDefault(Wrapper):
        inner: str = "any"

    assert describe_component(Wrapper, PluginInfo("", "")).counts == "exact"
    assert describe_component(WithDefault, PluginInfo("", "")).counts == ""
    check_fit(strategy, Wrapper("any"))
    with pytest.raises(CountsMismatch):
        check_fit(strategy, Wrapper("exact"))


def test_a_word_that_counts_cannot_be_is_refused(tmp_path):
    path = user_file(tmp_path, COMPONENT.replace("pruner", "mask-strategy") + 'counts = "any"\n')
    with pytest.raises(RegistryFileError, match="counts 'any' must be exact, bounded"):
        of_file(path).names()

    class Odd:
        kind, name, counts = "mask-strategy", "odd", "equal"

        def draw(self):
            pass

    with pytest.raises(BadParameter, match="may be 'exact' or 'bounded', not 'equal'"):
        Registry(third_party=False, built_in=False).register(Odd)


@pytest.mark.parametrize(
    ("mixed", "disjoint", "advice"),
    [(4, 1, "draws each by itself; use 'apart'"), (4, 2, "keeps only 2 disjoint; give both the same number")],
)
def test_an_objective_that_mixes_rows_refuses_masks_that_may_overlap(mixed, disjoint, advice):
    strategy, objective = strategy_and_objective()
    strategy.disjoint_rows, objective.disjoint_rows, objective.default_strategy = disjoint, mixed, "apart"
    with pytest.raises(OverlappingMasks, match=f"'learner' mixes {mixed} consecutive rows.*{advice}"):
        check_fit(strategy, objective)


@pytest.mark.parametrize(("mixed", "disjoint"), [(4, 4), (2, 4), (1, 4), (1, 1)])
def test_rows_that_are_disjoint_are_so_in_smaller_numbers_too(mixed, disjoint):
    strategy, objective = strategy_and_objective()
    strategy.disjoint_rows, objective.disjoint_rows = disjoint, mixed
    check_fit(strategy, objective)


@attrs.frozen
class Mixes:
    kind, name, modalities = "objective", "mixes", frozenset({"image"})
    images: int = 3

    @property
    def disjoint_rows(self):
        return self.images


@attrs.frozen
class MixesAnyNumber(Mixes):
    images: int = attrs.field()


@pytest.mark.parametrize(("component", "rows"), [(Mixes, 3), (MixesAnyNumber, 1)])
def test_the_catalogue_says_how_many_rows_are_mixed_by_default(component, rows):
    plugin = PluginInfo(slug="m", module="m")
    assert describe_component(component, plugin).disjoint_rows == rows
