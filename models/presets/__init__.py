"""Models by name: each YAML file beside this one is a `ModelConfig`, and its name is the preset's."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import resources

import yaml

from ..config import ConfigError, ModelConfig


def list_presets() -> list[str]:
    """Names of all presets, sorted."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_preset(name: str) -> ModelConfig:
    """The description of preset `name`.

    Raises:
        ConfigError: no preset of this name; the nearest is named.
    """
    names = list_presets()
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
        raise ConfigError(f"unknown model preset {name!r}; {hint}")
    text = resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return ModelConfig.parse(yaml.safe_load(text))
