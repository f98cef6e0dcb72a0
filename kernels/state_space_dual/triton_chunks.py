"""State-space duality on a GPU: the kernels of one chunk. See triton_dual.py for the plan of the whole.

Exponents are differences of sums taken in double precision within the chunk. No product is ever transposed after it was
computed (Triton 3.4 to 3.7.0 miscompile that on Hopper): a transposed matrix is computed with its operands exchanged.
Float32 operands are split in three TF32 products each, which keeps float32 accuracy on tensor cores.

Legend: B batch, T tokens, H heads, G groups of heads, P head width, N states, M chunks, Q tokens of one.
"""

# The type checker takes triton.language.static_range for something that cannot be iterated.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from ..triton_math import load_tile


@triton.jit
def _decay(later, earlier, allowed):
    """exp(later - earlier) where allowed, otherwise zero; arguments are double-precision sums."""
    return tl.exp(tl.where(allowed, (later - earlier).to(tl.float32), float("-inf")))


@triton.jit
def states_kernel(
    x, sums, B, count, added, length, heads, groups, width, states, chunks, x_strides, B_strides, count_stride,
    Q: tl.constexpr, P_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, DOT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state at its end. REVERSE, with dy and C for x and B: to the adjoint at its begin."""
    m, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = m.to(tl.int64) * Q
    t = begin + tl.arange(0, Q)
    p, n = tl.arange(0, P_BLOCK), tl.arange(0, N_BLOCK)
    valid, last = t < length, tl.minimum(begin + Q, length) - 1
    sums += b * length * heads + h
    sum_Q = tl.load(sums + t * heads, mask=valid, other=0.0)
    zero_Q = tl.zeros([Q], dtype=tl.float64)
    here = valid
    if count is not None:
        count += b * count_stride
        count_Q = tl.load(count + t, mask=valid, other=-1)
        if REVERSE:
            here = here & (count_Q == tl.load(count + begin - 1, mask=begin > 0, other=0))
        else:
            here = here & (count_Q == tl.load(count + last))
    decay_Q = _decay(sum_Q, zero_Q, here) if REVERSE else _decay(tl.load(sums + last * heads) + zero_Q, sum_Q, here)
    x += b * x_strides[0] + h.to(tl.int64) * x_strides[2]
    B += b * B_strides[0] + (h // (heads // groups)).to(tl.int64) * B_strides[2]
    x_PQ = load_tile(x, p, 1, p < width, t, x_strides[1], valid, tl.float32)
    B_QN = load_tile(B, t, B_strides[1], valid, n, 1, n < states, DOT)
    added_PN = tl.dot((x_PQ * decay_Q[None, :]).to(DOT), B_QN, input_precision="tf32x3")
    target = added + ((b * chunks + m) * heads + h) * width * states
    mask = (p < width)[:, None] & (n < states)[None, :]
    tl.store(target + p[:, None] * states + n[None, :], added_PN, mask=mask)


@triton.jit
def pass_kernel(
    added, whole, outermost, carried, last, heads, size, shared, chunks, BLOCK: tl.constexpr, REVERSE: tl.constexpr
):
    """States (REVERSE: adjoints) that enter each chunk, and the one that leaves the last; chunk after chunk.

    Of a state's `size` numbers, `shared` in a row have one decay in `whole`.
    """
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    state = tl.load(outermost + (b * heads + h) * size + i, mask=mask, other=0.0)
    for step in range(0, chunks):
        row = (b * chunks + ((chunks - 1 - step) if REVERSE else step)) * heads + h
        tl.store(carried + row * size + i, state, mask=mask)
        decay = tl.load(whole + row * (size // shared) + i // shared, mask=mask, other=0.0)
        state = state * decay + tl.load(added + row * size + i, mask=mask, other=0.0)
    tl.store(last + (b * heads + h) * size + i, state, mask=mask)


@triton.jit
def output_kernel(
    x, sums, B, C, count, entering, y, length, heads, groups, width, states, chunks,
    x_strides, B_strides, C_strides, count_stride,
    Q: tl.constexpr, P_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Outputs of one head of a chunk: masked attention, and what the entering state adds."""
    m, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = m.to(tl.int64) * Q
    i, p, n = tl.arange(0, Q), tl.arange(0, P_BLOCK), tl.arange(0, N_BLOCK)
    t = begin + i
    valid, mask_P, mask_N = t < length, p < width, n < states
    g = (h // (heads // groups)).to(tl.int64)
    x += b * x_strides[0] + h.to(tl.int64) * x_strides[2]
    B += b * B_strides[0] + g * B_strides[2]
    C += b * C_strides[0] + g * C_strides[2]
    sum_Q = tl.load(sums + b * length * heads + t * heads + h, mask=valid, other=0.0)
    pairs = (i[:, None] >= i[None, :]) & valid[:, None]
    from_before = valid
    if count is not None:
        count += b * count_stride
        count_Q = tl.load(count + t, mask=valid, other=-1)
        pairs = pairs & (count_Q[:, None] == count_Q[None, :])
        from_before = from_before & (count_Q == tl.load(count + begin - 1, mask=begin > 0, other=0))
    C_QN = load_tile(C, t, C_strides[1], valid, n, 1, mask_N, DOT)
    B_NQ = load_tile(B, n, 1, mask_N, t, B_strides[1], valid, DOT)
    scores_QQ = tl.dot(C_QN, B_NQ, input_precision="tf32x3") * _decay(sum_Q[:, None], sum_Q[None, :], pairs)
    x_QP = load_tile(x, t, x_strides[1], valid, p, 1, mask_P, DOT)
    y_QP = tl.dot(scores_QQ.to(DOT), x_QP, input_precision="tf32x3")
    entering += ((b * chunks + m) * heads + h) * width * states
    state_NP = load_tile(entering, n, 1, mask_N, p, states, mask_P, DOT)
    since_Q = _decay(sum_Q, tl.zeros([Q], dtype=tl.float64), from_before)
    y_QP += tl.dot(C_QN, state_NP, input_precision="tf32x3") * since_Q[:, None]
    target = y + ((b * length + t) * heads + h)[:, None] * width + p[None, :]
    tl.store(target, y_QP.to(y.dtype.element_ty), mask=valid[:, None] & mask_P[None, :])


@triton.jit
def gradient_kernel(
    mine, theirs, sums, own, other, count, carried, grad_mine, grad_sums, grad_own,
    length, heads, groups, width, states, chunks, partial_stride,
    mine_strides, their_strides, own_strides, other_strides, count_stride,
    Q: tl.constexpr, P_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, HEADS: tl.constexpr, DOT: tl.constexpr,
    LATER: tl.constexpr,
):  # fmt: skip
    """Gradients of one end of all pairs (t, s) of a chunk's tokens, for HEADS heads.

    LATER, the end t: mine is dy, theirs x, own C, other B, carried the entering states; gives the gradient of C.
    Otherwise the end s: mine is x, theirs dy, own B, other C, carried the adjoints; gives the gradients of B and x.
    Gradients of `own` are summed over the heads, then added in float32. `grad_sums` is what the pair's exponent, and
    that of the state read (or left), contribute to the gradient of the summed log decay at this end.
    """
    m, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    begin = m.to(tl.int64) * Q
    i, p, n = tl.arange(0, Q), tl.arange(0, P_BLOCK), tl.arange(0, N_BLOCK)
    t = begin + i
    valid, mask_P, mask_N = t < length, p < width, n < states
    last = tl.minimum(begin + Q, length) - 1
    outside = valid
    pairs = (i[:, None] >= i[None, :]) & valid[:, None] if LATER else (i[:, None] <= i[None, :]) & valid[None, :]
    if count is not None:
        count += b * count_stride
        count_Q = tl.load(count + t, mask=valid, other=-1)
        pairs = pairs & (count_Q[:, None] == count_Q[None, :])
        if LATER:
            outside = outside & (count_Q == tl.load(count + begin - 1, mask=begin > 0, other=0))
        else:
            outside = outside & (count_Q == tl.load(count + last))
    first_head = tl.program_id(1) * HEADS
    g = (first_head // (heads // groups)).to(tl.int64)
    own += b * own_strides[0] + g * own_strides[2]
    other += b * other_strides[0] + g * other_strides[2]
    own_QN = load_tile(own, t, own_strides[1], valid, n, 1, mask_N, DOT)
    other_QN = load_tile(other, t, other_strides[1], valid, n, 1, mask_N, DOT)
    other_NQ = load_tile(other, n, 1, mask_N, t, other_strides[1], valid, DOT)
    products_QQ = tl.dot(own_QN, other_NQ, input_precision="tf32x3")
    grad_own_QN = tl.zeros([Q, N_BLOCK], dtype=tl.float32)
    zero_Q = tl.zeros([Q], dtype=tl.float64)
    for r in range(0, HEADS):
        h = (first_head + r).to(tl.int64)
        my = mine + b * mine_strides[0] + h * mine_strides[2]
        their = theirs + b * their_strides[0] + h * their_strides[2]
        sum_Q = tl.load(sums + (b * length + t) * heads + h, mask=valid, other=0.0)
        if LATER:
            decay_QQ = _decay(sum_Q[:, None], sum_Q[None, :], pairs)
            outside_Q = _decay(sum_Q, zero_Q, outside)
        else:
            decay_QQ = _decay(sum_Q[None, :], sum_Q[:, None], pairs)
            outside_Q = _decay(tl.load(sums + (b * length + last) * heads + h) + zero_Q, sum_Q, outside)
        state = carried + ((b * chunks + m) * heads + h) * width * states
        mine_QP = load_tile(my, t, mine_strides[1], valid, p, 1, mask_P, DOT)
        theirs_PQ = load_tile(their, p, 1, mask_P, t, their_strides[1], valid, DOT)
        grad_QQ = tl.dot(mine_QP, theirs_PQ, input_precision="tf32x3") * decay_QQ
        state_PN = load_tile(state, p, states, mask_P, n, 1, mask_N, DOT)
        read_QN = tl.dot(mine_QP, state_PN, input_precision="tf32x3") * outside_Q[:, None]
        grad_own_QN += tl.dot(grad_QQ.to(DOT), other_QN, input_precision="tf32x3") + read_QN
        read_Q = tl.sum(read_QN * own_QN.to(tl.float32), axis=1)
        grad_sum_Q = tl.sum(grad_QQ * products_QQ, axis=1) + read_Q
        token = (b * length + t) * heads + h
        if not LATER:
            # exponents of what the state keeps are differences from the sum at the last token
            grad_sum_Q -= tl.where(t == last, tl.sum(read_Q, axis=0), 0.0)
            theirs_QP = load_tile(their, t, their_strides[1], valid, p, 1, mask_P, DOT)
            state_NP = load_tile(state, n, 1, mask_N, p, states, mask_P, DOT)
            grad_QP = tl.dot((products_QQ * decay_QQ).to(DOT), theirs_QP, input_precision="tf32x3")
            grad_QP += tl.dot(own_QN, state_NP, input_precision="tf32x3") * outside_Q[:, None]
            target = grad_mine + token[:, None] * width + p[None, :]
            tl.store(target, grad_QP.to(grad_mine.dtype.element_ty), mask=valid[:, None] & mask_P[None, :])
        tl.store(grad_sums + token, grad_sum_Q, mask=valid)
    partial = ((first_head // HEADS) % (heads // groups // HEADS)).to(tl.int64) * partial_stride
    shared = partial + ((b * length + t) * groups + g)[:, None] * states + n[None, :]
    tl.atomic_add(grad_own + shared, grad_own_QN, mask=valid[:, None] & mask_N[None, :], sem="relaxed")
