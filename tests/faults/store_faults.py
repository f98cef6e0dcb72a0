"""What happens to a store behind the proxy, by name. All of it passes, and each stops whoever does not try again."""

from __future__ import annotations

from collections.abc import Callable

from longstride.data import object_store

from .proxy import FaultProxy

OUTAGE = 1.5
IMPATIENCE = 1.0


def hurry() -> None:
    """From here on a silent try ends soon, in file systems that are made from now on. For processes of a test's own."""
    object_store.ANSWER_SECONDS = IMPATIENCE


def _refuse(proxy: FaultProxy) -> None:
    proxy.refuse()
    proxy.heal_after(OUTAGE)
    proxy.faults += 1


FAULTS: dict[str, Callable[[FaultProxy], None]] = {
    "refuses": _refuse,
    "hangs": lambda proxy: proxy.hang(lasts=OUTAGE),
    "answers too late": lambda proxy: proxy.delay(3 * IMPATIENCE, lasts=OUTAGE),
    "throttles": lambda proxy: proxy.throttle(times=2),
    "drops": lambda proxy: proxy.drop(after=5_000, times=2),
}
