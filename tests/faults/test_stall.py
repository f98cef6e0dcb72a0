"""What training stands still for: the copy of a checkpoint to host memory, and next to nothing for its data."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.checkpoint_stall import stalls
from longstride.parallel import Mesh
from longstride.workers import Experiment, Trainer

from ..distributed import run_ranks
from ..timing import in_time
from ..workers.tiny import open_run

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.timing
def test_a_checkpoint_beside_training_stalls_it_for_a_tenth_at_most(tmp_path: Path) -> None:
    size, seconds = run_ranks(stalls, 1, str(tmp_path), 288, 5)[0]
    assert size > 50
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    in_time(medians["asynchronous"] < 0.1 * medians["synchronous"], medians)


def data_shares(rank: int, world_size: int, directory: str) -> list[float]:
    """Of three steps of the quickstart, as its metrics have them."""
    words = [f"run.directory={directory}", "run.name=quickstart", f"workers={world_size}", "tracking.enabled=false"]
    experiment = Experiment.load(str(QUICKSTART), words)
    trainer = Trainer(experiment, Mesh(**asdict(experiment.degrees)), open_run(experiment, rank))
    shares = [trainer.step()[0].data_share for _ in range(3)]
    trainer.loader.close()
    return shares


@pytest.mark.timing
def test_the_quickstart_does_not_wait_for_its_data(tmp_path: Path) -> None:
    shares = run_ranks(data_shares, 2, str(tmp_path))[0]
    assert len(shares) == 3
    in_time(max(shares[1:]) < 0.02, shares)  # the first batch has nothing to be read beside
