"""StripedHyena-7B's state dict against its equations written out below, which transformers does not have.

The equations are read off the authors' code (togethercomputer/stripedhyena) and computed the slow way: filters as sums
of powers, convolutions as sums over lags, attention with a full matrix.
"""

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

from longstride.models.interchange import InterchangeError, load_config, load_pretrained, save_pretrained

from .cases import difference, numbers

CONFIG: dict[str, Any] = {
    "model_type": "stripedhyena",
    "vocab_size": 40,
    "hidden_size": 24,
    "num_filters": 24,
    "num_layers": 4,
    "attn_layer_idxs": [1, 3],
    "hyena_layer_idxs": [0, 2, 4],
    "num_attention_heads": 4,
    "proj_groups": 2,
    "rotary_emb_base": 500.0,
    "state_size": 2,
    "short_filter_length": 3,
    "short_filter_bias": True,
    "inner_mlp_size": 32,
    "eps": 1e-5,
    "tie_embeddings": False,
    "column_split_hyena": True,
    "column_split": False,
    "hyena_filter_groups": 1,
    "mha_out_proj_bias": False,
    "qkv_proj_bias": False,
    "use_flash_rmsnorm": True,
}
LENGTH = 17


def stored() -> dict[str, Tensor]:
    """A random state dict with the released model's names and shapes."""
    width, hidden = CONFIG["hidden_size"], CONFIG["inner_mlp_size"]
    shapes: dict[str, tuple[int, ...]] = {"embedding_layer.weight": (40, width), "unembed.weight": (40, width)}
    for index in range(CONFIG["num_layers"]):
        block = f"blocks.{index}"
        shapes |= {f"{block}.pre_norm.scale": (width,), f"{block}.post_norm.scale": (width,)}
        shapes |= {f"{block}.mlp.{name}.weight": (hidden, width) for name in ("l1", "l2")}
        shapes |= {f"{block}.mlp.l3.weight": (width, hidden)}
        if index in CONFIG["attn_layer_idxs"]:
            shapes |= {f"{block}.inner_mha_cls.Wqkv.weight": (2 * width, width)}
            shapes |= {f"{block}.inner_mha_cls.out_proj.weight": (width, width)}
            continue
        shapes |= {f"{block}.projections.weight": (3 * width, width), f"{block}.projections.bias": (3 * width,)}
        shapes |= {f"{block}.filter.short_filter_weight": (3 * width, 1, 3)}
        shapes |= {f"{block}.filter.short_filter_bias": (3 * width,), f"{block}.filter.D": (width,)}
        shapes |= {f"{block}.filter.{name}": (width, 2, 1, 2) for name in ("poles", "residues")}
        shapes |= {f"{block}.out_filter_dense.weight": (width, width), f"{block}.out_filter_dense.bias": (width,)}
    shapes["norm.scale"] = (width,)
    state = {name: numbers(name, *shape) * 0.4 for name, shape in shapes.items()}
    return {name: tensor.clamp(-0.6, 0.6) if "poles" in name else tensor for name, tensor in state.items()}


def expected_logits(state: dict[str, Tensor], tokens_BT: Tensor) -> Tensor:
    x_BTD = state["embedding_layer.weight"][tokens_BT]
    for index in range(CONFIG["num_layers"]):
        own = {
            name.removeprefix(f"blocks.{index}."): value for name, value in state.items() if f"blocks.{index}." in name
        }
        mixer = attention if index in CONFIG["attn_layer_idxs"] else hyena
        x_BTD = x_BTD + mixer(own, norm(x_BTD, own["pre_norm.scale"]))
        u_BTD = norm(x_BTD, own["post_norm.scale"])
        gated = F.silu(u_BTD @ own["mlp.l1.weight"].T) * (u_BTD @ own["mlp.l2.weight"].T)
        x_BTD = x_BTD + gated @ own["mlp.l3.weight"].T
    return norm(x_BTD, state["norm.scale"]) @ state["unembed.weight"].T


def norm(x: Tensor, scale: Tensor) -> Tensor:
    mean = x.square().mean(-1, keepdim=True)
    return x / ((mean + CONFIG["eps"]).sqrt() if CONFIG["use_flash_rmsnorm"] else mean.sqrt() + CONFIG["eps"]) * scale


def hyena(own: dict[str, Tensor], u_BTD: Tensor) -> Tensor:
    z = u_BTD @ own["projections.weight"].T + own["projections.bias"]
    taps = own["filter.short_filter_weight"][:, 0]
    padded = F.pad(z, (0, 0, 2, 0))
    z = sum(taps[:, lag] * padded[:, lag : lag + z.shape[1]] for lag in range(3)) + own["filter.short_filter_bias"]
    heads, head = CONFIG["num_attention_heads"], CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    z = z.reshape(*z.shape[:2], heads, 3 * head)
    x2, x1, v = (part.flatten(-2) for part in z.split(head, dim=-1))
    poles, residues = (torch.view_as_complex(own[f"filter.{name}"])[..., 0] for name in ("poles", "residues"))
    w = x1 * v
    lags = torch.stack([(residues * poles**lag).real.sum(-1) for lag in range(w.shape[1])])
    y = torch.stack([sum(lags[t - s] * w[:, s] for s in range(t + 1)) for t in range(w.shape[1])], dim=1)
    y = (y + own["filter.D"] * w) * x2
    return y @ own["out_filter_dense.weight"].T + own["out_filter_dense.bias"]


def attention(own: dict[str, Tensor], u_BTD: Tensor) -> Tensor:
    heads, head = CONFIG["num_attention_heads"], CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    groups, width = heads // CONFIG["proj_groups"], CONFIG["hidden_size"]
    qkv = u_BTD @ own["inner_mha_cls.Wqkv.weight"].T
    q, k, v = (part.unflatten(-1, (-1, head)) for part in qkv.split([width, groups * head, groups * head], dim=-1))
    angle = torch.arange(u_BTD.shape[1]).double()[:, None] / CONFIG["rotary_emb_base"] ** (
        torch.arange(0, head, 2).double() / head
    )
    cosine, sine = angle.cos()[:, None], angle.sin()[:, None]

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)

    k, v = (part.repeat_interleave(CONFIG["proj_groups"], dim=2) for part in (turn(k), v))
    scores = torch.einsum("bthk,bshk->bhts", turn(q), k) / math.sqrt(head)
    scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
    out = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v).flatten(2)
    return out @ own["inner_mha_cls.out_proj.weight"].T


def write(directory: Path, prefix: str = "backbone.", **changes: Any) -> dict[str, Tensor]:
    directory.mkdir()
    state = stored()
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file({prefix + name: tensor for name, tensor in state.items()}, directory / "model.safetensors")
    return state


@pytest.mark.parametrize(("prefix", "fused"), [("", True), ("backbone.", True), ("", False)])
def test_logits_and_gradients(prefix: str, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fused`: epsilon under the root of the norms or beside it; large, so that the other one would be noticed."""
    monkeypatch.setitem(CONFIG, "use_flash_rmsnorm", fused)
    monkeypatch.setitem(CONFIG, "eps", 1e-2)
    state = {name: tensor.requires_grad_() for name, tensor in write(tmp_path / "in", prefix).items()}
    ours = load_pretrained(tmp_path / "in")
    assert ours.config.layers == "[modal_hyena, attention] x 2"
    tokens_BT = torch.randint(40, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    expected, logits = expected_logits(state, tokens_BT), ours.logits(tokens_BT)
    assert difference(logits, expected) < 1e-12
    for values in (expected, logits):
        (values * numbers("weights", *values.shape)).sum().backward()
    gradients = {prefix + name: tensor.grad for name, tensor in state.items() if tensor.grad is not None}
    assert len(gradients) == len(state)
    save_file(gradients, tmp_path / "in" / "model.safetensors")
    expected_gradients = dict(load_pretrained(tmp_path / "in").named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert difference(parameter.grad, expected_gradients[name].detach()) < 1e-11, name


def test_round_trip(tmp_path: Path) -> None:
    state = write(tmp_path / "in")
    ours = load_pretrained(tmp_path / "in")
    save_pretrained(ours, tmp_path / "out", layout="striped-hyena-7b")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == {f"backbone.{name}" for name in state}
    assert all(torch.equal(tensor, state[name.removeprefix("backbone.")]) for name, tensor in written.items())
    assert load_config(tmp_path / "out") == ours.config


@pytest.mark.parametrize(
    ("key", "value"), [("qkv_proj_bias", True), ("column_split_hyena", False), ("mlp_activation", "gelu")]
)
def test_variants_are_refused(key: str, value: object, tmp_path: Path) -> None:
    write(tmp_path / "in", **{key: value})
    with pytest.raises(InterchangeError, match=rf"{key}={value} is not supported"):
        load_pretrained(tmp_path / "in")
