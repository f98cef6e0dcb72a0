"""Compile every Triton kernel for an H100, with the launch configurations used there, on a machine without a GPU.

    python -m tests.kernels.hopper

Calls the public doors forward and backward with CPU tensors, at sizes of models and with every size one (which Triton
compiles as constants); every launch becomes a compilation to machine code for compute capability 9.0 and nothing runs.
Prints one line a kernel: module, name, registers a thread, bytes spilled, shared memory, and pointer offsets that come
from 32-bit products. The last line is a kernel that has such an offset.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from longstride import kernels
from longstride.kernels import triton_support
from longstride.kernels.modal_convolution import modal_convolution
from longstride.kernels.state_space_dual import state_space_dual
from longstride.kernels.wkv4 import wkv4, wkv4_state
from longstride.kernels.wkv7 import wkv7

from .narrow_offsets import narrow_kernel
from .offsets import narrow_offsets


class _Hopper:
    """What Triton asks a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_only(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """In place of a launch."""
    compiled = kernel.warmup(*args, grid=grid, **options)
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(compiled.asm["ptx"])
        source.flush()
        command = [str(assembler), "-v", "-arch=sm_90a", source.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = [re.search(rf"(\d+) {what}|Used (\d+) {what}", report) for what in ("registers", "bytes spill stores")]
    registers, spilled = (next(x for x in found.groups() if x) if found else "?" for found in numbers)
    name = f"{kernel.fn.__module__.removeprefix('longstride.kernels.')} {kernel.fn.__name__}"
    narrow = len(narrow_offsets(compiled.asm["ttir"]))
    print(
        f"{name:64}{registers:>5} registers{spilled:>6} bytes spilled{compiled.metadata.shared:>8} shared"
        f"{narrow:>4} narrow offsets"
    )


def calls(dtype: torch.dtype, *, smallest: bool = False) -> list[Callable[[], Any]]:
    """Every operation at sizes of models, or with sizes of one; with documents and everything optional."""

    def x(*shape: int, of: torch.dtype = dtype, least: int = 1) -> Tensor:
        return torch.randn([least] * len(shape) if smallest else shape, dtype=of).requires_grad_()

    single, length = torch.float32, 1 if smallest else 512
    rows = kernels.RowMap.of_sorted(torch.arange(1 if smallest else 20), 1 if smallest else 2)
    starts = torch.zeros(1, length, dtype=torch.bool)

    def scan(states: int) -> Any:
        tensors = (
            x(1, length, 64),
            x(1, length, 64),
            x(64, states, of=single),
            x(1, length, states),
            x(1, length, states),
        )
        options = {"D": x(64, of=single), "z_BTD": x(1, length, 64), "delta_bias": x(64, of=single)}
        return kernels.selective_scan(*tensors, **options, delta_softplus=True, document_starts=starts)

    def scan_in_stages() -> Any:
        tensors = x(1, length, 64), x(1, length, 64), x(64, 16, of=single), x(1, length, 16), x(1, length, 16)
        stages = kernels.begin_selective_scan(*tensors, delta_softplus=True, document_starts=starts)
        return stages.finish(x(1, 64, 16, of=single)), stages.leaving

    def modal(*kind: torch.dtype) -> Any:
        return modal_convolution(x(1, length, 64), x(64, 16, of=kind[0]), x(64, 16, of=kind[0]))

    def modal_in_stages(kind: torch.dtype) -> Any:
        stages = kernels.begin_modal_convolution(x(1, length, 64), x(64, 16, of=kind), x(64, 16, of=kind))
        stages.compute_local()
        return stages.finish(x(1, 64, 16, of=kind)), stages.leaving

    def dual(states: int) -> Any:
        tensors = x(1, length, 8, 64), x(1, length, 8), x(1, length, 1, states), x(1, length, 1, states)
        return state_space_dual(*tensors, document_starts=starts)

    def dual_in_stages(states: int) -> Any:
        tensors = x(1, length, 8, 64), x(1, length, 8), x(1, length, 2, states), x(1, length, 2, states)
        stages = kernels.begin_state_space_dual(*tensors, document_starts=starts)
        stages.compute_local()
        return stages.finish(x(1, 8, 64, states, of=single)), stages.leaving

    def wkv7_in_stages() -> Any:
        stages = kernels.begin_wkv7(*(x(1, length, 2, 64) for _ in range(5)), document_starts=starts)
        stages.compute_local(x(1, length, 2, 64))
        state = x(1, 2, 64, 64, of=single)
        return stages.finish(state), stages.leaving + state @ stages.transition

    return [
        lambda: scan(16),
        lambda: scan(64),
        lambda: dual(64 if dtype == single else 128),
        lambda: modal(single),
        lambda: modal(torch.complex64),
        lambda: kernels.short_convolution(
            x(1, length, 128), x(128, 4), x(128), activation="silu", document_starts=starts
        ),
        lambda: kernels.short_convolution(x(1, length, 128), x(128, 7), x(128)),
        lambda: kernels.short_convolution(x(1, length, 128), x(128, 24), document_starts=starts),
        lambda: kernels.short_convolution(x(1, length, 128), x(128, 128)),
        lambda: kernels.long_convolution(
            x(2, length, 64), x(64, length), skip=x(64), input_gate=x(2, length, 64), gate=x(2, length, 64)
        ),
        lambda: kernels.long_convolution(x(2, length, 64), x(64, length)),
        lambda: kernels.gated_linear_attention(*(x(1, length, 2, 64) for _ in range(4)), document_starts=starts),
        scan_in_stages,
        lambda: dual_in_stages(64 if dtype == single else 128),
        lambda: kernels.gated_linear_attention_readout(
            x(1, 2, 64, 64, of=single), x(1, length, 2, 64), x(1, length, 2, 64)
        ),
        lambda: modal_in_stages(single),
        lambda: modal_in_stages(torch.complex64),
        lambda: kernels.rms_norm(x(10, 4096), x(4096), gate=x(10, 4096), groups=1 if smallest else 8),
        lambda: kernels.rms_norm(x(10, 4096), x(4096)),
        lambda: kernels.rotary(x(1, 512, 4, 128, least=2), torch.arange(2 if smallest else 512)),
        lambda: kernels.swiglu(x(10, 4096), x(10, 4096)),
        lambda: kernels.gather_rows(x(10, 4096), rows),
        lambda: kernels.sum_rows(x(20, 4096), rows),
        lambda: kernels.sum_rows(x(20, 4096), rows, x(20), x(10, 4096)),
        lambda: kernels.linear_cross_entropy(
            x(10, 64), x(70000, 64), torch.zeros(1 if smallest else 10, dtype=torch.int64), bias=x(70000)
        ),
        lambda: wkv4(x(1, length, 64), x(1, length, 64), x(64), x(64), document_starts=starts),
        lambda: wkv4_state(x(1, length, 64), x(1, length, 64), x(64), document_starts=starts),
        lambda: wkv7(*(x(1, length, 2, 64) for _ in range(6)), document_starts=starts),
        wkv7_in_stages,
    ]


def main() -> None:
    driver.set_active(_Hopper())  # type: ignore[arg-type]
    triton_support.launch = compile_only
    triton_support.takes = lambda *tensors: True
    for dtype, smallest in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        print(f"{dtype}, {'smallest' if smallest else 'usual'} sizes, triton {triton.__version__}")
        for call in calls(dtype, smallest=smallest):
            outputs = call()
            outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    compile_only(narrow_kernel, (2,), torch.ones(2, 8), torch.ones(2, 8), 1 << 30, 8, BLOCK=8)


if __name__ == "__main__":
    main()
