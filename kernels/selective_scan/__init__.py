"""Selective scan (Mamba-1): the state-space recurrence whose step sizes and projections depend on the input.

Origin: A. Gu and T. Dao, arXiv 2312.00752; github.com/state-spaces/mamba (selective_scan_interface.py). Unlike the
original the scan takes an initial state, and gradients flow through the initial and the final state, so that a sequence
can be cut anywhere. Legend: B batch, T tokens, D channels, N states per channel.
"""

import torch
from torch import Tensor

from .. import triton_support
from ..documents import checked_starts
from . import compiled
from .portable import SelectiveScan
from .readout import Readout

__all__ = ["selective_scan", "selective_scan_readout"]


def _state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """States and decays are float32, or float64 as soon as one argument is."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"selective scan: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def selective_scan(
    u_BTD: Tensor,
    delta_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    *,
    D: Tensor | None = None,
    z_BTD: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(s_t A) h_{t-1} + s_t u_t B_t and y_t = (C_t h_t + D u_t) silu(z_t). Returns (y_BTD, final_state_BDN).

    Args:
        u_BTD: inputs; float32, float64, bfloat16 or float16. y has its dtype.
        delta_BTD: step sizes s_t, before `delta_bias` (D,) and, if `delta_softplus`, the softplus.
        A_DN: rates, negative for a state that decays.
        B_BTN, C_BTN: input and output projections of each token, shared by the channels.
        D: (D,) direct term. z_BTD: gate.
        initial_state: (B, D, N) state before the first token; zeros by default. Differentiable.
        document_starts: boolean (B or 1, T); at a True token the state before it is forgotten (the decay is zero).

    Computes in float32, or in float64 if any argument is; the final state has that dtype and is differentiable. Memory
    is that of the arguments and one state per segment of a few hundred tokens: never length x channels x states.

    Raises:
        ValueError: if shapes do not agree.
    """
    batch, length, channels = u_BTD.shape
    states = A_DN.shape[-1]
    _expect("delta_BTD", delta_BTD, (batch, length, channels))
    _expect("A_DN", A_DN, (channels, states))
    _expect("B_BTN", B_BTN, (batch, length, states))
    _expect("C_BTN", C_BTN, (batch, length, states))
    _expect("D", D, (channels,))
    _expect("z_BTD", z_BTD, (batch, length, channels))
    _expect("delta_bias", delta_bias, (channels,))
    _expect("initial_state", initial_state, (batch, channels, states))
    starts_BT = checked_starts(document_starts, batch, length)
    dtype = _state_dtype(u_BTD, delta_BTD, A_DN, B_BTN, C_BTN, D, z_BTD, delta_bias, initial_state)
    if initial_state is None:
        initial_state = torch.zeros(batch, channels, states, dtype=dtype, device=u_BTD.device)
    function: type[torch.autograd.Function] = SelectiveScan
    if triton_support.takes(u_BTD, delta_BTD, A_DN, B_BTN, C_BTN, D, z_BTD, delta_bias, initial_state):
        from .triton_scan import TritonSelectiveScan as function
    elif compiled.takes(u_BTD, delta_BTD, A_DN, B_BTN, C_BTN, z_BTD, dtype):
        function = compiled.CompiledSelectiveScan
    return function.apply(
        u_BTD,
        delta_BTD,
        A_DN.to(dtype),
        B_BTN,
        C_BTN,
        None if D is None else D.to(dtype),
        z_BTD,
        None if delta_bias is None else delta_bias.to(dtype),
        initial_state.to(dtype),
        starts_BT,
        delta_softplus,
    )


def selective_scan_readout(
    state_BDN: Tensor,
    delta_BTD: Tensor,
    A_DN: Tensor,
    C_BTN: Tensor,
    *,
    document_starts: Tensor | None = None,
) -> Tensor:
    """What a state that enters before the first token adds to the outputs: y_t = C_t exp(A sum_{r<=t} s_r) state.

    By linearity, a scan from zero plus this is the scan from `state_BDN` (before direct term and gate). The work stops,
    for each channel and state apart, where the decay has left less of the state than the dtype can show beside it, and
    at a sequence's first document start; with fast decays it is a small part of the scan.

    Args:
        state_BDN: the state that enters. delta_BTD: step sizes s_t, already positive (after bias and softplus).
        A_DN, C_BTN, document_starts: as in `selective_scan`.

    Returns y_BTD in the dtype of `delta_BTD`; gradients flow to the state, the step sizes, A and C.

    Raises:
        ValueError: if shapes do not agree.
    """
    batch, length, channels = delta_BTD.shape
    states = A_DN.shape[-1]
    _expect("state_BDN", state_BDN, (batch, channels, states))
    _expect("A_DN", A_DN, (channels, states))
    _expect("C_BTN", C_BTN, (batch, length, states))
    starts_BT = checked_starts(document_starts, batch, length)
    dtype = _state_dtype(state_BDN, delta_BTD, A_DN, C_BTN)
    function: type[torch.autograd.Function] = Readout
    if triton_support.takes(state_BDN, delta_BTD, A_DN, C_BTN):
        from .triton_readout import TritonReadout as function
    return function.apply(state_BDN.to(dtype), delta_BTD, A_DN.to(dtype), C_BTN, starts_BT)
