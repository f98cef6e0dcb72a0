"""The recurrence of RWKV-4: a weighted mean of all earlier values, with a constant decay per channel.

Origin: B. Peng and others, arXiv 2305.13048; github.com/BlinkDL/RWKV-LM (RWKV-v4neo). Numerator and denominator share
an exponent, so that keys of any size neither overflow nor vanish. Legend: B batch, T tokens, D channels.
"""

import torch
from torch import Tensor

from .. import triton_support
from ..arguments import compute_dtype, expect_shape
from ..documents import checked_starts
from ..segments import segment_tokens, walk
from . import compiled
from .portable import EMPTY, Wkv4, summary_segment

__all__ = ["EMPTY", "wkv4", "wkv4_state"]


def wkv4(
    k_BTD: Tensor,
    v_BTD: Tensor,
    log_decay_D: Tensor,
    bonus_D: Tensor,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = (sum_{i<t} e^{(t-1-i) log_decay + k_i} v_i + e^{bonus + k_t} v_t) / (the same without v).

    Args:
        k_BTD, v_BTD: logarithmic weights and values; float32, float64, bfloat16 or float16. y has the dtype of v.
        log_decay_D: logarithm of one token's decay, not above zero: -exp(time_decay). bonus_D: time_first.
        initial_state: (B, D, 3) = (a, b, p), numerator a e^p and denominator b e^p of the tokens before; by default
            nothing, (0, 0, -1e38). Differentiable.
        document_starts: boolean (B or 1, T); at a True token everything before it is forgotten.

    Returns (y_BTD, final_state_BD3). Computes in float32, or in float64 if any argument is. Memory is that of the
    arguments, a few segments of them, and one state per segment.

    Raises:
        ValueError: if shapes do not agree.
    """
    batch, length, channels = k_BTD.shape
    _check("wkv4", k_BTD, v_BTD, log_decay_D)
    expect_shape("wkv4", "bonus_D", bonus_D, (channels,))
    expect_shape("wkv4", "initial_state", initial_state, (batch, channels, 3))
    starts_BT = checked_starts(document_starts, batch, length)
    dtype = compute_dtype(k_BTD, v_BTD, log_decay_D, bonus_D, initial_state)
    if initial_state is None:
        initial_state = _empty(k_BTD, dtype)
    function: type[torch.autograd.Function] = Wkv4
    if triton_support.takes(k_BTD, v_BTD, log_decay_D, bonus_D, initial_state):
        from .triton_wkv4 import TritonWkv4 as function
    elif compiled.takes(k_BTD, v_BTD, dtype):
        function = compiled.CompiledWkv4
    return function.apply(
        k_BTD, v_BTD, log_decay_D.to(dtype), bonus_D.to(dtype), initial_state.to(dtype), starts_BT
    )  # fmt: skip


def wkv4_state(k_BTD: Tensor, v_BTD: Tensor, log_decay_D: Tensor, *, document_starts: Tensor | None = None) -> Tensor:
    """The state (B, D, 3) after these tokens when nothing came before: what the next part of a split sequence needs.

    Outputs are ratios, so an entering state cannot be added to them afterwards; a split sequence makes this pass first
    and runs `wkv4` from the true state.

    Raises:
        ValueError: if shapes do not agree.
    """
    batch, length, channels = k_BTD.shape
    _check("wkv4 state", k_BTD, v_BTD, log_decay_D)
    starts_BT = checked_starts(document_starts, batch, length)
    dtype = compute_dtype(k_BTD, v_BTD, log_decay_D)
    if triton_support.takes(k_BTD, v_BTD, log_decay_D):
        from .triton_state import TritonWkv4State

        return TritonWkv4State.apply(k_BTD, v_BTD, log_decay_D.to(dtype), starts_BT)
    nothing = _empty(k_BTD, dtype)
    if compiled.takes(k_BTD, v_BTD, dtype):
        return compiled.CompiledWkv4.apply(k_BTD, v_BTD, log_decay_D.to(dtype), None, nothing, starts_BT)[1]
    return walk(
        summary_segment,
        nothing,
        (k_BTD, v_BTD),
        (log_decay_D.to(dtype),),
        segment=segment_tokens(64, 2 * batch * channels, k_BTD.device),
        starts_BT=starts_BT,
    )[1]


def _empty(k_BTD: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, D, 3): states that have seen nothing. Made where they are needed: a copy from the CPU would be waited for."""
    numbers = [torch.full((), number, dtype=dtype, device=k_BTD.device) for number in EMPTY]
    return torch.stack(numbers).expand(k_BTD.shape[0], k_BTD.shape[2], 3)


def _check(operation: str, k_BTD: Tensor, v_BTD: Tensor, log_decay_D: Tensor) -> None:
    expect_shape(operation, "v_BTD", v_BTD, tuple(k_BTD.shape))
    expect_shape(operation, "log_decay_D", log_decay_D, (k_BTD.shape[-1],))
