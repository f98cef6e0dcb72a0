"""When checkpoints are written, which of them stay, and which one is meant."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from pydantic import Field

from .configuration import ConfigError, Settings
from .manifest import Checkpoint, Manifest, NoCheckpoint, list_checkpoints
from .run_directory import RunDirectory

LATEST, BEST = "latest", "best"


class CheckpointConfig(Settings):
    """When checkpoints are written and how many stay. There is always one at the end.

    Attributes:
        every: steps between checkpoints; 0: not by steps.
        minutes: a checkpoint also when the last one was begun so long ago; 0: not by time.
        keep: how many of the newest complete ones stay; 0 means all.
        keep_best: how many with the lowest validation loss stay too; above 0 the loss is measured for every
            checkpoint that `every` or `minutes` asks for.
        asynchronous: write beside training, which waits only for a copy in memory.
    """

    every: int = Field(default=0, ge=0)
    minutes: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    keep: int = Field(default=2, ge=0)
    keep_best: int = Field(default=0, ge=0)
    asynchronous: bool = True


class CheckpointTimer:
    """Tells when a checkpoint is due.

    Steps are the same on every process, clocks are not: the first process's clock decides, and the others are told
    with what all processes exchange after every step.
    """

    def __init__(self, config: CheckpointConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._begun = clock()

    def time_is_up(self) -> bool:
        """Whether the time between checkpoints has passed on this process's clock."""
        return self._config.minutes > 0 and self._clock() - self._begun >= 60 * self._config.minutes

    def due(self, step: int, time_is_up: bool) -> bool:
        """Whether to save after this step; `time_is_up`: on the first process's clock."""
        return time_is_up or (self._config.every > 0 and step % self._config.every == 0)

    def restart(self) -> None:
        """A checkpoint was begun, or training was: the time counts from now."""
        self._begun = self._clock()


def prune(run: RunDirectory, keep: int, keep_best: int = 0) -> list[str]:
    """Removes committed checkpoints that are neither among the newest `keep` nor the best `keep_best`, and unfinished
    ones older than the newest `keep`; the names of what went. With `keep` 0 everything stays.
    """
    if keep <= 0:
        return []
    found = list_checkpoints(run)
    newest = [checkpoint for checkpoint in found if checkpoint.committed][-keep:]
    if not newest:
        return []
    oldest = (newest[0].step, newest[0].attempt)
    older = [checkpoint for checkpoint in found if (checkpoint.step, checkpoint.attempt) < oldest]
    kept = {checkpoint.name for checkpoint in _best([*older, *newest], keep_best)}
    stale = [checkpoint for checkpoint in older if checkpoint.name not in kept]
    for checkpoint in stale:
        checkpoint.remove()
    return [checkpoint.name for checkpoint in stale]


def candidates(run: RunDirectory, wanted: str = LATEST) -> list[Checkpoint]:
    """The checkpoints that `wanted` means, in the order in which to try them.

    Args:
        wanted: "latest"; "best", of the lowest validation loss; a step; or a checkpoint's name.

    Raises:
        ConfigError: none of these. NoCheckpoint (a ValueError): the run has none that is meant.
    """
    found = list_checkpoints(run)
    if wanted == LATEST:
        return found[::-1]
    if wanted == BEST:
        if measured := _best(found, len(found)):
            return measured
        raise NoCheckpoint(
            f"run {run.name} has no checkpoint with a validation loss, by which the best is known (train with "
            "checkpoint.keep_best=1); ask for latest, or for a step"
        )
    if wanted.isdecimal():
        named = [checkpoint for checkpoint in found[::-1] if checkpoint.step == int(wanted)]
    elif wanted.startswith("step-"):
        named = [checkpoint for checkpoint in found if checkpoint.name == wanted]
    else:
        raise ConfigError(f"no checkpoint is called {wanted!r}; ask for latest, best, or a step such as 200")
    if not named:
        steps = ", ".join(map(str, sorted({checkpoint.step for checkpoint in found}))) or "none"
        raise NoCheckpoint(f"run {run.name} has no checkpoint {wanted}; the steps that it has: {steps}")
    return named


def _best(checkpoints: Sequence[Checkpoint], count: int) -> list[Checkpoint]:
    """The `count` of the lowest validation loss, on the data and the context of the newest: others do not compare."""
    measured: list[tuple[float, Checkpoint, Manifest]] = []
    for checkpoint in checkpoints if count else []:
        try:
            manifest = checkpoint.read_manifest()
        except ValueError:  # none, or damaged: nothing is known of it
            continue
        loss = manifest.validation_loss
        measured.append((math.inf if loss is None else loss, checkpoint, manifest))
    if not measured:
        return []
    newest = measured[-1][2]
    same = [
        (loss, checkpoint)
        for loss, checkpoint, manifest in measured
        if loss < math.inf and (manifest.context, manifest.corpus) == (newest.context, newest.corpus)
    ]
    same.sort(key=lambda entry: entry[0])  # of equals the older, which is the one that was best first
    return [checkpoint for _, checkpoint in same[:count]]
