"""Descriptions of models: what is refused, and how it is said."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from longstride.models import ConfigError, ModelConfig, build_model, list_presets, load_preset

GOOD: dict[str, Any] = {"vocab_size": 256, "width": 16, "layers": "[mamba, attention+moe] x 2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widht": 3}, "unknown key 'widht'; did you mean 'width'?"),
        ({"mamab": {}}, "unknown key 'mamab'; did you mean 'mamba'?"),
        ({"mamba": {"stat": 8}}, "unknown key 'mamba.stat'; did you mean 'state'?"),
        ({"moe": {"expert": 8}}, "unknown key 'moe.expert'; did you mean 'experts'?"),
        ({"moe": {"zzzzzz": 8}}, "unknown key 'moe.zzzzzz'; known here are balance, balance_loss, bias_speed, experts"),
        ({"width": "wide"}, "width: input should be a valid integer, unable to parse string as an integer, not 'wide'"),
        ({"width": 0}, "width: input should be greater than or equal to 1, not 0"),
        ({"embedding_dropout": 1}, "embedding_dropout: input should be less than 1, not 1"),
        ({"mlp": {"kind": "relu"}}, "mlp.kind: input should be 'swiglu', 'geglu', 'bilinear' or 'gelu', not 'relu'"),
        ({"moe": {"experts": 2, "top_k": 3}}, "moe.top_k 3 exceeds moe.experts 2"),
        ({"layers": "[mamba, atention]"}, "unknown mixer 'atention'; did you mean 'attention'?"),
        ({"norm_eps": -1, "width": -1}, "(and 1 more)"),
    ],
)
def test_faults_are_one_line_with_the_key_and_the_fix(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ModelConfig.parse({**GOOD, **change})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="vocab_size is required"):
        ModelConfig.parse({"width": 16, "layers": "[mamba]"})


def test_plain_validation_refuses_the_same() -> None:
    with pytest.raises(ValidationError):
        ModelConfig.model_validate({**GOOD, "widht": 3})


def test_a_config_survives_its_own_dump() -> None:
    config = ModelConfig.parse(GOOD)
    assert ModelConfig.parse(config.model_dump()) == config


def test_number_of_experts_that_degrees_must_divide() -> None:
    assert ModelConfig.parse({**GOOD, "layers": "[mamba]"}).num_experts == 0
    assert ModelConfig.parse({**GOOD, "moe": {"experts": 6}}).num_experts == 6
    mixed = "mamba+moe(experts=8), mamba+moe(experts=12), mamba"
    assert ModelConfig.parse({**GOOD, "layers": mixed}).num_experts == 4


def test_presets_are_found_by_name() -> None:
    small = {"hybrid-small", "hyena-small", "mamba-small", "transformer-small"}
    assert small <= set(list_presets())
    with pytest.raises(ConfigError, match="unknown model preset 'mamba-smal'; did you mean 'mamba-small'"):
        load_preset("mamba-smal")
    with pytest.raises(ConfigError, match="unknown model preset"):
        build_model("nothing-like-it")
