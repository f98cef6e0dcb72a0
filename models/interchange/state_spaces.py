"""Mamba and Mamba-2 as their authors store them: config.json with d_model and ssm_cfg (state-spaces/mamba)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .layout import Layout, Stored, first_of
from .mamba import map_backbone
from .mapping import TensorMap
from .parts import read_step_rank, whole_number

PADDED_TO = (16, 8)
"""To which the authors round vocabularies up, Mamba-2's and Mamba's."""


class StateSpaces(Layout):
    """The embedding has as many rows as the vocabulary rounded up to `pad_vocab_size_multiple`."""

    name = "state-spaces"
    mixers, feed_forwards = ("mamba", "mamba2"), ("none",)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return "d_model" in config and "n_layer" in config and "model_type" not in config

    def read_config(self, stored: Stored) -> dict[str, Any]:
        stored.only("d_intermediate", 0, None)
        stored.only("attn_layer_idx", [], None)
        multiple = stored.get("pad_vocab_size_multiple", 8)
        options = Stored(stored.get("ssm_cfg", {}), f"{stored.origin}: ssm_cfg")
        options.only("layer", "Mamba1", "Mamba2")
        kind = "mamba2" if options.get("layer") == "Mamba2" else "mamba"
        read = _read_mamba2 if kind == "mamba2" else _read_mamba
        return {
            "vocab_size": -(-stored.need("vocab_size") // multiple) * multiple,
            "width": stored.need("d_model"),
            "layers": f"[{kind}] x {stored.need('n_layer')}",
            "feed_forward": "none",
            "norm": "rms" if stored.get("rms_norm", True) else "layer",
            "tie_embeddings": stored.get("tie_embeddings", True),
            kind: read(options, stored.need("d_model")) | _read_common(options),
        }

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        mamba, mamba2 = first_of(config, "mamba"), first_of(config, "mamba2")
        options = mamba2 or mamba
        steps = config.mamba2 if mamba2 else config.mamba
        own = (
            {"headdim": mamba2["head_dim"], "ngroups": mamba2["groups"]}
            if mamba2
            else {"dt_rank": mamba.get("dt_rank")}
        )
        multiples = [multiple for multiple in PADDED_TO if config.vocab_size % multiple == 0]
        return {
            "d_model": config.width,
            "d_intermediate": 0,
            "n_layer": len(config.plan),
            "vocab_size": config.vocab_size,
            "ssm_cfg": {
                "layer": "Mamba2" if mamba2 else "Mamba1",
                "d_state": options.get("state"),
                "d_conv": options.get("conv"),
                "expand": options.get("expand"),
                **own,
                "dt_min": steps.dt_min,
                "dt_max": steps.dt_max,
                "conv_bias": options.get("conv_bias"),
                "bias": options.get("bias"),
            },
            "attn_layer_idx": [],
            "attn_cfg": {},
            "rms_norm": config.norm == "rms",
            "residual_in_fp32": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": max(multiples, default=1),
            "tie_embeddings": config.tie_embeddings,
        }

    def map_tensors(self, config: ModelConfig, tensors: TensorMap) -> None:
        map_backbone(config, tensors, "backbone.embedding.weight")


def _read_common(options: Stored) -> dict[str, Any]:
    return {
        "conv": options.get("d_conv", 4),
        "expand": whole_number(options, "expand", 2),
        "dt_min": options.get("dt_min", 1e-3),
        "dt_max": options.get("dt_max", 1e-1),
        "conv_bias": options.get("conv_bias", True),
        "bias": options.get("bias", False),
    }


def _read_mamba(options: Stored, width: int) -> dict[str, Any]:
    return {"state": options.get("d_state", 16), "dt_rank": read_step_rank(options, "dt_rank", width)}


def _read_mamba2(options: Stored, width: int) -> dict[str, Any]:
    options.only("rmsnorm", True)
    options.only("norm_before_gate", False)
    options.only("D_has_hdim", False)
    options.only("d_ssm", None, options.get("expand", 2) * width)
    options.only("dt_limit", [0.0, math.inf])
    return {
        "state": options.get("d_state", 128),
        "head_dim": options.get("headdim", 64),
        "groups": options.get("ngroups", 1),
    }
