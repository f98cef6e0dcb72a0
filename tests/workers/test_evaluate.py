"""Held-out scores: those of the whole logits, the same on one process and on two, and lengths that there are not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from longstride.data import Task
from longstride.models import LanguageModel, build_model
from longstride.parallel import Mesh, SequenceShard
from longstride.workers import ConfigError, Experiment
from longstride.workers.evaluate import evaluate
from longstride.workers.launch import create_run, train_process
from longstride.workers.scoring import LengthScore, at_length, score_length, stretch_edges
from longstride.workers.sharded_model import make_sharded_model
from tests.distributed import run_ranks

from .tiny import tiny_experiment

TASK = ("data.corpus=selective-copying", "data.context=150", "data.batch=2", "data.tasks.selective_copying.tokens=8")
TEXT = ("data.context=150", "data.batch=2")


def experiment(*overrides: str) -> Experiment:
    return tiny_experiment("runs", "model.hyena.max_length=512", "train.dtype=float64", *overrides)


def model_of(config: Experiment) -> LanguageModel:
    return build_model(config.model, seed=config.seed, dtype=torch.float64)


@pytest.mark.parametrize("overrides", [TASK, TEXT])
def test_scores_are_those_of_the_whole_logits(overrides: tuple[str, ...]) -> None:
    config = experiment(*overrides)
    model, corpus = model_of(config), config.open_corpus()
    score = score_length(model, config.data, corpus)
    losses, correct = torch.zeros(150, dtype=torch.float64), 0
    counts = torch.zeros(150)
    for batch in config.data.validation(corpus):
        shard = SequenceShard.whole(150, batch.document_starts if any(batch.document_starts) else None)
        logits_BTV = model.logits(batch.tokens_BT, shard).detach()
        losses += F.cross_entropy(logits_BTV.transpose(1, 2), batch.targets_BT, reduction="none").sum(0)
        correct += int((logits_BTV.argmax(-1) == batch.targets_BT).sum())
        counts += (batch.targets_BT != -100).sum(0)
    assert (score.sequences, score.context, score.tokens) == (6, 150, int(counts.sum()))
    assert score.loss == pytest.approx(float(losses.sum()) / score.tokens, rel=1e-12)
    assert score.correct == correct
    assert score.accuracy == correct / score.tokens
    for stretch in score.stretches:
        part = slice(stretch.start, stretch.stop)
        assert stretch.tokens == int(counts[part].sum())
        assert stretch.loss == pytest.approx(float(losses[part].sum()) / stretch.tokens, rel=1e-12)
    bounds = [(stretch.start, stretch.stop) for stretch in score.stretches]
    assert bounds == ([(128, 150)] if isinstance(corpus, Task) else [(0, 64), (64, 128), (128, 150)])


def test_a_model_that_knows_the_answer_is_right_everywhere() -> None:
    """And one that knows another is wrong: the count is of answers, not of luck."""
    config = experiment("data.corpus=induction-heads", "data.context=32", "data.tasks.induction_heads.vocabulary=5")
    model = model_of(config)

    class Oracle(torch.nn.Module):
        output_weight = model.output_weight
        shift = 0

        def scores(self, tokens_BT, targets_BT, shard):
            trigger_B = (tokens_BT == 4).int().argmax(1)
            answer_B1 = (tokens_BT.gather(1, trigger_B[:, None] + 1) + self.shift) % 3
            correct_BT = targets_BT == answer_B1
            return type("Scores", (), {"loss_BT": torch.zeros(targets_BT.shape), "correct_BT": correct_BT})

    oracle = Oracle()
    assert score_length(oracle, config.data, config.open_corpus()).accuracy == 1.0  # type: ignore[arg-type]
    oracle.shift = 1
    assert score_length(oracle, config.data, config.open_corpus()).accuracy == 0.0  # type: ignore[arg-type]


def split_scores(rank: int, world_size: int, overrides: tuple[str, ...], lengths: list[int]) -> list[LengthScore]:
    config = experiment(f"workers={world_size}", *overrides)
    mesh = Mesh(**asdict(config.degrees))
    model, corpus = make_sharded_model(config, mesh).eval(), config.open_corpus()
    data = [at_length(config.data, config.evaluate, length, mesh.data_size) for length in lengths]
    return [score_length(model, each, corpus, mesh) for each in data]


@pytest.mark.parametrize("degrees", ["parallel.sequence=2", "parallel.data=2"])
@pytest.mark.parametrize("overrides", [TASK, TEXT])
def test_two_processes_find_what_one_finds(overrides: tuple[str, ...], degrees: str) -> None:
    lengths = [33, 150, 301]  # odd ones are cut unevenly
    config = experiment(*overrides, "evaluate.sequences=5")
    model, corpus = model_of(config), config.open_corpus()
    alone = [score_length(model, at_length(config.data, config.evaluate, length), corpus) for length in lengths]
    for found in run_ranks(split_scores, 2, (*overrides, degrees, "evaluate.sequences=5"), lengths):
        for one, two in zip(alone, found, strict=True):
            assert (one.context, one.sequences, one.tokens, one.correct) == (
                two.context,
                two.sequences,
                two.tokens,
                two.correct,
            )
            assert two.loss == pytest.approx(one.loss, rel=1e-12)
            assert [stretch.loss for stretch in two.stretches] == pytest.approx(
                [stretch.loss for stretch in one.stretches], rel=1e-12
            )


def test_lengths_of_a_run(tmp_path: Path) -> None:
    """Without lengths the loss is training's validation loss; with them each length has a score of its own."""
    config = tiny_experiment(str(tmp_path), "train.steps=2", "train.warmup=0", *TEXT, "data.context=64")
    run = create_run(config)
    summary = train_process(config, device="cpu", threads=1)
    assert summary is not None
    result = evaluate(config, run, device="cpu")
    assert result.step == 2
    assert result.scores[0].loss == pytest.approx(summary.validation_loss, rel=1e-6)
    several = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"lengths": (16, 48)})})
    assert [score.context for score in evaluate(several, run, device="cpu").scores] == [16, 48]
    long = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"lengths": (16, 65)})})
    with pytest.raises(ConfigError, match=r"evaluate\.lengths: 65 exceeds the 64 positions of the model"):
        evaluate(long, run, device="cpu")


def test_how_much_is_read_at_one_length() -> None:
    config = experiment(*TASK, "evaluate.sequences=10", "evaluate.tokens=1000")
    chosen = {length: at_length(config.data, config.evaluate, length, 2) for length in (20, 100, 300, 5000)}
    assert [data.validation_sequences for data in chosen.values()] == [10, 10, 3, 1]
    assert [data.batch for data in chosen.values()] == [10, 4, 2, 2]
    assert stretch_edges(64).tolist() == [0, 64]
    assert stretch_edges(300).tolist() == [0, 64, 128, 256, 300]
