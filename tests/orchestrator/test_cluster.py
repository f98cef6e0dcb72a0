"""Jobs on a cluster of two nodes with addresses of their own: real processes, really killed, stopped and lost."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .commands import Outcome, losses, run_command
from .nodes import HEAD, Nodes, cluster, suspend, title, wait_until

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]

ONE, TWO = "127.0.0.3", "127.0.0.4"
# float64: what another mesh adds in another order stays far below the tolerance for the whole run.
SETTINGS = (
    "workers=2",
    "train.steps=20000",  # more than anyone waits for: every run is stopped once it has shown what it should
    "train.dtype=float64",
    "train.validate_every=0",
    "checkpoint.every=10",
    "checkpoint.asynchronous=true",
    "recovery.hang_seconds=12",
)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with cluster(ONE, TWO) as started:
        yield started


def command(nodes: Nodes, *words: str, directory: Path) -> Outcome:
    return run_command(*words, "--address", nodes.url, directory=directory, **nodes.environment)


def submit(nodes: Nodes, *settings: str, directory: Path) -> str:
    outcome = command(nodes, "submit", "small.yaml", *SETTINGS, *settings, directory=directory)
    assert outcome.code == 0, outcome.stderr
    return outcome.stdout.strip()


@contextlib.contextmanager
def undisturbed(directory: Path, *settings: str) -> Iterator[Path]:
    """The same run on the same mesh, without Ray and left in peace; its directory."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "longstride.orchestrator", "train", "small.yaml", *SETTINGS, *settings, "run.name=peace"]
    process = subprocess.Popen(words, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield directory / "runs" / "peace"
    finally:
        process.terminate()
        process.wait(60)


def compare(run: Path, peace: Path, same_mesh: int) -> None:
    """Bitwise for the steps on the same mesh, to 1e-6 for the others."""
    found = losses(run)
    wait_for_step(peace, len(found) + 1)
    expected = losses(peace)[: len(found)]
    assert found[:same_mesh] == expected[:same_mesh]
    assert found == pytest.approx(expected, rel=1e-6)


def wait_for_step(run: Path, step: int) -> None:
    wait_until(lambda: recorded(run) >= step, f"step {step}")


def recorded(run: Path) -> int:
    """Steps in the log; it may be rewritten at this moment."""
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0


def info(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def starts(run: Path) -> int:
    return len(info(run).get("starts", []))


def wait_for_start(run: Path, number: int) -> None:
    wait_until(lambda: starts(run) >= number, f"start {number}")


def test_a_job_over_two_nodes_survives_a_killed_worker(nodes: Nodes, place: Path) -> None:
    """In short what the next test shows at length."""
    run = place / "runs" / "short"
    job = submit(nodes, "run.name=short", directory=place)
    wait_for_step(run, 12)
    nodes.worker(TWO).kill()
    wait_for_start(run, 2)
    wait_for_step(run, info(run)["starts"][1]["step"] + 5)
    outcome = command(nodes, "stop", job, directory=place)
    assert (outcome.code, outcome.stdout) == (0, f"job {job}: stopped\n"), outcome.stderr
    with undisturbed(place) as peace:
        compare(run, peace, same_mesh=recorded(run))

    assert (run / f"checkpoints/step-{recorded(run):08d}/manifest.json").exists(), "a stop leaves a checkpoint"
    log = command(nodes, "logs", job, directory=place).stdout
    assert f"{ONE}  0      0, in part" in log
    assert f"{TWO}  1      0, in part" in log
    (cause,) = (entry["cause"] for entry in info(run)["failures"])
    assert "worker 1" in cause and "died: killed from outside" in cause
    first, second = info(run)["starts"]
    assert (first["workers"], second["workers"]) == (2, 2)
    assert second["step"] > 0 and f"{cause}; going on from step {second['step']}" in log


@pytest.mark.slow  # two to three minutes of two cores; `make test` must stay under twelve
@pytest.mark.soak
def test_a_job_goes_on_whatever_happens_to_its_workers_and_nodes(nodes: Nodes, place: Path) -> None:
    """A worker killed, a worker stopped, a node lost, a node added: the losses stay those of the undisturbed run."""
    run = place / "runs" / "disturbed"
    with undisturbed(place) as peace:
        job = submit(nodes, "run.name=disturbed", directory=place)
        assert job == "disturbed.1"
        wait_for_step(run, 15)
        nodes.worker(TWO).kill()
        wait_for_start(run, 2)
        wait_for_step(run, info(run)["starts"][1]["step"] + 15)
        suspend(nodes.worker(ONE))
        wait_for_start(run, 3)
        wait_for_step(run, info(run)["starts"][2]["step"] + 15)
        nodes.lose(TWO)
        wait_for_start(run, 4)
        nodes.add(TWO)
        wait_for_start(run, 5)
        wait_for_step(run, info(run)["starts"][4]["step"] + 5)
        assert command(nodes, "stop", job, directory=place).code == 0
        compare(run, peace, same_mesh=info(run)["starts"][3]["step"])

    log = command(nodes, "logs", job, directory=place).stdout
    assert f"{ONE}  0      0, in part" in log
    assert f"{TWO}  1      0, in part" in log
    killed, stopped, lost = (entry["cause"] for entry in info(run)["failures"])
    assert "worker 1" in killed and "died: killed from outside" in killed
    assert stopped.startswith("no step for") and stopped.endswith("does not answer") and "worker 0 (pro" in stopped
    assert lost.endswith(f"was lost with its node {TWO}")
    assert all(f"{cause}; going on from step" in log for cause in (killed, stopped, lost))
    assert [entry["workers"] for entry in info(run)["starts"]] == [2, 2, 2, 1, 2]
    assert "+code." in info(run)["code_version"], "the job ran the code it brought"


@pytest.mark.slow  # as long again
@pytest.mark.soak
def test_a_stopped_job_and_a_lost_driver_are_taken_up_again(nodes: Nodes, place: Path) -> None:
    run = place / "runs" / "again"
    with undisturbed(place) as peace:
        job = submit(nodes, "run.name=again", directory=place)
        wait_for_step(run, 15)
        outcome = command(nodes, "submit", "small.yaml", *SETTINGS, "run.name=again", directory=place)
        assert outcome.code == 2 and f"job {job} is working on run again" in outcome.stderr

        outcome = command(nodes, "stop", job, directory=place)
        assert (outcome.code, outcome.stdout) == (0, f"job {job}: stopped\n"), outcome.stderr
        stopped_at = recorded(run)
        assert (run / f"checkpoints/step-{stopped_at:08d}/manifest.json").exists()

        job = submit(nodes, "run.name=again", directory=place)
        assert job == "again.2"
        wait_for_step(run, stopped_at + 15)
        driver = next(found for found in nodes.processes(HEAD) if "-m longstride.orchestrator" in title(found))
        driver.kill()
        wait_until(lambda: "failed" in command(nodes, "status", job, directory=place).stdout, "the job has failed")

        last = ("run.name=again", f"train.steps={recorded(run) + 20}", "--follow")
        outcome = command(nodes, "submit", "small.yaml", *SETTINGS, *last, directory=place)
        assert outcome.code == 0, outcome.stdout + outcome.stderr
        assert outcome.stdout.startswith("job again.3\n")
        assert "job again.3: succeeded" in outcome.stderr
        first, second, third = (entry["step"] for entry in info(run)["starts"])
        assert (first, second) == (0, stopped_at) and third > stopped_at
        wait_for_step(peace, third)
        assert losses(run)[:third] == losses(peace)[:third], "bitwise; the last job had another schedule"

    outcome = command(nodes, "status", directory=place)
    states = dict(line.split()[:2] for line in outcome.stdout.splitlines()[1:])
    assert {name: state for name, state in states.items() if name.startswith("again")} == {
        "again.1": "stopped",
        "again.2": "failed",
        "again.3": "succeeded",
    }


def test_a_cluster_that_does_not_let_us_in(nodes: Nodes, place: Path) -> None:
    words = ("status", "--address", nodes.url)
    outcome = run_command(*words, directory=place, **nodes.environment, RAY_AUTH_TOKEN="0" * 64)
    assert outcome.code == 2
    assert outcome.stderr.count("\n") == 1
    assert "refuses our token: set RAY_AUTH_MODE=token" in outcome.stderr
    outcome = command(nodes, "logs", "nonsense", directory=place)
    assert outcome.code == 2
    assert "no job 'nonsense'" in outcome.stderr and outcome.stderr.count("\n") == 1
