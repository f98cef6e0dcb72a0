"""HiPPO, S4D, S4 and H3 against their definitions: matrices, dense powers, Cauchy sums and recurrences, float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from longstride.models.mixers.h3 import H3
from longstride.models.mixers.hippo import hippo_legs, legs_modes, low_rank_part
from longstride.models.mixers.s4 import S4, ConstantMatrix
from longstride.models.mixers.s4d import S4D
from longstride.models.parameters import initialise
from longstride.parallel import SequenceShard

from .cases import WIDTH, difference, make_mixer, make_model, numbers

LENGTH = 33


def paired(pairs: Tensor) -> Tensor:
    """One of each conjugate pair as (..., M, 2) to both, (..., 2 M)."""
    half = torch.view_as_complex(pairs.detach().contiguous())
    return torch.cat([half, half.conj()], dim=-1)


def impulse_response(mixer: S4D | S4) -> Tensor:
    """(D, L): what the sequence map, without the output layer, makes of a one."""
    mixer.output = lambda y_BTD: y_BTD  # type: ignore[method-assign]
    u_BTD = torch.zeros(1, LENGTH, WIDTH, dtype=torch.float64)
    u_BTD[:, 0] = 1
    return mixer(u_BTD, SequenceShard.whole(LENGTH))[0].t()


def dense_response(A_DNN: Tensor, B_DN: Tensor, C_DN: Tensor, D_D: Tensor, dt_D: Tensor, rule: str) -> Tensor:
    """The same of x' = A x + B u, y = C x + D u, sampled, by powers of the matrix."""
    unit_NN, dt_D11 = torch.eye(A_DNN.shape[-1], dtype=A_DNN.dtype), dt_D[:, None, None]
    if rule == "zoh":
        Abar_DNN = torch.linalg.matrix_exp(dt_D11 * A_DNN)
        Bbar_DN = torch.linalg.solve(A_DNN, ((Abar_DNN - unit_NN) @ B_DN[..., None]))[..., 0]
    else:
        Abar_DNN = torch.linalg.solve(unit_NN - dt_D11 / 2 * A_DNN, unit_NN + dt_D11 / 2 * A_DNN)
        Bbar_DN = torch.linalg.solve(unit_NN - dt_D11 / 2 * A_DNN, dt_D11 * B_DN[..., None])[..., 0]
    taps, x_DN = [], Bbar_DN
    for _ in range(LENGTH):
        taps.append((C_DN * x_DN).sum(-1).real)
        x_DN = torch.einsum("dnm,dm->dn", Abar_DNN, x_DN)
    taps[0] = taps[0] + D_D
    return torch.stack(taps, dim=1)


# HiPPO


@pytest.mark.parametrize("state", [2, 8, 64])
def test_legs_plus_a_rank_one_term_is_minus_half_plus_skew(state: int) -> None:
    A_NN, _ = hippo_legs(state)
    P_N = low_rank_part(state)
    rest_NN = A_NN + torch.outer(P_N, P_N) + torch.eye(state) / 2
    assert (rest_NN + rest_NN.t()).abs().max() < 1e-12
    assert (A_NN + A_NN.t()).abs().max() > 1  # A itself is nothing of the kind


def test_a_random_matrix_has_no_such_form() -> None:
    A_NN, P_N = numbers("A", 8, 8), low_rank_part(8)
    normal_NN = A_NN + torch.outer(P_N, P_N)
    assert difference(normal_NN @ normal_NN.t(), normal_NN.t() @ normal_NN) > 0.1


@pytest.mark.parametrize("state", [4, 16])
def test_legs_modes_are_legs_in_another_basis(state: int) -> None:
    A_M, P_M, B_M = legs_modes(state)
    A_N, P_N, B_N = (torch.cat([half, half.conj()]) for half in (A_M, P_M, B_M))
    modes_NN = torch.diag(A_N) - torch.outer(P_N, P_N.conj())
    A_NN, b_N = hippo_legs(state)
    for power in range(4):  # B* A^k B does not depend on the basis
        ours = B_N.conj() @ torch.linalg.matrix_power(modes_NN, power) @ B_N
        theirs = b_N @ torch.linalg.matrix_power(A_NN, power) @ b_N
        assert abs(ours - theirs) < 1e-10 * abs(theirs)
    assert (A_M.real + 0.5).abs().max() < 1e-12
    assert (P_M.imag.abs() < 1e-12).all() and (P_M.real > 0).all()
    if state == 16:
        assert abs(A_M.imag.max() - 80.97) < 0.01


# S4D


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["lin", "inv", "quad", "legs", "real"])
def test_s4d_is_the_sampled_differential_equation(init: str, rule: str) -> None:
    mixer = make_model({"layers": f"[s4d(state=6, init={init}, discretisation={rule})]"}).blocks[0].mixer
    assert isinstance(mixer, S4D)
    ssm, pairs = mixer.ssm, init != "real"
    rate_DM = -torch.exp(ssm.log_A_real.detach())
    if ssm.A_imag is None:
        A_DN, B_DN, C_DN = rate_DM, ssm.B.detach(), ssm.C.detach()
    else:
        A_DN = paired(torch.stack([rate_DM, ssm.A_imag.detach()], dim=-1))
        B_DN, C_DN = paired(ssm.B), paired(ssm.C)
    assert A_DN.shape == (WIDTH, 6) and A_DN.is_complex() == pairs
    step_D = torch.exp(ssm.log_dt.detach())
    expected_DL = dense_response(torch.diag_embed(A_DN), B_DN, C_DN, mixer.D.detach(), step_D, rule)
    assert difference(impulse_response(mixer), expected_DL) < 1e-12


@pytest.mark.parametrize("name", ["s4d", "s4d, legs, bilinear", "s4d, real"])
def test_s4d_is_a_convolution_with_its_modes(name: str) -> None:
    mixer = make_mixer(name)
    assert isinstance(mixer, S4D)
    log_poles_DM, residues_DM = mixer.ssm.discrete()
    lags_L = torch.arange(LENGTH)
    powers_DML = torch.exp(log_poles_DM.unsqueeze(-1) * lags_L)
    taps_DL = (residues_DM.unsqueeze(-1) * powers_DML).sum(1).real
    x_BTD = numbers("x", 2, LENGTH, WIDTH)

    def by_fourier(n: int) -> Tensor:
        spectrum = torch.fft.rfft(x_BTD, n=n, dim=1) * torch.fft.rfft(taps_DL.t(), n=n, dim=0)
        return torch.fft.irfft(spectrum, n=n, dim=1)[:, :LENGTH] + mixer.D * x_BTD

    mixer.output = lambda y_BTD: y_BTD  # type: ignore[method-assign]
    y_BTD = mixer(x_BTD, SequenceShard.whole(LENGTH))
    assert difference(y_BTD, by_fourier(2 * LENGTH)) < 1e-12
    assert difference(y_BTD, by_fourier(LENGTH)) > 1e-2  # without padding the end wraps around to the beginning


@pytest.mark.parametrize("gated", [True, False])
def test_s4d_ends_with_a_glu_or_without(gated: bool) -> None:
    mixer = make_model({"layers": f"[s4d(state=6, gated={str(gated).lower()})]"}).blocks[0].mixer
    assert isinstance(mixer, S4D)
    y_BTD = numbers("y", 2, 5, WIDTH)
    out = torch.nn.functional.gelu(y_BTD) @ mixer.out_proj.weight.t() + mixer.out_proj.bias
    if gated:
        out = out[..., :WIDTH] * torch.sigmoid(out[..., WIDTH:])
    assert out.shape == y_BTD.shape and difference(mixer.output(y_BTD), out) < 1e-12


def legs_by_numpy(state: int) -> tuple[np.ndarray, np.ndarray]:
    """Of HiPPO-LegS' normal part: the eigenvalues of positive frequency, and what of B is along their eigenvectors."""
    n = np.arange(state)
    A_NN = -np.tril(np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), -1) - np.diag(n + 1)
    values_N, vectors_NN = np.linalg.eig(A_NN + np.sqrt(np.outer(n + 0.5, n + 0.5)))
    order_M = np.argsort(np.imag(values_N))[state // 2 :]
    return values_N[order_M], np.abs(vectors_NN.conj().T @ np.sqrt(2 * n + 1))[order_M]


STATE = 8
HALF, WHOLE = np.arange(STATE // 2), np.arange(STATE)
S4D_BEGINS = {
    "lin": (-0.5 + 1j * np.pi * HALF, np.ones(4)),
    "inv": (-0.5 + 1j * STATE / np.pi * (STATE / (2 * HALF + 1) - 1), np.ones(4)),
    "quad": (-0.5 + 1j / np.pi * (1 + 2 * HALF) ** 2, np.ones(4)),
    "real": (-(WHOLE + 1.0), np.ones(8)),
    "legs": legs_by_numpy(STATE),
}
"""A and the absolute values of B."""


@pytest.mark.parametrize("init", S4D_BEGINS)
def test_s4d_begins_where_the_paper_says(init: str) -> None:
    layers = f"[s4d(state={STATE}, init={init})]"
    model = make_model({"layers": layers, "width": 400, "vocab_size": 4, "feed_forward": "none"})
    initialise(model, seed=1)
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, S4D)
    A_DM, B_DM, C_DM = (part.detach() for part in mixer.ssm.continuous())
    A_M, B_M = (torch.from_numpy(part) for part in S4D_BEGINS[init])
    assert torch.allclose(A_DM, A_M.expand(400, -1), rtol=1e-6, atol=1e-6)  # kept in single precision at first
    assert torch.allclose(B_DM.abs(), B_M.expand(400, -1), rtol=1e-6)
    assert init == "legs" or (B_DM == 1).all()
    assert abs(C_DM.abs().square().mean() - 1) < 0.1  # standard normal, complex where A is
    dt_D = mixer.ssm.log_dt.exp()
    assert 1e-3 <= dt_D.min() < 1.5e-3 and 0.07 < dt_D.max() <= 1e-1


# S4


def cauchy_response(mixer: S4, length: int) -> Tensor:
    """(D, L), L odd: the authors' kernel, a generating function at the roots of unity and an inverse FFT."""
    A_DN = paired(torch.stack([-torch.exp(mixer.log_A_real.detach()), mixer.A_imag.detach()], dim=-1))
    P_DN, B_DN, C_DN = paired(mixer.P), paired(mixer.B), paired(mixer.C)
    rate_D = 2 * torch.exp(-mixer.log_dt.detach())
    A_DNN = torch.diag_embed(A_DN) - P_DN.unsqueeze(-1) * P_DN.conj().unsqueeze(-2)
    unit_NN = torch.eye(A_DN.shape[1], dtype=torch.complex128)
    Abar_DNN = torch.linalg.solve(rate_D[:, None, None] * unit_NN - A_DNN, rate_D[:, None, None] * unit_NN + A_DNN)
    Ctilde_DN = torch.einsum("dn,dnm->dm", C_DN, unit_NN - torch.linalg.matrix_power(Abar_DNN, length))
    roots_L = torch.exp(-2j * math.pi * torch.arange(length, dtype=torch.float64) / length)
    nodes_DL = rate_D[:, None] * (1 - roots_L) / (1 + roots_L)

    def cauchy(a_DN: Tensor, b_DN: Tensor) -> Tensor:
        return ((a_DN * b_DN).unsqueeze(1) / (nodes_DL.unsqueeze(-1) - A_DN.unsqueeze(1))).sum(-1)

    low_rank_DL = cauchy(Ctilde_DN, P_DN) * cauchy(P_DN.conj(), B_DN) / (1 + cauchy(P_DN.conj(), P_DN))
    spectrum_DL = 2 / (1 + roots_L) * (cauchy(Ctilde_DN, B_DN) - low_rank_DL)
    taps_DL = torch.fft.ifft(spectrum_DL).real
    taps_DL[:, 0] += mixer.D.detach()
    return taps_DL


def make_s4(options: str) -> S4:
    mixer = make_model({"layers": f"[s4({options})]"}).blocks[0].mixer
    assert isinstance(mixer, S4)
    return mixer


@pytest.mark.parametrize("options", ["state=6", "state=8, init=random"])
def test_s4_is_the_sampled_differential_equation_and_the_authors_kernel(options: str) -> None:
    mixer = make_s4(options)
    A_DN = paired(torch.stack([-torch.exp(mixer.log_A_real.detach()), mixer.A_imag.detach()], dim=-1))
    P_DN = paired(mixer.P)
    A_DNN = torch.diag_embed(A_DN) - P_DN.unsqueeze(-1) * P_DN.conj().unsqueeze(-2)
    step_D = torch.exp(mixer.log_dt.detach())
    ours_DL = impulse_response(mixer)
    expected_DL = dense_response(A_DNN, paired(mixer.B), paired(mixer.C), mixer.D.detach(), step_D, "bilinear")
    assert difference(ours_DL, expected_DL) < 1e-12
    assert difference(ours_DL, cauchy_response(mixer, LENGTH)) < 1e-11
    diagonal_DL = dense_response(
        torch.diag_embed(A_DN), paired(mixer.B), paired(mixer.C), mixer.D.detach(), step_D, "bilinear"
    )
    assert difference(ours_DL, diagonal_DL) > 1e-3  # the rank-one term matters


def test_a_new_s4_is_hippo_legs() -> None:
    mixer = make_s4("state=8")
    initialise(mixer, seed=0)
    A_NN, B_N = hippo_legs(8)
    step_D = torch.exp(mixer.log_dt.detach())
    # C that reads B* x is the same vector in every basis
    with torch.no_grad():
        mixer.C.copy_(mixer.B * torch.tensor([1.0, -1.0]))
    expected_DL = dense_response(
        A_NN.expand(WIDTH, -1, -1), B_N.expand(WIDTH, -1), B_N.expand(WIDTH, -1), mixer.D.detach(), step_D, "bilinear"
    )
    assert difference(impulse_response(mixer), expected_DL) < 1e-6  # the initial values are single precision


def test_sampled_legs_is_a_contraction() -> None:
    for options in ("state=64", "state=64, init=random"):
        (Abar_DNN,), _, _ = make_s4(options).discrete(1)
        assert torch.linalg.matrix_norm(Abar_DNN, ord=2).max() < 1


def test_legs_remembers_more_than_a_random_matrix() -> None:
    ranks = {}
    for init in ("legs", "random"):
        mixer = make_s4(f"state=32, init={init}, dt_min=0.01, dt_max=0.010001")
        initialise(mixer, seed=0)
        squares, Bbar_DN, _ = mixer.discrete(1)
        columns, x_DN = [], Bbar_DN
        for _ in range(2000):
            columns.append(x_DN)
            x_DN = torch.einsum("dnm,dm->dn", squares[0], x_DN)
        singular_DN = torch.linalg.svdvals(torch.stack(columns, dim=-1).detach())
        # directions of the past that the state still tells apart at a part in a hundred
        ranks[init] = (singular_DN > 1e-2 * singular_DN[:, :1]).double().sum(-1).mean().item()
    assert ranks["legs"] > 1.3 * ranks["random"]


def test_powers_of_a_constant_matrix() -> None:
    matrix_DNN, state_BDN = numbers("M", 3, 4, 4) / 4, numbers("s", 2, 3, 4)
    transition = ConstantMatrix(matrix_DNN)
    expected_BDN = state_BDN
    for _ in range(5):
        expected_BDN = torch.einsum("dnm,bdm->bdn", matrix_DNN, expected_BDN)
    assert difference(transition.apply(None, 5, state_BDN), expected_BDN) < 1e-13
    part = transition.sliced(slice(1, 3), state_BDN)
    assert difference(part.apply(None, 5, state_BDN[:, 1:3]), expected_BDN[:, 1:3]) < 1e-13
    other_BDN = numbers("o", 2, 3, 4)
    adjoint = (transition.apply(None, 5, other_BDN, transposed=True) * state_BDN).sum()
    assert abs(adjoint - (other_BDN * expected_BDN).sum()) < 1e-13


# H3


def slow_h3(mixer: H3, x_BTD: Tensor) -> Tensor:
    """Both state spaces as recurrences, the shift one with the last inputs as its state."""
    heads, K = mixer.heads, mixer.head_dim
    q_BTD, k_BTD, v_BTD = mixer.q_proj(x_BTD), mixer.k_proj(x_BTD), mixer.v_proj(x_BTD)
    log_poles_HM, residues_HM = mixer.ssm.discrete()
    shift_BDN = torch.zeros(len(x_BTD), *mixer.shift_B.shape, dtype=torch.float64)
    state_BHKKM = torch.zeros(len(x_BTD), heads, K, K, log_poles_HM.shape[1], dtype=torch.complex128)
    outputs = []
    for t in range(x_BTD.shape[1]):
        k_BD = k_BTD[:, t]
        # the register moves down, then the input enters it through B
        shift_BDN = torch.cat([torch.zeros_like(shift_BDN[..., :1]), shift_BDN[..., :-1]], dim=-1)
        shift_BDN = shift_BDN + mixer.shift_B * k_BD.unsqueeze(-1)
        k_BHK = ((mixer.shift_C * shift_BDN).sum(-1) + mixer.shift_D * k_BD).view(-1, heads, K)
        kv_BHKK = k_BHK.unsqueeze(-1) * v_BTD[:, t].view(-1, heads, 1, K)
        state_BHKKM = torch.exp(log_poles_HM)[:, None, None] * state_BHKKM + kv_BHKK.unsqueeze(-1)
        s_BHKK = (residues_HM[:, None, None] * state_BHKKM).sum(-1).real + mixer.D[:, None, None] * kv_BHKK
        outputs.append(torch.einsum("bhi,bhij->bhj", q_BTD[:, t].view(-1, heads, K), s_BHKK).flatten(1))
    return mixer.out_proj(torch.stack(outputs, dim=1))


@pytest.mark.parametrize("name", ["h3", "h3 with heads"])
def test_h3_is_its_two_recurrences(name: str) -> None:
    mixer = make_mixer(name)
    assert isinstance(mixer, H3)
    x_BTD = numbers("x", 2, LENGTH, WIDTH)
    assert difference(mixer(x_BTD, SequenceShard.whole(LENGTH)), slow_h3(mixer, x_BTD)) < 1e-12


def test_a_new_shift_is_a_filter_of_its_c() -> None:
    mixer = make_mixer("h3")
    assert isinstance(mixer, H3)
    initialise(mixer, seed=0)
    assert torch.equal(mixer.shift_taps(), mixer.shift_C)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("[s4d(state=7)]", "s4d.state: input should be a multiple of 2, not 7"),
        ("[s4(state=7)]", "s4.state: input should be a multiple of 2, not 7"),
        ("[h3(state=7)]", "h3.state"),
        ("[h3(head_dim=5)]", "width 12 is not divisible by h3.head_dim 5"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(layers: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        make_model({"layers": layers})
    assert "\n" not in str(raised.value)
