"""RWKV-7's recurrence on a GPU: the forward kernels of chunks, and the walk from chunk to chunk. Plan: triton_wkv7.py.

The equations are portable.py's, with the matrices T = (I - A_ab)^-1 and W = T A_ak of a chunk in the place of its
answers: X = T A and U' = W V are one product away. Weights between two tokens of a chunk come from walking through its
tokens with one side carried along and decayed as the state would be: none is a ratio of decays, so nothing overflows
whatever the decays, and nobody has to look at them first. A document start is a log decay of minus infinity at a token
whose a is zero.

No product is transposed after it was computed (Triton 3.4 to 3.7.0 miscompile that on Hopper): operands are exchanged.
Everything is float32, split in three TF32 products each, which keeps float32 accuracy on tensor cores.

Kernels work on some chunks of a sequence, from the number `first` on; what belongs to chunks begins with that one. They
are compiled once for all pieces of a sequence.

Legend: B batch, T tokens, H heads, N head width (keys), V values: rows of a state, M chunks, Q tokens of one.
"""

import triton
import triton.language as tl

from ..triton_math import load_tile


@triton.jit
def product(x, y):
    return tl.dot(x, y, input_precision="tf32x3")


@triton.jit
def head_of(x, strides, b, h):
    return x + b * strides[0] + h * strides[2]


@triton.jit
def log_before(log_w, stride, begin, t, stop, n, mask_N):
    """(Q, N): log decays of the chunk's tokens before t, summed."""
    return tl.cumsum(load_tile(log_w, t - 1, stride, (t > begin) & (t < stop), n, 1, mask_N, tl.float32), axis=0)


@triton.jit
def log_since(log_w, stride, t, stop, n, mask_N):
    """(Q, N): up to and with t."""
    return tl.cumsum(load_tile(log_w, t, stride, t < stop, n, 1, mask_N, tl.float32), axis=0)


@triton.jit
def log_after(log_w, stride, t, stop, n, mask_N):
    """(Q, N): after t, to the chunk's end."""
    after_QN = load_tile(log_w, t + 1, stride, t + 1 < stop, n, 1, mask_N, tl.float32)
    return tl.cumsum(after_QN, axis=0, reverse=True)


@triton.jit
def load_before_NQ(x, stride, log_w, w_stride, begin, t, stop, n, mask_N):
    """(N, Q): x as it meets the state that enters the chunk; tokens answer with what was before them."""
    log_NQ = load_tile(log_w, n, 1, mask_N, t - 1, w_stride, (t > begin) & (t < stop), tl.float32)
    return load_tile(x, n, 1, mask_N, t, stride, t < stop, tl.float32) * tl.exp(tl.cumsum(log_NQ, axis=1))


@triton.jit
def write(
    x, log_w, b, k, x_stride, w_stride, b_stride, k_stride, begin, stop, n, mask_N, grad_b_QQ, grad_k_QQ,
    Q: tl.constexpr, N_BLOCK: tl.constexpr, BEFORE: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Weights (t, s) of what b and k store at s in what x reads at t, and from the weights' gradients those of b and k.

    BEFORE: x reads before its own token decays and stores (a); otherwise after it (r). The walk is from the last token
    to the first with x carried along, so that a sum over keys already lies where its column of weights is kept.
    """
    i = tl.arange(0, Q)
    carried_QN = tl.zeros([Q, N_BLOCK], dtype=tl.float32)
    grad_b_QN = tl.zeros([Q, N_BLOCK], dtype=tl.float32)
    grad_k_QN = tl.zeros([Q, N_BLOCK], dtype=tl.float32)
    with_b_QQ = tl.zeros([Q, Q], dtype=tl.float32)
    with_k_QQ = tl.zeros([Q, Q], dtype=tl.float32)
    tokens = (stop - begin).to(tl.int32)
    for back in range(0, tokens):
        step = tokens - 1 - back
        s = begin + step
        here_Q1, here_1Q = (i == step)[:, None], (i == step)[None, :]
        w_N = tl.exp(tl.load(log_w + s * w_stride + n, mask=mask_N, other=0.0).to(tl.float32))
        x_N = tl.load(x + s * x_stride + n, mask=mask_N, other=0.0).to(tl.float32)
        b_N = tl.load(b + s * b_stride + n, mask=mask_N, other=0.0).to(tl.float32)
        k_N = tl.load(k + s * k_stride + n, mask=mask_N, other=0.0).to(tl.float32)
        if not BEFORE:
            carried_QN = tl.where(here_Q1, x_N[None, :], carried_QN)
        with_b_QQ = tl.where(here_1Q, tl.sum(carried_QN * b_N[None, :], axis=1)[:, None], with_b_QQ)
        with_k_QQ = tl.where(here_1Q, tl.sum(carried_QN * k_N[None, :], axis=1)[:, None], with_k_QQ)
        if GRADIENT:
            grad_b_Q = tl.sum(tl.where(here_1Q, grad_b_QQ, 0.0), axis=1)
            grad_k_Q = tl.sum(tl.where(here_1Q, grad_k_QQ, 0.0), axis=1)
            grad_b_QN = tl.where(here_Q1, tl.sum(carried_QN * grad_b_Q[:, None], axis=0)[None, :], grad_b_QN)
            grad_k_QN = tl.where(here_Q1, tl.sum(carried_QN * grad_k_Q[:, None], axis=0)[None, :], grad_k_QN)
        carried_QN = carried_QN * w_N[None, :]
        if BEFORE:
            carried_QN = tl.where(here_Q1, x_N[None, :], carried_QN)
    return with_b_QQ, with_k_QQ, grad_b_QN, grad_k_QN


@triton.jit(do_not_specialize=["first"])
def systems_kernel(
    log_w, k, a, b, inner, first, length, heads, width, w_strides, k_strides, a_strides, b_strides,
    Q: tl.constexpr, N_BLOCK: tl.constexpr,
):  # fmt: skip
    """T and W of a chunk, by forward substitution."""
    own, h, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i, n = tl.arange(0, Q), tl.arange(0, N_BLOCK)
    mask_N = n < width
    begin = (first + own) * Q
    stop = tl.minimum(begin + Q, length)
    log_w, k = head_of(log_w, w_strides, batch, h), head_of(k, k_strides, batch, h)
    a, b = head_of(a, a_strides, batch, h), head_of(b, b_strides, batch, h)
    nothing_QQ = tl.zeros([Q, Q], dtype=tl.float32)
    with_b_QQ, with_k_QQ, _, _ = write(
        a, log_w, b, k, a_strides[1], w_strides[1], b_strides[1], k_strides[1], begin, stop, n, mask_N,
        nothing_QQ, nothing_QQ, Q, N_BLOCK, True, False,
    )  # fmt: skip
    inverse_QQ = tl.where(i[:, None] == i[None, :], 1.0, nothing_QQ)
    for step in range(0, (stop - begin).to(tl.int32)):
        column_Q = tl.sum(tl.where((i == step)[None, :], with_b_QQ, 0.0), axis=1)
        row_Q = tl.sum(tl.where((i == step)[:, None], inverse_QQ, 0.0), axis=0)
        inverse_QQ += column_Q[:, None] * row_Q[None, :]
    inner += ((own * tl.num_programs(2) + batch) * heads + h) * 2 * Q * Q + i[:, None] * Q + i[None, :]
    tl.store(inner, inverse_QQ)
    tl.store(inner + Q * Q, product(inverse_QQ, with_k_QQ))


@triton.jit(do_not_specialize=["first"])
def transition_kernel(
    log_w, k, v, a, b, inner, transition, added, first, length, heads, width,
    w_strides, k_strides, v_strides, a_strides, b_strides, Q: tl.constexpr, N_BLOCK: tl.constexpr,
):  # fmt: skip
    """P and, if asked for, C of a chunk: S' = S P + C."""
    own, h, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i, n = tl.arange(0, Q), tl.arange(0, N_BLOCK)
    mask_N, mask_NN = n < width, (n < width)[:, None] & (n < width)[None, :]
    begin = (first + own) * Q
    stop = tl.minimum(begin + Q, length)
    t = begin + i
    log_w = head_of(log_w, w_strides, batch, h)
    row = (own * tl.num_programs(2) + batch) * heads + h
    inner += row * 2 * Q * Q
    at_NN = row * width * width + n[:, None] * width + n[None, :]
    until_QN = tl.exp(log_after(log_w, w_strides[1], t, stop, n, mask_N))
    b_QN = load_tile(head_of(b, b_strides, batch, h), t, b_strides[1], t < stop, n, 1, mask_N, tl.float32) * until_QN
    inverse_T = load_tile(inner, i, 1, i < Q, i, Q, i < Q, tl.float32)
    a_NQ = load_before_NQ(head_of(a, a_strides, batch, h), a_strides[1], log_w, w_strides[1], begin, t, stop, n, mask_N)
    turned_NN = product(a_NQ, product(inverse_T, b_QN))
    log_QN = load_tile(log_w, t, w_strides[1], t < stop, n, 1, mask_N, tl.float32)
    turned_NN += tl.where(n[:, None] == n[None, :], tl.exp(tl.sum(log_QN, axis=0))[None, :], 0.0)
    tl.store(transition + at_NN, turned_NN, mask=mask_NN)
    if added is not None:
        stored_T = load_tile(inner + Q * Q, i, 1, i < Q, i, Q, i < Q, tl.float32)
        k_QN = load_tile(head_of(k, k_strides, batch, h), t, k_strides[1], t < stop, n, 1, mask_N, tl.float32)
        kept_QN = product(stored_T, b_QN) + k_QN * until_QN
        v_NQ = load_tile(head_of(v, v_strides, batch, h), n, 1, mask_N, t, v_strides[1], t < stop, tl.float32)
        tl.store(added + at_NN, product(v_NQ, kept_QN), mask=mask_NN)


@triton.jit(do_not_specialize=["count"])
def pass_kernel(
    transition, added, passing, adjoint, count, heads, values, width,
    V_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Some rows of the states before each of `count` chunks, and after the last: E' = E P + [C; 0].

    REVERSE, with what outputs add to the adjoints of the states before the chunks in `passing`: that of the state after
    each chunk, in place, and in `adjoint` the outermost one; G = G' P^T + D.
    """
    h, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p, n = tl.program_id(0).to(tl.int64) * V_BLOCK + tl.arange(0, V_BLOCK), tl.arange(0, N_BLOCK)
    mask_N, mask_VN = n < width, (p < values)[:, None] & (n < width)[None, :]
    at_VN = p[:, None] * width + n[None, :]
    head, every = batch * heads + h, tl.num_programs(2).to(tl.int64) * heads
    outermost = adjoint + head * values * width if REVERSE else passing + head * values * width
    state_VN = tl.load(outermost + at_VN, mask=mask_VN, other=0.0)
    for step in range(0, count):
        row = (count - 1 - step) if REVERSE else step
        matrix = (row * every + head) * width * width
        if REVERSE:
            here = passing + (row * every + head) * values * width + at_VN
            outputs_VN = tl.load(here, mask=mask_VN, other=0.0)
            tl.debug_barrier()  # every thread has read before another writes in its place
            tl.store(here, state_VN, mask=mask_VN)
            turned_NN = load_tile(transition + matrix, n, 1, mask_N, n, width, mask_N, tl.float32)
            state_VN = product(state_VN, turned_NN) + outputs_VN
        else:
            turned_NN = load_tile(transition + matrix, n, width, mask_N, n, 1, mask_N, tl.float32)
            added_VN = tl.load(added + matrix + at_VN, mask=mask_VN & (p < width)[:, None], other=0.0)
            state_VN = product(state_VN, turned_NN) + added_VN
            tl.store(passing + ((row + 1) * every + head) * values * width + at_VN, state_VN, mask=mask_VN)
    if REVERSE:
        tl.store(outermost + at_VN, state_VN, mask=mask_VN)


@triton.jit(do_not_specialize=["first"])
def output_kernel(
    r, log_w, k, v, a, b, inner, passing, y, first, length, heads, values, width,
    r_strides, w_strides, k_strides, v_strides, a_strides, b_strides, y_strides,
    Q: tl.constexpr, V_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr,
):  # fmt: skip
    """Outputs of one head of a chunk: what its own tokens give, and its questions to the state that enters it."""
    own, h, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i, n = tl.arange(0, Q), tl.arange(0, N_BLOCK)
    mask_N = n < width
    begin = (first + own) * Q
    stop = tl.minimum(begin + Q, length)
    t = begin + i
    r, log_w = head_of(r, r_strides, batch, h), head_of(log_w, w_strides, batch, h)
    k, v = head_of(k, k_strides, batch, h), head_of(v, v_strides, batch, h)
    a, b = head_of(a, a_strides, batch, h), head_of(b, b_strides, batch, h)
    y += batch * y_strides[0] + h * y_strides[2]
    row = (own * tl.num_programs(2) + batch) * heads + h
    inner += row * 2 * Q * Q
    passing += row * values * width
    nothing_QQ = tl.zeros([Q, Q], dtype=tl.float32)
    with_b_QQ, with_k_QQ, _, _ = write(
        r, log_w, b, k, r_strides[1], w_strides[1], b_strides[1], k_strides[1], begin, stop, n, mask_N,
        nothing_QQ, nothing_QQ, Q, N_BLOCK, False, False,
    )  # fmt: skip
    with_v_QQ = with_k_QQ + product(with_b_QQ, load_tile(inner + Q * Q, i, Q, i < Q, i, 1, i < Q, tl.float32))
    question_QN = load_questions(
        r, log_w, a, inner, with_b_QQ, r_strides[1], w_strides[1], a_strides[1], begin, t, stop, n, mask_N, Q
    )
    for start in range(0, values, V_BLOCK):
        p = (start + tl.arange(0, V_BLOCK)).to(tl.int64)
        state_NV = load_tile(passing, n, 1, mask_N, p, width, p < values, tl.float32)
        v_QV = load_tile(v, t, v_strides[1], t < stop, p, 1, p < width, tl.float32)
        y_QV = product(question_QN, state_NV) + product(with_v_QQ, v_QV)
        target = y + t[:, None] * y_strides[1] + p[None, :]
        tl.store(target, y_QV.to(y.dtype.element_ty), mask=(t < stop)[:, None] & (p < values)[None, :])


@triton.jit
def load_questions(
    r, log_w, a, inner, with_b_QQ, r_stride, w_stride, a_stride, begin, t, stop, n, mask_N, Q: tl.constexpr
):
    """(Q, N): what each token's output asks the state that enters the chunk; y_t += S q_t."""
    i = tl.arange(0, Q)
    inverse_QQ = load_tile(inner, i, Q, i < Q, i, 1, i < Q, tl.float32)
    a_QN = load_tile(a, t, a_stride, t < stop, n, 1, mask_N, tl.float32)
    a_QN *= tl.exp(log_before(log_w, w_stride, begin, t, stop, n, mask_N))
    r_QN = load_tile(r, t, r_stride, t < stop, n, 1, mask_N, tl.float32)
    r_QN *= tl.exp(log_since(log_w, w_stride, t, stop, n, mask_N))
    return r_QN + product(with_b_QQ, product(inverse_QQ, a_QN))
