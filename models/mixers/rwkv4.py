"""RWKV-4's time mix (Peng et al., arXiv 2305.13048, BlinkDL/RWKV-LM); `models.channel_mix` is the block's other half.

    r, k, v = W_r lerp(x_{t-1}, x_t, mix_r), W_k lerp(..., mix_k), W_v lerp(..., mix_v)
    wkv_t = (sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same without v)      w = e^{time_decay}
    out = W_o (sigmoid(r) * wkv)                                                               u = time_first

Split along the sequence one token crosses each boundary for the shift, and the sums above and below the fraction with
their common exponent: three numbers a channel, whatever the length. The outputs are ratios, to which nothing can be
added afterwards; each shard sums first, projects r while the sums travel, and computes its outputs from the state that
really enters.

Shapes: B batch, T local tokens, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import wkv4, wkv4_state
from ...parallel import LogSpace, SequenceShard, begin_prefix_state, prefix_state
from ..channel_mix import channel_powers
from ..parameters import Initialiser, Linear, at_least_float32, constant, orthogonal
from ..token_shift import token_shift
from .base import LayerPlace, Mixer, MixerOptions, State, linear_flops, window_before


class RWKV4Options(MixerOptions):
    """RWKV-4 has nothing to choose beside the width."""

    def build(self, place: LayerPlace) -> RWKV4:
        return RWKV4(self, place)


class RWKV4(Mixer):
    """Parameters as in the authors' code: `time_decay`, `time_first` and three `mix_*` (D,), four square matrices."""

    def __init__(self, options: RWKV4Options, place: LayerPlace) -> None:
        super().__init__()
        width, remaining = place.width, 1 - place.index / place.num_layers
        depth = place.index / max(1, place.num_layers - 1)
        self.time_decay = self.parameter("time_decay", (width,), spread_decays(depth), rate=2.0)
        self.time_first = self.parameter("time_first", (width,), staggered_bonus, rate=3.0)
        self.mix_key = self.parameter("mix_key", (width,), channel_powers(remaining), half=True)
        mix_value, mix_receptance = channel_powers(remaining, offset=0.3 * depth), channel_powers(0.5 * remaining)
        self.mix_value = self.parameter("mix_value", (width,), mix_value, half=True)
        self.mix_receptance = self.parameter("mix_receptance", (width,), mix_receptance, half=True)
        self.key = Linear(width, width, constant(0.0))
        self.value = Linear(width, width, orthogonal())
        self.receptance = Linear(width, width, constant(0.0))
        self.output = Linear(width, width, constant(0.0))

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        before_BTD = token_shift(x_BTD, shard)
        k_BTD, v_BTD = self.project_stored(x_BTD, before_BTD)
        starts_BT, log_decay_D = shard.start_mask(x_BTD.device), self.log_decay()
        pending = None
        if shard.size > 1:
            own_BD3 = wkv4_state(k_BTD, v_BTD, log_decay_D, document_starts=starts_BT)
            pending = begin_prefix_state(LogSpace(log_decay_D, shard.reset_mask(x_BTD.device)), own_BD3, shard)
        r_BTD = self.project_receptance(x_BTD, before_BTD)
        entering_BD3 = None if pending is None else pending.wait()
        wkv_BTD, _ = wkv4(
            k_BTD, v_BTD, log_decay_D, self.time_first, initial_state=entering_BD3, document_starts=starts_BT
        )
        return self.output(torch.sigmoid(r_BTD) * wkv_BTD)

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        before_B1D = window_before(x_BTD, state["shift"].unsqueeze(1), shard)
        before_BTD = torch.cat([before_B1D, x_BTD[:, :-1]], dim=1)
        r_BTD, (k_BTD, v_BTD) = self.project_receptance(x_BTD, before_BTD), self.project_stored(x_BTD, before_BTD)
        log_decay_D, sums_BD3 = self.log_decay(), state["sums"]
        if shard.size > 1:
            own_BD3 = wkv4_state(k_BTD, v_BTD, log_decay_D)
            sums_BD3 = prefix_state(LogSpace(log_decay_D), own_BD3, shard, initial=sums_BD3)
        wkv_BTD, sums_BD3 = wkv4(k_BTD, v_BTD, log_decay_D, self.time_first, initial_state=sums_BD3)
        return self.output(torch.sigmoid(r_BTD) * wkv_BTD), {"shift": x_BTD[:, -1], "sums": sums_BD3}

    def project_stored(self, x_BTD: Tensor, before_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (..., D), given each token and the one before it."""
        k_BTD = self.key(torch.lerp(before_BTD, x_BTD, self.mix_key))
        return k_BTD, self.value(torch.lerp(before_BTD, x_BTD, self.mix_value))

    def project_receptance(self, x_BTD: Tensor, before_BTD: Tensor) -> Tensor:
        """r (..., D), likewise."""
        return self.receptance(torch.lerp(before_BTD, x_BTD, self.mix_receptance))

    def log_decay(self) -> Tensor:
        """(D,), negative, in float32 or better: half types would move the slow decays by percents."""
        return -torch.exp(at_least_float32(self.time_decay))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        shift_BD = torch.zeros(batch, len(self.time_decay), device=device, dtype=dtype)
        sums_BD3 = torch.zeros(*shift_BD.shape, 3, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return {"shift": shift_BD, "sums": LogSpace(self.time_decay).empty(sums_BD3)}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        before_BD = state["shift"]
        r_BD, (k_BD, v_BD) = self.project_receptance(x_BD, before_BD), self.project_stored(x_BD, before_BD)
        k_B1D, v_B1D = k_BD.unsqueeze(1), v_BD.unsqueeze(1)
        wkv_B1D, sums_BD3 = wkv4(k_B1D, v_B1D, self.log_decay(), self.time_first, initial_state=state["sums"])
        return self.output(torch.sigmoid(r_BD) * wkv_B1D.squeeze(1)), {"shift": x_BD, "sums": sums_BD3}

    def flops_per_token(self, context: int) -> float:
        matrices = (self.receptance, self.key, self.value, self.output)
        # the upper sum is decayed (a product), fed and read (two each); for the lower one the value is 1: three
        return linear_flops(*(matrix.weight for matrix in matrices)) + 8.0 * len(self.time_decay)


def spread_decays(depth: float) -> Initialiser:
    """-5 + 8 (h / (D - 1))^(0.7 + 1.3 depth) for channel h; `depth` is 0 in the first layer and 1 in the last."""

    def init(shape: Sequence[int], generator: torch.Generator) -> Tensor:
        place = torch.arange(shape[0], dtype=torch.float32) / max(1, shape[0] - 1)
        return -5 + 8 * place.pow(0.7 + 1.3 * depth)

    return init


def staggered_bonus(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """log(0.3) + 0, 0.5, -0.5, 0, ...: neighbouring channels differ."""
    return math.log(0.3) + 0.5 * ((torch.arange(shape[0]) + 1) % 3 - 1).float()
