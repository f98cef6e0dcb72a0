"""Jobs on a cluster of two nodes with addresses of their own: real processes, really killed, stopped and lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .commands import Outcome, losses, run_command
from .nodes import Nodes, cluster, suspend, title, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ONE, TWO = "127.0.0.3", "127.0.0.4"
# float64: what another mesh adds in another order stays far below the tolerance for the whole run.
SETTINGS = (
    "workers=2",
    "train.steps=240",
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


def undisturbed(directory: Path) -> subprocess.Popen[str]:
    """The same run on the same mesh, without Ray and left in peace."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "longstride.orchestrator", "train", "small.yaml", *SETTINGS, "run.name=peace"]
    return subprocess.Popen(words, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


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


def test_a_job_goes_on_whatever_happens_to_its_workers_and_nodes(nodes: Nodes, place: Path) -> None:
    """A worker killed, a worker stopped, a node lost, a node added: the losses stay those of the undisturbed run."""
    peace = undisturbed(place)
    run = place / "runs" / "disturbed"
    job = submit(nodes, "run.name=disturbed", directory=place)
    assert job == "disturbed.1"

    wait_for_step(run, 15)
    nodes.worker(TWO).kill()
    wait_for_start(run, 2)
    wait_for_step(run, 45)
    suspend(nodes.worker(ONE))
    wait_for_start(run, 3)
    wait_for_step(run, 75)
    nodes.lose(TWO)
    wait_for_start(run, 4)
    alone_from = info(run)["starts"][3]["step"]
    wait_for_step(run, alone_from + 30)
    nodes.add(TWO)
    wait_for_start(run, 5)

    outcome = command(nodes, "logs", job, "-f", directory=place)
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    assert f"{ONE}  0      0, in part" in outcome.stdout
    assert f"{TWO}  1      0, in part" in outcome.stdout
    assert peace.wait(120) == 0, peace.communicate()

    causes = [entry["cause"] for entry in info(run)["failures"]]
    assert len(causes) == 3, causes
    assert "worker 1" in causes[0] and "died: killed from outside" in causes[0]
    assert causes[1].startswith("no step for") and "worker 0 (process" in causes[1] and "does not answer" in causes[1]
    assert causes[2].endswith(f"was lost with its node {TWO}")
    assert [entry["workers"] for entry in info(run)["starts"]] == [2, 2, 2, 1, 2]
    assert "+code." in info(run)["code_version"], "the job ran the code it brought"

    expected, found = losses(place / "runs" / "peace"), losses(run)
    assert len(found) == 240
    assert found[:alone_from] == expected[:alone_from], "bitwise on the same mesh"
    assert found == pytest.approx(expected, rel=1e-6)

    outcome = command(nodes, "status", directory=place)
    assert outcome.stdout.splitlines()[1].split()[:2] == [job, "succeeded"]


def test_a_stopped_job_and_a_lost_driver_are_taken_up_again(nodes: Nodes, place: Path) -> None:
    peace = undisturbed(place)
    run = place / "runs" / "again"
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
    driver = next(process for process in nodes.processes("127.0.0.2") if "longstride.orchestrator" in title(process))
    driver.kill()
    wait_until(lambda: "failed" in command(nodes, "status", job, directory=place).stdout, "the job has failed")

    job = submit(nodes, "run.name=again", directory=place)
    outcome = command(nodes, "logs", job, "-f", directory=place)
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    assert peace.wait(120) == 0, peace.communicate()
    assert losses(run) == losses(place / "runs" / "peace")
    assert info(run)["starts"][1]["step"] == stopped_at
    assert starts(run) == 3


def test_a_cluster_that_does_not_let_us_in(nodes: Nodes, place: Path) -> None:
    words = ("status", "--address", nodes.url)
    outcome = run_command(*words, directory=place, **nodes.environment, RAY_AUTH_TOKEN="0" * 64)
    assert outcome.code == 2
    assert outcome.stderr.count("\n") == 1
    assert "refuses our token: set RAY_AUTH_MODE=token" in outcome.stderr
    outcome = command(nodes, "logs", "nonsense", directory=place)
    assert outcome.code == 2
    assert "no job 'nonsense'" in outcome.stderr and outcome.stderr.count("\n") == 1
