"""EvoPress's candidates per second, switched in memory, against loops that read the model again for each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import maskwright
from benchmarks.timing import Row, interleaved, row
from maskwright import Budget, PruneTask
from maskwright.backbones.defaults import causal_language_model
from maskwright.plugins.evopress.fitness import Fitness, divergence, predictions
from maskwright.plugins.evopress.levels import Unit
from maskwright.plugins.evopress.pruner import EvoPress
from maskwright.plugins.evopress.search import offspring
from maskwright.toolkit.calibration import run as run_model
from maskwright.toolkit.masked import replaced
from maskwright.toolkit.prunable import prunable_weights

NAME = "EvoPress: measuring candidates, a Llama of the embedded model's size at 60 %"
VOCABULARY, LENGTH, WIDTH, DEPTH, HEADS = 1024, 128, 128, 4, 4
SPARSITY, CANDIDATES, REPEATS = 0.6, 8, 5


class Reloading:
    """What one writes without a database in memory: a fresh model for each candidate, and its layers' levels on top."""

    def __init__(self, folder: Path, units: list[Unit], batch: dict[str, Tensor], dense: Tensor) -> None:
        self.folder, self.units, self.batch, self.dense = folder, units, batch, dense
        for unit in units:
            for place, versions in enumerate(unit.versions):
                values = {name: version.values.contiguous() for name, version in versions.items()}
                save_file(values, self._file(unit, place))

    def _file(self, unit: Unit, place: int) -> Path:
        return self.folder / f"{next(iter(unit.versions[place]))}.{place}.safetensors"

    def model(self) -> nn.Module:
        """The dense model, read from its folder."""
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder / "model").eval()

    @torch.no_grad()
    def by_files(self, candidates: Tensor) -> list[float]:
        """Each layer's level is read from a file that was written beforehand."""
        fitness = []
        for levels in candidates.tolist():
            model = self.model()
            for unit, level in zip(self.units, levels):
                for name, values in load_file(self._file(unit, level - unit.lowest)).items():
                    model.get_parameter(name).copy_(values)
            fitness.append(self.divergence(model))
        return fitness

    @torch.no_grad()
    def by_pruning(self, candidates: Tensor) -> list[float]:
        """Without levels made beforehand: the fresh model is pruned again, layer by layer, to each one's sparsity."""
        fitness = []
        pruner = maskwright.create("pruner", "wanda")
        for levels in candidates.tolist():
            model = self.model()
            kept: dict[str, float] = {}
            for unit, level in zip(self.units, levels):
                kept.update((name, one.keep.double().mean().item()) for name, one in unit.at(level).items())
            for name, share in kept.items():
                pruner.prune(model, PruneTask(Budget(sparsity=1 - share), [self.batch], prunable=_only(name)))
            fitness.append(self.divergence(model))
        return fitness

    def divergence(self, model: nn.Module) -> float:
        """On the whole minibatch."""
        return float(divergence(self.dense, predictions(run_model(model, self.batch).logits)).mean())


def _only(name: str) -> Callable[[nn.Module], dict[str, nn.Parameter]]:
    return lambda model: {name: model.get_parameter(name)}


@torch.no_grad()
def run() -> list[dict[str, Any]]:
    """Seconds of a generation's candidates over those of the reloading loops, and over evaluating alone."""
    transformers.utils.logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(0)
    model = causal_language_model(vocabulary=VOCABULARY, length=LENGTH, width=WIDTH, depth=DEPTH, heads=HEADS)
    model.eval()
    pruner = maskwright.create("pruner", "evopress", level="wanda", num_levels=4)
    assert isinstance(pruner, EvoPress)
    rows: list[Row] = []
    for sequences in (1, 16):
        tokens = torch.randint(0, VOCABULARY, (sequences, LENGTH), generator=generator)
        rows += compared(model, pruner, {"tokens": tokens}, generator)
    return rows


def compared(
    model: nn.Module, pruner: EvoPress, batch: dict[str, Tensor], generator: torch.Generator
) -> list[Row]:
    """The rows of one minibatch."""
    weights, count = prunable_weights(model), batch["tokens"].numel()
    task = PruneTask(Budget(sparsity=SPARSITY), [batch], generator=generator)
    units, space = pruner.sparse(model, weights, task, SPARSITY, torch.device("cpu"))
    candidates = offspring(torch.zeros_like(space.lowest), space, CANDIDATES, 3, generator)
    with tempfile.TemporaryDirectory() as name, replaced(model, weights) as replace:
        fitness = Fitness(model, task, units, replace, "kl")
        folder = Path(name)
        model.save_pretrained(folder / "model")
        naive = Reloading(folder, units, batch, torch.log_softmax(predictions(fitness.logits[0]), -1))
        # The loops do the same work: the same numbers come out.
        found = fitness(candidates, count)
        torch.testing.assert_close(
            found, torch.tensor(naive.by_files(candidates)).double(), rtol=1e-4, atol=1e-6
        )
        few = candidates[:1]
        seconds = interleaved(
            {
                "ours": lambda: fitness(candidates, count),
                "files": lambda: naive.by_files(candidates),
                "alone": lambda: [naive.divergence(model) for _ in candidates],
            },
            REPEATS,
        )
        again = interleaved({"pruning": lambda: naive.by_pruning(few)}, 1)["pruning"] * len(candidates)
    what = f"{CANDIDATES} candidates, {count} tokens each"
    return [
        row(
            f"{what}: over reading the model and pruning it again (Wanda, layer by layer)",
            seconds["ours"],
            again,
            0.2,
        ),
        row(
            f"{what}: over reading the model and every layer's level from files",
            seconds["ours"],
            seconds["files"],
            note="what is left is the forward, which no way of switching makes faster",
        ),
        row(f"{what}: over the forwards alone", seconds["ours"], seconds["alone"]),
    ]
