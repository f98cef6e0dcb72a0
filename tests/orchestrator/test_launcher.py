"""Processes that a launcher started without a store of its own, as Slurm's: the first process holds it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import rendezvous

from longstride.orchestrator import launcher
from longstride.orchestrator.cli import main
from longstride.orchestrator.failures import EchoOfMistake, RunFailed
from longstride.orchestrator.preparation import Prepared

from ..distributed import run_ranks


def fail() -> Prepared:
    raise ValueError("unknown setting train.stepz")


def late_rendezvous(url: str) -> Iterator[tuple[object, int, int]]:
    """The second process takes its time after it has found the others."""
    for store, rank, size in rendezvous(url):
        time.sleep(0.5 * rank)
        yield store, rank, size


def how_it_ends(rank: int, world_size: int, port: int, wait: float) -> str:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    launcher.rendezvous = late_rendezvous
    launcher._HEARD_SECONDS = wait
    try:
        launcher.meet(fail)
    except (ValueError, EchoOfMistake, RunFailed) as error:
        return type(error).__name__
    return "nothing happened"


def test_a_port_that_is_taken(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "2"}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert main(["train", "small.yaml"]) == 2
    line = f"longstride: MASTER_PORT={port} is in use on this machine: give the launcher another port\n"
    assert capsys.readouterr().err == line
    assert not (place / "runs").exists()


@pytest.mark.parametrize(("wait", "told"), [(5.0, "EchoOfMistake"), (0.0, "RunFailed")])
def test_a_mistake_is_heard_before_the_store_goes(wait: float, told: str) -> None:
    """Without the wait it is lost: the others then know no more than that the first process ended."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert run_ranks(how_it_ends, 2, port, wait) == ["ValueError", told]
