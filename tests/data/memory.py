"""A corpus in memory whose tokens are their own positions, and which counts what is read from it."""

import hashlib

import numpy as np

from longstride.data import ByteTokenizer, Corpus
from longstride.data.order import Region


class MemoryCorpus(Corpus):
    """Token i of the stream is i (validation: i + 1,000,000), so that a test sees at once which token it got."""

    name = "memory"
    tokenizer = ByteTokenizer()

    def __init__(self, lengths=(1000, 300), documents=(0, 1, 7, 100, 101, 400, 999), weights=None):
        self.lengths = dict(zip(("train", "validation"), lengths, strict=True))
        self.documents = np.array(documents, dtype=np.int64)
        self.weights = weights
        self.ranges = []

    def num_tokens(self, split):
        return self.lengths[split]

    def document_starts(self, split, start, stop):
        starts = self.documents[self.documents < self.lengths[split]]
        return starts[(starts >= start) & (starts < stop)]

    def read(self, split, start, stop):
        assert 0 <= start < stop <= self.lengths[split]
        self.ranges.append((start, stop))
        return np.arange(start, stop, dtype=np.int64) + (1_000_000 if split == "validation" else 0)

    def fingerprint(self):
        return hashlib.sha256(repr(self.lengths).encode()).hexdigest()

    def regions(self, split):
        if not self.weights:
            return super().regions(split)
        edges = np.linspace(0, self.lengths[split], len(self.weights) + 1).astype(int).tolist()
        return [Region(*edge, weight) for *edge, weight in zip(edges, edges[1:], self.weights, strict=False)]
