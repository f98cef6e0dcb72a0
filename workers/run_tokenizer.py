"""The tokenizer of a run: its corpus's, or its own where the model came with one."""

from __future__ import annotations

from ..data import Corpus, CorpusError, SubwordTokenizer, Tokenizer
from .experiment import Experiment
from .run_directory import RunDirectory

TOKENIZER_FILE = "tokenizer.json"


def run_tokenizer(run: RunDirectory, corpus: Corpus) -> Tokenizer:
    """What a run's prompts and samples are read and written with; `corpus` is the run's."""
    if run.storage.exists(TOKENIZER_FILE):
        return SubwordTokenizer(run.storage.read_text(TOKENIZER_FILE))
    return corpus.tokenizer


def foreign_corpus(run: RunDirectory, experiment: Experiment) -> str | None:
    """The line for an experiment whose corpus's token ids mean something else than the run's; None where they agree."""
    corpus, before = experiment.data.open(), Experiment.resume(run)
    same = before.data.corpus == experiment.data.corpus
    try:
        own, theirs = run_tokenizer(run, corpus if same else before.data.open()), corpus.tokenizer
    except CorpusError:  # it is gone: nothing says more than the number of ids, which is compared elsewhere
        return None
    if own.name == theirs.name:
        return None
    if run.storage.exists(TOKENIZER_FILE):
        has, take = "has a tokenizer of its own", f"{run.url}/{TOKENIZER_FILE}"
    else:
        has, take = f"was trained on {own.name}", own.name
        if isinstance(own, SubwordTokenizer):
            take = f"{before.data.corpus}/{TOKENIZER_FILE}"
    return (
        f"run {run.name} {has} and data.corpus={corpus.name} is written in {theirs.name}: "
        f"make one with `longstride prepare SOURCE OUT --tokenizer {take}` and give data.corpus=OUT"
    )
