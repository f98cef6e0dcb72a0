"""Llama as transformers stores it: model_type `llama`, LlamaForCausalLM (Touvron et al., arXiv 2307.09288)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .layout import Layout, Stored, first_of, group_of
from .mapping import TensorMap
from .parts import add_attention, add_norm, add_output, add_swiglu, read_rotary_base, write_rotary_base


class Llama(Layout):
    """Rotary attention and SwiGLU in every layer."""

    name = "llama"
    mixers, feed_forwards = ("attention",), ("mlp",)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "llama"

    def read_config(self, stored: Stored) -> dict[str, Any]:
        stored.only("mlp_bias", False, True)
        return read_frame(stored, norm_eps=1e-6, tied=False) | {
            "layers": f"[attention] x {stored.need('num_hidden_layers')}",
            "feed_forward": "mlp",
            "attention": read_attention(stored, rotary_base=read_rotary_base(stored, 10000.0)),
            "mlp": {"hidden": stored.need("intermediate_size"), "bias": stored.get("mlp_bias", False)},
        }

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        attention, mlp = first_of(config, "attention"), first_of(config, "mlp")
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            **write_frame(config),
            **write_attention(config),
            **write_rotary_base(attention.get("rotary_base")),
            "attention_bias": attention.get("bias", False),
            "intermediate_size": mlp.get("hidden"),
            "mlp_bias": mlp.get("bias", False),
        }

    def map_tensors(self, config: ModelConfig, tensors: TensorMap) -> None:
        tensors.add("embedding.weight", "model.embed_tokens.weight")
        for index in range(len(config.plan)):
            ours, theirs = f"blocks.{index}", f"model.layers.{index}"
            add_norm(tensors, f"{ours}.mixer_norm", f"{theirs}.input_layernorm")
            add_attention(tensors, f"{ours}.mixer", f"{theirs}.self_attn")
            add_norm(tensors, f"{ours}.feed_forward_norm", f"{theirs}.post_attention_layernorm")
            self.map_feed_forward(tensors, f"{ours}.feed_forward", theirs)
        add_norm(tensors, "norm", "model.norm")
        add_output(tensors, "model.embed_tokens.weight", "lm_head.weight")
        tensors.ignored = (".rotary_emb.inv_freq",)

    def map_feed_forward(self, tensors: TensorMap, ours: str, layer: str) -> None:
        add_swiglu(tensors, ours, f"{layer}.mlp")


def read_frame(stored: Stored, *, norm_eps: float, tied: bool) -> dict[str, Any]:
    """What Llama, Mixtral and Jamba describe alike; the layout's defaults."""
    stored.only("hidden_act", "silu", "swish")
    return {
        "vocab_size": stored.need("vocab_size"),
        "width": stored.need("hidden_size"),
        "norm": "rms",
        "norm_eps": stored.get("rms_norm_eps", norm_eps),
        "tie_embeddings": stored.get("tie_word_embeddings", tied),
        "init_std": stored.get("initializer_range", 0.02),
    }


def write_frame(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(config.plan),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
    }


def read_attention(stored: Stored, *, rotary_base: float | None, kv_heads: int | None = None) -> dict[str, Any]:
    heads = stored.need("num_attention_heads")
    return {
        "heads": heads,
        "kv_heads": stored.get("num_key_value_heads", kv_heads or heads),
        "head_dim": stored.get("head_dim"),
        "rotary_base": rotary_base,
        "bias": stored.get("attention_bias", False),
    }


def write_attention(config: ModelConfig) -> dict[str, Any]:
    """Of the first attention layer; of the config where no layer has any."""
    attention = first_of(config, "attention") or group_of(config, "attention")
    heads, head_dim = attention["heads"], attention["head_dim"]
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": attention["kv_heads"],
        **({"head_dim": head_dim} if head_dim * heads != config.width else {}),
    }
