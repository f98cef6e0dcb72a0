"""StripedHyena-7B's own names (togethercomputer/stripedhyena), with or without `backbone.` before them.

Hyena layers with filters of a few complex modes, and attention in the layers `attn_layer_idxs`. The released config
lists more Hyena layers than there are: what counts is `num_layers`. Its norms are the fused ones, with epsilon under
the root (`use_flash_rmsnorm`); the others add epsilon to the root.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .layout import Layout, Stored, first_of, write_plan
from .mapping import TensorMap
from .parts import add_norm, add_output, add_same


class StripedHyena7B(Layout):
    """The model of December 2023; Evo 2 is another layout."""

    name = "striped-hyena-7b"
    mixers, feed_forwards = ("modal_hyena", "attention"), ("mlp",)
    prefix = "backbone."

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return "attn_layer_idxs" in config and "hyena_layer_idxs" in config

    def read_config(self, stored: Stored) -> dict[str, Any]:
        width = stored.need("hidden_size")
        # where a key is absent, the default of the authors' code
        stored.only("column_split_hyena", True)
        stored.only("short_filter_bias", True, default=False)
        stored.only("hyena_filter_groups", 1, default=width)
        stored.only("use_interpolated_rotary_pos_emb", False)
        stored.only("mlp_activation", "silu")
        attention = set(stored.need("attn_layer_idxs"))
        return read_frame(stored) | {
            "layers": write_plan(
                ["attention" if index in attention else "modal_hyena" for index in range(stored.need("num_layers"))]
            ),
            "modal_hyena": {
                "heads": stored.need("num_attention_heads"),
                "modes": stored.need("state_size"),
                "conv": stored.need("short_filter_length"),
            },
            "mlp": {"hidden": stored.get("inner_mlp_size", 64 * -(-int(8 * width / 3) // 64))},
        }

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        hyena = first_of(config, "modal_hyena")
        return {
            "model_type": "stripedhyena",
            **write_frame(config),
            "num_attention_heads": first_of(config, "attention").get("heads", hyena.get("heads", 1)),
            "hyena_layer_idxs": [index for index, layer in enumerate(config.plan) if layer.mixer != "attention"],
            "state_size": hyena.get("modes", 2),
            "short_filter_length": hyena.get("conv", 3),
            "short_filter_bias": True,
            "column_split_hyena": True,
            "column_split": False,
            "mlp_activation": "silu",
        }

    def map_tensors(self, config: ModelConfig, tensors: TensorMap) -> None:
        tensors.add("embedding.weight", "backbone.embedding_layer.weight")
        for index, layer in enumerate(config.plan):
            ours, theirs = f"blocks.{index}", f"backbone.blocks.{index}"
            if layer.mixer == "attention":
                projections = [f"{ours}.mixer.{name}_proj.weight" for name in ("q", "k", "v")]
                tensors.join(projections, f"{theirs}.inner_mha_cls.Wqkv.weight")
                add_norm(tensors, f"{ours}.mixer.out_proj", f"{theirs}.inner_mha_cls.out_proj")
            else:
                add_gated_convolution(tensors, f"{ours}.mixer", theirs)
                for name in ("poles", "residues"):
                    tensors.add(f"{ours}.mixer.{name}", f"{theirs}.filter.{name}", axes=(0, 1, None, 2))
            add_block_frame(tensors, ours, theirs)
        tensors.add("norm.weight", "backbone.norm.scale")
        add_output(tensors, "backbone.embedding_layer.weight", "backbone.unembed.weight")
        tensors.ignored = (".rotary_emb.inv_freq",)


def add_block_frame(tensors: TensorMap, ours: str, theirs: str) -> None:
    """A block's two norms and its gated feed-forward layer."""
    tensors.add(f"{ours}.mixer_norm.weight", f"{theirs}.pre_norm.scale")
    tensors.add(f"{ours}.feed_forward_norm.weight", f"{theirs}.post_norm.scale")
    tensors.split(f"{ours}.feed_forward.up_proj.weight", [f"{theirs}.mlp.l1.weight", f"{theirs}.mlp.l2.weight"])
    tensors.add(f"{ours}.feed_forward.down_proj.weight", f"{theirs}.mlp.l3.weight")


def add_gated_convolution(tensors: TensorMap, ours: str, theirs: str) -> None:
    """What all Hyena operators of both generations have around their filters."""
    add_norm(tensors, f"{ours}.in_proj", f"{theirs}.projections")
    tensors.add(f"{ours}.conv_weight", f"{theirs}.filter.short_filter_weight", axes=(0, None, 1))
    add_same(tensors, ours, theirs, {"conv_bias": "filter.short_filter_bias", "D": "filter.D"})
    add_norm(tensors, f"{ours}.out_proj", f"{theirs}.out_filter_dense")


def read_frame(stored: Stored) -> dict[str, Any]:
    """What StripedHyena and Evo 2 describe alike."""
    stored.only("num_filters", stored.need("hidden_size"))
    stored.only("final_norm", True)
    stored.only("smeared_gqa", False)
    stored.only("qkv_proj_bias", False, default=True)
    heads = stored.need("num_attention_heads")
    return {
        "vocab_size": stored.need("vocab_size"),
        "width": stored.need("hidden_size"),
        "feed_forward": "mlp",
        "norm": "rms" if stored.get("use_flash_rmsnorm", False) else "rms_outer",
        "norm_eps": stored.need("eps"),
        "tie_embeddings": stored.need("tie_embeddings"),
        "attention": {
            "heads": heads,
            "kv_heads": heads // stored.get("proj_groups", 1),
            "rotary_base": float(stored.get("rotary_emb_base", 10000.0)),
            "bias": "out" if stored.get("mha_out_proj_bias", True) else False,
        },
    }


def write_frame(config: ModelConfig) -> dict[str, Any]:
    attention = first_of(config, "attention")
    heads = attention.get("heads", 1)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_filters": config.width,
        "num_layers": len(config.plan),
        "attn_layer_idxs": [index for index, layer in enumerate(config.plan) if layer.mixer == "attention"],
        "num_attention_heads": heads,
        "proj_groups": heads // attention.get("kv_heads", heads),
        "rotary_emb_base": attention.get("rotary_base", 10000.0),
        "mha_out_proj_bias": attention.get("bias", False) == "out",
        "qkv_proj_bias": False,
        "inner_mlp_size": first_of(config, "mlp").get("hidden"),
        "hyena_filter_groups": 1,
        "eps": config.norm_eps,
        "use_flash_rmsnorm": config.norm == "rms",
        "final_norm": True,
        "tie_embeddings": config.tie_embeddings,
    }
