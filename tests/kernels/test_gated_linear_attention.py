"""Gated linear attention and its read-out against the step loop: outputs and every gradient in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_readout
from longstride.kernels.gated_linear_attention.reference import (
    gated_linear_attention_readout_reference,
    gated_linear_attention_reference,
)

from .compare import assert_same, leaf, relative_error, start_mask, worst_error


def arguments(batch: int, length: int, heads: int, keys: int, values: int, decay: float = 0.3) -> list[Tensor]:
    log_decay = -leaf(batch, length, heads, keys, seed=2).detach().abs() * decay
    return [
        leaf(batch, length, heads, keys, seed=1),
        leaf(batch, length, heads, keys, seed=3),
        leaf(batch, length, heads, values, seed=4),
        log_decay.requires_grad_(),
        leaf(batch, heads, keys, values, seed=5),
    ]


def full(function, *inputs: Tensor, **options):
    return function(*inputs[:4], initial_state=inputs[4], **options)


SHAPES = [(1, 1, 1, 1, 1), (2, 7, 3, 4, 2), (1, 64, 2, 3, 5), (2, 65, 2, 2, 3), (1, 700, 3, 4, 2), (1, 1500, 40, 4, 1)]


@pytest.mark.parametrize("decay", [0.1, 5.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_step_loop(shape: tuple[int, ...], decay: float) -> None:
    inputs = arguments(*shape, decay=decay)
    assert_same(partial(full, gated_linear_attention), partial(full, gated_linear_attention_reference), inputs)


def test_decays_that_no_product_of_factors_could_hold() -> None:
    """One token may erase everything; the float32 result stays finite and right."""
    singles = [x.detach().float() for x in arguments(1, 200, 2, 8, 4, decay=100.0)]
    singles[3][:, ::7] = -1e-3
    exact, exact_state = full(gated_linear_attention_reference, *[x.double() for x in singles])
    y, state = full(gated_linear_attention, *singles)
    assert y.dtype == state.dtype == torch.float32
    assert relative_error(y, exact) < 1e-6
    assert relative_error(state, exact_state) < 1e-6


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("positions", [(0,), (1, 2, 3), (7, 8), (63, 64), (128, 129, 130, 150), (199,), (0, 64, 191)])
def test_documents_forget_the_state_before_them(rows: int, positions: tuple[int, ...]) -> None:
    inputs = arguments(2, 200, 2, 3, 2)
    starts = start_mask(rows, 200, *[(index % rows, position) for index, position in enumerate(positions)])
    fast = partial(full, gated_linear_attention, document_starts=starts)
    slow = partial(full, gated_linear_attention_reference, document_starts=starts)
    assert_same(fast, slow, inputs)
    # Negative control: without the mask the result differs far beyond the tolerance.
    assert worst_error(partial(full, gated_linear_attention), slow, inputs) > 1e-6


@pytest.mark.parametrize("cut", [1, 50, 64])
def test_state_and_readout_join_two_pieces(cut: int) -> None:
    def joined(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *sequences, state = inputs
        left, state = gated_linear_attention(*[x[:, :cut] for x in sequences], initial_state=state)
        rest = [x[:, cut:] for x in sequences]
        right, _ = gated_linear_attention(*rest)
        _, final = gated_linear_attention(*rest, initial_state=state)
        added = gated_linear_attention_readout(state, rest[0], rest[3])
        return torch.cat((left, right + added), 1), final

    assert_same(joined, partial(full, gated_linear_attention_reference), arguments(2, 150, 3, 4, 2))


@pytest.mark.parametrize("length", [1, 64, 500])
@pytest.mark.parametrize("starts", [None, (), ((0, 0), (1, 250)), ((0, 40), (1, 41))])
def test_readout(length: int, starts) -> None:
    """Decays of very different speed, some of which are gone long before the end."""
    q, _, _, log_decay, state = arguments(2, length, 5, 2, 3)
    speeds = torch.tensor([1e-3, 3.0, 0.1, 30.0, 1000.0], dtype=torch.float64).unsqueeze(1)
    log_decay = (log_decay.detach() * speeds - 0.01 * speeds).requires_grad_()
    mask = None
    if starts is not None:
        mask = start_mask(2, length, *[(row, position) for row, position in starts if position < length])
    fast = partial(gated_linear_attention_readout, document_starts=mask)
    assert_same(fast, partial(gated_linear_attention_readout_reference, document_starts=mask), [state, q, log_decay])


@pytest.mark.parametrize("decay", [1.0, 1000.0])
def test_a_state_nobody_sees_still_has_a_gradient(decay: float) -> None:
    """Zero, not none: in a split sequence it has to be sent. Hidden by a document, or erased by the first token."""
    other, _, _, log_decay, state = arguments(2, 9, 4, 2, 3)
    starts = start_mask(1, 9, (0, 0)) if decay == 1 else None
    log_decay = (log_decay.detach() * 0 - decay).requires_grad_()
    inputs = (state, other, log_decay)
    y = gated_linear_attention_readout(*inputs, document_starts=starts)
    for gradient in torch.autograd.grad(y.sum(), inputs):
        assert (gradient == 0).all()


def test_gradcheck() -> None:
    inputs = arguments(1, 6, 1, 2, 2)
    fast = partial(full, gated_linear_attention, document_starts=start_mask(1, 6, (0, 3)))
    assert torch.autograd.gradcheck(fast, tuple(inputs))


def test_causal() -> None:
    inputs = arguments(1, 140, 2, 2, 3)
    y, _ = gated_linear_attention(*inputs[:4])
    for gradient in torch.autograd.grad(y[:, 70].sum(), inputs[:4]):
        assert (gradient[:, 71:] == 0).all()
        assert gradient[:, 70].any()


def test_bfloat16_in_and_out() -> None:
    inputs = [x.detach() for x in arguments(2, 100, 2, 3, 4)[:4]]
    halves = [*(x.bfloat16() for x in inputs[:3]), inputs[3].float()]
    y, state = gated_linear_attention(*halves)
    expected, _ = gated_linear_attention(*[x.double() for x in halves])
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative_error(y, expected) < 1e-2


def test_empty_sequence_passes_the_state_on() -> None:
    inputs = arguments(2, 0, 2, 3, 4)
    y, state = full(gated_linear_attention, *inputs)
    assert y.shape == (2, 0, 2, 4)
    torch.testing.assert_close(state, inputs[4])
    assert gated_linear_attention_readout(inputs[4], inputs[0], inputs[3]).shape == (2, 0, 2, 4)


def test_wrong_shapes_are_named() -> None:
    q, k, v, log_decay = (x.detach() for x in arguments(2, 5, 2, 3, 4)[:4])
    with pytest.raises(ValueError, match=r"k_BTHK has shape \(2, 4, 2, 3\), expected \(2, 5, 2, 3\)"):
        gated_linear_attention(q, k[:, 1:], v, log_decay)
