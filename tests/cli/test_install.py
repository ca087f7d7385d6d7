"""`maskwright install` and `uninstall`: what they refuse, with which program they work, how they fail. tests/end_to_end runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from maskwright import packages
from maskwright.cli import cli
from maskwright.errors import BadRequirement, InstallError
from maskwright.packages import Change, Installed, Installer, Offer


def run(*arguments: str, **more):
    return CliRunner().invoke(cli, arguments, prog_name="maskwright", **more)


# -- what may be asked for -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("my-plugin", "my-plugin"),
        (" my-plugin >= 1.2, <2 ", "my-plugin<2,>=1.2"),
        ("my-plugin[fast]", "my-plugin[fast]"),
        ("my-plugin @ https://example.org/x.whl", "my-plugin@ https://example.org/x.whl"),
        ("my-plugin @ git+https://example.org/x", "my-plugin@ git+https://example.org/x"),
        ("p; python_version > '3'", 'p; python_version > "3"'),
    ],
)
def test_requirements_are_taken(given, taken):
    assert packages.requirement(given).replace(" @ ", "@ ") == taken


@pytest.mark.parametrize(
    "given",
    [
        "--index-url=https://example.org",
        "-r x.txt",
        "-e.",
        "--",
        "-",
        " --no-deps",
        "a b",
        "a==",
        "",
        "a\n--pre",
        "a;--pre",
        "no/such/path",
        "no-such-file.whl",
    ],
)
def test_options_and_nonsense_are_no_requirements(given):
    with pytest.raises(BadRequirement):
        packages.requirement(given)


def test_an_existing_wheel_or_folder_becomes_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p-1-py3-none-any.whl").touch()
    Path("-x").mkdir()
    assert packages.requirement("p-1-py3-none-any.whl") == str(tmp_path / "p-1-py3-none-any.whl")
    assert packages.requirement("./-x") == str(tmp_path / "-x")


def test_an_option_after_the_separator_is_refused(monkeypatch):
    monkeypatch.setattr(packages, "install", lambda *_, **__: pytest.fail("it was passed on"))
    done = run("install", "--", "good-plugin", "--index-url=https://example.org")
    assert done.exit_code == 2
    assert "is an option, not a package" in done.stderr
    assert run("install", "--index-url=https://example.org").exit_code == 2
    assert run("install").exit_code == 2


def test_an_editable_path_must_be_a_project(tmp_path):
    done = run("install", "-e", str(tmp_path))
    assert done.exit_code == 2
    assert "no pyproject.toml" in done.stderr
    (tmp_path / "pyproject.toml").touch()
    assert packages.project(tmp_path) == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torch", "brings no maskwright plugin"),
        ("maskwright", "maskwright itself"),
        ("surely-not-installed", "is not installed"),
        ("torch>=2", "no package's name"),
        ("../x", "no package's name"),
    ],
)
def test_only_plugins_are_uninstalled(name, words):
    done = run("uninstall", "--yes", name)
    assert done.exit_code == 2
    assert words in done.stderr


# -- with what -----------------------------------------------------------------------------------------------


@pytest.fixture
def not_in_a_venv(monkeypatch):
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)


def test_pip_of_this_interpreter_is_called_with_a_list_and_no_options_of_the_user():
    installer = packages.find_installer()
    command = installer.install(["a", "b>1"], ["/p"], True)
    assert command[:4] == [sys.executable, "-P", "-m", "pip"]
    assert command[4:] == [
        "--disable-pip-version-check",
        "install",
        "--upgrade",
        "--editable",
        "/p",
        "--",
        "a",
        "b>1",
    ]
    assert installer.uninstall(["a"])[5:] == ["uninstall", "--yes", "--", "a"]


def test_a_managed_interpreter_is_left_alone(monkeypatch, tmp_path, not_in_a_venv):
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(packages.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InstallError, match=r"PEP 668.*python3 -m venv"):
        packages.find_installer()


def test_a_managed_base_does_not_matter_inside_an_environment(monkeypatch, tmp_path):
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(packages.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert packages.find_installer().name == "pip"


def test_without_pip_uv_is_used(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(packages.shutil, "which", lambda name: "/bin/uv")
    installer = packages.find_installer()
    assert installer.install(["a"], [], False) == [
        "/bin/uv",
        "pip",
        "install",
        "--python",
        sys.executable,
        "--",
        "a",
    ]
    assert installer.uninstall(["a"]) == [
        "/bin/uv",
        "pip",
        "uninstall",
        "--python",
        sys.executable,
        "--",
        "a",
    ]


def test_without_pip_and_uv_the_way_forward_is_named(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(InstallError, match=r"has no pip\. .*ensurepip.*uv pip install"):
        packages.find_installer()


def test_what_uv_would_install_is_read_from_its_words(monkeypatch):
    said = "Resolved 2 packages in 3ms\nWould install 2 packages\n + my-plugin==1.2\n + attrs==99.0\n - attrs==1.0\n + own @ file:///x/own-1.whl"
    monkeypatch.setattr(packages, "_run", lambda command, say: said)
    monkeypatch.setattr(packages, "versions", lambda: {"attrs": "1.0"})
    changes = packages._would_install(Installer("uv", ("uv", "pip")), ["my-plugin"], [], False, print)
    assert [str(one) for one in changes] == [
        "~ attrs 1.0 → 99.0",
        "+ my-plugin 1.2",
        "+ own file:///x/own-1.whl",
    ]


# -- how it fails --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("ERROR: No matching distribution found for nonsense>=2", "No package 'nonsense>=2' was found"),
        (
            "  × No solution found\n  ╰─▶ Because nonsense was not found in the registry",
            "No package 'nonsense' was found",
        ),
        ("error: externally-managed-environment", "PEP 668"),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 30] Read-only file system: '/x'",
            "cannot be changed",
        ),
        ("ERROR: [Errno 28] No space left on device", "disk is full"),
        ("Collecting x\nERROR: Something odd.", "Something odd (exit code 1)"),
        ("", "it said nothing"),
    ],
)
def test_a_failing_installer_is_explained_in_one_sentence(said, words):
    sentence = packages.explain(said.splitlines(), 1)
    assert words in sentence
    assert "\n" not in sentence


def test_the_command_ends_with_that_sentence(monkeypatch):
    monkeypatch.setattr(
        packages,
        "find_installer",
        lambda: Installer(
            "pip",
            (
                sys.executable,
                "-c",
                "import sys; print('ERROR: No matching distribution found for zzz'); sys.exit(1)",
            ),
        ),
    )
    monkeypatch.setattr(packages, "installed", Installed)
    done = run("install", "zzz")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("Error: No package 'zzz' was found")
    assert done.stdout == ""


def test_an_installer_that_is_gone_is_named(monkeypatch):
    with pytest.raises(InstallError, match="no/uv cannot be run: No such file"):
        packages._run(["no/uv"], print)


def test_removing_asks_first(monkeypatch):
    monkeypatch.setattr(packages, "installed_plugin", lambda text: text)
    monkeypatch.setattr(packages, "uninstall", lambda *_, **__: pytest.fail("it was not asked"))
    done = run("uninstall", "my-plugin")
    assert done.exit_code == 2
    assert "say --yes" in done.stderr


# -- what is said afterwards ---------------------------------------------------------------------------------


OFFER = Offer("mask-strategy", "one", "a", "1")


def outcome(before: Installed, after: Installed, *changes: Change):
    return packages._outcome(before, after, changes, packages._notes(before, after, changes))


def test_components_gained_and_lost_are_told_whatever_their_version():
    old, new = Offer("sampler", "old", "a", "1"), Offer("sampler", "new", "a", "2")
    kept = Offer("mask-strategy", "one", "a", "2")
    done = outcome(
        Installed(frozenset({OFFER, old})), Installed(frozenset({kept, new})), Change("a", "1", "2")
    )
    assert (done.gained, done.lost, done.notes) == ((new,), (old,), ())


@pytest.mark.parametrize(
    ("after", "note"),
    [
        (Installed(errors={"a": "no valid TOML"}), "a cannot be used: no valid TOML"),
        (Installed(undescribed=frozenset({"a"})), "it has no registry.toml"),
        (Installed(), "None of a brings a maskwright plugin."),
        (Installed(frozenset({OFFER, Offer("mask-strategy", "one", "b")})), "ask for a/one"),
    ],
)
def test_what_a_user_should_know_of_what_came(after, note):
    before = Installed(frozenset({Offer("mask-strategy", "one", "b")}) if "ask for" in note else frozenset())
    (said,) = outcome(before, after, Change("a", "", "1")).notes
    assert note in said


def test_the_outcome_for_programs(monkeypatch):
    monkeypatch.setattr(
        packages, "install", lambda *_, **__: packages.Outcome((Change("a", "", "1"),), (OFFER,))
    )
    content = json.loads(run("install", "a", "--json").stdout)
    assert content == {
        "dry_run": False,
        "changes": [{"name": "a", "before": "", "after": "1"}],
        "gained": [{"kind": "mask-strategy", "name": "one", "distribution": "a", "version": "1"}],
        "lost": [],
        "notes": [],
    }


def test_the_outcome_for_people(monkeypatch):
    monkeypatch.setattr(
        packages,
        "install",
        lambda *_, **__: packages.Outcome((Change("a", "1", "2"),), (OFFER,), (), ("hear",)),
    )
    done = run("install", "a")
    assert done.stdout == "  ~ a 1 → 2\nGained:\n  mask-strategy  one  (a 1)\n"
    assert "Note: hear" in done.stderr
    monkeypatch.setattr(packages, "install", lambda *_, **__: packages.Outcome())
    assert run("install", "a").stdout == "Nothing changed.\n"
    assert run("install", "a", "--dry-run").stdout == "Nothing would change.\n"


INSTALLER = """
import json, pathlib, shutil, sys
site, words = pathlib.Path(sys.argv[1]), sys.argv[2:]
print("Working on", words[-1])
if "--report" in words:
    report = {"install": [{"metadata": {"name": "Stand_In", "version": "2.0"}}]}
    pathlib.Path(words[words.index("--report") + 1]).write_text(json.dumps(report))
elif "uninstall" in words:
    shutil.rmtree(site / "stand_in")
    shutil.rmtree(site / "stand_in-1.0.dist-info")
else:
    for folder in ("stand_in", "stand_in-1.0.dist-info"):
        (site / folder).mkdir()
    (site / "stand_in" / "__init__.py").touch()
    (site / "stand_in" / "registry.toml").write_text(
        '[plugins.stand-in]\\nmodule = "stand_in"\\n[[plugins.stand-in.components]]\\nkind = "sampler"\\nname = "standing"\\n'
    )
    info = site / "stand_in-1.0.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: stand-in\\nVersion: 1.0\\n")
    (info / "entry_points.txt").write_text("[maskwright]\\nstand-in = stand_in\\n")
"""
"""A stand-in for pip that knows one package and puts it on a path of its own."""


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder on the path of this process and its children, into which the stand-in installs."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    )
    (tmp_path / "installer.py").write_text(INSTALLER)
    command = (sys.executable, str(tmp_path / "installer.py"), str(folder))
    monkeypatch.setattr(packages, "find_installer", lambda: Installer("pip", command))
    monkeypatch.setattr(packages.sysconfig, "get_path", lambda name: str(folder))
    return folder


def test_from_asking_to_telling(site):
    done = run("install", "stand-in", "--dry-run")
    assert (done.exit_code, done.stdout) == (0, "Would change:\n  + stand-in 2.0\n")
    assert list(site.iterdir()) == []

    done = run("install", "stand-in")
    assert (done.exit_code, done.stderr) == (0, "Working on stand-in\n")
    assert done.stdout == "  + stand-in 1.0\nGained:\n  sampler  standing  (stand-in 1.0)\n"

    assert run("install", "stand-in", "-n").stdout == "Would change:\n  ~ stand-in 1.0 → 2.0\n"
    lost = "  - stand-in 1.0\nLost:\n  sampler  standing  (stand-in 1.0)\n"
    assert run("uninstall", "Stand_In", "--dry-run").stdout == f"Would change:\n{lost}"
    assert (site / "stand_in").exists()
    assert run("uninstall", "--yes", "Stand_In").stdout == lost
    assert not (site / "stand_in").exists()


def test_the_lock_tells_who_has_it_and_is_given_back(site):
    said: list[str] = []
    with packages.alone(said.append):
        assert (site / ".maskwright-install.lock").read_text() == str(os.getpid())
    with packages.alone(said.append):
        pass
    assert said == []
    assert (site / ".maskwright-install.lock").read_text() == ""


def test_two_threads_of_installing_take_turns(site):
    order: list[str] = []
    first_is_in, waiting = threading.Event(), threading.Event()

    def first() -> None:
        with packages.alone(order.append):
            first_is_in.set()
            waiting.wait(10)
            order.append("first done")

    def say(text: str) -> None:
        order.append(text)
        waiting.set()

    thread = threading.Thread(target=first)
    thread.start()
    first_is_in.wait(10)
    with packages.alone(say):
        order.append("second done")
    thread.join()
    assert order[0].startswith(
        f"Another maskwright (process {os.getpid()}) is changing this environment; waiting"
    )
    assert order[1:] == ["first done", "second done"]


def test_where_only_the_users_own_packages_can_be_written_the_lock_lies_there(site, monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "_writable", lambda folder: False)
    monkeypatch.setattr(packages.site, "getusersitepackages", lambda: str(tmp_path / "own"))
    with packages.alone(print):
        assert (tmp_path / "own" / ".maskwright-install.lock").exists()


def test_a_read_only_environment_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(packages.sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(InstallError, match=r"cannot be changed: .*nowhere is not writable"):
        packages.find_installer()


def test_an_environment_that_cannot_be_listed_is_no_traceback(monkeypatch):
    monkeypatch.setattr(packages, "_SNAPSHOT", "raise RuntimeError('broken')")
    with pytest.raises(InstallError, match="cannot be listed: RuntimeError: broken"):
        packages.installed()


def test_a_terminal_is_asked(monkeypatch):
    removed: list[object] = []
    monkeypatch.setattr(packages, "installed_plugin", lambda text: text)
    monkeypatch.setattr(packages, "uninstall", lambda names, **_: removed.append(names) or packages.Outcome())
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    assert run("uninstall", "my-plugin", input="n\n").exit_code == 1
    assert removed == []
    assert run("uninstall", "my-plugin", input="y\n").exit_code == 0
    assert removed == [["my-plugin"]]


def test_importing_it_imports_no_torch():
    code = "import maskwright.packages, maskwright.scaffold, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
