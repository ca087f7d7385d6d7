"""Sorting with a pointer and with a fixed dictionary, at and beyond the trained lengths; validity of every task's decodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import maskwright
from maskwright import Mask, SampleRequest
from maskwright.jobs.claims import Claim
from maskwright.plugins.pointer_networks.network import PointerLSTM
from maskwright.plugins.pointer_networks.objective import BoundPointer, Pointer, pointing
from maskwright.plugins.pointer_networks.tasks import TASKS, Task, sequences

WIDTH, BATCH, STEPS, RATE, CLIP = 64, 128, 800, 4e-3, 2.0
TRAINED, BEYOND, TESTED = (3, 4, 5, 6), (8, 10), 500
POINTER, FIXED = "pointer", "fixed dictionary"


class FixedDictionary(BoundPointer):
    """The paper's baseline: the same network and attention, a = softmax(u), d' = Σ a_j e_j, and a softmax over [d; d'] (section 2.2).

    Its dictionary has the positions of `size` inputs, and the end; of fewer inputs those that do not exist are left out.
    """

    def __init__(self, settings: Pointer, backbone: nn.Module, size: int) -> None:
        super().__init__(settings, backbone)
        self.predict = nn.Linear(2 * backbone.width, size + 1)
        with torch.no_grad():
            for parameter in self.predict.parameters():
                parameter.uniform_(-settings.spread, settings.spread)

    def scores(self, memory: Tensor, keep: Tensor, states: Tensor) -> Tensor:
        """[B, T, n + 1] for at most `size` inputs."""
        u = pointing(memory, states, self.w1, self.w2, self.v).masked_fill(~keep[:, None], -torch.inf)
        blended = u.softmax(-1) @ memory
        words = self.predict(torch.cat([states, blended], dim=-1))
        exists = nn.functional.pad(keep, (0, 1), value=True)
        of_inputs = torch.cat([words[..., : keep.shape[1]], words[..., -1:]], dim=-1)
        return of_inputs.masked_fill(~exists[:, None], -torch.inf)


def made(task: Task, kind: str, seed: int) -> BoundPointer:
    """A network of a seed, which leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        network = PointerLSTM(task.features, WIDTH)
        return (
            Pointer().bind(network) if kind == POINTER else FixedDictionary(Pointer(), network, max(TRAINED))
        )


def trained(bound: BoundPointer, task: Task, seed: int, *, steps: int, rows: int) -> BoundPointer:
    """Adam at a constant rate on lengths drawn uniformly, one length a batch; no visited mask in training."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(bound.parameters(), RATE)
    for _ in range(steps):
        n = TRAINED[int(torch.randint(len(TRAINED), (), generator=generator))] + (task.features > 1)
        batch = task.batch(rows, n, generator)
        bound(batch, Mask(torch.ones(rows, n, dtype=torch.bool))).total.backward()
        nn.utils.clip_grad_norm_(bound.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return bound.eval()


def decoded(bound: BoundPointer, task: Task, points: Tensor, *, rule: str, beams: int = 1) -> list[list[int]]:
    """The positions pointed at for [B, n, F]."""
    rows, n, _ = points.shape
    blank = torch.full((rows, task.longest(n) + 1), -1)
    sampler = maskwright.create("sampler", "pointer-decode", rule=rule, beams=beams)
    request = SampleRequest(blank, -1, torch.Generator())
    return sequences(sampler.sample(bound.denoiser(points), request).values, n)


def right(answers: Sequence[Sequence[int]], targets: Tensor) -> float:
    """Share of the sequences that are the target."""
    return sum(list(one) == two for one, two in zip(answers, targets.tolist())) / len(answers)


def tau(answers: Sequence[Sequence[int]], targets: Tensor) -> float:
    """Kendall's tau of permutations with the right ones, the mean: 1 for the same order, 0 by chance."""
    ranks = torch.empty_like(targets).scatter_(1, targets, torch.arange(targets.shape[1]).expand_as(targets))
    placed = ranks.gather(1, torch.tensor(answers))
    pairs = torch.triu_indices(*2 * [targets.shape[1]], offset=1)
    return float((placed[:, pairs[1]] - placed[:, pairs[0]]).sign().double().mean())


def validity(answers: Sequence[Sequence[int]], task: Task, n: int) -> float:
    """Share of the sequences that are an answer to the task at all."""
    return sum(task.valid(one, n) for one in answers) / len(answers)


def measure(seed: int) -> Mapping[str, float]:
    """One seed: both networks on sorting, and short trainings on the other tasks for the validity of what they decode."""
    sort, numbers = TASKS["sorting"], {}
    both = {
        kind: trained(made(sort, kind, seed), sort, seed, steps=STEPS, rows=BATCH)
        for kind in (POINTER, FIXED)
    }
    test = torch.Generator().manual_seed(10_000 + seed)
    valid: list[float] = []
    for n in (*TRAINED[1:], *BEYOND):
        batch = sort.batch(TESTED, n, test)
        for kind in (POINTER, FIXED) if n in TRAINED else (POINTER,):
            answers = decoded(both[kind], sort, batch["points"], rule=sort.rule)
            valid.append(validity(answers, sort, n))
            numbers[f"sorting, n = {n}, {kind}, right"] = right(answers, batch["targets"])
        if n in BEYOND:
            numbers[f"sorting, n = {n}, {POINTER}, Kendall's tau"] = tau(answers, batch["targets"])
        if n in (TRAINED[-1], BEYOND[-1]):
            loose = decoded(both[POINTER], sort, batch["points"], rule="anything")
            numbers[f"sorting, n = {n}, {POINTER}, valid without a mask"] = validity(loose, sort, n)
    for name in ("hull", "delaunay", "tour"):
        task = TASKS[name]
        bound = trained(made(task, POINTER, seed), task, seed, steps=40, rows=32)
        loose = []
        for n in (6, 12):
            points = torch.rand(100, n, 2, generator=test)
            valid += [
                validity(decoded(bound, task, points, rule=task.rule, beams=beams), task, n)
                for beams in (1, 3)
            ]
            loose.append(validity(decoded(bound, task, points, rule="anything"), task, n))
        numbers[f"{name}, after 40 steps, valid without a mask"] = sum(loose) / len(loose)
    return {"valid with the mask, all tasks and lengths, the least": min(valid), **numbers}


def decide(measurements: Sequence[Mapping[str, float]]) -> bool:
    """The criterion in code."""
    return all(
        one["valid with the mask, all tasks and lengths, the least"] == 1
        and all(
            one[f"sorting, n = {n}, {POINTER}, right"] > one[f"sorting, n = {n}, {FIXED}, right"]
            for n in TRAINED[1:]
        )
        and all(one[f"sorting, n = {n}, {POINTER}, Kendall's tau"] > 0.5 for n in BEYOND)
        for one in measurements
    )


CLAIM = Claim(
    statement="pointing at inputs is learned faster than naming them from a fixed dictionary and goes on beyond the trained lengths, "
    "and with visited positions masked every decode is valid",
    baseline="the same LSTMs and attention with a softmax over a dictionary of 6 positions and the end, trained alike",
    criterion="in every seed: every masked decode of all four tasks is valid; the pointer sorts more of 500 sequences exactly right "
    "at n = 4, 5 and 6; its order at n = 8 and 10 has a Kendall's tau above 0.5 (0 by chance)",
    measure=measure,
    decide=decide,
    seeds=(1, 2, 3),
    paper="hull, n = 50: LSTM 1.9 %, with attention 38.9 %, pointer 72.6 %; trained on 5-50: n = 100 50.3 %, n = 500 1.3 % right, "
    "99.2 % of the area",
    note="sorting is ours, the paper's tasks need far more steps (1 M examples each); lengths 3-6, width 64, 800 steps of 128 with Adam "
    "instead of SGD; the dictionary cannot name inputs beyond 6, so that nothing can be measured of it there; validity holds by "
    "construction, also for networks trained for 40 steps only; seed 0 was looked at while this was written",
)
