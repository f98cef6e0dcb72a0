"""Preparing a corpus: raw sources to token shards, in parts that are each finished or not begun.

A part is about `part_bytes` of source. Its shards are written, then `parts/00012.json` that says so, with checksums;
when all parts are there, `index.json`. Preparing again after an interruption keeps the finished parts. The result
depends on the sources and settings alone: not on the number of workers, and not on interruptions.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Literal

from .corpus import SPLITS
from .credentials import refuse_credentials
from .errors import CorpusError
from .order import stable_hash
from .parts import PARTS, Division, Part, finished_parts, make_part
from .shards import INDEX, PLAN, Index, find_problems, read_index
from .sources import Kind, Piece, SourceFile, cut, documents, expand
from .storage import Folder
from .subwords import SubwordTokenizer, train_bpe
from .tokenizer_choice import BPE_VOCABULARY, choose_tokenizer
from .tokenizer_files import TOKENIZER
from .tokenizers import Tokenizer

_TRAINING_BYTES = 32 << 20
_FEW_FILES = 100
Holdout = Literal["auto", "documents", "tail"]


@dataclass(frozen=True)
class Progress:
    """How far `prepare` is. `seconds` since it began; parts that an earlier run finished count as done."""

    parts_done: int
    num_parts: int
    source_bytes_done: int
    source_bytes: int
    num_documents: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made. Tokens and documents are per split."""

    url: str
    tokenizer: str
    vocab_size: int
    num_shards: int
    num_tokens: dict[str, int]
    num_documents: dict[str, int]
    seconds: float


def prepare(
    sources: str | list[str],
    out: str,
    *,
    tokenizer: str = "auto",
    vocab_size: int | None = None,
    separator: str | None = None,
    sample_rate: int | None = None,
    format: Kind | Literal["auto"] = "auto",
    field: str = "text",
    validation: float = 0.05,
    holdout: Holdout = "auto",
    part_bytes: int = 64 << 20,
    workers: int = 2,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Prepared:
    """Turn raw sources into a prepared corpus that `open_corpus(out)` reads. Run again, it goes on.

    Args:
        sources: files, folders (everything below), globs; paths or fsspec URLs (s3://bucket/*.jsonl).
        out: folder to write, path or fsspec URL.
        tokenizer: "bytes", "dna", "bpe" (trained on a sample of the sources, each digit a token of its own), or the
            path or URL of a tokenizer.json; "auto" takes "dna" where all files are FASTA, "mu-law" for audio, which
            takes no other, and "bytes" otherwise. vocab_size: for "bpe" only, default 4096. separator: for a
            tokenizer.json only, the token that ends a document, where it has an unusual name.
        sample_rate: for audio only, in Hz, default 16000: what recordings are resampled to.
        format: "text" and "audio" (a file is a document), "jsonl", "parquet", "fasta" (a record is one), or by file
            ending. Compressed files (.gz, .bz2, .xz) are read as what is in them.
        field: key or column that holds the text, for JSONL and Parquet.
        validation: share to hold out. holdout: "documents" holds out whole documents by a hash of their content, "tail"
            the end of each; "auto" takes the tail for FASTA and for fewer than 100 text or audio files.
        part_bytes: source bytes in a shard, about. workers: threads. progress: called as parts are finished.
        overwrite: replace what another preparation left in `out`.

    Raises ValueError (CorpusError where files are at fault): one line with the file or value and the fix.
    StoreUnavailable: a store could not be reached.
    """
    began = time.monotonic()
    if not 0 <= validation < 1:
        raise ValueError(f"validation {validation} is not a share: take 0 or more and less than 1, as in 0.05")
    for name, value in (("workers", workers), ("part_bytes", part_bytes)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    sources = [sources] if isinstance(sources, str) else sources
    for what, url in (("OUT", out), ("--tokenizer", tokenizer), *(("SOURCE", source) for source in sources)):
        refuse_credentials(what, url)
    folder = Folder(out)
    own = folder.fs.unstrip_protocol(folder.root) + "/"
    files = expand(sources, format, exclude=own)
    division = Division(validation, _choose_holdout(files) if holdout == "auto" else holdout)
    name, loaded = choose_tokenizer(files, tokenizer, vocab_size, separator, sample_rate)
    plan = _digest(
        [(file.url, file.size, file.kind) for file in files], name, field, validation, division.holdout, part_bytes
    )
    if _claim(folder, plan, overwrite):
        return _summary(folder, read_index(folder), began)

    parts = cut(files, part_bytes)
    if loaded is None:
        loaded = _trained_tokenizer(folder, parts, division, field, vocab_size or BPE_VOCABULARY)
    elif isinstance(loaded, SubwordTokenizer):
        folder.write(TOKENIZER, loaded.content.encode())
    made = _make_parts(folder, parts, loaded, division, field, workers, progress)
    index = _index(loaded, plan, made)
    folder.write(INDEX, index.model_dump_json(indent=1).encode())
    folder.remove([f"{PARTS}/{name}" for name in folder.sizes(PARTS)])
    return _summary(folder, index, began)


def _make_parts(
    folder: Folder,
    parts: list[list[Piece]],
    tokenizer: Tokenizer,
    division: Division,
    field: str,
    workers: int,
    progress: Callable[[Progress], None] | None,
) -> list[Part]:
    """All parts, in order: those that an earlier run finished, and the others made now."""
    began = time.monotonic()
    done: dict[int, Part] = {}
    sizes = [sum(piece.size for piece in part) for part in parts]
    totals = Counter[str]()

    def finish(number: int, part: Part) -> None:
        done[number] = part
        totals["bytes"] += sizes[number]
        totals["documents"] += sum(shard.num_documents for shard in part.shards.values())
        totals["tokens"] += sum(shard.num_tokens for shard in part.shards.values())

    def report() -> None:
        if progress:
            counts = (totals["bytes"], sum(sizes), totals["documents"], totals["tokens"])
            progress(Progress(len(done), len(parts), *counts, time.monotonic() - began))

    for number, part in finished_parts(folder, tokenizer, len(parts)).items():
        finish(number, part)
    report()
    with ThreadPoolExecutor(workers, "prepare") as pool:
        tasks = {
            pool.submit(make_part, folder, number, part, tokenizer, division, field): number
            for number, part in enumerate(parts)
            if number not in done
        }
        try:
            for task in as_completed(tasks):
                finish(tasks[task], task.result())
                report()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # parts that are begun are finished, and kept for the next run
            raise
    return [done[number] for number in range(len(parts))]


def _choose_holdout(files: list[SourceFile]) -> Literal["documents", "tail"]:
    kinds = {file.kind for file in files}
    few = kinds in ({"text"}, {"audio"}) and len(files) < _FEW_FILES
    return "tail" if few or "fasta" in kinds else "documents"


def _digest(*settings: object) -> str:
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _claim(folder: Folder, plan: str, overwrite: bool) -> bool:
    """Make sure that `out` holds this preparation or nothing. True: it is finished already.

    CorpusError: it holds another one and may not be overwritten.
    """
    names = folder.sizes()
    if PLAN in names or INDEX in names:
        renew = overwrite and INDEX in names and not _has_blocks(folder)
        if PLAN in names and folder.read(PLAN) == plan.encode() and not renew:
            return INDEX in names and _whole(folder)
        if not overwrite:
            raise CorpusError(
                f"{folder.url} holds a corpus prepared from other sources or settings: "
                "take another folder, or overwrite it"
            )
        ours = [
            name
            for name in names
            if name in (PLAN, TOKENIZER) or name.endswith((".tokens", ".documents", ".blocks", ".writing"))
        ]
        parts = [f"{PARTS}/{name}" for name in folder.sizes(PARTS)]
        folder.remove([INDEX] * (INDEX in names) + parts + ours)
    folder.write(PLAN, plan.encode())
    return False


def _whole(folder: Folder) -> bool:
    try:
        return not find_problems(folder, read_index(folder), checksum=False)
    except CorpusError:
        return False


def _has_blocks(folder: Folder) -> bool:
    try:
        return all(shard.blocks_sha256 for shard in read_index(folder).shards)
    except CorpusError:
        return False


def _trained_tokenizer(
    folder: Folder, parts: list[list[Piece]], division: Division, field: str, vocab_size: int
) -> Tokenizer:
    """The BPE tokenizer of an interrupted run, or one trained on up to 32 MiB from all over the training split."""
    if TOKENIZER in folder.sizes():
        return SubwordTokenizer(folder.read(TOKENIZER).decode())

    def sample() -> Iterator[str]:
        room = _TRAINING_BYTES
        share = max(room // len(parts), 1 << 20)
        for number in sorted(range(len(parts)), key=lambda number: stable_hash("sample", number)):
            left = min(share, room)
            for document in (document for piece in parts[number] for document in documents(piece, field)):
                if left <= 0:
                    break
                if not division.held_out(document):
                    text = document[: min(left, len(document) - division.tail(len(document)))]
                    yield text.decode("utf-8", "replace")
                    left, room = left - len(text), room - len(text)

    trained = train_bpe(sample(), vocab_size)
    folder.write(TOKENIZER, trained.content.encode())
    return trained


def _index(tokenizer: Tokenizer, plan: str, parts: list[Part]) -> Index:
    return Index.model_validate(
        {
            "tokenizer": tokenizer.name,
            "separator": tokenizer.separator,
            "vocab_size": tokenizer.vocab_size,
            "dtype": tokenizer.dtype.str,
            "plan": plan,
            "splits": {split: [part.shards[split] for part in parts if split in part.shards] for split in SPLITS},
        }
    )


def _summary(folder: Folder, index: Index, began: float) -> Prepared:
    return Prepared(
        folder.url,
        index.tokenizer,
        index.vocab_size,
        len(index.shards),
        {split: sum(shard.num_tokens for shard in index.splits[split]) for split in SPLITS},
        {split: sum(shard.num_documents for shard in index.splits[split]) for split in SPLITS},
        time.monotonic() - began,
    )
