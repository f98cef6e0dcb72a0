"""Rules that every mixer keeps on one process: causality, documents, decoding, state sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longstride.kernels import attention
from longstride.models.mixers.attention import window_attention
from longstride.models.mixers.hyena import Hyena
from longstride.parallel import SequenceShard

from .cases import (
    MIXER_CASES,
    REMEMBER_EVERY_TOKEN,
    SMALL,
    WIDTH,
    WINDOWS,
    difference,
    make_mixer,
    make_model,
    numbers,
)

LENGTH = 19

every_mixer = pytest.mark.parametrize("name", MIXER_CASES)


@every_mixer
def test_output_depends_on_earlier_tokens_and_on_no_later_one(name: str) -> None:
    mixer, batch = make_mixer(name), 12  # a weight may be zero by chance (GAU's), but not in every row
    for token in (0, 7, LENGTH - 1):
        x_BTD = numbers("x", batch, LENGTH, WIDTH).requires_grad_()
        y_BTD = mixer(x_BTD, SequenceShard.whole(LENGTH))
        assert y_BTD.shape == x_BTD.shape
        (grad_BTD,) = torch.autograd.grad((y_BTD[:, token] * numbers("w", batch, WIDTH)).sum(), x_BTD)
        reach_T = grad_BTD.abs().amax(dim=(0, 2))
        assert reach_T[token + 1 :].sum() <= 1e-12 * reach_T.max()
        first = max(0, token + 1 - WINDOWS.get(name, LENGTH))
        assert (reach_T[first : token + 1] > 1e-9 * reach_T.max()).all()
        assert reach_T[:first].sum() == 0


@every_mixer
def test_packed_documents_are_computed_as_if_each_stood_alone(name: str) -> None:
    mixer = make_mixer(name)
    x_BTD = numbers("x", 2, LENGTH, WIDTH)
    starts = [0, 1, 2, 6, 17]
    packed_BTD = mixer(x_BTD, SequenceShard.whole(LENGTH, starts))
    parts = [x_BTD[:, a:b] for a, b in zip(starts, [*starts[1:], LENGTH], strict=True)]
    alone_BTD = torch.cat([mixer(part, SequenceShard.whole(part.shape[1])) for part in parts], dim=1)
    assert difference(packed_BTD, alone_BTD) < 1e-12
    assert difference(mixer(x_BTD, SequenceShard.whole(LENGTH)), alone_BTD) > 1e-3  # the boundaries matter


@every_mixer
def test_rows_of_a_batch_have_their_own_documents(name: str) -> None:
    mixer = make_mixer(name)
    x_BTD = numbers("x", 2, LENGTH, WIDTH)
    rows = [[5, 6], [12]]
    together_BTD = mixer(x_BTD, SequenceShard.whole(LENGTH, rows))
    for row, starts in enumerate(rows):
        alone_BTD = mixer(x_BTD[row : row + 1], SequenceShard.whole(LENGTH, starts))
        assert difference(together_BTD[row : row + 1], alone_BTD) < 1e-12


@every_mixer
def test_steps_equal_the_parallel_form(name: str) -> None:
    mixer = make_mixer(name)
    x_BTD = numbers("x", 3, LENGTH, WIDTH)
    with torch.no_grad():
        state = mixer.init_state(3, x_BTD.device, x_BTD.dtype)
        outputs = []
        for token in range(LENGTH):
            y_BD, state = mixer.step(x_BTD[:, token], state)
            outputs.append(y_BD)
        assert difference(torch.stack(outputs, dim=1), mixer(x_BTD, SequenceShard.whole(LENGTH))) < 1e-9


@every_mixer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_state_bytes_are_those_of_the_state(name: str, dtype: torch.dtype) -> None:
    mixer = make_mixer(name).to(dtype)
    state = mixer.init_state(1, torch.device("cpu"), dtype)
    with torch.no_grad():
        for token in range(5):
            assert sum(tensor.nbytes for tensor in state.values()) == mixer.state_bytes(token)
            _, state = mixer.step(numbers("x", 1, WIDTH).to(dtype), state)


@every_mixer
def test_only_attention_and_implicit_filters_remember_every_token(name: str) -> None:
    """The bytes that are told for long texts, and those that are held (both lengths are whole chunks of FLASH)."""
    mixer, kind = make_mixer(name), make_model(MIXER_CASES[name]).config.plan[0].mixer
    grows = kind in REMEMBER_EVERY_TOKEN and name not in WINDOWS
    assert (mixer.state_bytes(2304 << 9) > mixer.state_bytes(2304)) == grows
    state, held = mixer.init_state(1, torch.device("cpu"), torch.float64), []
    with torch.no_grad():
        for token in range(40):
            _, state = mixer.step(numbers(f"x{token}", 1, WIDTH), state)
            held.append(sum(tensor.nbytes for tensor in state.values()))
    assert (held[35] > held[17]) == grows


@every_mixer
def test_every_parameter_has_a_gradient(name: str) -> None:
    mixer = make_mixer(name)
    x_BTD = numbers("x", 2, LENGTH, WIDTH)
    (mixer(x_BTD, SequenceShard.whole(LENGTH)) * numbers("w", 2, LENGTH, WIDTH)).sum().backward()
    for parameter_name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


@every_mixer
def test_half_precision_stays_close_to_double(name: str) -> None:
    mixer = make_mixer(name)
    x_BTD = numbers("x", 2, LENGTH, WIDTH)
    expected_BTD = mixer(x_BTD, SequenceShard.whole(LENGTH))
    half_BTD = mixer.to(torch.bfloat16)(x_BTD.to(torch.bfloat16), SequenceShard.whole(LENGTH))
    assert half_BTD.dtype == torch.bfloat16
    assert difference(half_BTD.double(), expected_BTD) < 0.1


def slow_filters(mixer: Hyena) -> Tensor:
    """(D, N - 1, L) at every lag, from the network's weights and the paper's equations alone."""
    options, convolutions = mixer.filter.options, mixer.order - 1
    lags_L, pairs = torch.arange(options.max_length, dtype=torch.float64), (options.features - 1) // 2
    angle_L, position_L = 2 * math.pi * lags_L / options.max_length, lags_L / (options.max_length - 1)
    frequencies = [1e-4 + pair * (pairs - 1 - 1e-4) / (pairs - 1) for pair in range(pairs)]
    cosines, sines = ([f(angle_L * frequency) for frequency in frequencies] for f in (torch.cos, torch.sin))
    hidden_LF = torch.stack([position_L, *cosines, *(-sine_L for sine_L in sines)], dim=1)
    for layer in mixer.filter.layers:
        hidden_LF = torch.sin(mixer.filter.frequency * (hidden_LF @ layer.weight.t() + layer.bias))
    # channels major, convolutions minor, in the last matrix and in the windows' rates
    rates = len(mixer.filter.output) * convolutions
    slowest, fastest = -math.log(options.target) / options.slow, -math.log(options.target) / options.fast
    rows = []
    for row, weight_F in enumerate(mixer.filter.output.flatten(0, 1)):
        rate = slowest + (fastest - slowest) * row / (rates - 1)
        rows.append((hidden_LF @ weight_F) * (torch.exp(-rate * position_L) + options.shift))
    return torch.stack(rows).unflatten(0, (-1, convolutions))


def slow_hyena(mixer: Hyena, x_BTD: Tensor) -> Tensor:
    """Its equations, one token and one lag after another."""
    tokens, taps_DNL = range(x_BTD.shape[1]), slow_filters(mixer)
    padded_BTM = F.pad(mixer.in_proj(x_BTD), (0, 0, 2, 0))
    convolved = [(padded_BTM[:, t : t + 3] * mixer.conv_weight.t()).sum(1) + mixer.conv_bias for t in tokens]
    *gates, v_BTD = torch.stack(convolved, dim=1).split(WIDTH, dim=-1)
    for convolution in range(mixer.order - 1):
        u_BTD = gates[mixer.order - 1 - convolution] * v_BTD
        taps_LD = taps_DNL[:, convolution].t()
        sums = [torch.stack([taps_LD[lag] * u_BTD[:, t - lag] for lag in range(t + 1)]).sum(0) for t in tokens]
        v_BTD = torch.stack(sums, dim=1) + mixer.skip[convolution] * u_BTD
    return mixer.out_proj(gates[0] * v_BTD)


@pytest.mark.parametrize("name", ["hyena", "hyena of order 3"])
def test_hyena_is_its_equations(name: str) -> None:
    mixer, x_BTD = make_mixer(name), numbers("x", 2, LENGTH, WIDTH)
    assert isinstance(mixer, Hyena) and mixer.conv_weight.shape[1] == 3
    y_BTD = mixer(x_BTD, SequenceShard.whole(LENGTH))
    assert difference(y_BTD, slow_hyena(mixer, x_BTD)) < 1e-13
    with torch.no_grad():
        mixer.filter.output.copy_(mixer.filter.output.flip(0, 1))
    assert difference(y_BTD, slow_hyena(mixer, x_BTD)) > 1e-2  # whose filter is whose matters


def test_hyena_filters_do_not_depend_on_the_length_at_hand() -> None:
    mixer = make_mixer("hyena")
    x_BTD = numbers("x", 1, 40, WIDTH)
    longer = mixer(x_BTD, SequenceShard.whole(40))[:, :LENGTH]
    assert difference(longer, mixer(x_BTD[:, :LENGTH], SequenceShard.whole(LENGTH))) < 1e-12


def test_hyena_refuses_sequences_longer_than_its_filters() -> None:
    mixer = make_mixer("hyena")
    with pytest.raises(ValueError, match=r"65 tokens are more than max_length 64.*hyena\.max_length to at least 65"):
        mixer(numbers("x", 1, 65, WIDTH), SequenceShard.whole(65))


def test_long_hyena_filters_are_evaluated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[torch.Tensor]:
        mixer = make_mixer("hyena")
        y_BTD = mixer(numbers("x", 2, LENGTH, WIDTH), SequenceShard.whole(LENGTH))
        return [y_BTD, *torch.autograd.grad(y_BTD.square().sum(), list(mixer.parameters()))]

    expected = run()
    monkeypatch.setattr("longstride.models.mixers.hyena.LAGS_AT_ONCE", 5)
    for ours, theirs in zip(run(), expected, strict=True):
        assert difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("at_once", [1, 512])
@pytest.mark.parametrize("window", [1, 2, 5, LENGTH - 1, LENGTH, 40])
def test_a_window_is_attention_to_its_keys(window: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of queries and at once, with documents of each row's own; outputs and gradients."""
    monkeypatch.setattr("longstride.models.mixers.attention.QUERIES_AT_ONCE", at_once)
    q_BTHK, k_BTGK, v_BTGK = (numbers(n, 2, LENGTH, h, 3).requires_grad_() for n, h in (("q", 4), ("k", 2), ("v", 2)))
    begin_BT = SequenceShard.whole(LENGTH, [[3, 11], [7]]).document_begin()
    visible_BT = torch.maximum(begin_BT, torch.arange(LENGTH) - window + 1)
    expected_BTHK, _ = attention(q_BTHK, k_BTGK, v_BTGK, document_begin=visible_BT)
    ours_BTHK = window_attention(q_BTHK, torch.stack([k_BTGK, v_BTGK], dim=2), window, begin_BT)
    weights = numbers("w", *expected_BTHK.shape)
    pairs = [(ours_BTHK, expected_BTHK)]
    pairs += zip(*(torch.autograd.grad((y * weights).sum(), (q_BTHK, k_BTGK, v_BTGK)) for y in pairs[0]), strict=True)
    assert all(difference(ours, theirs) < 1e-12 for ours, theirs in pairs)
    wider_BTHK, _ = attention(q_BTHK, k_BTGK, v_BTGK, document_begin=(visible_BT - 1).clamp(min=begin_BT))
    assert (difference(ours_BTHK, wider_BTHK) > 1e-3) == (window < 12)  # the control: no document is longer


def test_operations_of_a_window_are_those_of_its_pairs() -> None:
    narrow, wide = make_mixer("attention in a window"), make_mixer("attention")
    matrices = 2 * sum(p.numel() for p in narrow.parameters())
    for context in (1, 4, 5, 6, 100):
        pairs = sum(min(5, query + 1) for query in range(context))
        assert narrow.flops_per_token(context) - matrices == pytest.approx(4 * pairs / context * 6 * 2)
    matrices = 2 * sum(p.numel() for p in wide.parameters())
    assert wide.flops_per_token(100) - matrices == pytest.approx(2 * 101 * 4 * 4)


def test_attention_sees_positions_through_rotation() -> None:
    x_BTD = numbers("x", 1, LENGTH, WIDTH)
    swapped_BTD = x_BTD[:, [1, 0, *range(2, LENGTH)]]
    shard = SequenceShard.whole(LENGTH)
    for name, positional in (("attention", True), ("attention, one key head, no positions", False)):
        mixer = make_mixer(name)
        moved = difference(mixer(swapped_BTD, shard)[:, -1], mixer(x_BTD, shard)[:, -1])
        assert (moved > 1e-4) == positional


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("[attention(heads=5)]", "width 12 is not divisible by 5 heads"),
        ("[attention(heads=4, kv_heads=3)]", "4 heads cannot share 3 kv_heads"),
        ("[attention(heads=4, head_dim=3)]", "even head width, not 3"),
        ("[hyena(features=4)]", "hyena.features must be odd"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(layers: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        make_model({**SMALL, "layers": layers})
    assert "\n" not in str(raised.value)
