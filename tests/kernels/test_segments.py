"""Operations walked in many short segments: states and gradients cross every boundary, documents too."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels import segments
from longstride.kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_readout
from longstride.kernels.gated_linear_attention.reference import (
    gated_linear_attention_readout_reference,
    gated_linear_attention_reference,
)
from longstride.kernels.modal_convolution import modal_convolution
from longstride.kernels.modal_convolution.reference import modal_convolution_reference
from longstride.kernels.segments import walk
from longstride.kernels.wkv4 import wkv4_state
from longstride.kernels.wkv4.reference import wkv4_reference

from . import test_gated_linear_attention as gla_cases
from . import test_modal_convolution as modal_cases
from . import test_state_space_dual as dual_cases
from . import test_wkv4 as wkv4_cases
from . import test_wkv7 as wkv7_cases
from .compare import assert_same, leaf, start_mask, worst_error


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few chunks in a segment as there may be."""
    monkeypatch.setattr(segments, "CACHE_ELEMENTS", 1)


STARTS = [None, start_mask(1, 700, (0, 300), (0, 511)), start_mask(2, 700, (0, 256), (1, 100), (1, 699))]


@pytest.mark.parametrize("starts", STARTS)
def test_state_space_dual(starts: Tensor | None) -> None:
    inputs = dual_cases.arguments(2, 700, 4, 2, 2, 3, decay=0.01)
    for fast, slow in dual_cases.WHOLE_AND_STAGED.values():
        fast, slow = partial(fast, chunk_size=16, document_starts=starts), partial(slow, document_starts=starts)
        assert_same(fast, slow, inputs)


@pytest.mark.parametrize("starts", STARTS)
def test_gated_linear(starts: Tensor | None) -> None:
    inputs = gla_cases.arguments(2, 700, 2, 3, 2, decay=0.01)
    slow = partial(gla_cases.full, gated_linear_attention_reference, document_starts=starts)
    assert_same(partial(gla_cases.full, gated_linear_attention, document_starts=starts), slow, inputs)
    read = [inputs[4], inputs[0], inputs[3]]
    slow_read = partial(gated_linear_attention_readout_reference, document_starts=starts)
    assert_same(partial(gated_linear_attention_readout, document_starts=starts), slow_read, read)


@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("turning", [False, True])
def test_modal(turning: bool, starts: Tensor | None) -> None:
    inputs = modal_cases.arguments(2, 2300, 2, 2, turning, decay=0.01)
    if starts is not None:
        starts = torch.cat((starts, starts.flip(1), starts, starts[:, :200]), 1)
    slow = partial(modal_cases.full, modal_convolution_reference, document_starts=starts)
    assert_same(partial(modal_cases.full, modal_convolution, document_starts=starts), slow, inputs)


@pytest.mark.parametrize("starts", STARTS)
def test_delta_rule(starts: Tensor | None) -> None:
    inputs = wkv7_cases.arguments(2, 700, 2, 3)
    for fast, slow in wkv7_cases.WHOLE_AND_STAGED.values():
        assert_same(partial(fast, document_starts=starts), partial(slow, document_starts=starts), inputs)


@pytest.mark.parametrize("starts", STARTS)
def test_exponents(starts: Tensor | None) -> None:
    inputs = wkv4_cases.arguments(2, 700, 3)[:3]

    def last(k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return wkv4_reference(k, v, log_decay, torch.zeros_like(log_decay), document_starts=starts)[1]

    assert_same(partial(wkv4_state, document_starts=starts), last, inputs)


def _leaky_sum(state_BD, sequences, parameters, starts_BT):
    outputs = []
    for x_BD in sequences[0].unbind(1):
        state_BD = parameters[0] * state_BD + x_BD
        outputs.append(state_BD)
    return torch.stack(outputs, 1), state_BD


def test_walk_adds_the_gradients_of_parameters_and_passes_those_of_states() -> None:
    inputs = [leaf(2, 23, 3, seed=1), leaf(3, seed=2, scale=0.5), leaf(2, 3, seed=3)]

    def walked(x: Tensor, factor: Tensor, state: Tensor, segment: int = 5) -> tuple[Tensor, Tensor]:
        return walk(_leaky_sum, state, (x,), (factor,), segment=segment)

    def plain(x: Tensor, factor: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return _leaky_sum(state, (x,), (factor,), None)

    assert_same(walked, plain, inputs)
    assert_same(partial(walked, segment=100), plain, inputs)

    def forgets(x: Tensor, factor: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Negative control: a boundary that stops the gradient of the state."""
        left, middle = walked(x[:, :10], factor, state)
        right, final = walked(x[:, 10:], factor, middle.detach())
        return torch.cat((left, right), 1), final

    assert worst_error(forgets, plain, inputs) > 1e-3


def test_memory_is_one_segment() -> None:
    """What a forward keeps for its backward: the arguments and one state per segment."""
    kept = []

    def note(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    inputs = gla_cases.arguments(1, 4096, 2, 4, 2)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        gla_cases.full(gated_linear_attention, *inputs)
    arguments = sum(x.numel() for x in inputs)
    assert sum(x.numel() for x in kept) <= arguments + 16 * inputs[4].numel()
