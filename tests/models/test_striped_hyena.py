"""StripedHyena's and StripedHyena 2's operators, norm and feed-forward layers against their definitions, float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longstride.models.mixers.attention import Attention
from longstride.models.mixers.gated_convolution import GatedConvolution
from longstride.models.mixers.modal_hyena import ModalHyena
from longstride.models.mixers.striped_hyena_2 import HyenaLI, HyenaMR, HyenaSE, decaying_window
from longstride.models.mlp import MLP
from longstride.models.parameters import OuterRMSNorm, RMSNorm, initialise
from longstride.parallel import SequenceShard

from .cases import WIDTH, difference, make_mixer, make_model, numbers

LENGTH = 25


def taps_of(mixer: GatedConvolution) -> Tensor:
    """(D, L): the filter of G by its own formula, the direct term in it."""
    lags_L = torch.arange(LENGTH, dtype=torch.float64)
    taps_DL = torch.zeros(WIDTH, LENGTH, dtype=torch.float64)
    if isinstance(mixer, ModalHyena):
        poles_DN, residues_DN = (torch.view_as_complex(pair.detach()) for pair in (mixer.poles, mixer.residues))
        taps_DL += (residues_DN.unsqueeze(-1) * poles_DN.unsqueeze(-1) ** lags_L).sum(1).real
    elif isinstance(mixer, HyenaLI):
        rates_DN = torch.exp(mixer.log_rates.detach())
        taps_DL += (mixer.residues.detach().unsqueeze(-1) * torch.exp(-rates_DN.unsqueeze(-1) * lags_L)).sum(1)
    else:
        assert isinstance(mixer, HyenaSE)
        groups, known = mixer.taps.shape
        for channel in range(WIDTH):
            group = channel // (WIDTH // groups)
            for lag in range(min(known, LENGTH)):
                window = 1.0
                if isinstance(mixer, HyenaMR):
                    slowest = math.log10(mixer.slowest)
                    alpha = 10 ** (slowest + (2 - slowest) * group / (groups - 1))
                    window = math.exp(-alpha * lag / (known - 1))
                taps_DL[channel, lag] = mixer.taps[group, lag] * window
    if not isinstance(mixer, HyenaSE) or isinstance(mixer, HyenaMR):
        taps_DL[:, 0] += mixer.D.detach()
    return taps_DL


def streams_of(mixer: GatedConvolution, x_BTD: Tensor) -> Tensor:
    """(B, T, 3 D) after the short convolution, whose last tap multiplies the current token."""
    streams_BTM, taps = mixer.in_proj(x_BTD), mixer.conv_weight.shape[1]
    padded_BTM = F.pad(streams_BTM, (0, 0, taps - 1, 0))
    summed = sum(padded_BTM[:, j : j + LENGTH] * mixer.conv_weight[:, j] for j in range(taps))
    assert isinstance(summed, Tensor)
    return summed if mixer.conv_bias is None else summed + mixer.conv_bias


def slow_output(mixer: GatedConvolution, x_BTD: Tensor, layout: str) -> Tensor:
    streams_BTM = streams_of(mixer, x_BTD)
    if layout == "interleaved":
        q_BTD, k_BTD, v_BTD = (streams_BTM[..., first::3] for first in range(3))
    else:
        head = WIDTH // 3
        parts = [[], [], []]
        for start in range(0, 3 * WIDTH, 3 * head):
            for stream in range(3):
                parts[stream].append(streams_BTM[..., start + stream * head : start + (stream + 1) * head])
        q_BTD, k_BTD, v_BTD = (torch.cat(part, dim=-1) for part in parts)
    u_BTD, taps_DL = k_BTD * v_BTD, taps_of(mixer)
    y_BTD = torch.stack([(u_BTD[:, : t + 1].flip(1) * taps_DL[:, : t + 1].t()).sum(1) for t in range(LENGTH)], dim=1)
    return mixer.out_proj(q_BTD * y_BTD)


LAYOUTS = {"modal_hyena": "heads", "hyena_li": "interleaved", "hyena_mr": "interleaved", "hyena_se": "interleaved"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_operators_are_their_filters_between_gates(name: str) -> None:
    mixer = make_mixer(name)
    assert isinstance(mixer, GatedConvolution)
    if isinstance(mixer, ModalHyena):
        with torch.no_grad():
            mixer.poles *= 0.7  # all inside the unit circle
    x_BTD = numbers("x", 2, LENGTH, WIDTH)
    y_BTD = mixer(x_BTD, SequenceShard.whole(LENGTH))
    assert difference(y_BTD, slow_output(mixer, x_BTD, LAYOUTS[name])) < 1e-12
    for layout in {"heads", "interleaved"} - {LAYOUTS[name]}:
        assert difference(y_BTD, slow_output(mixer, x_BTD, layout)) > 0.1


def test_a_recurrence_of_real_parts_is_not_the_filter() -> None:
    # the released prefill multiplies real parts only
    poles_N, residues_N = (torch.view_as_complex(numbers(name, 8, 2)) for name in ("p", "r"))
    poles_N = poles_N / poles_N.abs() * 0.9
    lags_L = torch.arange(20, dtype=torch.float64)
    powers_NL = poles_N.unsqueeze(-1) ** lags_L
    right = (residues_N.unsqueeze(-1) * powers_NL).sum(0).real
    wrong = (residues_N.real.unsqueeze(-1) * powers_NL.real).sum(0)
    assert difference(wrong, right) > 0.3


def test_poles_outside_the_unit_circle_are_held_on_it() -> None:
    mixer = make_mixer("modal_hyena")
    assert isinstance(mixer, ModalHyena)
    with torch.no_grad():
        mixer.poles.copy_(torch.tensor([1.2, 0.5]).expand_as(mixer.poles))
    log_poles_DN, _, _ = mixer.modes()
    assert (log_poles_DN.real == 0).all()
    assert torch.allclose(log_poles_DN.imag, torch.tensor(math.atan2(0.5, 1.2), dtype=torch.float64))
    initialise(mixer, seed=0)
    assert (mixer.modes()[0].real < 0).all()


def test_long_operators_begin_as_savanna_does() -> None:
    model = make_model({"layers": "[hyena_li, hyena_mr]", "width": 240})
    initialise(model, seed=0)
    long, medium = (block.mixer for block in model.blocks)
    assert isinstance(long, HyenaLI) and isinstance(medium, HyenaMR)
    rates_DN = long.log_rates.exp() * math.e
    assert 0.01 <= rates_DN.min() < 0.011 and 0.099 < rates_DN.max() <= 0.1
    assert abs(long.residues.std() - 0.1 / 4) < 1e-3
    assert abs(medium.taps.std() - 1e-5 / math.sqrt(128)) < 1e-8
    window_FK = decaying_window(1.0, *medium.taps.shape)
    assert torch.allclose(-window_FK[[0, -1], -1].log(), torch.tensor([1.0, 100.0], dtype=torch.float64))


def test_a_norm_whose_epsilon_is_outside_the_root() -> None:
    outer, inner = OuterRMSNorm(WIDTH, 1e-2).double(), RMSNorm(WIDTH, 1e-2).double()
    x_BTD, weight = numbers("x", 2, 3, WIDTH) * 0.05, numbers("w", WIDTH)
    with torch.no_grad():
        outer.weight.copy_(weight)
        inner.weight.copy_(weight)
    expected = x_BTD / (x_BTD.square().mean(-1, keepdim=True).sqrt() + 1e-2) * weight
    assert difference(outer(x_BTD), expected) < 1e-14
    assert difference(inner(x_BTD), expected) > 0.1
    assert outer(x_BTD.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "activation"), [("bilinear", lambda x: x), ("geglu", F.gelu), ("swiglu", F.silu)])
def test_gated_linear_units(kind: str, activation) -> None:  # type: ignore[no-untyped-def]
    model = make_model({"layers": "[mamba+mlp]", "mlp": {"kind": kind, "hidden": 7}})
    layer = model.blocks[0].feed_forward
    assert isinstance(layer, MLP)
    x_BTD = numbers("x", 2, 3, WIDTH)
    gate_FD, up_FD = layer.up_proj.weight.chunk(2)
    expected = layer.down_proj(activation(x_BTD @ gate_FD.t()) * (x_BTD @ up_FD.t()))
    assert difference(layer(x_BTD, SequenceShard.whole(3))[0], expected) < 1e-13


def test_a_gelu_without_a_gate() -> None:
    model = make_model({"layers": "[mamba+mlp]", "mlp": {"kind": "gelu", "hidden": 7, "bias": True}})
    layer = model.blocks[0].feed_forward
    assert isinstance(layer, MLP)
    x_BTD = numbers("x", 2, 3, WIDTH)
    up_BTF = x_BTD @ layer.up_proj.weight.t() + layer.up_proj.bias
    # the exact one, not the approximation by a tanh
    gelu_BTF = up_BTF * (1 + torch.erf(up_BTF / math.sqrt(2))) / 2
    expected = gelu_BTF @ layer.down_proj.weight.t() + layer.down_proj.bias
    assert difference(layer(x_BTD, SequenceShard.whole(3))[0], expected) < 1e-13


def test_scaled_and_partial_rotations() -> None:
    x_BTD = numbers("x", 1, 9, WIDTH)

    def queries(options: str, start: int) -> Tensor:
        mixer = make_model({"layers": f"[attention(heads=2{options})]"}).blocks[0].mixer
        assert isinstance(mixer, Attention)
        return mixer.project(x_BTD, torch.arange(start, start + 9))[0]

    # the tenth token of a context stretched tenfold stands where the first one stood
    assert difference(queries(", rotary_scale=10.0", 10)[:, 0], queries("", 1)[:, 0]) < 1e-13
    partial, none = queries(", rotary_dim=2", 5), queries(", rotary_base=null", 5)
    assert torch.equal(partial[..., 2:], none[..., 2:])
    assert difference(partial[..., :2], none[..., :2]) > 0.1


def test_a_bias_of_the_output_alone() -> None:
    names = {name for name, _ in make_model({"layers": "[attention(heads=2, bias=out)]"}).named_parameters()}
    assert {name for name in names if name.endswith("bias")} == {"blocks.0.mixer.out_proj.bias"}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("[modal_hyena(heads=5)]", "width 12 is not divisible by 5 heads"),
        ("[hyena_se(groups=5)]", "width 12 is not divisible by 5 filter groups"),
        ("[hyena_mr(groups=7)]", "width 12 is not divisible by 7 filter groups"),
        ("[attention(heads=3, rotary_dim=6)]", "rotary_dim 6 exceeds the head width 4"),
        ("[attention(heads=3, rotary_dim=3)]", "even head width, not 3"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(layers: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        make_model({"layers": layers})
    assert "\n" not in str(raised.value)


def test_a_pole_that_left_the_circle_is_set_on_it() -> None:
    mixer = make_mixer("modal_hyena")
    assert isinstance(mixer, ModalHyena)
    with torch.no_grad():
        mixer.poles.copy_(torch.tensor([1.2, -0.9]).expand_as(mixer.poles))
    log_poles_DN, _, _ = mixer.modes()
    assert (log_poles_DN.real == 0).all() and (log_poles_DN.imag < -0.6).all()
