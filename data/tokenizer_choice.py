"""Which tokenizer a preparation uses: what the user named, or what goes with the sources."""

import difflib

from .errors import CorpusError
from .sources import SourceFile
from .storage import Folder
from .subwords import SubwordTokenizer
from .tokenizer_files import recognised
from .tokenizers import BUILT_IN, MU_LAW, Tokenizer, built_in

BPE_VOCABULARY = 4096
_SAMPLE_RATE, _LOWEST_RATE = 16000, 1000


def choose_tokenizer(
    files: list[SourceFile], tokenizer: str, vocab_size: int | None, separator: str | None, sample_rate: int | None
) -> tuple[str, Tokenizer | None]:
    """What stands for the tokenizer in the plan, and the tokenizer unless it is still to be trained.

    ValueError: there is none of that name, the options are not for it, it is not for what the files are, or audio is
    mixed with other files.
    """
    return _identify(_fitting(files, tokenizer, sample_rate), vocab_size, separator)


def _fitting(files: list[SourceFile], tokenizer: str, sample_rate: int | None) -> str:
    """A tokenizer's full name or place for such files."""
    sound = next((file for file in files if file.kind == "audio"), None)
    other = next((file for file in files if file.kind != "audio"), None)
    if sound and other:
        raise CorpusError(f"{sound.url} is audio and {other.url} is {other.kind}: prepare them apart")
    if sound:
        if tokenizer not in ("auto", MU_LAW):
            raise ValueError(f"tokenizer {tokenizer!r} is not for audio, which {sound.url} is: take {MU_LAW!r}")
        rate = _SAMPLE_RATE if sample_rate is None else sample_rate
        if rate < _LOWEST_RATE:
            raise ValueError(f"sample_rate {rate} is in Hz: take at least {_LOWEST_RATE}, as in {_SAMPLE_RATE}")
        return f"{MU_LAW}-{rate}"
    if sample_rate is not None or tokenizer.startswith(MU_LAW):
        given = f"tokenizer {tokenizer!r}" if sample_rate is None else f"sample_rate {sample_rate}"
        raise ValueError(f"{given} is for audio and {files[0].url} is {files[0].kind}: leave it out")
    if tokenizer == "auto":
        return "dna" if all(file.kind == "fasta" for file in files) else "bytes"
    return tokenizer


def _identify(tokenizer: str, vocab_size: int | None, separator: str | None) -> tuple[str, Tokenizer | None]:
    """What stands for the tokenizer in the plan, and the tokenizer unless it is still to be trained."""
    if vocab_size is not None and tokenizer != "bpe":
        raise ValueError(f"vocab_size is chosen for a tokenizer that is trained here (bpe), not for {tokenizer!r}")
    own = built_in(tokenizer)
    if separator is not None and (tokenizer == "bpe" or own):
        raise ValueError(f"a separator is chosen for a tokenizer.json, not for {tokenizer!r}")
    if tokenizer == "bpe":
        return f"bpe:{vocab_size or BPE_VOCABULARY}", None
    if own:
        return tokenizer, own
    if not tokenizer.endswith(".json"):
        names = ["bpe", *BUILT_IN, MU_LAW]
        near = difflib.get_close_matches(tokenizer, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"take {', '.join(names)}, or the path of a tokenizer.json"
        raise ValueError(f"unknown tokenizer {tokenizer!r}: {hint}")
    parent, _, file = tokenizer.rpartition("/")
    try:
        loaded = SubwordTokenizer(Folder(parent or ".").read(file).decode("utf-8", "replace"), separator=separator)
    except CorpusError:
        raise
    except ValueError as error:
        raise ValueError(f"{tokenizer}: {error}") from error
    own = loaded if separator else recognised(loaded)
    return (own.name if built_in(own.name) else f"{own.name}:{own.separator}"), own
