"""The loader: hands every process its slice of every sequence, in one global order that no mesh can change.

Shape letters: B rows (sequences) of this process, T tokens of this process's slice.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from .corpus import Corpus
from .errors import CorpusError
from .order import GlobalOrder, Region, Window, spread
from .prefetch import Prefetcher

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """This process's part of one global batch.

    tokens_BT: int64, tokens [bounds) of each of this process's sequences.
    targets_BT: int64, the next tokens; -100 where the next token belongs to another document.
    document_starts: per row, ascending positions in the WHOLE sequence (1 to context - 1) at which a document begins.
        Position 0 is never listed: a sequence always begins afresh, wherever in a document it was cut.
    step: place in the global order.
    num_targets: targets that count (are not -100) in the global batch, over all processes.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    document_starts: tuple[tuple[int, ...], ...]
    step: int
    num_targets: int


class SliceReader:
    """Reads this process's rows and slice of a batch of windows; see `SequenceLoader` for the arguments and errors."""

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        context: int,
        batch: int,
        data_rank: int,
        data_size: int,
        bounds: tuple[int, int] | None,
    ) -> None:
        self.corpus, self.split, self.context, self.batch = corpus, split, context, batch
        self.start, self.stop = bounds or (0, context)
        self.rows = own_rows(context, batch, data_rank, data_size, (self.start, self.stop))
        self._pool = ThreadPoolExecutor(corpus.concurrent_reads, "read") if corpus.concurrent_reads > 1 else None

    def read(self, windows: Sequence[Window | None], step: int) -> Batch:
        """The batch of these windows, one a global row; None is a row of padding without targets."""
        run = self._pool.map if self._pool else map
        starts = list(run(self._document_starts, windows))
        num_targets = sum(self.context - len(row) for row, window in zip(starts, windows, strict=True) if window)
        own = self.rows
        tokens_BT = np.zeros((len(own), self.stop - self.start), dtype=np.int64)
        targets_BT = np.full_like(tokens_BT, IGNORED)
        rows = [(row, number, window) for row, number in enumerate(own) if (window := windows[number])]
        rows = rows if self.start < self.stop else []
        for (row, number, _), tokens in zip(rows, run(self._tokens, [window for *_, window in rows]), strict=True):
            tokens_BT[row], targets_BT[row] = tokens[:-1], tokens[1:]
            crossing = [place - 1 - self.start for place in starts[number] if self.start < place <= self.stop]
            targets_BT[row, crossing] = IGNORED
        return Batch(
            torch.from_numpy(tokens_BT),
            torch.from_numpy(targets_BT),
            tuple(tuple(place for place in starts[number] if place < self.context) for number in own),
            step,
            num_targets,
        )

    def _tokens(self, window: Window) -> np.ndarray:
        parts = [self.corpus.read(self.split, *span[:2]) for span in window.spans(self.start, self.stop + 1)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _document_starts(self, window: Window | None) -> list[int]:
        """Positions 1 to context (the last is the token after the sequence) at which a document begins."""
        places = []
        if window is None:
            return places
        for first, stop, place in window.spans(1, self.context + 1):
            starts = self.corpus.document_starts(self.split, first, stop) - first + place
            if first == window.region.start and (not len(starts) or starts[0] != place):
                places.append(place)  # wrapped around: the stream's end and beginning are not neighbours
            places.extend(starts.tolist())
        return places


def own_rows(context: int, batch: int, data_rank: int, data_size: int, bounds: tuple[int, int]) -> range:
    """The rows of the global batch that a data rank reads. ValueError: there is no such rank, or such a slice."""
    start, stop = bounds
    if context < 1 or batch < 1:
        raise ValueError(f"data.context {context} and data.batch {batch} must be at least 1")
    if batch % data_size:
        above = -(-batch // data_size) * data_size
        raise ValueError(f"data.batch {batch} does not divide over {data_size} data ranks: take {above}")
    if not 0 <= data_rank < data_size:
        raise ValueError(f"data rank {data_rank} is not one of {data_size}")
    if not 0 <= start <= stop <= context:
        raise ValueError(f"slice [{start}, {stop}) is not inside a sequence of {context} tokens")
    num_rows = batch // data_size
    return range(data_rank * num_rows, (data_rank + 1) * num_rows)


class BatchLoader(Iterator[Batch]):
    """Endless iterator of training batches: batch number `step` is a function of `step` alone.

    Args:
        read: the batch of a step.
        start_step: the first step to hand out. prefetch: batches read ahead by a thread; 0 reads in `next`.

    What `read` raises comes from `next`, at the step it belongs to. `close` ends the thread.
    """

    def __init__(self, read: Callable[[int], Batch], start_step: int, prefetch: int) -> None:
        self._read = read
        self._prefetch = prefetch
        self._batches: Iterator[Batch] | None = None
        self._position = start_step

    @property
    def position(self) -> int:
        """The step that `next` hands out: the whole state of the loader."""
        return self._position

    def seek(self, step: int) -> None:
        """Go on at `step`, before or behind; replays nothing."""
        self.close()
        self._position = step

    def __next__(self) -> Batch:
        if self._batches is None:
            source = map(self._read, itertools.count(self._position))
            self._batches = Prefetcher(source, self._prefetch) if self._prefetch else source
        try:
            batch = next(self._batches)
        except Exception:
            self.close()  # so that another `next` tries the same step again
            raise
        self._position = batch.step + 1
        return batch

    def close(self) -> None:
        """End the background thread. The loader may be used again: it reads on at `position`."""
        if isinstance(self._batches, Prefetcher):
            self._batches.close()
        self._batches = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HeldOut(Protocol):
    """The held-out batches of one process, the same each time and in the same number on every process.

    The last one may be filled up with rows whose targets are all -100: weight each batch's mean loss by its
    `num_targets`.
    """

    @property
    def num_sequences(self) -> int: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class SequenceLoader(BatchLoader):
    """The training batches of a corpus.

    The global order is fixed by (seed, corpus, split, context): batch number `step` holds sequences
    [step * batch, (step + 1) * batch) of `GlobalOrder`, whatever the mesh. Data rank r of P reads rows
    [r * batch / P, (r + 1) * batch / P) of it and, of each row, the tokens [bounds) and the one after them, by range.

    Args:
        corpus: what to read; split: "train" or "validation".
        context: tokens of a sequence. batch: sequences of the GLOBAL batch, over all data ranks.
        seed: of the order. bounds: [start, stop) of every sequence that this process reads; default: all.
        start_step, prefetch: see `BatchLoader`.

    Raises ValueError: batch not divisible by data_size, context longer than the corpus, bounds outside the sequence.
    A read that fails raises CorpusError from `next`.
    """

    def __init__(
        self,
        corpus: Corpus,
        context: int,
        batch: int,
        *,
        seed: int,
        split: str = "train",
        data_rank: int = 0,
        data_size: int = 1,
        bounds: tuple[int, int] | None = None,
        start_step: int = 0,
        prefetch: int = 2,
    ) -> None:
        reader = SliceReader(corpus, split, context, batch, data_rank, data_size, bounds)
        regions = corpus.regions(split)
        _require(min(regions, key=attrgetter("length")), split, context)
        order = GlobalOrder(regions, context, seed)
        # Not a method: the prefetching thread must not keep the loader alive.
        super().__init__(lambda step: _batch(reader, order, step), start_step, prefetch)


def _require(region: Region, split: str, context: int) -> None:
    if region.length < context:
        raise CorpusError(
            f"data.context {context} is longer than the {split} split of {region.name!r}, {region.length} tokens: "
            "shorten the context or take a larger corpus"
        )


def _batch(reader: SliceReader, order: GlobalOrder, step: int) -> Batch:
    first = step * reader.batch
    return reader.read([order.window(first + row) for row in range(reader.batch)], step)


class ValidationSet:
    """The held-out batches: at most `sequences` disjoint windows spread over the validation split, the same each time.

    Independent of seed and mesh. Where the split holds fewer windows of this context, it is those. The last batch is
    filled up with rows whose targets are all -100, so that every process sees the same number of batches: weight each
    batch's mean loss by its `num_targets`. Arguments and errors as of `SequenceLoader`.
    """

    def __init__(
        self,
        corpus: Corpus,
        context: int,
        batch: int,
        *,
        sequences: int,
        data_rank: int = 0,
        data_size: int = 1,
        bounds: tuple[int, int] | None = None,
    ) -> None:
        self._reader = SliceReader(corpus, "validation", context, batch, data_rank, data_size, bounds)
        regions = corpus.regions("validation")
        _require(max(regions, key=attrgetter("length")), "validation", context)
        self._windows = spread(regions, context, sequences)

    @property
    def num_sequences(self) -> int:
        return len(self._windows)

    def __len__(self) -> int:
        return -(-len(self._windows) // self._reader.batch)

    def __iter__(self) -> Iterator[Batch]:
        size = self._reader.batch
        for step in range(len(self)):
            windows: list[Window | None] = list(self._windows[step * size : (step + 1) * size])
            yield self._reader.read(windows + [None] * (size - len(windows)), step)
