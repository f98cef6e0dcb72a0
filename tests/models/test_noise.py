"""The noise that Conba draws in training: normal, the same however a step is split, and where the equations have it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longstride.models import DropoutKey
from longstride.models import noise as noise_module
from longstride.models.mixers.conba_exact import ExactConba
from longstride.models.mixers.conba_linear import LinearConba
from longstride.models.noise import NOISE, normal_numbers
from longstride.parallel import SequenceShard

from .cases import WIDTH, difference, make_model, numbers
from .test_conba import slow_exact

KEY = DropoutKey(seed=3, step=17)
SIGMA = 0.3


def streams(rows: int, key: DropoutKey = KEY) -> torch.Tensor:
    return torch.tensor(key.streams(rows, NOISE))


def test_numbers_are_normal_and_independent() -> None:
    x_BTD = torch.empty(2, 1000, 65, dtype=torch.float64)
    here = normal_numbers(streams(2), 0, x_BTD, 0)
    count = here.numel() ** 0.5
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        spread = {1: 1.0, 2: 2.0, 3: 15.0, 4: 96.0}[power] ** 0.5  # of one number's power
        assert abs((here**power).mean() - moment) < 5 * spread / count
    others = {
        "row": here.flip(0),
        "step": normal_numbers(streams(2, replace(KEY, step=18)), 0, x_BTD, 0),
        "seed": normal_numbers(streams(2, replace(KEY, seed=4)), 0, x_BTD, 0),
        "layer": normal_numbers(streams(2), 1, x_BTD, 0),
        "position": normal_numbers(streams(2), 0, x_BTD, 1),
        "feature": here.roll(1, dims=2),
        "dropout": normal_numbers(torch.tensor(KEY.streams(2)), 0, x_BTD, 0),
    }
    for name, other in others.items():
        assert abs((here * other).mean()) < 5 / count, name


def test_the_same_numbers_however_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x_BTD = torch.empty(2, 13, 9, dtype=torch.float64)
    whole = normal_numbers(streams(2), 70, x_BTD, 5)
    monkeypatch.setattr(noise_module, "DRAWN_AT_ONCE", 30)
    assert torch.equal(normal_numbers(streams(2), 70, x_BTD, 5), whole)
    part = normal_numbers(streams(1, replace(KEY, first_row=1)), 70, x_BTD[1:, 4:], 9)
    assert torch.equal(part, whole[1:, 4:])
    assert normal_numbers(streams(2), 70, x_BTD.bfloat16(), 5).dtype == torch.float32


def test_exact_adds_it_to_the_state_and_the_observation() -> None:
    mixer = make_model({"layers": f"[conba(variant=exact, state=6, online_rate=0.1, noise={SIGMA})]"}).blocks[0].mixer
    assert isinstance(mixer, ExactConba)
    x_BTD, shard = numbers("x", 2, 7, WIDTH), SequenceShard.whole(7)
    found, _ = mixer.share(x_BTD, shard, {NOISE: streams(2)})
    w_BTN, v_BTN = (SIGMA * normal_numbers(streams(2), 0, x_BTD, 0)).chunk(2, dim=-1)
    assert difference(found, slow_exact(mixer, x_BTD, 0.1, w_BTN, v_BTN)) < 1e-11
    for wrong in ((w_BTN, 0.0), (0.0, v_BTN), (v_BTN, w_BTN)):
        assert difference(slow_exact(mixer, x_BTD, 0.1, *wrong), found) > 1e-2


def test_linear_adds_it_where_a_token_writes_and_to_the_observation() -> None:
    mixer = make_model({"layers": f"[conba(variant=linear, state=4, dt_max=0.5, noise={SIGMA})]"}).blocks[0].mixer
    assert isinstance(mixer, LinearConba)
    x_BTD, shard = numbers("x", 2, 9, WIDTH), SequenceShard.whole(9, [4])
    found, _ = mixer.share(x_BTD, shard, {NOISE: streams(2)})
    channels = len(mixer.D)
    drawn = SIGMA * normal_numbers(streams(2), 0, x_BTD, 0, 2 * channels)
    w_BTHN, v_BTHN = (part.unflatten(-1, (-1, 4)) for part in drawn.chunk(2, dim=-1))
    outputs, S_BHNN = [], mixer.init_state(2, x_BTD.device, x_BTD.dtype)["memory"]
    for token in range(9):
        S_BHNN = torch.zeros_like(S_BHNN) if token == 4 else S_BHNN
        loop = mixer.select(x_BTD[:, token])
        delayed_BHN = (S_BHNN @ loop.q.unsqueeze(-1)).squeeze(-1)
        S_BHNN = mixer.store(loop, S_BHNN) + w_BTHN[:, token].unsqueeze(-1) * loop.k.unsqueeze(-2)
        y_BHN = (S_BHNN @ loop.k.unsqueeze(-1)).squeeze(-1) + delayed_BHN
        y_BHN = y_BHN + mixer.D.view(-1, 4) * loop.v + v_BTHN[:, token]
        outputs.append(mixer.out_proj(mixer.norm(y_BHN.flatten(1))))
    assert difference(found, torch.stack(outputs, dim=1)) < 1e-11
    assert difference(mixer(x_BTD, shard), found) > 1e-2  # the control


def test_it_changes_training_and_nothing_else() -> None:
    layers = f"[conba(variant=linear, noise={SIGMA}), conba(variant=exact, noise={SIGMA})]"
    options = {"conba": {"state": 4, "dt_max": 0.5}}
    model = make_model({"layers": layers, **options})
    plain = make_model({"layers": layers.replace(str(SIGMA), "0"), **options})
    tokens_BT, targets_BT = torch.randint(11, (2, 2, 19), generator=torch.Generator().manual_seed(0))
    expected = plain.loss(tokens_BT, targets_BT)
    assert torch.equal(plain.loss(tokens_BT, targets_BT, None, KEY), expected)
    assert torch.equal(model.loss(tokens_BT, targets_BT), expected)
    assert torch.equal(model.logits(tokens_BT), plain.logits(tokens_BT))
    noisy = model.loss(tokens_BT, targets_BT, None, KEY)
    assert abs(noisy - expected) > 1e-4
    assert torch.equal(noisy, model.loss(tokens_BT, targets_BT, None, KEY))
    assert not torch.equal(noisy, model.loss(tokens_BT, targets_BT, None, replace(KEY, step=18)))


def test_the_released_variant_has_none() -> None:
    with pytest.raises(ValueError, match=r"^conba: noise 0\.1 is not in the released variant; [^\n]*variant=linear$"):
        make_model({"layers": "[conba(noise=0.1)]"})
