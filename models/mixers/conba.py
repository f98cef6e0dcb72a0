"""Conba, MixCon's control mixer (Xu and Lin, ECAI 2024, doi 10.3233/FAIA240593): three declared completions.

The paper leaves open what its equations need (the desired outputs, how the selection enters, the delay, the noise) and
the authors' code does not run, so a Conba layer can only be its equations and a completion that says what it adds:

    released   the authors' code with its dimensions repaired: Jamba's mixer, then a position-wise controller  (here)
    linear     the closed loop, linear in its state: the one to train split                       (`conba_linear`)
    exact      the printed equations, nonlinear in the state: processes take turns                (`conba_exact`)

`noise` is the standard deviation of the paper's process and observation noise, (13) and (14), in training; its level is
not published, and the authors' code, and so `released`, has none. This file is `released`. On s, the output of Mamba's
mixer with norms:

    s <- s * (Z s + g)        s <- s + (F s + b)        e = s - y_d, y_d = 0        out = s - K e

K is no parameter: it is constant within a step and afterwards moves by `online_rate` times the mean of e e' over all
tokens. The authors subtract that, which lets the output grow; `gain: reduce`, the default, adds it.

Shapes: B batch, T local tokens, D model width.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...parallel import SequenceShard
from ..parameters import Linear, constant, normal
from ..step_sums import StepSum
from .base import LayerPlace, Mixer, MixerOptions, State, linear_flops
from .conba_exact import ExactConba
from .conba_linear import LinearConba
from .mamba import Mamba, MambaOptions


class ConbaOptions(MixerOptions):
    """MixCon's control mixer.

    Attributes:
        variant: how the paper's equations are completed: as the authors' code (released), as a closed loop linear in
            its state (linear: the one to train split), or as printed (exact: processes take turns).
        state: size of the state of a channel.
        expand: inner channels for each of the width; not heeded by `exact`.
        conv: taps of the short convolution of `released`.
        dt_rank: rank of the step sizes of `released`; by default width / 16, rounded up.
        dt_min: the smallest step size at first; not heeded by `exact`.
        dt_max: the largest step size at first; not heeded by `exact`.
        selector: width of the selection of `linear`; by default width / 4, rounded up.
        online_rate: how fast the gain K moves; not heeded by `linear`.
        gain: the sign of K's moves in `released`: to `reduce` the outputs, or as the authors have it.
        solver: whether the processes of `exact` take turns or solve for all tokens at once.
        noise: standard deviation of the noise in training; `released` has none.
    """

    variant: Literal["released", "linear", "exact"] = "released"
    state: int = Field(default=16, ge=1)
    expand: int = Field(default=2, ge=1)
    conv: int = Field(default=4, ge=2)
    dt_rank: int | None = Field(default=None, ge=1)
    dt_min: float = Field(default=1e-3, gt=0)
    dt_max: float = Field(default=1e-1, gt=0)
    selector: int | None = Field(default=None, ge=1)
    online_rate: float = Field(default=1e-5, ge=0)
    gain: Literal["reduce", "released"] = "reduce"
    solver: Literal["turns", "newton"] = "turns"
    noise: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def build(self, place: LayerPlace) -> Mixer:
        if self.variant == "exact":
            return ExactConba(
                place, state=self.state, online_rate=self.online_rate, solver=self.solver, noise=self.noise
            )
        if self.variant == "linear":
            steps = (self.dt_min, self.dt_max)
            return LinearConba(
                place, state=self.state, expand=self.expand, selector=self.selector, steps=steps, noise=self.noise
            )
        if self.noise:
            raise ValueError(f"conba: noise {self.noise:g} is not in the released variant; set conba.variant=linear")
        return ReleasedConba(self, place)


class ReleasedConba(Mamba):
    """Mamba's parameters, `scaling` (Z, g), `delayed_state` (F, b), and the buffer `control_gain` K (D, D)."""

    def __init__(self, options: ConbaOptions, place: LayerPlace) -> None:
        shared = options.model_dump(include=set(MambaOptions.model_fields))
        super().__init__(MambaOptions(**shared, inner_norms=True), place)
        width, init = place.width, normal(place.init_std)
        # g begins at one, so that a new layer passes on what its scan found
        self.scaling = Linear(width, width, init, bias=True, bias_init=constant(1.0))
        self.delayed_state = Linear(width, width, init, bias=True)
        self.control_gain = self.buffer("control_gain", (width, width), constant(0.0))
        self.online_rate = options.online_rate if options.gain == "reduce" else -options.online_rate
        self._errors = StepSum()

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        e_BTD = self.observe(super().forward(x_BTD, shard))
        y_BTD = self.control(e_BTD)
        if self.training and torch.is_grad_enabled() and self.online_rate:
            e_ND = e_BTD.detach().flatten(0, 1).to(self.control_gain.dtype)
            count = e_ND.new_full((1,), len(e_ND))
            self._errors.add(torch.cat([(e_ND.t() @ e_ND).flatten(), count]), self, y_BTD, shard)
        return y_BTD

    def observe(self, s_BTD: Tensor) -> Tensor:
        """e"""
        s_BTD = s_BTD * self.scaling(s_BTD)
        return s_BTD + self.delayed_state(s_BTD)

    def control(self, e_BTD: Tensor) -> Tensor:
        """s - K e, where s = e."""
        return e_BTD - e_BTD @ self.control_gain.t().to(e_BTD.dtype)

    def end_step(self) -> None:
        """Move K by what the step saw, on whatever process."""
        sums = self._errors.take()
        if sums is None:
            return
        with torch.no_grad():
            products, count = sums.split([self.control_gain.numel(), 1])
            self.control_gain += self.online_rate * (products / count).view_as(self.control_gain)

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        s_BTD, state = super().prefill(x_BTD, shard, state)
        return self.control(self.observe(s_BTD)), state

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        s_BD, state = super().step(x_BD, state)
        return self.control(self.observe(s_BD)), state

    def flops_per_token(self, context: int) -> float:
        extra = linear_flops(self.scaling.weight, self.delayed_state.weight, self.control_gain)
        return super().flops_per_token(context) + extra
