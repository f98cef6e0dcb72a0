"""The layer plan language: which layers a model has, short enough for one line of a config.

    [conba, conba+moe, conba, attention+moe, attention, conba+moe, conba, conba+moe] x 4

A layer is a mixer, and after `+` what follows it in the block: `mlp`, `moe`, or `none`; without `+`, the config's
`feed_forward`. Options of one layer stand in parentheses and override the config's: `attention(heads=4)+moe(top_k=1)`.
Lists nest, and anything can be repeated: `[mamba x 3, attention] x 2`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import yaml


class PlanError(ValueError):
    """A layer plan that cannot be read: one line with the place and the nearest name."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer: names of its parts and the options that differ from the config's. `feed_forward` None: default."""

    mixer: str
    feed_forward: str | None = None
    mixer_options: dict[str, Any] = field(default_factory=dict)
    feed_forward_options: dict[str, Any] = field(default_factory=dict)


def parse_plan(text: str, mixers: Sequence[str], feed_forwards: Sequence[str]) -> tuple[LayerPlan, ...]:
    """Read a plan.

    Args:
        mixers, feed_forwards: the names that may occur; `none` may too, after `+`.

    Raises:
        PlanError: a name that is not among them, or text that is no plan.
    """
    parser = _Parser(text, tuple(mixers), (*feed_forwards, "none"))
    layers = parser.sequence()
    if parser.peek():
        raise parser.error(f"expected ',' or the end, found {parser.peek()!r}")
    return tuple(layers)


_TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_-]*|\d+|\S|$)")
_REPEAT = re.compile(r"\s*[x×*]\s*(\d+)(?![A-Za-z0-9_-])")  # noqa: RUF001


class _Parser:
    """Recursive descent; `at` is the index of the next character."""

    def __init__(self, text: str, mixers: tuple[str, ...], feed_forwards: tuple[str, ...]) -> None:
        self.text, self.at = text, 0
        self.mixers, self.feed_forwards = mixers, feed_forwards

    def peek(self) -> str:
        match = _TOKEN.match(self.text, self.at)
        assert match is not None
        return match.group(1)

    def take(self) -> str:
        match = _TOKEN.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return match.group(1)

    def expect(self, token: str, opened: str) -> None:
        if self.peek() != token:
            found = repr(self.peek()) if self.peek() else "the end"
            raise self.error(f"expected ',' or {token!r} to close {opened!r}, found {found}")
        self.take()

    def sequence(self) -> list[LayerPlan]:
        layers = self.item()
        while self.peek() == ",":
            self.take()
            if self.peek() == "]":
                break
            layers = layers + self.item()
        return layers

    def item(self) -> list[LayerPlan]:
        if self.peek() == "[":
            self.take()
            layers = self.sequence()
            self.expect("]", "[")
        else:
            layers = [self.layer()]
        while repeat := _REPEAT.match(self.text, self.at):
            if int(repeat.group(1)) < 1:
                raise self.error("a repeat count must be at least 1")
            self.at = repeat.end()
            layers = layers * int(repeat.group(1))
        return layers

    def layer(self) -> LayerPlan:
        mixer, mixer_options = self.part("mixer", self.mixers)
        if self.peek() != "+":
            return LayerPlan(mixer, None, mixer_options)
        self.take()
        feed_forward, options = self.part("feed-forward layer", self.feed_forwards)
        return LayerPlan(mixer, feed_forward, mixer_options, options)

    def part(self, what: str, names: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
        written = self.peek()
        if not re.match(r"[A-Za-z_]", written):
            raise self.error(f"expected the name of a {what}, found {repr(written) if written else 'the end'}")
        name = written.replace("-", "_")
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
            raise self.error(f"unknown {what} {written!r}; {hint}")
        self.take()
        return name, self.options() if self.peek() == "(" else {}

    def options(self) -> dict[str, Any]:
        self.take()
        end = self.text.find(")", self.at)
        if end < 0:
            raise self.error("expected ')' to close '('")
        options: dict[str, Any] = {}
        for pair in filter(str.strip, self.text[self.at : end].split(",")):
            key, equals, value = pair.partition("=")
            if not equals or not key.strip():
                raise self.error(f"expected option=value, found {pair.strip()!r}")
            options[key.strip()] = yaml.safe_load(value)
        self.at = end + 1
        return options

    def error(self, message: str) -> PlanError:
        rest = self.text[self.at :]
        place = self.at + len(rest) - len(rest.lstrip()) + 1
        return PlanError(f"layers: {message}, at character {place} of {self.text!r}")


def write_layers(layers: Sequence[LayerPlan]) -> str:
    """A plan that `parse_plan` reads as these layers."""
    return "[" + ", ".join(_write_layer(layer) for layer in layers) + "]"


def _write_layer(layer: LayerPlan) -> str:
    second = [] if layer.feed_forward is None else [(layer.feed_forward, layer.feed_forward_options)]
    return "+".join(name + _write_options(options) for name, options in [(layer.mixer, layer.mixer_options), *second])


def _write_options(options: dict[str, Any]) -> str:
    pairs = ", ".join(f"{name}={json.dumps(value)}" for name, value in options.items())
    return f"({pairs})" if pairs else ""
