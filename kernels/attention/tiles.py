"""Which keys which queries see, as rectangles and triangles.

Queries of one document that follow each other see the keys from the document's begin to themselves. Cut where the keys
end and where the first query stands, this is at most three tiles, each either wholly visible or exactly triangular, so
that no mask is ever stored and what is invisible is never touched.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Queries and keys (local, half-open) of the rows; wholly visible, or `causal`: equally long and aligned."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool


def _runs(document_begin: Tensor | None, batch: int, length: int) -> list[tuple[slice, int, int, int]]:
    """(rows, first query, end, begin): successive queries of one document; rows with the same documents together."""
    if document_begin is None:
        return [(slice(0, batch), 0, length, -(1 << 62))]
    begins = document_begin.cpu()
    if begins.shape[0] > 1 and bool((begins == begins[:1]).all()):
        begins = begins[:1]
    runs = []
    for index, row in enumerate(begins):
        values, counts = torch.unique_consecutive(row, return_counts=True)
        rows = slice(0, batch) if begins.shape[0] == 1 else slice(index, index + 1)
        start = 0
        for begin, count in zip(values.tolist(), counts.tolist(), strict=True):
            runs.append((rows, start, start + count, begin))
            start += count
    return runs


def tiles(
    batch: int, length: int, num_keys: int, query_start: int, key_start: int, document_begin: Tensor | None
) -> list[Tile]:
    """All visible pairs of global positions, each in exactly one tile. Every query of a tile sees at least one key."""
    found = []

    def add(rows: slice, queries: tuple[int, int], keys: tuple[int, int], *, causal: bool) -> None:
        if queries[1] > queries[0] and keys[1] > keys[0]:
            local_queries = slice(queries[0] - query_start, queries[1] - query_start)
            found.append(Tile(rows, local_queries, slice(keys[0] - key_start, keys[1] - key_start), causal))

    for rows, first, end, begin in _runs(document_begin, batch, length):
        key_first, key_end = max(begin, key_start), key_start + num_keys
        query_first, query_end = max(query_start + first, key_first), query_start + end
        inside = max(query_first, min(query_end, key_end))  # queries before this one stand among the keys
        add(rows, (query_first, inside), (query_first, inside), causal=True)
        add(rows, (query_first, inside), (key_first, min(query_first, key_end)), causal=False)
        add(rows, (inside, query_end), (key_first, key_end), causal=False)
    return found
