"""Hyena begins, and its weights decay, as in the authors' code (HazyResearch/safari), and its config is their task."""

from __future__ import annotations

from pathlib import Path

import pytest

from longstride.models import build_model, weight_decayed
from longstride.workers.experiment import Experiment

CONFIG = Path(__file__).parents[2] / "configs" / "tasks" / "hyena-associative-recall.yaml"

# sizes as there: nn.Linear N(0, 0.02), the last of a residual branch by sqrt(2 layers) smaller, nn.Conv1d's default
SPREAD = {
    "in_proj.weight": 0.02,
    "in_proj.bias": 0.0,
    "conv_weight": 1 / 3,  # uniform in (-1, 1) / sqrt(3)
    "conv_bias": 1 / 3,
    "skip": 1.0,
    "filter.layers.0.weight": 0.02,
    "filter.layers.0.bias": 0.0,
    "filter.layers.1.weight": 0.02,
    "filter.layers.1.bias": 0.0,
    "filter.layers.2.weight": 0.02,
    "filter.layers.2.bias": 0.0,
    "filter.frequency": 0.0,
    "filter.output": 0.02,
    "out_proj.weight": 0.01,
    "out_proj.bias": 0.0,
}


def test_every_parameter_begins_as_the_authors() -> None:
    description = {"vocab_size": 10, "width": 256, "layers": "[hyena(order=3, sine=10.0)] x 2", "feed_forward": "none"}
    model = build_model(description, seed=1)
    own = {name.removeprefix("blocks.1.mixer."): p for name, p in model.named_parameters() if "blocks.1.mixer." in name}
    assert set(own) == set(SPREAD)
    for name, spread in SPREAD.items():
        # the smallest that is drawn has 320 numbers
        assert own[name].std().item() == pytest.approx(spread, rel=0.12), name
        assert own[name].mean().item() == pytest.approx(10.0 if name == "filter.frequency" else 0.0, abs=0.1), name
    assert own["conv_weight"].abs().max() <= 3**-0.5 and own["conv_bias"].abs().max() <= 3**-0.5
    assert own["in_proj.weight"].abs().max() > 3 * 0.02  # the control: normal, not uniform


def test_the_projections_decay_and_nothing_of_a_filter_does() -> None:
    model = build_model({"vocab_size": 10, "width": 16, "layers": "[hyena]", "feed_forward": "none"})
    decayed = {name for name in weight_decayed(model) if ".mixer." in name}
    assert decayed == {f"blocks.0.mixer.{name}" for name in ("in_proj.weight", "conv_weight", "out_proj.weight")}


def test_the_config_is_the_papers_task_at_another_length() -> None:
    experiment = Experiment.load(str(CONFIG), [])
    model, task = experiment.model, experiment.data.tasks.associative_recall
    assert model.vocab_size == task.vocabulary and task.examples == 2000 and task.score == "all"
    assert model.hyena.max_length == experiment.data.context and experiment.data.context % 2 == 0
    assert (model.width, model.layers, model.embedding_dropout) == (64, "[hyena] x 2", 0.1)
    filters = model.hyena
    assert (filters.order, filters.features, filters.filter_width, filters.sine) == (2, 5, 64, 10.0)
