"""How the command line ends: exit codes, one line for each mistake, and no traceback unless asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import maskwright
from maskwright.cli import cli
from maskwright.errors import OutputError
from sites import Site, catalogue


def run(*args: str, **env: str) -> Result:
    return CliRunner().invoke(cli, list(args), env=env, prog_name="maskwright")


def fails(result: Result, code: int, said: str) -> None:
    """One line on stderr, nothing else there, and this exit code."""
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def shell(*args: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "maskwright", *args], capture_output=True, text=True, timeout=60, **kwargs
    )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["lst"], "There is no command 'lst'. Did you mean 'list'? See `maskwright --help`."),
        (["list", "--kid", "x"], "No such option '--kid'"),
        (["list", "--kind", "strategy"], "'strategy' is not one of 'mask-strategy'"),
        (["list", "a", "b"], "unexpected extra argument (b). See `maskwright list --help`."),
        (["info"], "Missing argument 'NAME'. See `maskwright info --help`."),
        (["info", "rndom"], "There is no component 'rndom'. Did you mean 'random'"),
        (["info", "mae", "--kind", "pruner"], "'mae' is no pruner; it is an objective."),
        (["show", "mae"], "'mae' is no mask-strategy; it is an objective."),
        (["show", "random", "--set", "ratoi=0.5"], "random has no parameter 'ratoi'. Did you mean 'ratio'"),
        (["show", "random", "--set", "ratio=2"], "random: ratio=2.0 must be in [0, 1)."),
        (["show", "random", "--set", "ratio=green"], "random: ratio='green' must be a number in [0, 1)."),
        (["show", "random", "--set", "ratio"], "--set 'ratio' must be key=value, such as --set ratio=0.5."),
        (["show", "random", "--grid", "14xx"], "'14xx' must be sides such as 14x14"),
        (["show", "random", "--grid", "0"], "'0' must be sides such as 14x14"),
        (["show", "random", "--out", "mask.jpg"], "--out mask.jpg must be a .png file."),
        (["show", "tube", "--grid", "12"], "tube needs a grid of frames × places"),
        (["check"], "Name a component, a plugin or a module to check, or give --all."),
        (["check", "rndom"], "There is no component, plugin or module 'rndom'. Did you mean 'random'"),
        (["check", "random", "--kind", "sampler"], "There is no sampler in random."),
        (["check", "random", "--rule", "monotne"], "There is no rule 'monotne'. Did you mean 'monotone'?"),
        (["check", "./none.py"], "There is no module ./none.py: it is no file"),
        (["describe", "no_such_module"], "There is no module 'no_such_module'."),
        (["doctor", "baslines"], "There is no plugin 'baslines'. Did you mean 'baselines'"),
        (["doctor", "--timeout", "0"], "0.0 is not in the range x>0"),
        (["verify", "baslines"], "There is no plugin 'baslines'. Did you mean 'baselines'"),
        (["verify", "baselines"], "Plugin 'baselines' has no claim"),
        (["verify", "baselines", "--all"], "Name plugins or give --all, not both."),
        (["verify", "--family", "nonsense"], "There is no family 'nonsense'."),
        (["pretrain", "--objective", "mea"], "There is no objective 'mea'."),
        (["pretrain", "--strategy", "rndom"], "There is no mask-strategy 'rndom'. Did you mean 'random'"),
        (["pretrain", "--set", "strategy.ratio=1.5"], "random: ratio=1.5 must be in [0, 1)."),
        (["pretrain", "--steps", "0"], "[run] steps=0 must be >= 1."),
        (["pretrain", "--steps", "many"], "'many' is not a valid integer"),
        (["pretrain", "--set", "run.stps=3"], "unknown key 'stps'. Did you mean 'steps'?"),
        (
            ["pretrain", "--set", "pruner.name=x"],
            "pretrain has no section [pruner]. It is a section of prune.",
        ),
        (["pretrain", "none.toml"], "The run file none.toml does not exist."),
        (["pretrain", "none.toml", "--resume"], "leave none.toml out"),
        (["pretrain", "--resume"], "There is no run to resume below ./runs"),
        (["pretrain", "--resume", "x", "--out", "y"], "Name the run's folder once"),
        (["pretrain", "--resume", "nowhere"], "There is no run to resume in nowhere: it has no run.toml."),
        (["prune", "--sparsity", "0.5", "--pattern", "2:4"], "exactly one of pattern, sparsity"),
        (["sample", "--count", "0"], "[request] count=0 must be >= 1."),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(args, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(run(*args), 2, said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[oops", "is no valid TOML"),
        ('[plugins.a]\nmodul = "x"\n', "unknown key 'modul'. Did you mean 'module'?"),
    ],
)
@pytest.mark.parametrize("way", ["option", "late option", "environment"])
def test_a_named_registry_file_that_is_wrong_is_a_mistake(tmp_path, text, said, way):
    path = tmp_path / "registry.toml"
    path.write_text(text)
    if way == "environment":
        result = run("list", MASKWRIGHT_REGISTRY=str(path))
    else:
        args = ["--registry", str(path), "list"]
        result = run(*(args if way == "option" else ["list", *args[:2]]))
    fails(result, 2, said)
    assert str(path) in result.stderr


def test_an_installed_registry_file_that_is_wrong_is_none(site: Site):
    site.install("torn", {"torn/__init__.py": "", "torn/registry.toml": "[oops"})
    assert run("list").exit_code == 0
    assert run("info", "tube").exit_code == 0


def test_a_plugin_that_breaks_is_exit_code_1(site: Site):
    site.good("breaks", top="raise RuntimeError('one\\ntwo')")
    fails(run("show", "breaks"), 1, "could not be imported: RuntimeError: one two")
    assert "Traceback" in run("--debug", "show", "breaks").stderr
    assert "RuntimeError: one" in run("show", "breaks", "--debug").stderr


def test_files_that_cannot_be_written_or_read_are_exit_code_1_and_2(tmp_path):
    fails(
        run("show", "random", "--out", str(tmp_path / "no" / "mask.png")),
        1,
        "cannot be written: No such file",
    )
    fails(run("show", "random", "--image", str(tmp_path / "none.jpg")), 2, "none.jpg does not exist.")
    (tmp_path / "text.jpg").write_text("no image")
    fails(run("show", "random", "--image", str(tmp_path / "text.jpg")), 2, "cannot be read as an image")
    fails(
        run("show", "tube", "--image", str(tmp_path / "text.jpg")),
        2,
        "does not mask images on a grid 4 × 14 × 14",
    )


@pytest.fixture
def planted(monkeypatch):
    """A command that does what the test wants."""

    def plant(action) -> None:
        monkeypatch.setitem(cli.table, "planted", ("nowhere:x", "Does something."))
        monkeypatch.setitem(cli.commands, "planted", click.Command("planted", callback=action))

    return plant


def raising(error: BaseException):
    def action() -> None:
        raise error

    return action


def test_any_other_exception_is_one_line_that_points_to_debug(planted):
    planted(raising(ZeroDivisionError("division by\nzero.")))
    fails(
        run("planted"), 1, "ZeroDivisionError: division by zero. Run it again with --debug for the traceback."
    )
    assert "Traceback" in run("--debug", "planted").stderr
    planted(raising(KeyError()))
    fails(run("planted"), 1, "Error: KeyError. Run it again")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "Interrupted."),
        (click.Abort(), 1, "Aborted."),
        (click.ClickException("no such thing"), 1, "no such thing."),
        (OutputError("The disk is full."), 1, "The disk is full."),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_other_ends(planted, error, code, said):
    planted(raising(error))
    fails(run("planted"), code, said)


def test_an_exit_code_of_a_command_is_kept(planted):
    planted(raising(SystemExit(3)))
    assert run("planted").exit_code == 3
    planted(lambda: None)
    assert run("planted").exit_code == 0
    planted(raising(click.exceptions.Exit(4)))
    assert run("planted").exit_code == 4


def test_a_reader_who_leaves_early_is_no_error(planted):
    planted(raising(BrokenPipeError(32, "Broken pipe")))
    assert run("planted").stderr == ""


def test_of_many_processes_the_first_says_what_all_did_wrong(planted):
    assert run("info", "rndom", RANK="1").stderr == ""
    assert run("info", "rndom", RANK="1").exit_code == 2
    assert run("info", "rndom", RANK="0").stderr.startswith("Error: There is no component")
    planted(raising(OutputError("The disk is full.")))
    assert run("planted", RANK="1").stderr == "Error: [process 1] The disk is full.\n"


def test_click_can_still_be_used_without_the_last_word():
    with pytest.raises(click.UsageError):
        cli.main(["lst"], prog_name="maskwright", standalone_mode=False)


def test_help_and_version():
    assert run("--version").stdout == f"maskwright {maskwright.__version__}\n"
    output = run("--help").stdout
    assert "pretrain" in output
    assert "--registry" in output
    help_of_list = run("list", "--help").stdout
    assert "Examples:" in help_of_list
    assert "--registry" not in help_of_list  # it may stand there, but it is told once


def test_global_options_may_stand_on_either_side(tmp_path, site: Site):
    path = tmp_path / "mine.toml"
    path.write_text(catalogue("mine", "./a.py", "my-mask"))
    site.good("third", "third-mask")
    for args in (["--registry", str(path), "list"], ["list", "--registry", str(path)]):
        assert "my-mask" in run(*args).stdout
    for args in (["--no-third-party", "list"], ["list", "--no-third-party"]):
        assert "third-mask" not in run(*args).stdout
    assert "third-mask" in run("list").stdout


# -- as programs ---------------------------------------------------------------------------------------------


def test_the_module_is_the_command(tmp_path):
    done = shell("--version")
    assert (done.returncode, done.stdout) == (0, f"maskwright {maskwright.__version__}\n")
    wrong = shell("lst")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "Error: There is no command 'lst'. Did you mean 'list'? See `maskwright --help`.\n"


def test_output_is_plain_when_piped_and_survives_any_encoding():
    done = shell("list")
    assert "\x1b[" not in done.stdout
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "60"}
    done = shell("list", env=ascii_only)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_a_terminal_gets_colour_unless_no_color_is_set(no_color, coloured):
    ours, theirs = os.openpty()
    env = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-m", "maskwright", "list"], stdout=theirs, env=env)
    os.close(theirs)
    output = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break
        if not part:
            break
        output += part
    os.close(ours)
    assert process.wait(30) == 0
    assert (b"\x1b[" in output) is coloured


def test_a_pipe_that_closes_is_quiet():
    process = subprocess.Popen(
        [sys.executable, "-m", "maskwright", "list", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait(30)


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_ctrl_c_is_one_line(tmp_path):
    started = tmp_path / "started"
    (tmp_path / "slow.py").write_text(f"import time\nopen({str(started)!r}, 'w').close()\ntime.sleep(60)\n")
    registry = tmp_path / "registry.toml"
    registry.write_text(catalogue("slow", "./slow.py", "slow"))
    process = subprocess.Popen(
        [sys.executable, "-m", "maskwright", "--registry", str(registry), "show", "slow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (130, "", "Error: Interrupted.\n")


def test_paths_are_shown_as_one_would_type_them(tmp_path, monkeypatch):
    from maskwright.cli.tables import shown

    monkeypatch.chdir(tmp_path)
    assert shown(str(tmp_path / "a" / "b")) == str(Path("a") / "b")
    assert shown("/elsewhere") == "/elsewhere"
