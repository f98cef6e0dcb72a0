"""Modal convolution, whole and in stages, against the step loop: outputs and every gradient in float64."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from longstride.kernels.modal_convolution import begin_modal_convolution, modal_convolution
from longstride.kernels.modal_convolution.reference import modal_convolution_reference

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
    return y, as_real(state)


def as_real(state: Tensor) -> Tensor:
    return torch.view_as_real(state.resolve_conj()) if state.is_complex() else state


def staged(*inputs: Tensor, **options) -> tuple[Tensor, Tensor]:
    """y, and the state that leaves from zero."""
    stages = begin_modal_convolution(*inputs[:3], skip=inputs[3], **options)
    stages.compute_local()
    return stages.finish(inputs[4]), as_real(stages.leaving)


def staged_reference(*inputs: Tensor, **options) -> tuple[Tensor, Tensor]:
    y, _ = full(modal_convolution_reference, *inputs, **options)
    return y, as_real(modal_convolution_reference(*inputs[:3], **options)[1])


WHOLE_AND_STAGED = {
    "whole": (partial(full, modal_convolution), partial(full, modal_convolution_reference)),
    "staged": (staged, staged_reference),
}
SHAPES = [(1, 1, 1, 1), (2, 7, 3, 4), (1, 64, 2, 3), (2, 65, 3, 2), (3, 200, 2, 2), (2, 1500, 2, 1), (1, 130, 20, 8)]


@pytest.mark.parametrize("turning", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WHOLE_AND_STAGED)
def test_equals_the_step_loop(way: str, shape: tuple[int, int, int, int], turning: bool) -> None:
    assert_same(*WHOLE_AND_STAGED[way], arguments(*shape, turning))


@pytest.mark.parametrize("starts", [None, ((0, 1100), (1, 2290))])
@pytest.mark.parametrize("way", WHOLE_AND_STAGED)
def test_many_segments(way: str, starts) -> None:
    """Channels enough that a segment is a few chunks; the state that enters reaches the third in some of them."""
    fast, slow = WHOLE_AND_STAGED[way]
    inputs = arguments(2, 2300, 130, 2, True)
    speeds = torch.logspace(-4, 1, 130, dtype=torch.float64).unsqueeze(1)
    inputs[1] = (inputs[1].detach() * speeds).requires_grad_()
    mask = None if starts is None else start_mask(2, 2300, *starts)
    assert_same(partial(fast, document_starts=mask), partial(slow, document_starts=mask), inputs)


@pytest.mark.parametrize("turning", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "positions", [(0,), (1, 2, 3), (63, 64), (127, 128, 129, 150), (299,), (0, 64, 192, 256), tuple(range(5, 300, 3))]
)
@pytest.mark.parametrize("way", WHOLE_AND_STAGED)
def test_documents_forget_the_state_before_them(way: str, rows: int, positions: tuple[int, ...], turning: bool) -> None:
    fast, slow = WHOLE_AND_STAGED[way]
    inputs = arguments(2, 300, 3, 2, turning)
    starts = start_mask(rows, 300, *[(index % rows, position) for index, position in enumerate(positions)])
    slow = partial(slow, document_starts=starts)
    assert_same(partial(fast, document_starts=starts), slow, inputs)
    # Negative control: without the mask the result differs far beyond the tolerance.
    assert worst_error(fast, slow, inputs) > 1e-6


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


@pytest.mark.parametrize("way", WHOLE_AND_STAGED)
def test_a_single_channel_is_left_as_it_was(way: str) -> None:
    """Its rows are the input's own memory, and those of its gradient the caller's."""
    inputs = arguments(1, 128, 1, 2, False)
    starts = start_mask(1, 128, (0, 20), (0, 90))
    u, (y, _) = inputs[0].detach().clone(), WHOLE_AND_STAGED[way][0](*inputs, document_starts=starts)
    weights = torch.ones_like(y)
    y.backward(weights)
    assert torch.equal(inputs[0], u)
    assert (weights == 1).all()


def test_only_the_required_arguments() -> None:
    inputs = arguments(2, 33, 3, 2, False)[:3]
    assert_same(modal_convolution, modal_convolution_reference, inputs)


@pytest.mark.parametrize("turning", [False, True])
@pytest.mark.parametrize("cuts", [(0, 1, 150), (0, 70, 70, 150), (0, 64, 128, 150)])
@pytest.mark.parametrize("starts", [None, ((0, 0), (1, 17)), ((0, 70), (1, 100), (1, 149))])
def test_stages_join_pieces(cuts: tuple[int, ...], starts, turning: bool) -> None:
    """As in a split sequence: every piece begins before any of them knows what enters. One of them may be empty."""
    mask = None if starts is None else start_mask(2, 150, *starts)

    def joined(u: Tensor, log_poles: Tensor, residues: Tensor, skip: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        pieces = [slice(start, stop) for start, stop in pairwise(cuts)]
        masks = [None if mask is None else mask[:, piece] for piece in pieces]
        begun = [
            begin_modal_convolution(u[:, piece], log_poles, residues, skip=skip, document_starts=here)
            for piece, here in zip(pieces, masks, strict=True)
        ]
        outputs = []
        for piece, here, stages in zip(pieces, masks, begun, strict=True):
            stages.compute_local()
            outputs.append(stages.finish(state))
            decay = torch.exp(log_poles * (piece.stop - piece.start))
            if here is not None:
                decay = decay * ~here.any(1)[:, None, None]
            state = stages.leaving + decay * state
        return torch.cat(outputs, 1), as_real(state)

    slow = partial(full, modal_convolution_reference, document_starts=mask)
    assert_same(joined, slow, arguments(2, 150, 3, 4, turning))


@pytest.mark.parametrize("turning", [False, True])
@pytest.mark.parametrize("length", [1, 63, 64, 300])
@pytest.mark.parametrize("starts", [None, (), ((0, 0), (1, 250)), ((0, 40), (1, 41))])
def test_an_entering_state_alone(length: int, starts, turning: bool) -> None:
    """Decays of very different speed, some of which are gone long before the end."""
    u, log_poles, residues, skip, state = arguments(2, length, 5, 3, turning)
    speeds = torch.tensor([1e-4, 0.03, 0.3, 3.0, 300.0], dtype=torch.float64).unsqueeze(1)
    log_poles = (log_poles.detach() * speeds).requires_grad_()
    mask = None
    if starts is not None:
        mask = start_mask(2, length, *[(row, position) for row, position in starts if position < length])
    nothing = torch.zeros_like(u).requires_grad_()
    fast, slow = (partial(way, document_starts=mask) for way in WHOLE_AND_STAGED["staged"])
    assert_same(fast, slow, [nothing, log_poles, residues, skip, state])


def test_each_output_alone_has_its_gradients() -> None:
    """A loss of the outputs, or of the leaving state: gradients that one of the stages would add to do not come."""
    inputs = arguments(2, 70, 3, 2, True)

    def one(way: Callable[..., tuple[Tensor, Tensor]], output: int, *tensors: Tensor) -> Tensor:
        return way(*tensors)[output]

    for output in (0, 1):
        assert_same(partial(one, staged, output), partial(one, staged_reference, output), inputs)


def test_little_is_kept_for_the_backward() -> None:
    """Beside the arguments: one state for each chunk, and what is known of the filter."""
    batch, length, channels, modes = 2, 4096, 16, 4
    singles = [x.detach().to(torch.complex64 if x.is_complex() else torch.float32) for x in arguments(
        batch, length, channels, modes, True
    )]  # fmt: skip
    inputs = [x.requires_grad_() for x in singles]
    given, kept = {x.untyped_storage().data_ptr() for x in inputs}, dict[int, Tensor]()

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in given:
            kept[x.untyped_storage().data_ptr()] = x  # alive, so that no other gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = staged(*inputs)
    chunk_states = batch * length // 64 * channels * modes * 8
    tables = channels * (2 * 64 * 64 * 4 + 6 * modes * 64 * 16)
    own = sum(x.untyped_storage().nbytes() for x in kept.values() if all(x is not y for y in outputs))
    assert chunk_states <= own <= chunk_states + tables


@pytest.mark.parametrize("starts", [None, ((0, 0),)])
def test_a_state_nobody_sees_still_has_a_gradient(starts) -> None:
    """Zero, not none: in a split sequence it has to be sent. Hidden by a document, or erased by the first token."""
    u, log_poles, residues, skip, state = arguments(2, 9, 3, 2, True)
    mask = None if starts is None else start_mask(1, 9, *starts)
    log_poles = log_poles.detach() - (1000.0 if starts is None else 0.0)
    y, _ = staged(u, log_poles, residues, skip, state, document_starts=mask)
    (gradient,) = torch.autograd.grad(y.sum(), state)
    assert (gradient == 0).all()


def test_gradcheck() -> None:
    inputs = arguments(1, 6, 2, 2, True)
    assert torch.autograd.gradcheck(partial(staged, document_starts=start_mask(1, 6, (0, 4))), inputs)


@pytest.mark.parametrize("turning", [False, True])
@pytest.mark.parametrize("way", WHOLE_AND_STAGED)
def test_single_precision_keeps_phases_over_long_sequences(way: str, turning: bool) -> None:
    """Slow modes over 40,000 tokens: the error stays that of single precision, not that of forty thousand powers."""
    doubles = [x.detach() for x in arguments(1, 40000, 2, 3, turning, decay=1e-4)]
    singles = [x.to(torch.complex64 if x.is_complex() else torch.float32) for x in doubles]
    # the oracle gets the same rounded numbers
    exact = [x.to(torch.complex128 if x.is_complex() else torch.float64) for x in singles]
    fast, _ = WHOLE_AND_STAGED[way]
    y, state = fast(*singles)
    expected, expected_state = fast(*exact)
    assert y.dtype == state.dtype == torch.float32
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
    u, *others = [x.detach() for x in arguments(2, 100, 3, 2, False)]
    half = u.bfloat16().requires_grad_()
    double = half.detach().double().requires_grad_()
    expected, _ = staged_reference(double, *others)
    (exact,) = torch.autograd.grad(expected.sum(), double)
    for fast, _ in WHOLE_AND_STAGED.values():
        y, state = fast(half, *[x.float() for x in others])
        assert y.dtype == torch.bfloat16
        assert state.dtype == torch.float32
        assert relative_error(y, expected) < 1e-2
        (gradient,) = torch.autograd.grad(y.sum(), half)
        assert gradient.dtype == torch.bfloat16
        assert relative_error(gradient, exact) < 1e-2


def test_empty_sequence_passes_the_state_on() -> None:
    inputs = arguments(2, 0, 3, 2, True)
    y, state = modal_convolution(*inputs[:3], initial_state=inputs[4])
    assert y.shape == (2, 0, 3)
    torch.testing.assert_close(state, inputs[4])
    y, state = staged(*inputs)
    assert y.shape == (2, 0, 3) and not state.any()
    assert all(not x.any() for x in torch.autograd.grad(y.sum() + state.sum(), inputs))


def test_wrong_arguments_are_named() -> None:
    u, log_poles, residues = (x.detach() for x in arguments(2, 5, 3, 4, False)[:3])
    for door in (modal_convolution, begin_modal_convolution):
        with pytest.raises(ValueError, match=r"residues_DN has shape \(3, 3\), expected \(3, 4\)"):
            door(u, log_poles, residues[:, :3])
        with pytest.raises(ValueError, match="both real or both complex"):
            door(u, log_poles, residues.to(torch.complex128))
