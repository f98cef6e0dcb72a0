"""What a corpus is: two splits, each one long stream of tokens that can be read by range.

Where documents begin is known from an index, without reading tokens, so that every process knows the boundaries of a
whole sequence while it reads only its own slice of the tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np

from .order import Region
from .tokenizers import Tokenizer

SPLITS = ("train", "validation")


class Corpus(ABC):
    """Two splits, "train" and "validation".

    Attributes: `name`; `tokenizer`, for prompts and samples; `concurrent_reads`, how many reads to have under way at
    once: more than one where each waits for a network; `skipped`, the bad shards that were left out.
    """

    name: str
    tokenizer: Tokenizer
    concurrent_reads: int = 1
    skipped: tuple[str, ...] = ()

    @abstractmethod
    def num_tokens(self, split: str) -> int:
        """Length of the split's stream, in tokens."""

    @abstractmethod
    def document_starts(self, split: str, start: int, stop: int) -> np.ndarray:
        """Ascending int64 positions in [start, stop) of the stream at which a document begins. Position 0 always does.

        A document's separator is its own last token. Reads no tokens.
        """

    @abstractmethod
    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, shape (stop - start,), unsigned integers. Touches no other tokens.

        CorpusError: what lies there is missing, shorter than the index says, or corrupted.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digest that changes when the tokens, their order or the splits do: compare it before a resume."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.tokenizer.vocab_size

    def regions(self, split: str) -> list[Region]:
        """The stretches of the stream that are read as corpora of their own; one, unless this is a mixture."""
        return [Region(0, self.num_tokens(split), name=self.name)]

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a prompt, without a separator."""
        return self.tokenizer.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of a sample."""
        return self.tokenizer.decode(tokens)
