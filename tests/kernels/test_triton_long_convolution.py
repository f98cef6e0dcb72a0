"""The Triton kernels around the long convolution's transforms against a sum over lags in float64: outputs and every
gradient."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels import long_convolution
from longstride.kernels.long_convolution import triton_long
from longstride.kernels.long_convolution.reference import long_convolution_reference

from .compare import leaf, start_mask
from .native import DEVICE, NATIVE, assert_close, errors, needs_triton, triton_chosen
from .test_convolutions import gated, gated_arguments, large_tensors

pytestmark = needs_triton
# batch, length, channels, taps
SHAPES = [(1, 1, 1, 1), (2, 21, 5, 21), (3, 18, 2, 40), (2, 33, 9, 7), *([(2, 3000, 70, 3000)] if NATIVE else [])]
FORWARD = ["rows_kernel", "tokens_kernel"]
BACKWARD = ["rows_kernel", "rows_kernel", "spectra_kernel", "tokens_gradient_kernel"]


def with_options(names: tuple[str, ...], function: Callable[..., Tensor], u: Tensor, taps: Tensor, *rest: Tensor):
    return function(u, taps, **dict(zip(names, rest, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_convolution(
    shape: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = gated_arguments(*shape)
    with triton_chosen(monkeypatch) as launched:
        assert_close(partial(gated, long_convolution), partial(gated, long_convolution_reference), inputs, dtype)
    assert launched == FORWARD + BACKWARD


@pytest.mark.parametrize("names", [(), ("skip",), ("input_gate",), ("gate",), ("skip", "gate")])
def test_what_is_left_out_is_not_missed(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(zip(("skip", "input_gate", "gate"), gated_arguments(2, 19, 5, 19)[2:], strict=True))
    inputs = [*gated_arguments(2, 19, 5, 19)[:2], *(options[name] for name in names)]
    fast, slow = (
        partial(with_options, names, long_convolution),
        partial(with_options, names, long_convolution_reference),
    )
    with triton_chosen(monkeypatch):
        assert_close(fast, slow, inputs)


@pytest.mark.parametrize("elements", [1, 100])
def test_blocks_of_channels_and_sequences(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence at a time and two of three; the gradients of taps and skip are sums over them."""
    monkeypatch.setattr(triton_long, "_BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(triton_long, "_LEAST_CHANNELS", 2)
    inputs = gated_arguments(3, 12, 5, 12)
    with triton_chosen(monkeypatch) as launched:
        assert_close(partial(gated, long_convolution), partial(gated, long_convolution_reference), inputs)
    assert launched == FORWARD * (len(launched) // 6) + BACKWARD * (len(launched) // 6)
    assert len(launched) // 6 == (9 if elements == 1 else 6)


def test_what_gates_multiply_is_never_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a row or spectrum of all channels: y and the gradients of u, the taps and both gates are all there is."""
    monkeypatch.setattr(triton_long, "_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(triton_long, "_LEAST_CHANNELS", 1)
    inputs = [x.detach().to(DEVICE, torch.float32).requires_grad_() for x in gated_arguments(1, 32, 12, 32)]
    with triton_chosen(monkeypatch):
        assert large_tensors(partial(gated, long_convolution), inputs) == 5


def test_only_the_taps_or_only_the_tokens_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients of gate and taps the tokens' spectra are not made again."""
    u, taps, skip, *_ = gated_arguments(2, 20, 3, 20)
    for fixed, launches in ((taps, [*FORWARD, "rows_kernel", *BACKWARD[2:]]), (u, FORWARD + BACKWARD)):

        def call(function, free: Tensor, skip: Tensor, fixed: Tensor = fixed) -> Tensor:
            still = fixed.detach().to(free.device, free.dtype)
            return function(still, free, skip=skip) if fixed is u else function(free, still, skip=skip)

        inputs = [u if fixed is taps else taps, skip]
        with triton_chosen(monkeypatch) as launched:
            assert_close(partial(call, long_convolution), partial(call, long_convolution_reference), inputs)
        assert launched == launches


def test_a_slice_of_channels_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    def sliced(function, wide: Tensor, taps: Tensor) -> Tensor:
        return function(wide[:, :, 1:4], taps, input_gate=wide[:, :, 4:7], gate=wide[:, :, :3])

    inputs = [leaf(2, 17, 8), leaf(3, 17)]
    with triton_chosen(monkeypatch):
        assert_close(partial(sliced, long_convolution), partial(sliced, long_convolution_reference), inputs)


def test_documents_are_left_to_the_portable_form(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = start_mask(1, 21, (0, 9))
    inputs = gated_arguments(1, 21, 3, 21)
    slow = partial(gated, long_convolution_reference, document_starts=starts)
    with triton_chosen(monkeypatch) as launched:
        assert_close(partial(gated, long_convolution, document_starts=starts.to(DEVICE)), slow, inputs)
        assert not launched
        assert max(errors(partial(gated, long_convolution), slow, inputs, torch.float32)) > 1e-2  # negative control
        assert launched
