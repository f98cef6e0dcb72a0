"""What a person sees of a run: one live line on a terminal, plain lines elsewhere, a summary at the end.

Driven by reported values alone, so that they may come from a process on another machine.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from .metrics import StepRecord
from .reporting import RunStart, Summary

# Off a terminal: at most one line in so many seconds, and one for every validation.
LINE_INTERVAL = 10.0


class Display:
    """A Reporter that prints. `console`: where; `clock`: seconds, for the time left."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(file=cast("IO[str]", Unfailing(sys.stdout)), highlight=False)
        self._clock = clock
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._first_step, self._steps = 0, 0
        self._began = 0.0
        self._last_line = float("-inf")
        self._validation_loss: float | None = None

    def started(self, start: RunStart) -> None:
        self.close()
        degrees = mesh_name(start.parallel)
        split = f", {degrees}" if degrees else ""
        plural = "process" if start.workers == 1 else "processes"
        self._print(f"run {start.name} in {shorten(start.url)}")
        part = f" ({start.trained:,} of them trained)" if start.trained < start.parameters else ""
        self._print(
            f"{start.parameters:,} parameters{part}, {start.dtype}, {start.workers} {plural} on {start.device}{split}; "
            f"{shorten(start.corpus)}, {start.batch} x {start.context:,} tokens a step"
        )
        if start.step:
            self._print(f"continuing after step {start.step}")
        if start.until < start.steps:
            self._print(f"with this context until step {start.until} of {start.steps}")
        self._first_step, self._steps = start.step, start.steps
        self._began = self._clock()
        if self.console.is_terminal and self.console.width >= 60:
            self._progress = Progress(
                TextColumn("[bold]{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=12),
                TextColumn("{task.fields[line]}"),
                console=self.console,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task("", total=start.steps, completed=start.step, line="first step ...")
            self._progress.start()

    def stepped(self, record: StepRecord) -> None:
        if record.validation_loss is not None:
            self._validation_loss = record.validation_loss
        line = status_line(record, self._validation_loss, self._seconds_left(record.step))
        if self._progress is not None:
            self._progress.update(self._task, completed=record.step, line=escape(line))
            return
        now = self._clock()
        important = record.validation_loss is not None or record.step in (self._first_step + 1, self._steps)
        if important or now - self._last_line >= LINE_INTERVAL:
            self._last_line = now
            self._print(f"step {record.step}/{self._steps} {line}")

    def noted(self, message: str) -> None:
        self._print(message)

    def finished(self, summary: Summary) -> None:
        self.close()
        for line in summary_lines(summary):
            self._print(line)

    def close(self) -> None:
        """Ends the live line; also after an error. May be called more than once."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, line: str) -> None:
        self.console.print(escape(line), soft_wrap=True)

    def _seconds_left(self, step: int) -> float:
        done = step - self._first_step
        return (self._clock() - self._began) / max(1, done) * (self._steps - step)


class Unfailing:
    """A text stream that may be lost, as a closed terminal's, a pipe's whose reader has ended, or on a full disk.

    What it does not take is dropped: nobody's training should end for want of a spectator. Where nothing can come back
    the rest goes to the null device, so that Python's own writing at the end of the process does not fail either.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)


def mesh_name(degrees: dict[str, int]) -> str:
    """data 2 x sequence 4; empty for one process"""
    return " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)


def status_line(record: StepRecord, validation_loss: float | None, seconds_left: float) -> str:
    """One step in some 70 characters."""
    validation = f" val {validation_loss:.3f}" if validation_loss is not None else ""
    return (
        f"loss {record.loss:.3f}{validation} {count(record.tokens_per_second)} tok/s "
        f"wait {record.wait_share:.0%} mem {record.memory / 2**30:.2f} GiB left {duration(seconds_left)}"
    )


def summary_lines(summary: Summary) -> list[str]:
    """How the run ended, its sample, and the commands to go on with."""
    loss = "" if summary.validation_loss is None else f", validation loss {summary.validation_loss:.4f} nats per token"
    state = "finished" if summary.finished else "stopped"
    run = shorten(summary.url)
    lines = [
        f"{state} at step {summary.step}/{summary.steps} after {duration(summary.seconds)}, "
        f"{summary.tokens:,} tokens{loss}"
    ]
    if summary.sample:
        lines += ["", "sample:", *printable(summary.prompt + summary.sample).splitlines(), ""]
    lines += summary.notes
    lines += [
        f"run:      {run}",
        f"resume:   {command('longstride', 'resume', run)}"
        + (f" train.steps={2 * summary.steps}" if summary.finished else ""),
        f"generate: {generate_command(run, summary.prompt, audio=summary.audio)}",
    ]
    if summary.tracking_uri is not None:
        lines.append(f"MLflow:   {tracking_command(summary.tracking_uri)}")
    return lines


def generate_command(run: str, prompt: str = "", *, audio: bool = False) -> str:
    """How to have a run continue this prompt, where it is text."""
    return command(
        "longstride", "generate", run, *(("--out", "sound.wav") if audio else ("--prompt", prompt or "TEXT"))
    )


def tracking_command(uri: str) -> str:
    """How to look at the tracker: the server's address, or a command that serves the embedded store."""
    if uri.startswith(("http://", "https://")):
        return uri
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{shorten(uri.removeprefix('sqlite:///'))}"
    return command("mlflow", "ui", "--backend-store-uri", uri)


def command(program: str, *arguments: str) -> str:
    """A line for a shell that runs `program` of this environment, also where that is not activated."""
    beside = Path(sys.executable).parent / program
    found = shutil.which(program)
    if found is None or Path(found).resolve() != beside.resolve():
        program = shorten(str(beside)) if beside.exists() else program
    return shlex.join([program, *arguments])


def printable(text: str) -> str:
    """Text of a model without what would steer the terminal."""
    kept = (letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return "".join(kept)


def shorten(path: str) -> str:
    """A path relative to the current directory where it lies below it; anything else as it is."""
    if "://" in path:
        return path
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


def count(number: float) -> str:
    """12.3k"""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """1:02:03 or 2:03"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
