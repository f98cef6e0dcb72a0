"""Selective scan on a GPU, forward, and what both directions share. See triton_scan.py for the plan of the whole.

A program owns a block of channels of one segment of one sequence, and keeps their states in registers as [N, D]: lanes
are channels, so that the sum over states stays within a lane, and B and C are read once for the whole block.

Legend: B batch, T tokens, D channels of a block, N states per channel, S segments.
"""

# The type checker takes triton.language.static_range for something that cannot be iterated.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from ..triton_math import load_keeps, load_rows, sigmoid, softplus


@triton.jit
def tile_steps(raw_rows, bias_D, first, stop, mask_D, TILE: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Step sizes of a tile, zero behind the end: there a state neither decays nor takes anything in."""
    steps = ()
    for j in tl.static_range(TILE):
        step_D = raw_rows[j] + bias_D
        if SOFTPLUS:
            step_D = softplus(step_D)
        steps = steps + (tl.where(mask_D & (first + j < stop), step_D, 0.0),)  # noqa: RUF005
    return steps


@triton.jit
def summary_kernel(
    u, delta, A_log2, B, C, z, bias, starts, grad_y, ends, sums, alive,
    length, channels, states, segment, first_segment, segments,
    u_strides, delta_strides, B_strides, C_strides, z_strides, grad_strides, starts_stride,
    N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, TILE: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state that crosses it, the sum of its step sizes, and whether anything crosses it.

    Forward: the state at its end from nothing at its beginning. REVERSE: the adjoint at its beginning from nothing at
    its end. Results of segment s go to row s of `ends`, `sums` and `alive`.
    """
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    s = tl.program_id(1) + first_segment
    b = tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N_BLOCK)
    mask_D, mask_N = d < channels, n < states
    mask_ND = mask_N[:, None] & mask_D[None, :]
    begin = s.to(tl.int64) * segment
    stop = tl.minimum(begin + segment, length)
    offset_ND = n[:, None] * channels + d[None, :]
    A_ND = tl.load(A_log2 + offset_ND, mask=mask_ND, other=0.0)
    bias_D = tl.zeros([D_BLOCK], dtype=tl.float32)
    if bias is not None:
        bias_D += tl.load(bias + d, mask=mask_D, other=0.0)
    delta += b * delta_strides[0]
    if starts is not None:
        starts += b * starts_stride
    if REVERSE:
        C += b * C_strides[0]
        grad_y += b * grad_strides[0]
        if z is not None:
            z += b * z_strides[0]
    else:
        u += b * u_strides[0]
        B += b * B_strides[0]
    state_ND = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
    sum_D = tl.zeros([D_BLOCK], dtype=tl.float32)
    crosses = 1.0
    tiles = tl.cdiv(segment, TILE)
    for i in range(0, tiles):
        first = begin + ((tiles - 1 - i) if REVERSE else i) * TILE
        raws = load_rows(delta, delta_strides[1], first, stop, d, mask_D, TILE)
        steps = tile_steps(raws, bias_D, first, stop, mask_D, TILE, SOFTPLUS)
        keeps = load_keeps(starts, first, stop, TILE)
        if REVERSE:
            Cs = load_rows(C, C_strides[1], first, stop, n, mask_N, TILE)
            grads = load_rows(grad_y, grad_strides[1], first, stop, d, mask_D, TILE)
            if z is not None:
                zs = load_rows(z, z_strides[1], first, stop, d, mask_D, TILE)
        else:
            us = load_rows(u, u_strides[1], first, stop, d, mask_D, TILE)
            Bs = load_rows(B, B_strides[1], first, stop, n, mask_N, TILE)
        for j in tl.static_range(TILE):
            if REVERSE:
                grad_D = grads[TILE - 1 - j]
                if z is not None:
                    grad_D *= zs[TILE - 1 - j] * sigmoid(zs[TILE - 1 - j])
                step_D = steps[TILE - 1 - j]
                decay_ND = tl.exp2(A_ND * step_D[None, :]) * keeps[TILE - 1 - j]
                state_ND = decay_ND * (state_ND + Cs[TILE - 1 - j][:, None] * grad_D[None, :])
            else:
                step_D = steps[j]
                decay_ND = tl.exp2(A_ND * step_D[None, :]) * keeps[j]
                state_ND = decay_ND * state_ND + Bs[j][:, None] * (step_D * us[j])[None, :]
            sum_D += step_D
            crosses *= keeps[j]
    row = b * segments + s
    tl.store(ends + row * states * channels + offset_ND, state_ND, mask=mask_ND)
    tl.store(sums + row * channels + d, sum_D, mask=mask_D)
    if tl.program_id(0) == 0:
        tl.store(alive + row, crosses)


@triton.jit
def pass_kernel(
    A_log2, ends, sums, alive, carried, outermost, channels, states, segments,
    N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """States (REVERSE: adjoints) that enter each segment, in order: decay times the one before, plus what was added."""
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    b = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, N_BLOCK)
    mask_D = d < channels
    mask_ND = (n < states)[:, None] & mask_D[None, :]
    offset_ND = n[:, None] * channels + d[None, :]
    A_ND = tl.load(A_log2 + offset_ND, mask=mask_ND, other=0.0)
    state_ND = tl.load(outermost + b * states * channels + offset_ND, mask=mask_ND, other=0.0)
    for i in range(0, segments):
        row = b * segments + ((segments - 1 - i) if REVERSE else i)
        tl.store(carried + row * states * channels + offset_ND, state_ND, mask=mask_ND)
        if i < segments - 1:
            sum_D = tl.load(sums + row * channels + d, mask=mask_D, other=0.0)
            decay_ND = tl.exp2(A_ND * sum_D[None, :]) * tl.load(alive + row)
            added_ND = tl.load(ends + row * states * channels + offset_ND, mask=mask_ND, other=0.0)
            state_ND = added_ND + decay_ND * state_ND


@triton.jit
def scan_kernel(
    u, delta, A_log2, B, C, D, z, bias, starts, entering, checkpoints, sums, y, final,
    length, channels, states, segment, segments,
    u_strides, delta_strides, B_strides, C_strides, z_strides, starts_stride,
    N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, CHECK: tl.constexpr, TILE: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Outputs of a segment from the state that enters it; its state before every CHECK tokens; the final state.

    `sums`, if asked for: the step sizes of every CHECK tokens, summed.
    """
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    s = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N_BLOCK)
    mask_D, mask_N = d < channels, n < states
    mask_ND = mask_N[:, None] & mask_D[None, :]
    begin = s.to(tl.int64) * segment
    stop = tl.minimum(begin + segment, length)
    offset_ND = n[:, None] * channels + d[None, :]
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
    y += b * length * channels
    if z is not None:
        z += b * z_strides[0]
    if starts is not None:
        starts += b * starts_stride
    checkpoints += b * tl.cdiv(length, CHECK) * states * channels
    if sums is not None:
        sums += b * tl.cdiv(length, CHECK) * channels
    sum_D = tl.zeros([D_BLOCK], dtype=tl.float32)
    state_ND = tl.load(entering + (b * segments + s) * states * channels + offset_ND, mask=mask_ND, other=0.0)
    for i in range(0, tl.cdiv(segment, TILE)):
        first = begin + i * TILE
        if (i % (CHECK // TILE) == 0) & (first < stop):
            tl.store(checkpoints + (first // CHECK) * states * channels + offset_ND, state_ND, mask=mask_ND)
            sum_D = tl.zeros([D_BLOCK], dtype=tl.float32)
        us = load_rows(u, u_strides[1], first, stop, d, mask_D, TILE)
        raws = load_rows(delta, delta_strides[1], first, stop, d, mask_D, TILE)
        Bs = load_rows(B, B_strides[1], first, stop, n, mask_N, TILE)
        Cs = load_rows(C, C_strides[1], first, stop, n, mask_N, TILE)
        if z is not None:
            zs = load_rows(z, z_strides[1], first, stop, d, mask_D, TILE)
        keeps = load_keeps(starts, first, stop, TILE)
        steps = tile_steps(raws, bias_D, first, stop, mask_D, TILE, SOFTPLUS)
        for j in tl.static_range(TILE):
            decay_ND = tl.exp2(A_ND * steps[j][None, :]) * keeps[j]
            state_ND = decay_ND * state_ND + Bs[j][:, None] * (steps[j] * us[j])[None, :]
            sum_D += steps[j]
            y_D = tl.sum(state_ND * Cs[j][:, None], axis=0) + skip_D * us[j]
            if z is not None:
                y_D *= zs[j] * sigmoid(zs[j])
            tl.store(y + (first + j) * channels + d, y_D.to(y.dtype.element_ty), mask=mask_D & (first + j < stop))
        if sums is not None:
            # again with every tile; the last one of the CHECK tokens has the sum of all
            tl.store(sums + (first // CHECK) * channels + d, sum_D, mask=mask_D & (first < stop))
    if s == segments - 1:
        tl.store(final + b * states * channels + offset_ND, state_ND, mask=mask_ND)
