"""Storage of torch.distributed.checkpoint (DCP) through fsspec, made fit to be trusted.

DCP's own reader and writer (torch 2.13) check nothing: a flipped byte loads silently, a half-written object of a
failed upload stays in place, and `.metadata` is a pickle that may run anything. Here the writer digests every byte on
its way out, and the reader builds only DCP's own types.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecReader, FsspecWriter
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from .liveness import alive
from .storage import Storage

# Without BytesStorageMetadata: DCP would unpickle such an entry without restriction, and we save nothing but tensors.
_METADATA_CLASSES = frozenset(
    {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    }
)
_READ_SIZE = 1 << 20


def digest_file(storage: Storage, name: str) -> dict[str, Any]:
    """{"bytes": length, "sha256": hexadecimal digest} of a file as it lies in storage."""
    sha256, length = hashlib.sha256(), 0
    with storage.explained(name), storage.open(name, "rb") as stream:
        while block := stream.read(_READ_SIZE):
            sha256.update(block)
            length += len(block)
            alive()
    return {"bytes": length, "sha256": sha256.hexdigest()}


class DigestingWriter(FsspecWriter):
    """FsspecWriter that knows the length and SHA-256 of everything this process wrote.

    The location goes to the writer alone: given a `checkpoint_id` too, DCP opens it again without its options. A
    directory is written once; files are synced where the file system has files and not only objects.
    """

    def __init__(self, storage: Storage, threads: int = 1) -> None:
        super().__init__(storage.url, sync_files=storage.local, overwrite=False, thread_count=threads)
        self.fs = self._digesting = _DigestingFileSystem(storage)

    def digests(self) -> dict[str, dict[str, Any]]:
        """By file name, what this process wrote."""
        return {
            path.rsplit("/", 1)[-1]: {"bytes": stream.length, "sha256": stream.sha256.hexdigest()}
            for path, stream in self._digesting.written.items()
        }


class RestrictedReader(FsspecReader):
    """FsspecReader whose `.metadata` may hold nothing but DCP's own descriptions of tensors in files beside it."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage.url)
        self.fs.fs = storage.fs  # DCP opens its own, with other patience

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        # A file of an object store is read ahead: each step back in it would fetch up to 50 MiB once more.
        items = sorted(plan.items, key=lambda item: self.storage_data[item.storage_index].offset)
        return super().read_data(replace(plan, items=items), planner)

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        alive()  # once for every tensor
        return super()._slice_file(file, sinfo)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(), "rb") as stream:
            metadata = _RestrictedUnpickler(io.BytesIO(cast("IO[bytes]", stream).read())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("the checkpoint's .metadata does not describe a checkpoint")
        for place in (metadata.storage_data or {}).values():
            if place.relative_path != os.path.basename(place.relative_path):  # noqa: PTH119
                raise pickle.UnpicklingError(
                    f"the checkpoint's .metadata points outside of it, at {place.relative_path}; it is not loaded"
                )
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        allowed = (
            (module == "torch.distributed.checkpoint.metadata" and name in _METADATA_CLASSES)
            or (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
            or (module, name) == ("torch.serialization", "_get_layout")
            or (module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)))
        )
        if not allowed:
            raise pickle.UnpicklingError(f"the checkpoint's .metadata asks for {module}.{name}; it is not loaded")
        return super().find_class(module, name)


def _memory_format(kind: object, name: str) -> _MEM_FORMAT_ENCODING:
    """All that `getattr` is taken for: as Python 3.11.2, which is Debian 12's, pickles a member of an enumeration."""
    if kind is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError("the checkpoint's .metadata asks for builtins.getattr; it is not loaded")
    return _MEM_FORMAT_ENCODING[name]


class _DigestingFileSystem(FileSystem):
    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self.fs = storage.fs
        self.written: dict[str, _DigestingStream] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            digesting = _DigestingStream(cast("IO[bytes]", stream))
            try:
                yield cast("io.IOBase", digesting)
            except RuntimeError as error:
                # torch.save closes its archive after a write that failed, and says only that this failed.
                raise digesting.failure or error from error
            self.written[os.fspath(path)] = digesting

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written[os.fspath(new_path)] = self.written.pop(os.fspath(path))


class _DigestingStream:
    """What DCP uses of a file open for writing; DCP writes in order and never seeks."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.length = 0
        self.failure: OSError | None = None  # of the first write that failed

    def write(self, block: bytes | bytearray | memoryview) -> int:
        view = memoryview(block).cast("B")
        try:
            self._stream.write(view)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self.sha256.update(view)
        self.length += len(view)
        alive()
        return len(view)

    def tell(self) -> int:
        return self.length

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()
