"""A profile of one step: what each process did and when, for https://ui.perfetto.dev or Chrome's tracing page."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from ..data.storage import one_line
from .run_directory import RunDirectory

FOLDER = "profiles"


def profile_name(step: int, rank: int) -> str:
    """The file of one process in the run's directory: a compressed trace, as PyTorch's profiler writes it."""
    return f"{FOLDER}/step-{step:08d}-rank-{rank:05d}.json.gz"


@contextmanager
def profiled(run: RunDirectory, step: int, group: dist.ProcessGroup, noted: Callable[[str], None]) -> Iterator[None]:
    """Profiles what is done inside and writes it into the run's directory; nothing where what is inside fails.

    Every process of `group` calls this. A profile that cannot be written ends no run: the first process is `noted` it.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library prints when it begins and ends
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        yield
    rank, problems = dist.get_rank(group), [""] * dist.get_world_size(group)
    name, problem = profile_name(step, rank), ""
    try:
        _write(profiler, run, name)
    except OSError as error:
        problem = f"{run.url}/{name} cannot be written: {one_line(error)}"
    dist.all_gather_object(problems, problem, group=group)
    if rank == 0 and (found := list(filter(None, problems))):
        noted(f"step {step} has no profile of {len(found)} of {len(problems)} processes: {found[0]}")


def _write(profiler: profile, run: RunDirectory, name: str) -> None:
    """OSError: there is no room, here or there, or it is not permitted."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        with trace.open("rb") as source:
            # The profiler does not say when a disk is full.
            source.seek(-min(os.fstat(source.fileno()).st_size, 16), os.SEEK_END)
            if not source.read().rstrip().endswith(b"}"):
                raise OSError(errno.ENOSPC, f"no space left for it in {tempfile.gettempdir()}")
            source.seek(0)
            (run.storage / FOLDER).make()
            with run.storage.explained(name), run.storage.open(name, "wb") as file, gzip.open(file, "wb") as target:
                shutil.copyfileobj(source, target)
