"""One process of a run from start to finish, and what precedes all of them.

Whoever starts the processes (torchrun, Ray's actors, nobody when there is one) first calls `create_run` or
`reopen_run` once, where the user can be told what is wrong, and then `train_process` in every process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from ..data import MuLawTokenizer, Stage
from ..models import build_model
from ..parallel import Mesh
from .configuration import ConfigError
from .evaluate import load_run
from .experiment import Experiment
from .generate import Sample, check_length, first_tokens, sample_text
from .manifest import explain_none, list_checkpoints
from .process_group import process_group
from .reporting import Reporter, Silent, Summary
from .run_directory import RunDirectory, code_version
from .run_tokenizer import foreign_corpus
from .stages import train_stages
from .tracking import MlflowSink, Tracker, tracking_uri
from .trained_parameters import rate_multiples
from .trainer import Trainer


def create_run(experiment: Experiment) -> RunDirectory:
    """Checks what can be checked before anything starts, and makes the run's directory. ValueError of one line."""
    check(experiment)
    assert experiment.run.name is not None, "Experiment.load gives every run a name"
    return RunDirectory.create(experiment.run.directory, experiment.run.name, experiment.to_yaml())


def reopen_run(run: RunDirectory, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a run that goes on, overrides put in and kept in its directory. ValueError of one line."""
    experiment = Experiment.resume(run, overrides)
    check(experiment)
    committed = [checkpoint for checkpoint in list_checkpoints(run) if checkpoint.committed]
    if not committed:
        unfinished = [f"{found.name}: {found.problems()[0]}" for found in list_checkpoints(run)]
        raise ConfigError(explain_none(run, unfinished))
    if committed[-1].step >= experiment.train.steps:
        made, asked = committed[-1].step, experiment.train.steps
        state = f"has made all its {made} steps" if made == asked else f"is at step {made}, past train.steps={asked}"
        raise ConfigError(f"run {run.name} {state}; go on with train.steps={2 * made}")
    if problem := foreign_corpus(run, experiment):
        raise ConfigError(problem)
    run.write_experiment(experiment.to_yaml())
    return experiment


def check(experiment: Experiment) -> None:
    """ValueError of one line for what the settings alone do not show: data, vocabulary, lengths, prompt, names."""
    longest = check_lengths(experiment)
    rate_multiples(build_model(experiment.model, device="meta"), experiment.train)
    for stage in experiment.stages:
        now = experiment.at(stage)
        corpus = now.open_corpus()
        now.data.training(corpus, seed=now.seed).close()
        now.data.validation(corpus)
    corpus = experiment.open_corpus()
    check_length(longest, len(first_tokens(corpus, experiment.sample.prompt)), experiment.sample)


def check_lengths(experiment: Experiment) -> int | None:
    """The longest sequence the model is defined for, None: any. ValueError: a stage's sequences are longer."""
    longest = build_model(experiment.model, device="meta").max_length
    for stage in experiment.stages:
        if longest is not None and stage.context > longest:
            raise ConfigError(
                f"data.context={stage.context} exceeds the {longest} positions of the model; begin a run with a longer "
                "max_length of its mixers (model.hyena.max_length)"
            )
    return longest


def train_process(
    experiment: Experiment,
    rank: int = 0,
    world_size: int = 1,
    *,
    run: str | None = None,
    store: Store | None = None,
    device: str | None = None,
    threads: int | None = None,
    node_size: int | None = None,
    reporter: Reporter | None = None,
    resume: bool = False,
    stop: threading.Event | None = None,
    token: str | None = None,
) -> Summary | None:
    """Trains as process `rank` of `world_size`; the summary on rank 0, None elsewhere.

    Args:
        run: the run's directory, made before by `create_run`; where the experiment says by default.
        store: where the processes meet. By default nothing for one process, torchrun's environment for several.
        device: "cpu" or "cuda"; a GPU where there is one by default. With several, LOCAL_RANK says which.
        threads: for arithmetic on the CPU; this process's share of the cores by default.
        node_size: processes per machine, neighbours in rank; None when all are on one, or machines differ.
        reporter: told what happens, on rank 0.
        resume: continue the run from its newest whole checkpoint.
        stop: once set on any process, all end after the step at hand with a checkpoint.
        token: with which the run was taken, see `RunDirectory.take`; None: it has no other writer.

    Raises ValueError (a user's mistake), TrainingError, CheckpointError, RunTaken; RuntimeError when another process is
    lost.
    """
    url = run or f"{experiment.run.directory.rstrip('/')}/{experiment.run.name}"
    directory = RunDirectory(url, token if rank == 0 else None)
    directory.check_owner()
    reporter = reporter or Silent()
    tracker = _tracker(experiment, directory) if rank == 0 and experiment.tracking.enabled else None
    status, left_behind = "FAILED", None
    try:
        with process_group(rank, world_size, store, device, threads) as own_device:

            def make(now: Experiment, stage: Stage) -> Trainer:
                degrees, strategies = now.degrees, now.parallel.strategies
                size = node_size if node_size and _nest(node_size, degrees.sequence) else None
                mesh = Mesh(**asdict(degrees), device=own_device, strategies=strategies, node_size=size)
                return Trainer(now, mesh, directory, reporter, stage=stage, tracker=tracker, stop=stop)

            began = time.monotonic()
            trainer = train_stages(experiment, directory, make, resume=resume)
            status = "FINISHED" if trainer.step_count >= experiment.train.steps else "KILLED"
            seconds = time.monotonic() - began
    finally:
        if tracker is not None:
            if tracker.last_failure:
                reporter.noted(f"tracking: MLflow is given {experiment.tracking.patience:.0f} s (tracking.patience)")
            left_behind = tracker.close(status, experiment.tracking.patience)
    if rank != 0:
        return None
    audio = isinstance(trainer.corpus.tokenizer, MuLawTokenizer)
    printed = status == "FINISHED" and not audio
    sample = _sample(directory, experiment) if printed else Sample(experiment.sample.prompt or "", "")
    summary = Summary(
        name=directory.name,
        url=directory.url,
        step=trainer.step_count,
        steps=experiment.train.steps,
        tokens=trainer.tokens,
        finished=status == "FINISHED",
        loss=trainer.last_record.loss if trainer.last_record else None,
        validation_loss=trainer.validation_loss,
        seconds=seconds,
        prompt=sample.prompt,
        sample=sample.text,
        tracking_uri=tracking_uri(experiment.tracking, directory) if experiment.tracking.enabled else None,
        notes=[left_behind] if left_behind else [],
        audio=audio,
    )
    reporter.finished(summary)
    return summary


def _nest(node_size: int, sequence: int) -> bool:
    """Whether nodes are made of whole sequence groups, or sequence groups of whole nodes."""
    return node_size % sequence == 0 or sequence % node_size == 0


def _tracker(experiment: Experiment, run: RunDirectory) -> Tracker:
    sink = MlflowSink(run, experiment.tracking, experiment.settings(), code_version(), training=True)
    return Tracker(run, sink, every=experiment.tracking.every)


def _sample(run: RunDirectory, experiment: Experiment) -> Sample:
    return sample_text(load_run(run, experiment).model, experiment.open_corpus(), experiment.sample)
