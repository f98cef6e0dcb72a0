"""Which parameters a run trains, and how fast: `train.rates` and `train.freeze`.

Both are patterns over the names of parameters, as shells match file names (`*` any letters, `?` one, `[0-3]` one of
these). Every parameter has a multiple of the run's learning rate: that of the last pattern in `train.rates` that
matches, or else the one its layer declares, as RWKV-4's decays do, or else 1. A multiple of 0 means that it is not
trained: no gradient, no moments, no weight decay. `train.freeze` comes after `train.rates` and gives 0.

What layers adapt without gradients, in buffers (experts' selection bias, Conba's gain), stays where it is too if a
pattern with 0 matches the buffer's name.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor, nn

from ..models.parameters import learning_rates
from .configuration import ConfigError

MOST_NAMED = 3  # names in a message


class Chosen(Protocol):
    """What `train` says of it; see `TrainConfig`."""

    @property
    def rates(self) -> Mapping[str, float]: ...
    @property
    def freeze(self) -> Sequence[str]: ...


def rate_multiples(model: nn.Module, config: Chosen) -> dict[str, float]:
    """By name, what of the learning rate every parameter of the model moves by; buffers that stay as they are have 0.

    Raises ConfigError: a pattern matches no parameter (and of those that give 0, no buffer), or nothing is trained.
    """
    parameters = dict(model.named_parameters())
    multiples = dict.fromkeys(parameters, 1.0) | learning_rates(model)
    buffers = [name for name, _ in model.named_buffers()]
    patterns = [("train.rates", pattern, multiple) for pattern, multiple in config.rates.items()]
    patterns += [("train.freeze", pattern, 0.0) for pattern in config.freeze]
    for key, pattern, multiple in patterns:
        matched = [name for name in (*parameters, *buffers) if fnmatchcase(name, pattern)]
        if not matched or (multiple and not parameters.keys() & matched):
            raise ConfigError(f"{key}: {pattern!r} matches no parameter of the model; {_alike(pattern, [*parameters])}")
        multiples |= dict.fromkeys(matched, multiple)
    if not any(multiples[name] for name in parameters):
        key = "train.freeze" if config.freeze else "train.rates"
        given = list(config.freeze) or config.rates
        raise ConfigError(f"{key}={given} leaves no parameter to train; take a pattern out")
    return multiples


def freeze(model: nn.Module, config: Chosen) -> None:
    """Ask for no gradients of the parameters that are not trained. Do it before the model is sharded.

    Raises ConfigError as `rate_multiples`.
    """
    multiples = rate_multiples(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(multiples[name] != 0)


def still_buffers(model: nn.Module, config: Chosen) -> list[Tensor]:
    """The buffers that no layer may adapt."""
    multiples = rate_multiples(model, config)
    return [buffer for name, buffer in model.named_buffers() if multiples.get(name) == 0]


@contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[None]:
    """What is done inside changes none of these tensors."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    yield
    with torch.no_grad():
        for tensor, before in kept:
            tensor.copy_(before)


def changed_set(before: Collection[str], trained: Collection[str], step: int) -> list[str]:
    """Lines for a person whose run goes on after `step` with other `trained` parameters than `before`."""
    lines = []
    if added := [name for name in trained if name not in before]:
        lines.append(
            f"trained from step {step + 1} on, with optimiser state that begins anew: {several(added)} "
            f"({len(added)} of {len(trained)} trained parameters)"
        )
    if dropped := sorted(set(before).difference(trained)):
        lines.append(f"frozen from step {step + 1} on, and their optimiser state is dropped: {several(dropped)}")
    return lines


def several(names: Sequence[str]) -> str:
    """Names for a message: all of a few, the first ones of many."""
    shown = ", ".join(names[:MOST_NAMED])
    return shown if len(names) <= MOST_NAMED else f"{shown} and {len(names) - MOST_NAMED} more"


def _alike(pattern: str, names: Sequence[str]) -> str:
    forms = dict.fromkeys(form for name in names for form in _forms(name))
    if close := difflib.get_close_matches(pattern, forms, n=MOST_NAMED):
        return f"what does and looks like it: {', '.join(close)}"
    return f"names are {several(names)}"


def _forms(name: str) -> Iterator[str]:
    """A parameter's name, and patterns that match it."""
    parts = name.split(".")
    yield name
    for place in range(1, len(parts)):
        yield ".".join(parts[:place]) + ".*"
        yield "*." + ".".join(parts[place:])
        if place < len(parts) - 1 and not parts[place].isdigit():
            yield f"*.{parts[place]}.*"
