"""RWKV-4 as transformers stores it: model_type `rwkv`, RwkvForCausalLM (Peng et al., arXiv 2305.13048).

`rescale_every` halves activations every so many layers for float16; it is written as 0, which computes what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .layout import Layout, Stored, first_of
from .mapping import TensorMap
from .parts import add_norm, add_output, add_same

NORM_EPS = 1e-5
"""transformers' last norm has it whatever its config says, so that other values would not be one model."""


class HuggingFaceRWKV(Layout):
    """Time mix and channel mix in every layer, and a norm after the embedding."""

    name = "rwkv"
    mixers, feed_forwards = ("rwkv4",), ("channel_mix",)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "rwkv"

    def read_config(self, stored: Stored) -> dict[str, Any]:
        width = stored.need("hidden_size")
        stored.only("attention_hidden_size", width, None)
        stored.only("layer_norm_epsilon", NORM_EPS)
        return {
            "vocab_size": stored.need("vocab_size"),
            "width": width,
            "layers": f"[rwkv4] x {stored.need('num_hidden_layers')}",
            "feed_forward": "channel_mix",
            "channel_mix": {"hidden": stored.get("intermediate_size", 4 * width)},
            "norm": "layer",
            "norm_eps": NORM_EPS,
            "embedding_norm": True,
            "tie_embeddings": stored.get("tie_word_embeddings", False),
        }

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "model_type": "rwkv",
            "architectures": ["RwkvForCausalLM"],
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "attention_hidden_size": config.width,
            "intermediate_size": first_of(config, "channel_mix").get("hidden"),
            "num_hidden_layers": len(config.plan),
            "layer_norm_epsilon": NORM_EPS,
            "tie_word_embeddings": config.tie_embeddings,
            "rescale_every": 0,
        }

    def map_tensors(self, config: ModelConfig, tensors: TensorMap) -> None:
        tensors.add("embedding.weight", "rwkv.embeddings.weight")
        add_norm(tensors, "embedding_norm", "rwkv.blocks.0.pre_ln")
        for index in range(len(config.plan)):
            ours, theirs = f"blocks.{index}", f"rwkv.blocks.{index}"
            add_norm(tensors, f"{ours}.mixer_norm", f"{theirs}.ln1")
            _add_mix(tensors, f"{ours}.mixer", f"{theirs}.attention")
            add_norm(tensors, f"{ours}.feed_forward_norm", f"{theirs}.ln2")
            _add_mix(tensors, f"{ours}.feed_forward", f"{theirs}.feed_forward")
        add_norm(tensors, "norm", "rwkv.ln_out")
        add_output(tensors, "rwkv.embeddings.weight", "head.weight")


def _add_mix(tensors: TensorMap, ours: str, theirs: str) -> None:
    """Time mix or channel mix: what each has of these."""
    add_same(tensors, ours, theirs, {name: name for name in ("time_decay", "time_first")})
    for stream in ("key", "value", "receptance"):
        if f"{ours}.mix_{stream}" in tensors.parameters:
            tensors.add(f"{ours}.mix_{stream}", f"{theirs}.time_mix_{stream}", axes=(None, None, 0))
    for matrix in ("key", "value", "receptance", "output"):
        add_norm(tensors, f"{ours}.{matrix}", f"{theirs}.{matrix}")
