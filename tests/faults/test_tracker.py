"""A real MLflow server killed and started again beside a run: every metric arrives, and no step waits for it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing as mp
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from longstride.workers import RunDirectory, create_run, train_process
from longstride.workers.metrics import StepRecord, read_records
from longstride.workers.mlflow_client import METRICS, SYSTEM_METRICS, values
from longstride.workers.reporting import Silent, Summary

from ..distributed import PRELOAD
from ..orchestrator.nodes import PIN, free_port, wait_until
from ..timing import in_time
from ..workers.tiny import tiny_experiment

# Training has the first core for itself, the server the last.
CORES = sorted(os.sched_getaffinity(0))


class Server:
    """`mlflow server` over one database, which outlives it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port = directory, free_port("127.0.0.1")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = [str(Path(sys.executable).parent / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--backend-store-uri", f"sqlite:///{self.directory}/mlflow.db", "--workers", "1"]
        words += ["--artifacts-destination", str(self.directory / "artifacts")]
        with (self.directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*PIN, str(CORES[-1]), sys.executable, *words],
                stdout=log,
                stderr=log,
                cwd=self.directory,
                start_new_session=True,
            )

    def wait(self) -> None:
        wait_until(self.answers, "the tracking server answers", timeout=240)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=1) as answer:
            return answer.status == 200
        return False

    def kill(self) -> None:
        """SIGKILL to the server and the processes it started."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def a_server(directory: Path) -> Iterator[Server]:
    """Not started yet; killed at the end."""
    server = Server(directory)
    try:
        yield server
    finally:
        server.kill()


def history(server: Server, run_id: str, name: str) -> list[tuple[int, float]]:
    """Every value that MLflow has of a metric, by step."""
    from mlflow import MlflowClient

    found = MlflowClient(tracking_uri=server.url).get_metric_history(run_id, name)
    return sorted((entry.step, entry.value) for entry in found)


class Clock(Silent):
    """The time of every step, and the part of it that was not spent waiting for a core (other work on the machine)."""

    def __init__(self, directory: Path, stop: threading.Event) -> None:
        self.directory, self.stop = directory, stop
        self.last: tuple[float, float] | None = None
        self.steps: list[tuple[float, float, float]] = []

    def stepped(self, record: StepRecord) -> None:
        # of the thread that trains: nanoseconds on a core, nanoseconds waiting for one, turns
        waiting = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
        now = time.time()
        if self.last is not None:
            seconds = now - self.last[0]
            self.steps.append((now, seconds, seconds - (waiting - self.last[1])))
        self.last = now, waiting
        if (self.directory / "enough").exists():
            self.stop.set()

    def finished(self, summary: Summary) -> None:
        (self.directory / "steps.json").write_text(json.dumps(self.steps))


def train(directory: Path, uri: str) -> None:
    """Trains until there is a file `enough`."""
    os.sched_setaffinity(0, {CORES[0]})
    settings = ["tracking.enabled=true", f"tracking.uri={uri}", "tracking.patience=120", "checkpoint.every=0"]
    settings += ["train.steps=100000", "train.validate_every=0", "data.context=256", "model.hyena.max_length=256"]
    stop = threading.Event()
    experiment = tiny_experiment(str(directory), *settings)
    run = create_run(experiment)
    train_process(experiment, run=run.url, threads=1, reporter=Clock(directory, stop), stop=stop)


def train_beside_kills(server: Server, directory: Path, kills: int) -> list[tuple[float, float]]:
    """When the server was away: from each kill until it answered again."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    training = context.Process(target=train, args=(directory, server.url), daemon=True)
    training.start()
    server.start()  # it is not there when training begins
    server.wait()
    down: list[tuple[float, float]] = []
    for _ in range(kills):
        time.sleep(3)  # for records to arrive, and others to be on their way
        killed = time.time()
        server.kill()
        time.sleep(1)
        server.start()
        server.wait()
        down.append((killed, time.time()))
    time.sleep(3)
    (directory / "enough").touch()
    training.join(180)
    assert training.exitcode == 0
    return down


def longest_step(directory: Path, down: list[tuple[float, float]]) -> float:
    """The longest step without a server or while it catches up, in medians of all; waiting for a core not counted."""
    steps: list[tuple[float, float, float]] = json.loads((directory / "steps.json").read_text())
    without = [step for step in steps if any(start < step[0] < stop + 2 for start, stop in down)]
    assert len(without) > 20
    wall, own = (statistics.median(step[number] for step in steps) for number in (1, 2))
    longest, longest_own = (max(step[number] for step in without) for number in (1, 2))
    print(f"\n{len(down)} kills, {len(steps)} steps, {len(without)} of them without a server or while it catches up")
    print(f"median {1e3 * wall:.1f} ms, longest {longest / wall:.2f} of it; without the wait for a core ", end="")
    print(f"{1e3 * own:.1f} ms, {longest_own / own:.2f}")
    return longest_own / own


@pytest.mark.timing
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=[pytest.mark.slow, pytest.mark.soak])])
def test_a_killed_server_loses_no_metric_and_delays_no_step(tmp_path: Path, kills: int) -> None:
    with a_server(tmp_path) as server:
        down = train_beside_kills(server, tmp_path, kills)
        run = RunDirectory(str(tmp_path / "tiny"))
        found, run_id = list(read_records(run.storage)), run.read_info()["mlflow"]["run_id"]
        for name in [*METRICS, *SYSTEM_METRICS]:
            expected = [(record.step, values(record)[name]) for record in found if name in values(record)]
            assert history(server, run_id, name) == expected, name
    longest = longest_step(tmp_path, down)
    in_time(longest < 2, longest)
