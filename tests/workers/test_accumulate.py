"""A step computed in parts is the step: the same losses, gradients and adapted buffers, in less memory."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longstride.data import DataConfig, prepare
from longstride.workers import split_model
from longstride.workers.configuration import ConfigError
from longstride.workers.trainer import Trainer

from ..distributed import run_ranks
from .tiny import make_trainer, tiny_experiment

# Packed documents (of which targets are lost), experts that adapt, dropout and noise: all that could tell parts apart.
SETTINGS = (
    "model.layers=[conba+moe, hyena, attention, mamba+moe]",
    "model.conba.online_rate=0.1",
    "model.moe.balance=bias",
    "model.embedding_dropout=0.2",
    "train.dtype=float64",
    "train.steps=4",
    "train.validate_every=2",
)
Numbers = tuple[list[float], list[Tensor]]


def trained(rank: int, world_size: int, directory: str, *overrides: str) -> Numbers:
    """Losses and gradient norms of all steps, and the buffers that layers adapt."""
    trainer = make_trainer(tiny_experiment(directory, f"workers={world_size}", *SETTINGS, *overrides), rank)
    rows: list[int] = []
    trainer.model.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    numbers: list[float] = []
    while trainer.step_count < 4:
        record, _ = trainer.step()
        numbers += [record.loss, record.grad_norm]
    numbers.append(trainer.validate())
    trainer.loader.close()
    at_once = trainer.experiment.data.batch // trainer.mesh.data_size // trainer.experiment.train.accumulate
    assert trainer.experiment.train.canonical or set(rows) == {at_once}
    return numbers, [buffer.clone() for buffer in trainer.model.buffers()]


def each_by_its_own_targets(rank: int, world_size: int, directory: str, *overrides: str) -> Numbers:
    """Parts as if each were a step: means over their own targets, added up."""
    split_model.Part = lambda share, targets: None  # type: ignore[assignment,misc]
    return trained(rank, world_size, directory, *overrides)


def distance(first: Numbers, second: Numbers) -> float:
    losses = max(abs(a - b) for a, b in zip(first[0], second[0], strict=True))
    return max([losses, *(float((a - b).abs().max()) for a, b in zip(first[1], second[1], strict=True))])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The setting for a corpus of long and very short texts, so that parts have different numbers of targets."""
    folder, draw = tmp_path_factory.mktemp("packed"), random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ", k=draw.choice([1, 3, 20, 60]))) for _ in range(400)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(str(folder / "texts.jsonl"), str(folder / "corpus"))
    data = DataConfig.model_validate({"corpus": str(folder / "corpus"), "context": 64, "batch": 4})
    loader = data.training(data.open(), seed=0, data_rank=0, data_size=1, bounds=(0, 64))
    first, second = (next(loader).targets_BT != -100).sum(1).chunk(2)
    loader.close()
    assert first.sum() != second.sum()
    return f"data.corpus={folder}/corpus"


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory, packed: str) -> Numbers:
    return run_ranks(trained, 1, str(tmp_path_factory.mktemp("alone")), packed)[0]


@pytest.mark.parametrize(
    ("workers", "settings"),
    [
        (1, ["train.accumulate=4"]),
        (2, ["train.accumulate=2", "parallel.sequence=2", "model.recompute=true"]),
        (2, ["train.accumulate=2", "parallel.data=2", "parallel.expert=2"]),
        (4, ["train.accumulate=2", "parallel.replicate=2", "parallel.sequence=2"]),
        (2, ["train.accumulate=2", "train.canonical=4", "parallel.sequence=2"]),
    ],
    ids=["alone", "recomputed", "expert parallel", "copies", "canonical"],
)
def test_parts_do_not_change_the_step(
    at_once: Numbers, packed: str, tmp_path: Path, workers: int, settings: list[str]
) -> None:
    numbers, buffers = run_ranks(trained, workers, str(tmp_path), packed, *settings)[0]
    assert any(buffer.abs().max() > 0 for buffer in buffers)
    assert distance((numbers, buffers), at_once) < 1e-10


def test_the_comparison_can_fail(at_once: Numbers, packed: str, tmp_path: Path) -> None:
    """The mean of the parts' means is near the first step's loss, and is not it."""
    numbers, _ = run_ranks(each_by_its_own_targets, 1, str(tmp_path), packed, "train.accumulate=2")[0]
    assert 1e-5 < abs(numbers[0] / 2 - at_once[0][0]) < 0.1


def peak_of_saved(trainer: Trainer) -> int:
    """The most bytes that autograd keeps at one time in a step."""
    alive, peak = 0, 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal alive, peak
        alive += tensor.nbytes
        peak = max(peak, alive)
        return tensor

    def use(tensor: Tensor) -> Tensor:
        nonlocal alive
        alive -= tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, use):
        trainer.step()
    trainer.loader.close()
    return peak


def memory(rank: int, world_size: int, directory: str) -> list[int]:
    parts = (1, 2, 4)
    experiments = [tiny_experiment(directory, "model.layers=[mamba]", f"train.accumulate={n}") for n in parts]
    return [peak_of_saved(make_trainer(experiment, rank)) for experiment in experiments]


def test_memory_is_that_of_a_part(tmp_path: Path) -> None:
    whole, half, quarter = run_ranks(memory, 1, str(tmp_path))[0]
    assert half < 0.6 * whole and quarter < 0.35 * whole


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.batch=4 .* in train.accumulate=3 parts; set data.batch=6"):
        tiny_experiment(str(tmp_path), "train.accumulate=3")
    with pytest.raises(ConfigError, match=r"2 groups .* in train.accumulate=4 parts; set data.batch=8"):
        tiny_experiment(str(tmp_path), "workers=2", "parallel.data=2", "train.accumulate=4")


def test_a_schedule_plans_for_parts(tmp_path: Path) -> None:
    """Longer sequences are split as soon as their number leaves no row for every part."""
    words = ("workers=4", "train.accumulate=2", "data.batch=2", "data.schedule=16 for 5 steps, then 32 for 5 steps")
    experiment = tiny_experiment(str(tmp_path), *words)
    degrees = [experiment.at(stage).degrees for stage in experiment.stages]
    assert [(stage.context, stage.batch) for stage in experiment.stages] == [(16, 8), (32, 4), (64, 2)]
    assert [(each.data, each.sequence) for each in degrees] == [(4, 1), (2, 2), (1, 4)]
