"""How the state-space dual goes through a sequence: a few chunks at a time, so that what it makes of them is small.

Legend: as in portable.py; M chunks, Q tokens of one; the last chunk may have fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..segments import segment_tokens
from .portable import Decays, chunked, documents_before


@dataclass(frozen=True)
class Piece:
    """Chunks from `first` up to `last`, all of `chunk` tokens; `has_start`: a document begins in one of them."""

    first: int
    last: int
    start: int
    chunk: int
    has_start: bool

    @property
    def chunks(self) -> slice:
        return slice(self.first, self.last)

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + (self.last - self.first) * self.chunk)


@dataclass(frozen=True)
class Plan:
    """A sequence's chunks, and how many a step takes.

    Attributes:
        dtype: of the computation.
        count_BMQ: see `documents_before`. has_start: of each chunk, whether a document begins in it.
        paired, unpaired: pieces for work with and without a matrix of each chunk's pairs of tokens.
    """

    dtype: torch.dtype
    count_BMQ: Tensor | None
    has_start: list[bool]
    paired: Sequence[Piece] = field(default=())
    unpaired: Sequence[Piece] = field(default=())

    @staticmethod
    def make(x_BTHP: Tensor, chunk: int, dtype: torch.dtype, starts_BT: Tensor | None) -> Plan:
        batch, length, heads, width = x_BTHP.shape
        count_BMQ = documents_before(starts_BT, chunk)
        has_start = [] if count_BMQ is None else (count_BMQ[:, :, -1] > 0).any(0).tolist()
        paired, unpaired = (
            _pieces(length, chunk, segment_tokens(chunk, batch * heads * elements, x_BTHP.device), has_start)
            for elements in (max(chunk, width), width)
        )
        return Plan(dtype, count_BMQ, has_start, paired, unpaired)

    def cut(self, x_BT: Tensor, piece: Piece) -> Tensor:
        """(B, M, Q, ...) in the dtype of the computation; a view if it has that already."""
        return x_BT[:, piece.tokens].unflatten(1, (-1, piece.chunk)).to(self.dtype)

    def decays(self, sums_BMQH: Tensor, piece: Piece) -> Decays:
        count_BMQ = self.count_BMQ if piece.has_start else None
        if count_BMQ is not None:
            count_BMQ = count_BMQ[:, piece.chunks, : piece.chunk]
        return Decays(sums_BMQH[:, piece.chunks, : piece.chunk], count_BMQ, self.dtype)

    def tails(self, sums_BMQH: Tensor) -> Tensor:
        """(B, M, H), decay from the end of each chunk to that of the sequence, zero if a document begins there."""
        whole_BMH = sums_BMQH[:, :, -1]
        tail_BMH = (whole_BMH.flip(1).cumsum(1).flip(1) - whole_BMH).exp()
        if self.count_BMQ is not None:
            begun_BM = self.count_BMQ[:, :, -1]
            tail_BMH = tail_BMH * (begun_BM.flip(1).cumsum(1).flip(1) == begun_BM).unsqueeze(2)
        return tail_BMH.to(self.dtype)


def _pieces(length: int, chunk: int, tokens: int, has_start: list[bool]) -> list[Piece]:
    full, rest = divmod(length, chunk)
    step = tokens // chunk
    ranges = [(first, min(first + step, full), chunk) for first in range(0, full, step)]
    if rest:
        ranges.append((full, full + 1, rest))
    return [Piece(first, last, first * chunk, size, any(has_start[first:last])) for first, last, size in ranges]


def sums_of_chunks(log_decay_BTH: Tensor, chunk: int) -> Tensor:
    """(B, M, Q, H): log decays summed since the chunk's begin, in double precision; differentiable."""
    return chunked(log_decay_BTH.double(), chunk).cumsum(2)
