"""The selective scan in C++ for the CPU; how it is built is in kernels/compiled.py.

Legend: B batch, T tokens, D channels, N states per channel.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order
from ..compiled import Extension, lanes, thread_shares
from .stages import Entering

EXTENSION = Extension(
    Path(__file__).with_name("scan.cpp"),
    (
        *("u", "delta", "A", "B", "C", "D", "z", "bias", "initial", "starts", "y", "final_state", "checkpoints"),
        *("sums", "before", "entering", "grad_entering"),
        *("grad_y", "grad_final", "grad_u", "grad_delta", "grad_A", "grad_B", "grad_C", "grad_D", "grad_z"),
        *("grad_bias", "grad_initial"),
    ),
    ("batch", "length", "channels", "states", "tile", "softplus"),
    ("u", "delta", "B", "C", "z", "grad_y"),
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
        entering: Entering | None = None,
    ) -> tuple[Tensor, Tensor]:
        batch, length, channels = u_BTD.shape
        states, dtype = A_DN.shape[1], A_DN.dtype
        dense = {"A": A_DN, "D": D, "bias": delta_bias, "initial": initial_BDN, "starts": starts_BT}
        dense = {name: None if x is None else x.contiguous() for name, x in dense.items()}
        y_BTD = torch.empty(batch, length, channels, dtype=dtype)
        final_BDN = torch.empty(batch, channels, states, dtype=dtype)
        tile = _tile(states)
        checkpoints, tiles, width = None, -(-length // tile), lanes(dtype)
        if any(ctx.needs_input_grad):
            checkpoints = torch.empty(batch, tiles, -(-channels // width), states, width, dtype=dtype)
        sums_BKD = None if entering is None else torch.empty(batch, tiles, channels, dtype=dtype)
        sequences = {"u": u_BTD, "delta": delta_BTD, "B": B_BTN, "C": C_BTN, "z": z_BTD}
        inputs = {**sequences, **dense, "checkpoints": checkpoints}
        ctx.sizes = {
            "batch": batch, "length": length, "channels": channels, "states": states, "tile": tile,
            "softplus": int(softplus),
        }  # fmt: skip
        tensors = {**inputs, "y": y_BTD, "final_state": final_BDN, "sums": sums_BKD}
        shares = thread_shares(channels, dtype)
        EXTENSION.run("scan_forward", dtype, [(tensors, ctx.sizes | share) for share in shares])
        inputs["before"] = None if entering is None or sums_BKD is None else entering.note(sums_BKD)
        ctx.entering = entering
        ctx.names = list(inputs)
        ctx.save_for_backward(*inputs.values())
        return y_BTD, final_BDN

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs: dict[str, Tensor | None] = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        named = {"grad_y": _dense_rows(grads[0]), "grad_final": grads[1].contiguous()}
        if ctx.entering is not None and ctx.entering.state_BDN is not None:
            named["entering"] = ctx.entering.state_BDN.contiguous()
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
        return (*(results.get(name) for name in order), None, None, None)


class CompiledEnter(torch.autograd.Function):
    """See readout.Enter."""

    @staticmethod
    def forward(
        ctx: Any,
        y_BTD: Tensor,
        entering_BDN: Tensor,
        delta_BTD: Tensor,
        A_DN: Tensor,
        C_BTN: Tensor,
        delta_bias: Tensor | None,
        starts_BT: Tensor | None,
        before_BKD: Tensor,
        softplus: bool,
    ) -> Tensor:
        ctx.softplus = softplus
        read = delta_BTD, A_DN, C_BTN, delta_bias, starts_BT, before_BKD
        _run_enter("scan_enter", read, softplus, y=y_BTD, entering=entering_BDN.contiguous())
        ctx.save_for_backward(*read)
        ctx.mark_dirty(y_BTD)
        return y_BTD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        read = ctx.saved_tensors
        grad_BDN = torch.empty(len(grads[0]), *read[1].shape, dtype=grads[0].dtype)
        _run_enter("scan_enter_backward", read, ctx.softplus, grad_y=_dense_rows(grads[0]), grad_entering=grad_BDN)
        return grads[0], grad_BDN, *(None,) * 7


def _run_enter(name: str, read: tuple[Tensor | None, ...], softplus: bool, **others: Tensor) -> None:
    tensors = dict(zip(("delta", "A", "C", "bias", "starts", "before"), read, strict=True))
    for name_of in ("A", "bias", "starts", "before"):
        if (x := tensors[name_of]) is not None:
            tensors[name_of] = x.contiguous()
    delta_BTD, A_DN = tensors["delta"], tensors["A"]
    assert delta_BTD is not None and A_DN is not None
    (batch, length, channels), states = delta_BTD.shape, A_DN.shape[1]
    sizes = {
        "batch": batch, "length": length, "channels": channels, "states": states, "tile": _tile(states),
        "softplus": int(softplus),
    }  # fmt: skip
    shares = thread_shares(channels, A_DN.dtype)
    EXTENSION.run(name, A_DN.dtype, [({**tensors, **others}, sizes | share) for share in shares])


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
