"""Small models to hold the rules of every layer against, one at least for each registered family."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from longstride.models import LanguageModel, ModelConfig, build_model
from longstride.models.mixers import Mixer
from longstride.models.registry import MIXERS

WIDTH = 12
SMALL: dict[str, Any] = {"vocab_size": 11, "width": WIDTH, "feed_forward": "none", "init_std": 0.3}

# options worth a case of their own; a family without an entry here is tested with its defaults
VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {"layers": "[attention(heads=4, kv_heads=2, head_dim=4)]"},
    "attention with biases": {"layers": "[attention(heads=2, bias=true)]"},
    "attention, one key head, no positions": {"layers": "[attention(heads=3, kv_heads=1, rotary_base=null)]"},
    "hyena": {"layers": "[hyena(max_length=64, features=7, filter_width=8, sine=3.0, slow=0.5)]"},
    "hyena of order 3": {"layers": "[hyena(max_length=64, order=3, filter_width=8, sine=3.0, shift=0.1)]"},
    "mamba": {"layers": "[mamba(state=4, dt_max=1.0)]"},
    "mamba with inner norms": {
        "layers": "[mamba(state=3, inner_norms=true, dt_rank=2, bias=true, dt_max=1.0, conv=3)]"
    },
}
MIXER_CASES = {name: {"layers": f"[{name}]"} for name in MIXERS} | VARIANTS

EXPERTS = {"moe": {"experts": 4, "top_k": 2, "hidden": 10, "balance_loss": 0.3, "z_loss": 0.1}}
MODEL_CASES: dict[str, dict[str, Any]] = {
    "every part": {
        "layers": "[mamba, hyena(max_length=64)+moe, attention(heads=4, kv_heads=2, head_dim=4), mamba(state=3)+moe]",
        "feed_forward": "mlp",
        **EXPERTS,
    },
    "layer norms, own head, chosen probabilities kept": {
        "layers": "[attention(heads=3)+moe, mamba+mlp]",
        "norm": "layer",
        "tie_embeddings": False,
        "mlp": {"kind": "gelu", "bias": True},
        "moe": {**EXPERTS["moe"], "renormalise": False, "top_k": 1},
    },
    "recomputed": {
        "layers": "[mamba+moe, hyena(max_length=64), attention(heads=3)+mlp]",
        "recompute": True,
        **EXPERTS,
    },
}


def make_model(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A model whose every parameter is well away from special values such as zero biases and unit norms."""
    model = build_model(ModelConfig.parse({**SMALL, **case}), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * numbers(name, *parameter.shape).to(dtype)
    return model


def make_mixer(name: str) -> Mixer:
    mixer = make_model(MIXER_CASES[name]).blocks[0].mixer
    assert isinstance(mixer, Mixer)
    return mixer


def numbers(label: str, *shape: int) -> Tensor:
    """The same normal numbers for the same label in every process, float64."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:6], "little")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value."""
    scale = theirs.abs().max().item()
    return (ours - theirs).abs().max().item() / (scale if scale > 0 else 1.0)
