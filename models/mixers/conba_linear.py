"""Conba's closed loop, linear in its state; see `conba` for what that is a completion of.

    g_t = Swish(U1 x_t + c1) * (U2 x_t + c2)                                 selection
    k_t, q_t, Delta_t from g_t;  |k_t| = 1                                   a_t = exp(-Delta_t e^{A_log})
    r_t = sigmoid(Z x_t + c)                                                 scaling
    e_t = S_{t-1} k_t - v_t                                                  error: what the state answers to k_t
    u_t = -kappa e_t                                                         control, 0 < kappa < 1
    S_t = a_t S_{t-1} + r_t u_t k_t'                                         state
    y_t = S_t k_t + S_{t-1} q_t + D v_t                                      output, with a delayed read-out

The desired output is v_t = W_v x_t, and the observer reads with the key it writes with. So the state goes through
a_t I - kappa r_t k_t k_t', whose norm is at most 1: the loop cannot run away. With W_o, a norm before it, and one a, r
and kappa a head. kappa, a sigmoid of a parameter, is learned with the others and by nothing else: the paper's online
update of the gain (11), which could move it between steps, is left out. Computed as

    y_t = S_{t-1} ((a_t - kappa r_t) k_t + q_t) + (kappa r_t + D) v_t

the memory, a `MatrixMemory`, is asked before the token is stored: what each token stores comes one token later. In
training, with `noise`, S_t has w_t k_t' and y_t has v'_t more, w and v' normal: the state, which every token reads, is
disturbed where the token writes.

Shapes: B batch, T local tokens, D model width, G selection width, H heads, N width of a head's values and keys.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...parallel import SequenceShard
from ..noise import NOISE, normal_numbers
from ..parameters import Linear, RMSNorm, at_least_float32, constant, fan_in_uniform, normal
from ..token_shift import token_shift
from .base import LayerPlace, Mixer, Shared, State, linear_flops
from .mamba import log_uniform_step_sizes
from .mamba2 import log_of_uniform
from .matrix_memory import MatrixMemory


class Loop(NamedTuple):
    """What a token does to the state: names as in the equations, `learn` for kappa r; (..., H) and (..., H, N).

    `disturbed`: w and v', where there is noise.
    """

    log_a: Tensor
    learn: Tensor
    k: Tensor
    v: Tensor
    q: Tensor
    disturbed: tuple[Tensor, Tensor] | None = None


class LinearConba(Mixer):
    """`state`: N; `expand`: H N = expand x D; `selector`: G; `steps`: the range of initial step sizes."""

    def __init__(
        self,
        place: LayerPlace,
        *,
        state: int,
        expand: int,
        selector: int | None,
        steps: tuple[float, float],
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.index, self.noise = place.index, noise
        width, channels = place.width, expand * place.width
        if channels % state:
            raise ValueError(f"conba: {channels} channels are not divisible by heads of {state}; choose conba.state")
        heads, selector = channels // state, selector or math.ceil(width / 4)
        self.state = state
        self.sizes = [channels, channels, heads]
        self.select_gate = Linear(width, selector, fan_in_uniform(), bias=True)
        self.select_value = Linear(width, selector, fan_in_uniform(), bias=True, bias_init=constant(1.0))
        self.select_out = Linear(selector, sum(self.sizes), fan_in_uniform())
        self.step_bias = self.parameter("step_bias", (heads,), log_uniform_step_sizes(*steps))
        self.A_log = self.parameter("A_log", (heads,), log_of_uniform)
        self.scaling = Linear(width, heads, normal(place.init_std), bias=True)
        self.control_gain = self.parameter("control_gain", (heads,), constant(2.0))
        self.value = Linear(width, channels, fan_in_uniform())
        self.D = self.parameter("D", (channels,), constant(1.0))
        self.norm = RMSNorm(channels, place.norm_eps)
        self.out_proj = Linear(channels, width, fan_in_uniform(place.num_layers**-0.5))

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        return self.share(x_BTD, shard, {})[0]

    def share(self, x_BTD: Tensor, shard: SequenceShard, shared: Shared) -> tuple[Tensor, Shared]:
        loop = self.select(x_BTD)
        if self.noise and NOISE in shared:
            drawn_BTC2 = normal_numbers(shared[NOISE], self.index, x_BTD, shard.start, 2 * len(self.D))
            w_BTC, v_BTC = (self.noise * drawn_BTC2).to(loop.v.dtype).chunk(2, dim=-1)
            loop = loop._replace(disturbed=(w_BTC.view_as(loop.v), v_BTC.view_as(loop.v)))
        answer_BTHN, _ = self.recall(loop, shard)
        return self.read_out(answer_BTHN, loop), {}

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        loop = self.select(x_BTD)
        answer_BTHN, memory_BHNN = self.recall(loop, shard, state["memory"])
        last = Loop(*(part[:, -1] for part in (loop.log_a, loop.learn, loop.k, loop.v, loop.q)), disturbed=None)
        return self.read_out(answer_BTHN, loop), {"memory": self.store(last, memory_BHNN)}

    def recall(self, loop: Loop, shard: SequenceShard, initial_BHNN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the memory answers each token (B, T, H, N), and the memory without what the last token stores.

        `initial_BHNN`: the memory before the sequence, where there is one.
        """
        # what the token before stored; zeros before a document's first token
        rates = token_shift(torch.cat([loop.log_a, loop.learn], dim=-1), shard)
        log_a_BTH, learn_BTH = (rate.unsqueeze(-1) for rate in rates.chunk(2, dim=-1))
        told = torch.cat([loop.k, loop.v, *(loop.disturbed or ())[:1]], dim=-1)
        stored = token_shift(told.flatten(2), shard).unflatten(2, told.shape[2:])
        k_BTHN, v_BTHN, *w_BTHN = stored.split(self.state, dim=-1)
        learn_BTH = learn_BTH.to(k_BTHN.dtype)
        sequences = (sum(w_BTHN, learn_BTH * v_BTHN), -learn_BTH * k_BTHN, k_BTHN)
        memory = MatrixMemory(log_a_BTH.expand(k_BTHN.shape), k_BTHN, *sequences, shard, initial_BHNN)
        return memory.recall(self.question(loop))

    def select(self, x_BTD: Tensor) -> Loop:
        """The token's part in the loop; rates in float32 or better."""
        g_BTG = F.silu(self.select_gate(x_BTD)) * self.select_value(x_BTD)
        k_BTC, q_BTC, delta_BTH = self.select_out(g_BTG).split(self.sizes, dim=-1)
        delta_BTH = F.softplus(at_least_float32(delta_BTH) + at_least_float32(self.step_bias))
        log_a_BTH = -delta_BTH * torch.exp(at_least_float32(self.A_log))
        r_BTH = torch.sigmoid(at_least_float32(self.scaling(x_BTD)))
        learn_BTH = torch.sigmoid(at_least_float32(self.control_gain)) * r_BTH
        k, v, q = (x.unflatten(-1, (-1, self.state)) for x in (k_BTC, self.value(x_BTD), q_BTC))
        return Loop(log_a_BTH, learn_BTH, F.normalize(k, dim=-1), v, q)

    def question(self, loop: Loop) -> Tensor:
        """(a - kappa r) k + q"""
        remaining = (torch.exp(loop.log_a) - loop.learn).unsqueeze(-1)
        return remaining.to(loop.k.dtype) * loop.k + loop.q

    def read_out(self, answer_BTHN: Tensor, loop: Loop) -> Tensor:
        """out (..., D), given what the memory answered to `question`."""
        y_BTHN = answer_BTHN + (loop.learn.unsqueeze(-1) + self.D.view(-1, self.state)) * loop.v
        y_BTHN = sum(loop.disturbed or (), y_BTHN)
        return self.out_proj(self.norm(y_BTHN.flatten(-2).to(loop.v.dtype)))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        state_dtype = torch.promote_types(dtype, torch.float32)
        shape = (batch, len(self.A_log), self.state, self.state)
        return {"memory": torch.zeros(shape, device=device, dtype=state_dtype)}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        loop, S_BHNN = self.select(x_BD), state["memory"]
        answer_BHN = (S_BHNN @ self.question(loop).to(S_BHNN.dtype).unsqueeze(-1)).squeeze(-1)
        return self.read_out(answer_BHN, loop), {"memory": self.store(loop, S_BHNN)}

    def store(self, loop: Loop, S_BHNN: Tensor) -> Tensor:
        """The memory after one token's part in the loop, (..., H, ...) without a dimension of tokens."""
        k_BHN, v_BHN = loop.k.to(S_BHNN.dtype), loop.v.to(S_BHNN.dtype)
        a_BH11, learn_BH1 = torch.exp(loop.log_a)[..., None, None], loop.learn.unsqueeze(-1)
        error_BHN = (S_BHNN @ k_BHN.unsqueeze(-1)).squeeze(-1) - v_BHN
        return a_BH11 * S_BHNN - (learn_BH1 * error_BHN).unsqueeze(-1) * k_BHN.unsqueeze(-2)

    def flops_per_token(self, context: int) -> float:
        matrices = (self.select_gate, self.select_value, self.select_out, self.scaling, self.value, self.out_proj)
        # an element of the state is decayed (a product), compared with what is wanted, corrected and read (two each)
        loop = 7.0 * len(self.D) * self.state
        return linear_flops(*(matrix.weight for matrix in matrices)) + loop
