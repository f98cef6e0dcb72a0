"""Norms, gated unit, rotary positions, experts and the chunked loss against their references in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels import grouped_matmul, linear_cross_entropy, permute, rms_norm, rotary, swiglu
from longstride.kernels.experts.reference import grouped_matmul_reference, permute_reference
from longstride.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from longstride.kernels.norms.reference import rms_norm_reference
from longstride.kernels.rotary.reference import rotary_reference
from longstride.kernels.swiglu.reference import swiglu_reference

from .compare import assert_same, leaf, outputs_and_gradients, relative_error, worst_error


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 12)])
def test_rms_norm(shape: tuple[int, ...], groups: int) -> None:
    inputs = [leaf(*shape, seed=1), leaf(shape[-1], seed=2), leaf(*shape, seed=3)]
    options = {"eps": 1e-3, "groups": groups}
    assert_same(partial(rms_norm, **options), partial(rms_norm_reference, **options), inputs[:2])

    def gated(function, x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return function(x, weight, gate=gate, **options)

    assert_same(partial(gated, rms_norm), partial(gated, rms_norm_reference), inputs)
    assert torch.autograd.gradcheck(partial(gated, rms_norm), tuple(inputs))
    other = partial(rms_norm_reference, eps=1e-3, groups=2)
    assert worst_error(partial(rms_norm, **options), other, inputs[:2]) > 1e-3  # negative control


def test_rms_norm_in_bfloat16_and_its_errors() -> None:
    x, weight = leaf(4, 64, dtype=torch.bfloat16), leaf(64, seed=2, dtype=torch.bfloat16)
    outputs, gradients = outputs_and_gradients(rms_norm, [x, weight])
    exact = [v.detach().double().requires_grad_() for v in (x, weight)]
    expected, expected_gradients = outputs_and_gradients(rms_norm_reference, exact)
    assert {v.dtype for v in outputs + gradients} == {torch.bfloat16}
    pairs = zip(outputs + gradients, expected + expected_gradients, strict=True)
    assert max(relative_error(value, want) for value, want in pairs) < 5e-3
    with pytest.raises(ValueError, match="width 64 is not a multiple of groups=3"):
        rms_norm(x, weight, groups=3)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(x, weight[:3])


def test_swiglu() -> None:
    inputs = [leaf(2, 5, 3, seed=1), leaf(2, 5, 3, seed=2)]
    assert_same(swiglu, swiglu_reference, inputs)
    assert torch.autograd.gradcheck(swiglu, tuple(inputs))
    assert worst_error(lambda gate, up: swiglu(up, gate), swiglu_reference, inputs) > 1e-3  # negative control
    with pytest.raises(ValueError, match="must agree"):
        swiglu(inputs[0], inputs[1].float())


@pytest.mark.parametrize("style", ["half", "pairs"])
@pytest.mark.parametrize("by_row", [False, True])
def test_rotary(style: str, by_row: bool) -> None:
    x = leaf(2, 7, 3, 6)
    positions = 1_000_000 + torch.arange(7)
    if by_row:
        positions = torch.stack((positions, positions - 999_990))
    options = {"base": 500.0, "style": style}
    fast = lambda x: rotary(x, positions, **options)  # noqa: E731
    assert_same(fast, lambda x: rotary_reference(x, positions, **options), [x])
    assert torch.autograd.gradcheck(fast, (x,))
    assert worst_error(fast, lambda x: rotary_reference(x, positions + 1, **options), [x]) > 1e-3  # negative control


def test_rotary_keeps_its_precision_at_a_million_tokens() -> None:
    """Products of a query and a key depend on their distance alone, in float32 too."""
    q, k = (leaf(1, 4, 2, 16, seed=seed, dtype=torch.float32).detach() for seed in (1, 2))
    near = (rotary(q, torch.arange(4)) * rotary(k, torch.arange(4) + 3)).sum(-1)
    far_at = 3_000_000 + torch.arange(4)
    far = (rotary(q, far_at) * rotary(k, far_at + 3)).sum(-1)
    assert relative_error(far, near) < 1e-5


def test_rotary_names_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="must be even"):
        rotary(torch.zeros(1, 2, 1, 3), torch.arange(2))
    with pytest.raises(ValueError, match="'neox' is unknown"):
        rotary(torch.zeros(1, 2, 1, 4), torch.arange(2), style="neox")
    with pytest.raises(ValueError, match="positions have shape"):
        rotary(torch.zeros(1, 2, 1, 4), torch.arange(3))


@pytest.mark.parametrize("choices", [(0, 1), (1, 1), (17, 2), (64, 3)])
def test_permute(choices: tuple[int, int]) -> None:
    index = torch.randint(0, 5, choices, generator=torch.Generator().manual_seed(1))
    order, counts = permute(index, 7)
    expected_order, expected_counts = permute_reference(index, 7)
    assert torch.equal(order, expected_order) and torch.equal(counts, expected_counts)
    with pytest.raises(ValueError, match=r"expert 7 is outside 0 \.\. 6"):
        permute(torch.tensor([[7]]), 7)


COUNTS = [(3, 0, 5, 1), (0, 0, 0, 0), (0, 9, 0, 0), (1, 1, 1, 1)]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("sizes", [(3, 5), (4, 8)])
def test_grouped_matmul(counts: tuple[int, ...], sizes: tuple[int, int]) -> None:
    counts_E = torch.tensor(counts)
    inputs = [leaf(sum(counts), sizes[0], seed=1), leaf(len(counts), *sizes, seed=2)]
    fast = lambda x, weight: grouped_matmul(x, weight, counts_E)  # noqa: E731
    assert_same(fast, lambda x, weight: grouped_matmul_reference(x, weight, counts_E), inputs)
    if sum(counts) in (4, 9):
        assert torch.autograd.gradcheck(fast, tuple(inputs))
    if sum(counts) == 9 and counts[1] == 0:  # negative control
        shifted = torch.tensor((5, 0, 3, 1))
        assert worst_error(fast, lambda x, w: grouped_matmul_reference(x, w, shifted), inputs) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 5), (16, 8)])
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_matmul_in_lower_precision(dtype: torch.dtype, sizes: tuple[int, int], counts: tuple[int, ...]) -> None:
    """Aligned sizes take PyTorch's grouped product, odd ones the loop; empty experts get a zero gradient."""
    counts_E = torch.tensor(counts)
    inputs = [leaf(sum(counts), sizes[0], seed=1, dtype=dtype), leaf(len(counts), *sizes, seed=2, dtype=dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outputs, gradients = outputs_and_gradients(lambda *x: grouped_matmul(*x, counts_E), inputs)
    expected, expected_gradients = outputs_and_gradients(lambda *x: grouped_matmul_reference(*x, counts_E), exact)
    pairs = zip(outputs + gradients, expected + expected_gradients, strict=True)
    assert max(relative_error(value, want) for value, want in pairs) < (1e-5 if dtype == torch.float32 else 1e-2)
    empty = torch.tensor(counts) == 0
    assert (gradients[1][empty] == 0).all()


@pytest.mark.parametrize("sizes", [(3, 5), (4, 8)])
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_rows_or_matrices(frozen: int, sizes: tuple[int, int]) -> None:
    """What asks for no gradient gets none, whatever it is; the other's does not change."""
    inputs, counts_E = [leaf(5, sizes[0], seed=1).float(), leaf(2, *sizes, seed=2).float()], torch.tensor([2, 3])
    inputs = [x.detach().requires_grad_(place != frozen) for place, x in enumerate(inputs)]
    grouped_matmul(*inputs, counts_E).sum().backward()
    expected = [x.detach().requires_grad_() for x in inputs]
    grouped_matmul_reference(*expected, counts_E).sum().backward()
    assert inputs[frozen].grad is None
    torch.testing.assert_close(inputs[1 - frozen].grad, expected[1 - frozen].grad)


def test_grouped_matmul_names_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="counts add up to 3, but there are 4 rows"):
        grouped_matmul(torch.zeros(4, 2), torch.zeros(2, 2, 2), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="do not fit matrices"):
        grouped_matmul(torch.zeros(4, 3), torch.zeros(2, 2, 2), torch.tensor([2, 2]))


def loss_arguments(tokens: int, width: int, vocabulary: int) -> tuple[list[Tensor], Tensor]:
    targets = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(1))
    targets[::3] = -100
    return [leaf(tokens, width, seed=1), leaf(vocabulary, width, seed=2), leaf(vocabulary, seed=3)], targets


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("chunk_size", [1, 4, 16, 1000])
def test_linear_cross_entropy(tokens: int, chunk_size: int) -> None:
    inputs, targets = loss_arguments(tokens, 3, 11)

    def fast(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # Scaled, so that the gradient handed to the backward is not one.
        return linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_size=chunk_size) * 0.37

    def slow(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy_reference(hidden, weight, targets, bias=bias) * 0.37

    assert_same(fast, slow, inputs)
    assert_same(lambda h, w: linear_cross_entropy(h, w, targets, chunk_size=chunk_size), lambda h, w: linear_cross_entropy_reference(h, w, targets), inputs[:2])  # fmt: skip # noqa: E501
    counted = torch.where(targets == -100, 0, targets)
    if tokens > 1:  # negative control: ignored tokens must not count
        assert (
            worst_error(fast, lambda h, w, b: linear_cross_entropy_reference(h, w, counted, bias=b) * 0.37, inputs)
            > 1e-3
        )


def test_linear_cross_entropy_gradcheck_and_frozen_weights() -> None:
    inputs, targets = loss_arguments(7, 3, 5)
    function = lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, chunk_size=3)  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(inputs))
    hidden, weight = inputs[0], inputs[1].detach()
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden)
    (expected,) = torch.autograd.grad(linear_cross_entropy_reference(hidden, weight, targets), hidden)
    torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        torch.testing.assert_close(
            function(*inputs), linear_cross_entropy_reference(*inputs[:2], targets, bias=inputs[2])
        )


def test_linear_cross_entropy_in_bfloat16() -> None:
    inputs, targets = loss_arguments(400, 16, 40)
    half = [x.detach().to(torch.bfloat16).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in half]
    outputs, gradients = outputs_and_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, chunk_size=1), half
    )
    expected, wanted = outputs_and_gradients(
        lambda h, w, b: linear_cross_entropy_reference(h, w, targets, bias=b), exact
    )
    assert outputs[0].dtype == torch.float32
    # a weight's gradient that were summed over the chunks in half precision would be 9e-3 off
    most = (1e-4, 1.2e-2, 5e-3, 6e-3)
    for value, want, bound in zip(outputs + gradients, expected + wanted, most, strict=True):
        assert relative_error(value, want) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_cross_entropy_scales_in_single_precision(dtype: torch.dtype) -> None:
    """A mean's 1 / N rounded to a half type would change all hidden gradients alike."""
    (hidden, weight, _), targets = loss_arguments(9000, 8, 20)  # more rows than are scaled at once
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    (unscaled,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden)
    for divisor in (3.0, 7.0, 5999.0, 4096.0):
        factor = torch.ones(()) / divisor
        (found,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets) / divisor, hidden)
        exact = unscaled.double() * factor
        assert torch.equal(found, exact.to(dtype))
        if divisor != 4096:  # negative control
            bent = (unscaled * factor.to(dtype)).double()
            assert (bent - exact).norm() > 1.2 * (found - exact).norm()


def test_linear_cross_entropy_names_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"hidden states are \(2, 3, 4\).* give \(tokens, width\)"):
        linear_cross_entropy(torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="target 9 is outside the vocabulary of 5"):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([1, 9]))
    with pytest.raises(ValueError, match="widths and dtypes must agree"):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 4), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="chunk_size is 0"):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([1, 1]), chunk_size=0)
