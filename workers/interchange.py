"""Checkpoints of other software into runs, and runs into them; by one process, or by several that share the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..data import CorpusError, TokenizerFiles
from ..data.credentials import refuse_credentials
from ..data.tokenizer_files import TOKENIZER, TOKENIZER_CONFIG
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
from .run_tokenizer import keep_tokenizer, other_tokens, tokenizer_files
from .sharded_model import make_sharded_model
from .shared_outcomes import SharedOutcomes


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
    if (files := _found_tokenizer(directory)) is not None:
        tokenizer = files.open()
        if tokenizer.vocab_size > vocabulary:
            raise ConfigError(
                f"{directory}/{TOKENIZER} has {tokenizer.vocab_size} token ids and the model {vocabulary}: it is "
                "another model's; put the model's own there, or remove it"
            )
        given = "corpus" in experiment.data.model_fields_set
        if given and (problem := other_tokens(f"the model in {directory}", tokenizer, directory, corpus)):
            raise ConfigError(problem)
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
        run = RunDirectory(SharedOutcomes().from_first(lambda: _create(experiment, directory)))
        corpus = experiment.open_corpus()
        Checkpointer(run, experiment.checkpoint, model).save(beginning(experiment, corpus.fingerprint(), mesh))
    return run


def _create(experiment: Experiment, directory: str) -> str:
    tokenizer, run = _found_tokenizer(directory), create_run(experiment)
    if tokenizer is not None:
        keep_tokenizer(run, tokenizer)
    return run.url


def export_run(
    run: RunDirectory, experiment: Experiment, out: str, layout: str, rank: int = 0, *, checkpoint: str = LATEST
) -> tuple[int, list[str]]:
    """Writes a whole checkpoint's weights to the directory `out`, and the run's tokenizer.

    Returns their step, and a line for every checkpoint that came first and is broken, and for a tokenizer that is not
    to be had. `checkpoint`: as of `load_run`.
    Called on each of the experiment's workers; the first one writes, and no process holds the whole model if there are
    several. Raises ValueError, in one line: see `save_pretrained`, where there is no checkpoint, and for a URL.
    """
    if "://" in refuse_credentials("OUT", out):
        raise ConfigError(f"OUT={out} is a URL: give a folder of this machine, and copy it from there")
    tokenizer, without = _exported_tokenizer(run, experiment) if rank == 0 else (None, [])
    end = tokenizer.open().separator if tokenizer is not None else -1
    token_ids = {"eos_token_id": end if end >= 0 else None} if tokenizer is not None else {}
    if experiment.workers == 1:
        trained = load_run(run, experiment, checkpoint=checkpoint)
        save_pretrained(trained.model, out, layout=layout, token_ids=token_ids)
        step, notes = trained.step, trained.notes
    else:
        with process_group(rank, experiment.workers, None, "cpu", None):
            mesh = Mesh(**asdict(experiment.degrees))
            model, manifest, notes = load_sharded(run, experiment, mesh, checkpoint=checkpoint)
            save_pretrained(model, out, layout=layout, token_ids=token_ids)
            step = manifest.step
    if tokenizer is not None:
        (Path(out) / TOKENIZER).write_text(tokenizer.tokenizer, encoding="utf-8")
        (Path(out) / TOKENIZER_CONFIG).write_text(tokenizer.config, encoding="utf-8")
    return step, [*notes, *without]


def _exported_tokenizer(run: RunDirectory, experiment: Experiment) -> tuple[TokenizerFiles | None, list[str]]:
    """The run's tokenizer, or why there is none where there should be one."""
    try:
        return tokenizer_files(run, experiment.data), []
    except CorpusError as error:
        return None, [f"without a {TOKENIZER}: {error}"]


def _found_tokenizer(directory: str) -> TokenizerFiles | None:
    """The tokenizer beside a checkpoint, if there is one. ConfigError: its files are damaged."""
    try:
        return TokenizerFiles.found(lambda name: _text(Path(directory) / name))
    except ValueError as error:
        raise ConfigError(f"{directory}/{TOKENIZER} cannot be used: {error}; mend it, or remove it") from None


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def beginning(experiment: Experiment, corpus: str, mesh: Mesh) -> Manifest:
    """What the checkpoint says with which a run begins that has made no step. `corpus`: its fingerprint."""
    counts = {"step": 0, "tokens": 0, "position": 0}
    data = {"context": experiment.data.context, "batch": experiment.data.batch, "corpus": corpus}
    written = {"created": timestamp(), "code_version": code_version(), "files": {}}
    return Manifest(**counts, **data, **written, world_size=mesh.world_size, parallel=asdict(mesh.degrees))
