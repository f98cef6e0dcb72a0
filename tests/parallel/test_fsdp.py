"""A toy with experts, sharded every way, against one process: losses, gradient norms and parameters after 3 steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longstride.parallel import Mesh, MeshConfig, SequenceShard, clip_gradients, global_sum, local_part, run_experts
from longstride.parallel.fsdp import shard_model
from tests.distributed import run_ranks
from tests.parallel.oracles import normal, relative_error

BATCH, LENGTH, WIDTH, EXPERTS = 4, 8, 8, 4


class ToyExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(normal(EXPERTS, WIDTH, WIDTH, seed=4))

    def forward(self, x_ND: Tensor, index: Tensor, weight: Tensor, shard: SequenceShard) -> Tensor:
        matrices = local_part(self.matrix)

        def compute(rows: Tensor, counts: Tensor) -> Tensor:
            parts = zip(rows.split(counts.tolist()), matrices, strict=True)
            return torch.cat([part @ matrix for part, matrix in parts]).tanh()

        return run_experts(x_ND, index, weight, compute, EXPERTS, shard)


class ToyBlock(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False, dtype=torch.float64)
        self.experts = ToyExperts()
        with torch.no_grad():
            for i, parameter in enumerate((self.linear.weight, self.linear.bias, self.router.weight)):
                parameter.copy_(normal(*parameter.shape, seed=seed + i))

    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        x = x + self.linear(x).tanh()
        flat = x.reshape(-1, WIDTH)
        weight, index = self.router(flat).softmax(-1).topk(2)
        return x + self.experts(flat, index, weight, shard).view_as(x)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ToyBlock(10), ToyBlock(20)])
        self.scale = nn.Parameter(normal(WIDTH, seed=30))

    def loss(self, x: Tensor, target: Tensor, shard: SequenceShard) -> Tensor:
        for block in self.blocks:
            x = block(x, shard)
        local = ((x * self.scale - target) ** 2).sum() / (BATCH * LENGTH)
        return global_sum(local, shard)


def train(rank: int, world: int, degrees: dict[str, int]) -> tuple[list[float], list[float], dict[str, Tensor]]:
    mesh = Mesh(**degrees)
    model = Toy()
    experts = [block.experts for block in model.blocks]  # type: ignore[union-attr]
    shard_model(model, mesh, blocks=list(model.blocks), experts=experts, forward_methods=["loss"])  # type: ignore[arg-type]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    shard = mesh.shard(LENGTH)
    rows = slice(mesh.data_rank * BATCH // mesh.data_size, (mesh.data_rank + 1) * BATCH // mesh.data_size)
    losses, norms = [], []
    for step in range(3):
        x = normal(BATCH, LENGTH, WIDTH, seed=50 + step)[rows, shard.start : shard.stop]
        target = normal(BATCH, LENGTH, WIDTH, seed=60 + step)[rows, shard.start : shard.stop]
        loss = model.loss(x, target, shard)
        loss.backward()
        norms.append(float(clip_gradients(model.parameters(), 0.5, mesh)))
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
    parameters = {
        name: p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for name, p in model.named_parameters()
    }
    return losses, norms, parameters


COMBINATIONS = [
    {"data": 2},
    {"sequence": 2},
    {"sequence": 2, "expert": 2},
    {"data": 2, "sequence": 2, "expert": 2},
    {"data": 2, "sequence": 2, "expert": 4},
    {"replicate": 2, "sequence": 2, "expert": 2},
    {"replicate": 2, "data": 2, "sequence": 2, "expert": 2},
]


@pytest.mark.parametrize("degrees", COMBINATIONS, ids=lambda d: "-".join(f"{k}{v}" for k, v in d.items()))
def test_any_degrees_train_alike(degrees: dict[str, int]) -> None:
    losses, norms, parameters = run_ranks(train, 1, {})[0]
    world = degrees.get("replicate", 1) * degrees.get("data", 1) * degrees.get("sequence", 1)
    for got_losses, got_norms, got_parameters in run_ranks(train, world, degrees):
        assert got_losses == pytest.approx(losses, rel=1e-12)
        assert got_norms == pytest.approx(norms, rel=1e-12)
        for name, expected in parameters.items():
            assert relative_error(got_parameters[name], expected) < 1e-10, name


@pytest.mark.parametrize(
    ("config", "workers", "experts", "message"),
    [
        ({"sequence": 3}, 4, 0, r"replicate 1 x data 1 x sequence 3 = 3 does not match workers=4: set workers=3"),
        ({"expert": 3}, 4, 4, r"parallel.expert 3 does not divide the model's 4 experts: use 2"),
        ({"expert": 4}, 2, 4, r"parallel.expert 4 does not divide data x sequence = 2 processes: use 2"),
    ],
)
def test_degrees_that_do_not_divide(config: dict[str, int], workers: int, experts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeshConfig(**config).resolve(workers, experts)  # type: ignore[arg-type]


def test_auto_degrees() -> None:
    degrees = MeshConfig().resolve(4, 6)
    assert (degrees.data, degrees.sequence, degrees.expert) == (1, 4, 2)
    assert MeshConfig(sequence=2).resolve(4).data == 2
