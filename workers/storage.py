"""A directory at any fsspec URL, with the few operations a run needs and the promises it relies on.

`write_text` is all or nothing: a reader sees the old content or the new one. On a file system that takes a
temporary file, fsync and rename; an object store gives it for free, because an object appears when it is closed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import IO, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"})


class Storage:
    """Files below one URL. Names are relative, with forward slashes.

    Credentials come from the environment (AWS_ACCESS_KEY_ID, ...), never from the URL.
    """

    def __init__(self, url: str) -> None:
        try:
            fs, root = url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"cannot open {url!r}: {error}") from None
        self.fs: AbstractFileSystem = fs
        self.root = root.rstrip("/")
        self.local = isinstance(fs, LocalFileSystem)
        self.url = self.root if self.local else url.rstrip("/")

    def __truediv__(self, name: str) -> Storage:
        return Storage(f"{self.url}/{name}")

    def path(self, name: str) -> str:
        """The file's path in this file system (without the protocol)."""
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str = "") -> bool:
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(name)))

    def read_text(self, name: str) -> str:
        """The whole file. FileNotFoundError if there is none."""
        with self.open(name, "rb") as stream:
            return stream.read().decode("utf-8")

    def write_text(self, name: str, text: str) -> None:
        """Replaces the file atomically and durably."""
        if not self.local:
            self.fs.pipe_file(self.path(name), text.encode("utf-8"))
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as stream:
            stream.write(text.encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)

    def open(self, name: str, mode: str) -> IO[bytes]:
        return cast("IO[bytes]", self.fs.open(self.path(name), mode))

    def size(self, name: str) -> int:
        """Bytes in the file. FileNotFoundError if there is none."""
        self.fs.invalidate_cache()
        size = self.fs.size(self.path(name))
        if size is None:
            raise OSError(f"{self.url}/{name}: the store does not tell its size")
        return int(size)

    def files(self, name: str = "") -> list[str]:
        """Names of the files directly below `name`, sorted; empty when there is no such directory."""
        return self._list(name, "file")

    def directories(self, name: str = "") -> list[str]:
        """Names of the directories directly below `name`, sorted; empty when there is no such directory."""
        return self._list(name, "directory")

    def make(self) -> None:
        """Creates the directory and its parents where there are directories; never a bucket."""
        if not OBJECT_STORES.intersection(
            [self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol
        ):
            self.fs.makedirs(self.root, exist_ok=True)

    def remove(self, name: str) -> None:
        """Removes a file or a whole directory; what is already gone is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path(name), recursive=True)

    def _list(self, name: str, kind: str) -> list[str]:
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.path(name), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        # An object store may list the directory itself as an empty object.
        names = {entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == kind}
        own = self.path(name).rstrip("/").rsplit("/", 1)[-1]
        return sorted(names - ({own} if kind == "file" else set()))
