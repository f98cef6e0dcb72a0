"""One model of many families with sharded parameters (FSDP2) and split sequences against one process, float64.

Rows of a batch are spread too, so that a process may hold a single row with documents.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longstride.models import LanguageModel, ModelConfig, build_model, initialise
from longstride.parallel import Mesh, SequenceShard, shard_model
from tests.distributed import run_ranks

from .cases import difference

LAYERS = [
    "s4d(state=4, dt_min=0.1)",
    "s4(state=4, dt_min=0.1)",
    "h3(state=4, shift=4, dt_min=0.1)",
    "mamba2(head_dim=8, state=4, dt_min=0.1)",
    "retnet(heads=2)",
    "linear-attention(heads=4)",
    "modal-hyena(heads=2)",
    "hyena-se(groups=4)",
    "hyena-mr(taps=9, groups=4)+mlp(kind=geglu)",
    "hyena-li+mlp(kind=bilinear)",
    "attention(heads=2, bias=out, rotary_dim=4, rotary_scale=2.0)",
]
CONFIG: dict[str, Any] = {
    "vocab_size": 48,
    "width": 16,
    "layers": ", ".join(LAYERS),
    "feed_forward": "none",
    "norm": "rms_outer",
    "init_std": 0.2,
}
LENGTH, DOCUMENTS = 22, [5, 11, 14]


def batch() -> tuple[Tensor, Tensor]:
    tokens_BT, targets_BT = torch.randint(48, (2, 2, LENGTH), generator=torch.Generator().manual_seed(0))
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
    loss = model.loss(tokens_BT, targets_BT, shard)
    loss.backward()
    grads = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    return {"loss": loss.detach(), **grads}


@pytest.mark.parametrize(
    ("degrees", "recompute"),
    [({"sequence": 2}, False), ({"sequence": 3}, True), ({"data": 2, "sequence": 2}, True)],
)
def test_sharded_equals_whole(degrees: dict[str, int], recompute: bool) -> None:
    model = build_model(CONFIG, seed=5, dtype=torch.float64)
    loss = model.loss(*batch(), SequenceShard.whole(LENGTH, DOCUMENTS))
    loss.backward()
    world_size = degrees.get("data", 1) * degrees.get("sequence", 1)
    for result in run_ranks(sharded_gradients, world_size, degrees, recompute):
        assert difference(result.pop("loss"), loss.detach()) < 1e-12
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert difference(result[name], parameter.grad) < 1e-11, name
