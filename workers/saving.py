"""When a run in training saves, and what it bears when a checkpoint is not written."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from .checkpoint import Checkpointer, CheckpointError
from .checkpoint_policy import CheckpointConfig, CheckpointTimer
from .exchange import Shared
from .liveness import alive
from .recovery import FailedCheckpoints, RecoveryConfig, TrainingError
from .shared_outcomes import SharedOutcomes

PAUSE_SECONDS = 5.0  # between tries while training stands still


class Save(Protocol):
    """Writes a checkpoint of this moment; without `wait` it returns while that is written beside training."""

    def __call__(self, *, wait: bool) -> None: ...


class Saving:
    """Decides after every step; every process of the run has one, calls it alike, and comes to the same decision.

    Args:
        noted: told, a line each, what a person should know.

    Attributes:
        due: a checkpoint is to be written after the last step.

    After more failures in a row than `RecoveryConfig` bears, training stands still while a checkpoint is tried again:
    what it holds is in memory yet, and another start would only make the same steps again.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        config: CheckpointConfig,
        recovery: RecoveryConfig,
        noted: Callable[[str], None],
    ) -> None:
        self.timer = CheckpointTimer(config)
        self.due = False
        self._checkpointer, self._asynchronous = checkpointer, config.asynchronous
        self._failures, self._noted = FailedCheckpoints(recovery), noted
        self._patience = recovery.wait_seconds if recovery.max_failures else 0.0
        self._unborne: CheckpointError | None = None  # one too many in a row
        self._shared = SharedOutcomes(checkpointer.group)
        self._unwritten = False
        self._newest: int | None = None  # the step of the newest checkpoint; None: it was not written

    def begin(self, step: int) -> None:
        """Training begins, or after a rollback goes on, at a step whose state is in a checkpoint, or is the first."""
        self._newest = step
        self.timer.restart()

    def own(self) -> dict[str, bool]:
        """What this process knows and has to tell the others after a step, see `Shared`."""
        return {"unwritten": self._checkpointer.failed, "time_is_up": self.timer.time_is_up()}

    def learn(self, step: int, shared: Shared) -> None:
        """What all processes know after a step."""
        self._unwritten = shared.unwritten
        self.due = self.timer.due(step, shared.time_is_up)

    def after_step(self, step: int, save: Save) -> None:
        """Learns the fate of the checkpoint beside training if that is known to be bad, and begins the one that is due.

        TrainingError: too many in a row were not written, and this one cannot be.
        """
        if self._unwritten and not self.settle():
            self._newest = None
        if self.due and self._unborne is None:
            begun = self._bear(lambda: save(wait=not self._asynchronous))
            self._newest = step if begun else None
        if self._unborne is not None:
            self._insist(step, save)

    def settle(self) -> bool:
        """Waits for the checkpoint beside training; whether it was written."""
        return self._bear(self._checkpointer.wait)

    def finish(self, step: int, save: Save) -> None:
        """Returns when a checkpoint of this step, the last, is written. TrainingError: it cannot be."""
        if not self.settle() or self._newest != step:
            self._insist(step, save)

    def _insist(self, step: int, save: Save) -> None:
        """Saves now, and again while that fails, as long as a run is patient; all processes try as often."""
        began, told, failed = time.monotonic(), False, self._unborne
        while True:
            if failed is not None:
                if self._shared.from_first(lambda: time.monotonic() - began >= self._patience):
                    raise TrainingError(self._farewell(failed)) from failed
                if not told:
                    self._noted(f"{failed}; training stands still until one is, for up to {self._patience:.0f} s")
                told = True
                time.sleep(min(PAUSE_SECONDS, self._patience))
            alive()
            try:
                save(wait=True)
            except CheckpointError as error:
                failed = error
            else:
                self._newest, self._unborne = step, None
                return

    def _farewell(self, failed: CheckpointError) -> str:
        patience = f" within {self._patience:.0f} s (recovery.wait_seconds)" if self._patience else ""
        back = f"`longstride resume {self._checkpointer.run.url}` goes on from the last checkpoint that is whole"
        return f"{failed}, nor another{patience}, and the run ends: once its store takes files, {back}"

    def _bear(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except CheckpointError as error:
            line = self._failures.bear(error, self._checkpointer.written)
            self._unborne = error if line is None else None
            if line is not None:
                self._noted(line)
            return False
        return True
