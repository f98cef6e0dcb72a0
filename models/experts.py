"""A mixture of experts: each token goes to the few experts that its router scores highest; no token is dropped.

    p = softmax(W_router x);   y = sum over the top-k experts e of w_e SwiGLU_e(x)

w_e is p_e divided by the sum over the chosen k (`renormalise`, Mixtral, arXiv 2401.04088) or p_e itself (Jamba,
arXiv 2403.19887). Two losses keep the router healthy: the balance loss E sum_e f_e p_e, with f_e the number of
tokens that chose e and p_e the mean probability (Switch, arXiv 2101.03961; k where the load is even), and the mean
squared log-partition (ST-MoE, arXiv 2202.08906). Both are over all tokens of the step, on whatever process they are.

Shapes: N tokens here, D model width, E experts, J experts a token, F hidden width, M tokens sorted by expert.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ..kernels import grouped_matmul, swiglu
from ..parallel import SequenceShard, global_sum, local_part, run_experts
from .feed_forward import FeedForward, FeedForwardOptions
from .mixers.base import LayerPlace, linear_flops
from .mlp import default_hidden
from .parameters import Linear, ParameterModule, at_least_float32, normal


class ExpertsOptions(FeedForwardOptions):
    """`experts`: E; `top_k`: J; `hidden`: F of each expert, by default 8/3 x width; the rest: see the module."""

    experts: int = Field(default=8, ge=2)
    top_k: int = Field(default=2, ge=1)
    hidden: int | None = Field(default=None, ge=1)
    renormalise: bool = True
    balance_loss: float = Field(default=1e-2, ge=0)
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
        out_init = normal(place.init_std / math.sqrt(2 * place.num_layers))
        self.gate_up = self.parameter("gate_up", (experts, place.width, 2 * hidden), normal(place.init_std))
        self.down = self.parameter("down", (experts, hidden, place.width), out_init)

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """`x_MD` sorted by local expert, `counts_E` (int64) tokens for each."""
        gate_MF, up_MF = grouped_matmul(x_MD, local_part(self.gate_up), counts_E).chunk(2, dim=-1)
        return grouped_matmul(swiglu(gate_MF, up_MF), local_part(self.down), counts_E)


class MixtureOfExperts(FeedForward):
    """`router` (E, D) and `experts`."""

    def __init__(self, options: ExpertsOptions, place: LayerPlace) -> None:
        super().__init__()
        self.options = options
        self.router = Linear(place.width, options.experts, normal(place.init_std))
        self.experts = SwiGLUExperts(options, place)

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> tuple[Tensor, Tensor | None]:
        x_ND = x_BTD.flatten(0, 1)
        logits_NE = at_least_float32(self.router(x_ND))
        probability_NE = F.softmax(logits_NE, dim=-1)
        weight_NJ, expert_NJ = probability_NE.topk(self.options.top_k, dim=-1)
        if self.options.renormalise:
            weight_NJ = weight_NJ / weight_NJ.sum(dim=-1, keepdim=True)
        y_ND = run_experts(x_ND, expert_NJ, weight_NJ, self.experts, self.options.experts, shard)
        return y_ND.to(x_BTD.dtype).view_as(x_BTD), self.losses(logits_NE, probability_NE, expert_NJ, shard)

    def losses(
        self, logits_NE: Tensor, probability_NE: Tensor, expert_NJ: Tensor, shard: SequenceShard
    ) -> Tensor | None:
        """The weighted router losses over all tokens of the step; None when both weights are zero."""
        options, num_experts = self.options, self.options.experts
        if options.balance_loss == 0 and options.z_loss == 0:
            return None
        chosen_E = torch.bincount(expert_NJ.flatten(), minlength=num_experts).to(probability_NE.dtype)
        squared_partition = logits_NE.logsumexp(dim=-1).square().sum()
        # one message for all statistics: counts, summed probabilities, squared log-partitions, tokens
        tokens = probability_NE.new_tensor(len(probability_NE))
        statistics = torch.cat([chosen_E, probability_NE.sum(dim=0), squared_partition[None], tokens[None]])
        total = global_sum(statistics, shard)
        chosen_E, probability_E, (squared_partition, tokens) = total.split([num_experts, num_experts, 2])
        balance = num_experts * (chosen_E / tokens * (probability_E / tokens)).sum()
        return options.balance_loss * balance + options.z_loss * squared_partition / tokens

    @property
    def num_idle_parameters(self) -> int:
        """Of the experts that a token is not sent to."""
        idle = self.options.experts - self.options.top_k
        return sum(parameter.numel() // self.options.experts * idle for parameter in self.experts.parameters())

    def flops_per_token(self) -> float:
        router, experts = self.router.weight, (self.experts.gate_up, self.experts.down)
        return linear_flops(router, *experts) - 2.0 * self.num_idle_parameters
