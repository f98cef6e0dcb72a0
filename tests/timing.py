"""Tests of time, on a machine that other work shares and that may stand still for seconds.

A test with `@pytest.mark.timing` runs by itself, and when an `in_time` of it does not hold it gets two more tries: what
waits where it should not does so in every one of them. All else that such a test asserts has to hold in each try.
"""

from __future__ import annotations

TRIES = 3


class OutOfTime(AssertionError):
    """A measured time that a machine which stood still would explain."""


def in_time(holds: bool, *measured: object) -> None:
    """Like `assert holds, measured`, but for times alone.

    Raises:
        OutOfTime: it does not hold, which pytest-rerunfailures answers with another try.
    """
    if not holds:
        raise OutOfTime(*measured)
