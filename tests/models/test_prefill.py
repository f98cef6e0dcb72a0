"""Prefill, then steps: the same logits as the parallel form on everything, whole or split, in one piece or in two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longstride.models import LanguageModel
from longstride.models.mixers.base import Mixer
from longstride.parallel import SequenceShard
from tests.distributed import run_ranks

from .cases import MIXER_CASES, MODEL_CASES, difference, make_model

PROMPT, TOTAL = 13, 19
# every mixer twice, so that what layers share is met; channel mix keeps a state of its own
CASES: dict[str, dict[str, Any]] = {
    **{
        name: {**case, "layers": f"[{case['layers']}] x 2", "feed_forward": "channel_mix"}
        for name, case in MIXER_CASES.items()
    },
    **MODEL_CASES,
}


def tokens() -> Tensor:
    return torch.randint(11, (2, TOTAL), generator=torch.Generator().manual_seed(0))


def continue_from(model: LanguageModel, logits_BV: Tensor, state: Any) -> Tensor:
    """The prompt's last logits and those of every step after it: (B, TOTAL - PROMPT + 1, V)."""
    outputs = [logits_BV]
    for token in range(PROMPT, TOTAL):
        logits_BV, state = model.step(tokens()[:, token], state)
        outputs.append(logits_BV)
    return torch.stack(outputs, dim=1)


def expected(model: LanguageModel) -> Tensor:
    return model.logits(tokens())[:, PROMPT - 1 :]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cut", [None, 1, 5])
def test_prefill_then_steps(case: str, cut: int | None) -> None:
    """`cut`: the prompt is read in two pieces, the first of so many tokens; short ones end inside convolutions."""
    model = make_model(CASES[case])
    with torch.no_grad():
        state = None if cut is None else model.prefill(tokens()[:, :cut])[1]
        logits_BV, state = model.prefill(tokens()[:, cut or 0 : PROMPT], state=state)
        assert difference(continue_from(model, logits_BV, state), expected(model)) < 1e-9


@torch.no_grad()
def split_prefill(rank: int, world_size: int, bounds: tuple[int, ...], first: int) -> dict[str, Tensor]:
    """Of every case; only the last process goes on."""
    outputs = {}
    for case in CASES:
        model = make_model(CASES[case])
        state = model.prefill(tokens()[:, :first])[1] if first else None
        shard = SequenceShard.split(PROMPT - first, bounds=bounds)
        local_BT = tokens()[:, first + shard.start : first + shard.stop]
        logits_BV, state = model.prefill(local_BT, shard, state)
        if rank == world_size - 1:
            outputs[case] = continue_from(model, logits_BV, state)
    return outputs


@pytest.mark.parametrize(
    ("bounds", "first"),
    [((0, 7, PROMPT), 0), ((0, 1, 2, PROMPT), 0), ((0, 1, 2, PROMPT - 3), 3)],
    ids=["two", "shards shorter than the short convolutions", "the same, with something before the prompt"],
)
def test_split_prefill(bounds: tuple[int, ...], first: int) -> None:
    outputs = run_ranks(split_prefill, len(bounds) - 1, bounds, first)[-1]
    for case in CASES:
        assert difference(outputs[case], expected(make_model(CASES[case]))) < 1e-9, case


@pytest.mark.parametrize("case", MIXER_CASES)
def test_a_prompt_is_not_read_by_steps(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(CASES[case])
    for block in model.blocks:
        assert isinstance(block.mixer, Mixer)
        for step in ("step", "share_step"):
            monkeypatch.setattr(block.mixer, step, None)
    with torch.no_grad():
        logits_BV, _ = model.prefill(tokens()[:, :PROMPT])
        assert difference(logits_BV, expected(model)[:, 0]) < 1e-12


def test_a_forgotten_state_is_noticed() -> None:
    """Negative control: the second piece read as if it were the beginning."""
    model = make_model(CASES["mamba"])
    with torch.no_grad():
        logits_BV, state = model.prefill(tokens()[:, 5:PROMPT])
        assert difference(continue_from(model, logits_BV, state), expected(model)) > 1e-3


def test_documents_inside_a_prompt_are_refused() -> None:
    model = make_model(CASES["mamba"])
    with pytest.raises(ValueError, match="a prompt is one document"):
        model.prefill(tokens()[:, :PROMPT], SequenceShard.whole(PROMPT, [4]))
