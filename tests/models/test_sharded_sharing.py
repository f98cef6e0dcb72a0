"""Families with something beside parameters and activations (values passed between layers, hand-offs, a gain that is no
parameter), with sharded parameters (FSDP2 over data x sequence) against one process, float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longstride.models import LanguageModel, ModelConfig, initialise
from longstride.models.parameters import Initialiser, ParameterModule
from longstride.parallel import Mesh, SequenceShard, shard_model
from tests.distributed import run_ranks

from .cases import difference

CONFIG: dict[str, Any] = {
    "vocab_size": 48,
    "width": 16,
    "layers": "[rwkv7, conba+moe, rwkv7+none, lstm, gau, rwkv4, flash+none, conba(variant=linear)]",
    "feed_forward": "channel_mix",
    "moe": {"experts": 4, "hidden": 24, "balance_loss": 0.3},
    "rwkv7": {"head_dim": 8},
    "conba": {"state": 4, "online_rate": 0.1},
    "gau": {"key_dim": 4},
    "flash": {"key_dim": 4, "chunk": 5},
    "embedding_norm": True,
    "tie_embeddings": False,
    "head_gain": 0.5,
    "init_std": 0.2,
}
LENGTH, DOCUMENTS = 22, [5, 11, 14]
GAIN = "blocks.1.mixer.control_gain"


def batch() -> tuple[Tensor, Tensor]:
    tokens_BT, targets_BT = torch.randint(48, (2, 2, LENGTH), generator=torch.Generator().manual_seed(0))
    targets_BT[1, 4:9] = -100
    return tokens_BT, targets_BT


def make_model(recompute: bool = False) -> LanguageModel:
    """On the meta device; no parameter will begin at zero, and neither will the gain."""
    with torch.device("meta"):
        model = LanguageModel(ModelConfig.parse({**CONFIG, "recompute": recompute})).double()
    for module in model.modules():
        if isinstance(module, ParameterModule):
            module.initialisers = {name: moved(init) for name, init in module.initialisers.items()}
    return model


def moved(init: Initialiser) -> Initialiser:
    return lambda shape, generator: init(shape, generator) + 0.1 * torch.randn(tuple(shape), generator=generator)


def sharded_results(rank: int, world_size: int, degrees: dict[str, int], recompute: bool) -> dict[str, Tensor]:
    mesh = Mesh(**degrees)
    model = make_model(recompute)
    shard_model(model, mesh, blocks=list(model.blocks), experts=model.expert_modules())
    model.to_empty(device="cpu")
    initialise(model, seed=5)
    shard = mesh.shard(LENGTH, DOCUMENTS)
    rows = slice(mesh.data_rank * 2 // mesh.data_size, (mesh.data_rank + 1) * 2 // mesh.data_size)
    tokens_BT, targets_BT = (tensor[rows, shard.start : shard.stop] for tensor in batch())
    losses = model(tokens_BT, targets_BT, shard)
    losses.total.backward()
    model.end_step()
    grads = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    return {"loss": torch.stack(losses).detach(), **grads, GAIN: model.get_buffer(GAIN)}


@pytest.mark.parametrize(
    ("degrees", "recompute"),
    [({"sequence": 2, "expert": 2}, True), ({"data": 2, "sequence": 2, "expert": 4}, False)],
)
def test_sharded_equals_whole(degrees: dict[str, int], recompute: bool) -> None:
    model = make_model().to_empty(device="cpu")
    initialise(model, seed=5)
    gain = model.get_buffer(GAIN).clone()
    losses = model(*batch(), SequenceShard.whole(LENGTH, DOCUMENTS))
    losses.total.backward()
    model.end_step()
    assert difference(model.get_buffer(GAIN), gain) > 1e-4
    world_size = degrees.get("data", 1) * degrees.get("sequence", 1)
    for result in run_ranks(sharded_results, world_size, degrees, recompute):
        assert difference(result.pop("loss"), torch.stack(losses).detach()) < 1e-12
        assert difference(result.pop(GAIN), model.get_buffer(GAIN)) < 1e-11
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, name
            assert difference(result[name], parameter.grad) < 1e-10, name
