"""How the tokens of a segment lie in rows of Q, channel by channel, for products with Toeplitz matrices.

Rows of inputs are J = `spill` more than those of outputs and begin J places before them, so that row r of the outputs
reads rows r ... r + J of the inputs.

Legend: B batch, T tokens of a segment, P tokens before it (taps less one), E = P + T, D channels, R rows, Q tokens of a
row, J rows in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows(Protocol):
    """Tokens to rows and back; the directions of the backward are the transposes of those of the forward."""

    @property
    def depth_R(self) -> Tensor | None: ...
    def of_inputs(self, x_BED: Tensor) -> Tensor: ...
    def to_outputs(self, y_DRQ: Tensor) -> Tensor: ...
    def of_outputs(self, grad_BTD: Tensor) -> Tensor: ...
    def to_inputs(self, grad_DRQ: Tensor) -> Tensor: ...


def _to_rows(x_XD: Tensor, row: int) -> Tensor:
    """(D, R, Q), dense. Transposing a dense matrix as a whole is several times faster than a strided copy."""
    return x_XD.contiguous().t().contiguous().unflatten(1, (-1, row))


def _to_tokens(x_DRQ: Tensor) -> Tensor:
    """(R Q, D), dense."""
    return x_DRQ.flatten(1).t().contiguous()


@dataclass(frozen=True)
class PlainRows:
    """No document begins: the segment's tokens in order, each sequence's after J rows that end with those before it."""

    shape: tuple[int, int, int]  # B, T, P
    row: int
    spill: int
    depth_R: Tensor | None = None

    def _padding(self) -> tuple[int, int]:
        """Empty places before and behind the tokens of a sequence."""
        _, tokens, before = self.shape
        return self.spill * self.row - before, -tokens % self.row

    def _places(self) -> tuple[int, int]:
        """Sequences, and the places of each."""
        batch, tokens, before = self.shape
        first, last = self._padding()
        return batch, first + before + tokens + last

    def of_inputs(self, x_BED: Tensor) -> Tensor:
        first, last = self._padding()
        x_XD = F.pad(x_BED, (0, 0, first, last)).flatten(0, 1)
        return _to_rows(F.pad(x_XD, (0, 0, 0, self.spill * self.row)), self.row)

    def to_outputs(self, y_DRQ: Tensor) -> Tensor:
        return _to_tokens(y_DRQ).unflatten(0, self._places())[:, : self.shape[1]]

    def of_outputs(self, grad_BTD: Tensor) -> Tensor:
        last = self._padding()[1] + self.spill * self.row
        return _to_rows(F.pad(grad_BTD, (0, 0, 0, last)).flatten(0, 1), self.row)

    def to_inputs(self, grad_DRQ: Tensor) -> Tensor:
        first, _ = self._padding()
        _, tokens, before = self.shape
        grad_XD = _to_tokens(grad_DRQ)[: (grad_DRQ.shape[1] - self.spill) * self.row]
        return grad_XD.unflatten(0, self._places())[:, first : first + before + tokens]


@dataclass(frozen=True)
class IndexedRows:
    """Every document, and every sequence of the batch, begins a row of its own; J empty rows come first."""

    shape: tuple[int, int, int]
    row: int
    spill: int
    depth_R: Tensor
    source_X: Tensor  # for each place of the output's rows its token among the B E, or B E where there is none
    place_BE: Tensor  # for each token its place

    @staticmethod
    def of(shape: tuple[int, int, int], row: int, spill: int, starts_BE: Tensor) -> IndexedRows:
        batch, tokens, before = shape
        total, device = batch * (before + tokens), starts_BE.device
        begins_BE = starts_BE.expand(batch, -1).clone()
        begins_BE[:, 0] = True
        begin_of = begins_BE.flatten().nonzero().squeeze(1)
        length_of = F.pad(begin_of, (0, 1), value=total).diff()
        rows_of = (length_of + row - 1) // row
        first_row_of = rows_of.cumsum(0) - rows_of
        document_R = torch.arange(len(begin_of), device=device).repeat_interleave(rows_of)
        depth_R = torch.arange(len(document_R), device=device) - first_row_of[document_R]
        age_RQ = depth_R.unsqueeze(1) * row + torch.arange(row, device=device)
        inside_RQ = age_RQ < length_of[document_R].unsqueeze(1)
        source_RQ = torch.where(inside_RQ, begin_of[document_R].unsqueeze(1) + age_RQ, total)
        document_X = begins_BE.flatten().cumsum(0) - 1
        place_X = first_row_of[document_X] * row + torch.arange(total, device=device) - begin_of[document_X]
        return IndexedRows(shape, row, spill, depth_R.int(), source_RQ.flatten(), place_X.view(batch, before + tokens))

    def _place(self, x_BED: Tensor, front: int) -> Tensor:
        x_XD = F.pad(x_BED.flatten(0, 1), (0, 0, 0, 1)).index_select(0, self.source_X)
        return _to_rows(F.pad(x_XD, (0, 0, front * self.row, 0)), self.row)

    def of_inputs(self, x_BED: Tensor) -> Tensor:
        return self._place(x_BED, self.spill)

    def to_outputs(self, y_DRQ: Tensor) -> Tensor:
        place_BT = self.place_BE[:, self.shape[2] :]
        return _to_tokens(y_DRQ).index_select(0, place_BT.flatten()).unflatten(0, place_BT.shape)

    def of_outputs(self, grad_BTD: Tensor) -> Tensor:
        return self._place(F.pad(grad_BTD, (0, 0, self.shape[2], 0)), 0)

    def to_inputs(self, grad_DRQ: Tensor) -> Tensor:
        place_X = self.place_BE.flatten() + self.spill * self.row
        return _to_tokens(grad_DRQ).index_select(0, place_X).unflatten(0, self.place_BE.shape)
