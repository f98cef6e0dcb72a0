"""Prepared corpora: token shards with an index, in a folder at any fsspec URL.

    index.json              written last: no index, no corpus. Tokenizer, vocabulary, shards with counts and SHA-256
    train-00000.tokens      raw little-endian token ids (1, 2 or 4 bytes each), documents one after the other
    train-00000.documents   positions in the shard at which its documents begin, raw little-endian uint64
    train-00000.blocks      CRC-32 of every 64 KiB of the tokens, raw little-endian uint32 (`blocks`)
    tokenizer.json          where the tokenizer is not one of the built-in ones

A split's stream is its shards in the order of the index. Documents never span shards. Reading needs nothing but NumPy,
and any slice of any sequence is one byte range (two where it crosses shards), widened to whole blocks the first time.
"""

import functools
import hashlib
import itertools
import logging
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .blocks import BLOCK_BYTES, CheckedFile, checksums_length
from .corpus import SPLITS, Corpus
from .errors import CorpusError
from .storage import Folder
from .subwords import SubwordTokenizer
from .tokenizer_files import TOKENIZER
from .tokenizers import Tokenizer, built_in

log = logging.getLogger(__name__)

INDEX = "index.json"
PLAN = "prepare.plan"  # of a preparation that has begun
_SHARDS_OF_DOCUMENTS_KEPT = 256
_REMOTE_READS = 8
Verify = Literal["size", "blocks", "checksum"]


class ShardEntry(BaseModel):
    """One shard, as the index knows it. `name` has no folder in it: an index cannot point outside of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    num_tokens: int = Field(gt=0)
    num_documents: int = Field(gt=0)
    tokens_sha256: str
    documents_sha256: str
    blocks_sha256: str | None = None  # None: prepared before there were blocks

    @property
    def tokens_file(self) -> str:
        return f"{self.name}.tokens"

    @property
    def documents_file(self) -> str:
        return f"{self.name}.documents"

    @property
    def blocks_file(self) -> str:
        return f"{self.name}.blocks"

    def files(self, token_bytes: int, block_bytes: int = BLOCK_BYTES) -> list[tuple[str, int, str]]:
        """(name, bytes, SHA-256) of each of its files."""
        length = self.num_tokens * token_bytes
        found = [
            (self.tokens_file, length, self.tokens_sha256),
            (self.documents_file, self.num_documents * 8, self.documents_sha256),
        ]
        if self.blocks_sha256:
            found.append((self.blocks_file, checksums_length(length, block_bytes), self.blocks_sha256))
        return found


class Index(BaseModel):
    """The content of index.json. `plan` is the digest of the sources and settings that the corpus was prepared from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["longstride-tokens"] = "longstride-tokens"
    version: Literal[1] = 1
    tokenizer: str
    separator: int = Field(ge=0)
    vocab_size: int = Field(gt=0)
    dtype: Literal["|u1", "<u2", "<u4"]
    plan: str
    block_bytes: int = Field(BLOCK_BYTES, gt=0)
    splits: dict[Literal["train", "validation"], list[ShardEntry]] = Field(min_length=2)

    @property
    def shards(self) -> list[ShardEntry]:
        return [shard for split in SPLITS for shard in self.splits[split]]


def read_index(folder: Folder) -> Index:
    """CorpusError: there is none, or it is damaged."""
    if INDEX not in (files := folder.sizes()):
        raw = bool(files) and PLAN not in files  # sources, and no place to write to
        fix = f"prepare {folder.url} OUT` and give data.corpus=OUT" if raw else f"prepare SOURCE {folder.url}`"
        raise CorpusError(f"{folder.url} is not a prepared corpus (no {INDEX}): run `longstride {fix}")
    try:
        return Index.model_validate_json(folder.read(INDEX))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CorpusError(f"{folder.url}/{INDEX} is damaged: {place} {first['msg']}".replace("\n", " ")) from error


def read_tokenizer(folder: Folder, index: Index) -> Tokenizer:
    """The tokenizer that the shards were written with."""
    if own := built_in(index.tokenizer):
        return own
    tokenizer = SubwordTokenizer(folder.read(TOKENIZER).decode("utf-8", "replace"), separator=index.separator)
    if tokenizer.name != index.tokenizer:
        raise CorpusError(f"{folder.url}/{TOKENIZER} is not the one that the corpus was prepared with: restore it")
    return tokenizer


class ShardedCorpus(Corpus):
    """A corpus that `prepare` made.

    Args:
        url: its folder, a path or any fsspec URL.
        verify: "size" compares every shard's size with the index (one listing); "blocks" also checks every block of
            64 KiB when it is first read; "checksum" also reads every byte beforehand.
        on_bad_shard: what to do about a shard that is missing, short or corrupted beforehand. "stop" raises; "skip"
            leaves it out, logs a warning, keeps its name in `skipped`, and changes the fingerprint and the order.

    Raises CorpusError, naming the shard and what is wrong with it. A shard found bad while it is read stops the read,
    always: processes that skip different shards would train on different orders.
    """

    def __init__(
        self,
        url: str,
        *,
        verify: Verify = "blocks",
        on_bad_shard: Literal["stop", "skip"] = "stop",
    ) -> None:
        self.folder = Folder(url)
        self.name = self.folder.url
        self.index = read_index(self.folder)
        self.concurrent_reads = 1 if self.folder.is_local else _REMOTE_READS
        self.tokenizer = read_tokenizer(self.folder, self.index)
        self._dtype = np.dtype(self.index.dtype)
        problems = find_problems(self.folder, self.index, checksum=verify == "checksum")
        if problems and on_bad_shard == "stop":
            name, problem = next(iter(problems.items()))
            others = f" (and {len(problems) - 1} more bad shards)" if len(problems) > 1 else ""
            raise CorpusError(f"shard {self.name}/{name} {problem}{others}: restore it or set data.on_bad_shard=skip")
        for name, problem in problems.items():
            log.warning("skipping shard %s/%s: it %s", self.name, name, problem)
        self.skipped = tuple(problems)
        self._by_block = verify != "size"
        if self._by_block and not all(shard.blocks_sha256 for shard in self.index.shards):
            _tell_unchecked(self.name)
        self._shards = {
            split: [shard for shard in shards if shard.name not in problems]
            for split, shards in self.index.splits.items()
        }
        self._offsets = {
            split: np.cumsum([0, *(shard.num_tokens for shard in shards)], dtype=np.int64)
            for split, shards in self._shards.items()
        }
        self._document_starts = functools.lru_cache(_SHARDS_OF_DOCUMENTS_KEPT)(self._read_document_starts)
        self._tokens: dict[str, Callable[[int, int], bytes]] = {}

    def num_tokens(self, split: str) -> int:
        return int(self._offsets[split][-1])

    def document_starts(self, split: str, start: int, stop: int) -> np.ndarray:
        parts = [np.zeros(0, dtype=np.int64)]
        for shard, offset, first, last in self._pieces(split, start, stop):
            starts = self._document_starts(shard.documents_file, shard.documents_sha256)
            parts.append(starts[np.searchsorted(starts, first) : np.searchsorted(starts, last)] + offset)
        return np.concatenate(parts)

    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        tokens = np.empty(stop - start, dtype=self._dtype)
        size = self._dtype.itemsize
        for shard, offset, first, last in self._pieces(split, start, stop):
            try:
                content = self._open_tokens(shard)(first * size, last * size)
            except CorpusError:
                raise
            except ValueError as error:
                raise CorpusError(
                    f"shard {self.name}/{shard.name} is corrupted: {error}; restore it, or leave it out: "
                    "data.verify=checksum data.on_bad_shard=skip"
                ) from error
            if len(content) != (last - first) * size:
                raise CorpusError(f"shard {self.name}/{shard.name} has become short: restore it")
            part = np.frombuffer(content, dtype=self._dtype)
            if part.max() >= self.index.vocab_size:
                raise CorpusError(
                    f"shard {self.name}/{shard.name} is corrupted: token {part.max()} is beyond its vocabulary"
                )
            tokens[offset + first - start : offset + last - start] = part
        return tokens

    def _pieces(self, split: str, start: int, stop: int) -> list[tuple[ShardEntry, int, int, int]]:
        """The shards that hold [start, stop): (shard, its offset in the stream, range inside the shard)."""
        offsets = self._offsets[split]
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        last = int(np.searchsorted(offsets, stop, side="left"))
        return [
            (self._shards[split][number], begin, max(start, begin) - begin, min(stop, end) - begin)
            for number, (begin, end) in enumerate(itertools.pairwise(offsets[first : last + 1].tolist()), start=first)
        ]

    def _open_tokens(self, shard: ShardEntry) -> Callable[[int, int], bytes]:
        """How to read bytes of a shard's tokens, given where they begin and end."""
        if shard.name not in self._tokens:
            read = partial(self.folder.read, shard.tokens_file)
            if self._by_block and shard.blocks_sha256:
                checksums = np.frombuffer(self._read_whole(shard.blocks_file, shard.blocks_sha256), dtype="<u4")
                length = shard.num_tokens * self._dtype.itemsize
                read = CheckedFile(read, length, checksums, self.index.block_bytes).read
            self._tokens[shard.name] = read
        return self._tokens[shard.name]

    def _read_document_starts(self, file: str, digest: str) -> np.ndarray:
        return np.frombuffer(self._read_whole(file, digest), dtype="<u8").astype(np.int64)

    def _read_whole(self, file: str, digest: str) -> bytes:
        content = self.folder.read(file)
        if hashlib.sha256(content).hexdigest() != digest:
            raise CorpusError(f"shard file {self.name}/{file} is corrupted: its SHA-256 is not that of the index")
        return content

    def fingerprint(self) -> str:
        told = {"name", "num_tokens", "num_documents", "tokens_sha256", "documents_sha256"}
        shards = {split: [shard.model_dump(include=told) for shard in shards] for split, shards in self._shards.items()}
        return hashlib.sha256(repr((self.index.tokenizer, self.index.vocab_size, shards)).encode()).hexdigest()


def find_problems(folder: Folder, index: Index, *, checksum: bool) -> dict[str, str]:
    """What is wrong with which shard, by name: it "is missing ...", "is short ...", "is corrupted ..."; or nothing."""
    sizes = folder.sizes()
    problems = {}
    for shard in index.shards:
        problem = None
        for file, size, digest in shard.files(np.dtype(index.dtype).itemsize, index.block_bytes):
            if file not in sizes:
                problem = f"is missing its file {file}"
            elif sizes[file] != size:
                problem = f"is short or overlong: {file} has {sizes[file]} bytes, not {size}"
            elif checksum and hashlib.sha256(folder.read(file)).hexdigest() != digest:
                problem = f"is corrupted: the SHA-256 of {file} is not that of the index"
            if problem:
                problems[shard.name] = problem
                break
    return problems


@functools.cache
def _tell_unchecked(name: str) -> None:
    """Once for each corpus."""
    log.warning(
        "%s has no checksums of its blocks: only sizes are checked while it is read. data.verify=checksum reads it "
        "whole beforehand; `longstride prepare ... --overwrite` adds them",
        name,
    )
