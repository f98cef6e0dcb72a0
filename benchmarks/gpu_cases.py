"""What kernels_gpu.py measures: ours and peers, by name. Every entry makes (inputs, function) on DEVICE.

A peer that is not installed raises ImportError, which becomes a row of the table. Peers are never dependencies; they
are installed beside (pip install --no-deps) on the machine that measures.

Legend: B batch, T tokens, D channels, N states, H heads, P head width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longstride import kernels
from longstride.kernels.gated_linear_attention import gated_linear_attention
from longstride.kernels.modal_convolution import modal_convolution
from longstride.kernels.state_space_dual import state_space_dual

from .measuring import Case

DTYPE = torch.bfloat16
DEVICE = "cuda"


def _peer(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_()


def _scan_inputs(batch: int, length: int, channels: int, states: int) -> list[Tensor]:
    rates = -torch.arange(1.0, states + 1, device=DEVICE).repeat(channels, 1)
    sizes = (batch, length)
    inputs = [_random(*sizes, channels), (_random(*sizes, channels).detach() - 4.0).requires_grad_()]
    inputs += [rates.requires_grad_(), _random(*sizes, states), _random(*sizes, states)]
    return [*inputs, torch.ones(channels, device=DEVICE).requires_grad_(), _random(*sizes, channels)]


def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    return kernels.selective_scan(u, delta, A, B, C, D=D, z_BTD=z, delta_softplus=True)[0]


def _mamba_scan(batch: int, length: int, channels: int, states: int) -> Case:
    """mamba-ssm's CUDA kernel; it wants (B, D, T), given here for nothing."""
    peer = _peer("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    u, delta, A, B, C, D, z = _scan_inputs(batch, length, channels, states)
    across = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (u, delta, B, C, z)]
    inputs = [across[0], across[1], A, across[2], across[3], D, across[4]]
    return inputs, lambda u, delta, A, B, C, D, z: peer(u, delta, A, B, C, D, z=z, delta_softplus=True)


def _dual_inputs(batch: int, length: int, heads: int, width: int, states: int) -> list[Tensor]:
    decay = (-0.1 * torch.rand(batch, length, heads, device=DEVICE)).requires_grad_()
    both = [_random(batch, length, 1, states) for _ in range(2)]
    return [_random(batch, length, heads, width), decay, *both]


def _mamba_dual(**sizes: int) -> Case:
    """mamba-ssm's Triton path, told the same decays: rate -1, and a step size of minus our log decay."""
    peer = _peer("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    x, decay, B, C = _dual_inputs(**sizes)
    rate = -torch.ones(x.shape[2], device=DEVICE)
    inputs = [x, (-decay.detach()).requires_grad_(), B, C]
    return inputs, lambda x, step, B, C: peer(x, step, rate, B, C, chunk_size=256)


def _fla_retention(batch: int, length: int, heads: int, width: int, states: int) -> Case:
    """fla-core with a constant decay per head: data-dependent ones raise on Triton 3.4 to 3.7.0."""
    peer = _peer("fla.ops.simple_gla", "chunk_simple_gla")
    decay = -torch.linspace(0.01, 0.1, heads, device=DEVICE)
    queries, keys = _random(batch, length, heads, states), _random(batch, length, heads, states)
    return [queries, keys, _random(batch, length, heads, width)], lambda q, k, v: peer(q, k, v, g_gamma=decay)[0]


def _gated_inputs(batch: int, length: int, heads: int, keys: int) -> list[Tensor]:
    decay = -0.1 * torch.rand(batch, length, heads, keys, device=DEVICE)
    return [*(_random(batch, length, heads, keys) for _ in range(3)), decay.requires_grad_()]


def _fla_gated(**sizes: int) -> Case:
    peer = _peer("fla.ops.gla", "chunk_gla")
    return _gated_inputs(**sizes), lambda q, k, v, g: peer(q, k, v, g)[0]


def _modal_inputs(batch: int, length: int, channels: int, states: int) -> list[Tensor]:
    poles = -torch.logspace(-4, 0, states, device=DEVICE).repeat(channels, 1)
    return [_random(batch, length, channels), poles.requires_grad_(), _random(channels, states, dtype=torch.float32)]


def _modal_by_fft(u: Tensor, poles: Tensor, residues: Tensor) -> Tensor:
    """The filter written out, then the FFT: what the scan replaces."""
    lags = torch.arange(u.shape[1], device=u.device)
    taps = torch.einsum("dn,dnl->dl", residues, torch.exp(poles.unsqueeze(-1) * lags))
    return _rfft(u, taps)


def _rfft(u: Tensor, taps: Tensor) -> Tensor:
    size = 2 * u.shape[1]
    spectrum = torch.fft.rfft(u.float().transpose(1, 2), size) * torch.fft.rfft(taps, size)
    return torch.fft.irfft(spectrum, size)[..., : u.shape[1]].transpose(1, 2).to(u.dtype)


def _convolution(function: Callable[..., Any], batch: int, length: int, channels: int) -> Case:
    return [_random(batch, length, channels), _random(channels, length, dtype=torch.float32)], function


def _flash(batch: int, length: int, channels: int) -> Case:
    """Causal attention of the same width, heads of 64."""
    inputs = [_random(batch, channels // 64, length, 64) for _ in range(3)]
    return inputs, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _short(function: Callable[..., Any], batch: int, length: int, channels: int, width: int) -> Case:
    return [_random(batch, length, channels), _random(channels, width)], function


def _ours_short(x: Tensor, weight: Tensor) -> Tensor:
    return kernels.short_convolution(x, weight, activation="silu")


def _peer_short(**sizes: int) -> Case:
    peer = _peer("causal_conv1d", "causal_conv1d_fn")
    return _short(lambda x, weight: peer(x.transpose(1, 2), weight, activation="silu").transpose(1, 2), **sizes)


def _copy(batch: int, length: int, channels: int, width: int) -> Case:
    """Reads and writes what a perfect short convolution would: x and y, then x, dy and dx."""
    source, target = _random(batch, length, channels).detach(), _random(batch, length, channels).detach()
    leaf = torch.zeros(1, device=DEVICE, requires_grad=True)

    def copies(leaf: Tensor) -> Tensor:
        target.copy_(source)
        target.add_(source)  # two reads and a write
        return leaf * 1.0

    del width
    return [leaf], copies


def _experts(function: Callable[..., Any], tokens: int, width: int, hidden: int, experts: int) -> Case:
    counts = kernels.permute(torch.randint(experts, (tokens, 1), device=DEVICE), experts)[1]
    return [_random(tokens, width), _random(experts, width, hidden)], lambda x, w: function(x, w, counts)


def _expert_loop(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    pieces = zip(x.split(counts.tolist()), weight.unbind(0), strict=True)
    return torch.cat([piece @ matrix for piece, matrix in pieces])


def _entropy(function: Callable[..., Any], tokens: int, width: int, vocabulary: int) -> Case:
    targets = torch.randint(vocabulary, (tokens,), device=DEVICE)
    inputs = [_random(tokens, width), (_random(vocabulary, width).detach() * 0.02).requires_grad_()]
    return inputs, lambda hidden, weight: function(hidden, weight, targets)


def _naive_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def _liger_entropy(**sizes: int) -> Case:
    peer = _peer("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")(reduction="sum")
    return _entropy(lambda hidden, weight, targets: peer(weight, hidden, targets), **sizes)


def _norm(function: Callable[..., Any], tokens: int, width: int) -> Case:
    return [_random(tokens, width), _random(width)], function


def _plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def _pair(function: Callable[..., Any], tokens: int, width: int) -> Case:
    return [_random(tokens, width), _random(tokens, width)], function


def _dual(**sizes: int) -> Case:
    return _dual_inputs(**sizes), lambda *inputs: state_space_dual(*inputs)[0]


def _gated(**sizes: int) -> Case:
    return _gated_inputs(**sizes), lambda *inputs: gated_linear_attention(*inputs)[0]


def _modal(**sizes: int) -> Case:
    return _modal_inputs(**sizes), lambda *inputs: modal_convolution(*inputs)[0]


def _wkv4(function: Callable[..., Any], batch: int, length: int, channels: int) -> Case:
    decay, bonus = -torch.linspace(0.01, 2.0, channels, device=DEVICE), torch.zeros(channels, device=DEVICE)
    inputs = [_random(batch, length, channels), _random(batch, length, channels)]
    return [*inputs, decay.requires_grad_(), bonus.requires_grad_()], function


def _peer_wkv4(**sizes: int) -> Case:
    """fla-core takes the logarithm of minus our log decay, and a state."""
    peer = _peer("fla.ops.rwkv4", "fused_recurrent_rwkv4")
    state = torch.zeros(sizes["batch"], 3, 1, sizes["channels"], device=DEVICE)
    state[:, 2] = -1e30
    return _wkv4(lambda k, v, decay, bonus: peer((-decay).log(), bonus, k, v, state)[0], **sizes)


def _wkv7(function: Callable[..., Any], batch: int, length: int, heads: int, width: int) -> Case:
    """Keys that the state unlearns, as RWKV-7 makes them: a = -kappa, b = kappa times a rate of a half."""
    shape = (batch, length, heads, width)
    kappa = F.normalize(_random(*shape).detach().float(), dim=-1).to(DTYPE)
    decay = (-0.6 * torch.rand(shape, device=DEVICE)).to(DTYPE)
    fixed = [decay, _random(*shape).detach(), _random(*shape).detach(), -kappa, kappa * 0.5]
    return [_random(*shape), *(x.requires_grad_() for x in fixed)], function


def _peer_wkv7(**sizes: int) -> Case:
    peer = _peer("fla.ops.rwkv7", "chunk_rwkv7")
    return _wkv7(lambda r, w, k, v, a, b: peer(r=r, w=w, k=k, v=v, a=a, b=b, scale=1.0)[0], **sizes)


def _rotary(function: Callable[..., Any], batch: int, length: int, heads: int, width: int) -> Case:
    positions = torch.arange(length, device=DEVICE)
    return [_random(batch, length, heads, width)], lambda x: function(x, positions)


def _plain_rotary(x: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * 10000.0 ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def _state(*shape: int) -> Tensor:
    return _random(*shape, dtype=torch.float32)


def _scan_from_state(readout: bool, batch: int, length: int, channels: int, states: int) -> Case:
    """What a split sequence does with the state that arrives: read it out, or scan again from it."""
    u, delta, rates, B, C, _, _ = _scan_inputs(batch, length, channels, states)
    steps, state = F.softplus(delta.detach()).requires_grad_(), _state(batch, channels, states)
    if readout:
        return [state, steps, rates, C], kernels.selective_scan_readout
    return [state, steps, rates, C, u, B], lambda state, steps, rates, C, u, B: kernels.selective_scan(
        u, steps, rates, B, C, initial_state=state
    )[0]


def _dual_from_state(readout: bool, **sizes: int) -> Case:
    x, decay, B, C = _dual_inputs(**sizes)
    state = _state(sizes["batch"], sizes["heads"], sizes["width"], sizes["states"])
    if readout:
        return [state, decay, C], kernels.state_space_dual_readout
    return [state, decay, C, x, B], lambda state, decay, C, x, B: state_space_dual(x, decay, B, C, initial_state=state)[
        0
    ]


def _gated_from_state(readout: bool, **sizes: int) -> Case:
    q, k, v, decay = _gated_inputs(**sizes)
    state = _state(sizes["batch"], sizes["heads"], sizes["keys"], sizes["keys"])
    if readout:
        return [state, q, decay], kernels.gated_linear_attention_readout
    return [state, q, decay, k, v], lambda state, q, decay, k, v: gated_linear_attention(
        q, k, v, decay, initial_state=state
    )[0]


def _modal_from_state(readout: bool, **sizes: int) -> Case:
    u, poles, residues = _modal_inputs(**sizes)
    state, length = _state(sizes["batch"], sizes["channels"], sizes["states"]), sizes["length"]
    if readout:
        return [state, poles, residues], lambda *inputs: kernels.modal_readout(*inputs, length)
    return [state, poles, residues, u], lambda state, poles, residues, u: modal_convolution(
        u, poles, residues, initial_state=state
    )[0]


def _gated_convolution(function: Callable[..., Any], **sizes: int) -> Case:
    """As Hyena has it: gates before and behind."""
    shape = sizes["batch"], sizes["length"], sizes["channels"]
    inputs, _ = _convolution(function, **sizes)
    return [*inputs, _random(*shape), _random(*shape)], function


def _ours_gated(u: Tensor, taps: Tensor, first: Tensor, last: Tensor) -> Tensor:
    return kernels.long_convolution(u, taps, input_gate=first, gate=last)


CASES: dict[str, Callable[..., Case]] = {
    "scan: ours": lambda **sizes: (_scan_inputs(**sizes), _scan),
    "scan: mamba-ssm": _mamba_scan,
    "dual: ours": _dual,
    "dual: mamba-ssm": _mamba_dual,
    "dual: fla retention": _fla_retention,
    "gated: ours": _gated,
    "gated: fla": _fla_gated,
    "modal: ours": _modal,
    "modal: filter and FFT": lambda **sizes: (_modal_inputs(**sizes), _modal_by_fft),
    "long: ours": lambda **sizes: _convolution(kernels.long_convolution, **sizes),
    "long: plain rfft": lambda **sizes: _convolution(_rfft, **sizes),
    "long: flash attention": _flash,
    "gated long: ours": lambda **sizes: _gated_convolution(_ours_gated, **sizes),
    "gated long: plain rfft": lambda **sizes: _gated_convolution(
        lambda u, taps, first, last: last * _rfft(first * u, taps), **sizes
    ),
    "wkv4: ours": lambda **sizes: _wkv4(lambda *inputs: kernels.wkv4(*inputs)[0], **sizes),
    "wkv4: fla": _peer_wkv4,
    "wkv7: ours": lambda **sizes: _wkv7(lambda *inputs: kernels.wkv7(*inputs)[0], **sizes),
    "wkv7: fla": _peer_wkv7,
    "scan read-out: ours": partial(_scan_from_state, True),
    "scan read-out: second scan": partial(_scan_from_state, False),
    "dual read-out: ours": partial(_dual_from_state, True),
    "dual read-out: second pass": partial(_dual_from_state, False),
    "gated read-out: ours": partial(_gated_from_state, True),
    "gated read-out: second pass": partial(_gated_from_state, False),
    "modal read-out: ours": partial(_modal_from_state, True),
    "modal read-out: second pass": partial(_modal_from_state, False),
    "rotary: ours": lambda **sizes: _rotary(kernels.rotary, **sizes),
    "rotary: autograd": lambda **sizes: _rotary(_plain_rotary, **sizes),
    "short: ours": lambda **sizes: _short(_ours_short, **sizes),
    "short: causal-conv1d": _peer_short,
    "short: copies": _copy,
    "experts: ours": lambda **sizes: _experts(kernels.grouped_matmul, **sizes),
    "experts: loop": lambda **sizes: _experts(_expert_loop, **sizes),
    "entropy: ours": lambda **sizes: _entropy(kernels.linear_cross_entropy, **sizes),
    "entropy: naive": lambda **sizes: _entropy(_naive_entropy, **sizes),
    "entropy: liger": _liger_entropy,
    "norm: ours": lambda **sizes: _norm(kernels.rms_norm, **sizes),
    "norm: F.rms_norm": lambda **sizes: _norm(_plain_norm, **sizes),
    "swiglu: ours": lambda **sizes: _pair(kernels.swiglu, **sizes),
    "swiglu: autograd": lambda **sizes: _pair(lambda gate, up: F.silu(gate) * up, **sizes),
}
