"""Masks of a pruning on the dense model again."""

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from test_prune import llama, run, saved_model, text  # noqa: F401 - fixtures

from maskwright import Mask, save_masks
from maskwright.cli import cli
from maskwright.errors import BadData, OutputError
from maskwright.jobs.apply import apply_masks


def test_masks_on_the_dense_model_are_the_pruned_model_bit_for_bit(tmp_path, llama, text):  # noqa: F811
    pruned = run(tmp_path / "run", text, llama, pruner__name="magnitude").folder
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    done = CliRunner().invoke(
        cli, ["apply", str(llama), str(pruned / "masks.safetensors"), "--out", str(tmp_path / "sparse")]
    )
    assert done.exit_code == 0, done.output
    assert done.output.startswith("50.00% of ")
    again, wanted = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "sparse", pruned / "model")
    )
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    assert (tmp_path / "sparse" / "tokenizer.json").is_file()
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before, (
        "the dense model is untouched"
    )


def test_masks_of_another_model_are_refused_before_anything_is_written(tmp_path, llama):  # noqa: F811
    def masks(**shapes):
        path = tmp_path / "masks.safetensors"
        save_masks(path, {name: Mask(torch.ones(shape, dtype=torch.bool)) for name, shape in shapes.items()})
        return path

    target = tmp_path / "out"
    with pytest.raises(BadData, match="has no tensor other"):
        apply_masks(llama, masks(other=(4, 4)), target)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(BadData, match=r"is \[4, 4\], the weight in .* belong to different models"):
        apply_masks(llama, masks(**{name: (4, 4)}), target)
    assert not target.exists()
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    shape = load_file(llama / "model.safetensors")[name].shape
    with pytest.raises(OutputError, match="is not empty"):
        apply_masks(llama, masks(**{name: tuple(shape)}), target)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


def test_masks_of_a_change_are_not_applied_to_weights(tmp_path, llama):  # noqa: F811
    name = "model.layers.0.mlp.up_proj.weight"
    shape = load_file(llama / "model.safetensors")[name].shape
    path = tmp_path / "masks.safetensors"
    save_masks(path, {name: Mask(torch.ones(shape, dtype=torch.bool))}, of="difference")
    with pytest.raises(BadData, match="are of a model's change, not of its weights"):
        apply_masks(llama, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
