"""Preparing corpora, and reading them back."""

import contextlib
import gzip
import hashlib
import itertools
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from longstride.data import CorpusError, DataConfig, SequenceLoader, ShardedCorpus, open_corpus, prepare
from longstride.data import parts as parts_module
from longstride.data.sources import cut, documents, expand
from longstride.data.storage import patiently

from .conftest import TEXTS, stream, with_blocks_of


def texts(corpus):
    """The documents of each split, decoded from the stream by the index alone; each must end with its separator."""
    found = {}
    for split in ("train", "validation"):
        size = corpus.num_tokens(split)
        edges = [*corpus.document_starts(split, 0, size).tolist(), size]
        tokens = stream(corpus, split)
        assert all(tokens[stop - 1] == corpus.tokenizer.separator for stop in edges[1:])
        found[split] = [corpus.decode(tokens[start : stop - 1]) for start, stop in itertools.pairwise(edges)]
    return found


def contents(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir() if path.is_file()
    }


def write_texts(tmp_path, count=120):
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    for number, text in enumerate(TEXTS[:count]):
        (folder / ("below" if number % 2 else ".") / f"{number}.txt").write_text(text)
    (folder / ".hidden").write_text("not this")
    (folder / "empty.txt").touch()
    return str(folder), TEXTS[:count]


def write_jsonl(tmp_path):
    half = len(TEXTS) // 2
    for name, part in (("a.jsonl", TEXTS[:half]), ("b.jsonl.gz", TEXTS[half:])):
        lines = "".join(json.dumps({"text": text}) + "\n\n" for text in [*part, ""]).encode()
        (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    return str(tmp_path / "*.jsonl*"), TEXTS


def write_parquet(tmp_path):
    table = pyarrow.table({"n": list(range(len(TEXTS) + 2)), "text": [*TEXTS, None, ""]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=16)
    return str(tmp_path / "a.parquet"), TEXTS


@pytest.mark.parametrize("write", [write_texts, write_jsonl, write_parquet])
@pytest.mark.parametrize("part_bytes", [1, 700, 64 << 20])
def test_every_document_is_there_once_whole_and_in_one_split(tmp_path, write, part_bytes):
    source, expected = write(tmp_path)
    made = prepare(source, str(tmp_path / "out"), part_bytes=part_bytes, validation=0.2)
    corpus = open_corpus(str(tmp_path / "out"))
    found = texts(corpus)
    assert sorted(found["train"] + found["validation"]) == sorted(expected)
    assert 0.05 < len(found["validation"]) / len(expected) < 0.4
    assert not set(found["train"]) & set(found["validation"])
    assert made.num_documents == {split: len(part) for split, part in found.items()}
    assert made.num_tokens == {split: corpus.num_tokens(split) for split in found}
    assert made.num_shards > 2 or part_bytes > 10_000


@pytest.mark.parametrize("size", range(1, 120, 7))
@pytest.mark.parametrize("ending", ["\n", ""])
def test_pieces_of_a_file_hold_each_record_once(tmp_path, size, ending):
    (tmp_path / "a.fa").write_text(">one x\nACG\nTTA\n>two\n>three\nGGGGGGGGGGGGGG\nCC" + ending)
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": c * n}) for n, c in enumerate("abcdef")) + ending)
    for name, expected in (
        ("a.fa", [b"ACGTTA", b"GGGGGGGGGGGGGGCC"]),
        ("b.jsonl", [b"b", b"cc", b"ddd", b"eeee", b"fffff"]),
    ):
        pieces = [piece for part in cut(expand([str(tmp_path / name)]), size) for piece in part]
        assert [text for piece in pieces for text in documents(piece)] == expected
        assert sum(piece.size for piece in pieces) == (tmp_path / name).stat().st_size


def test_fasta_holds_out_the_tail_of_every_record(tmp_path):
    records = {"one": "ACGTN" * 100, "two": "ttgca" * 40}
    lines = "".join(
        f">{name} text\n" + "\n".join(seq[i : i + 60] for i in range(0, len(seq), 60)) + "\n"
        for name, seq in records.items()
    )
    (tmp_path / "genome.fna.gz").write_bytes(gzip.compress(lines.encode()))
    prepare(str(tmp_path / "genome.fna.gz"), str(tmp_path / "out"), tokenizer="dna", validation=0.1)
    found = texts(open_corpus(str(tmp_path / "out")))
    assert found["train"] == [records["one"][:450], records["two"][:180].upper()]
    assert found["validation"] == [records["one"][450:], records["two"][180:].upper()]


def test_fasta_alone_is_dna(tmp_path):
    (tmp_path / "a.fna.gz").write_bytes(gzip.compress(b">one\nACGTacgt\n"))
    (tmp_path / "b.fa").write_text(">two\nTTTT\n")
    (tmp_path / "c.txt").write_text("text")
    (tmp_path / "d.fasta").write_text(">three\nMKVLAE\n")
    for name, sources, options, tokenizer in (
        ("auto", ["a.fna.gz", "b.fa"], {}, "dna"),
        ("mixed", ["a.fna.gz", "c.txt"], {}, "bytes"),
        ("text", ["c.txt"], {}, "bytes"),
        ("asked", ["a.fna.gz"], {"tokenizer": "bytes"}, "bytes"),
        ("proteins", ["d.fasta"], {"tokenizer": "bytes"}, "bytes"),
    ):
        paths, out = [str(tmp_path / source) for source in sources], str(tmp_path / name)
        assert prepare(paths, out, **options).tokenizer == open_corpus(out).tokenizer.name == tokenizer
    with pytest.raises(
        CorpusError, match=r"d\.fasta: 'L' is not a base: .*; `--tokenizer bytes --overwrite` takes any"
    ):
        prepare(str(tmp_path / "d.fasta"), str(tmp_path / "wrong"))
    made = prepare(str(tmp_path / "d.fasta"), str(tmp_path / "wrong"), tokenizer="bytes", overwrite=True)
    assert sum(made.num_tokens.values()) >= 7


def test_any_range_is_the_same_as_the_whole(prepared):
    corpus = ShardedCorpus(prepared)
    assert len(corpus.index.splits["train"]) > 3
    whole = stream(corpus, "train")
    starts = corpus.document_starts("train", 0, len(whole))
    for start in range(0, len(whole), 97):
        for size in (1, 2, 500, 5000):
            stop = min(start + size, len(whole))
            assert np.array_equal(corpus.read("train", start, stop), whole[start:stop])
            inside = starts[(starts >= start) & (starts < stop)]
            assert np.array_equal(corpus.document_starts("train", start, stop), inside)


@pytest.mark.parametrize("verify", ["size", "blocks"])
def test_a_rank_fetches_only_its_slice(prepared, monkeypatch, verify):
    """And, the first time, what is left of the blocks at its edges."""
    block = 50
    with_blocks_of(prepared, block)
    corpus = ShardedCorpus(prepared, verify=verify)
    fetched = []
    original = corpus.folder.read

    def read(name, start=None, stop=None):
        content = original(name, start, stop)
        if name.endswith(".tokens"):
            fetched.append(len(content))
        return content

    monkeypatch.setattr(corpus.folder, "read", read)
    with SequenceLoader(corpus, 256, 4, seed=0, data_rank=1, data_size=2, bounds=(64, 128), prefetch=0) as loader:
        list(itertools.islice(loader, 6))
        assert sum(fetched) == 6 * 2 * 65 if verify == "size" else 6 * 2 * 65 < sum(fetched) < 6 * 2 * (65 + 2 * block)
        stream(corpus, "train")
        fetched.clear()
        loader.seek(0)
        list(itertools.islice(loader, 6))
    assert sum(fetched) == 6 * 2 * 65, "all blocks are known"


def test_interruptions_and_workers_leave_the_same_bytes(jsonl, tmp_path, monkeypatch):
    options = {"tokenizer": "bpe", "vocab_size": 300, "part_bytes": 2000}
    prepare(jsonl, str(tmp_path / "straight"), workers=1, **options)
    made = []
    original = parts_module.make_part

    def failing(folder, number, *rest):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(number)
        return original(folder, number, *rest)

    out = tmp_path / "broken"
    monkeypatch.setattr("longstride.data.preparation.make_part", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(jsonl, str(out), workers=1, **options)
    with pytest.raises(CorpusError, match="is not a prepared corpus"):
        open_corpus(str(out))
    (out / f"train-{made[0]:05d}.tokens").write_bytes(b"torn")  # a finished part that was damaged since
    (out / "parts" / f"{made[1]:05d}.json").write_text("{")  # a record that was torn
    again, progress = [], []
    monkeypatch.setattr(
        "longstride.data.preparation.make_part",
        lambda f, number, *rest: again.append(number) or original(f, number, *rest),
    )
    prepare(jsonl, str(out), workers=3, progress=progress.append, **options)
    assert not set(again) & set(made[2:4]) and set(made[:2]) <= set(again)
    assert contents(out) == contents(tmp_path / "straight")
    assert not list((out / "parts").glob("*"))
    assert (progress[0].parts_done, progress[-1].parts_done) == (2, progress[-1].num_parts)
    assert progress[-1].source_bytes_done == progress[-1].source_bytes == Path(jsonl).stat().st_size
    again.clear()
    prepare(jsonl, str(out), **options)
    assert again == []  # nothing left to do


def test_another_preparation_is_not_overwritten_unasked(jsonl, prepared, tmp_path):
    before = contents(prepared)
    with pytest.raises(CorpusError, match="prepared from other sources or settings"):
        prepare(jsonl, prepared, part_bytes=999)
    assert contents(prepared) == before
    prepare(jsonl, prepared, part_bytes=64 << 20, overwrite=True)
    assert len(ShardedCorpus(prepared).index.shards) == 2
    assert len(list(Path(prepared).glob("*.tokens"))) == 2
    bystander = tmp_path / "mine"
    bystander.mkdir()
    (bystander / "precious.tokens").write_text("mine")
    prepare(jsonl, str(bystander), overwrite=True)
    assert (bystander / "precious.tokens").read_text() == "mine"


def test_a_mixture_of_prepared_and_embedded_corpora(prepared):
    corpus = DataConfig(corpus={"python-source": 3, prepared: 1}).open()
    parts = [open_corpus("python-source"), open_corpus(prepared)]
    border = parts[0].num_tokens("train")
    assert np.array_equal(
        corpus.read("train", border - 50, border + 50),
        np.concatenate([parts[0].read("train", border - 50, border), parts[1].read("train", 0, 50)]),
    )
    starts = corpus.document_starts("train", border - 5000, border + 50)
    assert border in starts and (starts >= border - 5000).all()
    assert corpus.num_tokens("train") == sum(part.num_tokens("train") for part in parts)
    regions = corpus.regions("train")
    assert [(region.weight, region.length) for region in regions] == [
        (weight, part.num_tokens("train")) for weight, part in zip((3, 1), parts, strict=True)
    ]
    assert len({corpus.fingerprint(), DataConfig(corpus={"python-source": 2, prepared: 1}).open().fingerprint()}) == 2
    with SequenceLoader(corpus, 128, 4, seed=0) as loader:
        assert next(loader).tokens_BT.shape == (4, 128)
    for weights, message in (
        ({"python-source": 1, "ecoli": 1}, "one tokenizer: 'python-source' has bytes, 'ecoli' has dna"),
        ({"python-source": 0}, "weight of 'python-source' is 0"),
        ({}, "the mixture is empty"),
    ):
        with pytest.raises(CorpusError, match=message):
            open_corpus(weights)
    with pytest.raises(CorpusError, match=r"data.context 20000 is longer than the train split of '.*out'"):
        SequenceLoader(corpus, 20_000, 1, seed=0)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere.txt", {}, "cannot read .*nowhere.txt: no such file"),
        ("*.md", {}, "no source files at"),
        ("bad.jsonl", {}, "bad.jsonl, line at byte 14: not JSON"),
        ("keys.jsonl", {}, "line at byte 0: no text under 'text'; it has content, id"),
        ("bad.parquet", {}, "bad.parquet is not Parquet"),
        ("bad.fa", {}, "bad.fa is not FASTA"),
        ("binary.txt", {}, "binary.txt is not text"),
        ("cut.txt.gz", {}, "cannot read .*cut.txt.gz: Compressed file ended before"),
        ("torn.txt.gz", {}, "cannot read .*torn.txt.gz: "),
        ("plain.txt", {"tokenizer": "dna"}, "plain.txt: 'e' is not a base"),
        ("plain.txt", {"tokenizer": "byte"}, "unknown tokenizer 'byte': did you mean 'bytes'"),
        ("plain.txt", {"tokenizer": "gone.json"}, "cannot read .*gone.json: no such file"),
        ("plain.txt", {"tokenizer": "bpe", "vocab_size": 100}, "vocab_size 100 is too small"),
        ("plain.txt", {"vocab_size": 300}, "vocab_size is chosen for"),
        ("plain.txt", {"separator": "x"}, "a separator is chosen for"),
        ("plain.txt", {"validation": 5}, "validation 5 is not a share"),
        ("gone://x/y", {}, "cannot open gone://x/y: Protocol not known"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, monkeypatch, source, options, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("keys.jsonl").write_text('{"content": "a", "id": 1}\n')
    Path("bad.parquet").write_text("PAR?")
    Path("bad.fa").write_text("ACGT\n>x\n")
    Path("binary.txt").write_bytes(b"a\0b")
    Path("plain.txt").write_text("hello")
    packed = gzip.compress(b"hello, hello, and again hello" * 9)
    Path("cut.txt.gz").write_bytes(packed[:-12])
    Path("torn.txt.gz").write_bytes(packed[:12] + b"\xff" * 20)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(source, "out", **options)
    assert "\n" not in str(caught.value)
    assert not Path("out/index.json").exists()


def test_an_unwritable_folder_is_one_clear_line(jsonl, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CorpusError, match=r"cannot (write|list)"):
        prepare(jsonl, str(tmp_path / "file" / "out"))
    assert threading.active_count() < 10


def test_a_full_disk_is_not_tried_again(caplog):
    def write():
        with Path("/dev/full").open("wb") as disk:
            disk.write(b"x")

    waits = []
    with pytest.raises(CorpusError, match=r"^cannot write x: No space left on device$"):
        patiently(write, "cannot write x", waits.append)
    assert not waits and not caplog.records


def test_a_disk_that_fills_up_under_a_shard_is_one_line(jsonl, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def staged(folder, name):
        with Path("/dev/full").open("w+b", buffering=0) as disk:
            yield disk

    monkeypatch.setattr("longstride.data.storage.Folder.staged", staged)
    with pytest.raises(CorpusError, match=r"^cannot write \S+/train-00000.tokens: No space left on device$"):
        prepare(jsonl, str(tmp_path / "out"))


_KILLED = """
import os, signal, sys
from longstride.data import prepare

def kill(progress):
    if progress.parts_done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

prepare(sys.argv[1], sys.argv[2], part_bytes=2000, progress=kill)
"""


def test_a_killed_preparation_goes_on(jsonl, prepared, tmp_path):
    out = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", _KILLED, jsonl, str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (out / "index.json").exists()
    progress = []
    prepare(jsonl, str(out), part_bytes=2000, progress=progress.append)
    assert progress[0].parts_done >= 3
    assert contents(out) == contents(prepared)
