"""`show`: masks as text and as pictures, with what stands in for the signals."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from maskwright import AttentionMask, Layout, Mask, setting
from maskwright.cli import cli
from maskwright.cli.session import Session
from maskwright.jobs.demonstration import demonstrate
from maskwright.registry import Registry


@attrs.frozen
class Loudest:
    """Hides where the signal is largest; shows how far the training is."""

    kind: ClassVar[str] = "mask-strategy"
    name: ClassVar[str] = "loudest"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"patch_loss"})
    share: float = setting(0.25, "share that is hidden", ge=0, lt=1)

    def draw(self, layout, *, signals, progress, generator):
        count = int(self.share * progress * layout.positions)
        hidden = torch.zeros(layout.batch, layout.positions, dtype=torch.bool)
        hidden.scatter_(1, signals["patch_loss"].topk(count, dim=1).indices, True)
        return Mask(~hidden.view(layout.shape))


@attrs.frozen
class Words(Loudest):
    name = "words"
    modalities = frozenset({"text"})
    needs = frozenset({"tokens"})

    def draw(self, layout, *, signals, progress, generator):
        return Mask(signals["tokens"] % 2 == 0)


@attrs.frozen
class Own(Loudest):
    name = "own"
    modalities = frozenset({"graph"})
    needs = frozenset({"degree"})
    example_grids = ((5, 7),)

    @staticmethod
    def example_signals(layout, generator):
        return {"degree": torch.arange(layout.positions).float()[None]}

    def draw(self, layout, *, signals, progress, generator):
        return Mask((signals["degree"] < 10).view(layout.shape))


@attrs.frozen
class Causal(Loudest):
    name = "causal"
    modalities = frozenset({"text"})
    needs = frozenset()

    def draw(self, layout, *, signals, progress, generator):
        return AttentionMask.causal(layout.positions)


@pytest.fixture
def run(monkeypatch):
    """The command with these strategies registered."""
    registry = Registry(third_party=False)
    for one in (Loudest, Words, Own, Causal):
        registry.register(one)
    monkeypatch.setattr(Session, "registry", registry)

    def call(*args: str, **env: str) -> Result:
        result = CliRunner().invoke(cli, ["show", *args], env=env, prog_name="maskwright")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    return call


def drawn(text: str) -> np.ndarray:
    """The boolean mask that framed half blocks show."""
    lines = [line[1:-1] for line in text.splitlines() if line.startswith("│")]
    rows = []
    for line in lines:
        rows.append([cell in "█▀" for cell in line])
        rows.append([cell in "█▄" for cell in line])
    return np.array(rows)


def test_the_text_is_the_mask(run):
    result = run("random", "--seed", "3", "--set", "ratio=0.5", "--grid", "6x10")
    strategy = Registry(third_party=False).create("mask-strategy", "random", ratio=0.5)
    expected = strategy.draw(
        Layout(1, (6, 10), patch_size=16),
        signals={},
        progress=0.5,
        generator=torch.Generator().manual_seed(3),
    )
    assert (drawn(result.stdout) == expected.keep[0].numpy()).all()
    assert (
        "Random(ratio=0.5, truncated='visible') on 6 × 10: 50.0% hidden (seed 3, progress 0.5)"
        in result.stdout
    )


def test_other_seeds_give_other_masks_and_equal_ones_the_same(run):
    assert run("random").stdout == run("random").stdout
    assert run("random").stdout != run("random", "--seed", "1").stdout.replace("seed 1", "seed 0")


def test_a_signal_is_computed_from_the_photograph_and_that_is_said(run, tmp_path):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[16:32, 32:48] = np.random.default_rng(0).integers(0, 255, (16, 16, 3))
    Image.fromarray(picture).save(tmp_path / "spot.png")
    result = run("loudest", "--grid", "4x4", "--image", str(tmp_path / "spot.png"), "--set", "share=0.125")
    keep = drawn(result.stdout)
    assert not keep[1, 2]  # the only patch with something in it
    assert keep.sum() == 15
    assert "patch_loss: the variance of each patch stands in" in result.stdout


def test_progress_is_given_to_the_strategy(run):
    assert "0.0% hidden" in run("loudest", "--progress", "0").stdout
    assert "25.0% hidden (seed 0, progress 1)" in run("loudest", "--progress", "1").stdout


def test_frames_lie_side_by_side_as_far_as_they_fit(run):
    wide = run("tube", COLUMNS="120").stdout.splitlines()
    assert wide[0].count("┌") == 4
    narrow = run("tube", COLUMNS="40").stdout.splitlines()
    assert narrow[0].count("┌") == 2
    assert sum(line.count("┌") for line in narrow) == 4
    assert max(map(len, narrow[:18])) <= 40


def test_a_sequence_is_broken_into_lines(run):
    lines = run("random", "--grid", "100", COLUMNS="42").stdout.splitlines()
    assert [len(line) for line in lines[:3]] == [40, 40, 20]
    assert sum(line.count("█") for line in lines) == 25


def test_tokens_are_made_up_and_that_is_said(run):
    result = run("words")
    assert "on 128" in result.stdout
    assert "tokens: example values, drawn at random" in result.stdout


def test_a_strategy_brings_its_own_grid_and_signals(run):
    result = run("own")
    assert drawn(result.stdout)[:5].sum() == 10
    assert "on 5 × 7" in result.stdout
    assert "degree: example values" in result.stdout


def test_an_attention_rule_is_drawn_as_queries_and_keys(run, tmp_path):
    keep = drawn(run("causal", "--grid", "12").stdout)
    assert (keep == np.tri(12, dtype=bool)).all()
    coarse = drawn(run("causal", "--grid", "100", COLUMNS="42").stdout)
    assert coarse.shape[1] <= 40
    assert not coarse[0, 1:].any()
    run("causal", "--grid", "12", "--out", str(tmp_path / "rule.png"))
    with Image.open(tmp_path / "rule.png") as image:
        assert image.width == image.height


def test_the_picture_covers_what_is_hidden(run, tmp_path):
    white = tmp_path / "white.png"
    Image.new("RGB", (300, 200), "white").save(white)
    out = tmp_path / "mask.png"
    result = run("random", "--grid", "4x6", "--image", str(white), "--out", str(out))
    assert result.stdout.splitlines()[-1] == f"wrote {out}"
    with Image.open(out) as image:
        assert image.size == (6 * 16, 4 * 16)
        corners = np.array(image.convert("L"))[::16, ::16]
    assert ((corners == 255) == drawn(result.stdout)).all()


def test_what_is_no_image_is_drawn_as_cells(run, tmp_path):
    for args in (["words"], ["tube"], ["own"]):
        out = tmp_path / f"{args[0]}.png"
        assert run(*args, "--out", str(out)).exit_code == 0
        with Image.open(out) as image:
            assert image.width > image.height or args == ["own"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.png", "tube.png", "words.png"]


def test_a_demonstration_is_deterministic_and_leaves_the_global_generator():
    before = torch.get_rng_state()
    first, second = demonstrate(Loudest()), demonstrate(Loudest())
    assert torch.equal(first.mask.keep, second.mask.keep)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.photograph is not None
    assert first.photograph.shape == (3, 224, 224)
