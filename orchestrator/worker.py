"""The Ray actor that is one process of a run: a thin shell around `workers.train_process`.

Its main method trains for as long as the run lasts. A second group of threads answers meanwhile: who the worker is,
what it has to report, and that it should stop.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from dataclasses import dataclass
from types import FrameType

import psutil
import ray

from ..workers import Experiment, Summary, train_process
from ..workers.liveness import silent_seconds
from .failures import Fault
from .records import Outbox, OutboxReporter, Report
from .rendezvous import Rendezvous


@dataclass(frozen=True)
class Assignment:
    """What a worker is to do.

    Attributes:
        run: the run directory's URL; it exists. token: with which the driver took it.
        resume: go on from the last whole checkpoint.
        device: "cpu" or "cuda".
        neighbours: workers on this node, itself included; they share its cores.
        node_size: workers on every node, where that is one number; see `train_process`.
    """

    experiment: Experiment
    run: str
    token: str | None
    resume: bool
    rank: int
    world_size: int
    device: str
    neighbours: int
    node_size: int | None
    rendezvous: Rendezvous


class Worker:
    """One process of a run."""

    def __init__(self) -> None:
        self._outbox = Outbox()
        self._stop = threading.Event()
        self._training = threading.Event()
        # Ray's own would wait for the end of training before it ends the process, which answers nobody meanwhile.
        self._before = signal.signal(signal.SIGTERM, self._terminated)

    def train(self, assignment: Assignment) -> Summary | Fault | None:
        """Trains to the end. Rank 0 returns the run's summary, others None; a Fault is what ended it early.

        Faults are returned, not raised: they arrive whole, whatever the exception held.
        """
        rank = assignment.rank
        self._training.set()
        try:
            alone = assignment.neighbours == assignment.world_size
            if interface := _interface("127.0.0.1" if alone else ray.util.get_node_ip_address()):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
            return train_process(
                assignment.experiment,
                rank,
                assignment.world_size,
                run=assignment.run,
                token=assignment.token,
                store=assignment.rendezvous.connect(),
                device=assignment.device,
                threads=max(1, len(os.sched_getaffinity(0)) // assignment.neighbours),
                node_size=assignment.node_size,
                reporter=OutboxReporter(self._outbox),
                resume=assignment.resume,
                stop=self._stop,
            )
        except Exception as error:
            return Fault.from_exception(rank, error, traceback.format_exc())
        finally:
            self._training.clear()
            self._outbox.close()

    @ray.method(concurrency_group="control")
    def place(self) -> str:
        """Who this is: process id and host."""
        return f"process {os.getpid()} on {socket.gethostname()}"

    @ray.method(concurrency_group="control")
    def silent_seconds(self) -> float:
        """See `workers.liveness`."""
        return silent_seconds()

    @ray.method(concurrency_group="control")
    def stacks(self) -> str:
        """Where every thread of this process is, innermost call last."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sys._current_frames().items()
        return "\n".join(f"{names.get(i, i)}:\n{''.join(traceback.format_stack(frame))}" for i, frame in frames)

    # Asked for after every step: Ray would keep an entry of each, hundreds of megabytes in its head in the end.
    @ray.method(concurrency_group="control", enable_task_events=False)
    def reports(self, after: int, wait: float) -> list[Report]:
        """See `Outbox.take`."""
        return self._outbox.take(after, wait)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Asks for an end after the step at hand, with a checkpoint; one worker's wish is everybody's."""
        self._stop.set()

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM: as `stop`; the next one, and one of a worker that does not train, as Ray has it."""
        if self._training.is_set() and not self._stop.is_set():
            self._stop.set()
        elif callable(self._before):
            self._before(number, frame)


def _interface(address: str) -> str | None:
    """The network interface that has the node's address as Ray knows it, for the processes' own traffic.

    Left to itself gloo takes what the host's name resolves to, which on many systems is a loopback address.
    """
    if address.startswith("127."):
        address = "127.0.0.1"  # all addresses of that network are the loopback interface's
    for name, found in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in found):
            return name
    return None
