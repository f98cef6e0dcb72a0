"""LSTM against its equations and torch's module."""

from __future__ import annotations

import torch
from torch import Tensor

from longstride.models import build_model
from longstride.models.mixers.lstm import LSTM
from longstride.parallel import SequenceShard

from .cases import WIDTH, difference, make_mixer, numbers

LENGTH, BATCH = 13, 2


def make_lstm() -> LSTM:
    mixer = make_mixer("lstm")
    assert isinstance(mixer, LSTM)
    return mixer


def slow_lstm(mixer: LSTM, x_BTD: Tensor, starts: list[int]) -> Tensor:
    h = c = x_BTD.new_zeros(x_BTD.shape[0], mixer.hidden)
    outputs = []
    for t in range(x_BTD.shape[1]):
        if t in starts:
            h, c = torch.zeros_like(h), torch.zeros_like(c)
        gates = x_BTD[:, t] @ mixer.input_weight.t() + h @ mixer.state_weight.t() + mixer.bias
        i, f, g, o = gates.chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return mixer.out_proj(torch.stack(outputs, dim=1))


def test_outputs_and_gradients_are_the_equations() -> None:
    mixer, starts = make_lstm(), [3, 4, 9]
    x_BTD, weight = numbers("x", BATCH, LENGTH, WIDTH).requires_grad_(), numbers("w", BATCH, LENGTH, WIDTH)
    ours, expected = mixer(x_BTD, SequenceShard.whole(LENGTH, starts)), slow_lstm(mixer, x_BTD, starts)
    assert difference(ours, expected) < 1e-12
    inputs = [x_BTD, *mixer.parameters()]
    both = [torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, expected)]
    assert max(difference(a, b) for a, b in zip(*both, strict=True)) < 1e-12


def test_agrees_with_torch() -> None:
    mixer, x_BTD = make_lstm(), numbers("x", BATCH, LENGTH, WIDTH)
    theirs = torch.nn.LSTM(WIDTH, mixer.hidden, batch_first=True).double()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(mixer.input_weight)
        theirs.weight_hh_l0.copy_(mixer.state_weight)
        theirs.bias_ih_l0.copy_(mixer.bias)
        theirs.bias_hh_l0.zero_()
        assert difference(mixer(x_BTD, SequenceShard.whole(LENGTH)), mixer.out_proj(theirs(x_BTD)[0])) < 1e-13


def test_a_new_layer_remembers() -> None:
    mixer = build_model({"vocab_size": 8, "width": 16, "layers": "[lstm]"}).blocks[0].mixer
    assert isinstance(mixer, LSTM)
    assert torch.equal(mixer.bias, torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(16))
    assert mixer.input_weight.abs().max() <= 0.25
