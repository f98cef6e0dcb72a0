"""A run has one writer: a second driver takes it over, and the first stops with one line. Real processes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from longstride.orchestrator.failures import Fault, RunLost, raise_fault
from longstride.workers import Experiment, RunDirectory, create_run
from longstride.workers.run_directory import RunTaken

from .commands import finish, losses, start_command
from .nodes import wait_until

# Steps enough for the second to come in the midst of the first.
MANY = ("train.steps=100000", "train.validate_every=0", "checkpoint.every=20")


def steps(run: Path) -> int:
    """Lines in the log at this moment."""
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0


@pytest.mark.timeout(600)
def test_a_second_driver_takes_the_run_over(place: Path) -> None:
    run = place / "runs" / "small"
    first = start_command("train", "small.yaml", *MANY, directory=place)
    second = None
    try:
        wait_until(lambda: steps(run) > 40, "the first to train", 200)
        second = start_command("resume", str(run), directory=place)
        ended = finish(first, 200)
        assert ended.code == 1
        assert ended.stderr.startswith("longstride: run small was taken over from ")
        assert ended.stderr.count("\n") == 1
        made = steps(run)
        wait_until(lambda: steps(run) > made + 40, "the second to train", 200)
        second.send_signal(signal.SIGTERM)
        outcome = finish(second, 200)
        assert outcome.code == 143, outcome.stderr
        assert "nobody gave the run back: whoever may still train it stops" in outcome.stdout
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
    assert len(losses(run)) > made, "each step once, in order"
    assert "failures" not in RunDirectory(str(run)).read_info()
    assert "given_back" in RunDirectory(str(run)).read_info()["owner"]


def test_the_last_to_take_a_run_has_it(place: Path) -> None:
    first = create_run(Experiment.load("small.yaml"))
    first.take()
    worker = RunDirectory(first.url, first.token)
    worker.check_owner()
    assert not worker.lost()
    second = RunDirectory(first.url)
    second.take()
    assert worker.lost()
    with pytest.raises(RunTaken, match=r"run small was taken over from \S+ at 20"):
        worker.check_owner()
    first.give_back()
    assert second.read_info()["owner"]["token"] == second.token, "it is the other's"
    assert not second.lost()
    second.give_back()
    assert worker.lost(), "one that wakes up late as well"
    assert not RunDirectory(first.url).lost(), "without a token nobody asks"


def test_a_lost_run_is_not_tried_again() -> None:
    fault = Fault.from_exception(0, RunTaken("run small was taken over"), "")
    with pytest.raises(RunLost, match="run small was taken over") as caught:
        raise_fault([fault], ["process 1"])
    assert not caught.value.retry
