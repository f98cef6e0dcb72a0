"""The layouts that are known: one line each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from .checkpoint import CONFIG_FILE, read_config
from .evo2 import Evo2
from .files import InterchangeError
from .jamba import Jamba
from .layout import Layout, foreign_layers, listed, misfits, parse_config
from .llama import Llama
from .mamba import HuggingFaceMamba
from .mamba2 import HuggingFaceMamba2
from .mixtral import Mixtral
from .rwkv import HuggingFaceRWKV
from .state_spaces import StateSpaces
from .striped_hyena import StripedHyena7B

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        HuggingFaceMamba(),
        HuggingFaceMamba2(),
        StateSpaces(),
        HuggingFaceRWKV(),
        Llama(),
        Mixtral(),
        Jamba(),
        StripedHyena7B(),
        Evo2(),
    )
}


def identify(config: Mapping[str, Any], directory: str | Path) -> tuple[Layout, ModelConfig]:
    """The layout of a config.json, and the model that it describes. InterchangeError: none, or not one of ours."""
    origin = str(Path(directory) / CONFIG_FILE)
    for layout in LAYOUTS.values():
        if layout.recognises(config):
            return layout, parse_config(layout, config, origin)
    kind = config.get("model_type", "not given")
    raise InterchangeError(f"{origin} is in no known layout (model_type {kind}); known are {', '.join(LAYOUTS)}")


def load_config(directory: str | Path) -> ModelConfig:
    """The description of the model that a checkpoint holds; no tensor is touched. InterchangeError as `load_into`."""
    return identify(read_config(Path(directory)), directory)[1]


def alternatives(config: ModelConfig, asked: str) -> str:
    """Which layouts can hold a model that the one asked for cannot; where none can, why the nearest does not."""
    found = {name: misfits(layout, config) for name, layout in LAYOUTS.items()}
    fitting = [name for name, reasons in found.items() if not reasons]
    if fitting:
        return f"{' or '.join(fitting)} can hold it"
    distance = {name: (len(foreign_layers(LAYOUTS[name], config)), len(found[name]), name != asked) for name in LAYOUTS}
    nearest = min(LAYOUTS, key=lambda name: distance[name])
    others = f"nor as any other ({', '.join(name for name in LAYOUTS if name != asked)})"
    return others if nearest == asked else f"{others}, of which {nearest} is nearest: {listed(found[nearest])}"
