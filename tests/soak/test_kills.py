"""Thirty kills at random moments of one run, those while a checkpoint is written included, and what is left of it.

    make soak        or        python -m tests.soak.test_kills --kills 30 --seed 0     (prints the table)

Two workers train under the supervisor; a worker of chance is killed (or stopped, every fifth time) after a time of
chance, every third time at the very moment at which a checkpoint's files are there and its manifest is not. The run
must go on by itself with the losses of the undisturbed run, bitwise: no token lost or trained on twice, no torn
checkpoint trusted. (`losses` fails when a step is missing from the log or in it twice.)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from ..orchestrator.commands import losses, start_command, write_config
from ..orchestrator.nodes import suspend, title, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(7200)]

# A larger model than the other tests', so that writing a checkpoint takes a while that can be hit.
SETTINGS = (
    "workers=2",
    "train.steps=1000000",  # the run is stopped when it has been disturbed enough
    "train.validate_every=0",
    "checkpoint.every=5",
    "checkpoint.keep=3",
    "model.width=256",
    "recovery.hang_seconds=15",
    "recovery.max_failures=10",
)
EVERY_STOP, EVERY_TORN = 5, 3


@dataclass
class Kill:
    """One disturbance: what was done, at which step of the log, and how long until the next new step."""

    how: str
    step: int
    seconds: float = 0.0


@dataclass
class Outcome:
    """A disturbed run beside an undisturbed one."""

    steps: int
    kills: list[Kill] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    torn: int = 0
    skipped: int = 0
    differing: int = 0
    seconds: float = 0.0
    undisturbed_seconds: float = 0.0

    def table(self) -> str:
        """For people, and for docs/."""
        times = sorted(kill.seconds for kill in self.kills)
        rows = [("kills", str(len(self.kills)))]
        rows += [(f"  {how}", str(number)) for how, number in Counter(kill.how for kill in self.kills).items()]
        rows += [
            ("failures the supervisor saw", str(len(self.causes))),
            ("unfinished checkpoints at the end", str(self.torn)),
            ("resumes that passed over an unfinished checkpoint", str(self.skipped)),
            ("steps, none missing and none twice", str(self.steps)),
            ("steps whose loss differs from the undisturbed run's", str(self.differing)),
            ("seconds from a kill to the next new step, median", f"{times[len(times) // 2]:.1f}"),
            ("seconds from a kill to the next new step, longest", f"{times[-1]:.1f}"),
            ("seconds in all", f"{self.seconds:.0f}"),
            ("seconds undisturbed", f"{self.undisturbed_seconds:.0f}"),
        ]
        return "\n".join(f"| {name} | {value} |" for name, value in [("what", "number"), ("---", "---"), *rows])


def soak(directory: Path, kills: int, seed: int) -> Outcome:
    """Disturbs a run `kills` times. Raises AssertionError when it does not end well."""
    write_config(directory)
    chance = random.Random(seed)
    began = time.monotonic()
    process = start_command("train", "small.yaml", *SETTINGS, "run.name=killed", directory=directory)
    run = directory / "runs" / "killed"
    disturbances: list[Kill] = []
    try:
        for number in range(kills):
            wait_until(lambda: trained(run) or process.poll() is not None, "training", 300)
            disturbances.append(disturb(process, run, chance, number))
            struck = time.monotonic()
            wait_until(lambda: highest(run) > disturbances[-1].step or process.poll() is not None, "a new step", 300)
            disturbances[-1].seconds = time.monotonic() - struck
            assert process.poll() is None, process.communicate()
        wait_until(lambda: trained(run), "training", 300)
        process.terminate()
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 143, stderr
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    found = losses(run)
    outcome = Outcome(len(found), disturbances, seconds=time.monotonic() - began)
    expected, outcome.undisturbed_seconds = undisturbed(directory, len(found))
    outcome.causes = [entry["cause"] for entry in json.loads((run / "run.json").read_text()).get("failures", [])]
    whole = [(path / "manifest.json").exists() for path in (run / "checkpoints").iterdir()]
    outcome.torn, outcome.skipped = whole.count(False), stdout.count("is skipped")
    outcome.differing = sum(one != other for one, other in zip(found, expected, strict=True))
    return outcome


def undisturbed(directory: Path, steps: int) -> tuple[list[float], float]:
    """The losses of the same run in peace, without Ray, and its seconds."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "longstride.orchestrator", "train", "small.yaml", *SETTINGS, "run.name=peace"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, cwd=directory, env=environment, **quiet)
    peace = directory / "runs" / "peace"
    try:
        wait_until(lambda: highest(peace) > steps or process.poll() is not None, "the undisturbed run", 1800)
        return losses(peace)[:steps], time.monotonic() - began
    finally:
        process.terminate()
        process.wait(60)


def disturb(process: subprocess.Popen[str], run: Path, chance: random.Random, number: int) -> Kill:
    """Kills or stops a worker at a moment of chance."""
    if number % EVERY_TORN == EVERY_TORN - 1:
        how = "killed while a checkpoint was written"
        wait_until(lambda: being_written(run) or process.poll() is not None, "a checkpoint being written", 300, 0.002)
    else:
        how = "killed"
        time.sleep(chance.uniform(0.0, 3.0))
    victims = workers(process)
    if not victims:
        return Kill("nothing to kill", highest(run))
    victim = chance.choice(victims)
    try:
        if number % EVERY_STOP == EVERY_STOP - 1:
            how = how.replace("killed", "stopped (SIGSTOP)")
            suspend(victim)
        else:
            victim.kill()
    except psutil.Error:
        how = "nothing to kill"
    return Kill(how, highest(run))


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return sorted((child for child in children if title(child).startswith("ray::Worker")), key=lambda child: child.pid)


def trained(run: Path) -> bool:
    """Whether the newest start has made a step."""
    try:
        starts: list[dict[str, Any]] = json.loads((run / "run.json").read_text()).get("starts", [])
    except (OSError, ValueError):
        return False
    return bool(starts) and highest(run) > starts[-1]["step"]


def highest(run: Path) -> int:
    """Steps in the log at this moment."""
    log = run / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def being_written(run: Path) -> bool:
    """Whether the newest checkpoint has files and no manifest."""
    try:
        newest = max((run / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
        names = [path.name for path in newest.iterdir()]
    except (OSError, ValueError):
        return False
    return bool(names) and "manifest.json" not in names


def test_kills_at_random_moments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = soak(tmp_path, kills=30, seed=0)
    with capsys.disabled():
        print("\n" + outcome.table())
    assert len(outcome.kills) == 30
    assert sum("checkpoint" in kill.how for kill in outcome.kills) >= 5
    assert outcome.differing == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        print(soak(Path(place), chosen.kills, chosen.seed).table())
