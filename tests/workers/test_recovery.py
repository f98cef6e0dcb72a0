"""Bad losses: the batch is left out for good, with or without a way back to the last checkpoint, and not for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longstride.workers import ConfigError, RunDirectory
from longstride.workers.metrics import read_records
from longstride.workers.recovery import LossGuard, RecoveryConfig, record_skipped
from longstride.workers.trainer import Trainer

from ..distributed import run_ranks
from .tiny import make_trainer, tiny_experiment

STEPS = ("train.steps=12", "checkpoint.every=3", "train.validate_every=0", "checkpoint.asynchronous=false")
BAD = 7  # position in the data's order


class Poisoned(Trainer):
    """A trainer for which some batches' losses are multiplied by a factor."""

    factor, positions = float("nan"), (BAD,)

    def _losses(self, batch: Any, *, backward: bool = False) -> Any:
        losses = super()._losses(batch, backward=backward)
        if batch.step not in self.positions:
            return losses
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= self.factor
        return type(losses)(*(value * self.factor for value in losses))


def train(rank: int, world_size: int, directory: str, name: str, factor: float, *overrides: str) -> list[float] | str:
    """Losses of the run's log, or the error; a run that is there goes on."""
    experiment = tiny_experiment(directory, f"workers={world_size}", f"run.name={name}", *STEPS, *overrides)
    trainer = make_trainer(experiment, rank)
    trainer.__class__ = type("Poisoned", (Poisoned,), {"factor": factor})
    if trainer.run.storage.directories("checkpoints"):
        trainer.restore()
    try:
        trainer.train()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return [record.loss for record in read_records(trainer.run.storage)]


def left_out(rank: int, world_size: int, directory: str) -> list[float] | str:
    """A run that was told beforehand to leave the batch out."""
    experiment = tiny_experiment(directory, f"workers={world_size}", "run.name=told", *STEPS)
    trainer = make_trainer(experiment, rank)
    if rank == 0:
        record_skipped(trainer.run, step=BAD + 1, position=BAD, context=64, batch=4)
    trainer.train()
    return [record.loss for record in read_records(trainer.run.storage)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_whose_loss_is_no_number_is_left_out(tmp_path: Path, workers: int) -> None:
    expected = run_ranks(left_out, workers, str(tmp_path))[0]
    assert len(expected) == 12
    for policy in ("skip", "rollback"):
        found = run_ranks(train, workers, str(tmp_path), policy, float("nan"), f"recovery.bad_loss={policy}")[0]
        assert found == expected
        info = json.loads((tmp_path / policy / "run.json").read_text())
        (entry,) = info["skipped_batches"]
        assert (entry["position"], entry["step"]) == (BAD, BAD + 1)
        assert "the loss is nan" in entry["cause"]
    undisturbed = run_ranks(train, workers, str(tmp_path), "well", 1.0)[0]
    assert undisturbed[:BAD] == expected[:BAD]
    assert undisturbed[BAD:] != expected[BAD:], "the comparison can fail"


def test_what_is_left_out_stays_out_after_a_resume(tmp_path: Path) -> None:
    """From a checkpoint before the bad batch, which is good this time: it is not trained on all the same."""
    expected = run_ranks(train, 1, str(tmp_path), "run", float("nan"), "checkpoint.keep=0")[0]
    run = RunDirectory(f"{tmp_path}/run")
    for step in (9, 12):
        run.storage.remove(f"checkpoints/step-{step:08d}")
    assert run_ranks(train, 1, str(tmp_path), "run", 1.0)[0] == expected


def test_a_spike_is_rolled_back(tmp_path: Path) -> None:
    settings = ("recovery.spike=3", "train.steps=14")
    Poisoned.positions = (BAD,)
    calm = run_ranks(train, 1, str(tmp_path), "calm", 10.0, "train.steps=14")[0]
    assert len(calm) == 14 and max(calm) > 30, "without the setting it is trained on"
    found = run_ranks(train_spike, 1, str(tmp_path), *settings)[0]
    assert len(found) == 14 and max(found) < 7
    entries = json.loads((tmp_path / "spike" / "run.json").read_text())["skipped_batches"]
    assert [entry["position"] for entry in entries] == [11]


def train_spike(rank: int, world_size: int, directory: str, *settings: str) -> list[float] | str:
    Poisoned.positions = (11,)  # after enough steps to know what is usual
    return train(rank, world_size, directory, "spike", 10.0, *settings)


def test_it_is_not_tried_for_ever(tmp_path: Path) -> None:
    for policy, causes in (("stop", 0), ("skip", 2)):
        words = (f"recovery.bad_loss={policy}", "recovery.max_failures=2")
        message = run_ranks(train_always, 1, str(tmp_path), policy, *words)[0]
        assert message.startswith("TrainingError: the loss is nan")
        assert "lower train.learning_rate" in message
        info = json.loads((tmp_path / policy / "run.json").read_text())
        assert len(info.get("skipped_batches", [])) == causes


def train_always(rank: int, world_size: int, directory: str, name: str, *overrides: str) -> list[float] | str:
    Poisoned.positions = tuple(range(100))
    return train(rank, world_size, directory, name, float("nan"), *overrides)


def test_the_guard() -> None:
    guard = LossGuard(RecoveryConfig(spike=2.0), [1.0] * 9)
    assert guard.problem(5.0, 1.0) is None, "too few steps to know what is usual"
    guard.add(1.0)
    assert guard.problem(1.9, 1.0) is None
    assert guard.problem(2.1, 1.0) == "the loss is 2.1 after 1"
    assert guard.problem(1.0, float("inf")) == "the loss is 1.0 and the gradient's norm inf"
    assert LossGuard(RecoveryConfig(), [1.0] * 50).problem(1e6, 1.0) is None
    with pytest.raises(ConfigError, match=r"recovery\.spike=0\.5"):
        tiny_experiment("runs", "recovery.spike=0.5")
