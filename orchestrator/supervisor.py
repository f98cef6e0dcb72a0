"""Keeps a run going on a Ray cluster, whatever happens to its workers and nodes.

PLAN   the largest mesh that the cluster can hold now, its devices' memory included
PLACE  reserve places for it, sequence groups inside nodes
FORM   start the workers
RUN    train from the newest whole checkpoint
         -> DONE   all steps made, or stopped by the user
         -> PLAN   a node came or is about to leave: a checkpoint was written
         -> FAIL   a worker died, hung or failed; a node was lost
FAIL   -> PLAN, or the end: too many failures in a row without a new checkpoint, or one that would come again
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ..data import StoreUnavailable
from ..workers import Experiment, Reporter, Summary
from ..workers.manifest import list_checkpoints
from ..workers.run_directory import timestamp
from .arrangement import Node, arrange, fit
from .attempt import formed
from .cluster import Cluster, Resources, choose_device
from .failures import RunFailed, RunLost, one_line
from .forecast import forecast
from .placement import RESOURCE, Device, Placement, Taken, draining, reserved, room, usable_nodes
from .preparation import FAILURE_FILE, Prepared, take
from .rendezvous import Rendezvous
from .stopping import StopRequest
from .tables import amount_of_bytes

# After an attempt its places become free within this time; a stopped process takes Ray 5 s to kill.
SETTLE_SECONDS = 15.0
PAUSE_SECONDS = 0.5
# How often in a row the cluster must offer a larger mesh before the run moves to it.
GROW_AFTER = 2
ResultT = TypeVar("ResultT")


@dataclass
class Supervisor:
    """One run on one cluster. `reporter` hears every attempt as one run; `elastic`: fewer workers than asked will do.

    A run that begins takes what was asked for or nothing; one that went on with fewer workers grows again.
    """

    prepared: Prepared
    cluster: Cluster
    reporter: Reporter
    stop: StopRequest
    elastic: bool = False
    _failures: int = field(default=0, init=False)
    _step: int = field(default=0, init=False)
    _offers: int = field(default=0, init=False)
    _asked: int = field(default=0, init=False)
    _needs: dict[tuple[int, int], int] = field(default_factory=dict, init=False)

    def run(self, meeting: Rendezvous) -> Summary:
        """The run's summary, when all its steps are made or the user stopped it.

        Raises ValueError for a mistake the user can put right and RunFailed when the run cannot go on.
        """
        try:
            return self._attempts(meeting, self._device())
        finally:
            self._ask_for(0, "cpu")

    def _attempts(self, meeting: Rendezvous, device: Device) -> Summary:
        while True:
            experiment, nodes = self._plan(device)
            try:
                with reserved(nodes, experiment.degrees, device) as placement:
                    self._announce(placement, experiment)
                    with formed(placement) as crew:
                        resume = self._patiently(self._committed_step) > 0
                        prepared = replace(self.prepared, experiment=experiment, resume=resume)
                        watch = self._watch(placement, experiment)
                        if self.prepared.run.token is None:
                            take(self.prepared.run, self.reporter)
                        summary = crew.train(prepared, meeting, self.reporter, self.stop, watch)
            except Taken:
                continue
            except RunLost:
                raise
            except RunFailed as failure:
                self._fail(failure)
            else:
                if summary.finished or self.stop.event.is_set():
                    self.reporter.finished(summary)
                    return summary
            self.elastic = True
            meeting = replace(meeting, attempt=meeting.attempt + 1)

    def _device(self) -> Device:
        """What the workers compute on, for the whole run. ValueError after waiting: the cluster is too small."""
        wanted = self.prepared.experiment.workers
        recovery = self.prepared.experiment.recovery
        local = self.cluster.local

        def attempt() -> Device | ValueError:
            there = self.cluster.resources()
            try:
                return choose_device(wanted, there, local)
            except ValueError as error:
                # Fewer do for a run that goes on.
                kind: Device = "cuda" if there.gpus else "cpu"
                return kind if self.elastic and fit(self.prepared.experiment, _count(there, kind)) else error

        found = attempt()
        if isinstance(found, ValueError) and not local and recovery.wait_seconds:
            self._ask_for(wanted, "cuda" if self.cluster.resources().gpus else "cpu")
            self.reporter.noted(f"{str(found).partition(': use ')[0]}: waiting up to {recovery.wait_seconds:.0f} s")
            deadline = time.monotonic() + recovery.wait_seconds
            while isinstance(found, ValueError) and time.monotonic() < deadline:
                time.sleep(PAUSE_SECONDS)
                found = attempt()
        if isinstance(found, ValueError):
            raise found
        if found == "cpu" and self.cluster.resources().gpus:
            self.reporter.noted(f"on the CPU, because {wanted} workers want a GPU each and there are fewer")
        return found

    def _plan(self, device: Device) -> tuple[Experiment, list[Node]]:
        """The experiment on the mesh to take now, and nodes with room for it. RunFailed: no room came free in time.

        What could hold a larger mesh is waited for a moment: the places of the attempt before may not be free yet.
        """
        wanted = self.prepared.experiment
        began, told = time.monotonic(), False
        while True:
            nodes = usable_nodes(device)
            now = fit(wanted, sum(node.slots for node in nodes))
            soon = fit(wanted, sum(node.capacity for node in nodes))
            settled = time.monotonic() - began > SETTLE_SECONDS
            problem = None
            if now and (now.workers == wanted.workers or (self.elastic and (now == soon or settled))):
                problem = self._too_large(now, nodes, device)
                if problem is None:
                    # What a smaller mesh lacks goes on being asked for.
                    self._ask_for(wanted.workers if now.workers < wanted.workers else 0, device)
                    return now, nodes
            self._ask_for(wanted.workers, device)
            problem = problem or self._missing(nodes, device)
            if time.monotonic() - began > wanted.recovery.wait_seconds:
                raise RunFailed(f"no room within {wanted.recovery.wait_seconds:.0f} s: {problem}")
            if not told and settled:
                told = True
                self.reporter.noted(f"{problem}: waiting up to {wanted.recovery.wait_seconds:.0f} s")
            time.sleep(PAUSE_SECONDS)

    def _too_large(self, smaller: Experiment, nodes: list[Node], device: Device) -> str | None:
        """Why the devices cannot hold their parts of a mesh that is smaller than was asked for; None if they can.

        What the forecast counts is the least that a process takes. Of a schedule, the stage at hand counts.
        """
        wanted = self.prepared.experiment
        has = room(arrange(nodes, smaller.degrees), device) if smaller.workers < wanted.workers else None
        if has is None:
            return None
        stage = smaller.stage_after(self._patiently(self._committed_step))
        key = smaller.workers, stage.first
        if key not in self._needs:
            forecasts = forecast(smaller, device)
            self._needs[key] = next(sum(found.memory.values()) for found in forecasts if found.stage == stage)
        if self._needs[key] <= has:
            return None
        needs = f"{amount_of_bytes(self._needs[key])} a process, and there is {amount_of_bytes(has)}"
        return f"{smaller.workers} of {wanted.workers} workers would need {needs}"

    def _ask_for(self, workers: int, device: Device) -> None:
        """See `Cluster.ask_for`; the wish of another program on the cluster stays while there is none of ours."""
        if workers != self._asked:
            self._asked = workers
            self.cluster.ask_for(workers, device)

    def _missing(self, nodes: list[Node], device: Device) -> str:
        workers, kind = self.prepared.experiment.workers, RESOURCE[device]
        free, there = sum(node.slots for node in nodes), sum(node.capacity for node in nodes)
        where = f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}"
        return f"workers={workers} want a {kind} each; {free} of {there} {kind}s on {where} are free"

    def _announce(self, placement: Placement, experiment: Experiment) -> None:
        if not self.cluster.local:
            self.reporter.noted(placement.table())
        fewer = experiment.workers, self.prepared.experiment.workers
        if fewer[0] < fewer[1]:
            degrees = experiment.degrees
            mesh = f"data {degrees.replicate * degrees.data} x sequence {degrees.sequence}"
            self.reporter.noted(f"{fewer[0]} of {fewer[1]} workers have a place: going on as {mesh}")

    def _watch(self, placement: Placement, experiment: Experiment) -> Callable[[], str | None]:
        """Asks the cluster for a reason to move: a node that is about to leave, or room for a larger mesh."""
        self._offers = 0
        wanted = self.prepared.experiment

        def reason() -> str | None:
            leaving = draining()
            for node in placement.nodes:
                if node.id in leaving:
                    return f"node {node.address} is about to leave: writing a checkpoint and moving"
            if experiment.workers == wanted.workers:
                return None
            free = sum(node.slots for node in usable_nodes(placement.device))
            larger = fit(wanted, free + experiment.workers)
            self._offers = self._offers + 1 if larger and larger.workers > experiment.workers else 0
            if self._offers < GROW_AFTER or larger is None:
                return None
            return f"there is room for {larger.workers} workers: writing a checkpoint and growing"

        return reason

    def _fail(self, failure: RunFailed) -> None:
        """Counts a failure. Raises it when the run is not to go on."""
        if not failure.retry:
            with contextlib.suppress(OSError):  # where the store is the cause, it is not waited for once more
                self._note(failure, self._committed_step())
            raise failure
        try:
            step = self._patiently(self._committed_step)
        except RunFailed as away:
            away.add_note(f"before:   {failure}")
            raise
        most = self.prepared.experiment.recovery.max_failures
        self._failures = 1 if step > self._step else self._failures + 1
        self._step = max(step, self._step)
        try:
            self._patiently(lambda: self._note(failure, step))
        except OSError as error:  # a full disk: there may be room again by the next attempt
            self.reporter.noted(f"{one_line(error)}: run.json does not have this failure")
        if self._failures > most:
            if self._failures > 1:
                failure.add_note(f"gave up after {self._failures} failures in a row without a new checkpoint")
            raise failure
        place = f"from step {step}" if step else "from the beginning"
        self.reporter.noted(f"{failure}; going on {place} (failure {self._failures} of {most} in a row)")

    def _note(self, failure: RunFailed, step: int) -> None:
        """Keeps the failure in the run's directory."""
        run = self.prepared.run
        entry = {"time": timestamp(), "step": step, "cause": str(failure)}
        run.update_info(failures=[*run.read_info().get("failures", []), entry])
        if failure.details:
            run.storage.write_text(FAILURE_FILE, failure.details.rstrip() + "\n")

    def _patiently(self, work: Callable[[], ResultT]) -> ResultT:
        """What `work` finds in the run's store, tried again while that cannot be reached. RunFailed: for too long."""
        seconds = self.prepared.experiment.recovery.wait_seconds
        deadline, told = time.monotonic() + seconds, False
        while True:
            try:
                return work()
            except StoreUnavailable as error:
                if time.monotonic() >= deadline:
                    raise RunFailed(
                        f"the run's store stayed away for {seconds:.0f} s: {one_line(error)}; once it is back, "
                        f"`longstride resume {self.prepared.run.url}` goes on"
                    ) from error
                if not told:
                    told = True
                    self.reporter.noted(f"{one_line(error)}: waiting up to {seconds:.0f} s")
            time.sleep(PAUSE_SECONDS)

    def _committed_step(self) -> int:
        """The step of the newest checkpoint; 0: there is none."""
        committed = [found.step for found in list_checkpoints(self.prepared.run) if found.committed]
        return committed[-1] if committed else 0


def _count(there: Resources, device: Device) -> int:
    return there.gpus if device == "cuda" else there.cpus
