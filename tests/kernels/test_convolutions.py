"""Short and long causal convolutions against sums over taps: outputs and every gradient in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longstride.kernels import long_convolution, short_convolution
from longstride.kernels.long_convolution import portable as long_portable
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
    with pytest.raises(ValueError, match=r"document_starts must be a boolean mask \(2 or 1, 5\), not list"):
        short_convolution(torch.zeros(2, 5, 3), torch.zeros(3, 4), document_starts=[3])
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


def gated(function, u: Tensor, taps: Tensor, skip: Tensor, input_gate: Tensor, gate: Tensor, **options) -> Tensor:
    return function(u, taps, skip=skip, input_gate=input_gate, gate=gate, **options)


def gated_arguments(batch: int, length: int, channels: int, taps: int) -> list[Tensor]:
    gates = [leaf(batch, length, channels, seed=seed) for seed in (4, 5)]
    return [*long_arguments(batch, length, channels, taps), *gates]


GATED = [((2, 101, 3, 101), ()), ((2, 90, 2, 40), ((0, 3), (0, 70), (1, 1))), ((1, 64, 2, 3), ((0, 9),))]


@pytest.mark.parametrize("block_elements", [1, 1 << 19])
@pytest.mark.parametrize(("shape", "starts"), GATED)
def test_gates_before_and_behind(
    monkeypatch, block_elements: int, shape: tuple[int, int, int, int], starts: tuple[tuple[int, int], ...]
) -> None:
    """Whole and in documents, by transforms and by Toeplitz products, together and each by itself."""
    monkeypatch.setattr(long_portable, "_BLOCK_ELEMENTS", block_elements)
    options = {"document_starts": start_mask(shape[0], shape[1], *starts) if starts else None}
    inputs = gated_arguments(*shape)
    assert_same(
        partial(gated, long_convolution, **options), partial(gated, long_convolution_reference, **options), inputs
    )
    for name in ("input_gate", "gate"):

        def one(function, u: Tensor, taps: Tensor, factor: Tensor, name: str) -> Tensor:
            return function(u, taps, **{name: factor}, **options)

        slow = partial(one, long_convolution_reference, name=name)
        other = "gate" if name == "input_gate" else "input_gate"
        assert_same(partial(one, long_convolution, name=name), slow, [*inputs[:2], inputs[3]])
        assert worst_error(partial(one, long_convolution, name=other), slow, [*inputs[:2], inputs[3]]) > 0.1


class Allocations(TorchDispatchMode):
    """The memory of tensors with at least `elements`, by where it begins; kept, so that no other begins there later."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.seen = elements, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() >= self.elements * tensor.element_size():
                    self.seen[storage.data_ptr()] = storage
        return result


def large_tensors(function, inputs: list[Tensor]) -> int:
    """How many tensors as large as the first input a forward and backward pass makes."""
    grad_y = torch.ones_like(inputs[0])
    with Allocations(inputs[0].numel()) as allocations:
        y = function(*inputs)
        grads = torch.autograd.grad(y, inputs, grad_y)
    assert len(grads) == len(inputs)
    return len(allocations.seen.keys() - {x.untyped_storage().data_ptr() for x in (*inputs, grad_y)})


def test_what_gates_multiply_is_never_stored(monkeypatch) -> None:
    monkeypatch.setattr(long_portable, "_BLOCK_ELEMENTS", 1)
    inputs = gated_arguments(1, 400, 16, 400)
    # y and the gradients of u, the filter and both gates
    assert large_tensors(partial(gated, long_convolution), inputs) == 5

    def outside(u: Tensor, taps: Tensor, skip: Tensor, first: Tensor, last: Tensor) -> Tensor:
        return last * long_convolution(first * u, taps, skip=skip)

    assert large_tensors(outside, inputs) == 9  # negative control: both products, and their gradients


@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_four_million_tokens(backward: bool) -> None:
    """A filter of three taps at lags up to three million, against shifted copies; the same lags of the gradient."""
    length, lags, values = 1 << 22, (0, 5, 3_000_001), torch.tensor([[0.5, -1.5, 2.0], [1.0, 3.0, -2.5]])
    generator = torch.Generator().manual_seed(3)
    u, first, last, grad_y = (torch.randn(1, length, 2, generator=generator) for _ in range(4))
    taps = torch.zeros(2, length)
    taps[:, list(lags)] = values
    shifted = [F.pad(u * first, (0, 0, lag, 0))[:, :length] for lag in lags]
    expected = torch.stack([x * tap for x, tap in zip(shifted, values.t(), strict=True)]).sum(0)
    inputs = [x.requires_grad_(backward) for x in (taps, last)]
    y = long_convolution(u, taps, input_gate=first, gate=last)
    assert relative_error(y, expected * last) < 1e-5
    assert relative_error(y, expected * first) > 0.1  # negative control
    if backward:
        grad_taps, grad_last = torch.autograd.grad(y, inputs, grad_y)
        assert relative_error(grad_last, expected * grad_y) < 1e-5
        moments = torch.stack([(grad_y * last * x).double().sum((0, 1)) for x in shifted], 1)
        assert relative_error(grad_taps[:, list(lags)], moments.detach()) < 1e-4


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


def test_long_convolution_names_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="filter has shape"):
        long_convolution(torch.zeros(1, 4, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"input_gate has shape \(1, 3, 2\), expected \(1, 4, 2\)"):
        long_convolution(torch.zeros(1, 4, 2), torch.zeros(2, 4), input_gate=torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match="skip has shape"):
        long_convolution(torch.zeros(1, 4, 2), torch.zeros(2, 4), skip=torch.zeros(3))
