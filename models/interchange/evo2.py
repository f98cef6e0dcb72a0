"""Evo 2's own names (Zymrael/vortex; StripedHyena 2, arXiv 2503.01868); config.json holds the keys of its YAML files.

Three kinds of Hyena layers and attention, by lists of layer numbers. The stored filters are what the layers apply: SE's
last tap first, MR's already under their windows, LI's rates as negative numbers. Rows of Wqkv lie head by head
(`column_split`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..mixers.striped_hyena_2 import decaying_window
from .files import InterchangeError, Region
from .layout import Layout, Stored, first_of, layer_options, write_plan
from .mapping import Conversion, TensorMap
from .parts import add_norm, add_output, whole_number
from .striped_hyena import add_block_frame, add_gated_convolution, read_frame, write_frame

KINDS = {"hyena_se": "hcs", "hyena_mr": "hcm", "hyena_li": "hcl"}


class Evo2(Layout):
    """Feed-forward layers are gated by GELU in the first layer and by nothing in the others."""

    name = "evo2"
    mixers, feed_forwards = ("hyena_se", "hyena_mr", "hyena_li", "attention"), ("mlp",)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return "attn_layer_idxs" in config and "hcl_layer_idxs" in config

    def read_config(self, stored: Stored) -> dict[str, Any]:
        width = stored.need("hidden_size")
        # where a key is absent, the default of the authors' code
        for key in ("short_filter_bias", "hyena_flip_x1x2"):
            stored.only(key, False)
        for key in ("interleave", "evo2_style_activations", "hyena_out_proj_bias"):
            stored.only(key, True, default=False)
        stored.only("column_split_hyena", False, default=True)
        stored.only("column_split", True)
        stored.only("proj_groups", 1)
        stored.only("mlp_activation", "gelu")
        stored.only("hcl_filter_groups", width)
        conv = {"conv": stored.need("short_filter_length")}
        scaled = stored.get("use_interpolated_rotary_pos_emb", False)
        description = read_frame(stored) | {
            "layers": _read_plan(stored),
            "mlp": {"kind": "bilinear", "hidden": stored.need("inner_mlp_size")},
            "hyena_li": {"modes": stored.need("state_size"), **conv},
        }
        for kind, name in (("hyena_se", "hcs"), ("hyena_mr", "hcm")):
            groups, taps = stored.need(f"{name}_filter_groups"), whole_number(stored, f"{name}_filter_length", 0)
            description[kind] = {"groups": groups, "taps": taps, **conv}
        if description["hyena_se"]["taps"] >= 128 or description["hyena_mr"]["taps"] < 128:
            raise InterchangeError(f"{stored.origin}: hcs_filter_length must be below 128, and hcm_filter_length not")
        description["attention"]["rotary_scale"] = stored.get("rotary_emb_scaling_factor", 1.0) if scaled else 1.0
        return description

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        se, mr, li = (first_of(config, kind) for kind in KINDS)
        scale = first_of(config, "attention").get("rotary_scale", 1.0)
        return {
            **write_frame(config),
            **{
                f"{name}_layer_idxs": [index for index, layer in enumerate(config.plan) if layer.mixer == kind]
                for kind, name in KINDS.items()
            },
            "hcs_filter_groups": se.get("groups", config.width),
            "hcs_filter_length": se.get("taps", 7),
            "hcm_filter_groups": mr.get("groups", config.width),
            "hcm_filter_length": mr.get("taps", 128),
            "hcl_filter_groups": config.width,
            "state_size": li.get("modes", 16),
            "short_filter_length": (se or mr or li).get("conv", 3),
            "short_filter_bias": False,
            "rotary_emb_scaling_factor": scale,
            "use_interpolated_rotary_pos_emb": scale != 1.0,
            "column_split_hyena": False,
            "column_split": True,
            "interleave": True,
            "evo2_style_activations": True,
            "hyena_out_proj_bias": True,
            "hyena_flip_x1x2": False,
            "mlp_activation": "gelu",
        }

    def map_tensors(self, config: ModelConfig, tensors: TensorMap) -> None:
        tensors.add("embedding.weight", "embedding_layer.weight")
        for index, layer in enumerate(layer_options(config)):
            ours, theirs = f"blocks.{index}", f"blocks.{index}"
            if layer["mixer"] == "attention":
                heads = layer["attention.heads"]
                _add_attention(tensors, f"{ours}.mixer", f"{theirs}.inner_mha_cls", heads)
            else:
                add_gated_convolution(tensors, f"{ours}.mixer", theirs)
                window = _window(config, index, *tensors.parameters.get(f"{ours}.mixer.taps", (1, 1)))
                _add_filter(tensors, f"{ours}.mixer", f"{theirs}.filter", layer["mixer"], window)
            add_block_frame(tensors, ours, theirs)
        tensors.add("norm.weight", "norm.scale")
        add_output(tensors, "embedding_layer.weight", "unembed.weight")
        tensors.ignored = (".rotary_emb.inv_freq", "._extra_state")


def _add_attention(tensors: TensorMap, ours: str, theirs: str, heads: int) -> None:
    rows, width = tensors.parameters[f"{ours}.q_proj.weight"]
    head_dim, columns = rows // heads, slice(0, width, 1)
    for projection, name in enumerate(("q", "k", "v")):
        for head in range(heads):
            first = (3 * head + projection) * head_dim
            tensors.add(
                f"{ours}.{name}_proj.weight",
                f"{theirs}.Wqkv.weight",
                rows=slice(head * head_dim, (head + 1) * head_dim),
                stored=(slice(first, first + head_dim, 1), columns),
                shape=(3 * rows, width),
            )
    add_norm(tensors, f"{ours}.out_proj", f"{theirs}.out_proj")


def _add_filter(tensors: TensorMap, ours: str, theirs: str, kind: str, window_FK: Tensor) -> None:
    if kind == "hyena_li":
        tensors.add(f"{ours}.log_rates", f"{theirs}.log_poles", axes=(0, 1, None), conversion=RATES)
        tensors.add(f"{ours}.residues", f"{theirs}.residues")
    elif kind == "hyena_mr":
        tensors.add(f"{ours}.taps", f"{theirs}.h", axes=(0, None, 1), conversion=_windowed(window_FK))
    else:
        groups, taps = tensors.parameters[f"{ours}.taps"]
        rows = slice(0, groups, 1)
        for lag in range(taps):
            place = (rows, slice(0, 1, 1), slice(taps - 1 - lag, taps - lag, 1))
            box = (rows, slice(lag, lag + 1, 1))
            shape = (groups, 1, taps)
            tensors.add(f"{ours}.taps", f"{theirs}.h", box=box, stored=place, shape=shape, axes=(0, None, 1))


RATES = Conversion(
    load=lambda log_poles, _: torch.log(-log_poles),
    store=lambda log_rates, _: -torch.exp(log_rates),
    limits="negative",
)


def _windowed(window_FK: Tensor) -> Conversion:
    """MR's taps are trained before their windows. What a window has erased altogether cannot be anything but zero."""

    def load(filter_FK: Tensor, box: Region) -> Tensor:
        part_FK = window_FK[box]
        taps_FK = torch.where(filter_FK == 0, 0.0, filter_FK / part_FK)
        return torch.where(taps_FK.abs() <= torch.finfo(torch.float32).max, taps_FK, torch.nan)

    return Conversion(load, lambda taps_FK, box: taps_FK * window_FK[box], "no larger than its window lets it be")


def _window(config: ModelConfig, index: int, groups: int, taps: int) -> Tensor:
    """(F, K), float64: MR's at layer `index`."""
    return decaying_window(getattr(config.mixer_options(config.plan[index]), "slowest", 1.0), groups, taps)


def _read_plan(stored: Stored) -> str:
    mixers = dict.fromkeys(stored.need("attn_layer_idxs"), "attention")
    for kind, name in KINDS.items():
        mixers |= dict.fromkeys(stored.need(f"{name}_layer_idxs"), kind)
    count = stored.need("num_layers")
    missing = [index for index in range(count) if index not in mixers]
    if missing:
        raise InterchangeError(f"{stored.origin}: no list of layers names layer {missing[0]}")
    first, *others = [mixers[index] for index in range(count)]
    return write_plan([f"{first}+mlp(kind=geglu)", *others])
