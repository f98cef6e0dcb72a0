"""A shard on its way into its folder: kept on a disk until it is whole, so that memory does not grow with it."""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator

import numpy as np

from .blocks import BLOCK_BYTES, block_checksums
from .shards import ShardEntry
from .storage import Folder, explained
from .tokenizers import Tokenizer

_READ_AT_ONCE = 16 * BLOCK_BYTES


class ShardWriter:
    """Documents, one after the other: many that are whole, or one in as many pieces as it comes in.

    CorpusError: the disk is full or not to be written to. StoreUnavailable: the store cannot be reached.
    """

    def __init__(self, folder: Folder, name: str, tokenizer: Tokenizer) -> None:
        self.num_tokens = 0
        self._folder, self._name = folder, name
        self._dtype, self._separator = tokenizer.dtype, tokenizer.separator
        self._starts = [0]
        self._stack = contextlib.ExitStack()
        with self._explained():
            self._file = self._stack.enter_context(folder.staged(f"{name}.tokens"))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, documents: list[np.ndarray]) -> None:
        """Whole documents, none of them empty, without their separators."""
        if documents:
            separator = np.array([self._separator], dtype=self._dtype)
            lengths = [len(document) + 1 for document in documents]
            self._starts.extend(itertools.accumulate(lengths[1:], initial=self.num_tokens + lengths[0]))
            self.append(np.concatenate([part for document in documents for part in (document, separator)]))

    def append(self, tokens: np.ndarray) -> None:
        """A piece of the document at hand."""
        with self._explained():
            self._file.write(tokens.astype(self._dtype, copy=False).tobytes())
        self.num_tokens += len(tokens)

    def end_document(self) -> None:
        """Ends the document at hand with a separator; what is appended next begins another."""
        self.append(np.array([self._separator]))
        self._starts.append(self.num_tokens)

    def hand_over(self, count: int, other: "ShardWriter") -> None:
        """Moves the last `count` tokens of the document at hand to the end of another shard."""
        start = self.num_tokens - count
        for content in self._contents(start):
            other.append(np.frombuffer(content, dtype=self._dtype))
        with self._explained():
            self._file.truncate(start * self._dtype.itemsize)
            self._file.seek(0, os.SEEK_END)
        self.num_tokens = start

    def finish(self) -> ShardEntry | None:
        """Writes the shard's files; None, and nothing is written, where it has no document."""
        if not self.num_tokens:
            return None
        tokens, checksums = hashlib.sha256(), bytearray()
        for content in self._contents():
            tokens.update(content)
            checksums += block_checksums(content)
        listing = np.array(self._starts[:-1], dtype="<u8").tobytes()
        shard = ShardEntry(
            name=self._name,
            num_tokens=self.num_tokens,
            num_documents=len(self._starts) - 1,
            tokens_sha256=tokens.hexdigest(),
            documents_sha256=hashlib.sha256(listing).hexdigest(),
            blocks_sha256=hashlib.sha256(checksums).hexdigest(),
        )
        self._folder.commit(shard.tokens_file, self._file)
        self._folder.write(shard.documents_file, listing)
        self._folder.write(shard.blocks_file, bytes(checksums))
        return shard

    def _contents(self, start: int = 0) -> Iterator[bytes]:
        """What has been written from token `start` on, in pieces of whole blocks if that is 0."""
        with self._explained():
            self._file.seek(start * self._dtype.itemsize)
            while content := self._file.read(_READ_AT_ONCE):
                yield content

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explained(error, f"cannot write {self._folder.url}/{self._name}.tokens") from error
