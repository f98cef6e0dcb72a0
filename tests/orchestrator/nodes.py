"""A Ray cluster of several "nodes" on one machine, each with its own loopback address, started as an operator would."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from .network import Network

RAY = str(Path(sys.executable).parent / "ray")
HEAD = "127.0.0.2"
# A command that runs the rest of its words on one core.
PIN = (
    sys.executable,
    "-c",
    "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execv(sys.argv[2], sys.argv[2:])",
)
# Ray's own values find a node lost after 13 s; a node that is told to end waits as long as in infra/kuberay, nearly.
HURRY = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "240",
}


class Nodes:
    """A head without places for workers, and nodes that can be added and lost. `home` holds the cluster's token.

    With a `network` every node has a namespace of its own.
    """

    def __init__(self, home: Path, temporary: str, head: str = HEAD, network: Network | None = None) -> None:
        self.home, self.temporary, self.head, self.network = home, temporary, head, network
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._seen: dict[int, psutil.Process] = {}
        (home / ".ray").mkdir(parents=True)
        (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
        self.port, self.dashboard_port = free_port(head), free_port(head)
        words = ["--head", f"--port={self.port}", "--num-cpus=0"]
        words += [f"--dashboard-host={head}", f"--dashboard-port={self.dashboard_port}"]
        self._start(head, words)
        wait_until(lambda: answers(head, self.dashboard_port), "the dashboard answers", timeout=120)

    @property
    def url(self) -> str:
        return f"http://{self.head}:{self.dashboard_port}"

    @property
    def environment(self) -> dict[str, str]:
        """For processes that are to be let in."""
        return {"HOME": str(self.home), "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1", "TMPDIR": self.temporary}

    def add(self, address: str, cpus: int = 1) -> None:
        """A node at `address`."""
        self._start(address, [f"--address={self.head}:{self.port}", f"--num-cpus={cpus}"])

    def revive(self, address: str) -> None:
        """Starts a node again that ended by itself: Ray gives a raylet 30 s, and a busy machine may take longer."""
        if self._started[address].poll() is not None:
            self.add(address)

    def lose(self, address: str) -> None:
        """The node's raylet is killed; its workers end with it."""
        next(process for process in self.processes(address) if process.name() == "raylet").kill()
        self._started.pop(address).wait(60)

    def forget(self, address: str) -> None:
        """Ends what is left of a node that the cluster has given up."""
        left = [psutil.Process(self._started[address].pid), *self.processes(address)]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._started.pop(address).wait(60)

    def preempt(self, address: str) -> subprocess.Popen[bytes]:
        """What Kubernetes does to a pod: SIGTERM. Ray drains the node, and ends it once nothing runs there."""
        self._started[address].terminate()
        return self._started[address]

    def processes(self, address: str) -> list[psutil.Process]:
        """The node's processes, its workers included; none when it has ended."""
        try:
            found = psutil.Process(self._started[address].pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self._seen |= {process.pid: process for process in found}
        return found

    def worker(self, address: str) -> psutil.Process:
        """The training worker on the node."""
        return next(process for process in self.processes(address) if title(process).startswith("ray::Worker"))

    def close(self) -> None:
        """Ends everything that was started; nothing stays. Asked politely, Ray takes a minute."""
        for address in self._started:
            self.processes(address)
        for process in (*self._started.values(), *self._seen.values()):
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(list(self._seen.values()), timeout=10)
        for process in self._started.values():
            process.wait(30)

    def _start(self, address: str, words: list[str]) -> None:
        common = [f"--node-ip-address={address}", "--num-gpus=0", "--block", "--disable-usage-stats"]
        # A directory of its own: nodes that share one replace each other's copy of a job's code.
        common += [f"--object-store-memory={80 * 2**20}", f"--temp-dir={self.temporary}/{address.rpartition('.')[2]}"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, **self.environment, **HURRY, "PATH": path}
        environment.pop("RAY_ADDRESS", None)
        # A core of its own, as on a machine of its own: how many threads there are shows in the last bit.
        cores = sorted(os.sched_getaffinity(0))
        core = cores[int(address.rpartition(".")[2]) % len(cores)]
        own = (
            [RAY, "start", *words, *common]
            if address == self.head
            else [*PIN, str(core), RAY, "start", *words, *common]
        )
        own = [*(self.network.enter(address) if self.network else []), *own]
        with Path(self.temporary, f"{address}.log").open("ab") as log:
            self._started[address] = subprocess.Popen(own, env=environment, stdout=log, stderr=subprocess.STDOUT)


@contextlib.contextmanager
def cluster(*addresses: str, head: str = HEAD, network: Network | None = None) -> Iterator[Nodes]:
    """A cluster with nodes of one place each at `addresses`."""
    temporary = tempfile.mkdtemp(prefix="ls", dir="/tmp")  # short: Ray's sockets lie below it
    nodes = Nodes(Path(temporary, "home"), temporary, head, network)
    try:
        for address in addresses:
            nodes.add(address)
        yield nodes
    finally:
        nodes.close()
        shutil.rmtree(temporary, ignore_errors=True)


def suspend(process: psutil.Process) -> None:
    """The process stops, and answers nobody, but stays."""
    process.send_signal(signal.SIGSTOP)


def title(process: psutil.Process) -> str:
    """The process's command line, which Ray sets to the actor's name; empty when it has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        return server.getsockname()[1]


def answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def wait_until(condition: Callable[[], Any], what: str, timeout: float = 240, pause: float = 0.2) -> None:
    """Fails when the condition does not come true in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s in vain: {what}"
        time.sleep(pause)
