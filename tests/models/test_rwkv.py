"""RWKV-4 and RWKV-7 against their equations written out token by token, and their oracles."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longstride.kernels import begin_wkv7, wkv4, wkv4_state, wkv7
from longstride.models import build_model
from longstride.models.channel_mix import ChannelMix
from longstride.models.mixers.rwkv4 import RWKV4
from longstride.models.mixers.rwkv7 import RWKV7
from longstride.models.parameters import learning_rates, orthogonal
from longstride.models.token_shift import token_shift
from longstride.parallel import LogSpace, SequenceShard

from .cases import WIDTH, difference, make_mixer, make_model, numbers

LENGTH, BATCH = 13, 2
RWKV7_LAYERS = {"layers": "[rwkv7] x 3", "rwkv7": {"head_dim": 4, "value_rank": 3}}


def same_gradients(ours: Tensor, slow: Tensor, inputs: list[Tensor]) -> None:
    weight = numbers("w", *ours.shape)
    both = [torch.autograd.grad((y * weight).sum(), inputs, retain_graph=True) for y in (ours, slow)]
    for a, b in zip(*both, strict=True):
        assert difference(a, b) < 1e-11


def previous(x_BTD: Tensor) -> Tensor:
    return F.pad(x_BTD, (0, 0, 1, 0))[:, :-1]


def slow_rwkv4(mixer: RWKV4, x_BTD: Tensor) -> Tensor:
    before = previous(x_BTD)
    r, k, v = (
        (mix * x_BTD + (1 - mix) * before) @ matrix.weight.t()
        for mix, matrix in (
            (mixer.mix_receptance, mixer.receptance),
            (mixer.mix_key, mixer.key),
            (mixer.mix_value, mixer.value),
        )
    )
    decay, outputs = torch.exp(mixer.time_decay), []
    for t in range(x_BTD.shape[1]):
        above = below = torch.zeros_like(k[:, 0])
        for i in range(t + 1):
            weight = torch.exp(mixer.time_first + k[:, t] if i == t else -(t - 1 - i) * decay + k[:, i])
            above, below = above + weight * v[:, i], below + weight
        outputs.append(torch.sigmoid(r[:, t]) * above / below)
    return torch.stack(outputs, dim=1) @ mixer.output.weight.t()


def test_rwkv4_is_its_equations() -> None:
    mixer = make_mixer("rwkv4")
    assert isinstance(mixer, RWKV4)
    x_BTD = numbers("x", BATCH, LENGTH, WIDTH).requires_grad_()
    ours, slow = mixer(x_BTD, SequenceShard.whole(LENGTH)), slow_rwkv4(mixer, x_BTD)
    assert difference(ours, slow) < 1e-12
    same_gradients(ours, slow, [x_BTD, *mixer.parameters()])


def test_rwkv4_states_of_two_stretches_merge() -> None:
    k, v, bonus = (numbers(name, BATCH, LENGTH, WIDTH) for name in ("k", "v", "bonus"))
    log_decay = -torch.exp(numbers("decay", WIDTH))
    left, right = wkv4_state(k[:, :5], v[:, :5], log_decay), wkv4_state(k[:, 5:], v[:, 5:], log_decay)
    transition = LogSpace(log_decay)
    merged = transition.merge(transition.apply(None, LENGTH - 5, left), right)
    _, whole = wkv4(k, v, log_decay, bonus[0, 0])
    sums = [state[..., :2] * torch.exp(state[..., 2:]) for state in (merged, whole, right)]
    assert difference(sums[0], sums[1]) < 1e-14
    assert difference(sums[2], sums[1]) > 1e-3


def test_rwkv4_weights_of_any_size_stay_finite() -> None:
    mixer = make_mixer("rwkv4")
    assert isinstance(mixer, RWKV4)
    with torch.no_grad():
        mixer.key.weight *= 1e3
        assert mixer(numbers("x", BATCH, LENGTH, WIDTH), SequenceShard.whole(LENGTH)).isfinite().all()


def test_rwkv4_begins_as_its_authors_code_does() -> None:
    model = build_model({"vocab_size": 64, "width": 32, "layers": "[rwkv4] x 3", "feed_forward": "channel_mix"})
    for layer, block in enumerate(model.blocks):
        mixer, channel = block.mixer, block.feed_forward
        assert isinstance(mixer, RWKV4) and isinstance(channel, ChannelMix)
        place, remaining, depth = torch.arange(32) / 32, 1 - layer / 3, layer / 2
        h = torch.arange(32) / 31
        assert torch.allclose(mixer.time_decay, -5 + 8 * h ** (0.7 + 1.3 * depth))
        assert torch.allclose(mixer.time_first[:4], math.log(0.3) + torch.tensor([0.0, 0.5, -0.5, 0.0]))
        assert torch.allclose(mixer.mix_value, place**remaining + 0.3 * depth)
        assert torch.allclose(mixer.mix_receptance, place ** (0.5 * remaining))
        for mix in (mixer.mix_key, channel.mix_key, channel.mix_receptance):
            assert torch.allclose(mix, place**remaining)  # type: ignore[arg-type]
        zero = [mixer.key, mixer.receptance, mixer.output, channel.value, channel.receptance]
        assert all(matrix.weight.abs().max() == 0 for matrix in zero)  # type: ignore[union-attr]
        for matrix, gain in ((mixer.value, 1), (channel.key, 2)):
            assert torch.allclose(matrix.weight.t() @ matrix.weight, gain**2 * torch.eye(32), atol=1e-5)


def test_orthogonal_matrices_have_orthogonal_rows_or_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    wide, tall = orthogonal(0.5)((3, 7), generator), orthogonal(0.5)((12, 3), generator)
    assert torch.allclose(wide @ wide.t(), 0.25 * torch.eye(3), atol=1e-6)
    assert torch.allclose(tall.t() @ tall, 0.25 * 4 * torch.eye(3), atol=1e-6)


@pytest.mark.parametrize("receptance", [True, False])
def test_channel_mix_is_its_equations(receptance: bool) -> None:
    case = {"layers": "[mamba+channel_mix]", "channel_mix": {"receptance": receptance, "hidden": 10}}
    layer = make_model(case).blocks[0].feed_forward
    assert isinstance(layer, ChannelMix)
    x_BTD = numbers("x", BATCH, LENGTH, WIDTH)
    before = previous(x_BTD)
    k = layer.mix_key * x_BTD + (1 - layer.mix_key) * before
    expected = torch.relu(k @ layer.key.weight.t()) ** 2 @ layer.value.weight.t()
    if layer.receptance is not None and layer.mix_receptance is not None:
        r = layer.mix_receptance * x_BTD + (1 - layer.mix_receptance) * before
        expected = torch.sigmoid(r @ layer.receptance.weight.t()) * expected
    assert difference(layer(x_BTD, SequenceShard.whole(LENGTH))[0], expected) < 1e-12


def test_token_shift_stops_at_documents() -> None:
    x_BTD = numbers("x", BATCH, LENGTH, WIDTH)
    shifted = token_shift(x_BTD, SequenceShard.whole(LENGTH, [[4], [2, 9]]))
    expected = previous(x_BTD).clone()
    expected[0, 4] = expected[1, 2] = expected[1, 9] = 0
    assert torch.equal(shifted, expected)


def slow_rwkv7(mixer: RWKV7, x_BTD: Tensor, first_v: Tensor | None = None) -> Tensor:
    """As the authors' slow version states it, with their two directions of the correction."""
    before, N = previous(x_BTD), mixer.head_dim
    xr, xw, xk, xv, xa, xg = (x_BTD + (before - x_BTD) * mix for mix in mixer.mix)
    r, k, v = mixer.receptance(xr), mixer.key(xk), mixer.value(xv)
    if first_v is not None:
        assert mixer.first_value is not None
        low = mixer.first_value
        v = v + (first_v - v) * torch.sigmoid(low.bias + (xv @ low.down) @ low.up)
    w = -F.softplus(-(mixer.decay.bias + torch.tanh(xw @ mixer.decay.down) @ mixer.decay.up)) - 0.5
    a = torch.sigmoid(mixer.rate.bias + (xa @ mixer.rate.down) @ mixer.rate.up)
    g = torch.sigmoid(xg @ mixer.gate.down) @ mixer.gate.up
    kk = F.normalize((k * mixer.k_k).unflatten(-1, (-1, N)), dim=-1)
    k = k * (1 + (a - 1) * mixer.k_a)
    r, k, v, a, decay = (part.unflatten(-1, (-1, N)) for part in (r, k, v, a, torch.exp(-torch.exp(w))))
    state, outputs = torch.zeros(BATCH, WIDTH // N, N, N, dtype=x_BTD.dtype), []
    for t in range(x_BTD.shape[1]):
        correction = -kk[:, t, :, :, None] * (kk * a)[:, t, :, None, :]
        stored = v[:, t, :, :, None] * k[:, t, :, None, :]
        state = state @ (torch.diag_embed(decay[:, t]) + correction) + stored
        outputs.append((state @ r[:, t, :, :, None]).squeeze(-1))
    y = torch.stack(outputs, dim=1)
    mean, variance = y.mean(-1, keepdim=True), y.var(-1, keepdim=True, unbiased=False)
    y = (y - mean) / torch.sqrt(variance + N * 1e-5)
    y = y.flatten(-2) * mixer.norm_weight + mixer.norm_bias
    y = y + ((r * k * mixer.r_k).sum(-1, keepdim=True) * v).flatten(-2)
    return mixer.output(y * g)


def test_rwkv7_is_its_equations() -> None:
    mixer = make_mixer("rwkv7")
    assert isinstance(mixer, RWKV7) and mixer.first_value is None
    x_BTD = numbers("x", BATCH, LENGTH, WIDTH).requires_grad_()
    ours, slow = mixer(x_BTD, SequenceShard.whole(LENGTH)), slow_rwkv7(mixer, x_BTD)
    assert difference(ours, slow) < 1e-12
    same_gradients(ours, slow, [x_BTD, *mixer.parameters()])


def test_rwkv7_later_layers_take_values_of_the_first() -> None:
    mixers = [block.mixer for block in make_model(RWKV7_LAYERS).blocks]
    shard, x_BTD = SequenceShard.whole(LENGTH), numbers("x", BATCH, LENGTH, WIDTH).requires_grad_()
    _, shared = mixers[0].share(x_BTD, shard, {})
    later = mixers[2]
    assert isinstance(later, RWKV7)
    (first_v,) = shared.values()
    ours, added = later.share(x_BTD.square(), shard, shared)
    assert not added
    slow = slow_rwkv7(later, x_BTD.square(), first_v)
    assert difference(ours, slow) < 1e-12
    same_gradients(ours, slow, [x_BTD, *later.parameters()])
    assert difference(later(x_BTD.square(), shard), slow) > 1e-3


def test_rwkv7_values_are_those_of_the_first_layer_of_the_family() -> None:
    model = make_model({**RWKV7_LAYERS, "layers": "[mamba, rwkv7, attention(heads=3), rwkv7]"})
    first, later = (model.blocks[index].mixer for index in (1, 3))
    assert isinstance(first, RWKV7) and first.first_value is None
    assert isinstance(later, RWKV7) and later.first_value is not None
    tokens_BT = torch.randint(11, (1, 9), generator=torch.Generator().manual_seed(0))
    model.loss(tokens_BT, tokens_BT).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_rwkv7_stretches_compose_as_matrices() -> None:
    r, k, v, a, b = (numbers(name, BATCH, LENGTH, 3, 4) for name in "rkvab")
    log_w, a = -torch.exp(numbers("w", BATCH, LENGTH, 3, 4)), 0.3 * a
    _, left = wkv7(*(x[:, :5] for x in (r, log_w, k, v, a, b)))
    _, right = wkv7(*(x[:, 5:] for x in (r, log_w, k, v, a, b)))
    _, whole = wkv7(r, log_w, k, v, a, b)
    matrix = begin_wkv7(*(x[:, 5:] for x in (log_w, k, v, a, b))).transition
    assert difference(left @ matrix + right, whole) < 1e-13
    assert difference(matrix @ left + right, whole) > 1e-3  # the side matters


def test_rwkv7_begins_as_its_authors_code_does() -> None:
    model = build_model(
        {"vocab_size": 64, "width": 128, "layers": "[rwkv7] x 3", "feed_forward": "channel_mix"}, seed=1
    )
    mixer = model.blocks[1].mixer
    assert isinstance(mixer, RWKV7) and mixer.first_value is not None
    C, N, n = 128, 64, torch.arange(128)
    linear, zigzag = n / (C - 1) - 0.5, (n % N - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = zigzag * zigzag.abs()
    depth, remaining = 1 / 2, 1 - 1 / 3
    for part, exponent in zip(mixer.mix, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
        assert torch.allclose(part, 1 - (n / C) ** (exponent * remaining))
    decays = -6 + 6 * (n / (C - 1)) ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag
    expected = {
        mixer.decay.bias: decays,
        mixer.rate.bias: -0.19 + zigzag * 0.3 + linear * 0.4,
        mixer.first_value.bias: 0.73 - linear * 0.4,
        mixer.k_k: 0.71 - linear * 0.1,
    }
    for parameter, value in expected.items():
        assert parameter is not None and torch.allclose(parameter, value, atol=1e-5)
    assert mixer.decay.down.shape == (128, 32) and mixer.gate.down.shape == (128, 64)
    assert mixer.output.weight.abs().max() == 0 and mixer.decay.down.abs().max() == 0
    assert 0.9 * 0.05 < mixer.key.weight.abs().max() * math.sqrt(C) <= 0.05
    log_w = -math.exp(-0.5) * torch.sigmoid(decays)
    assert log_w.min() > -0.61 and log_w.max() < 0


def test_rwkv7_refuses_heads_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="width 12 is not divisible by head_dim 64"):
        make_model({"layers": "[rwkv7]"})


def test_large_logits_are_pulled_back_as_in_the_authors_code() -> None:
    """Their L2Wrap leaves the loss alone and adds pull / (B T) times the largest logit to that logit's gradient."""
    pull, tokens_BT = 0.3, torch.randint(11, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    model, plain = make_model({"layers": "[rwkv4]", "logit_pull": pull}), make_model({"layers": "[rwkv4]"})
    losses = model(tokens_BT, tokens_BT)
    losses.total.backward()
    assert losses.cross_entropy == plain(tokens_BT, tokens_BT).cross_entropy < losses.total
    logits_BTV = plain.logits(tokens_BT)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten()), logits_BTV)
    logits_BTV = plain.logits(tokens_BT)
    largest_BT1, place_BT1 = logits_BTV.detach().max(dim=-1, keepdim=True)
    logits_BTV.backward(gradient.scatter_add(-1, place_BT1, pull / tokens_BT.numel() * largest_BT1))
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert difference(ours.grad, theirs.grad) < 1e-12, name


def test_decays_and_bonuses_learn_faster() -> None:
    rates = learning_rates(make_model({"layers": "[rwkv4, mamba]"}))
    assert rates == {"blocks.0.mixer.time_decay": 2.0, "blocks.0.mixer.time_first": 3.0}
