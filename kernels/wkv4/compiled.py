"""RWKV-4's recurrence, and its state alone, in C++ for the CPU; how it is built is in kernels/compiled.py.

Legend: B batch, T tokens, D channels.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order
from ..compiled import Extension, lanes, thread_shares

# Tokens between kept states: what the backward remembers of a tile stays in the second-level cache.
_TILE = 64

EXTENSION = Extension(
    Path(__file__).with_name("wkv4.cpp"),
    (
        *("k", "v", "decay", "bonus", "initial", "starts", "y", "final_state", "checkpoints", "grad_y", "grad_final"),
        *("grad_k", "grad_v", "grad_decay", "grad_bonus", "grad_initial"),
    ),
    ("batch", "length", "channels", "tile"),
    ("k", "v"),
)


def takes(k_BTD: Tensor, v_BTD: Tensor, dtype: torch.dtype) -> bool:
    """Whether the public door hands these arguments to the compiled recurrence."""
    # an exponential is worth some sixteen multiplications
    return EXTENSION.takes(16 * k_BTD.numel(), dtype, k_BTD, v_BTD)


class CompiledWkv4(torch.autograd.Function):
    """The recurrence with recomputation; without `bonus_D` no outputs. Call it through `wkv4` and `wkv4_state`."""

    @staticmethod
    def forward(
        ctx: Any,
        k_BTD: Tensor,
        v_BTD: Tensor,
        log_decay_D: Tensor,
        bonus_D: Tensor | None,
        state_BD3: Tensor,
        starts_BT: Tensor | None,
    ) -> tuple[Tensor | None, Tensor]:
        batch, length, channels = k_BTD.shape
        dtype = log_decay_D.dtype
        dense = {"decay": log_decay_D, "bonus": bonus_D, "initial": state_BD3, "starts": starts_BT}
        inputs: dict[str, Tensor | None] = {"k": k_BTD, "v": v_BTD}
        inputs |= {name: None if x is None else x.contiguous() for name, x in dense.items()}
        if any(ctx.needs_input_grad):
            blocks = -(-channels // lanes(dtype))
            inputs["checkpoints"] = torch.empty(batch, -(-length // _TILE), blocks, 3, lanes(dtype), dtype=dtype)
        y_BTD = None if bonus_D is None else torch.empty(batch, length, channels, dtype=dtype)
        final_BD3 = torch.empty(batch, channels, 3, dtype=dtype)
        ctx.sizes = {"batch": batch, "length": length, "channels": channels, "tile": _TILE}
        tensors = {**inputs, "y": y_BTD, "final_state": final_BD3}
        EXTENSION.run("wkv4_forward", dtype, [(tensors, ctx.sizes | share) for share in thread_shares(channels, dtype)])
        ctx.names = [*inputs, "final_state"]
        ctx.save_for_backward(*inputs.values(), final_BD3)
        return y_BTD, final_BD3

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs: dict[str, Tensor | None] = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        results: dict[str, Tensor] = {}
        for name in ("k", "v", "decay", "bonus", "initial"):
            if (x := inputs[name]) is not None:
                results[name] = torch.empty(x.shape, dtype=x.dtype)
        named = {"grad_y": grads[0], "grad_final": grads[1]}
        tensors = {
            **inputs,
            **{name: None if x is None else x.contiguous() for name, x in named.items()},
            **{f"grad_{name}": x for name, x in results.items()},
        }
        dtype = results["k"].dtype
        shares = thread_shares(ctx.sizes["channels"], dtype)
        EXTENSION.run("wkv4_backward", dtype, [(tensors, ctx.sizes | share) for share in shares])
        return (*(results.get(name) for name in ("k", "v", "decay", "bonus", "initial")), None)
