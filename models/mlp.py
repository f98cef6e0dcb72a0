"""Feed-forward layers without experts: gated linear units (Shazeer, arXiv 2002.05202) and GELU.

    swiglu: W_down (SiLU(W_gate x) * W_up x)          gelu: W_down GELU(W_up x)
    geglu and bilinear: GELU, or nothing, in place of SiLU (Evo 2's first layer and its other ones)

Shapes: B batch, T tokens, D model width, F hidden width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..kernels import swiglu
from ..parallel import SequenceShard
from .feed_forward import FeedForward, FeedForwardOptions
from .mixers.base import LayerPlace, linear_flops
from .parameters import Linear, normal


class MLPOptions(FeedForwardOptions):
    """A feed-forward layer without experts.

    Attributes:
        kind: what it computes: a gate with SiLU, with GELU, or without either; or GELU and no gate.
        hidden: hidden width; by default 4 x width for gelu, and 8/3 x width, rounded up to a multiple of 8, for gated
            kinds.
        bias: whether the projections have biases.
    """

    kind: Literal["swiglu", "geglu", "bilinear", "gelu"] = "swiglu"
    hidden: int | None = Field(default=None, ge=1)
    bias: bool = False

    def build(self, place: LayerPlace) -> MLP:
        return MLP(self, place)


class MLP(FeedForward):
    """`up_proj` holds gate and up, in this order, for gated kinds."""

    def __init__(self, options: MLPOptions, place: LayerPlace) -> None:
        super().__init__()
        self.kind, self.gated = options.kind, options.kind != "gelu"
        hidden = options.hidden or default_hidden(place.width, self.gated)
        out_init = normal(place.init_std / math.sqrt(2 * place.num_layers))
        self.up_proj = Linear(place.width, hidden * (1 + self.gated), normal(place.init_std), bias=options.bias)
        self.down_proj = Linear(hidden, place.width, out_init, bias=options.bias)

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> tuple[Tensor, None]:
        hidden_BTF = self.up_proj(x_BTD)
        return self.down_proj(self.activate(hidden_BTF)), None

    def activate(self, hidden_BTF: Tensor) -> Tensor:
        """(B, T, F), of twice the width for gated kinds, to (B, T, F)."""
        if not self.gated:
            return F.gelu(hidden_BTF)
        gate_BTF, up_BTF = hidden_BTF.chunk(2, dim=-1)
        if self.kind == "swiglu":
            return swiglu(gate_BTF, up_BTF)
        return (F.gelu(gate_BTF) if self.kind == "geglu" else gate_BTF) * up_BTF

    def flops_per_token(self) -> float:
        return linear_flops(self.up_proj.weight, self.down_proj.weight)


def default_hidden(width: int, gated: bool) -> int:
    return 8 * math.ceil(width / 3) if gated else 4 * width
