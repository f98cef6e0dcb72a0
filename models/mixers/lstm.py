"""LSTM with forget gates (Hochreiter and Schmidhuber 1997; Gers et al. 2000), the recurrent baseline.

    i, f, g, o = W x_t + U h_{t-1} + b
    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)        h_t = sigmoid(o) tanh(c_t)        out = out_proj(h)

The state enters its own gates, so no short summary of a stretch of tokens exists. Split along the sequence the
processes take turns (`parallel.sequential_state`): every shard waits for the one before it.

Shapes: B batch, T local tokens, D model width, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from pydantic import Field
from torch import Tensor

from ...parallel import SequenceShard, sequential_state
from ..parameters import Linear, at_least_float32, normal, uniform
from .base import LayerPlace, Mixer, MixerOptions, State, linear_flops


class LSTMOptions(MixerOptions):
    """The recurrent baseline.

    Attributes:
        hidden: size of the state; by default the width.
        forget_bias: of the forget gates at first, so that a new layer remembers.
    """

    hidden: int | None = Field(default=None, ge=1)
    forget_bias: float = 1.0

    def build(self, place: LayerPlace) -> LSTM:
        return LSTM(self, place)


class LSTM(Mixer):
    """`input_weight` (4H, D), `state_weight` (4H, H) and `bias` (4H,), gates in torch's order: i, f, g, o."""

    def __init__(self, options: LSTMOptions, place: LayerPlace) -> None:
        super().__init__()
        hidden = options.hidden or place.width
        self.hidden, init = hidden, uniform(hidden**-0.5)

        def bias(shape: Sequence[int], generator: torch.Generator) -> Tensor:
            values = torch.zeros(shape[0])
            values[hidden : 2 * hidden] = options.forget_bias
            return values

        self.input_weight = self.parameter("input_weight", (4 * hidden, place.width), init)
        self.state_weight = self.parameter("state_weight", (4 * hidden, hidden), init)
        self.bias = self.parameter("bias", (4 * hidden,), bias)
        self.out_proj = Linear(hidden, place.width, normal(place.init_std / math.sqrt(2 * place.num_layers)))

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        starts_BT = shard.start_mask()  # where the sequence is cut is decided on the CPU
        x_BTD, dtype = at_least_float32(x_BTD), x_BTD.dtype
        initial_B2H = x_BTD.new_zeros(x_BTD.shape[0], 2, self.hidden)
        h_BTH, _ = sequential_state(lambda state_B2H: self.run(x_BTD, state_B2H, starts_BT), initial_B2H, shard)
        return self.out_proj(h_BTH.to(dtype))

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        wide_BTD, memory_B2H = at_least_float32(x_BTD), state["memory"]
        h_BTH, memory_B2H = sequential_state(lambda state_B2H: self.run(wide_BTD, state_B2H, None), memory_B2H, shard)
        return self.out_proj(h_BTH.to(x_BTD.dtype)), {"memory": memory_B2H}

    def run(self, x_BTD: Tensor, state_B2H: Tensor, starts_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs h and the last (h, c): stretch by stretch between the places where a document begins in some row."""
        cuts = [] if starts_BT is None else starts_BT.any(dim=0).nonzero().flatten().tolist()
        bounds = [0, *(cut for cut in cuts if cut), x_BTD.shape[1]]
        outputs: list[Tensor] = []
        for start, stop in pairwise(bounds):
            if starts_BT is not None:
                begins_B = starts_BT[:, start].to(state_B2H.device, non_blocking=True)
                state_B2H = state_B2H.masked_fill(begins_B[:, None, None], 0)
            h_BTH, state_B2H = self.recur(x_BTD[:, start:stop], state_B2H)
            outputs.append(h_BTH)
        return torch.cat(outputs, dim=1), state_B2H

    def recur(self, x_BTD: Tensor, state_B2H: Tensor) -> tuple[Tensor, Tensor]:
        """The recurrence over one stretch; in float32 or better, for c is a sum over the whole sequence."""
        weights = [at_least_float32(weight) for weight in (self.input_weight, self.state_weight, self.bias)]
        weights.append(torch.zeros_like(weights[2]))  # torch's LSTM has two biases
        h_1BH, c_1BH = (part_BH.unsqueeze(0).contiguous() for part_BH in state_B2H.unbind(dim=1))
        training = torch.is_grad_enabled()
        with torch.autocast(x_BTD.device.type, enabled=False):  # it would make all of it bfloat16
            h_BTH, h_1BH, c_1BH = torch.lstm(x_BTD, (h_1BH, c_1BH), weights, True, 1, 0.0, training, False, True)
        return h_BTH, torch.stack([h_1BH[0], c_1BH[0]], dim=1)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        state_dtype = torch.promote_types(dtype, torch.float32)
        return {"memory": torch.zeros(batch, 2, self.hidden, device=device, dtype=state_dtype)}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        h_B1H, memory_B2H = self.recur(at_least_float32(x_BD).unsqueeze(1), state["memory"])
        return self.out_proj(h_B1H.squeeze(1).to(x_BD.dtype)), {"memory": memory_B2H}

    def flops_per_token(self, context: int) -> float:
        # c is decayed (a product), fed (a product, a sum) and read (a product)
        return linear_flops(self.input_weight, self.state_weight, self.out_proj.weight) + 4.0 * self.hidden
