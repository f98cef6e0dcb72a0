"""Checksums of a shard's blocks: what is read by byte range is checked without reading the rest of the shard.

The file NAME.blocks holds the CRC-32 of every block of NAME.tokens (the last one may be short), raw little-endian
uint32. The SHA-256 of that file is in the index, so that nothing in it need be believed.
"""

import zlib
from collections.abc import Callable

import numpy as np

BLOCK_BYTES = 1 << 16


def block_checksums(content: bytes, size: int = BLOCK_BYTES) -> bytes:
    """The content of the file of checksums."""
    view = memoryview(content)
    sums = [zlib.crc32(view[start : start + size]) for start in range(0, len(content), size)]
    return np.array(sums, dtype="<u4").tobytes()


def checksums_length(length: int, size: int) -> int:
    """Bytes of the file of checksums for `length` bytes in blocks of `size`."""
    return -(-length // size) * 4


class CheckedFile:
    """A file that is read by byte range, each block of it checked the first time that a range touches it.

    A range that begins or ends inside a block not yet checked is widened to the block's border; others are read as
    they are. Threads may read at once.

    Args:
        read: bytes [start, stop) of the file; fewer where it ends before.
        length: bytes that the file should have. checksums: of its blocks of `size` bytes.
    """

    def __init__(self, read: Callable[[int, int], bytes], length: int, checksums: np.ndarray, size: int) -> None:
        self._read, self._length, self._checksums, self._size = read, length, checksums, size
        self._checked = bytearray(len(checksums))

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer if the file has become short. ValueError: a block is not what it was."""
        size = self._size
        first, last = start // size, (stop - 1) // size
        begin = start if self._checked[first] else first * size
        end = stop if self._checked[last] else min((last + 1) * size, self._length)
        content = self._read(begin, end)
        if len(content) != end - begin:
            return b""
        view = memoryview(content)
        for block in range(first, last + 1):
            if self._checked[block]:
                continue
            low, high = block * size, min((block + 1) * size, self._length)
            if zlib.crc32(view[low - begin : high - begin]) != self._checksums[block]:
                raise ValueError(f"bytes {low} to {high} are not what was written")
            self._checked[block] = 1
        return content if (begin, end) == (start, stop) else content[start - begin : stop - begin]
