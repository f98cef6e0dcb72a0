"""C++ for the CPU beside a kernel's Python, built when first needed and never required.

A source is compiled once for each kind of processor into PyTorch's cache of extensions (TORCH_EXTENSIONS_DIR), by the
C++ compiler and ninja that PyTorch finds; later processes load it from there. Without them, or with
LONGSTRIDE_COMPILED=0 in the environment, the portable code runs instead. The libraries work on plain pointers and know
nothing of PyTorch, so that a build takes seconds. Channels are shared out over as many threads as PyTorch uses.
"""

import ctypes
import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

VECTOR_BYTES = 64
# Numbers that an operation touches; for fewer nobody should wait for a build.
LEAST_WORK = 1 << 22
_HEADER = Path(__file__).with_name("vectors.h")
_FLAGS = {"AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"], "AVX2": ["-mavx2", "-mfma"]}

_log = logging.getLogger(__name__)


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled source, built if necessary; None, after saying why once, where it cannot be built."""
    if os.environ.get("LONGSTRIDE_COMPILED", "1") == "0":
        return None
    try:
        return ctypes.CDLL(str(_build(source)))
    except Exception as error:  # a compiler can be missing or fail in many ways, and none of them may stop a run
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        _log.warning("%s: no compiled code on this machine, using PyTorch's (%s)", source.stem, reason)
        return None


def _build(source: Path) -> Path:
    """Path of the shared library. Each process builds in a folder of its own and then moves the result into place: no
    lock that a killed process could leave behind, at worst a few seconds spent twice."""
    from torch.utils import cpp_extension

    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", *_FLAGS.get(capability, [])]
    headers = [_HEADER, *sorted(source.parent.glob("*.h"))]
    text = b"".join(path.read_bytes() for path in (source, *headers)) + " ".join(flags).encode()
    name = f"longstride_{source.stem}_{capability.lower().replace(' ', '_')}_{hashlib.sha256(text).hexdigest()[:12]}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    built = Path(root) / f"{name}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=name) as scratch:
            cpp_extension.load(name, [str(source)], extra_cflags=flags, build_directory=scratch, is_python_module=False)
            (Path(scratch) / built.name).replace(built)
    return built


class Extension:
    """A source whose functions take one struct: pointers, then sizes, then strides of some of the pointers.

    The struct is called `Arguments` there. Behind `sizes` it has `first_block` and `last_block`, one thread's share of
    the channels in vectors; for every name in `strided` the elements between batches and between tokens; and
    `starts_batch`, that of the document starts.
    """

    def __init__(self, source: Path, pointers: Sequence[str], sizes: Sequence[str], strided: Sequence[str]) -> None:
        self.source, self._strided = source, tuple(strided)
        strides = [f"{name}_{dim}" for name in strided for dim in ("batch", "token")]
        integers = [*sizes, "first_block", "last_block", *strides, "starts_batch"]
        fields = [(name, ctypes.c_void_p) for name in pointers] + [(name, ctypes.c_int64) for name in integers]
        self._arguments = type("Arguments", (ctypes.Structure,), {"_fields_": fields})

    def takes(self, work: int, dtype: torch.dtype, *sequences: Tensor | None) -> bool:
        """Whether the compiled code may run: all sequences on the CPU, in the dtype of the computation, with dense
        rows, work enough to wait for a build, and a build that succeeds."""
        if work < LEAST_WORK or dtype not in (torch.float32, torch.float64):
            return False
        if any(x is not None and (x.device.type != "cpu" or x.dtype != dtype or x.stride(-1) != 1) for x in sequences):
            return False
        return library(self.source) is not None

    def run(
        self, name: str, dtype: torch.dtype, calls: Sequence[tuple[Mapping[str, Tensor | None], Mapping[str, int]]]
    ) -> None:
        """`name`_float32 or _float64 with (tensors, sizes) of every thread. The foreign function releases the
        interpreter, so threads run side by side."""
        compiled = library(self.source)
        assert compiled is not None
        function = getattr(compiled, f"{name}_{str(dtype).removeprefix('torch.')}")
        filled = [self._fill(*call) for call in calls]
        if len(filled) == 1:
            function(ctypes.byref(filled[0]))
            return
        with ThreadPoolExecutor(len(filled)) as pool:
            list(pool.map(lambda arguments: function(ctypes.byref(arguments)), filled))

    def _fill(self, tensors: Mapping[str, Tensor | None], sizes: Mapping[str, int]) -> ctypes.Structure:
        addresses = {name: None if x is None else x.data_ptr() for name, x in tensors.items()}
        arguments = self._arguments(**addresses, **sizes)
        for name in self._strided:
            if (x := tensors.get(name)) is not None:
                setattr(arguments, f"{name}_batch", x.stride(0))
                setattr(arguments, f"{name}_token", x.stride(1))
        starts_BT = tensors.get("starts")
        arguments.starts_batch = 0 if starts_BT is None or starts_BT.shape[0] == 1 else starts_BT.stride(0)
        return arguments


def lanes(dtype: torch.dtype) -> int:
    """Channels of a vector."""
    return VECTOR_BYTES // dtype.itemsize


def thread_shares(channels: int, dtype: torch.dtype) -> list[dict[str, int]]:
    """`first_block` and `last_block` of every thread."""
    blocks = -(-channels // lanes(dtype))
    threads = min(torch.get_num_threads(), blocks)
    cuts = [blocks * i // threads for i in range(threads + 1)]
    return [{"first_block": first, "last_block": last} for first, last in pairwise(cuts)]
