"""A language model: embedding, blocks, norm, output layer, over a sequence of which this process holds a shard.

Shapes: B batch, T tokens of this shard, N = B T, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import linear_cross_entropy
from ..parallel import SequenceShard, global_sum
from .block import Block, BlockState
from .config import ModelConfig
from .experts import SwiGLUExperts
from .parameters import Embedding, Linear, make_norm, normal

IGNORED = -100
"""Targets with this value count nowhere."""


class Losses(NamedTuple):
    """Scalars, the same on every process.

    Attributes:
        total: what to minimise: their sum. Its backward gives each process its part of the gradient; the sum of the
            parts over all processes that hold tokens is the gradient.
        cross_entropy: nats, mean over all valid targets of the step.
        routers: losses of the experts' routers, already weighted.
    """

    total: Tensor
    cross_entropy: Tensor
    routers: Tensor


class LanguageModel(nn.Module):
    """Every method takes this process's tokens, and the shard that says which they are; None: the whole sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width, config.init_std)
        self.blocks = nn.ModuleList([Block(config, index) for index in range(len(config.plan))])
        self.norm = make_norm(config.norm, config.width, config.norm_eps)
        tied = config.tie_embeddings
        self.head = None if tied else Linear(config.width, config.vocab_size, normal(config.init_std))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, shard: SequenceShard | None = None) -> Losses:
        """The losses of a step.

        Args:
            tokens_BT: int64 token ids of this shard.
            targets_BT: int64 ids that should follow each; -100 where there is nothing to predict.

        Raises:
            ValueError: tokens that are not what the shard says.
        """
        return self._losses(tokens_BT, targets_BT, self._shard(tokens_BT, shard))

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, shard: SequenceShard | None = None) -> Tensor:
        """`forward`'s total: a scalar whose backward is exact."""
        # not through forward: FSDP prepares the parameters for each method it knows, once a call
        return self._losses(tokens_BT, targets_BT, self._shard(tokens_BT, shard)).total

    def _losses(self, tokens_BT: Tensor, targets_BT: Tensor, shard: SequenceShard) -> Losses:
        hidden_BTD, routers = self._hidden(tokens_BT, shard)
        valid = (targets_BT != IGNORED).sum().to(torch.float64)
        summed = linear_cross_entropy(
            hidden_BTD.flatten(0, 1), self.output_weight, targets_BT.flatten(), ignore_index=IGNORED
        )
        cross_entropy = global_sum(summed, shard) / global_sum(valid, shard).clamp(min=1).to(summed.dtype)
        return Losses(cross_entropy + routers, cross_entropy, routers)

    def logits(self, tokens_BT: Tensor, shard: SequenceShard | None = None) -> Tensor:
        """Scores (B, T, V) of the next token after each of this shard's tokens."""
        hidden_BTD, _ = self._hidden(tokens_BT, self._shard(tokens_BT, shard))
        return F.linear(hidden_BTD, self.output_weight)

    def init_state(self, batch: int) -> list[BlockState]:
        """The decoding state before the first token of `batch` sequences."""
        weight = self.embedding.weight
        return [block.init_state(batch, weight.device, weight.dtype) for block in self._blocks()]

    def step(self, token_B: Tensor, state: list[BlockState]) -> tuple[Tensor, list[BlockState]]:
        """Scores (B, V) of the token after `token_B` (int64), and the next state. `state` itself is not changed."""
        x_BD = self.embedding(token_B)
        following: list[BlockState] = []
        for block, block_state in zip(self._blocks(), state, strict=True):
            x_BD, block_state = block.step(x_BD, block_state)
            following.append(block_state)
        return F.linear(self.norm(x_BD), self.output_weight), following

    @property
    def output_weight(self) -> Tensor:
        """(V, D)"""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def max_length(self) -> int | None:
        """The longest sequence that every mixer is defined for; None: any."""
        lengths = [block.mixer.max_length for block in self._blocks() if block.mixer.max_length is not None]
        return min(lengths, default=None)

    def expert_modules(self) -> list[nn.Module]:
        """The modules whose parameters have the experts as their first dimension."""
        return [module for module in self.modules() if isinstance(module, SwiGLUExperts)]

    def num_parameters(self) -> int:
        """Parameters in all, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self) -> int:
        """Parameters that one token meets: of the experts, those it is sent to."""
        feed_forwards = [block.feed_forward for block in self._blocks()]
        return self.num_parameters() - sum(layer.num_idle_parameters for layer in feed_forwards if layer is not None)

    def flops_per_token(self, context: int) -> float:
        """Forward floating-point operations a token (a multiply-add is two), mean over sequences of `context`."""
        return sum(block.flops_per_token(context) for block in self._blocks()) + 2.0 * self.output_weight.numel()

    def state_bytes(self, context: int) -> int:
        """Bytes of the decoding state of one sequence after `context` tokens."""
        return sum(block.state_bytes(context) for block in self._blocks())

    def _hidden(self, tokens_BT: Tensor, shard: SequenceShard) -> tuple[Tensor, Tensor]:
        x_BTD = self.embedding(tokens_BT)
        routers = x_BTD.new_zeros(())
        for block in self.blocks:
            x_BTD, block_loss = block(x_BTD, shard)
            routers = routers + block_loss
        return self.norm(x_BTD), routers

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    @staticmethod
    def _shard(tokens_BT: Tensor, shard: SequenceShard | None) -> SequenceShard:
        if shard is None:
            return SequenceShard.whole(tokens_BT.shape[1])
        if tokens_BT.shape[1] != shard.local_length:
            raise ValueError(f"{tokens_BT.shape[1]} tokens were given; the shard holds {shard.local_length}")
        return shard
