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
    "attention, half rotated, scaled": {"layers": "[attention(heads=3, rotary_dim=2, rotary_scale=4.0, bias=out)]"},
    "attention in a window": {"layers": "[attention(heads=6, kv_heads=3, window=5)]"},
    "attention, one key head, no positions": {"layers": "[attention(heads=3, kv_heads=1, rotary_base=null)]"},
    "conba": {"layers": "[conba(state=4, dt_max=1.0)]"},
    "conba, linear": {"layers": "[conba(variant=linear, state=4, dt_max=0.5)]"},
    "conba, exact": {"layers": "[conba(variant=exact, state=6, online_rate=0.1)]"},
    "conba, exact, by Newton's method": {"layers": "[conba(variant=exact, state=4, online_rate=0.1, solver=newton)]"},
    "flash": {"layers": "[flash(key_dim=6, chunk=4)]"},
    "flash in long chunks": {"layers": "[flash(key_dim=10, chunk=9, expand=1)]"},
    "gau": {"layers": "[gau(key_dim=6)]"},
    "h3": {"layers": "[h3(state=4, shift=5, dt_min=0.1, dt_max=0.5)]"},
    "h3 with heads": {"layers": "[h3(state=6, shift=3, head_dim=3, dt_min=0.1, dt_max=0.5, discretisation=zoh)]"},
    "hyena": {"layers": "[hyena(max_length=64, features=7, filter_width=8, sine=3.0, slow=0.5)]"},
    "hyena of order 3": {"layers": "[hyena(max_length=64, order=3, filter_width=8, sine=3.0, shift=0.1)]"},
    "hyena_li": {"layers": "[hyena_li(modes=4)]"},
    "hyena_mr": {"layers": "[hyena_mr(taps=40, groups=3, slowest=0.1)]"},
    "hyena_se": {"layers": "[hyena_se(taps=19, groups=4)]"},
    "linear_attention": {"layers": "[linear_attention(heads=3)]"},
    "lstm": {"layers": "[lstm(hidden=7)]"},
    "mamba": {"layers": "[mamba(state=4, dt_max=1.0)]"},
    "mamba with inner norms": {
        "layers": "[mamba(state=3, inner_norms=true, dt_rank=2, bias=true, dt_max=1.0, conv=3)]"
    },
    "mamba2": {"layers": "[mamba2(state=5, head_dim=8, dt_min=0.02, dt_max=0.1)]"},
    "mamba2 with groups": {
        "layers": "[mamba2(state=4, head_dim=6, groups=2, bias=true, dt_min=0.02, dt_max=0.1, conv=3)]"
    },
    "modal_hyena": {"layers": "[modal_hyena(heads=3)]"},
    "retnet": {"layers": "[retnet(heads=3)]"},
    "retnet, other decays": {"layers": "[retnet(heads=2, expand=1, decay=linspace)]"},
    "rwkv4": {"layers": "[rwkv4]"},
    "rwkv7": {"layers": "[rwkv7(head_dim=4)]"},
    "s4": {"layers": "[s4(state=8, dt_min=0.05, dt_max=0.2)]"},
    "s4, random": {"layers": "[s4(state=4, init=random, dt_min=0.1, dt_max=0.5)]"},
    "s4d": {"layers": "[s4d(state=8, dt_min=0.05, dt_max=0.2)]"},
    "s4d, legs, bilinear": {"layers": "[s4d(state=8, init=legs, discretisation=bilinear, dt_min=0.05, dt_max=0.2)]"},
    "s4d, inv": {"layers": "[s4d(state=6, init=inv, dt_min=0.05, dt_max=0.2)]"},
    "s4d, quad": {"layers": "[s4d(state=4, init=quad, dt_min=0.05, dt_max=0.2)]"},
    "s4d, real": {"layers": "[s4d(state=4, init=real, dt_min=0.05, dt_max=0.2)]"},
    "s4d, real, bilinear": {"layers": "[s4d(state=6, init=real, discretisation=bilinear, dt_min=0.2, dt_max=1.0)]"},
}
MIXER_CASES = {name: {"layers": f"[{name}]"} for name in MIXERS} | VARIANTS
WINDOWS = {"attention in a window": 5}
"""Those that do not look back to the beginning: how many tokens they see."""
REMEMBER_EVERY_TOKEN = {"attention", "gau", "hyena"}
"""Families whose decoding state grows with the text."""

EXPERTS = {"moe": {"experts": 4, "top_k": 2, "hidden": 10, "balance_loss": 0.3, "z_loss": 0.1}}
MODEL_CASES: dict[str, dict[str, Any]] = {
    "channel mixes and values of the first layer": {
        "layers": "[rwkv7, rwkv7, mamba+moe, rwkv7+channel_mix(receptance=true, hidden=10)]",
        "feed_forward": "channel_mix",
        "channel_mix": {"receptance": False},
        "rwkv7": {"head_dim": 4, "decay_rank": 3, "rate_rank": 3, "value_rank": 3, "gate_rank": 3},
        "norm": "layer",
        "embedding_norm": True,
        "embedding_std": 0.5,
        "tie_embeddings": False,
        "head_gain": 0.5,
        "recompute": True,
        **EXPERTS,
    },
    "every part": {
        "layers": "[mamba, hyena(max_length=64)+moe, attention(heads=4, kv_heads=2, head_dim=4), "
        "mamba(state=3)+moe(balance=bias, shared=1)]",
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
