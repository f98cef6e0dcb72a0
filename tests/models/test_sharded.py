"""Models with sharded parameters and spread experts (FSDP2 over data x sequence) against one process, float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longstride.models import LanguageModel, ModelConfig, build_model, initialise
from longstride.parallel import Mesh, SequenceShard, shard_model
from tests.distributed import run_ranks

from .cases import difference

CONFIG: dict[str, Any] = {
    "vocab_size": 48,
    "width": 16,
    "layers": "[mamba, hyena(max_length=64)+moe, attention(heads=4, kv_heads=2), mamba+moe]",
    "moe": {"experts": 4, "hidden": 24, "balance_loss": 0.3, "z_loss": 0.1},
    "init_std": 0.2,
}
LENGTH, DOCUMENTS = 22, [5, 11, 14]


def batch() -> tuple[Tensor, Tensor]:
    tokens_BT, targets_BT = torch.randint(48, (2, 2, LENGTH), generator=torch.Generator().manual_seed(0))
    targets_BT[1, 4:9] = -100
    return tokens_BT, targets_BT


def sharded_gradients(rank: int, world_size: int, degrees: dict[str, int], recompute: bool) -> dict[str, Tensor]:
    mesh = Mesh(**degrees)
    with torch.device("meta"):
        model = LanguageModel(ModelConfig.parse({**CONFIG, "recompute": recompute})).double()
    shard_model(model, mesh, blocks=list(model.blocks), experts=model.expert_modules())
    model.to_empty(device="cpu")
    initialise(model, seed=5)
    shard = mesh.shard(LENGTH, DOCUMENTS)
    rows = slice(mesh.data_rank * 2 // mesh.data_size, (mesh.data_rank + 1) * 2 // mesh.data_size)
    tokens_BT, targets_BT = (tensor[rows, shard.start : shard.stop] for tensor in batch())
    losses = model(tokens_BT, targets_BT, shard)
    losses.total.backward()
    grads = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    return {"loss": torch.stack(losses).detach(), **grads}


@pytest.mark.parametrize(
    ("degrees", "recompute"),
    [
        ({"sequence": 2, "expert": 2}, False),
        ({"data": 2, "expert": 1}, False),
        ({"data": 2, "sequence": 2, "expert": 2}, True),
        ({"sequence": 4, "expert": 4}, False),
    ],
)
def test_sharded_equals_whole(degrees: dict[str, int], recompute: bool) -> None:
    model = build_model(CONFIG, seed=5, dtype=torch.float64)
    losses = model(*batch(), SequenceShard.whole(LENGTH, DOCUMENTS))
    losses.total.backward()
    world_size = degrees.get("data", 1) * degrees.get("sequence", 1)
    for result in run_ranks(sharded_gradients, world_size, degrees, recompute):
        assert difference(result.pop("loss"), torch.stack(losses).detach()) < 1e-12
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert difference(result[name], parameter.grad) < 1e-11, name
