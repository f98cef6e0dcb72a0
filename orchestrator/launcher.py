"""Being one of the processes that torchrun, or a launcher like it, has started.

The first process makes or reopens the run and tells the others where it is; they read the rest from there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from torch.distributed import DistNetworkError, PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from ..workers import Experiment, RunDirectory
from .failures import EchoOfMistake, RunFailed
from .preparation import Done, Prepared

_RUN_KEY, _HEARD_KEY = "longstride/run", "longstride/heard"
# How long the first process waits for the others to hear of a mistake before it takes their store away with itself.
_HEARD_SECONDS = 5.0


def present() -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's number; 0 without a launcher."""
    return int(os.environ["RANK"]) if present() else 0


def world_size() -> int:
    """How many processes there are; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if present() else 1


def with_workers(overrides: list[str]) -> list[str]:
    """`overrides` with `workers` as launched. ValueError when the user asked for another number."""
    launched = os.environ["WORLD_SIZE"]
    asked = [text.partition("=")[2].strip() for text in overrides if text.partition("=")[0].strip() == "workers"]
    if asked and asked[-1] != launched:
        raise ValueError(f"workers={asked[-1]}, but the launcher started {launched} processes: make them agree")
    return [*overrides, f"workers={launched}"]


def with_own_workers(overrides: list[str], command: str) -> list[str]:
    """`overrides` with `workers` as launched, 1 without a launcher. ValueError when the user asked for another number.

    For commands that start no processes themselves; the advice names `command`.
    """
    if present():
        return with_workers(overrides)
    asked = [text.partition("=")[2].strip() for text in overrides if text.partition("=")[0].strip() == "workers"]
    if asked and asked[-1] != "1":
        raise ValueError(
            f"workers={asked[-1]}: start so many with `torchrun --nproc-per-node {asked[-1]} "
            f"-m longstride.orchestrator {command} ...`"
        )
    return [*overrides, "workers=1"]


def meet(prepare: Callable[[], Prepared | Done]) -> tuple[Prepared | Done, Store]:
    """What the first process prepared, on all of them, and a store for their process group.

    When `prepare` fails, its error is raised on the first process and EchoOfMistake on the others;
    RunFailed there when it ended without a word.
    """
    store, own_rank, size = next(iter(rendezvous("env://")))
    if own_rank == 0:
        try:
            prepared = prepare()
        except BaseException:
            store.set(_RUN_KEY, "")
            _wait_for(store, size - 1)
            raise
        how = f"done-{prepared.step}" if isinstance(prepared, Done) else f"resume-{int(prepared.resume)}"
        store.set(_RUN_KEY, f"{how} {prepared.run.url}")
    else:
        try:
            how, _, url = store.get(_RUN_KEY).decode().partition(" ")
        except DistNetworkError as error:
            raise RunFailed("the first process ended before it had made the run: it says why", retry=True) from error
        if not url:
            store.add(_HEARD_KEY, 1)
            raise EchoOfMistake
        run, (what, _, number) = RunDirectory(url), how.partition("-")
        if what == "done":
            return Done(run, int(number)), store
        prepared = Prepared(Experiment.resume(run), run, number == "1", "")
    return prepared, PrefixStore("training", store)


def _wait_for(store: Store, others: int) -> None:
    """Where a launcher like Slurm's starts the processes, the store is the first one's, and ends with it."""
    deadline = time.monotonic() + _HEARD_SECONDS
    while store.add(_HEARD_KEY, 0) < others and time.monotonic() < deadline:
        time.sleep(0.05)
