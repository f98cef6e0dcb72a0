"""The language of a schedule of contexts, and the stages that follow from it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from longstride.data import DataConfig, Stage
from longstride.data.schedule import parse_length, parse_schedule


@pytest.mark.parametrize(("text", "tokens"), [("8192", 8192), ("8k", 8192), ("1M", 1048576), (" 64 k ", 65536)])
def test_lengths(text: str, tokens: int) -> None:
    assert parse_length(text) == tokens
    assert DataConfig.model_validate({"context": text}).context == tokens


@pytest.mark.parametrize(
    "text",
    ["8k for 1000 steps, then 64k for 500 steps", "8k for 1000, 64k for 500", "8192 for 1000 then 65536 for 500 steps"],
)
def test_ways_to_write_a_schedule(text: str) -> None:
    assert parse_schedule(text) == ((8192, 1000), (65536, 500))


def test_stages_keep_the_tokens_of_a_step() -> None:
    data = DataConfig.model_validate(
        {"context": "1M", "batch": 2, "schedule": "8k for 1000 steps, then 64k for 500 steps"}
    )
    assert data.stages(2000) == (
        Stage(8192, 256, 0, 1000),
        Stage(65536, 32, 1000, 1500),
        Stage(1048576, 2, 1500, 2000),
    )
    assert DataConfig().stages(7) == (Stage(8192, 1, 0, 7),)
    assert DataConfig.model_validate(data.model_dump(mode="json")) == data


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "8q for 3"}, "'8q for 3' is no stage"),
        ({"schedule": "8k for 3, then 64k, then 1M"}, "'64k' has no number of steps"),
        ({"schedule": "8k for 3, then 1M"}, "which lasts until train.steps, is data.context"),
        ({"schedule": "0 for 3"}, "must be at least 1"),
        ({"schedule": ""}, "is no stage"),
        ({"context": "many"}, "'many' is no number of tokens; write it as 8192, 8k or 1M"),
    ],
)
def test_what_is_no_schedule(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(settings)


def test_stages_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="3000 does not divide the 8192 tokens of a step"):
        DataConfig(schedule="3000 for 2 steps").stages(10)
    with pytest.raises(ValueError, match=r"take 10 steps and leave none of train\.steps=10.*above 10"):
        DataConfig(schedule="1k for 10 steps").stages(10)
