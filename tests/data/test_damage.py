"""Damaged corpora: a bad shard is named and stops the run, or is left out and that on record; never silently."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longstride.data import CorpusError, DataConfig, SequenceLoader, ShardedCorpus, open_corpus, prepare
from longstride.data.blocks import CheckedFile, block_checksums
from longstride.workers.run_directory import RunDirectory

from ..distributed import run_ranks
from ..workers.tiny import make_trainer, tiny_experiment
from .conftest import stream, with_blocks_of


@pytest.mark.parametrize("on_bad_shard", ["stop", "skip"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "is missing its file"),
        ("short", "is short"),
        ("flipped", "is corrupted"),
        ("documents", "is corrupted"),
        ("blocks", "is corrupted"),
    ],
)
def test_a_bad_shard_is_named_and_stops_or_is_skipped(prepared, damage, message, on_bad_shard, caplog):
    victim = ShardedCorpus(prepared).index.splits["train"][1]
    before = ShardedCorpus(prepared)
    files = {"documents": victim.documents_file, "blocks": victim.blocks_file}
    path = Path(prepared) / files.get(damage, victim.tokens_file)
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content[:-1] if damage == "short" else content)
    config = DataConfig(corpus=prepared, verify="checksum", on_bad_shard=on_bad_shard)
    if on_bad_shard == "stop":
        with pytest.raises(CorpusError, match=f"{victim.name} {message}.*data.on_bad_shard=skip") as caught:
            config.open()
        assert "\n" not in str(caught.value)
        return
    corpus = config.open()
    assert isinstance(corpus, ShardedCorpus)
    assert corpus.skipped == (victim.name,)
    assert f"skipping shard {prepared}/{victim.name}" in caplog.text
    assert corpus.num_tokens("train") == before.num_tokens("train") - victim.num_tokens
    assert corpus.fingerprint() != before.fingerprint()
    first = before.index.splits["train"][0].num_tokens
    rest = stream(corpus, "train")[first:]
    assert corpus.decode(rest) == "".join(
        (Path(prepared) / shard.tokens_file).read_bytes().replace(b"\0", b"\n").decode()
        for shard in before.index.splits["train"][2:]
    )


def test_a_shard_that_goes_bad_later_stops_the_read(prepared):
    corpus = ShardedCorpus(prepared)
    shards = corpus.index.splits["train"]
    path = Path(prepared) / shards[0].tokens_file
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(CorpusError, match=f"{shards[0].name} has become short"):
        stream(corpus, "train")
    path.unlink()
    with pytest.raises(CorpusError, match=f"cannot read .*{shards[0].tokens_file}: no such file"):
        stream(corpus, "train")
    path.write_bytes(content)
    stream(corpus, "train")
    documents_file = Path(prepared) / shards[0].documents_file
    documents_file.write_bytes(bytes(len(documents_file.read_bytes())))
    with pytest.raises(CorpusError, match=f"{shards[0].documents_file} is corrupted"):
        ShardedCorpus(prepared).document_starts("train", 0, 100)


@pytest.mark.parametrize("block", [64, 1 << 16])
def test_one_flipped_bit_stops_the_read_of_its_block(prepared, block):
    """With the default settings, by a read that wants another byte of the block; other blocks are still to be had."""
    with_blocks_of(prepared, block)
    shard = ShardedCorpus(prepared).index.splits["train"][1]
    first = ShardedCorpus(prepared).index.splits["train"][0].num_tokens
    path = Path(prepared) / shard.tokens_file
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    corpus = DataConfig(corpus=prepared).open()
    line = rf"shard {prepared}/{shard.name} is corrupted: bytes .* data.verify=checksum data.on_bad_shard=skip"
    with pytest.raises(CorpusError, match=line) as caught:
        corpus.read("train", first + 195, first + 196)
    assert "\n" not in str(caught.value)
    with SequenceLoader(corpus, 256, 4, seed=0) as loader, pytest.raises(CorpusError, match=line):
        list(itertools.islice(loader, 100))
    if block == 64:
        assert corpus.read("train", first, first + 192).tobytes() == bytes(content[:192])
    control = DataConfig(corpus=prepared, verify="size").open()  # sizes say nothing about it
    assert control.read("train", first + 200, first + 201) == content[200]
    path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    assert len(corpus.read("train", first, first + 300)) == 300, "restored, it is read on"


def test_a_corpus_without_blocks_is_read_and_that_said_once(jsonl, prepared, caplog):
    before, fingerprint = stream(open_corpus(prepared), "train"), open_corpus(prepared).fingerprint()
    with_blocks_of(prepared, None)
    for _ in range(2):
        corpus = open_corpus(prepared)
        assert np.array_equal(stream(corpus, "train"), before)
        assert corpus.fingerprint() == fingerprint, "a run goes on with it"
    assert caplog.text.count("has no checksums of its blocks") == 1
    prepare(jsonl, prepared, part_bytes=2000)
    assert not list(Path(prepared).glob("*.blocks")), "finished, and not overwritten unasked"
    prepare(jsonl, prepared, part_bytes=2000, overwrite=True)
    assert ShardedCorpus(prepared).index.shards[0].blocks_sha256 and open_corpus(prepared).fingerprint() == fingerprint
    assert caplog.text.count("has no checksums of its blocks") == 1


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_checked_file_finds_what_was_flipped_and_nothing_else(data):
    content = data.draw(st.binary(min_size=1, max_size=100))
    size = data.draw(st.integers(1, 120))
    flipped = data.draw(st.none() | st.integers(0, len(content) - 1))
    there = bytearray(content)
    if flipped is not None:
        there[flipped] ^= 128
    fetched = []

    def read(start, stop):
        fetched.append((start, stop))
        return bytes(there[start:stop])

    checksums = np.frombuffer(block_checksums(content, size), dtype="<u4")
    file = CheckedFile(read, len(content), checksums, size)
    for _ in range(4):
        start = data.draw(st.integers(0, len(content) - 1))
        stop = data.draw(st.integers(start + 1, len(content)))
        touched = flipped is not None and start // size <= flipped // size <= (stop - 1) // size
        try:
            assert file.read(start, stop) == content[start:stop]
            assert not touched
        except ValueError:
            assert touched
        low, high = fetched[-1]
        assert start // size * size <= low <= start and stop <= high <= -(-stop // size) * size


def test_tokens_beyond_the_vocabulary_are_corruption(tmp_path):
    (tmp_path / "g.fa").write_text(">a\n" + "ACGT" * 100)
    prepare(str(tmp_path / "g.fa"), str(tmp_path / "out"), tokenizer="dna")
    path = tmp_path / "out" / "train-00000.tokens"
    path.write_bytes(b"\x77" * path.stat().st_size)
    with pytest.raises(CorpusError, match="train-00000 is corrupted: token 119 is beyond its vocabulary"):
        stream(open_corpus(str(tmp_path / "out"), verify="size"), "train")


def test_an_index_cannot_lead_out_of_its_folder(prepared):
    path = Path(prepared) / "index.json"
    path.write_text(path.read_text().replace("train-00001", "../../etc/passwd"))
    with pytest.raises(CorpusError, match=r"index.json is damaged: splits.train.1.name"):
        open_corpus(prepared)
    path.write_text("{")
    with pytest.raises(CorpusError, match=r"index\.json is damaged") as caught:
        open_corpus(prepared)
    assert "\n" not in str(caught.value)


SKIP = ("data.verify=checksum", "data.on_bad_shard=skip")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A prepared corpus with a flipped bit in its second shard."""
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"Document {number} says {number * number}.\n" * 400)
    prepare(f"{tmp_path}/*.txt", str(tmp_path / "corpus"), part_bytes=20_000)
    tokens = tmp_path / "corpus" / "train-00001.tokens"
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2] ^= 1
    tokens.write_bytes(content)
    return tmp_path / "corpus"


def train(rank: int, world_size: int, directory: str, *overrides: str) -> str:
    """The mistake that ended the run, or nothing."""
    words = [f"workers={world_size}", f"data.corpus={directory}/corpus", "train.steps=12", *overrides]
    trainer = make_trainer(tiny_experiment(f"{directory}/runs", *words), rank)
    try:
        trainer.train()
    except CorpusError as error:
        return str(error)
    finally:
        trainer.loader.close()
    return ""


def test_a_flipped_bit_stops_a_run_with_default_settings(damaged: Path) -> None:
    (line,) = run_ranks(train, 1, str(damaged.parent), "data.context=1024", "model.hyena.max_length=1024")
    assert line.startswith(f"shard {damaged}/train-00001 is corrupted: bytes 0 to ") and "\n" not in line
    (control,) = run_ranks(train, 1, str(damaged.parent), "run.name=control", "data.verify=size")
    assert control == "", "sizes are right"


def test_what_was_skipped_is_in_the_runs_record(damaged: Path) -> None:
    assert run_ranks(train, 2, str(damaged.parent), *SKIP) == ["", ""]
    (start,) = RunDirectory(f"{damaged.parent}/runs/tiny").read_info()["starts"]
    assert start["skipped_shards"] == ["train-00001"]
    assert ShardedCorpus(str(damaged)).skipped == ()


def test_a_whole_corpus_leaves_no_such_record(damaged: Path) -> None:
    prepare(f"{damaged.parent}/*.txt", str(damaged), part_bytes=20_001, overwrite=True)
    assert run_ranks(train, 1, str(damaged.parent), *SKIP) == [""]
    (start,) = RunDirectory(f"{damaged.parent}/runs/tiny").read_info()["starts"]
    assert "skipped_shards" not in start
