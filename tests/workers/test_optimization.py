"""The optimiser's own rules; that it is AdamW on shards is held by the tests of training."""

from __future__ import annotations

import pytest
import torch

from longstride.models import build_model
from longstride.workers.optimization import ShardedAdamW, TrainConfig


def test_parameters_move_by_their_multiple_of_the_learning_rate() -> None:
    """Adam's first step is the learning rate itself, in the direction of the gradient's sign."""
    model = build_model({"vocab_size": 11, "width": 12, "layers": "[rwkv4]", "feed_forward": "none"})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    ShardedAdamW(model, TrainConfig(weight_decay=0.0)).step(1e-3)
    moved = {name: float((before[name] - parameter.detach()).mean()) for name, parameter in model.named_parameters()}
    assert moved.pop("blocks.0.mixer.time_decay") == pytest.approx(2e-3, rel=1e-3)
    assert moved.pop("blocks.0.mixer.time_first") == pytest.approx(3e-3, rel=1e-3)
    assert all(distance == pytest.approx(1e-3, rel=1e-3) for distance in moved.values())
