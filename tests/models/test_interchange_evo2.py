"""Evo 2's state dict against its equations written out below, as read off the authors' code (Zymrael/vortex)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from longstride.models import build_model, list_presets, load_preset
from longstride.models.interchange import LAYOUTS, InterchangeError, load_config, load_pretrained, save_pretrained
from longstride.models.interchange.layout import tensor_map, write_config

from .cases import difference, numbers

WIDTH, HEADS, HEAD, VOCAB, LENGTH = 24, 4, 6, 40, 140
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_filters": WIDTH,
    "num_layers": 5,
    "hcs_layer_idxs": [0, 4],
    "hcm_layer_idxs": [1],
    "hcl_layer_idxs": [2],
    "attn_layer_idxs": [3],
    "hcs_filter_length": 7,
    "hcs_filter_groups": 6,
    "hcm_filter_length": 128,
    "hcm_filter_groups": 8,
    "hcl_filter_groups": WIDTH,
    "state_size": 16,
    "short_filter_length": 3,
    "short_filter_bias": False,
    "num_attention_heads": HEADS,
    "proj_groups": 1,
    "rotary_emb_base": 500.0,
    "rotary_emb_scaling_factor": 4.0,
    "use_interpolated_rotary_pos_emb": True,
    "inner_mlp_size": 32,
    "eps": 1e-2,
    "tie_embeddings": True,
    "column_split_hyena": False,
    "column_split": True,
    "interleave": True,
    "evo2_style_activations": True,
    "mha_out_proj_bias": True,
    "hyena_out_proj_bias": True,
    "qkv_proj_bias": False,
    "use_flash_rmsnorm": False,
    "final_norm": True,
    "mlp_activation": "gelu",
}
LAGS = torch.linspace(0, 1, 128, dtype=torch.float64)
WINDOW = torch.exp(-torch.logspace(0, 2, 8, dtype=torch.float64)[:, None] * LAGS)


def stored() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"embedding_layer.weight": (VOCAB, WIDTH), "norm.scale": (WIDTH,)}
    for index in range(CONFIG["num_layers"]):
        block = f"blocks.{index}"
        shapes |= {f"{block}.{name}.scale": (WIDTH,) for name in ("pre_norm", "post_norm")}
        shapes |= {f"{block}.mlp.{name}.weight": (32, WIDTH) for name in ("l1", "l2")}
        shapes |= {f"{block}.mlp.l3.weight": (WIDTH, 32)}
        if index == 3:
            shapes |= {f"{block}.inner_mha_cls.Wqkv.weight": (3 * WIDTH, WIDTH)}
            shapes |= {f"{block}.inner_mha_cls.out_proj.weight": (WIDTH, WIDTH)}
            shapes |= {f"{block}.inner_mha_cls.out_proj.bias": (WIDTH,)}
            continue
        shapes |= {f"{block}.projections.weight": (3 * WIDTH, WIDTH)}
        shapes |= {f"{block}.filter.short_filter_weight": (3 * WIDTH, 1, 3)}
        shapes |= {f"{block}.out_filter_dense.weight": (WIDTH, WIDTH), f"{block}.out_filter_dense.bias": (WIDTH,)}
        if index == 2:
            shapes |= {f"{block}.filter.log_poles": (WIDTH, 16, 1), f"{block}.filter.residues": (WIDTH, 16)}
        else:
            shapes |= {f"{block}.filter.h": (8, 1, 128) if index == 1 else (6, 1, 7)}
        if index in (1, 2):
            shapes |= {f"{block}.filter.D": (WIDTH,)}
    state = {name: numbers(name, *shape) * 0.4 for name, shape in shapes.items()}
    state["blocks.1.filter.h"] *= WINDOW[:, None]
    state["blocks.2.filter.log_poles"] = -state["blocks.2.filter.log_poles"].abs() - 1e-3
    return state


def expected_logits(state: dict[str, Tensor], tokens_BT: Tensor) -> Tensor:
    x_BTD = state["embedding_layer.weight"][tokens_BT]
    for index in range(CONFIG["num_layers"]):
        prefix = f"blocks.{index}."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        u_BTD = norm(x_BTD, own["pre_norm.scale"])
        x_BTD = x_BTD + (attention(own, u_BTD) if index == 3 else hyena(own, u_BTD, index))
        u_BTD = norm(x_BTD, own["post_norm.scale"])
        gate = u_BTD @ own["mlp.l1.weight"].T
        gated = (F.gelu(gate) if index == 0 else gate) * (u_BTD @ own["mlp.l2.weight"].T)
        x_BTD = x_BTD + gated @ own["mlp.l3.weight"].T
    return norm(x_BTD, state["norm.scale"]) @ state["embedding_layer.weight"].T


def norm(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) / math.sqrt(WIDTH) + CONFIG["eps"]) * scale


def hyena(own: dict[str, Tensor], u_BTD: Tensor, index: int) -> Tensor:
    z = causal(u_BTD @ own["projections.weight"].T, own["filter.short_filter_weight"][:, 0].flip(1))
    x2, x1, v = z[..., 0::3], z[..., 1::3], z[..., 2::3]
    w = x1 * v
    if index == 2:
        lags = torch.arange(LENGTH).double()
        taps = (own["filter.residues"][..., None] * torch.exp(own["filter.log_poles"] * lags)).sum(1)
    else:
        taps = own["filter.h"][:, 0].repeat_interleave(WIDTH // len(own["filter.h"]), 0)
        taps = taps if index == 1 else taps.flip(1)
    y = causal(w, taps)
    if "filter.D" in own:
        y = y + own["filter.D"] * w
    return (x2 * y) @ own["out_filter_dense.weight"].T + own["out_filter_dense.bias"]


def causal(u_BTD: Tensor, taps_DK: Tensor) -> Tensor:
    """Tap k multiplies the token k before."""
    lag_TS = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    known = (lag_TS >= 0) & (lag_TS < taps_DK.shape[1])
    matrix_DTS = taps_DK[:, lag_TS.clamp(0, taps_DK.shape[1] - 1)] * known
    return torch.einsum("dts,bsd->btd", matrix_DTS, u_BTD)


def attention(own: dict[str, Tensor], u_BTD: Tensor) -> Tensor:
    q, k, v = (u_BTD @ own["inner_mha_cls.Wqkv.weight"].T).unflatten(-1, (HEADS, 3, HEAD)).unbind(-2)
    positions = torch.arange(LENGTH).double() / CONFIG["rotary_emb_scaling_factor"]
    angle = positions[:, None] / CONFIG["rotary_emb_base"] ** (torch.arange(0, HEAD, 2).double() / HEAD)
    cosine, sine = angle.cos()[:, None], angle.sin()[:, None]

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)

    scores = torch.einsum("bthk,bshk->bhts", turn(q), turn(k)) / math.sqrt(HEAD)
    scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
    out = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v).flatten(2)
    return out @ own["inner_mha_cls.out_proj.weight"].T + own["inner_mha_cls.out_proj.bias"]


def write(directory: Path, **changes: Any) -> dict[str, Tensor]:
    directory.mkdir()
    state = stored()
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    extra = {"blocks.0.projections._extra_state": torch.zeros(3, dtype=torch.uint8)}
    save_file({**state, **extra}, directory / "model.safetensors")
    return state


def test_logits_and_gradients(tmp_path: Path) -> None:
    state = {name: tensor.requires_grad_() for name, tensor in write(tmp_path / "in").items()}
    ours = load_pretrained(tmp_path / "in")
    tokens_BT = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    expected, logits = expected_logits(state, tokens_BT), ours.logits(tokens_BT)
    assert difference(logits, expected) < 1e-11
    for values in (expected, logits):
        (values * numbers("weights", *values.shape)).sum().backward()
    gradients = {name: tensor.grad for name, tensor in state.items() if tensor.grad is not None}
    assert len(gradients) == len(state)
    with torch.no_grad():
        # what is trained is not what is stored: the chain rule, and what reading does undone beforehand
        gradients["blocks.1.filter.h"] *= WINDOW[:, None] ** 2
        rates = "blocks.2.filter.log_poles"
        gradients[rates] = -torch.exp(gradients[rates] * state[rates])
    save_file(gradients, tmp_path / "in" / "model.safetensors")
    expected_gradients = dict(load_pretrained(tmp_path / "in").named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert difference(parameter.grad, expected_gradients[name].detach()) < 1e-10, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bitwise but for the filters that are trained in other terms, which come back to rounding."""
    state = write(tmp_path / "in")
    ours = load_pretrained(tmp_path / "in", dtype=dtype)
    save_pretrained(ours, tmp_path / "out", layout="evo2")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == state.keys()
    for name, tensor in written.items():
        if name.endswith(("log_poles", "1.filter.h")):
            assert torch.allclose(tensor.double(), state[name], rtol=4 * torch.finfo(dtype).eps, atol=1e-36), name
        else:
            assert torch.equal(tensor, state[name].to(dtype)), name
    assert load_config(tmp_path / "out") == ours.config


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blocks.1.filter.h", 1.0, "blocks.1.filter.h must be no larger than its window lets it be"),
        ("blocks.2.filter.log_poles", 0.0, "blocks.2.filter.log_poles must be negative"),
    ],
)
def test_filters_that_cannot_be_trained(name: str, value: float, message: str, tmp_path: Path) -> None:
    state = write(tmp_path / "in")
    save_file({**state, name: torch.full_like(state[name], value)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(InterchangeError, match=message):
        load_pretrained(tmp_path / "in")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interleave": False}, "interleave=False is not supported"),
        ({"column_split": False}, "column_split=False is not supported"),
        ({"evo2_style_activations": False}, "evo2_style_activations=False is not supported"),
        ({"hcs_layer_idxs": [0]}, "no list of layers names layer 4"),
        ({"hcm_filter_length": 64}, "hcs_filter_length must be below 128, and hcm_filter_length not"),
    ],
)
def test_variants_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "in", **changes)
    with pytest.raises(InterchangeError, match=message):
        load_pretrained(tmp_path / "in")


@pytest.mark.parametrize("preset", [name for name in list_presets() if name.startswith("evo-2")])
def test_presets_fit_the_layout(preset: str) -> None:
    config = load_preset(preset)
    write_config(LAYOUTS["evo2"], config)
    shapes = tensor_map(LAYOUTS["evo2"], config).shapes
    assert sum(math.prod(shape) for shape in shapes.values()) == build_model(config, device="meta").num_parameters()
