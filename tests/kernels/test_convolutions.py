"""Short and long causal convolutions against sums over taps: outputs and every gradient in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels import long_convolution, short_convolution
from longstride.kernels.long_convolution import portable as long_portable
from longstride.kernels.long_convolution.portable import fast_length
from longstride.kernels.long_convolution.reference import long_convolution_reference
from longstride.kernels.short_convolution import portable as short_portable
from longstride.kernels.short_convolution.reference import short_convolution_reference

from .compare import assert_same, leaf, outputs_and_gradients, relative_error, start_mask, worst_error


def with_halo(function, x: Tensor, weight: Tensor, bias: Tensor, halo: Tensor, **options) -> Tensor:
    return function(x, weight, bias, halo=halo, **options)


def short_arguments(batch: int, length: int, channels: int, width: int) -> list[Tensor]:
    halo = leaf(batch, width - 1, channels, seed=4)
    return [leaf(batch, length, channels, seed=1), leaf(channels, width, seed=2), leaf(channels, seed=3), halo]


@pytest.mark.parametrize("block_elements", [8, 1 << 16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 2, 5), (2, 70, 3, 4), (1, 65, 2, 7), (1, 50, 2, 33), (2, 9, 2, 40)]
)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_short_convolution(monkeypatch, block_elements: int, shape: tuple[int, ...], activation: str | None) -> None:
    monkeypatch.setattr(short_portable, "_BLOCK_ELEMENTS", block_elements)
    fast = partial(with_halo, short_convolution, activation=activation)
    assert_same(fast, partial(with_halo, short_convolution_reference, activation=activation), short_arguments(*shape))


@pytest.mark.parametrize("width", [2, 4, 7, 40])
@pytest.mark.parametrize("length", [3, 70])
@pytest.mark.parametrize("rows", [1, 2])
def test_short_convolution_stays_in_its_document(width: int, length: int, rows: int) -> None:
    positions = [p for p in (0, 1, 2, 30, 31, 32, 33, 68, 69) if p < length]
    mask = start_mask(rows, length, *[(i % rows, p) for i, p in enumerate(positions)])
    inputs = short_arguments(2, length, 2, width)
    slow = partial(with_halo, short_convolution_reference, document_starts=mask)
    assert_same(partial(with_halo, short_convolution, document_starts=mask), slow, inputs)
    assert worst_error(partial(with_halo, short_convolution), slow, inputs) > 1e-3  # negative control


@pytest.mark.parametrize("width", [4, 40])
def test_the_halo_is_what_the_left_neighbour_holds(width: int) -> None:
    """Two pieces, the second with the end of the first as its halo, equal the whole."""
    cut = 45

    def joined(x: Tensor, weight: Tensor) -> Tensor:
        left = short_convolution(x[:, :cut], weight)
        return torch.cat((left, short_convolution(x[:, cut:], weight, halo=x[:, cut - width + 1 : cut])), 1)

    assert_same(joined, short_convolution, [leaf(2, 90, 3, seed=1), leaf(3, width, seed=2)])


def test_short_convolution_gradcheck_and_no_bias() -> None:
    mask = start_mask(1, 6, (0, 2))
    inputs = short_arguments(2, 6, 2, 3)
    assert torch.autograd.gradcheck(
        partial(with_halo, short_convolution, activation="silu", document_starts=mask), tuple(inputs)
    )
    assert torch.autograd.gradcheck(short_convolution, tuple(inputs[:2]))


@pytest.mark.parametrize("width", [4, 40])
def test_short_convolution_in_bfloat16_accumulates_in_float32(width: int) -> None:
    inputs = [x.detach().to(torch.bfloat16).requires_grad_() for x in short_arguments(1, 80, 4, width)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outputs, gradients = outputs_and_gradients(partial(with_halo, short_convolution), inputs)
    expected, expected_gradients = outputs_and_gradients(partial(with_halo, short_convolution), exact)
    assert outputs[0].dtype == torch.bfloat16 and {g.dtype for g in gradients} == {torch.bfloat16}
    pairs = zip(outputs + gradients, expected + expected_gradients, strict=True)
    assert max(relative_error(value, want) for value, want in pairs) < 5e-3  # one rounding of the result


def test_short_convolution_names_wrong_arguments() -> None:
    x, weight = torch.zeros(1, 4, 2), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"halo has shape \(1, 3, 2\), expected \(1, 2, 2\)"):
        short_convolution(x, weight, halo=torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match="'relu' is unknown"):
        short_convolution(x, weight, activation="relu")
    with pytest.raises(ValueError, match="weight has shape"):
        short_convolution(x, torch.zeros(3, 3))


def with_skip(function, u: Tensor, taps: Tensor, skip: Tensor, **options) -> Tensor:
    return function(u, taps, skip=skip, **options)


def long_arguments(batch: int, length: int, channels: int, taps: int) -> list[Tensor]:
    return [leaf(batch, length, channels, seed=1), leaf(channels, taps, seed=2), leaf(channels, seed=3)]


@pytest.mark.parametrize("block_elements", [1, 1 << 19])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 3, 7), (3, 64, 2, 64), (2, 101, 3, 20), (1, 33, 2, 50)])
def test_long_convolution(monkeypatch, block_elements: int, shape: tuple[int, int, int, int]) -> None:
    monkeypatch.setattr(long_portable, "_BLOCK_ELEMENTS", block_elements)
    inputs = long_arguments(*shape)
    assert_same(partial(with_skip, long_convolution), partial(with_skip, long_convolution_reference), inputs)
    assert_same(long_convolution, long_convolution_reference, inputs[:2])


@pytest.mark.parametrize("block_elements", [64, 1 << 19])
@pytest.mark.parametrize("rows", [1, 2])
def test_long_convolution_takes_each_document_by_itself(monkeypatch, block_elements: int, rows: int) -> None:
    monkeypatch.setattr(long_portable, "_BLOCK_ELEMENTS", block_elements)
    mask = start_mask(rows, 90, *[(i % rows, p) for i, p in enumerate((0, 1, 2, 3, 20, 21, 40, 50, 60, 89))])
    inputs = long_arguments(2, 90, 3, 90)
    slow = partial(with_skip, long_convolution_reference, document_starts=mask)
    assert_same(partial(with_skip, long_convolution, document_starts=mask), slow, inputs)
    assert worst_error(partial(with_skip, long_convolution), slow, inputs) > 1e-3  # negative control


def test_a_circular_convolution_would_not_pass() -> None:
    """Negative control: transforms of the plain length wrap the end around to the beginning."""

    def circular(u: Tensor, taps: Tensor) -> Tensor:
        product = torch.fft.rfft(u, dim=1) * torch.fft.rfft(taps, dim=1).t()
        return torch.fft.irfft(product, u.shape[1], dim=1)

    assert worst_error(circular, long_convolution_reference, long_arguments(1, 32, 2, 32)[:2]) > 0.1


def test_long_convolution_gradcheck() -> None:
    mask = start_mask(1, 6, (0, 2))
    fast = partial(with_skip, long_convolution, document_starts=mask)
    assert torch.autograd.gradcheck(fast, tuple(long_arguments(2, 6, 2, 6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_convolution_in_lower_precision(dtype: torch.dtype) -> None:
    inputs = [x.detach().to(dtype).requires_grad_() for x in long_arguments(2, 500, 3, 500)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outputs, gradients = outputs_and_gradients(partial(with_skip, long_convolution), inputs)
    expected, expected_gradients = outputs_and_gradients(partial(with_skip, long_convolution), exact)
    assert outputs[0].dtype == dtype and {g.dtype for g in gradients} == {dtype}
    pairs = zip(outputs + gradients, expected + expected_gradients, strict=True)
    bound = 2e-6 if dtype == torch.float32 else 5e-3
    assert max(relative_error(value, want) for value, want in pairs) < bound


def test_fast_lengths() -> None:
    for minimum in (1, 2, 3, 97, 1000, 131071, 131073):
        length = fast_length(minimum)
        assert length >= minimum and length % 2 == 0 and length < 2 * max(minimum, 2)
        for factor in (2, 3, 5):
            while length % factor == 0:
                length //= factor
        assert length == 1


def test_long_convolution_names_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="filter has shape"):
        long_convolution(torch.zeros(1, 4, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="skip has shape"):
        long_convolution(torch.zeros(1, 4, 2), torch.zeros(2, 4), skip=torch.zeros(3))
