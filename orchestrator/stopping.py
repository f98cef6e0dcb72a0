"""Ctrl-C and SIGTERM in a run: the first asks for an end after the step at hand, with a checkpoint; the next ends it.

SIGUSR1, with which Slurm can announce a job's end (`--signal=USR1@300`), and SIGHUP, which the closing of a terminal
sends, ask for the same and never end anything. SIGHUP stays ignored where it was (nohup).

Launchers pass a terminal's Ctrl-C on to processes that had it already, so an echo within a moment does not count.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from .failures import Terminated

ECHO_SECONDS = 1.0
STOPPING = "stopping after this step; once more to stop at once"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WARNINGS = (signal.SIGUSR1, signal.SIGHUP)


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
            # Of a stream that the interrupted code was writing to, or whose terminal is gone.
            with contextlib.suppress(RuntimeError, OSError):
                self.told(STOPPING)
        elif number not in _WARNINGS and time.monotonic() - self._since > ECHO_SECONDS:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + (self.signal or 0)


def stoppable(request: StopRequest) -> contextlib.AbstractContextManager[None]:
    """Inside, SIGINT, SIGTERM, SIGUSR1 and SIGHUP go to `request`."""
    return _handled((*_SIGNALS, *_WARNINGS), request.receive)


def terminable() -> contextlib.AbstractContextManager[None]:
    """Inside, SIGTERM and SIGHUP raise Terminated at once, so that everything is put away as after Ctrl-C."""

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    return _handled((signal.SIGTERM, signal.SIGHUP), terminate)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP wait; the first is raised at the end. For what is not to be left half made."""
    request = StopRequest()
    with _handled((*_SIGNALS, signal.SIGHUP), lambda number, _frame: request.note(number)):
        yield
    if request.signal is not None:
        raise KeyboardInterrupt if request.signal == signal.SIGINT else Terminated


def undisturbed() -> contextlib.AbstractContextManager[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP are ignored: putting things away takes a moment, and should be whole."""
    return _handled((*_SIGNALS, signal.SIGHUP), signal.SIG_IGN)


@contextlib.contextmanager
def sheltered() -> Iterator[None]:
    """Processes started inside do not hear of a closed terminal: they end when they are told to, not before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _handled(
    numbers: Sequence[int], handler: Callable[[int, FrameType | None], None] | signal.Handlers
) -> Iterator[None]:
    """Inside, `handler` has these signals, but for a SIGHUP that is ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    before = {number: signal.signal(number, handler) for number in numbers if not (number == signal.SIGHUP and ignored)}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
