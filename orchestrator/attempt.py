"""One attempt at a run: workers are started in their places, trained, listened to, and ended together.

It ends with rank 0's summary or with an exception that names the cause; `supervisor` makes another attempt from the
last checkpoint, because nothing here outlives the attempt.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, OutOfMemoryError, RayActorError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..workers import Reporter, Summary
from .failures import Fault, RunFailed, one_line, raise_fault
from .placement import Placement, answers
from .preparation import Prepared
from .records import replay
from .rendezvous import Rendezvous
from .stopping import STOPPING, StopRequest, stoppable
from .worker import Assignment, Worker

START_SECONDS = 120.0
# After the first fault the others report theirs within milliseconds; Ray needs longer to notice a death.
GRACE_SECONDS = 5.0
# How long a worker holds a question for reports open, and the pause before a dead one is asked again.
POLL_SECONDS = 0.5
DEAD_WORKER_PAUSE = 0.05
# A worker's second group of threads answers at once, unless the process or its node has stopped.
ANSWER_SECONDS = 5.0
# How often the cluster is looked at for a reason to move.
WATCH_SECONDS = 2.0

Answer = Summary | Fault | None
Reason = str | None
# The second group of threads answers questions while the first trains.
_ACTOR: Any = cast(Any, ray.remote)(concurrency_groups={"control": 2})(Worker)


class Crew:
    """The workers of one attempt, by rank, started and idle. `places`: who they are."""

    def __init__(self, placement: Placement, workers: list[Any], places: list[str]) -> None:
        self.placement, self.workers, self.places = placement, workers, places

    def train(
        self,
        prepared: Prepared,
        meeting: Rendezvous,
        reporter: Reporter,
        stop: StopRequest,
        watch: Callable[[], Reason] = lambda: None,
    ) -> Summary:
        """Trains what was prepared; rank 0's summary. `reporter` hears what rank 0 reports, in order, but the end.

        `watch` is asked every few seconds; once it gives a reason, training ends early with a checkpoint, as it does
        for `stop`. Raises ValueError for a mistake the user can put right and RunFailed when a worker failed, died or
        stopped making steps.
        """
        placement = self.placement
        answers = [
            worker.train.remote(
                Assignment(
                    prepared.experiment,
                    prepared.run.url,
                    prepared.run.token,
                    prepared.resume,
                    rank,
                    len(self.workers),
                    placement.device,
                    placement.addresses.count(placement.addresses[rank]),
                    placement.node_size,
                    meeting,
                )
            )
            for rank, worker in enumerate(self.workers)
        ]
        with stoppable(stop):
            return self._listen(answers, reporter, stop, watch, prepared.experiment.recovery.hang_seconds)

    def _listen(
        self,
        answers: list[ray.ObjectRef],
        reporter: Reporter,
        stop: StopRequest,
        watch: Callable[[], Reason],
        hang_seconds: float,
    ) -> Summary:
        """Passes reports on until every worker has answered or one has a fault."""
        pending = dict(zip(answers, range(len(answers)), strict=True))
        summary: Summary | None = None
        heard, leaving = 0, False
        alive_at = watched_at = time.monotonic()
        reports = self.workers[0].reports.remote(heard, POLL_SECONDS)
        while pending:
            ready, _ = ray.wait([*pending, reports], num_returns=1, timeout=WATCH_SECONDS)
            now = time.monotonic()
            if not leaving and (reason := self._reason_to_leave(stop, watch, now - watched_at >= WATCH_SECONDS)):
                leaving = True
                self.workers[0].stop.remote()
                reporter.noted(reason)
            if now - watched_at >= WATCH_SECONDS:
                watched_at = now
            for reference in ready:
                if reference == reports:
                    count = _pass_on(reports, reporter)
                    heard, alive_at = heard + count, now if count else alive_at
                    reports = self.workers[0].reports.remote(heard, POLL_SECONDS)
                    continue
                rank = pending.pop(reference)
                answer = self._answer(reference, rank)
                if isinstance(answer, Fault):
                    raise_fault([answer, *self._other_faults(pending)], self.places)
                summary, alive_at = answer or summary, now
            if hang_seconds and now - alive_at > hang_seconds:
                if (silence := self._silence()) > hang_seconds:
                    raise self._hang(now - alive_at)
                alive_at = now - silence
        _pass_on(self.workers[0].reports.remote(heard, 0.0), reporter)
        assert summary is not None, "rank 0 returns the summary"
        if not (leaving or summary.finished or stop.event.is_set()):
            reporter.noted(f"a worker was told to end (SIGTERM): going on from step {summary.step} with another")
        return summary

    def _reason_to_leave(self, stop: StopRequest, watch: Callable[[], Reason], due: bool) -> Reason:
        if stop.event.is_set():
            return STOPPING
        return watch() if due else None

    def _answer(self, reference: ray.ObjectRef, rank: int) -> Answer:
        try:
            return ray.get(reference)
        except OutOfMemoryError:
            return Fault(rank, "died", "was stopped by Ray because its node ran out of memory")
        except RayActorError as error:
            return Fault(rank, "died", self._cause_of_death(error, rank), str(error))
        except RayError as error:
            return Fault(rank, type(error).__name__, _short(error), str(error))

    def _cause_of_death(self, error: RayActorError, rank: int) -> str:
        text = str(error).lower()
        if "out of memory" in text or "oom" in text.split("common causes")[0]:
            return "died: its node ran out of memory"
        node = self.placement.nodes[rank]
        if not answers(node.id):
            return f"was lost with its node {node.address}"
        if isinstance(error, ActorUnavailableError):
            return "cannot be reached"
        return "died: killed from outside (out of memory?) or crashed"

    def _other_faults(self, pending: dict[ray.ObjectRef, int]) -> list[Fault]:
        """Faults of the workers still running that come to light within the grace period."""
        deadline = time.monotonic() + GRACE_SECONDS
        faults: list[Fault] = []
        while pending and (left := deadline - time.monotonic()) > 0:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=left)
            for reference in ready:
                answer = self._answer(reference, pending.pop(reference))
                if isinstance(answer, Fault):
                    faults.append(answer)
        return faults

    def _silence(self) -> float:
        """Seconds since a worker last got on with what lies between steps; infinite when one of them does not answer.

        Workers wait for each other: as long as one gets on, so does the run.
        """
        questions = [worker.silent_seconds.remote() for worker in self.workers]
        try:
            return min(ray.get(questions, timeout=ANSWER_SECONDS))
        except RayError:
            return math.inf

    def _hang(self, seconds: float) -> RunFailed:
        """Who does not answer at all; else where everybody is, for the file of details."""
        questions = [worker.stacks.remote() for worker in self.workers]
        ready, _ = ray.wait(questions, num_returns=len(questions), timeout=ANSWER_SECONDS)
        stacks, silent = [], []
        for rank, question in enumerate(questions):
            try:
                stack = ray.get(question, timeout=0) if question in ready else None
            except RayError:
                stack = None
            if stack is None:
                silent.append(rank)
            stacks.append(f"worker {rank} ({self.places[rank]}):\n{stack or 'no answer'}")
        who = ", ".join(f"worker {rank} ({self.places[rank]})" for rank in silent)
        cause = f"{who} does not answer" if who else "all workers answer, and wait"
        return RunFailed(f"no step for {seconds:.0f} s: {cause}", "\n".join(stacks), retry=True)


@contextlib.contextmanager
def formed(placement: Placement) -> Iterator[Crew]:
    """The workers of an attempt, all of them started; none is left on leaving, an interrupt included.

    Raises RunFailed when they do not start.
    """
    workers: list[Any] = []
    try:
        for rank in range(len(placement.nodes)):
            workers.append(_spawn(placement, rank))
        yield Crew(placement, workers, _await_start(workers))
    finally:
        for worker in workers:
            ray.kill(worker)


def _spawn(placement: Placement, rank: int) -> Any:
    gpus = 1 if placement.device == "cuda" else 0
    strategy = PlacementGroupSchedulingStrategy(placement.group, placement_group_bundle_index=rank)
    return _ACTOR.options(num_cpus=1, num_gpus=gpus, scheduling_strategy=strategy).remote()


def _await_start(workers: list[Any]) -> list[str]:
    """Who the workers are, once all of them have started."""
    try:
        return ray.get([worker.place.remote() for worker in workers], timeout=START_SECONDS)
    except GetTimeoutError:
        message = f"the {len(workers)} workers did not start within {START_SECONDS:.0f} s"
        raise RunFailed(message, retry=True) from None
    except RayError as error:
        raise RunFailed(f"a worker could not start: {_short(error)}", str(error), retry=True) from None


def _pass_on(reference: ray.ObjectRef, reporter: Reporter) -> int:
    """Hands on what came; how many there were. A dead worker has none: its answer says why."""
    try:
        reports = ray.get(reference)
    except RayActorError:
        time.sleep(DEAD_WORKER_PAUSE)
        return 0
    for method, argument in reports:
        # Whether the run has ended with the attempt, the supervisor knows.
        if method != "finished":
            replay((method, argument), reporter)
    return len(reports)


def _short(error: BaseException) -> str:
    return one_line(error)[:200]
