"""Cases of kernels_gpu.py: recurrences, and what a split sequence does with their states. See gpu_cases.py.

Legend: B batch, T tokens, D channels, N states, H heads, P head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longstride import kernels

from . import gpu_common as gpu
from .measuring import Case


def _scan_inputs(batch: int, length: int, channels: int, states: int) -> list[Tensor]:
    rates = -torch.arange(1.0, states + 1, device=gpu.DEVICE).repeat(channels, 1)
    sizes = (batch, length)
    inputs = [gpu.random(*sizes, channels), (gpu.random(*sizes, channels).detach() - 4.0).requires_grad_()]
    inputs += [rates.requires_grad_(), gpu.random(*sizes, states), gpu.random(*sizes, states)]
    return [*inputs, torch.ones(channels, device=gpu.DEVICE).requires_grad_(), gpu.random(*sizes, channels)]


def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    return kernels.selective_scan(u, delta, A, B, C, D=D, z_BTD=z, delta_softplus=True)[0]


def _mamba_scan(batch: int, length: int, channels: int, states: int) -> Case:
    """mamba-ssm's CUDA kernel; it wants (B, D, T), given here for nothing."""
    peer = gpu.peer("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    u, delta, A, B, C, D, z = _scan_inputs(batch, length, channels, states)
    across = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (u, delta, B, C, z)]
    inputs = [across[0], across[1], A, across[2], across[3], D, across[4]]
    return inputs, lambda u, delta, A, B, C, D, z: peer(u, delta, A, B, C, D, z=z, delta_softplus=True)


def _dual_inputs(batch: int, length: int, heads: int, width: int, states: int) -> list[Tensor]:
    decay = (-0.1 * torch.rand(batch, length, heads, device=gpu.DEVICE)).requires_grad_()
    both = [gpu.random(batch, length, 1, states) for _ in range(2)]
    return [gpu.random(batch, length, heads, width), decay, *both]


def _mamba_dual(**sizes: int) -> Case:
    """mamba-ssm's Triton path, told the same decays: rate -1, and a step size of minus our log decay."""
    peer = gpu.peer("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    x, decay, B, C = _dual_inputs(**sizes)
    rate = -torch.ones(x.shape[2], device=gpu.DEVICE)
    inputs = [x, (-decay.detach()).requires_grad_(), B, C]
    return inputs, lambda x, step, B, C: peer(x, step, rate, B, C, chunk_size=256)


def _fla_retention(batch: int, length: int, heads: int, width: int, states: int) -> Case:
    """fla-core with a constant decay per head: data-dependent ones raise on Triton 3.4 to 3.7.0."""
    peer = gpu.peer("fla.ops.simple_gla", "chunk_simple_gla")
    decay = -torch.linspace(0.01, 0.1, heads, device=gpu.DEVICE)
    queries, keys = gpu.random(batch, length, heads, states), gpu.random(batch, length, heads, states)
    return [queries, keys, gpu.random(batch, length, heads, width)], lambda q, k, v: peer(q, k, v, g_gamma=decay)[0]


def _gated_inputs(batch: int, length: int, heads: int, keys: int) -> list[Tensor]:
    decay = -0.1 * torch.rand(batch, length, heads, keys, device=gpu.DEVICE)
    return [*(gpu.random(batch, length, heads, keys) for _ in range(3)), decay.requires_grad_()]


def _fla_gated(**sizes: int) -> Case:
    peer = gpu.peer("fla.ops.gla", "chunk_gla")
    return _gated_inputs(**sizes), lambda q, k, v, g: peer(q, k, v, g)[0]


def _modal_inputs(batch: int, length: int, channels: int, states: int) -> list[Tensor]:
    poles = -torch.logspace(-4, 0, states, device=gpu.DEVICE).repeat(channels, 1)
    return [
        gpu.random(batch, length, channels),
        poles.requires_grad_(),
        gpu.random(channels, states, dtype=torch.float32),
    ]


def _modal_by_fft(u: Tensor, poles: Tensor, residues: Tensor) -> Tensor:
    """The filter written out, then the FFT: what the scan replaces."""
    lags = torch.arange(u.shape[1], device=u.device)
    taps = torch.einsum("dn,dnl->dl", residues, torch.exp(poles.unsqueeze(-1) * lags))
    return gpu.convolve_by_fft(u, taps)


def _dual(**sizes: int) -> Case:
    return _dual_inputs(**sizes), lambda *inputs: kernels.state_space_dual(*inputs)[0]


def _gated(**sizes: int) -> Case:
    return _gated_inputs(**sizes), lambda *inputs: kernels.gated_linear_attention(*inputs)[0]


def _modal(**sizes: int) -> Case:
    return _modal_inputs(**sizes), lambda *inputs: kernels.modal_convolution(*inputs)[0]


def _wkv4(function: Callable[..., Any], batch: int, length: int, channels: int) -> Case:
    decay, bonus = -torch.linspace(0.01, 2.0, channels, device=gpu.DEVICE), torch.zeros(channels, device=gpu.DEVICE)
    inputs = [gpu.random(batch, length, channels), gpu.random(batch, length, channels)]
    return [*inputs, decay.requires_grad_(), bonus.requires_grad_()], function


def _peer_wkv4(**sizes: int) -> Case:
    """fla-core takes the logarithm of minus our log decay, and a state."""
    peer = gpu.peer("fla.ops.rwkv4", "fused_recurrent_rwkv4")
    state = torch.zeros(sizes["batch"], 3, 1, sizes["channels"], device=gpu.DEVICE)
    state[:, 2] = -1e30
    return _wkv4(lambda k, v, decay, bonus: peer((-decay).log(), bonus, k, v, state)[0], **sizes)


def _wkv7(function: Callable[..., Any], batch: int, length: int, heads: int, width: int) -> Case:
    """Keys that the state unlearns, as RWKV-7 makes them: a = -kappa, b = kappa times a rate of a half."""
    shape = (batch, length, heads, width)
    kappa = F.normalize(gpu.random(*shape).detach().float(), dim=-1).to(gpu.DTYPE)
    decay = (-0.6 * torch.rand(shape, device=gpu.DEVICE)).to(gpu.DTYPE)
    fixed = [decay, gpu.random(*shape).detach(), gpu.random(*shape).detach(), -kappa, kappa * 0.5]
    return [gpu.random(*shape), *(x.requires_grad_() for x in fixed)], function


def _peer_wkv7(**sizes: int) -> Case:
    peer = gpu.peer("fla.ops.rwkv7", "chunk_rwkv7")
    return _wkv7(lambda r, w, k, v, a, b: peer(r=r, w=w, k=k, v=v, a=a, b=b, scale=1.0)[0], **sizes)


def _wkv4_state(function: Callable[..., Any], **sizes: int) -> Case:
    return _wkv4(function, **sizes)[0][:3], function


def _wkv4_last(k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    return kernels.wkv4(k, v, decay, torch.zeros_like(decay))[1]


def _state(*shape: int) -> Tensor:
    return gpu.random(*shape, dtype=torch.float32)


def _wkv7_from_state(function: Callable[..., Any], **sizes: int) -> Case:
    """What a split sequence does: the state that leaves from zero, and the outputs from the state that arrives."""
    inputs, _ = _wkv7(function, **sizes)
    return [_state(sizes["batch"], sizes["heads"], sizes["width"], sizes["width"]), *inputs], function


def _wkv7_in_stages(state: Tensor, r: Tensor, *stored: Tensor) -> tuple[Tensor, Tensor]:
    stages = kernels.begin_wkv7(*stored)
    stages.compute_local(r)
    return stages.finish(state), stages.leaving + state @ stages.transition


def _wkv7_twice(state: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Without the transition, which would come on top."""
    return kernels.wkv7(*inputs, initial_state=state)[0], kernels.wkv7(*inputs)[1]


def _scan_from_state(function: Callable[..., Any], **sizes: int) -> Case:
    """What a split sequence does: the state that leaves from zero, and the outputs from the state that arrives."""
    u, delta, rates, B, C, _, _ = _scan_inputs(**sizes)
    return [_state(sizes["batch"], sizes["channels"], sizes["states"]), u, delta, rates, B, C], function


def _scan_in_stages(state: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    stages = kernels.begin_selective_scan(*inputs, delta_softplus=True)
    return stages.finish(state), stages.leaving


def _scan_twice(state: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    outputs, _ = kernels.selective_scan(*inputs, delta_softplus=True, initial_state=state)
    return outputs, kernels.selective_scan(*inputs, delta_softplus=True)[1]


def _dual_readout(state: Tensor, decay: Tensor, C: Tensor) -> Tensor:
    from longstride.kernels.triton_readout import TritonReadout

    return TritonReadout.apply(state.mT, decay.unsqueeze(-1), C, None)


def _dual_from_state(readout: bool, **sizes: int) -> Case:
    x, decay, B, C = _dual_inputs(**sizes)
    state = _state(sizes["batch"], sizes["heads"], sizes["width"], sizes["states"])
    if readout:
        return [state, decay, C], _dual_readout
    return [state, decay, C, x, B], lambda state, decay, C, x, B: kernels.state_space_dual(
        x, decay, B, C, initial_state=state
    )[0]


def _gated_from_state(readout: bool, **sizes: int) -> Case:
    q, k, v, decay = _gated_inputs(**sizes)
    state = _state(sizes["batch"], sizes["heads"], sizes["keys"], sizes["keys"])
    if readout:
        return [state, q, decay], kernels.gated_linear_attention_readout
    return [state, q, decay, k, v], lambda state, q, decay, k, v: kernels.gated_linear_attention(
        q, k, v, decay, initial_state=state
    )[0]


def _modal_readout(state: Tensor, poles: Tensor, residues: Tensor, length: int) -> Tensor:
    from longstride.kernels.modal_convolution.triton_readout import TritonModalReadout

    return TritonModalReadout.apply(state, poles, residues, length, None)


def _modal_from_state(readout: bool, **sizes: int) -> Case:
    u, poles, residues = _modal_inputs(**sizes)
    state, length = _state(sizes["batch"], sizes["channels"], sizes["states"]), sizes["length"]
    if readout:
        return [state, poles, residues], lambda *inputs: _modal_readout(*inputs, length)
    return [state, poles, residues, u], lambda state, poles, residues, u: kernels.modal_convolution(
        u, poles, residues, initial_state=state
    )[0]


RECURRENCES: dict[str, Callable[..., Case]] = {
    "scan: ours": lambda **sizes: (_scan_inputs(**sizes), _scan),
    "scan: mamba-ssm": _mamba_scan,
    "dual: ours": _dual,
    "dual: mamba-ssm": _mamba_dual,
    "dual: fla retention": _fla_retention,
    "gated: ours": _gated,
    "gated: fla": _fla_gated,
    "modal: ours": _modal,
    "modal: filter and FFT": lambda **sizes: (_modal_inputs(**sizes), _modal_by_fft),
    "wkv4: ours": lambda **sizes: _wkv4(lambda *inputs: kernels.wkv4(*inputs)[0], **sizes),
    "wkv4: fla": _peer_wkv4,
    "wkv7: ours": lambda **sizes: _wkv7(lambda *inputs: kernels.wkv7(*inputs)[0], **sizes),
    "wkv7: fla": _peer_wkv7,
    "wkv4 state: ours": lambda **sizes: _wkv4_state(kernels.wkv4_state, **sizes),
    "wkv4 state: whole recurrence": lambda **sizes: _wkv4_state(_wkv4_last, **sizes),
    "wkv7 stages: ours": partial(_wkv7_from_state, _wkv7_in_stages),
    "wkv7 stages: two passes": partial(_wkv7_from_state, _wkv7_twice),
    "scan stages: ours": partial(_scan_from_state, _scan_in_stages),
    "scan stages: two scans": partial(_scan_from_state, _scan_twice),
    "dual read-out: ours": partial(_dual_from_state, True),
    "dual read-out: second pass": partial(_dual_from_state, False),
    "gated read-out: ours": partial(_gated_from_state, True),
    "gated read-out: second pass": partial(_gated_from_state, False),
    "modal read-out: ours": partial(_modal_from_state, True),
    "modal read-out: second pass": partial(_modal_from_state, False),
}
