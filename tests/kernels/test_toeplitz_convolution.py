"""Convolutions of medium width, as products of Toeplitz matrices, against one token and one tap at a time."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels import long_convolution, short_convolution
from longstride.kernels.long_convolution import toeplitz
from longstride.kernels.long_convolution.portable import LongConvolution
from longstride.kernels.long_convolution.reference import long_convolution_reference
from longstride.kernels.short_convolution.reference import short_convolution_reference

from .compare import assert_same, leaf, relative_error, start_mask, worst_error
from .native import DEVICE, NATIVE, assert_close, needs_triton, triton_chosen


def with_halo(function, x: Tensor, weight: Tensor, bias: Tensor, halo: Tensor, **options) -> Tensor:
    return function(x, weight, bias, halo=halo, **options)


def arguments(batch: int, length: int, channels: int, width: int) -> list[Tensor]:
    halo = leaf(batch, width - 1, channels, seed=4)
    return [leaf(batch, length, channels, seed=1), leaf(channels, width, seed=2), leaf(channels, seed=3), halo]


@pytest.mark.parametrize("segment_elements", [1, 1 << 20])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 5, 2, 40), (1, 80, 1, 17), (2, 130, 2, 33), (1, 40, 1, 100)])
def test_equals_the_sum_over_taps(
    monkeypatch: pytest.MonkeyPatch, segment_elements: int, shape: tuple[int, int, int, int]
) -> None:
    """One segment and several, rows of which the last is short, filters longer than the sequence."""
    monkeypatch.setattr(toeplitz, "_SEGMENT_ELEMENTS", segment_elements)
    fast = partial(with_halo, short_convolution, activation="silu")
    assert_same(fast, partial(with_halo, short_convolution_reference, activation="silu"), arguments(*shape))


@pytest.mark.parametrize("segment_elements", [1, 1 << 20])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("width", [17, 40])
def test_no_tap_reaches_over_a_document_start(
    monkeypatch: pytest.MonkeyPatch, segment_elements: int, rows: int, width: int
) -> None:
    monkeypatch.setattr(toeplitz, "_SEGMENT_ELEMENTS", segment_elements)
    starts = start_mask(rows, 90, *[(i % rows, p) for i, p in enumerate((0, 1, 2, 16, 30, 31, 63, 64, 89))])
    inputs = arguments(2, 90, 1, width)
    slow = partial(with_halo, short_convolution_reference, document_starts=starts)
    assert_same(partial(with_halo, short_convolution, document_starts=starts), slow, inputs)
    assert worst_error(partial(with_halo, short_convolution), slow, inputs) > 1e-3  # negative control


def test_a_long_convolution_with_few_taps_takes_the_same_products() -> None:
    starts = start_mask(1, 300, (0, 7), (0, 150))
    inputs = [leaf(2, 300, 2, seed=1), leaf(2, 20, seed=2), leaf(2, seed=3)]

    def full(function, u: Tensor, taps: Tensor, skip: Tensor) -> Tensor:
        return function(u, taps, skip=skip, document_starts=starts)

    assert_same(partial(full, long_convolution), partial(full, long_convolution_reference), inputs)
    names = []
    for length, taps in ((300, 20), (300, 100), (8192, 128), (2048, 300)):
        u, filter_DK = torch.zeros(1, length, 1, requires_grad=True), torch.zeros(1, taps)
        names.append(type(long_convolution(u, filter_DK).grad_fn).__name__)
    assert names == ["ToeplitzConvolutionBackward", "LongConvolutionBackward"] * 2


def test_single_precision_is_as_exact_as_transforms() -> None:
    u, taps = leaf(1, 2000, 2).detach(), leaf(2, 128, seed=1).detach()
    exact = LongConvolution.apply(u, taps, None, None)
    halo = torch.zeros(1, 127, 2)
    products = toeplitz.ToeplitzConvolution.apply(u.float(), taps.float(), halo, None)
    transforms = LongConvolution.apply(u.float(), taps.float(), None, None)
    assert relative_error(products, exact) < max(1e-6, relative_error(transforms, exact))


def test_strided_inputs_and_expanded_gradients() -> None:
    def averaged(function, wide: Tensor, weight: Tensor) -> Tensor:
        return function(wide.transpose(1, 2)[..., 1:], weight).mean(0, keepdim=True).expand(3, -1, -1)

    inputs = [leaf(2, 3, 40), leaf(2, 20, seed=1)]
    assert_same(partial(averaged, short_convolution), partial(averaged, short_convolution_reference), inputs)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "width", "starts"),
    [(40, 20, ()), (21, 36, ()), (40, 20, ((0, 3), (1, 17), (1, 18))), *([(3000, 128, ())] if NATIVE else [])],
)
def test_triton(
    length: int, width: int, starts: tuple[tuple[int, int], ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = start_mask(2, length, *starts) if starts else None
    slow = partial(with_halo, short_convolution_reference, document_starts=mask)
    fast = partial(with_halo, short_convolution, document_starts=None if mask is None else mask.to(DEVICE))
    with triton_chosen(monkeypatch) as launched:
        assert_close(fast, slow, arguments(2, length, 2, width), dtype)
    assert launched == ["band_kernel", "band_kernel", "band_taps_kernel"]
