"""One layer of a model: norm, mixer, residual; then, unless it has none, norm, feed-forward layer, residual.

Shapes: B batch, T tokens of this shard, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from ..parallel import SequenceShard
from .config import ModelConfig
from .mixers.base import LayerPlace, Shared, State
from .parameters import make_norm

BlockState = dict[str, State]
"""`mixer` and `feed_forward` states of one block."""


class Block(nn.Module):
    """Layer number `index` of the config's plan, pre-norm."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        layer = config.plan[index]
        first = all(earlier.mixer != layer.mixer for earlier in config.plan[:index])
        place = LayerPlace(config.width, index, len(config.plan), config.norm_eps, config.init_std, first)
        feed_forward_options = config.feed_forward_options(layer)
        self.label = f"{index}.{layer.mixer}"
        self.mixer_norm = make_norm(config.norm, config.width, config.norm_eps)
        self.mixer = config.mixer_options(layer).build(place)
        self.recompute = config.recompute and self.mixer.recomputable
        self.feed_forward = feed_forward_options.build(place) if feed_forward_options else None
        has_second = self.feed_forward is not None
        self.feed_forward_norm = make_norm(config.norm, config.width, config.norm_eps) if has_second else None

    def forward(
        self, x_BTD: Tensor, shard: SequenceShard, shared: Shared | None = None
    ) -> tuple[Tensor, Tensor, Shared]:
        """(outputs, the block's own loss: a scalar, zero where it has none, what it adds to what blocks share)."""
        shared = shared or {}
        if not (self.recompute and torch.is_grad_enabled()):
            return self.compute(x_BTD, shard, shared)
        # never stop the recomputation early: where it stops depends on the rank, and it contains collectives
        outputs = checkpoint(
            self.compute, x_BTD, shard, shared, use_reentrant=False, early_stop=False, preserve_rng_state=False
        )
        assert isinstance(outputs, tuple)
        return outputs

    def compute(self, x_BTD: Tensor, shard: SequenceShard, shared: Shared) -> tuple[Tensor, Tensor, Shared]:
        shard = shard.labelled(self.label)
        loss = None
        with record_function(self.label):
            y_BTD, added = self.mixer.share(self.mixer_norm(x_BTD), shard, shared)
            x_BTD = x_BTD + y_BTD
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            with record_function(f"{self.label} feed-forward"):
                y_BTD, loss = self.feed_forward(self.feed_forward_norm(x_BTD), shard)
                x_BTD = x_BTD + y_BTD
        return x_BTD, x_BTD.new_zeros(()) if loss is None else loss, added

    def end_step(self) -> None:
        """See `Mixer.end_step`."""
        self.mixer.end_step()
        if self.feed_forward is not None:
            self.feed_forward.end_step()

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> BlockState:
        second = self.feed_forward.init_state(batch, device, dtype) if self.feed_forward is not None else {}
        return {"mixer": self.mixer.init_state(batch, device, dtype), "feed_forward": second}

    def prefill(
        self, x_BTD: Tensor, shard: SequenceShard, state: BlockState, shared: Shared
    ) -> tuple[Tensor, BlockState, Shared]:
        """`compute` without losses, and the state after this shard's last token; see `Mixer.prefill`."""
        shard = shard.labelled(self.label)
        normed_BTD = self.mixer_norm(x_BTD)
        y_BTD, mixer_state, added = self.mixer.share_prefill(normed_BTD, shard, state["mixer"], shared)
        x_BTD, second_state = x_BTD + y_BTD, state["feed_forward"]
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            y_BTD, second_state = self.feed_forward.prefill(self.feed_forward_norm(x_BTD), shard, second_state)
            x_BTD = x_BTD + y_BTD
        return x_BTD, {"mixer": mixer_state, "feed_forward": second_state}, added

    def step(self, x_BD: Tensor, state: BlockState, shared: Shared) -> tuple[Tensor, BlockState, Shared]:
        y_BD, mixer_state, added = self.mixer.share_step(self.mixer_norm(x_BD), state["mixer"], shared)
        x_BD, second_state = x_BD + y_BD, state["feed_forward"]
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            y_BD, second_state = self.feed_forward.step(self.feed_forward_norm(x_BD), second_state)
            x_BD = x_BD + y_BD
        return x_BD, {"mixer": mixer_state, "feed_forward": second_state}, added

    def flops_per_token(self, context: int) -> float:
        second = self.feed_forward.flops_per_token() if self.feed_forward is not None else 0.0
        return self.mixer.flops_per_token(context) + second

    def state_bytes(self, context: int) -> int:
        second = self.feed_forward.state_bytes() if self.feed_forward is not None else 0
        return self.mixer.state_bytes(context) + second
