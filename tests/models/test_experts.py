"""Mixtures of experts against a loop over tokens; the routers' losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longstride.models import build_model
from longstride.models.experts import MixtureOfExperts
from longstride.parallel import SequenceShard

from .cases import WIDTH, difference, make_model, numbers

MOE = {"experts": 5, "top_k": 2, "hidden": 7, "balance_loss": 0.3, "z_loss": 0.1}


def make_experts(**options: object) -> MixtureOfExperts:
    layer = make_model({"layers": "[mamba+moe]", "moe": {**MOE, **options}}).blocks[0].feed_forward
    assert isinstance(layer, MixtureOfExperts)
    return layer


def slow_mixture(layer: MixtureOfExperts, x_ND: Tensor) -> Tensor:
    rows = []
    for x_D in x_ND:
        probability_E = torch.softmax(layer.router.weight @ x_D, dim=0)
        score_E = probability_E if layer.selection_bias is None else probability_E + layer.selection_bias
        chosen = score_E.argsort(descending=True)[: layer.options.top_k]
        weight = probability_E[chosen] / (probability_E[chosen].sum() if layer.options.renormalise else 1)
        y_D = torch.zeros_like(x_D)
        for w, e in zip(weight, chosen, strict=True):
            gate_F, up_F = (x_D @ layer.experts.gate_up[e]).chunk(2)
            y_D = y_D + w * ((F.silu(gate_F) * up_F) @ layer.experts.down[e])
        if layer.shared is not None:
            gate_F, up_F = (layer.shared.up_proj.weight @ x_D).chunk(2)
            y_D = y_D + layer.shared.down_proj.weight @ (F.silu(gate_F) * up_F)
        rows.append(y_D)
    return torch.stack(rows)


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_outputs_and_gradients_equal_a_loop_over_tokens(renormalise: bool, top_k: int, shared: int) -> None:
    layer = make_experts(renormalise=renormalise, top_k=top_k, shared=shared, balance="none", z_loss=0)
    x_BTD = numbers("x", 2, 9, WIDTH).requires_grad_()
    ours_BTD, loss = layer(x_BTD, SequenceShard.whole(9))
    assert loss is None
    slow_BTD = slow_mixture(layer, x_BTD.flatten(0, 1)).view_as(x_BTD)
    assert difference(ours_BTD, slow_BTD) < 1e-12
    # a single renormalised weight is 1 whatever the router says: its gradient vanishes
    inputs = [x_BTD, *layer.parameters()]
    weight = numbers("w", 2, 9, WIDTH)
    ours, slow = (torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True) for y in (ours_BTD, slow_BTD))
    for a, b in zip(ours, slow, strict=True):
        assert a is not None and b is not None
        assert (a - b).abs().max() < 1e-12 * max(1.0, b.abs().max().item())


def test_the_two_kinds_of_router_differ() -> None:
    x_BTD = numbers("x", 2, 9, WIDTH)
    mixtral, jamba = (make_experts(renormalise=kind)(x_BTD, SequenceShard.whole(9))[0] for kind in (True, False))
    assert difference(mixtral, jamba) > 0.05


def test_balance_and_z_losses_are_their_formulas() -> None:
    layer = make_experts()
    x_ND = numbers("x", 1, 30, WIDTH)[0]
    logits_NE = x_ND @ layer.router.weight.t()
    probability_NE = logits_NE.softmax(dim=1)
    chosen_NE = F.one_hot(probability_NE.topk(2).indices, 5).sum(dim=1).double()
    balance = 5 * (chosen_NE.mean(dim=0) * probability_NE.mean(dim=0)).sum()
    expected = 0.3 * balance + 0.1 * logits_NE.logsumexp(dim=1).square().mean()
    ours = layer(x_ND[None], SequenceShard.whole(30))[1]
    assert ours is not None and abs(ours - expected) < 1e-12
    grads = [torch.autograd.grad(loss, layer.router.weight)[0] for loss in (ours, expected)]
    assert difference(*grads) < 1e-12


def test_the_balance_loss_is_top_k_where_the_load_is_even() -> None:
    layer = make_experts(experts=4, balance_loss=1.0, z_loss=0.0)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4, WIDTH))
    # every pair of neighbours of a ring is chosen equally often
    x_ND = torch.eye(4, WIDTH, dtype=torch.float64) + torch.eye(4, WIDTH, dtype=torch.float64).roll(1, dims=0)
    loss = layer(x_ND[None], SequenceShard.whole(4))[1]
    assert loss is not None and abs(loss.item() - 2) < 1e-12


def test_experts_without_tokens_have_zero_gradients() -> None:
    layer = make_experts(top_k=1)
    x_BTD = numbers("x", 1, 1, WIDTH)
    layer(x_BTD, SequenceShard.whole(1))[0].sum().backward()
    reached_E = layer.experts.down.grad.abs().amax(dim=(1, 2)) > 0  # type: ignore[union-attr]
    assert reached_E.sum() == 1


def test_operations_count_the_active_experts() -> None:
    one, two = (
        build_model({"vocab_size": 8, "width": 16, "layers": "[mamba+moe]", "moe": {"experts": 8, "top_k": k}})
        for k in (1, 2)
    )
    per_expert = sum(p[0].numel() for p in one.expert_modules()[0].parameters())
    assert two.flops_per_token(8) - one.flops_per_token(8) == 2 * per_expert
    shared = build_model({**one.config.model_dump(), "moe": {"experts": 8, "top_k": 1, "shared": 2}})
    assert shared.flops_per_token(8) - one.flops_per_token(8) == 2 * 2 * per_expert
