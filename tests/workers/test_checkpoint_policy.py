"""When checkpoints are written (by steps, by minutes) and which of them stay (the newest, the best)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from longstride.workers.checkpoint_policy import CheckpointConfig, CheckpointTimer, candidates, prune
from longstride.workers.configuration import ConfigError, validate
from longstride.workers.manifest import (
    MANIFEST_FILE,
    Checkpoint,
    Manifest,
    NoCheckpoint,
    first_whole,
    list_checkpoints,
    new_checkpoint,
)
from longstride.workers.metrics import StepRecord, read_records
from longstride.workers.run_directory import RunDirectory

from ..distributed import run_ranks
from .tiny import make_trainer, tiny_experiment


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_minutes_count_from_the_last_checkpoint_and_steps_go_on_beside_them() -> None:
    clock = Clock(1000.0)
    timer = CheckpointTimer(CheckpointConfig(every=10, minutes=2), clock)
    assert [step for step in range(1, 31) if timer.due(step, timer.time_is_up())] == [10, 20, 30]
    clock.now += 119
    assert not timer.time_is_up()
    clock.now += 1
    assert timer.time_is_up() and timer.due(7, True)
    timer.restart()
    assert not timer.time_is_up()
    clock.now += 1e9
    assert not CheckpointTimer(CheckpointConfig(), clock).time_is_up(), "0 minutes: never by time"


def test_times_that_are_no_times_are_refused() -> None:
    for minutes in ("-1", "nan", "inf", "soon"):
        with pytest.raises(ConfigError, match=r"minutes"):
            validate(CheckpointConfig, {"minutes": minutes})


def train_with_clocks(rank: int, world_size: int, directory: str) -> tuple[list[int], list[bool]]:
    """Eight steps, in each of which a minute passes on the first process's clock and an hour on the other's: the steps
    after which a checkpoint was begun, and what the process's own clock would have said.
    """
    words = [f"workers={world_size}", "parallel.sequence=2", "train.steps=8", "checkpoint.minutes=3"]
    trainer = make_trainer(tiny_experiment(directory, *words, "train.validate_every=0"), rank)
    clock, saved, own = Clock(5e5 * rank), list[int](), list[bool]()
    trainer.saving.timer = CheckpointTimer(trainer.experiment.checkpoint, clock)
    step, save = trainer.step, trainer.save

    def slow_step() -> tuple[StepRecord, bool]:
        clock.now += 3600 if rank else 60
        own.append(trainer.saving.timer.time_is_up())
        return step()

    def noted_save(*, wait: bool = True) -> None:
        saved.append(trainer.step_count)
        save(wait=wait)

    trainer.step, trainer.save = slow_step, noted_save  # type: ignore[method-assign]
    trainer.train()
    return saved, own


def test_processes_whose_clocks_differ_save_after_the_same_steps(tmp_path: Path) -> None:
    (first, by_first), (second, by_second) = run_ranks(train_with_clocks, 2, str(tmp_path))
    assert first == second == [3, 6, 8], "every three minutes of the first, and at the end"
    assert all(by_second) and sum(by_first) == 2, "left to itself, the second would have saved after every step"


def manifest(step: int, loss: float | None, context: int = 64) -> Manifest:
    return Manifest(step, step * 256, step, context, 4, "corpus", 1, {}, "", "", {}, loss)


def written(run: RunDirectory, losses: dict[int, float | None], context: int = 64) -> None:
    for step, loss in losses.items():
        checkpoint = Checkpoint(run, f"step-{step:08d}")
        checkpoint.storage.make()
        checkpoint.storage.write_text(MANIFEST_FILE, manifest(step, loss, context).to_json())


def steps(run: RunDirectory) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(run)]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(str(tmp_path / "run"))


def test_the_best_survive_besides_the_newest(run: RunDirectory) -> None:
    written(run, {1: 3.0, 2: 1.5, 3: None, 4: 1.0, 5: math.nan, 6: 1.2, 7: 2.0, 8: 2.1})
    assert prune(run, 0, 2) == [], "all stay"
    assert len(prune(run, 2, 2)) == 4
    assert steps(run) == [4, 6, 7, 8]
    written(run, {9: 0.5})
    prune(run, 2, 2)
    assert steps(run) == [4, 8, 9], "the best may be the newest"
    prune(run, 1, 0)
    assert steps(run) == [9]


def test_losses_of_another_context_do_not_compare(run: RunDirectory) -> None:
    written(run, {1: 0.1, 2: 0.2})
    written(run, {3: 2.0, 4: 2.5, 5: 3.0}, context=128)
    prune(run, 1, 1)
    assert steps(run) == [3, 5]


def test_a_manifest_that_is_damaged_or_unfinished_is_no_best(run: RunDirectory) -> None:
    written(run, {1: 1.0, 2: 2.0, 3: 3.0})
    run.storage.write_text("checkpoints/step-00000001/manifest.json", "{")
    run.storage.remove("checkpoints/step-00000002/manifest.json")
    prune(run, 1, 2)
    assert steps(run) == [3]


def test_manifests_of_older_and_newer_versions_are_read(run: RunDirectory) -> None:
    values = json.loads(manifest(1, 2.5).to_json())
    assert Manifest.from_json(json.dumps(values)).validation_loss == 2.5
    assert Manifest.from_json(json.dumps(values | {"added_later": 1})) == manifest(1, 2.5)
    del values["validation_loss"]
    assert Manifest.from_json(json.dumps(values)) == manifest(1, None)
    assert Manifest.from_json(manifest(1, math.nan).to_json()) == manifest(1, None), "NaN is no JSON"
    written(run, {1: 2.0, 2: 3.0, 3: 4.0})
    run.storage.write_text("checkpoints/step-00000001/manifest.json", json.dumps(values))
    prune(run, 1, 1)
    assert steps(run) == [2, 3], "of an older one no loss is known"


def test_which_checkpoint_is_meant(run: RunDirectory) -> None:
    written(run, {1: 3.0, 2: 1.5, 3: None, 12: 1.7})
    again = manifest(12, 1.6).to_json()
    run.storage.write_text(f"checkpoints/{new_checkpoint(run, 12).name}/{MANIFEST_FILE}", again)

    def names(wanted: str) -> list[str]:
        return [checkpoint.name.removeprefix("step-000000") for checkpoint in candidates(run, wanted)]

    assert names("latest") == ["12.1", "12", "03", "02", "01"]
    assert names("best") == ["02", "12.1", "12", "01"], "what was not measured is not among them"
    assert names("12") == names("0012") == ["12.1", "12"], "of one step the attempt that was made last"
    assert names("step-00000012") == ["12"]
    for wanted, message in {
        "7": r"no checkpoint 7; the steps that it has: 1, 2, 3, 12$",
        "step-00000007": r"no checkpoint step-00000007; the steps",
        "bset": r"no checkpoint is called 'bset'; ask for latest, best, or a step such as 200$",
    }.items():
        with pytest.raises(ValueError, match=message):
            candidates(run, wanted)


def test_no_best_without_a_measurement(run: RunDirectory) -> None:
    written(run, {1: None, 2: None})
    with pytest.raises(NoCheckpoint, match=r"no checkpoint with a validation loss.*checkpoint\.keep_best=1.*latest"):
        candidates(run, "best")


def test_a_damaged_one_is_only_replaced_by_what_was_meant_too(run: RunDirectory) -> None:
    """The manifests here list no files, so that none is whole."""
    written(run, {1: 3.0, 2: 1.5})
    with pytest.raises(NoCheckpoint, match=r"has no such whole checkpoint: .*00000001 is skipped.*lists all$"):
        first_whole(run, candidates(run, "1"))
    with pytest.raises(NoCheckpoint, match=r"has no complete checkpoint: .*00000002 is skipped.*00000001 is skipped"):
        first_whole(run, candidates(run))


def train_and_keep_the_best(rank: int, world_size: int, directory: str) -> list[tuple[int, float | None]]:
    words = ["train.steps=6", "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_best=1"]
    trainer = make_trainer(tiny_experiment(directory, *words, "train.validate_every=0"), rank)
    losses = iter([5.0, 4.0, 3.0, 3.5, 4.5, 6.0])
    trainer.validate = lambda: next(losses)  # type: ignore[method-assign]
    trainer.train()
    found = list_checkpoints(trainer.run)
    return [(checkpoint.step, checkpoint.read_manifest().validation_loss) for checkpoint in found]


def test_a_run_keeps_its_best_checkpoint_with_the_loss_it_was_measured_at(tmp_path: Path) -> None:
    assert run_ranks(train_and_keep_the_best, 1, str(tmp_path))[0] == [(3, 3.0), (6, 6.0)]
    records = read_records(RunDirectory(str(tmp_path / "tiny")).storage)
    assert [record.validation_loss for record in records] == [5.0, 4.0, 3.0, 3.5, 4.5, 6.0]
