"""The process of a command ends with the command's exit code, whatever threads are still in it. Real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A thread that is in torch without Python's lock most of the time, as gloo's threads and a checkpoint's writer may be.
IN_TORCH = """
import resource, sys, threading, torch
from longstride.orchestrator import cli

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
multiplying = threading.Event()

def multiply():
    matrix = torch.ones(200, 200)
    while True:
        matrix @ matrix
        multiplying.set()

def command(words):
    threading.Thread(target=multiply, daemon=True).start()
    multiplying.wait()
    print("done")
    return 7

cli._run = command
"""
ENDS_WITH = """
import atexit, sys, threading, time
from longstride.orchestrator import cli

def command(words):
    atexit.register(print, "put away")
    threading.Thread(target=lambda: (time.sleep(0.2), print("waited for"))).start()
    print("done")
    {ending}

cli._run = command
sys.exit(cli.main())
"""


def start(code: str, directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python 3.14 lets such a thread be")
def test_a_thread_in_torch_does_not_change_the_exit_code(tmp_path: Path) -> None:
    """Without the process's own end the same thread aborts it."""
    mended = start(f"{IN_TORCH}sys.exit(cli.main())", tmp_path)
    taken_apart = start(f"{IN_TORCH}sys.exit(cli.main(sys.argv[1:]))", tmp_path)
    outputs = [process.communicate(timeout=60) for process in (mended, taken_apart)]
    assert (mended.returncode, outputs[0]) == (7, ("done\n", ""))
    assert taken_apart.returncode == -6
    assert "terminate called without an active exception" in outputs[1][1]


@pytest.mark.parametrize(("ending", "code"), [("return 7", 7), ("raise LookupError('a bug')", 1)])
def test_all_else_that_belongs_to_an_end_happens(ending: str, code: int, tmp_path: Path) -> None:
    process = start(ENDS_WITH.format(ending=ending), tmp_path)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stdout == "done\nwaited for\nput away\n"
    assert stderr.endswith("LookupError: a bug\n" if code == 1 else "")
    assert ("Traceback" in stderr) == (code == 1)


def test_output_that_cannot_be_written_is_told() -> None:
    """A full disk: as of any Python program."""
    words = [sys.executable, "-c", ENDS_WITH.format(ending="return 0")]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, env=buffered, text=True)
    assert "No space left on device" in done.stderr
    assert done.returncode == 120
