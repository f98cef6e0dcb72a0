"""The language model on one process: losses, masks, decoding."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from longstride.models import ModelConfig, build_model
from longstride.models.language_model import Part
from longstride.parallel import SequenceShard

from .cases import EXPERTS, MODEL_CASES, SMALL, difference, make_model

every_model = pytest.mark.parametrize("case", MODEL_CASES.values(), ids=MODEL_CASES)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


@every_model
def test_the_loss_is_the_cross_entropy_of_the_logits(case: dict) -> None:
    model = make_model(case)
    tokens_BT, targets_BT = tokens(2, 17), tokens(2, 17, seed=1)
    targets_BT[0, 3:9] = -100
    losses = model(tokens_BT, targets_BT)
    logits_BTV = model.logits(tokens_BT)
    assert logits_BTV.shape == (2, 17, SMALL["vocab_size"])
    expected = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
    assert abs(losses.cross_entropy - expected) < 1e-12
    assert losses.total == losses.cross_entropy + losses.routers == model.loss(tokens_BT, targets_BT)
    assert losses.routers > 0
    ours = torch.autograd.grad(losses.cross_entropy, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    assert all(difference(a, b) < 1e-11 for a, b in zip(ours, theirs, strict=True))


@every_model
def test_decoding_equals_the_logits(case: dict) -> None:
    model = make_model(case)
    tokens_BT = tokens(2, 21)
    with torch.no_grad():
        state, outputs = model.init_state(2), []
        for token_B in tokens_BT.t():
            logits_BV, state = model.step(token_B, state)
            outputs.append(logits_BV)
        assert difference(torch.stack(outputs, dim=1), model.logits(tokens_BT)) < 1e-9


def test_a_state_can_be_continued_more_than_once() -> None:
    model = make_model(MODEL_CASES["every part"])
    with torch.no_grad():
        _, state = model.step(tokens(1, 1)[0], model.init_state(1))
        first, _ = model.step(tokens(1, 1, seed=1)[0], state)
        again, _ = model.step(tokens(1, 1, seed=1)[0], state)
    assert torch.equal(first, again)


@every_model
def test_later_tokens_do_not_change_logits(case: dict) -> None:
    model = make_model(case)
    tokens_BT = tokens(1, 20)
    changed_BT = tokens_BT.clone()
    changed_BT[:, 12:] = (changed_BT[:, 12:] + 1) % SMALL["vocab_size"]
    with torch.no_grad():
        before, after = model.logits(tokens_BT), model.logits(changed_BT)
    assert difference(after[:, :12], before[:, :12]) < 1e-12
    assert difference(after[:, 12:], before[:, 12:]) > 1e-3


def test_recomputing_activations_changes_nothing() -> None:
    case = MODEL_CASES["recomputed"]
    results = []
    for recompute in (True, False):
        model = make_model({**case, "recompute": recompute})
        loss = model.loss(tokens(2, 13), tokens(2, 13, seed=1))
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_new_model_knows_nothing() -> None:
    for name in ("mamba-small", "hybrid-small", "transformer-small", "hyena-small"):
        model = build_model(name)
        tokens_BT = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
        targets_BT = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert abs(model(tokens_BT, targets_BT).cross_entropy - math.log(256)) < 0.1


def test_parts_add_up_to_the_step() -> None:
    """Losses and gradients; of the routers' losses those that are means over tokens."""
    routers = {**EXPERTS["moe"], "balance_loss": 0.0}
    model = make_model({**MODEL_CASES["every part"], "moe": routers, "logit_pull": 0.1})
    tokens_BT, targets_BT = torch.randint(SMALL["vocab_size"], (2, 3, 14), generator=torch.Generator().manual_seed(0))
    targets_BT[0, 2:9] = targets_BT[1, 0] = -100
    whole = model(tokens_BT, targets_BT)
    assert whole.routers > 1e-3
    expected = torch.autograd.grad(whole.total, list(model.parameters()))
    pieces, valid = [slice(0, 1), slice(1, 3)], int((targets_BT != -100).sum())
    parts = [
        model(tokens_BT[rows], targets_BT[rows], part=Part((rows.stop - rows.start) / 3, valid)) for rows in pieces
    ]
    for ours, theirs in zip(zip(*parts, strict=True), whole, strict=True):
        assert difference(sum(ours, torch.zeros(())), theirs) < 1e-12
    gradients = [torch.autograd.grad(part.total, list(model.parameters())) for part in parts]
    for first, second, theirs in zip(*gradients, expected, strict=True):
        assert difference(first + second, theirs) < 1e-12


def test_no_valid_target_is_a_loss_of_zero() -> None:
    model = make_model(MODEL_CASES["every part"])
    assert model(tokens(1, 9), torch.full((1, 9), -100)).cross_entropy == 0


def test_tokens_must_be_the_shards() -> None:
    model = make_model(MODEL_CASES["every part"])
    with pytest.raises(ValueError, match="9 tokens were given; the shard holds 8"):
        model.logits(tokens(1, 9), SequenceShard.whole(8))
    for wrong in (torch.zeros(7, dtype=torch.int64), torch.zeros(1, 7)):
        with pytest.raises(ValueError, match=r"tokens are .* give int64 \(batch, length\)"):
            model.logits(wrong)


def test_longest_sequence() -> None:
    assert build_model("mamba-small", device="meta").max_length is None
    layers = "[hyena(max_length=64), mamba, hyena(max_length=32)]"
    config = ModelConfig.parse({**SMALL, "layers": layers})
    assert build_model(config, device="meta").max_length == 32


def test_operations_of_a_transformer_are_the_usual_count() -> None:
    model = build_model("llama-2-7b", device="meta")
    context = 4096
    matrices = model.num_parameters() - model.embedding.weight.numel() - 65 * 4096
    attention = 32 * 2 * (context + 1) * 4096
    assert model.flops_per_token(context) == 2 * matrices + attention
