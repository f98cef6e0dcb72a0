"""Mamba-2 as transformers stores it: model_type `mamba2`, Mamba2ForCausalLM (Dao and Gu, arXiv 2405.21060)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .layout import Layout, Stored, first_of
from .mamba import map_backbone, read_frame, write_frame
from .mapping import TensorMap
from .parts import whole_number

ANY_STEP = [0.0, math.inf]


class HuggingFaceMamba2(Layout):
    """Mamba-2 and nothing else in every layer."""

    name = "mamba2"
    mixers, feed_forwards = ("mamba2",), ("none",)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "mamba2"

    def read_config(self, stored: Stored) -> dict[str, Any]:
        stored.only("rms_norm", True)
        stored.only("norm_before_gate", False)
        stored.only("time_step_limit", ANY_STEP)
        width, expand = stored.need("hidden_size"), whole_number(stored, "expand", 2)
        heads, head_dim = stored.get("num_heads", 128), stored.get("head_dim", 64)
        if heads * head_dim != expand * width:
            raise stored.unsupported(
                "num_heads", heads, f"expand x hidden_size / head_dim = {expand * width / head_dim}"
            )
        own = {"head_dim": head_dim, "groups": stored.get("n_groups", 8)}
        return read_frame(stored, "mamba2", tied=False, state=128, own=own)

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        mamba2 = first_of(config, "mamba2")
        channels = mamba2.get("expand", 0) * config.width
        return {
            "model_type": "mamba2",
            "architectures": ["Mamba2ForCausalLM"],
            **write_frame(config, "mamba2"),
            "num_heads": channels // mamba2.get("head_dim", 1),
            "head_dim": mamba2.get("head_dim"),
            "n_groups": mamba2.get("groups"),
        }

    def map_tensors(self, config: ModelConfig, tensors: TensorMap) -> None:
        map_backbone(config, tensors, "backbone.embeddings.weight")
