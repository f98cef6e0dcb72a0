"""Normal numbers for layers that add noise in training; like dropout's, the same ones however a step is split.

Two numbers follow from 64 random bits by Box and Muller's transformation, and those from the run's seed, the step, the
sequence's row in the global batch, the layer, the token's position in the whole sequence and the feature.

Shapes: B rows here, T tokens of this shard, D features, C = ceil(D / 2) pairs of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dropout import DRAWN_AT_ONCE, GOLDEN, as_int64, mix

NOISE = "noise"
"""The name under which the rows' streams (B,), int64, reach the layers of a training step; see `mixers.base.Shared`."""


def normal_numbers(streams_B: Tensor, layer: int, x_BTD: Tensor, start: int, width: int | None = None) -> Tensor:
    """Independent standard normal numbers as many as in `x_BTD`, or `width` a token; of its dtype, at least float32.

    `start`: the global position of the first token here.
    """
    tokens, width = x_BTD.shape[1], width or x_BTD.shape[2]
    pairs = -(-width // 2)
    # each layer has its own stream: SplitMix64's way of splitting one
    streams_B = mix(streams_B + as_int64((layer + 1) * GOLDEN))
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    normal_BTD = torch.empty(len(streams_B), tokens, width, dtype=dtype, device=streams_B.device)
    at_once = max(1, DRAWN_AT_ONCE // max(1, len(streams_B) * pairs))
    for first in range(0, tokens, at_once):
        last = min(first + at_once, tokens)
        places = torch.arange((start + first) * pairs + 1, (start + last) * pairs + 1, device=streams_B.device)
        draws_BTC = mix(streams_B[:, None, None] + (places * GOLDEN).view(-1, pairs))
        normal_BTD[:, first:last] = _box_muller(draws_BTC)[..., :width]
    return normal_BTD


def _box_muller(draws_BTC: Tensor) -> Tensor:
    """(B, T, 2 C), float64."""
    halves_BTC2 = draws_BTC.view(torch.int32).unflatten(-1, (-1, 2))
    uniform_BTC2 = (halves_BTC2.double() + (2**31 + 0.5)) / 2**32  # inside (0, 1)
    radius_BTC, angle_BTC = (-2 * uniform_BTC2[..., 0].log()).sqrt(), 2 * math.pi * uniform_BTC2[..., 1]
    return torch.stack([radius_BTC * angle_BTC.cos(), radius_BTC * angle_BTC.sin()], dim=-1).flatten(2)
