"""Claims: measured with seeds, decided by their own criterion, recorded where people read them."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest

from maskwright.errors import OutputError, PluginLoadError, UnknownComponent
from maskwright.jobs import claims
from maskwright.jobs.claims import (
    Claim,
    ClaimResult,
    load_claim,
    papers_table,
    record,
    record_papers,
    replace_block,
    spread,
    verify,
    with_claims,
)
from maskwright.registry import PluginInfo, Registry

CLAIM = Claim(
    statement="A beats B. By far.",
    baseline="B",
    criterion="mean of a above mean of b",
    measure=lambda seed: {"a": 2.0 + seed, "b": 1.0},
    decide=lambda all: sum(one["a"] for one in all) > sum(one["b"] for one in all),
    paper="a = 5",
)
SOURCE = """
from maskwright.jobs.claims import Claim
CLAIM = Claim("it holds", "nothing", "always", lambda seed: {"x": float(seed)}, lambda all: True, seeds=(4, 6))
"""


def result(claim: Claim = CLAIM) -> ClaimResult:
    return ClaimResult("mine", claim, tuple(claim.measure(seed) for seed in claim.seeds))


def plugin_in(folder: Path, source: str | None = SOURCE, **known: str) -> PluginInfo:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text("")
    if source is not None:
        (folder / "claim.py").write_text(source)
    return PluginInfo("mine", "./mine.py", source="file", folder=folder, **known)


def test_a_claim_is_measured_seed_by_seed(tmp_path):
    seen = []
    measured = verify(plugin_in(tmp_path), lambda done, total: seen.append((done, total)))
    assert measured.measurements == ({"x": 4.0}, {"x": 6.0})
    assert seen == [(1, 2), (2, 2)]
    assert measured.verdict == "reproduced"


def test_the_text_says_everything_a_reader_needs():
    text = result().text()
    assert text.splitlines() == [
        "mine: reproduced",
        "  claim     A beats B. By far.",
        "  baseline  B",
        "  criterion mean of a above mean of b",
        "  paper     a = 5",
        "  seeds     0, 1, 2",
        "    a  3 ± 1",
        "    b  1",
    ]


def test_the_criterion_alone_decides():
    lost = attrs.evolve(CLAIM, decide=lambda all: False, note="small")
    assert result(lost).verdict == "not reproduced at this scale"
    assert "  note      small" in result(lost).text()


def test_the_json_has_every_measurement_and_no_function():
    document = json.loads(json.dumps(result().as_json()))
    assert document["verdict"] == "reproduced"
    assert document["measurements"][1] == {"a": 3.0, "b": 1.0}
    assert "measure" not in document


@pytest.mark.parametrize(
    ("values", "said"), [([1.0], "1"), ([2.0, 2.0], "2"), ([1.0, 3.0], "2 ± 1.4"), ([0.12345678], "0.1235")]
)
def test_spread(values, said):
    assert spread(values) == said


def test_a_plugin_without_a_claim_says_so(tmp_path):
    for source in (None, "CLAIM = 3", ""):
        (tmp_path / "claim.py").unlink(missing_ok=True)
        with pytest.raises(UnknownComponent, match="Plugin 'mine' has no claim"):
            load_claim(plugin_in(tmp_path, source))


def test_a_claim_that_cannot_be_imported_chains_the_cause(tmp_path):
    with pytest.raises(PluginLoadError, match="could not be imported: ZeroDivisionError") as caught:
        load_claim(plugin_in(tmp_path, "1 / 0"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_the_claim_of_an_installed_package_is_found(site):
    folder = site.good("claimer")
    (folder / "claim.py").write_text(SOURCE)
    site.install("lone", {"lone.py": "", "registry.toml": '[plugins.lone]\nmodule = "lone"\n'})
    registry = Registry()
    assert load_claim(registry.plugin("claimer")).seeds == (4, 6)
    with pytest.raises(UnknownComponent):
        load_claim(registry.plugin("lone"))


def test_which_plugins_have_claims(site):
    folder = site.good("claimer")
    (folder / "claim.py").write_text(SOURCE)
    (folder / "registry.toml").write_text(
        '[plugins.claimer]\nmodule = "claimer"\nfamily = "small"\n', "utf-8"
    )
    registry = Registry()

    def slugs(*names: str, **words: object) -> list[str]:
        return [one.slug for one in with_claims(registry, names, **words)]  # type: ignore[arg-type]

    assert "baselines" not in slugs()
    assert "claimer" not in slugs()
    assert "claimer" in slugs(third_party=True)
    assert slugs("claimer") == ["claimer"]
    assert slugs(third_party=True, family="small") == ["claimer"]
    with pytest.raises(UnknownComponent, match=r"There is no family 'smal'. Did you mean 'small'\?"):
        slugs(family="smal")
    with pytest.raises(UnknownComponent, match="There is no plugin 'clamer'"):
        slugs("clamer")


def test_recording_writes_json_and_the_readmes_block(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# mine\n\n<!-- claim -->\nold\n<!-- /claim -->\n\nAfter.\n")
    record(result(), tmp_path)
    assert json.loads((tmp_path / "claim.json").read_text())["slug"] == "mine"
    text = readme.read_text()
    assert text.startswith("# mine\n\n<!-- claim -->\n```\nmine: reproduced\n")
    assert text.endswith("```\n<!-- /claim -->\n\nAfter.\n")
    assert "old" not in text


def test_recording_needs_no_readme(tmp_path):
    record(result(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["claim.json"]


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        record(result(), tmp_path / "none")


def test_a_block_is_added_where_there_is_none():
    assert replace_block("text\n\n", "x", "new") == "text\n\n<!-- x -->\nnew\n<!-- /x -->\n"


def test_the_table_of_papers_has_a_row_for_each_paper(tmp_path, monkeypatch):
    own = Registry(built_in=False, third_party=False)
    told = {"paper": "arXiv:2401.00001", "title": "Masks | and more", "family": "images"}
    one = attrs.evolve(plugin_in(tmp_path / "a", **told), slug="a", source="built-in")
    two = attrs.evolve(
        plugin_in(tmp_path / "b", paper="NeurIPS 2015", title="Points"), slug="b", source="built-in"
    )
    three = attrs.evolve(plugin_in(tmp_path / "c", title="Baselines"), slug="c", source="built-in")
    monkeypatch.setattr(own, "plugins", lambda: [one, two, three])
    record(result(), tmp_path / "a")
    assert papers_table(own).splitlines()[2:] == [
        "| Points · [b](plugins/b/README.md) |  |  | not measured yet |",
        "| [Masks \\| and more](https://arxiv.org/abs/2401.00001) · [a](plugins/a/README.md) |  | A beats B | reproduced |",
    ]


def test_the_readme_gets_the_table_between_its_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "built_in_catalogue", lambda: tmp_path / "registry.toml")
    registry = Registry(third_party=False)
    assert record_papers(registry) is None
    readme = tmp_path / "README.md"
    readme.write_text("no marker")
    assert record_papers(registry) is None
    readme.write_text("Papers:\n<!-- papers -->\n<!-- /papers -->\nEnd.\n")
    assert record_papers(registry) == readme
    assert (
        readme.read_text() == f"Papers:\n<!-- papers -->\n{papers_table(registry)}\n<!-- /papers -->\nEnd.\n"
    )
