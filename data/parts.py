"""One part of a preparation: some source, tokenised into a shard for each split, and the record that it is done."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from .corpus import SPLITS
from .errors import CorpusError
from .shard_writer import ShardWriter
from .shards import ShardEntry
from .sources import Piece, documents, recording
from .storage import Folder
from .tokenizers import DnaTokenizer, MuLawTokenizer, Tokenizer

PARTS = "parts"
_ENCODED_TOGETHER = 4 << 20


class Part(BaseModel):
    """The content of parts/NNNNN.json: a part's shards by split; a split that no document fell into has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: dict[str, ShardEntry]


@dataclass(frozen=True)
class Division:
    """How documents are shared among the splits."""

    validation: float
    holdout: Literal["documents", "tail"]

    def tail(self, length: int) -> int:
        """How much of a document's end is held out, of `length` tokens or bytes."""
        return round(length * self.validation) if self.holdout == "tail" else 0

    def held_out(self, document: bytes) -> bool:
        """By content: a document that occurs twice falls into the same split twice."""
        if self.holdout == "tail":
            return False
        digest = hashlib.blake2b(document, digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.validation * 2**64


def finished_parts(folder: Folder, tokenizer: Tokenizer, num_parts: int) -> dict[int, Part]:
    """The parts of an interrupted run that can be trusted: their record is whole and their shards are all there."""
    sizes = folder.sizes()
    records = folder.sizes(PARTS)
    done = {}
    for number in range(num_parts):
        if f"{number:05d}.json" not in records:
            continue
        with contextlib.suppress(ValidationError):
            part = Part.model_validate_json(folder.read(f"{PARTS}/{number:05d}.json"))
            files = [file for shard in part.shards.values() for file in shard.files(tokenizer.dtype.itemsize)]
            if all(sizes.get(name) == size for name, size, _ in files) and all(
                shard.blocks_sha256 for shard in part.shards.values()
            ):
                done[number] = part
    return done


def make_part(
    folder: Folder, number: int, pieces: list[Piece], tokenizer: Tokenizer, division: Division, field: str
) -> Part:
    """Tokenise and write one part, its record last."""
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(folder, f"{split}-{number:05d}", tokenizer)) for split in SPLITS]
        if isinstance(tokenizer, MuLawTokenizer):
            _write_recordings(writers, pieces, tokenizer, division)
        else:
            _write_texts(writers, pieces, tokenizer, division, field)
        shards = {split: shard for split, writer in zip(SPLITS, writers, strict=True) if (shard := writer.finish())}
    part = Part(shards=shards)
    folder.write(f"{PARTS}/{number:05d}.json", part.model_dump_json().encode())
    return part


def _write_texts(
    writers: list[ShardWriter], pieces: list[Piece], tokenizer: Tokenizer, division: Division, field: str
) -> None:
    for texts in _batches(pieces, field):
        try:
            encoded = tokenizer.encode_batch([text for _, text in texts])
        except ValueError as error:
            files = sorted({piece.file.url for piece, _ in texts})
            hint = "; `--tokenizer bytes --overwrite` takes any letters" if isinstance(tokenizer, DnaTokenizer) else ""
            raise CorpusError(f"{files[0]}: {error}{hint}") from error
        shares: tuple[list[np.ndarray], ...] = ([], [])
        for (_, text), tokens in zip(texts, encoded, strict=True):
            head = len(tokens) - division.tail(len(tokens))
            halves = (tokens[:0], tokens) if division.held_out(text) else (tokens[:head], tokens[head:])
            for share, half in zip(shares, halves, strict=True):
                if len(half):
                    share.append(half)
        for writer, share in zip(writers, shares, strict=True):
            writer.add(share)


def _write_recordings(
    writers: list[ShardWriter], pieces: list[Piece], tokenizer: MuLawTokenizer, division: Division
) -> None:
    """A recording's length and the hash of its content are known at its end: what is held out is moved there."""
    train, validation = writers
    for piece in pieces:
        content, start = hashlib.blake2b(), train.num_tokens
        for levels in recording(piece.file, tokenizer.sample_rate):
            content.update(levels.data)
            train.append(levels)
        length = train.num_tokens - start
        held_out = length if division.held_out(content.digest()) else division.tail(length)
        train.hand_over(held_out, validation)
        for writer, part in ((train, length - held_out), (validation, held_out)):
            if part:
                writer.end_document()


def _batches(pieces: list[Piece], field: str) -> Iterator[list[tuple[Piece, bytes]]]:
    """The documents, a few megabytes at a time."""
    batch, size = [], 0
    for piece in pieces:
        for document in documents(piece, field):
            batch.append((piece, document))
            size += len(document)
            if size >= _ENCODED_TOGETHER:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
