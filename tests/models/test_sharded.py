"""Models with sharded parameters and spread experts against one process, float64: losses, gradients, buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longstride.models import initialise

from .cases import difference
from .sharded import check_sharded_equals_whole, make_model, whole_results

HYBRID: dict[str, Any] = {
    "width": 16,
    "layers": "[mamba, hyena(max_length=64)+moe, attention(heads=4, kv_heads=2), mamba+moe]",
    "moe": {"experts": 4, "hidden": 24, "balance_loss": 0.3, "z_loss": 0.1},
    "init_std": 0.2,
}

# rows of a batch are spread too, so that a process may hold a single row with documents
FAMILIES: dict[str, Any] = {
    "width": 16,
    "layers": ", ".join(
        [
            "s4d(state=4, dt_min=0.1)",
            "s4(state=4, dt_min=0.1)",
            "h3(state=4, shift=4, dt_min=0.1)",
            "mamba2(head_dim=8, state=4, dt_min=0.1)",
            "retnet(heads=2)",
            "linear-attention(heads=4)",
            "modal-hyena(heads=2)",
            "hyena-se(groups=4)",
            "hyena-mr(taps=9, groups=4)+mlp(kind=geglu)",
            "hyena-li+mlp(kind=bilinear)",
            "attention(heads=2, bias=out, rotary_dim=4, rotary_scale=2.0)",
        ]
    ),
    "feed_forward": "none",
    "norm": "rms_outer",
    "init_std": 0.2,
}

# something beside parameters and activations: values passed between layers, hand-offs, a gain that is no parameter
SHARING: dict[str, Any] = {
    "width": 16,
    "layers": "[rwkv7, conba+moe, rwkv7+none, lstm, gau, rwkv4, flash+none, conba(variant=linear)]",
    "feed_forward": "channel_mix",
    "moe": {"experts": 4, "hidden": 24, "balance_loss": 0.3},
    "rwkv7": {"head_dim": 8},
    "conba": {"state": 4, "online_rate": 0.1},
    "gau": {"key_dim": 4},
    "flash": {"key_dim": 4, "chunk": 5},
    "embedding_norm": True,
    "tie_embeddings": False,
    "head_gain": 0.5,
    "logit_pull": 0.1,
    "init_std": 0.2,
}
GAIN = "blocks.1.mixer.control_gain"


@pytest.mark.parametrize(
    ("degrees", "recompute"),
    [
        ({"sequence": 2, "expert": 2}, False),
        ({"data": 2, "expert": 1}, False),
        ({"data": 2, "sequence": 2, "expert": 2}, True),
        ({"sequence": 4, "expert": 4}, False),
    ],
)
def test_a_hybrid_with_experts(degrees: dict[str, int], recompute: bool) -> None:
    check_sharded_equals_whole(HYBRID, degrees, recompute=recompute)


@pytest.mark.parametrize(
    ("degrees", "recompute"),
    [({"sequence": 2}, False), ({"sequence": 3}, True), ({"data": 2, "sequence": 2}, True)],
)
def test_many_families(degrees: dict[str, int], recompute: bool) -> None:
    check_sharded_equals_whole(FAMILIES, degrees, recompute=recompute)


@pytest.mark.parametrize(
    ("degrees", "recompute"),
    [({"sequence": 2, "expert": 2}, True), ({"data": 2, "sequence": 2, "expert": 4}, False)],
)
def test_families_with_more_than_parameters(degrees: dict[str, int], recompute: bool) -> None:
    check_sharded_equals_whole(SHARING, degrees, recompute=recompute, moved=True)


def test_their_gradients_are_there_and_the_gain_moves() -> None:
    found = whole_results(SHARING, moved=True)
    before = make_model(SHARING, moved=True).to_empty(device="cpu")
    initialise(before, seed=5)
    assert difference(found[GAIN], before.get_buffer(GAIN)) > 1e-4
    assert all(found[name].abs().max() > 1e-9 for name, _ in before.named_parameters())
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
