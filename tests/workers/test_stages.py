"""A schedule of contexts: one run over several meshes, whatever happens between and inside its stages."""

from __future__ import annotations

import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from longstride.parallel import Mesh
from longstride.workers import ConfigError, Experiment, RunDirectory, Trainer, reopen_run, stages
from longstride.workers.launch import check
from longstride.workers.manifest import Checkpoint
from longstride.workers.metrics import StepRecord, read_records
from longstride.workers.reporting import Silent
from longstride.workers.stages import train_stages

from ..distributed import run_ranks
from .tiny import open_run, tiny_experiment

# 64 tokens a step: 4 x 16, 2 x 32, 1 x 64
GROWING = (
    "data.context=64",
    "data.batch=1",
    "data.schedule=16 for 3 steps, then 32 for 4 steps",
    "train.steps=10",
    "train.dtype=float64",
    "checkpoint.keep=0",
)
Losses = list[tuple[int, float, float | None, float, int]]


class StopAfter(Silent):
    """Asks, while the step before is reported, for an end after a step."""

    def __init__(self, step: int | None, stop: threading.Event) -> None:
        self.step, self.stop = step, stop

    def stepped(self, record: StepRecord) -> None:
        if self.step is not None and record.step == self.step - 1:
            self.stop.set()


def train(
    rank: int,
    world_size: int,
    directory: str,
    overrides: tuple[str, ...] = (),
    stop_after: int | None = None,
    resume: bool = False,
) -> tuple[Losses, list[dict[str, Any]]]:
    """The run's log, and what run.json says of every start; a run that is there goes on with `resume`."""
    experiment = tiny_experiment(directory, *GROWING, f"workers={world_size}", *overrides)
    run = open_run(experiment, rank)
    if resume:
        experiment = Experiment.resume(run)
    stop = threading.Event()

    def make(now: Experiment, stage: Any) -> Trainer:
        mesh = Mesh(**asdict(now.degrees))
        return Trainer(now, mesh, run, StopAfter(stop_after, stop), stage=stage, stop=stop)

    train_stages(experiment, run, make, resume=resume)
    return log(run), run.read_info()["starts"]


def log(run: RunDirectory) -> Losses:
    return [(r.step, r.loss, r.validation_loss, r.grad_norm, r.tokens) for r in read_records(run.storage)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Losses, list[dict[str, Any]]]:
    return run_ranks(train, 1, str(tmp_path_factory.mktemp("whole")))[0]


def test_stages_keep_tokens_and_position(undisturbed: tuple[Losses, list[dict[str, Any]]]) -> None:
    records, starts = undisturbed
    assert [tokens for *_, tokens in records] == [64 * step for step in range(1, 11)]
    assert [(start["step"], start["context"], start["batch"]) for start in starts] == [
        (0, 16, 4),
        (3, 32, 2),
        (7, 64, 1),
    ]
    validated = [step for step, _, validation, *_ in records if validation is not None]
    assert validated == [3, 7, 10], "at the end of every stage"


def test_two_processes_train_as_one(tmp_path: Path, undisturbed: tuple[Losses, list[dict[str, Any]]]) -> None:
    """Whole sequences for each while the batch allows it, then one sequence for both."""
    records, starts = run_ranks(train, 2, str(tmp_path))[0]
    meshes = [(start["parallel"]["data"], start["parallel"]["sequence"]) for start in starts]
    assert meshes == [(2, 1), (2, 1), (1, 2)]
    for found, expected in zip(records, undisturbed[0], strict=True):
        assert found == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("step", [3, 5], ids=["at a border", "inside a stage"])
def test_interrupted_is_bitwise_undisturbed(
    tmp_path: Path, step: int, undisturbed: tuple[Losses, list[dict[str, Any]]]
) -> None:
    records, _ = run_ranks(train, 1, str(tmp_path), (), step)[0]
    assert len(records) == step
    records, starts = run_ranks(train, 1, str(tmp_path), (), None, True)[0]
    assert records == undisturbed[0]
    assert step in [start["step"] for start in starts]


def test_a_damaged_checkpoint_leads_back_to_the_stage_before(
    tmp_path: Path, undisturbed: tuple[Losses, list[dict[str, Any]]]
) -> None:
    run_ranks(train, 1, str(tmp_path), ("checkpoint.every=2",), 5)
    run = RunDirectory(f"{tmp_path}/tiny")
    for step in (3, 4, 5):
        checkpoint = Checkpoint(run, f"step-{step:08d}")
        name = next(name for name in checkpoint.read_manifest().files if name.endswith(".distcp"))
        path = Path(checkpoint.storage.path(name))
        path.write_bytes(path.read_bytes()[:-1])
    records, starts = run_ranks(train, 1, str(tmp_path), (), None, True)[0]
    assert records == undisturbed[0]
    assert [start["step"] for start in starts] == [0, 3, 2, 3, 7]


def open_files_and_threads(rank: int, world_size: int, directory: str) -> dict[str, list[tuple[int, int]]]:
    """Of this process, as every stage begins: with the groups ended between them, and without that."""
    process, seen = psutil.Process(), dict[str, list[tuple[int, int]]]()
    for name, between in {"ended": stages.leave_groups, "kept": dist.barrier}.items():
        schedule = "16 for 1 steps, then 32 for 1 steps, then 16 for 1 steps"
        words = (f"data.schedule={schedule}", "train.steps=4", "train.validate_every=0", f"run.name={name}")
        experiment = tiny_experiment(directory, *GROWING[:2], *words, f"workers={world_size}")
        run, counts = open_run(experiment, rank), seen.setdefault(name, [])
        dist.barrier()

        def make(now: Experiment, stage: Any, run: RunDirectory = run, counts: list[Any] = counts) -> Trainer:
            counts.append((process.num_fds(), process.num_threads()))
            return Trainer(now, Mesh(**asdict(now.degrees)), run, stage=stage)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "leave_groups", between)
            train_stages(experiment, run, make, resume=False)
    return seen


def test_a_stage_leaves_no_files_and_threads_behind(tmp_path: Path) -> None:
    for seen in run_ranks(open_files_and_threads, 2, str(tmp_path)):
        _, after_one, *later = seen["ended"]  # the first fills caches
        assert len(later) == 2 and max(later) <= after_one
        _, after_one, *later = seen["kept"]
        files, threads = later[-1]
        assert files > after_one[0] + 40 and threads > after_one[1] + 30, "the comparison can fail"


def test_by_hand(tmp_path: Path) -> None:
    """`resume RUN data.context=64 parallel.sequence=auto` is what a schedule does."""
    scheduled = ("data.schedule=16 for 3 steps", "run.name=scheduled", "train.steps=5")
    expected, _ = run_ranks(train, 1, str(tmp_path), scheduled)[0]
    short = ("data.schedule=null", "data.context=16", "data.batch=4", "train.steps=5", "train.validate_every=3")
    run_ranks(train, 1, str(tmp_path), short, 3)
    again = reopen_run(RunDirectory(f"{tmp_path}/tiny"), ["data.context=64", "parallel.sequence=auto"])
    assert (again.data.context, again.data.batch) == (64, 1)
    found, _ = run_ranks(train, 1, str(tmp_path), (), None, True)[0]
    assert found == expected


def test_another_context_by_hand_keeps_the_tokens_of_a_step(tmp_path: Path) -> None:
    run = open_run(tiny_experiment(str(tmp_path), "data.context=16", "data.batch=4"), 0)
    assert Experiment.resume(run, ["data.context=32"]).data.batch == 2
    assert Experiment.resume(run, ["data.context=32", "data.batch=3"]).data.batch == 3
    assert Experiment.resume(run, ["data.context=1k"]).data.batch == 1, "a step cannot have less than a sequence"
    with pytest.raises(ConfigError, match=r"data\.context=48 does not divide the 64 tokens of a step|data\.context=48"):
        Experiment.resume(run, ["data.context=48"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("workers=3",), r"data\.schedule, where it has 4 x 16: data\.context=16 does not divide over .*sequence=3"),
        (("workers=2", "parallel.data=2"), r"where it has 1 x 64: data\.batch=1 does not divide over 2 groups"),
        (("data.schedule=16 for 10 steps",), r"leave none of train\.steps=10"),
        (("data.schedule=24 for 2 steps",), "24 does not divide the 64 tokens of a step"),
        (("data.schedule=16",), "'16' has no number of steps"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        tiny_experiment(str(tmp_path), *GROWING, *overrides)
    assert "\n" not in str(caught.value)


def test_the_last_stage_may_not_exceed_the_model(tmp_path: Path) -> None:
    longer = ("data.schedule=64 for 3 steps", "data.context=128")
    with pytest.raises(ConfigError, match=r"data\.context=128 exceeds the 64 positions of the model"):
        check(tiny_experiment(str(tmp_path), *GROWING, *longer))


def test_degrees_grow_with_the_context(tmp_path: Path) -> None:
    def meshes(*overrides: str) -> list[tuple[int, int, int]]:
        found = tiny_experiment(str(tmp_path), *GROWING, *overrides)
        degrees = [found.at(stage).degrees for stage in found.stages]
        return [(each.replicate, each.data, each.sequence) for each in degrees]

    assert meshes("workers=4") == [(1, 4, 1), (1, 2, 2), (1, 1, 4)]
    assert meshes("workers=8", "data.batch=2") == [(1, 8, 1), (1, 4, 2), (1, 2, 4)]
    assert meshes("workers=4", "data.batch=2", "parallel.replicate=2") == [(2, 2, 1), (2, 2, 1), (2, 1, 2)]
    assert meshes("workers=4", "parallel.sequence=4") == [(1, 1, 4)] * 3, "what is given stays"
    assert meshes("workers=4", "train.canonical=8") == [(1, 1, 4)] * 3
