"""The tokenizer of a run: its corpus's, or its own where the model came with one."""

from __future__ import annotations

from ..data import Corpus, SubwordTokenizer, Tokenizer
from .run_directory import RunDirectory

TOKENIZER_FILE = "tokenizer.json"


def run_tokenizer(run: RunDirectory, corpus: Corpus) -> Tokenizer:
    """What a run's prompts and samples are read and written with."""
    if run.storage.exists(TOKENIZER_FILE):
        return SubwordTokenizer(run.storage.read_text(TOKENIZER_FILE))
    return corpus.tokenizer


def foreign_corpus(run: RunDirectory, corpus: Corpus) -> str | None:
    """The line for a corpus whose token ids mean something else than the run's own; None where they agree."""
    own, theirs = run_tokenizer(run, corpus), corpus.tokenizer
    if own.name == theirs.name:
        return None
    return (
        f"run {run.name} has a tokenizer of its own and data.corpus={corpus.name} is written in {theirs.name}: "
        f"make one with `longstride prepare SOURCE OUT --tokenizer {run.url}/{TOKENIZER_FILE}` and give data.corpus=OUT"
    )
