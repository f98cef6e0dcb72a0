"""One process per device: the training loop, checkpoints, tracking, evaluation, generation. Runs without Ray."""

from .configuration import ConfigError
from .experiment import Experiment
from .launch import create_run, reopen_run, train_process
from .reporting import Reporter, RunStart, Summary
from .run_directory import RunDirectory, find_run, list_runs
from .trainer import Trainer

__all__ = [
    "ConfigError",
    "Experiment",
    "Reporter",
    "RunDirectory",
    "RunStart",
    "Summary",
    "Trainer",
    "create_run",
    "find_run",
    "list_runs",
    "reopen_run",
    "train_process",
]
