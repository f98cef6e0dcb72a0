"""A device that is not the CPU though its numbers lie in the CPU's memory, to run without a GPU what a GPU would run.

Inside `far_device()`, "far" is a device: tensors made there or moved there compute, differentiate, are sent between
processes, and have values as elsewhere. What a GPU refuses is refused (`Misplaced`): operands on different devices, and
messages that NCCL does not send. Where a GPU would make the process wait for it, the line of the project is noted.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
FAR = "far"
ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "parallel", "models", "data", "workers")

# NCCL's: no complex numbers, of the integers of 16 bits none.
SENT = {
    *(torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}
# The sizes of their results follow from values, which the process must read.
SIZED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy_.default}


class Misplaced(AssertionError):
    """An operation that a GPU would refuse. Said at once: raised in a backward pass it ends the process, for want of
    what the engine asks of a device written in C++."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{_place()}: {problem}")
        print(f"Misplaced: {self}", file=sys.stderr, flush=True)


class FarTensor(Tensor):
    """`near` holds the numbers."""

    near: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        near = near.resolve_conj().resolve_neg()  # a wrapper cannot say that its numbers are to be conjugated
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset()}
        self = Tensor._make_wrapper_subclass(cls, near.size(), **layout, dtype=near.dtype, device=f"{FAR}:0")
        self.near = near
        return self

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Misplaced(f"{func} of a far tensor outside far_device()")


class Far(TorchDispatchMode):
    """What happened: `waits` counts the lines that made the process wait, as "file:line why"; `messages` has what was
    sent and received, in order: operation, peer (None of a collective), shape, dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.messages: list[tuple[str, int | None, tuple[int, ...], torch.dtype]] = []

    def forget(self) -> None:
        self.waits.clear()
        self.messages.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(kind in (Tensor, torch.nn.Parameter) or issubclass(kind, FarTensor) for kind in types):
            return NotImplemented  # another class of tensors, DTensor for one, says first what it makes of it
        kwargs = kwargs or {}
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        far, asked = any(isinstance(x, FarTensor) for x in tensors), kwargs.get("device")
        to_far = far if asked is None else torch.device(asked).type == FAR
        if not far and not to_far:
            return func(*args, **kwargs)
        message = func.namespace == "c10d"
        if message:
            self._sent(func, args, tensors)
        elif func not in COPIES:
            _check_devices(func, tensors)
        if why := _waited_for(func, args, kwargs, to_far):
            self.waits[f"{_place()} {why}"] += 1
        near_kwargs = {**kwargs, "device": "cpu"} if asked is not None else kwargs
        near_args, near_kwargs = pytree.tree_map_only(FarTensor, lambda x: x.near, (args, near_kwargs))
        result = NOT_ON_THE_CPU.get(func, func)(*near_args, **near_kwargs)
        if message:
            return _with_the_tensors_of(args, near_args, result)
        if not to_far or func is aten._local_scalar_dense.default:
            return result
        return return_and_correct_aliasing(func, args, kwargs, pytree.tree_map_only(Tensor, FarTensor, result))

    def _sent(self, func: Any, args: Any, tensors: list[Tensor]) -> None:
        name = func._schema.name.removeprefix("c10d::")
        peer = args[2] if name in ("send", "recv_") else None
        for x in tensors:
            self.messages.append((name, peer, tuple(x.shape), x.dtype))
            if isinstance(x, FarTensor) and (not x.is_contiguous() or x.dtype not in SENT):
                raise Misplaced(f"{name}: NCCL does not send {x.dtype} of strides {x.stride()}")


def _check_devices(func: Any, tensors: list[Tensor]) -> None:
    """Single numbers of the CPU may take part where numbers are taken one by one."""
    near = [x for x in tensors if not isinstance(x, FarTensor)]
    scalars = torch.Tag.pointwise in func.tags or func in INDEXING or func is aten.fill_.Tensor
    if near and len(near) < len(tensors) and not (scalars and all(x.dim() == 0 for x in near)):
        raise Misplaced(f"{func}: tensors of shapes {[tuple(x.shape) for x in near]} are on the CPU, others are not")


def _waited_for(func: Any, args: Any, kwargs: Any, to_far: bool) -> str | None:
    """Why a GPU's process waits, if it does."""
    if func is aten._local_scalar_dense.default:
        return "number read"
    masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)] if func in INDEXING else []
    if masks or (func in SIZED_BY_VALUES and kwargs.get("output_size") is None):
        return "size read"
    if func in COPIES:
        source, target = args[1] if func is aten.copy_.default else args[0], args[0]
        to_far = isinstance(target, FarTensor) if func is aten.copy_.default else to_far
        promised = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
        if isinstance(source, FarTensor) != to_far and not promised:
            return "copied there" if to_far else "copied here"
    return None


def _place() -> str:
    """The innermost line of the project's rooms."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename).resolve()
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ROOMS:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "elsewhere"


def _with_the_tensors_of(args: Any, near_args: Any, result: Any) -> Any:
    """A message's result, with the tensors that were given in the place of their numbers."""
    pairs = zip(pytree.tree_leaves(near_args), pytree.tree_leaves(args), strict=True)
    given = {id(near): x for near, x in pairs if isinstance(x, FarTensor)}
    return pytree.tree_map_only(Tensor, lambda x: given.get(id(x), x), result)


def _lstm_cell(x_B4H: Tensor, h_B4H: Tensor, c_BH: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    i, f, g, o = sum(biases, x_B4H + h_B4H).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c_BH = f * c_BH + i * g
    return o * c_BH.tanh(), c_BH, torch.cat([i, f, g, o], -1)


def _lstm_cell_backward(
    grad_h: Tensor | None, grad_c: Tensor | None, before: Tensor, c: Tensor, gates: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    (i, f, g, o), tanh_c = gates.chunk(4, -1), c.tanh()
    grad_h = torch.zeros_like(c) if grad_h is None else grad_h
    grad_c = grad_h * o * (1 - tanh_c**2) + (0 if grad_c is None else grad_c)
    of_input, of_forget = grad_c * g * i * (1 - i), grad_c * before * f * (1 - f)
    grad = torch.cat([of_input, of_forget, grad_c * i * (1 - g**2), grad_h * tanh_c * o * (1 - o)], -1)
    return grad, grad_c * f, grad.sum(0) if has_bias else None


NOT_ON_THE_CPU = {
    aten._thnn_fused_lstm_cell.default: _lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl.default: _lstm_cell_backward,
}


class _Event:
    def record(self, stream: Any = None) -> _Event:
        return self


class _Stream(torch.cpu.Stream):
    """Does nothing, as the CPU's."""

    def synchronize(self) -> None:
        pass

    def record_event(self, event: Any = None) -> _Event:
        return _Event()


class _Module:
    """What torch asks of a device's module."""

    Stream, StreamContext, Event = _Stream, torch.cpu.StreamContext, _Event
    stream, synchronize = staticmethod(torch.cpu.stream), staticmethod(torch.cpu.synchronize)

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@cache
def _register() -> None:
    _setup_privateuseone_for_python_backend(FAR, _Module())


@contextmanager
def far_device() -> Iterator[Far]:
    """See above; yields what happened."""
    _register()
    freeing = "free_storage", "alloc_storage"  # by which FSDP gives memory back between uses; a wrapper has none
    functions = [getattr(_fsdp_param, name) for name in freeing]
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="far") is a copy from the CPU
    try:
        for name in freeing:
            setattr(_fsdp_param, name, lambda tensor: None)
        # on a thread of its own the engine would not see the mode
        with Far() as far, torch.autograd.set_multithreading_enabled(False):
            yield far
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        for name, function in zip(freeing, functions, strict=True):
            setattr(_fsdp_param, name, function)
