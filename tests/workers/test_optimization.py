"""The optimiser's own rules; that it is AdamW on shards is held by the tests of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longstride.models import build_model
from longstride.workers.optimization import ShardedAdamW, TrainConfig, learning_rate


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


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"warmup": 2, "final_fraction": 0.0}, {1: 0.5, 2: 1.0, 6: 0.5, 10: 0.0, 11: 0.0}),
        ({"warmup": 2, "stable": 4, "decay": "linear"}, {1: 0.5, 2: 1.0, 6: 1.0, 8: 0.55, 10: 0.1, 12: 0.1}),
        ({"warmup": 2, "stable": 8}, {1: 0.5, 2: 1.0, 10: 1.0}),
        ({"stable": 0, "decay": "linear", "final_fraction": 0.0}, {1: 0.9, 5: 0.5, 10: 0.0}),
    ],
    ids=["cosine", "stable and a line", "never down", "a line"],
)
def test_the_learning_rate_over_time(settings: dict[str, Any], rates: dict[int, float]) -> None:
    config = TrainConfig(steps=10, learning_rate=1.0, **settings)
    assert {step: learning_rate(config, step) for step in rates} == pytest.approx(rates)


def test_a_rate_that_stays_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train.stable=9 after train.warmup=2 .* set train.stable=8 or less"):
        TrainConfig(steps=10, warmup=2, stable=9)
