"""Runs that begin with another run's weights, and corpora in other tokens than a run's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longstride.data import prepare
from longstride.models import build_model
from longstride.parallel import SequenceShard
from longstride.workers import ConfigError, Experiment, RunDirectory, create_run, reopen_run, train_process
from longstride.workers.descent import descend, descendant
from longstride.workers.evaluate import evaluate, load_run
from longstride.workers.manifest import list_checkpoints
from longstride.workers.metrics import read_records

from .tiny import tiny_experiment

TEXT = "".join(f"line {number}: to begin is half of the work\n" for number in range(400))


@pytest.fixture
def parent(tmp_path: Path) -> RunDirectory:
    """A run of two steps."""
    experiment = tiny_experiment(str(tmp_path), "train.steps=2", "train.warmup=0", "sample.tokens=0")
    run = create_run(experiment)
    train_process(experiment, threads=1, device="cpu")
    return run


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Another corpus in the same tokens."""
    return prepared(tmp_path, "bytes")


def prepared(directory: Path, tokenizer: str) -> str:
    (directory / "text.txt").write_text("ACGT" * 800 if tokenizer == "dna" else TEXT)
    prepare([str(directory / "text.txt")], str(directory / tokenizer), tokenizer=tokenizer)
    return str(directory / tokenizer)


def first_loss(run: RunDirectory, *overrides: str) -> float:
    """Of the first step that the run makes next."""
    train_process(reopen_run(run, list(overrides)), run=run.url, threads=1, device="cpu", resume=True)
    return next(read_records(run.storage)).loss


def test_a_run_begins_with_anothers_weights(parent: RunDirectory, texts: str, tmp_path: Path) -> None:
    words = [f"data.corpus={texts}", "data.context=32", "train.steps=1"]
    experiment = descendant(parent, str(tmp_path / "child"), words)
    child, step, _ = descend(parent, experiment)
    assert step == 2 and child.read_info()["parents"] == [parent.url]
    ours, theirs = load_run(child, experiment), load_run(parent, Experiment.resume(parent))
    assert (ours.step, ours.tokens) == (0, 0)
    assert all(
        a.equal(b) for a, b in zip(ours.model.state_dict().values(), theirs.model.state_dict().values(), strict=True)
    )

    loss = first_loss(child)
    assert reopen_run(child, ["train.steps=2"]).data.context == 32
    tokens = experiment.data.training(experiment.open_corpus(), seed=experiment.seed)
    batch = next(tokens)
    tokens.close()
    expected, fresh = (
        model(batch.tokens_BT, batch.targets_BT, SequenceShard.whole(32, batch.document_starts)).cross_entropy.item()
        for model in (theirs.model, build_model(experiment.model, seed=experiment.seed))
    )
    assert loss == pytest.approx(expected, rel=1e-6)
    assert loss != pytest.approx(fresh, rel=1e-3), "negative control: other weights, another loss"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["model.width=32"],
            r"than run tiny: embedding.weight is \(256, 16\) there, \(256, 32\) here",
        ),
        (["model.tie_embeddings=false"], "missing there"),
        (["data.corpus=DNA"], "was trained on bytes and .* is written in dna: .* --tokenizer bytes` and give"),
        (["run.name=tiny"], "exists already"),
    ],
)
def test_what_is_no_descendant(parent: RunDirectory, words: list[str], line: str, tmp_path: Path) -> None:
    if "DNA" in words[0]:
        words = [words[0].replace("DNA", prepared(tmp_path, "dna"))]
    with pytest.raises(ValueError, match=line):
        descend(parent, descendant(parent, str(tmp_path / "child"), words))
    assert not (tmp_path / "child").exists()


def test_another_corpus_is_measured_and_not_trained_on(parent: RunDirectory, texts: str, tmp_path: Path) -> None:
    words = [f"data.corpus={texts}", "data.batch=2"]
    with pytest.raises(ConfigError, match=rf"data.corpus cannot change .* `longstride import {parent.url} OUT"):
        reopen_run(parent, [*words, "train.steps=4"])
    there = evaluate(Experiment.resume(parent, words, any_corpus=True), parent, device="cpu").scores[0]
    here = evaluate(Experiment.resume(parent, ["data.batch=2"]), parent, device="cpu").scores[0]
    assert there.loss != here.loss
    dna = Experiment.resume(parent, [f"data.corpus={prepared(tmp_path, 'dna')}"], any_corpus=True)
    with pytest.raises(ConfigError, match="is written in dna"):
        evaluate(dna, parent, device="cpu")


def test_before_its_first_step_a_run_may_be_given_its_corpus(parent: RunDirectory, texts: str, tmp_path: Path) -> None:
    child, _, _ = descend(parent, descendant(parent, str(tmp_path / "child"), ["train.steps=1"]))
    assert first_loss(child, f"data.corpus={texts}") > 0
    assert [found.step for found in list_checkpoints(child)] == [0, 1]
    with pytest.raises(ConfigError, match="cannot change"):
        reopen_run(child, ["data.corpus=python-source", "train.steps=2"])
    moved = Path(texts).rename(tmp_path / "moved")
    assert reopen_run(child, [f"data.corpus={moved}", "train.steps=2"]).data.corpus == str(moved), "the same tokens"
    assert json.loads((tmp_path / "child" / "run.json").read_text())["starts"][0]["step"] == 0
