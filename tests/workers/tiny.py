"""An experiment with every mission part, small enough for a test of a second."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from longstride.parallel import Mesh
from longstride.workers import Experiment, RunDirectory, Trainer, create_run
from longstride.workers.configuration import apply_overrides, validate

TINY: dict[str, Any] = {
    "run": {"name": "tiny"},
    "model": {
        "vocab_size": 256,
        "width": 16,
        "layers": "[mamba, hyena+moe, attention, mamba+moe]",
        "mamba": {"state": 4},
        "hyena": {"max_length": 64, "features": 5, "filter_width": 8},
        "attention": {"heads": 4, "kv_heads": 2},
        "mlp": {"hidden": 24},
        "moe": {"experts": 4, "top_k": 2, "hidden": 12},
    },
    "data": {"corpus": "python-source", "context": 64, "batch": 4, "validation_sequences": 6},
    "train": {"steps": 20, "learning_rate": 3e-3, "warmup": 3},
    "tracking": {"enabled": False},
    "sample": {"prompt": "def ", "tokens": 8},
}


def tiny_experiment(directory: str, *overrides: str) -> Experiment:
    """The experiment with overrides put in; its run will be `directory`/tiny unless an override names it."""
    return validate(Experiment, apply_overrides(TINY, [f"run.directory={directory}", *overrides]))


def open_run(experiment: Experiment, rank: int) -> RunDirectory:
    """The experiment's run, made by the first process where it is missing; the others only look."""
    run = RunDirectory(f"{experiment.run.directory}/{experiment.run.name}")
    return create_run(experiment) if rank == 0 and not run.exists() else run


def make_trainer(experiment: Experiment, rank: int) -> Trainer:
    """A trainer in an initialised process group."""
    return Trainer(experiment, Mesh(**asdict(experiment.degrees)), open_run(experiment, rank))
