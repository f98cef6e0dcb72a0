"""Gated linear attention on a GPU: the kernels of one chunk. See triton_gated.py for the plan of the whole.

Within a chunk the tokens are walked one after the other, with the other side's tokens carried along and decayed as the
state would be: no weight is a ratio of decays, so none overflows and no digits cancel, whatever the decays. A document
start is a log decay of minus infinity. Float32 operands are split in three TF32 products each.

Legend: B batch, T tokens, H heads, K keys and V values of a head, M chunks, Q tokens of one.
"""

import triton
import triton.language as tl

from ..triton_math import load_tile


@triton.jit
def _walk(
    own, other, log_decay, own_stride, other_stride, decay_stride, begin, stop, k, mask_K, grad_QQ,
    Q: tl.constexpr, K_BLOCK: tl.constexpr, LATER: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Weights (own token, other token) of a chunk's pairs and, from their gradient, that of the own tokens.

    LATER: own are queries, others the keys up to them. Otherwise own are keys, others the queries from them on.
    """
    i = tl.arange(0, Q)
    carried_QK = tl.zeros([Q, K_BLOCK], dtype=tl.float32)
    weights_QQ = tl.zeros([Q, Q], dtype=tl.float32)
    grad_own_QK = tl.zeros([Q, K_BLOCK], dtype=tl.float32)
    for step in range(0, Q):
        row = step if LATER else Q - 1 - step
        t = begin + row
        crossed = t if LATER else t + 1
        log_K = tl.load(log_decay + crossed * decay_stride + k, mask=mask_K & (crossed < stop), other=0.0)
        other_K = tl.load(other + t * other_stride + k, mask=mask_K & (t < stop), other=0.0).to(tl.float32)
        own_K = tl.load(own + t * own_stride + k, mask=mask_K & (t < stop), other=0.0).to(tl.float32)
        here_Q1 = (i == row)[:, None]
        carried_QK = tl.where(here_Q1, other_K[None, :], carried_QK * tl.exp(log_K)[None, :])
        weights_QQ = tl.where(here_Q1, tl.sum(carried_QK * own_K[None, :], axis=1)[None, :], weights_QQ)
        if GRADIENT:
            grad_Q = tl.sum(tl.where(here_Q1, grad_QQ, 0.0), axis=0)
            grad_own_QK = tl.where(here_Q1, tl.sum(carried_QK * grad_Q[:, None], axis=0)[None, :], grad_own_QK)
    return weights_QQ, grad_own_QK


@triton.jit
def gated_states_kernel(
    k, v, log_decay, added, whole, length, heads, keys, values, chunks, k_strides, v_strides, decay_strides,
    Q: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, DOT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state at its end, and its decay. REVERSE, with q and dy: to the adjoint at its begin."""
    m, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = m.to(tl.int64) * Q
    t = begin + tl.arange(0, Q)
    n, p = tl.arange(0, K_BLOCK), tl.arange(0, V_BLOCK)
    stop = tl.minimum(begin + Q, length)
    mask_Q, mask_K, mask_V = t < stop, n < keys, p < values
    k += b * k_strides[0] + h.to(tl.int64) * k_strides[2]
    v += b * v_strides[0] + h.to(tl.int64) * v_strides[2]
    log_decay += b * decay_strides[0] + h.to(tl.int64) * decay_strides[2]
    k_KQ = load_tile(k, n, 1, mask_K, t, k_strides[1], mask_Q, tl.float32)
    log_KQ = load_tile(log_decay, n, 1, mask_K, t, decay_strides[1], mask_Q, tl.float32)
    row = (b * chunks + m) * heads + h
    if REVERSE:
        decay_KQ = tl.exp(tl.cumsum(log_KQ, axis=1))
    else:
        tl.store(whole + row * keys + n, tl.exp(tl.sum(log_KQ, axis=1)), mask=mask_K)
        after_KQ = load_tile(log_decay, n, 1, mask_K, t + 1, decay_strides[1], t + 1 < stop, tl.float32)
        decay_KQ = tl.exp(tl.cumsum(after_KQ, axis=1, reverse=True))
    v_QV = load_tile(v, t, v_strides[1], mask_Q, p, 1, mask_V, DOT)
    added_KV = tl.dot((k_KQ * decay_KQ).to(DOT), v_QV, input_precision="tf32x3")
    target = added + row * keys * values + n[:, None] * values + p[None, :]
    tl.store(target, added_KV, mask=mask_K[:, None] & mask_V[None, :])


@triton.jit
def gated_output_kernel(
    q, k, v, log_decay, entering, y, length, heads, keys, values, chunks,
    q_strides, k_strides, v_strides, decay_strides,
    Q: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Outputs of one head of a chunk: weighted values, and what the entering state adds."""
    m, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin = m.to(tl.int64) * Q
    t = begin + tl.arange(0, Q)
    n, p = tl.arange(0, K_BLOCK), tl.arange(0, V_BLOCK)
    stop = tl.minimum(begin + Q, length)
    mask_Q, mask_K, mask_V = t < stop, n < keys, p < values
    q += b * q_strides[0] + h * q_strides[2]
    k += b * k_strides[0] + h * k_strides[2]
    v += b * v_strides[0] + h * v_strides[2]
    log_decay += b * decay_strides[0] + h * decay_strides[2]
    nothing_QQ = tl.zeros([Q, Q], dtype=tl.float32)
    weights_QQ, _ = _walk(
        q, k, log_decay, q_strides[1], k_strides[1], decay_strides[1], begin, stop, n, mask_K, nothing_QQ,
        Q, K_BLOCK, True, False,
    )  # fmt: skip
    v_QV = load_tile(v, t, v_strides[1], mask_Q, p, 1, mask_V, DOT)
    y_QV = tl.dot(weights_QQ.to(DOT), v_QV, input_precision="tf32x3")
    log_QK = load_tile(log_decay, t, decay_strides[1], mask_Q, n, 1, mask_K, tl.float32)
    q_QK = load_tile(q, t, q_strides[1], mask_Q, n, 1, mask_K, tl.float32) * tl.exp(tl.cumsum(log_QK, axis=0))
    entering += ((b * chunks + m) * heads + h) * keys * values
    state_KV = load_tile(entering, n, values, mask_K, p, 1, mask_V, DOT)
    y_QV += tl.dot(q_QK.to(DOT), state_KV, input_precision="tf32x3")
    target = y + ((b * length + t) * heads + h)[:, None] * values + p[None, :]
    tl.store(target, y_QV.to(y.dtype.element_ty), mask=mask_Q[:, None] & mask_V[None, :])


@triton.jit
def gated_gradient_kernel(
    q, k, v, log_decay, grad_y, entering, final, adjoints, grad_q, grad_k, grad_v, grad_log,
    length, heads, keys, values, chunks, q_strides, k_strides, v_strides, decay_strides, grad_strides,
    Q: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """All gradients of one head of a chunk, from the states that enter it and the adjoints of those that leave it.

    A log decay's gradient is what crosses its token: sum_v of state times adjoint. At the chunk's end that is known;
    from there to the left every query adds q dq and every key takes k dk away.
    """
    m, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin = m.to(tl.int64) * Q
    t = begin + tl.arange(0, Q)
    n, p = tl.arange(0, K_BLOCK), tl.arange(0, V_BLOCK)
    stop = tl.minimum(begin + Q, length)
    mask_Q, mask_K, mask_V = t < stop, n < keys, p < values
    mask_QK, mask_KV = mask_Q[:, None] & mask_K[None, :], mask_K[:, None] & mask_V[None, :]
    q += b * q_strides[0] + h * q_strides[2]
    k += b * k_strides[0] + h * k_strides[2]
    v += b * v_strides[0] + h * v_strides[2]
    log_decay += b * decay_strides[0] + h * decay_strides[2]
    grad_y += b * grad_strides[0] + h * grad_strides[2]
    matrix = ((b * chunks + m) * heads + h) * keys * values
    at_QK = ((b * length + t) * heads + h)[:, None] * keys + n[None, :]

    v_QV = load_tile(v, t, v_strides[1], mask_Q, p, 1, mask_V, DOT)
    v_VQ = load_tile(v, p, 1, mask_V, t, v_strides[1], mask_Q, DOT)
    dy_QV = load_tile(grad_y, t, grad_strides[1], mask_Q, p, 1, mask_V, DOT)
    dy_VQ = load_tile(grad_y, p, 1, mask_V, t, grad_strides[1], mask_Q, DOT)
    grad_QQ = tl.dot(dy_QV, v_VQ, input_precision="tf32x3")
    _, grad_q_QK = _walk(
        q, k, log_decay, q_strides[1], k_strides[1], decay_strides[1], begin, stop, n, mask_K, grad_QQ,
        Q, K_BLOCK, True, True,
    )  # fmt: skip
    state_VK = load_tile(entering + matrix, p, 1, mask_V, n, values, mask_K, DOT)
    log_QK = load_tile(log_decay, t, decay_strides[1], mask_Q, n, 1, mask_K, tl.float32)
    since_QK = tl.exp(tl.cumsum(log_QK, axis=0))
    grad_q_QK += tl.dot(dy_QV, state_VK, input_precision="tf32x3") * since_QK
    tl.store(grad_q + at_QK, grad_q_QK.to(grad_q.dtype.element_ty), mask=mask_QK)
    balance_QK = grad_q_QK * load_tile(q, t, q_strides[1], mask_Q, n, 1, mask_K, tl.float32)

    grad_QQ = tl.dot(v_QV, dy_VQ, input_precision="tf32x3")
    weights_QQ, grad_k_QK = _walk(
        k, q, log_decay, k_strides[1], q_strides[1], decay_strides[1], begin, stop, n, mask_K, grad_QQ,
        Q, K_BLOCK, False, True,
    )  # fmt: skip
    after_QK = load_tile(log_decay, t + 1, decay_strides[1], t + 1 < stop, n, 1, mask_K, tl.float32)
    until_QK = tl.exp(tl.cumsum(after_QK, axis=0, reverse=True))
    adjoint_VK = load_tile(adjoints + matrix, p, 1, mask_V, n, values, mask_K, DOT)
    grad_k_QK += tl.dot(v_QV, adjoint_VK, input_precision="tf32x3") * until_QK
    tl.store(grad_k + at_QK, grad_k_QK.to(grad_k.dtype.element_ty), mask=mask_QK)
    k_QK = load_tile(k, t, k_strides[1], mask_Q, n, 1, mask_K, tl.float32)
    balance_QK -= grad_k_QK * k_QK

    adjoint_KV = load_tile(adjoints + matrix, n, values, mask_K, p, 1, mask_V, DOT)
    grad_v_QV = tl.dot(weights_QQ.to(DOT), dy_QV, input_precision="tf32x3")
    grad_v_QV += tl.dot((k_QK * until_QK).to(DOT), adjoint_KV, input_precision="tf32x3")
    at_QV = ((b * length + t) * heads + h)[:, None] * values + p[None, :]
    tl.store(grad_v + at_QV, grad_v_QV.to(grad_v.dtype.element_ty), mask=mask_Q[:, None] & mask_V[None, :])

    at_KV = n[:, None] * values + p[None, :]
    leaving = entering + matrix + heads * keys * values
    leaving_KV = tl.load(leaving + at_KV, mask=mask_KV & (m + 1 < chunks), other=0.0)
    leaving_KV += tl.load(final + (b * heads + h) * keys * values + at_KV, mask=mask_KV & (m + 1 == chunks), other=0.0)
    exact_KV = tl.load(adjoints + matrix + at_KV, mask=mask_KV, other=0.0)
    grad_log_QK = tl.cumsum(balance_QK, axis=0, reverse=True) + tl.sum(leaving_KV * exact_KV, axis=1)[None, :]
    tl.store(grad_log + at_QK, grad_log_QK.to(grad_log.dtype.element_ty), mask=mask_QK)
