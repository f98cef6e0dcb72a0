"""RWKV-7's recurrence on a GPU: the gradient kernels of one chunk. See triton_wkv7.py for the plan of the whole.

With E the state that enters a chunk, G the adjoint of the one that leaves it, ~ for a token's vector decayed to the
chunk's begin (a, r) or end (b, k), and ' for transposed,
    U = T (A~ E' + A_ak V) = X E' + W V        Y = R~ E' + A_rb U + A_rk V        E_out = E diag(w) + U' B~ + V' K~
Everything leads back to products with E or V: no gradient of U is needed, which has a number for each token and row of
E, but only sums over rows, H = E' G and V G among them.
    from the outputs    dR~ = dY E                  dA_rk = dY V'             dA_rb = dR~ X' + dA_rk W'
                        dA~ = X_r' dR~              dA_ak = X_r' dA_rk        dV = (A_rk' + W' A_rb') dY   X_r = A_rb T
    from the state      dA~ += T' B~ H'             dA_ak += T' B~ (V G)'     dV += (K~ + W' B~) G'
                        dB~ = X H + W V G           dK~ = V G                 dA_ab = dA~ X' + dA_ak W'
The first kernel makes those of the outputs and D, their part in the adjoint of E; the second adds those of the state;
the third has the pairs of tokens of A_ab and A_ak, and what all of it means for log w, k, a and b.
A log decay's gradient is what crosses its token: at the chunk's end E_out times G summed over rows; from there to the
left each reader (r; a, one token later) adds its product with its gradient, and each writer (b, k) takes it away.

Legend: as in triton_chunks.py.
"""

import triton
import triton.language as tl

from ..triton_math import load_tile
from .triton_chunks import head_of, load_before_NQ, load_questions, log_after, log_before, log_since, product, write


@triton.jit
def read(
    x, log_w, b, k, x_stride, w_stride, b_stride, k_stride, begin, stop, n, mask_N, grad_b_QQ, grad_k_QQ,
    Q: tl.constexpr, N_BLOCK: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """`write` from the other side, b and k carried: weights at (s, t), and from their gradients (t, s) that of x."""
    i = tl.arange(0, Q)
    carried_b_QN = tl.zeros([Q, N_BLOCK], dtype=tl.float32)
    carried_k_QN = tl.zeros([Q, N_BLOCK], dtype=tl.float32)
    grad_x_QN = tl.zeros([Q, N_BLOCK], dtype=tl.float32)
    with_b_QQ = tl.zeros([Q, Q], dtype=tl.float32)
    with_k_QQ = tl.zeros([Q, Q], dtype=tl.float32)
    for step in range(0, (stop - begin).to(tl.int32)):
        t = begin + step
        here_Q1, here_1Q = (i == step)[:, None], (i == step)[None, :]
        w_N = tl.exp(tl.load(log_w + t * w_stride + n, mask=mask_N, other=0.0).to(tl.float32))
        x_N = tl.load(x + t * x_stride + n, mask=mask_N, other=0.0).to(tl.float32)
        b_N = tl.load(b + t * b_stride + n, mask=mask_N, other=0.0).to(tl.float32)
        k_N = tl.load(k + t * k_stride + n, mask=mask_N, other=0.0).to(tl.float32)
        after_b_QN = tl.where(here_Q1, b_N[None, :], carried_b_QN * w_N[None, :])
        after_k_QN = tl.where(here_Q1, k_N[None, :], carried_k_QN * w_N[None, :])
        if not BEFORE:
            carried_b_QN, carried_k_QN = after_b_QN, after_k_QN
        with_b_QQ = tl.where(here_1Q, tl.sum(carried_b_QN * x_N[None, :], axis=1)[:, None], with_b_QQ)
        with_k_QQ = tl.where(here_1Q, tl.sum(carried_k_QN * x_N[None, :], axis=1)[:, None], with_k_QQ)
        grad_b_Q = tl.sum(tl.where(here_Q1, grad_b_QQ, 0.0), axis=0)
        grad_k_Q = tl.sum(tl.where(here_Q1, grad_k_QQ, 0.0), axis=0)
        grad_N = tl.sum(carried_b_QN * grad_b_Q[:, None] + carried_k_QN * grad_k_Q[:, None], axis=0)
        grad_x_QN = tl.where(here_Q1, grad_N[None, :], grad_x_QN)
        carried_b_QN, carried_k_QN = after_b_QN, after_k_QN
    return with_b_QQ, with_k_QQ, grad_x_QN


@triton.jit(do_not_specialize=["first"])
def output_gradient_kernel(
    r, log_w, k, v, a, b, inner, passing, grad_y, grad_r, part_w, part_k, part_v, part_a, part_b, part_ak, grad_passing,
    first, length, heads, values, width, r_strides, w_strides, k_strides, v_strides, a_strides, b_strides, y_strides,
    Q: tl.constexpr, V_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr,
):  # fmt: skip
    """What the outputs of one head of a chunk give: r's gradient, D, and their part in the others, dA~ and dA_ak.

    That in the gradient of log w is left as r dr: the rest of the balance comes at the end.
    """
    own, h, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i, n = tl.arange(0, Q), tl.arange(0, N_BLOCK)
    mask_N = n < width
    begin = (first + own) * Q
    stop = tl.minimum(begin + Q, length)
    t = begin + i
    valid = t < stop
    mask_QN = valid[:, None] & mask_N[None, :]
    r, log_w = head_of(r, r_strides, batch, h), head_of(log_w, w_strides, batch, h)
    k, v = head_of(k, k_strides, batch, h), head_of(v, v_strides, batch, h)
    a, b = head_of(a, a_strides, batch, h), head_of(b, b_strides, batch, h)
    grad_y = head_of(grad_y, y_strides, batch, h)
    row = (own * tl.num_programs(2) + batch) * heads + h
    inner += row * 2 * Q * Q
    passing += row * values * width
    grad_passing += row * values * width
    token_QN = ((batch * length + t) * heads + h)[:, None] * width + n[None, :]
    own_Q1, all_QN = row * Q * width + i[:, None] * width, (i < Q)[:, None] & mask_N[None, :]
    own_QN = own_Q1 + n[None, :]

    read_QN = tl.zeros([Q, N_BLOCK], dtype=tl.float32)
    grad_k_QQ = tl.zeros([Q, Q], dtype=tl.float32)
    for start in range(0, values, V_BLOCK):
        p = (start + tl.arange(0, V_BLOCK)).to(tl.int64)
        dy_QV = load_tile(grad_y, t, y_strides[1], valid, p, 1, p < values, tl.float32)
        read_QN += product(dy_QV, load_tile(passing, p, width, p < values, n, 1, mask_N, tl.float32))
        if start < width:
            grad_k_QQ += product(dy_QV, load_tile(v, p, 1, p < width, t, v_strides[1], valid, tl.float32))
    inverse_T = load_tile(inner, i, 1, i < Q, i, Q, i < Q, tl.float32)
    stored_T = load_tile(inner + Q * Q, i, 1, i < Q, i, Q, i < Q, tl.float32)
    a_NQ = load_before_NQ(a, a_strides[1], log_w, w_strides[1], begin, t, stop, n, mask_N)
    grad_b_QQ = product(read_QN, product(a_NQ, inverse_T)) + product(grad_k_QQ, stored_T)
    with_b_T, with_k_T, grad_r_QN = read(
        r, log_w, b, k, r_strides[1], w_strides[1], b_strides[1], k_strides[1], begin, stop, n, mask_N,
        grad_b_QQ, grad_k_QQ, Q, N_BLOCK, False,
    )  # fmt: skip
    grad_r_QN += read_QN * tl.exp(log_since(log_w, w_strides[1], t, stop, n, mask_N))
    tl.store(grad_r + token_QN, grad_r_QN.to(grad_r.dtype.element_ty), mask=mask_QN)
    r_QN = load_tile(r, t, r_strides[1], valid, n, 1, mask_N, tl.float32)
    tl.store(part_w + own_QN, grad_r_QN * r_QN, mask=all_QN)
    told_QQ = product(inverse_T, with_b_T)
    tl.store(part_a + own_QN, product(told_QQ, read_QN), mask=all_QN)
    tl.store(part_ak + row * Q * Q + i[:, None] * Q + i[None, :], product(told_QQ, grad_k_QQ))
    with_v_T = with_k_T + product(stored_T, with_b_T)

    with_b_QQ, _, grad_b_QN, grad_k_QN = write(
        r, log_w, b, k, r_strides[1], w_strides[1], b_strides[1], k_strides[1], begin, stop, n, mask_N,
        grad_b_QQ, grad_k_QQ, Q, N_BLOCK, False, True,
    )  # fmt: skip
    tl.store(part_b + own_QN, grad_b_QN, mask=all_QN)
    tl.store(part_k + own_QN, grad_k_QN, mask=all_QN)
    question_QN = load_questions(
        r, log_w, a, inner, with_b_QQ, r_strides[1], w_strides[1], a_strides[1], begin, t, stop, n, mask_N, Q
    )
    for start in range(0, values, V_BLOCK):
        p = (start + tl.arange(0, V_BLOCK)).to(tl.int64)
        dy_VQ = load_tile(grad_y, p, 1, p < values, t, y_strides[1], valid, tl.float32)
        mask_VN = (p < values)[:, None] & mask_N[None, :]
        tl.store(grad_passing + p[:, None] * width + n[None, :], product(dy_VQ, question_QN), mask=mask_VN)
        if start < width:
            dy_QV = load_tile(grad_y, t, y_strides[1], valid, p, 1, p < width, tl.float32)
            mask_QV = (i < Q)[:, None] & (p < width)[None, :]
            tl.store(part_v + own_Q1 + p[None, :], product(with_v_T, dy_QV), mask=mask_QV)


@triton.jit(do_not_specialize=["first"])
def state_gradient_kernel(
    log_w, k, v, a, b, inner, passing, adjoints, crossing, part_k, part_v, part_a, part_b, part_ak, grad_v,
    first, length, heads, values, width, w_strides, k_strides, v_strides, a_strides, b_strides,
    Q: tl.constexpr, V_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds to the outputs' part what the state that leaves a chunk gives: all of v's gradient, and what crosses."""
    own, h, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i, n = tl.arange(0, Q), tl.arange(0, N_BLOCK)
    mask_N = n < width
    begin = (first + own) * Q
    stop = tl.minimum(begin + Q, length)
    t = begin + i
    valid = t < stop
    log_w, k, v = head_of(log_w, w_strides, batch, h), head_of(k, k_strides, batch, h), head_of(v, v_strides, batch, h)
    a, b = head_of(a, a_strides, batch, h), head_of(b, b_strides, batch, h)
    row = (own * tl.num_programs(2) + batch) * heads + h
    inner += row * 2 * Q * Q
    passing += row * values * width
    adjoints += row * values * width
    token_Q1 = ((batch * length + t) * heads + h)[:, None] * width
    own_Q1, all_QN = row * Q * width + i[:, None] * width, (i < Q)[:, None] & mask_N[None, :]
    own_QN = own_Q1 + n[None, :]

    stored_T = load_tile(inner + Q * Q, i, 1, i < Q, i, Q, i < Q, tl.float32)
    until_QN = tl.exp(log_after(log_w, w_strides[1], t, stop, n, mask_N))
    left_b_QN = load_tile(b, t, b_strides[1], valid, n, 1, mask_N, tl.float32) * until_QN
    left_k_QN = load_tile(k, t, k_strides[1], valid, n, 1, mask_N, tl.float32) * until_QN
    kept_QN = left_k_QN + product(stored_T, left_b_QN)
    grad_left_k_QN = tl.zeros([Q, N_BLOCK], dtype=tl.float32)
    grad_left_k_NQ = tl.zeros([N_BLOCK, Q], dtype=tl.float32)
    for start in range(0, width, V_BLOCK):
        p = (start + tl.arange(0, V_BLOCK)).to(tl.int64)
        adjoint_VN = load_tile(adjoints, p, width, p < width, n, 1, mask_N, tl.float32)
        adjoint_NV = load_tile(adjoints, n, 1, mask_N, p, width, p < width, tl.float32)
        grad_left_k_QN += product(load_tile(v, t, v_strides[1], valid, p, 1, p < width, tl.float32), adjoint_VN)
        grad_left_k_NQ += product(adjoint_NV, load_tile(v, p, 1, p < width, t, v_strides[1], valid, tl.float32))
        mask_QV = valid[:, None] & (p < width)[None, :]
        grad_v_QV = product(kept_QN, adjoint_NV) + tl.load(part_v + own_Q1 + p[None, :], mask=mask_QV, other=0.0)
        tl.store(grad_v + token_Q1 + p[None, :], grad_v_QV.to(grad_v.dtype.element_ty), mask=mask_QV)
    crossing_N = tl.sum(grad_left_k_QN * left_k_QN, axis=0)
    part_k += own_QN
    tl.store(part_k, tl.load(part_k, mask=all_QN, other=0.0) + grad_left_k_QN * until_QN, mask=all_QN)
    told_QN = product(load_tile(inner, i, 1, i < Q, i, Q, i < Q, tl.float32), left_b_QN)
    part_ak += row * Q * Q + i[:, None] * Q + i[None, :]
    tl.store(part_ak, tl.load(part_ak) + product(told_QN, grad_left_k_NQ))
    grad_left_b_QN = product(load_tile(inner + Q * Q, i, Q, i < Q, i, 1, i < Q, tl.float32), grad_left_k_QN)

    both_NN = tl.zeros([N_BLOCK, N_BLOCK], dtype=tl.float32)
    for start in range(0, values, V_BLOCK):
        p = (start + tl.arange(0, V_BLOCK)).to(tl.int64)
        adjoint_NV = load_tile(adjoints, n, 1, mask_N, p, width, p < values, tl.float32)
        both_NN += product(adjoint_NV, load_tile(passing, p, width, p < values, n, 1, mask_N, tl.float32))
    part_a += own_QN
    tl.store(part_a, tl.load(part_a, mask=all_QN, other=0.0) + product(told_QN, both_NN), mask=all_QN)

    both_NN = tl.zeros([N_BLOCK, N_BLOCK], dtype=tl.float32)
    for start in range(0, values, V_BLOCK):
        p = (start + tl.arange(0, V_BLOCK)).to(tl.int64)
        state_NV = load_tile(passing, n, 1, mask_N, p, width, p < values, tl.float32)
        both_NN += product(state_NV, load_tile(adjoints, p, width, p < values, n, 1, mask_N, tl.float32))
    a_QN = load_tile(a, t, a_strides[1], valid, n, 1, mask_N, tl.float32)
    a_QN *= tl.exp(log_before(log_w, w_strides[1], begin, t, stop, n, mask_N))
    answers_QN = product(load_tile(inner, i, Q, i < Q, i, 1, i < Q, tl.float32), a_QN)
    grad_left_b_QN += product(answers_QN, both_NN)
    log_QN = load_tile(log_w, t, w_strides[1], valid, n, 1, mask_N, tl.float32)
    same_N = tl.sum(tl.where(n[:, None] == n[None, :], both_NN, 0.0), axis=0)
    crossing_N += tl.exp(tl.sum(log_QN, axis=0)) * same_N + tl.sum(grad_left_b_QN * left_b_QN, axis=0)
    tl.store(crossing + row * width + n, crossing_N, mask=mask_N)
    part_b += own_QN
    tl.store(part_b, tl.load(part_b, mask=all_QN, other=0.0) + grad_left_b_QN * until_QN, mask=all_QN)


@triton.jit(do_not_specialize=["first"])
def pair_gradient_kernel(
    log_w, k, a, b, inner, crossing, part_w, part_k, part_a, part_b, part_ak, grad_w, grad_k, grad_a, grad_b,
    first, length, heads, width, w_strides, k_strides, a_strides, b_strides, Q: tl.constexpr, N_BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of one head of a chunk, from those of its system and what else there is of them."""
    own, h, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i, n = tl.arange(0, Q), tl.arange(0, N_BLOCK)
    mask_N = n < width
    begin = (first + own) * Q
    stop = tl.minimum(begin + Q, length)
    t = begin + i
    valid = t < stop
    log_w, k = head_of(log_w, w_strides, batch, h), head_of(k, k_strides, batch, h)
    a, b = head_of(a, a_strides, batch, h), head_of(b, b_strides, batch, h)
    row = (own * tl.num_programs(2) + batch) * heads + h
    inner += row * 2 * Q * Q
    at_QN = ((batch * length + t) * heads + h)[:, None] * width + n[None, :]
    own_QN, mask_QN = row * Q * width + i[:, None] * width + n[None, :], valid[:, None] & mask_N[None, :]

    part_a_QN = tl.load(part_a + own_QN, mask=mask_QN, other=0.0)
    grad_k_QQ = tl.load(part_ak + row * Q * Q + i[:, None] * Q + i[None, :])
    a_NQ = load_before_NQ(a, a_strides[1], log_w, w_strides[1], begin, t, stop, n, mask_N)
    answers_NQ = product(a_NQ, load_tile(inner, i, 1, i < Q, i, Q, i < Q, tl.float32))
    grad_b_QQ = product(grad_k_QQ, load_tile(inner + Q * Q, i, 1, i < Q, i, Q, i < Q, tl.float32))
    grad_b_QQ += product(part_a_QN, answers_NQ)
    _, _, grad_a_QN = read(
        a, log_w, b, k, a_strides[1], w_strides[1], b_strides[1], k_strides[1], begin, stop, n, mask_N,
        grad_b_QQ, grad_k_QQ, Q, N_BLOCK, True,
    )  # fmt: skip
    grad_a_QN += part_a_QN * tl.exp(log_before(log_w, w_strides[1], begin, t, stop, n, mask_N))
    tl.store(grad_a + at_QN, grad_a_QN.to(grad_a.dtype.element_ty), mask=mask_QN)
    _, _, grad_b_QN, grad_k_QN = write(
        a, log_w, b, k, a_strides[1], w_strides[1], b_strides[1], k_strides[1], begin, stop, n, mask_N,
        grad_b_QQ, grad_k_QQ, Q, N_BLOCK, True, True,
    )  # fmt: skip
    grad_b_QN += tl.load(part_b + own_QN, mask=mask_QN, other=0.0)
    grad_k_QN += tl.load(part_k + own_QN, mask=mask_QN, other=0.0)
    tl.store(grad_b + at_QN, grad_b_QN.to(grad_b.dtype.element_ty), mask=mask_QN)
    tl.store(grad_k + at_QN, grad_k_QN.to(grad_k.dtype.element_ty), mask=mask_QN)
    asked_QN = grad_a_QN * load_tile(a, t, a_strides[1], valid, n, 1, mask_N, tl.float32)
    balance_QN = tl.load(part_w + own_QN, mask=mask_QN, other=0.0) + asked_QN
    balance_QN -= grad_b_QN * load_tile(b, t, b_strides[1], valid, n, 1, mask_N, tl.float32)
    balance_QN -= grad_k_QN * load_tile(k, t, k_strides[1], valid, n, 1, mask_N, tl.float32)
    grad_w_QN = tl.cumsum(balance_QN, axis=0, reverse=True) - asked_QN  # a token's a is asked before its own decay
    grad_w_QN += tl.load(crossing + row * width + n, mask=mask_N, other=0.0)[None, :]
    tl.store(grad_w + at_QN, grad_w_QN.to(grad_w.dtype.element_ty), mask=mask_QN)
