"""The profile of a step: one of each process, of that step alone, with layers and waits by name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from longstride.workers.profiling import FOLDER, profile_name

from ..distributed import run_ranks
from .tiny import make_trainer, tiny_experiment


def trained(rank: int, world_size: int, directory: str) -> bool:
    words = ("train.steps=3", "train.warmup=0", "train.profile=2", f"workers={world_size}", "parallel.sequence=2")
    return make_trainer(tiny_experiment(directory, *words), rank).train()


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
