"""The recurrence of RWKV-7: a matrix state that decays by key and is corrected along one direction at every token.

Origin: B. Peng and others, arXiv 2503.14456; github.com/BlinkDL/RWKV-LM (RWKV-v7). With a = -kappa and b = kappa times
a learning rate the state unlearns what it holds for a key before it stores the new value. Legend: B batch, T tokens,
H heads, N head width.
"""

import torch
from torch import Tensor

from .. import triton_support
from ..arguments import compute_dtype, expect_shape
from ..documents import checked_starts
from ..segments import segment_tokens, walk
from .portable import CHUNK, PAIRWISE_CHUNK, is_moderate, segment
from .stages import Plan, Wkv7Stages, portable_stages

__all__ = ["Wkv7Stages", "begin_wkv7", "wkv7"]


def wkv7(
    r_BTHN: Tensor,
    log_w_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHN: Tensor,
    a_BTHN: Tensor,
    b_BTHN: Tensor,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T and y_t = S_t r_t. Returns (y_BTHN, final_state_BHNN).

    Args:
        r_BTHN: what reads the state; float32, float64, bfloat16 or float16. y has its dtype.
        log_w_BTHN: logarithm of the decay of each key, not above zero (RWKV-7: above -0.61).
        k_BTHN, v_BTHN: keys and values that are stored.
        a_BTHN, b_BTHN: directions of the correction: what the state answers to a is added along b.
        initial_state: (B, H, N, N), values by keys, before the first token; zeros by default. Differentiable.
        document_starts: boolean (B or 1, T); at a True token the state before it is forgotten.

    Computes in float32, or in float64 if any argument is. Memory is that of the arguments, a few chunks, and one state
    per segment, which on Triton is 32 tokens. Without Triton, decays beyond exp(-60) within 32 tokens are handled, but
    slower.

    Raises:
        ValueError: if shapes do not agree.
    """
    batch, length, heads, width = r_BTHN.shape
    sequences = (r_BTHN, log_w_BTHN, k_BTHN, v_BTHN, a_BTHN, b_BTHN)
    names = ("r_BTHN", "log_w_BTHN", "k_BTHN", "v_BTHN", "a_BTHN", "b_BTHN")
    for name, tensor in zip(names, sequences, strict=True):
        expect_shape("wkv7", name, tensor, (batch, length, heads, width))
    expect_shape("wkv7", "initial_state", initial_state, (batch, heads, width, width))
    starts_BT = checked_starts(document_starts, batch, length)
    dtype = compute_dtype(*sequences, initial_state)
    if initial_state is None:
        initial_state = torch.zeros(batch, heads, width, width, dtype=dtype, device=r_BTHN.device)
    if triton_support.takes(*sequences, initial_state):
        from .triton_wkv7 import WIDEST, TritonWkv7

        if width <= WIDEST:
            return TritonWkv7.apply(*sequences, initial_state.to(dtype), starts_BT)
    moderate = is_moderate(log_w_BTHN, CHUNK)
    chunk = CHUNK if moderate else PAIRWISE_CHUNK

    def one_segment(state, cut, parameters, starts):
        return segment(chunk, moderate, state, cut, starts)

    return walk(
        one_segment,
        initial_state.to(dtype),
        sequences,
        segment=_segment(chunk, batch * heads * width, width, r_BTHN.device),
        starts_BT=starts_BT,
    )


def begin_wkv7(
    log_w_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHN: Tensor,
    a_BTHN: Tensor,
    b_BTHN: Tensor,
    *,
    document_starts: Tensor | None = None,
) -> Wkv7Stages:
    """`wkv7` of a part of a sequence, in stages: what leaves is known before the outputs are, and before r is.

    Send `leaving` and `transition` on their way, `compute_local(r)`, await the state that enters, `finish` with it. The
    backward pass runs the stages in reverse: the gradient of the entering state is ready first, those of `leaving` and
    `transition` are needed last.

    Arguments and errors are those of `wkv7`, r's those of `Wkv7Stages.compute_local`. Between the stages, and for the
    backward pass, there are beside the arguments two matrices for each chunk of 32 tokens (without Triton 8, if decays
    are strong), the outputs, and what each token asks the state that enters; also, on Triton, two triangular matrices
    of each chunk, otherwise two vectors a token. On Triton states pass from chunk to chunk inside a kernel, and nothing
    waits for the GPU; where heads are wider than a program holds, PyTorch does it there, chunk by chunk.
    """
    batch, length, heads, width = k_BTHN.shape
    sequences = (log_w_BTHN, k_BTHN, v_BTHN, a_BTHN, b_BTHN)
    for name, tensor in zip(("log_w_BTHN", "k_BTHN", "v_BTHN", "a_BTHN", "b_BTHN"), sequences, strict=True):
        expect_shape("wkv7", name, tensor, (batch, length, heads, width))
    starts_BT = checked_starts(document_starts, batch, length)
    if triton_support.takes(*sequences):
        from .triton_wkv7 import WIDEST

        if width <= WIDEST:
            from .triton_stages import triton_stages

            return triton_stages(sequences, starts_BT)
    moderate = is_moderate(log_w_BTHN, CHUNK)
    chunk = min(CHUNK if moderate else PAIRWISE_CHUNK, max(length, 1))
    step = _segment(chunk, batch * heads * width, width, k_BTHN.device) // chunk
    return portable_stages(Plan(length, chunk, step, moderate, compute_dtype(*sequences), starts_BT), sequences)


def _segment(chunk: int, elements: int, width: int, device: torch.device) -> int:
    """A chunk's transition is as large as N / Q of its tokens."""
    return segment_tokens(chunk, elements * max(1, width // chunk), device)
