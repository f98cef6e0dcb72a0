"""Checkpoints of other software become runs that generate, train on and go out again as they came."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from longstride.data.subwords import train_bpe
from longstride.models import build_model
from longstride.models.interchange import load_pretrained, save_pretrained
from longstride.parallel import Mesh
from longstride.workers import ConfigError, Experiment, RunDirectory, Trainer, reopen_run, train_process
from longstride.workers.checkpoint import Checkpointer
from longstride.workers.evaluate import evaluate, load_run, load_sharded
from longstride.workers.interchange import export_run, import_run, imported_experiment
from longstride.workers.manifest import Manifest, list_checkpoints
from longstride.workers.run_tokenizer import run_tokenizer

from ..distributed import run_ranks
from .test_checkpoint import whole

SMALL = ["data.context=64", "data.batch=2", "data.validation_sequences=2", "tracking.enabled=false", "train.steps=3"]
BEGINNING = Manifest(0, 0, 0, 64, 2, "", 1, {}, "", "", {})
MAMBA = {"vocab_size": 257, "width": 16, "layers": "[mamba] x 2", "feed_forward": "none", "mamba": {"state": 4}}


@pytest.fixture
def mamba(tmp_path: Path) -> Path:
    """A small Mamba as transformers writes it."""
    config = transformers.MambaConfig(vocab_size=257, hidden_size=16, state_size=4, num_hidden_layers=2)
    torch.manual_seed(0)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "there")
    return tmp_path / "there"


def imported(directory: Path, out: Path, *overrides: str) -> RunDirectory:
    return import_run(str(directory), imported_experiment(str(directory), str(out), [*SMALL, *overrides]), threads=1)


def digests(directory: Path) -> dict[str, str]:
    tensors: dict[str, Any] = load_file(directory / "model.safetensors")
    return {key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for key, tensor in tensors.items()}


def test_in_trained_and_out(mamba: Path, tmp_path: Path) -> None:
    run = imported(mamba, tmp_path / "runs" / "mine")
    assert (run.name, run.url) == ("mine", str(tmp_path / "runs" / "mine"))
    assert [(found.name, found.committed) for found in list_checkpoints(run)] == [("step-00000000", True)]
    experiment = imported_experiment(str(mamba), run.url, SMALL)
    trained = load_run(run, experiment)
    assert (trained.step, trained.tokens) == (0, 0)
    reference = load_pretrained(mamba)
    tokens = torch.randint(256, (2, 30))
    assert torch.equal(trained.model.logits(tokens), reference.logits(tokens))

    export_run(run, experiment, str(tmp_path / "out"), "mamba")
    assert digests(tmp_path / "out") == digests(mamba)
    there = transformers.MambaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(there(tokens).logits, reference.logits(tokens), atol=1e-5)

    summary = train_process(reopen_run(run), run=run.url, device="cpu", threads=1, resume=True)
    assert summary is not None and summary.finished and summary.step == 3
    export_run(run, experiment, str(tmp_path / "after"), "mamba")
    assert digests(tmp_path / "after").keys() == digests(mamba).keys()
    assert digests(tmp_path / "after") != digests(mamba)


def test_a_tokenizer_travels_with_its_model(mamba: Path, tmp_path: Path) -> None:
    tokenizer = train_bpe(iter(["def f(x): return x + 1"] * 4), 257)
    (mamba / "tokenizer.json").write_text(tokenizer.content)
    run = imported(mamba, tmp_path / "run")
    data = imported_experiment(str(mamba), run.url, SMALL).data
    assert run_tokenizer(run, data).name == tokenizer.name != data.open().tokenizer.name
    export_run(run, imported_experiment(str(mamba), run.url, SMALL), str(tmp_path / "out"), "mamba")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == tokenizer.content
    # the corpus of bytes is nothing to this model: one line says so
    with pytest.raises(ConfigError, match=r"a tokenizer of its own and data\.corpus=python-source is written in bytes"):
        evaluate(imported_experiment(str(mamba), run.url, SMALL), run, device="cpu")
    save_pretrained(build_model({**MAMBA, "vocab_size": 256}), tmp_path / "fewer", layout="mamba")
    (tmp_path / "fewer" / "tokenizer.json").write_text(tokenizer.content)
    with pytest.raises(ConfigError, match=r"has 257 token ids and the model 256: it is another model's"):
        imported_experiment(str(tmp_path / "fewer"), str(tmp_path / "other"), SMALL)
    (mamba / "tokenizer.json").unlink()
    assert run_tokenizer(imported(mamba, tmp_path / "bare"), data) is data.open().tokenizer


def checkpoint_sizes(run: RunDirectory) -> dict[int, float]:
    """By step, the bytes of a run's checkpoint as a multiple of its weights'; all are whole."""
    found = list_checkpoints(run)
    assert not any(checkpoint.problems() for checkpoint in found)
    weights = 4 * build_model(Experiment.resume(run).model, device="meta").num_parameters()
    manifests = [checkpoint.read_manifest() for checkpoint in found]
    return {each.step: sum(file["bytes"] for file in each.files.values()) / weights for each in manifests}


def test_a_checkpoint_of_an_import_has_the_size_of_its_weights(tmp_path: Path) -> None:
    save_pretrained(build_model({**MAMBA, "width": 256}), tmp_path / "there", layout="mamba")
    run = imported(tmp_path / "there", tmp_path / "run", "train.steps=1")
    assert 1.0 <= checkpoint_sizes(run)[0] < 1.02
    train_process(reopen_run(run), run=run.url, device="cpu", threads=1, resume=True)
    assert 3.0 <= checkpoint_sizes(run)[1] < 3.06, "what has been trained has two moments for each"


def trainer_of(rank: int, world_size: int, url: str, *overrides: str) -> Trainer:
    """Of a run, after two steps from other weights: a restore has moments to overwrite."""
    experiment = Experiment.resume(RunDirectory(url), [f"workers={world_size}", *overrides])
    trainer = Trainer(experiment, Mesh(**asdict(experiment.degrees)), RunDirectory(url))
    trainer.step()
    trainer.step()
    return trainer


def save_with_moments(rank: int, world_size: int, urls: dict[str, float]) -> None:
    """Every run's checkpoint once more, with moments of the value beside it."""
    trainer = trainer_of(rank, world_size, next(iter(urls)))
    for url, value in urls.items():
        trainer.run = trainer.checkpointer.run = RunDirectory(url)
        trainer.restore()
        for moment in trainer.optimizer.state_dict().values():
            moment.fill_(value)
        trainer.save()


def go_on(rank: int, world_size: int, urls: list[str], *overrides: str) -> list[dict[str, Tensor]]:
    """Of every run, weights and moments two steps after its newest checkpoint."""
    trainer, found = trainer_of(rank, world_size, urls[0], *overrides), []
    for url in urls:
        trainer.run = trainer.checkpointer.run = RunDirectory(url)
        trainer.restore()
        assert (trainer.step_count, trainer.optimizer.steps, trainer.tokens, trainer.position) == (0, 0, 0, 0)
        trainer.loader.seek(0)
        trainer.step()
        trainer.step()
        found.append(whole(trainer.checkpointer._tensors()))
    return found


def test_an_import_goes_on_as_if_it_had_moments_of_zero(mamba: Path, tmp_path: Path) -> None:
    bare = imported(mamba, tmp_path / "bare").url
    values = {str(tmp_path / "zeros"): 0.0, str(tmp_path / "halves"): 0.5}
    for url in values:
        shutil.copytree(bare, url)
    run_ranks(save_with_moments, 1, values)
    for url in values:
        assert [each.read_manifest().weights_only for each in list_checkpoints(RunDirectory(url))] == [True, False]
    for world_size, overrides in ((1, []), (2, ["parallel.sequence=2"])):
        ours, zeros, halves = run_ranks(go_on, world_size, [bare, *values], *overrides)[0]
        assert ours.keys() == zeros.keys() and all(ours[key].equal(zeros[key]) for key in ours)
        assert not all(ours[key].equal(halves[key]) for key in ours)


def save_and_load_weights(rank: int, world_size: int, url: str) -> tuple[str, bool]:
    """What a restore says of a checkpoint of step 2 without moments; and whether its weights can be had."""
    trainer = trainer_of(rank, world_size, url)
    Checkpointer(trainer.run, trainer.experiment.checkpoint, trainer.model).save(replace(BEGINNING, step=2))
    model, manifest, notes = load_sharded(trainer.run, trainer.experiment, trainer.mesh)
    assert (manifest.step, manifest.weights_only, notes) == (2, True, [])
    theirs, own = whole(dict(model.state_dict())), whole(dict(trainer.model.state_dict()))
    with pytest.raises(ValueError) as caught:
        trainer.restore()
    return str(caught.value), all(theirs[key].equal(own[key]) for key in own)


def test_a_training_that_has_begun_does_not_go_on_without_its_moments(mamba: Path, tmp_path: Path) -> None:
    imported(mamba, tmp_path / "run")
    for message, usable in run_ranks(save_and_load_weights, 2, str(tmp_path / "run")):
        assert message.startswith("checkpoint step-00000002 cannot be trained on: it has no optimizer.exp_avg.")
        assert "\n" not in message and usable


def test_mistakes_are_one_line_and_leave_no_run(mamba: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no directory"):
        imported(tmp_path / "nowhere", tmp_path / "run")
    save_pretrained(build_model({**MAMBA, "vocab_size": 48}), tmp_path / "few", layout="mamba")
    with pytest.raises(ConfigError, match=r"has 48 token ids and data\.corpus=python-source 256: give data\.corpus="):
        imported(tmp_path / "few", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"unknown setting train\.step; did you mean train\.steps"):
        imported(mamba, tmp_path / "run", "train.step=1")
    whole = (mamba / "model.safetensors").read_bytes()
    (mamba / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        imported(mamba, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (mamba / "model.safetensors").write_bytes(whole)
    run = imported(mamba, tmp_path / "run")
    with pytest.raises(ValueError, match="exists already"):
        imported(mamba, tmp_path / "run")
    experiment = imported_experiment(str(mamba), run.url, SMALL)
    with pytest.raises(ValueError, match="no layout 'mambo'"):
        export_run(run, experiment, str(tmp_path / "out"), "mambo")
    with pytest.raises(ValueError, match="cannot be stored as llama"):
        export_run(run, experiment, str(tmp_path / "out"), "llama")
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        export_run(run, experiment, str(mamba), "mamba")
