"""The transform of a long convolution against products of polynomials made coefficient by coefficient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from longstride.kernels.long_convolution.transform import Transform, fast_length

# The last are beyond one row of either number: several rows, of lengths that are no powers of two.
SIZES = [(1, 1), (2, 1), (5, 3), (7, 7), (100, 1), (100, 100), (1000, 37), (20_000, 9_000), (30_000, 30_000)]


def signals(*lengths: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randn(2, length, generator=generator, dtype=torch.float64).to(dtype) for length in lengths]


def product(u: Tensor, v: Tensor) -> Tensor:
    """All coefficients."""
    rows = [np.convolve(one, other) for one, other in zip(u.numpy(), v.numpy(), strict=True)]
    return torch.from_numpy(np.stack(rows))


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("length", "taps"), SIZES)
def test_spectra_multiply_as_polynomials(length: int, taps: int) -> None:
    u, v = signals(length, taps)
    transform = Transform(length + taps - 1, u.dtype, u.device)
    spectrum = transform.forward(u) * transform.forward(v)
    assert spectrum.shape == (2, transform.frequencies)
    expected = product(u, v)
    for first in {1, length, length + taps - 1}:
        found = transform.backward(spectrum, first)
        assert found.shape == (2, first)
        assert difference(torch.cat((found, expected[:, first:]), 1), expected) < 1e-13


@pytest.mark.parametrize(("length", "taps"), SIZES)
def test_a_conjugate_turns_round(length: int, taps: int) -> None:
    """What the gradients need: sums over t of u_{t + lag} v_t, for lags from 0."""
    u, v = signals(length, taps)
    transform = Transform(length + taps - 1, u.dtype, u.device)
    found = transform.backward(transform.forward(u) * transform.forward(v).conj(), length)
    assert difference(found, product(u, v.flip(1))[:, taps - 1 :]) < 1e-13


@pytest.mark.parametrize("length", [4, 100, 40_000])
def test_shifts(length: int) -> None:
    (u,) = signals(length)
    transform = Transform(2 * length, u.dtype, u.device)
    later = transform.backward(transform.forward(u) * transform.shift(length // 2), length)
    assert difference(later, torch.cat((torch.zeros(2, length // 2), u[:, : length - length // 2]), 1)) < 1e-13
    earlier = transform.backward(transform.forward(u) * transform.shift(-(length // 2)), length // 2)
    assert difference(earlier, u[:, length // 2 : 2 * (length // 2)]) < 1e-13


def test_too_few_values_wrap_around() -> None:
    """Negative control: with room for fewer values than a product has, its end comes back to its beginning, negated."""
    u, v = signals(64, 64)
    transform = Transform(64, u.dtype, u.device)
    found, expected = transform.backward(transform.forward(u) * transform.forward(v), 64), product(u, v)
    assert difference(found, expected[:, :64]) > 0.1
    assert difference(found[:, :63], expected[:, :63] - expected[:, 64:]) < 1e-13


def test_single_precision_at_a_million_tokens() -> None:
    """No worse than the library's real FFT of twice the length."""
    length = 1 << 20
    u, v = signals(length, length)
    exact, single = (Transform(2 * length - 1, x, u.device) for x in (torch.float64, torch.float32))
    expected = exact.backward(exact.forward(u) * exact.forward(v), length)
    found = single.backward(single.forward(u.float()) * single.forward(v.float()), length)
    spectrum = torch.fft.rfft(u.float(), 2 * length) * torch.fft.rfft(v.float(), 2 * length)
    assert difference(found, expected) < 1.5 * difference(torch.fft.irfft(spectrum)[:, :length], expected)


def test_autocast_leaves_it_alone() -> None:
    u, v = signals(300, 300, dtype=torch.float32)
    transform = Transform(600, u.dtype, u.device)
    expected = transform.backward(transform.forward(u) * transform.forward(v), 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transform.backward(transform.forward(u) * transform.forward(v), 300), expected)


def test_fast_lengths() -> None:
    for minimum in range(1, 3000):
        length = fast_length(minimum)
        assert length >= minimum and length % 2 == 0 and length < 2 * max(minimum, 2)
        for factor in (2, 3, 5):
            while length % factor == 0:
                length //= factor
        assert length == 1
