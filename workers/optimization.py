"""How parameters are updated: AdamW, which parameters decay, and the learning rate over time.

Learning rate: linear warm-up, if asked for a constant stretch (warm-up, stable, decay: Hu and others, arXiv
2404.06395), then half a cosine (Loshchilov & Hutter, arXiv 1608.03983) or a line down to `learning_rate *
final_fraction`. The rate is a function of the step alone, so a resumed run needs no schedule state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from ..models.parameters import weight_decayed
from .configuration import Settings
from .trained_parameters import rate_multiples

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class TrainConfig(Settings):
    """The optimisation of a run.

    Attributes:
        steps: optimiser steps in the whole run.
        dtype: float32; float64; or bfloat16, where weights and moments stay float32 and arithmetic is bfloat16.
        learning_rate: at the end of the warm-up.
        final_fraction: the last step's learning rate as a share of `learning_rate`.
        warmup: steps of linear warm-up.
        stable: steps after it at `learning_rate`.
        decay: the shape of the way down.
        weight_decay: AdamW's, on what declares it: matrices, not norms, biases, state-space parameters or filters.
        betas: AdamW's moment decays.
        epsilon: AdamW's.
        rates: multiples of the learning rate by pattern of parameters' names, as "*.filter.*": 0.1; the last pattern
            that matches counts, and 0 means that they are not trained.
        freeze: patterns of the names of parameters that are not trained, as "embedding.*" or "blocks.[0-3].*", whatever
            `rates` says: no gradient, no moments, no decay.
        clip: largest global gradient norm; 0 means no clipping.
        accumulate: parts, of as many sequences each, in which a process computes its sequences of a step one after the
            other: the same step in less memory, with every message sent for each part.
        validate_every: steps between validations; 0 means only at the end.
        profile: the step of which every process writes a profile to the run's directory; 0: none.
        canonical: tiles into which every sequence is cut so that losses and gradients are bitwise the same for every
            sequence degree that divides them (parallel/canonical.py; slower, parameters whole everywhere); 0: off.
    """

    steps: int = Field(default=1000, ge=1)
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    learning_rate: float = Field(default=1e-3, gt=0)
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    warmup: int = Field(default=0, ge=0)
    stable: int = Field(default=0, ge=0)
    decay: Literal["cosine", "linear"] = "cosine"
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(default=1e-8, gt=0)
    rates: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    clip: float = Field(default=1.0, ge=0)
    accumulate: int = Field(default=1, ge=1)
    validate_every: int = Field(default=0, ge=0)
    profile: int = Field(default=0, ge=0)
    canonical: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.warmup >= self.steps and self.warmup > 0:
            raise ValueError(
                f"train.warmup={self.warmup} leaves nothing of train.steps={self.steps}; warm up for fewer steps"
            )
        if self.stable and self.warmup + self.stable > self.steps:
            raise ValueError(
                f"train.stable={self.stable} after train.warmup={self.warmup} is more than train.steps={self.steps}; "
                f"set train.stable={self.steps - self.warmup} or less"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas={list(self.betas)}: both must lie in [0, 1)")
        return self

    @property
    def parameter_dtype(self) -> torch.dtype:
        """What weights and moments are kept in."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What FSDP casts parameters to for the arithmetic; None: as they are kept."""
        return torch.bfloat16 if self.dtype == "bfloat16" else None


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step `step`, counted from 1."""
    if step <= config.warmup:
        return config.learning_rate * step / config.warmup
    before = config.warmup + config.stable
    progress = min(1.0, max(0, step - before) / max(1, config.steps - before))
    above = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * above)


class ShardedAdamW:
    """AdamW (Loshchilov & Hutter 2019) on the local shards of a model's parameters.

    The update is elementwise, so it needs no communication and no DTensor arithmetic: one fused call works on the
    plain local tensors, several times faster than dispatching every operation through DTensor. Moments are wrapped
    again with their parameter's placements for checkpoints, which can then be loaded onto other degrees.

    Make it after sharding, from the parameters that will be stepped. Parameters without a gradient are left alone, and
    those that are not trained have no moments.

    Attributes:
        steps: made so far.
        parameters: those that are trained, by name.
        begun: of the parameters whose moments are younger than the run, the step after which they began.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.config = config
        self.steps = 0
        self.begun: dict[str, int] = {}
        self._decayed, self._multiples = weight_decayed(model), rate_multiples(model, config)
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        self.parameters = {name: p for name, p in trained if self._multiples[name]}
        self._exp_avg = {name: torch.zeros_like(local(p)) for name, p in self.parameters.items()}
        self._exp_avg_sq = {name: torch.zeros_like(local(p)) for name, p in self.parameters.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update with learning rate `rate`; some parameters have a multiple of it."""
        groups: dict[tuple[bool, float], list[str]] = {}
        for name, parameter in self.parameters.items():
            # A process may hold no element of a small parameter.
            if parameter.grad is not None and local(parameter).numel() > 0:
                groups.setdefault((name in self._decayed, self._multiples[name]), []).append(name)
        for (decayed, multiple), names in groups.items():
            self._update(names, rate * multiple, self.config.weight_decay if decayed else 0.0)
        self.steps += 1

    @property
    def num_parameters(self) -> int:
        """Trained parameters, all processes together."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def resume(self, steps: int, begun: Mapping[str, int], anew: Iterable[str] = ()) -> None:
        """Go on after `steps` steps with the moments that were put in, but for those of `anew`, which begin at zero.

        `begun`: what it was when the moments were saved.
        """
        self.steps = steps
        self.begun = {name: step for name, step in begun.items() if name in self.parameters}
        for name in anew:
            self._exp_avg[name].zero_()
            self._exp_avg_sq[name].zero_()
            if steps:
                self.begun[name] = steps

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Moments by name, placed as their parameters are. The tensors alias the optimiser's own."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            first, second = moment_names(name)
            tensors[first] = like(self._exp_avg[name], parameter)
            tensors[second] = like(self._exp_avg_sq[name], parameter)
        return tensors

    def _update(self, names: list[str], rate: float, weight_decay: float) -> None:
        gradients = [self.parameters[name].grad for name in names]
        parameters = [local(self.parameters[name]) for name in names]
        # the fused kernel reads its step counts where it runs
        steps = torch.full((len(names),), float(self.steps), device=parameters[0].device)
        if self.begun:
            steps -= torch.tensor([self.begun.get(name, 0) for name in names], device=steps.device)
        adamw(
            parameters,
            [local(gradient) for gradient in gradients if gradient is not None],
            [self._exp_avg[name] for name in names],
            [self._exp_avg_sq[name] for name in names],
            [],
            list(steps.unbind()),
            fused=True,
            amsgrad=False,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            lr=rate,
            weight_decay=weight_decay,
            eps=self.config.epsilon,
            maximize=False,
        )


def moment_names(parameter: str) -> tuple[str, str]:
    """What the two moments of a parameter of this name are called."""
    return f"exp_avg.{parameter}", f"exp_avg_sq.{parameter}"


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor (an alias, not a copy); a plain tensor as it is."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def like(shard: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`shard` as a DTensor placed as `parameter` is; as it is where the parameter is not distributed."""
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
