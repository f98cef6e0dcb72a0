"""Prepared corpora on an S3-compatible store (moto's server, over HTTP) that throttles, delays and cuts answers."""

import itertools
import json
import threading
import time

import fsspec
import numpy as np
import pytest
import s3fs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from longstride.data import Corpus, CorpusError, SequenceLoader, prepare
from longstride.data.storage import Folder, patiently

TEXTS = [f"Document {number} says {number * number}.\n" * 20 for number in range(60)]


class FaultyStore:
    """A WSGI application before moto's: every `period`-th request of the chosen kind goes wrong in the chosen way."""

    def __init__(self):
        self.inner = DomainDispatcherApplication(create_backend_app)
        self.fault, self.period, self.faults, self.seen = None, 3, 0, 0
        self.lock = threading.Lock()
        self.ranges = []

    def __call__(self, environ, start_response):
        with self.lock:
            self.seen += 1
            fault = self.fault if self.seen % self.period == 0 else None
            self.faults += fault is not None
            if "HTTP_RANGE" in environ:
                self.ranges.append((environ["PATH_INFO"], environ["HTTP_RANGE"]))
        if fault == "throttle":
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        if fault == "delay":
            time.sleep(0.1)
        if fault == "cut" and environ["REQUEST_METHOD"] == "GET" and "HTTP_RANGE" in environ:
            start_response("206 Partial Content", [("Content-Length", "1000")])
            return [b"too few"]
        return self.inner(environ, start_response)


@pytest.fixture(scope="module")
def server():
    store = FaultyStore()
    http = make_server("127.0.0.1", 0, store, threaded=True)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield store, f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def store(server, monkeypatch):
    store, url = server
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "a-secret-that-shows-nowhere",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    store.fault = None
    fs = fsspec.filesystem("s3")
    if not fs.exists("corpora"):
        fs.mkdir("corpora")
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
        fs.pipe_file("corpora/raw/a.jsonl", lines)
        fs.pipe_file("corpora/raw/b.jsonl", lines.replace(b"says", b"writes"))
    yield store
    store.fault = None
    s3fs.S3FileSystem.clear_instance_cache()


def stream(corpus):
    return corpus.read("train", 0, corpus.num_tokens("train"))


def test_the_same_corpus_as_on_disk(store, tmp_path):
    prepare("s3://corpora/raw/*.jsonl", "s3://corpora/plain", part_bytes=20_000)
    prepare("s3://corpora/raw", str(tmp_path / "out"), part_bytes=20_000)
    remote, local = Corpus.open("s3://corpora/plain"), Corpus.open(str(tmp_path / "out"))
    assert remote.fingerprint() == local.fingerprint()
    assert np.array_equal(stream(remote), stream(local))
    assert "secret" not in remote.index.model_dump_json()  # pyright: ignore[reportAttributeAccessIssue]

    store.ranges.clear()
    with SequenceLoader(remote, 512, 4, seed=0, data_rank=1, data_size=2, bounds=(128, 256), prefetch=0) as loader:
        batches = list(itertools.islice(loader, 5))
    fetched = [
        tuple(map(int, span.removeprefix("bytes=").split("-"))) for path, span in store.ranges if "tokens" in path
    ]
    assert sum(last - first + 1 for first, last in fetched) == 5 * 2 * 129
    with SequenceLoader(local, 512, 4, seed=0, data_rank=1, data_size=2, bounds=(128, 256)) as loader:
        assert all(batch.tokens_BT.equal(next(loader).tokens_BT) for batch in batches)


@pytest.mark.parametrize("fault", ["throttle", "delay", "cut"])
def test_a_store_that_fails_for_a_while_changes_nothing(store, fault):
    store.fault, store.faults, store.period = fault, 0, 7 if fault == "throttle" else 3
    out = f"s3://corpora/{fault}"
    prepare("s3://corpora/raw/*.jsonl", out, part_bytes=50_000)
    corpus = Corpus.open(out, verify="checksum")
    with SequenceLoader(corpus, 512, 4, seed=0) as loader:
        faulty = [next(loader).tokens_BT for _ in range(6)]
    assert store.faults > 3
    store.fault = None
    with SequenceLoader(corpus, 512, 4, seed=0) as loader:
        assert all(tokens.equal(next(loader).tokens_BT) for tokens in faulty)


def test_a_missing_object_or_bucket_is_named(store):
    prepare("s3://corpora/raw/*.jsonl", "s3://corpora/holed", part_bytes=20_000)
    fsspec.filesystem("s3").rm_file("corpora/holed/train-00002.tokens")
    with pytest.raises(CorpusError, match=r"shard s3://corpora/holed/train-00002 is missing"):
        Corpus.open("s3://corpora/holed")
    with pytest.raises(CorpusError, match=r"s3://nobucket/x is not a prepared corpus"):
        Corpus.open("s3://nobucket/x")


def test_patience_has_an_end(caplog):
    waits, attempts = [], []

    def refuse():
        attempts.append(1)
        raise ConnectionRefusedError(111, "Connection refused")

    with pytest.raises(CorpusError, match=r"cannot read x after 4 tries: Connection refused"):
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
