"""Runs a training in the way that fits: in this process alone, as one of torchrun's, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from ..workers import Reporter, Summary, train_process
from ..workers.display import Display
from ..workers.reporting import Silent
from . import launcher
from .failures import failure, is_mistake, one_line
from .preparation import Done, Prepared, guarded, new_run, old_run, same_run, take
from .stopping import StopRequest, stoppable, terminable


def start(config: str, overrides: list[str], address: str | None, *, same: bool = False) -> int:
    """Makes a run of the config and trains it; the exit code: 0 when finished, the signal's when asked to stop.

    With `same`, a run of the config's name that is there already goes on. Raises ValueError for a mistake and RunFailed
    for a run that could not go on, with what to do next as a note.
    """
    return _launch(lambda: (same_run if same else new_run)(config, _words(overrides)), address)


def go_on(run: str, overrides: list[str], address: str | None) -> int:
    """Continues a run, given by its path, URL or name, from its last whole checkpoint. Else like `start`."""
    return _launch(lambda: old_run(run, _words(overrides)), address)


def _words(overrides: list[str]) -> list[str]:
    return launcher.with_workers(overrides) if launcher.present() else overrides


def _launch(prepare: Callable[[], Prepared | Done], address: str | None) -> int:
    stop = StopRequest()
    prepared, store = launcher.meet(prepare) if launcher.present() else (prepare(), None)
    if isinstance(prepared, Done):
        print(f"run {prepared.run.name} has made all its {prepared.step} steps")
        return 0
    display = Display() if launcher.rank() == 0 else None
    with guarded(prepared) if display else contextlib.nullcontext():
        try:
            if store is not None or (prepared.experiment.workers == 1 and address is None):
                summary = run_here(prepared, store, display, stop)
            else:
                assert display is not None
                summary = run_on_ray(prepared, display, stop, address)
        finally:
            if display:
                display.close()
                with contextlib.suppress(OSError):  # a store that is lost, a full disk: how the run ended says more
                    prepared.run.give_back()
    finished = summary.finished if summary else not stop.event.is_set()
    return 0 if finished else stop.exit_code


def run_here(prepared: Prepared, store: Store | None, reporter: Reporter | None, stop: StopRequest) -> Summary | None:
    """Trains in this process: alone, or as a rank whose fellows it meets through `store`."""
    rank, workers = launcher.rank(), prepared.experiment.workers
    try:
        if rank == 0:
            take(prepared.run, reporter or Silent())
        stop.told = (reporter or Silent()).noted
        with stoppable(stop):
            return train_process(
                prepared.experiment,
                rank,
                workers,
                run=prepared.run.url,
                token=prepared.run.token,
                store=store,
                reporter=reporter,
                resume=prepared.resume,
                stop=stop.event,
            )
    except Exception as error:
        if is_mistake(error):
            raise
        where = f"worker {rank}" if workers > 1 else ""
        raise failure(type(error).__name__, one_line(error), traceback.format_exc(), where) from error


def run_on_ray(prepared: Prepared, reporter: Reporter, stop: StopRequest, address: str | None) -> Summary:
    """Trains with one Ray actor for every worker, on the cluster at `address` or on one that is started here."""
    from . import cluster, rendezvous
    from .supervisor import Supervisor

    with terminable(), cluster.open_cluster(address, prepared.experiment.workers) as ray_cluster:
        own_address = "127.0.0.1" if ray_cluster.local else ray_cluster.address
        supervisor = Supervisor(prepared, ray_cluster, reporter, stop, elastic=prepared.continued)
        with rendezvous.host(own_address) as meeting:
            try:
                return supervisor.run(meeting)
            except SystemError as error:
                # What a signal's handler raises inside of Ray's C code may come out as this.
                raise error.__cause__ or error from None
