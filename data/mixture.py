"""Several corpora as one, each read in proportion to its weight."""

import hashlib
from bisect import bisect_right
from dataclasses import replace

import numpy as np

from .corpus import SPLITS, Corpus
from .errors import CorpusError
from .order import Region


class Mixture(Corpus):
    """Corpora one after the other in one address space, each a region with a weight; `GlobalOrder` draws from them.

    A sequence comes from one corpus. Each corpus has epochs of its own: a small one with a large weight is read again
    sooner. Held-out sequences are shared out by the weights too.

    Args: corpora: (corpus, weight) pairs. CorpusError: tokenizers differ, or a weight is not above 0.
    """

    def __init__(self, corpora: list[tuple[Corpus, float]]) -> None:
        self._corpora = [corpus for corpus, _ in corpora]
        self._weights = [weight for _, weight in corpora]
        self.name = " + ".join(corpus.name for corpus in self._corpora)
        self.concurrent_reads = max(corpus.concurrent_reads for corpus in self._corpora)
        self.skipped = tuple(f"{corpus.name}/{shard}" for corpus in self._corpora for shard in corpus.skipped)
        first, *others = self._corpora
        self.tokenizer = first.tokenizer
        for corpus in others:
            if corpus.tokenizer.name != first.tokenizer.name:
                raise CorpusError(
                    f"a mixture needs one tokenizer: {first.name!r} has {first.tokenizer.name}, "
                    f"{corpus.name!r} has {corpus.tokenizer.name}"
                )
        for corpus, weight in corpora:
            if not 0 < weight < float("inf"):
                raise CorpusError(
                    f"the weight of {corpus.name!r} is {weight}: it must be above 0; leave it out instead"
                )
        self._offsets = {
            split: np.cumsum([0, *(corpus.num_tokens(split) for corpus in self._corpora)], dtype=np.int64)
            for split in SPLITS
        }

    def num_tokens(self, split: str) -> int:
        return int(self._offsets[split][-1])

    def regions(self, split: str) -> list[Region]:
        return [
            replace(region, start=offset + region.start, stop=offset + region.stop, weight=weight)
            for corpus, weight, offset in zip(
                self._corpora, self._weights, self._offsets[split][:-1].tolist(), strict=True
            )
            for region in corpus.regions(split)
        ]

    def document_starts(self, split: str, start: int, stop: int) -> np.ndarray:
        parts = [
            corpus.document_starts(split, *span) + offset for corpus, offset, span in self._spans(split, start, stop)
        ]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        parts = [corpus.read(split, *span) for corpus, _, span in self._spans(split, start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _spans(self, split: str, start: int, stop: int) -> list[tuple[Corpus, int, tuple[int, int]]]:
        offsets = self._offsets[split].tolist()
        spans = []
        for number in range(max(0, bisect_right(offsets, start) - 1), len(self._corpora)):
            begin, end = max(start, offsets[number]), min(stop, offsets[number + 1])
            if begin < end:
                spans.append((self._corpora[number], offsets[number], (begin - offsets[number], end - offsets[number])))
        return spans

    def fingerprint(self) -> str:
        parts = [(corpus.fingerprint(), weight) for corpus, weight in zip(self._corpora, self._weights, strict=True)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()
