"""Checkpoints of other software into runs, and runs into them; by one process, or by several that share the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..data import SubwordTokenizer
from ..data.credentials import refuse_credentials
from ..models.interchange import load_config, load_into, save_pretrained
from ..parallel import Mesh
from .checkpoint import Checkpointer
from .checkpoint_policy import LATEST
from .configuration import ConfigError, apply_overrides, validate
from .evaluate import load_run, load_sharded
from .experiment import Experiment
from .launch import create_run
from .manifest import Manifest
from .process_group import process_group
from .run_directory import RunDirectory, code_version, timestamp
from .run_tokenizer import TOKENIZER_FILE
from .sharded_model import make_sharded_model


def imported_experiment(directory: str, out: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a run at `out` (a path or URL) of the model in `directory`, with overrides put in.

    ValueError of one line: no model there, settings that are wrong, or a tokenizer or a corpus with more token ids than
    the model has.
    """
    refuse_credentials("OUT", out)
    parent, _, name = out.rstrip("/").rpartition("/")
    run = {"directory": parent or "/" if "/" in out else ".", "name": name}
    tree = {"model": load_config(directory).model_dump(mode="json"), "run": run}
    experiment = validate(Experiment, apply_overrides(tree, overrides))
    vocabulary, corpus = experiment.model.vocab_size, experiment.data.open()
    if (path := Path(directory) / TOKENIZER_FILE).is_file():
        tokenizer = SubwordTokenizer(path.read_text(encoding="utf-8"))
        if tokenizer.vocab_size > vocabulary:
            raise ConfigError(
                f"{path} has {tokenizer.vocab_size} token ids and the model {vocabulary}: it is another model's; "
                "put the model's own there, or remove it"
            )
    if corpus.vocab_size > vocabulary:
        raise ConfigError(
            f"the model in {directory} has {vocabulary} token ids and data.corpus={experiment.data.corpus} "
            f"{corpus.vocab_size}: give data.corpus=OUT of `longstride prepare SOURCE OUT` with the model's tokenizer"
        )
    return experiment


def import_run(directory: str, experiment: Experiment, rank: int = 0, *, threads: int | None = None) -> RunDirectory:
    """Makes the experiment's run with a checkpoint of step 0 that holds the weights in `directory`, and nothing else.

    Called on each of the experiment's workers with its rank; each reads its shards of the tensors, none holds all of
    them. A tokenizer.json there becomes the run's.

    Raises ValueError, in one line: see `load_into`, and as of `create_run`. Then there is no run.
    """
    with process_group(rank, experiment.workers, None, "cpu", threads):
        mesh = Mesh(**asdict(experiment.degrees))
        model = make_sharded_model(experiment, mesh, filled=False)
        load_into(model, directory)
        run = from_first(rank, lambda: create_run(experiment).url)
        corpus = experiment.open_corpus()
        checkpointer = Checkpointer(RunDirectory(run), experiment.checkpoint, model)
        checkpointer.save(beginning(experiment, corpus.fingerprint(), mesh))
    made, tokenizer = RunDirectory(run), Path(directory) / TOKENIZER_FILE
    if rank == 0 and tokenizer.is_file():
        made.storage.write_text(TOKENIZER_FILE, tokenizer.read_text(encoding="utf-8"))
    return made


def export_run(
    run: RunDirectory, experiment: Experiment, out: str, layout: str, rank: int = 0, *, checkpoint: str = LATEST
) -> tuple[int, list[str]]:
    """Writes a whole checkpoint's weights to the directory `out`.

    Returns their step, and a line for every checkpoint that came first and is broken. `checkpoint`: as of `load_run`.
    Called on each of the experiment's workers; the first one writes, and no process holds the whole model if there are
    several. Raises ValueError, in one line: see `save_pretrained`, where there is no checkpoint, and for a URL.
    """
    if "://" in refuse_credentials("OUT", out):
        raise ConfigError(f"OUT={out} is a URL: give a folder of this machine, and copy it from there")
    if experiment.workers == 1:
        trained = load_run(run, experiment, checkpoint=checkpoint)
        save_pretrained(trained.model, out, layout=layout)
        step, notes = trained.step, trained.notes
    else:
        with process_group(rank, experiment.workers, None, "cpu", None):
            mesh = Mesh(**asdict(experiment.degrees))
            model, manifest, notes = load_sharded(run, experiment, mesh, checkpoint=checkpoint)
            save_pretrained(model, out, layout=layout)
            step = manifest.step
    if rank == 0 and run.storage.exists(TOKENIZER_FILE):
        (Path(out) / TOKENIZER_FILE).write_text(run.storage.read_text(TOKENIZER_FILE), encoding="utf-8")
    return step, notes


def beginning(experiment: Experiment, corpus: str, mesh: Mesh) -> Manifest:
    """What the checkpoint says with which a run begins that has made no step. `corpus`: its fingerprint."""
    counts = {"step": 0, "tokens": 0, "position": 0}
    data = {"context": experiment.data.context, "batch": experiment.data.batch, "corpus": corpus}
    written = {"created": timestamp(), "code_version": code_version(), "files": {}}
    return Manifest(**counts, **data, **written, world_size=mesh.world_size, parallel=asdict(mesh.degrees))


def from_first(rank: int, work: Any) -> Any:
    """What `work` returns on the first process, on all; its ValueError too."""
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = work()
        except ValueError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ConfigError(outcome[1])
    return outcome[0]
