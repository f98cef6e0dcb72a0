"""One safetensors file, read and written in pieces: what is in memory is a buffer, never the file.

The format (huggingface/safetensors): eight bytes with the length of a JSON header, the header with each tensor's
dtype, shape and place, then the tensors' bytes, little-endian and row-major. Nothing in it can run code.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

BUFFER_BYTES = 32 * 2**20
"""Read at once, but for single rows that are longer."""
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Region = tuple[slice, ...]
"""A box of a tensor: start, stop and step of every dimension, all given."""


class InterchangeError(ValueError):
    """A checkpoint that cannot be read, or a model that cannot be written: one line."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its bytes are [start, stop) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsReader:
    """An open file. `entries`: what is in it; `bytes_read` and `largest_read`: what was read of its tensors.

    Raises:
        InterchangeError: not a safetensors file, or a broken one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = self.largest_read = 0
        try:
            self.file = path.open("rb", buffering=0)
        except OSError as error:
            raise InterchangeError(f"{path} cannot be read: {error.strerror}") from None
        try:
            self.entries = self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            self.file.close()
            raise InterchangeError(f"{path} is not a whole safetensors file: {error}") from None

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()

    def read_into(self, key: str, region: Region, target: Tensor) -> None:
        """Copy a box of tensor `key` into `target`, of the box's shape and of any dtype, layout and device.

        Whole rows are read, a buffer at a time.
        """
        entry = self.entries[key]
        if not entry.shape:
            target.copy_(self._read(entry, entry.start, 1).view(()))
            return
        rows, *inner = region
        row_shape = entry.shape[1:]
        row_bytes = math.prod(row_shape) * entry.dtype.itemsize
        at_once = max(1, BUFFER_BYTES // max(1, row_bytes * rows.step))
        numbers = range(rows.start, rows.stop, rows.step)
        for first in range(0, len(numbers), at_once):
            part = numbers[first : first + at_once]
            count = part[-1] - part[0] + 1
            values = self._read(entry, entry.start + part[0] * row_bytes, count * math.prod(row_shape))
            values = values.view(count, *row_shape)[(slice(None, None, rows.step), *inner)]
            target[first : first + len(part)].copy_(values)

    def _read(self, entry: Entry, offset: int, count: int) -> Tensor:
        """`count` elements from `offset` on, flat."""
        size = count * entry.dtype.itemsize
        if size == 0:
            return torch.empty(0, dtype=entry.dtype)
        buffer = bytearray(size)
        view, done = memoryview(buffer), 0
        self.file.seek(offset)
        while done < size:
            got = self.file.readinto(view[done:])
            if not got:
                raise InterchangeError(f"{self.path} ends before its header says")
            done += got
        self.bytes_read += size
        self.largest_read = max(self.largest_read, size)
        return torch.frombuffer(buffer, dtype=entry.dtype)

    def _read_header(self) -> dict[str, Entry]:
        file_bytes = self.path.stat().st_size
        (length,) = struct.unpack("<Q", self.file.read(8))
        if length > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise ValueError(f"its header would be {length} bytes long")
        header = json.loads(self.file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        entries: dict[str, Entry] = {}
        for key, fields in header.items():
            if fields["dtype"] not in DTYPES:
                raise ValueError(f"{key} has dtype {fields['dtype']}; known are {', '.join(DTYPES)}")
            start, stop = (int(offset) + 8 + length for offset in fields["data_offsets"])
            entry = Entry(DTYPES[fields["dtype"]], tuple(int(size) for size in fields["shape"]), start, stop)
            if min(entry.shape, default=0) < 0 or not 8 + length <= start <= stop <= file_bytes:
                raise ValueError(f"{key} lies outside the file of {file_bytes} bytes")
            if stop - start != entry.num_bytes:
                raise ValueError(f"{key} of shape {entry.shape} cannot have {stop - start} bytes")
            entries[key] = entry
        return entries


class SafetensorsWriter:
    """A new file whose tensors are announced first and then written one by one, in the order announced."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for key, entry in entries.items():
            offsets = [offset, offset + entry.num_bytes]
            header[key] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
            offset = offsets[1]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.waiting = list(entries.items())
        self.file = path.open("wb", buffering=0)
        self._write(struct.pack("<Q", len(text)) + text)

    def write(self, key: str, tensor: Tensor) -> None:
        """Append the next tensor, contiguous and on the CPU."""
        expected, entry = self.waiting.pop(0)
        assert key == expected and tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype, key
        self._write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")

    def close(self) -> None:
        self.file.close()

    def _write(self, content: bytes | memoryview) -> None:
        view, done = memoryview(content), 0
        while done < len(view):
            done += self.file.write(view[done:]) or 0


def whole(shape: Sequence[int]) -> Region:
    """The box that is all of a tensor of this shape."""
    return tuple(slice(0, size, 1) for size in shape)
