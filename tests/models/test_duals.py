"""Mamba-2, RetNet and linear attention against their quadratic forms and, where there is one, the common library."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longstride.kernels import rms_norm
from longstride.models.mixers.linear_attention import LinearAttention
from longstride.models.mixers.mamba2 import Mamba2
from longstride.models.mixers.retnet import RetNet
from longstride.models.parameters import initialise
from longstride.parallel import SequenceShard

from .cases import WIDTH, difference, make_mixer, make_model, numbers

LENGTH = 21


def causal_products(log_decay_BTH: Tensor) -> Tensor:
    """(B, H, T, T): the decay from token s to token t, zero above the diagonal."""
    length = log_decay_BTH.shape[1]
    later_TT = torch.ones(length, length).tril(-1).bool()
    # row t sums the logarithms of tokens s + 1 to t
    logs_BHTT = log_decay_BTH.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, length)
    sums_BHTT = logs_BHTT.masked_fill(~later_TT, 0).cumsum(dim=2)
    return torch.exp(sums_BHTT).masked_fill(~torch.ones(length, length).tril().bool(), 0)


# Mamba-2


def quadratic_mamba2(mixer: Mamba2, x_BTD: Tensor) -> Tensor:
    """Before gate and norm: Y = (C B' * decays * delta) X, heads apart."""
    streams_BTM, delta_BTH = mixer.project_streams(x_BTD)
    taps = mixer.conv_weight.shape[1]
    padded_BTM = F.pad(streams_BTM, (0, 0, taps - 1, 0))
    convolved_BTM = sum(padded_BTM[:, j : j + x_BTD.shape[1]] * mixer.conv_weight[:, j] for j in range(taps))
    x_BTHP, B_BTGN, C_BTGN = mixer.split(F.silu(convolved_BTM + mixer.conv_bias))
    delta_BTH = F.softplus(delta_BTH + mixer.dt_bias)
    decays_BHTT = causal_products(-torch.exp(mixer.A_log) * delta_BTH)
    sharing = mixer.heads // mixer.groups
    scores_BGTT = torch.einsum("btgn,bsgn->bgts", C_BTGN, B_BTGN)
    matrix_BHTT = scores_BGTT.repeat_interleave(sharing, dim=1) * decays_BHTT * delta_BTH.transpose(1, 2).unsqueeze(2)
    return torch.einsum("bhts,bshp->bthp", matrix_BHTT, x_BTHP) + mixer.D[:, None] * x_BTHP


@pytest.mark.parametrize("name", ["mamba2", "mamba2 with groups"])
def test_mamba2_is_its_quadratic_form(name: str) -> None:
    mixer = make_mixer(name)
    assert isinstance(mixer, Mamba2)
    x_BTD = numbers("x", 2, LENGTH, WIDTH)
    gated_BTC = quadratic_mamba2(mixer, x_BTD).flatten(2) * F.silu(mixer.project_gate(x_BTD))

    def output(groups: int) -> Tensor:
        parts = gated_BTC.unflatten(-1, (groups, -1))
        normed_BTC = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + mixer.norm.eps)
        return mixer.out_proj(normed_BTC.flatten(2) * mixer.norm.weight)

    y_BTD = mixer(x_BTD, SequenceShard.whole(LENGTH))
    assert difference(y_BTD, output(mixer.groups)) < 1e-12
    if mixer.groups > 1:
        assert difference(y_BTD, output(1)) > 0.05  # the mean is not over all channels


def test_mamba2_is_the_library_s() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        hidden_size=12, num_heads=6, head_dim=4, state_size=5, n_groups=2, expand=2, chunk_size=8, vocab_size=7
    )
    theirs = Mamba2Mixer(config, layer_idx=0).double()
    ours = make_model({"layers": "[mamba2(state=5, head_dim=4, groups=2)]"}).blocks[0].mixer
    assert isinstance(ours, Mamba2)
    ours.norm.eps = config.layer_norm_epsilon
    with torch.no_grad():
        names = {"conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias"}
        source = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            source[names.get(name, name)].copy_(parameter.view_as(source[names.get(name, name)]))
        x_BTD = numbers("x", 2, LENGTH, WIDTH)
        expected_BTD = theirs(x_BTD)
    assert difference(ours(x_BTD, SequenceShard.whole(LENGTH)), expected_BTD) < 1e-6  # theirs rounds to float32 inside


def test_mamba2_begins_as_its_authors_code_does() -> None:
    model = make_model({"layers": "[mamba2(head_dim=1, state=4)] x 4", "width": 256})
    initialise(model, seed=0)
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, Mamba2)
    rates_H = mixer.A_log.exp()
    assert 1 <= rates_H.min() < 1.5 and 15.5 < rates_H.max() <= 16 and abs(rates_H.mean() - 8.5) < 1
    steps_H = F.softplus(mixer.dt_bias)
    assert steps_H.min() >= 0.99e-3 and steps_H.max() <= 1.01e-1
    assert abs(steps_H.log().mean() - math.log(1e-2)) < 0.3
    assert 0.9 < mixer.out_proj.weight.abs().max() * math.sqrt(512) * math.sqrt(4) <= 1


# RetNet


def quadratic_retention(mixer: RetNet, x_BTD: Tensor, *, normalised: bool = False, positions: Tensor | None = None):
    """(Q K' * D) V of the paper; `normalised`: with its three scalings of the scores."""
    length = x_BTD.shape[1]
    q_BTHK, k_BTHK, v_BTHP = mixer.project(x_BTD, torch.arange(length) if positions is None else positions)
    gamma_H = 1 - 2.0 ** (-5 - torch.arange(mixer.heads).double())
    n = torch.arange(length)
    decay_HTT = torch.where(n[:, None] >= n, gamma_H[:, None, None] ** (n[:, None] - n).clamp(min=0), 0.0)
    if normalised:
        decay_HTT = decay_HTT / decay_HTT.sum(-1, keepdim=True).sqrt()
    scores_BHTT = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) * decay_HTT
    if normalised:
        scores_BHTT = scores_BHTT / scores_BHTT.sum(-1, keepdim=True).abs().clamp(min=1)
    return torch.einsum("bhts,bshp->bthp", scores_BHTT, v_BTHP)


def make_retnet() -> RetNet:
    mixer = make_mixer("retnet")
    assert isinstance(mixer, RetNet)
    return mixer


def retention_output(mixer: RetNet, o_BTHP: Tensor, x_BTD: Tensor) -> Tensor:
    normed_BTHP = o_BTHP * torch.rsqrt(o_BTHP.square().mean(-1, keepdim=True) + mixer.options.eps)
    return mixer.out_proj(F.silu(mixer.g_proj(x_BTD)) * normed_BTHP.flatten(2))


def test_retnet_is_its_quadratic_form() -> None:
    mixer, x_BTD = make_retnet(), 10 * numbers("x", 2, LENGTH, WIDTH)
    y_BTD = mixer(x_BTD, SequenceShard.whole(LENGTH))
    plain, scaled = (quadratic_retention(mixer, x_BTD, normalised=normalised) for normalised in (False, True))
    assert difference(y_BTD, retention_output(mixer, plain, x_BTD)) < 1e-12
    # the norm undoes the paper's scalings, but for its epsilon
    assert 1e-12 < difference(y_BTD, retention_output(mixer, scaled, x_BTD)) < 1e-4
    whole = rms_norm(plain.flatten(2), torch.ones(plain[0, 0].numel(), dtype=torch.float64), mixer.options.eps)
    assert difference(y_BTD, mixer.out_proj(F.silu(mixer.g_proj(x_BTD)) * whole)) > 0.05  # not one norm for all heads


def test_retention_sees_distances_through_its_rotation() -> None:
    mixer, x_BTD = make_retnet(), numbers("x", 2, LENGTH, WIDTH)
    plain = quadratic_retention(mixer, x_BTD)
    assert difference(quadratic_retention(mixer, x_BTD, positions=torch.arange(LENGTH) + 1000), plain) < 1e-12
    restarted = torch.arange(LENGTH) % 11  # as if a shard counted its tokens from zero
    assert difference(quadratic_retention(mixer, x_BTD, positions=restarted), plain) > 1e-2


def test_retention_s_angles_are_torchscale_s() -> None:
    mixer = make_model({"layers": "[retnet(heads=2)]", "width": 16}).blocks[0].mixer
    assert isinstance(mixer, RetNet)
    ones_BTD = torch.ones(1, 1, 16, dtype=torch.float64)
    with torch.no_grad():
        mixer.q_proj.weight.copy_(torch.eye(16))
        at_zero, at_three = (mixer.project(ones_BTD, torch.tensor([t]))[0][0, 0, 0] for t in (0, 3))
    angles = 3 * 10000 ** -torch.linspace(0, 1, 4, dtype=torch.float64)
    assert torch.allclose(at_zero, torch.ones(8, dtype=torch.float64))
    assert torch.allclose(at_three[0::2], angles.cos() - angles.sin())
    assert torch.allclose(at_three[1::2], angles.cos() + angles.sin())


def test_decays_of_both_kinds() -> None:
    powers = make_retnet().log_gamma(torch.device("cpu")).exp()
    assert torch.allclose(powers, 1 - torch.tensor([1 / 32, 1 / 64, 1 / 128], dtype=torch.float64))
    other = make_mixer("retnet, other decays")
    assert isinstance(other, RetNet)
    expected = 1 - torch.tensor([1 / 32, 1 / 512], dtype=torch.float64)
    assert torch.allclose(other.log_gamma(torch.device("cpu")).exp(), expected)


# linear attention


def test_linear_attention_is_its_quadratic_form() -> None:
    mixer = make_mixer("linear_attention")
    assert isinstance(mixer, LinearAttention)
    x_BTD = numbers("x", 2, LENGTH, WIDTH)

    def heads(projection: torch.nn.Module) -> Tensor:
        return projection(x_BTD).unflatten(-1, (3, 4)).transpose(1, 2)

    q_BHTK, k_BHTK, v_BHTK = F.elu(heads(mixer.q_proj)) + 1, F.elu(heads(mixer.k_proj)) + 1, heads(mixer.v_proj)
    weights_BHTT = (q_BHTK @ k_BHTK.mT).tril()
    out_BHTK = weights_BHTT @ v_BHTK / (weights_BHTT.sum(-1, keepdim=True) + mixer.eps)
    expected_BTD = mixer.out_proj(out_BHTK.transpose(1, 2).flatten(2))
    assert difference(mixer(x_BTD, SequenceShard.whole(LENGTH)), expected_BTD) < 1e-12


def test_linear_attention_is_an_average_of_values() -> None:
    mixer = make_mixer("linear_attention")
    assert isinstance(mixer, LinearAttention)
    with torch.no_grad():
        mixer.v_proj.weight.zero_()
        mixer.out_proj.weight.copy_(torch.eye(WIDTH))
    mixer.v_proj.register_forward_hook(lambda module, inputs, output: output + 3.0)
    y_BTD = mixer(numbers("x", 2, LENGTH, WIDTH), SequenceShard.whole(LENGTH))
    assert (y_BTD - 3).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("[mamba2(head_dim=5)]", "24 inner channels are not divisible by mamba2.head_dim 5"),
        ("[mamba2(head_dim=8, groups=2)]", "3 heads are not divisible by mamba2.groups 2"),
        ("[retnet(heads=4)]", "width 12 is not divisible by 4 heads of even width"),
        ("[linear_attention(heads=5)]", "width 12 is not divisible by 5 heads"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(layers: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        make_model({"layers": layers})
    assert "\n" not in str(raised.value)
