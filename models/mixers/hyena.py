"""Hyena's mixer of order N: gates and long convolutions in turn (Poli et al., arXiv 2302.10866, HazyResearch/safari).

    x_0, ..., x_{N-1}, v = conv3(in_proj(u))
    for o = 0 .. N-2:  v = filter_o * (x_{N-1-o} v) + b_o (x_{N-1-o} v)            y = out_proj(x_0 v)

The filters are functions of the lag: a small network of sines over position features, under an exponential window.
They depend on `max_length` and not on the sequence at hand, so that a filter for a longer sequence begins with the
filter for a shorter one, and any process can evaluate any lags of it. There is no finite state: split sequences meet
in `parallel.convolve`, and decoding keeps the history, unless the filters are made modes (`models.distillation`).

Shapes: B batch, T local tokens, L lags, S tokens so far, D model width, N order, E position features, F filter width.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...kernels import long_convolution, short_convolution
from ...parallel import Filter, SequenceShard, SharedFilter, convolve, projected_halo
from ..parameters import Linear, ParameterModule, at_least_float32, constant, fan_in_uniform, normal, uniform
from .base import (
    LayerPlace,
    Mixer,
    MixerOptions,
    State,
    linear_flops,
    long_convolution_flops,
    tokens_so_far,
    window_before,
)

LAGS_AT_ONCE = 1 << 16
"""Lags of a filter whose hidden activations exist at one time; longer filters are recomputed in the backward pass."""


class HyenaOptions(MixerOptions):
    """Gates and long convolutions in turn.

    Attributes:
        max_length: the longest sequence, to which the filters' positions are normalised; a part of the model.
        order: how many gates; there are `order` - 1 long convolutions.
        conv: taps of the short convolution.
        features: of a position, for the network that makes the filters, odd.
        filter_width: hidden width of that network.
        filter_layers: its inner sine layers.
        sine: the frequency of its sines at first.
        fast: share of `max_length` within which the fastest channel's window has decayed to `target`.
        slow: the same of the slowest channel.
        target: what the windows decay to.
        shift: added to the windows.
    """

    max_length: int = Field(ge=2, default=8192)
    order: int = Field(default=2, ge=2)
    conv: int = Field(default=3, ge=2)
    features: int = Field(default=5, ge=3)
    filter_width: int = Field(default=64, ge=1)
    filter_layers: int = Field(default=2, ge=0)
    sine: float = Field(default=1.0, gt=0)
    fast: float = Field(default=0.3, gt=0)
    slow: float = Field(default=1.5, gt=0)
    target: float = Field(default=1e-2, gt=0, lt=1)
    shift: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _odd(self) -> HyenaOptions:
        if self.features % 2 == 0:
            raise ValueError(f"hyena.features must be odd (one position and pairs of sines), not {self.features}")
        return self

    def build(self, place: LayerPlace) -> Hyena:
        return Hyena(self, place)


class ImplicitFilter(ParameterModule):
    """The N - 1 filters of D channels as functions of the lag, in float32 or better."""

    def __init__(self, options: HyenaOptions, channels: int, init_std: float) -> None:
        super().__init__()
        self.options, self.channels, self.rounds = options, channels, options.order - 1
        widths = [options.features] + [options.filter_width] * (options.filter_layers + 1)
        layers = [Linear(a, b, normal(init_std), bias=True, half=False) for a, b in pairwise(widths)]
        self.layers = torch.nn.ModuleList(layers)
        # as in the authors' code nothing of a filter decays, and all layers share one set of sine frequencies
        for layer in layers:
            layer.undecayed.add("weight")
        self.frequency = self.parameter("frequency", (options.filter_width,), constant(options.sine))
        shape = (channels, self.rounds, options.filter_width)
        self.output = self.parameter("output", shape, normal(init_std), decay=False)

    def forward(self, positions_L: Tensor, channels: slice, convolution: int) -> Tensor:
        """Taps (D of `channels`, L) of convolution number `convolution` at lags `positions_L` (int64)."""
        if len(positions_L) <= LAGS_AT_ONCE:
            return self.evaluate(positions_L, channels, convolution)
        parts = [
            checkpoint(self.evaluate, part_L, channels, convolution, use_reentrant=False, preserve_rng_state=False)
            for part_L in positions_L.split(LAGS_AT_ONCE)
        ]
        return torch.cat(parts, dim=1)

    def evaluate(self, positions_L: Tensor, channels: slice, convolution: int) -> Tensor:
        # half precision cannot tell neighbouring positions apart
        with torch.autocast(positions_L.device.type, enabled=False):
            hidden_LF = self.features(positions_L)
            frequency_F = at_least_float32(self.frequency)
            for layer in self.layers:
                weight, bias = (at_least_float32(parameter) for parameter in layer.parameters())
                hidden_LF = torch.sin(frequency_F * F.linear(hidden_LF, weight, bias))
            filter_DL = at_least_float32(self.output[channels, convolution]) @ hidden_LF.t()
            return filter_DL * self.window(positions_L, channels, convolution)

    @property
    def hidden(self) -> list[torch.nn.Parameter]:
        """The matrices that all channels share."""
        return [layer.weight for layer in self.layers if isinstance(layer, Linear)]

    @property
    def shared_flops(self) -> float:
        """Operations a lag, once for all channels: the matrices, and sines at ten each."""
        sines = self.options.features + self.options.filter_width * len(self.layers)
        return linear_flops(*self.hidden) + 10 * sines

    def features(self, positions_L: Tensor) -> Tensor:
        """(L, E): the position in [0, 1], then cosines and negative sines of it."""
        options = self.options
        pairs = (options.features - 1) // 2
        position_L1 = positions_L.to(torch.float64).unsqueeze(1)
        frequencies = torch.linspace(1e-4, pairs - 1, pairs, dtype=torch.float64, device=positions_L.device)
        angle_LE = position_L1 * (2 * math.pi / options.max_length) * frequencies
        features_LE = torch.cat([position_L1 / (options.max_length - 1), angle_LE.cos(), -angle_LE.sin()], dim=1)
        return features_LE.to(self.dtype)

    def window(self, positions_L: Tensor, channels: slice, convolution: int) -> Tensor:
        """(D of `channels`, L): decay rates evenly spread over channels and convolutions, convolutions minor."""
        options, device = self.options, positions_L.device
        slowest, fastest = (math.log(options.target) / span for span in (options.slow, options.fast))
        count = self.channels * self.rounds
        rates = torch.linspace(slowest, fastest, count, dtype=torch.float64, device=device).abs()
        rates_D1 = rates.reshape(self.channels, self.rounds)[channels, convolution].unsqueeze(1)
        position_L = (positions_L.to(torch.float64) / (options.max_length - 1)).to(self.dtype)
        return torch.exp(-rates_D1.to(self.dtype) * position_L) + options.shift

    @property
    def dtype(self) -> torch.dtype:
        """In which the filter is computed: the parameters', but at least float32."""
        return torch.promote_types(self.frequency.dtype, torch.float32)


class Hyena(Mixer):
    """Order-N Hyena. `conv_weight` ((N + 1) D, W); `skip` (N - 1, D)."""

    def __init__(self, options: HyenaOptions, place: LayerPlace) -> None:
        super().__init__()
        self.width, self.order, self.max_length = place.width, options.order, options.max_length
        streams, init = (options.order + 1) * place.width, normal(place.init_std)
        self.in_proj = Linear(place.width, streams, init, bias=True)
        self.conv_weight = self.parameter("conv_weight", (streams, options.conv), fan_in_uniform())
        self.conv_bias = self.parameter("conv_bias", (streams,), uniform(options.conv**-0.5))
        self.filter = ImplicitFilter(options, place.width, place.init_std)
        self.skip = self.parameter("skip", (options.order - 1, place.width), normal(1.0), decay=False)
        out_init = normal(place.init_std / math.sqrt(2 * place.num_layers))
        self.out_proj = Linear(place.width, place.width, out_init, bias=True)

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        streams_BTM = self.in_proj(x_BTD)
        before_BWM = projected_halo(self.in_proj, x_BTD, self.conv_weight.shape[1] - 1, shard)
        self.check_length(shard.length)
        *gates, v_BTD = self.streams(streams_BTM, before_BWM, shard)
        for convolution in range(self.order - 1):
            taps, skip_D = self.taps(convolution), self.skip[convolution]
            v_BTD = convolve(v_BTD, taps, shard, skip=skip_D, input_gate=gates.pop())
        return self.out_proj((gates.pop() * v_BTD).to(streams_BTM.dtype))

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        streams_BTM, past_BSND = self.in_proj(x_BTD), state["history"]
        before_BWM = window_before(streams_BTM, state["conv"], shard)
        y_BTD, inputs = self.mix(streams_BTM, before_BWM, shard, past_BSND)
        inputs_BSND = tokens_so_far(torch.stack(inputs, dim=2), shard)
        lags_L = torch.arange(past_BSND.shape[1] + shard.stop, device=x_BTD.device)
        taps = [self.filter(lags_L, slice(0, self.width), convolution) for convolution in range(self.order - 1)]
        return y_BTD, {
            "conv": torch.cat([before_BWM, streams_BTM], dim=1)[:, -before_BWM.shape[1] :],
            "history": torch.cat([past_BSND, inputs_BSND], dim=1),
            "taps": torch.stack(taps).unsqueeze(0),
        }

    def streams(self, projected_BTM: Tensor, before_BWM: Tensor, shard: SequenceShard) -> tuple[Tensor, ...]:
        """The gates x_0, ..., x_{N-1} and v, each (B, T, D)."""
        streams_BTM = short_convolution(
            projected_BTM,
            self.conv_weight,
            self.conv_bias,
            halo=before_BWM,
            document_starts=shard.start_mask(projected_BTM.device),
        )
        return streams_BTM.split(self.width, dim=-1)

    def mix(
        self, streams_BTM: Tensor, before_BWM: Tensor, shard: SequenceShard, past_BSND: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The outputs, and the inputs (B, T, D) of each long convolution.

        `past_BSND`: those inputs at the tokens before the sequence, S of them or none.
        """
        past = past_BSND.shape[1]
        self.check_length(past + shard.length)
        dtype, inputs = streams_BTM.dtype, []
        *gates, v_BTD = self.streams(streams_BTM, before_BWM, shard)
        for convolution in range(self.order - 1):
            inputs.append(gates.pop() * v_BTD)
            taps, skip_D = self.taps(convolution), self.skip[convolution]
            if not past:
                v_BTD = convolve(inputs[-1], taps, shard, skip=skip_D)
                continue
            seen_BSD = torch.cat([past_BSND[:, :, convolution], tokens_so_far(inputs[-1], shard)], dim=1)
            taps_DS = taps(torch.arange(seen_BSD.shape[1], device=seen_BSD.device), slice(0, self.width))
            v_BTD = long_convolution(seen_BSD, taps_DS, skip=skip_D)[:, -shard.local_length :]
        return self.out_proj((gates.pop() * v_BTD).to(dtype)), inputs

    def taps(self, convolution: int) -> Filter:
        """The filter as `parallel.convolve` asks for it: (global lags, channels) -> taps."""
        return SharedFilter(
            lambda lags_K, channels: self.filter(lags_K, channels, convolution), self.filter.shared_flops
        )

    def check_length(self, length: int) -> None:
        longest = self.filter.options.max_length
        if length > longest:
            raise ValueError(
                f"hyena: {length} tokens are more than max_length {longest}, to which its filters were made; "
                f"set hyena.max_length to at least {length} before training"
            )

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        window, streams = self.conv_weight.shape[1] - 1, self.conv_weight.shape[0]
        taps_dtype = torch.promote_types(dtype, torch.float32)
        return {
            "conv": torch.zeros(batch, window, streams, device=device, dtype=dtype),
            "history": torch.zeros(batch, 0, self.order - 1, self.width, device=device, dtype=dtype),
            "taps": torch.zeros(1, self.order - 1, self.width, 0, device=device, dtype=taps_dtype),
        }

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        position = state["history"].shape[1]
        self.check_length(position + 1)
        window_BWM = torch.cat([state["conv"], self.in_proj(x_BD).unsqueeze(1)], dim=1)
        streams_BM = torch.einsum("bwm,mw->bm", window_BWM, self.conv_weight) + self.conv_bias
        *gates, v_BD = streams_BM.split(self.width, dim=-1)
        taps_1NDS = self.extend(state["taps"])
        inputs: list[Tensor] = []
        for convolution in range(self.order - 1):
            gated_BD = gates.pop() * v_BD
            inputs.append(gated_BD)
            history_BSD = torch.cat([state["history"][:, :, convolution], gated_BD.unsqueeze(1)], dim=1)
            backwards_DS = taps_1NDS[0, convolution].flip(-1)
            v_BD = torch.einsum("bsd,ds->bd", history_BSD.to(backwards_DS.dtype), backwards_DS)
            v_BD = (v_BD + self.skip[convolution] * gated_BD).to(x_BD.dtype)
        history_BSND = torch.cat([state["history"], torch.stack(inputs, dim=1).unsqueeze(1)], dim=1)
        state = {"conv": window_BWM[:, 1:], "history": history_BSND, "taps": taps_1NDS}
        return self.out_proj(gates.pop() * v_BD), state

    def extend(self, taps_1NDS: Tensor) -> Tensor:
        """The taps known so far and those of the next lag."""
        lag_L = torch.full((1,), taps_1NDS.shape[-1], device=taps_1NDS.device)
        filters = [self.filter(lag_L, slice(0, self.width), convolution) for convolution in range(self.order - 1)]
        return torch.cat([taps_1NDS, torch.stack(filters).unsqueeze(0)], dim=-1)

    def flops_per_token(self, context: int) -> float:
        # the filters have a tap for each token
        filters = linear_flops(*self.filter.hidden, self.filter.output)
        convolutions = (self.order - 1) * self.width * long_convolution_flops(context)
        return linear_flops(self.in_proj.weight, self.out_proj.weight, self.conv_weight) + filters + convolutions

    def state_bytes(self, context: int) -> int:
        (streams, window), dtype = self.conv_weight.shape, self.conv_weight.dtype
        element = context * (self.order - 1) * self.width
        taps_itemsize = torch.promote_types(dtype, torch.float32).itemsize
        return (streams * (window - 1) + element) * dtype.itemsize + element * taps_itemsize
