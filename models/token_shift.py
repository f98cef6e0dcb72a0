"""Token shift: the token before each token (RWKV, arXiv 2305.13048). Shapes: B batch, T local tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from ..parallel import SequenceShard, halo


def token_shift(x_BTD: Tensor, shard: SequenceShard) -> Tensor:
    """The token before each token, on whatever process; zeros before a document's first."""
    before_BTD = torch.cat([halo(x_BTD, 1, shard), x_BTD[:, :-1]], dim=1)
    starts_BT = shard.start_mask(x_BTD.device)
    return before_BTD if starts_BT is None else before_BTD.masked_fill(starts_BT.unsqueeze(-1), 0)
