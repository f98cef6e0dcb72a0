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
from .dropout import DropoutKey, dropout
from .experts import SwiGLUExperts
from .mixers.base import Shared
from .noise import NOISE
from .parameters import Embedding, Linear, at_least_float32, make_norm, normal, orthogonal

IGNORED = -100
"""Targets with this value count nowhere."""
SCORED_AT_ONCE = 1024
"""Tokens whose logits are held at a time."""


class Losses(NamedTuple):
    """Scalars, the same on every process.

    Attributes:
        total: what to minimise: their sum, and what `logit_pull` adds. Its backward gives each process its part of the
            gradient; the sum of the parts over all processes that hold tokens is the gradient.
        cross_entropy: nats, mean over all valid targets of the step.
        routers: losses of the experts' routers, already weighted.
    """

    total: Tensor
    cross_entropy: Tensor
    routers: Tensor


class Part(NamedTuple):
    """A part of a step that is computed in several, whose losses and gradients add up to the step's.

    Attributes:
        share: of the step's sequences.
        num_targets: valid ones of the whole step, on all processes.
    """

    share: float
    num_targets: int


class Scores(NamedTuple):
    """Of each of this shard's tokens, (B, T): `loss_BT`, nats, 0 where nothing is asked for; `correct_BT`, whether the
    likeliest token is the target."""

    loss_BT: Tensor
    correct_BT: Tensor


class LanguageModel(nn.Module):
    """Every method takes this process's tokens, and the shard that says which they are; None: the whole sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width, config.embedding_std or config.init_std)
        normed = config.embedding_norm
        self.embedding_norm = make_norm(config.norm, config.width, config.norm_eps) if normed else None
        self.blocks = nn.ModuleList([Block(config, index) for index in range(len(config.plan))])
        self.norm = make_norm(config.norm, config.width, config.norm_eps)
        head_init = orthogonal(config.head_gain) if config.head_gain else normal(config.init_std)
        self.head = None if config.tie_embeddings else Linear(config.width, config.vocab_size, head_init)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        shard: SequenceShard | None = None,
        dropout_key: DropoutKey | None = None,
        part: Part | None = None,
    ) -> Losses:
        """The losses of a step.

        Args:
            tokens_BT: int64 token ids of this shard.
            targets_BT: int64 ids that should follow each; -100 where there is nothing to predict.
            dropout_key: of a training step: what the config's `embedding_dropout` drops, and the noise that layers
                draw; without it there is neither.
            part: what these tokens are of the step; None: all of it. A router's loss that is no mean over tokens is one
                over parts.

        Raises:
            ValueError: tokens that are not what the shard says.
        """
        return self._losses(tokens_BT, targets_BT, self._shard(tokens_BT, shard), dropout_key, part)

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        shard: SequenceShard | None = None,
        dropout_key: DropoutKey | None = None,
    ) -> Tensor:
        """`forward`'s total: a scalar whose backward is exact."""
        # not through forward: FSDP prepares the parameters for each method it knows, once a call
        return self._losses(tokens_BT, targets_BT, self._shard(tokens_BT, shard), dropout_key).total

    def _losses(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        shard: SequenceShard,
        dropout_key: DropoutKey | None,
        part: Part | None = None,
    ) -> Losses:
        hidden_BTD, routers = self._hidden(tokens_BT, shard, dropout_key)
        summed = linear_cross_entropy(
            hidden_BTD.flatten(0, 1), self.output_weight, targets_BT.flatten(), ignore_index=IGNORED
        )
        if part is None:
            valid = global_sum((targets_BT != IGNORED).sum().to(torch.float64), shard).clamp(min=1).to(summed.dtype)
        else:
            valid, routers = max(1, part.num_targets), routers * part.share
        cross_entropy = global_sum(summed, shard) / valid
        total = cross_entropy + routers
        if self.config.logit_pull:
            largest_N = largest_logits(hidden_BTD.flatten(0, 1), self.output_weight)
            count = largest_N.new_full((), largest_N.numel(), dtype=torch.float64)
            mean_square = global_sum(largest_N.square().sum(), shard) / global_sum(count, shard).to(largest_N.dtype)
            total = total + 0.5 * self.config.logit_pull * mean_square * (1.0 if part is None else part.share)
        return Losses(total, cross_entropy, routers)

    def logits(self, tokens_BT: Tensor, shard: SequenceShard | None = None) -> Tensor:
        """Scores (B, T, V) of the next token after each of this shard's tokens."""
        hidden_BTD, _ = self._hidden(tokens_BT, self._shard(tokens_BT, shard))
        return F.linear(hidden_BTD, self.output_weight)

    def scores(self, tokens_BT: Tensor, targets_BT: Tensor, shard: SequenceShard | None = None) -> Scores:
        """How well each target is foretold; arguments and errors as of `forward`. The logits are never whole."""
        hidden_BTD, _ = self._hidden(tokens_BT, self._shard(tokens_BT, shard))
        targets_N = targets_BT.flatten()
        loss_N = hidden_BTD.new_zeros(targets_N.shape, dtype=torch.float64)
        correct_N = torch.zeros_like(targets_N, dtype=torch.bool)
        for places in (targets_N != IGNORED).nonzero()[:, 0].split(SCORED_AT_ONCE):
            logits_CV = F.linear(hidden_BTD.flatten(0, 1)[places], self.output_weight)
            loss_N[places] = F.cross_entropy(logits_CV.double(), targets_N[places], reduction="none")
            correct_N[places] = logits_CV.argmax(-1) == targets_N[places]
        return Scores(loss_N.view_as(targets_BT), correct_N.view_as(targets_BT))

    def init_state(self, batch: int) -> list[BlockState]:
        """The decoding state before the first token of `batch` sequences."""
        weight = self.embedding.weight
        return [block.init_state(batch, weight.device, weight.dtype) for block in self._blocks()]

    def prefill(
        self, tokens_BT: Tensor, shard: SequenceShard | None = None, state: list[BlockState] | None = None
    ) -> tuple[Tensor, list[BlockState]]:
        """Read a prompt, split over the sequence group as in training, and go on with `step`.

        Args:
            tokens_BT: int64 ids of this shard; each row is one document.
            state: what came before the prompt, the same on every process; by default nothing.

        Returns:
            Scores (B, V) of the token after this shard's last, and the state there: on the last process of the
            sequence group, those after the whole prompt.

        Raises:
            ValueError: documents begin inside the prompt, or tokens are not what the shard says.
        """
        shard = self._shard(tokens_BT, shard)
        if shard.document_starts is not None:
            raise ValueError("a prompt is one document: give prefill a shard without document_starts")
        x_BTD, following = self._embed(tokens_BT), []
        shared: Shared = {}
        state = self.init_state(len(tokens_BT)) if state is None else state
        for block, block_state in zip(self._blocks(), state, strict=True):
            x_BTD, block_state, added = block.prefill(x_BTD, shard, block_state, shared)
            shared = {**shared, **added}
            following.append(block_state)
        return F.linear(self.norm(x_BTD[:, -1]), self.output_weight), following

    def step(self, token_B: Tensor, state: list[BlockState]) -> tuple[Tensor, list[BlockState]]:
        """Scores (B, V) of the token after `token_B` (int64), and the next state. `state` itself is not changed."""
        x_BD = self._embed(token_B)
        following: list[BlockState] = []
        shared: Shared = {}
        for block, block_state in zip(self._blocks(), state, strict=True):
            x_BD, block_state, added = block.step(x_BD, block_state, shared)
            shared = {**shared, **added}
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

    def end_step(self) -> None:
        """To be called on every process after an optimiser step: layers that also adapt otherwise do so now."""
        for block in self._blocks():
            block.end_step()

    @property
    def labels(self) -> list[str]:
        """The blocks' names in a communication ledger."""
        return [block.label for block in self._blocks()]

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

    def _hidden(
        self, tokens_BT: Tensor, shard: SequenceShard, dropout_key: DropoutKey | None = None
    ) -> tuple[Tensor, Tensor]:
        x_BTD = self._embed(tokens_BT)
        if dropout_key is not None and self.config.embedding_dropout:
            x_BTD = dropout(x_BTD, self.config.embedding_dropout, dropout_key, shard.start)
        routers = x_BTD.new_zeros(())
        shared: Shared = {}
        if dropout_key is not None and any(block.mixer.noise for block in self._blocks()):
            streams = dropout_key.streams(len(x_BTD), NOISE)
            shared[NOISE] = torch.tensor(streams, dtype=torch.int64).to(x_BTD.device, non_blocking=True)
        for block in self.blocks:
            x_BTD, block_loss, added = block(x_BTD, shard, shared)
            shared = {**shared, **added}
            routers = routers + block_loss
        return self.norm(x_BTD), routers

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    @staticmethod
    def _shard(tokens_BT: Tensor, shard: SequenceShard | None) -> SequenceShard:
        if tokens_BT.dim() != 2 or tokens_BT.is_floating_point():
            given = f"{tokens_BT.dtype} of shape {tuple(tokens_BT.shape)}"
            raise ValueError(f"tokens are {given}; give int64 (batch, length)")
        if shard is None:
            return SequenceShard.whole(tokens_BT.shape[1])
        if tokens_BT.shape[1] != shard.local_length:
            raise ValueError(f"{tokens_BT.shape[1]} tokens were given; the shard holds {shard.local_length}")
        return shard


def largest_logits(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """Each token's largest logit (N,), float32 or wider, differentiable; the logits are never whole."""
    with torch.no_grad():
        pieces = [F.linear(part, weight_VD).argmax(-1) for part in hidden_ND.split(SCORED_AT_ONCE)]
        likeliest_N = torch.cat(pieces) if pieces else hidden_ND.new_zeros(0, dtype=torch.int64)
    return (at_least_float32(hidden_ND) * at_least_float32(weight_VD[likeliest_N])).sum(-1)
