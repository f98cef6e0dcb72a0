"""Parts that several layouts store alike."""

from __future__ import annotations

from collections.abc import Sequence

from .files import InterchangeError
from .layout import Stored
from .mapping import TensorMap


def add_same(tensors: TensorMap, ours: str, theirs: str, names: dict[str, str]) -> None:
    """Parameters that differ in nothing but their names, those that the model has; names relative to the prefixes."""
    for own, other in names.items():
        if f"{ours}.{own}" in tensors.parameters:
            tensors.add(f"{ours}.{own}", f"{theirs}.{other}")


def add_norm(tensors: TensorMap, ours: str, theirs: str) -> None:
    """A norm's weight, and bias where it has one."""
    add_same(tensors, ours, theirs, {"weight": "weight", "bias": "bias"})


def add_output(tensors: TensorMap, embedding: str, head: str) -> None:
    """The output layer; a tied one is not stored, but may have been."""
    if "head.weight" in tensors.parameters:
        tensors.add("head.weight", head)
    else:
        tensors.copies[head] = embedding


def add_attention(tensors: TensorMap, ours: str, theirs: str) -> None:
    """Llama's names; rows of queries and keys are in the same order (half-split rotation)."""
    for own, other in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj")):
        add_norm(tensors, f"{ours}.{own}", f"{theirs}.{other}")


def add_swiglu(tensors: TensorMap, ours: str, theirs: str) -> None:
    """Gate and up are two tensors."""
    for kind in ("weight", "bias"):
        if f"{ours}.up_proj.{kind}" in tensors.parameters:
            tensors.split(f"{ours}.up_proj.{kind}", [f"{theirs}.{name}_proj.{kind}" for name in ("gate", "up")])
            tensors.add(f"{ours}.down_proj.{kind}", f"{theirs}.down_proj.{kind}")


def add_experts(tensors: TensorMap, ours: str, theirs: str, names: Sequence[str]) -> None:
    """One tensor for each expert and matrix, with features out first; `names` of gate, up and down."""
    gate, up, down = names
    num_experts, width, both = tensors.parameters[f"{ours}.gate_up"]
    hidden = both // 2
    for expert in range(num_experts):
        one = slice(expert, expert + 1, 1)
        for name, start in ((gate, 0), (up, hidden)):
            box = (one, slice(0, width, 1), slice(start, start + hidden, 1))
            tensors.add(f"{ours}.gate_up", f"{theirs}.{expert}.{name}.weight", box=box, axes=(2, 1))
    for expert in range(num_experts):
        box = (slice(expert, expert + 1, 1), slice(0, hidden, 1), slice(0, width, 1))
        tensors.add(f"{ours}.down", f"{theirs}.{expert}.{down}.weight", box=box, axes=(2, 1))


def add_convolution(tensors: TensorMap, ours: str, theirs: str) -> None:
    """A short convolution (C, W) as torch stores it: (C, 1, W)."""
    tensors.add(f"{ours}.conv_weight", f"{theirs}.weight", axes=(0, None, 1))
    if f"{ours}.conv_bias" in tensors.parameters:
        tensors.add(f"{ours}.conv_bias", f"{theirs}.bias")


def add_mamba(tensors: TensorMap, ours: str, theirs: str) -> None:
    """Mamba's mixer with its authors' names, and Jamba's norms inside it where the model has them."""
    add_same(tensors, ours, theirs, {"A_log": "A_log", "D": "D"})
    add_convolution(tensors, ours, f"{theirs}.conv1d")
    for projection in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        add_norm(tensors, f"{ours}.{projection}", f"{theirs}.{projection}")
    for position, name in enumerate(("dt", "b", "c")):
        add_norm(tensors, f"{ours}.inner_norms.{position}", f"{theirs}.{name}_layernorm")


def add_mamba2(tensors: TensorMap, ours: str, theirs: str) -> None:
    """Mamba-2's mixer with its authors' names."""
    add_same(tensors, ours, theirs, {"dt_bias": "dt_bias", "A_log": "A_log", "D": "D"})
    add_convolution(tensors, ours, f"{theirs}.conv1d")
    for part in ("in_proj", "norm", "out_proj"):
        add_norm(tensors, f"{ours}.{part}", f"{theirs}.{part}")


def read_rotary_base(stored: Stored, default: float) -> float:
    """From `rope_parameters` (transformers 5) or `rope_theta` (before). InterchangeError: a scaled rotation."""
    values = stored.get("rope_parameters", {})
    for key, scaling in (("rope_parameters", values), ("rope_scaling", stored.get("rope_scaling", {}))):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default" or scaling.get("partial_rotary_factor", 1.0) != 1.0:
            raise stored.unsupported(key, scaling, "rope_type=default")
    stored.only("partial_rotary_factor", 1.0, None)
    return float(values.get("rope_theta", stored.get("rope_theta", default)))


def write_rotary_base(base: float | None) -> dict[str, object]:
    """For readers new and old."""
    if base is None:
        raise InterchangeError("its attention layers have no rotary positions")
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base}, "rope_theta": base}


def whole_number(stored: Stored, key: str, default: float) -> int:
    """A value that may be written as a float but must be whole."""
    value = stored.get(key, default)
    if value != int(value):
        raise stored.unsupported(key, value, "a whole number")
    return int(value)


def read_step_rank(stored: Stored, key: str, width: int) -> int:
    """The rank of Mamba's step sizes; "auto" is a sixteenth of the width."""
    rank = stored.get(key, "auto")
    return -(-width // 16) if rank == "auto" else int(rank)
