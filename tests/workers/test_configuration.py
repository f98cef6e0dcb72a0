"""YAML and overrides to settings: what is refused, and with which words."""

import pytest
from pydantic import Field

from longstride.workers.configuration import ConfigError, Settings, apply_overrides, parse_yaml, validate


class Inner(Settings):
    learning_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)


class Outer(Settings):
    steps: int = Field(default=10, ge=1)
    name: str | None = None
    train: Inner = Inner()


def test_overrides_are_typed_as_yaml_and_leave_the_original_alone() -> None:
    tree = {"train": {"learning_rate": 1.0}}
    result = apply_overrides(tree, ["steps=5", "train.learning_rate=3e-4", "train.betas=[0.8, 0.9]", "name=null"])
    outer = validate(Outer, result)
    assert (outer.steps, outer.train.learning_rate, outer.train.betas, outer.name) == (5, 3e-4, (0.8, 0.9), None)
    assert tree == {"train": {"learning_rate": 1.0}}


def test_a_later_override_wins_and_sections_are_made() -> None:
    assert apply_overrides({}, ["train.x=1", "train.x=2"]) == {"train": {"x": 2}}
    assert apply_overrides({"train": None}, ["train.x=1"]) == {"train": {"x": 1}}


def test_expand_turns_a_value_into_a_section_only_where_an_override_reaches_into_it() -> None:
    expand = lambda path, value: {"preset": value} if path == "model" else None  # noqa: E731
    assert apply_overrides({"model": "small"}, ["model.width=3"], expand) == {"model": {"preset": "small", "width": 3}}
    assert apply_overrides({"model": "small"}, ["steps=3"], expand) == {"model": "small", "steps": 3}
    with pytest.raises(ConfigError, match="name is a value, not a section"):
        apply_overrides({"name": "small"}, ["name.width=3"], expand)


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"stepz": 3}, "unknown setting stepz; did you mean steps?"),
        ({"train": {"learning_rte": 3}}, "unknown setting train.learning_rte; did you mean train.learning_rate?"),
        ({"learning_rate": 3}, "unknown setting learning_rate; did you mean train.learning_rate?"),
        ({"train": {"betas": 3}}, "train.betas=3: the value should be a list, as in [1, 2]"),
        ({"train": {"zzz": 3}}, "unknown setting train.zzz; train has learning_rate, betas"),
        ({"steps": "many"}, "steps='many': the value should be a valid integer"),
        ({"steps": 0}, "steps=0: the value should be greater than or equal to 1"),
        ({"train": {"betas": [0.9]}}, "train.betas.1"),
    ],
)
def test_mistakes_are_one_line_with_the_path(tree: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Outer, tree)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1", "cfg.yaml line"),
        ("a:\n\tb: 1", "line 2: .*indent with spaces"),
        ("a: 1\na: 2", "the key 'a' is given twice"),
        ("- 1", "expected keys and values, found a list"),
        ("a: !!python/object/apply:os.system [true]", "not valid YAML"),
    ],
)
def test_yaml_that_is_refused(text: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        parse_yaml(text, "cfg.yaml")
    assert "\n" not in str(caught.value)


def test_empty_yaml_is_no_settings() -> None:
    assert parse_yaml("# nothing\n", "cfg.yaml") == {}


@pytest.mark.parametrize("override", ["steps", "=3", "train..x=1", ".steps=1"])
def test_an_override_needs_a_key_and_a_value(override: str) -> None:
    with pytest.raises(ConfigError, match="not of the form key=value"):
        apply_overrides({}, [override])
