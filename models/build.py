"""From a description to a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .config import ConfigError, ModelConfig
from .language_model import LanguageModel
from .parameters import initialise
from .presets import load_preset


def build_model(
    config_or_preset: ModelConfig | Mapping[str, Any] | str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """Build a model and give its parameters their initial values.

    Args:
        config_or_preset: a description, or a preset's name.
        seed: initial values depend on it and on nothing else.
        dtype: of the parameters; the values are those of float32, rounded or widened.
        device: "meta" gives shapes without memory or values.

    Raises:
        ConfigError: no such preset, or a description that is no model.
    """
    config = config_or_preset
    if isinstance(config, str):
        config = load_preset(config)
    elif not isinstance(config, ModelConfig):
        config = ModelConfig.parse(config)
    try:
        with torch.device("meta"):
            model = LanguageModel(config).to(dtype)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        initialise(model, seed)
    return model
