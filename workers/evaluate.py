"""What a trained run is worth: its weights, and how well they foretell held-out data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from ..data import Corpus, Task
from ..models import LanguageModel, build_model
from ..parallel import Mesh
from .checkpoint import Checkpointer, load_weights
from .checkpoint_policy import LATEST, candidates
from .configuration import ConfigError
from .experiment import Experiment
from .manifest import Manifest, first_whole
from .process_group import process_group
from .run_directory import RunDirectory
from .run_tokenizer import foreign_corpus
from .scoring import LengthScore, at_length, score_length
from .sharded_model import make_sharded_model


@dataclass(frozen=True)
class TrainedModel:
    """A run's weights after `step`. `notes`: a line for every checkpoint that came first and could not be used."""

    model: LanguageModel
    step: int
    tokens: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """Scores of the weights after `step`, one a length. `notes`: as of `TrainedModel`."""

    step: int
    scores: list[LengthScore]
    notes: list[str]


def load_run(
    run: RunDirectory, experiment: Experiment, device: str = "cpu", *, checkpoint: str = LATEST
) -> TrainedModel:
    """The model of one of the run's whole checkpoints, verified, whole on this process; no corpus is opened.

    Args:
        checkpoint: "latest", "best" or a step, see `candidates`.

    ValueError: there is no such checkpoint, or it holds another model than the experiment's.
    """
    found, manifest, rejected = first_whole(run, candidates(run, checkpoint))
    model = build_model(experiment.model, seed=experiment.seed, dtype=experiment.train.parameter_dtype, device=device)
    load_weights(found, model)
    return TrainedModel(model.eval(), manifest.step, manifest.tokens, rejected)


def load_sharded(
    run: RunDirectory, experiment: Experiment, mesh: Mesh, *, checkpoint: str = LATEST
) -> tuple[LanguageModel, Manifest, list[str]]:
    """The same model sharded over the mesh, its manifest, and the notes."""
    model = make_sharded_model(experiment, mesh, filled=False).eval()
    checkpointer = Checkpointer(run, experiment.checkpoint, model)
    found, manifest, rejected = checkpointer.find(checkpoint)
    checkpointer.load(found, manifest)
    return model, manifest, rejected


def evaluate(
    experiment: Experiment,
    run: RunDirectory,
    rank: int = 0,
    *,
    checkpoint: str = LATEST,
    device: str | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Scores one of the run's whole checkpoints on held-out data, of `evaluate.lengths` or as training validates.

    With several workers every process calls this with its rank; they meet as torchrun's environment says, hold their
    shards of the parameters, and come to the same result.

    Args:
        checkpoint: as of `load_run`.
        device: "cpu" or "cuda"; a GPU where there is one by default. threads: as of `train_process`.
        progress: told (batches done, batches in all) of each length.

    Raises ValueError: there is no whole checkpoint, lengths for which there is no model or no data, or a corpus that is
    not written in the run's own tokens.
    """
    if problem := unfit_lengths(experiment) or foreign_corpus(run, experiment):
        raise ConfigError(problem)
    if experiment.workers == 1:
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        trained = load_run(run, experiment, name, checkpoint=checkpoint)
        scores = _scores(trained.model, experiment.open_corpus(), experiment, None, progress)
        return Evaluation(trained.step, scores, trained.notes)
    with process_group(rank, experiment.workers, None, device, threads) as own_device:
        mesh = Mesh(**asdict(experiment.degrees), device=own_device, strategies=experiment.parallel.strategies)
        model, manifest, rejected = load_sharded(run, experiment, mesh, checkpoint=checkpoint)
        scores = _scores(model, experiment.open_corpus(), experiment, mesh, progress)
        return Evaluation(manifest.step, scores, rejected)


def unfit_lengths(experiment: Experiment) -> str | None:
    """The line for a length that the model is not defined for, or of which there is no held-out data; else None."""
    longest = build_model(experiment.model, device="meta").max_length
    key, lengths = "evaluate.lengths", experiment.evaluate.lengths
    if not lengths:
        key, lengths = "data.context", (experiment.data.context,)
    if longest is not None and max(lengths) > longest:
        return f"{key}: {max(lengths)} exceeds the {longest} positions of the model"
    corpus = experiment.data.open()
    if isinstance(corpus, Task):
        problems = [f"{key}: {length}: {problem}" for length in lengths if (problem := corpus.misfit(length))]
        return problems[0] if problems else None
    held_out = max(region.length for region in corpus.regions("validation"))
    if max(lengths) <= held_out:
        return None
    return (
        f"{key}: {max(lengths)} exceeds the {held_out} held-out tokens of data.corpus={experiment.data.corpus}; "
        f"set evaluate.lengths=[{held_out}] or less, or give a larger data.corpus"
    )


def _scores(
    model: LanguageModel,
    corpus: Corpus,
    experiment: Experiment,
    mesh: Mesh | None,
    progress: Callable[[int, int], None],
) -> list[LengthScore]:
    config, copies = experiment.evaluate, mesh.data_size if mesh else 1
    data = [at_length(experiment.data, config, length, copies) for length in config.lengths] or [experiment.data]
    return [score_length(model, each, corpus, mesh, progress) for each in data]
