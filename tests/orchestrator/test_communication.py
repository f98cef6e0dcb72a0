"""`longstride communication`: the ledgers that a split run leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from longstride.orchestrator.cli import main
from longstride.parallel import CommunicationLedger
from longstride.workers import find_run
from longstride.workers.communication import write_communication
from tests.distributed import run_ranks


def write(rank: int, world: int, run: str) -> None:
    ledger = CommunicationLedger()
    ledger.record("halo.forward", "0.mamba", sent=100 * (rank + 1), received=300 - 100 * (rank + 1))
    ledger.record("prefix_state.forward", "0.mamba", sent=2048, received=2048)
    group = dist.group.WORLD
    assert group is not None
    write_communication(find_run(run), ledger, 1, group)


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["train", "small.yaml"]) == 0
    capsys.readouterr()
    return place / "runs" / "small"


def test_one_process_sends_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["communication", "small"]) == 0
    assert capsys.readouterr().out == "nothing crosses between processes: the run has one\n"
    (run / "communication.json").unlink()
    assert main(["communication", "small"]) == 2
    assert "it is written after the run's first step" in capsys.readouterr().err


def test_sums_by_motion_and_rank(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(write, 2, str(run))
    assert main(["communication", "small"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2][:6] == ["halo.forward", "2", "300", "B", "300", "B"]
    assert lines[3][:6] == ["prefix_state.forward", "2", "4.0", "KiB", "4.0", "KiB"]
    assert main(["communication", "small", "--by", "rank"]) == 0
    assert "1: halo.forward" in capsys.readouterr().out
