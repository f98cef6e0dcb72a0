"""Modal convolution and read-out against the step loop: outputs and every gradient in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels.modal_convolution import modal_convolution, modal_readout
from longstride.kernels.modal_convolution.reference import modal_convolution_reference, modal_readout_reference

from .compare import assert_same, leaf, relative_error, start_mask, worst_error


def complex_leaf(*shape: int, seed: int) -> Tensor:
    return torch.complex(leaf(*shape, seed=seed).detach(), leaf(*shape, seed=seed + 50).detach()).requires_grad_()


def arguments(batch: int, length: int, channels: int, modes: int, turning: bool, decay: float = 0.3) -> list[Tensor]:
    log_poles = -leaf(channels, modes, seed=3).detach().abs() * decay - 0.01 * decay
    u, skip = leaf(batch, length, channels, seed=1), leaf(channels, seed=2)
    if not turning:
        state = leaf(batch, channels, modes, seed=5)
        return [u, log_poles.requires_grad_(), leaf(channels, modes, seed=4), skip, state]
    log_poles = torch.complex(log_poles, leaf(channels, modes, seed=6).detach())
    state = complex_leaf(batch, channels, modes, seed=5)
    return [u, log_poles.requires_grad_(), complex_leaf(channels, modes, seed=4), skip, state]


def full(function, *inputs: Tensor, **options):
    """Every optional tensor given; the state as real numbers, which the comparison can weigh."""
    y, state = function(*inputs[:3], skip=inputs[3], initial_state=inputs[4], **options)
    return y, torch.view_as_real(state) if state.is_complex() else state


SHAPES = [(1, 1, 1, 1), (2, 7, 3, 4), (1, 64, 2, 3), (2, 65, 3, 2), (3, 200, 2, 2), (2, 1500, 2, 1), (1, 130, 20, 8)]


@pytest.mark.parametrize("turning", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_step_loop(shape: tuple[int, int, int, int], turning: bool) -> None:
    inputs = arguments(*shape, turning)
    assert_same(partial(full, modal_convolution), partial(full, modal_convolution_reference), inputs)


@pytest.mark.parametrize("turning", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "positions", [(0,), (1, 2, 3), (63, 64), (127, 128, 129, 150), (299,), (0, 64, 192, 256), tuple(range(5, 300, 3))]
)
def test_documents_forget_the_state_before_them(rows: int, positions: tuple[int, ...], turning: bool) -> None:
    inputs = arguments(2, 300, 3, 2, turning)
    starts = start_mask(rows, 300, *[(index % rows, position) for index, position in enumerate(positions)])
    fast = partial(full, modal_convolution, document_starts=starts)
    slow = partial(full, modal_convolution_reference, document_starts=starts)
    assert_same(fast, slow, inputs)
    # Negative control: without the mask the result differs far beyond the tolerance.
    assert worst_error(partial(full, modal_convolution), slow, inputs) > 1e-6


def test_a_document_never_sees_another_ones_values() -> None:
    """Exactly: not even the rounding of huge values crosses a document start."""
    inputs = [x.detach() for x in arguments(1, 150, 2, 3, False)]
    starts = start_mask(1, 150, (0, 70), (0, 100))
    y, _ = modal_convolution(*inputs[:3], document_starts=starts)
    changed = inputs[0].clone()
    changed[:, 70:100] = 1e30
    again, _ = modal_convolution(changed, *inputs[1:3], document_starts=starts)
    assert torch.equal(y[:, :70], again[:, :70])
    assert torch.equal(y[:, 100:], again[:, 100:])


def test_only_the_required_arguments() -> None:
    inputs = arguments(2, 33, 3, 2, False)[:3]
    assert_same(modal_convolution, modal_convolution_reference, inputs)


@pytest.mark.parametrize("turning", [False, True])
@pytest.mark.parametrize("cut", [1, 64, 99])
def test_state_and_readout_join_two_pieces(cut: int, turning: bool) -> None:
    def joined(u: Tensor, log_poles: Tensor, residues: Tensor, skip: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        left, state = modal_convolution(u[:, :cut], log_poles, residues, skip=skip, initial_state=state)
        right, _ = modal_convolution(u[:, cut:], log_poles, residues, skip=skip)
        _, final = full(modal_convolution, u[:, cut:], log_poles, residues, skip, state)
        added = modal_readout(state, log_poles, residues, u.shape[1] - cut)
        return torch.cat((left, right + added), 1), final

    assert_same(joined, partial(full, modal_convolution_reference), arguments(2, 150, 3, 4, turning))


@pytest.mark.parametrize("turning", [False, True])
@pytest.mark.parametrize("length", [1, 63, 64, 300])
@pytest.mark.parametrize("starts", [None, (), ((0, 0), (1, 250)), ((0, 40), (1, 41))])
def test_readout(length: int, starts, turning: bool) -> None:
    """Decays of very different speed, some of which are gone long before the end."""
    _, log_poles, residues, _, state = arguments(2, 1, 5, 3, turning)
    speeds = torch.tensor([1e-4, 0.03, 0.3, 3.0, 300.0], dtype=torch.float64).unsqueeze(1)
    log_poles = (log_poles.detach() * speeds).requires_grad_()
    mask = None
    if starts is not None:
        mask = start_mask(2, length, *[(row, position) for row, position in starts if position < length])
    options = {"length": length, "document_starts": mask}
    fast, slow = partial(modal_readout, **options), partial(modal_readout_reference, **options)
    assert_same(fast, slow, [state, log_poles, residues])


def test_a_state_nobody_sees_still_has_a_gradient() -> None:
    """Zero, not none: in a split sequence it has to be sent."""
    _, log_poles, residues, _, state = arguments(2, 1, 3, 2, True)
    y = modal_readout(state, log_poles, residues, 9, document_starts=start_mask(1, 9, (0, 0)))
    for gradient in torch.autograd.grad(y.sum(), [state, log_poles, residues]):
        assert (gradient == 0).all()


def test_readout_stops_where_nothing_is_left() -> None:
    log_poles = torch.tensor([[-0.5], [-1e-5]])
    y = modal_readout(torch.ones(1, 2, 1), log_poles, torch.ones(2, 1), 5000)
    assert (y[0, 100:, 0] == 0).all()
    assert (y[0, :, 1] > 0.9).all()


@pytest.mark.parametrize("turning", [False, True])
def test_single_precision_keeps_phases_over_long_sequences(turning: bool) -> None:
    """Slow modes over 40,000 tokens: the error stays that of single precision, not that of forty thousand powers."""
    doubles = [x.detach() for x in arguments(1, 40000, 2, 3, turning, decay=1e-4)]
    singles = [x.to(torch.complex64 if x.is_complex() else torch.float32) for x in doubles]
    # the oracle gets the same rounded numbers
    exact = [x.to(torch.complex128 if x.is_complex() else torch.float64) for x in singles]
    y, state = modal_convolution(*singles[:3], skip=singles[3], initial_state=singles[4])
    expected, expected_state = modal_convolution(*exact[:3], skip=exact[3], initial_state=exact[4])
    assert y.dtype == torch.float32
    assert state.dtype == (torch.complex64 if turning else torch.float32)
    assert relative_error(y, expected) < 1e-6
    assert (state - expected_state).abs().max() / expected_state.abs().max() < 1e-6
    if turning:  # a phase of an ordinary single-precision power would be off by much more
        careless = torch.exp(singles[1] * 40000)
        assert (careless - torch.exp(exact[1] * 40000)).abs().max() > 1e-5


def test_causal() -> None:
    inputs = arguments(1, 140, 2, 2, True)
    y, _ = modal_convolution(*inputs[:3])
    (gradient,) = torch.autograd.grad(y[:, 70].sum(), inputs[0])
    assert (gradient[:, 71:] == 0).all()
    assert (gradient[:, :71] != 0).all()


def test_bfloat16_in_and_out() -> None:
    inputs = [x.detach() for x in arguments(2, 100, 3, 2, False)]
    y, state = modal_convolution(inputs[0].bfloat16(), inputs[1].float(), inputs[2].float())
    expected, _ = modal_convolution(inputs[0].bfloat16().double(), inputs[1], inputs[2])
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative_error(y, expected) < 1e-2


def test_empty_sequence_passes_the_state_on() -> None:
    inputs = arguments(2, 0, 3, 2, True)
    y, state = modal_convolution(*inputs[:3], initial_state=inputs[4])
    assert y.shape == (2, 0, 3)
    torch.testing.assert_close(state, inputs[4])
    assert modal_readout(inputs[4], inputs[1], inputs[2], 0).shape == (2, 0, 3)


def test_wrong_arguments_are_named() -> None:
    u, log_poles, residues = (x.detach() for x in arguments(2, 5, 3, 4, False)[:3])
    with pytest.raises(ValueError, match=r"residues_DN has shape \(3, 3\), expected \(3, 4\)"):
        modal_convolution(u, log_poles, residues[:, :3])
    with pytest.raises(ValueError, match="both real or both complex"):
        modal_convolution(u, log_poles, residues.to(torch.complex128))
