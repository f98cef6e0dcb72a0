"""Triton read-outs, the scan's behind its scan, against their step loops in float64: outputs and every gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from longstride.kernels import begin_selective_scan, gated_linear_attention_readout
from longstride.kernels.gated_linear_attention.reference import gated_linear_attention_readout_reference
from longstride.kernels.modal_convolution.reference import modal_convolution_reference
from longstride.kernels.selective_scan.reference import selective_scan_reference
from longstride.kernels.state_space_dual.reference import state_space_dual_reference

from .compare import leaf, start_mask
from .native import DEVICE, NATIVE, assert_close, errors, needs_triton, triton_chosen

pytestmark = needs_triton
BATCH, LENGTH = 2, 700 if NATIVE else 21


def decays(*shape: int, rate: float) -> Tensor:
    """Negative numbers: logarithms of decays, or rates."""
    return (-rate * leaf(*shape, seed=2).detach().abs() - 1e-3).requires_grad_()


def scan_inputs(length: int, rate: float) -> list[Tensor]:
    """The state that enters, step sizes before bias and softplus, rates, C, u, B and the bias."""
    sequences = [leaf(BATCH, length, 3, seed=4), leaf(BATCH, length, 18, seed=5), leaf(BATCH, length, 3, seed=6)]
    rates = decays(18, 3, rate=rate)
    return [leaf(BATCH, 18, 3, seed=1), leaf(BATCH, length, 18, seed=3), rates, *sequences, leaf(18, seed=7)]


def scan_in_stages(*inputs: Tensor, document_starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs, and the state that leaves as a split sequence composes it."""
    state, delta, rates, C, u, B, bias = inputs
    options = {"delta_bias": bias, "delta_softplus": True, "document_starts": document_starts}
    stages = begin_selective_scan(u, delta, rates, B, C, **options)
    decay = torch.exp(rates.detach() * stages.steps.unsqueeze(-1))
    if document_starts is not None:
        decay = decay * ~document_starts.any(1)[:, None, None]
    return stages.finish(state), stages.leaving + decay * state


def scan_reference(*inputs: Tensor, document_starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    state, delta, rates, C, u, B, bias = inputs
    options = {"delta_bias": bias, "delta_softplus": True, "document_starts": document_starts}
    return selective_scan_reference(u, delta, rates, B, C, **options, initial_state=state)


def dual_inputs(length: int, rate: float) -> list[Tensor]:
    """Four heads that share two projections."""
    return [leaf(BATCH, 4, 3, 5, seed=1), decays(BATCH, length, 4, rate=rate), leaf(BATCH, length, 2, 5, seed=4)]


def dual_readout(state: Tensor, log_decay: Tensor, C: Tensor, *, document_starts: Tensor | None = None) -> Tensor:
    """The last stage of a split state-space dual."""
    from longstride.kernels.triton_readout import TritonReadout

    return TritonReadout.apply(state.float().mT, log_decay.unsqueeze(-1), C, document_starts)


def dual_readout_reference(state: Tensor, log_decay: Tensor, C: Tensor, **options: Any) -> Tensor:
    nothing = log_decay.new_zeros(*log_decay.shape, state.shape[2]), log_decay, torch.zeros_like(C), C
    return state_space_dual_reference(*nothing, initial_state=state, **options)[0]


def gated_inputs(length: int, rate: float) -> list[Tensor]:
    return [leaf(BATCH, 2, 3, 5, seed=1), leaf(BATCH, length, 2, 3, seed=4), decays(BATCH, length, 2, 3, rate=rate)]


def modal_inputs(length: int, rate: float, *, turning: bool) -> list[Tensor]:
    real = [leaf(BATCH, 18, 3, seed=1), decays(18, 3, rate=rate), leaf(18, 3, seed=4)]
    imaginary = [leaf(BATCH, 18, 3, seed=5), leaf(18, 3, seed=6), leaf(18, 3, seed=7)]
    if not turning:
        return real
    pairs = zip(real, imaginary, strict=True)
    return [torch.complex(x.detach(), y.detach()).requires_grad_() for x, y in pairs]


def modal_readout(
    state: Tensor, log_poles: Tensor, residues: Tensor, *, length: int = LENGTH, document_starts: Tensor | None = None
) -> Tensor:
    """The last stage of a split modal convolution."""
    from longstride.kernels.modal_convolution.triton_readout import TritonModalReadout

    return TritonModalReadout.apply(state, log_poles, residues, length, document_starts)


def modal_readout_reference(
    state: Tensor, log_poles: Tensor, residues: Tensor, *, length: int = LENGTH, **options: Any
) -> Tensor:
    nothing = torch.zeros(len(state), length, len(log_poles), dtype=torch.float64)
    return modal_convolution_reference(nothing, log_poles, residues, initial_state=state, **options)[0]


# door, reference, inputs of a length and a rate of decay, launches
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., list[Tensor]], list[str]]] = {
    "scan": (
        scan_in_stages,
        scan_reference,
        scan_inputs,
        [
            *("summary_kernel", "pass_kernel", "scan_kernel", "scan_enter_kernel"),
            *("scan_enter_gradient_kernel", "summary_kernel", "pass_kernel", "backward_kernel"),
        ],
    ),
    "dual": (
        dual_readout,
        dual_readout_reference,
        dual_inputs,
        ["readout_kernel", "readout_gradient_kernel"],
    ),
    "gated": (
        gated_linear_attention_readout,
        gated_linear_attention_readout_reference,
        gated_inputs,
        ["readout_kernel", "readout_gradient_kernel"],
    ),
    "modal": (
        modal_readout,
        modal_readout_reference,
        partial(modal_inputs, turning=False),
        ["modal_readout_kernel", "modal_moments_kernel"],
    ),
    "turning modal": (
        modal_readout,
        modal_readout_reference,
        partial(modal_inputs, turning=True),
        ["modal_readout_kernel", "modal_moments_kernel"],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rate", [0.05, 3.0])
def test_equals_the_step_loop(case: str, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow decays, and decays that leave nothing long before the end."""
    fast, slow, inputs, kernels = CASES[case]
    with triton_chosen(monkeypatch) as launched:
        assert_close(fast, slow, inputs(LENGTH, rate))
    assert launched == kernels


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("starts", [((0, 0), (1, 17)), ((0, 8), (1, 9), (1, 20))])
def test_nothing_is_seen_behind_a_document_start(case: str, starts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow, inputs, _ = CASES[case]
    mask = start_mask(BATCH, LENGTH, *starts)
    masked = partial(slow, document_starts=mask)
    with triton_chosen(monkeypatch):
        assert_close(partial(fast, document_starts=mask.to(DEVICE)), masked, inputs(LENGTH, 0.05))
        assert max(errors(fast, masked, inputs(LENGTH, 0.05), torch.float32)) > 1e-3  # negative control


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_and_shared_sums(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of shared projections by atomic additions; complex modes stay single."""
    fast, slow, inputs, _ = CASES[case]
    with triton_chosen(monkeypatch, deterministic=False):
        assert_close(fast, slow, inputs(LENGTH, 0.05), torch.bfloat16)


@pytest.mark.parametrize("case", CASES)
def test_strided_and_expanded_gradients(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over the batch hands every sequence the same row of memory."""
    fast, slow, inputs, _ = CASES[case]

    def averaged(function: Callable[..., Any], *x: Tensor) -> list[Tensor]:
        result = function(*x)
        outputs = [result] if isinstance(result, Tensor) else result
        return [output.mean(0, keepdim=True).transpose(1, 2) for output in outputs]

    with triton_chosen(monkeypatch):
        assert_close(partial(averaged, fast), partial(averaged, slow), inputs(LENGTH, 0.05))
