"""What becomes of a run when nobody watches it any more. Real terminals and pipes."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from longstride.workers import RunDirectory
from longstride.workers.manifest import list_checkpoints

from .commands import losses, write_config
from .nodes import title, wait_until

LONGSTRIDE = str(Path(sys.executable).parent / "longstride")
# Begins a session on the terminal that is its input, as a login does, and becomes the rest of its words.
LOGIN = (
    sys.executable,
    "-c",
    "import fcntl, os, signal, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])",
)
DIRECTORY = re.compile(r"/\S*/longstride-ray-\w+")  # Ray's files


def environment(directory: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(directory), "TERM": "xterm"}


@pytest.mark.alone
def test_a_closed_terminal_ends_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    """The system tells all processes of the terminal, Ray's among them."""
    write_config(tmp_path)
    words = ("workers=2", "train.steps=100000", "train.validate_every=0", "checkpoint.every=0")
    terminal, inside = pty.openpty()
    training = subprocess.Popen(
        [*LOGIN, LONGSTRIDE, "train", "small.yaml", *words],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdin=inside,
        stdout=inside,
        stderr=inside,
    )
    os.close(inside)
    run = tmp_path / "runs" / "small"
    try:
        wait_until(lambda: len(losses(run)) >= 3, "some steps")
        helpers = psutil.Process(training.pid).children(recursive=True)
        (ours,) = {found[0] for found in map(DIRECTORY.search, map(title, helpers)) if found}
        os.close(terminal)
        assert training.wait(60) == 129
        assert not psutil.wait_procs(helpers, timeout=20)[1]
    finally:
        training.kill()
    (checkpoint,) = list_checkpoints(RunDirectory(str(run)))
    assert checkpoint.problems() == []
    assert checkpoint.step == len(losses(run))
    assert "given_back" in RunDirectory(str(run)).read_info()["owner"]
    assert not Path(ours).exists()


def test_a_run_goes_on_without_a_reader(tmp_path: Path) -> None:
    """As in `longstride train ... | head -1`, or when the one who kept its output has ended."""
    write_config(tmp_path)
    training = subprocess.Popen(
        [LONGSTRIDE, "train", "small.yaml"],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert training.stdout is not None and training.stderr is not None
    assert training.stdout.readline().startswith("run small")
    training.stdout.close()
    errors = training.stderr.read()
    assert training.wait(60) == 0, errors
    assert errors == ""
    assert len(losses(tmp_path / "runs" / "small")) == 6
