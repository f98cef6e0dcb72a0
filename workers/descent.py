"""A run that begins with another run's weights: on another corpus, with another context, other rates."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict

from ..data import CorpusError
from ..data.credentials import refuse_credentials
from ..models import ModelConfig, build_model
from ..parallel import Mesh
from .checkpoint import Checkpointer
from .checkpoint_policy import LATEST
from .configuration import ConfigError, apply_overrides, parse_yaml, validate
from .evaluate import load_sharded
from .experiment import Experiment
from .interchange import beginning
from .launch import create_run
from .process_group import process_group
from .run_directory import RunDirectory
from .run_tokenizer import foreign_corpus, keep_tokenizer, tokenizer_files
from .shared_outcomes import SharedOutcomes


def descendant(parent: RunDirectory, out: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a run at `out` (a path or URL): the parent's with overrides put in.

    ValueError of one line: settings that are wrong, a model with other parameters than the parent's, or a corpus that
    is not written in its tokens.
    """
    directory, _, name = refuse_credentials("OUT", out.rstrip("/")).rpartition("/")
    tree = parse_yaml(parent.read_experiment(), f"{parent.url}/experiment.yaml")
    tree["run"] = {"directory": directory or "/" if "/" in out else ".", "name": name}
    experiment = validate(Experiment, apply_overrides(tree, overrides))
    before, after = (_shapes(model) for model in (Experiment.resume(parent).model, experiment.model))
    if before != after:
        key = next(key for key in [*before, *after] if before.get(key) != after.get(key))
        there, here = (shapes.get(key, "missing") for shapes in (before, after))
        raise ConfigError(f"the model has other parameters than run {parent.name}: {key} is {there} there, {here} here")
    if problem := foreign_corpus(parent, experiment):
        raise ConfigError(problem)
    return experiment


def descend(
    parent: RunDirectory, experiment: Experiment, rank: int = 0, workers: int = 1, *, checkpoint: str = LATEST
) -> tuple[RunDirectory, int, list[str]]:
    """Makes the experiment's run with a checkpoint of step 0 that holds the weights of a whole checkpoint of `parent`.

    Called on each of `workers` processes with its rank, however many the experiment will have; each holds its shards.
    Returns the run, the step the parent's weights are of, and a line for every checkpoint that came first and is
    broken. `checkpoint`: as of `load_run`. ValueError of one line as of `create_run`, or there is no such checkpoint;
    then there is no run.
    """
    sharded = [f"parallel.{axis}=auto" for axis in ("data", "sequence", "expert")]
    here = [f"workers={workers}", "data.batch=1", "parallel.replicate=1", "train.accumulate=1", "data.schedule=null"]
    theirs = Experiment.resume(parent, [*here, "train.canonical=0", *sharded])
    with process_group(rank, workers, None, "cpu", None):
        mesh = Mesh(**asdict(theirs.degrees))
        model, manifest, notes = load_sharded(parent, theirs, mesh, checkpoint=checkpoint)
        run = RunDirectory(SharedOutcomes().from_first(lambda: create_run(experiment).url))
        fingerprint = experiment.open_corpus().fingerprint()
        Checkpointer(run, experiment.checkpoint, model).save(beginning(experiment, fingerprint, mesh))
    if rank == 0:
        run.update_info(parents=[parent.url])
        with contextlib.suppress(CorpusError):  # it is gone, and its tokenizer was not kept
            if (tokenizer := tokenizer_files(parent, theirs.data)) is not None:
                keep_tokenizer(run, tokenizer)
    return run, manifest.step, notes


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in build_model(model, device="meta").state_dict().items()}
