"""Training in the canonical mode: every number of every step is bitwise the same for any sequence degree."""

from __future__ import annotations

from pathlib import Path

import pytest

from longstride.workers.metrics import read_records
from tests.distributed import run_ranks

from .tiny import make_trainer, tiny_experiment


def numbers(rank: int, world: int, directory: str, canonical: int) -> list[tuple[float, float, float | None]]:
    settings = ["train.steps=6", "train.validate_every=3", f"train.canonical={canonical}", f"run.name=on-{world}"]
    experiment = tiny_experiment(directory, f"workers={world}", *settings)
    trainer = make_trainer(experiment, rank)
    trainer.train()
    if rank:
        return []
    trainer.run.metrics.flush()
    return [(r.loss, r.grad_norm, r.validation_loss) for r in read_records(trainer.run.storage)]


def test_bitwise_for_every_sequence_degree(tmp_path: Path) -> None:
    alone = run_ranks(numbers, 1, str(tmp_path), 8)[0]
    assert len(alone) == 6
    for world in (2, 4):
        assert run_ranks(numbers, world, str(tmp_path), 8)[0] == alone


def test_negative_control_the_ordinary_mode_is_equal_only_to_rounding(tmp_path: Path) -> None:
    alone, split = (run_ranks(numbers, world, str(tmp_path), 0)[0] for world in (1, 2))
    assert split != alone
    assert [row[0] for row in split] == pytest.approx([row[0] for row in alone], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.canonical=3"], "train.canonical=3 must divide data.context=64 and be a multiple of"),
        (["train.canonical=8", "train.dtype=bfloat16"], "set train.dtype=float32"),
        (["train.canonical=8", "workers=2", "parallel.data=2"], "set parallel.sequence=2"),
    ],
)
def test_what_it_cannot_do_is_named(tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_experiment(str(tmp_path), *settings)
