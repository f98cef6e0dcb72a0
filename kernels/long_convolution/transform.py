"""The transform of a long convolution: real polynomials modulo x^F + 1, at half of its roots.

A product of real polynomials of at most F coefficients is exact modulo x^F + 1, as modulo x^F - 1, whose roots a real
FFT of F points stands for. But the roots of x^F = -1 are F / 2 = N with x^N = -i and their conjugates, and the former
say everything about a real polynomial: a complex FFT of N points does it, with no pass that packs a real signal, and
zeros that only keep the product from wrapping around are never touched.

Much of the time of a long FFT goes by outside the cache. So the first step (decimation in frequency) is made here: with
N = R M, x^N + i is the product of x^M - c_r over r < R, c_r^R = -i, and rows of M points are left for the library:

    z_rn = sum over q of c_r^q x_{q M + n}             n < M: the remainder modulo x^M - c_r, a small matrix times rows
    X_rk = FFT_M of z_rn e^(-i pi (4 r + 1) n / F)     the roots of x^M = c_r

The frequencies are in no common order, nor need they be: spectra are only multiplied with each other, or conjugates.
Transforming back is the same matrix transposed.

Legend: C any leading dimensions, L real values, Q = L / M rounded up, R rows of M points, S = R M frequencies.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Points of a row: two arrays of this many complex numbers fit a core's cache.
_ROW = 1 << 13
# Rows: two, so that the matrix above also makes complex numbers of real ones; not so many that it takes long.
_LEAST_ROWS, _MOST_ROWS = 2, 16


def fast_length(minimum: int) -> int:
    """The smallest 2^a 3^b 5^c, with a of at least 1, that is not below `minimum`: lengths that FFTs like."""
    best = 2
    while best < minimum:
        best *= 2
    five = 1
    while five < best:
        three = five
        while three < best:
            two = 2 * three
            while two < minimum:
                two *= 2
            best = min(best, two)
            three *= 3
        five *= 5
    return best


class Transform:
    """Of real signals whose products have at most `values` coefficients; exact in the sense of an FFT.

    Signals are float32 or float64, as `dtype` says; a spectrum is `frequencies` complex numbers, half of `values` or a
    few more. Spectra multiply as polynomials do, and a conjugate stands for the signal turned round in time.
    """

    def __init__(self, values: int, dtype: torch.dtype, device: torch.device) -> None:
        half, rows = -(-values // 2), _LEAST_ROWS
        while rows < _MOST_ROWS and half > rows * _ROW:
            rows *= 2
        self.row = fast_length(-(-half // rows))
        self.frequencies = rows * self.row
        self._dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
        self._quarters_R1 = 4 * torch.arange(rows, device=device).unsqueeze(1) + 1
        # c_r^q; even a signal that fills all values has only 2 R rows
        powers_RQ = self._phase(self.row * torch.arange(2 * rows, device=device))
        self._real_RQ, self._imag_RQ = powers_RQ.real.contiguous(), powers_RQ.imag.contiguous()
        self._phases_RM = self._phase(torch.arange(self.row, device=device))
        self._back_RM = self._phases_RM.conj().resolve_conj() / self.frequencies

    def _phase(self, exponents: Tensor) -> Tensor:
        """e^(-i pi (4 r + 1) exponent / F), (R, exponents); whole turns are taken off as integers."""
        angle = (self._quarters_R1 * exponents % (4 * self.frequencies)).double() * (-math.pi / (2 * self.frequencies))
        return torch.polar(torch.ones_like(angle), angle).to(self._dtype)

    def forward(self, x_CL: Tensor) -> Tensor:
        """(..., S) complex, of up to `values` numbers."""
        x_CL = F.pad(x_CL, (0, -x_CL.shape[-1] % self.row))
        x_CQM = x_CL.view(-1, x_CL.shape[-1] // self.row, self.row)
        count = x_CQM.shape[1]
        with torch.autocast(x_CL.device.type, enabled=False):
            z_CRM = torch.complex(self._real_RQ[:, :count] @ x_CQM, self._imag_RQ[:, :count] @ x_CQM)
        z_CRM.mul_(self._phases_RM)
        if z_CRM.numel():  # MKL refuses none
            z_CRM = torch.fft.fft(z_CRM)
        return z_CRM.view(*x_CL.shape[:-1], self.frequencies)

    def backward(self, spectrum_CS: Tensor, length: int) -> Tensor:
        """(..., length), the first values that a spectrum stands for."""
        spectrum_CRM = spectrum_CS.reshape(-1, *self._phases_RM.shape)
        z_CRM = spectrum_CRM
        if spectrum_CRM.numel():
            z_CRM = torch.fft.ifft(spectrum_CRM, norm="forward").mul_(self._back_RM)
        count = -(-length // self.row)
        with torch.autocast(z_CRM.device.type, enabled=False):
            x_CQM = self._real_RQ[:, :count].mT @ z_CRM.real.contiguous()
            x_CQM += self._imag_RQ[:, :count].mT @ z_CRM.imag.contiguous()
        return x_CQM.view(*spectrum_CS.shape[:-1], count * self.row)[..., :length]

    def shift(self, steps: int) -> Tensor:
        """(S,), the spectrum of x^steps: multiplied with it, a signal comes later by as many steps, or earlier."""
        turns_M = (torch.arange(self.row, device=self._phases_RM.device) * steps % self.row).double() / self.row
        within_M = torch.polar(torch.ones_like(turns_M), turns_M * (-2 * math.pi)).to(self._dtype)
        return (self._phase(torch.full((1,), steps, device=turns_M.device)) * within_M).flatten()
