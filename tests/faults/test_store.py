"""Checkpoints over a store that fails for a while: nothing is lost or corrupt; for good: one line, and in time."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from botocore.exceptions import ClientError, ReadTimeoutError
from s3fs import S3FileSystem
from s3fs.errors import translate_boto_error
from torch import Tensor
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.tensor import DTensor

from longstride.data import StoreUnavailable, object_store
from longstride.data.object_store import PatientS3FileSystem
from longstride.data.storage import open_filesystem
from longstride.workers.checkpoint import CheckpointError
from longstride.workers.dcp_storage import RestrictedReader, digest_file
from longstride.workers.manifest import list_checkpoints
from longstride.workers.run_directory import find_run
from longstride.workers.storage import Storage, StorageError, StorageUnavailable
from longstride.workers.trainer import Trainer

from ..distributed import run_ranks
from ..timing import in_time
from ..workers.tiny import make_trainer, tiny_experiment
from .conftest import ACCESS_KEY, SECRET, forget_connections
from .proxy import FaultProxy
from .store_faults import FAULTS, hurry


@contextmanager
def own_proxy(server: tuple[str, int]) -> Iterator[FaultProxy]:
    """A proxy of this process's own, which its storage goes through."""
    with FaultProxy(server) as proxy:
        os.environ.update(AWS_ENDPOINT_URL=proxy.url, AWS_DEFAULT_REGION="us-east-1")
        os.environ.update(AWS_ACCESS_KEY_ID=ACCESS_KEY, AWS_SECRET_ACCESS_KEY=SECRET)
        yield proxy


def trainer_of(rank: int, world_size: int, name: str, *overrides: str) -> Trainer:
    words = [f"workers={world_size}", f"parallel.sequence={world_size}", f"run.name={name}", *overrides]
    return make_trainer(tiny_experiment("s3://bucket/runs", *words), rank)


def tensors(trainer: Trainer) -> dict[str, Tensor]:
    found = trainer.checkpointer._tensors().items()
    return {key: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone() for key, tensor in found}


def save_and_load(rank: int, world_size: int, server: tuple[str, int]) -> dict[str, tuple[int, int, bool, list[str]]]:
    """A checkpoint written, verified and loaded while the store fails in each way; what became of it."""
    outcomes = {}
    hurry()
    with own_proxy(server) as proxy:
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


@pytest.mark.timeout(600)
def test_a_checkpoint_is_whole_whatever_the_store_does(server: tuple[str, int], store: FaultProxy) -> None:
    for outcomes in run_ranks(save_and_load, 2, server, timeout=500):
        assert outcomes.keys() == FAULTS.keys()
        for saving, loading, same, problems in outcomes.values():
            assert saving > 0 and loading > 0, f"the fault struck: {outcomes}"
            assert same
            assert problems == []


def fetch_a_checkpoint(rank: int, world_size: int, server: tuple[str, int]) -> tuple[int, list[int]]:
    """How long the files of a checkpoint are, and what is fetched to load it: by us, and by DCP's own reader."""
    with own_proxy(server):
        trainer = trainer_of(rank, world_size, "fetched")
        trainer.step()
        trainer.save()
        checkpoint, manifest, _ = trainer.checkpointer.latest()
        original, fetched, read_data = PatientS3FileSystem._call_s3, [0, 0], RestrictedReader.read_data

        async def call(self: PatientS3FileSystem, method: str, *arguments: Any, **named: Any) -> Any:
            answer = await original(self, method, *arguments, **named)
            if method == "get_object" and named["Key"].endswith(".distcp"):
                fetched[-1] += answer["ContentLength"]
            return answer

        PatientS3FileSystem._call_s3 = call  # type: ignore[method-assign]
        trainer.checkpointer.load(checkpoint, manifest)
        ours, fetched[-1] = fetched[-1], 0
        RestrictedReader.read_data = FsspecReader.read_data  # type: ignore[method-assign]
        trainer.checkpointer.load(checkpoint, manifest)
        PatientS3FileSystem._call_s3, RestrictedReader.read_data = original, read_data  # type: ignore[method-assign]
        length = sum(file["bytes"] for name, file in manifest.files.items() if name.endswith(".distcp"))
        return length, [ours, fetched[-1]]


def test_what_is_loaded_is_fetched_once(server: tuple[str, int], store: FaultProxy) -> None:
    """Where DCP goes back in a file, what was read ahead is fetched again."""
    ((length, (ours, without)),) = run_ranks(fetch_a_checkpoint, 1, server)
    assert ours <= length < 2 * length < without


def meet_a_dead_store(rank: int, world_size: int, server: tuple[str, int]) -> list[str]:
    """The messages of a save, a load and a look at the run, when one process reaches nobody; then all is well again."""
    messages = []
    with own_proxy(server) as proxy:
        trainer = trainer_of(rank, world_size, "dead")
        trainer.step()
        trainer.save()
        object_store.PATIENCE_SECONDS = 0.5
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


def without_another_try(rank: int, world_size: int, server: tuple[str, int]) -> list[str]:
    """What becomes of a save and a load under each fault."""
    messages = []
    hurry()
    with own_proxy(server) as proxy:
        trainer = trainer_of(rank, world_size, "control")
        trainer.step()
        trainer.save()
        trainer.step()
        object_store.PATIENCE_SECONDS = 0.0
        for fault in FAULTS.values():
            for attempt in (trainer.save, trainer.restore):
                fault(proxy)
                with pytest.raises(CheckpointError) as caught:
                    attempt()
                messages.append(str(caught.value))
                proxy.heal()
        trainer.restore()
        assert trainer.step_count == 1, "what is torn is not trusted"
    return messages


def test_without_another_try_the_same_faults_stop_a_checkpoint(server: tuple[str, int], store: FaultProxy) -> None:
    """The control: it is the tries that save the checkpoints above."""
    first, second = run_ranks(without_another_try, 2, server)
    assert first == second, "all processes stop with the same line"
    assert len(first) == 2 * len(FAULTS)
    assert all("control" in message or "step-00000002" in message for message in first), first


def test_a_store_that_stays_away_is_one_clear_stop_on_all(server: tuple[str, int], store: FaultProxy) -> None:
    """And it does not pass for a damaged checkpoint: no older one is taken for it."""
    outcomes = run_ranks(meet_a_dead_store, 2, server)
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


def read(storage: Storage) -> None:
    storage.read_text("small")


def upload(storage: Storage) -> None:
    """More than the system's buffers hold: the store stops taking it in the middle."""
    with storage.explained("large"), storage.open("large", "wb") as stream:
        stream.write(bytes(40 << 20))


# The system notices only now and then that what it holds is not taken.
@pytest.mark.timing
@pytest.mark.parametrize(("operation", "limit"), [(read, 4.5), (upload, 7.0)])
def test_a_store_that_never_answers_is_given_up_in_time(
    store: FaultProxy, monkeypatch: pytest.MonkeyPatch, operation: Callable[[Storage], None], limit: float
) -> None:
    """Patience bounds all that goes on below it: of 2 s with tries of 0.7 s, it ends with the first try after 2 s."""
    monkeypatch.setattr(object_store, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(object_store, "ANSWER_SECONDS", 0.7)
    forget_connections()
    storage = Storage("s3://bucket/dir")
    storage.write_text("small", "text")
    store.hang()
    began = time.monotonic()
    with pytest.raises(StorageUnavailable, match=r"\(given up after \d+ s\)") as caught:
        operation(storage)
    seconds = time.monotonic() - began
    assert seconds >= 2.0
    in_time(seconds < limit, seconds, caught.value)
    assert "\n" not in str(caught.value) and isinstance(caught.value, StoreUnavailable)
    assert str(caught.value.filename).startswith("s3://bucket/dir")
    store.heal()
    assert storage.read_text("small") == "text"


def test_a_file_that_is_written_is_waited_for_as_long_as_one_that_is_read(store: FaultProxy) -> None:
    """s3fs's files have a door of their own to the store."""
    storage = Storage("s3://bucket/dir")
    with storage.open("file", "wb") as stream:
        stream.write(b"content")
        store.refuse()
        store.heal_after(3)  # longer than s3fs itself would try
    assert storage.read_text("file") == "content"


@pytest.mark.parametrize("completed", [True, False])
def test_a_completion_whose_answer_is_lost_counts(
    store: FaultProxy, monkeypatch: pytest.MonkeyPatch, completed: bool
) -> None:
    """The second try finds no upload any more: the object says whether the first one did it."""
    original, lost = S3FileSystem._call_s3, []
    gone: Any = {"Error": {"Code": "NoSuchUpload", "Message": "gone"}, "ResponseMetadata": {"HTTPStatusCode": 404}}

    async def call(self: S3FileSystem, method: str, *arguments: Any, **named: Any) -> Any:
        if method == "complete_multipart_upload":
            if lost:  # S3's answer, where moto's server has an error of its own
                raise translate_boto_error(ClientError(gone, "CompleteMultipartUpload"))
            if completed:
                await original(self, method, *arguments, **named)
            lost.append(method)
            raise ReadTimeoutError(endpoint_url=store.url)
        return await original(self, method, *arguments, **named)

    monkeypatch.setattr(S3FileSystem, "_call_s3", call)
    content = bytes(range(256)) * (11 << 12)
    filesystem, _ = open_filesystem("s3://bucket")
    if completed:
        filesystem.pipe_file("bucket/large", content, chunksize=5 << 20)
        assert filesystem.cat_file("bucket/large") == content
    else:
        with pytest.raises(FileNotFoundError):
            filesystem.pipe_file("bucket/large", content, chunksize=5 << 20)
    assert lost


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
