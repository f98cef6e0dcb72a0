"""FSDP2's own messages in the ledger: parameters gathered before a layer computes, gradients summed after it did.

Seconds are those for which the calling thread is held: all of the message with gloo, none with NCCL, whose messages
run on a stream of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from .ledger import CommunicationLedger


@dataclass
class CountedAllGather(DefaultAllGather):
    """FSDP2's all-gather of a layer's parameters, counted under `layer`."""

    ledger: CommunicationLedger
    layer: str

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        # the backward pass gathers again, for a recomputed forward pass too
        direction = "forward" if torch._C._current_graph_task_id() == -1 else "backward"
        motion, others = f"fsdp.all_gather.{direction}", input_tensor.nbytes * (group.size() - 1)
        self.ledger.record(motion, self.layer, sent=others, received=others)
        with self.ledger.waiting(motion, self.layer):
            return super().__call__(output_tensor, input_tensor, group, async_op)


@dataclass
class CountedReduceScatter(DefaultReduceScatter):
    """FSDP2's reduce-scatter of a layer's gradients, counted under `layer`."""

    ledger: CommunicationLedger
    layer: str

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work:
        motion, others = "fsdp.reduce_scatter.backward", output_tensor.nbytes * (group.size() - 1)
        self.ledger.record(motion, self.layer, sent=others, received=others)
        with self.ledger.waiting(motion, self.layer):
            return super().__call__(output_tensor, input_tensor, group, op, async_op)


@dataclass
class CountAllReduce:
    """Told by FSDP2 what it has just summed over copies of the sharded parameters (HSDP)."""

    ledger: CommunicationLedger
    layer: str

    def __call__(self, reduced: Tensor) -> None:
        self.ledger.record("fsdp.all_reduce.backward", self.layer, sent=reduced.nbytes, received=reduced.nbytes)
