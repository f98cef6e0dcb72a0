"""The layer plan language."""

from __future__ import annotations

import pytest

from longstride.models import ConfigError, ModelConfig, PlanError
from longstride.models.plan import LayerPlan, parse_plan, write_layers

MIXERS = ("attention", "conba", "linear_attention", "mamba", "x_layer")
FEED_FORWARDS = ("mlp", "moe")


def names(text: str) -> str:
    layers = parse_plan(text, MIXERS, FEED_FORWARDS)
    return " ".join(layer.mixer + (f"+{layer.feed_forward}" if layer.feed_forward else "") for layer in layers)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mamba", "mamba"),
        ("[mamba]", "mamba"),
        ("[mamba] x 3", "mamba mamba mamba"),
        ("mamba x3", "mamba mamba mamba"),
        ("mamba*2, attention", "mamba mamba attention"),
        ("[mamba+moe, attention] x 2", "mamba+moe attention mamba+moe attention"),
        ("[mamba x 2, [attention+none] x 2,] x 2", "mamba mamba attention+none attention+none " * 2),
        ("[[mamba] x 2] x 2 x 2", "mamba " * 8),
        ("linear-attention+mlp", "linear_attention+mlp"),
        ("x_layer x 2", "x_layer x_layer"),
        ("  [ mamba ,\n attention + moe ]  ", "mamba attention+moe"),
        (
            "[conba, conba+moe, conba, attention+moe, attention, conba+moe, conba, conba+moe] x 4",
            "conba conba+moe conba attention+moe attention conba+moe conba conba+moe " * 4,
        ),
    ],
)
def test_plans(text: str, expected: str) -> None:
    assert names(text) == expected.strip()


def test_options_of_one_layer() -> None:
    (layer,) = parse_plan("mamba(state=8, bias=true)+moe(top_k = 1)", MIXERS, FEED_FORWARDS)
    assert layer == LayerPlan("mamba", "moe", {"state": 8, "bias": True}, {"top_k": 1})


def test_a_plan_is_written_as_it_is_read() -> None:
    text = "[mamba(state=8, bias=true, dt_rank=null), linear-attention+moe(top_k=1, kind=gelu), attention+none] x 2"
    layers = parse_plan(text, MIXERS, FEED_FORWARDS)
    assert parse_plan(write_layers(layers), MIXERS, FEED_FORWARDS) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[mmaba, attention]", "unknown mixer 'mmaba'; did you mean 'mamba'?, at character 2"),
        ("[mamba, attentoin]", "did you mean 'attention'?, at character 9"),
        ("mamba+mo", "unknown feed-forward layer 'mo'; did you mean 'moe'?, at character 7"),
        ("mamba+zzzzz", "known are mlp, moe, none, at character 7"),
        ("[mamba", "expected ',' or ']' to close '[', found the end, at character 7"),
        ("[mamba attention]", "expected ',' or ']' to close '[', found 'attention', at character 8"),
        ("mamba]", "expected ',' or the end, found ']', at character 6"),
        ("mamba x 0", "repeat count must be at least 1, at character 7"),
        ("mamba x", "found 'x', at character 7"),
        ("", "expected the name of a mixer, found the end, at character 1"),
        ("[]", "expected the name of a mixer, found ']', at character 2"),
        ("mamba+", "expected the name of a feed-forward layer, found the end"),
        ("mamba(state=3", "expected ')' to close '('"),
        ("mamba(state)", "expected option=value, found 'state'"),
        ("3 x mamba", "expected the name of a mixer, found '3', at character 1"),
    ],
)
def test_errors_say_where_and_what(text: str, message: str) -> None:
    with pytest.raises(PlanError) as raised:
        parse_plan(text, MIXERS, FEED_FORWARDS)
    assert message in str(raised.value)
    assert str(raised.value).count("\n") == 0


def test_a_config_reads_lists_and_checks_options_of_layers() -> None:
    config = ModelConfig.parse({"vocab_size": 9, "width": 8, "layers": ["mamba", "attention+moe"]})
    assert [layer.mixer for layer in config.plan] == ["mamba", "attention"]
    config = ModelConfig.parse({"vocab_size": 9, "width": 8, "layers": "mamba(state=2), mamba", "mamba": {"conv": 3}})
    first, second = (config.mixer_options(layer).model_dump() for layer in config.plan)
    assert (first["state"], first["conv"]) == (2, 3)
    assert (second["state"], second["conv"]) == (16, 3)
    with pytest.raises(ConfigError, match=r"unknown key 'mamba\.stat'; did you mean 'state'\?"):
        ModelConfig.parse({"vocab_size": 9, "width": 8, "layers": "mamba(stat=2)"})
