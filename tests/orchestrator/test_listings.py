"""`longstride presets` and `longstride settings`: complete, true, and one line an entry where a program reads them."""

from __future__ import annotations

import io
from typing import Literal

import pytest
import yaml
from pydantic import BaseModel, Field
from rich.console import Console

from longstride.models import ModelConfig, build_model, list_presets, load_preset
from longstride.orchestrator.cli import main
from longstride.orchestrator.tables import show
from longstride.workers import Experiment
from longstride.workers.configuration import Tree
from longstride.workers.meanings import Setting, settings_of


class Inner(BaseModel):
    """What is inside.

    Attributes:
        size: of the thing, over a line
            and another one.
        undocumented_elsewhere: told here.

    And no attribute: this.
    """

    size: int | None = Field(default=None, ge=1)
    undocumented_elsewhere: Literal["a", "b"] = "a"
    unexplained: float = 1e-5


class Outer(Inner):
    described: tuple[float, float] = Field(default=(0.5, 1.0), description="by its field")
    inner: Inner = Inner()


def test_meanings_come_from_the_classes() -> None:
    found = {setting.name: setting for setting in settings_of(Outer)}
    assert found["size"] == Setting("size", "int | null, >= 1", "null", "of the thing, over a line and another one")
    assert found["described"] == Setting("described", "[float, float]", "[0.5, 1.0]", "by its field")
    assert found["inner.undocumented_elsewhere"] == Setting("inner.undocumented_elsewhere", "a | b", "a", "told here")
    assert not found["unexplained"].meaning and not found["inner.unexplained"].meaning, "what the next test looks for"


def test_every_setting_has_a_meaning() -> None:
    settings = list(settings_of(Experiment))
    assert [setting.name for setting in settings if not setting.meaning] == []
    experiment = Experiment.model_validate({"model": "mamba-small"})
    names = {name for name, _ in leaves(experiment.model_dump(mode="json", exclude={"model"}))}
    assert names <= {setting.name for setting in settings}
    defaults = dict(leaves(experiment.model_dump(mode="json", exclude={"model", "run"})))
    listed = {setting.name: yaml.safe_load(setting.default) for setting in settings}
    assert defaults == {name: listed[name] for name in defaults}


def leaves(tree: Tree, prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found += leaves(value, f"{path}.") if isinstance(value, dict) and value else [(path, value)]
    return found


def test_settings_of_a_section_of_a_word_and_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "model.mamba"]) == 0
    title, _, header, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("model.mamba: A selective state space")
    assert header.split() == ["SETTING", "TYPE", "DEFAULT", "MEANING"]
    assert [line.split()[0] for line in lines] == [f"model.mamba.{name}" for name in type(load_mamba()).model_fields]
    assert main(["settings", "warm"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["train.warmup", "int,"]
    assert main(["settings", "trian"]) == 2
    assert capsys.readouterr().err == "longstride: no setting is called 'trian'; did you mean train?\n"


def load_mamba() -> BaseModel:
    return load_preset("mamba-small").mamba


def test_presets_are_listed_with_their_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert sorted(lines) == list_presets()
    assert lines["mixtral-8x7b"][1:5] == ["46.7B", "12.9B", "32,000", "any"], "as published: 46.7B, 12.9B a token"
    assert lines["jamba-v0.1"][5:] == ["28", "mamba,", "4", "attention;", "16", "with", "moe"]
    assert lines["hyena-small"][4] == "8,192"


def test_a_preset_is_printed_as_a_config_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "hybrid-small"]) == 0
    config = ModelConfig.model_validate(yaml.safe_load(capsys.readouterr().out))
    assert config == load_preset("hybrid-small")
    assert build_model(config, device="meta").num_parameters() == 282_912
    assert main(["presets", "hybrid-smal"]) == 2
    assert "did you mean 'hybrid-small'?" in capsys.readouterr().err


def test_a_terminal_wraps_and_a_pipe_does_not() -> None:
    rows = [("a.b", "[int, ...]", "a meaning that goes on for longer than the terminal is wide")]
    texts = []
    for terminal in (True, False):
        file = io.StringIO()
        show(
            ("SETTING", "TYPE", "MEANING"),
            rows,
            Console(file=file, force_terminal=terminal, width=48, color_system=None),
        )
        texts.append(file.getvalue().splitlines())
    wrapped, plain = texts
    assert len(wrapped) > 3 and max(len(line.rstrip()) for line in wrapped) <= 48
    assert " ".join(line[21:].strip() for line in wrapped[1:]) == rows[0][-1]
    assert plain[1] == "a.b      [int, ...]  " + rows[0][-1]
