"""What can stop a run, in words for the person who started it.

A mistake of the user's is a ValueError (or an OSError that names a file) and ends with exit code 2. A run that
began and could not go on is a `RunFailed`, exit code 1, and so is a store that nobody can reach now. Anything else is
a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import NoReturn

# A rank that loses a neighbour fails in its next collective. These words mark such an echo of somebody else's fault.
_ECHOES = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "tcpstore", "socket", "recvvalue")
_ECHO_TYPES = ("CommunicationError", "DistNetworkError", "DistStoreError", "DistBackendError", "DistError")
# Exceptions of a bug: the same code fails on the same data again.
_BUGS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, TypeError)
_TAKEN = "RunTaken"
_OUT_OF_MEMORY_TYPES = ("OutOfMemoryError", "MemoryError")
_OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory")
# A disk, a quota, or the table of open files.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
# Errors of `workers` and `data` whose message is for the user as it stands.
_SAY_IT_ALL = ("TrainingError", "CheckpointError", "StoreUnavailable", "StorageUnavailable")


class RunFailed(Exception):
    """A run that started and could not go on. The message is one line: the cause; `details` may hold a traceback.

    `retry`: another attempt may go well, as after a lost node. A bug of ours comes again, and a loss that stays bad.
    """

    def __init__(self, message: str, details: str = "", *, retry: bool = False) -> None:
        super().__init__(message)
        self.details = details
        self.retry = retry


class RunLost(RunFailed):
    """Somebody else has taken the run: nothing is written to it any more, and it is not tried again."""


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt no `except Exception` may swallow it."""


class EchoOfMistake(Exception):
    """A mistake that is the first of several processes' to report. The message is this process's own view, if any."""


@dataclass(frozen=True)
class Fault:
    """Why one worker stopped.

    Attributes:
        rank: the worker.
        kind: name of the exception's type, or "died" when the process ended without one.
        message: one line.
        traceback: the worker's own, empty when it died.
        mistake: True when the user can put it right (bad settings, missing files).
        retry: whether another attempt may go well.
    """

    rank: int
    kind: str
    message: str
    traceback: str = ""
    mistake: bool = False
    retry: bool = True

    @classmethod
    def from_exception(cls, rank: int, error: BaseException, traceback: str) -> Fault:
        kind = type(error).__name__
        retry = not isinstance(error, _BUGS) and kind not in ("TrainingError", _TAKEN)
        return cls(rank, kind, one_line(error), traceback, is_mistake(error), retry)

    @property
    def echo(self) -> bool:
        """Whether this is only the consequence of another worker's fault."""
        if self.kind == "died":
            return False
        text = self.message.lower()
        return self.kind in _ECHO_TYPES or (self.kind == "RuntimeError" and any(word in text for word in _ECHOES))


def root_cause(faults: list[Fault]) -> Fault:
    """The fault the others follow from: a death first, then the earliest that is no echo, then the earliest."""
    deaths = [fault for fault in faults if fault.kind == "died"]
    own = [fault for fault in faults if not fault.echo]
    return (deaths or own or faults)[0]


def raise_fault(faults: list[Fault], places: list[str]) -> NoReturn:
    """Raises what the faults of one attempt come down to: ValueError for a mistake, RunFailed otherwise.

    `places[rank]` says where the worker ran.
    """
    cause = root_cause(faults)
    if cause.mistake:
        raise ValueError(cause.message)
    where = f"worker {cause.rank} ({places[cause.rank]})"
    if cause.kind == "died":
        raise RunFailed(f"{where} {cause.message}", cause.traceback, retry=cause.retry)
    failed = failure(cause.kind, cause.message, cause.traceback, where)
    failed.retry = cause.retry
    raise failed


def failure(kind: str, message: str, traceback: str, where: str = "") -> RunFailed:
    """For an exception that stopped a run: those meant for the user stand as they are, others are named and placed."""
    if kind == _TAKEN:
        return RunLost(message)
    if kind in _SAY_IT_ALL:
        return RunFailed(message)
    place = f"{where} failed: " if where else ""
    if kind in _OUT_OF_MEMORY_TYPES or any(words in message for words in _OUT_OF_MEMORY):
        hint = (
            "take more workers, or a smaller data.batch, data.context or model; `longstride plan` says what each takes"
        )
        return RunFailed(f"{place}out of memory: {hint} ({message})", traceback)
    return RunFailed(f"{place}{kind}: {message}", traceback)


def is_mistake(error: BaseException) -> bool:
    """Whether the error is one that the user can put right."""
    if is_outage(error):
        return False
    return (
        _is_taken_port(error)
        or isinstance(error, ValueError)
        or (isinstance(error, OSError) and error.filename is not None)
    )


def is_outage(error: BaseException) -> bool:
    """Whether a store could not be reached, however long it was waited for, or takes no more: another attempt, later,
    may go well.
    """
    if not isinstance(error, OSError):
        return False
    if error.errno in _FULL:
        return True
    from ..data.errors import StoreUnavailable  # slow to import, and --help needs none of it

    return isinstance(error, StoreUnavailable)


def _is_taken_port(error: BaseException) -> bool:
    """Whether a launcher's processes cannot meet at the port that they were given."""
    return type(error).__name__ == "DistNetworkError" and "EADDRINUSE" in str(error)


def one_line(error: BaseException) -> str:
    """The error's message without line breaks; a file's name first for the operating system's errors."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    if _is_taken_port(error):
        return f"MASTER_PORT={os.environ.get('MASTER_PORT')} is in use on this machine: give the launcher another port"
    return " ".join(str(error).split()) or type(error).__name__
