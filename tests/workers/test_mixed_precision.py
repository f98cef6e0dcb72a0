"""bfloat16 training through the trainer: master weights and moments in float32, whole after a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from longstride.workers import Trainer
from tests.distributed import run_ranks

from .tiny import make_trainer, tiny_experiment

SETTINGS = ["workers=2", "parallel.sequence=2", "train.steps=4", "checkpoint.every=4"]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    state = {**trainer.model.state_dict(), **trainer.optimizer.state_dict()}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in state.items()}


def trained(rank: int, world: int, directory: str, dtype: str) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Weights and moments after four steps, the same after they were saved and loaded, and the last loss."""
    experiment = tiny_experiment(directory, *SETTINGS, f"train.dtype={dtype}", f"run.name={dtype}")
    trainer = make_trainer(experiment, rank)
    trainer.train()
    assert trainer.last_record is not None
    restored = make_trainer(experiment, rank)
    restored.restore()
    return weights(trainer), weights(restored), trainer.last_record.loss


def test_a_checkpoint_holds_the_master_weights(tmp_path: Path) -> None:
    exact = run_ranks(trained, 2, str(tmp_path), "float32")[0]
    for saved, restored, loss in run_ranks(trained, 2, str(tmp_path), "bfloat16"):
        assert saved.keys() == restored.keys()
        for name, tensor in saved.items():
            assert tensor.dtype == torch.float32, name
            assert torch.equal(tensor, restored[name]), name
        # the control: a weight that had been kept in bfloat16 would equal its rounding
        assert any(not torch.equal(t, t.bfloat16().float()) for n, t in saved.items() if n.endswith("A_log"))
        assert loss == pytest.approx(exact[2], rel=0.01)
        assert loss != exact[2]
