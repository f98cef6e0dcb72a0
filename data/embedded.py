"""Corpora that need no download: the interpreter's own source code, and the chromosome shipped with this package."""

import functools
import gzip
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .corpus import SPLITS, Corpus
from .errors import CorpusError
from .order import stable_hash
from .tokenizers import ByteTokenizer, DnaTokenizer


class PythonSource(Corpus):
    """The running interpreter's standard library: every .py file outside site-packages is one document, whole.

    A document is the file's bytes and then byte 0. Files follow each other in an order fixed by a hash of their
    relative path; another hash holds out about one file in twenty for validation. Indexing asks for sizes only. The
    fingerprint covers relative paths and sizes: it differs between interpreter releases.

    Args: root: another directory to read instead. CorpusError: it holds no .py file.
    """

    name = "python-source"
    tokenizer = ByteTokenizer()
    _ELSEWHERE = frozenset({"site-packages", "dist-packages", "__pycache__"})
    _HELD_OUT_ONE_IN = 20

    def __init__(self, root: str | os.PathLike | None = None) -> None:
        self.root = Path(root or sysconfig.get_path("stdlib"))
        sizes = dict(self._scan())
        if not sizes:
            raise CorpusError(f"corpus python-source: no readable .py file under {self.root}; is the directory right?")
        order = sorted(sizes, key=lambda path: (stable_hash("order", path), path))
        self._files: dict[str, list[str]] = {split: [] for split in SPLITS}
        for path in order:
            held_out = stable_hash("split", path) % self._HELD_OUT_ONE_IN == 0
            self._files["validation" if held_out else "train"].append(path)
        self._offsets = {
            split: np.cumsum([0, *(sizes[path] + 1 for path in files)], dtype=np.int64)
            for split, files in self._files.items()
        }
        listing = "\n".join(f"{path}\t{sizes[path]}" for path in order)
        self._fingerprint = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()

    def _scan(self) -> Iterator[tuple[str, int]]:
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if name not in self._ELSEWHERE]
            for path in (Path(folder, name) for name in names if name.endswith(".py")):
                if path.is_file() and os.access(path, os.R_OK) and (size := path.stat().st_size):
                    yield path.relative_to(self.root).as_posix(), size

    def num_tokens(self, split: str) -> int:
        return int(self._offsets[split][-1])

    def document_starts(self, split: str, start: int, stop: int) -> np.ndarray:
        starts = self._offsets[split][:-1]
        return starts[np.searchsorted(starts, start) : np.searchsorted(starts, stop)]

    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        offsets, files = self._offsets[split], self._files[split]
        tokens = np.zeros(stop - start, dtype=np.uint8)  # zeros: the separators are already there
        number = int(np.searchsorted(offsets, start, side="right")) - 1
        position = start
        while position < stop:
            first, size = int(offsets[number]), int(offsets[number + 1] - offsets[number]) - 1
            end = min(stop, first + size)
            if position < end:
                content = read_bytes(self.root / files[number], position - first, end - position)
                tokens[position - start : end - start] = np.frombuffer(content, dtype=np.uint8)
            position = first + size + 1
            number += 1
        return tokens

    def fingerprint(self) -> str:
        return self._fingerprint


class Ecoli(Corpus):
    """The chromosome of *Escherichia coli* 536 (RefSeq NC_008253.1), 4,938,920 bases, one token a base, one document.

    The last 2**20 + 1 bases are held out: one validation sequence of 1,048,576 tokens with its targets, while the
    training part holds three. Each process unpacks the file once (5 MB of memory).
    """

    name = "ecoli"
    tokenizer = DnaTokenizer()
    _FILE = "NC_008253.fna.gz"
    _HELD_OUT = (1 << 20) + 1

    def _tokens(self, split: str) -> np.ndarray:
        tokens = _chromosome(Path(__file__).with_name(self._FILE))
        return tokens[-self._HELD_OUT :] if split == "validation" else tokens[: -self._HELD_OUT]

    def num_tokens(self, split: str) -> int:
        return len(self._tokens(split))

    def document_starts(self, split: str, start: int, stop: int) -> np.ndarray:
        return np.zeros(1 if start <= 0 < stop else 0, dtype=np.int64)

    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        return self._tokens(split)[start:stop]

    def fingerprint(self) -> str:
        return hashlib.sha256(self._tokens("train").tobytes() + b"|" + self._tokens("validation").tobytes()).hexdigest()


@functools.cache
def _chromosome(path: Path) -> np.ndarray:
    try:
        fasta = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise CorpusError(f"corpus ecoli: cannot read {path} ({error}); install the package again") from error
    _, _, bases = fasta.partition(b"\n")
    return Ecoli.tokenizer.encode(bases)


def read_bytes(path: Path, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start`, unbuffered: nothing else is read. CorpusError: they are not there."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            content = file.read(size)
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror or error}") from error
    if len(content) != size:
        raise CorpusError(f"{path} is shorter than when indexed: {size} bytes wanted at {start}, {len(content)} there")
    return content


EMBEDDED: dict[str, type[PythonSource] | type[Ecoli]] = {"python-source": PythonSource, "ecoli": Ecoli}
