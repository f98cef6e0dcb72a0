"""Models with sharded parameters (FSDP2 over data x sequence), split sequences and spread rows and experts, held
against one process: what the tests of families have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longstride.models import LanguageModel, ModelConfig, initialise
from longstride.models.parameters import Initialiser, ParameterModule
from longstride.parallel import Mesh, SequenceShard, shard_model
from tests.distributed import run_ranks

from .cases import difference

VOCABULARY, LENGTH, DOCUMENTS = 48, 22, [5, 11, 14]
TOLERANCE = 1e-12
Change = Callable[[LanguageModel], None]


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and targets (2, LENGTH), some of them left out."""
    shape = (2, 2, LENGTH)
    tokens_BT, targets_BT = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    targets_BT[1, 4:9] = -100
    return tokens_BT, targets_BT


def make_model(config: dict[str, Any], *, moved: bool = False) -> LanguageModel:
    """On the meta device, float64. `moved`: no parameter will begin at zero."""
    with torch.device("meta"):
        model = LanguageModel(ModelConfig.parse({"vocab_size": VOCABULARY, **config})).double()
    for module in model.modules():
        if moved and isinstance(module, ParameterModule):
            module.initialisers = {name: _moved(init) for name, init in module.initialisers.items()}
    return model


def results(model: LanguageModel, tokens_BT: Tensor, targets_BT: Tensor, shard: SequenceShard) -> dict[str, Tensor]:
    """The losses, every parameter's gradient, and the buffers after the step."""
    losses = model(tokens_BT, targets_BT, shard)
    losses.total.backward()
    model.end_step()
    found = {"losses": torch.stack(losses).detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
    return {**found, **{name: buffer.clone() for name, buffer in model.named_buffers()}}


def whole_results(config: dict[str, Any], *, moved: bool = False) -> dict[str, Tensor]:
    model = make_model(config, moved=moved).to_empty(device="cpu")
    initialise(model, seed=5)
    return results(model, *batch(), SequenceShard.whole(LENGTH, DOCUMENTS))


def sharded_results(
    rank: int, world_size: int, config: dict[str, Any], degrees: dict[str, int], moved: bool
) -> dict[str, Tensor]:
    mesh = Mesh(**degrees)
    model = make_model(config, moved=moved)
    shard_model(model, mesh, blocks=list(model.blocks), experts=model.expert_modules())
    model.to_empty(device="cpu")
    initialise(model, seed=5)
    shard = mesh.shard(LENGTH, DOCUMENTS)
    rows = slice(mesh.data_rank * 2 // mesh.data_size, (mesh.data_rank + 1) * 2 // mesh.data_size)
    tokens_BT, targets_BT = (tensor[rows, shard.start : shard.stop] for tensor in batch())
    return results(model, tokens_BT, targets_BT, shard)


def check_sharded_equals_whole(
    config: dict[str, Any], degrees: dict[str, int], *, recompute: bool, moved: bool = False
) -> None:
    """The same losses, gradients and buffers on every process."""
    whole = whole_results(config, moved=moved)
    world_size = degrees.get("data", 1) * degrees.get("sequence", 1)
    for found in run_ranks(sharded_results, world_size, {**config, "recompute": recompute}, degrees, moved):
        assert found.keys() == whole.keys()
        for name, tensor in whole.items():
            error = difference(found[name], tensor)
            assert error < TOLERANCE, f"{name} differs by {error:.1e}"


def _moved(init: Initialiser) -> Initialiser:
    return lambda shape, generator: init(shape, generator) + 0.1 * torch.randn(tuple(shape), generator=generator)
