"""The profile of a step: one of each process, of that step alone, with layers and waits by name."""

from __future__ import annotations

import gzip
import json
import os
import resource
from pathlib import Path

import torch

from longstride.workers import RunDirectory
from longstride.workers.profiling import FOLDER, profile_name, profiled
from longstride.workers.reporting import Silent
from longstride.workers.shared_outcomes import gloo_group

from ..distributed import run_ranks
from ..faults.conftest import server as server
from ..faults.conftest import store as store
from ..faults.proxy import FaultProxy
from .tiny import make_trainer, tiny_experiment


def trained(rank: int, world_size: int, directory: str) -> bool:
    words = ("train.steps=3", "train.warmup=0", "train.profile=2", f"workers={world_size}", "parallel.sequence=2")
    return make_trainer(tiny_experiment(directory, *words), rank).train()


class Notes(Silent):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def noted(self, message: str) -> None:
        self.lines.append(message)


def trained_beside_a_full_disk(rank: int, world_size: int, directory: str) -> list[str]:
    """The second process's file is a device that is always full."""
    words = ("train.steps=3", "train.warmup=0", "train.profile=2", f"workers={world_size}", "parallel.sequence=2")
    trainer = make_trainer(tiny_experiment(directory, *words), rank)
    trainer.reporter = notes = Notes()
    if rank == 0:
        (Path(directory) / "tiny" / FOLDER).mkdir()
        (Path(directory) / "tiny" / profile_name(2, 1)).symlink_to("/dev/full")
    assert trainer.train()
    return notes.lines


def refused(rank: int, world_size: int, cases: list[tuple[str, int]], environment: dict[str, str]) -> list[str]:
    """Profiles of nothing much: to which run, and how many bytes a file may have."""
    os.environ.update(environment)
    notes, group, limits = Notes(), gloo_group(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for url, largest_file in cases:
        with profiled(RunDirectory(url), 2, group, notes.noted):
            torch.ones(9).sum()
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limits[1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return notes.lines


def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    lines, others = run_ranks(trained_beside_a_full_disk, 2, str(tmp_path))
    assert others == []
    first, problem = [line for line in lines if "profile" in line]
    file = tmp_path / "tiny" / profile_name(2, 1)
    assert first.startswith("step 2 is profiled: ")
    assert problem == f"step 2 has no profile of 1 of 2 processes: {file} cannot be written: No space left on device"
    assert (tmp_path / "tiny" / profile_name(2, 0)).stat().st_size > 1000


def test_where_a_profile_cannot_go(store: FaultProxy, tmp_path: Path) -> None:
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / FOLDER).write_text("a file where a directory should be")
    enough, whole = 10**9, str(tmp_path / "whole")
    cases = {
        (str(tmp_path / "occupied"), enough): "cannot be written: File exists",
        ("s3://no-such-bucket/runs/tiny", enough): "cannot be written: no such bucket",
        (str(tmp_path / "new"), 200): "cannot be written: no space left for it in ",
    }
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    (lines,) = run_ranks(refused, 1, [*cases, (whole, enough)], environment)
    for line, ((url, _), words) in zip(lines, cases.items(), strict=True):
        assert line.startswith(f"step 2 has no profile of 1 of 1 processes: {url}/") and words in line
    assert json.loads(gzip.decompress(Path(whole, profile_name(2, 0)).read_bytes()))["traceEvents"]


def test_every_process_profiles_the_step_that_is_asked_for(tmp_path: Path) -> None:
    assert run_ranks(trained, 2, str(tmp_path)) == [True, True]
    run = tmp_path / "tiny"
    names = [profile_name(2, rank) for rank in range(2)]
    assert sorted(f"{FOLDER}/{path.name}" for path in (run / FOLDER).iterdir()) == names
    for name in names:
        events = json.loads(gzip.decompress((run / name).read_bytes()))["traceEvents"]
        seen = [event["name"] for event in events if event.get("ph") == "X"]
        # the validation after the last step would make it two
        assert seen.count("0.mamba") == 1 and seen.count("1.hyena feed-forward") == 1
        assert any(label.startswith("wait for prefix_state") and label.endswith(" of 0.mamba") for label in seen)
