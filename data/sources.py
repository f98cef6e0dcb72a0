"""Raw sources: text, JSONL, Parquet, FASTA and audio files, cut into pieces that can be read apart, by document."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression

from .errors import CorpusError
from .storage import explained, one_line, patiently, resolve

Kind = Literal["text", "jsonl", "parquet", "fasta", "audio"]
_KINDS: dict[str, Kind] = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".fa", ".fasta", ".fna", ".ffn", ".fas"), "fasta"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff"), "audio"),
}


@dataclass(frozen=True)
class SourceFile:
    """One file: its URL, size in bytes, what it holds, and how it is compressed (fsspec's name, or None)."""

    url: str
    size: int
    kind: Kind
    compression: str | None


@dataclass(frozen=True)
class Piece:
    """The documents of a file that begin in [start, stop): bytes, or row groups for Parquet; stop None: to its end."""

    file: SourceFile
    start: int
    stop: int | None
    size: int


def expand(sources: list[str], kind: Kind | Literal["auto"] = "auto", exclude: str | None = None) -> list[SourceFile]:
    """The files that paths, folders (all files below, hidden ones left out), globs and URLs stand for, in order of URL.

    `kind` "auto" goes by the file's ending. CorpusError: a source is not there or holds no file.
    """
    files: dict[str, SourceFile] = {}
    for source in sources:
        fs, path = resolve(source)
        found = patiently(lambda fs=fs, path=path: _find(fs, path), f"cannot read {source}")
        urls = {fs.unstrip_protocol(name): size for name, size in found.items()}
        urls = {url: size for url, size in urls.items() if not (exclude and url.startswith(exclude))}
        if urls and not any(urls.values()):
            raise CorpusError(f"nothing is in {source}: {len(urls)} empty file{'s'[: len(urls) != 1]}")
        urls = {url: size for url, size in urls.items() if size}
        if not urls:
            raise CorpusError(f"no source files at {source}: is the path right?")
        for url, size in urls.items():
            compression = infer_compression(url)
            stem = url.rpartition(".")[0] if compression else url
            ending = "." + stem.rpartition(".")[2].lower()
            files[url] = SourceFile(url, size, _KINDS.get(ending, "text") if kind == "auto" else kind, compression)
    return [files[url] for url in sorted(files)]


def _find(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, int]:
    found: Any  # fsspec annotates these answers as lists
    if any(letter in path for letter in "*?["):
        found = fs.glob(path, detail=True)
    elif fs.isdir(path):
        found = fs.find(path, detail=True)
        below = len(path.rstrip("/"))
        found = {name: info for name, info in found.items() if "/." not in name[below:]}
    else:
        found = {path: fs.info(path)}
    return {name: info["size"] for name, info in found.items() if info["type"] == "file"}


def cut(files: list[SourceFile], size: int) -> list[list[Piece]]:
    """Parts of about `size` source bytes each: small files together, large ones in pieces if their kind allows."""
    parts: list[list[Piece]] = [[]]
    room = size
    for piece in (piece for file in files for piece in _pieces(file, size)):
        if parts[-1] and piece.size > room:
            parts.append([])
            room = size
        parts[-1].append(piece)
        room -= piece.size
    return parts


def _pieces(file: SourceFile, size: int) -> list[Piece]:
    if file.size <= size or file.kind in ("text", "audio") or (file.compression and file.kind != "parquet"):
        return [Piece(file, 0, None, file.size)]
    if file.kind == "parquet":
        with _open(file) as stream:
            rows = _parquet(stream, file).num_row_groups
        step = max(1, rows * size // file.size)
        groups = [(start, min(start + step, rows)) for start in range(0, rows, step)]
        return [Piece(file, start, stop, file.size * (stop - start) // rows) for start, stop in groups]
    starts = range(0, file.size, size)
    return [Piece(file, start, min(start + size, file.size), min(size, file.size - start)) for start in starts]


def documents(piece: Piece, field: str = "text") -> Iterator[bytes]:
    """The documents of a piece of anything but audio, as bytes (UTF-8 where the format says text), without empty ones.

    `field`: the key of JSONL objects, or column of Parquet files, that holds the text.
    CorpusError: the file is gone or is not what its ending says; names the file and the line. StoreUnavailable: the
    store cannot be reached.
    """
    reader = {"text": _text, "jsonl": _jsonl, "parquet": _parquet_rows, "fasta": _fasta}[piece.file.kind]
    try:
        with _open(piece.file) as stream:
            yield from filter(None, reader(stream, piece, field))
    except CorpusError:
        raise
    except Exception as error:  # of the store, the decompressor or the format: each library has its own
        raise explained(error, f"cannot read {piece.file.url}") from error


def recording(file: SourceFile, sample_rate: int) -> Iterator[np.ndarray]:
    """The mu-law levels of an audio file at `sample_rate` Hz, uint8, in blocks; see `audio.read_levels`.

    CorpusError: the file is gone, is no sound, is damaged or breaks off; names the file. StoreUnavailable: as above.
    """
    from .audio import read_levels  # loads the libraries for sound

    try:
        with _on_disk(file) as path:
            yield from read_levels(path, sample_rate)
    except CorpusError:
        raise
    except Exception as error:
        raise explained(error, f"cannot read {file.url}") from error


@contextmanager
def _on_disk(file: SourceFile) -> Iterator[str]:
    """The path of a file on this machine: its own, or a copy's where it lies elsewhere or is compressed."""
    filesystem, path = resolve(file.url)
    if isinstance(filesystem, LocalFileSystem) and not file.compression:
        with Path(path).open("rb"):  # libsndfile does not say why it cannot
            yield path
        return
    with tempfile.NamedTemporaryFile() as copy:
        with _open(file) as stream:
            shutil.copyfileobj(stream, copy, 1 << 20)
        copy.flush()
        yield copy.name


def _open(file: SourceFile) -> IO[bytes]:
    compression = None if file.kind == "parquet" else file.compression

    def start() -> Any:  # a stream of bytes; fsspec says more
        filesystem, path = resolve(file.url)
        return filesystem.open(path, "rb", compression=compression)

    return patiently(start, f"cannot open {file.url}")


def _text(stream: IO[bytes], piece: Piece, _: str) -> Iterator[bytes]:
    content = stream.read()
    if b"\0" in content[:8192]:
        raise CorpusError(
            f"{piece.file.url} is not text (it holds zero bytes): name the text files, by a glob if need be"
        )
    yield content


def _lines(stream: IO[bytes], piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that begin at or after piece.start, to the end of the file."""
    offset = piece.start
    if offset:
        stream.seek(offset - 1)
        offset += len(stream.readline()) - 1
    for line in stream:
        yield offset, line
        offset += len(line)


def _jsonl(stream: IO[bytes], piece: Piece, field: str) -> Iterator[bytes]:
    for offset, line in _lines(stream, piece):
        if piece.stop is not None and offset >= piece.stop:
            return
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CorpusError(f"{piece.file.url}, line at byte {offset}: not JSON ({error})") from error
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(record) if isinstance(record, dict) else "no keys"
            raise CorpusError(f"{piece.file.url}, line at byte {offset}: no text under {field!r}; it has {keys}")
        yield text.encode("utf-8", "replace")


def _fasta(stream: IO[bytes], piece: Piece, _: str) -> Iterator[bytes]:
    record: list[bytes] | None = None
    for offset, line in _lines(stream, piece):
        if line.startswith(b">"):
            if record is not None:
                yield b"".join(record)
            if piece.stop is not None and offset >= piece.stop:
                return
            record = []
        elif record is not None:
            record.append(line.strip())
        elif piece.start == 0 and line.strip():
            raise CorpusError(f"{piece.file.url} is not FASTA: its first line does not begin with '>'")
        elif piece.stop is not None and offset >= piece.stop:
            return
    if record is not None:
        yield b"".join(record)


def _parquet_rows(stream: IO[bytes], piece: Piece, field: str) -> Iterator[bytes]:
    table = _parquet(stream, piece.file)
    if field not in table.schema_arrow.names:
        names = ", ".join(table.schema_arrow.names)
        raise CorpusError(f"{piece.file.url} has no column {field!r}; it has {names}")
    groups = list(range(piece.start, table.num_row_groups if piece.stop is None else piece.stop))
    for rows in table.iter_batches(batch_size=1024, row_groups=groups, columns=[field]):
        for value in rows.column(0).to_pylist():
            if isinstance(value, str | bytes):
                yield value.encode("utf-8", "replace") if isinstance(value, str) else value
            elif value is not None:
                raise CorpusError(f"{piece.file.url}, column {field!r} holds {type(value).__name__}, not text")


def _parquet(stream: IO[bytes], file: SourceFile):
    import pyarrow  # slow to import, and only Parquet needs it
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(stream)
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"{file.url} is not Parquet: {one_line(error)}") from error
