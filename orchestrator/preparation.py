"""What is checked and made before any worker starts, and taken back when none comes to train."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..workers import Experiment, Reporter, RunDirectory, create_run, find_run, reopen_run
from ..workers.display import command
from ..workers.launch import check
from ..workers.manifest import list_checkpoints
from ..workers.metrics import StepRecord, newest_records
from .failures import RunFailed, RunLost, is_mistake

FAILURE_FILE = "failure.txt"
# A run whose last step is longer ago than this many of its steps, and these seconds, is not taken to be running.
IDLE_STEPS, IDLE_SECONDS = 20, 120.0


@dataclass(frozen=True)
class Prepared:
    """A checked experiment whose run directory exists.

    Attributes:
        resume: the run goes on from its last whole checkpoint.
        before: the text of experiment.yaml before this launch; empty for a new run.
        continued: the run goes on by itself, as a job that was started again; fewer workers than it asks for will do.
    """

    experiment: Experiment
    run: RunDirectory
    resume: bool
    before: str
    continued: bool = False


@dataclass(frozen=True)
class Done:
    """A run that has made all its steps."""

    run: RunDirectory
    step: int


def new_run(config: str, overrides: list[str]) -> Prepared:
    """A new run of the config. ValueError of one line."""
    experiment = Experiment.load(config, overrides)
    return Prepared(experiment, create_run(experiment), False, "")


def old_run(name: str, overrides: list[str]) -> Prepared:
    """A run that goes on, given by its path, URL or name. ValueError of one line."""
    run = find_run(name)
    before = run.read_experiment()
    return Prepared(reopen_run(run, overrides), run, True, before)


def same_run(config: str, overrides: list[str]) -> Prepared | Done:
    """The run that the config names: a new one, or the one that is there and goes on; `Done` if it has ended.

    For jobs: the lost driver's run is found again by the job that takes its place. ValueError of one line.
    """
    experiment = Experiment.load(config, overrides)
    run = RunDirectory(f"{experiment.run.directory.rstrip('/')}/{experiment.run.name}")
    if not run.exists():
        return Prepared(experiment, create_run(experiment), False, "")
    committed = [checkpoint for checkpoint in list_checkpoints(run) if checkpoint.committed]
    if committed and committed[-1].step >= experiment.train.steps:
        return Done(run, committed[-1].step)
    sections = experiment.model_dump(mode="json", exclude={"run"}).items()
    words = [f"{section}={json.dumps(settings)}" for section, settings in sections]
    if committed:
        return replace(old_run(run.url, words), continued=True)
    before = run.read_experiment()
    again = Experiment.resume(run, words)
    check(again)
    run.write_experiment(again.to_yaml())
    return Prepared(again, run, False, before, continued=True)


def take(run: RunDirectory, reporter: Reporter) -> None:
    """Makes this driver the run's writer. Another that seems to be alive is told of, and will stop."""
    owner = run.read_info().get("owner")
    if owner is not None and "given_back" not in owner:
        last = next(newest_records(run.storage), None)
        if last is not None and is_recent(last, now := time.time()):
            ago = f"step {last.step} was made {max(0.0, now - last.time):.0f} s ago, and nobody gave the run back"
            reporter.noted(f"{ago}: whoever may still train it stops")
    run.take()


def is_recent(last: StepRecord, now: float) -> bool:
    """Whether a run with this last step may still be training at the time `now`."""
    return now - last.time < max(IDLE_SECONDS, IDLE_STEPS * last.seconds)


@contextlib.contextmanager
def guarded(prepared: Prepared) -> Iterator[None]:
    """Adds to an error what the user can do next, or undoes the preparation if training had not begun."""
    starts = _starts(prepared.run)
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):  # of a store that is lost, a full disk: the error itself says more
            if isinstance(error, RunFailed) and error.details:
                prepared.run.storage.write_text(FAILURE_FILE, error.details.rstrip() + "\n")
                error.add_note(f"details:  {prepared.run.url}/{FAILURE_FILE}")
            elif _starts(prepared.run) == starts:
                _undo(prepared)
                raise
            if not is_mistake(error) and not isinstance(error, RunLost):
                error.add_note(_how_to_continue(prepared.run))
        raise


def _starts(run: RunDirectory) -> int:
    """How often training has begun."""
    return len(run.read_info().get("starts", []))


def _undo(prepared: Prepared) -> None:
    if prepared.before:
        prepared.run.write_experiment(prepared.before)
    else:
        prepared.run.storage.remove("")


def _how_to_continue(run: RunDirectory) -> str:
    committed = [checkpoint for checkpoint in list_checkpoints(run) if checkpoint.committed]
    if committed:
        return f"continue: {command('longstride', 'resume', run.url)}   (from step {committed[-1].step})"
    return "there is no checkpoint to continue from yet; checkpoint.every=STEPS writes them"
