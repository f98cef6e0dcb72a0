"""Presets: their sizes, counted without allocating them, and what they compute."""

from __future__ import annotations

import pytest
import torch

from longstride.models import build_model, list_presets, load_preset

from .cases import difference

# counts of the published checkpoints
PUBLISHED = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "llama-2-7b": 6_738_415_616,
    "mixtral-8x7b": 46_702_792_704,
    "jamba-v0.1": 51_570_323_328,
}
SMALL = [name for name in list_presets() if name.endswith("-small")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert build_model(name, device="meta").num_parameters() == PUBLISHED[name]


def test_every_preset_is_either_published_or_small() -> None:
    assert set(list_presets()) == set(PUBLISHED) | set(SMALL)


def test_active_parameters() -> None:
    assert round(build_model("mixtral-8x7b", device="meta").num_active_parameters() / 1e9, 1) == 12.9
    assert round(build_model("jamba-v0.1", device="meta").num_active_parameters() / 1e9, 1) == 12.1
    mamba = build_model("mamba-130m", device="meta")
    assert mamba.num_active_parameters() == mamba.num_parameters()


def test_attention_caches_are_the_published_sizes() -> None:
    context, gib = 256 * 1024, 2**30
    llama = build_model("llama-2-7b", device="meta", dtype=torch.bfloat16)
    assert llama.state_bytes(context) == 128 * gib
    assert build_model("mixtral-8x7b", device="meta", dtype=torch.bfloat16).state_bytes(context) == 32 * gib
    mamba = build_model("mamba-2.8b", device="meta")
    assert mamba.state_bytes(context) == mamba.state_bytes(1)


@pytest.mark.parametrize("name", SMALL)
def test_small_presets_are_small_and_decode_as_they_compute(name: str) -> None:
    model = build_model(name, seed=3, dtype=torch.float64)
    assert 50_000 <= model.num_parameters() <= 300_000
    assert load_preset(name).vocab_size == 256
    tokens_BT = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        state, outputs = model.init_state(2), []
        for token in range(tokens_BT.shape[1]):
            logits_BV, state = model.step(tokens_BT[:, token], state)
            outputs.append(logits_BV)
        assert difference(torch.stack(outputs, dim=1), model.logits(tokens_BT)) < 1e-9
        held = sum(tensor[:1].nbytes for block in state for part in block.values() for tensor in part.values())
        assert held == model.state_bytes(tokens_BT.shape[1])
