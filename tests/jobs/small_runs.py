"""Runs small enough for tests, in this process or in one of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from maskwright.jobs import execute
from maskwright.jobs.settings import Settings, resolve

SMALL = {
    "run.steps": 6,
    "run.batch_size": 8,
    "run.save_every": 2,
    "model.width": 16,
    "model.depth": 1,
    "model.heads": 2,
    "data.source": "digits",
    "objective.decoder_width": 16,
    "objective.decoder_depth": 1,
    "objective.decoder_heads": 2,
}

SCRIPT = """
import json, sys
from maskwright.errors import MaskwrightError
from maskwright.jobs import execute
from maskwright.jobs.settings import resolve
given, how = json.loads(sys.argv[1]), json.loads(sys.argv[2])
try:
    execute(resolve("pretrain", None, given), **how)
except MaskwrightError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def small(**changes: object) -> Settings:
    """Settings of a pretraining of seconds; `run__steps=4` changes run.steps."""
    return resolve("pretrain", None, changed(**changes))


def changed(**changes: object) -> dict[str, object]:
    return {**SMALL, **{name.replace("__", "."): value for name, value in changes.items()}}


def run(folder: Path, *, resume: bool = False, observers=(), **changes: object):
    return execute(small(**changes), folder=folder, resume=resume, observers=observers, quiet=True)


def lines(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without the seconds, which no two runs share."""
    whole = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in whole]


def process(
    folder: Path, *, launcher=(), resume=False, script=SCRIPT, env=None, **changes
) -> subprocess.Popen:
    """The same in a process of its own."""
    how = {"folder": str(folder), "resume": resume}
    return subprocess.Popen(
        [sys.executable, *launcher, _file(folder, script), json.dumps(changed(**changes)), json.dumps(how)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )


def _file(folder: Path, script: str) -> str:
    path = folder.with_suffix(".script.py")
    path.write_text(script)
    return str(path)


def wait_for_steps(started: subprocess.Popen, folder: Path, steps: int, seconds: float = 60) -> None:
    """Until the run has written `steps` lines of metrics."""
    end = time.monotonic() + seconds
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < steps:
        if started.poll() is not None:
            raise AssertionError(f"The run ended early:\n{started.communicate()[1]}")
        if time.monotonic() > end:
            started.send_signal(signal.SIGKILL)
            raise AssertionError(f"No {steps} steps in {seconds} seconds.")
        time.sleep(0.01)
