"""Under a user's own autocast every mixer computes and decodes, and what must be exact stays in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longstride.models import LanguageModel, ModelConfig, build_model
from longstride.models.mixers import Mixer, flash
from longstride.models.mixers.conba_exact import ExactConba
from longstride.models.mixers.flash import Flash
from longstride.models.mixers.s4 import S4
from longstride.models.parameters import Linear
from longstride.parallel import SequenceShard

from .cases import MIXER_CASES, SMALL
from .test_mixed_precision import WIDE, relative, tokens, watch_kernels

DECODED, READ = 9, 5
"""Tokens, and how many of them are a prompt, read in two pieces."""


@torch.no_grad()
def decoded(model: LanguageModel) -> dict[str, Tensor]:
    """Logits (B, V) of the parallel form, of steps alone and of a prompt and steps, under autocast; one step later."""
    tokens_BT = tokens()[:, :DECODED]
    found = {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found["parallel"] = model.logits(tokens_BT)[:, -1]
        state = model.init_state(2)
        for token in range(DECODED):
            found["steps"], state = model.step(tokens_BT[:, token], state)
        _, state = model.prefill(tokens_BT[:, :2])
        _, state = model.prefill(tokens_BT[:, 2:READ], state=state)
        for token in range(READ, DECODED):
            found["prompt"], state = model.step(tokens_BT[:, token], state)
    found["another step, without autocast"], _ = model.step(tokens()[:, DECODED], state)
    return found


@pytest.mark.parametrize("name", MIXER_CASES)
def test_decoding_under_autocast(name: str) -> None:
    """Close to float32's numbers; the state, which began in float32, goes on without autocast."""
    model = build_model(ModelConfig.parse({**SMALL, **MIXER_CASES[name]}))
    with torch.no_grad():
        exact_BTV = model.logits(tokens()[:, : DECODED + 1])
    for kind, logits_BV in decoded(model).items():
        last, other = (DECODED, DECODED - 1) if kind.startswith("another") else (DECODED - 1, DECODED)
        assert relative(logits_BV.float(), exact_BTV[:, last]) < 0.02, kind
        assert relative(logits_BV.float(), exact_BTV[:, other]) > 0.1  # negative control


ROUNDED_OUTPUTS = 4e-3
"""Two roundings to bfloat16."""


def test_under_autocast_what_decays_and_filters_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arguments of kernels as in mixed precision."""
    with monkeypatch.context() as patch:
        seen = watch_kernels(patch.setattr)
        for name, case in MIXER_CASES.items():
            seen.clear()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                build_model(ModelConfig.parse({**SMALL, **case})).loss(tokens(), tokens()).backward()
            for argument, arrived in seen.items():
                if argument.split(".")[1] in WIDE:
                    assert not arrived & {torch.bfloat16, torch.float16}, f"{name}: {argument} arrives in {arrived}"


@torch.no_grad()
def error_under_autocast(name: str, length: int) -> float:
    """Of one mixer, against float32, between projections in and out that are exact in bfloat16."""
    mixer = build_model(ModelConfig.parse({**SMALL, **MIXER_CASES[name]})).blocks[0].mixer
    assert isinstance(mixer, Mixer)
    for projection in mixer.children():
        if isinstance(projection, Linear):
            projection.weight.copy_(torch.eye(*projection.weight.shape))
    x_BTD = torch.randn(2, length, SMALL["width"], generator=torch.Generator().manual_seed(0)).bfloat16().float()
    shard = SequenceShard.whole(length)
    exact_BTD = mixer(x_BTD, shard)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_BTD = mixer(x_BTD, shard)
    return relative(found_BTD.float(), exact_BTD)


@torch.no_grad()
def error_of_flash_sums() -> float:
    """Of the sums of whole chunks after a prompt and steps, against the double precision sums of what is projected."""
    mixer = build_model(ModelConfig.parse({**SMALL, **MIXER_CASES["flash"]})).blocks[0].mixer
    assert isinstance(mixer, Flash)
    whole, length = 40 * mixer.chunk, 44 * mixer.chunk
    x_BTD = torch.randn(2, length, SMALL["width"], generator=torch.Generator().manual_seed(0))
    state = mixer.init_state(2, x_BTD.device, x_BTD.dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, v_BTE, (_, _, _, k_lin_BTS) = mixer.project(x_BTD, torch.arange(length))
        _, state = mixer.prefill(x_BTD[:, :whole], SequenceShard.whole(whole), state)
        for x_BD in x_BTD[:, whole:].unbind(1):
            _, state = mixer.step(x_BD, state)
    return relative(state["sum"].double(), k_lin_BTS.double().mT @ v_BTE.double())


def test_sums_over_the_sequence_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    assert error_of_flash_sums() < 1e-6
    monkeypatch.setattr(flash, "wide_product", flash.wide_product.__wrapped__)  # negative control
    assert error_of_flash_sums() > 1e-4


LONG = {"s4": 480, "lstm": 480, "conba, exact": 480, "conba, exact, by Newton's method": 48}
"""Tokens over which errors would show."""


@pytest.mark.parametrize("name", LONG)
def test_recurrences_of_their_own_are_as_exact_under_autocast(name: str) -> None:
    assert error_under_autocast(name, LONG[name]) < ROUNDED_OUTPUTS


@pytest.mark.parametrize(("name", "function"), [("s4", (S4, "read")), ("conba, exact", (ExactConba, "advance"))])
def test_negative_control_recurrences_under_autocast(
    name: str, function: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*function, getattr(*function).__wrapped__)
    assert error_under_autocast(name, LONG[name]) > 1.3 * ROUNDED_OUTPUTS
