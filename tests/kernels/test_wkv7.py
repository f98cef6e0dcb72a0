"""RWKV-7's recurrence and its transition against the step loop: outputs and every gradient in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels.wkv7 import wkv7, wkv7_transition
from longstride.kernels.wkv7.portable import CHUNK, is_moderate
from longstride.kernels.wkv7.reference import wkv7_reference, wkv7_transition_reference

from .compare import assert_same, leaf, relative_error, start_mask, worst_error


def arguments(batch: int, length: int, heads: int, width: int, decay: float = 0.606) -> list[Tensor]:
    """As RWKV-7 makes them: a normalised direction, and a learning rate between 0 and 1."""
    shape = batch, length, heads, width
    direction = torch.nn.functional.normalize(leaf(*shape, seed=5).detach(), dim=-1)
    rate = torch.sigmoid(leaf(*shape, seed=6).detach())
    log_w = -decay * torch.sigmoid(leaf(*shape, seed=2).detach())
    return [
        leaf(*shape, seed=1),
        log_w.requires_grad_(),
        leaf(*shape, seed=3),
        leaf(*shape, seed=4),
        (-direction).requires_grad_(),
        (direction * rate).requires_grad_(),
        leaf(batch, heads, width, width, seed=7),
    ]


def full(function, *inputs: Tensor, **options):
    return function(*inputs[:6], initial_state=inputs[6], **options)


SHAPES = [(1, 1, 1, 1), (2, 7, 3, 4), (1, 32, 2, 5), (2, 33, 2, 3), (1, 700, 2, 4), (1, 600, 20, 8)]


@pytest.mark.parametrize(
    ("shape", "decay"), [*((shape, 0.606) for shape in SHAPES), *((shape, 40.0) for shape in SHAPES[1:])]
)
def test_equals_the_step_loop(shape: tuple[int, int, int, int], decay: float) -> None:
    """Also with decays that no product of factors could hold."""
    inputs = arguments(*shape, decay=decay)
    assert shape[1] < 32 or is_moderate(inputs[1], CHUNK) == (decay < 1)
    assert_same(partial(full, wkv7), partial(full, wkv7_reference), inputs)


@pytest.mark.parametrize("decay", [0.606, 40.0])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("positions", [(0,), (1, 2, 3), (31, 32), (64, 65, 66, 90), (149,), (0, 32, 96, 127, 128)])
def test_documents_forget_the_state_before_them(rows: int, positions: tuple[int, ...], decay: float) -> None:
    inputs = arguments(2, 150, 2, 3, decay)
    starts = start_mask(rows, 150, *[(index % rows, position) for index, position in enumerate(positions)])
    fast, slow = partial(full, wkv7, document_starts=starts), partial(full, wkv7_reference, document_starts=starts)
    assert_same(fast, slow, inputs)
    # Negative control: without the mask the result differs far beyond the tolerance.
    assert worst_error(partial(full, wkv7), slow, inputs) > 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_transition(shape: tuple[int, int, int, int]) -> None:
    _, log_w, _, _, a, b, _ = arguments(*shape)
    assert_same(wkv7_transition, wkv7_transition_reference, [log_w, a, b])


def test_transition_of_strong_decays() -> None:
    _, log_w, _, _, a, b, _ = arguments(2, 70, 2, 3, decay=40.0)
    assert_same(wkv7_transition, wkv7_transition_reference, [log_w, a, b])


@pytest.mark.parametrize("cut", [1, 32, 99])
def test_the_transition_carries_a_state_over_a_piece(cut: int) -> None:
    """State after two pieces = transition of the second, from the left on the transposed first, + its own."""

    def joined(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *sequences, state = inputs
        left = [x[:, :cut] for x in sequences]
        right = [x[:, cut:] for x in sequences]
        y_left, state = wkv7(*left, initial_state=state)
        y_right, _ = wkv7(*right, initial_state=state)
        _, own = wkv7(*right)
        moved = (wkv7_transition(right[1], right[4], right[5]) @ state.mT).mT
        return torch.cat((y_left, y_right), 1), moved + own

    assert_same(joined, partial(full, wkv7_reference), arguments(2, 120, 2, 4))


@pytest.mark.parametrize("decay", [0.606, 40.0])
def test_single_precision_beside_the_oracle(decay: float) -> None:
    singles = [x.detach().float() for x in arguments(1, 300, 2, 16, decay)]
    exact, exact_state = full(wkv7_reference, *[x.double() for x in singles])
    y, state = full(wkv7, *singles)
    assert y.dtype == state.dtype == torch.float32
    assert relative_error(y, exact) < 3e-6
    assert relative_error(state, exact_state) < 3e-6


def test_comparison_notices_a_missing_correction() -> None:
    """Negative control: without the rank-one part everything differs."""

    def plain(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return full(wkv7, *inputs[:4], inputs[4] * 0, *inputs[5:])

    assert worst_error(plain, partial(full, wkv7_reference), arguments(1, 20, 2, 3)) > 1e-3


def test_gradcheck() -> None:
    inputs = arguments(1, 5, 1, 2)
    assert torch.autograd.gradcheck(partial(full, wkv7, document_starts=start_mask(1, 5, (0, 3))), tuple(inputs))


def test_causal() -> None:
    inputs = arguments(1, 100, 1, 3)
    y, _ = wkv7(*inputs[:6])
    for gradient in torch.autograd.grad(y[:, 50].sum(), inputs[:6]):
        assert (gradient[:, 51:] == 0).all()
        assert gradient[:, 50].any()


def test_bfloat16_in_and_out() -> None:
    halves = [x.detach().bfloat16() for x in arguments(2, 60, 2, 4)[:6]]
    y, state = wkv7(*halves)
    expected, _ = wkv7(*[x.double() for x in halves])
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative_error(y, expected) < 1e-2


def test_empty_sequence_passes_the_state_on() -> None:
    inputs = arguments(2, 0, 2, 3)
    y, state = full(wkv7, *inputs)
    assert y.shape == (2, 0, 2, 3)
    torch.testing.assert_close(state, inputs[6])
    assert (wkv7_transition(inputs[1], inputs[4], inputs[5]) == torch.eye(3)).all()


def test_wrong_shapes_are_named() -> None:
    inputs = [x.detach() for x in arguments(2, 5, 2, 3)[:6]]
    with pytest.raises(ValueError, match=r"k_BTHN has shape \(2, 4, 2, 3\), expected \(2, 5, 2, 3\)"):
        wkv7(*inputs[:2], inputs[2][:, 1:], *inputs[3:])
