"""Whatever lies between steps and may take long says so as it goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from longstride.workers import dcp_storage, generate, liveness, trainer
from longstride.workers.evaluate import load_run
from longstride.workers.generate import sample_text
from longstride.workers.process_group import process_group

from .tiny import make_trainer, tiny_experiment


def test_every_long_phase_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signs: list[int] = [0]

    def count() -> None:
        signs[0] += 1

    for module in (dcp_storage, generate, trainer):
        monkeypatch.setattr(module, "alive", count)

    def signs_of(work: object) -> int:
        before = signs[0]
        assert callable(work)
        work()
        return signs[0] - before

    experiment = tiny_experiment(str(tmp_path), "data.validation_sequences=8")
    with process_group(0, 1, None, "cpu", 1):
        training = make_trainer(experiment, 0)
        tensors = len(training.checkpointer._tensors())
        assert signs_of(training.step) == 0, "a step is its own sign"
        assert signs_of(training.validate) == 2, "two batches of four"
        assert signs_of(training.save) >= tensors
        assert signs_of(training.checkpointer.latest) >= 1, "verified, block by block"
        checkpoint, manifest, _ = training.checkpointer.latest()
        assert signs_of(lambda: training.checkpointer.load(checkpoint, manifest)) >= tensors
        training.loader.close()
        trained = load_run(training.run, experiment)
        assert signs_of(lambda: sample_text(trained.model, experiment.open_corpus(), experiment.sample)) == 1 + 8


def test_silence_is_counted_from_the_last_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(liveness.time, "monotonic", lambda: clock[0])
    liveness.alive()
    clock[0] += 7
    assert liveness.silent_seconds() == 7
