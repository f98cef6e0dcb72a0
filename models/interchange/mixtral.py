"""Mixtral as transformers stores it: model_type `mixtral`, MixtralForCausalLM (Jiang et al., arXiv 2401.04088).

The files hold each expert's matrices by themselves (w1 gate, w2 down, w3 up); that transformers 5 fuses them in memory
does not show in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .layout import Stored, first_of
from .llama import Llama, read_attention, read_frame, write_attention, write_frame
from .mapping import TensorMap
from .parts import add_experts, read_rotary_base, write_rotary_base


class Mixtral(Llama):
    """Llama with experts in place of SwiGLU; the chosen experts' probabilities are renormalised."""

    name = "mixtral"
    mixers, feed_forwards = ("attention",), ("moe",)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "mixtral"

    def read_config(self, stored: Stored) -> dict[str, Any]:
        stored.only("attention_bias", False)
        return read_frame(stored, norm_eps=1e-5, tied=False) | {
            "layers": f"[attention] x {stored.need('num_hidden_layers')}",
            "feed_forward": "moe",
            "attention": {
                **read_attention(stored, rotary_base=read_rotary_base(stored, 1e6), kv_heads=8),
                "window": stored.get("sliding_window"),
            },
            "moe": {
                "experts": stored.get("num_local_experts", 8),
                "top_k": stored.get("num_experts_per_tok", 2),
                "hidden": stored.need("intermediate_size"),
                "renormalise": True,
                "balance_loss": stored.get("router_aux_loss_coef", 0.001),
            },
        }

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        attention, moe = first_of(config, "attention"), first_of(config, "moe")
        return {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            **write_frame(config),
            **write_attention(config),
            **write_rotary_base(attention.get("rotary_base")),
            "intermediate_size": moe.get("hidden"),
            "num_local_experts": moe.get("experts"),
            "num_experts_per_tok": moe.get("top_k"),
            "router_aux_loss_coef": config.moe.balance_loss,
            "sliding_window": attention.get("window"),
        }

    def map_feed_forward(self, tensors: TensorMap, ours: str, layer: str) -> None:
        tensors.add(f"{ours}.router.weight", f"{layer}.block_sparse_moe.gate.weight")
        add_experts(tensors, f"{ours}.experts", f"{layer}.block_sparse_moe.experts", ("w1", "w3", "w2"))
