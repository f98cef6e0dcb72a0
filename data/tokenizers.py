"""Tokenizers: text to token ids and back, as NumPy arrays of the smallest unsigned type that holds the vocabulary."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np

from .mu_law import LEVELS


class Tokenizer(ABC):
    """Attributes: `name`; `vocab_size` (ids are below it); `separator`, the id that ends every document."""

    name: str
    vocab_size: int
    separator: int

    @property
    def dtype(self) -> np.dtype:
        """Little-endian type of the ids, as kept in memory and in token shards."""
        return np.dtype("u1") if self.vocab_size <= 1 << 8 else np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @abstractmethod
    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids of the text, shape (tokens,), without a separator. ValueError: the text has no such ids."""

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """`encode` of each text, together where that is faster."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the tokens, for people: separators become a line break, broken characters are replaced."""


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8, vocabulary 256; byte 0, which text does not use, ends a document."""

    name = "bytes"
    vocab_size = 256
    separator = 0

    def encode(self, text: str | bytes) -> np.ndarray:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        return np.frombuffer(data, dtype=np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        data = bytes(int(token) for token in tokens)
        return data.replace(b"\0", b"\n").decode("utf-8", "replace")


class DnaTokenizer(Tokenizer):
    """One token a base: A 1, C 2, G 3, T (and U) 4, N and every other IUPAC ambiguity code 5; 0 ends a document.

    Either case; white space is dropped. Any other character is a ValueError.
    """

    name = "dna"
    vocab_size = 6
    separator = 0
    letters = "\nACGTN"
    _AMBIGUOUS = "NRYSWKMBDHV"
    _UNKNOWN = 255

    def __init__(self) -> None:
        table = bytearray([self._UNKNOWN]) * 256
        for base, letters in self.spellings().items():
            for letter in letters:
                table[ord(letter)] = self.letters.index(base)
        self._table = bytes(table)

    def spellings(self) -> dict[str, str]:
        """By the letter that a base is decoded to, all letters that it is written with."""
        return {letters[0]: letters + letters.lower() for letters in ("A", "C", "G", "TU", self._AMBIGUOUS)}

    def encode(self, text: str | bytes) -> np.ndarray:
        data = text if isinstance(text, bytes) else text.encode()
        tokens = np.frombuffer(data.translate(self._table, b" \t\r\n\v\f"), dtype=np.uint8)
        if (tokens == self._UNKNOWN).any():
            strange = re.sub(rf"[ACGTU{self._AMBIGUOUS}\s]+", "", data.decode("utf-8", "replace"), flags=re.I | re.A)[0]
            raise ValueError(f"{strange!r} is not a base: DNA is written with A, C, G, T, N and IUPAC ambiguity codes")
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(self.letters[int(token)] if token < self.vocab_size else "?" for token in tokens)


class IdTokenizer(Tokenizer):
    """Token ids as people write them: decimal numbers with spaces between. No id ends a document."""

    separator = -1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.name = f"ids-{vocab_size}"

    def encode(self, text: str | bytes) -> np.ndarray:
        words = (text if isinstance(text, str) else text.decode()).split()
        strange = next((word for word in words if not word.isdecimal() or int(word) >= self.vocab_size), None)
        if strange is not None:
            raise ValueError(f"{strange!r} is no token of this task: write numbers from 0 to {self.vocab_size - 1}")
        return np.array([int(word) for word in words], dtype=self.dtype)

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(f"{int(token)} " for token in tokens)


class MuLawTokenizer(IdTokenizer):
    """One token a sample of sound: its level (see `mu_law`), written as a number. 256 ends a recording.

    Args: sample_rate: of the sound, Hz; it is part of the name.
    """

    separator = LEVELS

    def __init__(self, sample_rate: int) -> None:
        super().__init__(LEVELS + 1)
        self.name = f"{MU_LAW}-{sample_rate}"
        self.sample_rate = sample_rate


BUILT_IN: dict[str, type[ByteTokenizer] | type[DnaTokenizer]] = {"bytes": ByteTokenizer, "dna": DnaTokenizer}
MU_LAW = "mu-law"


def built_in(name: str) -> Tokenizer | None:
    """The tokenizer of this package that has this name, as indexes of corpora have it; None: none has."""
    kind, _, rate = name.rpartition("-")
    if kind == MU_LAW and rate.isdecimal():
        return MuLawTokenizer(int(rate))
    return BUILT_IN[name]() if name in BUILT_IN else None
