"""Tokenizers: text to token ids and back, as NumPy arrays of the smallest unsigned type that holds the vocabulary."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np


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
        for token, letters in enumerate(("A", "C", "G", "TU", self._AMBIGUOUS), start=1):
            for letter in letters + letters.lower():
                table[ord(letter)] = token
        self._table = bytes(table)

    def encode(self, text: str | bytes) -> np.ndarray:
        data = text if isinstance(text, bytes) else text.encode()
        tokens = np.frombuffer(data.translate(self._table, b" \t\r\n\v\f"), dtype=np.uint8)
        if (tokens == self._UNKNOWN).any():
            strange = re.sub(rf"[ACGTU{self._AMBIGUOUS}\s]+", "", data.decode("utf-8", "replace"), flags=re.I | re.A)[0]
            raise ValueError(f"{strange!r} is not a base: DNA is written with A, C, G, T, N and IUPAC ambiguity codes")
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(self.letters[int(token)] if token < self.vocab_size else "?" for token in tokens)


BUILT_IN: dict[str, type[ByteTokenizer] | type[DnaTokenizer]] = {"bytes": ByteTokenizer, "dna": DnaTokenizer}
