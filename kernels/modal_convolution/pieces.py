"""How the stages of a modal convolution go through a sequence: a few chunks at a time, the shorter last one alone.

Between stages, tokens and states lie in buffers of rows, one piece after another: for each channel the chunks of all
sequences, and of each chunk its tokens or the state before it. So each piece is dense, as batched products want it.

Legend: as in portable.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..documents import first_start
from ..segments import segment_tokens
from .portable import Documents


@dataclass(frozen=True)
class Piece:
    """`chunks` chunks of `chunk` tokens, from token `start`; `documents`: None if none begins in them."""

    start: int
    chunks: int
    chunk: int
    documents: Documents | None

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.chunks * self.chunk)

    @property
    def keep_BM(self) -> Tensor | None:
        """False where a chunk forgets the state before it."""
        return None if self.documents is None else self.documents.unbroken_R.view(-1, self.chunks)


@dataclass(frozen=True)
class Plan:
    """A sequence's chunks, and how many a step takes.

    Attributes:
        chunk: tokens of all chunks but a shorter last one. dtype: of the computation.
        first_B: where each sequence's first document begins; None if none does.
        reach: tokens that can see the state before the first token.
    """

    batch: int
    length: int
    channels: int
    chunk: int
    dtype: torch.dtype
    first_B: Tensor | None
    reach: int
    pieces: list[Piece]

    @staticmethod
    def make(u_BTD: Tensor, chunk: int, dtype: torch.dtype, starts_BT: Tensor | None) -> Plan:
        batch, length, channels = u_BTD.shape
        full, tail = divmod(length, chunk)
        step = segment_tokens(chunk, batch * channels, u_BTD.device, least_chunks=16) // chunk
        sizes = [(first * chunk, min(step, full - first), chunk) for first in range(0, full, step)]
        if tail:
            sizes.append((full * chunk, 1, tail))
        first_B, reach = None, length
        if starts_BT is not None and length:
            starts_BT = starts_BT.expand(batch, -1)
            first_B = first_start(starts_BT)
            reach = int(first_B.max()) if batch else 0
        pieces = [Piece(*size, _documents(starts_BT, *size)) for size in sizes]
        return Plan(batch, length, channels, chunk, dtype, first_B, reach, pieces)

    def cut(self, x_BTD: Tensor, piece: Piece) -> Tensor:
        """(D, R, Q) in the dtype of the computation: a piece of a sequence as dense rows."""
        x_DBT = x_BTD[:, piece.tokens].permute(2, 0, 1).to(self.dtype)
        return x_DBT.reshape(self.channels, -1, piece.chunk).contiguous()

    def put(self, x_BTD: Tensor, piece: Piece, rows_DRQ: Tensor) -> None:
        """The inverse of `cut`: the rows back into the sequence, in its dtype."""
        rows_DBT = rows_DRQ.view(self.channels, self.batch, piece.chunks * piece.chunk)
        for x_TD, rows_DT in zip(x_BTD[:, piece.tokens].unbind(0), rows_DBT.unbind(1), strict=True):
            x_TD.copy_(rows_DT.t())  # PyTorch transposes a matrix twice as fast as more dimensions

    def token_buffer(self, like: Tensor) -> Tensor:
        """A buffer of rows of tokens."""
        return like.new_empty(self.batch * self.length * self.channels, dtype=self.dtype)

    def state_buffer(self, like: Tensor, size: int) -> Tensor:
        """A buffer of rows of states, of `size` real numbers each."""
        chunks = -(-self.length // self.chunk)
        return like.new_empty(self.batch * chunks * self.channels, size, dtype=self.dtype)

    def token_rows(self, buffer: Tensor, piece: Piece) -> Tensor:
        """(D, R, Q), a view."""
        chunks = self.batch * self.channels * piece.chunks
        first = self.batch * self.channels * piece.start
        return buffer[first : first + chunks * piece.chunk].view(self.channels, -1, piece.chunk)

    def state_rows(self, buffer: Tensor, piece: Piece) -> Tensor:
        """(D, R, S), a view."""
        chunks = self.batch * self.channels * piece.chunks
        first = self.batch * self.channels * (piece.start // self.chunk)
        return buffer[first : first + chunks].view(self.channels, -1, buffer.shape[1])

    def by_sequence(self, rows_DR: Tensor) -> Tensor:
        """(D, B, M, ...)"""
        return rows_DR.unflatten(1, (self.batch, rows_DR.shape[1] // max(1, self.batch)))


def _documents(starts_BT: Tensor | None, start: int, chunks: int, chunk: int) -> Documents | None:
    if starts_BT is None:
        return None
    here_BT = starts_BT[:, start : start + chunks * chunk]
    return Documents.of(here_BT.reshape(-1, chunk)) if bool(here_BT.any()) else None
