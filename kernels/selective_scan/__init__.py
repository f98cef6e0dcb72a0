"""Selective scan (Mamba-1): the state-space recurrence whose step sizes and projections depend on the input.

Origin: A. Gu and T. Dao, arXiv 2312.00752; github.com/state-spaces/mamba (selective_scan_interface.py). Unlike the
original the scan takes an initial state, and gradients flow through the initial and the final state, so that a sequence
can be cut anywhere. Legend: B batch, T tokens, D channels, N states per channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..arguments import compute_dtype, expect_shape
from ..documents import checked_starts
from . import compiled
from .portable import SelectiveScan
from .readout import Enter
from .stages import Entering, ScanStages

__all__ = ["ScanStages", "begin_selective_scan", "selective_scan"]


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
    scan = _Scan.choose(
        u_BTD, delta_BTD, A_DN, B_BTN, C_BTN, D, z_BTD, delta_bias, delta_softplus, initial_state, document_starts
    )
    return scan.function.apply(*scan.arguments)


def begin_selective_scan(
    u_BTD: Tensor,
    delta_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    *,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    document_starts: Tensor | None = None,
) -> ScanStages:
    """`selective_scan` of a part of a sequence, before it is known what state enters that part. See `ScanStages`.

    The outputs from zero are computed here; `leaving` and `steps` say what the part does to any state that enters.
    `finish(entering)` gives the outputs. Its work ends, for each channel and state apart, where the decay has left less
    of the state than the dtype can show beside an output, and at a sequence's first document start.

    Args as in `selective_scan`, but no gate and no initial state: both belong to the entering state.

    Raises:
        ValueError: if shapes do not agree.
    """
    scan = _Scan.choose(
        u_BTD, delta_BTD, A_DN, B_BTN, C_BTN, D, None, delta_bias, delta_softplus, None, document_starts
    )
    entering = Entering()
    y_BTD, leaving_BDN = scan.function.apply(*scan.arguments, entering)
    _, delta_BTD, A_DN, _, C_BTN, _, _, bias, _, starts_BT, softplus = scan.arguments
    return ScanStages(scan.enter, entering, y_BTD, leaving_BDN, delta_BTD, A_DN, C_BTN, bias, starts_BT, softplus)


@dataclass
class _Scan:
    """Which code runs, both stages of it, and the first one's arguments."""

    function: type[torch.autograd.Function]
    enter: type[torch.autograd.Function]
    arguments: tuple[Any, ...]

    @staticmethod
    def choose(
        u_BTD: Tensor,
        delta_BTD: Tensor,
        A_DN: Tensor,
        B_BTN: Tensor,
        C_BTN: Tensor,
        D: Tensor | None,
        z_BTD: Tensor | None,
        delta_bias: Tensor | None,
        softplus: bool,
        initial_BDN: Tensor | None,
        document_starts: Tensor | None,
    ) -> _Scan:
        batch, length, channels = u_BTD.shape
        states = A_DN.shape[-1]
        expect_shape("selective scan", "delta_BTD", delta_BTD, (batch, length, channels))
        expect_shape("selective scan", "A_DN", A_DN, (channels, states))
        expect_shape("selective scan", "B_BTN", B_BTN, (batch, length, states))
        expect_shape("selective scan", "C_BTN", C_BTN, (batch, length, states))
        expect_shape("selective scan", "D", D, (channels,))
        expect_shape("selective scan", "z_BTD", z_BTD, (batch, length, channels))
        expect_shape("selective scan", "delta_bias", delta_bias, (channels,))
        expect_shape("selective scan", "initial_state", initial_BDN, (batch, channels, states))
        starts_BT = checked_starts(document_starts, batch, length)
        tensors = u_BTD, delta_BTD, A_DN, B_BTN, C_BTN, D, z_BTD, delta_bias, initial_BDN
        dtype = compute_dtype(*tensors)
        function: type[torch.autograd.Function] = SelectiveScan
        enter: type[torch.autograd.Function] = Enter
        if triton_support.takes(*(x for x in tensors if x is not None)):
            from .triton_readout import TritonEnter as enter
            from .triton_scan import TritonSelectiveScan as function
        elif compiled.takes(u_BTD, delta_BTD, A_DN, B_BTN, C_BTN, z_BTD, dtype):
            function, enter = compiled.CompiledSelectiveScan, compiled.CompiledEnter
        if initial_BDN is None:
            initial_BDN = torch.zeros(batch, channels, states, dtype=dtype, device=u_BTD.device)
        D, delta_bias = (None if x is None else x.to(dtype) for x in (D, delta_bias))
        arguments = (
            *(u_BTD, delta_BTD, A_DN.to(dtype), B_BTN, C_BTN),
            *(D, z_BTD, delta_bias, initial_BDN.to(dtype), starts_BT, softplus),
        )
        return _Scan(function, enter, arguments)
