"""Checkpoints: whole on any degrees, never trusted when damaged, never in the way of training."""

from __future__ import annotations

import pickle
import re
import shutil
import threading
import time
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata
from torch.distributed.tensor import DTensor

from longstride.workers import checkpoint as checkpoint_module
from longstride.workers.checkpoint import CheckpointError
from longstride.workers.checkpoint_policy import prune
from longstride.workers.dcp_storage import DigestingWriter, RestrictedReader
from longstride.workers.evaluate import load_run
from longstride.workers.manifest import (
    MANIFEST_FILE,
    Checkpoint,
    Manifest,
    list_checkpoints,
    new_checkpoint,
    newest_whole,
)
from longstride.workers.run_directory import RunDirectory
from longstride.workers.storage import Storage
from longstride.workers.trainer import Trainer

from ..distributed import run_ranks
from .tiny import make_trainer, tiny_experiment


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t.full_tensor() if isinstance(t, DTensor) else t.clone() for k, t in tensors.items()}


def state(trainer: Trainer) -> dict[str, Any]:
    """Everything a checkpoint must bring back but random state."""
    progress = {"step": trainer.step_count, "tokens": trainer.tokens, "position": trainer.position}
    return {"tensors": whole(trainer.checkpointer._tensors()), "steps": trainer.optimizer.steps} | progress


def save_two_steps(rank: int, world_size: int, directory: str, *overrides: str) -> dict[str, Any]:
    """Two steps and a checkpoint of them; what was saved."""
    trainer = make_trainer(tiny_experiment(directory, f"workers={world_size}", *overrides), rank)
    trainer.step()
    trainer.step()
    trainer.save()
    return state(trainer)


def restore(rank: int, world_size: int, directory: str, *overrides: str) -> dict[str, Any]:
    """What comes back, from other initial values; and the loss of the next step."""
    trainer = make_trainer(tiny_experiment(directory, f"workers={world_size}", "seed=7", *overrides), rank)
    trainer.experiment = tiny_experiment(directory, f"workers={world_size}", *overrides)
    trainer.restore()
    return state(trainer)


SPLIT = ["parallel.sequence=2"]
FOUR = ["parallel.data=2", "parallel.sequence=2", "parallel.expert=4"]


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [((2, SPLIT), (2, SPLIT)), ((2, SPLIT), (1, [])), ((1, []), (4, FOUR)), ((4, FOUR), (2, ["parallel.data=2"]))],
)
def test_every_tensor_comes_back_bitwise_on_any_degrees(
    tmp_path: Path, saved_by: tuple[int, list[str]], loaded_by: tuple[int, list[str]]
) -> None:
    saved = run_ranks(save_two_steps, saved_by[0], str(tmp_path), *saved_by[1])[0]
    loaded = run_ranks(restore, loaded_by[0], str(tmp_path), *loaded_by[1])[0]
    assert saved["step"] == loaded["step"] == loaded["steps"] == 2
    assert saved["tokens"] == loaded["tokens"] == 2 * 4 * 64
    assert saved["position"] == loaded["position"] == 2
    assert saved["tensors"].keys() == loaded["tensors"].keys()
    assert all(torch.equal(saved["tensors"][key], loaded["tensors"][key]) for key in saved["tensors"])
    moments = [key for key in saved["tensors"] if key.startswith("optimizer.exp_avg.")]
    assert moments
    assert any(saved["tensors"][key].abs().sum() > 0 for key in moments)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two whole checkpoints, steps 2 and 3, written by two processes."""
    directory = tmp_path_factory.mktemp("written")
    run_ranks(save_two_and_three, 2, str(directory))
    return directory


def save_two_and_three(rank: int, world_size: int, directory: str) -> None:
    trainer = make_trainer(tiny_experiment(directory, f"workers={world_size}", "checkpoint.keep=0", *SPLIT), rank)
    for _ in range(3):
        trainer.step()
        if trainer.step_count > 1:
            trainer.save()


@pytest.fixture
def run(written: Path, tmp_path: Path) -> RunDirectory:
    """A copy of `written` to damage."""
    shutil.copytree(written / "tiny", tmp_path / "tiny")
    return RunDirectory(str(tmp_path / "tiny"))


def newest(run: RunDirectory) -> Path:
    return Path(list_checkpoints(run)[-1].storage.root)


def test_a_whole_checkpoint_lists_all_its_files(run: RunDirectory) -> None:
    checkpoint, manifest, rejected = newest_whole(run)
    assert (checkpoint.step, manifest.step, rejected) == (3, 3, [])
    on_disk = {path.name for path in newest(run).iterdir()} - {MANIFEST_FILE}
    assert set(manifest.files) == on_disk >= {"__0_0.distcp", "__1_0.distcp", ".metadata"}
    assert all(file["bytes"] == (newest(run) / name).stat().st_size for name, file in manifest.files.items())


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: flip(d / "__1_0.distcp", 0.5), "__1_0.distcp is damaged"),
        (lambda d: flip(d / "__0_0.distcp", 0.999), "__0_0.distcp is damaged"),
        (lambda d: flip(d / ".metadata", 0.3), ".metadata is damaged"),
        (lambda d: (d / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
        (lambda d: (d / "__1_0.distcp").write_bytes(b"PK"), "__1_0.distcp has 2 bytes instead of"),
        (lambda d: (d / MANIFEST_FILE).unlink(), "no manifest.json"),
        (lambda d: (d / MANIFEST_FILE).write_text('{"format": 1, "st'), "manifest.json is damaged"),
        (lambda d: (d / MANIFEST_FILE).write_text('{"format": 9}'), "unknown format"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(run: RunDirectory, damage: Any, words: str) -> None:
    damage(newest(run))
    checkpoint, _, rejected = newest_whole(run)
    assert checkpoint.step == 2
    assert len(rejected) == 1
    assert "checkpoint step-00000003 is skipped" in rejected[0]
    assert words in rejected[0]


def test_processes_share_the_verification_and_agree(run: RunDirectory) -> None:
    flip(newest(run) / "__1_0.distcp", 0.5)
    outcome = run_ranks(resumed_step, 2, str(newest(run).parent.parent.parent))
    assert outcome == [(2, newest_whole(run)[2]), (2, [])]


class Notes:
    """A reporter that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def noted(self, message: str) -> None:
        self.notes.append(message)


def resumed_step(rank: int, world_size: int, directory: str) -> tuple[int, list[str]]:
    trainer = make_trainer(tiny_experiment(directory, f"workers={world_size}", *SPLIT), rank)
    notes = Notes()
    trainer.reporter = notes  # type: ignore[assignment]
    trainer.restore()
    return trainer.step_count, notes.notes


def test_no_whole_checkpoint_is_one_line(run: RunDirectory) -> None:
    for checkpoint in list_checkpoints(run):
        flip(Path(checkpoint.storage.root) / "__0_0.distcp", 0.5)
    with pytest.raises(ValueError, match=r"no complete checkpoint: .*step-00000003.*step-00000002.*") as caught:
        newest_whole(run)
    assert "\n" not in str(caught.value)
    assert "longstride train" in str(caught.value)


def test_a_directory_is_never_used_twice(run: RunDirectory) -> None:
    (newest(run) / MANIFEST_FILE).unlink()  # torn
    assert new_checkpoint(run, 3).name == "step-00000003.1"
    assert new_checkpoint(run, 4).name == "step-00000004"
    run_ranks(save_again, 2, str(newest(run).parent.parent.parent))
    assert [found.name for found in list_checkpoints(run)][-2:] == ["step-00000003", "step-00000003.1"]
    assert newest_whole(run)[0].name == "step-00000003.1"


def save_again(rank: int, world_size: int, directory: str) -> None:
    trainer = make_trainer(tiny_experiment(directory, f"workers={world_size}", "checkpoint.keep=0", *SPLIT), rank)
    trainer.restore()
    trainer.step()
    trainer.save()


def test_keep_counts_whole_ones_and_removes_older_torn_ones(run: RunDirectory) -> None:
    (run.storage / "checkpoints/step-00000001").make()  # torn and old
    (run.storage / "checkpoints/step-00000009").make()  # being written, say
    assert prune(run, 0) == []
    assert prune(run, 1) == ["step-00000001", "step-00000002"]
    assert [found.name for found in list_checkpoints(run)] == ["step-00000003", "step-00000009"]
    assert prune(run, 1) == []


def test_another_model_is_refused(run: RunDirectory) -> None:
    other = tiny_experiment(str(newest(run).parent.parent.parent), "model.width=32")
    with pytest.raises(ValueError, match=r"does not fit the model: model\.embedding\.weight is \(256, 16\) there"):
        load_run(run, other)
    deeper = tiny_experiment(str(newest(run).parent.parent.parent), "model.layers='[mamba, hyena+moe, attention]'")
    with pytest.raises(ValueError, match=r"the model has no model\.blocks\.3"):
        load_run(run, deeper)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("owned",))


def test_metadata_that_would_run_code_is_refused(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    directory = newest(run)
    (directory / ".metadata").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(pickle.UnpicklingError, match=r"asks for builtins\.print"):
        RestrictedReader(Storage(str(directory))).read_metadata()
    assert capsys.readouterr().out == ""


class OlderPickler(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.2 does."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_metadata_of_an_older_python_is_read_and_getattr_is_nothing_else(run: RunDirectory) -> None:
    directory = newest(run)
    metadata = RestrictedReader(Storage(str(directory))).read_metadata()
    metadata.storage_meta = None
    with (directory / ".metadata").open("wb") as file:
        OlderPickler(file).dump(metadata)
    assert b"getattr" in (directory / ".metadata").read_bytes()
    assert RestrictedReader(Storage(str(directory))).read_metadata().state_dict_metadata == metadata.state_dict_metadata
    (directory / ".metadata").write_bytes(pickle.dumps(Reaching()))
    with pytest.raises(pickle.UnpicklingError, match=r"asks for builtins\.getattr"):
        RestrictedReader(Storage(str(directory))).read_metadata()


class Reaching:
    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (_MEM_FORMAT_ENCODING, "__init_subclass__"))


def test_an_entry_that_is_no_tensor_is_refused(run: RunDirectory) -> None:
    """DCP's own reader would hand its bytes to an unrestricted torch.load."""
    directory = Storage(str(newest(run)))
    metadata = RestrictedReader(directory).read_metadata()
    metadata.state_dict_metadata["model.norm.weight"] = BytesStorageMetadata()
    (newest(run) / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(pickle.UnpicklingError, match=r"asks for .*\.BytesStorageMetadata; it is not loaded"):
        RestrictedReader(directory).read_metadata()


def test_the_writer_digests_what_it_writes_through_a_rename(tmp_path: Path) -> None:
    writer = DigestingWriter(Storage(str(tmp_path)))
    with writer.fs.create_stream(str(tmp_path / "a.tmp"), "wb") as stream:
        assert stream.write(b"hello") == 5
        assert stream.tell() == 5
        stream.write(memoryview(bytearray(b" world")))
    writer.fs.rename(str(tmp_path / "a.tmp"), str(tmp_path / "a"))
    digest = "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9"
    assert writer.digests() == {"a": {"bytes": 11, "sha256": digest}}


def save_beside_training(rank: int, world_size: int, directory: str) -> tuple[bool, bool, bool]:
    """Training goes on, with collectives, while a slow disk takes the checkpoint; what was saved is the moment's."""
    trainer = make_trainer(tiny_experiment(directory, f"workers={world_size}", *SPLIT), rank)
    gate = threading.Event()
    write = trainer.checkpointer._write

    def slow(*arguments: Any) -> None:
        gate.wait(30)
        write(*arguments)

    trainer.checkpointer._write = slow  # type: ignore[method-assign]
    trainer.step()
    before = state(trainer)
    trainer.save(wait=False)
    for _ in range(3):
        trainer.step()
    nothing_yet = not any(found.committed for found in list_checkpoints(trainer.run))
    dist.barrier()
    gate.set()
    for _ in range(3):
        trainer.step()
    trainer.checkpointer.wait()
    moved = not torch.equal(state(trainer)["tensors"]["model.norm.weight"], before["tensors"]["model.norm.weight"])
    again = make_trainer(tiny_experiment(directory, f"workers={world_size}", *SPLIT), rank)
    again.restore()
    after = state(again)
    same = all(torch.equal(before["tensors"][key], after["tensors"][key]) for key in before["tensors"])
    return nothing_yet, moved, same and after["step"] == 1


def test_an_asynchronous_checkpoint_is_of_its_moment_and_training_goes_on(tmp_path: Path) -> None:
    assert run_ranks(save_beside_training, 2, str(tmp_path)) == [(True, True, True)] * 2


def save_behind_a_slow_disk(rank: int, world_size: int, directory: str) -> list[list[str]]:
    """What is said at three saves after each of which the disk is quick, slow, and quick."""
    checkpoint_module.LONG_WAIT = 0.3
    trainer = make_trainer(tiny_experiment(directory, f"workers={world_size}", "checkpoint.every=1", *SPLIT), rank)
    write, said, gate = trainer.checkpointer._write, list[list[str]](), threading.Event()

    def slow(*arguments: Any) -> None:
        gate.wait(30)
        write(*arguments)

    for disk in (write, slow, write):
        notes = Notes()
        trainer.reporter = notes  # type: ignore[assignment]
        trainer.checkpointer._write = disk  # type: ignore[method-assign]
        trainer.step()
        if said[1:]:
            threading.Timer(0.6, gate.set).start()
        trainer.save(wait=False)
        said.append(notes.notes)
        if disk is write:
            trainer.checkpointer.wait()
    return said


def test_a_checkpoint_that_holds_up_the_next_is_said(tmp_path: Path) -> None:
    first, second = run_ranks(save_behind_a_slow_disk, 2, str(tmp_path))
    assert first[:2] == [[], []]
    assert len(first[2]) == 1
    assert re.fullmatch(r"waited \d\.\d s for the checkpoint before; raise checkpoint\.every", first[2][0])
    assert second == [[], [], []], "once, by the first process"


def fail_to_write(rank: int, world_size: int, directory: str, asynchronous: bool) -> str:
    trainer = make_trainer(tiny_experiment(directory, f"workers={world_size}", *SPLIT), rank)
    trainer.step()
    if rank == 1:

        def full(self: object, block: object) -> int:
            raise OSError(28, "No space left on device")

        from longstride.workers import dcp_storage

        dcp_storage._DigestingStream.write = full  # type: ignore[method-assign,assignment]
    try:
        trainer.save(wait=not asynchronous)
        trainer.checkpointer.wait()
    except CheckpointError as error:
        return str(error)
    return "written"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_process_that_cannot_write_fails_all_with_the_cause(tmp_path: Path, asynchronous: bool) -> None:
    messages = run_ranks(fail_to_write, 2, str(tmp_path), asynchronous)
    assert messages[0] == messages[1]
    assert "checkpoint step-00000001 was not written (process 1: [Errno 28] No space left on device)" in messages[0]
    run = RunDirectory(str(tmp_path / "tiny"))
    assert list_checkpoints(run) == [], "and what was written of it is gone"


def wait_for_a_slow_process(rank: int, world_size: int, directory: str, own: bool) -> str:
    """A save in which one process takes longer than torch lets others wait; `own`: with a timeout of our own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed_c10d, "_get_default_timeout", lambda _: timedelta(seconds=3))
        if not own:
            patch.setattr(checkpoint_module, "TIMEOUT", None)
        trainer = make_trainer(tiny_experiment(directory, f"workers={world_size}", *SPLIT), rank)
        trainer.step()
        if rank == 1:
            digests = DigestingWriter.digests
            patch.setattr(DigestingWriter, "digests", lambda self: time.sleep(6) or digests(self))
        try:
            trainer.save()
        except Exception as error:
            return str(error)
    return "written"


@pytest.mark.slow
def test_one_process_may_take_its_time(tmp_path: Path) -> None:
    assert run_ranks(wait_for_a_slow_process, 2, str(tmp_path), True) == ["written", "written"]
    assert "Timed out" in run_ranks(wait_for_a_slow_process, 2, str(tmp_path), False)[0], "the comparison can fail"


@pytest.mark.parametrize(
    ("context", "batch", "position"), [(64, 4, 10), (64, 2, 20), (64, 3, 14), (128, 4, 5), (128, 3, 7)]
)
def test_the_position_in_the_data_when_batch_or_context_change(context: int, batch: int, position: int) -> None:
    manifest = Manifest(10, 10 * 4 * 64, 10, 64, 4, "", 1, {}, "", "", {})
    assert manifest.resume_position(context, batch) == position


def test_names_of_checkpoints(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    assert Checkpoint(run, "step-00000200.3").attempt == 3
    with pytest.raises(ValueError, match="not a checkpoint's name"):
        Checkpoint(run, "../step-00000200")
