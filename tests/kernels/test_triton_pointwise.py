"""Triton kernels of the short convolution, normalisation, rotary positions, SwiGLU and the loss, each against its
reference in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels import linear_cross_entropy, rms_norm, rotary, short_convolution, swiglu
from longstride.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from longstride.kernels.norms.reference import rms_norm_reference
from longstride.kernels.rotary.reference import rotary_reference
from longstride.kernels.short_convolution.reference import short_convolution_reference
from longstride.kernels.swiglu.reference import swiglu_reference

from .compare import leaf, start_mask
from .native import DEVICE, NATIVE, assert_close, errors, needs_triton, triton_chosen
from .test_pointwise_and_loss import loss_arguments

pytestmark = needs_triton
DTYPES = [torch.float32, torch.bfloat16]
CONVOLUTIONS = [(1, 1, 1), (21, 18, 4), (2, 3, 7), (16, 5, 2), (11, 2, 12)]  # length, channels, width
LOSSES = [(1, 1, 1, 1), (2, 3, 11, 1), (9, 5, 37, 4), (7, 4, 16, 1000)]  # tokens, width, vocabulary, chunk
NORMS, UNITS = [((1, 3), 1), ((2, 5, 12), 1), ((7, 12), 4), ((3, 33), 3)], [(1, 1), (3, 21), (2, 2, 16)]
if NATIVE:
    CONVOLUTIONS += [(3000, 300, 4), (700, 130, 15)]
    LOSSES += [(300, 64, 5000, 128)]
    NORMS, UNITS = [*NORMS, ((1000, 4096), 8), ((300, 5000), 1)], [*UNITS, (1000, 4096)]


def convolve(function, x: Tensor, weight: Tensor, bias: Tensor, halo: Tensor, **options) -> Tensor:
    return function(x, weight, bias, halo=halo, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("length", "channels", "width"), CONVOLUTIONS)
def test_short_convolution(
    length: int,
    channels: int,
    width: int,
    activation: str | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = [
        leaf(2, length, channels, seed=1),
        leaf(channels, width, seed=2),
        leaf(channels, seed=3),
        leaf(2, width - 1, channels, seed=4),
    ]
    fast = partial(convolve, short_convolution, activation=activation)
    with triton_chosen(monkeypatch) as launched:
        assert_close(fast, partial(convolve, short_convolution_reference, activation=activation), inputs, dtype)
    assert launched == ["convolve_kernel", "gradient_kernel"]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("rows", [1, 2])
def test_short_convolution_keeps_documents_apart(
    rows: int, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = start_mask(rows, 21, (0, 1), (0, 7), (rows - 1, 8), (rows - 1, 20))
    inputs = [leaf(2, 21, 3, seed=1), leaf(3, 4, seed=2), leaf(3, seed=3), leaf(2, 3, 3, seed=4)]
    slow = partial(convolve, short_convolution_reference, activation=activation, document_starts=starts)
    fast = partial(convolve, short_convolution, activation=activation)
    with triton_chosen(monkeypatch):
        assert_close(partial(fast, document_starts=starts.to(DEVICE)), slow, inputs)
        assert max(errors(fast, slow, inputs, torch.float32)) > 1e-3  # negative control


def test_short_convolution_of_a_slice_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    def sliced(function, wide: Tensor, weight: Tensor) -> Tensor:
        return function(wide[:, :, 2:7], weight, activation="silu")

    inputs = [leaf(2, 10, 9), leaf(5, 3)]
    with triton_chosen(monkeypatch):
        assert_close(partial(sliced, short_convolution), partial(sliced, short_convolution_reference), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("shape", "groups"), NORMS)
def test_rms_norm(
    shape: tuple[int, ...], groups: int, gated: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def norm(function, x: Tensor, weight: Tensor, *gate: Tensor) -> Tensor:
        return function(x, weight, 1e-5, gate=gate[0] if gate else None, groups=groups)

    inputs = [leaf(*shape, seed=1), leaf(shape[-1], seed=2), *([leaf(*shape, seed=3)] if gated else [])]
    with triton_chosen(monkeypatch) as launched:
        assert_close(partial(norm, rms_norm), partial(norm, rms_norm_reference), inputs, dtype)
    assert launched == ["norm_kernel", "norm_gradient_kernel"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", ["half", "pairs"])
@pytest.mark.parametrize("batched", [False, True])
def test_rotary(style: str, batched: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = torch.arange(5) + 1_000_003
    if batched:
        positions = torch.stack((positions, torch.arange(5) * 7))

    def turn(function, device: torch.device, x: Tensor) -> Tensor:
        return function(x.transpose(1, 2), positions.to(device), style=style)

    fast, slow = partial(turn, rotary, DEVICE), partial(turn, rotary_reference, torch.device("cpu"))
    with triton_chosen(monkeypatch) as launched:
        assert_close(fast, slow, [leaf(2, 3, 5, 6)], dtype)
    assert launched == ["rotate_kernel", "rotate_kernel"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", UNITS)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def halves(function, both: Tensor) -> Tensor:
        return function(*both.chunk(2, -1))

    inputs = [leaf(*shape[:-1], 2 * shape[-1], scale=4.0)]
    with triton_chosen(monkeypatch) as launched:
        assert_close(partial(halves, swiglu), partial(halves, swiglu_reference), inputs, dtype)
    assert launched == ["swiglu_kernel", "swiglu_gradient_kernel"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "width", "vocabulary", "chunk"), LOSSES)
def test_linear_cross_entropy(
    tokens: int,
    width: int,
    vocabulary: int,
    chunk: int,
    biased: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Targets that lie apart in memory; some count nothing, and theirs would be wrong if they did."""
    inputs, targets = loss_arguments(tokens, width, vocabulary)
    apart = targets.to(DEVICE).repeat_interleave(2)[::2]

    def loss(function, hidden: Tensor, weight: Tensor, *bias: Tensor, targets: Tensor, **options) -> Tensor:
        return 0.37 * function(hidden, weight, targets, bias=bias[0] if bias else None, **options)

    fast = partial(loss, linear_cross_entropy, targets=apart, chunk_size=chunk)
    slow = partial(loss, linear_cross_entropy_reference, targets=targets)
    with triton_chosen(monkeypatch) as launched:
        assert_close(fast, slow, inputs[: 2 + biased], dtype)
        assert launched == ["entropy_kernel"] * -(-tokens // chunk)
        if tokens > 1:  # negative control
            counted = partial(slow, targets=torch.where(targets == -100, 0, targets))
            assert max(errors(fast, counted, inputs[: 2 + biased], dtype)) > 0.1


def test_linear_cross_entropy_of_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients logits stay as they are; a target outside the vocabulary, looked for on the CPU alone, is seen
    in the loss; logits of any size do not overflow."""
    from longstride.kernels.linear_cross_entropy.triton_entropy import TritonLinearCrossEntropy

    hidden, weight = torch.eye(3, device=DEVICE) * 1000, torch.eye(3, device=DEVICE)
    with triton_chosen(monkeypatch) as launched:
        targets = torch.tensor([0, 2, -100], device=DEVICE)
        assert linear_cross_entropy(hidden, weight, targets).item() == 1000.0
        outside = torch.tensor([0, 3, 1], device=DEVICE)
        assert TritonLinearCrossEntropy.apply(hidden, weight, outside, None, 2, -100).isnan()
    assert launched == ["entropy_kernel"] * 3
