"""FSDP2's own messages in the ledger: bytes by the shapes of what travels, their number by PyTorch's own count."""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed.tensor.debug import CommDebugMode

from longstride.parallel import CommunicationLedger, Mesh, shard_model
from tests.distributed import run_ranks
from tests.parallel.oracles import normal
from tests.parallel.test_fsdp import BATCH, EXPERTS, LENGTH, WIDTH, Toy

FLOAT64 = 8
DENSE = WIDTH * WIDTH + WIDTH + EXPERTS * WIDTH  # a block's linear layer and router
Counts = dict[tuple[str, str], tuple[int, int, int]]


def one_step(rank: int, world: int, degrees: dict[str, int]) -> tuple[Counts, dict[str, int]]:
    """(calls, bytes sent, bytes received) by motion and layer, and PyTorch's count of calls."""
    mesh, ledger, model = Mesh(**degrees), CommunicationLedger(), Toy()
    experts = [block.experts for block in model.blocks]  # type: ignore[union-attr]
    units: dict[str, Any] = {"blocks": list(model.blocks), "experts": experts, "labels": ["0.toy", "1.toy"]}
    shard_model(model, mesh, **units, forward_methods=["loss"], ledger=ledger)
    shard = mesh.shard(LENGTH, checked=False)  # comparing what processes have would gather too
    rows = slice(mesh.data_rank * BATCH // mesh.data_size, (mesh.data_rank + 1) * BATCH // mesh.data_size)
    x = normal(BATCH, LENGTH, WIDTH, seed=50)[rows, shard.start : shard.stop]
    with CommDebugMode() as counted:
        model.loss(x, x, shard).backward()
    found = {(row.motion, row.layer): (row.calls, row.bytes_sent, row.bytes_received) for row in ledger.rows()}
    calls: dict[str, int] = {}
    for operation, number in counted.get_comm_counts().items():
        for kind in ("all_gather", "allgather", "reduce_scatter"):
            if kind in str(operation):
                name = kind.replace("allgather", "all_gather")
                calls[name] = calls.get(name, 0) + number
    return found, calls


@pytest.mark.parametrize(
    ("degrees", "shards", "expert_shards"),
    [
        ({"sequence": 2}, 2, 0),
        ({"sequence": 2, "expert": 2}, 2, 1),
        ({"data": 2, "sequence": 2, "expert": 2}, 4, 2),
        ({"replicate": 2, "sequence": 2, "expert": 2}, 2, 1),
    ],
)
def test_bytes_are_those_of_the_shapes(degrees: dict[str, int], shards: int, expert_shards: int) -> None:
    world = degrees.get("replicate", 1) * degrees.get("data", 1) * degrees["sequence"]
    matrices = EXPERTS * WIDTH * WIDTH
    # what a process holds of a block: the experts are in the block's message unless they are spread
    dense = (DENSE + (0 if expert_shards else matrices)) // shards * FLOAT64
    spread = matrices // 2 // expert_shards * FLOAT64 if expert_shards > 1 else 0
    sent = dense * (shards - 1) + spread * (expert_shards - 1 if spread else 0)
    calls = 2 if spread else 1
    root = WIDTH // shards * FLOAT64 * (shards - 1)
    for found, counted in run_ranks(one_step, world, degrees):
        for layer in ("0.toy", "1.toy"):
            # gathered for the forward pass and again for the backward pass; gradients go the other way once
            for motion in ("all_gather.forward", "all_gather.backward", "reduce_scatter.backward"):
                assert found[f"fsdp.{motion}", layer] == (calls, sent, sent), (motion, layer)
        # what is outside the blocks stays until the backward pass
        assert found["fsdp.all_gather.forward", "model"] == (1, root, root)
        assert ("fsdp.all_gather.backward", "model") not in found
        assert found["fsdp.reduce_scatter.backward", "model"] == (1, root, root)
        if "replicate" in degrees:
            assert found["fsdp.all_reduce.backward", "model"][1] == WIDTH // shards * FLOAT64
        gathers = sum(number for (motion, _), (number, *_) in found.items() if "all_gather" in motion)
        scatters = sum(number for (motion, _), (number, *_) in found.items() if "reduce_scatter" in motion)
        assert (gathers, scatters) == (counted["all_gather"], counted["reduce_scatter"])


def test_one_process_sends_nothing() -> None:
    found, counted = run_ranks(one_step, 1, {"sequence": 1})[0]
    assert not any(motion.startswith("fsdp") for motion, _ in found)
    assert not counted
