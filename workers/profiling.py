"""A profile of one step: what each process did and when, for https://ui.perfetto.dev or Chrome's tracing page."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from .run_directory import RunDirectory

FOLDER = "profiles"


def profile_name(step: int, rank: int) -> str:
    """The file of one process in the run's directory: a compressed trace, as PyTorch's profiler writes it."""
    return f"{FOLDER}/step-{step:08d}-rank-{rank:05d}.json.gz"


@contextmanager
def profiled(run: RunDirectory, step: int, rank: int) -> Iterator[None]:
    """Profiles what is done inside and writes it into the run's directory; nothing where that fails."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library prints when it begins and ends
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        yield
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json.gz")
        profiler.export_chrome_trace(str(trace))
        (run.storage / FOLDER).make()
        with trace.open("rb") as source, run.storage.open(profile_name(step, rank), "wb") as target:
            shutil.copyfileobj(source, target)
