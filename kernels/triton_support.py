"""When the Triton kernels run, and how they are launched.

Triton is optional and imported only when a kernel is needed: nothing here imports it. Kernels take CUDA tensors; with
TRITON_INTERPRET=1 set before the first import of triton they run on the CPU as well, slowly, which is how they are
tested where no GPU is at hand. Launch configurations are chosen by rules, never by autotuning (autotuned kernels cannot
be interpreted): small fixed blocks when interpreting, blocks that suit Hopper otherwise.
"""

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_WIDE = (torch.float64, torch.complex128)


@cache
def installed() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def takes(*tensors: Tensor | None) -> bool:
    """Whether a public door hands these arguments to Triton: all on a GPU, none in double precision, none empty."""
    given = [tensor for tensor in tensors if tensor is not None]
    fits = all(tensor.is_cuda and tensor.dtype not in _WIDE and tensor.numel() for tensor in given)
    return fits and installed()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on the device of its first tensor."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 132, those of an H100, where there is none to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`, at least 1."""
    return 1 << max(number - 1, 0).bit_length()


def rows_contiguous(x: Tensor) -> Tensor:
    """The tensor itself if its last dimension is dense, otherwise a dense copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def batch_strides(x: Tensor | None) -> tuple[int, int]:
    """Strides, in elements, of batch and time; zero for a dimension of one, which is then shared."""
    if x is None:
        return (0, 0)
    strides: Sequence[int] = [stride if size > 1 else 0 for size, stride in zip(x.shape[:2], x.stride(), strict=False)]
    return (strides[0], strides[1])


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A boolean mask as kernels read it."""
    return None if mask is None else mask.contiguous().view(torch.uint8)
