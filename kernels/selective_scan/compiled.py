"""The selective scan in C++ for the CPU, built when first needed and never required.

`scan.cpp` is compiled once for each kind of processor into PyTorch's cache of extensions (TORCH_EXTENSIONS_DIR), by the
C++ compiler and ninja that PyTorch finds; later processes load it from there. Without them, or with
LONGSTRIDE_COMPILED=0 in the environment, the portable code runs instead. The library works on plain pointers and knows
nothing of PyTorch, so that the build takes seconds. Channels are shared out over as many threads as PyTorch uses.

Legend: B batch, T tokens, D channels, N states per channel.
"""

import ctypes
import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order

_SOURCE = Path(__file__).with_name("scan.cpp")
_LEAST_WORK = 1 << 22  # length x channels x states; for less nobody should wait for a build
_VECTOR_BYTES = 64
_FLAGS = {"AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"], "AVX2": ["-mavx2", "-mfma"]}
_POINTERS = [
    *("u", "delta", "A", "B", "C", "D", "z", "bias", "initial", "starts", "y", "final_state", "checkpoints"),
    *("grad_y", "grad_final", "grad_u", "grad_delta", "grad_A", "grad_B", "grad_C", "grad_D", "grad_z", "grad_bias"),
    "grad_initial",
]
_SIZES = ["batch", "length", "channels", "states", "tile", "softplus", "first_block", "last_block"]
_STRIDED = ("u", "delta", "B", "C", "z")

_log = logging.getLogger(__name__)


class Arguments(ctypes.Structure):
    """scan.cpp's struct of this name."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS]
        + [(name, ctypes.c_int64) for name in _SIZES]
        + [(f"{name}_{dim}", ctypes.c_int64) for name in _STRIDED for dim in ("batch", "token")]
        + [("starts_batch", ctypes.c_int64)]
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
    """Whether the public door hands these arguments to the compiled scan: all on the CPU, in the dtype of the state,
    with dense rows, work enough to wait for a build, and a build that succeeds."""
    sequences = [x for x in (u_BTD, delta_BTD, B_BTN, C_BTN, z_BTD) if x is not None]
    if any(x.device.type != "cpu" or x.dtype != dtype or x.stride(-1) != 1 for x in sequences):
        return False
    return u_BTD.numel() * A_DN.shape[1] >= _LEAST_WORK and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The compiled scan, built if necessary; None, after saying why once, where it cannot be built."""
    if os.environ.get("LONGSTRIDE_COMPILED", "1") == "0":
        return None
    try:
        return ctypes.CDLL(str(_build()))
    except Exception as error:  # a compiler can be missing or fail in many ways, and none of them may stop a run
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        _log.warning("selective scan: no compiled code on this machine, using PyTorch's (%s)", reason)
        return None


def _build() -> Path:
    """Path of the shared library. Each process builds in a folder of its own and then moves the result into place: no
    lock that a killed process could leave behind, at worst a few seconds spent twice."""
    from torch.utils import cpp_extension

    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", *_FLAGS.get(capability, [])]
    digest = hashlib.sha256(_SOURCE.read_bytes() + " ".join(flags).encode()).hexdigest()[:12]
    name = f"longstride_scan_{capability.lower().replace(' ', '_')}_{digest}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    built = Path(root) / f"{name}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=name) as scratch:
            cpp_extension.load(
                name, [str(_SOURCE)], extra_cflags=flags, build_directory=scratch, is_python_module=False
            )
            (Path(scratch) / built.name).replace(built)
    return built


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _arguments(tensors: dict[str, Tensor | None], sizes: dict[str, int]) -> Arguments:
    arguments = Arguments(**{name: _address(x) for name, x in tensors.items()}, **sizes)
    for name in _STRIDED:
        if (x := tensors.get(name)) is not None:
            setattr(arguments, f"{name}_batch", x.stride(0))
            setattr(arguments, f"{name}_token", x.stride(1))
    starts_BT = tensors.get("starts")
    arguments.starts_batch = 0 if starts_BT is None or starts_BT.shape[0] == 1 else starts_BT.stride(0)
    return arguments


def _shares(channels: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Blocks of channels (vectors) for each thread."""
    blocks = -(-channels * dtype.itemsize // _VECTOR_BYTES)
    threads = min(torch.get_num_threads(), blocks)
    cuts = [blocks * i // threads for i in range(threads + 1)]
    return list(pairwise(cuts))


def _run(direction: str, dtype: torch.dtype, calls: Sequence[Arguments]) -> None:
    """The foreign function releases the interpreter, so threads run side by side."""
    compiled = library()
    assert compiled is not None
    function = getattr(compiled, f"scan_{direction}_{str(dtype).removeprefix('torch.')}")
    if len(calls) == 1:
        function(ctypes.byref(calls[0]))
        return
    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(lambda arguments: function(ctypes.byref(arguments)), calls))


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
        lanes = _VECTOR_BYTES // dtype.itemsize
        checkpoints = None
        if any(ctx.needs_input_grad):
            checkpoints = torch.empty(batch, -(-length // tile), -(-channels // lanes), states, lanes, dtype=dtype)
        sequences = {"u": u_BTD, "delta": delta_BTD, "B": B_BTN, "C": C_BTN, "z": z_BTD}
        inputs = {**sequences, **dense, "checkpoints": checkpoints}
        ctx.sizes = {
            "batch": batch, "length": length, "channels": channels, "states": states, "tile": tile,
            "softplus": int(softplus),
        }  # fmt: skip
        calls = [
            _arguments({**inputs, "y": y_BTD, "final_state": final_BDN}, ctx.sizes | _share(share))
            for share in _shares(channels, dtype)
        ]
        _run("forward", dtype, calls)
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
        shares = _shares(ctx.sizes["channels"], B_BTN.dtype)
        # every thread sums over its own channels
        partial = {name: torch.empty(len(shares), *B_BTN.shape, dtype=B_BTN.dtype) for name in ("B", "C")}
        calls = []
        for index, share in enumerate(shares):
            outputs = {**results, "B": partial["B"][index], "C": partial["C"][index]}
            tensors = {**inputs, **named, **{f"grad_{name}": x for name, x in outputs.items()}}
            calls.append(_arguments(tensors, ctx.sizes | _share(share)))
        _run("backward", B_BTN.dtype, calls)
        for name, x in partial.items():
            results[name] = x[0] if len(shares) == 1 else x.sum(0)
        order = ("u", "delta", "A", "B", "C", "D", "z", "bias", "initial")
        return (*(results.get(name) for name in order), None, None)


def _share(share: tuple[int, int]) -> dict[str, int]:
    return {"first_block": share[0], "last_block": share[1]}
