"""What a layout is: how one family's checkpoints are described in config.json and how their tensors are named.

Each layout is one file beside this one. What a config says and this package does not know is an error, never a guess.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..config import ModelConfig
from ..language_model import LanguageModel
from ..mixers.base import Options
from ..mlp import default_hidden
from ..registry import FEED_FORWARDS, MIXERS
from .files import InterchangeError
from .mapping import TensorMap

TRAINING_ONLY = {
    "mamba": {"dt_min", "dt_max"},
    "mamba2": {"dt_min", "dt_max"},
    "moe": {"balance_loss", "z_loss", "bias_speed"},
    "hyena_mr": {"slowest"},
}
"""Options that change how a model begins, is penalised or keeps its numbers, and not what it computes."""
LISTED = 3
"""Of several things that are wrong, so many are told."""
NOT_COMPARED = {
    "layers",
    "feed_forward",
    "init_std",
    "embedding_std",
    "embedding_dropout",
    "head_gain",
    "recompute",
    "logit_pull",
    *MIXERS,
    *FEED_FORWARDS,
}
"""Of the whole description: the same kind, and what is compared layer by layer."""


class Layout(ABC):
    """One way to store one family of models."""

    name: str
    mixers: tuple[str, ...]
    feed_forwards: tuple[str, ...]
    """What its layers can be made of; "none": nothing after the mixer."""
    prefix = ""
    """Before every key as written; it may be absent where it is read."""

    @abstractmethod
    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether this config.json belongs to the layout."""

    @abstractmethod
    def read_config(self, stored: Stored) -> dict[str, Any]:
        """What a `ModelConfig` must be given. InterchangeError: something is asked for that models here cannot do."""

    @abstractmethod
    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """config.json of a model of this kind; whether it is one is found out by reading it back."""

    @abstractmethod
    def map_tensors(self, config: ModelConfig, tensors: TensorMap) -> None:
        """Add the pieces of every parameter, in the order in which they are to be written."""


class Stored:
    """A config.json being read: values with their defaults, and refusals of what is not supported."""

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self.values, self.origin = values, origin

    def get(self, key: str, default: Any = None) -> Any:
        """The value; the default also where it is null."""
        value = self.values.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise InterchangeError(f"{self.origin} has no {key}")
        return self.values[key]

    def only(self, key: str, *supported: Any, default: Any = None) -> None:
        """Refuse any value but these; without a default the first is what an absent key means."""
        value = self.values.get(key, supported[0] if default is None else default)
        if value not in supported:
            raise self.unsupported(key, value, " or ".join(str(each) for each in supported))

    def unsupported(self, key: str, value: object, supported: str) -> InterchangeError:
        return InterchangeError(f"{self.origin}: {key}={value} is not supported; only {supported} is")


def parse_config(layout: Layout, values: Mapping[str, Any], origin: str) -> ModelConfig:
    """The model that a config.json describes."""
    return ModelConfig.parse(layout.read_config(Stored(values, origin)))


def write_config(layout: Layout, config: ModelConfig) -> dict[str, Any]:
    """config.json for a model. InterchangeError, with what differs, if it is not of the layout's kind."""
    if found := misfits(layout, config):
        raise InterchangeError(f"the model cannot be stored as {layout.name}: {listed(found)}")
    return layout.write_config(config)


def misfits(layout: Layout, config: ModelConfig) -> list[str]:
    """Why the layout cannot hold a model, a phrase each; empty where it can."""
    if foreign := foreign_layers(layout, config):
        return [f"it has layers that {layout.name} has not, {listed(foreign, ', ')}"]
    try:
        return differences(config, parse_config(layout, layout.write_config(config), layout.name))
    except InterchangeError as error:
        return [str(error)]


def foreign_layers(layout: Layout, config: ModelConfig) -> list[str]:
    """Kinds of layers of a model, such as hyena+moe, that the layout does not know."""
    kinds = {f"{layer['mixer']}+{layer['feed_forward']}": layer for layer in layer_options(config)}
    return [
        kind
        for kind, layer in kinds.items()
        if layer["mixer"] not in layout.mixers or layer["feed_forward"] not in layout.feed_forwards
    ]


def listed(phrases: Sequence[str], between: str = "; ") -> str:
    """The first few of them, and how many there are beside."""
    more = len(phrases) - LISTED
    return between.join([*phrases[:LISTED], *([f"and {more} more"] if more > 0 else [])])


def tensor_map(layout: Layout, config: ModelConfig) -> TensorMap:
    """Where every parameter of the described model is stored."""
    with torch.device("meta"):
        model = LanguageModel(config)
    tensors = TensorMap({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    layout.map_tensors(config, tensors)
    tensors.check()
    return tensors


def differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """In what two descriptions compute differently: a phrase each, layers alike in one; empty for the same model."""
    found = [
        f"{key} is {getattr(ours, key)} here and {getattr(theirs, key)} there"
        for key in ModelConfig.model_fields
        if key not in NOT_COMPARED and getattr(ours, key) != getattr(theirs, key)
    ]
    if len(ours.plan) != len(theirs.plan):
        return [*found, f"{len(ours.plan)} layers here and {len(theirs.plan)} there"]
    layers: dict[str, list[int]] = {}
    for index, (mine, other) in enumerate(zip(layer_options(ours), layer_options(theirs), strict=True)):
        unequal = [key for key in {**mine, **other} if mine.get(key) != other.get(key)]
        if unequal:
            kinds = [key for key in unequal if "." not in key]  # where these differ, all options do
            values = [f"{key} is {mine.get(key)} here and {other.get(key)} there" for key in kinds or unequal]
            layers.setdefault(", ".join(values), []).append(index)
    return [*found, *(f"{_numbered(indices)}: {values}" for values, indices in layers.items())]


def _numbered(indices: Sequence[int]) -> str:
    if len(indices) == 1:
        return f"layer {indices[0]}"
    return f"layers {', '.join(str(index) for index in indices[:LISTED])}" + (", ..." if len(indices) > LISTED else "")


def layer_options(config: ModelConfig) -> list[dict[str, Any]]:
    """Of every layer: its parts by name, and every option (`part.option`) that changes what they compute."""
    layers: list[dict[str, Any]] = []
    for layer in config.plan:
        kind, second = layer.feed_forward or config.feed_forward, config.feed_forward_options(layer)
        parts = {layer.mixer: config.mixer_options(layer), **({kind: second} if second is not None else {})}
        options = {
            f"{part}.{name}": value
            for part, own in parts.items()
            for name, value in resolved(config, part, own).items()
        }
        layers.append({"mixer": layer.mixer, "feed_forward": kind, **options})
    return layers


def resolved(config: ModelConfig, kind: str, options: Options) -> dict[str, Any]:
    """Options by name, with the numbers in place of the defaults that follow from the width."""
    values = {name: value for name, value in options.model_dump().items() if name not in TRAINING_ONLY.get(kind, ())}
    defaults: dict[str, Any] = {}
    if kind == "attention":
        head_dim = values["head_dim"] or config.width // values["heads"]
        defaults = {"kv_heads": values["heads"], "head_dim": head_dim, "rotary_dim": head_dim}
    elif kind == "mamba":
        defaults = {"dt_rank": -(-config.width // 16)}
    elif kind in ("hyena_se", "hyena_mr"):
        defaults = {"groups": config.width}
    elif kind == "channel_mix":
        defaults = {"hidden": 4 * config.width}
    elif kind in ("mlp", "moe"):
        defaults = {"hidden": default_hidden(config.width, gated=values.get("kind") != "gelu")}
    return values | {name: value for name, value in defaults.items() if values[name] is None}


def write_plan(layers: Sequence[str]) -> str:
    """A layer plan in its shortest form: the pattern that repeats, and how often."""
    for period in range(1, len(layers) + 1):
        pattern, times = list(layers[:period]), len(layers) // period
        if pattern * times == list(layers):
            break
    else:
        return "[]"
    return f"[{', '.join(pattern)}]" + (f" x {times}" if times > 1 else "")


def first_of(config: ModelConfig, kind: str) -> dict[str, Any]:
    """The resolved options of the first layer that has a part of this kind; empty without one."""
    for layer in config.plan:
        options = config.feed_forward_options(layer)
        if layer.mixer == kind:
            return resolved(config, kind, config.mixer_options(layer))
        if options is not None and kind == (layer.feed_forward or config.feed_forward):
            return resolved(config, kind, options)
    return {}


def group_of(config: ModelConfig, kind: str) -> dict[str, Any]:
    """The config's own options of a kind, resolved."""
    return resolved(config, kind, getattr(config, kind))
