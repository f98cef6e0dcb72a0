"""The same losses whatever the degrees: same data, same initial values, exact gradients of the one global loss."""

from __future__ import annotations

import gc
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from longstride.models import build_model
from longstride.parallel import Mesh, SequenceShard, shard_model
from longstride.workers.evaluate import load_run
from longstride.workers.metrics import read_records
from longstride.workers.scoring import score_length
from longstride.workers.sharded_model import make_sharded_model
from longstride.workers.trainer import Trainer

from ..distributed import run_ranks
from .tiny import make_trainer, tiny_experiment


def train(rank: int, world_size: int, directory: str, *overrides: str) -> list[float]:
    """Losses of all steps, then gradient norms of all steps, then the validation loss, as the run's log has them."""
    trainer = make_trainer(tiny_experiment(directory, f"workers={world_size}", *overrides), rank)
    assert trainer.train()
    if rank:
        return []
    records = list(read_records(trainer.run.storage))
    assert [record.step for record in records] == list(range(1, 21))
    assert records[-1].tokens == 20 * 4 * 64
    assert records[-1].validation_loss is not None
    whole = build_model(trainer.experiment.model, device="meta")  # of which processes hold parts
    for record in records:
        assert record.flops_per_second == pytest.approx(3 * whole.flops_per_token(64) * record.tokens_per_second)
    return [*(r.loss for r in records), *(r.grad_norm for r in records), records[-1].validation_loss]


def distance(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """What one process makes of it, by dtype."""
    directory = str(tmp_path_factory.mktemp("alone"))
    return {
        dtype: run_ranks(train, 1, directory, f"run.name={dtype}", f"train.dtype={dtype}")[0]
        for dtype in ("float32", "float64")
    }


@pytest.mark.parametrize(
    ("workers", "degrees"),
    [
        (2, ["parallel.sequence=2"]),
        (2, ["parallel.sequence=2", "parallel.expert=1"]),
        (2, ["parallel.data=2"]),
        (4, ["parallel.data=2", "parallel.sequence=2"]),
        (4, ["parallel.sequence=4", "parallel.expert=2"]),
        (4, ["parallel.replicate=2", "parallel.sequence=2"]),
    ],
)
def test_degrees_do_not_change_the_losses(
    alone: dict[str, list[float]], tmp_path: Path, workers: int, degrees: list[str]
) -> None:
    exact = run_ranks(train, workers, str(tmp_path), "train.dtype=float64", *degrees)[0]
    assert distance(exact, alone["float64"]) < 1e-10


def test_single_precision_agrees_as_far_as_it_goes(alone: dict[str, list[float]], tmp_path: Path) -> None:
    losses = run_ranks(train, 2, str(tmp_path), "parallel.sequence=2")[0]
    assert distance(losses[:20], alone["float32"][:20]) < 1e-5
    assert losses[19] < losses[0] - 0.5  # it learns


def test_the_comparison_can_fail(alone: dict[str, list[float]], tmp_path: Path) -> None:
    other = run_ranks(train, 1, str(tmp_path), "train.dtype=float64", "data.batch=4", "seed=1")[0]
    assert distance(other, alone["float64"]) > 1e-3


def test_bfloat16_learns_with_float32_weights(tmp_path: Path) -> None:
    losses = run_ranks(train, 2, str(tmp_path), "train.dtype=bfloat16", "parallel.sequence=2")[0]
    assert losses[19] < losses[0] - 0.5


def validation_and_evaluation(rank: int, world_size: int, directory: str) -> tuple[float, float]:
    experiment = tiny_experiment(directory, "train.steps=3", "train.warmup=0")
    trainer = make_trainer(experiment, rank)
    trainer.train()
    assert trainer.validation_loss is not None
    trained = load_run(trainer.run, experiment)
    return trainer.validation_loss, score_length(trained.model, experiment.data, experiment.open_corpus()).loss


def test_evaluate_measures_what_training_measured(tmp_path: Path) -> None:
    in_training, afterwards = run_ranks(validation_and_evaluation, 1, str(tmp_path))[0]
    assert in_training == pytest.approx(afterwards, abs=1e-6)


def stop_early(rank: int, world_size: int, directory: str) -> tuple[bool, int, int]:
    trainer = make_trainer(tiny_experiment(directory, f"workers={world_size}", "parallel.sequence=2"), rank)
    if rank == 1:
        trainer.stop.set()  # one process's wish is everyone's
    finished = trainer.train()
    again = make_trainer(tiny_experiment(directory, f"workers={world_size}", "parallel.sequence=2"), rank)
    again.restore()
    return finished, trainer.step_count, again.step_count


def test_a_stop_ends_all_processes_after_a_step_with_a_checkpoint(tmp_path: Path) -> None:
    assert run_ranks(stop_early, 2, str(tmp_path)) == [(False, 1, 1), (False, 1, 1)]


def diverge(rank: int, world_size: int, directory: str) -> str:
    trainer = make_trainer(tiny_experiment(directory, "train.learning_rate=1e30", "train.warmup=0"), rank)
    try:
        trainer.train()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_loss_that_is_no_number_stops_the_run_with_advice(tmp_path: Path) -> None:
    message = run_ranks(diverge, 1, str(tmp_path))[0]
    assert message.startswith("TrainingError: the loss is nan")
    assert "lower train.learning_rate" in message


def live_tensors(rank: int, world_size: int, directory: str) -> list[int]:
    """Tensors alive after each of some steps."""
    trainer = make_trainer(tiny_experiment(directory, f"workers={world_size}", "data.prefetch=0"), rank)
    counts = []
    for _ in range(9):
        trainer.step()
        gc.collect()
        counts.append(sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()))
    return counts


@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_leaves_nothing_behind(tmp_path: Path, workers: int) -> None:
    for counts in run_ranks(live_tensors, workers, str(tmp_path)):
        # The first step settles the optimiser and FSDP. Gloo's thread may hold a message's tensor for a moment longer
        # than the wait for it, so that one count says little and the fewest of some say what stays.
        assert min(counts[1:5]) == min(counts[5:]), counts


def undecayed(rank: int, world_size: int, directory: str) -> set[str]:
    trainer: Trainer = make_trainer(tiny_experiment(directory, f"workers={world_size}"), rank)
    names = trainer.optimizer.parameters
    return {name for name in names if name not in trainer.optimizer._decayed}


def test_norms_biases_and_state_space_parameters_do_not_decay(tmp_path: Path) -> None:
    names = run_ranks(undecayed, 2, str(tmp_path))[0]
    assert {"norm.weight", "blocks.0.mixer.A_log", "blocks.0.mixer.D"} <= names
    assert not any("router" in name or "experts" in name or "embedding" in name for name in names)


def plain_and_sharded(rank: int, world_size: int, directory: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Losses and gradients of one process: with parameters as training has them there, and sharded over it."""
    experiment = tiny_experiment(directory)
    mesh = Mesh(**asdict(experiment.degrees))
    plain, sharded = make_sharded_model(experiment, mesh), make_sharded_model(experiment, mesh)
    shard_model(sharded, mesh, blocks=list(sharded.blocks), experts=sharded.expert_modules())
    tokens_BT, targets_BT = torch.randint(256, (2, 3, 64), generator=torch.Generator().manual_seed(0))
    found = []
    for model in (plain, sharded):
        losses = model(tokens_BT, targets_BT, SequenceShard.whole(64))
        losses.total.backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert any(isinstance(grad, DTensor) for grad in grads) == (model is sharded)
        found.append([losses.total.detach(), *(g.full_tensor() if isinstance(g, DTensor) else g for g in grads)])
    return found[0], found[1]


def test_one_process_needs_no_sharding(tmp_path: Path) -> None:
    plain, sharded = run_ranks(plain_and_sharded, 1, str(tmp_path))[0]
    assert len(plain) == len(sharded) > 30
    assert all(torch.equal(a, b) for a, b in zip(plain, sharded, strict=True))
