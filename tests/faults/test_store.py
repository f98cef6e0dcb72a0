"""Checkpoints and shard reads over a store that fails for a while: nothing is lost or corrupt; for good: one line."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from longstride.data import Corpus, CorpusError, SequenceLoader, object_store, prepare
from longstride.data import storage as data_storage
from longstride.workers.checkpoint import CheckpointError
from longstride.workers.dcp_storage import digest_file
from longstride.workers.manifest import list_checkpoints
from longstride.workers.run_directory import find_run
from longstride.workers.storage import Storage, StorageError
from longstride.workers.trainer import Trainer

from ..distributed import run_ranks
from ..workers.tiny import make_trainer, tiny_experiment
from .conftest import SECRET, forget_connections
from .proxy import FaultProxy

OUTAGE = 0.5


def refuse(proxy: FaultProxy) -> None:
    proxy.refuse()
    threading.Timer(OUTAGE, proxy.heal).start()
    proxy.faults += 1


# What happens to the store, by name. All pass, or can be lived with.
FAULTS: dict[str, Callable[[FaultProxy], None]] = {
    "refuses": refuse,
    "delays": lambda proxy: proxy.delay(0.02),
    "throttles": lambda proxy: proxy.throttle(times=2),
    "drops": lambda proxy: proxy.drop(after=5_000, times=2),
}


@contextmanager
def own_proxy(moto: tuple[str, int]) -> Iterator[FaultProxy]:
    """A proxy of this process's own, which its storage goes through."""
    with FaultProxy(moto) as proxy:
        os.environ.update(AWS_ENDPOINT_URL=proxy.url, AWS_DEFAULT_REGION="us-east-1")
        os.environ.update(AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY=SECRET)
        yield proxy


def trainer_of(rank: int, world_size: int, name: str, *overrides: str) -> Trainer:
    words = [f"workers={world_size}", f"parallel.sequence={world_size}", f"run.name={name}", *overrides]
    return make_trainer(tiny_experiment("s3://bucket/runs", *words), rank)


def tensors(trainer: Trainer) -> dict[str, Tensor]:
    found = trainer.checkpointer._tensors().items()
    return {key: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone() for key, tensor in found}


def save_and_load(rank: int, world_size: int, moto: tuple[str, int]) -> dict[str, tuple[int, int, bool, list[str]]]:
    """A checkpoint written, verified and loaded while the store fails in each way; what became of it."""
    outcomes = {}
    with own_proxy(moto) as proxy:
        trainer, again = trainer_of(rank, world_size, "run"), trainer_of(rank, world_size, "run")
        for step, (name, fault) in enumerate(FAULTS.items(), start=1):
            proxy.heal()
            trainer.step()
            expected, proxy.faults = tensors(trainer), 0
            fault(proxy)
            trainer.save(wait=False)
            trainer.checkpointer.wait()
            saving, proxy.faults = proxy.faults, 0
            fault(proxy)
            again.restore()
            loading, found = proxy.faults, tensors(again)
            proxy.heal()
            same = again.step_count == step and all(torch.equal(expected[key], found[key]) for key in expected)
            outcomes[name] = (saving, loading, same, list_checkpoints(again.run)[-1].problems())
    return outcomes


def test_a_checkpoint_is_whole_whatever_the_store_does(moto: tuple[str, int], store: FaultProxy) -> None:
    for outcomes in run_ranks(save_and_load, 2, moto):
        assert outcomes.keys() == FAULTS.keys()
        for saving, loading, same, problems in outcomes.values():
            assert saving > 0 and loading > 0, "the fault struck"
            assert same
            assert problems == []


def meet_a_dead_store(rank: int, world_size: int, moto: tuple[str, int]) -> list[str]:
    """The messages of a save, a load and a look at the run, when one process reaches nobody; then all is well again."""
    messages = []
    with own_proxy(moto) as proxy:
        trainer = trainer_of(rank, world_size, "dead")
        trainer.step()
        trainer.save()
        object_store.PATIENCE_SECONDS, object_store.PatientS3FileSystem.retries = 0.5, 2
        trainer.step()
        for attempt in (trainer.save, trainer.restore):
            if rank == 1:
                proxy.refuse()
            try:
                attempt()
            except CheckpointError as error:
                messages.append(str(error))
            proxy.heal()
        trainer.restore()
        assert trainer.step_count == 1, "the checkpoint before"
        messages.append(", ".join(found.name for found in list_checkpoints(trainer.run) if found.committed))
    return messages


def without_another_try(rank: int, world_size: int, moto: tuple[str, int]) -> list[str]:
    """What becomes of a save and a load under faults that are over after two requests."""
    messages = []
    with own_proxy(moto) as proxy:
        trainer = trainer_of(rank, world_size, "control")
        trainer.step()
        trainer.save()
        trainer.step()
        object_store.PATIENCE_SECONDS, object_store.PatientS3FileSystem.retries = 0.0, 1
        for fault in ("throttles", "drops"):
            for attempt in (trainer.save, trainer.restore):
                FAULTS[fault](proxy)
                with pytest.raises(CheckpointError) as caught:
                    attempt()
                messages.append(str(caught.value))
                proxy.heal()
        trainer.restore()
        assert trainer.step_count == 1, "what is torn is not trusted"
    return messages


def test_without_another_try_the_same_faults_stop_a_checkpoint(moto: tuple[str, int], store: FaultProxy) -> None:
    """The control: it is the tries that save the checkpoints above."""
    first, second = run_ranks(without_another_try, 2, moto)
    assert first == second, "all processes stop with the same line"
    assert len(first) == 4
    assert all("control" in message or "step-00000002" in message for message in first), first


def test_a_store_that_stays_away_is_one_clear_stop_on_all(moto: tuple[str, int], store: FaultProxy) -> None:
    """And it does not pass for a damaged checkpoint: no older one is taken for it."""
    outcomes = run_ranks(meet_a_dead_store, 2, moto)
    assert outcomes[0] == outcomes[1]
    saving, loading, committed = outcomes[0]
    assert committed == "step-00000001"
    assert "checkpoint step-00000002 was not written (process 1: " in saving and "Could not connect" in saving
    assert "checkpoints of run dead: process 1: " in loading and "ould not connect" in loading
    assert "\n" not in saving + loading
    assert SECRET not in saving + loading


def test_a_command_that_meets_a_dead_store_is_one_line(store: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "PATIENCE_SECONDS", 1.0)
    store.refuse()
    with pytest.raises(StorageError, match=r"Could not connect .*\(given up after \d+ s\)") as caught:
        find_run("s3://bucket/runs/any")
    assert caught.value.filename == "s3://bucket/runs/any/experiment.yaml"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store.heal()
    forget_connections()
    with pytest.raises(StorageError, match=r"no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        Storage("s3://bucket").exists("any")


@pytest.fixture
def corpus(store: FaultProxy, tmp_path: Path) -> tuple[Corpus, Corpus]:
    """The same corpus in the store and on the disk."""
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"Document {number} says {number * number}.\n" * 400)
    prepare(f"{tmp_path}/*.txt", str(tmp_path / "out"), part_bytes=20_000)
    prepare(f"{tmp_path}/*.txt", "s3://bucket/corpus", part_bytes=20_000)
    return Corpus.open("s3://bucket/corpus"), Corpus.open(str(tmp_path / "out"))


def batches(corpus: Corpus, number: int = 6) -> list[Tensor]:
    """Large enough to be cut in the middle."""
    with SequenceLoader(corpus, 8192, 2, seed=0) as loader:
        return [batch.tokens_BT for batch in itertools.islice(loader, number)]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_tokens_are_the_same_whatever_the_store_does(
    store: FaultProxy, corpus: tuple[Corpus, Corpus], fault: str
) -> None:
    store.faults = 0
    FAULTS[fault](store)
    found = batches(corpus[0])
    assert store.faults > 0
    assert all(map(torch.equal, found, batches(corpus[1])))


def test_shards_that_stay_away_are_one_clear_stop(
    store: FaultProxy, corpus: tuple[Corpus, Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PATIENCE_SECONDS", 1.0)
    store.refuse()
    with pytest.raises(
        CorpusError, match=r"cannot read s3://bucket/corpus/\S+: Could not connect .*given up"
    ) as caught:
        batches(corpus[0])
    assert "\n" not in str(caught.value)
    store.heal()
    assert all(map(torch.equal, batches(corpus[0]), batches(corpus[1]))), "the same loader settings read on"


@pytest.mark.parametrize("fault", ["throttles", "drops"])
def test_without_another_try_the_same_faults_are_final(
    store: FaultProxy, corpus: tuple[Corpus, Corpus], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: it is the tries that save the reads above."""
    monkeypatch.setattr(object_store, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(object_store.PatientS3FileSystem, "retries", 1)
    monkeypatch.setattr(data_storage, "_WAITS", ())
    FAULTS[fault](store)
    with pytest.raises(CorpusError):
        batches(corpus[0])


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["throttles", "drops"])
def test_a_file_of_many_parts_is_whole(store: FaultProxy, fault: str) -> None:
    """130 MB go up in parts, and down in pieces, cut off in the middle of both."""
    block = torch.arange(1 << 22, dtype=torch.int32).numpy().tobytes()
    expected, storage = hashlib.sha256(), Storage("s3://bucket/large")
    for direction in ("up", "down"):
        store.faults = 0
        if fault == "throttles":
            store.throttle(times=3)
        else:
            store.drop(after=20 << 20, times=3)
        if direction == "up":
            with storage.open("file", "wb") as stream:
                for number in range(8):
                    piece = bytes([number]) + block[1:]
                    stream.write(piece)
                    expected.update(piece)
        else:
            assert digest_file(storage, "file") == {"bytes": 8 * len(block), "sha256": expected.hexdigest()}
        assert store.faults > 0, direction
        store.heal()
