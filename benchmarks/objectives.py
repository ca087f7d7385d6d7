"""Each image objective through maskwright against a loop written by hand, its memory, and what the backbone leaves over."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

import maskwright
from benchmarks.objectives_by_hand import BY_HAND, DECODER, resnet, vit
from benchmarks.timing import Row, interleaved, row, skipped
from maskwright import Layout, MaskedTraining, adapt
from maskwright.backbones import defaults, encode_visible
from maskwright.registry import Registry
from maskwright.testing.objectives import example_batch
from maskwright.testing.rules import made
from maskwright.toolkit.selection import random_mask

NAME = "image objectives: a training step over one by hand, its memory, and its share outside the backbone"
BATCH, REPEATS = 16, 21
MEMORY_BATCH, MEMORY_STEPS = 128, 2
BOUND, ENCODER_BOUND = 1.05, 0.45

Step = Callable[[], None]


def run() -> list[Row]:
    """Three rows for each objective of the catalogue, then what dropping hidden patches saves.

    On one thread, in seconds of this process: other programs are not counted.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [one for name in objectives() for one in of_objective(name)]
        return [*rows, *dropping()]
    finally:
        torch.set_num_threads(threads)


def objectives() -> list[str]:
    """The image objectives that work on one of the two networks, from the catalogue."""
    found = Registry(third_party=False).find(kind="objective", modality="image")
    return [info.name for info in found if info.backbone in ("patch", "grid", "conv")]


# -- the two loops ---------------------------------------------------------------------------------------------


def component(name: str) -> Any:
    """An objective with the kit's example sizes, and the small decoder of a job where it has one."""
    catalogue = Registry(third_party=False)
    kind = catalogue.component_class("objective", name)
    given = getattr(kind, "example_parameters", {})
    parameters = {parameter.name for parameter in catalogue.info(name, "objective").parameters}
    small = {key: value for key, value in DECODER.items() if key in parameters}
    return made(kind) if not small else kind(**{**(given() if callable(given) else given), **small})


def strategy_for(objective: Any) -> Any:
    """The strategy that a job would draw its masks with."""
    suited = getattr(objective, "default_strategy", "random")
    words = {"name": suited} if isinstance(suited, str) else dict(suited)
    return maskwright.create("mask-strategy", words.pop("name"), **words)


def training(name: str, rows: int) -> tuple[MaskedTraining, dict[str, Tensor]]:
    """An objective on its network through maskwright, with a batch."""
    objective = component(name)
    network = resnet() if objective.backbone == "conv" else vit()
    torch.manual_seed(0)
    model = MaskedTraining(network, strategy_for(objective), objective, total_steps=10_000).train()
    return model, example_batch(objective, model.backbone, rows, 0)


def through_maskwright(name: str, rows: int) -> Step:
    """A step as a user of `MaskedTraining` makes it."""
    model, batch = training(name, rows)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], fused=True)

    def step() -> None:
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_hand(name: str, rows: int) -> Step:
    """The same step, written by hand."""
    torch.manual_seed(0)
    model = BY_HAND[name]().train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], fused=True)
    _, batch = training(name, rows)

    def step() -> None:
        model(**batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        getattr(model, "after_step", lambda: None)()

    return step


LOOPS = {"maskwright": through_maskwright, "hand": by_hand}


def of_objective(name: str) -> list[Row]:
    """Time, memory and share of one objective."""
    known = name in BY_HAND
    steps = {loop: make(name, BATCH) for loop, make in LOOPS.items() if loop == "maskwright" or known}
    seconds = interleaved(steps, REPEATS, process_time)
    mine = seconds["maskwright"]
    speed = f"{1 / mine:.3g} steps a second, of {BATCH} images"
    reason = f"{speed}; no loop by hand is written for it"
    time = (
        row(f"{name}: a step", mine, seconds["hand"], BOUND, speed)
        if known
        else skipped(f"{name}: a step", reason)
    )
    memory = {loop: peak(name, loop) for loop in steps}
    return [time, memory_row(name, memory), outside(name)]


# -- memory ----------------------------------------------------------------------------------------------------


def peak(name: str, loop: str) -> float:
    """MiB by which the largest resident size of a process of its own grows over two steps, its model being made."""
    words = [sys.executable, "-m", "benchmarks.objectives", name, loop]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = Path(__file__).parents[1]
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["grown"]


def grown(name: str, loop: str) -> float:
    """What `peak` asks of its process."""
    torch.set_num_threads(1)
    step = LOOPS[loop](name, MEMORY_BATCH)
    before = largest()
    for _ in range(MEMORY_STEPS):
        step()
    return largest() - before


def largest() -> float:
    """MiB of this process's largest resident size so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says on Linux is inherited: a child begins with its parent's
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_row(name: str, memory: dict[str, float]) -> Row:
    mine, hand = memory["maskwright"], memory.get("hand")
    what = f"{name}: peak memory of the steps"
    if not hand:
        return skipped(what, f"{mine:.0f} MiB; no loop by hand is written for it")
    return {**skipped(what, f"{mine:.0f} MiB, by hand {hand:.0f} MiB"), "ratio": mine / hand}


# -- the share of the backbone ---------------------------------------------------------------------------------


def outside(name: str) -> Row:
    """The share of a step that is not the student's backbone: its calls in one step, repeated alone with their backward."""
    model, batch = training(name, BATCH)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], fused=True)
    calls: list[Step] = []
    with recorded(model.backbone, calls):
        model(**batch)["loss"].backward()

    def step() -> None:
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    def alone() -> None:
        for call in calls:
            call()

    seconds = interleaved({"step": step, "backbone": alone}, REPEATS // 2, process_time)
    rest = max(seconds["step"] - seconds["backbone"], 0.0)
    return row(f"{name}: share of the step outside the backbone", rest, seconds["step"])


@contextmanager
def recorded(backbone: Any, calls: list[Step]) -> Iterator[None]:
    """Within it, what the backbone is called with in training is kept, each as a call to repeat."""
    methods = [name for name in ("patches", "encode", "stem") if hasattr(backbone, name)]
    handles = []
    for name in methods:
        setattr(backbone, name, _recording(getattr(backbone, name), calls))
    for stage in getattr(backbone, "stages", ()):
        plain = stage.forward
        handles.append(stage.register_forward_hook(_hook(plain, calls)))
    try:
        yield
    finally:
        for name in methods:
            delattr(backbone, name)
        for handle in handles:
            handle.remove()


def _recording(call: Callable[..., Any], calls: list[Step]) -> Callable[..., Any]:
    def recording(*given: Any, **told: Any) -> Any:
        if torch.is_grad_enabled():
            calls.append(_again(call, given, told))
        return call(*given, **told)

    return recording


def _hook(call: Callable[..., Any], calls: list[Step]) -> Callable[..., None]:
    def hook(module: nn.Module, given: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            calls.append(_again(call, given, {}))

    return hook


def _again(call: Callable[..., Any], given: Any, told: Any) -> Step:
    given = [
        one.detach().requires_grad_(one.requires_grad) if isinstance(one, Tensor) else one for one in given
    ]

    def again() -> None:
        made = call(*given, **told)
        several = made if isinstance(made, list | tuple) else [made]
        torch.autograd.backward(list(several), [torch.ones_like(one) for one in several])

    return again


# -- what dropping hidden patches saves ------------------------------------------------------------------------

RATIO = 0.75
SMALL_VIT = {"image_size": 128, "patch_size": 8, "width": 192, "depth": 8, "heads": 3}


def dropping() -> list[Row]:
    """A visible-only encoder and its objective against an encoder of all tokens and its objective, on the same ViT."""
    rows = 4
    pixels = torch.randn(rows, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    backbone = adapt(defaults.vision_transformer(**SMALL_VIT), "patch")
    layout = Layout.of(backbone, {"pixels": pixels})
    mask = random_mask(layout, round(layout.positions * (1 - RATIO)), torch.Generator().manual_seed(0))
    token = nn.Parameter(torch.zeros(SMALL_VIT["width"]))

    def visible() -> None:
        encode_visible(backbone, backbone.patches(pixels) + backbone.positions, mask).sum().backward()

    def everything() -> None:
        tokens = torch.where(mask.flatten().keep[..., None], backbone.patches(pixels), token)
        prefix = backbone.prefix(rows)
        backbone.encode(torch.cat([prefix, tokens + backbone.positions], 1)).sum().backward()

    def objective(name: str, **parameters: Any) -> Step:
        model = MaskedTraining(
            defaults.vision_transformer(**SMALL_VIT),
            maskwright.create("mask-strategy", "random", ratio=RATIO),
            maskwright.create("objective", name, **parameters),
        )
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step() -> None:
            model(pixels=pixels)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    seconds = interleaved(
        {
            "visible": visible,
            "everything": everything,
            "mae": objective("mae", **DECODER),
            "simmim": objective("simmim"),
        },
        REPEATS // 3,
        process_time,
    )
    return [
        row(
            f"encoder of the visible patches at {RATIO} over one with mask tokens",
            seconds["visible"],
            seconds["everything"],
            ENCODER_BOUND,
            "a ViT of 256 patches, width 192, depth 8: forward and backward",
        ),
        row(
            f"a step of mae at {RATIO} over a step of simmim",
            seconds["mae"],
            seconds["simmim"],
            ENCODER_BOUND,
            "the same ViT; mae's decoder is 64 wide and 2 deep, and sees every position",
        ),
    ]


if __name__ == "__main__":
    print(json.dumps({"grown": grown(*sys.argv[1:3])}))
