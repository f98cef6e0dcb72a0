"""What kernels_gpu.py measures: ours and peers, by name. Every entry makes (inputs, function) on the GPU.

A peer that is not installed raises ImportError, which becomes a row of the table. Peers are never dependencies; they
are installed beside (pip install --no-deps) on the machine that measures. Recurrences have a module of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longstride import kernels

from . import gpu_common as gpu
from .gpu_recurrences import RECURRENCES
from .measuring import Case


def _convolution(function: Callable[..., Any], batch: int, length: int, channels: int) -> Case:
    return [gpu.random(batch, length, channels), gpu.random(channels, length, dtype=torch.float32)], function


def _flash(batch: int, length: int, channels: int) -> Case:
    """Causal attention of the same width, heads of 64."""
    inputs = [gpu.random(batch, channels // 64, length, 64) for _ in range(3)]
    return inputs, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _short(function: Callable[..., Any], batch: int, length: int, channels: int, width: int) -> Case:
    return [gpu.random(batch, length, channels), gpu.random(channels, width)], function


def _ours_short(x: Tensor, weight: Tensor) -> Tensor:
    return kernels.short_convolution(x, weight, activation="silu")


def _peer_short(**sizes: int) -> Case:
    peer = gpu.peer("causal_conv1d", "causal_conv1d_fn")
    return _short(lambda x, weight: peer(x.transpose(1, 2), weight, activation="silu").transpose(1, 2), **sizes)


def _copy(batch: int, length: int, channels: int, width: int) -> Case:
    """Reads and writes what a perfect short convolution would: x and y, then x, dy and dx."""
    source, target = gpu.random(batch, length, channels).detach(), gpu.random(batch, length, channels).detach()
    leaf = torch.zeros(1, device=gpu.DEVICE, requires_grad=True)

    def copies(leaf: Tensor) -> Tensor:
        target.copy_(source)
        target.add_(source)  # two reads and a write
        return leaf * 1.0

    del width
    return [leaf], copies


def _experts(function: Callable[..., Any], tokens: int, width: int, hidden: int, experts: int) -> Case:
    counts = kernels.permute(torch.randint(experts, (tokens, 1), device=gpu.DEVICE), experts)[1]
    return [gpu.random(tokens, width), gpu.random(experts, width, hidden)], lambda x, w: function(x, w, counts)


def _expert_loop(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    pieces = zip(x.split(counts.tolist()), weight.unbind(0), strict=True)
    return torch.cat([piece @ matrix for piece, matrix in pieces])


def _expert_rows(function: Callable[..., Any], tokens: int, width: int, experts: int) -> Case:
    """Two experts a token: rows into their order and, weighted, back."""
    index = torch.rand(tokens, experts, device=gpu.DEVICE).topk(2).indices
    order, _ = kernels.permute(index, experts)
    return [gpu.random(tokens, width), gpu.random(tokens, 2)], lambda x, weight: function(x, weight, order)


def _ours_rows(x: Tensor, weight: Tensor, order: Tensor) -> Tensor:
    rows = kernels.RowMap.of_sorted(order, 2)
    return kernels.sum_rows(kernels.gather_rows(x, rows), rows, weight.flatten())


def _selected_rows(x: Tensor, weight: Tensor, order: Tensor) -> Tensor:
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    back = x.index_select(0, order // 2).index_select(0, inverse)
    return (back.view(*weight.shape, -1) * weight.unsqueeze(-1)).sum(1)


def _entropy(function: Callable[..., Any], tokens: int, width: int, vocabulary: int) -> Case:
    targets = torch.randint(vocabulary, (tokens,), device=gpu.DEVICE)
    inputs = [gpu.random(tokens, width), (gpu.random(vocabulary, width).detach() * 0.02).requires_grad_()]
    return inputs, lambda hidden, weight: function(hidden, weight, targets)


def _naive_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def _liger_entropy(**sizes: int) -> Case:
    peer = gpu.peer("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")(reduction="sum")
    return _entropy(lambda hidden, weight, targets: peer(weight, hidden, targets), **sizes)


def _norm(function: Callable[..., Any], tokens: int, width: int) -> Case:
    return [gpu.random(tokens, width), gpu.random(width)], function


def _plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def _pair(function: Callable[..., Any], tokens: int, width: int) -> Case:
    return [gpu.random(tokens, width), gpu.random(tokens, width)], function


def _rotary(function: Callable[..., Any], batch: int, length: int, heads: int, width: int) -> Case:
    positions = torch.arange(length, device=gpu.DEVICE)
    return [gpu.random(batch, length, heads, width)], lambda x: function(x, positions)


def _plain_rotary(x: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * 10000.0 ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def _gated_convolution(function: Callable[..., Any], **sizes: int) -> Case:
    """As Hyena has it: gates before and behind."""
    shape = sizes["batch"], sizes["length"], sizes["channels"]
    inputs, _ = _convolution(function, **sizes)
    return [*inputs, gpu.random(*shape), gpu.random(*shape)], function


def _ours_gated(u: Tensor, taps: Tensor, first: Tensor, last: Tensor) -> Tensor:
    return kernels.long_convolution(u, taps, input_gate=first, gate=last)


CASES: dict[str, Callable[..., Case]] = {
    **RECURRENCES,
    "long: ours": lambda **sizes: _convolution(kernels.long_convolution, **sizes),
    "long: plain rfft": lambda **sizes: _convolution(gpu.convolve_by_fft, **sizes),
    "long: flash attention": _flash,
    "gated long: ours": lambda **sizes: _gated_convolution(_ours_gated, **sizes),
    "gated long: plain rfft": lambda **sizes: _gated_convolution(
        lambda u, taps, first, last: last * gpu.convolve_by_fft(first * u, taps), **sizes
    ),
    "rotary: ours": lambda **sizes: _rotary(kernels.rotary, **sizes),
    "rotary: autograd": lambda **sizes: _rotary(_plain_rotary, **sizes),
    "short: ours": lambda **sizes: _short(_ours_short, **sizes),
    "short: causal-conv1d": _peer_short,
    "short: copies": _copy,
    "experts: ours": lambda **sizes: _experts(kernels.grouped_matmul, **sizes),
    "experts: loop": lambda **sizes: _experts(_expert_loop, **sizes),
    "expert rows: ours": lambda **sizes: _expert_rows(_ours_rows, **sizes),
    "expert rows: index_select": lambda **sizes: _expert_rows(_selected_rows, **sizes),
    "entropy: ours": lambda **sizes: _entropy(kernels.linear_cross_entropy, **sizes),
    "entropy: naive": lambda **sizes: _entropy(_naive_entropy, **sizes),
    "entropy: liger": _liger_entropy,
    "norm: ours": lambda **sizes: _norm(kernels.rms_norm, **sizes),
    "norm: F.rms_norm": lambda **sizes: _norm(_plain_norm, **sizes),
    "swiglu: ours": lambda **sizes: _pair(kernels.swiglu, **sizes),
    "swiglu: autograd": lambda **sizes: _pair(lambda gate, up: F.silu(gate) * up, **sizes),
}
