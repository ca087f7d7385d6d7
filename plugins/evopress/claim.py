"""EvoPress's headline effect: at equal sparsity, levels found by evolution beat the uniform ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import maskwright
from maskwright import Budget, PruneTask
from maskwright.backbones.defaults import causal_language_model
from maskwright.jobs.claims import Claim
from maskwright.plugins.evopress.fitness import Fitness, Parent
from maskwright.plugins.evopress.pruner import EvoPress
from maskwright.plugins.evopress.search import Space, offspring, random_states, selected, switched
from maskwright.sources.text import TextSource, load_text
from maskwright.toolkit.masked import replaced
from maskwright.toolkit.prunable import prunable_weights

LENGTH, VOCABULARY, WIDTH, DEPTH = 64, 512, 64, 2
BATCH, STEPS, RATE = 32, 200, 4e-3
CALIBRATION, SPARSITY = 128, 0.7
GENERATIONS, OFFSPRING, SURVIVORS, TOKENS = 30, 16, (4, 1), (512, 4096)
DIFFERENCE = round(1e6 / 4096**2 * WIDTH**2)
"""Δ in proportion to the official 1,000,000 weights for layers of 4096²."""
WALK = 40
"""Most switches from the uniform levels of a candidate of the random search."""
LINEAR_RUNS = 10


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the tokens after the first, in nats."""
    logits = model(input_ids=batch["tokens"], use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())


def train(seed: int, source: TextSource) -> nn.Module:
    """A small Llama trained on the standard library's documentation."""
    model: nn.Module = causal_language_model(
        vocabulary=source.vocabulary, length=LENGTH, width=WIDTH, depth=DEPTH, seed=seed
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05, fused=True)
    for step in range(STEPS):
        loss = next_token_loss(model, source.batch(source.order(0)[step * BATCH : (step + 1) * BATCH], 0))
        rising, falling = (step + 1) / 20, 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.param_groups[0]["lr"] = RATE * min(rising, falling)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def perplexity(model: nn.Module, source: TextSource) -> float:
    """On the first 256 held-out sequences."""
    held_out = source.held_out
    rows = torch.arange(min(256, len(held_out))).split(64)
    losses = [next_token_loss(model, held_out.batch(part)) * len(part) for part in rows]
    return math.exp(float(sum(losses)) / sum(map(len, rows)))


def random_search(space: Space, fitness: Fitness, generator: torch.Generator) -> Tensor:
    """The best of as many random vectors as evolution looks at, selected in the same stages."""
    uniform = torch.zeros_like(space.lowest)
    found = uniform
    for _ in range(GENERATIONS):
        drawn = switched(uniform, space, OFFSPRING, WALK, generator)
        found, _ = selected(drawn, found, list(zip(SURVIVORS, TOKENS)), fitness)
    return found


def linear_optimum_found(seed: int) -> float:
    """Share of runs on a linear fitness, 4 of 16 layers, that are at the optimum after 60 generations."""
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.zeros(16, dtype=torch.int64)
    space = Space(zeros, torch.ones_like(zeros), zeros)
    right = 0
    for _ in range(LINEAR_RUNS):
        cost = torch.rand(16, generator=generator, dtype=torch.float64)
        parent = random_states(zeros, 4, 1, generator)[0]
        for _ in range(60):
            children = offspring(parent, space, 8, 3, generator)
            parent, _ = selected(children, parent, [(1, 1)], lambda some, _, cost=cost: some.double() @ cost)
        right += set(parent.nonzero()[:, 0].tolist()) == set(cost.argsort()[:4].tolist())
    return right / LINEAR_RUNS


def measure(seed: int) -> dict[str, float]:
    """Held-out perplexity of the dense model and of the three allocations of the same levels, and their KL in calibration."""
    source = load_text(length=LENGTH, vocabulary=VOCABULARY, seed=seed)
    model = train(seed, source)
    result = {"dense": perplexity(model, source)}
    pruner = maskwright.create("pruner", "evopress", weights_diff=DIFFERENCE)
    assert isinstance(pruner, EvoPress)
    batches = [source.batch(part, 0) for part in source.order(0)[:CALIBRATION].split(64)]
    task = PruneTask(Budget(sparsity=SPARSITY), batches, generator=torch.Generator().manual_seed(seed))
    weights = prunable_weights(model)
    units, space = pruner.sparse(model, weights, task, SPARSITY, torch.device("cpu"))
    uniform = torch.zeros_like(space.lowest)
    with torch.no_grad(), replaced(model, weights) as replace:
        fitness = Fitness(model, task, units, replace, "kl")
        parent = Parent(uniform.clone())
        stages = list(zip(SURVIVORS, TOKENS))
        pruner.evolve(parent, space, fitness, task, GENERATIONS, OFFSPRING, stages)
        allocations = {
            "uniform": uniform,
            "random search": random_search(space, fitness, task.generator),
            "evopress": parent.levels,
        }
        for name, levels in allocations.items():
            kl = fitness.over_all(levels)
            result |= {name: perplexity(model, source), f"{name}, KL": kl}
    return {**result, "linear optimum found": linear_optimum_found(seed)}


def decide(measurements: Sequence[Mapping[str, float]]) -> bool:
    """The criterion, seed by seed."""
    return all(
        one["evopress"] < min(one["uniform"], one["random search"]) and one["linear optimum found"] == 1
        for one in measurements
    )


CLAIM = Claim(
    statement=f"at {SPARSITY:.0%} sparsity, levels per layer that evolution found give a lower held-out perplexity than the uniform "
    "ones, and it converges to the optimum of a linear fitness",
    baseline="SparseGPT of this registry at the uniform level, made from the same calibration set; and a random search over the same "
    "levels with as many evaluations and the same stages",
    criterion="in every seed, EvoPress's perplexity is below that of the uniform levels and that of the random search, and all "
    f"{LINEAR_RUNS} linear problems (4 of 16 layers, 60 generations of 8) are solved",
    measure=measure,
    decide=decide,
    paper="Llama and Mistral models at 70 %, and at 25-50 % of the depth: below uniform and OWL on every one (numbers not read)",
    note=f"a Llama of width {WIDTH} and depth {DEPTH}, trained here for {STEPS} steps on the standard library's documentation; "
    f"perplexities of held-out text, KL to the dense model on the {CALIBRATION} calibration sequences. {GENERATIONS} generations of "
    f"{OFFSPRING} instead of 400 of 64; Δ in proportion to the official one.",
)
