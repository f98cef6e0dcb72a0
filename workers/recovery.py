"""What a run does about its own failures: settings, and the batches that are not trained on.

The trainer acts on a bad loss by itself; whoever supervises the processes (`orchestrator`) acts on the rest.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal

import torch.distributed as dist
from pydantic import Field, field_validator

from .configuration import Settings
from .metrics import read_records
from .run_directory import RunDirectory, timestamp
from .shared_outcomes import SharedOutcomes

SKIPPED_KEY = "skipped_batches"
# The steps whose median loss a spike is measured against, and how many of them there must be.
SPIKE_WINDOW, SPIKE_LEAST = 50, 10


class TrainingError(Exception):
    """Training cannot go on; the message is one line with the cause and what to do."""


class BadLoss(TrainingError):
    """A step whose loss or gradient cannot be trained on; the weights have not seen it. `position`: of its batch."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


class RecoveryConfig(Settings):
    """When a run goes on by itself, and how.

    Attributes:
        max_failures: failures in a row, with no new checkpoint between them, that are recovered from; 0: none. As many
            checkpoints in a row may fail to be written while training goes on.
        hang_seconds: a run on Ray that makes no step for so long, and does not get on with anything else either
            (restoring, verifying or saving a checkpoint, validating), is taken to hang and started again; 0: never.
        wait_seconds: how long a run on Ray waits for devices that are missing or busy, or for a store that it cannot
            reach; and how long any run stands still to write its last checkpoint, or one after too many failures.
        bad_loss: when the loss or the gradient is no number, or the loss a spike: "rollback" to the last checkpoint
            and past the batch; "skip" the batch, as the weights have not seen it; or "stop".
        spike: a loss above this many times the median of the last 50 steps is bad; 0: only one that is no number.
    """

    max_failures: int = Field(default=3, ge=0)
    hang_seconds: float = Field(default=600.0, ge=0)
    wait_seconds: float = Field(default=60.0, ge=0)
    bad_loss: Literal["rollback", "skip", "stop"] = "rollback"
    spike: float = Field(default=0.0, ge=0)

    @field_validator("spike")
    @classmethod
    def _a_spike_is_above_the_median(cls, spike: float) -> float:
        if 0 < spike <= 1:
            raise ValueError(f"recovery.spike={spike} would call ordinary losses bad; take more than 1, or 0 for none")
        return spike


class FailedCheckpoints:
    """Bears checkpoints that cannot be written, as on a full disk: each costs a run nothing but itself."""

    def __init__(self, config: RecoveryConfig) -> None:
        self._most, self._count, self._written = config.max_failures, 0, 0

    def bear(self, error: Exception, written: int) -> str | None:
        """The line about one, after `written` good ones; None: there were too many in a row."""
        self._count = self._count + 1 if written == self._written else 1
        self._written = written
        if self._count > self._most:
            return None
        return f"{error}; training goes on, and the next tries again (failure {self._count} of {self._most} in a row)"


class LossGuard:
    """Tells a bad loss from a good one. It decides from values that are the same on every process."""

    def __init__(self, config: RecoveryConfig, losses: Iterable[float] = ()) -> None:
        self._spike = config.spike
        self._recent = deque(losses, maxlen=SPIKE_WINDOW)

    def add(self, loss: float) -> None:
        """A step with this loss was made."""
        self._recent.append(loss)

    def problem(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step of this loss and gradient norm; None if nothing is."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss} and the gradient's norm {norm}"
        if not self._spike or len(self._recent) < SPIKE_LEAST:
            return None
        usual = statistics.median(self._recent)
        return f"the loss is {loss:.4g} after {usual:.4g}" if loss > self._spike * usual else None


class BadBatches:
    """The batches that a run leaves out, and the judgement of new ones; the same on every process.

    Args:
        context, batch: of the data; positions in another order are other batches.
        group: of all processes.
    """

    def __init__(
        self, run: RunDirectory, config: RecoveryConfig, context: int, batch: int, group: dist.ProcessGroup
    ) -> None:
        self.run, self.config, self.context, self.batch = run, config, context, batch
        self.guard = LossGuard(config)
        self._group = group
        self._skipped = set[int]()
        self._setbacks = 0

    def __contains__(self, position: object) -> bool:
        return position in self._skipped

    def read(self, step: int) -> None:
        """What the run knows after so many steps: batches found bad, and the losses that a spike is measured against.

        The first process reads; all call it.
        """

        def known() -> tuple[set[int], list[float]]:
            losses = [record.loss for record in read_records(self.run.storage) if record.step <= step]
            return skipped_positions(self.run, self.context, self.batch), losses

        skipped, losses = SharedOutcomes(self._group).from_first(known)
        self._skipped, self.guard = skipped, LossGuard(self.config, losses)

    def progressed(self) -> None:
        """A checkpoint was begun: the setbacks before it are forgiven."""
        self._setbacks = 0

    def leave_out(self, bad: BadLoss, step: int) -> None:
        """Remembers the batch of a bad step for good. TrainingError: there were too many, or it is not wished."""
        self._setbacks += 1
        if self.config.bad_loss == "stop" or self._setbacks > self.config.max_failures:
            raise TrainingError(f"{bad}; go on with a lower train.learning_rate or train.clip") from bad
        if dist.get_rank() == 0:
            place = {"position": bad.position, "context": self.context, "batch": self.batch}
            record_skipped(self.run, step=step, **place, cause=str(bad))


def skipped_positions(run: RunDirectory, context: int, batch: int) -> set[int]:
    """Positions in the data's order of this context and batch that an earlier part of the run found bad."""
    entries = run.read_info().get(SKIPPED_KEY, [])
    return {entry["position"] for entry in entries if (entry["context"], entry["batch"]) == (context, batch)}


def record_skipped(run: RunDirectory, **entry: Any) -> None:
    """Remembers a bad batch in run.json, so that it stays left out whatever happens next. One process calls it."""
    entries = run.read_info().get(SKIPPED_KEY, [])
    run.update_info(**{SKIPPED_KEY: [*entries, {"time": timestamp()} | entry]})
