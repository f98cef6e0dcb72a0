"""The description of a model: what a preset file or an experiment's `model:` section says.

Options of mixers and feed-forward layers live beside them and are composed here through `registry`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .feed_forward import FeedForwardOptions
from .mixers.base import MixerOptions, Options
from .plan import LayerPlan, parse_plan
from .registry import FEED_FORWARDS, MIXERS, FeedForwardGroups, MixerGroups

T = TypeVar("T", bound=Options)


class ConfigError(ValueError):
    """A description that is no model: one line with the key, the value and the fix."""


class ModelConfig(MixerGroups, FeedForwardGroups):
    """A language model.

    Attributes:
        vocab_size: number of token ids.
        width: features of a token in the residual stream.
        layers: the layer plan, such as "[mamba x 3, attention(heads=4)+moe] x 2": of each layer its mixer, and after +
            what follows it; see `plan`.
        feed_forward: what a layer of the plan has after its mixer where it does not say.
        norm: before each half of a block and after the last block; "rms_outer" adds `norm_eps`
            outside the root (Evo 2).
        norm_eps: added to what a norm divides by, under the root.
        embedding_norm: a norm after the embedding as well (RWKV).
        embedding_dropout: in training this share of what enters the first block is dropped, chosen by `dropout`: the
            same numbers on every mesh.
        tie_embeddings: the output layer is the embedding.
        init_std: standard deviation of the embedding and of weights whose family says no better.
        embedding_std: that of the embedding where it differs.
        logit_pull: adds half of this times the mean square of each token's largest logit to the loss, so that logits
            stay small (RWKV-4: 1e-4).
        head_gain: the output layer begins orthogonal with this gain (RWKV: 0.5) and not normal.
        recompute: recompute each block's activations in the backward pass instead of keeping them: the same
            numbers, less memory, a third more time.

    Beside these, options of the layers, one group a kind: `attention`, `hyena`, `mamba`, ..., `mlp`, `moe`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: int = Field(ge=1)
    width: int = Field(ge=1)
    layers: str
    feed_forward: Literal["mlp", "moe", "channel_mix", "none"] = "mlp"
    norm: Literal["rms", "rms_outer", "layer"] = "rms"
    norm_eps: float = Field(default=1e-5, gt=0)
    embedding_norm: bool = False
    embedding_dropout: float = Field(default=0.0, ge=0, lt=1)
    tie_embeddings: bool = True
    init_std: float = Field(default=0.02, gt=0)
    embedding_std: float | None = Field(default=None, gt=0)
    head_gain: float | None = Field(default=None, gt=0)
    logit_pull: float = Field(default=0.0, ge=0)
    recompute: bool = False

    @field_validator("layers", mode="before")
    @classmethod
    def _from_list(cls, value: object) -> object:
        # YAML reads an unquoted [a, b+c] as a list
        return "[" + ", ".join(str(item) for item in value) + "]" if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check_plan(self) -> ModelConfig:
        for layer in self.plan:
            self.mixer_options(layer)
            self.feed_forward_options(layer)
        return self

    @cached_property
    def plan(self) -> tuple[LayerPlan, ...]:
        """The layers, in order."""
        return parse_plan(self.layers, MIXERS, FEED_FORWARDS)

    @property
    def idle_groups(self) -> set[str]:
        """The groups of options, all as by default, of mixers and feed-forward layers that are not in the plan."""
        at_work = {name for layer in self.plan for name in (layer.mixer, layer.feed_forward or self.feed_forward)}
        others = {*MIXERS, *FEED_FORWARDS} - at_work
        return {name for name in others if getattr(self, name) == type(getattr(self, name))()}

    def mixer_options(self, layer: LayerPlan) -> MixerOptions:
        """The config's options for this layer's mixer with the layer's own laid over."""
        return _overridden(getattr(self, layer.mixer), layer.mixer, layer.mixer_options)

    def feed_forward_options(self, layer: LayerPlan) -> FeedForwardOptions | None:
        """The same for what follows the mixer; None where nothing does."""
        kind = layer.feed_forward or self.feed_forward
        return None if kind == "none" else _overridden(getattr(self, kind), kind, layer.feed_forward_options)

    @property
    def num_experts(self) -> int:
        """The greatest common divisor of the layers' numbers of experts, 0 without any: degrees must divide it."""
        groups = [self.feed_forward_options(layer) for layer in self.plan]
        return math.gcd(*(int(getattr(group, "experts", 0)) for group in groups))

    @classmethod
    def parse(cls, description: Mapping[str, Any]) -> ModelConfig:
        """Read a description.

        Raises:
            ConfigError: an unknown key, a wrong value or an impossible combination, in one line.
        """
        try:
            return cls.model_validate(dict(description))
        except ValidationError as error:
            raise ConfigError(one_line(error, cls)) from None


def _overridden(options: T, name: str, changes: dict[str, Any]) -> T:
    if not changes:
        return options
    try:
        return type(options).model_validate({**options.model_dump(), **changes})
    except ValidationError as error:
        raise ConfigError(f"layers: {one_line(error, type(options), prefix=name)}") from None


def one_line(error: ValidationError, root: type[BaseModel], prefix: str = "") -> str:
    """The first fault of a pydantic error as one line: dotted key, what is wrong, and the nearest valid key."""
    fault = error.errors()[0]
    place = [str(part) for part in fault["loc"]]
    key = ".".join(filter(None, [prefix, *place]))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if fault["type"] == "extra_forbidden":
        names = _keys_beside(root, place)
        near = get_close_matches(place[-1], names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here are {', '.join(sorted(names))}:"
        section = ".".join(["model", *key.split(".")[:-1]])
        return f"unknown key {key!r}; {hint} `longstride settings {section}` explains them{more}"
    if fault["type"] == "missing":
        return f"{key} is required{more}"
    context = fault.get("ctx", {})
    if "error" in context:
        return f"{context['error']}{more}"  # our own checks name their keys
    return f"{key}: {fault['msg'][0].lower()}{fault['msg'][1:]}, not {fault['input']!r}{more}"


def _keys_beside(root: type[BaseModel], place: list[str]) -> list[str]:
    model = root
    for part in place[:-1]:
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return list(model.model_fields)
