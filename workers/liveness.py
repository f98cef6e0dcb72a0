"""Signs of life of this process between its steps.

Restoring, verifying and saving a checkpoint, validating and sampling can take longer than any step. Each says so after
every piece of its work, and whoever supervises the process asks how long ago that was before taking it to hang.
"""

from __future__ import annotations

import time

_last = time.monotonic()


def alive() -> None:
    """A piece of work is done: a block of a file, a tensor, a batch, a token. Cheap; any thread may call it."""
    global _last
    _last = time.monotonic()


def silent_seconds() -> float:
    """Since the last sign of life, or since this module was imported."""
    return time.monotonic() - _last
