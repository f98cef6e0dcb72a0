"""Dropout through the trainer: the same losses on every mesh, bitwise after a resume; none on held-out data."""

from __future__ import annotations

from pathlib import Path

import pytest

from longstride.models import DropoutKey
from longstride.workers import split_model
from longstride.workers.configuration import ConfigError
from longstride.workers.evaluate import load_run
from longstride.workers.metrics import read_records
from longstride.workers.scoring import score_length
from longstride.workers.trainer import Trainer

from ..distributed import run_ranks
from .tiny import make_trainer, tiny_experiment

SETTINGS = ("model.embedding_dropout=0.2", "train.steps=4", "train.validate_every=2", "checkpoint.keep=0")
Numbers = list[tuple[float, float, float | None]]


def log(trainer: Trainer, rank: int) -> Numbers:
    """Loss, gradient norm and validation loss of every step; of the first process."""
    return [(r.loss, r.grad_norm, r.validation_loss) for r in read_records(trainer.run.storage)] if rank == 0 else []


def trained(rank: int, world_size: int, directory: str, *overrides: str) -> Numbers:
    trainer = make_trainer(tiny_experiment(directory, f"workers={world_size}", *SETTINGS, *overrides), rank)
    assert trainer.train()
    return log(trainer, rank)


def without_rows(rank: int, world_size: int, directory: str, *overrides: str) -> Numbers:
    """Every process takes its first sequence for the first of the global batch."""
    split_model.DropoutKey = lambda seed, step, first_row: DropoutKey(seed, step)  # type: ignore[assignment,misc]
    return trained(rank, world_size, directory, *overrides)


def distance(first: Numbers, second: Numbers) -> float:
    pairs = [(a, b) for ours, theirs in zip(first, second, strict=True) for a, b in zip(ours, theirs, strict=True)]
    return max(abs(a - b) for a, b in pairs if a is not None and b is not None)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    return run_ranks(trained, 1, str(tmp_path_factory.mktemp("alone")), "train.dtype=float64")[0]


@pytest.mark.parametrize(
    "degrees",
    [
        ("parallel.data=2", "parallel.sequence=2", "model.recompute=true"),
        ("parallel.replicate=2", "parallel.sequence=2", "parallel.expert=2"),
    ],
)
def test_the_mesh_does_not_change_the_losses(alone: Numbers, tmp_path: Path, degrees: tuple[str, ...]) -> None:
    assert distance(run_ranks(trained, 4, str(tmp_path), "train.dtype=float64", *degrees)[0], alone) < 1e-10


def test_the_comparison_can_fail(alone: Numbers, tmp_path: Path) -> None:
    settings = ("train.dtype=float64", "parallel.data=2")
    assert distance(run_ranks(without_rows, 2, str(tmp_path), *settings)[0], alone) > 1e-4


def interrupted(rank: int, world_size: int, directory: str, *overrides: str) -> Numbers:
    """The same run, stopped after its first step and continued by another trainer."""
    experiment = tiny_experiment(directory, f"workers={world_size}", *SETTINGS, *overrides)
    first, second = make_trainer(experiment, rank), make_trainer(experiment, rank)
    first.stop.set()
    first.train()
    assert first.step_count == 1
    second.restore()
    assert second.train()
    return log(second, rank)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_bitwise_the_same(tmp_path: Path, dtype: str) -> None:
    settings = ("parallel.sequence=2", f"train.dtype={dtype}", "model.recompute=true")
    whole = run_ranks(trained, 2, str(tmp_path / "whole"), *settings)[0]
    assert run_ranks(interrupted, 2, str(tmp_path / "interrupted"), *settings)[0] == whole


def test_the_canonical_mode_is_bitwise_the_same_for_every_sequence_degree(tmp_path: Path) -> None:
    one, two = (run_ranks(trained, n, str(tmp_path), "train.canonical=4", f"run.name=on-{n}")[0] for n in (1, 2))
    assert one == two


def first_numbers(rank: int, world_size: int, directory: str, share: float, *overrides: str) -> tuple[float, ...]:
    """Validation loss before and after a step that changes nothing worth mentioning, its loss, and the run's score."""
    settings = ("train.learning_rate=1e-30", "train.weight_decay=0", f"model.embedding_dropout={share}")
    experiment = tiny_experiment(directory, "train.steps=1", "train.warmup=0", *settings, *overrides)
    trainer = make_trainer(experiment, rank)
    before = trainer.validate()
    trainer.train()
    assert trainer.last_record is not None
    assert trainer.validation_loss is not None
    found = load_run(trainer.run, experiment)
    score = score_length(found.model, experiment.data, experiment.open_corpus()).loss
    return before, trainer.validation_loss, score, trainer.last_record.loss


@pytest.mark.parametrize("mode", [(), ("train.canonical=2",)])
def test_held_out_data_is_read_without_it(tmp_path: Path, mode: tuple[str, ...]) -> None:
    plain = run_ranks(first_numbers, 1, str(tmp_path / "plain"), 0.0, *mode)[0]
    dropped = run_ranks(first_numbers, 1, str(tmp_path / "dropped"), 0.5, *mode)[0]
    assert plain[:3] == dropped[:3]
    assert abs(plain[3] - dropped[3]) > 1e-3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1", "model.embedding_dropout=1: the value should be less than 1"),
        ("-0.1", "model.embedding_dropout=-0.1: the value should be greater than or equal to 0"),
        (".nan", "model.embedding_dropout=nan: the value should be"),
        ("much", "model.embedding_dropout='much': the value should be a valid number"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_experiment(str(tmp_path), f"model.embedding_dropout={value}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
