"""Observers are told of a run, and none of them can stop it."""

import sys
import textwrap

import pytest
import torch
from small_runs import lines, run, small

from maskwright import Mask, Registry, hookimpl
from maskwright.errors import PluginLoadError, UnknownComponent, UsageError
from maskwright.jobs import observers as observing
from maskwright.jobs.observers import Observers
from maskwright.jobs.run import Run


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes an importable module and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def write(name, code):
        (tmp_path / f"{name}.py").write_text("from maskwright import hookimpl\n" + textwrap.dedent(code))
        made.append(name)
        return name

    yield write
    for name in made:
        sys.modules.pop(name, None)


RECORDER = """
told = []

@hookimpl
def maskwright_run_started(run):
    told.append(("started", run.job, run.steps, run.settings["run"]["seed"]))

@hookimpl
def maskwright_mask_drawn(mask):
    told.append(("mask", tuple(mask.shape)))

@hookimpl
def maskwright_step_ended(run, metrics):
    told.append(("step", metrics["step"], metrics["loss"]))

@hookimpl
def maskwright_run_ended(result):
    told.append(("ended", result["finished"]))
"""


def test_the_four_hooks_are_called_in_order_with_what_they_ask_for(tmp_path, module):
    name = module("recorder_of_hooks", RECORDER)
    run(tmp_path / "run", observers=[name], run__steps=2, run__seed=5)
    first, second = lines(tmp_path / "run")
    assert sys.modules[name].told == [
        ("started", "pretrain", 2, 5),
        ("mask", (8, 4, 4)),
        ("step", 1, first["loss"]),
        ("mask", (8, 4, 4)),
        ("step", 2, second["loss"]),
        ("ended", True),
    ]


def test_an_observer_that_raises_is_reported_once_and_switched_off_and_others_go_on(tmp_path, module, capsys):
    bad = module(
        "raising_observer",
        """
        @hookimpl
        def maskwright_step_ended(run, metrics):
            raise ValueError("no colour")
        """,
    )
    good = module("watching_observer", RECORDER)
    result = run(tmp_path / "run", observers=[bad, good], run__steps=3)
    said = capsys.readouterr().err
    assert said.count("raised ValueError: no colour") == 1
    assert "'raising_observer'" in said
    assert "switched off and the run goes on" in said
    assert [event[0] for event in sys.modules[good].told].count("step") == 3
    assert result.summary["finished"]


def test_masks_and_steps_are_not_told_where_nobody_listens(tmp_path, monkeypatch):
    monkeypatch.setattr(Observers, "tell", lambda *_, **__: pytest.fail("nobody listens"))
    with Run(small(), folder=tmp_path, quiet=True) as quiet:
        quiet.mask_drawn(Mask(torch.ones(1, 2, dtype=torch.bool)))
        for step in quiet.steps(1, {}):
            quiet.log(step, loss=1.0)


def test_a_plugin_of_the_registry_is_found_by_its_slug_and_needs_no_components(tmp_path, module):
    module("observer_in_a_file", RECORDER)
    catalogue = tmp_path / "registry.toml"
    catalogue.write_text('[plugins.watcher]\nmodule = "observer_in_a_file"\n')
    registry = Registry(files=[catalogue], third_party=False)
    watching = Observers.named(["watcher"], registry)
    watching.tell("maskwright_run_ended", run=None, result={"finished": True})
    assert sys.modules["observer_in_a_file"].told == [("ended", True)]


def test_an_unknown_observer_is_named_with_those_that_are_like_it():
    with pytest.raises(UnknownComponent, match=r"no observer 'tensorbord'. Did you mean 'tensorboard'\?"):
        Observers.named(["tensorbord"], Registry(third_party=False))


def test_a_plugin_without_hooks_observes_nothing():
    with pytest.raises(UsageError, match="'baselines' observes nothing"):
        Observers.named(["baselines"], Registry(third_party=False))


def test_a_hook_with_an_argument_that_does_not_exist_is_said_at_once(module):
    name = module("wrong_observer", "@hookimpl\ndef maskwright_run_ended(outcome): ...\n")
    with pytest.raises(PluginLoadError, match="wrong_observer' has a hook that cannot be called"):
        Observers.named([name], Registry(third_party=False))


def test_an_observer_that_does_not_import_is_said_at_once(module):
    name = module("broken_observer", "raise OSError('no licence')\n")
    with pytest.raises(PluginLoadError, match="could not be imported: OSError: no licence"):
        Observers.named([name], Registry(third_party=False))


def test_a_wrong_observer_leaves_no_folder(tmp_path):
    with pytest.raises(UnknownComponent):
        run(tmp_path / "run", observers=["nobody"])
    assert not (tmp_path / "run").exists()


# -- TensorBoard ---------------------------------------------------------------------------------------------------


def test_tensorboard_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setattr("accelerate.utils.is_tensorboard_available", lambda: False)
    with pytest.raises(PluginLoadError, match=r"needs the package tensorboard: pip install tensorboard\."):
        Observers.named(["tensorboard"], Registry(third_party=False))


def test_tensorboard_gets_each_step_through_accelerates_tracker(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, **_):
            written.append(("folder", str(folder)))

        def add_scalar(self, name, value, global_step=None):
            written.append((name, value, global_step))

        def add_text(self, name, text, **_):
            written.append((name, text))

        def flush(self):
            pass

        def close(self):
            written.append("closed")

    # tensorboard itself is not among the packages that the tests need: a module in its place takes what is written.
    stand_in = type(sys)("tensorboardX")
    stand_in.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "tensorboardX", stand_in)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("accelerate.utils.is_tensorboard_available", lambda: True)
    run(tmp_path / "run", observers=["tensorboard"], run__steps=2)
    assert written[0] == ("folder", str(tmp_path / "run" / "tensorboard") + "/")
    assert "run.seed = 0" in written[1][1]
    losses = [(step["loss"], step["step"]) for step in lines(tmp_path / "run")]
    assert [one[1:] for one in written if one[0] == "loss"] == losses
    assert written[-1] == "closed"


def test_hooks_of_the_observers_are_those_that_are_specified():
    from maskwright import hookspecs

    specified = {name for name in vars(hookspecs) if name.startswith("maskwright_")}
    assert set(observing.HOOKS) == specified - {"maskwright_components"}
    assert hookimpl.project_name == "maskwright"
