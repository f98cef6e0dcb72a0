"""Files at any fsspec URL: a folder, read by range and written whole, patient with a store that fails for a while.

Two errors come of it. `CorpusError`: the user can mend it (no such file, not permitted, the wrong format).
`StoreUnavailable`: nobody could be reached within our patience; another attempt, later, may go well.
"""

import contextlib
import errno
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from .credentials import mask_credentials, refuse_credentials
from .errors import CorpusError, StoreUnavailable

Result = TypeVar("Result")
log = logging.getLogger(__name__)

_WAITS = (0.5, 1.5, 4.0)
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
    TypeError,
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")  # by name: their module is slow to import
# Packages whose errors are about connections: fsspec's stores speak HTTP through them.
_NETWORK_PACKAGES = ("aiohttp", "urllib3", "requests")


def open_filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a URL or path, and the path in it.

    ValueError, ImportError: unknown, its package missing, or the URL lacks a slash or holds credentials.
    """
    refuse_credentials("URL", url)
    check_url(url)
    if not url.startswith(("s3://", "s3a://")):
        return url_to_fs(url)
    from .object_store import PatientS3FileSystem  # slow to import, and only such a store needs it

    filesystem = PatientS3FileSystem()
    return filesystem, str(filesystem._strip_protocol(url))


def check_url(url: str) -> str:
    """`url` unless it is a URL with one slash, which would be a folder here; ValueError."""
    if half := re.match(r"(s3a?|gs|gcs|az|abfss?|memory|file):/(?!/)", url):
        raise ValueError(f"{url} has one slash behind the colon: write {half[1]}://{url[half.end() :]}")
    return url


def resolve(url: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a URL or path, and the path in it. CorpusError: as the errors of `open_filesystem`."""
    try:
        return open_filesystem(url)
    except (ValueError, ImportError) as error:
        raise CorpusError(f"cannot open {mask_credentials(url)}: {one_line(error)}") from error


def patiently(action: Callable[[], Result], what: str, sleep: Callable[[float], None] = time.sleep) -> Result:
    """Do what may fail for a while (refused, throttled or dropped connections), up to four times.

    What waiting does not mend (not found, not permitted, no room), what was waited for below (see `object_store`), and
    the last failure, are raised as `explained` has them.
    """
    for attempt, wait in enumerate((*_WAITS, None), start=1):
        try:
            return action()
        except CorpusError:
            raise
        except Exception as error:
            final = isinstance(error, (*_FINAL, StoreUnavailable)) or type(error).__name__ in _NO_CREDENTIALS
            if wait is None or final or getattr(error, "errno", None) in _FULL:
                tries = "" if attempt == 1 else f" after {attempt} tries"
                raise explained(error, f"{what}{tries}") from error
            log.warning("%s: %s; trying again in %.1f s", what, one_line(error), wait)
            sleep(wait)
    raise AssertionError


def explained(error: Exception, what: str) -> CorpusError | StoreUnavailable:
    """The error for the user, as one line: StoreUnavailable if a store could not be reached, CorpusError otherwise."""
    if isinstance(error, StoreUnavailable) and error.errno is None:  # an explained one
        return error
    return (StoreUnavailable if is_unreachable(error) else CorpusError)(f"{what}: {one_line(error)}")


def is_unreachable(error: Exception) -> bool:
    """Whether a store's client says with this that it reached nobody, or nobody in a state to answer."""
    if isinstance(error, (StoreUnavailable, ConnectionError, TimeoutError)):
        return True
    status = getattr(error, "status", None)  # of an answer over HTTP
    refused = isinstance(status, int) and status < 500 and status != 429
    return type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES and not refused


def one_line(error: BaseException) -> str:
    """The cause as one line, never empty."""
    if isinstance(error, FileNotFoundError):
        answer: dict[str, Any] = getattr(error.__cause__, "response", {})  # of S3; its message may be empty
        return "no such bucket" if answer.get("Error", {}).get("Code") == "NoSuchBucket" else "no such file"
    if type(error).__name__ in _NO_CREDENTIALS:
        return "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


class Folder:
    """A folder at a URL. Names are those of files inside it, with "/" between the parts."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.fs, root = resolve(url)
        self.root = root.rstrip("/")

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The bytes [start, stop) of a file, all of it by default. CorpusError: they are not to be had."""

        def fetch() -> Any:  # bytes; fsspec says str | bytes
            # from 0: asked for a whole file, s3fs asks for its size first
            return self.fs.cat_file(self.path(name), start=start or 0, end=stop)

        return patiently(fetch, f"cannot read {self.url}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all, over the one that is there."""

        def store() -> None:
            path = self.path(name)
            if self.is_local:  # object stores show nothing before the last byte; disks do
                self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                self.fs.pipe_file(f"{path}.writing", content)
                Path(f"{path}.writing").replace(path)
            else:
                self.fs.pipe_file(path, content)

        patiently(store, f"cannot write {self.url}/{name}")

    @contextlib.contextmanager
    def staged(self, name: str) -> Iterator[IO[bytes]]:
        """A file on a disk of this machine, to write and read, for `commit`; afterwards nothing else of it is left."""
        if not self.is_local:
            with tempfile.NamedTemporaryFile() as file:
                yield file
            return
        path = Path(f"{self.path(name)}.writing")
        try:
            with path.open("w+b") as file:
                yield file
        finally:
            path.unlink(missing_ok=True)

    def commit(self, name: str, file: IO[bytes]) -> None:
        """Makes a staged file the file `name`, whole or not at all."""

        def store() -> None:
            file.flush()
            if self.is_local:
                Path(file.name).replace(self.path(name))
            else:
                self.fs.put_file(file.name, self.path(name))

        patiently(store, f"cannot write {self.url}/{name}")

    def sizes(self, name: str = "") -> dict[str, int]:
        """Sizes in bytes of the files directly in this folder, or its subfolder `name`; empty where there is none."""

        def listing() -> dict[str, int]:
            self.fs.invalidate_cache()
            try:
                entries = self.fs.ls(self.path(name).rstrip("/"), detail=True)
            except FileNotFoundError:
                return {}
            return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}

        return patiently(listing, f"cannot list {self.url}/{name}")

    def remove(self, names: list[str]) -> None:
        """Remove files that are there."""
        for name in names:
            patiently(lambda name=name: self.fs.rm_file(self.path(name)), f"cannot remove {self.url}/{name}")
