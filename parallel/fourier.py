"""A convolution by a Fourier transform that is itself distributed: no process ever holds a full-length row.

Tokens of a window are numbered n = r T + t with r in [0, P), t in [0, T), and padded with zeros to r in [0, 2P), so
that nothing wraps around. The transform of length 2 P T is Cooley and Tukey's two-step one: over r, a twiddle, over t.

    scatter   contiguous tokens  ->  a slice of t for every r          T real numbers per channel and process
    transform over r (2P points, the zero half costs nothing); real input leaves P + 1 frequencies, the first and last
              of which are real and share one complex row: P rows
    transpose rows to processes  ->  one row, every t                  T complex numbers
    transform over t; multiply; and back the same way: T complex and T real numbers.

The order stays transposed in between, so only exchanges that the data force remain. A process's row after the first
step has T numbers, a P-th of the sequence. On process 0 the row is two real signals: the frequencies 2P k2 of the
first, and of the last, shifted by half a bin, only the even ones of its Hermitian spectrum, by a complex transform of
half the length; so its work is that of the others.

Shapes: B batch, D channels, T columns, K rows (one per process), C columns of one process's slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .collectives import exchange
from .shard import SequenceShard, even_bounds


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) of a sequence, laid out in P rows of `columns` columns, for one shard."""

    shard: SequenceShard
    begin: int
    end: int

    @property
    def columns(self) -> int:
        """T: even, and a product of small primes, which transforms like."""
        size = self.shard.size
        return _smooth_even(max(-(-(self.end - self.begin) // size), 2, size))

    @property
    def column_bounds(self) -> tuple[int, ...]:
        return even_bounds(self.columns, self.shard.size)

    @property
    def my_columns(self) -> range:
        bounds = self.column_bounds
        return range(bounds[self.shard.rank], bounds[self.shard.rank + 1])

    def local(self, rank: int) -> tuple[int, int]:
        """The window's tokens on `rank`, in positions of the window."""
        first = min(max(self.shard.bounds[rank], self.begin), self.end)
        last = min(max(self.shard.bounds[rank + 1], self.begin), self.end)
        return first - self.begin, last - self.begin

    def pieces(self, rank: int, slice_of: int) -> list[tuple[int, int, int, int]]:
        """(row, first column, last column, position in the window) of rank's tokens in the columns of `slice_of`."""
        first, last = self.local(rank)
        low, high = self.column_bounds[slice_of], self.column_bounds[slice_of + 1]
        found = []
        for row in range(first // self.columns, -(-last // self.columns)):
            a = max(first, row * self.columns + low)
            b = min(last, row * self.columns + high)
            if a < b:
                found.append((row, a - row * self.columns, b - row * self.columns, a))
        return found


def convolve_window(u_BWD: Tensor, filter_DKC: Tensor, window: Window) -> Tensor:
    """Causal convolution within one window of a length-sharded sequence; differentiable in both arguments.

    Args:
        u_BWD: this shard's tokens of the window (possibly none), float32 or float64.
        filter_DKC: the filter at lags r T + t, for every row r < P and this process's columns t (zeros at lags that
            lie beyond the window).

    Returns:
        (B, W, D).
    """
    u_BDKC = _scatter(u_BWD, window)
    spectrum = _Rows.of(u_BDKC, window).transform() * _Rows.of(filter_DKC.unsqueeze(0), window).transform()
    return _gather(spectrum.inverse(), window)


class _Rows:
    """This process's row of the two-step transform: (B, D, T) complex before the transform over t."""

    def __init__(self, row_BDT: Tensor, window: Window) -> None:
        self.row_BDT = row_BDT
        self.window = window

    @classmethod
    def of(cls, x_BDKC: Tensor, window: Window) -> _Rows:
        """Transform over r, then rows to processes."""
        real_FK, imaginary_FK = _across_rows(window.shard.size, x_BDKC)
        return cls(_transpose_rows(torch.complex(real_FK @ x_BDKC, imaginary_FK @ x_BDKC), window), window)

    def transform(self) -> _Spectrum:
        """Twiddle and transform over t."""
        columns, rank = self.window.columns, self.window.shard.rank
        if rank:
            angle = _angles(columns, self.row_BDT) * (rank / self.window.shard.size)
            return _Spectrum([torch.fft.fft(self.row_BDT * torch.polar(torch.ones_like(angle), -angle))], self.window)
        half = columns // 2
        last = self.row_BDT.imag
        angle = _angles(columns, self.row_BDT)[:half]
        folded = torch.complex(last[..., :half], -last[..., half:]) * torch.polar(torch.ones_like(angle), -angle)
        return _Spectrum([torch.fft.rfft(self.row_BDT.real), torch.fft.fft(folded)], self.window)


class _Spectrum:
    """Frequencies of one row, in transposed order: one complex spectrum, or process 0's two."""

    def __init__(self, parts: list[Tensor], window: Window) -> None:
        self.parts = parts
        self.window = window

    def __mul__(self, other: _Spectrum) -> _Spectrum:
        return _Spectrum([a * b for a, b in zip(self.parts, other.parts, strict=True)], self.window)

    def inverse(self) -> Tensor:
        """(B, D, P, C) real: transform back over t, rows to columns, back over r without the padding half."""
        size, columns = self.window.shard.size, self.window.columns
        if len(self.parts) == 1:
            angle = _angles(columns, self.parts[0]) * (self.window.shard.rank / size)
            row = torch.fft.ifft(self.parts[0]) * torch.polar(torch.ones_like(angle), angle)
        else:
            angle = _angles(columns, self.parts[1])[: columns // 2]
            folded = torch.fft.ifft(self.parts[1]) * torch.polar(torch.ones_like(angle), angle)
            last = torch.cat([folded.real, -folded.imag], dim=-1)
            row = torch.complex(torch.fft.irfft(self.parts[0], n=columns), last)
        rows_BDKC = _transpose_columns(row, self.window)
        real_FK, imaginary_FK = _across_rows(size, rows_BDKC.real)
        weight_F1 = torch.full_like(real_FK[:, :1], 1 / size)
        weight_F1[0] /= 2
        back_KF, back_imaginary_KF = (weight_F1 * real_FK).t(), (weight_F1 * imaginary_FK).t()
        return back_KF @ rows_BDKC.real + back_imaginary_KF @ rows_BDKC.imag


def _across_rows(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The transform over P rows and as many of zeros: two (P, P) matrices, the real and imaginary parts of frequencies.

    Frequency 0 is real, and frequency P, real as well, is its imaginary part. Products: a row more or less is nothing
    beside the transform over t, whereas a library's transforms of a few strided numbers take as long as that.
    """
    r_K = torch.arange(size, dtype=torch.float64, device=like.device)
    angle_FK = r_K[:, None] * r_K * (torch.pi / size)
    imaginary_FK = -torch.sin(angle_FK)
    imaginary_FK[0] = 1 - 2 * (r_K % 2)
    return torch.cos(angle_FK).to(like.dtype), imaginary_FK.to(like.dtype)


def _angles(columns: int, like: Tensor) -> Tensor:
    """(T,) pi t / T, taken in double precision."""
    real = torch.float64 if like.dtype == torch.complex128 else torch.float32
    return (torch.arange(columns, dtype=torch.float64, device=like.device) * (torch.pi / columns)).to(real)


def _smooth_even(least: int) -> int:
    """The smallest even number >= least without prime factors above 5."""
    number = least + least % 2
    while True:
        rest = number
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return number
        number += 2


# The four exchanges. Each is linear and its adjoint is the one that goes the other way.


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, window: Window, forth: str) -> Tensor:
        ctx.window, ctx.forth = window, forth  # type: ignore[attr-defined]
        return _MOVES[forth](x, window, "convolve.forward")

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        move = _MOVES[_ADJOINT[ctx.forth]]  # type: ignore[attr-defined]
        return move(grads[0], ctx.window, "convolve.backward"), None, None  # type: ignore[attr-defined]


def _apply(x: Tensor, window: Window, forth: str) -> Tensor:
    result = _Exchange.apply(x, window, forth)
    assert isinstance(result, Tensor)
    return result


def _scatter(u_BWD: Tensor, window: Window) -> Tensor:
    """(B, W, D) contiguous tokens -> (B, D, P, C): this process's columns of every row, zero where no token is."""
    return _apply(u_BWD, window, "scatter")


def _gather(y_BDKC: Tensor, window: Window) -> Tensor:
    """The inverse of `_scatter`."""
    return _apply(y_BDKC, window, "gather")


def _transpose_rows(rows_BDKC: Tensor, window: Window) -> Tensor:
    """(B, D, P, C) all rows, my columns -> (B, D, T) my row, all columns."""
    return _apply(rows_BDKC, window, "rows")


def _transpose_columns(row_BDT: Tensor, window: Window) -> Tensor:
    """The inverse of `_transpose_rows`."""
    return _apply(row_BDT, window, "columns")


def _move_scatter(u_BWD: Tensor, window: Window, motion: str) -> Tensor:
    shard, (batch, _, channels) = window.shard, u_BWD.shape
    first, _ = window.local(shard.rank)
    mine = [window.pieces(shard.rank, peer) for peer in range(shard.size)]
    theirs = [window.pieces(peer, shard.rank) for peer in range(shard.size)]
    u_BDW = u_BWD.transpose(1, 2)
    parts = [_joined([u_BDW[:, :, n - first : n - first + b - a] for _, a, b, n in p], u_BDW) for p in mine]
    shapes = [(batch, channels, sum(b - a for _, a, b, _ in p)) for p in theirs]
    out = u_BWD.new_zeros(batch, channels, shard.size, len(window.my_columns))
    low = window.my_columns.start
    for pieces, arrived in zip(theirs, exchange(parts, shapes, shard, motion).wait(), strict=True):
        offset = 0
        for row, a, b, _ in pieces:
            out[:, :, row, a - low : b - low] = arrived[:, :, offset : offset + b - a]
            offset += b - a
    return out


def _move_gather(y_BDKC: Tensor, window: Window, motion: str) -> Tensor:
    shard, (batch, channels) = window.shard, y_BDKC.shape[:2]
    first, last = window.local(shard.rank)
    mine = [window.pieces(shard.rank, peer) for peer in range(shard.size)]
    theirs = [window.pieces(peer, shard.rank) for peer in range(shard.size)]
    low = window.my_columns.start
    parts = [_joined([y_BDKC[:, :, r, a - low : b - low] for r, a, b, _ in p], y_BDKC[:, :, 0]) for p in theirs]
    shapes = [(batch, channels, sum(b - a for _, a, b, _ in p)) for p in mine]
    out = y_BDKC.new_zeros(batch, channels, last - first)
    for pieces, arrived in zip(mine, exchange(parts, shapes, shard, motion).wait(), strict=True):
        offset = 0
        for _, a, b, n in pieces:
            out[:, :, n - first : n - first + b - a] = arrived[:, :, offset : offset + b - a]
            offset += b - a
    return out.transpose(1, 2)


def _joined(pieces: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(pieces, dim=-1) if pieces else like[..., :0]


def _move_rows(rows_BDKC: Tensor, window: Window, motion: str) -> Tensor:
    shard, (batch, channels) = window.shard, rows_BDKC.shape[:2]
    bounds = window.column_bounds
    parts = [torch.view_as_real(rows_BDKC[:, :, peer]) for peer in range(shard.size)]
    shapes = [(batch, channels, bounds[peer + 1] - bounds[peer], 2) for peer in range(shard.size)]
    return torch.view_as_complex(torch.cat(exchange(parts, shapes, shard, motion).wait(), dim=2))


def _move_columns(row_BDT: Tensor, window: Window, motion: str) -> Tensor:
    shard, (batch, channels) = window.shard, row_BDT.shape[:2]
    bounds = window.column_bounds
    real = torch.view_as_real(row_BDT.resolve_conj())
    parts = [real[:, :, bounds[peer] : bounds[peer + 1]] for peer in range(shard.size)]
    shapes = [(batch, channels, len(window.my_columns), 2)] * shard.size
    return torch.view_as_complex(torch.stack(exchange(parts, shapes, shard, motion).wait(), dim=2))


_MOVES = {"scatter": _move_scatter, "gather": _move_gather, "rows": _move_rows, "columns": _move_columns}
_ADJOINT = {"scatter": "gather", "gather": "scatter", "rows": "columns", "columns": "rows"}
