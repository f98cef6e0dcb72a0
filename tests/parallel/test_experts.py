"""run_experts split over processes against a plain loop over tokens and experts; float64, every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longstride.parallel import SequenceShard, run_experts
from tests.distributed import run_ranks
from tests.parallel.oracles import gathered, normal, relative_error

N, D, J = 13, 4, 2


def inputs(num_experts: int, lopsided: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = normal(N, D)
    scores = normal(N, num_experts, seed=1)
    if lopsided:  # nearly every token chooses experts 0 and 1; some experts get none
        scores[:, :2] += 100
    weight, index = scores.softmax(-1).topk(J)
    return x, index, weight, normal(num_experts, D, D, seed=2)


def through_matrices(rows: Tensor, counts: Tensor, matrices: Tensor) -> Tensor:
    parts = rows.split(counts.tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)]).tanh()


def loop(num_experts: int, lopsided: bool) -> tuple[Tensor, list[Tensor]]:
    x, index, weight, matrices = inputs(num_experts, lopsided)
    tensors = [x.requires_grad_(), weight.requires_grad_(), matrices.requires_grad_()]
    rows = [sum(weight[n, j] * (x[n] @ matrices[index[n, j]]).tanh() for j in range(J)) for n in range(N)]
    out = torch.stack(rows)  # type: ignore[arg-type]
    (out * normal(N, D, seed=3)).sum().backward()
    return out.detach(), [t.grad for t in tensors]  # type: ignore[misc]


def split(rank: int, world: int, num_experts: int, lopsided: bool) -> tuple[Tensor, list[Tensor], int]:
    x, index, weight, matrices = inputs(num_experts, lopsided)
    shard = SequenceShard.split(N, None, expert_group=dist.group.WORLD)
    here = slice(shard.start, shard.stop)
    share = num_experts // world
    leaves = [x[here].clone(), weight[here].clone(), matrices[rank * share : (rank + 1) * share].clone()]
    x, weight, matrices = (leaf.requires_grad_() for leaf in leaves)
    out = run_experts(x, index[here], weight, lambda r, c: through_matrices(r, c, matrices), num_experts, shard)
    (out * normal(N, D, seed=3)[here]).sum().backward()
    sent = shard.ledger.by_motion()["experts.forward"].bytes_sent if world > 1 else 0
    return out.detach(), [x.grad, weight.grad, matrices.grad], sent  # type: ignore[list-item]


@pytest.mark.parametrize("lopsided", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_equals_loop(world: int, lopsided: bool) -> None:
    expected, expected_grads = loop(8, lopsided)
    results = run_ranks(split, world, 8, lopsided)
    assert relative_error(gathered((r[0] for r in results), dim=0), expected) < 1e-13
    for i, true_grad in enumerate(expected_grads):
        assert relative_error(gathered((r[1][i] for r in results), dim=0), true_grad) < 1e-13


def test_bytes_are_the_rows_that_leave() -> None:
    _, index, _, _ = inputs(8, False)
    owner = index // 4  # 2 processes, 4 experts each
    shards = [slice(0, 7), slice(7, N)]
    leaving = [int((owner[part] != rank).sum()) for rank, part in enumerate(shards)]
    back = [leaving[1], leaving[0]]  # results of the other's rows go home
    sent = [sent for _, _, sent in run_ranks(split, 2, 8, False)]
    assert sent == [8 * D * (a + b) for a, b in zip(leaving, back, strict=True)]


def test_experts_that_do_not_divide_are_named() -> None:
    with pytest.raises(AssertionError, match="6 experts cannot be spread over 4 processes"):
        run_ranks(split, 4, 6, False)
