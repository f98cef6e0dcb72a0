"""Runs as jobs of a Ray cluster: submitted, watched and stopped from anywhere that reaches its dashboard.

A job carries the code (a wheel, unpacked), the resolved config with the run's name in it, and the command that trains
or goes on: submitted again, or started again by the cluster, it finds its run.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import shlex
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from ..data.credentials import refuse_credentials
from ..workers import Experiment
from .failures import one_line
from .wheel import build_wheel

CONFIG_FILE = "experiment.yaml"
# Between the first signal and the last word Ray gives a job 3 s unless told otherwise; a checkpoint takes longer.
STOP_SECONDS = 600
POLL_SECONDS = 0.5
REACH_SECONDS = 10.0
AGENT_SECONDS = 60.0
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


class Jobs:
    """The jobs of the cluster whose dashboard is at `address` (http://host:8265).

    Every method raises ValueError of one line when the cluster cannot be reached, refuses the token or has no such job.
    """

    def __init__(self, address: str) -> None:
        self.address = check_address(address)
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        with self._explained():
            self._reach()
            self._client = JobSubmissionClient(self.address)
        logging.getLogger("ray").setLevel(logging.ERROR)  # which the client has just set to tell of its uploads

    def submit(self, experiment: Experiment, *, python: str = "python") -> str:
        """Sends code and config; the job's name, which is the run's with a number after it."""
        assert experiment.run.name is not None, "Experiment.load gives every run a name"
        name = self._free_name(experiment.run.name)
        with tempfile.TemporaryDirectory(prefix="longstride-job-") as directory, self._explained():
            pack(experiment, Path(directory))
            words = [python, "-m", "longstride.orchestrator", "train", CONFIG_FILE, "--continue", "--address", "auto"]
            submit = functools.partial(
                self._client.submit_job,
                # Without a shell in between the signal to stop reaches the driver itself.
                entrypoint=f"exec {shlex.join(words)}",
                submission_id=name,
                runtime_env={"working_dir": directory, "env_vars": job_environment()},
                metadata={"run": f"{experiment.run.directory.rstrip('/')}/{experiment.run.name}"},
            )
            _once_ready(submit)
        return name

    def list(self) -> list[Any]:
        """All jobs, oldest first, as Ray describes them."""
        with self._explained():
            return sorted((job for job in self._client.list_jobs() if job.submission_id), key=_start_time)

    def get(self, name: str) -> Any:
        """One job, as Ray describes it."""
        with self._explained(name):
            return self._client.get_job_info(name)

    def logs(self, name: str) -> str:
        """What the job has printed so far."""
        with self._explained(name):
            return self._client.get_job_logs(name)

    def follow(self, name: str) -> Iterator[str]:
        """What the job prints, as it comes, until it ends."""
        pieces = self._client.tail_job_logs(name)
        loop = asyncio.new_event_loop()
        try:
            with self._explained(name):
                self._client.get_job_status(name)
                while True:
                    try:
                        yield loop.run_until_complete(anext(aiter(pieces)))
                    except StopAsyncIteration:
                        return
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def stop(self, name: str, timeout: float) -> JobStatus:
        """Asks the job to write a checkpoint and leave; its state once it has ended, or after `timeout` seconds."""
        with self._explained(name):
            self._client.stop_job(name)
        return self.wait(name, timeout)

    def wait(self, name: str, timeout: float) -> JobStatus:
        """The job's state once it has ended, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (status := self.get(name).status) not in ENDED and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return status

    def _free_name(self, run: str) -> str:
        taken = {job.submission_id for job in self.list()}
        running = [job.submission_id for job in self.list() if job.submission_id.rpartition(".")[0] == run]
        for other in running:
            if self.get(other).status not in ENDED:
                raise ValueError(f"job {other} is working on run {run}: stop it first, or choose another run.name")
        return next(name for number in range(1, len(taken) + 2) if (name := f"{run}.{number}") not in taken)

    def _reach(self) -> None:
        """OSError when nobody answers; Ray's own client would wait for minutes."""
        with contextlib.suppress(urllib.error.HTTPError):  # somebody answers, and says no
            urllib.request.urlopen(self.address, timeout=REACH_SECONDS).close()

    @contextlib.contextmanager
    def _explained(self, job: str = "") -> Iterator[None]:
        """Turns what goes wrong between here and the cluster into one line that says what to do."""
        try:
            yield
        except AuthenticationError:
            raise ValueError(
                f"the cluster at {self.address} refuses our token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
                "RAY_AUTH_TOKEN_PATH) to the cluster's own"
            ) from None
        except OSError as error:
            if getattr(error, "response", None) is not None:
                raise ValueError(
                    f"{self.address} does not answer as a Ray dashboard: {one_line(error)[:200]}"
                ) from error
            raise ValueError(f"no Ray dashboard answers at {self.address}: {_reason(error)}") from error
        except RuntimeError as error:
            text = one_line(error)
            if job and ("404" in text or "does not exist" in text):
                known = ", ".join(found.submission_id for found in self.list()[-5:]) or "none"
                raise ValueError(f"no job {job!r} on the cluster at {self.address}; its jobs: {known}") from None
            raise ValueError(f"{self.address} does not answer as a Ray dashboard: {text[:200]}") from error


def pack(experiment: Experiment, directory: Path) -> None:
    """The wheel, unpacked, and the config: what every process of the job has in its current directory."""
    with tempfile.TemporaryDirectory() as aside, zipfile.ZipFile(build_wheel(Path(aside))) as archive:
        archive.extractall(directory)
    (directory / CONFIG_FILE).write_text(experiment.to_yaml(), encoding="utf-8")


def job_environment() -> dict[str, str]:
    """What the job's processes need to know: no secrets, which the cluster's own environment holds."""
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), "PYTHONUNBUFFERED": "1"}
    threads = os.environ.get("OMP_NUM_THREADS")
    return environment | ({"OMP_NUM_THREADS": threads} if threads else {})


def check_address(address: str) -> str:
    """ValueError unless `address` is the URL of a dashboard, with no secret in it."""
    refuse_credentials("--address", address if "://" in address else f"http://{address}", "RAY_AUTH_TOKEN")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--address {address!r} is not the URL of a Ray dashboard, such as http://10.0.0.5:8265")
    return address.rstrip("/")


def _once_ready(submit: Callable[[], object]) -> None:
    """Submits as soon as the cluster takes jobs: the agents that do come up some seconds after its dashboard."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            submit()
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)


def _start_time(job: Any) -> int:
    return job.start_time or 0


def _reason(error: Exception) -> str:
    text = str(error).lower()
    for sign, reason in (("refused", "connection refused"), ("timed out", "it does not answer in time")):
        if sign in text:
            return reason
    return "its name is not known" if "resol" in text or "not known" in text else one_line(error)[:120]
