"""The tokenizer of a run, kept in its directory as tokenizer.json and tokenizer_config.json: it needs no corpus.

An import brings the model's own; otherwise it is the corpus's, kept when training begins. What the ids of an imported
model mean that came without one is not known before: any corpus may say it.
"""

from __future__ import annotations

from ..data import Corpus, CorpusError, DataConfig, MuLawTokenizer, SubwordTokenizer, Tokenizer, TokenizerFiles
from ..data.tokenizer_files import TOKENIZER, TOKENIZER_CONFIG
from ..data.tokenizers import IdTokenizer
from .configuration import ConfigError
from .experiment import Experiment
from .manifest import list_checkpoints
from .run_directory import RunDirectory


def kept_tokenizer(run: RunDirectory) -> TokenizerFiles | None:
    """What is kept with the run; None before its first training, and where that was before tokenizers were kept.

    ConfigError: its files are damaged.
    """
    try:
        return TokenizerFiles.found(lambda name: run.storage.read_text(name) if run.storage.exists(name) else None)
    except ValueError as error:
        raise ConfigError(f"{run.url}/{TOKENIZER} cannot be used: {error}") from None


def tokenizer_files(run: RunDirectory, data: DataConfig) -> TokenizerFiles | None:
    """What is kept with the run, or made of the tokenizer of its corpus `data` if it was trained; None otherwise.

    Errors as of `run_tokenizer`.
    """
    kept = kept_tokenizer(run)
    return TokenizerFiles.of(data.open().tokenizer) if kept is None and _trained(run) else kept


def keep_tokenizer(run: RunDirectory, tokenizer: Tokenizer | TokenizerFiles) -> None:
    """Puts a tokenizer into the run's directory; where its tokenizer.json is there, all stays as it is."""
    files = tokenizer if isinstance(tokenizer, TokenizerFiles) else TokenizerFiles.of(tokenizer)
    before = kept_tokenizer(run)
    if files is None or (before is not None and before.tokenizer == files.tokenizer):
        return
    run.storage.write_text(TOKENIZER_CONFIG, files.config)
    run.storage.write_text(TOKENIZER, files.tokenizer)


def run_tokenizer(run: RunDirectory, data: DataConfig) -> Tokenizer:
    """What a run's prompts and samples are read and written with: the one kept with it, or that of its corpus `data`.

    ConfigError as of `kept_tokenizer`. CorpusError: nothing is kept, and the corpus is gone.
    """
    kept = kept_tokenizer(run)
    return data.open().tokenizer if kept is None else kept.open()


def foreign_corpus(run: RunDirectory, experiment: Experiment) -> str | None:
    """The line for an experiment whose corpus's token ids mean something else than the run's; None where they agree."""
    corpus, before = experiment.data.open(), Experiment.resume(run).data
    kept, place = kept_tokenizer(run) is not None, run.url
    if not kept:
        if before.corpus == experiment.data.corpus or not _trained(run):
            return None
        place = before.corpus if isinstance(before.corpus, str) else next(iter(before.corpus))
    try:
        own = run_tokenizer(run, before)
    except CorpusError:  # it is gone: nothing says more than the number of ids, which is compared elsewhere
        return None
    return other_tokens(f"run {run.name}", own, place, corpus)


def other_tokens(whose: str, own: Tokenizer, place: str, corpus: Corpus) -> str | None:
    """The line for a corpus whose token ids are not those of `own`; None where they are. `place`: of tokenizer.json."""
    if own.name == corpus.tokenizer.name:
        return None
    subwords = isinstance(own, SubwordTokenizer)
    has = "has a tokenizer of its own" if subwords else f"was trained on {own.name}"
    problem = f"{whose} {has} and data.corpus={corpus.name} is written in {corpus.tokenizer.name}"
    if isinstance(own, MuLawTokenizer):
        option = f"--sample-rate {own.sample_rate}"
    elif isinstance(own, IdTokenizer):
        return f"{problem}: give a task of {own.vocab_size} tokens"
    else:
        option = "--tokenizer " + (f"{place}/{TOKENIZER}" if subwords else own.name)
    return f"{problem}: make one with `longstride prepare SOURCE OUT {option}` and give data.corpus=OUT"


def _trained(run: RunDirectory) -> bool:
    return any(found.step > 0 for found in list_checkpoints(run))
