"""Jamba as transformers stores it: model_type `jamba`, JambaForCausalLM (Lieber et al., arXiv 2403.19887).

Mamba with norms on delta, B and C; attention without positions, and experts, each in one of so many layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import ModelConfig
from .layout import Layout, Stored, first_of, layer_options, write_plan
from .llama import read_attention, read_frame, write_attention, write_frame
from .mapping import TensorMap
from .parts import (
    add_attention,
    add_experts,
    add_mamba,
    add_norm,
    add_output,
    add_swiglu,
    read_step_rank,
    whole_number,
)


class Jamba(Layout):
    """The plan is written as two periods and offsets: of attention, and of experts."""

    name = "jamba"
    mixers, feed_forwards = ("mamba", "attention"), ("mlp", "moe")

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "jamba"

    def read_config(self, stored: Stored) -> dict[str, Any]:
        stored.only("sliding_window", None)
        stored.only("attention_bias", False)
        hidden = stored.need("intermediate_size")
        num_experts = stored.get("num_experts", stored.get("num_local_experts", 16))
        description = read_frame(stored, norm_eps=1e-6, tied=False) | {
            "layers": _read_plan(stored, num_experts),
            "attention": read_attention(stored, rotary_base=None, kv_heads=8),
            "mamba": {
                "state": stored.get("mamba_d_state", 16),
                "conv": stored.get("mamba_d_conv", 4),
                "expand": whole_number(stored, "mamba_expand", 2),
                "dt_rank": read_step_rank(stored, "mamba_dt_rank", stored.need("hidden_size")),
                "conv_bias": stored.get("mamba_conv_bias", True),
                "bias": stored.get("mamba_proj_bias", False),
                "inner_norms": True,
            },
            "mlp": {"hidden": hidden},
            "moe": {"balance_loss": stored.get("router_aux_loss_coef", 0.001)},
        }
        if num_experts > 1:
            top_k = stored.get("num_experts_per_tok", 2)
            description["moe"] |= {"experts": num_experts, "top_k": top_k, "hidden": hidden, "renormalise": False}
        return description

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        mamba, mlp, moe = (first_of(config, kind) for kind in ("mamba", "mlp", "moe"))
        layers = layer_options(config)
        attention = _period([layer["mixer"] == "attention" for layer in layers])
        experts = _period([layer["feed_forward"] == "moe" for layer in layers])
        return {
            "model_type": "jamba",
            "architectures": ["JambaForCausalLM"],
            **write_frame(config),
            **write_attention(config),
            "attn_layer_period": attention[0],
            "attn_layer_offset": attention[1],
            "expert_layer_period": experts[0],
            "expert_layer_offset": experts[1],
            "intermediate_size": mlp.get("hidden", moe.get("hidden")),
            "num_experts": moe.get("experts", 1),
            "num_experts_per_tok": moe.get("top_k", config.moe.top_k),
            "router_aux_loss_coef": config.moe.balance_loss,
            "mamba_d_state": mamba.get("state"),
            "mamba_d_conv": mamba.get("conv"),
            "mamba_expand": mamba.get("expand"),
            "mamba_dt_rank": mamba.get("dt_rank"),
            "mamba_conv_bias": mamba.get("conv_bias"),
            "mamba_proj_bias": mamba.get("bias"),
        }

    def map_tensors(self, config: ModelConfig, tensors: TensorMap) -> None:
        tensors.add("embedding.weight", "model.embed_tokens.weight")
        for index, layer in enumerate(layer_options(config)):
            ours, theirs = f"blocks.{index}", f"model.layers.{index}"
            add_norm(tensors, f"{ours}.mixer_norm", f"{theirs}.input_layernorm")
            if layer["mixer"] == "attention":
                add_attention(tensors, f"{ours}.mixer", f"{theirs}.self_attn")
            else:
                add_mamba(tensors, f"{ours}.mixer", f"{theirs}.mamba")
            add_norm(tensors, f"{ours}.feed_forward_norm", f"{theirs}.pre_ff_layernorm")
            if layer["feed_forward"] == "moe":
                tensors.add(f"{ours}.feed_forward.router.weight", f"{theirs}.feed_forward.router.weight")
                names = ("gate_proj", "up_proj", "down_proj")
                add_experts(tensors, f"{ours}.feed_forward.experts", f"{theirs}.feed_forward.experts", names)
            else:
                add_swiglu(tensors, f"{ours}.feed_forward", f"{theirs}.feed_forward")
        add_norm(tensors, "norm", "model.final_layernorm")
        add_output(tensors, "model.embed_tokens.weight", "lm_head.weight")


def _read_plan(stored: Stored, num_experts: int) -> str:
    def chosen(kind: str, period: int, offset: int) -> list[bool]:
        period, offset = stored.get(f"{kind}_layer_period", period), stored.get(f"{kind}_layer_offset", offset)
        return [index % period == offset for index in range(stored.need("num_hidden_layers"))]

    return write_plan(
        [
            f"{'attention' if attention else 'mamba'}+{'moe' if experts and num_experts > 1 else 'mlp'}"
            for attention, experts in zip(chosen("attn", 8, 4), chosen("expert", 2, 1), strict=True)
        ]
    )


def _period(chosen: Sequence[bool]) -> tuple[int, int]:
    """The period and offset that choose these layers; those of none where no period does."""
    for period in range(1, len(chosen) + 1):
        for offset in range(period):
            if list(chosen) == [index % period == offset for index in range(len(chosen))]:
                return period, offset
    return len(chosen) + 1, len(chosen)
