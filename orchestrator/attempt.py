"""One attempt at a run: workers are put in their places, started, listened to, and stopped together.

It ends with rank 0's summary or with an exception that names the cause; a supervisor can make another attempt from
the last checkpoint, because nothing here outlives the attempt.
"""

from __future__ import annotations

import socket
import time
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..workers import Reporter, Summary
from .cluster import Placement
from .failures import Fault, RunFailed, raise_fault
from .preparation import Prepared
from .records import replay
from .rendezvous import Rendezvous
from .stopping import StopRequest, stoppable
from .worker import Assignment, Worker

START_SECONDS = 120.0
# After the first fault the others report theirs within milliseconds; Ray needs longer to notice a death.
GRACE_SECONDS = 5.0
# How long a worker holds a question for reports open, and the pause before a dead one is asked again.
POLL_SECONDS = 0.5
DEAD_WORKER_PAUSE = 0.05

Answer = Summary | Fault | None
# The second group of threads answers questions while the first trains.
_ACTOR: Any = cast(Any, ray.remote)(concurrency_groups={"control": 2})(Worker)


def run_attempt(
    prepared: Prepared, placement: Placement, rendezvous: Rendezvous, reporter: Reporter, stop: StopRequest
) -> Summary:
    """Runs what was prepared to its end; rank 0's summary. `reporter` hears all that rank 0 reports, in order.

    Raises ValueError for a mistake the user can put right and RunFailed when a worker failed or died. In every case,
    an interrupt included, no worker is left.
    """
    workers = [_spawn(placement, bundle) for bundle in placement.bundles]
    try:
        places = _await_start(workers)
        assignments = [
            Assignment(
                prepared.experiment,
                prepared.run.url,
                prepared.resume,
                rank,
                len(workers),
                placement.device,
                placement.addresses.count(placement.addresses[rank]),
                rendezvous,
                _interface(placement),
            )
            for rank in range(len(workers))
        ]
        with stoppable(stop):
            answers = [worker.train.remote(its) for worker, its in zip(workers, assignments, strict=True)]
            return _listen(workers, answers, places, reporter, stop)
    finally:
        for worker in workers:
            ray.kill(worker)


def _spawn(placement: Placement, bundle: int) -> Any:
    gpus = 1 if placement.device == "cuda" else 0
    strategy = PlacementGroupSchedulingStrategy(placement.group, placement_group_bundle_index=bundle)
    return _ACTOR.options(num_cpus=1, num_gpus=gpus, scheduling_strategy=strategy).remote()


def _await_start(workers: list[ActorHandle]) -> list[str]:
    """Who the workers are, once all of them have started."""
    try:
        return ray.get([worker.place.remote() for worker in workers], timeout=START_SECONDS)
    except GetTimeoutError:
        raise RunFailed(f"the {len(workers)} workers did not start within {START_SECONDS:.0f} s") from None
    except RayError as error:
        raise RunFailed(f"a worker could not start: {_short(error)}", str(error)) from None


def _listen(
    workers: list[Any], answers: list[ray.ObjectRef], places: list[str], reporter: Reporter, stop: StopRequest
) -> Summary:
    """Passes reports on until every worker has answered or one has a fault."""
    pending = dict(zip(answers, range(len(answers)), strict=True))
    summary: Summary | None = None
    heard, asked_to_stop = 0, False
    reports = workers[0].reports.remote(heard, POLL_SECONDS)
    while pending:
        ready, _ = ray.wait([*pending, reports], num_returns=1)
        if stop.event.is_set() and not asked_to_stop:
            asked_to_stop = True
            workers[0].stop.remote()
            reporter.noted("stopping after this step; once more to stop at once")
        for reference in ready:
            if reference == reports:
                heard += _pass_on(reports, reporter)
                reports = workers[0].reports.remote(heard, POLL_SECONDS)
                continue
            rank = pending.pop(reference)
            answer = _answer(reference, rank)
            if isinstance(answer, Fault):
                raise_fault([answer, *_other_faults(pending)], places)
            summary = answer or summary
    _pass_on(workers[0].reports.remote(heard, 0.0), reporter)
    assert summary is not None, "rank 0 returns the summary"
    return summary


def _pass_on(reference: ray.ObjectRef, reporter: Reporter) -> int:
    """Hands on what came; how many there were. A dead worker has none: its answer says why."""
    try:
        reports = ray.get(reference)
    except RayActorError:
        time.sleep(DEAD_WORKER_PAUSE)
        return 0
    for report in reports:
        replay(report, reporter)
    return len(reports)


def _answer(reference: ray.ObjectRef, rank: int) -> Answer:
    try:
        return ray.get(reference)
    except OutOfMemoryError:
        return Fault(rank, "died", "was stopped by Ray because its node ran out of memory")
    except RayActorError as error:
        return Fault(rank, "died", _cause_of_death(error), str(error))
    except RayError as error:
        return Fault(rank, type(error).__name__, _short(error), str(error))


def _other_faults(pending: dict[ray.ObjectRef, int]) -> list[Fault]:
    """Faults of the workers still running that come to light within the grace period."""
    deadline = time.monotonic() + GRACE_SECONDS
    faults: list[Fault] = []
    while pending and (left := deadline - time.monotonic()) > 0:
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=left)
        for reference in ready:
            answer = _answer(reference, pending.pop(reference))
            if isinstance(answer, Fault):
                faults.append(answer)
    return faults


def _cause_of_death(error: RayActorError) -> str:
    text = str(error).lower()
    if "out of memory" in text or "oom" in text.split("common causes")[0]:
        return "died: its node ran out of memory"
    if "node" in text and ("node died" in text or "node has died" in text or "its node" in text):
        return "died with its node, or the node lost its connection"
    return "died: killed from outside (out of memory?) or crashed"


def _interface(placement: Placement) -> str | None:
    """Gloo's network interface: loopback when all workers share a node, gloo's own choice otherwise."""
    names = [name for _, name in socket.if_nameindex()] if placement.one_node else []
    return next((name for name in names if name in ("lo", "lo0")), None)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
