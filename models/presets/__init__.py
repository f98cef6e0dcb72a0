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
    """The description of preset `name`. ConfigError as of `preset_text`."""
    return ModelConfig.parse(yaml.safe_load(preset_text(name)))


def preset_text(name: str) -> str:
    """The file of preset `name`: what a config's `model:` may hold in its place, and where it is from.

    Raises:
        ConfigError: no preset of this name; the nearest is named.
    """
    names = list_presets()
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`longstride presets` lists them"
        raise ConfigError(f"unknown model preset {name!r}; {hint}")
    return resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
