"""Mamba as transformers stores it: model_type `mamba`, MambaForCausalLM (Gu and Dao, arXiv 2312.00752)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .layout import Layout, Stored, first_of
from .mapping import TensorMap
from .parts import add_mamba, add_mamba2, add_norm, add_output, read_step_rank, whole_number


class HuggingFaceMamba(Layout):
    """Mamba and nothing else in every layer."""

    name = "mamba"
    mixers, feed_forwards = ("mamba",), ("none",)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "mamba"

    def read_config(self, stored: Stored) -> dict[str, Any]:
        dt_rank = read_step_rank(stored, "time_step_rank", stored.need("hidden_size"))
        return read_frame(stored, "mamba", tied=True, state=16, own={"dt_rank": dt_rank})

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        mamba = first_of(config, "mamba")
        return {
            "model_type": "mamba",
            "architectures": ["MambaForCausalLM"],
            **write_frame(config, "mamba"),
            "intermediate_size": mamba.get("expand", 0) * config.width,
            "time_step_rank": mamba.get("dt_rank"),
        }

    def map_tensors(self, config: ModelConfig, tensors: TensorMap) -> None:
        map_backbone(config, tensors, "backbone.embeddings.weight")


def read_frame(stored: Stored, kind: str, *, tied: bool, state: int, own: dict[str, Any]) -> dict[str, Any]:
    """What Mamba and Mamba-2 describe alike; the layout's defaults, and the mixer's `own` options."""
    stored.only("hidden_act", "silu", "swish")
    return {
        "vocab_size": stored.need("vocab_size"),
        "width": stored.need("hidden_size"),
        "layers": f"[{kind}] x {stored.need('num_hidden_layers')}",
        "feed_forward": "none",
        "norm": "rms",
        "norm_eps": stored.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": stored.get("tie_word_embeddings", tied),
        "init_std": stored.get("initializer_range", 0.1),
        kind: {
            "state": stored.get("state_size", state),
            "conv": stored.get("conv_kernel", 4),
            "expand": whole_number(stored, "expand", 2),
            "dt_min": stored.get("time_step_min", 1e-3),
            "dt_max": stored.get("time_step_max", 1e-1),
            "conv_bias": stored.get("use_conv_bias", True),
            "bias": stored.get("use_bias", False),
            **own,
        },
    }


def write_frame(config: ModelConfig, kind: str) -> dict[str, Any]:
    options, steps = first_of(config, kind), getattr(config, kind)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(config.plan),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "state_size": options.get("state"),
        "conv_kernel": options.get("conv"),
        "expand": options.get("expand"),
        "time_step_min": steps.dt_min,
        "time_step_max": steps.dt_max,
        "use_conv_bias": options.get("conv_bias"),
        "use_bias": options.get("bias"),
    }


def map_backbone(config: ModelConfig, tensors: TensorMap, embedding: str) -> None:
    """The authors' names for Mamba's and Mamba-2's layers, but for the embedding's."""
    tensors.add("embedding.weight", embedding)
    for index, layer in enumerate(config.plan):
        add_norm(tensors, f"blocks.{index}.mixer_norm", f"backbone.layers.{index}.norm")
        add_mixer = add_mamba if layer.mixer == "mamba" else add_mamba2
        add_mixer(tensors, f"blocks.{index}.mixer", f"backbone.layers.{index}.mixer")
    add_norm(tensors, "norm", "backbone.norm_f")
    add_output(tensors, embedding, "lm_head.weight")
