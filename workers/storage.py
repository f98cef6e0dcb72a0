"""A directory at any fsspec URL, with the few operations a run needs and the promises it relies on.

`write_text` is all or nothing: a reader sees the old content or the new one. On a file system that takes a
temporary file, fsync and rename; an object store gives it for free, because an object appears when it is closed.

Waiting for a store that fails for a while happens below (see `data.object_store`); what comes up is final.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from ..data.credentials import mask_credentials
from ..data.errors import StoreUnavailable
from ..data.storage import is_unreachable, one_line, open_filesystem

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"})


class StorageError(OSError):
    """A store that cannot be reached, or does not let us in. `filename`: what was wanted of it; one line."""


class StorageUnavailable(StorageError, StoreUnavailable):
    """A store that could not be reached within our patience: no mistake of the user's, and another try may go well."""


class Storage:
    """Files below one URL. Names are relative, with forward slashes.

    Credentials come from the environment (AWS_ACCESS_KEY_ID, ...), never from the URL. A store that fails for good
    raises StorageError from every method, StorageUnavailable where it could not be reached.
    """

    def __init__(self, url: str) -> None:
        try:
            fs, root = open_filesystem(url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"cannot open {mask_credentials(url)!r}: {error}") from None
        self.fs: AbstractFileSystem = fs
        self.local = isinstance(fs, LocalFileSystem)
        # one name for one place, however it was reached
        self.root = os.path.normpath(root) if self.local else root.rstrip("/")
        self.url = self.root if self.local else url.rstrip("/")

    def __truediv__(self, name: str) -> Storage:
        return Storage(f"{self.url}/{name}")

    def path(self, name: str) -> str:
        """The file's path in this file system (without the protocol)."""
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str = "") -> bool:
        with self.explained(name):
            self.fs.invalidate_cache()
            return bool(self.fs.exists(self.path(name)))

    def read_text(self, name: str) -> str:
        """The whole file as it was at one moment. FileNotFoundError if there is none."""
        with self.explained(name):
            # In one request: what s3fs opens or reads side by side expires when it is replaced meanwhile.
            return cast("bytes", self.fs.cat_file(self.path(name), max_concurrency=1)).decode("utf-8")

    def write_text(self, name: str, text: str) -> None:
        """Replaces the file atomically and durably."""
        if not self.local:
            with self.explained(name):
                self.fs.pipe_file(self.path(name), text.encode("utf-8"))
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as stream:
                stream.write(text.encode("utf-8"))
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def open(self, name: str, mode: str) -> IO[bytes]:
        return cast("IO[bytes]", self.fs.open(self.path(name), mode))

    def size(self, name: str) -> int:
        """Bytes in the file. FileNotFoundError if there is none."""
        with self.explained(name):
            self.fs.invalidate_cache()
            size = self.fs.size(self.path(name))
        if size is None:
            raise OSError(f"{self.url}/{name}: the store does not tell its size")
        return int(size)

    def files(self, name: str = "") -> list[str]:
        """Names of the files directly below `name`, sorted; empty when there is no such directory."""
        return self._list(name, "file")

    def directories(self, name: str = "", *, links: bool = True) -> list[str]:
        """Names of the directories directly below `name`, sorted; empty when there is no such directory.

        Without `links`, those that lie elsewhere are left out.
        """
        return self._list(name, "directory", links)

    def make(self) -> None:
        """Creates the directory and its parents where there are directories; never a bucket."""
        if not OBJECT_STORES.intersection(
            [self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol
        ):
            with self.explained(""):
                self.fs.makedirs(self.root, exist_ok=True)

    def remove(self, name: str) -> None:
        """Removes a file or a whole directory; what is already gone is no error."""
        with self.explained(name), contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path(name), recursive=True)

    @contextlib.contextmanager
    def explained(self, name: str) -> Iterator[None]:
        """Turns what a store's client raises about `name`, once waiting does not help, into a StorageError."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, ValueError, StorageError):
            raise
        except Exception as error:  # every client has its own family of errors
            if self.local:
                raise
            kind = StorageUnavailable if is_unreachable(error) else StorageError
            raise kind(errno.EIO, one_line(error), f"{self.url}/{name}".rstrip("/")) from error

    def _list(self, name: str, kind: str, links: bool = True) -> list[str]:
        try:
            with self.explained(name):
                self.fs.invalidate_cache()
                entries = self.fs.ls(self.path(name), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        # An object store may list the directory itself as an empty object.
        entries = [entry for entry in entries if links or not entry.get("islink")]
        names = {entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == kind}
        own = self.path(name).rstrip("/").rsplit("/", 1)[-1]
        return sorted(names - ({own} if kind == "file" else set()))
