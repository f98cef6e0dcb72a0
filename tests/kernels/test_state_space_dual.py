"""State-space duality, whole and in stages, against the step loop: outputs and every gradient in float64."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from longstride.kernels.state_space_dual import begin_state_space_dual, state_space_dual
from longstride.kernels.state_space_dual.reference import state_space_dual_reference

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


def staged(*inputs: Tensor, **options) -> tuple[Tensor, Tensor]:
    """y, and the state that leaves from zero."""
    stages = begin_state_space_dual(*inputs[:4], **options)
    stages.compute_local()
    return stages.finish(inputs[4]), stages.leaving


def staged_reference(*inputs: Tensor, **options) -> tuple[Tensor, Tensor]:
    y, _ = full(state_space_dual_reference, *inputs, **options)
    return y, state_space_dual_reference(*inputs[:4], **options)[1]


WHOLE_AND_STAGED = {
    "whole": (partial(full, state_space_dual), partial(full, state_space_dual_reference)),
    "staged": (staged, staged_reference),
}
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 7, 4, 3, 2, 5), (1, 128, 2, 3, 1, 2), (2, 129, 2, 2, 2, 3), (1, 700, 6, 2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk_size", [1, 16, 128])
@pytest.mark.parametrize("way", WHOLE_AND_STAGED)
def test_equals_the_step_loop(way: str, shape: tuple[int, ...], chunk_size: int) -> None:
    fast, slow = WHOLE_AND_STAGED[way]
    assert_same(partial(fast, chunk_size=chunk_size), slow, arguments(*shape))


@pytest.mark.parametrize("way", WHOLE_AND_STAGED)
def test_many_segments(way: str) -> None:
    """Heads enough that a segment is a few chunks; several segments pass their states on."""
    fast, slow = WHOLE_AND_STAGED[way]
    assert_same(partial(fast, chunk_size=16), slow, arguments(1, 3000, 40, 1, 1, 2))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("positions", [(0,), (1, 2, 3), (31, 32), (64, 65, 66, 90), (299,), (0, 32, 96, 255, 256)])
@pytest.mark.parametrize("way", WHOLE_AND_STAGED)
def test_documents_forget_the_state_before_them(way: str, rows: int, positions: tuple[int, ...]) -> None:
    fast, slow = WHOLE_AND_STAGED[way]
    inputs = arguments(2, 300, 4, 3, 2, 2)
    starts = start_mask(rows, 300, *[(index % rows, position) for index, position in enumerate(positions)])
    slow = partial(slow, document_starts=starts)
    assert_same(partial(fast, document_starts=starts, chunk_size=32), slow, inputs)
    # Negative control: without the mask the result differs far beyond the tolerance.
    assert worst_error(fast, slow, inputs) > 1e-6


@pytest.mark.parametrize("cuts", [(0, 1, 150), (0, 50, 50, 150), (0, 16, 128, 150)])
@pytest.mark.parametrize("starts", [None, ((0, 0), (1, 17)), ((0, 50), (1, 100), (1, 149))])
def test_stages_join_pieces(cuts: tuple[int, ...], starts) -> None:
    """As in a split sequence: every piece begins before any of them knows what enters. One of them may be empty."""
    mask = None if starts is None else start_mask(2, 150, *starts)

    def joined(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        pieces = [slice(start, stop) for start, stop in pairwise(cuts)]
        begun = [
            begin_state_space_dual(
                x[:, piece], log_decay[:, piece], B[:, piece], C[:, piece], chunk_size=16,
                document_starts=None if mask is None else mask[:, piece],
            )
            for piece in pieces
        ]  # fmt: skip
        outputs = []
        for piece, stages in zip(pieces, begun, strict=True):
            stages.compute_local()
            outputs.append(stages.finish(state))
            decay = log_decay[:, piece].sum(1).exp()
            if mask is not None:
                decay = decay * ~mask[:, piece].any(1, keepdim=True)
            state = stages.leaving + decay[:, :, None, None] * state
        return torch.cat(outputs, 1), state

    slow = partial(full, state_space_dual_reference, document_starts=mask)
    assert_same(joined, slow, arguments(2, 150, 4, 3, 2, 4))


def test_each_output_alone_has_its_gradients() -> None:
    """A loss of the outputs, or of the leaving state: gradients that one of the stages would add to do not come."""
    inputs = arguments(2, 70, 4, 3, 2, 4)

    def one(way: Callable[..., tuple[Tensor, Tensor]], output: int, *tensors: Tensor) -> Tensor:
        return way(*tensors)[output]

    for output in (0, 1):
        fast = partial(one, partial(staged, chunk_size=16), output)
        assert_same(fast, partial(one, staged_reference, output), inputs)


@pytest.mark.parametrize("way", WHOLE_AND_STAGED)
def test_little_is_kept_for_the_backward(way: str) -> None:
    """Beside the arguments: the sums of log decays, and one state for each chunk, or for every fourth."""
    batch, length, heads, width, groups, states = 1, 2048, 8, 16, 1, 16
    inputs = [x.detach().float().requires_grad_() for x in arguments(batch, length, heads, width, groups, states)]
    given, kept = {x.untyped_storage().data_ptr() for x in inputs}, dict[int, Tensor]()

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in given:
            kept[x.untyped_storage().data_ptr()] = x  # alive, so that no other gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = WHOLE_AND_STAGED[way][0](*inputs)
    chunk_states = length // 128 * heads * width * states * 4
    allowed = chunk_states * (1.5 if way == "staged" else 0.5) + length * heads * 8
    own = sum(x.untyped_storage().nbytes() for x in kept.values() if all(x is not y for y in outputs))
    assert 0.25 * chunk_states < own <= allowed


@pytest.mark.parametrize("way", WHOLE_AND_STAGED)
def test_single_precision_beside_the_oracle(way: str) -> None:
    """Strong decays: differences of long sums would lose digits."""
    fast, slow = WHOLE_AND_STAGED[way]
    singles = [x.detach().float() for x in arguments(1, 600, 4, 8, 2, 16, decay=5.0)]
    exact, exact_state = slow(*[x.double() for x in singles])
    y, state = fast(*singles)
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
    x, log_decay, B, C, state = arguments(2, 9, 4, 2, 2, 3)
    starts = start_mask(1, 9, (0, 0)) if decay == 1 else None
    y, _ = staged(x, log_decay.detach() * 0 - decay, B, C, state, document_starts=starts)
    (gradient,) = torch.autograd.grad(y.sum(), state)
    assert (gradient == 0).all()


def test_gradcheck() -> None:
    inputs = arguments(1, 6, 2, 2, 1, 2)
    for fast in (partial(full, state_space_dual), staged):
        assert torch.autograd.gradcheck(partial(fast, chunk_size=4, document_starts=start_mask(1, 6, (0, 3))), inputs)


def test_causal() -> None:
    inputs = arguments(1, 140, 2, 2, 1, 2)
    y, _ = state_space_dual(*inputs[:4], chunk_size=32)
    for gradient in torch.autograd.grad(y[:, 70].sum(), inputs[:4]):
        assert (gradient[:, 71:] == 0).all()
        assert gradient[:, 70].any()


def test_bfloat16_in_and_out() -> None:
    *inputs, initial = [x.detach() for x in arguments(1, 100, 2, 3, 1, 2)]
    dtypes = torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16
    halves = [x.to(dtype).requires_grad_() for x, dtype in zip(inputs, dtypes, strict=True)]
    doubles = [x.detach().double().requires_grad_() for x in halves]
    expected, _ = staged_reference(*doubles, initial)
    exact = torch.autograd.grad(expected.sum(), doubles)
    for fast in (partial(full, state_space_dual), staged):
        y, state = fast(*halves, initial.float())
        assert y.dtype == torch.bfloat16
        assert state.dtype == torch.float32
        assert relative_error(y, expected) < 1e-2
        for x, found, wanted in zip(halves, torch.autograd.grad(y.sum(), halves), exact, strict=True):
            assert found.dtype == x.dtype
            assert relative_error(found, wanted) < 1e-2


def test_empty_sequence_passes_the_state_on() -> None:
    inputs = arguments(2, 0, 4, 3, 2, 2)
    y, state = full(state_space_dual, *inputs)
    assert y.shape == (2, 0, 4, 3)
    torch.testing.assert_close(state, inputs[4])
    y, state = staged(*inputs)
    assert y.shape == (2, 0, 4, 3) and not state.any()
    assert all(not x.any() for x in torch.autograd.grad(y.sum() + state.sum(), inputs))


def test_wrong_arguments_are_named() -> None:
    x, log_decay, B, C = (x.detach() for x in arguments(2, 5, 4, 3, 2, 4)[:4])
    with pytest.raises(ValueError, match=r"C_BTGN has shape \(2, 5, 2, 3\), expected \(2, 5, 2, 4\)"):
        state_space_dual(x, log_decay, B, C[..., :3])
    for door in (state_space_dual, begin_state_space_dual):
        with pytest.raises(ValueError, match="4 heads cannot share 3 groups"):
            door(x, log_decay, torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 3, 4))
