"""What counting makes of a corpus of sound: bits a sample, to put beside a model's loss.

    python -m benchmarks.sound_baselines corpora/sounds [--length 16384] [--sequences 64]

Tables are counted on all training samples and asked about the same held-out targets as `longstride evaluate`. Every
context's table is smoothed by the one of the context that is a sample shorter.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from longstride.data import Corpus, ValidationSet, open_corpus

ORDERS = (0, 1, 2)
WEIGHTS = (2.0, 10.0, 30.0)
"""Counts that the shorter context's table weighs; the best of them is said."""


def held_out(corpus: Corpus, length: int, sequences: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, targets) of each held-out sequence, int64; -100 is no target."""
    for batch in ValidationSet(corpus, length, 1, sequences=sequences):
        yield batch.tokens_BT.numpy().ravel().astype(np.int64), batch.targets_BT.numpy().ravel().astype(np.int64)


class Table:
    """How often each token follows each context of `order` tokens in the training split."""

    def __init__(self, train: np.ndarray, vocabulary: int, order: int, shorter: Table | None, weight: float) -> None:
        self.order, self.vocabulary, self.shorter, self.weight = order, vocabulary, shorter, weight
        place = np.zeros(len(train) - order, dtype=np.int64)
        for back in range(order, -1, -1):
            place = place * vocabulary + train[order - back : len(train) - back]
        self.counts = np.bincount(place, minlength=vocabulary ** (order + 1)).reshape(-1, vocabulary)
        self.totals = self.counts.sum(axis=1)

    def probability(self, contexts: list[np.ndarray], targets: np.ndarray) -> np.ndarray:
        """Of each target after its context: `contexts[0]` the token before it, `contexts[1]` the one before that."""
        if self.shorter is None:
            likely = np.full(len(targets), 1 / self.vocabulary)
        else:
            likely = self.shorter.probability(contexts, targets)
        place = np.zeros(len(targets), dtype=np.int64)
        for context in reversed(contexts[: self.order]):
            place = place * self.vocabulary + context
        return (self.counts[place, targets] + self.weight * likely) / (self.totals[place] + self.weight)


def bits(table: Table, sequences: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, int]:
    """(mean bits a target, how many targets); the first of a sequence, which have no whole context, are left out."""
    total, count, first = 0.0, 0, max(table.order - 1, 0)
    for tokens, targets in sequences:
        contexts = [tokens[first - back : len(tokens) - back] for back in range(table.order)]
        asked = targets[first:] >= 0
        kept = [context[asked] for context in contexts]
        total -= np.log2(table.probability(kept, targets[first:][asked])).sum()
        count += int(asked.sum())
    return total / count, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--sequences", type=int, default=64)
    options = parser.parse_args()
    corpus = open_corpus(options.corpus)
    train = corpus.read("train", 0, corpus.num_tokens("train")).astype(np.int64)
    sequences = list(held_out(corpus, options.length, options.sequences))
    table: Table | None = None
    for order in ORDERS:
        counted = Table(train, corpus.vocab_size, order, table, WEIGHTS[0])
        found: dict[float, float] = {}
        for counted.weight in WEIGHTS:
            found[counted.weight], count = bits(counted, sequences)
        counted.weight = min(found, key=lambda weight: found[weight])
        print(f"order {order}: {found[counted.weight]:.3f} bits a sample of {count:,} (weight {counted.weight:g})")
        table = counted


if __name__ == "__main__":
    main()
