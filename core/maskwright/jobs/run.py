"""`Run`: one job's folder, its steps, checkpoints, metrics and observers, in one process or several."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from maskwright.errors import (
    CheckpointError,
    Interrupted,
    MaskwrightError,
    NumericalError,
    OutputError,
    UsageError,
    reason,
)
from maskwright.jobs.checkpoint import (
    load_checkpoint,
    read_header,
    refuse_pickles,
    restore,
    save_checkpoint,
)
from maskwright.jobs.observers import Observers
from maskwright.jobs.settings import Settings, leaves
from maskwright.mask import Mask, save_masks, write_whole
from maskwright.protocols import RunInfo, Step
from maskwright.registry import Registry, default

RUNS = Path("runs")
"""Where a run's folder is made when none is named: runs/<job>-<n>."""

_STRIDE = 1_000_003
_WORDS_EVERY = 15.0
"""Seconds between lines about progress where there is no terminal."""

_FREE = ("log_every", "save_every")
"""Settings of [run] that may differ when a run is resumed: they do not change its numbers."""


@attrs.frozen
class Result:
    """What a job leaves: its folder, the content of summary.json, and report.html (None in all processes but the first)."""

    folder: Path
    summary: Mapping[str, Any]
    report: Path | None


class Run:
    """A job at work. It is a context manager: leaving it gives back signals, files, and the processes' group.

    `folder` is made here; with `resume` it must hold this run, which then goes on from its last checkpoint to the numbers
    that it would have had. Every step begins with the global generators seeded from (seed, step, process), so that their
    state is no part of a checkpoint. Raises `OutputError` for a folder that cannot be written or holds another run,
    `CheckpointError` for a checkpoint that is damaged, a pickle, or of a run with other settings.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        folder: str | os.PathLike[str] | None = None,
        resume: bool = False,
        observers: Sequence[str] = (),
        registry: Registry | None = None,
        quiet: bool = False,
        accelerator: Any = None,
    ) -> None:
        self.settings = settings
        self.registry = registry or default()
        self.quiet = quiet
        self._observers = Observers.named(observers, self.registry)
        self._owns_group = accelerator is None and not dist.is_initialized()
        self.accelerator = accelerator or _accelerator()
        self._exit = contextlib.ExitStack()
        self._exit.callback(self._leave_group)
        try:
            self.folder = Path(self._on_main(lambda: str(self._open(folder, resume))))
        except BaseException:
            self._exit.close()
            raise
        self.resumed = resume
        self.info = RunInfo(self.job, self.folder, settings.as_dict(), settings.run.steps or 0)
        self._loops = 0
        self._before = 0
        self._stop = False
        self._started = time.monotonic() - self._earlier_seconds()
        self._shown: _Progress | None = None
        if self._observers:
            self._observers.tell("maskwright_run_started", run=self.info)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._exit.close()
        if isinstance(error, UsageError) and self.is_main and not self.resumed:
            self._forget()

    def _forget(self) -> None:
        """Remove the folder of a run that was asked for wrongly and so never began."""
        if (self.folder / "metrics.jsonl").stat().st_size:
            return
        for name in ("run.toml", "metrics.jsonl"):
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _leave_group(self) -> None:
        if self._owns_group and dist.is_available() and dist.is_initialized():
            from accelerate.state import AcceleratorState

            dist.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)

    # -- what a job reads ----------------------------------------------------------------------------------

    @property
    def job(self) -> str:
        """ "pretrain", "prune" or "sample"."""
        return self.settings.run.job

    @property
    def seed(self) -> int:
        """The seed that everything random follows from."""
        return self.settings.run.seed

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def processes(self) -> int:
        """How many processes share the run."""
        return int(self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device(self.accelerator.device)

    @property
    def seconds(self) -> float:
        """How long the run has taken, what came before it was resumed included (up to its checkpoint)."""
        return time.monotonic() - self._started

    def generator(self, stream: int = 0) -> torch.Generator:
        """A CPU generator that follows from the run's seed; streams differ."""
        return torch.Generator().manual_seed((self.seed * _STRIDE + stream) % 2**63)

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Scalars by name, averaged over the processes. Every process must call it."""
        numbers = torch.stack([value.detach().double().reshape(()).cpu() for value in values.values()])
        if self.processes > 1:
            shared = numbers.to(self.device, torch.float32 if self.device.type == "mps" else torch.float64)
            dist.all_reduce(shared)
            numbers = shared.cpu() / self.processes
        return dict(zip(values, numbers.tolist()))

    def say(self, text: str) -> None:
        """A line for the person who waits, on stderr; nothing when the run is quiet."""
        if self.is_main and not self.quiet:
            if self._shown is not None:
                self._shown.say(text)
            else:
                print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def part(self, name: str, settings: Settings) -> Iterator[Run]:
        """A run inside this one, in its folder `name`: of another job, resumed when it was begun before."""
        folder = self.folder / name
        with Run(
            settings,
            folder=folder,
            resume=self._on_main(lambda: str((folder / "run.toml").exists())) == "True",
            registry=self.registry,
            quiet=self.quiet,
            accelerator=self.accelerator,
        ) as run:
            yield run

    # -- steps ---------------------------------------------------------------------------------------------

    def steps(self, total: int, state: Mapping[str, Any]) -> Iterator[Step]:
        """Loop over the steps: progress bar, a checkpoint every `save_every` steps and after the last, resume, Ctrl-C.

        `state` maps names to what is saved and, when the run is resumed, restored before the first step: objects with
        `state_dict` and `load_state_dict`, or generators. A job may loop several times; each loop has its own checkpoint.
        On Ctrl-C the step is finished, a checkpoint is saved, and `Interrupted` says how to go on; a second Ctrl-C does not
        wait for the step.
        """
        self._loops += 1
        path = self._checkpoint(self._loops)
        first = self._restore(path, state, total)
        every = self.settings.run.save_every or total
        rank = self.accelerator.process_index
        try:
            with self._progress(total, first) as shown, self._signals():
                for index in range(first, total):
                    torch.manual_seed(((self.seed * _STRIDE + self._before + index) * 1024 + rank) % 2**63)
                    yield Step(index, total)
                    shown.advance(index + 1)
                    stop = self._must_stop()
                    if stop or (index + 1) % every == 0 or index + 1 == total:
                        self._save(path, state, index + 1, total)
                    if stop and index + 1 < total:
                        raise Interrupted(
                            f"Stopped after step {index + 1} of {total}; go on with: {self.resume_command}"
                        )
        finally:
            self._shown = None
        self._before += total

    @property
    def resume_command(self) -> str:
        """What continues this run."""
        return f"maskwright {self.job} --resume {self.folder}"

    def due(self, step: Step) -> bool:
        """Whether `log` writes the numbers of this step: every `log_every`, the first and the last."""
        done = step.index + 1
        return done % (self.settings.run.log_every or 1) == 0 or done in (1, step.total)

    def log(self, step: Step, **metrics: float | Tensor) -> None:
        """Write a step's numbers to metrics.jsonl and tell the observers, when the step is `due`.

        Raises `NumericalError` for a number that is not finite. Every process must call it.
        """
        if not self.due(step):
            return
        values = {
            name: float(value.detach()) if isinstance(value, Tensor) else value
            for name, value in metrics.items()
        }
        number = self._before + step.index + 1
        for name, value in values.items():
            self.check_finite(value, name, step)
        if self.is_main:
            line = {"step": number, "seconds": round(self.seconds, 3), **values}
            self._append(line)
            if self._shown is not None:
                self._shown.numbers = values
            if self._observers:
                self._observers.tell("maskwright_step_ended", run=self.info, metrics=line)

    def recent(self, name: str) -> float | None:
        """The mean of a metric over the last twentieth of its lines, in the main process; None where there is none."""
        if not self.is_main:
            return None
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_bytes().splitlines())
        values = [line[name] for line in lines if name in line]
        last = values[-max(len(values) // 20, 1) :]
        return sum(last) / len(last) if last else None

    def check_finite(self, value: float, name: str, step: Step) -> None:
        """Raise `NumericalError` when a number of a step is not finite."""
        if not math.isfinite(value):
            saved = self._saved_step(self._loops)
            where = f" The checkpoint of step {saved} is intact." if saved else ""
            raise NumericalError(
                f"The {name} is {value} at step {self._before + step.index + 1} of {self._before + step.total}: try a lower "
                f"run.lr or a longer run.warmup.{where}"
            )

    def mask_drawn(self, mask: Mask) -> None:
        """Tell the observers of a mask."""
        if self._observers and self.is_main:
            self._observers.tell("maskwright_mask_drawn", run=self.info, mask=mask)

    # -- the end -------------------------------------------------------------------------------------------

    def finish(
        self,
        summary: Mapping[str, Any],
        *,
        model: Any = None,
        tokenizer: Any = None,
        masks: Mapping[str, Mask] | None = None,
        masks_of: str = "weights",
        pictures: Mapping[str, Tensor] | None = None,
        samples: Iterable[Mapping[str, Any]] | None = None,
        files: Mapping[str, str] | None = None,
        artifacts: Mapping[str, Mapping[str, Mask] | Mapping[str, Tensor]] | None = None,
        counted: Callable[[Path], Mapping[str, Any]] | None = None,
    ) -> Result:
        """Write what the job leaves: model/, masks, pictures, samples, summary.json and report.html, each whole or not.

        `model` and `tokenizer` have `save_pretrained`; a module without it is saved as model/model.safetensors. `files` are
        texts to lie beside the model, by name; `masks_of` says what is masked; `artifacts` masks or tensors that become files <name>.safetensors. `counted` adds to the summary what it reads from the run's folder, with model and
        masks in it. In all processes but the first nothing is written.
        """
        from safetensors.torch import save

        from maskwright.jobs.report import write_report

        told: dict[str, Any] = {"job": self.job, "finished": True, **summary}
        if not self.is_main:
            return Result(self.folder, {**told, "seconds": round(self.seconds, 3)}, None)
        if model is not None:
            with self._writing(self.folder / "model"), _whole_folder(self.folder / "model") as temporary:
                _save_model(model, temporary)
                if tokenizer is not None:
                    tokenizer.save_pretrained(temporary)
                for name, text in (files or {}).items():
                    (temporary / name).write_text(text, "utf-8")
        if masks:
            with self._writing(self.folder / "masks.safetensors"):
                save_masks(self.folder / "masks.safetensors", masks, of=masks_of)
        for name, held in (artifacts or {}).items():
            self._artifact(f"{name}.safetensors", held)
        if pictures:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in pictures.items()}
            self._write("pictures.safetensors", save(tensors))
        if samples is not None:
            lines = "".join(json.dumps(dict(one), ensure_ascii=False) + "\n" for one in samples)
            self._write("samples.jsonl", lines.encode("utf-8"))
        told |= {**(counted(self.folder) if counted is not None else {}), "seconds": round(self.seconds, 3)}
        self._write("summary.json", (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
        report = write_report(self.folder)
        if self._observers:
            self._observers.tell("maskwright_run_ended", run=self.info, result=told)
        return Result(self.folder, told, report)

    def _artifact(self, name: str, held: Mapping[str, Mask] | Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        masks = {key: one for key, one in held.items() if isinstance(one, Mask)}
        tensors = {
            key: one.detach().cpu().contiguous() for key, one in held.items() if not isinstance(one, Mask)
        }
        if masks and tensors:
            raise TypeError(f"The artifact {name} holds masks and tensors; give each a name of its own.")
        if masks:
            with self._writing(self.folder / name):
                save_masks(self.folder / name, masks)
        else:
            self._write(name, save(tensors))

    # -- the folder ----------------------------------------------------------------------------------------

    def _open(self, folder: str | os.PathLike[str] | None, resume: bool) -> Path:
        """Make or enter the run's folder; on the main process only."""
        if resume:
            if folder is None:
                raise UsageError("Name the folder of the run that is to be resumed.")
            path = Path(folder)
            if not path.is_dir():
                raise CheckpointError(f"There is no run to resume: {path} is no folder.")
        else:
            with self._writing(Path(folder) if folder is not None else RUNS):
                path = numbered(self.job) if folder is None else _empty(Path(folder))
        self._exit.callback(_lock(path))
        refuse_pickles(path / "checkpoint")
        latest = self._latest(path)
        if latest is not None:
            self._check_same_settings(read_header(latest), latest)
        with self._writing(path / "run.toml"):
            write_whole(path / "run.toml", self.settings.toml().encode("utf-8"))
        with self._writing(path / "metrics.jsonl"):
            for stale in path.glob("checkpoint/.*.tmp"):
                stale.unlink(missing_ok=True)
            end = read_header(latest)["metrics_bytes"] if latest is not None else 0
            self._metrics = (path / "metrics.jsonl").open("ab", buffering=0)
            self._exit.callback(self._metrics.close)
            if self._metrics.tell() > end:
                self._metrics.truncate(end)
        return path

    def _append(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, whole or not at all."""
        before = self._metrics.seek(0, os.SEEK_END)
        content = (json.dumps(line) + "\n").encode("utf-8")
        with self._writing(self.folder / "metrics.jsonl"):
            try:
                if self._metrics.write(content) != len(content):
                    raise OSError(0, "no space left on device")
            except OSError:
                self._metrics.truncate(before)
                raise

    def _write(self, name: str, content: bytes) -> None:
        with self._writing(self.folder / name):
            write_whole(self.folder / name, content)

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except MaskwrightError:
            raise
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{path} cannot be written ({reason(error)}); free the disk or choose another folder with --out."
            ) from error

    # -- checkpoints ---------------------------------------------------------------------------------------

    def _checkpoint(self, loop: int) -> Path:
        return self.folder / "checkpoint" / f"loop-{loop}.safetensors"

    @staticmethod
    def _latest(folder: Path) -> Path | None:
        numbered = {
            int(path.stem.removeprefix("loop-")): path
            for path in folder.glob("checkpoint/loop-*.safetensors")
            if path.stem.removeprefix("loop-").isdigit()
        }
        return numbered[max(numbered)] if numbered else None

    def _save(self, path: Path, state: Mapping[str, Any], done: int, total: int) -> None:
        if self.is_main:
            header = {
                "job": self.job,
                "settings": self._fingerprint(),
                "step": done,
                "steps": total,
                "seconds": self.seconds,
                "metrics_bytes": self._metrics.seek(0, os.SEEK_END),
            }
            save_checkpoint(path, state, header)

    def _restore(self, path: Path, state: Mapping[str, Any], total: int) -> int:
        """Give `state` what the checkpoint holds; the steps that are behind. Every process reads the file."""
        if not path.exists():
            return 0
        states, header = load_checkpoint(path)
        if set(states) != set(state) or header["steps"] != total:
            raise CheckpointError(
                f"The checkpoint {path} is of another run: it holds {', '.join(sorted(states))} after {header['step']} of "
                f"{header['steps']} steps, this run has {', '.join(sorted(state))} and {total} steps."
            )
        for name, thing in state.items():
            restore(thing, states[name], name, path)
        return int(header["step"])

    def _saved_step(self, loop: int) -> int:
        path = self._checkpoint(loop)
        return int(read_header(path)["step"]) if path.exists() else 0

    def _earlier_seconds(self) -> float:
        latest = self._latest(self.folder)
        return float(read_header(latest)["seconds"]) if latest is not None else 0.0

    def _fingerprint(self) -> dict[str, Any]:
        """The settings that decide the numbers, as JSON reads them back."""
        tables = json.loads(json.dumps(self.settings.as_dict(), default=list))
        tables["run"] = {key: value for key, value in tables["run"].items() if key not in _FREE}
        return dict(tables)

    def _check_same_settings(self, header: Mapping[str, Any], path: Path) -> None:
        then, now = dict(leaves(header["settings"])), dict(leaves(self._fingerprint()))
        for name in sorted({*then, *now}):
            if then.get(name) != now.get(name):
                raise CheckpointError(
                    f"The checkpoint {path} is of a run with other settings: {name} was {then.get(name)!r}, now it is "
                    f"{now.get(name)!r}. Resume with the run's own run.toml, or begin a new run in another folder."
                )

    # -- signals, progress, processes ----------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask the loop to stop after its step; a second SIGINT stops it at once."""

        def asked(number: int, frame: FrameType | None) -> None:
            if self._stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop = True
            if self.is_main and not self.quiet:
                # Not through print: the signal may have come in the middle of one.
                with contextlib.suppress(OSError):
                    os.write(2, b"\nFinishing this step and saving; press Ctrl-C again to stop without.\n")

        earlier = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                earlier[number] = signal.signal(number, asked)
        except ValueError:  # signals belong to the main thread; in another one the caller handles them
            earlier = {}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _must_stop(self) -> bool:
        """Whether any process was asked to stop: all of them stop after the same step."""
        if self.processes == 1:
            return self._stop
        asked = torch.tensor(int(self._stop), device=self.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked.item())

    @contextlib.contextmanager
    def _progress(self, total: int, first: int) -> Iterator[_Progress]:
        if not self.is_main or self.quiet:
            yield _Progress(total)
            return
        shown = _Bar(self.job, total, first) if sys.stderr.isatty() else _Words(self.job, total)
        with shown:
            self._shown = shown
            yield shown

    def _on_main(self, make: Callable[[], str]) -> str:
        """What `make` returns in the main process, in every process; when it raises there, the others end quietly."""
        if self.processes == 1:
            return make()
        text, failure = "", None
        if self.is_main:
            try:
                text = make()
            except Exception as error:
                failure = error
        content = text.encode("utf-8") if failure is None else b""
        size = torch.tensor(len(content) if failure is None else -1, device=self.device)
        dist.broadcast(size, 0)
        if failure is not None:
            raise failure
        if int(size) < 0:
            raise SystemExit(1)
        held = torch.frombuffer(bytearray(content or b" "), dtype=torch.uint8).to(self.device)
        if not self.is_main:
            held = torch.zeros(max(int(size), 1), dtype=torch.uint8, device=self.device)
        dist.broadcast(held, 0)
        return bytes(held.cpu().numpy()[: int(size)]).decode("utf-8")


# -- progress ------------------------------------------------------------------------------------------------


class _Progress(contextlib.AbstractContextManager[Any]):
    """Shows nothing."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.numbers: Mapping[str, Any] = {}

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, done: int) -> None:
        """`done` steps are behind."""

    def say(self, text: str) -> None:
        """A line beside the progress."""
        print(text, file=sys.stderr, flush=True)

    def _loss(self) -> str:
        loss = self.numbers.get("loss")
        return f"loss {loss:.4f}" if isinstance(loss, float) else ""


class _Words(_Progress):
    """A line now and then, where stderr is no terminal."""

    def __init__(self, job: str, total: int) -> None:
        super().__init__(total)
        self.job = job
        self.last = time.monotonic()

    def advance(self, done: int) -> None:
        if time.monotonic() - self.last >= _WORDS_EVERY:
            self.last = time.monotonic()
            loss = self._loss()
            self.say(f"{self.job}: step {done} of {self.total}{f', {loss}' if loss else ''}")


class _Bar(_Progress):
    """A bar of rich on stderr."""

    def __init__(self, job: str, total: int, first: int) -> None:
        super().__init__(total)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn(job),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self.task = self.bar.add_task(job, total=total, completed=first, loss="")

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, done: int) -> None:
        self.bar.update(self.task, completed=done, loss=self._loss())

    def say(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False)


# -- files and folders ---------------------------------------------------------------------------------------


def _accelerator() -> Any:
    from accelerate import Accelerator

    # Where torchrun starts processes on a machine without an accelerator, accelerate must be told that they are one group.
    kind = torch.accelerator.current_accelerator()
    grouped = "LOCAL_RANK" in os.environ and (kind is None or kind.type == "mps")
    return Accelerator(cpu=grouped)


def numbered(job: str) -> Path:
    """A new folder runs/<job>-<n>, also when several runs begin at the same time."""
    RUNS.mkdir(parents=True, exist_ok=True)
    taken = [path.name.removeprefix(f"{job}-") for path in RUNS.glob(f"{job}-*")]
    number = max((int(one) for one in taken if one.isdigit()), default=0) + 1
    while True:
        path = RUNS / f"{job}-{number}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def _empty(path: Path) -> Path:
    if path.is_dir() and any(path.iterdir()):
        held = (
            "holds a run already; go on with --resume, or"
            if (path / "run.toml").exists()
            else "is not empty;"
        )
        raise OutputError(f"The output folder {path} {held} choose another one with --out.")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _lock(path: Path) -> Callable[[], None]:
    """Hold the folder for this process, so that a run is not resumed twice at once; returns what gives it back."""
    try:
        import fcntl
    except ImportError:  # a platform without it goes without
        return lambda: None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise OutputError(f"The run in {path} is still at work in another process.") from None
    except OSError:  # some network file systems have no locks
        pass
    return lambda: os.close(handle)


@contextlib.contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes `target`'s place when all went well and vanishes otherwise."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for path in temporary.rglob("*"):  # safetensors writes files that nobody else may read
            path.chmod(0o755 if path.is_dir() else 0o644)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_model(model: Any, folder: Path) -> None:
    model = getattr(model, "module", model)  # the model inside DistributedDataParallel
    if not hasattr(model, "save_pretrained"):
        from safetensors.torch import save_model

        save_model(model, str(folder / "model.safetensors"))
        return
    from maskwright.backbones.folders import quiet_transformers

    with quiet_transformers():
        model.save_pretrained(folder)


__all__ = ["RUNS", "Result", "Run", "numbered"]
