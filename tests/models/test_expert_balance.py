"""Loss-free balancing: the bias counts in the choice alone, evens a skewed load, moves once a step by all tokens."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longstride.models import build_model
from longstride.models.experts import MixtureOfExperts
from longstride.parallel import SequenceShard
from tests.distributed import run_ranks

from .cases import WIDTH, difference, numbers
from .test_experts import make_experts, slow_mixture

TOKENS, SPEED = 400, 0.005


def skewed(balance: str) -> MixtureOfExperts:
    """A router for which expert 0 is likeliest at nearly every token, and expert 1 next."""
    layer = make_experts(balance=balance, bias_speed=SPEED, z_loss=0)
    with torch.no_grad():
        layer.router.weight[:, 0] = torch.tensor([1.0, 0.7, 0.0, 0.0, 0.0])
    return layer


def inputs(step: int) -> Tensor:
    x_BTD = numbers(f"x{step}", 1, TOKENS, WIDTH)
    x_BTD[..., 0] = 2.0
    return x_BTD


def largest_load(layer: MixtureOfExperts, x_BTD: Tensor) -> float:
    """Of an expert, over the mean."""
    probability_NE = torch.softmax(x_BTD[0] @ layer.router.weight.t(), dim=-1)
    load_E = torch.bincount(layer.choose(probability_NE).flatten(), minlength=layer.options.experts)
    return float(load_E.max() / load_E.double().mean())


@pytest.mark.parametrize(("balance", "evens"), [("bias", True), ("none", False)])
def test_the_bias_evens_a_skewed_load(balance: str, evens: bool) -> None:
    layer = skewed(balance)
    assert largest_load(layer, inputs(-1)) > 2
    for step in range(80):
        y_BTD, loss = layer(inputs(step), SequenceShard.whole(TOKENS))
        assert loss is None
        y_BTD.sum().backward()
        layer.end_step()
    # a step of the bias moves some tens of tokens, and so it hovers around an even load
    assert (largest_load(layer, inputs(-1)) < 1.35) == evens


def test_the_bias_counts_in_the_choice_and_not_in_the_weights() -> None:
    layer, x_BTD = skewed("bias"), inputs(0)[:, :9]
    assert layer.selection_bias is not None
    before_BTD, _ = layer(x_BTD, SequenceShard.whole(9))
    layer.selection_bias.copy_(torch.linspace(-0.5, 0.5, 5))
    after_BTD, _ = layer(x_BTD, SequenceShard.whole(9))
    assert difference(after_BTD, before_BTD) > 0.01
    assert difference(after_BTD, slow_mixture(layer, x_BTD[0])[None]) < 1e-12


def moved_bias(rank: int, world: int) -> list[Tensor]:
    """The bias after one step and after none; the step's forward pass was computed twice."""
    shard = SequenceShard.split(TOKENS, dist.group.WORLD)
    layer = skewed("bias")
    assert layer.selection_bias is not None
    for _ in range(2):
        y_BTD, _ = layer(inputs(0)[:, shard.start : shard.stop], shard)
    y_BTD.sum().backward()
    layer.end_step()
    first = layer.selection_bias.clone()
    layer.end_step()
    return [first, layer.selection_bias]


def test_it_moves_once_a_step_by_the_loads_of_all_processes() -> None:
    probability_NE = torch.softmax(inputs(0)[0] @ skewed("bias").router.weight.t(), dim=-1)
    load_E = torch.bincount(probability_NE.topk(2).indices.flatten(), minlength=5).double()
    expected_E = SPEED * torch.sign(load_E.mean() - load_E)
    assert expected_E.unique().numel() > 1
    for first, again in run_ranks(moved_bias, 2):
        assert torch.equal(first, expected_E) and torch.equal(again, expected_E)


@pytest.mark.parametrize("parts", [1, 2])
def test_every_pass_of_a_step_counts_once_recomputed_or_not(parts: int) -> None:
    config = {"vocab_size": 8, "width": 16, "layers": "[mamba+moe(balance=bias, top_k=2)]", "recompute": True}
    model = build_model(config)
    tokens_BT = torch.randint(8, (2, 20), generator=torch.Generator().manual_seed(0))
    for part_BT in tokens_BT.chunk(parts):
        model.loss(part_BT, part_BT).backward()
    layer = model.blocks[0].feed_forward
    assert isinstance(layer, MixtureOfExperts)
    load_E = layer._loads.take()
    assert load_E is not None and int(load_E.sum()) == 2 * 40
    assert layer._loads.take() is None


def test_neither_evaluation_nor_decoding_moves_it() -> None:
    layer = skewed("bias").eval()
    layer(inputs(0), SequenceShard.whole(TOKENS))[0].sum().backward()
    layer.train()
    with torch.no_grad():
        layer(inputs(0), SequenceShard.whole(TOKENS))
    layer.end_step()
    assert layer.selection_bias is not None and not layer.selection_bias.any()


def test_the_bias_is_saved_and_not_trained() -> None:
    model = build_model({"vocab_size": 8, "width": 16, "layers": "[mamba+moe(balance=bias)]"})
    name = "blocks.0.feed_forward.selection_bias"
    assert name in model.state_dict() and name not in dict(model.named_parameters())
