"""Conba's printed equations; see `conba` for what is added to them. Numbers are the paper's.

    y_k = C x_k                      (4)        e_k = y_k - y_d
    u_k = -K_k e_k + u_d            (10)
    S = Swish(W1 x_k + U1 u_k + c1) * (W2 x_k + U2 u_k + c2)                                     (12)
    f_d = A x_k + B u_k + S         (3), (6)
    x_{k+1} = Swish(Z f_d + g)       (7), (8)
    K_{k+1} = K_k - alpha d|e_k| / dK_k = K_k + alpha (C B)' (e_k / |e_k|) e_{k-1}'              (11)

The token enters as what is desired: y_d and u_d are linear in it, and out = W_o C x_{k+1}. (11) is the gradient one
step back through the linear part. K begins at a parameter, at zero at first, and moves within the sequence. In
training, with `noise`, normal numbers are added to f_d (13) and to y_{k+1} as it is put out (14).

The state stands inside nonlinear functions, so no short summary of a stretch of tokens exists, and nothing keeps it
from growing without bound but small weights. Split along the sequence the processes take turns, a token at a time
(`parallel.sequential_state`); or, where the states stay bounded, all tokens are solved for at once (`newton`). For
small studies only.

Shapes: B batch, T local tokens, D model width, N entries each of x, y and u.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.autograd import own_precision
from ...parallel import SequenceShard, sequential_state
from ..noise import NOISE, normal_numbers
from ..parameters import Linear, at_least_float32, constant, fan_in_uniform, normal
from .base import LayerPlace, Mixer, Shared, State, linear_flops
from .newton import newton_states


class ExactConba(Mixer):
    """`state`: N; `online_rate`: alpha; `solver`: "turns" or "newton". Matrices are named as in the equations."""

    def __init__(
        self, place: LayerPlace, *, state: int, online_rate: float, solver: str = "turns", noise: float = 0.0
    ) -> None:
        super().__init__()
        self.index, self.noise = place.index, noise
        self.recomputable = solver == "turns"  # torch.func takes no derivatives inside torch's checkpoint
        self.state, self.online_rate, self.solver = state, online_rate, solver
        self.desired = Linear(place.width, 2 * state, fan_in_uniform())
        self.A, self.B, self.C = (self.parameter(name, (state, state), fan_in_uniform()) for name in "ABC")
        # W1 over W2 and U1 over U2
        self.W = self.parameter("W", (2 * state, state), fan_in_uniform(0.5))
        self.U = self.parameter("U", (2 * state, state), fan_in_uniform(0.5))
        self.c = self.parameter("c", (2 * state,), constant(0.0))
        self.scaling = Linear(state, state, fan_in_uniform(), bias=True, half=False)
        self.control_gain = self.parameter("control_gain", (state, state), constant(0.0))
        self.out_proj = Linear(state, place.width, normal(place.init_std / math.sqrt(2 * place.num_layers)))

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        return self.share(x_BTD, shard, {})[0]

    def share(self, x_BTD: Tensor, shard: SequenceShard, shared: Shared) -> tuple[Tensor, Shared]:
        desired_BTN2 = at_least_float32(self.desired(x_BTD))
        initial = self.initial(x_BTD.shape[0], desired_BTN2)
        if self.noise and NOISE in shared:
            noise_BTN2 = normal_numbers(shared[NOISE], self.index, desired_BTN2, shard.start)
            desired_BTN2 = torch.cat([desired_BTN2, self.noise * noise_BTN2], dim=-1)
        if self.solver == "turns":
            y_BTN, _ = self.read(desired_BTN2, shard, initial)
        else:
            states = newton_states(lambda told, state: self.advance(told, state)[1], desired_BTN2, initial, shard)
            y_BTN = states[..., : self.state] @ at_least_float32(self.C).t()
            y_BTN = sum(desired_BTN2.split(self.state, dim=-1)[3:], y_BTN)
        return self.out_proj(y_BTN.to(x_BTD.dtype)), {}

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        y_BTN, following = self.read(at_least_float32(self.desired(x_BTD)), shard, state["loop"])
        return self.out_proj(y_BTN.to(x_BTD.dtype)), {"loop": following}

    def read(self, desired_BTN2: Tensor, shard: SequenceShard, first: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, T, N) after the state `first` before the sequence, and the state after this shard's last token."""
        initial = self.initial(desired_BTN2.shape[0], desired_BTN2)
        starts_BT = shard.start_mask(desired_BTN2.device)

        def run(state: Tensor) -> tuple[Tensor, Tensor]:
            outputs = []
            for token, desired in enumerate(desired_BTN2.unbind(dim=1)):
                if starts_BT is not None:
                    state = torch.where(starts_BT[:, token, None], initial, state)
                y_BN, state = self.advance(desired, state)
                outputs.append(y_BN)
            return torch.stack(outputs, dim=1), state

        return sequential_state(run, first, shard)

    @own_precision
    def advance(self, desired: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token: (C x_{k+1}, the next state). `state`: x, e of the token before, and K.

        `desired`: y_d and u_d, and where there is noise what is added to f_d and to C x_{k+1}.
        """
        N = self.state
        x_BN, before_BN, K_BNN = state[:, :N], state[:, N : 2 * N], state[:, 2 * N :].unflatten(1, (N, N))
        A, B, C, W, U, c = (at_least_float32(p) for p in (self.A, self.B, self.C, self.W, self.U, self.c))
        Z, g = (at_least_float32(p) for p in self.scaling.parameters())
        y_d, u_d, *noise = desired.split(N, dim=-1)
        e_BN = x_BN @ C.t() - y_d
        u_BN = u_d - (K_BNN @ e_BN.unsqueeze(-1)).squeeze(-1)
        gate, value = (x_BN @ W.t() + u_BN @ U.t() + c).chunk(2, dim=-1)
        f_BN = sum(noise[:1], x_BN @ A.t() + u_BN @ B.t() + F.silu(gate) * value)
        x_BN = F.silu(f_BN @ Z.t() + g)
        pull_BN = F.normalize(e_BN, dim=-1) @ (C @ B)
        K_BNN = K_BNN + self.online_rate * pull_BN.unsqueeze(-1) * before_BN.unsqueeze(-2)
        return sum(noise[1:], x_BN @ C.t()), torch.cat([x_BN, e_BN, K_BNN.flatten(1)], dim=-1)

    def initial(self, batch: int, like: Tensor) -> Tensor:
        """(B, 2 N + N^2)"""
        rest = like.new_zeros(2 * self.state)
        return torch.cat([rest, self.control_gain.flatten().to(like)]).expand(batch, -1)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        like = torch.empty(0, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return {"loop": self.initial(batch, like).detach().clone()}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        y_BN, following = self.advance(at_least_float32(self.desired(x_BD)), state["loop"])
        return self.out_proj(y_BN.to(x_BD.dtype)), {"loop": following}

    def flops_per_token(self, context: int) -> float:
        matrices = (self.desired.weight, self.A, self.B, self.C, self.C, self.W, self.U, self.scaling.weight)
        # K is applied, and moved by an outer product with (C B)' e
        gain = 3 * 2.0 * self.state**2
        return linear_flops(*matrices, self.out_proj.weight) + gain
