"""GAU and FLASH against their equations written out, token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longstride.kernels import rotary
from longstride.models import ModelConfig, build_model
from longstride.models.mixers.flash import Flash
from longstride.models.mixers.gau import GAU, GatedUnit
from longstride.parallel import SequenceShard

from .cases import SMALL, WIDTH, difference, make_mixer, numbers

LENGTH, BATCH = 23, 2


def rows_of(mixer: GatedUnit, x_BTD: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """u, v and the rotated rows."""
    weight_u, weight_v, weight_z = mixer.in_proj.weight.split([mixer.channels, mixer.channels, mixer.key_dim])
    u, v, z = (F.silu(x_BTD @ weight.t()) for weight in (weight_u, weight_v, weight_z))
    positions = torch.arange(x_BTD.shape[1])
    pairs = zip(mixer.gamma, mixer.beta, strict=True)
    rows = [(z * gamma + beta).unsqueeze(2) for gamma, beta in pairs]
    return u, v, [rotary(row, positions, base=mixer.rotary_base).squeeze(2) for row in rows]


def slow_gau(mixer: GAU, x_BTD: Tensor, begin: list[int]) -> Tensor:
    u, v, (q, k) = rows_of(mixer, x_BTD)
    outputs = []
    for t in range(x_BTD.shape[1]):
        seen = range(begin[t], t + 1)
        total = torch.zeros_like(v[:, t])
        for s in seen:
            score = (q[:, t] * k[:, s]).sum(-1, keepdim=True) / mixer.key_dim**0.5
            total = total + torch.relu(score) ** 2 * v[:, s]
        outputs.append(u[:, t] * total / len(seen))
    return mixer.out_proj(torch.stack(outputs, dim=1))


def slow_flash(mixer: Flash, x_BTD: Tensor, begin: list[int]) -> Tensor:
    u, v, (q, k, q_lin, k_lin) = rows_of(mixer, x_BTD)
    outputs, scale = [], mixer.key_dim**-0.5
    for t in range(x_BTD.shape[1]):
        chunk_begin = begin[t] + (t - begin[t]) // mixer.chunk * mixer.chunk
        total = torch.zeros_like(v[:, t])
        for s in range(chunk_begin, t + 1):
            score = (q[:, t] * k[:, s]).sum(-1, keepdim=True) * scale
            total = total + torch.relu(score) ** 2 * v[:, s] / mixer.chunk
        for s in range(begin[t], chunk_begin):
            score = (q_lin[:, t] * k_lin[:, s]).sum(-1, keepdim=True) * scale
            total = total + score * v[:, s] / (chunk_begin - begin[t])
        outputs.append(u[:, t] * total)
    return mixer.out_proj(torch.stack(outputs, dim=1))


def slow(mixer: GatedUnit, x_BTD: Tensor, starts: list[int]) -> Tensor:
    begin = [max(start for start in [0, *starts] if start <= t) for t in range(x_BTD.shape[1])]
    assert isinstance(mixer, (GAU, Flash))
    return slow_gau(mixer, x_BTD, begin) if isinstance(mixer, GAU) else slow_flash(mixer, x_BTD, begin)


@pytest.mark.parametrize("starts", [[], [1, 7, 8, 17]])
@pytest.mark.parametrize("name", ["gau", "flash", "flash in long chunks"])
def test_outputs_and_gradients_are_the_equations(name: str, starts: list[int]) -> None:
    mixer = make_mixer(name)
    assert isinstance(mixer, GatedUnit)
    x_BTD, weight = numbers("x", BATCH, LENGTH, WIDTH).requires_grad_(), numbers("w", BATCH, LENGTH, WIDTH)
    ours, expected = mixer(x_BTD, SequenceShard.whole(LENGTH, starts)), slow(mixer, x_BTD, starts)
    assert difference(ours, expected) < 1e-12
    inputs = [x_BTD, *mixer.parameters()]
    both = [torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, expected)]
    assert max(difference(a, b) for a, b in zip(*both, strict=True)) < 1e-12


@pytest.mark.parametrize("name", ["gau", "flash"])
def test_an_output_does_not_depend_on_how_long_the_sequence_becomes(name: str) -> None:
    mixer, x_BTD = make_mixer(name), numbers("x", BATCH, LENGTH, WIDTH)
    longer, shorter = (mixer(x_BTD[:, :length], SequenceShard.whole(length)) for length in (LENGTH, 11))
    assert difference(longer[:, :11], shorter) < 1e-13


def test_blocks_of_scores_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        mixer, x_BTD = make_mixer("gau"), numbers("x", BATCH, 70, WIDTH).requires_grad_()
        y_BTD = mixer(x_BTD, SequenceShard.whole(70, [[9, 40], [33]]))
        return [y_BTD, *torch.autograd.grad(y_BTD.square().sum(), [x_BTD, *mixer.parameters()])]

    expected = run()
    monkeypatch.setattr("longstride.models.mixers.gau.SCORES_AT_ONCE", 1)  # blocks of 16 queries
    assert all(difference(ours, theirs) < 1e-12 for ours, theirs in zip(run(), expected, strict=True))


def test_flash_decodes_in_bounded_memory() -> None:
    mixer = make_mixer("flash")
    assert isinstance(mixer, Flash)
    held = []
    with torch.no_grad():
        state = mixer.init_state(1, torch.device("cpu"), torch.float64)
        for token in numbers("x", 5 * mixer.chunk, 1, WIDTH):
            _, state = mixer.step(token, state)
            held.append(sum(tensor.nbytes for tensor in state.values()))
    assert held[: mixer.chunk] == held[-mixer.chunk :]
    assert mixer.state_bytes(1 << 20) == mixer.state_bytes(0)


def test_options_that_do_not_fit_are_refused_in_one_line() -> None:
    for family in ("gau", "flash"):
        with pytest.raises(ValueError, match="key_dim: input should be a multiple of 2, not 7"):
            ModelConfig.parse({**SMALL, "layers": f"[{family}(key_dim=7)]"})


def test_a_new_gau_has_something_to_learn_from() -> None:
    """With gamma around zero, as in the paper, but without its bias of positions, gradients would be tiny."""
    shares = []
    for scale in (1.0, 0.02):
        mixer = build_model("gau-small", dtype=torch.float64).blocks[0].mixer
        assert isinstance(mixer, GAU)
        with torch.no_grad():
            mixer.gamma *= scale
        weight = mixer.in_proj.weight
        y_BTD = mixer(numbers("x", 8, 64, 64), SequenceShard.whole(64))
        (grad,) = torch.autograd.grad((y_BTD * numbers("w", 8, 64, 64)).sum(), weight)
        shares.append(grad[-mixer.key_dim :].abs().mean().item())
    assert shares[1] < 1e-4 * shares[0]
