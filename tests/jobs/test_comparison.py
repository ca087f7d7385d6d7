"""A family under one budget: which rows there are, what each is run with, and that nothing stops the rest."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
from click.testing import CliRunner
from PIL import Image

from maskwright.cli import cli
from maskwright.cli.session import Session
from maskwright.errors import BadRunFile, Interrupted, UnknownComponent
from maskwright.jobs import claims, comparison, pictures, pretrain
from maskwright.jobs.comparison import Entry, Row, Terms
from maskwright.jobs.settings import resolve
from maskwright.registry import Registry

TINY = Terms(
    data=("digits",), steps=2, batch_size=8, seeds=(0, 1), width=16, depth=1, heads=2, everything=True
)

CATALOGUE = """
[plugins.mine]
module = "./mine.py"
family = "images"

[[plugins.mine.components]]
kind = "mask-strategy"
name = "left"
modalities = ["image"]

[[plugins.mine.components]]
kind = "mask-strategy"
name = "told"
modalities = ["image"]
needs = ["secret"]

[[plugins.mine.components]]
kind = "mask-strategy"
name = "frames"
modalities = ["video"]

[[plugins.mine.components]]
kind = "objective"
name = "follows"
modalities = ["image"]
needs = ["pixels"]
backbone = "patch"
[[plugins.mine.components.parameters]]
name = "teacher"
[[plugins.mine.components.parameters]]
name = "weight"
"""

MODULE = '''
from typing import Any

import attrs, torch
from maskwright import BoundObjective, Loss, Mask, adapt, hookimpl, setting

def strategy(title, kinds, asks=frozenset()):
    @attrs.frozen
    class Half:
        """Half."""
        kind, name, modalities, needs = "mask-strategy", title, frozenset(kinds), asks
        def draw(self, layout, *, signals, progress, generator):
            keep = torch.ones(layout.shape, dtype=torch.bool)
            keep[..., : layout.grid[-1] // 2] = False
            return Mask(keep)
    return Half

class Bound(BoundObjective):
    def __init__(self, backbone, teacher):
        super().__init__()
        self.backbone, self.head = backbone, torch.nn.Linear(backbone.width, 1)
    def forward(self, batch, mask, **rest):
        loss = self.head(self.backbone.patches(batch["pixels"])).square().mean()
        return Loss(loss, {"loss": loss})

@attrs.frozen
class Follows:
    """Follows."""
    kind, name, modalities, backbone = "objective", "follows", frozenset({"image"}), "patch"
    needs, provides, default_strategy = frozenset({"pixels"}), frozenset(), "left"
    teacher: Any = setting(None, "a folder", optional=True)
    weight: float = setting(1.0, "a number")
    def bind(self, backbone):
        assert self.teacher is not None, "no teacher"
        return Bound(adapt(backbone, "patch"), self.teacher)

@hookimpl
def maskwright_components():
    return [strategy("left", ["image"]), strategy("told", ["image"], frozenset({"secret"})), strategy("frames", ["video"]), Follows]
'''

CLAIM = """
from maskwright.jobs.claims import Claim
from maskwright.jobs.comparison import Entry, supervised
CLAIM = Claim("A holds", "B", "a > 1", lambda seed: {"a": 2.0 + seed}, lambda all: True)
"""


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Registry:
    """The built-in catalogue, of which only a plugin of our own is in the family."""
    folder = tmp_path / "plugin"
    folder.mkdir()
    (folder / "registry.toml").write_text(CATALOGUE)
    (folder / "mine.py").write_text(MODULE)
    (folder / "claim.py").write_text(CLAIM)
    known = Registry(files=[folder / "registry.toml"], third_party=False)
    every = known.plugins()
    monkeypatch.setattr(known, "plugins", lambda: [one for one in every if one.slug in ("baselines", "mine")])
    return known


def declare(registry: Registry, entries: str) -> None:
    folder = registry.plugin("mine").folder
    (folder / "claim.py").write_text(f"{CLAIM}\nENTRIES = {entries}\n")


def test_the_rows_are_the_baseline_the_objectives_and_the_strategies(registry):
    told = {row.name: row for row in comparison.rows(registry, "images", True)}
    assert list(told) == ["random × mae", "left × follows", "left × mae", "told × mae"]
    assert told["random × mae"].baseline
    assert told["told × mae"].refused == "needs secret, which mae does not provide"
    assert not told["left × mae"].refused


def test_declared_entries_take_the_objectives_place(registry):
    declare(
        registry,
        '(Entry({"objective.name": "follows", "objective.weight": 2.0}, {"objective.teacher": {"objective.name": "mae"}}),'
        ' Entry({"objective.name": "follows", "strategy.name": "random"}, name="another"))',
    )
    told = {row.name: row for row in comparison.rows(registry, "images", True)}
    assert list(told) == ["random × mae", "left × follows", "another", "left × mae", "told × mae"]
    assert (
        comparison.differences(told["left × follows"])
        == "objective.weight 2; teacher: mae, on the same budget before"
    )


@pytest.mark.parametrize("broken", ["1 / 0", '(Entry({"objective.name": "nonsense"}),)'])
def test_what_cannot_be_declared_is_a_refused_row(registry, broken):
    declare(registry, broken)
    refused = [
        row for row in comparison.rows(registry, "images", True) if row.refused and row.plugin == "mine"
    ]
    assert any("division by zero" in row.refused or "nonsense" in row.refused for row in refused)


def test_the_built_in_entries_resolve():
    own = Registry(third_party=False)
    chosen = comparison.rows(own, "images")
    assert len(chosen) > 5
    planned = comparison.tasks(chosen, Terms(data=("digits",), seeds=(0,)))
    for group in planned.values():
        for task in group:
            resolve("pretrain", None, task.settings, registry=own)


def test_all_rows_share_the_budget_and_equal_teachers_are_trained_once(registry):
    declare(
        registry, '(Entry({"objective.name": "follows"}, {"objective.teacher": {"objective.name": "mae"}}),)'
    )
    planned = comparison.tasks(comparison.rows(registry, "images", True), TINY)
    for (name, data, seed), group in planned.items():
        own = group[-1].settings
        assert (own["run.steps"], own["run.batch_size"], own["run.seed"]) == (2, 8, seed), name
        assert (own["data.source"], own["model.width"]) == (data, 16)
    teacher, own = planned["left × follows", "digits", 1]
    assert teacher is planned["random × mae", "digits", 1][-1], "the baseline's own run is the teacher"
    assert own.teachers == {"objective.teacher": teacher.folder}
    assert len({task.folder for group in planned.values() for task in group}) == 6


def test_a_function_makes_a_teacher(registry):
    declare(registry, '(Entry({"objective.name": "follows"}, {"objective.teacher": supervised}),)')
    chosen = comparison.rows(registry, "images", True)
    teacher, _ = comparison.tasks(chosen, TINY)["left × follows", "digits", 0]
    assert teacher.make is comparison.supervised
    assert teacher.folder == "digits/left-follows-teacher/seed-0"
    assert "teacher: trained with the labels, on the same budget before" in comparison.differences(
        next(row for row in chosen if row.name == "left × follows")
    )


# -- running ---------------------------------------------------------------------------------------------------------


def test_a_verification_from_the_command_line_to_the_readme(registry, tmp_path, monkeypatch):
    """Two rows trained, a supervised teacher, one that fails, one that cannot be run; then the same resumed."""
    declare(
        registry,
        '(Entry({"objective.name": "follows"}, {"objective.teacher": supervised}),'
        ' Entry({"objective.name": "follows", "objective.weight": 3.0}, name="teacherless"))',
    )
    monkeypatch.setattr(Session, "registry", registry)
    monkeypatch.setattr(comparison, "Terms", lambda **given: attrs.evolve(TINY, **{"seeds": (0,), **given}))
    monkeypatch.setattr(claims, "built_in_catalogue", lambda: tmp_path / "registry.toml")
    monkeypatch.chdir(tmp_path)
    small = pictures.png(Image.new("RGB", (8, 6)))
    for chart in ("curve", "compared_curves", "dots"):
        monkeypatch.setattr(pictures, chart, lambda *_, **__: small)
    monkeypatch.setattr(pretrain, "PROBED", 120)
    monkeypatch.setattr(pretrain, "HELD_OUT", 16)
    (tmp_path / "README.md").write_text(
        "<!-- comparison-images -->\nold\n<!-- /comparison-images -->\nEnd.\n"
    )
    told = invoke("verify", "--family", "image", "--all", "--workers", "1", "--record")
    assert told.exit_code == 0
    assert "mine  reproduced" in told.stdout
    assert "teacherless  failed: AssertionError: no teacher" in told.stdout
    assert "told × mae  not run: needs secret" in told.stdout
    readme = (tmp_path / "README.md").read_text()
    assert "old\n" not in readme
    assert "| `random` × `mae` (baseline) | " in readme
    assert "| failed: AssertionError: no teacher |" in readme
    assert "teacher: trained with the labels, on the same budget before" in readme
    assert "| *always the commonest label* | " in readme
    assert readme.endswith("End.\n")
    root = tmp_path / "runs" / "verify-images-1"
    assert (root / "digits.html").is_file()
    assert not list(root.rglob("checkpoint"))
    assert (root / "digits" / "left-follows-teacher" / "seed-0" / "model" / "model.safetensors").is_file()

    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("summary.json")}
    assert len(stamps) == 3
    again = json.loads(invoke("verify", "--resume", "--workers", "1", "--json").stdout)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("summary.json")} == stamps, (
        "nothing ran twice"
    )
    assert again["results"][0]["verdict"] == "reproduced"
    row = next(one for one in again["comparison"]["rows"] if one["name"] == "left × follows")
    assert row["numbers"]["hidden"] == [0.5]
    assert len(row["numbers"]["linear_probe"]) == 1


def invoke(*arguments: str):
    result = CliRunner().invoke(cli, list(arguments), prog_name="maskwright")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def test_a_stopped_comparison_says_how_to_go_on(monkeypatch, tmp_path, registry):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "execute", stop)
    planned = comparison.tasks(comparison.rows(registry, "images", True)[:1], TINY)
    with pytest.raises(Interrupted, match=f"go on with: maskwright verify --resume {tmp_path}"):
        comparison.run_all(planned, tmp_path, registry, "images", TINY)


def test_a_run_that_was_killed_is_resumed_and_a_finished_one_left_alone(monkeypatch, tmp_path, registry):
    asked = []
    monkeypatch.setattr(comparison, "execute", lambda settings, **how: asked.append(how["resume"]))
    planned = comparison.tasks(
        comparison.rows(registry, "images", True)[:1], attrs.evolve(TINY, seeds=(0, 1, 2))
    )
    begun, done, new = (tmp_path / group[-1].folder for group in planned.values())
    for folder in (begun, done):
        folder.mkdir(parents=True)
        (folder / "run.toml").write_text("")
    (done / "summary.json").write_text('{"finished": true}')
    assert comparison.run_all(planned, tmp_path, registry, "images", TINY) == {}
    assert asked == [True, False]
    assert not new.exists()


def test_a_teacher_that_failed_fails_its_pupil_with_the_reason(monkeypatch, tmp_path, registry):
    declare(registry, '(Entry({"objective.name": "follows"}, {"objective.teacher": supervised}),)')
    planned = comparison.tasks(comparison.rows(registry, "images", True)[1:2], attrs.evolve(TINY, seeds=(0,)))
    teacher, own = planned["left × follows", "digits", 0]
    broken = attrs.evolve(teacher, make=lambda settings, folder: 1 / 0)
    failures = comparison.run_all({"x": [broken, own]}, tmp_path, registry, "images", TINY)
    assert failures[teacher.folder] == "ZeroDivisionError: division by zero"
    assert failures[own.folder] == "its teacher (objective.teacher) could not be made"


# -- the table -------------------------------------------------------------------------------------------------------


def summaries(root: Path, row: Row, planned, data: str, **numbers: float) -> None:
    for (name, of, seed), group in planned.items():
        if (name, of) == (row.name, data):
            folder = root / group[-1].folder
            folder.mkdir(parents=True)
            told = {key: value + seed / 100 for key, value in numbers.items()}
            (folder / "summary.json").write_text(json.dumps({"finished": True, **told}))
            (folder / "metrics.jsonl").write_text('{"step": 1, "masked": 0.5}\n{"step": 2, "masked": 0.7}\n')


def test_the_table_has_mean_and_spread_and_the_level_of_another_encoder(tmp_path, registry):
    chosen = [
        Row("a × b", Entry({"objective.name": "b"}), baseline=True),
        Row(
            "c × b",
            Entry({"objective.name": "b", "strategy.name": "c", "data.size": 64}, note="a note | more"),
        ),
        Row("d × b", Entry({"objective.name": "b", "strategy.name": "d"})),
    ]
    planned = comparison.tasks(chosen, TINY)
    usual = {"linear_probe": 0.8, "knn_probe": 0.7, "seconds_per_step": 0.02, "flops_per_step": 1e9}
    levels = {"linear_probe_before": 0.6, "knn_probe_before": 0.5, "chance": 0.1}
    summaries(tmp_path, chosen[0], planned, "digits", **usual, **levels)
    summaries(tmp_path, chosen[1], planned, "digits", **usual, **{**levels, "linear_probe_before": 0.65})
    failures = {planned["d × b", "digits", 0][-1].folder: "it broke"}
    measured = comparison.lines(chosen, planned, TINY, tmp_path, failures)
    text = comparison.markdown(measured, TINY, resolve("pretrain", None, TINY.overrides("digits", 0)))
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows[0].startswith("| `a` × `b` (baseline) | 80.5 ± 0.7 % | 70.5 ± 0.7 % | 60")
    assert "a note \\| more; its encoder untrained: 65.5 ± 0.7 % and 50.5 ± 0.7 % |" in rows[1]
    assert "data.size 64" in rows[1]
    assert rows[2] == "| `d` × `b` | failed: it broke |  |  |  |  |  |"
    assert rows[3].startswith("| *the baseline's encoder, untrained* | 60.5 ± 0.7 % | 50.5 ± 0.7 %")
    document = comparison.as_json(measured, TINY)
    assert document["rows"][0]["numbers"]["linear_probe"] == pytest.approx([0.8, 0.81])
    assert document["rows"][2]["failure"] == "it broke"


# -- the folder ------------------------------------------------------------------------------------------------------


def test_the_terms_are_remembered(tmp_path):
    comparison.remember(tmp_path / "v", "images", TINY)
    assert comparison.recall(tmp_path / "v") == ("images", TINY)
    with pytest.raises(BadRunFile, match="There is no verification to resume"):
        comparison.recall(tmp_path)
    (tmp_path / "verify.json").write_text("{}")
    with pytest.raises(BadRunFile, match="cannot be read"):
        comparison.recall(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hpm", "--only", "comparison"], "There is a comparison of the family images only"),
        (["--family", "pruning", "--steps", "3"], "There is a comparison of the family images only"),
        (["--resume", "x", "--family", "images"], "--resume goes on as it was begun"),
        (["--resume", "nowhere"], "There is no verification to resume in nowhere"),
        (["--resume"], "There is no verification to resume below ./runs"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    result = invoke("verify", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_other_families_have_verdicts_only(registry, tmp_path, monkeypatch):
    table = registry.plugin("mine")
    monkeypatch.setattr(registry, "plugins", lambda: [attrs.evolve(table, family="pruning")])
    monkeypatch.setattr(Session, "registry", registry)
    monkeypatch.chdir(tmp_path)
    told = invoke("verify", "--family", "pruning", "--all")
    assert told.exit_code == 0
    assert told.stdout.splitlines()[0] == "mine  reproduced"
    kept = tmp_path / "runs" / "verify-pruning-1" / "claims" / "mine.json"
    assert json.loads(kept.read_text())["verdict"] == "reproduced"
    monkeypatch.setattr(claims, "verify", lambda *_: pytest.fail("it was measured before"))
    assert invoke("verify", "--resume").stdout == told.stdout


def test_a_kept_claim_counts_only_while_the_claim_says_the_same(registry, tmp_path):
    plugin = registry.plugin("mine")
    result = claims.verify(plugin)
    claims.keep_result(result, tmp_path / "kept.json")
    assert claims.kept_result(plugin, tmp_path / "kept.json").measurements == result.measurements
    text = (tmp_path / "kept.json").read_text()
    (tmp_path / "kept.json").write_text(text.replace("A holds", "A held"))
    assert claims.kept_result(plugin, tmp_path / "kept.json") is None


def test_a_family_may_leave_out_its_plural(registry):
    assert claims.family_of(registry, "image") == claims.family_of(registry, "images") == "images"
    with pytest.raises(UnknownComponent, match="There is no family 'imag'"):
        claims.family_of(registry, "imag")
