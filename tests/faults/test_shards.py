"""Corpora on a store that fails for a while: every token there and the same; for good: one line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import fsspec
import pytest
import torch
from torch import Tensor

from longstride.data import Corpus, SequenceLoader, StoreUnavailable, object_store, open_corpus, prepare
from longstride.data import storage as data_storage

from .conftest import forget_connections
from .proxy import FaultProxy
from .store_faults import FAULTS, IMPATIENCE


@pytest.fixture(autouse=True)
def impatient(store: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent try ends soon."""
    monkeypatch.setattr(object_store, "ANSWER_SECONDS", IMPATIENCE)
    forget_connections()


@pytest.fixture
def local(store: FaultProxy, tmp_path: Path) -> Corpus:
    """A corpus on the disk, its source also in the store, at s3://bucket/raw."""
    lines = "".join(json.dumps({"text": f"Document {number} says {number}.\n" * 400}) + "\n" for number in range(8))
    (tmp_path / "a.jsonl").write_text(lines)
    fsspec.filesystem("s3").pipe_file("bucket/raw/a.jsonl", lines.encode())
    prepare(f"{tmp_path}/a.jsonl", str(tmp_path / "out"), part_bytes=20_000)
    return open_corpus(str(tmp_path / "out"))


@pytest.fixture
def remote(store: FaultProxy, local: Corpus) -> Corpus:
    """The same in the store."""
    source, target = fsspec.filesystem("file"), fsspec.filesystem("s3")
    for name in source.find(local.name):
        target.pipe_file(f"bucket/corpus/{Path(name).name}", source.cat_file(name))
    return open_corpus("s3://bucket/corpus")


def batches(corpus: Corpus, number: int = 6) -> list[Tensor]:
    """Large enough to be cut in the middle."""
    with SequenceLoader(corpus, 8192, 2, seed=0) as loader:
        return [batch.tokens_BT for batch in itertools.islice(loader, number)]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_tokens_are_the_same_whatever_the_store_does(store: FaultProxy, local: Corpus, fault: str) -> None:
    """While they are prepared, and while they are read."""
    store.faults = 0
    FAULTS[fault](store)
    prepare("s3://bucket/raw/*.jsonl", "s3://bucket/corpus", part_bytes=20_000)
    assert store.faults > 0
    store.heal()
    corpus = open_corpus("s3://bucket/corpus", verify="checksum")
    assert corpus.fingerprint() == local.fingerprint()
    store.faults = 0
    FAULTS[fault](store)
    found = batches(corpus)
    assert store.faults > 0
    assert all(map(torch.equal, found, batches(local)))


def test_shards_that_stay_away_are_one_clear_stop(
    store: FaultProxy, local: Corpus, remote: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PATIENCE_SECONDS", 1.0)
    store.refuse()
    with pytest.raises(
        StoreUnavailable, match=r"cannot read s3://bucket/corpus/\S+: Could not connect .*given up"
    ) as caught:
        batches(remote)
    assert "\n" not in str(caught.value)
    store.heal()
    assert all(map(torch.equal, batches(remote), batches(local))), "the same loader settings read on"


@pytest.mark.parametrize("fault", FAULTS)
def test_without_another_try_the_same_faults_are_final(
    store: FaultProxy, remote: Corpus, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: it is the tries that save the reads above."""
    monkeypatch.setattr(object_store, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(data_storage, "_WAITS", ())
    FAULTS[fault](store)
    with pytest.raises(StoreUnavailable):
        batches(remote)
