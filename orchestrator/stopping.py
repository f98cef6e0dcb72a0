"""Ctrl-C and SIGTERM in a run: the first asks for an end after the step at hand, with a checkpoint; the next ends it.

SIGUSR1, with which Slurm can announce a job's end (`--signal=USR1@300`), asks for the same and never ends anything.

Launchers pass a terminal's Ctrl-C on to processes that had it already, so an echo within a moment does not count.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from .failures import Terminated

ECHO_SECONDS = 1.0
STOPPING = "stopping after this step; once more to stop at once"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WARNING = signal.SIGUSR1


class StopRequest:
    """Whether, and by which signal, the run was asked to stop. `event` is set once it was.

    `told` is called by the first signal's handler with a line for the person.
    """

    def __init__(self, told: Callable[[str], None] = lambda line: None) -> None:
        self.told = told
        self.event = threading.Event()
        self.signal: int | None = None
        self._since = 0.0

    def note(self, number: int) -> None:
        """Remembers the first signal."""
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
            self.event.set()

    def receive(self, number: int, _frame: FrameType | None = None) -> None:
        """Handles a signal: notes the first, raises KeyboardInterrupt or Terminated for the second."""
        if self.signal is None:
            self.note(number)
            with contextlib.suppress(RuntimeError):  # of a stream that the interrupted code was writing to
                self.told(STOPPING)
        elif number != _WARNING and time.monotonic() - self._since > ECHO_SECONDS:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + (self.signal or 0)


@contextlib.contextmanager
def stoppable(request: StopRequest) -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGUSR1 go to `request`."""
    numbers = (*_SIGNALS, _WARNING)
    before = [signal.signal(number, request.receive) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated at once, so that everything is put away as after Ctrl-C."""

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM wait; a first one is raised at the end. For what cannot be put away half made."""
    request = StopRequest()
    before = [signal.signal(number, lambda number, _frame: request.note(number)) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)
    if request.signal is not None:
        raise KeyboardInterrupt if request.signal == signal.SIGINT else Terminated


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM are ignored: putting things away takes a second or two and should be whole."""
    before = [signal.signal(number, signal.SIG_IGN) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)
