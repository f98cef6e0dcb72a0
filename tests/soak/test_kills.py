"""Kills at random moments of one run, those while a checkpoint is written included, and what is left of it.

    make soak        or        python -m tests.soak.test_kills --kills 30 --seed 0     (prints the table)

Two workers train under the supervisor; a worker of chance is killed (or stopped, every fifth time) after a time of
chance, every third time at the very moment at which a checkpoint's files are there and its manifest is not. The run
must go on by itself with the losses of the undisturbed run, bitwise: no token lost or trained on twice, no torn
checkpoint trusted. (`losses` fails when a step is missing from the log or in it twice.) Three kills are part of
`make test`, thirty of `make soak`.
"""

from __future__ import annotations

import argparse
import contextlib
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

pytestmark = pytest.mark.alone

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
    """One disturbance: what was done, at which step of the log and in which start, how long until the next new step."""

    how: str
    step: int
    start: int
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
            disturbances.append(kill := disturb(process, run, chance, number))
            struck = time.monotonic()
            wait_until(lambda kill=kill: gone_on(run, kill) or process.poll() is not None, "a new step", 300)
            kill.seconds = time.monotonic() - struck
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
    outcome.differing = differing(found, expected)
    return outcome


def differing(found: list[float], expected: list[float]) -> int:
    """Steps whose losses are not bitwise the same."""
    return sum(one != other for one, other in zip(found, expected, strict=True))


def undisturbed(directory: Path, steps: int) -> tuple[list[float], float]:
    """The losses of the same run in peace, without Ray, and its seconds."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "longstride.orchestrator", "train", "small.yaml", *SETTINGS, "run.name=peace"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    null = subprocess.DEVNULL
    process = subprocess.Popen(words, cwd=directory, env=environment, stdout=null, stderr=null)
    peace = directory / "runs" / "peace"
    try:
        wait_until(lambda: highest(peace) > steps or process.poll() is not None, "the undisturbed run", 1800)
        return losses(peace)[:steps], time.monotonic() - began
    finally:
        process.terminate()
        process.wait(60)


def disturb(process: subprocess.Popen[str], run: Path, chance: random.Random, number: int) -> Kill:
    """Kills or stops a worker at a moment of chance; tries again where the worker ended before it was struck."""
    torn, stopped = number % EVERY_TORN == EVERY_TORN - 1, number % EVERY_STOP == EVERY_STOP - 1
    how = ("stopped (SIGSTOP)" if stopped else "killed") + (" while a checkpoint was written" if torn else "")
    while True:
        if torn:
            wait_until(
                lambda: being_written(run) or process.poll() is not None, "a checkpoint being written", 300, 0.002
            )
        else:
            time.sleep(chance.uniform(0.0, 3.0))
        assert process.poll() is None, process.communicate()
        kill = Kill(how, highest(run), starts(run))
        with contextlib.suppress(psutil.Error):
            victim = chance.choice(workers(process))
            if stopped:
                suspend(victim)
            else:
                victim.kill()
            return kill


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The two that train; one of an earlier start that was stopped takes Ray some seconds to end."""

    def found() -> list[psutil.Process]:
        children = psutil.Process(process.pid).children(recursive=True)
        alive = [child for child in children if title(child).startswith("ray::Worker")]
        return sorted(alive, key=lambda child: child.create_time())[-2:]

    wait_until(lambda: len(found()) == 2, "two workers", 60)
    return found()


def starts(run: Path) -> int:
    """How often training has begun."""
    try:
        return len(json.loads((run / "run.json").read_text()).get("starts", []))
    except (OSError, ValueError):
        return 0


def gone_on(run: Path, kill: Kill) -> bool:
    """Whether training has begun anew and made a step that was not in the log before."""
    return starts(run) > kill.start and highest(run) > kill.step


def trained(run: Path) -> bool:
    """Whether the newest start has made a step."""
    try:
        begun: list[dict[str, Any]] = json.loads((run / "run.json").read_text()).get("starts", [])
    except (OSError, ValueError):
        return False
    return bool(begun) and highest(run) > begun[-1]["step"]


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


def check(outcome: Outcome, kills: int) -> None:
    """What must hold after so many kills."""
    assert len(outcome.kills) == kills
    assert len(outcome.causes) >= kills, "every kill was one, and the supervisor saw it"
    assert sum("checkpoint" in kill.how for kill in outcome.kills) == kills // EVERY_TORN
    assert outcome.differing == 0
    assert outcome.steps > max(kill.step for kill in outcome.kills)


@pytest.mark.timeout(300)
def test_three_kills(tmp_path: Path) -> None:
    check(soak(tmp_path, kills=3, seed=1), kills=3)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_kills_at_random_moments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = soak(tmp_path, kills=30, seed=0)
    with capsys.disabled():
        print("\n" + outcome.table())
    check(outcome, kills=30)
    assert outcome.skipped >= 3, "torn checkpoints were met, and passed over"


def test_a_step_lost_or_made_twice_is_found(tmp_path: Path) -> None:
    """The control."""
    found = [0.5, 0.25, 0.125]
    assert differing(found, found) == 0
    assert differing(found, [0.5, 0.25, 0.125 + 2**-52]) == 1
    for steps in ([1, 3], [1, 2, 2]):
        lines = [json.dumps({"step": step, "loss": 0.5}) for step in steps]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
        with pytest.raises(AssertionError):
            losses(tmp_path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        print(soak(Path(place), chosen.kills, chosen.seed).table())
