"""A run's settings: defaults < run file < overrides, checked, and written back."""

from __future__ import annotations

import tomllib
from pathlib import Path

import attrs
import pytest

from maskwright import component, setting
from maskwright.errors import (
    BadBudget,
    BadParameter,
    BadRunFile,
    MissingSignal,
    UnknownComponent,
)
from maskwright.jobs.settings import JOBS, Settings, check, nested, resolve
from maskwright.registry import Registry


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry(third_party=False)


def run_file(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, "utf-8")
    return path


# -- what is decided -----------------------------------------------------------------------------------------


def test_a_pretraining_without_arguments_is_whole(registry):
    settings = resolve("pretrain", registry=registry)
    assert settings.require("strategy").name == "random"
    assert settings.require("objective").name == "mae"
    assert settings.data.source == "photographs"
    assert settings.model.source == "default"
    assert settings.run.betas == (0.9, 0.95)
    assert None not in (settings.run.steps, settings.run.batch_size, settings.run.lr, settings.model.width)
    assert settings.pruner is settings.sampler is settings.budget is settings.request is None
    check(settings, registry)


@pytest.mark.parametrize(
    ("job", "sections"),
    [("prune", {"pruner", "budget", "prunable", "output"}), ("sample", {"sampler", "request"})],
)
def test_the_other_jobs_have_their_own_sections(registry, job, sections):
    settings = resolve(job, registry=registry)
    tables = settings.as_dict()
    assert set(tables) == {"run", "model", "data"} | sections
    assert settings.data.source == "standard-library"


def test_a_run_file_is_stronger_than_defaults_and_overrides_than_it(registry, tmp_path):
    path = run_file(tmp_path, "[run]\nsteps = 7\nseed = 1\n[strategy]\nratio = 0.5\n")
    settings = resolve("pretrain", path, {"run.seed": 2, "run": {"lr": 1}}, registry=registry)
    assert (settings.run.steps, settings.run.seed, settings.run.lr) == (7, 2, 1.0)
    assert settings.require("strategy").params == {"ratio": 0.5}
    assert settings.run.batch_size == resolve("pretrain", registry=registry).run.batch_size


def test_another_component_drops_the_parameters_of_the_one_it_replaces(registry, tmp_path):
    path = run_file(tmp_path, '[strategy]\nname = "random"\nratio = 0.9\n')
    settings = resolve("pretrain", path, {"strategy.name": "block"}, registry=registry)
    assert dict(settings.require("strategy").params) == {}
    again = resolve("pretrain", path, {"strategy.name": "random"}, registry=registry)
    assert again.require("strategy").params == {"ratio": 0.9}


def test_another_budget_replaces_the_one_of_the_file(registry, tmp_path):
    path = run_file(tmp_path, '[budget]\npattern = "2:4"\n')
    assert resolve("prune", path, {"budget.sparsity": 0.5}, registry=registry).budget == {"sparsity": 0.5}


def test_embedded_data_decide_the_sizes(registry):
    digits = resolve("pretrain", None, {"data.source": "digits"}, registry=registry)
    assert (digits.data.size, digits.model.patch_size) == (8, 2)
    photographs = resolve("pretrain", registry=registry)
    assert photographs.data.size > 8
    assert photographs.data.size % photographs.model.patch_size == 0


def test_a_model_folder_decides_its_own_sizes(registry, tmp_path, monkeypatch):
    (tmp_path / "vit").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = resolve(
        "pretrain", None, {"model.source": "vit", "data.source": "~/photos"}, registry=registry
    )
    assert settings.model.source == str(tmp_path / "vit")
    assert settings.data.source == str(Path.home() / "photos")
    assert settings.model.width is None
    assert settings.data.size is None


def test_an_objective_may_bring_its_strategy(tmp_path):
    own = Registry(third_party=False)
    mae = own.component_class("objective", "mae")

    def named(name: str, suited: object) -> None:
        own.register(type("Learner", (mae,), {"name": name, "default_strategy": suited}))

    named("by-name", "block")
    named("by-table", {"name": "random", "ratio": 0.1})
    settings = resolve("pretrain", None, {"objective.name": "by-name"}, registry=own)
    assert settings.require("strategy").name == "block"
    settings = resolve("pretrain", None, {"objective.name": "by-table"}, registry=own)
    assert settings.require("strategy").params == {"ratio": 0.1}
    settings = resolve(
        "pretrain", None, {"objective.name": "by-table", "strategy.name": "tube"}, registry=own
    )
    assert settings.require("strategy").name == "tube"


@attrs.frozen
class Wrapper:
    """Wraps another strategy."""

    kind, name = "mask-strategy", "wrapper"
    modalities, needs = frozenset({"image"}), frozenset()
    inner: object = setting(None, "what is wrapped", optional=True)

    def draw(self, layout, *, signals, progress, generator): ...


def test_a_component_inside_a_component_is_a_table_with_a_name():
    own = Registry(third_party=False)
    own.register(Wrapper)
    given = {"strategy.name": "wrapper", "strategy.inner.name": "random", "strategy.inner.ratio": 0.25}
    section = resolve("pretrain", None, given, registry=own).require("strategy")
    assert section.create(own).inner == own.create("mask-strategy", "random", ratio=0.25)
    other = {**given, "strategy.inner": {"kind": "objective", "name": "mae", "norm_pix": False}}
    section = resolve("pretrain", None, other, registry=own).require("strategy")
    assert section.create(own).inner == own.create("objective", "mae", norm_pix=False)


@attrs.frozen
class Around:
    """Wraps an objective, which may be given by its name."""

    kind, name, backbone = "objective", "around", "patch"
    modalities, needs, provides = frozenset({"image"}), frozenset({"pixels"}), frozenset()
    inner: object = component("objective", "simmim", "what is wrapped")

    def bind(self, backbone): ...


@pytest.mark.parametrize("inner", ["mae", {"name": "mae"}, {"name": "mae", "decoder_depth": 1}])
def test_an_objective_inside_an_objective_gets_its_own_defaults(inner):
    own = Registry(third_party=False)
    own.register(Around)
    given = {"objective": {"name": "around", "inner": inner}}
    settings = resolve("pretrain", None, given, registry=own)
    made = settings.require("objective").create(own).inner
    assert (made.name, made.decoder_width) == ("mae", 64)
    assert made.decoder_depth == (1 if "decoder_depth" in inner else 2)
    assert settings.require("strategy").name == "random"
    check(settings, own)
    again = resolve("pretrain", None, tomllib.loads(settings.toml()), registry=own)
    assert again == settings


def test_an_objective_brings_the_strategy_of_the_one_inside_it():
    own = Registry(third_party=False)
    own.register(Around)
    settings = resolve("pretrain", None, {"objective.name": "around"}, registry=own)
    assert settings.require("strategy").name == "simmim-blocks"
    assert settings.require("objective").create(own).inner == own.create("objective", "simmim")
    own.register(type("Opinionated", (Around,), {"name": "opinionated", "default_strategy": "block"}))
    settings = resolve("pretrain", None, {"objective.name": "opinionated"}, registry=own)
    assert settings.require("strategy").name == "block"


def test_a_name_inside_is_looked_up_where_the_run_looks():
    own = Registry(third_party=False)
    own.register(Around)
    own.register(type("Private", (own.component_class("objective", "simmim"),), {"name": "private"}))
    settings = resolve(
        "pretrain", None, {"objective.name": "around", "objective.inner": "private"}, registry=own
    )
    assert settings.require("objective").create(own).inner.name == "private"
    unknown = resolve("pretrain", None, {"objective.name": "around"}, registry=own)
    unknown = attrs.evolve(unknown, objective=attrs.evolve(unknown.objective, params={"inner": "simmin"}))
    with pytest.raises(UnknownComponent, match="'simmim'"):
        check(unknown, own)


def test_one_parameter_of_an_inner_component_can_be_overridden(tmp_path):
    own = Registry(third_party=False)
    own.register(Wrapper)
    text = '[strategy]\nname = "wrapper"\ninner = { name = "random", ratio = 0.25 }\n'
    path = run_file(tmp_path, text)
    section = resolve("pretrain", path, {"strategy.inner.ratio": 0.5}, registry=own).require("strategy")
    assert section.create(own).inner == own.create("mask-strategy", "random", ratio=0.5)
    section = resolve("pretrain", path, {"strategy.inner.name": "block"}, registry=own).require("strategy")
    assert section.create(own).inner == own.create("mask-strategy", "block")


@pytest.mark.parametrize("job", JOBS)
def test_the_written_file_repeats_the_run(registry, tmp_path, job):
    first = resolve(job, None, {"run.seed": 3}, registry=registry)
    again = resolve(job, run_file(tmp_path, first.toml()), registry=registry)
    assert again == first
    assert f"repeat with: maskwright {job} run.toml" in first.toml()


def test_nothing_that_is_none_is_written(registry):
    tables = tomllib.loads(resolve("prune", registry=registry).toml())
    assert "steps" not in tables["run"]
    assert tables["budget"] == {"pattern": "2:4"}


def test_dotted_keys_and_tables_mean_the_same():
    assert nested({"a.b.c": 1, "a.b": {"d": 2}, "a": {"e": 3}}) == {"a": {"b": {"c": 1, "d": 2}, "e": 3}}
    assert nested({"a": 1, "a.b": 2}) == {"a": {"b": 2}}
    assert nested({"a.b": 2, "a": 1}) == {"a": 1}


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[run\n", "is no valid TOML"),
        ("[rum]\n", "pretrain has no section [rum]. Did you mean 'run'?"),
        ("[pruner]\n", "It is a section of prune. Legal: run, strategy, objective, model, data."),
        ("run = 3\n", "[run] must be a table such as [run] or run.key = …, not 3."),
        ("[run]\nstep = 3\n", "[run]: unknown key 'step'. Did you mean 'steps'"),
        ('[run]\nsteps = "many"\n', "steps must be a whole number, not 'many'."),
        ("[run]\nsteps = true\n", "steps must be a whole number, not True."),
        ("[run]\nsteps = 1.5\n", "steps must be a whole number, not 1.5."),
        ("[run]\nlr = []\n", "lr must be a number, not []."),
        ("[run]\nbetas = 0.9\n", "betas must be a list of numbers, not 0.9."),
        ("[run]\nbetas = ['a', 'b']\n", "betas must be a list of numbers"),
        ("[data]\nsource = 3\n", "source must be a text, not 3."),
        ("[strategy]\nname = 3\n", "[strategy]: name must be a text, not 3."),
        ('[run]\njob = "prune"\n', "this is of the job 'prune', not 'pretrain'; use `maskwright prune`."),
        ('[run]\njob = "bake"\n', "jobs are pretrain, prune, sample."),
    ],
)
def test_a_wrong_run_file_names_file_place_and_remedy(registry, tmp_path, text, said):
    path = run_file(tmp_path, text)
    with pytest.raises(BadRunFile) as caught:
        resolve("pretrain", path, registry=registry)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("job", "given", "said"),
    [
        ("pretrain", {"run.steps": 0}, "[run] steps=0 must be >= 1."),
        ("pretrain", {"run.lr": 0.0}, "[run] lr=0.0 must be > 0."),
        ("pretrain", {"run.betas": [0.9]}, "[run] betas=[0.9] must be two numbers in [0, 1)."),
        ("pretrain", {"run.betas": [0.9, 1.0]}, "must be two numbers in [0, 1)."),
        ("pretrain", {"model.width": 100, "model.heads": 3}, "width=100 must be a multiple of 2 × heads = 6"),
        ("pretrain", {"model.source": "/vit", "model.depth": 3}, "a model folder has its own sizes"),
        ("prune", {"budget.sparsity": 0.5, "budget.pattern": "2:4"}, "exactly one of pattern, sparsity"),
        ("prune", {"budget.sparse": 0.5}, "unknown key 'sparse'. Did you mean 'sparsity'"),
        ("sample", {"request.count": 0}, "[request] count=0 must be >= 1."),
        ("sample", {"run.steps": 3}, "unknown key 'steps'"),
    ],
)
def test_a_wrong_setting_is_told_what_is_legal(registry, job, given, said):
    with pytest.raises(BadRunFile) as caught:
        resolve(job, None, given, registry=registry)
    assert said in str(caught.value)


def test_unknown_jobs_and_objectives(registry):
    with pytest.raises(BadRunFile, match=r"There is no job 'pretain'. Did you mean 'pretrain'\?"):
        resolve("pretain", registry=registry)
    with pytest.raises(UnknownComponent, match="There is no objective 'mea'"):
        resolve("pretrain", None, {"objective.name": "mea"}, registry=registry)


def test_files_that_cannot_be_read(registry, tmp_path):
    with pytest.raises(BadRunFile, match="does not exist"):
        resolve("pretrain", tmp_path / "none.toml", registry=registry)
    with pytest.raises(BadRunFile, match="cannot be read: Is a directory"):
        resolve("pretrain", tmp_path, registry=registry)
    (tmp_path / "latin.toml").write_bytes(b'[data]\nsource = "caf\xe9"\n')
    with pytest.raises(BadRunFile, match="is no UTF-8 text"):
        resolve("pretrain", tmp_path / "latin.toml", registry=registry)


def test_check_finds_mistakes_before_anything_is_written(registry):
    def checked(job: str, **given: object) -> None:
        check(
            resolve(job, None, {key.replace("__", "."): value for key, value in given.items()}, registry=own),
            own,
        )

    own = Registry(third_party=False)
    own.register(type("Needy", (Wrapper,), {"name": "needy", "needs": frozenset({"echo"})}))
    own.register(type("Knife", (Wrapper,), {"kind": "pruner", "name": "knife", "prune": lambda *_: None}))
    with pytest.raises(BadParameter, match=r"ratio=2.0 must be in"):
        checked("pretrain", strategy__ratio=2)
    with pytest.raises(MissingSignal, match="'needy' needs the signal 'echo'"):
        checked("pretrain", strategy__name="needy")
    with pytest.raises(BadBudget, match=r"sparsity=1.5 must be in \[0, 1\)"):
        checked("prune", pruner__name="knife", budget__sparsity=1.5)
    with pytest.raises(BadBudget, match="must be N:M with 0 < N < M"):
        checked("prune", pruner__name="knife", budget__pattern="4:2")
    with pytest.raises(UnknownComponent):
        checked("sample", sampler__name="unheard-of")
    checked("prune", pruner__name="knife", budget__sparsity=0.5)


def test_a_section_that_a_job_has_is_required(registry):
    settings = resolve("pretrain", registry=registry)
    with pytest.raises(AssertionError, match="pruner"):
        settings.require("pruner")
    assert isinstance(settings, Settings)


def test_a_pruner_may_say_what_it_is_content_with_beside_the_embedded_model():
    own = Registry(third_party=False)

    @own.register
    @attrs.frozen
    class Thorough:
        """Takes its time."""

        kind = "pruner"
        name = "thorough"
        modalities = frozenset({"text"})
        budgets = frozenset({"sparsity"})
        small_parameters = {"rounds": 3}

        rounds: int = setting(1000, "rounds", ge=1)

        def prune(self, model, task):
            raise AssertionError

    def rounds(**given):
        return resolve("prune", None, {"pruner.name": "thorough", **given}, registry=own).pruner.params

    assert rounds() == {"rounds": 3}
    assert rounds(**{"pruner.rounds": 7}) == {"rounds": 7}
    assert rounds(**{"model.source": "./llama"}) == {}
