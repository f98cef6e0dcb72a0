"""The selective scan in C++ for the CPU; how it is built is in kernels/compiled.py.

Legend: B batch, T tokens, D channels, N states per channel.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order
from ..compiled import Extension, lanes, thread_shares

EXTENSION = Extension(
    Path(__file__).with_name("scan.cpp"),
    (
        *("u", "delta", "A", "B", "C", "D", "z", "bias", "initial", "starts", "y", "final_state", "checkpoints"),
        *("grad_y", "grad_final", "grad_u", "grad_delta", "grad_A", "grad_B", "grad_C", "grad_D", "grad_z"),
        *("grad_bias", "grad_initial"),
    ),
    ("batch", "length", "channels", "states", "tile", "softplus"),
    ("u", "delta", "B", "C", "z"),
)


def takes(
    u_BTD: Tensor,
    delta_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    z_BTD: Tensor | None,
    dtype: torch.dtype,
) -> bool:
    """Whether the public door hands these arguments to the compiled scan."""
    return EXTENSION.takes(u_BTD.numel() * A_DN.shape[1], dtype, u_BTD, delta_BTD, B_BTN, C_BTN, z_BTD)


def _tile(states: int) -> int:
    """Tokens between kept states: a tile stays in cache, and the kept states are no more than the inputs."""
    return 32 if states <= 32 else 64


class CompiledSelectiveScan(torch.autograd.Function):
    """The scan with recomputation; call it through `selective_scan`, which checks and prepares the arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        u_BTD: Tensor,
        delta_BTD: Tensor,
        A_DN: Tensor,
        B_BTN: Tensor,
        C_BTN: Tensor,
        D: Tensor | None,
        z_BTD: Tensor | None,
        delta_bias: Tensor | None,
        initial_BDN: Tensor,
        starts_BT: Tensor | None,
        softplus: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, length, channels = u_BTD.shape
        states, dtype = A_DN.shape[1], A_DN.dtype
        dense = {"A": A_DN, "D": D, "bias": delta_bias, "initial": initial_BDN, "starts": starts_BT}
        dense = {name: None if x is None else x.contiguous() for name, x in dense.items()}
        y_BTD = torch.empty(batch, length, channels, dtype=dtype)
        final_BDN = torch.empty(batch, channels, states, dtype=dtype)
        tile = _tile(states)
        checkpoints = None
        if any(ctx.needs_input_grad):
            width = lanes(dtype)
            checkpoints = torch.empty(batch, -(-length // tile), -(-channels // width), states, width, dtype=dtype)
        sequences = {"u": u_BTD, "delta": delta_BTD, "B": B_BTN, "C": C_BTN, "z": z_BTD}
        inputs = {**sequences, **dense, "checkpoints": checkpoints}
        ctx.sizes = {
            "batch": batch, "length": length, "channels": channels, "states": states, "tile": tile,
            "softplus": int(softplus),
        }  # fmt: skip
        tensors = {**inputs, "y": y_BTD, "final_state": final_BDN}
        shares = thread_shares(channels, dtype)
        EXTENSION.run("scan_forward", dtype, [(tensors, ctx.sizes | share) for share in shares])
        ctx.names = list(inputs)
        ctx.save_for_backward(*inputs.values())
        return y_BTD, final_BDN

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs: dict[str, Tensor | None] = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        named = {"grad_y": grads[0].contiguous(), "grad_final": grads[1].contiguous()}
        results: dict[str, Tensor] = {}
        for name in ("u", "delta", "A", "D", "z", "bias", "initial"):
            if (x := inputs[name]) is not None:
                results[name] = torch.empty(x.shape, dtype=x.dtype)
        B_BTN = inputs["B"]
        assert B_BTN is not None
        shares = thread_shares(ctx.sizes["channels"], B_BTN.dtype)
        # every thread sums over its own channels
        partial = {name: torch.empty(len(shares), *B_BTN.shape, dtype=B_BTN.dtype) for name in ("B", "C")}
        calls = []
        for index, share in enumerate(shares):
            outputs = {**results, "B": partial["B"][index], "C": partial["C"][index]}
            tensors = {**inputs, **named, **{f"grad_{name}": x for name, x in outputs.items()}}
            calls.append((tensors, ctx.sizes | share))
        EXTENSION.run("scan_backward", B_BTN.dtype, calls)
        for name, x in partial.items():
            results[name] = x[0] if len(shares) == 1 else x.sum(0)
        order = ("u", "delta", "A", "B", "C", "D", "z", "bias", "initial")
        return (*(results.get(name) for name in order), None, None)
