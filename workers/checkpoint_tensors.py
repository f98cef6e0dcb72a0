"""The tensors of a checkpoint and their names: parameters, buffers, and both moments of what is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .optimization import ShardedAdamW, moment_names

MODEL, OPTIMIZER, RANDOM = "model.", "optimizer.", "random.rank-"


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their name in a checkpoint, as aliases."""
    return {f"{MODEL}{name}": tensor for name, tensor in model.state_dict().items()}


def optimizer_tensors(optimizer: ShardedAdamW | None, without: Sequence[str] = ()) -> dict[str, Tensor]:
    """The optimiser's moments by their name in a checkpoint, as aliases; of parameters `without` none."""
    if optimizer is None:
        return {}
    left_out = {moment for name in without for moment in moment_names(name)}
    return {f"{OPTIMIZER}{key}": tensor for key, tensor in optimizer.state_dict().items() if key not in left_out}


def trained_in(saved: Mapping[str, Any]) -> list[str]:
    """The parameters of which moments were saved, by name."""
    marker = f"{OPTIMIZER}{moment_names('')[0]}"
    return [key.removeprefix(marker) for key in saved if key.startswith(marker)]


def check_fit(tensors: Mapping[str, Tensor], saved: Mapping[str, Any], name: str) -> None:
    """ValueError unless the checkpoint holds every one of `tensors` in its shape, and no other parameter."""
    for key, tensor in tensors.items():
        stored = saved.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            problem = "cannot be trained on" if key.startswith(OPTIMIZER) else "does not fit the model"
            raise ValueError(f"checkpoint {name} {problem}: it has no {key}")
        if stored.size != tensor.shape:
            raise ValueError(
                f"checkpoint {name} does not fit the model: {key} is {tuple(stored.size)} there and "
                f"{tuple(tensor.shape)} here"
            )
    extra = [key for key in saved if key.startswith(MODEL) and key not in tensors]
    if extra:
        raise ValueError(f"checkpoint {name} does not fit the model: the model has no {extra[0]}")
