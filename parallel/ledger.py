"""What moved between processes, and how long this process waited for it.

Every motion of this room reports here, so that bytes on the wire are something tests assert and users read.
A ledger belongs to one process; rows are keyed by motion ("prefix_state", "halo", ...), direction
("forward" or "backward") and layer.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import record_function

Mark = float | torch.cuda.Event
"""A moment: of the processor's clock in seconds, or in the work of a GPU's stream."""


@dataclass
class LedgerRow:
    """Counts of one motion in one layer: calls, bytes to and from other processes, seconds spent waiting."""

    motion: str
    layer: str
    calls: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds_waited: float = 0.0

    def add(self, other: LedgerRow) -> None:
        self.calls += other.calls
        self.bytes_sent += other.bytes_sent
        self.bytes_received += other.bytes_received
        self.seconds_waited += other.seconds_waited


class CommunicationLedger:
    """Counts of bytes, calls and waiting, per motion and layer, of one process.

    A tensor that a process keeps for itself costs no bytes. The bytes of a collective are those of its payload to and
    from the other processes, whatever algorithm the backend runs underneath.
    """

    # Not a dataclass: mixed precision in FSDP2 hands copies of dataclasses to the model, whose counts would be lost.
    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], LedgerRow] = {}
        self._waits: list[tuple[LedgerRow, Mark, Mark]] = []  # not in the rows yet

    def row(self, motion: str, layer: str) -> LedgerRow:
        """The row to add to; made at first use."""
        return self._rows.setdefault((motion, layer), LedgerRow(motion, layer))

    def record(self, motion: str, layer: str, *, sent: int, received: int) -> None:
        """Count one call that moves `sent` and `received` bytes between this process and the others."""
        row = self.row(motion, layer)
        row.calls += 1
        row.bytes_sent += sent
        row.bytes_received += received

    @contextmanager
    def waiting(self, motion: str, layer: str) -> Iterator[None]:
        """Count the seconds spent in the block as waiting, and show them in profiles.

        With a GPU it is not the processor that waits: it tells the GPU's stream to, and goes on. The stream's time is
        counted, when rows are asked for.
        """
        begun = _mark()
        try:
            with record_function(f"wait for {motion} of {layer or 'the model'}"):
                yield
        finally:
            self._waits.append((self.row(motion, layer), begun, _mark()))

    def rows(self) -> list[LedgerRow]:
        """All rows, ordered by layer and motion."""
        self._count_waits()
        return [self._rows[key] for key in sorted(self._rows, key=lambda key: (key[1], key[0]))]

    def by_motion(self) -> dict[str, LedgerRow]:
        """Sums over layers, per motion."""
        sums: dict[str, LedgerRow] = defaultdict(lambda: LedgerRow("", "*"))
        for row in self.rows():
            sums[row.motion].motion = row.motion
            sums[row.motion].add(row)
        return dict(sorted(sums.items()))

    def totals(self) -> LedgerRow:
        """Sum over everything."""
        total = LedgerRow("*", "*")
        for row in self.rows():
            total.add(row)
        return total

    @property
    def seconds_waited(self) -> float:
        return self.totals().seconds_waited

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._rows.clear()
        self._waits.clear()

    def _count_waits(self) -> None:
        for row, begun, ended in self._waits:
            row.seconds_waited += _seconds(begun, ended)
        self._waits.clear()


def _mark() -> Mark:
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begun: Mark, ended: Mark) -> float:
    """Between two marks; blocks until a GPU has come to the second."""
    if isinstance(begun, float) and isinstance(ended, float):
        return ended - begun
    if isinstance(begun, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
        ended.synchronize()
        return begun.elapsed_time(ended) / 1000
    return 0.0  # the GPU was first used in between
