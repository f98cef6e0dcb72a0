"""`longstride` under torchrun that notes every try of a request that failed and may be made again.

WITNESS names the folder of the notes, one file a process; PATIENCE is how many seconds a request is tried.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from longstride.data import object_store
from longstride.orchestrator.cli import main

_is_passing = object_store.is_passing


def _noting(error: BaseException) -> bool:
    passing = _is_passing(error)
    if passing:
        with (Path(os.environ["WITNESS"]) / os.environ["RANK"]).open("a") as notes:
            notes.write(" ".join(f"{error!r}".split()) + "\n")
    return passing


if __name__ == "__main__":
    object_store.PATIENCE_SECONDS = float(os.environ["PATIENCE"])
    object_store.is_passing = _noting
    sys.exit(main())
