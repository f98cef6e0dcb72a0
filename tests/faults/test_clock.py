"""A system's clock that is put back by an hour, then forward: no duration is measured with it.

The clock is that of a real process: a library in front of the C library's adds to it what a file says.
"""

from __future__ import annotations

import itertools
import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from ..orchestrator.commands import finish, losses, running, write_config
from ..orchestrator.nodes import wait_until

HOUR = 3600
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static volatile int64_t *offset;

__attribute__((constructor)) static void find_offset(void) {
    offset = mmap(0, sizeof *offset, PROT_READ, MAP_SHARED, open(getenv("CLOCK_OFFSET"), O_RDONLY), 0);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (clock == CLOCK_REALTIME && offset) now->tv_sec += *offset;
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    int failed = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *seconds) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (seconds) *seconds = exact.tv_sec;
    return exact.tv_sec;
}
"""


class Clock:
    """The clock of processes that have its `environment`."""

    def __init__(self, directory: Path) -> None:
        self._offset, library = directory / "offset", directory / "clock.so"
        self.put(0)
        (directory / "clock.c").write_text(CLOCK)
        words = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(directory / "clock.c"), "-ldl"]
        subprocess.run(words, check=True, capture_output=True)
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(self._offset)}

    def put(self, seconds: int) -> None:
        """So far from the system's."""
        with self._offset.open("r+b" if self._offset.exists() else "wb") as file:
            file.write(struct.pack("q", seconds))


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_training_does_not_mind(tmp_path: Path) -> None:
    """No checkpoint is due because of an hour that did not pass, and the times in the log grow all the same."""
    write_config(tmp_path)
    clock, run = Clock(tmp_path), tmp_path / "runs" / "jumps"
    words = ["train", "small.yaml", "run.name=jumps", "train.steps=600", "train.validate_every=0"]
    words += ["checkpoint.every=0", "checkpoint.minutes=30"]
    with running(*words, directory=tmp_path, **clock.environment) as training:
        for jump in (-HOUR, HOUR):
            step = len(losses(run)) + 20
            wait_until(lambda step=step: len(losses(run)) > step or training.poll() is not None, "20 steps", 200)
            clock.put(jump)
        outcome = finish(training, 200)
    assert outcome.code == 0, outcome.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = [record["time"] for record in records]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert min(gaps) > 0 and min(gaps) < 0.0011, "put back"
    assert max(gaps) > HOUR / 2, "put forward"
    assert all(0 <= record["seconds"] < 60 and 0 <= record["pause"] < 60 for record in records)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000600"]
