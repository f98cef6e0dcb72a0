"""Implicit Hyena filters as sums of modes: the same layer, in constant memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longstride.models import build_model, distil
from longstride.models.distillation import fit_modes

from .cases import difference, numbers

HYENA: dict[str, Any] = {
    "vocab_size": 11,
    "width": 12,
    "layers": "[hyena(conv=4)+mlp(kind=gelu), attention(heads=3, rotary_base=null)+none, hyena]",
    "hyena": {"max_length": 200, "features": 5, "filter_width": 16, "sine": 3.0},
    "init_std": 0.1,
}


@pytest.mark.parametrize("length", [64, 301])
def test_sums_of_modes_are_found_again(length: int) -> None:
    """Real modes, pairs, and fewer than are asked for; poles are rounded as complex64."""
    angles = torch.tensor([[0.3, 0.0, 1.2], [0.0, 0.0, 3.0], [0.7, 0.0, 0.0]], dtype=torch.float64)
    poles_DN = torch.polar(torch.tensor([[0.99, 0.9, 0.8], [0.95, 0.7, 0.9], [0.99, 0.5, 0.5]]).double(), angles)
    residues_DN = torch.complex(*numbers("residues", 2, 3, 3).unbind())
    residues_DN[2, 1:] = 0
    lags_L1 = torch.arange(length).unsqueeze(1)
    filter_DL = torch.stack([(poles**lags_L1 @ r).real for poles, r in zip(poles_DN, residues_DN, strict=True)])
    for modes in (3, 6):
        found_DN, weights_DN = fit_modes(filter_DL, modes)
        assert found_DN.shape == (3, modes) and found_DN.abs().max() <= 1
        again_DL = torch.stack([(p**lags_L1 @ r).real for p, r in zip(found_DN, weights_DN, strict=True)])
        assert difference(again_DL, filter_DL) < 1e-5
    assert difference(_once(fit_modes(filter_DL, 1), length), filter_DL) > 1e-2  # the control


def _once(modes: tuple[torch.Tensor, torch.Tensor], length: int) -> torch.Tensor:
    lags_L1 = torch.arange(length).unsqueeze(1)
    return torch.stack([(poles**lags_L1 @ r).real for poles, r in zip(*modes, strict=True)])


def test_the_distilled_model_is_the_model() -> None:
    model = build_model(HYENA, seed=1, dtype=torch.float64).eval()
    tokens_BT = torch.randint(11, (2, 200), generator=torch.Generator().manual_seed(0))
    expected_BTV = model.logits(tokens_BT)
    differences = []
    for modes in (1, 4, 8):
        distilled, errors = distil(model, modes)
        assert errors.keys() == {0, 2}
        differences.append(difference(distilled.logits(tokens_BT), expected_BTV))
        assert differences[-1] < 10 * max(errors.values()) and not distilled.training
    assert differences[0] > 1e-3 > differences[1] > 1e-5 > differences[2]
    assert [layer.mixer for layer in distilled.config.plan] == ["modal_hyena", "attention", "modal_hyena"]
    assert distilled.config.plan[0].feed_forward_options == {"kind": "gelu"} and distilled.max_length is None


def test_it_decodes_in_constant_memory() -> None:
    model = build_model({**HYENA, "layers": "[hyena] x 2"}, seed=1, dtype=torch.float64)
    distilled = distil(model, 8).model
    tokens_BT = torch.randint(11, (2, 60), generator=torch.Generator().manual_seed(0))
    held: dict[str, list[int]] = {}
    with torch.no_grad():
        for name, each in (("implicit", model), ("modes", distilled)):
            logits_BV, state = each.prefill(tokens_BT[:, :20])
            for token in range(20, 60):
                logits_BV, state = each.step(tokens_BT[:, token], state)
                tensors = [tensor for block in state for part in block.values() for tensor in part.values()]
                held.setdefault(name, []).append(sum(tensor.nbytes for tensor in tensors))
            assert difference(logits_BV, model.logits(tokens_BT)[:, -1]) < 1e-5
    assert len(set(held["modes"])) == 1 and held["implicit"][-1] > 2 * held["implicit"][0]
    assert distilled.state_bytes(10) == distilled.state_bytes(10**6) == held["modes"][0] // 2


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("[mamba, attention(heads=3)]", "the model has no hyena layer to distil"),
        ("[hyena, hyena(order=3)]", "layer 1 is hyena of order 3; only order 2 can be distilled"),
    ],
)
def test_what_cannot_be_distilled_is_one_line(layers: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}$"):
        distil(build_model({**HYENA, "layers": layers}), 4)
