"""Prepared corpora on an S3-compatible store that is well; what happens when it is not: tests/faults/test_shards.py."""

import itertools
import json
from types import SimpleNamespace

import aiohttp
import fsspec
import numpy as np
import pytest
from botocore.exceptions import NoCredentialsError

from longstride.data import CorpusError, SequenceLoader, StoreUnavailable, open_corpus, prepare
from longstride.data.storage import Folder, explained, patiently

from ..faults.conftest import SECRET
from ..faults.conftest import server as server
from ..faults.conftest import store as store

TEXTS = [f"Document {number} says {number * number}.\n" * 20 for number in range(60)]


@pytest.fixture
def raw(store):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    fs = fsspec.filesystem("s3")
    fs.pipe_file("bucket/raw/a.jsonl", lines)
    fs.pipe_file("bucket/raw/b.jsonl", lines.replace(b"says", b"writes"))
    return "s3://bucket/raw"


def answer_of(status):
    request = SimpleNamespace(real_url="https://host/x")
    return aiohttp.ClientResponseError(request, (), status=status)  # pyright: ignore[reportArgumentType]


def stream(corpus):
    return corpus.read("train", 0, corpus.num_tokens("train"))


def test_the_same_corpus_as_on_disk(raw, tmp_path, monkeypatch):
    prepare(f"{raw}/*.jsonl", "s3://bucket/plain", part_bytes=20_000)
    prepare(raw, str(tmp_path / "out"), part_bytes=20_000)
    remote, local = open_corpus("s3://bucket/plain"), open_corpus(str(tmp_path / "out"))
    assert remote.fingerprint() == local.fingerprint()
    assert np.array_equal(stream(remote), stream(local))
    assert SECRET not in remote.index.model_dump_json()  # pyright: ignore[reportAttributeAccessIssue]

    store_class, fetched = type(remote.folder.fs), []  # pyright: ignore[reportAttributeAccessIssue]
    call = store_class._call_s3

    async def counted(self, method, *arguments, **named):
        answer = await call(self, method, *arguments, **named)
        fetched.append((named.get("Key", ""), answer.get("ContentLength", 0)))
        return answer

    monkeypatch.setattr(store_class, "_call_s3", counted)
    with SequenceLoader(remote, 512, 4, seed=0, data_rank=1, data_size=2, bounds=(128, 256), prefetch=0) as loader:
        batches = list(itertools.islice(loader, 5))
    tokens = sum(length for key, length in fetched if key.endswith(".tokens"))
    assert tokens == 5 * 2 * 129, "its own slices: their blocks have been checked above"
    with SequenceLoader(local, 512, 4, seed=0, data_rank=1, data_size=2, bounds=(128, 256)) as loader:
        assert all(batch.tokens_BT.equal(next(loader).tokens_BT) for batch in batches)


def test_a_missing_object_or_bucket_is_named(raw):
    prepare(f"{raw}/*.jsonl", "s3://bucket/holed", part_bytes=20_000)
    fsspec.filesystem("s3").rm_file("bucket/holed/train-00002.tokens")
    with pytest.raises(CorpusError, match=r"shard s3://bucket/holed/train-00002 is missing"):
        open_corpus("s3://bucket/holed")
    with pytest.raises(CorpusError, match=r"s3://nobucket/x is not a prepared corpus"):
        open_corpus("s3://nobucket/x")
    with pytest.raises(CorpusError, match=r"cannot write s3://nobucket/x/prepare.plan: no such bucket"):
        prepare(f"{raw}/*.jsonl", "s3://nobucket/x")
    with pytest.raises(CorpusError, match=r"s3:/bucket/x has one slash .* write s3://bucket/x"):
        prepare(f"{raw}/*.jsonl", "s3:/bucket/x")


def test_patience_has_an_end(caplog):
    waits, attempts = [], []

    def refuse():
        attempts.append(1)
        raise ConnectionRefusedError(111, "Connection refused")

    with pytest.raises(StoreUnavailable, match=r"cannot read x after 4 tries: Connection refused"):
        patiently(refuse, "cannot read x", sleep=waits.append)
    assert len(attempts) == 4 and waits == [0.5, 1.5, 4.0]
    assert "cannot read x: Connection refused; trying again in 0.5 s" in caplog.text
    attempts.clear()

    def absent():
        attempts.append(1)
        raise FileNotFoundError(2, "No such file")

    with pytest.raises(CorpusError, match=r"cannot read x: no such file"):
        patiently(absent, "cannot read x", sleep=waits.append)
    assert len(attempts) == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StoreUnavailable(5, "silent (given up after 30 s)"), StoreUnavailable),
        (ConnectionResetError(104, "Connection reset by peer"), StoreUnavailable),
        (TimeoutError(), StoreUnavailable),
        (aiohttp.ServerDisconnectedError(), StoreUnavailable),
        (answer_of(503), StoreUnavailable),
        (answer_of(403), CorpusError),
        (FileNotFoundError(2, "No such file"), CorpusError),
        (PermissionError("Access Denied"), CorpusError),
        (OSError(28, "No space left on device"), CorpusError),
        (NoCredentialsError(), CorpusError),
    ],
)
def test_only_a_store_that_is_not_reached_is_no_mistake(error, kind):
    def fail():
        raise error

    with pytest.raises(kind, match=r"^cannot read x") as caught:
        patiently(fail, "cannot read x", sleep=lambda seconds: None)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert explained(caught.value, "cannot prepare y") is caught.value or kind is CorpusError, "explained once"


def test_memory_urls():
    folder = Folder("memory://room/inner")
    assert folder.sizes() == {}
    folder.write("a.bin", b"0123456789")
    folder.write("below/b.bin", b"x")
    assert folder.sizes() == {"a.bin": 10}
    assert folder.sizes("below") == {"b.bin": 1}
    assert folder.read("a.bin", 3, 5) == b"34"
    folder.remove(["a.bin"])
    assert folder.sizes() == {}
