"""In its first step a run compares what its processes have; afterwards they trust each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longstride.parallel import agreement, collectives

from ..distributed import run_ranks
from .tiny import make_trainer, tiny_experiment


def two_steps(rank: int, world_size: int, directory: str) -> tuple[str, list[int], list[float]]:
    """What is told where one process reads other documents, then comparisons in each of two steps, and the losses."""
    counts = [0]

    def counted(*args: object) -> None:
        counts[-1] += 1
        verify(*args)  # type: ignore[arg-type]

    verify, collectives.verify_exchange = agreement.verify_exchange, counted
    experiment = tiny_experiment(directory, "workers=2", "parallel.sequence=2")
    wrong = make_trainer(experiment, rank)
    batch = next(wrong.loader)
    mistaken = replace(batch, document_starts=((7,),) * len(batch.document_starts)) if rank else batch
    told = ""
    try:
        wrong._losses(mistaken, backward=True)
    except ValueError as error:
        told = str(error)
    assert counts == [0]
    trainer, losses = make_trainer(experiment, rank), []
    for _ in range(2):
        losses.append(float(trainer._losses(batch, backward=True).total.detach()))
        counts.append(0)
    return told, counts, losses


def test_processes_compare_documents_and_messages_once(tmp_path: Path) -> None:
    for told, counts, losses in run_ranks(two_steps, 2, str(tmp_path)):
        assert told == (
            "rank 1 has other document starts than rank 0: give every rank the same length, bounds, documents and dtype"
        )
        assert counts[0] > 10 and counts[1:] == [0, 0]
        assert losses[0] == losses[1]  # comparing changes nothing
