"""tokenizer.json and tokenizer_config.json of every tokenizer, as Hugging Face's libraries write and read them.

A run keeps them, `export` writes them, `import` takes those that it finds. Bytes, bases, levels of sound and the ids of
tasks are expressed in that format too, and recognised in it, by the vocabulary (of sound, by the config's sampling_rate
as well, which transformers' feature extractors call so): the same tokens have the same ids. Read by
`tokenizers` or `transformers` they give the ids of `Tokenizer.encode`, but that text which spells <|endoftext|> gives
the separator, and that byte 0, which text does not use, is dropped.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine

from .mu_law import LEVELS
from .subwords import END_OF_TEXT, SEPARATORS, SubwordTokenizer
from .tokenizers import ByteTokenizer, DnaTokenizer, IdTokenizer, MuLawTokenizer, Tokenizer

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class TokenizerFiles:
    """The content of tokenizer.json, and of tokenizer_config.json."""

    tokenizer: str
    config: str

    @classmethod
    def found(cls, read: Callable[[str], str | None]) -> "TokenizerFiles | None":
        """Those of a place; `read` gives a file's text by its name, None where there is none.

        A tokenizer.json that is alone gets a config. Raises ValueError, in one line: one of the files is damaged.
        """
        content = read(TOKENIZER)
        if content is None:
            return None
        config = read(TOKENIZER_CONFIG)
        if config is None:
            config = _config(cls(content, "{}").open())
        files = cls(content, config)
        files.open()
        return files

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TokenizerFiles | None":
        """Those of a tokenizer; None for a kind that is not of this package."""
        if isinstance(tokenizer, SubwordTokenizer):
            content = tokenizer.content
        elif isinstance(tokenizer, ByteTokenizer):
            content = _bytes().to_str()
        elif isinstance(tokenizer, DnaTokenizer):
            content = _dna(tokenizer).to_str()
        elif isinstance(tokenizer, MuLawTokenizer):
            content = _ids(_LEVELS, [END_OF_TEXT]).to_str()
        elif isinstance(tokenizer, IdTokenizer):
            content = _ids(_numbers(tokenizer.vocab_size)).to_str()
        else:
            return None
        return cls(content, _config(tokenizer))

    def open(self) -> Tokenizer:
        """The tokenizer. It ends documents with the config's eos_token, one of the usual names, or not at all (-1).

        Raises ValueError, in one line: one of the files is damaged.
        """
        return self._opened

    @functools.cached_property
    def _opened(self) -> Tokenizer:
        tokenizer = SubwordTokenizer(self.tokenizer, separator=-1)
        names, vocabulary = (self._end_of_text(), *SEPARATORS), tokenizer.vocabulary()
        tokenizer.separator = next((vocabulary[name] for name in names if name in vocabulary), -1)
        rate = self._setting("sampling_rate")
        return recognised(tokenizer, rate if isinstance(rate, int) else None)

    def _end_of_text(self) -> str | None:
        found = self._setting("eos_token")
        found = found.get("content") if isinstance(found, Mapping) else found
        return found if isinstance(found, str) else None

    def _setting(self, name: str) -> Any:
        try:
            return json.loads(self.config).get(name)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"not a {TOKENIZER_CONFIG}: {error}") from error


def recognised(tokenizer: SubwordTokenizer, sample_rate: int | None = None) -> Tokenizer:
    """The tokenizer of this package that a tokenizer.json stands for, or the one given. `sample_rate`: of sound."""
    vocabulary = tokenizer.vocabulary()
    if vocabulary == _LEVELS and sample_rate:
        return MuLawTokenizer(sample_rate)
    if vocabulary == _BYTES:
        return ByteTokenizer()
    if vocabulary == _BASES:
        return DnaTokenizer()
    return IdTokenizer(len(vocabulary)) if vocabulary == _numbers(len(vocabulary)) else tokenizer


def _config(tokenizer: Tokenizer) -> str:
    # Without the class, transformers makes one of its own by config.json, with other rules of splitting.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, MuLawTokenizer):
        config["sampling_rate"] = tokenizer.sample_rate
    if isinstance(tokenizer, SubwordTokenizer):
        end = next((name for name, token in tokenizer.vocabulary().items() if token == tokenizer.separator), None)
    else:
        end = END_OF_TEXT if tokenizer.separator >= 0 else None
    return json.dumps(config | ({} if end is None else {"eos_token": end}), indent=2) + "\n"


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's): itself, or one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _numbers(count: int) -> dict[str, int]:
    return {str(number): number for number in range(count)}


_BYTES = {END_OF_TEXT: 0} | {letter: byte for letter, byte in _byte_letters().items() if byte}
_BASES = {END_OF_TEXT: 0} | {letter: token for token, letter in enumerate(DnaTokenizer.letters) if token}
_LEVELS = _numbers(LEVELS) | {END_OF_TEXT: LEVELS}


def _bytes() -> Engine:
    engine = Engine(models.BPE(_BYTES, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([END_OF_TEXT])
    return engine


def _dna(tokenizer: DnaTokenizer) -> Engine:
    """A character that is no base is an error here as well: the vocabulary has no token for what is unknown."""
    engine = Engine(models.WordLevel(_BASES))
    replaced = {"[ \t\r\n\v\f]": "", **{f"[{letters}]": base for base, letters in tokenizer.spellings().items()}}
    engine.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(pattern), base) for pattern, base in replaced.items()]
    )
    engine.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    engine.decoder = decoders.Fuse()
    engine.add_special_tokens([END_OF_TEXT])
    return engine


def _ids(vocabulary: dict[str, int], special: Sequence[str] = ()) -> Engine:
    engine = Engine(models.WordLevel(vocabulary))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    engine.add_special_tokens(list(special))
    return engine
