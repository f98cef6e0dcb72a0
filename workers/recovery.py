"""What a run does about its own failures: settings, and the batches that are not to be trained on.

The trainer acts on a bad loss by itself; whoever supervises the processes (`orchestrator`) acts on the rest.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, field_validator

from .configuration import Settings
from .run_directory import RunDirectory, timestamp

SKIPPED_KEY = "skipped_batches"
# The steps whose median loss a spike is measured against, and how many of them there must be.
SPIKE_WINDOW, SPIKE_LEAST = 50, 10


class RecoveryConfig(Settings):
    """When a run goes on by itself, and how.

    Attributes:
        max_failures: failures in a row, with no new checkpoint between them, that are recovered from; 0: none.
        hang_seconds: a run on Ray that makes no step for so long is taken to hang, and is started again; 0: never.
        wait_seconds: how long a run on Ray waits for devices that are missing or busy.
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


def skipped_positions(run: RunDirectory, context: int, batch: int) -> set[int]:
    """Positions in the data's order of this context and batch that an earlier part of the run found bad."""
    entries = run.read_info().get(SKIPPED_KEY, [])
    return {entry["position"] for entry in entries if (entry["context"], entry["batch"]) == (context, batch)}


def record_skipped(run: RunDirectory, **entry: Any) -> None:
    """Remembers a bad batch in run.json, so that it stays left out whatever happens next. One process calls it."""
    entries = run.read_info().get(SKIPPED_KEY, [])
    run.update_info(**{SKIPPED_KEY: [*entries, {"time": timestamp()} | entry]})
