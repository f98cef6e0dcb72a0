"""Selective scan on a GPU, backward. See triton_scan.py for the plan of the whole and portable.py for the equations.

Legend: B batch, T tokens, D channels of a block, N states per channel, S segments.
"""

# The type checker takes triton.language.static_range for something that cannot be iterated.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from ..triton_math import load_keeps, load_rows, sigmoid
from .triton_forward import tile_steps


@triton.jit
def _recompute(
    u, delta, B, starts, scratch, state_ND, A_ND, bias_D, begin, stop, u_stride, delta_stride, B_stride,
    d, n, mask_D, mask_N,
    N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, CHECK: tl.constexpr, TILE: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Walk CHECK tokens forward from a checkpoint and leave the state before each tile in scratch memory."""
    scratch_ND = tl.arange(0, N_BLOCK)[:, None] * D_BLOCK + tl.arange(0, D_BLOCK)[None, :]
    for i in range(0, CHECK // TILE):
        tl.store(scratch + i * N_BLOCK * D_BLOCK + scratch_ND, state_ND)
        first = begin + i * TILE
        us = load_rows(u, u_stride, first, stop, d, mask_D, TILE)
        raws = load_rows(delta, delta_stride, first, stop, d, mask_D, TILE)
        Bs = load_rows(B, B_stride, first, stop, n, mask_N, TILE)
        keeps = load_keeps(starts, first, stop, TILE)
        steps = tile_steps(raws, bias_D, first, stop, mask_D, TILE, SOFTPLUS)
        for j in tl.static_range(TILE):
            decay_ND = tl.exp2(A_ND * steps[j][None, :]) * keeps[j]
            state_ND = decay_ND * state_ND + Bs[j][:, None] * (steps[j] * us[j])[None, :]


@triton.jit
def backward_kernel(
    u, delta, A_log2, B, C, D, z, bias, starts, grad_y, checkpoints, before, entering, reach, adjoints, scratch,
    grad_u, grad_delta, grad_B, grad_C, grad_z, grad_A, grad_D, grad_bias, grad_initial,
    length, channels, states, segment, segments, partial_stride,
    u_strides, delta_strides, B_strides, C_strides, z_strides, grad_strides, starts_stride,
    reach_stride,
    N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, CHECK: tl.constexpr, TILE: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """All gradients of a segment, from the adjoint of its last state.

    Gradients of B and C are summed over the block's channels first, then added to (partials, B, T, N) in float32, where
    partial_stride is 0 or keeps the blocks apart. Those of A, D and the bias are one partial sum per segment.
    `entering` (B, N, D), if there is one: a state that the checkpoints do not know of, with the step sizes summed up to
    each of them (`before`) and the tokens that it can reach.
    """
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    s = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N_BLOCK)
    mask_D, mask_N = d < channels, n < states
    mask_ND = mask_N[:, None] & mask_D[None, :]
    segment_begin = s.to(tl.int64) * segment
    stop = tl.minimum(segment_begin + segment, length)
    offset_ND = n[:, None] * channels + d[None, :]
    scratch_ND = n[:, None] * D_BLOCK + tl.arange(0, D_BLOCK)[None, :]
    A_ND = tl.load(A_log2 + offset_ND, mask=mask_ND, other=0.0)
    bias_D = tl.zeros([D_BLOCK], dtype=tl.float32)
    skip_D = tl.zeros([D_BLOCK], dtype=tl.float32)
    if bias is not None:
        bias_D += tl.load(bias + d, mask=mask_D, other=0.0)
    if D is not None:
        skip_D += tl.load(D + d, mask=mask_D, other=0.0)
    u += b * u_strides[0]
    delta += b * delta_strides[0]
    B += b * B_strides[0]
    C += b * C_strides[0]
    grad_y += b * grad_strides[0]
    grad_u += b * length * channels
    grad_delta += b * length * channels
    partial = tl.program_id(0).to(tl.int64) * partial_stride
    grad_B += partial + b * length * states
    grad_C += partial + b * length * states
    if z is not None:
        z += b * z_strides[0]
        grad_z += b * length * channels
    if starts is not None:
        starts += b * starts_stride
    checkpoints += b * tl.cdiv(length, CHECK) * states * channels
    if entering is not None:
        entering += b * states * channels
        before += b * tl.cdiv(length, CHECK) * channels
        reached = tl.load(reach + b * reach_stride)
    row = b * segments + s
    scratch += (row * tl.num_programs(0) + tl.program_id(0)) * (CHECK // TILE) * N_BLOCK * D_BLOCK
    carry_ND = tl.load(adjoints + row * states * channels + offset_ND, mask=mask_ND, other=0.0)
    grad_A_ND = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
    grad_D_D = tl.zeros([D_BLOCK], dtype=tl.float32)
    grad_bias_D = tl.zeros([D_BLOCK], dtype=tl.float32)
    blocks = tl.cdiv(segment, CHECK)
    for i in range(0, blocks):
        begin = segment_begin + (blocks - 1 - i) * CHECK
        kept_ND = mask_ND & (begin < stop)
        start_ND = tl.load(checkpoints + (begin // CHECK) * states * channels + offset_ND, mask=kept_ND, other=0.0)
        if entering is not None:
            # behind a document start nothing is left of it
            left_ND = mask_ND & (begin < tl.minimum(stop, reached))
            sum_D = tl.load(before + (begin // CHECK) * channels + d, mask=mask_D & (begin < stop), other=0.0)
            entering_ND = tl.load(entering + offset_ND, mask=left_ND, other=0.0)
            start_ND += tl.where(left_ND, tl.exp2(A_ND * sum_D[None, :]) * entering_ND, 0.0)
        _recompute(
            u, delta, B, starts, scratch, start_ND, A_ND, bias_D, begin, stop, u_strides[1], delta_strides[1],
            B_strides[1], d, n, mask_D, mask_N, N_BLOCK, D_BLOCK, CHECK, TILE, SOFTPLUS,
        )  # fmt: skip
        tl.debug_barrier()
        for k in range(0, CHECK // TILE):
            tile = CHECK // TILE - 1 - k
            first = begin + tile * TILE
            us = load_rows(u, u_strides[1], first, stop, d, mask_D, TILE)
            raws = load_rows(delta, delta_strides[1], first, stop, d, mask_D, TILE)
            Bs = load_rows(B, B_strides[1], first, stop, n, mask_N, TILE)
            Cs = load_rows(C, C_strides[1], first, stop, n, mask_N, TILE)
            grads = load_rows(grad_y, grad_strides[1], first, stop, d, mask_D, TILE)
            if z is not None:
                zs = load_rows(z, z_strides[1], first, stop, d, mask_D, TILE)
            keeps = load_keeps(starts, first, stop, TILE)
            steps = tile_steps(raws, bias_D, first, stop, mask_D, TILE, SOFTPLUS)
            before_ND = tl.load(scratch + tile * N_BLOCK * D_BLOCK + scratch_ND)
            decays, befores = (), ()
            for j in tl.static_range(TILE):
                decay_ND = tl.exp2(A_ND * steps[j][None, :]) * keeps[j]
                decays = decays + (decay_ND,)  # noqa: RUF005
                befores = befores + (before_ND,)  # noqa: RUF005
                before_ND = decay_ND * before_ND + Bs[j][:, None] * (steps[j] * us[j])[None, :]
            after_ND = before_ND
            for j in tl.static_range(TILE):
                token = first + (TILE - 1 - j)
                u_D, step_D, dy_D = us[TILE - 1 - j], steps[TILE - 1 - j], grads[TILE - 1 - j]
                B_N, C_N = Bs[TILE - 1 - j], Cs[TILE - 1 - j]
                here_D, here_N = mask_D & (token < stop), mask_N & (token < stop)
                if z is not None:
                    z_D = zs[TILE - 1 - j]
                    open_D = sigmoid(z_D)
                    ungated_D = tl.sum(after_ND * C_N[:, None], axis=0) + skip_D * u_D
                    grad_z_D = dy_D * ungated_D * open_D * (1.0 + z_D * (1.0 - open_D))
                    tl.store(grad_z + token * channels + d, grad_z_D.to(grad_z.dtype.element_ty), mask=here_D)
                    dy_D *= z_D * open_D
                adjoint_ND = C_N[:, None] * dy_D[None, :] + carry_ND
                grad_C_N = tl.sum(after_ND * dy_D[None, :], axis=1)
                grad_B_N = tl.sum(adjoint_ND * (step_D * u_D)[None, :], axis=1)
                tl.atomic_add(grad_C + token * states + n, grad_C_N, mask=here_N, sem="relaxed")
                tl.atomic_add(grad_B + token * states + n, grad_B_N, mask=here_N, sem="relaxed")
                grad_input_D = tl.sum(adjoint_ND * B_N[:, None], axis=0)
                carry_ND = adjoint_ND * decays[TILE - 1 - j]
                moment_ND = carry_ND * befores[TILE - 1 - j]
                grad_A_ND += moment_ND * step_D[None, :]
                # A_log2 = A log2(e), so A is ln(2) times it
                grad_step_D = u_D * grad_input_D + 0.6931471805599453 * tl.sum(moment_ND * A_ND, axis=0)
                if SOFTPLUS:
                    grad_step_D *= sigmoid(raws[TILE - 1 - j] + bias_D)
                grad_u_D = step_D * grad_input_D + skip_D * dy_D
                tl.store(grad_u + token * channels + d, grad_u_D.to(grad_u.dtype.element_ty), mask=here_D)
                tl.store(grad_delta + token * channels + d, grad_step_D.to(grad_delta.dtype.element_ty), mask=here_D)
                grad_D_D += dy_D * u_D
                grad_bias_D += tl.where(here_D, grad_step_D, 0.0)
                after_ND = befores[TILE - 1 - j]
        tl.debug_barrier()
    tl.store(grad_A + row * states * channels + offset_ND, grad_A_ND, mask=mask_ND)
    if D is not None:
        tl.store(grad_D + row * channels + d, grad_D_D, mask=mask_D)
    if bias is not None:
        tl.store(grad_bias + row * channels + d, grad_bias_D, mask=mask_D)
    if s == 0:
        tl.store(grad_initial + b * states * channels + offset_ND, carry_ND, mask=mask_ND)
