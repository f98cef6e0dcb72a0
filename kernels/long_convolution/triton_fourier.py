"""What lies around the transforms of a long convolution on a GPU, each in one pass over memory.

Tokens (channels dense) become rows (time dense) of padded length, gated and in float32, so that the library's real FFT
reads them without a copy; the backward's three products of spectra are one pass; rows become tokens again with skip and
gates. The inverse transform is taken without its division, which the last pass does.

Legend: B batch, T tokens, D channels (of a block), F padded length, M frequencies, all inside kernels of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support
from ..triton_support import batch_strides, interpreting, power_of_two


@triton.jit
def _tokens(x, strides, b, t, d, mask_TD):
    """A block of tokens by channels, as float32; ones where there is no tensor."""
    if x is None:
        x_TD = tl.where(mask_TD, 1.0, 0.0)
    else:
        at = b * strides[0] + t[:, None] * strides[1] + d[None, :]
        x_TD = tl.load(x + at, mask=mask_TD, other=0.0).to(tl.float32)
    return x_TD


@triton.jit
def _rows(x, at_D, t, mask_TD):
    """The same block of rows, as tokens by channels."""
    return tl.load(x + at_D[None, :] + t[:, None], mask=mask_TD, other=0.0)


@triton.jit
def rows_kernel(
    u, gate, rows, length, channels, padded, u_strides, gate_strides, T_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr
):
    """rows[b, d, t] = u[b, t, d] gate[b, t, d], and zeros from `length` to `padded`."""
    t = tl.program_id(0).to(tl.int64) * T_BLOCK + tl.arange(0, T_BLOCK)
    d, b = tl.program_id(1) * D_BLOCK + tl.arange(0, D_BLOCK), tl.program_id(2).to(tl.int64)
    mask_TD = (t < length)[:, None] & (d < channels)[None, :]
    v_TD = _tokens(u, u_strides, b, t, d, mask_TD) * _tokens(gate, gate_strides, b, t, d, mask_TD)
    at_D = (b * channels + d) * padded
    tl.store(rows + at_D[None, :] + t[:, None], v_TD, mask=(t < padded)[:, None] & (d < channels)[None, :])


@triton.jit
def tokens_kernel(
    rows, u, input_gate, gate, skip, y, scale, length, channels, padded, u_strides, input_strides, gate_strides,
    y_strides, T_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr,
):  # fmt: skip
    """y = gate (scale rows + skip input_gate u)."""
    t = tl.program_id(0).to(tl.int64) * T_BLOCK + tl.arange(0, T_BLOCK)
    d, b = tl.program_id(1) * D_BLOCK + tl.arange(0, D_BLOCK), tl.program_id(2).to(tl.int64)
    mask_D = d < channels
    mask_TD = (t < length)[:, None] & mask_D[None, :]
    y_TD = scale * _rows(rows, (b * channels + d) * padded, t, mask_TD)
    if skip is not None:
        v_TD = _tokens(u, u_strides, b, t, d, mask_TD) * _tokens(input_gate, input_strides, b, t, d, mask_TD)
        y_TD += v_TD * tl.load(skip + d, mask=mask_D, other=0.0)[None, :]
    if gate is not None:
        y_TD *= _tokens(gate, gate_strides, b, t, d, mask_TD)
    at = b * y_strides[0] + t[:, None] * y_strides[1] + d[None, :]
    tl.store(y + at, y_TD.to(y.dtype.element_ty), mask=mask_TD)


@triton.jit
def tokens_gradient_kernel(
    grad_rows, y_rows, u, input_gate, gate, grad_y, skip, grad_u, grad_input_gate, grad_gate, grad_skip,
    scale, length, channels, padded, u_strides, input_strides, gate_strides, grad_strides, out_strides,
    T_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens, of both gates, and one block's share of that of the skip; what is None is left out.

    `grad_rows` are the gradient of v = input_gate u through the filter, `y_rows` the convolution itself.
    """
    t = tl.program_id(0).to(tl.int64) * T_BLOCK + tl.arange(0, T_BLOCK)
    d, b = tl.program_id(1) * D_BLOCK + tl.arange(0, D_BLOCK), tl.program_id(2).to(tl.int64)
    mask_D = d < channels
    mask_TD = (t < length)[:, None] & mask_D[None, :]
    at_D = (b * channels + d) * padded
    out_TD = b * out_strides[0] + t[:, None] * out_strides[1] + d[None, :]
    u_TD = _tokens(u, u_strides, b, t, d, mask_TD)
    input_TD = _tokens(input_gate, input_strides, b, t, d, mask_TD)
    grad_y_TD = _tokens(grad_y, grad_strides, b, t, d, mask_TD)
    grad_TD = grad_y_TD * _tokens(gate, gate_strides, b, t, d, mask_TD)
    grad_v_TD = scale * _rows(grad_rows, at_D, t, mask_TD)
    if skip is not None:
        skip_D = tl.load(skip + d, mask=mask_D, other=0.0)
        grad_v_TD += grad_TD * skip_D[None, :]
        part = b * tl.num_programs(0) + tl.program_id(0)
        tl.store(grad_skip + part * channels + d, tl.sum(u_TD * input_TD * grad_TD, axis=0), mask=mask_D)
    tl.store(grad_u + out_TD, (grad_v_TD * input_TD).to(grad_u.dtype.element_ty), mask=mask_TD)
    if grad_input_gate is not None:
        grad_input_TD = grad_v_TD * u_TD
        tl.store(grad_input_gate + out_TD, grad_input_TD.to(grad_input_gate.dtype.element_ty), mask=mask_TD)
    if grad_gate is not None:
        y_TD = scale * _rows(y_rows, at_D, t, mask_TD)
        if skip is not None:
            y_TD += u_TD * input_TD * skip_D[None, :]
        tl.store(grad_gate + out_TD, (y_TD * grad_y_TD).to(grad_gate.dtype.element_ty), mask=mask_TD)


@triton.jit
def spectra_kernel(
    taps, grad, v, lags, batch, channels, frequencies, WITH_Y: tl.constexpr, WITH_LAGS: tl.constexpr,
    M_BLOCK: tl.constexpr,
):  # fmt: skip
    """grad *= conj(taps) and, for WITH_Y, v *= taps, in place; for WITH_LAGS lags = sum over the batch of grad conj(v).

    Complex numbers lie as pairs: taps (D, M, 2), grad and v (B, D, M, 2).
    """
    m = tl.program_id(0).to(tl.int64) * M_BLOCK + tl.arange(0, M_BLOCK)
    d = tl.program_id(1).to(tl.int64)
    mask_M2 = (m < frequencies)[:, None]
    pair_M2 = 2 * m[:, None] + tl.arange(0, 2)[None, :]
    taps_re, taps_im = tl.split(tl.load(taps + d * frequencies * 2 + pair_M2, mask=mask_M2, other=0.0))
    lags_re, lags_im = tl.zeros([M_BLOCK], dtype=tl.float32), tl.zeros([M_BLOCK], dtype=tl.float32)
    for b in range(0, batch):
        at_M2 = (tl.cast(b, tl.int64) * channels + d) * frequencies * 2 + pair_M2
        re, im = tl.split(tl.load(grad + at_M2, mask=mask_M2, other=0.0))
        grad_M2 = tl.join(re * taps_re + im * taps_im, im * taps_re - re * taps_im)
        tl.store(grad + at_M2, grad_M2, mask=mask_M2)
        if WITH_Y or WITH_LAGS:
            v_re, v_im = tl.split(tl.load(v + at_M2, mask=mask_M2, other=0.0))
        if WITH_LAGS:
            lags_re += re * v_re + im * v_im
            lags_im += im * v_re - re * v_im
        if WITH_Y:
            y_M2 = tl.join(v_re * taps_re - v_im * taps_im, v_re * taps_im + v_im * taps_re)
            tl.store(v + at_M2, y_M2, mask=mask_M2)
    if WITH_LAGS:
        tl.store(lags + d * frequencies * 2 + pair_M2, tl.join(lags_re, lags_im), mask=mask_M2)


def _grid(length: int, channels: int, batch: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    if interpreting():
        options = {"T_BLOCK": 16, "D_BLOCK": min(4, power_of_two(channels)), "num_warps": 1}
    else:
        options = {"T_BLOCK": 64, "D_BLOCK": min(32, power_of_two(channels)), "num_warps": 4}
    return (-(-length // options["T_BLOCK"]), -(-channels // options["D_BLOCK"]), batch), options


def to_rows(u_BTD: Tensor, gate_BTD: Tensor | None, padded: int) -> Tensor:
    """(B, D, F) float32: gated tokens and zeros behind them. Channels of the arguments lie dense."""
    batch, length, channels = u_BTD.shape
    rows_BDF = torch.empty(batch, channels, padded, dtype=torch.float32, device=u_BTD.device)
    grid, options = _grid(padded, channels, batch)
    triton_support.launch(
        rows_kernel, grid, u_BTD, gate_BTD, rows_BDF, length, channels, padded, batch_strides(u_BTD),
        batch_strides(gate_BTD), **options,
    )  # fmt: skip
    return rows_BDF


def to_tokens(
    rows_BDF: Tensor,
    u_BTD: Tensor,
    input_gate: Tensor | None,
    gate: Tensor | None,
    skip_D: Tensor | None,
    y_BTD: Tensor,
) -> None:
    """Write gate (rows / F + skip input_gate u) to `y_BTD`, whose channels lie dense too."""
    (batch, length, channels), padded = u_BTD.shape, rows_BDF.shape[2]
    grid, options = _grid(length, channels, batch)
    triton_support.launch(
        tokens_kernel, grid, rows_BDF, u_BTD, input_gate, gate, skip_D, y_BTD, 1.0 / padded, length, channels, padded,
        *(batch_strides(x) for x in (u_BTD, input_gate, gate, y_BTD)), **options,
    )  # fmt: skip


def to_token_gradients(
    rows: tuple[Tensor, Tensor | None],
    tokens: tuple[Tensor, Tensor | None, Tensor | None, Tensor],
    skip_D: Tensor | None,
    outs: tuple[Tensor, Tensor | None, Tensor | None],
) -> Tensor | None:
    """Write the gradients of u and both gates to `outs`; returns that of the skip.

    `rows` as the kernel has them; `tokens` are u, both gates and the gradient of y; `outs` share their strides.
    """
    (batch, length, channels), padded = tokens[0].shape, rows[0].shape[2]
    grid, options = _grid(length, channels, batch)
    grad_skip = None if skip_D is None else skip_D.new_empty(batch, grid[0], channels)
    triton_support.launch(
        tokens_gradient_kernel, grid, *rows, *tokens, skip_D, *outs, grad_skip, 1.0 / padded, length, channels, padded,
        *(batch_strides(x) for x in (*tokens, outs[0])), **options,
    )  # fmt: skip
    return None if grad_skip is None else grad_skip.sum((0, 1))


def multiply_spectra_(
    taps_DM: Tensor, grad_BDM: Tensor, v_BDM: Tensor | None, *, with_y: bool, with_lags: bool
) -> Tensor | None:
    """The backward's products, in place of the spectra that they replace; returns that of the taps' gradient."""
    batch, channels, frequencies = grad_BDM.shape
    lags_DM = torch.empty_like(taps_DM) if with_lags else None
    block = 16 if interpreting() else 512
    pairs = [None if x is None else torch.view_as_real(x) for x in (taps_DM, grad_BDM, v_BDM, lags_DM)]
    triton_support.launch(
        spectra_kernel, (-(-frequencies // block), channels), *pairs, batch, channels, frequencies, WITH_Y=with_y,
        WITH_LAGS=with_lags, M_BLOCK=block, num_warps=4,
    )  # fmt: skip
    return lags_DM
