"""What kernels_cpu.py measures: ours and others, by name. Every entry makes (inputs, function), float32, batch 1.

Legend: B batch, T tokens, D channels, N states per channel or tokens, V vocabulary, E experts, F expert width.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longstride import kernels
from longstride.kernels.selective_scan.portable import SelectiveScan

from .measuring import Case


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def _scan_inputs(length: int, channels: int = 256, states: int = 16) -> list[Tensor]:
    """Those of a fresh Mamba layer: rates -1 .. -N, step sizes log-uniform between 1e-3 and 1e-1."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.exp(torch.empty(channels).uniform_(-6.9, -2.3, generator=generator))
    noise = torch.rand(1, length, channels, generator=generator)
    rates = -torch.arange(1.0, states + 1).repeat(channels, 1)
    inputs = [_random(1, length, channels), noise.add_(0.5).mul_(steps), rates]
    inputs += [_random(1, length, states, seed=1), _random(1, length, states, seed=2)]
    return [x.detach().requires_grad_() for x in inputs]


def _portable(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    state = torch.zeros(u.shape[0], *A.shape)
    return SelectiveScan.apply(u, delta, A, B, C, None, None, None, state, None, False)[0]


def _compiled(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from longstride.kernels import compiled
    from longstride.kernels.selective_scan.compiled import EXTENSION, CompiledSelectiveScan

    if compiled.library(EXTENSION.source) is None:
        raise RuntimeError("no C++ compiler on this machine")
    state = torch.zeros(u.shape[0], *A.shape)
    return CompiledSelectiveScan.apply(u, delta, A, B, C, None, None, None, state, None, False)[0]


def _public_scan(*inputs: Tensor) -> Tensor:
    return kernels.selective_scan(*inputs)[0]


def _loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence as printed, through autograd; unbound, since indexing x[t] makes the backward quadratic."""
    decay, entering = torch.exp(delta.unsqueeze(-1) * A), (delta * u).unsqueeze(-1) * B.unsqueeze(2)
    state, states = torch.zeros_like(entering[:, 0]), []
    for a, x in zip(decay.unbind(1), entering.unbind(1), strict=True):
        state = a * state + x
        states.append(state)
    return (torch.stack(states, 1) @ C.unsqueeze(-1)).squeeze(-1)


def _mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """github.com/alxndrTL/mamba.py: Blelloch's scan over all decays and inputs, as its MambaBlock calls it."""
    from mambapy.pscan import pscan  # type: ignore[import-not-found]

    decay = torch.exp(delta.unsqueeze(-1) * A)
    entering = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
    return (pscan(decay, entering) @ C.unsqueeze(-1)).squeeze(-1)


def _loop_library() -> ctypes.CDLL:
    source = Path(__file__).with_name("plain_scan.cpp")
    target = Path(tempfile.gettempdir()) / f"longstride-plain-scan-{os.getuid()}-{int(source.stat().st_mtime)}.so"
    if not target.exists():
        flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-pthread"]
        subprocess.run(["g++", *flags, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


class _PlainLoop(torch.autograd.Function):
    """Both passes of plain_scan.cpp in the forward: their sum is what is measured."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        u, A = inputs[0], inputs[2]
        y, du, ds = (torch.empty_like(u) for _ in range(3))
        dA, dB, dC = (torch.zeros_like(x) for x in inputs[2:])
        tensors = [*inputs, torch.ones_like(u), y, du, ds, dA, dB, dC]
        sizes = (torch.get_num_threads(), u.shape[1], u.shape[2], A.shape[1])
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
        _loop_library().plain_scan(*[ctypes.c_int64(size) for size in sizes], *pointers)
        ctx.save_for_backward(du, ds, dA, dB, dC)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return ctx.saved_tensors


def _scan(function: Callable[..., Any]) -> Callable[..., Case]:
    return lambda length, **sizes: (_scan_inputs(length, **sizes), function)


def _rfft(u: Tensor, taps: Tensor) -> Tensor:
    """The usual two lines, with padding to a power of two."""
    size = 1 << (2 * u.shape[1] - 1).bit_length()
    spectrum = torch.fft.rfft(u.transpose(1, 2), size) * torch.fft.rfft(taps, size)
    return torch.fft.irfft(spectrum, size)[..., : u.shape[1]].transpose(1, 2)


def _rfft_exact(u: Tensor, taps: Tensor) -> Tensor:
    """The same padded to twice the length exactly, channels first in memory: the best plain form we know."""
    size = 2 * u.shape[1]
    u = u.transpose(1, 2).contiguous()
    return torch.fft.irfft(torch.fft.rfft(u, size) * torch.fft.rfft(taps, size), size)[..., : u.shape[2]]


def _convolution(function: Callable[..., Any]) -> Callable[..., Case]:
    return lambda length, channels=256: ([_random(1, length, channels), _random(channels, length, seed=1)], function)


def _short(function: Callable[..., Any]) -> Callable[..., Case]:
    return lambda length, width=4: ([_random(1, length, 256), _random(256, width, seed=1)], function)


def _conv1d(x: Tensor, weight: Tensor) -> Tensor:
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.conv1d(padded, weight.unsqueeze(1), groups=weight.shape[0]).transpose(1, 2)


def _expert_case(
    function: Callable[..., Any], tokens: int, width: int = 256, hidden: int = 512, experts: int = 8
) -> Case:
    index = torch.randint(experts, (tokens, 1), generator=torch.Generator().manual_seed(0))
    counts = kernels.permute(index, experts)[1]
    inputs = [_random(tokens, width), _random(experts, width, hidden, seed=1), _random(experts, hidden, width, seed=2)]
    return inputs, lambda x, up, down: function(F.silu(function(x, up, counts)), down, counts)


def _expert_loop(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    pieces = zip(x.split(counts.tolist()), weight.unbind(0), strict=True)
    return torch.cat([piece @ matrix for piece, matrix in pieces])


def _entropy_case(function: Callable[..., Any], tokens: int, width: int = 256, vocabulary: int = 32768) -> Case:
    targets = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    inputs = [_random(tokens, width), (_random(vocabulary, width, seed=1).detach() * 0.1).requires_grad_()]
    return inputs, lambda hidden, weight: function(hidden, weight, targets)


def _naive_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")


def _plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def _filtered(length: int, channels: int = 256) -> Case:
    return [_random(1, length, channels), _random(channels, length, seed=1)], kernels.long_convolution


def _dual(length: int, heads: int = 4, width: int = 64, states: int = 16) -> Case:
    decay = -torch.rand(1, length, heads, generator=torch.Generator().manual_seed(0)) * 0.1
    inputs = [_random(1, length, heads, width), decay.requires_grad_()]
    inputs += [_random(1, length, 1, states, seed=1), _random(1, length, 1, states, seed=2)]
    return inputs, kernels.state_space_dual


def _gated(length: int, heads: int = 4, keys: int = 64) -> Case:
    decay = -torch.rand(1, length, heads, keys, generator=torch.Generator().manual_seed(0)) * 0.1
    inputs = [_random(1, length, heads, keys, seed=seed) for seed in range(3)] + [decay.requires_grad_()]
    return inputs, kernels.gated_linear_attention


def _modal(length: int, channels: int = 256, modes: int = 16) -> Case:
    poles = -torch.logspace(-4, 0, modes).repeat(channels, 1)
    inputs = [_random(1, length, channels), poles.requires_grad_(), _random(channels, modes, seed=1)]
    return inputs, kernels.modal_convolution


def _wkv4(length: int, channels: int = 256) -> Case:
    inputs = [_random(1, length, channels, seed=seed) for seed in range(2)]
    decay = -torch.logspace(-3, 0, channels)
    return [*inputs, decay.requires_grad_(), _random(channels, seed=3)], kernels.wkv4


def _wkv7(length: int, heads: int = 4, width: int = 64) -> Case:
    shape = (1, length, heads, width)
    r, k, v, direction = (_random(*shape, seed=seed) for seed in range(4))
    log_w = -torch.rand(shape, generator=torch.Generator().manual_seed(5)) * 0.6
    a = -F.normalize(direction.detach(), dim=-1)
    return [r, log_w.requires_grad_(), k, v, a.requires_grad_(), (-0.5 * a.detach()).requires_grad_()], kernels.wkv7


CASES: dict[str, Callable[..., Case]] = {
    "scan: ours, portable": _scan(_portable),
    "scan: ours, compiled": _scan(_compiled),
    "scan: plain C++ loop": _scan(_PlainLoop.apply),
    "scan: mambapy": _scan(_mambapy),
    "scan: loop of PyTorch": _scan(_loop),
    "long: ours": _convolution(kernels.long_convolution),
    "long: plain rfft": _convolution(_rfft),
    "long: best plain rfft": _convolution(_rfft_exact),
    "short: ours": _short(kernels.short_convolution),
    "short: conv1d": _short(_conv1d),
    "experts: ours": lambda **sizes: _expert_case(kernels.grouped_matmul, **sizes),
    "experts: loop": lambda **sizes: _expert_case(_expert_loop, **sizes),
    "entropy: ours": lambda **sizes: _entropy_case(kernels.linear_cross_entropy, **sizes),
    "entropy: naive": lambda **sizes: _entropy_case(_naive_entropy, **sizes),
    "norm: ours": lambda tokens: ([_random(tokens, 1024), _random(1024, seed=1)], kernels.rms_norm),
    "norm: F.rms_norm": lambda tokens: ([_random(tokens, 1024), _random(1024, seed=1)], _plain_norm),
    "swiglu: ours": lambda tokens: ([_random(tokens, 1024), _random(tokens, 1024, seed=1)], kernels.swiglu),
    "swiglu: autograd": lambda tokens: (
        [_random(tokens, 1024), _random(tokens, 1024, seed=1)],
        lambda gate, up: F.silu(gate) * up,
    ),
    "selective scan": lambda length: (_scan_inputs(length, channels=64), _public_scan),
    "state-space dual": lambda length: _dual(length, heads=1),
    "gated linear attention": lambda length: _gated(length, heads=1),
    "modal convolution": lambda length: _modal(length, channels=64),
    "wkv4": lambda length: _wkv4(length, channels=64),
    "wkv7": lambda length: _wkv7(length, heads=1),
    "long convolution": lambda length: _filtered(length, channels=64),
    "long: best plain rfft, 64 channels": lambda length: _convolution(_rfft_exact)(length, channels=64),
}
