"""RWKV-7's recurrence, whole and in stages, against the step loop: outputs and every gradient in float64."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from longstride.kernels.wkv7 import begin_wkv7, wkv7
from longstride.kernels.wkv7.portable import CHUNK, is_moderate
from longstride.kernels.wkv7.reference import wkv7_reference

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


def staged(*inputs: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    """(y, the state after the last token, what leaves from zero), as a shard computes them."""
    r, *stored, state = inputs
    stages = begin_wkv7(*stored, **options)
    stages.compute_local(r)
    return stages.finish(state), stages.leaving + state.to(stages.leaving) @ stages.transition, stages.leaving


def staged_reference(*inputs: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    _, leaving = wkv7_reference(*inputs[:6], **options)
    return *full(wkv7_reference, *inputs, **options), leaving


def transition(log_w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    nothing = torch.zeros_like(a)
    return begin_wkv7(log_w, nothing, nothing, a, b).transition


def transition_reference(log_w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What becomes of an identity when nothing is stored."""
    batch, _, heads, width = a.shape
    identity, nothing = torch.eye(width, dtype=a.dtype).expand(batch, heads, -1, -1), torch.zeros_like(a)
    return wkv7_reference(nothing, log_w, nothing, nothing, a, b, initial_state=identity)[1]


WHOLE_AND_STAGED = {
    "whole": (partial(full, wkv7), partial(full, wkv7_reference)),
    "staged": (staged, staged_reference),
}
both_ways = pytest.mark.parametrize("way", WHOLE_AND_STAGED)
SHAPES = [(1, 1, 1, 1), (2, 7, 3, 4), (1, 32, 2, 5), (2, 33, 2, 3), (1, 700, 2, 4), (1, 600, 20, 8)]


@both_ways
@pytest.mark.parametrize(
    ("shape", "decay"), [*((shape, 0.606) for shape in SHAPES), *((shape, 40.0) for shape in SHAPES[1:])]
)
def test_equals_the_step_loop(shape: tuple[int, int, int, int], decay: float, way: str) -> None:
    """Also with decays that no product of factors could hold."""
    inputs = arguments(*shape, decay=decay)
    assert shape[1] < 32 or is_moderate(inputs[1], CHUNK) == (decay < 1)
    assert_same(*WHOLE_AND_STAGED[way], inputs)


@pytest.mark.parametrize("shape", SHAPES)
def test_transition(shape: tuple[int, int, int, int]) -> None:
    _, log_w, _, _, a, b, _ = arguments(*shape)
    assert_same(transition, transition_reference, [log_w, a, b])


@both_ways
@pytest.mark.parametrize("decay", [0.606, 40.0])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("positions", [(0,), (1, 2, 3), (31, 32), (64, 65, 66, 90), (149,), (0, 32, 96, 127, 128)])
def test_documents_forget_the_state_before_them(rows: int, positions: tuple[int, ...], decay: float, way: str) -> None:
    inputs = arguments(2, 150, 2, 3, decay)
    starts = start_mask(rows, 150, *[(index % rows, position) for index, position in enumerate(positions)])
    blind, slow = WHOLE_AND_STAGED[way]
    slow = partial(slow, document_starts=starts)
    assert_same(partial(blind, document_starts=starts), slow, inputs)
    # Negative control: without the mask the result differs far beyond the tolerance.
    assert worst_error(blind, slow, inputs) > 1e-6


@pytest.mark.parametrize("decay", [0.606, 40.0])
@pytest.mark.parametrize("starts", [None, start_mask(1, 120, (0, 50)), start_mask(2, 120, (0, 1), (1, 32), (1, 99))])
@pytest.mark.parametrize("cuts", [(1,), (32,), (40, 41, 99)])
def test_stages_join_pieces(cuts: tuple[int, ...], starts: Tensor | None, decay: float) -> None:
    """What leaves each piece, and its transition of what enters, make the next one's entering state."""

    def joined(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        r, *stored, state = inputs
        outputs, pieces = [], [slice(*ends) for ends in pairwise((0, *cuts, 120))]
        masks = [None if starts is None else starts[:, piece] for piece in pieces]
        begun = [
            begin_wkv7(*(x[:, piece] for x in stored), document_starts=mask)
            for piece, mask in zip(pieces, masks, strict=True)
        ]
        for piece, stages in zip(pieces, begun, strict=True):
            stages.compute_local(r[:, piece])
            outputs.append(stages.finish(state))
            state = stages.leaving + state @ stages.transition
        return torch.cat(outputs, 1), state

    slow = partial(full, wkv7_reference, document_starts=starts)
    assert_same(joined, slow, arguments(2, 120, 2, 4, decay))


@pytest.mark.parametrize("output", range(3))
def test_one_output_alone_is_differentiated(output: int) -> None:
    """A loss of one of what the stages give: gradients that another would add to do not come."""

    def one(function, *inputs: Tensor) -> Tensor:
        return function(*inputs)[output]

    assert_same(partial(one, staged), partial(one, staged_reference), arguments(2, 70, 2, 3))


def test_a_document_that_begins_leaves_no_transition() -> None:
    """Exactly none, whatever is sent on: nothing beside the matrix has to say that the state was forgotten."""
    stored = arguments(2, 70, 2, 3)[1:6]
    transition = begin_wkv7(*stored, document_starts=start_mask(2, 70, (1, 69))).transition
    assert transition[0].any() and not transition[1].any()
    gradients = torch.autograd.grad(transition.sum(), stored)
    assert gradients[0][0].any() and not any(gradient[1].any() for gradient in gradients)


@both_ways
@pytest.mark.parametrize("decay", [0.606, 40.0])
def test_single_precision_beside_the_oracle(decay: float, way: str) -> None:
    singles = [x.detach().float() for x in arguments(1, 300, 2, 16, decay)]
    fast, slow = WHOLE_AND_STAGED[way]
    for ours, exact in zip(fast(*singles), slow(*[x.double() for x in singles]), strict=True):
        assert ours.dtype == torch.float32
        assert relative_error(ours, exact) < 3e-6


@both_ways
def test_comparison_notices_a_missing_correction(way: str) -> None:
    """Negative control: without the rank-one part everything differs."""
    fast, slow = WHOLE_AND_STAGED[way]

    def plain(*inputs: Tensor) -> tuple[Tensor, ...]:
        return fast(*inputs[:4], inputs[4] * 0, *inputs[5:])

    assert worst_error(plain, slow, arguments(1, 20, 2, 3)) > 1e-3


@both_ways
def test_gradcheck(way: str) -> None:
    inputs, fast = arguments(1, 5, 1, 2), WHOLE_AND_STAGED[way][0]
    assert torch.autograd.gradcheck(partial(fast, document_starts=start_mask(1, 5, (0, 3))), tuple(inputs))


@both_ways
def test_causal(way: str) -> None:
    inputs = arguments(1, 100, 1, 3)
    y = WHOLE_AND_STAGED[way][0](*inputs)[0]
    for gradient in torch.autograd.grad(y[:, 50].sum(), inputs[:6]):
        assert (gradient[:, 51:] == 0).all()
        assert gradient[:, 50].any()


@both_ways
def test_bfloat16_in_and_out(way: str) -> None:
    fast, slow = WHOLE_AND_STAGED[way]
    halves = [x.detach().bfloat16().requires_grad_() for x in arguments(2, 60, 2, 4)]
    y, *states = fast(*halves)
    assert y.dtype == torch.bfloat16
    assert all(state.dtype == torch.float32 for state in states)
    assert worst_error(fast, lambda *inputs: slow(*(x.double() for x in inputs)), halves) < 1e-2


@both_ways
def test_empty_sequence_passes_the_state_on(way: str) -> None:
    inputs = arguments(2, 0, 2, 3)
    y, state, *_ = WHOLE_AND_STAGED[way][0](*inputs)
    assert y.shape == (2, 0, 2, 3)
    torch.testing.assert_close(state, inputs[6])


def test_wrong_shapes_are_named() -> None:
    r, *stored = [x.detach() for x in arguments(2, 5, 2, 3)[:6]]
    short = [*stored[:2], stored[2][:, 1:], *stored[3:]]
    for call in (lambda: wkv7(r, *short), lambda: begin_wkv7(*short)):
        with pytest.raises(ValueError, match=r"wkv7: v_BTHN has shape \(2, 4, 2, 3\), expected \(2, 5, 2, 3\)"):
            call()
    stages = begin_wkv7(*stored)
    with pytest.raises(ValueError, match=r"wkv7: r_BTHN has shape \(2, 4, 2, 3\), expected \(2, 5, 2, 3\)"):
        stages.compute_local(r[:, 1:])
    stages.compute_local(r)
    with pytest.raises(ValueError, match=r"wkv7: entering_BHNN has shape \(2, 2, 3\), expected \(2, 2, 3, 3\)"):
        stages.finish(torch.zeros(2, 2, 3))
