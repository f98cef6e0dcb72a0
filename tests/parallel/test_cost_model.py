"""Which way a state takes: the cost model's choice for small and large states, few and many processes, and nodes."""

from __future__ import annotations

import pytest
import torch

from longstride.parallel import Constant, SequenceShard
from longstride.parallel.prefix_strategies import choose_strategy, predicted_seconds
from longstride.parallel.segment import Segment
from longstride.parallel.shard import Link, even_bounds

GLOO, NCCL = Link.for_backend("gloo"), Link.for_backend("nccl")
KB, MB, GB = 1_000, 1_000_000, 1_000_000_000


def shard_of(processes: int, link: Link, node_size: int | None = None) -> SequenceShard:
    return SequenceShard(even_bounds(1 << 20, processes), link=link, node_size=node_size)


@pytest.mark.parametrize(
    ("processes", "node_size", "link", "state_bytes", "expected"),
    [
        (2, None, GLOO, 10 * KB, "all_gather"),  # one message either way
        (2, None, NCCL, 4 * MB, "all_gather"),
        (4, None, GLOO, 10 * KB, "all_gather"),  # latency: one collective against two rounds
        (8, None, GLOO, 10 * KB, "all_gather"),
        (8, None, NCCL, 560 * KB, "logarithmic"),
        (64, None, GLOO, 100 * KB, "logarithmic"),  # bytes: 63 states against 6
        (64, None, NCCL, 4 * MB, "logarithmic"),
        (1024, None, NCCL, 560 * KB, "logarithmic"),
        (4, None, NCCL, GB, "pipelined"),  # bandwidth: a state once, in slices, on a short chain
        (8, None, GLOO, GB, "pipelined"),
        (64, 8, NCCL, 4 * MB, "hierarchical"),  # between nodes only slices
        (1024, 8, NCCL, 16 * MB, "logarithmic"),  # slices of 127 other nodes are more than ten states
        (64, 8, NCCL, KB, "all_gather"),  # latency again: one message against three
        (8, 8, NCCL, 560 * KB, "logarithmic"),  # one node is no hierarchy
        (12, 8, NCCL, 560 * KB, "logarithmic"),  # nor are processes that are not whole nodes
    ],
)
def test_the_cheapest_is_chosen(
    processes: int, node_size: int | None, link: Link, state_bytes: int, expected: str
) -> None:
    shard = shard_of(processes, link, node_size)
    seconds = predicted_seconds(state_bytes, shard)
    assert min(seconds, key=lambda name: seconds[name]) == expected, seconds
    state = torch.empty(1, state_bytes // 4, 1, device="meta")
    segment = Segment(Constant(torch.zeros(1)), None, None, state, 1)
    assert choose_strategy("auto", segment, shard) == expected
    assert choose_strategy("pipelined", segment, shard) == "pipelined"  # what is asked for is done


def test_predictions_are_the_formulas() -> None:
    link = Link(latency=1.0, bytes_per_second=10.0, bytes_per_second_in_node=100.0)
    seconds = predicted_seconds(1000, shard_of(16, link, node_size=4))
    assert seconds == {
        "all_gather": 1 + 15 * 100,
        "logarithmic": 4 * (1 + 100),
        "pipelined": (16 + 4 - 2) * (1 + 100 / 4),
        "hierarchical": 3 * 1 + 2 * 10 + 3 * 100 / 4,
    }


def test_the_networks_of_a_group_with_two_backends_are_the_faster() -> None:
    """Runs on GPUs have gloo beside NCCL, for what lies on the CPU."""
    assert Link.for_backend("cpu:gloo,cuda:nccl") == NCCL != GLOO
