"""Conba's three variants against their equations written out, and the oracles of the closed loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longstride.models import build_model, load_preset
from longstride.models.mixers import newton
from longstride.models.mixers.conba import ReleasedConba
from longstride.models.mixers.conba_exact import ExactConba
from longstride.models.mixers.conba_linear import LinearConba
from longstride.models.mixers.mamba import Mamba
from longstride.parallel import SequenceShard
from tests.distributed import run_ranks

from .cases import WIDTH, difference, make_mixer, make_model, numbers

LENGTH, BATCH = 13, 2
RELEASED = {"layers": "[conba(state=4, dt_max=1.0, online_rate=0.1)]"}


def same_gradients(ours: Tensor, slow: Tensor, inputs: list[Tensor]) -> None:
    weight = numbers("w", *ours.shape)
    both = [torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, slow)]
    for a, b in zip(*both, strict=True):
        assert difference(a, b) < 1e-11


def make_released(case: dict[str, Any] = RELEASED) -> ReleasedConba:
    """With a control gain away from zero."""
    mixer = make_model(case).blocks[0].mixer
    assert isinstance(mixer, ReleasedConba)
    mixer.control_gain.copy_(0.3 * numbers("K", WIDTH, WIDTH))
    return mixer


def test_released_is_mamba_and_a_controller() -> None:
    mixer, x_BTD = make_released(), numbers("x", BATCH, LENGTH, WIDTH)
    shard = SequenceShard.whole(LENGTH)
    s = Mamba.forward(mixer, x_BTD, shard)
    s = s * (s @ mixer.scaling.weight.t() + mixer.scaling.bias)
    s = s + (s @ mixer.delayed_state.weight.t() + mixer.delayed_state.bias)
    e = s - 0.0
    expected = torch.stack([row - torch.stack([mixer.control_gain @ error for error in row]) for row in e])
    assert difference(mixer(x_BTD, shard), expected) < 1e-12


def test_released_decodes_with_a_gain() -> None:
    mixer, x_BTD = make_released(), numbers("x", BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        state, outputs = mixer.init_state(BATCH, x_BTD.device, x_BTD.dtype), []
        for token in x_BTD.unbind(dim=1):
            y_BD, state = mixer.step(token, state)
            outputs.append(y_BD)
        assert difference(torch.stack(outputs, dim=1), mixer(x_BTD, SequenceShard.whole(LENGTH))) < 1e-11


def moved_gain(rank: int, world: int) -> list[Tensor]:
    """K after a step in two parts, each of whose forward passes was computed twice, on the shards of one sequence."""
    shard = SequenceShard.split(LENGTH, dist.group.WORLD)
    mixer, x_BTD = make_released(), numbers("x", BATCH, LENGTH, WIDTH)[:, shard.start : shard.stop]
    for part_BTD in x_BTD.split(BATCH - 1):
        mixer(part_BTD, shard)
        mixer(part_BTD, shard).sum().backward()
    mixer.end_step()
    first = mixer.control_gain.clone()
    mixer.end_step()
    return [first, mixer.control_gain]


def test_released_gain_moves_after_the_step_by_all_tokens() -> None:
    mixer, x_BTD = make_released(), numbers("x", BATCH, LENGTH, WIDTH)
    before = mixer.control_gain.clone()
    e_BTD = mixer.observe(Mamba.forward(mixer, x_BTD, SequenceShard.whole(LENGTH)))
    products = torch.einsum("bti,btj->ij", e_BTD, e_BTD) / (BATCH * LENGTH)
    assert (products.abs().max() > 1e-2).item()
    for ours, again in run_ranks(moved_gain, 2):
        assert difference(ours, before + 0.1 * products.detach()) < 1e-12
        assert torch.equal(ours, again)  # one pass moves it once
    mixer.eval()
    mixer(x_BTD, SequenceShard.whole(LENGTH)).sum().backward()
    mixer.train()
    with torch.no_grad():
        mixer(x_BTD, SequenceShard.whole(LENGTH))
    mixer.end_step()
    assert torch.equal(mixer.control_gain, before)  # neither evaluation nor decoding moves it


@pytest.mark.parametrize(("gain", "smaller"), [("reduce", True), ("released", False)])
def test_the_sign_of_the_gain_decides_whether_errors_shrink(gain: str, smaller: bool) -> None:
    model = make_model({"layers": f"[conba(state=4, dt_max=1.0, online_rate=0.05, gain={gain})]"})
    mixer, x_BTD, shard = model.blocks[0].mixer, numbers("x", BATCH, LENGTH, WIDTH), SequenceShard.whole(LENGTH)
    sizes = []
    for _ in range(4):
        size = mixer(x_BTD, shard).square().mean()
        size.backward()
        sizes.append(size.item())
        model.end_step()
    assert (sizes == sorted(sizes, reverse=True)) == smaller
    assert (sizes == sorted(sizes)) != smaller


def test_released_gain_is_saved_and_not_trained() -> None:
    model = build_model({"vocab_size": 8, "width": 16, "layers": "[conba]"})
    name = "blocks.0.mixer.control_gain"
    assert name in model.state_dict() and name not in dict(model.named_parameters())
    assert model.state_dict()[name].abs().max() == 0


def slow_linear(mixer: LinearConba, x_BTD: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The loop as printed in the module: outputs, states, and every token's transition."""
    N = mixer.state
    g = F.silu(mixer.select_gate(x_BTD)) * mixer.select_value(x_BTD)
    k, q, delta = mixer.select_out(g).split(mixer.sizes, dim=-1)
    k, q, v = (part.unflatten(-1, (-1, N)) for part in (k, q, mixer.value(x_BTD)))
    k = k / k.norm(dim=-1, keepdim=True)
    a = torch.exp(-F.softplus(delta + mixer.step_bias) * torch.exp(mixer.A_log))[..., None]
    r = torch.sigmoid(mixer.scaling(x_BTD))[..., None]
    kappa, D = torch.sigmoid(mixer.control_gain)[:, None], mixer.D.view(-1, N)
    S = x_BTD.new_zeros(x_BTD.shape[0], len(mixer.A_log), N, N)
    outputs, states, transitions = [], [], []
    for t in range(x_BTD.shape[1]):
        e = torch.einsum("bhpn,bhn->bhp", S, k[:, t]) - v[:, t]
        u = -kappa * e
        delayed = torch.einsum("bhpn,bhn->bhp", S, q[:, t])
        S = a[:, t, ..., None] * S + (r[:, t] * u)[..., None] * k[:, t, :, None, :]
        outputs.append(torch.einsum("bhpn,bhn->bhp", S, k[:, t]) + delayed + D * v[:, t])
        states.append(S)
        outer = k[:, t, ..., None] * k[:, t, :, None, :]
        transitions.append(a[:, t, ..., None] * torch.eye(N) - (kappa * r[:, t])[..., None] * outer)
    y = torch.stack(outputs, dim=1).flatten(-2)
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + mixer.norm.eps) * mixer.norm.weight
    return mixer.out_proj(y), states, transitions


def make_linear() -> LinearConba:
    mixer = make_mixer("conba, linear")
    assert isinstance(mixer, LinearConba)
    return mixer


def test_linear_is_its_equations() -> None:
    mixer, x_BTD = make_linear(), numbers("x", BATCH, LENGTH, WIDTH).requires_grad_()
    ours, (slow, _, _) = mixer(x_BTD, SequenceShard.whole(LENGTH)), slow_linear(mixer, x_BTD)
    assert difference(ours, slow) < 1e-12
    same_gradients(ours, slow, [x_BTD, *mixer.parameters()])


def test_linear_loops_compose_and_never_grow() -> None:
    mixer, x_BTD = make_linear(), numbers("x", BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        _, states, transitions = slow_linear(mixer, x_BTD)
        _, from_nothing, _ = slow_linear(mixer, x_BTD[:, 5:])
    product = transitions[5]
    for transition in transitions[6:]:
        product = product @ transition
    assert difference(states[4] @ product + from_nothing[-1], states[-1]) < 1e-13
    norms = torch.linalg.matrix_norm(torch.stack(transitions), ord=2)
    assert norms.max() <= 1


def test_linear_loops_stay_bounded_whatever_the_weights() -> None:
    mixer = make_linear()
    with torch.no_grad():
        mixer.control_gain.fill_(50.0)  # kappa = 1
        mixer.scaling.bias.fill_(50.0)  # type: ignore[union-attr]
        mixer.A_log.fill_(-50.0)  # a = 1
        _, states, transitions = slow_linear(mixer, numbers("x", 1, 60, WIDTH))
    assert torch.linalg.matrix_norm(torch.stack(transitions), ord=2).max() <= 1 + 1e-12
    assert states[-1].abs().max() < 60


def make_exact() -> ExactConba:
    mixer = make_mixer("conba, exact")
    assert isinstance(mixer, ExactConba)
    return mixer


def slow_exact(mixer: ExactConba, x_BTD: Tensor, alpha: float, w_BTN: Any = 0.0, v_BTN: Any = 0.0) -> Tensor:
    """One sequence at a time, with the gradient of (11) taken by differentiation; w and v: (13) and (14)."""
    (W1, W2), (U1, U2), (c1, c2) = mixer.W.chunk(2), mixer.U.chunk(2), mixer.c.chunk(2)
    A, B, C, Z, g = mixer.A, mixer.B, mixer.C, mixer.scaling.weight, mixer.scaling.bias
    rows = []
    disturbed = zip(
        *(torch.as_tensor(part).expand(*x_BTD.shape[:2], mixer.state) for part in (w_BTN, v_BTN)), strict=True
    )
    for desired, (ws, vs) in zip(mixer.desired(x_BTD), disturbed, strict=True):
        x, K = torch.zeros(mixer.state, dtype=x_BTD.dtype), mixer.control_gain
        e_before, outputs = torch.zeros_like(x), []
        for target, w, v in zip(desired, ws, vs, strict=True):
            y_d, u_d = target.chunk(2)
            e = C @ x - y_d
            u = -K @ e + u_d
            S = F.silu(W1 @ x + U1 @ u + c1) * (W2 @ x + U2 @ u + c2)
            f_d = A @ x + B @ u + S
            x = F.silu(Z @ (f_d + w) + g)
            K = K - alpha * error_gradient(B, C, e, e_before)
            e_before = e
            outputs.append(C @ x + v)
        rows.append(torch.stack(outputs))
    return mixer.out_proj(torch.stack(rows))


def error_gradient(B: Tensor, C: Tensor, e: Tensor, e_before: Tensor) -> Tensor:
    """d|e| / dK where e contains -C B K e_before: by automatic differentiation at fixed e."""
    size = len(e)

    def error_norm(K: Tensor) -> Tensor:
        return (e - C @ B @ K @ e_before).norm()

    zero = torch.zeros(size, size, dtype=e.dtype)
    return torch.func.grad(error_norm)(zero)


def test_exact_is_the_printed_equations() -> None:
    mixer, x_BTD = make_exact(), numbers("x", BATCH, 7, WIDTH).requires_grad_()
    ours, slow = mixer(x_BTD, SequenceShard.whole(7)), slow_exact(mixer, x_BTD, 0.1)
    assert difference(ours, slow) < 1e-11
    same_gradients(ours, slow, [x_BTD, *mixer.parameters()])
    assert difference(slow_exact(mixer, x_BTD, 0.0), slow) > 1e-4  # the gain's moves matter


@pytest.mark.parametrize(("preset", "attention"), [("mixcon-published", {3, 4}), ("mixcon-released", {4})])
def test_plans_are_the_published_and_the_released_one(preset: str, attention: set[int]) -> None:
    plan = load_preset(preset).plan
    assert len(plan) == 32
    for index, layer in enumerate(plan):
        assert (layer.mixer == "attention") == (index % 8 in attention)
        assert (layer.feed_forward == "moe") == (index % 2 == 1)


def test_options_that_do_not_fit_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"24 channels are not divisible by heads of 16; choose conba\.state"):
        make_model({"layers": "[conba(variant=linear)]"})


def test_newtons_method_finds_the_same_states_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a few rounds for tens of tokens, with documents; one round alone is not enough."""
    name, shard = "conba, exact, by Newton's method", SequenceShard.whole(37, [5, 20])
    together, turns = make_mixer(name), make_mixer(name)
    assert isinstance(turns, ExactConba)
    turns.solver = "turns"
    x_BTD = numbers("x", BATCH, 37, WIDTH).requires_grad_()
    rounds = 0
    jacobians = newton.jacobians

    def counted(*arguments: object) -> Tensor:
        nonlocal rounds
        rounds += 1
        return jacobians(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(newton, "jacobians", counted)
    found, expected = together(x_BTD, shard), turns(x_BTD, shard)
    assert rounds <= 10
    assert difference(found, expected) < 1e-12
    gradients = [
        torch.autograd.grad((y * numbers("w", *y.shape)).sum(), [x_BTD, *mixer.parameters()])
        for y, mixer in ((found, together), (expected, turns))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert difference(ours, theirs) < 1e-11
    monkeypatch.setattr(newton, "ROUNDS", 1)
    with pytest.raises(ValueError, match=r"do not settle in Newton's rounds; set conba\.solver=turns"):
        together(x_BTD, shard)
