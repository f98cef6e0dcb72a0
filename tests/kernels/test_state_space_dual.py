"""State-space duality and its read-out against the step loop: outputs and every gradient in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels.living import groups_of_heads, reach_of_heads
from longstride.kernels.state_space_dual import state_space_dual, state_space_dual_readout
from longstride.kernels.state_space_dual.reference import (
    state_space_dual_readout_reference,
    state_space_dual_reference,
)

from .compare import assert_same, leaf, relative_error, start_mask, worst_error


def arguments(
    batch: int, length: int, heads: int, width: int, groups: int, states: int, decay: float = 0.3
) -> list[Tensor]:
    log_decay = -leaf(batch, length, heads, seed=2).detach().abs() * decay
    return [
        leaf(batch, length, heads, width, seed=1),
        log_decay.requires_grad_(),
        leaf(batch, length, groups, states, seed=3),
        leaf(batch, length, groups, states, seed=4),
        leaf(batch, heads, width, states, seed=5),
    ]


def full(function, *inputs: Tensor, **options):
    return function(*inputs[:4], initial_state=inputs[4], **options)


SHAPES = [(1, 1, 1, 1, 1, 1), (2, 7, 4, 3, 2, 5), (1, 128, 2, 3, 1, 2), (2, 129, 2, 2, 2, 3), (1, 700, 6, 2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk_size", [1, 16, 128])
def test_equals_the_step_loop(shape: tuple[int, ...], chunk_size: int) -> None:
    fast = partial(full, state_space_dual, chunk_size=chunk_size)
    assert_same(fast, partial(full, state_space_dual_reference), arguments(*shape))


def test_many_segments() -> None:
    """Heads enough that a segment is a few chunks; several segments pass their states on."""
    assert_same(
        partial(full, state_space_dual, chunk_size=16),
        partial(full, state_space_dual_reference),
        arguments(1, 3000, 40, 1, 1, 2),
    )


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("positions", [(0,), (1, 2, 3), (31, 32), (64, 65, 66, 90), (299,), (0, 32, 96, 255, 256)])
def test_documents_forget_the_state_before_them(rows: int, positions: tuple[int, ...]) -> None:
    inputs = arguments(2, 300, 4, 3, 2, 2)
    starts = start_mask(rows, 300, *[(index % rows, position) for index, position in enumerate(positions)])
    fast = partial(full, state_space_dual, document_starts=starts, chunk_size=32)
    slow = partial(full, state_space_dual_reference, document_starts=starts)
    assert_same(fast, slow, inputs)
    # Negative control: without the mask the result differs far beyond the tolerance.
    assert worst_error(partial(full, state_space_dual), slow, inputs) > 1e-6


@pytest.mark.parametrize("cut", [1, 50, 128])
def test_state_and_readout_join_two_pieces(cut: int) -> None:
    def joined(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        left, state = state_space_dual(x[:, :cut], log_decay[:, :cut], B[:, :cut], C[:, :cut], initial_state=state)
        rest = x[:, cut:], log_decay[:, cut:], B[:, cut:], C[:, cut:]
        right, _ = state_space_dual(*rest)
        _, final = state_space_dual(*rest, initial_state=state)
        added = state_space_dual_readout(state, log_decay[:, cut:], C[:, cut:])
        return torch.cat((left, right + added), 1), final

    assert_same(joined, partial(full, state_space_dual_reference), arguments(2, 150, 4, 3, 2, 4))


@pytest.mark.parametrize("length", [1, 64, 500])
@pytest.mark.parametrize("starts", [None, (), ((0, 0), (1, 250)), ((0, 40), (1, 41))])
def test_readout(length: int, starts) -> None:
    """Decays of very different speed, some of which are gone long before the end."""
    _, log_decay, _, C, state = arguments(2, length, 6, 2, 2, 3)
    speeds = torch.tensor([1e-3, 3.0, 0.1, 1.0, 30.0, 1000.0], dtype=torch.float64)
    log_decay = (log_decay.detach() * speeds - 0.01 * speeds).requires_grad_()
    mask = None
    if starts is not None:
        mask = start_mask(2, length, *[(row, position) for row, position in starts if position < length])
    fast = partial(state_space_dual_readout, document_starts=mask)
    slow = partial(state_space_dual_readout_reference, document_starts=mask)
    assert_same(fast, slow, [state, log_decay, C])

    def onto(state: Tensor, log_decay: Tensor, C: Tensor, y: Tensor) -> Tensor:
        return state_space_dual_readout(state, log_decay, C, onto=2 * y, document_starts=mask)

    y = leaf(2, length, 6, 2, seed=7)
    assert_same(onto, lambda state, log_decay, C, y: 2 * y + slow(state, log_decay, C), [state, log_decay, C, y])


def test_readout_does_a_small_part_of_the_work() -> None:
    """Decays of a fresh Mamba-2 layer: step sizes log-uniform in 1e-3 ... 1e-1, rates 1 ... 16."""
    length, heads = 16384, 64
    steps, rates = torch.logspace(-3, -1, heads), 1 + 15 * (torch.arange(heads) * 37 % heads) / heads
    log_decay = (-steps * rates).expand(1, length, heads)
    reach = reach_of_heads(log_decay, torch.float32, None)
    computed = sum(len(group) * tokens for group, tokens in groups_of_heads(reach))
    assert computed < 0.4 * length * heads
    assert computed >= reach.sum()


def test_single_precision_beside_the_oracle() -> None:
    """Strong decays: differences of long sums would lose digits."""
    singles = [x.detach().float() for x in arguments(1, 600, 4, 8, 2, 16, decay=5.0)]
    exact, exact_state = full(state_space_dual_reference, *[x.double() for x in singles])
    y, state = full(state_space_dual, *singles)
    assert y.dtype == state.dtype == torch.float32
    assert relative_error(y, exact) < 1e-6
    assert relative_error(state, exact_state) < 1e-6


def test_retention_is_a_constant_decay() -> None:
    """One gamma per head, against the parallel form of retention."""
    x, _, B, C, _ = arguments(1, 90, 3, 2, 3, 4)
    log_gamma = torch.log(1 - 2.0 ** (-5 - torch.arange(3, dtype=torch.float64)))
    y, _ = state_space_dual(x, log_gamma.expand(1, 90, 3), B, C)
    lags = torch.arange(90)[:, None] - torch.arange(90)
    weight = torch.where(lags >= 0, torch.exp(log_gamma[:, None, None] * lags), 0.0)
    expected = torch.einsum("bthn,bshn,hts,bshp->bthp", C, B, weight, x)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("decay", [1.0, 1000.0])
def test_a_state_nobody_sees_still_has_a_gradient(decay: float) -> None:
    """Zero, not none: in a split sequence it has to be sent. Hidden by a document, or erased by the first token."""
    _, log_decay, _, other, state = arguments(2, 9, 4, 2, 2, 3)
    starts = start_mask(1, 9, (0, 0)) if decay == 1 else None
    log_decay = (log_decay.detach() * 0 - decay).requires_grad_()
    inputs = (state, log_decay, other)
    y = state_space_dual_readout(*inputs, document_starts=starts)
    for gradient in torch.autograd.grad(y.sum(), inputs):
        assert (gradient == 0).all()
    before = torch.ones_like(y).requires_grad_()
    y = state_space_dual_readout(*inputs, onto=1 * before, document_starts=starts)
    assert torch.equal(y, before)
    *gradients, passed_on = torch.autograd.grad(y.sum(), (*inputs, before))
    assert all((gradient == 0).all() for gradient in gradients) and (passed_on == 1).all()


def test_gradcheck() -> None:
    inputs = arguments(1, 6, 2, 2, 1, 2)
    fast = partial(full, state_space_dual, chunk_size=4, document_starts=start_mask(1, 6, (0, 3)))
    assert torch.autograd.gradcheck(fast, tuple(inputs))


def test_causal() -> None:
    inputs = arguments(1, 140, 2, 2, 1, 2)
    y, _ = state_space_dual(*inputs[:4], chunk_size=32)
    for gradient in torch.autograd.grad(y[:, 70].sum(), inputs[:4]):
        assert (gradient[:, 71:] == 0).all()
        assert gradient[:, 70].any()


def test_bfloat16_in_and_out() -> None:
    inputs = [x.detach() for x in arguments(1, 100, 2, 3, 1, 2)[:4]]
    halves = [inputs[0].bfloat16(), inputs[1].float(), inputs[2].bfloat16(), inputs[3].bfloat16()]
    y, state = state_space_dual(*halves)
    expected, _ = state_space_dual(*[x.double() for x in halves])
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative_error(y, expected) < 1e-2


def test_empty_sequence_passes_the_state_on() -> None:
    inputs = arguments(2, 0, 4, 3, 2, 2)
    y, state = full(state_space_dual, *inputs)
    assert y.shape == (2, 0, 4, 3)
    torch.testing.assert_close(state, inputs[4])
    assert state_space_dual_readout(inputs[4], inputs[1], inputs[3]).shape == (2, 0, 4, 3)


def test_wrong_arguments_are_named() -> None:
    x, log_decay, B, C = (x.detach() for x in arguments(2, 5, 4, 3, 2, 4)[:4])
    with pytest.raises(ValueError, match=r"C_BTGN has shape \(2, 5, 2, 3\), expected \(2, 5, 2, 4\)"):
        state_space_dual(x, log_decay, B, C[..., :3])
    with pytest.raises(ValueError, match="4 heads cannot share 3 groups"):
        state_space_dual(x, log_decay, torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 3, 4))
