"""Mamba-2 as transformers stores it: model_type `mamba2`, Mamba2ForCausalLM (Dao and Gu, arXiv 2405.21060)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .layout import Layout, Stored, first_of
from .mamba import map_backbone
from .mapping import TensorMap
from .parts import whole_number

ANY_STEP = [0.0, math.inf]


class HuggingFaceMamba2(Layout):
    """Mamba-2 and nothing else in every layer."""

    name = "mamba2"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "mamba2"

    def read_config(self, stored: Stored) -> dict[str, Any]:
        stored.only("hidden_act", "silu", "swish")
        stored.only("rms_norm", True)
        stored.only("norm_before_gate", False)
        stored.only("time_step_limit", ANY_STEP)
        width, expand = stored.need("hidden_size"), whole_number(stored, "expand", 2)
        heads, head_dim = stored.get("num_heads", 128), stored.get("head_dim", 64)
        if heads * head_dim != expand * width:
            raise stored.unsupported(
                "num_heads", heads, f"expand x hidden_size / head_dim = {expand * width / head_dim}"
            )
        return {
            "vocab_size": stored.need("vocab_size"),
            "width": width,
            "layers": f"[mamba2] x {stored.need('num_hidden_layers')}",
            "feed_forward": "none",
            "norm": "rms",
            "norm_eps": stored.get("layer_norm_epsilon", 1e-5),
            "tie_embeddings": stored.get("tie_word_embeddings", False),
            "init_std": stored.get("initializer_range", 0.1),
            "mamba2": {
                "state": stored.get("state_size", 128),
                "conv": stored.get("conv_kernel", 4),
                "expand": expand,
                "head_dim": head_dim,
                "groups": stored.get("n_groups", 8),
                "dt_min": stored.get("time_step_min", 1e-3),
                "dt_max": stored.get("time_step_max", 1e-1),
                "conv_bias": stored.get("use_conv_bias", True),
                "bias": stored.get("use_bias", False),
            },
        }

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        mamba2 = first_of(config, "mamba2")
        channels = mamba2.get("expand", 0) * config.width
        return {
            "model_type": "mamba2",
            "architectures": ["Mamba2ForCausalLM"],
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "num_hidden_layers": len(config.plan),
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "initializer_range": config.init_std,
            "hidden_act": "silu",
            "state_size": mamba2.get("state"),
            "conv_kernel": mamba2.get("conv"),
            "expand": mamba2.get("expand"),
            "num_heads": channels // mamba2.get("head_dim", 1),
            "head_dim": mamba2.get("head_dim"),
            "n_groups": mamba2.get("groups"),
            "time_step_min": config.mamba2.dt_min,
            "time_step_max": config.mamba2.dt_max,
            "use_conv_bias": mamba2.get("conv_bias"),
            "use_bias": mamba2.get("bias"),
        }

    def map_tensors(self, config: ModelConfig, tensors: TensorMap) -> None:
        map_backbone(config, tensors, "backbone.embeddings.weight")
