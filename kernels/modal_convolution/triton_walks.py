"""Modal convolution on a GPU: the kernels. See triton_modal.py for the plan of the whole.

A program owns a block of channels of one segment of one sequence and walks its tokens with the modes in registers as
[N, D], real and imaginary parts apart; real modes have no imaginary part and the compiler drops it.

Legend: B batch, T tokens, D channels of a block, N modes per channel, S segments.
"""

# The type checker takes triton.language.static_range for something that cannot be iterated.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from ..triton_math import load_keeps, load_rows


@triton.jit
def walk_kernel(
    u, poles, weights, skip, starts, entering, y, ends, length, channels, modes, segment, segments, u_strides,
    starts_stride, N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, TILE: tl.constexpr, COMPLEX: tl.constexpr,
    REVERSE: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """Forward: x_t = p x_{t-1} + u_t and y_t = Re sum_n R x_t + skip u_t.

    REVERSE, with dy for u: the adjoint g_t = conj(p) g_{t+1} + conj(R) dy_t and du_t = Re sum_n g_t + skip dy_t.
    OUTPUT: write y, from the state that enters the segment. Always: the state that leaves it, from `entering` or, where
    there is none, from zero; parts of (parts, B, S, N, D).
    """
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    s = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N_BLOCK)
    mask_D = d < channels
    mask_ND = (n < modes)[:, None] & mask_D[None, :]
    begin = s.to(tl.int64) * segment
    stop = tl.minimum(begin + segment, length)
    offset_ND = n[:, None] * channels + d[None, :]
    size = modes * channels
    part = tl.num_programs(2).to(tl.int64) * segments * size
    row = (b * segments + s) * size
    pole_re = tl.load(poles + offset_ND, mask=mask_ND, other=0.0)
    weight_re = tl.load(weights + offset_ND, mask=mask_ND, other=0.0)
    re_ND = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
    im_ND = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
    if COMPLEX:
        sign = -1.0 if REVERSE else 1.0
        pole_im = sign * tl.load(poles + size + offset_ND, mask=mask_ND, other=0.0)
        weight_im = sign * tl.load(weights + size + offset_ND, mask=mask_ND, other=0.0)
    if entering is not None:
        re_ND += tl.load(entering + row + offset_ND, mask=mask_ND, other=0.0)
        if COMPLEX:
            im_ND += tl.load(entering + part + row + offset_ND, mask=mask_ND, other=0.0)
    skip_D = tl.zeros([D_BLOCK], dtype=tl.float32)
    if skip is not None:
        skip_D += tl.load(skip + d, mask=mask_D, other=0.0)
    u += b * u_strides[0]
    y += b * length * channels
    if starts is not None:
        starts += b * starts_stride
    tiles = tl.cdiv(stop - begin, TILE)
    for i in range(0, tiles):
        first = begin + ((tiles - 1 - i) if REVERSE else i) * TILE
        us = load_rows(u, u_strides[1], first, stop, d, mask_D, TILE)
        keeps = load_keeps(starts, first, stop, TILE)
        for j in tl.static_range(TILE):
            u_D = us[TILE - 1 - j] if REVERSE else us[j]
            keep = keeps[TILE - 1 - j] if REVERSE else keeps[j]
            token = first + ((TILE - 1 - j) if REVERSE else j)
            if token < stop:
                if not REVERSE:
                    next_re = pole_re * re_ND
                    if COMPLEX:
                        next_re -= pole_im * im_ND
                        im_ND = (pole_re * im_ND + pole_im * re_ND) * keep
                    re_ND = next_re * keep + tl.where(mask_ND, u_D[None, :], 0.0)
                    if OUTPUT:
                        out_ND = weight_re * re_ND
                        if COMPLEX:
                            out_ND -= weight_im * im_ND
                else:
                    re_ND += weight_re * u_D[None, :]
                    out_ND = re_ND
                    next_re = pole_re * re_ND
                    if COMPLEX:
                        im_ND += weight_im * u_D[None, :]
                        next_re -= pole_im * im_ND
                        im_ND = (pole_re * im_ND + pole_im * re_ND) * keep
                    re_ND = next_re * keep
                if OUTPUT:
                    y_D = tl.sum(out_ND, axis=0) + skip_D * u_D
                    tl.store(y + token * channels + d, y_D.to(y.dtype.element_ty), mask=mask_D)
    tl.store(ends + row + offset_ND, re_ND, mask=mask_ND)
    if COMPLEX:
        tl.store(ends + part + row + offset_ND, im_ND, mask=mask_ND)


@triton.jit
def mode_gradient_kernel(
    u, grad_y, poles, weights, starts, entering, slopes, sums, ends, length, channels, modes, segment, segments,
    u_strides, grad_strides, starts_stride, N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, TILE: tl.constexpr,
    COMPLEX: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """Gradients of the modes without the adjoint: x and its derivative by the pole's logarithm run side by side.

    With l_t = dx_t / dlog p = p (l_{t-1} + x_{t-1}), the gradient of R is sum_t conj(x_t) dy_t and that of log p is
    sum_t conj(R l_t) dy_t; OUTPUT: this segment's share of both goes to `sums`, (2, parts, B, S, N, D). Otherwise
    `ends` takes the derivative that leaves the segment, from states `entering` and slopes of zero.
    """
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    s = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N_BLOCK)
    mask_D = d < channels
    mask_ND = (n < modes)[:, None] & mask_D[None, :]
    begin = s.to(tl.int64) * segment
    stop = tl.minimum(begin + segment, length)
    offset_ND = n[:, None] * channels + d[None, :]
    size = modes * channels
    part = tl.num_programs(2).to(tl.int64) * segments * size
    row = (b * segments + s) * size
    pole_re = tl.load(poles + offset_ND, mask=mask_ND, other=0.0)
    re_ND = tl.load(entering + row + offset_ND, mask=mask_ND, other=0.0)
    slope_re = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
    slope_im = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
    if OUTPUT:
        slope_re += tl.load(slopes + row + offset_ND, mask=mask_ND, other=0.0)
    if COMPLEX:
        pole_im = tl.load(poles + size + offset_ND, mask=mask_ND, other=0.0)
        im_ND = tl.load(entering + part + row + offset_ND, mask=mask_ND, other=0.0)
        if OUTPUT:
            slope_im += tl.load(slopes + part + row + offset_ND, mask=mask_ND, other=0.0)
    state_sum_re = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
    state_sum_im = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
    slope_sum_re = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
    slope_sum_im = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
    u += b * u_strides[0]
    grad_y += b * grad_strides[0]
    if starts is not None:
        starts += b * starts_stride
    for i in range(0, tl.cdiv(stop - begin, TILE)):
        first = begin + i * TILE
        us = load_rows(u, u_strides[1], first, stop, d, mask_D, TILE)
        grads = load_rows(grad_y, grad_strides[1], first, stop, d, mask_D, TILE)
        keeps = load_keeps(starts, first, stop, TILE)
        for j in tl.static_range(TILE):
            if first + j < stop:
                both_re = slope_re + re_ND
                next_re, next_slope_re = pole_re * re_ND, pole_re * both_re
                if COMPLEX:
                    both_im = slope_im + im_ND
                    next_re -= pole_im * im_ND
                    next_slope_re -= pole_im * both_im
                    slope_im = (pole_re * both_im + pole_im * both_re) * keeps[j]
                    im_ND = (pole_re * im_ND + pole_im * re_ND) * keeps[j]
                    state_sum_im += im_ND * grads[j][None, :]
                    slope_sum_im += slope_im * grads[j][None, :]
                slope_re = next_slope_re * keeps[j]
                re_ND = next_re * keeps[j] + tl.where(mask_ND, us[j][None, :], 0.0)
                state_sum_re += re_ND * grads[j][None, :]
                slope_sum_re += slope_re * grads[j][None, :]
    if OUTPUT:
        # conj(x) dy, and conj(R l) dy
        weight_re = tl.load(weights + offset_ND, mask=mask_ND, other=0.0)
        both = 2 * part if COMPLEX else part
        tl.store(sums + row + offset_ND, state_sum_re, mask=mask_ND)
        if COMPLEX:
            weight_im = tl.load(weights + size + offset_ND, mask=mask_ND, other=0.0)
            tl.store(sums + part + row + offset_ND, -state_sum_im, mask=mask_ND)
            imaginary = weight_re * slope_sum_im + weight_im * slope_sum_re
            tl.store(sums + both + part + row + offset_ND, -imaginary, mask=mask_ND)
            slope_sum_re = weight_re * slope_sum_re - weight_im * slope_sum_im
        else:
            slope_sum_re = weight_re * slope_sum_re
        tl.store(sums + both + row + offset_ND, slope_sum_re, mask=mask_ND)
    tl.store(ends + row + offset_ND, slope_re, mask=mask_ND)
    if COMPLEX:
        tl.store(ends + part + row + offset_ND, slope_im, mask=mask_ND)


@triton.jit
def pass_kernel(
    ends, powers, alive, outermost, carried, size, segments, alive_stride,
    BLOCK: tl.constexpr, COMPLEX: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """States (REVERSE: adjoints) that enter each segment, carried in double precision.

    `powers` is (2, parts, N D), of a whole segment and of the last one; `alive` (B or 1, S) is zero where a document
    begins.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1).to(tl.int64)
    mask = i < size
    part = tl.num_programs(1).to(tl.int64) * segments * size
    re = tl.load(outermost + b * size + i, mask=mask, other=0.0).to(tl.float64)
    im = tl.zeros([BLOCK], dtype=tl.float64)
    parts = 2 if COMPLEX else 1
    if COMPLEX:
        im += tl.load(outermost + (tl.num_programs(1) + b) * size + i, mask=mask, other=0.0).to(tl.float64)
    for step in range(0, segments):
        s = (segments - 1 - step) if REVERSE else step
        row = (b * segments + s) * size
        tl.store(carried + row + i, re.to(tl.float32), mask=mask)
        if COMPLEX:
            tl.store(carried + part + row + i, im.to(tl.float32), mask=mask)
        which = tl.where(s == segments - 1, parts, 0).to(tl.int64) * size
        keep = tl.load(alive + b * alive_stride + s).to(tl.float64)
        power_re = tl.load(powers + which + i, mask=mask, other=0.0) * keep
        next_re = power_re * re
        if COMPLEX:
            power_im = tl.load(powers + which + size + i, mask=mask, other=0.0) * keep
            power_im = -power_im if REVERSE else power_im
            next_re -= power_im * im
            im = power_re * im + power_im * re
            im += tl.load(ends + part + row + i, mask=mask, other=0.0).to(tl.float64)
        re = next_re + tl.load(ends + row + i, mask=mask, other=0.0).to(tl.float64)
