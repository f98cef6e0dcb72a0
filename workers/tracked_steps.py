"""Which of a run's records MLflow is sent: every Nth, and those that must not be missed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .metrics import StepRecord


def is_due(record: StepRecord, every: int) -> bool:
    """Whether a record is sent however the run came to it: of every Nth step, or with a validation loss.

    A checkpoint that is kept as the best has its loss in such a record.
    """
    return record.step % every == 0 or record.validation_loss is not None


class TrackedSteps:
    """Chooses from the records of a run, which come in the order in which they were made.

    Also chosen are steps made again of which MLflow has a point from before, due or not: the point would otherwise
    stay, and be of a step that the run took back.

    Args:
        known: the steps of which MLflow has a point.
    """

    def __init__(self, every: int, known: Callable[[], set[int]]) -> None:
        self._every, self._known = every, known
        self._part: tuple[int, int] | None = None  # start and rewinds of the last record
        self._again: set[int] = set()

    def choose(self, records: Iterable[StepRecord]) -> list[StepRecord]:
        """Those to send, in order. It may be asked about the same records again."""
        if self._every == 1:
            return list(records)
        chosen: list[StepRecord] = []
        for record in records:
            if record.order[:2] != self._part:
                self._again = self._known() | {earlier.step for earlier in chosen}
                self._part = record.order[:2]
            if is_due(record, self._every) or record.step in self._again:
                chosen.append(record)
        return chosen
