"""The command as a user runs it: a small config, and the process it becomes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = """
workers: 1
seed: 3
model:
  vocab_size: 256
  width: 32
  layers: "[mamba, attention+moe]"
  attention: {heads: 2, kv_heads: 1}
  moe: {experts: 2, top_k: 1, hidden: 32}
data: {corpus: python-source, context: 128, batch: 2, validation_sequences: 2}
train: {steps: 6, learning_rate: 1.0e-3, warmup: 2, dtype: float32, validate_every: 3}
checkpoint: {every: 2, asynchronous: false}
sample: {prompt: "def ", tokens: 8}
tracking: {enabled: false}
"""

# The same number of tokens a step: two sequences of 64, then one of 128.
GROWING = ("data.batch=1", "data.schedule=64 for 4 steps")


def write_config(directory: Path) -> Path:
    """The small config, with runs below `directory`."""
    path = directory / "small.yaml"
    path.write_text(CONFIG + f"run: {{directory: {directory / 'runs'}, name: small}}\n")
    return path


def losses(run: Path) -> list[float]:
    """Step losses of a run, in order; empty before its first step."""
    file = run / "metrics.jsonl"
    records: list[dict[str, Any]] = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


def start_command(*arguments: str, directory: Path, **environment: str) -> subprocess.Popen[str]:
    """`longstride` with these arguments, in a session of its own."""
    values = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(directory), **environment}
    for name in ("RAY_ADDRESS", "RANK", "WORLD_SIZE"):
        values.pop(name, None)
    program = str(Path(sys.executable).parent / "longstride")
    return subprocess.Popen(
        [program, *arguments],
        cwd=directory,
        env=values,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@contextmanager
def running(*arguments: str, directory: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`start_command`; what still runs at the end, as after a failure, is asked to end with all that it started."""
    process = start_command(*arguments, directory=directory, **environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def finish(process: subprocess.Popen[str], timeout: float = 120) -> Outcome:
    """Waits for the command; kills it and fails when it takes longer."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        raise AssertionError(f"no end after {timeout:.0f} s\n{stdout}\n{stderr}") from None
    return Outcome(process.returncode, stdout, stderr)


def run_command(*arguments: str, directory: Path, **environment: str) -> Outcome:
    """`longstride` from start to end."""
    return finish(start_command(*arguments, directory=directory, **environment))
