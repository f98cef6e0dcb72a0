"""Mesh: the only place that knows how processes are laid out, and the one place that checks that degrees divide.

Axes, slowest first: `replicate` (whole copies of the sharded parameters, HSDP), `data` (different sequences),
`sequence` (parts of the same sequences; neighbours in rank, so that they stay inside a node first). Parameters are
sharded over data x sequence; experts over `expert`, folded over data x sequence, and then over what remains.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .ledger import CommunicationLedger
from .shard import SequenceShard, Strategies

Degree = Literal["auto"] | int


class MeshConfig(BaseModel):
    """Degrees of parallelism; "auto" is resolved from the number of workers."""

    model_config = ConfigDict(extra="forbid")

    replicate: int = Field(default=1, ge=1, description="whole copies of the sharded parameters")
    data: Degree = Field(default="auto", description="groups of processes that work on different sequences")
    sequence: Degree = Field(default="auto", description="processes that share every sequence")
    expert: Degree = Field(default="auto", description="processes over which experts are spread")
    prefix: Literal["auto", "all_gather", "logarithmic", "pipelined", "hierarchical"] = Field(
        default="auto", description="how the states of recurrences travel between the processes of a sequence"
    )
    attention: Literal["auto", "heads", "ring", "grid", "gather"] = Field(
        default="auto", description="how keys and values meet the queries of other processes"
    )
    convolution: Literal["auto", "channels", "length"] = Field(
        default="auto",
        description="how long implicit filters are applied: to whole sequences of some channels, or to parts",
    )

    @property
    def strategies(self) -> Strategies:
        """How the motions travel."""
        return Strategies(prefix=self.prefix, attention=self.attention, convolution=self.convolution)

    def resolve(self, workers: int, num_experts: int = 0) -> Degrees:
        """The degrees for `workers` processes and a model of `num_experts` experts (0: none).

        Sequence takes what data leaves (all workers by default); expert is the largest degree that divides both.

        Raises:
            ValueError: degrees that do not multiply to the workers, or experts that do not divide.
        """
        for name in ("data", "sequence", "expert"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ValueError(f"parallel.{name} must be at least 1, got {value}")
        known_data = 1 if self.data == "auto" else self.data
        sequence = self.sequence if self.sequence != "auto" else max(1, workers // (self.replicate * known_data))
        data = max(1, workers // (self.replicate * sequence)) if self.data == "auto" else self.data
        if self.replicate * data * sequence != workers:
            raise ValueError(
                f"parallel.replicate {self.replicate} x data {data} x sequence {sequence} = "
                f"{self.replicate * data * sequence} does not match workers={workers}: "
                f"set workers={self.replicate * data * sequence} or change a degree"
            )
        return Degrees(self.replicate, data, sequence, self._expert(data * sequence, num_experts))

    def _expert(self, processes: int, num_experts: int) -> int:
        if self.expert == "auto":
            return gcd(num_experts, processes) if num_experts else 1
        if num_experts and num_experts % self.expert:
            raise ValueError(
                f"parallel.expert {self.expert} does not divide the model's {num_experts} experts: "
                f"use {_nearest_divisor(num_experts, self.expert)}"
            )
        if processes % self.expert:
            raise ValueError(
                f"parallel.expert {self.expert} does not divide data x sequence = {processes} processes: "
                f"use {_nearest_divisor(processes, self.expert)}"
            )
        return self.expert


@dataclass(frozen=True)
class Degrees:
    """Concrete degrees of parallelism."""

    replicate: int = 1
    data: int = 1
    sequence: int = 1
    expert: int = 1

    @property
    def workers(self) -> int:
        return self.replicate * self.data * self.sequence


class Mesh:
    """The processes of a run, arranged by degrees; needs an initialised process group of that many processes.

    `node_size`: processes per machine, neighbours in rank; None when all are on one.

    Raises:
        ValueError: the degrees do not multiply to the number of processes, or expert does not divide data x sequence.
    """

    def __init__(
        self,
        replicate: int = 1,
        data: int = 1,
        sequence: int = 1,
        expert: int = 1,
        device: str = "cpu",
        *,
        strategies: Strategies | None = None,
        node_size: int | None = None,
    ) -> None:
        self.degrees = MeshConfig(replicate=replicate, data=data, sequence=sequence, expert=expert).resolve(
            dist.get_world_size()
        )
        self.device = device
        self.strategies = strategies or Strategies()
        self.node_size = node_size
        self._lengths: set[int] = set()
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        shape = (replicate, data, sequence)
        self._tokens = init_device_mesh(device, shape, mesh_dim_names=("replicate", "data", "sequence"))
        shape = (replicate, data * sequence // expert, expert)
        self._experts = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard", "expert"))
        flat = (replicate, data * sequence)
        self._parameters = init_device_mesh(device, flat, mesh_dim_names=("replicate", "shard"))

    @property
    def sequence_rank(self) -> int:
        return self._tokens.get_local_rank("sequence")

    @property
    def sequence_size(self) -> int:
        return self.degrees.sequence

    @property
    def sequence_group(self) -> dist.ProcessGroup:
        """The processes that share this process's sequences."""
        return self._tokens.get_group("sequence")

    @property
    def data_rank(self) -> int:
        """Which share of the batch this process works on, over replicate x data."""
        return self._tokens.get_local_rank("replicate") * self.degrees.data + self._tokens.get_local_rank("data")

    @property
    def data_size(self) -> int:
        """Number of shares of the batch: replicate x data."""
        return self.degrees.replicate * self.degrees.data

    @property
    def expert_size(self) -> int:
        return self.degrees.expert

    @property
    def expert_axis(self) -> DeviceMesh:
        """Processes over which experts are spread."""
        return self._experts["expert"]

    @property
    def parameter_axes(self) -> DeviceMesh:
        """Where dense parameters are sharded: ("shard",), or ("replicate", "shard") with copies."""
        return self._parameters if self.degrees.replicate > 1 else self._parameters["shard"]

    @property
    def expert_parameter_axes(self) -> DeviceMesh:
        """Where each expert's own parameters are sharded beside the expert axis."""
        return self._experts["replicate", "shard"] if self.degrees.replicate > 1 else self._experts["shard"]

    def shard(
        self,
        length: int,
        document_starts: object = None,
        ledger: CommunicationLedger | None = None,
        *,
        checked: bool | None = None,
    ) -> SequenceShard:
        """This process's part of sequences of `length` tokens.

        `checked`: whether what the processes of the sequence have is compared, and every message of the shard (see
        `SequenceShard`); by default for the first shard of each length.
        """
        first = length not in self._lengths
        self._lengths.add(length)
        return SequenceShard.split(
            length,
            self.sequence_group,
            document_starts,
            token_group=dist.group.WORLD,
            expert_group=self._experts.get_group("expert") if self.expert_size > 1 else None,
            ledger=ledger,
            strategies=self.strategies,
            node_size=min(self.node_size, self.sequence_size) if self.node_size else None,
            checked=first if checked is None else checked,
        )


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))
