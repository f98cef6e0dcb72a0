"""A mixture of experts: each token goes to the few experts that its router scores highest; no token is dropped.

    p = softmax(W_router x);   y = sum over the top-k experts e of w_e SwiGLU_e(x)

w_e is p_e divided by the sum over the chosen k (`renormalise`, Mixtral, arXiv 2401.04088) or p_e itself (Jamba,
arXiv 2403.19887). What keeps the load even is one of

    loss    a loss, E sum_e f_e p_e, with f_e the share of tokens that chose e and p_e the mean probability
            (Switch, arXiv 2101.03961; it is k where the load is even)
    bias    a bias on each expert's probability that counts in the choice alone, not in w_e, and after every step moves
            by `bias_speed` towards experts that had less than the mean load (DeepSeek, arXiv 2408.15664)

and the mean squared log-partition (ST-MoE, arXiv 2202.08906) can be a loss as well. Loads and losses are over all
tokens of the step, on whatever process they are. Shared experts (DeepSeekMoE, arXiv 2401.06066) are beside the routed
ones for every token; S of them are one SwiGLU layer of S times the width.

Shapes: N tokens here, D model width, E experts, J experts a token, F hidden width, M tokens sorted by expert.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ..kernels import grouped_matmul, swiglu
from ..kernels.experts import count_choices
from ..parallel import SequenceShard, global_sum, local_part, run_experts
from .feed_forward import FeedForward, FeedForwardOptions
from .mixers.base import LayerPlace, linear_flops
from .mlp import MLPOptions, default_hidden
from .parameters import Linear, ParameterModule, at_least_float32, constant, normal
from .step_sums import StepSum


class ExpertsOptions(FeedForwardOptions):
    """A mixture of experts.

    Attributes:
        experts: how many there are.
        top_k: how many of them a token goes to.
        hidden: hidden width of each expert; by default 8/3 x width, rounded up to a multiple of 8.
        shared: further experts, for every token.
        renormalise: whether the chosen experts' probabilities are divided by their sum (Mixtral) or taken as they are
            (Jamba).
        balance: what keeps the load even: a loss, a bias on the choice, or nothing.
        balance_loss: the weight of the loss of `balance: loss`.
        bias_speed: how far `balance: bias` moves after a step, in probability.
        z_loss: the weight of the mean squared log-partition of the router; 0: none.
    """

    experts: int = Field(default=8, ge=2)
    top_k: int = Field(default=2, ge=1)
    hidden: int | None = Field(default=None, ge=1)
    shared: int = Field(default=0, ge=0)
    renormalise: bool = True
    balance: Literal["loss", "bias", "none"] = "loss"
    balance_loss: float = Field(default=1e-2, ge=0)
    bias_speed: float = Field(default=1e-3, gt=0)
    z_loss: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _enough(self) -> ExpertsOptions:
        if self.top_k > self.experts:
            raise ValueError(f"moe.top_k {self.top_k} exceeds moe.experts {self.experts}")
        return self

    def build(self, place: LayerPlace) -> MixtureOfExperts:
        return MixtureOfExperts(self, place)


class SwiGLUExperts(ParameterModule):
    """E SwiGLU layers without biases: `gate_up` (E, D, 2F), gate first, and `down` (E, F, D).

    Where experts are spread over processes the parameters are sharded in their first dimension, and this process
    computes with its own.
    """

    def __init__(self, options: ExpertsOptions, place: LayerPlace) -> None:
        super().__init__()
        experts, hidden = options.experts, options.hidden or default_hidden(place.width, gated=True)
        self.num_experts = experts
        out_init = normal(place.init_std / math.sqrt(2 * place.num_layers))
        gate_up_init = normal(place.init_std)
        self.gate_up = self.parameter("gate_up", (experts, place.width, 2 * hidden), gate_up_init, half=True)
        self.down = self.parameter("down", (experts, hidden, place.width), out_init, half=True)

    def forward(self, x_ND: Tensor, expert_NJ: Tensor, weight_NJ: Tensor, shard: SequenceShard) -> Tensor:
        """The weighted sum of each token's experts. Tokens travel in here: the parameters are gathered once."""
        return run_experts(x_ND, expert_NJ, weight_NJ, self.compute, self.num_experts, shard)

    def compute(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """`x_MD` sorted by local expert, `counts_E` (int64) tokens for each."""
        gate_MF, up_MF = grouped_matmul(x_MD, local_part(self.gate_up), counts_E).chunk(2, dim=-1)
        return grouped_matmul(swiglu(gate_MF, up_MF), local_part(self.down), counts_E)


class MixtureOfExperts(FeedForward):
    """`router` (E, D), `experts`, and if there are any `shared`; the buffer `selection_bias` (E,) of balance "bias"."""

    def __init__(self, options: ExpertsOptions, place: LayerPlace) -> None:
        super().__init__()
        self.options = options
        self.router = Linear(place.width, options.experts, normal(place.init_std), half=False)
        self.experts = SwiGLUExperts(options, place)
        hidden = options.shared * (options.hidden or default_hidden(place.width, gated=True))
        self.shared = MLPOptions(hidden=hidden).build(place) if hidden else None
        biased = options.balance == "bias"
        self.selection_bias = self.buffer("selection_bias", (options.experts,), constant(0.0)) if biased else None
        self._loads = StepSum()

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> tuple[Tensor, Tensor | None]:
        x_ND = x_BTD.flatten(0, 1)
        logits_NE = at_least_float32(self.router(x_ND))
        probability_NE = F.softmax(logits_NE, dim=-1)
        expert_NJ = self.choose(probability_NE)
        weight_NJ = probability_NE.gather(1, expert_NJ)
        if self.options.renormalise:
            weight_NJ = weight_NJ / weight_NJ.sum(dim=-1, keepdim=True)
        y_ND = self.experts(x_ND, expert_NJ, weight_NJ, shard)
        y_BTD = y_ND.to(x_BTD.dtype).view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD, shard)[0]
        load_E = count_choices(expert_NJ, self.options.experts)
        if self.selection_bias is not None:
            self._loads.add(load_E, self, y_BTD, shard)
        return y_BTD, self.losses(logits_NE, probability_NE, load_E, shard)

    def choose(self, probability_NE: Tensor) -> Tensor:
        """The J experts of each token, (N, J) int64, likeliest first."""
        score_NE = probability_NE.detach()
        if self.selection_bias is not None:
            score_NE = score_NE + self.selection_bias
        return score_NE.topk(self.options.top_k, dim=-1).indices

    def losses(self, logits_NE: Tensor, probability_NE: Tensor, load_E: Tensor, shard: SequenceShard) -> Tensor | None:
        """The weighted router losses over all tokens of the step; None where neither counts."""
        options, num_experts = self.options, self.options.experts
        balance_weight = options.balance_loss if options.balance == "loss" else 0.0
        if balance_weight == 0 and options.z_loss == 0:
            return None
        squared_partition = logits_NE.logsumexp(dim=-1).square().sum()
        # one message for all statistics: counts, summed probabilities, squared log-partitions, tokens
        tokens = probability_NE.new_full((), len(probability_NE))
        chosen_E = load_E.to(probability_NE.dtype)
        statistics = torch.cat([chosen_E, probability_NE.sum(dim=0), squared_partition[None], tokens[None]])
        total = global_sum(statistics, shard)
        chosen_E, probability_E, (squared_partition, tokens) = total.split([num_experts, num_experts, 2])
        tokens = tokens.clamp(min=1)
        balance = num_experts * (chosen_E / tokens * (probability_E / tokens)).sum()
        return balance_weight * balance + options.z_loss * squared_partition / tokens

    def end_step(self) -> None:
        """Move the bias by the loads of the step, on whatever process."""
        load_E = self._loads.take()
        if load_E is None or self.selection_bias is None:
            return
        with torch.no_grad():
            # in whole numbers, so that no rounding decides a sign
            below_mean_E = torch.sign(load_E.sum() - load_E * len(load_E))
            self.selection_bias += self.options.bias_speed * below_mean_E.to(self.selection_bias.dtype)

    @property
    def num_idle_parameters(self) -> int:
        """Of the experts that a token is not sent to."""
        idle = self.options.experts - self.options.top_k
        return sum(parameter.numel() // self.options.experts * idle for parameter in self.experts.parameters())

    def flops_per_token(self) -> float:
        router, experts = self.router.weight, (self.experts.gate_up, self.experts.down)
        routed = linear_flops(router, *experts) - 2.0 * self.num_idle_parameters
        return routed + (self.shared.flops_per_token() if self.shared is not None else 0.0)
