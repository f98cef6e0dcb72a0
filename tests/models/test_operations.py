"""Operations a token: what every layer tells, against counts from the equations and against torch's own counter.

The equations are those of each module's text; `Mixer.flops_per_token` says what of them is counted. Here they are
counted again from a layer's options, and torch.utils.flop_counter counts the matrices of a forward pass that is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from longstride.models import build_model
from longstride.models.mixers import Mixer, s4
from longstride.models.registry import FEED_FORWARDS, MIXERS
from longstride.parallel import SequenceShard

from .cases import SMALL, make_model, numbers


class Count(NamedTuple):
    """Of one token: elements of `matrices`, at two operations each, and `other` operations."""

    matrices: int
    other: float = 0.0


def mamba(D: int, N: int, R: int | None = None, conv: int = 4) -> Count:
    """x and z; delta, B and C of rank R, N and N; delta's; out. A state element: delta A, decay, feeding, reading."""
    C, R = 2 * D, R or math.ceil(D / 16)
    return Count(D * 2 * C + C * (R + 2 * N) + R * C + C * D, 2 * conv * C + C * N * (1 + 1 + 2 + 2))


def mamba2(D: int, N: int, P: int, G: int = 1, conv: int = 4) -> Count:
    """z, x, B, C and a step size a head at once; out. One decay a head. The convolution takes x, B and C."""
    C, shared = 2 * D, 2 * G * N
    return Count(D * (2 * C + shared + C // P) + C * D, 2 * conv * (C + shared) + C * N * (1 + 2 + 2))


def half_pairs(L: int) -> float:
    """Tokens that a token meets, itself included, in the mean."""
    return sum(t + 1 for t in range(L)) / L


def chunk_pairs(L: int, chunk: int) -> float:
    return sum(t % chunk + 1 for t in range(L)) / L


def gated_convolution(D: int, other: float) -> Count:
    """q, k and v behind a convolution of three taps; out."""
    return Count(4 * D * D, 2 * 3 * 3 * D + other)


def transforms(L: int) -> float:
    """Three real transforms of 2 L numbers, and L + 1 complex products, over L tokens."""
    return (3 * 2.5 * 2 * L * math.log2(2 * L) + 6 * (L + 1)) / L


def hyena(D: int, L: int, order: int) -> Count:
    """N + 1 streams behind three taps; out; a network 7 -> 8 -> 8 -> 8 -> (N - 1) D for every lag."""
    network = 7 * 8 + 8 * 8 + 8 * 8 + 8 * (order - 1) * D
    return Count((order + 1) * D * D + D * D + network, 2 * 3 * (order + 1) * D + (order - 1) * D * transforms(L))


def linear_conba(D: int, N: int) -> Count:
    """Two matrices into the selection, one out of it to k, q and a step a head; r, v and out."""
    C, G = 2 * D, math.ceil(D / 4)
    H = C // N
    return Count(2 * D * G + G * (2 * C + H) + D * H + D * C + C * D, C * N * (1 + 2 + 2 + 2))


COMPLEX_MODE, REAL_MODE = 6 + 1 + 4, 1 + 1 + 2
"""Decay, one real number added, a product of which the real part is summed."""

CASES: dict[str, Callable[[int, int], Count]] = {
    "attention(heads=4, kv_heads=2, head_dim=4)": lambda D, L: Count(2 * 16 * D + 2 * 8 * D, 4 * 16 * half_pairs(L)),
    "attention(heads=3, window=5)": lambda D, L: Count(4 * D * D, 4 * D * sum(min(5, t + 1) for t in range(L)) / L),
    "conba(state=4)": lambda D, L: mamba(D, 4)._replace(matrices=mamba(D, 4).matrices + 3 * D * D),
    "conba(variant=linear, state=4)": lambda D, L: linear_conba(D, 4),
    # y_d and u_d; A, B, C twice, Z, K and (C B)'; W1, W2, U1, U2; out. K is moved by a product and a sum
    "conba(variant=exact, state=6)": lambda D, L: Count(12 * D + 7 * 36 + 4 * 36 + 6 * D, 2 * 36),
    "flash(key_dim=6, chunk=4)": lambda D, L: Count(
        D * (4 * D + 6) + 2 * D * D, 2 * (6 + 2 * D) * chunk_pairs(L, 4) + 4 * 6 * 2 * D
    ),
    "gau(key_dim=6)": lambda D, L: Count(D * (4 * D + 6) + 2 * D * D, 2 * (6 + 2 * D) * half_pairs(L)),
    "h3(state=4, shift=5)": lambda D, L: Count(4 * D * D, 2 * 5 * D + D * (1 + 2 * COMPLEX_MODE + 2)),
    "h3(state=6, shift=3, head_dim=3)": lambda D, L: Count(4 * D * D, 2 * 3 * D + 3 * D * (1 + 3 * COMPLEX_MODE + 2)),
    "hyena(features=7, filter_width=8)": lambda D, L: hyena(D, L, 2),
    "hyena(order=3, features=7, filter_width=8)": lambda D, L: hyena(D, L, 3),
    "hyena_li(modes=4)": lambda D, L: gated_convolution(D, D * 4 * REAL_MODE),
    "hyena_mr(taps=40, groups=3)": lambda D, L: gated_convolution(D, 2 * 40 * D),
    "hyena_se(taps=19, groups=4)": lambda D, L: gated_convolution(D, 2 * 19 * D),
    "linear_attention(heads=3)": lambda D, L: Count(4 * D * D, 3 * ((D // 3) ** 2 * (2 + 2) + D // 3 * (1 + 2))),
    "lstm(hidden=7)": lambda D, L: Count(4 * 7 * (D + 7) + 7 * D, 7 * (1 + 2 + 1)),
    "mamba(state=4)": lambda D, L: mamba(D, 4),
    "mamba(state=3, inner_norms=true, dt_rank=2, conv=3)": lambda D, L: mamba(D, 3, 2, 3),
    "mamba2(state=4, head_dim=6, groups=2, conv=3)": lambda D, L: mamba2(D, 4, 6, 2, 3),
    "mamba2(state=5, head_dim=8)": lambda D, L: mamba2(D, 5, 8),
    "modal_hyena(modes=2)": lambda D, L: gated_convolution(D, D * 2 * COMPLEX_MODE),
    "retnet(heads=3)": lambda D, L: Count(2 * D * D + 3 * D * 2 * D, 3 * (D // 3) * (2 * D // 3) * (1 + 2 + 2)),
    "rwkv4": lambda D, L: Count(4 * D * D, D * (1 + 2 + 2 + 1 + 1 + 1)),
    "rwkv7(head_dim=4, decay_rank=3, rate_rank=3, gate_rank=5)": lambda D, L: Count(
        4 * D * D + 2 * D * (3 + 3 + 5), D * 4 * (1 + 2 + 2 + 2 + 2)
    ),
    "s4(state=8)": lambda D, L: Count(2 * D * D, D * transforms(L) + s4_filter(D, 8, L)),
    "s4d(state=8)": lambda D, L: Count(2 * D * D, D * 4 * COMPLEX_MODE),
    "s4d(state=4, init=real)": lambda D, L: Count(2 * D * D, D * 4 * REAL_MODE),
}
SIZES = [(24, 1), (24, 37), (48, 37), (24, 4096), (48, 4096)]
FEED_FORWARD_CASES: dict[str, Callable[[int], int]] = {
    "mlp(hidden=20)": lambda D: 3 * D * 20,
    "mlp(hidden=20, kind=gelu)": lambda D: 2 * D * 20,
    "channel_mix(hidden=20)": lambda D: 2 * D * 20 + D * D,
    "channel_mix(hidden=20, receptance=false)": lambda D: 2 * D * 20,
    "moe(experts=8, top_k=3, hidden=20)": lambda D: 8 * D + 3 * 3 * D * 20,
    "moe(experts=8, top_k=3, hidden=20, shared=1)": lambda D: 8 * D + 4 * 3 * D * 20,
}


def s4_filter(D: int, N: int, L: int) -> float:
    """By torch's counter: the products of matrices that make the filter when S4 runs, without its convolution."""
    layer = mixer(f"s4(state={N})", D)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s4, "long_convolution", lambda u, *_, **__: u)
        return sum(counted(layer, D, L).values()) - 4 * D * D


def counted(layer: nn.Module, D: int, L: int) -> dict[str, float]:
    """Operations a token of a forward pass that torch counts, by operator."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(numbers("x", 1, L, D), SequenceShard.whole(L))
    return {str(operator).split(".")[-1]: total / L for operator, total in counter.get_flop_counts()["Global"].items()}


def mixer(layers: str, D: int) -> Mixer:
    found = make_model({"layers": f"[{layers}]", "width": D}).blocks[0].mixer
    assert isinstance(found, Mixer)
    return found


def test_every_family_is_counted() -> None:
    assert {case.partition("(")[0] for case in CASES} == set(MIXERS)
    assert {case.partition("(")[0] for case in FEED_FORWARD_CASES} == set(FEED_FORWARDS)


@pytest.mark.parametrize("layers", CASES)
def test_operations_are_those_of_the_equations(layers: str) -> None:
    told: dict[tuple[int, int], float] = {}
    for D, L in SIZES:
        expected = CASES[layers](D, L)
        told[D, L] = mixer(layers, D).flops_per_token(L)
        assert told[D, L] == pytest.approx(2 * expected.matrices + expected.other, rel=1e-12)
    of_context = layers.partition("(")[0] in {"attention", "flash", "gau", "hyena", "s4"}
    assert (told[24, 37] != told[24, 4096]) == of_context


@pytest.mark.parametrize("layers", CASES)
def test_matrices_are_those_that_torch_counts(layers: str) -> None:
    """As it sees linear layers; batches of matrices belong to convolutions, pairs and states."""
    for D in (24, 48):
        linear = {name: total for name, total in counted(mixer(layers, D), D, 37).items() if name in ("mm", "addmm")}
        expected = 2 * CASES[layers](D, 37).matrices
        if layers.startswith("conba(variant=exact"):
            expected += 2 * 6**3 - 2 * 6**2  # C B is made anew for every token; K times e is a batch
        if layers.startswith("hyena(order=3"):
            expected += 2 * (7 * 8 + 8 * 8 + 8 * 8)  # the network's inner layers are run for each filter
        assert sum(linear.values()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", FEED_FORWARD_CASES)
def test_operations_of_feed_forward_layers(kind: str) -> None:
    for D in (24, 48):
        layer = make_model({"layers": f"[rwkv4+{kind}]", "width": D}).blocks[0].feed_forward
        assert layer is not None
        assert layer.flops_per_token() == 2 * FEED_FORWARD_CASES[kind](D) == sum(counted(layer, D, 37).values())


def test_later_layers_and_the_vocabulary_are_counted() -> None:
    options: dict[str, Any] = {"head_dim": 4, "decay_rank": 3, "rate_rank": 3, "gate_rank": 5, "value_rank": 7}
    case = {**SMALL, "width": 24, "rwkv7": options}
    one, two = (build_model({**case, "layers": f"[rwkv7] x {count}"}) for count in (1, 2))
    first = CASES["rwkv7(head_dim=4, decay_rank=3, rate_rank=3, gate_rank=5)"](24, 9)
    alone = 2 * first.matrices + first.other
    assert one.flops_per_token(9) == alone + 2 * 24 * SMALL["vocab_size"]
    assert two.flops_per_token(9) - one.flops_per_token(9) == alone + 2 * 2 * 24 * 7, "values of the first layer"
